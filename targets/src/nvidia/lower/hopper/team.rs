//! Tiles that the blocks of a team exchange, through one another's shared memory.
//!
//! A matrix lies there as registers have it: four of a thread's registers together, those of neighbouring threads side by side, so that a warp moves
//! whole lines and no bank waits. Registers of a piece are neighbours: pieces are numbered as registers are, by 64 of the instruction's rows first.

use super::config::WARPGROUP;
use super::emit::{Emit, Held};
use super::ptx;
use crate::nvidia::lower::mlir::{Val, i32};
use dsc_ir::sched::{BufferId, Op};
use dsc_ir::tile::ValueId;
use std::collections::HashMap;

/// Registers that a thread moves at a time, and their bytes.
const TOGETHER: usize = 4;
const BYTES: u32 = 16;

impl Emit<'_> {
    /// Rank in the cluster of a block of this one's number in its team, by its number among those that share copies.
    pub fn rank_of(&mut self, shares: Val) -> Val {
        let first = self.t.f.mul(self.member, i32(self.cluster.into()));
        self.t.f.add(first, shares)
    }

    /// All threads of the team wait for one another.
    pub fn meet(&mut self) -> Result<(), String> {
        self.settle_all();
        self.met += 1;
        let all = self.s.roles.iter().map(|r| r.body.insts.iter().filter(|i| i.op == Op::Meet).count()).max();
        if all == Some(self.met) {
            // What comes next into this memory may come by the copy engine.
            ptx::fence_async(&mut self.t.f);
        }
        ptx::cluster_barrier(&mut self.t.f);
        Ok(())
    }

    /// Writes a tile for the team's other blocks.
    pub fn put_part(&mut self, buffer: BufferId, value: ValueId) -> Result<(), String> {
        let (geometry, data) = (self.seen_in(value)?, &self.s.buffers[buffer.0 as usize]);
        let base = self.t.f.add(self.t.shared32, i32(data.offset.into()));
        if data.shape[1] == 1 {
            return self.fill_rows(&geometry, value, data, base);
        }
        let registers = geometry.registers();
        if geometry.shape != data.shape || !registers.len().is_multiple_of(TOGETHER) {
            return Err(format!("%{} is no tile of a product's shape", value.0));
        }
        let own = self.own_place(base);
        let mut seen = HashMap::new();
        for (n, four) in (0..).zip(registers.chunks(TOGETHER)) {
            let values = four.iter().map(|&at| self.element(value, at, &mut seen)).collect::<Result<Vec<_>, _>>()?;
            let at = self.t.f.add(own, i32((n * WARPGROUP * BYTES).into()));
            ptx::store_shared_floats(&mut self.t.f, at, &values);
        }
        Ok(())
    }

    /// What the block so many places behind this one has put, or the piece of it that is this block's.
    pub fn get_part(&mut self, r: ValueId, buffer: BufferId, after: u32, own: bool) -> Result<(), String> {
        let (data, team) = (&self.s.buffers[buffer.0 as usize], self.team);
        let &[rows, columns] = self.shape(r) else { return Err(format!("%{} is no matrix", r.0)) };
        let down = data.shape[0] / rows;
        let (row, mut column) = (self.t.f.rem(self.member, down), self.t.f.div(self.member, down));
        let across = data.shape[1] / columns;
        if across * down < team {
            let there = self.t.f.cmp("ult", column, i32(across.into()));
            column = self.t.f.select(there, column, i32(i64::from(across) - 1));
        }
        let other = self.t.f.add(self.member, i32(after.into()));
        let other = self.t.f.bin("urem", other, i32(team.into()));
        let rank = self.t.f.mul(other, i32(self.cluster.into()));
        let rank = self.t.f.add(rank, self.rank);
        let base = self.t.f.add(self.t.shared32, i32(data.offset.into()));
        if columns == 1 {
            let first = self.t.f.mul(row, i32((rows * data.pitch).into()));
            let base = self.t.f.add(base, first);
            let base = ptx::address_in(&mut self.t.f, base, rank);
            return self.read_rows(r, data.pitch, base, ptx::load_cluster_f32);
        }
        let registers = self.geometry(r)?.registers().len();
        if !registers.is_multiple_of(TOGETHER) {
            return Err(format!("%{} is a piece of {registers} registers", r.0));
        }
        let groups = registers / TOGETHER;
        let mut base = self.own_place(base);
        if own {
            let number = self.t.f.mul(column, i32(down.into()));
            let number = self.t.f.add(number, row);
            let first = self.t.f.mul(number, i32((groups as u32 * WARPGROUP * BYTES).into()));
            base = self.t.f.add(base, first);
        }
        let base = ptx::address_in(&mut self.t.f, base, rank);
        let mut values = Vec::new();
        for n in 0..groups as u32 {
            let at = self.t.f.add(base, i32((n * WARPGROUP * BYTES).into()));
            values.extend(ptx::load_cluster_floats(&mut self.t.f, at));
        }
        self.held.insert(r, Held::Registers(values, [true, true]));
        Ok(())
    }

    fn own_place(&mut self, base: Val) -> Val {
        let own = self.t.f.mul(self.role_tid, i32(BYTES.into()));
        self.t.f.add(base, own)
    }
}
