//! A lowered kernel on buffers, as [`dsc_ir::tile::interp::run_blocks`] takes them.

use super::Machine;
use crate::gpu::Lowered;
use dsc_ir::SymValues;
use dsc_ir::tile::Program;
use dsc_ir::tile::interp::Binding;

/// Bytes that buffers start at multiples of, as a runtime's do.
const ALIGN: usize = 256;

/// Runs all blocks of a launch, and one more along every axis that depends on the step: they must do nothing.
///
/// # Errors
/// What the code does wrong, and accesses outside of the buffers.
pub fn run_blocks(
    program: &Program,
    lowered: &Lowered,
    syms: &SymValues,
    buffers: &mut [Vec<u8>],
    bindings: &[Binding],
    seed: u64,
) -> Result<(), String> {
    // Shared memory starts as what no kernel should let through: NaN, of any type.
    let shared = vec![0xff; lowered.gpu.shared_bytes as usize];
    let mut m = Machine { shared, seed, team: lowered.gpu.cluster, ..Machine::default() };
    let place = |m: &mut Machine, bytes: &[u8]| {
        let at = (m.global.len() + ALIGN).next_multiple_of(ALIGN);
        m.global.resize(at, 0xa5);
        m.global.extend(bytes);
        m.buffers.push(at as u64..m.global.len() as u64);
        at
    };
    let starts: Vec<usize> = buffers.iter().map(|b| place(&mut m, b)).collect();
    m.args = bindings.iter().map(|b| (starts[b.buffer] + b.offset) as u64).collect();
    let symbols: Vec<u8> = syms.0.iter().flat_map(|s| s.to_le_bytes()).collect();
    let at = place(&mut m, &symbols);
    m.args.push(at as u64);
    m.global.resize(m.global.len() + ALIGN, 0xa5);
    let mut sizes = [1; 3];
    for (size, dim) in sizes.iter_mut().zip(&program.grid) {
        *size = dim.eval(syms) as u32 + u32::from(dim.extent.sym.is_some());
    }
    let [x, y, z] = sizes;
    let blocks: Vec<[u32; 3]> = (0..z).flat_map(|z| (0..y).flat_map(move |y| (0..x).map(move |x| [x, y, z]))).collect();
    m.run_grid(&lowered.mlir, lowered.gpu.threads, &blocks)?;
    for (buffer, start) in buffers.iter_mut().zip(starts) {
        let n = buffer.len();
        buffer.copy_from_slice(&m.global[start..start + n]);
    }
    Ok(())
}
