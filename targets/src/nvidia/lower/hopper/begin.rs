//! The first round of computed rows, under way before it is known where the rounds end.
//!
//! A tile of attention begins with loads that each need the one before: where its selection ends, numbers of rows, their pages, rows. Which
//! round is a block's first does not depend on the end, so the last three begin at once, and the end is looked for meanwhile:
//!
//! ```text
//! end = last of a list                   numbers, pages, rows of round lo
//! numbers, pages, rows of round lo   =>  end = last of a list
//! for k = lo to end {..}                 for k = lo to end {..}
//! ```
//!
//! If there is no such round, what was loaded is of no use: all loads stay inside of their views, whatever the lists say.

use super::emit::Emit;
use super::fill::{Filled, Loaded, MOST_LOADED, Numbered, fills_of};
use crate::nvidia::lower::mlir::{Val, i32};
use dsc_ir::sched::{Block, Inst, Op, Place};
use dsc_ir::tile::{self, Index, ValueId};
use std::collections::HashSet;

/// The first round of a loop that computes rows, under way.
pub struct Begun {
    /// Numbers of its rows, and what those of the next are looked up by.
    pub(super) numbers: Vec<Numbered>,
    pub(super) listed: Vec<Numbered>,
    pub(super) loaded: Loaded,
    /// Tiles whose loads have been issued.
    pub(super) ahead: usize,
}

impl<'a> Emit<'a> {
    /// Issues the loads of the first round, and of the lists of the second; of none where it is known that there is none.
    pub(super) fn first_round(
        &mut self,
        (lo, hi, step): (Val, Option<Val>, Val),
        body: &'a Block,
        fills: &[Filled],
    ) -> Result<Begun, String> {
        let listed = self.read_lists(body, lo)?;
        let numbers = self.numbers_at(body, lo, hi, &listed)?;
        let second = self.t.f.add(lo, step);
        let listed = self.read_lists(body, second)?;
        let mut loaded = Loaded::default();
        self.load_rows(fills[0], &numbers, &mut loaded)?;
        let whole = loaded.values(&loaded.keys()).len() * fills.len() <= MOST_LOADED;
        let ahead = if whole { fills.len() } else { 1 };
        for &fill in &fills[1..ahead] {
            self.load_rows(fill, &numbers, &mut loaded)?;
        }
        Ok(Begun { numbers, listed, loaded, ahead })
    }

    /// Begins the loop of a block that computes rows, where what its first round needs is known without reading memory. Gives the values in
    /// front of it that are computed then.
    pub fn begin_rows(&mut self, block: &'a Block) -> Result<HashSet<ValueId>, String> {
        let none = HashSet::new();
        let computes = |i: &Inst| matches!(&i.op, Op::For { body, .. } if self.computes_rows(body));
        let Some(at) = block.insts.iter().position(computes) else { return Ok(none) };
        let (front, rounds) = (&block.insts[..at], &block.insts[at]);
        let Op::For { lo, step, body, .. } = &rounds.op else { return Ok(none) };
        let made: HashSet<ValueId> = front.iter().flat_map(|i| i.results.iter().copied()).collect();
        let mut early = HashSet::new();
        let mut insts = Vec::new();
        for inst in front {
            if self.is_known(inst, |v| !made.contains(&v) || early.contains(&v)) {
                early.extend(inst.results.iter().copied());
                insts.push(inst);
            }
        }
        let operands = |i: &Inst| if let Op::Tile(op) = &i.op { tile::operands(op) } else { Vec::new() };
        let first = if let Index::Value(v) = lo { Some(*v) } else { None };
        let mut uses = body.insts.iter().flat_map(operands).chain(first);
        if !uses.all(|v| !made.contains(&v) || early.contains(&v)) {
            return Ok(none);
        }
        insts.into_iter().try_for_each(|inst| self.inst(inst))?;
        let lo = self.index(*lo)?;
        self.begun = Some(self.first_round((lo, None, i32((*step).into())), body, &fills_of(body))?);
        Ok(early)
    }

    /// Whether an instruction makes a scalar of others that are known, and reads no memory.
    fn is_known(&self, inst: &Inst, known: impl Fn(ValueId) -> bool) -> bool {
        let computes = match &inst.op {
            Op::Number => true,
            Op::Tile(tile::Op::Load { .. } | tile::Op::Gather { .. } | tile::Op::Reduce { .. }) => false,
            Op::Tile(op) => tile::operands(op).into_iter().all(known),
            _ => false,
        };
        computes && inst.results.iter().all(|r| self.s.places[r.0 as usize] == Place::Uniform)
    }
}
