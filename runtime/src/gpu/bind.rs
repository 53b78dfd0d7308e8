//! Launches with their addresses: what a kernel's parameters point to, checked once.

use super::code::Kernel;
use super::context::Context;
use super::driver::Address;
use dsc_ir::artifact::{GpuKernel, KernelEntry, ParamEntry, TensorMap};
use dsc_ir::{DType, Sym, SymValues};
use std::ffi::c_void;

/// Size and distance that a tensor map holds.
const MAX_MAP_STRIDE: u64 = 1 << 40;

/// A launch that is ready but for its grid.
pub(super) struct Ready {
    pub(super) kernel: usize,
    /// Where each parameter of the kernel's function is: in one of the two below, which neither move nor change.
    params: Box<[*mut c_void]>,
    _addresses: Box<[Address]>,
    _maps: Box<[TensorMapBytes]>,
}

// SAFETY: the pointers are to what it owns, and the driver reads through them during a launch only.
unsafe impl Send for Ready {}

impl Ready {
    /// The parameters are `addresses`, the address of the symbols, that of memory for each block if the kernel wants such, and tensor maps.
    pub(super) fn new(
        kernel: usize,
        mut addresses: Vec<Address>,
        symbols: Address,
        scratch: Option<Address>,
        maps: Vec<TensorMapBytes>,
    ) -> Ready {
        addresses.push(symbols);
        addresses.extend(scratch);
        let (addresses, maps) = (addresses.into_boxed_slice(), maps.into_boxed_slice());
        let params = addresses.iter().map(|a| std::ptr::from_ref(a).cast_mut().cast());
        let params = params.chain(maps.iter().map(|m| std::ptr::from_ref(m).cast_mut().cast())).collect();
        Ready { kernel, params, _addresses: addresses, _maps: maps }
    }

    /// What a launch takes: an array of pointers to values, which the driver only reads.
    pub(super) fn params(&self) -> *mut *mut c_void {
        self.params.as_ptr().cast_mut()
    }
}

/// Launches that were bound together.
pub(super) struct Program {
    pub(super) limits: SymValues,
    pub(super) launches: Vec<Ready>,
    /// Whether graphs of them are kept.
    pub(super) kept: bool,
    /// Symbols that a grid of theirs depends on.
    grid_syms: [bool; 6],
}

impl Program {
    pub(super) fn new(limits: SymValues, launches: Vec<Ready>, kernels: &[Kernel]) -> Program {
        let mut grid_syms = [false; 6];
        for dim in launches.iter().flat_map(|l| &kernels[l.kernel].entry.grid) {
            if let Some(sym) = dim.extent.sym {
                grid_syms[sym as usize] = true;
            }
        }
        Program { limits, launches, kept: true, grid_syms }
    }

    /// Symbols to make grids with, at least `syms` and the same for many steps: small counts as they are, larger ones and
    /// those that grow from step to step rounded up; nothing above the limits, and zero where no grid asks.
    pub(super) fn bucket(&self, syms: &SymValues) -> SymValues {
        let mut bucket = SymValues::default();
        for sym in Sym::ALL.into_iter().filter(|&s| self.grid_syms[s as usize]) {
            let n = syms.get(sym);
            let rounded = match sym {
                Sym::C | Sym::P => n.checked_next_power_of_two().unwrap_or(n),
                _ => round_count(n),
            };
            bucket = bucket.with(sym, rounded.min(self.limits.get(sym)).max(n));
        }
        bucket
    }
}

/// Up to 64 as it is; above, to one of four steps between powers of two, so that at most a fifth of the blocks have no work.
fn round_count(n: u32) -> u32 {
    if n <= 64 {
        return n;
    }
    let step = 1 << (n.ilog2() - 2);
    n.checked_next_multiple_of(step).unwrap_or(n)
}

