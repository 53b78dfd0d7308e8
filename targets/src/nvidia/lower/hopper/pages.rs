//! What a round copies by is read a round ahead.
//!
//! Keys of a cache are found by a page table, and where a row's keys end stands in memory too. Read one after the other, both are in front of
//! a tile's first copy; and each round's page is in front of its copies. Which page is a round's is known from its number alone:
//!
//! ```text
//! end = load ends                      first = load pages[lo]
//! for k = lo to end {                  end = load ends
//!     page = load pages[k]        =>   for k = lo to end (page = first) {
//!     copy keys[page]                      copy keys[page]
//! }                                        yield load pages[k + 1]
//!                                      }
//! ```
//!
//! What lies behind a view's end is read as zero, and no round copies by it.
//!
//! A tile without rounds would read a page for nothing, and in page tables far wider than contexts most are such: it is done only where blocks
//! divide rounds, which come to no such tile.

use super::values::{added, added_number, plus};
use dsc_ir::sched::{Block, Inst, Op, Place, Scheduled};
use dsc_ir::tile::{self, Index, ValueId};

/// The kernel whose elected roles, if blocks divide rounds, read such scalars ahead, where the innermost of a role's loops has one of them.
pub fn ahead(mut s: Scheduled) -> Scheduled {
    if !s.parts() {
        return s;
    }
    for role in 0..s.roles.len() {
        if !s.roles[role].elected {
            continue;
        }
        let mut body = std::mem::take(&mut s.roles[role].body);
        if let Some(Some(first)) = read_ahead(&mut body, &mut s) {
            body.insts.insert(0, first);
        }
        s.roles[role].body = body;
    }
    s
}

/// Makes the innermost of loops that stand alone in one another carry its scalar. The load for its first round is put behind what it needs, or
/// given if nothing of that is made here. None: there is no such scalar.
fn read_ahead(block: &mut Block, s: &mut Scheduled) -> Option<Option<Inst>> {
    let is_loop = |i: &Inst| matches!(i.op, Op::For { .. });
    let at = block.insts.iter().position(is_loop)?;
    let alone = !block.insts[at + 1..].iter().any(is_loop);
    let inner = matches!(&block.insts[at].op, Op::For { body, .. } if body.insts.iter().any(is_loop));
    let first = match &mut block.insts[at].op {
        _ if !alone => return None,
        Op::For { body, .. } if inner => read_ahead(body, s)?,
        _ => Some(carried(&mut block.insts[at], s)?),
    };
    let Some(first) = first else { return Some(None) };
    let Op::Tile(load) = &first.op else { return None };
    let needs = tile::operands(load);
    let makes = |i: &Inst| i.results.iter().any(|r| needs.contains(r));
    let behind = block.insts[..at].iter().rposition(makes).map(|made| made + 1);
    let own = block.args.iter().any(|a| needs.contains(a)).then_some(0);
    let Some(place) = behind.or(own) else { return Some(Some(first)) };
    block.insts.insert(place, first);
    Some(None)
}

/// Makes a loop carry the only scalar that its rounds read at a place which their number moves; gives the load for the first round.
fn carried(rounds: &mut Inst, s: &mut Scheduled) -> Option<Inst> {
    let Op::For { lo, step, init, body, .. } = &mut rounds.op else { return None };
    let counter = body.args[0];
    let scalar = |i: &Inst| {
        let uniform = |r: &ValueId| s.places[r.0 as usize] == Place::Uniform;
        matches!(i.op, Op::Tile(tile::Op::Load { .. })) && i.results.iter().all(uniform)
    };
    let at = body.insts.iter().position(scalar)?;
    let Op::Tile(tile::Op::Load { view, index, shape }) = body.insts[at].op.clone() else { return None };
    let moved = |i: &Index| *i == Index::Value(counter);
    let made = |i: &Index| matches!(i, Index::Value(v) if body.insts.iter().any(|inst| inst.results.contains(v)));
    let by_number = index.iter().filter(|i| moved(i)).count() == 1 && !index.iter().any(made);
    let alone = body.insts.iter().filter(|i| scalar(i)).count() == 1;
    (by_number && alone && init.is_empty() && body.yields.is_empty()).then_some(())?;
    let read = |at: Index| {
        let index = index.iter().map(|&i| if i == Index::Value(counter) { at } else { i }).collect();
        Op::Tile(tile::Op::Load { view, index, shape: shape.clone() })
    };
    let page = body.insts.remove(at).results[0];
    let ty = s.types[page.0 as usize].clone();
    let [first, next, last] = [(); 3].map(|()| added(s, ty.clone(), Place::Uniform));
    let behind = added_number(s);
    body.args.push(page);
    body.insts.push(Inst { results: vec![behind], op: Op::Tile(plus(counter, *step as i32)), scratch: None });
    body.insts.push(Inst { results: vec![next], op: read(Index::Value(behind)), scratch: None });
    body.yields.push(next);
    init.push(first);
    let first = Inst { results: vec![first], op: read(*lo), scratch: None };
    rounds.results.push(last);
    Some(first)
}
