//! Hopper's way with contractions and attention: copies by descriptor, rings of stages, products of warpgroups.
//!
//! | file | does |
//! |---|---|
//! | `contraction`, `attention` | find the contraction, the attention of a tile program |
//! | `halves` | a program with tall tiles as one with twice as many, half as tall |
//! | `config` | tile, warpgroups, depth of the ring |
//! | `tensor_map` | what the copy engine can bring |
//! | `plan`, `attention_plan`, `values` | these to scheduled tile IR with roles |
//! | `twins` | weighted sums as those of two halves, each with a product of its own |
//! | `scores`, `sums`, `stream` | products that are weighted and summed over groups of rows (an indexer's scores), and selections from the sums |
//! | `beside` | programs of which blocks run one half or the other |
//! | `pages` | what a round copies by is read a round ahead |
//! | `overlap` | the last sums of such a round are made while the next one multiplies |
//! | `skip` | tiles with an empty loop cost their bounds only; rounds of tiles divided by blocks |
//! | `select`, `window`, `short`, `spread`, `bounded`, `filter`, `sends` | selections from rows in memory: by counting all of it, its columns, from registers of a block or of several, by a bound, by a sample |
//! | `group` | searches among candidates, and numbers in order, by threads together |
//! | `emit`, `held`, `loops`, `parts`, `turns`, `channels`, `ring`, `gather`, `fill`, `begin`, `wgmma`, `fragment`, `memory`, `quads`, `reduce`, `rescale`, `store` | that to MLIR |
//! | `ptx` | the instructions |
//!
//! Schedule and lowering know nothing of particular kernels: what a consumer does with its fragments besides products is whatever
//! maps, loads, stores and maxima of whole rows the program has.

mod attention;
mod attention_plan;
mod begin;
mod beside;
mod bounded;
mod channels;
mod config;
mod constants;
mod contraction;
mod emit;
mod fill;
mod filter;
mod fragment;
mod front;
mod gather;
mod group;
mod halves;
mod held;
mod idle;
mod loops;
mod memory;
mod overlap;
mod pages;
mod parts;
mod plan;
mod promote;
pub mod ptx;
mod quads;
mod reduce;
mod rescale;
mod ring;
mod roles;
mod scores;
mod select;
mod sends;
mod short;
mod skip;
mod spread;
mod store;
mod stream;
mod sums;
mod team;
mod tensor_map;
#[cfg(test)]
mod tests;
mod turns;
mod twins;
mod values;
mod wgmma;
mod window;

pub use emit::{How, lower};

use crate::Kernel;
use crate::nvidia::arch::Arch;
use crate::nvidia::lower::mlir::Ty;
use dsc_ir::artifact::GpuKernel;
use dsc_ir::sched::Scheduled;

/// Whether an architecture has what these kernels are made of.
fn has_path(arch: &Arch) -> bool {
    arch.has_wgmma && arch.has_tma
}

/// The kernel with roles and rings, if it has a form that this architecture's copy engine and warpgroups can run.
pub fn schedule(kernel: &Kernel, arch: &Arch) -> Option<Scheduled> {
    if !has_path(arch) {
        return None;
    }
    let scores = |ranges| scores::plan(&kernel.program, arch, ranges).map(|scores| skip::empty_tiles(scores, ranges));
    // Only rounds of a single loop can be divided.
    let divided = || kernel.schedule.ranges.then(|| scores(true)).flatten().filter(Scheduled::parts);
    plan::plan(kernel, arch)
        .or_else(|| divided().or_else(|| scores(false)).map(overlap::overlapped).map(pages::ahead))
        .or_else(|| select::plan(kernel, arch))
        .or_else(|| attention_plan::plan(kernel, arch))
}

/// Schedule (as text), MLIR and launch of a kernel; none if the plain way takes it: its form is none of these, or threads of roles cannot do what
/// stands around it.
pub fn compile(kernel: &Kernel, arch: &Arch, symbols: Ty) -> Option<(String, String, GpuKernel)> {
    if !has_path(arch) {
        return None;
    }
    if let Some(both) = beside::compile(kernel, arch, symbols) {
        return Some(both);
    }
    let scheduled = schedule(kernel, arch)?;
    let (mlir, gpu) = lower(&scheduled, arch, How::of(&kernel.schedule, symbols)).ok()?;
    Some((scheduled.to_string(), mlir, gpu))
}