/// The grid of a kernel along x, y and z; none if there is no block. A persistent kernel gets as many blocks as the GPU holds at a
/// time, or as it has tiles (times the blocks of a team) if those are fewer; one that says how many tiles are a block's, as many as that makes.
pub(super) fn grid(entry: &KernelEntry, gpu: &GpuKernel, multiprocessors: u32, syms: &SymValues) -> Option<[u32; 3]> {
    let cluster = gpu.cluster.max(1);
    let mut grid = [1u32; 3];
    if gpu.persistent {
        // Clusters are whole, and one that is not held at once would run after all others.
        let held = Kernel::held(gpu, multiprocessors);
        let tiles = u32::try_from(entry.blocks(syms).filter(|&n| n > 0)?).unwrap_or(u32::MAX);
        let tiles = tiles.saturating_mul(gpu.team.max(1));
        grid[0] = match gpu.turns {
            _ if gpu.ranges => held,
            0 => tiles.min(held),
            turns => tiles.div_ceil(turns),
        };
    } else {
        for (axis, dim) in grid.iter_mut().zip(&entry.grid) {
            *axis = u32::try_from(dim.eval(syms)).ok().filter(|&n| n > 0)?;
        }
    }
    if !gpu.persistent {
        grid[0] = grid[0].checked_mul(cluster)?;
    }
    // The hardware takes whole clusters.
    grid[0] = grid[0].checked_next_multiple_of(cluster)?;
    Some(grid)
}

/// Checks that grids at the limits are ones that the hardware can launch, or that a persistent kernel can count.
pub(super) fn check_grid(
    entry: &KernelEntry,
    gpu: &GpuKernel,
    most_blocks: fn(u32) -> [u64; 3],
    limits: &SymValues,
) -> Result<(), String> {
    let [most, most_y, most_z] = most_blocks(gpu.threads);
    let most = most - u64::from(gpu.cluster);
    if gpu.persistent {
        return match entry.blocks(limits) {
            Some(tiles) if tiles <= most => Ok(()),
            _ => Err(format!("more than {most} tiles of {}", entry.name)),
        };
    }
    for (axis, (dim, most)) in entry.grid.iter().zip([most, most_y, most_z]).enumerate() {
        let blocks = dim.eval(limits);
        if blocks > most {
            return Err(format!("{blocks} blocks along axis {axis} of {}, the hardware has {most}", entry.name));
        }
    }
    Ok(())
}

/// Encodes a descriptor of the parameter that `map` names, bound at `address`, at these symbols: the limits of a binding, or exactly
/// those of a launch.
pub(super) fn encode_map(
    context: &Context,
    map: &TensorMap,
    param: &ParamEntry,
    address: Address,
    (syms, exact): (&SymValues, bool),
) -> Result<TensorMapBytes, String> {
    let fault = |what: String| format!("the tensor map of parameter {}: {what}", param.name);
    let plan = MapPlan::new(map, param, (syms, exact)).map_err(fault)?;
    let address = address.wrapping_add(param.view.offset);
    if !address.is_multiple_of(16) {
        return Err(fault(format!("it starts at {address:#x}, which 16 bytes do not divide")));
    }
    let mut bytes = TensorMapBytes([0; 16]);
    let called = context.driver.api.encode(&plan, address, &mut bytes);
    context.driver.checked(called).map_err(|e| fault(format!("{plan:?}: {e}")))?;
    Ok(bytes)
}

/// `CUtensorMap`. CUDA 13 wants 128-byte alignment where 12 wants 64.
#[repr(C, align(128))]
#[derive(Clone, Copy)]
pub(super) struct TensorMapBytes([u64; 16]);

/// What a tensor map holds, innermost dim first.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct MapPlan {
    /// `CUtensorMapDataType`.
    pub(super) element: u32,
    pub(super) dims: Vec<u64>,
    /// Bytes between neighbours along all dims but the innermost, whose elements are adjacent.
    pub(super) strides: Vec<u64>,
    pub(super) tile: Vec<u32>,
    /// `CUtensorMapSwizzle`.
    pub(super) swizzle: u32,
}

