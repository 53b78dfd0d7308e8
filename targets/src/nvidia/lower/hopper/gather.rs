//! Rows chosen by number.
//!
//! The producer's threads bring gathered rows themselves: eight threads a row, 16 bytes each, into the swizzle that products read. Each
//! thread's copies arrive by themselves, so that as many stages are under way as the ring has; who waits for a stage makes what came visible to
//! the products' side of memory.

use super::emit::{Emit, Held};
use super::fill::{Numbered, ROW_THREADS};
use super::ptx;
use super::ring::Delivery;
use super::tensor_map::view_type;
use crate::nvidia::lower::arith;
use crate::nvidia::lower::mlir::{Ty, Val, i32, i64};
use dsc_ir::sched::{Block, ChannelId, Inst, Op};
use dsc_ir::tile::{self, Index, Type, ValueId};

use std::collections::HashMap;

/// Bytes that a thread brings at a time.
const PIECE: u32 = 16;

/// Whether rows are chosen in a body.
fn chosen_in(body: &Block, rows: ValueId) -> bool {
    body.insts.iter().any(|i| i.results.contains(&rows))
}

impl<'a> Emit<'a> {
    /// One element of a vector of integers, by its number.
    pub fn row_element(&mut self, v: ValueId, row: Val) -> Result<Val, String> {
        self.vector_element(v, row, &mut HashMap::new())
    }

    /// The same; `seen` keeps what this element's computation has already given.
    pub fn vector_element(&mut self, v: ValueId, row: Val, seen: &mut HashMap<ValueId, Val>) -> Result<Val, String> {
        if let Some(Held::Scalar(x)) = self.held.get(&v) {
            return Ok(*x);
        }
        if let Some(&known) = seen.get(&v) {
            return Ok(known);
        }
        let value = self.new_element(v, row, seen)?;
        seen.insert(v, value);
        Ok(value)
    }

    fn new_element(&mut self, v: ValueId, row: Val, seen: &mut HashMap<ValueId, Val>) -> Result<Val, String> {
        let op = match self.defs.get(&v).map(|i| &i.op) {
            Some(Op::Tile(op)) => op,
            _ => return Err(format!("%{} is no vector of integers", v.0)),
        };
        match op {
            tile::Op::Full { value, .. } => Ok(arith::constant(*value)),
            tile::Op::Iota { .. } => Ok(row),
            tile::Op::Load { view, index, shape } => {
                let axis = shape.iter().position(|&n| n > 1).unwrap_or(0);
                if shape.iter().filter(|&&n| n > 1).count() > 1 {
                    return Err("a vector of a matrix".into());
                }
                let mut at = index.iter().map(|&i| self.index(i)).collect::<Result<Vec<_>, _>>()?;
                at[axis] = self.t.f.add(at[axis], row);
                let (at, inside) = self.element_at(*view, &at);
                Ok(ptx::load_i32_if(&mut self.t.f, inside, at))
            }
            tile::Op::Gather { view, rows, index, shape } if shape.iter().skip(1).all(|&n| n == 1) => {
                let mut at = vec![self.vector_element(*rows, row, seen)?];
                for &i in index {
                    at.push(self.index(i)?);
                }
                let (at, inside) = self.element_at(*view, &at);
                Ok(ptx::load_i32_if(&mut self.t.f, inside, at))
            }
            tile::Op::Reshape { x, .. } => self.vector_element(*x, row, seen),
            tile::Op::Map { inputs, body } => {
                let mut args = Vec::new();
                for &input in inputs {
                    args.push((self.vector_element(input, row, seen)?, self.dtype(input)));
                }
                Ok(arith::apply(&mut self.t.f, self.t.arch, body, &args).0)
            }
            _ => Err(format!("%{} is no elementwise arithmetic", v.0)),
        }
    }

