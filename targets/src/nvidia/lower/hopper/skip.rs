//! Tiles with nothing to do, skipped.
//!
//! A loop over keys ends where a row's keys end, and grids are as large as the longest row could be. So most tiles of short rows in a wide page
//! table have an empty loop; but what stands around it, copies and barriers for operands that all its rounds share, would still be
//! run. Behind a loop of one round or none it is not:
//!
//! ```text
//! acquire, copy q, commit           for once = 0 to (lo < hi ? 1 : 0)
//! for k = lo to hi {..}                 acquire, copy q, commit
//!                                       for k = lo to hi {..}
//! ```
//!
//! Where blocks are to divide rounds rather than tiles, a block's part of `lo..hi` stands there instead of all.

use super::values::{added_number, arithmetic, constant, mapped, plain};
use dsc_ir::sched::{Block, Inst, Op, Place, Scheduled};
use dsc_ir::tile::{self, Index, MapArg, ScalarOp, ValueId};
use std::collections::{HashMap, HashSet};

/// The kernel with such loops around what its roles do, if what each of them does is one loop whose bounds are known in front of it, and
/// what that loop shares. `ranges`: blocks divide the rounds of tiles.
pub fn empty_tiles(mut s: Scheduled, ranges: bool) -> Scheduled {
    let bounds: Option<Vec<(ValueId, ValueId)>> = s.roles.iter().map(|r| bounds(&r.body, &s.places)).collect();
    let Some(bounds) = bounds else { return s };
    for (role, (lo, hi)) in bounds.into_iter().enumerate() {
        let (rounds, counter) = (added_number(&mut s), added_number(&mut s));
        let insts = std::mem::take(&mut s.roles[role].body.insts);
        let needed = sources(&insts, vec![lo, hi]);
        let (mut before, within): (Vec<Inst>, Vec<Inst>) =
            insts.into_iter().partition(|i| i.results.iter().any(|r| needed.contains(r)));
        let (mut own, mut within) = ([lo, hi], within);
        if ranges {
            own = [false, true].map(|end| {
                let v = added_number(&mut s);
                before.push(Inst { results: vec![v], op: Op::Part { lo, hi, end }, scratch: None });
                v
            });
            bounded(&mut within, own);
        }
        before.push(Inst { results: vec![rounds], op: Op::Tile(one_if_less(own[0], own[1])), scratch: None });
        let body = Block { args: vec![counter], insts: within, yields: Vec::new() };
        let op = Op::For { lo: Index::Const(0), hi: Index::Value(rounds), step: 1, init: Vec::new(), body };
        before.push(plain(op));
        s.roles[role].body.insts = before;
    }
    s
}

/// Gives the only loop these bounds.
fn bounded(insts: &mut [Inst], [from, end]: [ValueId; 2]) {
    for inst in insts {
        if let Op::For { lo, hi, .. } = &mut inst.op {
            (*lo, *hi) = (Index::Value(from), Index::Value(end));
        }
    }
}

fn is_loop(inst: &Inst) -> bool {
    matches!(inst.op, Op::For { .. })
}

/// These values and all that they are computed from.
fn sources(insts: &[Inst], mut pending: Vec<ValueId>) -> HashSet<ValueId> {
    let made: HashMap<ValueId, &Inst> = insts.iter().flat_map(|i| i.results.iter().map(move |&r| (r, i))).collect();
    let mut all = HashSet::new();
    while let Some(v) = pending.pop() {
        if let Some(Inst { op: Op::Tile(op), .. }) = made.get(&v)
            && all.insert(v)
        {
            pending.extend(tile::operands(op));
        }
    }
    all
}

/// The bounds of a body's only loop, which carries nothing; of a body that does nothing behind it but give back stages.
fn bounds(body: &Block, places: &[Place]) -> Option<(ValueId, ValueId)> {
    let at = body.insts.iter().position(is_loop)?;
    let Op::For { lo: Index::Value(lo), hi: Index::Value(hi), init, .. } = &body.insts[at].op else { return None };
    let uniform = |v: &ValueId| places[v.0 as usize] == Place::Uniform;
    let ends = body.insts[at + 1..].iter().all(|i| matches!(i.op, Op::Release { .. }));
    let shares = body.insts[..at].iter().any(|i| matches!(i.op, Op::Acquire(_) | Op::Wait(_)));
    (init.is_empty() && ends && shares && uniform(lo) && uniform(hi)).then_some((*lo, *hi))
}

/// `lo < hi ? 1 : 0`.
fn one_if_less(lo: ValueId, hi: ValueId) -> tile::Op {
    let insts = vec![
        arithmetic(ScalarOp::Lt, &[MapArg::Input(0), MapArg::Input(1)]),
        constant(1),
        constant(0),
        arithmetic(ScalarOp::Select, &[MapArg::Inst(0), MapArg::Inst(1), MapArg::Inst(2)]),
    ];
    mapped(vec![lo, hi], insts)
}