impl MapPlan {
    fn new(map: &TensorMap, param: &ParamEntry, (syms, exact): (&SymValues, bool)) -> Result<MapPlan, String> {
        let view = &param.view;
        let rank = view.shape.len();
        if !(1..=5).contains(&rank) || map.tile.len() != rank || view.strides.len() != rank {
            return Err(format!("{rank} dims with a box of {}", map.tile.len()));
        }
        let element = match view.dtype {
            DType::E4m3 => 0,
            DType::I32 => 3,
            DType::F16 => 6,
            DType::F32 => 7,
            DType::Bf16 => 9,
            DType::Bool => return Err("truth values in memory".into()),
        };
        let size = view.dtype.bytes() as u64;
        let mut strides = Vec::with_capacity(rank);
        for stride in view.strides.iter().rev() {
            // A step below the limits would have another distance than the map, which is made once.
            let bytes = u64::try_from(stride.bytes).ok().filter(|_| exact || stride.sym.is_none());
            let bytes = bytes.and_then(|n| n.checked_mul(stride.sym.map_or(1, |s| u64::from(syms.get(s)))));
            strides.push(bytes.ok_or_else(|| format!("a distance of {} bytes times {:?}", stride.bytes, stride.sym))?);
        }
        let innermost = strides.remove(0);
        if innermost != size {
            return Err(format!("innermost elements are {innermost} bytes apart"));
        }
        if let Some(stride) = strides.iter().find(|&&s| !s.is_multiple_of(16) || s >= MAX_MAP_STRIDE) {
            return Err(format!("a distance of {stride} bytes, which 16 do not divide, or too large"));
        }
        let dims: Vec<u64> = view.shape.iter().rev().map(|extent| extent.eval(syms)).collect();
        if dims.iter().any(|n| !(1..=1 << 32).contains(n)) {
            return Err(format!("dims of {dims:?}"));
        }
        let tile: Vec<u32> = map.tile.iter().rev().copied().collect();
        let inner = u64::from(tile[0]) * size;
        if tile.iter().any(|n| !(1..=256).contains(n)) || !inner.is_multiple_of(16) {
            return Err(format!("a box of {tile:?} elements of {size} bytes"));
        }
        let swizzle = match map.swizzle {
            0 => 0,
            32 => 1,
            64 => 2,
            128 => 3,
            n => return Err(format!("a swizzle of {n} bytes")),
        };
        if map.swizzle > 0 && inner > u64::from(map.swizzle) {
            return Err(format!("rows of {inner} bytes in a swizzle of {}", map.swizzle));
        }
        Ok(MapPlan { element, dims, strides, tile, swizzle })
    }
}

#[cfg(test)]
mod tests {
    use super::super::cuda;
    use super::*;
    use dsc_ir::artifact::Resources;
    use dsc_ir::extent::GridDim;
    use dsc_ir::tile::{Stride, ViewType};

    fn param(dtype: DType, shape: &[dsc_ir::extent::Extent]) -> ParamEntry {
        ParamEntry { name: "w".into(), view: ViewType::dense(dtype, shape), write: false }
    }

    #[test]
    fn maps_are_innermost_first() {
        let map = TensorMap { param: 0, tile: vec![1, 64, 32], swizzle: 64 };
        let view = param(DType::Bf16, &[Sym::T.into(), 128.into(), 512.into()]);
        let limits = SymValues([7, 1, 1, 1, 1, 1]);
        let plan = MapPlan::new(&map, &view, (&limits, false)).unwrap();
        let expected = MapPlan {
            element: 9,
            dims: vec![512, 128, 7],
            strides: vec![1024, 128 * 1024],
            tile: vec![32, 64, 1],
            swizzle: 2,
        };
        assert_eq!(plan, expected);
    }

    #[test]
    fn maps_that_hardware_cannot_hold_are_refused() {
        let limits = SymValues([7, 1, 1, 1, 1, 1]);
        let refused = |tile: &[u32], swizzle, edit: &dyn Fn(&mut ParamEntry)| {
            let mut view = param(DType::E4m3, &[Sym::T.into(), 512.into()]);
            edit(&mut view);
            MapPlan::new(&TensorMap { param: 0, tile: tile.to_vec(), swizzle }, &view, (&limits, false)).unwrap_err()
        };
        assert!(refused(&[8], 0, &|_| ()).contains("box of 1"));
        assert!(refused(&[8, 256], 128, &|_| ()).contains("rows of 256 bytes"));
        assert!(refused(&[8, 8], 0, &|_| ()).contains("a box of [8, 8]"));
        assert!(refused(&[8, 64], 0, &|p| p.view.strides[0].bytes = 520).contains("520"));
        assert!(refused(&[8, 64], 0, &|p| p.view.strides[0] = Stride { bytes: 512, sym: Some(Sym::P) }).contains("P"));
        assert!(refused(&[8, 64], 0, &|p| p.view.strides[1].bytes = 2).contains("2 bytes apart"));
        assert!(refused(&[8, 64], 0, &|p| p.view.shape[1] = 0.into()).contains("dims of"));
    }

