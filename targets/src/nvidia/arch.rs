//! What differs between NVIDIA architectures, as data.
//!
//! Limits are those of the CUDA programming guide's table of technical specifications; PTX versions are the lowest with all that
//! the lowering emits there, so that old drivers load the code too.

use dsc_ir::artifact::Resources;
use dsc_ir::schedule::Teams;

/// One architecture that code is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arch {
    /// The name that `--target` takes, which is also what LLVM and ptxas call it.
    pub name: &'static str,
    /// Version of the PTX that is written, times ten.
    pub ptx: u32,
    /// Bytes of shared memory that one block can have, static and dynamic together.
    pub shared_per_block: u32,
    /// Bytes of shared memory of a multiprocessor; every block takes [`Arch::SHARED_RESERVED`] more than it asks for.
    pub shared_per_sm: u32,
    /// Warps a multiprocessor holds at a time.
    pub warps_per_sm: u32,
    /// Blocks a multiprocessor holds at a time.
    pub blocks_per_sm: u32,
    /// Tensor cores multiply e4m3 (`mma.sync` at least), and f32 is converted to e4m3 by an instruction.
    pub has_fp8_mma: bool,
    /// Warpgroups multiply from shared memory (`wgmma`), and registers move between warps (`setmaxnreg`).
    pub has_wgmma: bool,
    /// Tiles are copied by descriptor (`cp.async.bulk.tensor`); clusters, `elect.sync`, `stmatrix` and dependent launch come with it.
    pub has_tma: bool,
    /// f32 is divided as IEEE 754 has it; else within two units in the last place, without a branch.
    pub exact_division: bool,
    /// The device that schedules are chosen for.
    pub device: Device,
}

/// A device of an architecture, from its vendor's data sheet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    /// What it is sold as.
    pub name: &'static str,
    /// Multiprocessors.
    pub sms: u32,
    /// Boost clock in MHz.
    pub clock_mhz: u32,
    /// Blocks, and clusters of two, that take a multiprocessor each and run at once. (Clusters of more do not fill the device: multiprocessors are in
    /// groups of unlike size.)
    pub teams: Teams,
}

impl Arch {
    /// 32-bit registers of a multiprocessor.
    pub const REGISTERS_PER_SM: u32 = 65536;
    /// Registers a thread can have.
    pub const REGISTERS_PER_THREAD: u32 = 255;
    /// Threads of a warp.
    pub const WARP: u32 = 32;
    /// Threads a block can have.
    pub const THREADS_PER_BLOCK: u32 = 1024;
    /// Bytes of shared memory that the system takes of each block.
    pub const SHARED_RESERVED: u32 = 1024;
    /// Registers are given to warps in units of this many.
    const REGISTER_UNIT: u32 = 256;

    /// The architecture of that name.
    pub fn named(name: &str) -> Option<&'static Arch> {
        ARCHS.iter().find(|a| a.name == name)
    }

    /// LLVM's subtarget features.
    pub fn llvm_features(&self) -> String {
        format!("+ptx{}", self.ptx)
    }

    /// Registers that each thread of so many `blocks` of a multiprocessor can have.
    pub fn registers(blocks: u32, threads: u32) -> u32 {
        // Each of the four schedulers has its own quarter of the registers.
        let warps = (blocks * threads.div_ceil(Arch::WARP)).div_ceil(4).max(1);
        let per_warp = Arch::REGISTERS_PER_SM / 4 / warps / Arch::REGISTER_UNIT * Arch::REGISTER_UNIT;
        per_warp / Arch::WARP
    }

    /// Blocks of `threads` threads, with `dynamic` bytes of dynamic shared memory and what `resources` says, that a multiprocessor
    /// holds at a time; 0 if not even one fits.
    pub fn occupancy(&self, threads: u32, dynamic: u32, resources: &Resources) -> u32 {
        let warps = threads.div_ceil(Arch::WARP).max(1);
        let per_warp = (resources.registers.max(1) * Arch::WARP).next_multiple_of(Arch::REGISTER_UNIT);
        // Each of the four schedulers has its own quarter of the registers.
        let by_registers = Arch::REGISTERS_PER_SM / 4 / per_warp * 4 / warps;
        let shared = u64::from(dynamic) + u64::from(resources.static_shared_bytes);
        if shared > u64::from(self.shared_per_block) || threads > Arch::THREADS_PER_BLOCK {
            return 0;
        }
        let by_shared = self.shared_per_sm / (shared as u32 + Arch::SHARED_RESERVED);
        self.blocks_per_sm.min(self.warps_per_sm / warps).min(by_registers).min(by_shared)
    }
}