    /// A column of scales, one for each of the tile's gathered rows.
    pub fn gather_fragment(&mut self, r: ValueId, view: ValueId, rows: ValueId, index: &[Index]) -> Result<(), String> {
        let numbers = self.gathered_numbers(rows)?;
        let index = index.iter().map(|&i| self.index(i)).collect::<Result<Vec<_>, _>>()?;
        let mut values = Vec::new();
        for number in numbers {
            let at: Vec<Val> = [number].into_iter().chain(index.iter().copied()).collect();
            let (at, inside) = self.element_at(view, &at);
            values.push(ptx::load_f32_if(&mut self.t.f, inside, at));
        }
        self.held.insert(r, Held::Registers(values, [true, false]));
        Ok(())
    }

    /// Numbers of the rows that a thread has elements of.
    pub fn gathered_numbers(&self, rows: ValueId) -> Result<Vec<Val>, String> {
        match self.held.get(&rows) {
            Some(Held::Scalar(x)) => Ok(vec![*x; self.the_geometry()?.varying(true, false).len()]),
            Some(Held::Registers(values, [true, false])) => Ok(values.clone()),
            _ => Err(format!("%{} is not held", rows.0)),
        }
    }

    /// Rows that the role's threads bring at a time.
    pub fn rows_at_once(&self) -> u32 {
        self.role_barrier_threads() / ROW_THREADS
    }

    /// The first of this thread's rows, and its piece of each.
    fn own_piece(&mut self) -> [Val; 2] {
        [self.t.f.div(self.role_tid, ROW_THREADS), self.t.f.rem(self.role_tid, ROW_THREADS)]
    }

    /// Finds the rows that the copies of a loop's body bring: those chosen in it, or those that are the same in all its rounds.
    pub fn prepare_rows(&mut self, body: &'a Block, inside: bool) -> Result<(), String> {
        for inst in &body.insts {
            let Op::Copy { view, rows: Some(rows), shape, .. } = &inst.op else { continue };
            if chosen_in(body, *rows) == inside {
                self.number_rows(*rows, shape[0], inside)?;
                let base = if inside { Some(self.base_of_rows(*view)) } else { None };
                self.find_rows(*view, *rows, shape[0], base)?;
            }
        }
        Ok(())
    }

    /// Whether a loop's body brings rows that are chosen in it, and does nothing else.
    pub fn brings_rows(&self, inst: &Inst, body: &Block) -> bool {
        let chosen = |i: &Inst| matches!(i.op, Op::Copy { rows: Some(rows), .. } if chosen_in(body, rows));
        inst.results.is_empty() && self.geometries_are_none() && body.insts.iter().any(chosen)
    }

    /// Such a loop. What numbers of rows are looked up by is read a round earlier.
    pub fn gathering(&mut self, (lo, hi, step): (Index, Index, u32), body: &'a Block) -> Result<(), String> {
        self.prepare_rows(body, false)?;
        let (lo, hi) = (self.index(lo)?, self.index(hi)?);
        let step = i32(step.into());
        let listed = self.read_lists(body, lo)?;
        let named: Vec<(ValueId, u32)> = listed.iter().map(|n| n.0).collect();
        let mut carried: Vec<Val> = self.ring_state();
        let counters = carried.len();
        carried.extend(listed.iter().map(|n| n.1));
        let end = self.counted((lo, hi, step), &carried, |e, counter, values| {
            ptx::warp_waits(&mut e.t.f);
            let (rings, listed) = values.split_at(counters);
            e.resume(rings);
            let mut listed: Vec<Numbered> = named.iter().copied().zip(listed.iter().copied()).collect();
            e.uniforms_at(body, counter)?;
            e.numbers.clear();
            e.sources.retain(|(_, rows), _| !chosen_in(body, *rows));
            let acquires: Vec<usize> =
                (0..body.insts.len()).filter(|&i| matches!(body.insts[i].op, Op::Acquire(_))).collect();
            let ahead = acquires.get(acquires.len() / 2).copied();
            for (i, inst) in body.insts.iter().enumerate() {
                if let (Op::Acquire(_), Some(next)) = (&inst.op, body.insts.get(i + 1)) {
                    e.rows_of_copy(body, &next.op, &listed)?;
                }
                if ahead == Some(i) {
                    for inst in &body.insts {
                        e.number_copy(body, &inst.op, &listed)?;
                    }
                    let next = e.t.f.add(counter, step);
                    listed = e.read_lists(body, next)?;
                    e.uniforms_at(body, counter)?;
                }
                e.inst(inst)?;
            }
            Ok(e.ring_state().into_iter().chain(listed.iter().map(|n| n.1)).collect())
        })?;
        self.resume(&end[..counters]);
        Ok(())
    }

