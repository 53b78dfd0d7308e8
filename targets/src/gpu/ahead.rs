//! Loads a round ahead. What a loop moves from global to shared memory and multiplies there is loaded into registers one round before it
//! is stored, so that a round's products run while the next round's bytes are on their way:
//!
//! ```text
//! load a, b of the first round
//! for ..:  store a, b to shared memory; barrier
//!          read what is added to the products; load a, b of the next round
//!          products from shared memory; barrier
//! ```
//!
//! Loads are answered in order, so what the round itself still needs of global memory (scales) is read before those of the next one:
//! waiting for it does not wait for them. The last round loads its views' first elements, which nobody reads. It costs the
//! registers that the tiles take, of which [`Isa::ahead_bytes`](super::isa::Isa::ahead_bytes) says how many there may be.

use super::emit::Emitter;
use super::fill::UNROLLED;
use super::fragment::Spread;
use super::mlir::Val;
use dsc_ir::sched::{Atom, Block, Inst, Op, Place};
use dsc_ir::tile::{self, Access, Index, ValueId};
use std::collections::{HashMap, HashSet};

/// A tile whose next round is loaded ahead.
pub struct Load<'a> {
    /// The tile.
    pub result: ValueId,
    op: &'a tile::Op,
}

/// What a loop loads ahead.
#[derive(Default)]
pub struct Ahead<'a> {
    /// The tiles.
    pub loads: Vec<Load<'a>>,
    /// The instruction of the body before which the next round is loaded.
    pub before: Option<usize>,
    /// Whether it reads shared memory that was written before the loop.
    pub behind_barrier: bool,
}

/// What the body of a loop can load ahead: nothing, if it multiplies nothing by matrix instructions.
pub fn find<'a>(e: &Emitter<'a>, body: &'a Block) -> Ahead<'a> {
    let product = |inst: &Inst| match (&inst.op, inst.results.first()) {
        (Op::Tile(tile::Op::Dot { .. }), Some(&r)) => {
            matches!(e.place(r), Place::Fragment(f) if f.atom != Atom::Fma)
        }
        _ => false,
    };
    let Some(before) = body.insts.iter().position(product) else { return Ahead::default() };
    let mut made = HashSet::new();
    results(body, &mut made);
    let again: HashSet<ValueId> = steps(e, body).flat_map(|inst| &inst.results).copied().collect();
    // Known before the round begins, or made again from the loop's counter.
    let known = |v: &ValueId| !made.contains(v) || again.contains(v) || *v == body.args[0];
    let fixed = |index: &[Index]| {
        index.iter().all(|i| matches!(i, Index::Const(_)) || matches!(i, Index::Value(v) if known(v)))
    };
    let read_only = |view: &ValueId| e.s.params.iter().any(|p| p.value == *view && p.access == Access::Read);
    let mut room = e.t.arch.ahead_bytes();
    let mut loads = Vec::new();
    for inst in &body.insts {
        let (Op::Tile(op), Some(&r)) = (&inst.op, inst.results.first()) else { continue };
        let Place::Shared(b) = e.place(r) else { continue };
        let movable = match op {
            tile::Op::Load { view, index, .. } => read_only(view) && fixed(index),
            tile::Op::Gather { view, rows, index, .. } => read_only(view) && fixed(index) && !depends(e, *rows, &made),
            _ => false,
        };
        if !movable {
            continue;
        }
        let fill = e.fill(op, r, e.buffer(*b));
        let rounds = fill.rounds(e.t.threads);
        let bytes = rounds * e.buffer(*b).bytes().div_ceil(fill.chunks().max(1));
        if rounds <= UNROLLED && bytes <= room {
            room -= bytes;
            loads.push(Load { result: r, op });
        }
    }
    let before = (!loads.is_empty()).then_some(before);
    let uniform = |v: &ValueId| e.place(*v) == &Place::Uniform;
    let reads = steps(e, body).any(|inst| matches!(&inst.op, Op::Tile(op) if !tile::operands(op).iter().all(uniform)));
    let behind_barrier = !loads.is_empty() && (reads || loads.iter().any(|l| matches!(l.op, tile::Op::Gather { .. })));
    Ahead { loads, before, behind_barrier }
}

/// Values made in a block, blocks inside and arguments included.
fn results(block: &Block, into: &mut HashSet<ValueId>) {
    into.extend(&block.args);
    for inst in &block.insts {
        into.extend(&inst.results);
        match &inst.op {
            Op::For { body, .. } => results(body, into),
            Op::If { then, otherwise, .. } => {
                results(then, into);
                results(otherwise, into);
            }
            _ => {}
        }
    }
}

