//! What differs between AMD chips, as data: the ISA documents of CDNA 3 and CDNA 4, LLVM's AMDGPU usage document, and data sheets.

use dsc_ir::artifact::Resources;

/// One chip that code is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arch {
    /// The name that `--target` takes, which is also LLVM's.
    pub name: &'static str,
    /// Bytes of LDS of a compute unit, which one block can have.
    pub lds_bytes: u32,
    /// LDS is given to blocks in units of this many bytes.
    pub lds_unit: u32,
    /// Codes of e4m3 that instructions take.
    pub fp8: Fp8,
    /// The wider products of CDNA 4: 16x16x32 of bf16 and f16, 16x16x128 of e4m3; f32 to bf16 in an instruction.
    pub cdna4: bool,
    /// Bytes of a lane's registers for loads a round ahead of products.
    pub ahead_bytes: u32,
    /// Bytes of a lane that go from global memory to LDS in an instruction.
    pub copy_bytes: u32,
    /// The device that schedules are chosen for.
    pub device: Device,
}

/// What eight bits mean as e4m3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fp8 {
    /// OCP: exponents from a bias of 7, NaN at 0x7f and 0xff. What memory holds.
    Ocp,
    /// FNUZ: exponents from a bias of 8, so that a code means half as much; NaN at 0x80, where OCP has −0.
    Fnuz,
}

/// A device, from its data sheet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    /// What it is sold as.
    pub name: &'static str,
    /// Compute units.
    pub units: u32,
    /// Dies (XCDs) that blocks are dealt to in turn, each with an L2 of its own.
    pub dies: u32,
    /// Peak engine clock in MHz.
    pub clock_mhz: u32,
}

impl Arch {
    /// Threads of a wave.
    pub const WAVE: u32 = 64;
    /// Registers of a SIMD that each lane has, vector and accumulator together.
    pub const REGISTERS: u32 = 512;
    /// Waves a SIMD holds at a time.
    pub const WAVES_PER_SIMD: u32 = 8;
    /// SIMDs of a compute unit.
    pub const SIMDS: u32 = 4;
    /// Threads a block can have.
    pub const THREADS_PER_BLOCK: u32 = 1024;
    /// Registers are given to waves in units of this many.
    const REGISTER_UNIT: u32 = 8;
    /// Blocks of more than one wave that a compute unit holds at a time.
    const BLOCKS_PER_UNIT: u32 = 16;

    /// The chip of that name.
    pub fn named(name: &str) -> Option<&'static Arch> {
        ARCHS.iter().find(|a| a.name == name)
    }

    /// Blocks of `threads` threads, with what `resources` says, that a compute unit holds at a time; 0 if not even one fits.
    pub fn occupancy(&self, threads: u32, resources: &Resources) -> u32 {
        let waves = threads.div_ceil(Arch::WAVE).max(1);
        let registers = resources.registers.max(1).next_multiple_of(Arch::REGISTER_UNIT);
        let lds = resources.static_shared_bytes.next_multiple_of(self.lds_unit);
        if threads > Arch::THREADS_PER_BLOCK || lds > self.lds_bytes || registers > Arch::REGISTERS {
            return 0;
        }
        let per_simd = (Arch::REGISTERS / registers).min(Arch::WAVES_PER_SIMD);
        let by_waves = per_simd * Arch::SIMDS / waves;
        by_waves.min(self.lds_bytes.checked_div(lds).unwrap_or(u32::MAX)).min(Arch::BLOCKS_PER_UNIT)
    }
}

const KIB: u32 = 1024;

/// Every chip that code is made for, the oldest first.
pub const ARCHS: &[Arch] = &[
    Arch {
        name: "gfx942",
        lds_bytes: 64 * KIB,
        lds_unit: 512,
        fp8: Fp8::Fnuz,
        cdna4: false,
        ahead_bytes: 320,
        copy_bytes: 4,
        device: Device { name: "MI300X", units: 304, dies: 8, clock_mhz: 2100 },
    },
    Arch {
        name: "gfx950",
        lds_bytes: 160 * KIB,
        lds_unit: 1280,
        fp8: Fp8::Ocp,
        cdna4: true,
        ahead_bytes: 320,
        copy_bytes: 16,
        device: Device { name: "MI355X", units: 256, dies: 8, clock_mhz: 2400 },
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_resource_can_be_the_one_that_limits() {
        let chip = Arch::named("gfx942").unwrap();
        let uses =
            |registers, static_shared_bytes| Resources { registers, static_shared_bytes, ..Resources::default() };
        assert_eq!(chip.occupancy(256, &uses(64, 0)), 8);
        assert_eq!(chip.occupancy(256, &uses(128, 0)), 4);
        assert_eq!(chip.occupancy(256, &uses(129, 0)), 3);
        assert_eq!(chip.occupancy(256, &uses(512, 0)), 1);
        assert_eq!(chip.occupancy(512, &uses(512, 0)), 0);
        assert_eq!(chip.occupancy(128, &uses(16, 0)), 16);
        assert_eq!(chip.occupancy(256, &uses(32, 32 * KIB)), 2);
        assert_eq!(chip.occupancy(256, &uses(32, 32 * KIB + 4)), 1);
        assert_eq!(chip.occupancy(256, &uses(32, 64 * KIB + 4)), 0);
    }
}