    /// Finds the rows that a copy brings, if no copy before it has: there are no registers for those of all.
    fn rows_of_copy(&mut self, body: &'a Block, op: &Op, listed: &[Numbered]) -> Result<(), String> {
        self.number_copy(body, op, listed)?;
        match op {
            Op::Copy { view, rows: Some(rows), shape, .. }
                if chosen_in(body, *rows) && !self.sources.contains_key(&(*view, *rows)) =>
            {
                let base = self.base_of_rows(*view);
                self.find_rows(*view, *rows, shape[0], Some(base))
            }
            _ => Ok(()),
        }
    }

    /// Numbers of the rows that a copy brings, of what was read for them.
    fn number_copy(&mut self, body: &'a Block, op: &Op, listed: &[Numbered]) -> Result<(), String> {
        let Op::Copy { rows: Some(rows), shape, .. } = op else { return Ok(()) };
        let [first, _] = self.own_piece();
        for start in (0..shape[0]).step_by(self.rows_at_once() as usize) {
            if !chosen_in(body, *rows) || self.numbers.contains_key(&(*rows, start)) {
                continue;
            }
            let row = self.t.f.add(first, i32(start.into()));
            let mut here = listed.iter().filter(|n| n.0.1 == start).map(|n| (n.0.0, n.1)).collect();
            let number = self.vector_element(*rows, row, &mut here)?;
            self.numbers.insert((*rows, start), number);
        }
        Ok(())
    }

    /// Reads the numbers of this thread's rows; those that are known are `kept`.
    fn number_rows(&mut self, rows: ValueId, count: u32, kept: bool) -> Result<(), String> {
        let [first, _] = self.own_piece();
        for start in (0..count).step_by(self.rows_at_once() as usize) {
            let key = (rows, start);
            if kept && self.numbers.contains_key(&key) {
                continue;
            }
            let row = self.t.f.add(first, i32(start.into()));
            let number = self.row_element(rows, row)?;
            self.numbers.insert(key, number);
        }
        Ok(())
    }

    /// Where this thread's part of the first row is.
    fn base_of_rows(&mut self, view: ValueId) -> Val {
        let (base, _) = self.element_at(view, &[i32(0), i32(0)]);
        self.own_part(base)
    }

    /// Finds where this thread's part of the rows of those numbers is. From a `base` of all rows it is one instruction a row, and two registers.
    fn find_rows(&mut self, view: ValueId, rows: ValueId, count: u32, base: Option<Val>) -> Result<(), String> {
        let mut sources = Vec::new();
        for start in (0..count).step_by(self.rows_at_once() as usize) {
            let number = *self.numbers.get(&(rows, start)).ok_or("rows whose numbers are not known")?;
            let (at, inside) = self.element_at(view, &[number, i32(0)]);
            // An address outside the view is never read, but it must not leave the buffer either.
            let at = match base {
                Some(_) => {
                    let number = self.t.f.select(inside, number, i32(0));
                    self.element_from(view, &[i32(0), i32(0)], base, Some((0, number)), (0, 0)).0
                }
                None => {
                    let param = self.param(view);
                    let at = self.t.f.select(inside, at, param);
                    self.own_part(at)
                }
            };
            sources.push((at, inside));
        }
        self.sources.insert((view, rows), sources);
        Ok(())
    }