    #[test]
    fn buckets_hold_their_steps() {
        let mut program = Program {
            limits: SymValues([600, 4, 40, 600, 100, 2500]),
            launches: Vec::new(),
            kept: true,
            grid_syms: [true; 6],
        };
        let bucket = |p: &Program, syms| p.bucket(&SymValues(syms)).0;
        assert_eq!(bucket(&program, [1, 1, 3, 0, 100, 130]), [1, 1, 4, 0, 100, 256]);
        assert_eq!(bucket(&program, [65, 4, 33, 600, 99, 2049]), [80, 4, 40, 600, 100, 2500]);
        assert_eq!(bucket(&program, [513, 1, 1, 64, 1, 1])[0], 600);
        program.grid_syms = [true, false, false, false, false, false];
        assert_eq!(bucket(&program, [300, 4, 33, 600, 99, 2049]), [320, 0, 0, 0, 0, 0]);
        for n in 1..5000 {
            assert!(round_count(n) >= n && round_count(n) * 4 <= n * 5, "{n}");
        }
    }

    #[test]
    fn a_cluster_takes_a_block_of_the_grid() {
        let mut entry = crate::testing::header().kernels.remove(0);
        let syms = |tokens| SymValues([tokens, 1, 1, 1, 1, 1]);
        let plain = |cluster| GpuKernel { cluster, ..GpuKernel::default() };
        assert_eq!(grid(&entry, &plain(1), 4, &syms(5)), Some([5, 1, 1]));
        assert_eq!(grid(&entry, &plain(2), 4, &syms(5)), Some([10, 1, 1]));
        assert_eq!(grid(&entry, &plain(1), 4, &syms(0)), None);
        entry.grid.insert(0, GridDim { extent: 3.into(), tile: 1 });
        let error = check_grid(&entry, &plain(1), cuda::SPEC.most_blocks, &syms(65536)).unwrap_err();
        assert!(error.contains("65536 blocks along axis 1"), "{error}");
        assert!(check_grid(&entry, &plain(1), cuda::SPEC.most_blocks, &syms(65535)).is_ok());

        let resources = Some(Resources { blocks_per_sm: 2, ..Resources::default() });
        let persistent = |cluster| GpuKernel { persistent: true, resources, ..plain(cluster) };
        assert_eq!(grid(&entry, &persistent(1), 4, &syms(2)), Some([6, 1, 1]));
        assert_eq!(grid(&entry, &persistent(1), 4, &syms(100)), Some([8, 1, 1]));
        assert_eq!(grid(&entry, &persistent(16), 4, &syms(100)), Some([16, 1, 1]));
        assert_eq!(grid(&entry, &persistent(3), 4, &syms(100)), Some([6, 1, 1]));
        assert_eq!(grid(&entry, &persistent(1), 4, &syms(0)), None);
        let team = GpuKernel { team: 4, ..persistent(8) };
        assert_eq!(grid(&entry, &team, 4, &syms(100)), Some([8, 1, 1]));
        assert_eq!(grid(&entry, &team, 40, &syms(1)), Some([16, 1, 1]));
        assert_eq!(grid(&entry, &team, 40, &syms(2)), Some([24, 1, 1]));
        // Teams that wait for one another through memory are all there at once.
        let apart = GpuKernel { team: 3, apart: true, ..persistent(2) };
        assert_eq!(grid(&entry, &apart, 4, &syms(100)), Some([6, 1, 1]));
        assert_eq!(grid(&entry, &apart, 40, &syms(2)), Some([18, 1, 1]));
        let ranges = GpuKernel { ranges: true, ..persistent(1) };
        assert_eq!(grid(&entry, &ranges, 4, &syms(1)), Some([8, 1, 1]));
        assert_eq!(grid(&entry, &ranges, 4, &syms(0)), None);
        let turns = GpuKernel { turns: 2, ..persistent(1) };
        assert_eq!(grid(&entry, &turns, 4, &syms(100)), Some([150, 1, 1]));
        assert_eq!(grid(&entry, &turns, 4, &syms(1)), Some([2, 1, 1]));
        assert!(check_grid(&entry, &persistent(1), cuda::SPEC.most_blocks, &syms(65536)).is_ok());
        assert!(
            check_grid(&entry, &persistent(1), cuda::SPEC.most_blocks, &syms(1 << 30))
                .unwrap_err()
                .contains("tiles of count")
        );
    }
}