const KIB: u32 = 1024;

const NO_TEAMS: Teams = Teams { blocks: 0, pairs: 0 };

/// Every architecture that code is made for, the oldest first.
pub const ARCHS: &[Arch] = &[
    Arch {
        name: "sm_80",
        ptx: 80,
        shared_per_block: 163 * KIB,
        shared_per_sm: 164 * KIB,
        warps_per_sm: 64,
        blocks_per_sm: 32,
        has_fp8_mma: false,
        has_wgmma: false,
        has_tma: false,
        exact_division: true,
        device: Device { name: "A100", sms: 108, clock_mhz: 1410, teams: NO_TEAMS },
    },
    Arch {
        name: "sm_89",
        ptx: 84,
        shared_per_block: 99 * KIB,
        shared_per_sm: 100 * KIB,
        warps_per_sm: 48,
        blocks_per_sm: 24,
        has_fp8_mma: true,
        has_wgmma: false,
        has_tma: false,
        exact_division: true,
        device: Device { name: "L40S", sms: 142, clock_mhz: 2520, teams: NO_TEAMS },
    },
    Arch {
        name: "sm_90a",
        ptx: 86,
        shared_per_block: 227 * KIB,
        shared_per_sm: 228 * KIB,
        warps_per_sm: 64,
        blocks_per_sm: 32,
        has_fp8_mma: true,
        has_wgmma: true,
        has_tma: true,
        exact_division: true,
        device: Device { name: "H200", sms: 132, clock_mhz: 1980, teams: Teams { blocks: 132, pairs: 66 } },
    },
    Arch {
        name: "sm_100a",
        ptx: 86,
        shared_per_block: 227 * KIB,
        shared_per_sm: 228 * KIB,
        warps_per_sm: 64,
        blocks_per_sm: 32,
        has_fp8_mma: true,
        has_wgmma: false,
        has_tma: true,
        exact_division: true,
        device: Device { name: "B200", sms: 148, clock_mhz: 1965, teams: NO_TEAMS },
    },
    Arch {
        name: "sm_120a",
        ptx: 87,
        shared_per_block: 99 * KIB,
        shared_per_sm: 100 * KIB,
        warps_per_sm: 48,
        blocks_per_sm: 24,
        has_fp8_mma: true,
        has_wgmma: false,
        has_tma: true,
        exact_division: true,
        device: Device { name: "RTX 5090", sms: 170, clock_mhz: 2407, teams: NO_TEAMS },
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    fn uses(registers: u32, static_shared_bytes: u32) -> Resources {
        Resources { registers, static_shared_bytes, ..Resources::default() }
    }

    #[test]
    fn each_resource_can_be_the_one_that_limits() {
        let hopper = Arch::named("sm_90a").unwrap();
        // By the numbers of the occupancy calculator that comes with CUDA.
        assert_eq!(hopper.occupancy(128, 0, &uses(32, 0)), 16);
        assert_eq!(hopper.occupancy(32, 0, &uses(16, 0)), 32);
        assert_eq!(hopper.occupancy(384, 0, &uses(168, 0)), 1);
        assert_eq!(hopper.occupancy(128, 0, &uses(168, 0)), 3);
        assert_eq!(hopper.occupancy(128, 100 * KIB, &uses(32, 0)), 2);
        assert_eq!(hopper.occupancy(128, 227 * KIB, &uses(32, 0)), 1);
        assert_eq!(hopper.occupancy(128, 227 * KIB, &uses(32, 16)), 0);
        assert_eq!(Arch::named("sm_89").unwrap().occupancy(1024, 0, &uses(32, 0)), 1);
    }

    #[test]
    fn threads_have_the_registers_that_blocks_leave_them() {
        let of_two = |threads| Arch::registers(2, threads);
        assert_eq!([128, 160, 192, 288, 320, 384].map(of_two), [256, 168, 168, 96, 96, 80]);
        let hopper = Arch::named("sm_90a").unwrap();
        for threads in [160, 288, 320, 384] {
            let held = |registers| hopper.occupancy(threads, 0, &uses(registers, 0));
            assert!(held(of_two(threads)) >= 2 && held(of_two(threads) + 8) < 2, "{threads} threads");
        }
    }
}