/// Whether reading a value reads one of these.
fn depends(e: &Emitter, v: ValueId, made: &HashSet<ValueId>) -> bool {
    made.contains(&v) || e.definition(v).is_some_and(|op| tile::operands(op).into_iter().any(|x| depends(e, x, made)))
}

/// The instructions of a body that make single integers from its counter and from what is known outside.
fn steps<'b, 'a: 'b>(e: &'b Emitter<'a>, body: &'a Block) -> impl Iterator<Item = &'a Inst> + 'b {
    let mut made = HashSet::new();
    results(body, &mut made);
    made.remove(&body.args[0]);
    body.insts.iter().filter(move |inst| {
        let (Op::Tile(op), [r]) = (&inst.op, &inst.results[..]) else { return false };
        let plain = matches!(op, tile::Op::Map { .. } | tile::Op::Full { .. } | tile::Op::Reshape { .. });
        let again = plain && e.place(*r) == &Place::Uniform && !tile::operands(op).iter().any(|v| made.contains(v));
        if again {
            made.remove(r);
        }
        again
    })
}

impl<'a> Emitter<'a> {
    /// Loads the round of a loop that begins at `at`, if that is before its end.
    pub fn load_ahead(&mut self, ahead: &Ahead<'a>, body: &'a Block, at: Val, end: Val) -> Vec<Vec<Val>> {
        if ahead.loads.is_empty() {
            return Vec::new();
        }
        let again: Vec<&'a Inst> = steps(self, body).collect();
        let changed = again.iter().map(|inst| inst.results[0]).chain([body.args[0]]);
        let before: HashMap<ValueId, Option<Val>> = changed.map(|v| (v, self.uniform.get(&v).copied())).collect();
        self.uniform.insert(body.args[0], at);
        again.iter().for_each(|inst| self.inst(inst));
        let reading = self.t.f.cmp("slt", at, end);
        let outer = std::mem::replace(&mut self.reading, reading);
        let loaded = ahead.loads.iter().map(|load| self.load_tile(load)).collect();
        self.reading = outer;
        for (v, value) in before {
            match value {
                Some(value) => self.uniform.insert(v, value),
                None => self.uniform.remove(&v),
            };
        }
        loaded
    }

    fn load_tile(&mut self, load: &Load<'a>) -> Vec<Val> {
        let Place::Shared(b) = self.place(load.result) else { unreachable!("it was found there") };
        let fill = self.fill(load.op, load.result, self.buffer(*b));
        let (total, rounds) = (fill.chunks(), fill.rounds(self.t.threads));
        let mut values = Vec::new();
        for i in 0..rounds {
            let partial = i + 1 == rounds && !total.is_multiple_of(self.t.threads);
            let (c, _) = self.round(self.t.tid, i, partial.then_some(total));
            let access = self.moved_from(&fill, c).expect("loads and gathers have one");
            values.extend(self.load_from(&access, true));
        }
        values
    }

    /// Reads inputs of arithmetic on fragments further down, of which `now` says whether they can be; it is told what is made until then.
    pub fn read_early(&mut self, insts: &'a [Inst], now: impl Fn(&Self, ValueId, &HashSet<ValueId>) -> bool) {
        let mut made = HashSet::new();
        for inst in insts {
            made.extend(&inst.results);
            let (Op::Tile(tile::Op::Map { inputs, .. }), [r]) = (&inst.op, &inst.results[..]) else { continue };
            let Place::Fragment(f) = self.place(*r) else { continue };
            let lazy: Vec<ValueId> = inputs.iter().copied().filter(|&v| now(self, v, &made)).collect();
            if lazy.is_empty() {
                continue;
            }
            let (shape, spread) = (self.shape(*r), Spread::new(self, *f, self.shape(*r)));
            for v in lazy {
                let values = self.fragment_input(v, shape, &spread);
                self.early.insert((*r, v), values);
            }
        }
    }

    /// Whether a value is a load from global memory, or a view of one, that depends on none of these.
    pub fn loads_only(&self, v: ValueId, made: &HashSet<ValueId>) -> bool {
        if made.contains(&v) || self.place(v) != &Place::Lazy {
            return false;
        }
        match self.definition(v) {
            Some(tile::Op::Load { index, .. }) => {
                !index.iter().any(|i| matches!(i, Index::Value(v) if made.contains(v)))
            }
            Some(tile::Op::Reshape { x, .. }) => self.loads_only(*x, made),
            _ => false,
        }
    }
}
