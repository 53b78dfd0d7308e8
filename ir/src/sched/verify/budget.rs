//! What a block uses, against what it may use.

use super::{Budget, Report, matrix};
use crate::sched::ring::{Unit, unit_name, units};
use crate::sched::visit::Definitions;
use crate::sched::{Atom, Block, Fragment, Op, Place, Scheduled};
use crate::tile::{Type, ValueId};
use std::collections::BTreeSet;

/// Registers of a thread are given out by so many.
const STEP: u32 = 8;

pub(super) fn check(kernel: &Scheduled, limits: &Budget, report: &mut Report) {
    if kernel.threads > limits.threads {
        report.add("", format!("{} threads, but a block has at most {}", kernel.threads, limits.threads));
    }
    let bytes =
        kernel.buffers.iter().filter(|b| !b.outside).map(|b| b.offset.saturating_add(b.bytes())).max().unwrap_or(0);
    if bytes > limits.shared_bytes {
        let limit = limits.shared_bytes;
        let message =
            format!("{bytes} bytes of shared memory, but a block has {limit}; choose smaller tiles or fewer stages");
        report.add("", message + &table(kernel));
    }
    let barriers = kernel.roles.iter().filter(|r| has_barrier(&r.body)).count();
    if barriers > limits.named_barriers as usize {
        report.add("", format!("{barriers} roles meet barriers, but a block has {}", limits.named_barriers));
    }
    let moved: u64 = kernel.roles.iter().map(|r| u64::from(r.registers.unwrap_or(0)) * threads(r.warps)).sum();
    // Roles share what the block had at its launch: as many a thread as fit, in steps of eight.
    let each = (limits.registers / kernel.threads.max(1) / STEP * STEP).min(limits.thread_registers);
    let had = u64::from(each) * u64::from(kernel.threads);
    if moved > had {
        report.add("", format!("roles have {moved} registers together, but a block has {had}"));
    }
    let even = (limits.registers / kernel.threads.max(1)).min(limits.thread_registers);
    for (unit, &needed) in registers(kernel).iter().enumerate() {
        let role = unit.checked_sub(1).map(|i| &kernel.roles[i]);
        let limit = role.and_then(|r| r.registers).unwrap_or(even).min(limits.thread_registers);
        if needed > limit {
            let name = unit_name(kernel, unit);
            let message =
                format!("{name} keeps {needed} registers a thread, but has {limit}; spread its tiles over more warps");
            report.add("", message);
        }
    }
}

/// Buffers by size, largest first.
fn table(kernel: &Scheduled) -> String {
    let mut order: Vec<usize> = (0..kernel.buffers.len()).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(kernel.buffers[i].bytes()), i));
    order.into_iter().map(|i| format!("\n    b{i} = {}", kernel.buffers[i])).collect()
}

fn threads([first, end]: [u32; 2]) -> u64 {
    u64::from(end.saturating_sub(first)) * 32
}

fn has_barrier(block: &Block) -> bool {
    block.insts.iter().any(|i| i.op == Op::Barrier || i.op.blocks().into_iter().any(has_barrier))
}

/// For `common` and each role: an estimate from below of the 32-bit registers that a thread needs, those of values that live at once.
/// Addresses, counters of channels and what an instruction needs while it runs are not in it.
pub fn registers(kernel: &Scheduled) -> Vec<u32> {
    let walk = Walk { kernel, definitions: Definitions::new(kernel) };
    let used = |block: &Block| walk.outside(block);
    let roles: BTreeSet<ValueId> = kernel.roles.iter().flat_map(|r| used(&r.body)).collect();
    let of = |unit: Unit, block: &Block| {
        let mut live = if unit == 0 { roles.clone() } else { BTreeSet::new() };
        let mut peak = 0;
        walk.block(block, &mut live, &mut peak);
        peak.max(walk.weight(&live))
    };
    let peaks = units(kernel).into_iter().enumerate().map(|(unit, block)| of(unit, block));
    peaks.map(|n| u32::try_from(n).unwrap_or(u32::MAX)).collect()
}