    /// This thread's piece of the row that starts there.
    fn own_part(&mut self, at: Val) -> Val {
        let [_, piece] = self.own_piece();
        let byte = self.t.f.mul(piece, i32(PIECE.into()));
        let byte = self.t.f.cast("zext", byte, Ty::I64);
        self.t.f.offset(at, byte)
    }

    /// Starts this thread's part of a gathering copy.
    pub fn gather_rows(
        &mut self,
        channel: ChannelId,
        slot: u32,
        view: ValueId,
        rows: ValueId,
        index: &[Index],
    ) -> Result<(), String> {
        let buffer = &self.s.buffers[self.s.channels[channel.0 as usize].slots[slot as usize].0 as usize];
        let sources = self.sources.get(&(view, rows)).cloned().ok_or("gathered rows outside a loop")?;
        let [column] = index else { return Err("rows gathered from a view that is no matrix".into()) };
        let Type::Tile(rows_type) = &self.s.types[rows.0 as usize] else { return Err("rows that are no tile".into()) };
        let count = rows_type.elements() as u32;
        let column = self.index(*column)?;
        let byte = self.t.f.mul(column, i32(self.dtype(view).bytes() as i64));
        let byte = self.t.f.cast("zext", byte, Ty::I64);
        let stage = self.rings[channel.0 as usize].stage;
        let base = self.t.f.add(self.t.shared32, i32(buffer.offset.into()));
        let offset = self.t.f.mul(stage, i32(buffer.copy_bytes().into()));
        let base = self.t.f.add(base, offset);
        let [first, piece] = self.own_piece();
        // Rows of one thread are 8 or 16 apart, so that they turn their pieces alike.
        let own = self.swizzled(first, piece);
        let base = self.t.f.add(base, own);
        let apart = self.rows_at_once();
        // Where rows end in the middle of a line of 256 bytes, its other half is another row's, which nobody asked for.
        let pitch = view_type(&self.s.types, view).and_then(|ty| ty.strides.first()).map_or(0, |s| s.bytes);
        let line = if pitch % 256 == 128 { 128 } else { 256 };
        for (i, (from, inside)) in sources.into_iter().enumerate() {
            let from = self.t.f.offset(from, byte);
            let to = self.t.f.add(base, i32((i as u32 * apart * buffer.pitch).into()));
            let wanted = if (i as u32 + 1) * apart <= count {
                Val::Int(1, Ty::I1)
            } else {
                let row = self.t.f.add(first, i32((i as u32 * apart).into()));
                self.t.f.cmp("ult", row, i32(count.into()))
            };
            for panel in 0..buffer.panels() {
                let from = self.t.f.offset(from, i64((panel * buffer.pitch).into()));
                let to = self.t.f.add(to, i32((panel * buffer.panel_bytes()).into()));
                ptx::copy_piece(&mut self.t.f, to, from, (inside, wanted), line);
            }
        }
        Ok(())
    }

    /// Ends a stage of the producer.
    pub fn commit(&mut self, channel: ChannelId) -> Result<(), String> {
        let ring = self.rings[channel.0 as usize].clone();
        match ring.delivery {
            Delivery::Both(_) | Delivery::Gathered(_) => {
                let full = self.barrier_at(channel, false, ring.stage);
                ptx::copies_arrive(&mut self.t.f, full);
            }
            Delivery::Written(_) => {
                // No fence here: it would wait for loads that run ahead.
                let full = self.barrier_at(channel, false, ring.stage);
                if ring.shared {
                    let (drives, bytes) = (self.drives(), self.others_bytes(channel));
                    ptx::barrier_arrive_expecting(&mut self.t.f, full, drives, bytes);
                } else {
                    ptx::barrier_arrive(&mut self.t.f, full);
                }
            }
            Delivery::Engine => {}
        }
        if !self.own.contains(&channel) {
            self.advance(channel);
        }
        Ok(())
    }
}
