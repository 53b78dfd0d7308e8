//! Loads that a block begins with, where it would come to them behind a barrier:
//!
//! ```text
//! put x down                     h = load w            (on its way, in registers)
//! barrier                        put x down
//! s = sum of x²                  put w = h down
//! y = x s (load w)      ──▶      barrier
//! ..                             s = sum of x²
//! b = load ..                    y = x s w
//! y · b                          put b = h' down; y · b
//! ```
//!
//! A launch of few blocks takes as long as what a block waits for, one thing after the other. What it reads of memory that no launch writes while it
//! runs, at places that are known from the start, it need not wait for twice. It costs registers until the tile is put down, and shared memory for
//! what was read where it was used.

use super::barriers::Reads;
use super::schedule::Scheduler;
use dsc_ir::sched::{Block, Inst, Op, Place};
use dsc_ir::tile::{self, Access, Index, MapArg, MapFn, ValueId};
use std::collections::HashSet;

/// A load that is made early.
struct Early {
    /// Where it is among the instructions.
    at: usize,
    /// Where it is put down, if not there.
    down: Option<usize>,
    bytes: u32,
    /// Whether no launch writes it.
    constant: bool,
}

impl Scheduler<'_> {
    /// Makes a block's loads begin with it, for at most so many bytes of a thread's registers.
    pub(super) fn begin_early(&mut self, block: &mut Block, room: u32) {
        for inst in &mut block.insts {
            if let Op::If { then, otherwise, .. } = &mut inst.op {
                self.begin_early(then, room);
                self.begin_early(otherwise, room);
            }
        }
        let early = self.known_early(block);
        let mut left = room;
        let mut chosen = self.late_loads(block, &early);
        // What is put down anyway first.
        chosen.sort_by_key(|load| load.down.is_some());
        chosen.retain(|load| {
            let fits = load.bytes <= left;
            left -= if fits { load.bytes } else { 0 };
            fits
        });
        // What is constant need not wait for launches before.
        chosen.sort_by_key(|load| (!load.constant, load.at));
        if !chosen.is_empty() {
            self.move_to_front(block, &early, &chosen);
        }
    }

    /// Scalars of a block that need no memory, and all that was there before it.
    fn known_early(&self, block: &Block) -> HashSet<usize> {
        let mut made: HashSet<ValueId> = block.insts.iter().flat_map(|i| i.results.iter().copied()).collect();
        let mut early = HashSet::new();
        for (at, inst) in block.insts.iter().enumerate() {
            let Op::Tile(op) = &inst.op else { continue };
            let scalar = inst.results.iter().all(|&r| self.place(r) == &Place::Uniform);
            let computed = matches!(
                op,
                tile::Op::BlockId { .. } | tile::Op::Sym(_) | tile::Op::Full { .. } | tile::Op::Map { .. }
            );
            if scalar && computed && tile::operands(op).iter().all(|v| !made.contains(v)) {
                inst.results.iter().for_each(|r| {
                    made.remove(r);
                });
                early.insert(at);
            }
        }
        early
    }

    /// Loads from known places that are put down behind another tile, or read only behind the first instruction that waits for other threads.
    fn late_loads(&self, block: &Block, early: &HashSet<usize>) -> Vec<Early> {
        let reads = Reads { defs: &self.defs, places: &self.places, channels: &self.channels };
        let lazy =
            |inst: &Inst| !inst.results.is_empty() && inst.results.iter().all(|&r| self.place(r) == &Place::Lazy);
        let meets = |inst: &Inst| match &inst.op {
            Op::Tile(tile::Op::Reduce { .. } | tile::Op::Dot { .. } | tile::Op::Scan { .. }) => true,
            Op::Tile(_) if lazy(inst) => false,
            Op::Tile(_) => !reads.touched(inst).0.is_empty(),
            _ => true,
        };
        let Some(meeting) = block.insts.iter().position(meets) else { return Vec::new() };
        // What is put down waits for its bytes, and so does what comes behind it.
        let put_down = |inst: &Inst| inst.results.iter().any(|&r| matches!(self.place(r), Place::Shared(_)));
        let first = block.insts.iter().position(put_down).unwrap_or(meeting).min(meeting);
        let late: HashSet<ValueId> = block
            .insts
            .iter()
            .enumerate()
            .filter(|(at, _)| !early.contains(at))
            .flat_map(|(_, i)| i.results.iter().copied())
            .collect();
        let mut found = Vec::new();
        for (at, inst) in block.insts.iter().enumerate() {
            let (Op::Tile(tile::Op::Load { view, index, .. }), [r]) = (&inst.op, &inst.results[..]) else { continue };
            let known = index.iter().all(|i| !matches!(i, Index::Value(v) if late.contains(v)));
            let constant = tile::access_of(&self.program.params, *view) == Some(Access::Constant);
            let down = match self.place(*r) {
                Place::Shared(_) if at > first => None,
                // What several branches or loops read lies somewhere already.
                Place::Lazy if at < meeting && self.first_reader(block, *r).is_some_and(|n| n > meeting) => {
                    Some(meeting)
                }
                Place::Lazy if at > meeting => Some(meeting),
                _ => continue,
            };
            if known && self.only_reads(*view) {
                let bytes = (self.tile(*r).elements() * self.tile(*r).dtype.bytes()) as u32;
                found.push(Early { at, down, bytes: bytes.div_ceil(self.threads), constant });
            }
        }
        found
    }

    /// The first instruction that evaluates a lazy value.
    fn first_reader(&self, block: &Block, v: ValueId) -> Option<usize> {
        block.insts.iter().position(|inst| {
            let lazy = !inst.results.is_empty() && inst.results.iter().all(|&r| self.place(r) == &Place::Lazy);
            match &inst.op {
                Op::Tile(op) => !lazy && tile::operands(op).iter().any(|&x| self.evaluates(x, v)),
                _ => true,
            }
        })
    }

    /// Whether evaluating `v` evaluates `x`.
    fn evaluates(&self, v: ValueId, x: ValueId) -> bool {
        v == x
            || self.place(v) == &Place::Lazy
                && self.defs.get(&v).is_some_and(|op| tile::operands(op).into_iter().any(|y| self.evaluates(y, x)))
    }

    fn move_to_front(&mut self, block: &mut Block, early: &HashSet<usize>, chosen: &[Early]) {
        let insts = std::mem::take(&mut block.insts);
        let (mut loads, mut down) = (Vec::new(), vec![Vec::new(); insts.len()]);
        let scalars = insts.iter().enumerate().filter(|(at, _)| early.contains(at)).map(|(_, i)| i.clone());
        let scalars: Vec<Inst> = scalars.collect();
        for load in chosen {
            let mut held = insts[load.at].clone();
            let r = held.results[0];
            let h = ValueId(self.types.len() as u32);
            self.types.push(self.types[r.0 as usize].clone());
            self.places.push(Place::Held);
            if let Op::Tile(op) = &held.op {
                self.defs.insert(h, op.clone());
            }
            held.results = vec![h];
            if self.place(r) == &Place::Lazy {
                let place = self.shared(r);
                self.set(r, place);
            }
            let op = tile::Op::Map { inputs: vec![h], body: MapFn { insts: Vec::new(), result: MapArg::Input(0) } };
            self.defs.insert(r, op.clone());
            loads.push(held);
            down[load.down.unwrap_or(load.at)].push(Inst { results: vec![r], op: Op::Tile(op), scratch: None });
        }
        block.insts = scalars;
        block.insts.extend(loads);
        for (at, inst) in insts.into_iter().enumerate() {
            block.insts.append(&mut down[at]);
            if !early.contains(&at) && !chosen.iter().any(|load| load.at == at) {
                block.insts.push(inst);
            }
        }
    }
}