struct Walk<'a> {
    kernel: &'a Scheduled,
    definitions: Definitions<'a>,
}

impl Walk<'_> {
    /// Backwards through a block: `live` is what is needed behind it, then what is needed before.
    fn block(&self, block: &Block, live: &mut BTreeSet<ValueId>, peak: &mut u64) {
        live.extend(self.definitions.sources(&block.yields));
        for inst in block.insts.iter().rev() {
            live.extend(&inst.results);
            *peak = (*peak).max(self.weight(live));
            inst.results.iter().for_each(|v| {
                live.remove(v);
            });
            for inner in inst.op.blocks() {
                let mut inside = live.clone();
                if matches!(inst.op, Op::For { .. }) {
                    inside.extend(self.outside(inner));
                }
                self.block(inner, &mut inside, peak);
                live.extend(inside);
            }
            live.extend(self.definitions.inputs(inst));
        }
        *peak = (*peak).max(self.weight(live));
        block.args.iter().for_each(|v| {
            live.remove(v);
        });
    }

    /// Values that a block uses and does not define.
    fn outside(&self, block: &Block) -> BTreeSet<ValueId> {
        let (mut used, mut defined) = (BTreeSet::new(), BTreeSet::new());
        let mut pending = vec![block];
        while let Some(block) = pending.pop() {
            defined.extend(&block.args);
            used.extend(self.definitions.sources(&block.yields));
            for inst in &block.insts {
                defined.extend(&inst.results);
                used.extend(self.definitions.inputs(inst));
                pending.extend(inst.op.blocks());
            }
        }
        used.difference(&defined).copied().collect()
    }

    fn weight(&self, live: &BTreeSet<ValueId>) -> u64 {
        live.iter().map(|v| self.registers(*v)).sum()
    }

    /// Registers of a thread for one value.
    fn registers(&self, v: ValueId) -> u64 {
        match (self.definitions.place(v), self.kernel.types.get(v.0 as usize)) {
            (Some(Place::Uniform), _) => 1,
            // About: a thread has whole pieces.
            (Some(Place::Held), Some(ty @ Type::Tile(t))) => {
                let [rows, columns] = matrix(ty);
                (rows * columns * t.dtype.bytes() as u64).div_ceil(4 * u64::from(self.kernel.threads).max(1)) + 1
            }
            (Some(Place::Fragment(f)), Some(ty @ Type::Tile(t))) => {
                (fragment_elements(*f, matrix(ty)) * t.dtype.bytes() as u64).div_ceil(4)
            }
            _ => 0,
        }
    }
}

/// Elements of a fragment in one thread.
fn fragment_elements(f: Fragment, shape: [u64; 2]) -> u64 {
    let (unit, threads) = match f.atom {
        Atom::Mma16x8 => ([16, 8], 32),
        Atom::Wgmma => ([64, 8], 128),
        Atom::WgmmaTransposed => ([8, 64], 128),
        Atom::Mfma16x16 => ([16, 16], 64),
        Atom::Mfma16x64 => ([16, 64], 64),
        Atom::Mfma16x128 => ([16, 128], 64),
        Atom::WgmmaSums => return 1,
        Atom::Fma => ([16, 32], 32),
    };
    let side = |d: usize| shape[d].div_ceil(u64::from(f.warps[d]).max(1)).next_multiple_of(unit[d]);
    // Of a column each thread has the elements of its rows, a quarter of them.
    if f.atom == Atom::WgmmaTransposed && shape[1] == 1 {
        return side(0) / 4;
    }
    if f.atom == Atom::Wgmma && shape[1] == 1 {
        return side(0) / 32;
    }
    // A row may be spread over the lanes of each warp.
    if f.atom == Atom::Wgmma && shape[0] == 1 {
        return side(1).div_ceil(32);
    }
    side(0) * side(1) / threads
}
