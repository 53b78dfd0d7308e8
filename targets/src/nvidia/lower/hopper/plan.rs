//! Contraction to scheduled tile IR with roles.
//!
//! A producer (one thread that drives the copy engine; a warpgroup, where rows are gathered by number) fills a ring of stages with tiles of both operands; consumer warpgroups multiply from
//! it and store. Everything else of the program goes to the roles that need it: scalars to both, scales and the
//! epilogue to the consumers. Products are kept one group deep: a stage is released when the product after it has been issued, so
//! the first round of a plain contraction stands before the loop.
//!
//! With scales, partial sums of two rounds are in flight and each is added to the accumulator while the other is made.

use super::config::{Config, Epilogue, ROWS, WARPGROUP, part_bytes};
use super::contraction::{Contraction, STEP_BYTES, definitions};
use super::fragment::varies;
use super::halves::halves;
use super::store::in_pieces;
use super::tensor_map::{can_copy, view_type};
use super::values::{Names, Values, plain, rename_index, slice, value_of};
use crate::Kernel;
use crate::nvidia::arch::Arch;
use dsc_ir::DType;
use dsc_ir::sched::{
    Atom, Block, Buffer, BufferId, Channel, ChannelId, Cluster, Fragment, Inst, Op, Place, Role, Scheduled,
};
use dsc_ir::tile::{self, Index, MapArg, MapFn, MapInst, Program, Region, Scalar, ScalarOp, TileType, Type, ValueId};
use std::collections::{HashMap, HashSet, VecDeque};

/// Row tiles that are walked together: their rows of the left operand and a few columns of the right one stay in the cache.
const BAND: u32 = 16;
/// Registers of a thread of the producer and of the consumers, where there are two consumer warpgroups.
const REGISTERS: [u32; 2] = [24, 240];
/// The same where the producer's threads gather rows.
const GATHERING_REGISTERS: [u32; 2] = [40, 232];
/// Registers where there are three.
const REGISTERS_OF_THREE: [u32; 2] = [32, 160];
/// The only channel.
const RING: ChannelId = ChannelId(0);

/// The schedule of a program that is one contraction; none if it is not, or the copy engine cannot bring its operands.
pub fn plan(kernel: &Kernel, arch: &Arch) -> Option<Scheduled> {
    plan_whole(&kernel.program, kernel.schedule.cluster, arch).or_else(|| {
        let c = Contraction::of(&kernel.program)?;
        // Numbers of gathered rows take the registers that halves would save.
        let gathered = c.lefts.iter().any(|l| l.gathered.is_some());
        let program = (c.shape()[0].is_multiple_of(2 * ROWS) && !gathered).then(|| halves(&kernel.program))??;
        plan_whole(&program, kernel.schedule.cluster, arch)
    })
}

/// The same with all rows of a tile at once.
fn plan_whole(program: &Program, cluster: u32, arch: &Arch) -> Option<Scheduled> {
    let c = Contraction::of(program)?;
    if !matches!(c.dtype, DType::Bf16 | DType::F16 | DType::E4m3) || !c.step.is_multiple_of(c.stage_k()) {
        return None;
    }
    for operand in c.operands() {
        can_copy(operand, view_type(&program.types, operand.view)?, c.stage_k()).then_some(())?;
    }
    let config = Config::of(&c, epilogue(program)?, arch)?;
    let mut planner = Planner::new(program, c, config);
    planner.cluster = planner.shared_copies(cluster);
    planner.scheduled()
}

/// What the program does with the product; none if it stores nothing.
fn epilogue(program: &Program) -> Option<Epilogue> {
    let written: Vec<&tile::Param> = program.params.iter().filter(|p| p.access != tile::Access::Read).collect();
    let mut defs = HashMap::new();
    definitions(&program.body, &mut defs);
    let (mut stores, mut reduced) = (Vec::new(), false);
    for_each(&program.body, &mut |inst| match &inst.op {
        tile::Op::Store { index, .. } | tile::Op::Scatter { index, .. } => {
            stores.push(index.last().map_or(1, |&i| divisor(i, &defs)));
        }
        tile::Op::Reduce { .. } => reduced = true,
        _ => {}
    });
    let staged = match (written.as_slice(), stores.iter().min()) {
        ([], _) | (_, None) => return None,
        (&[one], Some(&columns)) => in_pieces(view_type(&program.types, one.value)?, columns),
        _ => false,
    };
    Some(Epilogue { staged, reduced })
}

/// Visits every instruction.
pub fn for_each<'a>(region: &'a Region, visit: &mut dyn FnMut(&'a tile::Inst)) {
    for inst in &region.insts {
        visit(inst);
        match &inst.op {
            tile::Op::For { body, .. } => for_each(body, visit),
            tile::Op::If { then, otherwise, .. } => [then, otherwise].into_iter().for_each(|r| for_each(r, visit)),
            _ => {}
        }
    }
}

/// A number that divides an index.
fn divisor(i: Index, defs: &HashMap<ValueId, &tile::Inst>) -> u32 {
    let op = match i {
        Index::Const(0) => return 1 << 16,
        Index::Const(c) => return 1 << c.trailing_zeros().min(16),
        Index::Value(v) => defs.get(&v).map(|inst| &inst.op),
    };
    let Some(tile::Op::Map { body: MapFn { insts, result: MapArg::Inst(last) }, .. }) = op else { return 1 };
    let Some(MapInst { op: ScalarOp::Mul, args }) = insts.get(*last as usize) else { return 1 };
    let constant = args.iter().find_map(|a| match a {
        MapArg::Inst(i) => match insts.get(*i as usize)?.op {
            ScalarOp::Const(Scalar::I32(n)) => u32::try_from(n).ok(),
            _ => None,
        },
        MapArg::Input(_) => None,
    });
    constant.unwrap_or(1)
}

struct Planner<'a> {
    program: &'a Program,
    c: Contraction<'a>,
    config: Config,
    defs: HashMap<ValueId, &'a tile::Inst>,
    /// What the producer computes.
    produced: HashSet<ValueId>,
    /// What the consumers compute.
    consumed: HashSet<ValueId>,
    /// What of that needs the product.
    after: HashSet<ValueId>,
    /// Numbers of rows that scales are gathered by.
    scale_rows: HashSet<ValueId>,
    /// Results that maxima are taken of and that are used again: computed once, and kept in registers.
    kept: HashSet<ValueId>,
    values: Values<'a>,
    /// Blocks that share copies, and whether those are of the right operands, else of the left one.
    cluster: Option<(Cluster, bool)>,
}

impl<'a> Planner<'a> {
    fn new(program: &'a Program, c: Contraction<'a>, config: Config) -> Planner<'a> {
        let mut defs = HashMap::new();
        definitions(&program.body, &mut defs);
        let mut p = Planner {
            program,
            c,
            config,
            defs,
            produced: HashSet::new(),
            consumed: HashSet::new(),
            after: HashSet::new(),
            scale_rows: HashSet::new(),
            kept: HashSet::new(),
            values: Values::new(program),
            cluster: None,
        };
        let mut copied = p.bounds();
        for operand in p.c.operands() {
            copied.extend(operand.index.iter().filter_map(|i| value_of(*i)).chain(operand.gathered));
        }
        p.produced = p.slice(copied);
        let mut kept = p.bounds();
        for_each(&program.body, &mut |inst| {
            if let tile::Op::Store { .. } | tile::Op::Scatter { .. } = &inst.op {
                kept.extend(tile::operands(&inst.op));
            }
        });
        kept.extend(&p.c.body.yields);
        p.consumed = p.slice(kept);
        let after = |p: &Planner<'_>, v: ValueId| p.slice(vec![v]).iter().any(|&v| p.c.is_product(v));
        let gathered = p.c.body.insts.iter().filter_map(|i| match i.op {
            tile::Op::Gather { rows, .. } => Some(rows),
            _ => None,
        });
        p.scale_rows = gathered.collect();
        p.kept = p.split_for_maxima();
        p.after = p.c.body.insts.iter().filter_map(|i| i.results.first().copied()).filter(|&v| after(&p, v)).collect();
        p
    }

    /// Which copies so many blocks can share: of the larger operand, if neighbours along some axis of the grid want the same of it and
    /// something else of the other.
    fn shared_copies(&self, blocks: u32) -> Option<(Cluster, bool)> {
        let axes = |operand: &super::contraction::Operand<'_>| -> HashSet<u32> {
            let values = operand.index.iter().filter_map(|i| value_of(*i)).chain(operand.gathered).collect();
            let ops = self.slice(values).into_iter().filter_map(|v| self.defs.get(&v)).map(|i| &i.op);
            ops.filter_map(|op| if let tile::Op::BlockId { axis } = op { Some(*axis) } else { None }).collect()
        };
        let all =
            |operands: &[super::contraction::Operand<'_>]| operands.iter().flat_map(axes).collect::<HashSet<u32>>();
        let (left, right) = (all(&self.c.lefts), all(&self.c.rights));
        let bounds = self.slice(self.bounds());
        let bounded =
            bounds.iter().any(|v| matches!(self.defs.get(v), Some(i) if matches!(i.op, tile::Op::BlockId { .. })));
        let [rows, columns] = self.c.shape();
        let rows = rows * self.c.lefts.len() as u32;
        // Of equals the left: blocks that run side by side are of one column, and the cache answers their requests for the right ones once.
        let rights = columns * self.c.rights.len() as u32 > rows;
        let (shared, own) = if rights { (right, left) } else { (left, right) };
        let share = self.c.shape()[usize::from(rights)];
        let axis = (0..2).find(|a| own.contains(a) && !shared.contains(a))?;
        let whole = (2..=8).contains(&blocks) && share.is_multiple_of(blocks * 8) && !bounded && !self.gathers();
        whole.then_some((Cluster { axis, blocks }, rights))
    }

    /// Whether rows of the left operands are gathered by number.
    fn gathers(&self) -> bool {
        self.c.lefts.iter().any(|l| l.gathered.is_some())
    }

    /// Maps to matrices whose rows are split into groups of columns for a reduction.
    fn split_for_maxima(&self) -> HashSet<ValueId> {
        let mut reduced = Vec::new();
        for_each(&self.program.body, &mut |inst| {
            if let tile::Op::Reduce { x, .. } = inst.op {
                reduced.push(x);
            }
        });
        let split = |v: ValueId| match self.defs.get(&v)?.op {
            tile::Op::Reshape { x, .. } => Some(x),
            _ => None,
        };
        let kept = |&v: &ValueId| {
            let t = self.tile(v);
            t.is_some_and(|t| t.dtype == DType::F32 && t.shape == self.c.shape())
                && matches!(self.defs.get(&v), Some(tile::Inst { op: tile::Op::Map { .. }, .. }))
        };
        self.slice(reduced).into_iter().filter_map(split).filter(kept).collect()
    }

    /// Values that bound loops.
    fn bounds(&self) -> Vec<ValueId> {
        let mut out = Vec::new();
        for_each(&self.program.body, &mut |inst| {
            if let tile::Op::For { lo, hi, .. } = inst.op {
                out.extend([lo, hi].into_iter().filter_map(value_of));
            }
        });
        out
    }

    /// The body of a loop around the contraction, without carried values.
    fn around(&self, inst: &'a tile::Inst) -> Option<(Index, Index, u32, &'a Region)> {
        let tile::Op::For { lo, hi, step, init, body } = &inst.op else { return None };
        let mut holds = false;
        for_each(body, &mut |i| holds |= i.results == self.c.k_loop.results);
        (holds && init.is_empty()).then_some((*lo, *hi, *step, body))
    }

    /// That loop as a role runs it.
    fn loop_around(
        &mut self,
        (lo, hi, step, body): (Index, Index, u32, &'a Region),
        names: &mut Names,
        role: fn(&mut Self, &'a Region, &mut Names) -> Option<Vec<Inst>>,
    ) -> Option<Inst> {
        let (lo, hi) = (rename_index(lo, names)?, rename_index(hi, names)?);
        let counter = self.values.fresh(self.program.ty(body.args[0]).clone(), Place::Uniform);
        names.insert(body.args[0], counter);
        let body = Block { args: vec![counter], insts: role(self, body, names)?, yields: Vec::new() };
        Some(plain(Op::For { lo, hi, step, init: Vec::new(), body }))
    }

    /// These values and what they are computed from; a product's operands are not followed.
    fn slice(&self, roots: Vec<ValueId>) -> HashSet<ValueId> {
        slice(&self.defs, roots, |v| self.c.is_product(v))
    }

    fn tile(&self, v: ValueId) -> Option<&'a TileType> {
        self.program.tile(v)
    }

    fn fragment(&self) -> Place {
        let atom = if self.config.transposed { Atom::WgmmaTransposed } else { Atom::Wgmma };
        Place::Fragment(Fragment { atom, warps: self.config.groups })
    }

    /// Where an instruction's result lies; none if no thread can have it.
    fn place(&self, inst: &tile::Inst) -> Option<Place> {
        let t = self.tile(*inst.results.first()?)?;
        if t.elements() == 1 {
            return Some(Place::Uniform);
        }
        let matrix = self.c.shape();
        match &inst.op {
            // Numbers of rows that operands are scaled by: each thread keeps those of its rows.
            tile::Op::Map { .. } if self.scale_rows.contains(&inst.results[0]) => Some(self.fragment()),
            tile::Op::Map { .. } if self.kept.contains(&inst.results[0]) => Some(self.fragment()),
            tile::Op::Reshape { x, .. } => (varies(&self.tile(*x)?.shape) == varies(&t.shape)).then_some(Place::Lazy),
            tile::Op::Full { .. } | tile::Op::Map { .. } => Some(Place::Lazy),
            tile::Op::Iota { .. } | tile::Op::Load { .. } if t.dtype == DType::I32 => {
                (t.shape == [matrix[0]]).then_some(Place::Lazy)
            }
            tile::Op::Gather { .. } if t.dtype == DType::F32 && t.shape == [matrix[0], 1] => Some(self.fragment()),
            tile::Op::Load { .. } if t.dtype == DType::F32 => match t.shape[..] {
                [r, 1] if r == matrix[0] => Some(self.fragment()),
                [1, c] if c == matrix[1] => Some(self.fragment()),
                _ => None,
            },
            _ => None,
        }
    }

    fn scalar(&mut self, value: i32) -> (Inst, ValueId) {
        let result = self.values.fresh(Type::Tile(TileType::scalar(DType::I32)), Place::Uniform);
        let op = tile::Op::Full { value: Scalar::I32(value), shape: Vec::new() };
        (Inst { results: vec![result], op: Op::Tile(op), scratch: None }, result)
    }

    /// `v + by`, a scalar.
    fn plus(&mut self, v: ValueId, by: u32) -> (Inst, ValueId) {
        let result = self.values.fresh(Type::Tile(TileType::scalar(DType::I32)), Place::Uniform);
        let insts = vec![
            MapInst { op: ScalarOp::Const(Scalar::I32(by as i32)), args: Vec::new() },
            MapInst { op: ScalarOp::Add, args: vec![MapArg::Input(0), MapArg::Inst(0)] },
        ];
        let op = tile::Op::Map { inputs: vec![v], body: MapFn { insts, result: MapArg::Inst(1) } };
        (Inst { results: vec![result], op: Op::Tile(op), scratch: None }, result)
    }

    fn scheduled(mut self) -> Option<Scheduled> {
        let mut names = self.values.names.clone();
        let producer = self.producer(&self.program.body, &mut names)?;
        let mut names = self.values.names.clone();
        let consumer = self.consumer(&self.program.body, &mut names)?;
        let warps = self.config.warpgroups() * WARPGROUP / Arch::WARP;
        let gathers = self.gathers();
        let groups = self.config.warpgroups();
        let redistributed = groups >= 2 && !self.config.transposed;
        // Registers move between whole warpgroups; without that, one warp is enough to drive the copy engine.
        let (produces, consumes) = match (redistributed, gathers) {
            (true, _) => ([0, 4], [4, 4 + warps]),
            (false, true) => ([warps, warps + 4], [0, warps]),
            (false, false) => ([warps, warps + 1], [0, warps]),
        };
        let registers = match (groups, gathers) {
            (3, _) => REGISTERS_OF_THREE,
            (_, true) => GATHERING_REGISTERS,
            (_, false) => REGISTERS,
        };
        let role = |name: &str, warps, registers, elected, insts| Role {
            name: name.into(),
            warps,
            registers: redistributed.then_some(registers),
            elected,
            body: Block { insts, ..Block::default() },
        };
        let roles = vec![
            role("producer", produces, registers[0], !gathers, producer),
            role("consumer", consumes, registers[1], false, consumer),
        ];
        let buffers = self.buffers();
        Some(Scheduled {
            name: self.program.name.clone(),
            grid: self.program.grid.clone(),
            persistent: Some(BAND),
            cluster: self.cluster.map(|c| c.0),
            team: 1,
            folded: false,
            alternate: false,
            dies: 1,
            params: self.values.params,
            threads: produces[1].max(consumes[1]) * Arch::WARP,
            buffers,
            channels: vec![Channel {
                name: "operands".into(),
                stages: self.config.stages,
                slots: (0..self.c.operands().len() as u32).map(BufferId).collect(),
            }],
            types: self.values.types,
            places: self.values.places,
            common: Block::default(),
            roles,
        })
    }

    fn buffers(&self) -> Vec<Buffer> {
        let [left, right] = self.config.slot_bytes;
        let slot = |name: &str, bytes: u32, offset: u32| Buffer {
            name: name.into(),
            dtype: self.c.dtype,
            shape: [bytes / STEP_BYTES, self.c.stage_k()],
            pitch: STEP_BYTES,
            swizzle: STEP_BYTES,
            copies: self.config.stages,
            offset,
        };
        let (mut buffers, mut end) = (Vec::new(), 0);
        let slots = [("left", left, self.c.lefts.len()), ("right", right, self.c.rights.len())];
        for (name, bytes, _) in slots.into_iter().flat_map(|s| std::iter::repeat_n(s, s.2)) {
            buffers.push(slot(name, bytes, end));
            end += bytes * self.config.stages;
        }
        for _ in 0..self.config.staged {
            let mut staging = slot("result", self.config.staging_bytes, end);
            (staging.dtype, staging.copies) = (DType::Bf16, 1);
            staging.shape[1] = STEP_BYTES / 2;
            buffers.push(staging);
            end += self.config.staging_bytes;
        }
        let rows = self.c.shape()[0];
        let bytes = part_bytes(self.config.row_parts, rows);
        if bytes > 0 {
            buffers.push(Buffer {
                name: "maxima".into(),
                dtype: DType::F32,
                shape: [self.config.row_parts, rows.next_multiple_of(8)],
                pitch: bytes / self.config.row_parts,
                swizzle: 0,
                copies: 1,
                offset: end,
            });
        }
        buffers
    }

    /// A region as the producer runs it.
    fn producer(&mut self, region: &'a Region, names: &mut Names) -> Option<Vec<Inst>> {
        let mut out = Vec::new();
        for inst in &region.insts {
            if inst.results == self.c.k_loop.results {
                let fill = self.fill_loop(names, &mut out)?;
                out.push(fill);
            } else if let Some(around) = self.around(inst) {
                out.push(self.loop_around(around, names, Self::producer)?);
            } else if inst.results.first().is_some_and(|r| self.produced.contains(r)) {
                // Which rows a thread brings is its own affair: no place of a fragment.
                let place = self.place(inst)?;
                let place = if matches!(place, Place::Fragment(_)) { Place::Lazy } else { place };
                out.push(self.values.copied(inst, place, names)?);
            }
        }
        Some(out)
    }

    /// The bounds of the loop over `k` as a role has them: where the number of rounds is known, the end follows from the start.
    fn bounds_in(&mut self, names: &Names, out: &mut Vec<Inst>) -> Option<(Index, Index)> {
        let (lo, hi, step) = self.c.range;
        let lo = rename_index(lo, names)?;
        let hi = match (self.c.rounds, lo) {
            (Some(rounds), Index::Value(v)) => {
                let (inst, end) = self.plus(v, rounds * step);
                out.push(inst);
                Index::Value(end)
            }
            _ => rename_index(hi, names)?,
        };
        Some((lo, hi))
    }

    /// The loop over `k` that fills stages.
    fn fill_loop(&mut self, names: &mut Names, out: &mut Vec<Inst>) -> Option<Inst> {
        let c = self.c.clone();
        let step = c.range.2;
        let (lo, hi) = self.bounds_in(names, out)?;
        let counter = self.values.fresh(self.program.ty(c.body.args[0]).clone(), Place::Uniform);
        names.insert(c.body.args[0], counter);
        let mut insts = Vec::new();
        for inst in &c.body.insts {
            if !inst.results.first().is_some_and(|r| self.produced.contains(r)) {
                continue;
            }
            let place = self.place(inst)?;
            insts.push(self.values.copied(inst, place, names)?);
        }
        for part in 0..c.step / c.stage_k() {
            let mut copies = Vec::new();
            for (slot, operand) in c.operands().into_iter().enumerate() {
                let mut index: Vec<Index> =
                    operand.index.iter().map(|&i| rename_index(i, names)).collect::<Option<_>>()?;
                let last = index.last_mut()?;
                if part > 0 {
                    *last = match *last {
                        Index::Const(at) => Index::Const(at + i64::from(part * c.stage_k())),
                        Index::Value(v) => {
                            let (inst, v) = self.plus(v, part * c.stage_k());
                            insts.push(inst);
                            Index::Value(v)
                        }
                    };
                }
                let shared = self.cluster.is_some_and(|(_, rights)| rights == (slot >= c.lefts.len()));
                let mut shape = operand.shape.to_vec();
                *shape.last_mut()? = c.stage_k();
                let view = *names.get(&operand.view)?;
                let rows = operand.gathered.map(|r| names.get(&r).copied().ok_or(())).transpose().ok()?;
                copies.push(plain(Op::Copy { channel: RING, slot: slot as u32, view, rows, index, shape, shared }));
            }
            insts.push(plain(Op::Acquire(RING)));
            insts.extend(copies);
            insts.push(plain(Op::Commit(RING)));
        }
        let body = Block { args: vec![counter], insts, yields: Vec::new() };
        Some(plain(Op::For { lo, hi, step, init: Vec::new(), body }))
    }

    /// A region as the consumers run it.
    fn consumer(&mut self, region: &'a Region, names: &mut Names) -> Option<Vec<Inst>> {
        let mut out = Vec::new();
        let mut stores = 0_u32;
        for inst in &region.insts {
            if inst.results == self.c.k_loop.results {
                let totals = if self.c.direct { self.sum(names, &mut out)? } else { self.scaled_sum(names, &mut out)? };
                names.extend(inst.results.iter().copied().zip(totals));
            } else if let Some(around) = self.around(inst) {
                out.push(self.loop_around(around, names, Self::consumer)?);
            } else if let tile::Op::Reduce { .. } = &inst.op {
                out.extend(self.row_maxima(inst, names)?);
            } else if let tile::Op::Store { value, .. } | tile::Op::Scatter { value, .. } = &inst.op {
                self.storable(self.tile(*value)?).then_some(())?;
                let mut store = self.values.copied(inst, Place::Lazy, names)?;
                if let Some(number) = stores.checked_rem(self.config.staged) {
                    store.scratch = Some(BufferId(self.c.operands().len() as u32 + number));
                }
                stores += 1;
                out.push(store);
            } else if inst.results.first().is_some_and(|r| self.consumed.contains(r)) {
                let place = self.place(inst)?;
                out.push(self.values.copied(inst, place, names)?);
            } else if !inst.results.first().is_some_and(|r| self.produced.contains(r)) {
                return None;
            }
        }
        Some(out)
    }

    /// Whether threads have the elements of such a tile: results, or one value a row.
    fn storable(&self, t: &TileType) -> bool {
        let [rows, columns] = self.c.shape();
        let count = if t.shape.last() == Some(&1) { rows } else { rows * columns };
        t.shape.len() > 1 && t.shape.last().is_some_and(|&n| n == 1 || n == columns) && t.elements() == count as usize
    }

    /// The largest element of each row of a tile of results.
    fn row_maxima(&mut self, inst: &tile::Inst, names: &mut Names) -> Option<Vec<Inst>> {
        let tile::Op::Reduce { x, axis, kind: tile::ReduceKind::Max } = inst.op else { return None };
        let t = self.tile(x)?;
        let rows = t.dtype == DType::F32
            && axis as usize + 1 == t.shape.len()
            && t.shape.last() == Some(&self.c.shape()[1])
            && self.storable(t);
        rows.then_some(())?;
        let one = self.tile(inst.results[0])?.elements() == 1;
        let place = if one { Place::Uniform } else { self.fragment() };
        let result = self.values.fresh(self.program.ty(inst.results[0]).clone(), place);
        names.insert(inst.results[0], result);
        let op = tile::Op::Reduce { x: *names.get(&x)?, axis, kind: tile::ReduceKind::Max };
        let mut out = Vec::new();
        let mut scratch = None;
        if self.config.row_parts > 1 {
            // Some thread may still read the maxima of the tile before.
            out.push(plain(Op::Barrier));
            scratch = Some(BufferId(self.c.operands().len() as u32 + self.config.staged));
        }
        out.push(Inst { results: vec![result], op: Op::Tile(op), scratch });
        Some(out)
    }

    /// A new value for each product's result.
    fn results(&mut self) -> Vec<ValueId> {
        let types: Vec<Type> = self.c.dots.iter().map(|d| self.program.ty(d.results[0]).clone()).collect();
        let place = self.fragment();
        types.into_iter().map(|ty| self.values.fresh(ty, place.clone())).collect()
    }

    /// Waits for the stages of one round and multiplies them; the sums with `accs`. Of each stage but the first the one `lag` before is
    /// released once it is multiplied; of the first too if `first`.
    fn multiply(
        &mut self,
        mut accs: Option<Vec<ValueId>>,
        (lag, first): (Option<u32>, bool),
        out: &mut Vec<Inst>,
    ) -> Vec<ValueId> {
        let c = self.c.clone();
        for part in 0..c.step / c.stage_k() {
            out.push(plain(Op::Wait(RING)));
            let taken = self.take(out);
            let results = self.results();
            for (i, &result) in results.iter().enumerate() {
                let acc = accs.as_ref().map(|accs| accs[i]);
                let [a, b] = self.operands_of(&taken, i);
                let op = tile::Op::Dot { a, b, acc, trans_b: true };
                out.push(Inst { results: vec![result], op: Op::Tile(op), scratch: None });
            }
            if let Some(lag) = lag
                && (first || part > 0)
            {
                out.push(plain(Op::Release { channel: RING, lag }));
            }
            accs = Some(results);
        }
        accs.unwrap_or_default()
    }

    /// Zeros for each product's sum.
    fn zeros(&mut self, out: &mut Vec<Inst>) -> Vec<ValueId> {
        let shape = self.c.shape().to_vec();
        let ty = TileType { dtype: DType::F32, shape: shape.clone() };
        let zero = self.values.fresh(Type::Tile(ty), Place::Lazy);
        let op = Op::Tile(tile::Op::Full { value: Scalar::F32(0.0), shape });
        out.push(Inst { results: vec![zero], op, scratch: None });
        vec![zero; self.c.dots.len()]
    }

    fn counter(&mut self) -> ValueId {
        self.values.fresh(self.program.ty(self.c.body.args[0]).clone(), Place::Uniform)
    }

    /// A loop that carries sums; `body` gets its counter and the sums.
    fn carrying(
        &mut self,
        (lo, hi, step): (Index, Index, u32),
        init: Vec<ValueId>,
        out: &mut Vec<Inst>,
        body: impl FnOnce(&mut Self, ValueId, Vec<ValueId>, &mut Vec<Inst>) -> Option<Vec<ValueId>>,
    ) -> Option<Vec<ValueId>> {
        let counter = self.counter();
        let carried = self.results();
        let mut insts = Vec::new();
        let yields = body(self, counter, carried.clone(), &mut insts)?;
        let args = [counter].into_iter().chain(carried).collect();
        let results = self.results();
        let op = Op::For { lo, hi, step, init, body: Block { args, insts, yields } };
        out.push(Inst { results: results.clone(), op, scratch: None });
        Some(results)
    }

    /// `Σ_k a · bᵀ`.
    fn sum(&mut self, names: &Names, out: &mut Vec<Inst>) -> Option<Vec<ValueId>> {
        let step = self.c.range.2;
        let (lo, hi) = self.bounds_in(names, out)?;
        let Some(rounds) = self.c.rounds else {
            // There may be no round at all: nothing can stand before the loop.
            let zeros = self.zeros(out);
            return self.carrying((lo, hi, step), zeros, out, |p, _, accs, out| {
                Some(p.multiply(Some(accs), (Some(0), true), out))
            });
        };
        let second = match lo {
            Index::Const(first) => Index::Const(first + i64::from(step)),
            Index::Value(first) => {
                let (inst, second) = self.plus(first, step);
                out.push(inst);
                Index::Value(second)
            }
        };
        let mut totals = self.multiply(None, (Some(1), false), out);
        if rounds > 1 {
            let rest = (second, hi, step);
            totals =
                self.carrying(rest, totals, out, |p, _, accs, out| Some(p.multiply(Some(accs), (Some(1), true), out)))?;
        }
        out.push(plain(Op::Release { channel: RING, lag: 0 }));
        Some(totals)
    }

    /// The same with maps of each round's partial sums into the accumulators.
    ///
    /// A turn of the loop takes several rounds. In it partial sums of some rounds are in flight: a round's products are issued, then the oldest
    /// partial sums are added while the younger ones are made. None is in flight from turn to turn, which the assembler would serialise.
    /// What sums are scaled by is loaded some rounds before.
    fn scaled_sum(&mut self, names: &Names, out: &mut Vec<Inst>) -> Option<Vec<ValueId>> {
        let (lo, hi) = self.bounds_in(names, out)?;
        let (step, products, ahead) = (self.c.range.2, self.c.dots.len(), self.config.loads_ahead);
        let mut accs = self.zeros(out);
        let first = match lo {
            Index::Value(v) => v,
            Index::Const(n) => {
                let (inst, v) = self.scalar(i32::try_from(n).ok()?);
                out.push(inst);
                v
            }
        };
        let rounds = self.c.rounds;
        let turn = ((2 * self.config.partials).max(4) / products as u32).max(ahead);
        let each_turn = rounds.map_or(1, |rounds| turn.max(2).min(rounds));
        let rest = rounds.map_or(0, |rounds| rounds % each_turn);
        let end = match rounds {
            Some(rounds) if rest > 0 => {
                let (inst, end) = self.plus(first, (rounds - rest) * step);
                out.push(inst);
                Index::Value(end)
            }
            _ => hi,
        };
        let mut loaded = VecDeque::new();
        for round in 0..ahead {
            loaded.push_back(self.load_round((first, round * step), names, out)?);
        }
        let counter = self.counter();
        let init: Vec<ValueId> = accs.iter().copied().chain(loaded.iter().flatten().copied()).collect();
        let carried = |p: &mut Self| -> Vec<ValueId> {
            let mut all = p.results();
            for &v in &init[products..] {
                all.push(p.values.fresh(p.values.types[v.0 as usize].clone(), p.values.places[v.0 as usize].clone()));
            }
            all
        };
        let by_round = |values: &[ValueId]| -> VecDeque<Vec<ValueId>> {
            let each = values.len() / ahead as usize;
            (0..ahead as usize).map(|i| values[i * each..(i + 1) * each].to_vec()).collect()
        };
        let args = carried(self);
        let mut insts = Vec::new();
        let mut next = by_round(&args[products..]);
        let sums = args[..products].to_vec();
        let sums = self.scaled_rounds((counter, each_turn, true), (sums, &mut next), names, &mut insts)?;
        let yields = sums.into_iter().chain(next.into_iter().flatten()).collect();
        let body = Block { args: [counter].into_iter().chain(args).collect(), insts, yields };
        let results = carried(self);
        let op = Op::For { lo, hi: end, step: step * each_turn, init, body };
        out.push(Inst { results: results.clone(), op, scratch: None });
        accs = results[..products].to_vec();
        if let (Index::Value(counter), true) = (end, rest > 0) {
            let mut loaded = by_round(&results[products..]);
            accs = self.scaled_rounds((counter, rest, false), (accs, &mut loaded), names, out)?;
        }
        Some(accs)
    }

    /// `count` rounds from `counter` on, the first of which `loaded` has what is loaded for; afterwards it has that of the first
    /// rounds behind, if there are `more`.
    fn scaled_rounds(
        &mut self,
        (counter, count, more): (ValueId, u32, bool),
        (mut accs, loaded): (Vec<ValueId>, &mut VecDeque<Vec<ValueId>>),
        names: &Names,
        out: &mut Vec<Inst>,
    ) -> Option<Vec<ValueId>> {
        let (step, ahead) = (self.c.range.2, self.config.loads_ahead);
        let products = self.c.dots.len() as u32;
        let (mut flight, mut taken, mut waited) = (VecDeque::new(), Vec::new(), 0);
        let (mut issued, mut ready) = (0, None);
        for round in 0..count {
            let now = loaded.pop_front()?;
            let mut factors: Option<Names> = ready.take();
            for product in 0..products {
                let unit = round * products + product;
                while issued < (unit + self.config.partials).min(count * products) {
                    if issued % products == 0 {
                        // In front of a wait the assembler leaves them there; between products they would hold these up.
                        match (&factors, loaded.front().cloned()) {
                            (None, _) => factors = Some(self.factors(&now, names, out)?),
                            (_, Some(next)) if product > 0 => ready = Some(self.factors(&next, names, out)?),
                            _ => {}
                        }
                        taken = self.wait_for_round(out);
                        waited += 1;
                    }
                    flight.push_back(self.issue(&taken, (issued % products) as usize, out));
                    issued += 1;
                }
                let next = more || round + ahead < count;
                // With several products registers are scarce: what this round was loaded for makes room first.
                if next && products == 1 {
                    loaded.push_back(self.load_round((counter, (round + ahead) * step), names, out)?);
                }
                let last = (product + 1 == products).then_some(waited - 1 - round);
                if factors.is_none() {
                    factors = Some(self.factors(&now, names, out)?);
                }
                let names = factors.as_ref()?;
                accs = self.promote((accs, flight.pop_front()?), (product as usize, last), names, out)?;
                if next && last.is_some() && products > 1 {
                    loaded.push_back(self.load_round((counter, (round + ahead) * step), names, out)?);
                }
            }
        }
        Some(accs)
    }

    /// Waits for the stages of a round; what is in their slots, stage by stage.
    fn wait_for_round(&mut self, out: &mut Vec<Inst>) -> Vec<Vec<ValueId>> {
        let c = self.c.clone();
        let mut stages = Vec::new();
        for _ in 0..c.step / c.stage_k() {
            out.push(plain(Op::Wait(RING)));
            stages.push(self.take(out));
        }
        stages
    }

    /// The operands of a product, of what is in the slots.
    fn operands_of(&self, taken: &[ValueId], product: usize) -> [ValueId; 2] {
        let [left, right] = self.c.pairs[product];
        [taken[left], taken[self.c.lefts.len() + right]]
    }

    /// What is in the slots of the stage waited for last.
    fn take(&mut self, out: &mut Vec<Inst>) -> Vec<ValueId> {
        let c = self.c.clone();
        let mut taken = Vec::new();
        for (slot, operand) in c.operands().into_iter().enumerate() {
            let ty = TileType { dtype: c.dtype, shape: vec![operand.rows, c.stage_k()] };
            taken.push(self.values.fresh(Type::Tile(ty), Place::Slot(RING, slot as u32)));
            let op = Op::Take { channel: RING, slot: slot as u32 };
            out.push(Inst { results: vec![taken[slot]], op, scratch: None });
        }
        taken
    }

    /// The partial sum of one of the products of a round.
    fn issue(&mut self, stages: &[Vec<ValueId>], product: usize, out: &mut Vec<Inst>) -> ValueId {
        let mut acc = None;
        let ty = self.program.ty(self.c.dots[product].results[0]).clone();
        for taken in stages {
            let result = self.values.fresh(ty.clone(), self.fragment());
            let [a, b] = self.operands_of(taken, product);
            let op = tile::Op::Dot { a, b, acc, trans_b: true };
            out.push(Inst { results: vec![result], op: Op::Tile(op), scratch: None });
            acc = Some(result);
        }
        acc.unwrap_or(ValueId(u32::MAX))
    }

    /// What the maps of a round take from memory.
    fn round_loads(&self) -> Vec<ValueId> {
        let loads =
            self.c.body.insts.iter().filter(|i| matches!(i.op, tile::Op::Load { .. } | tile::Op::Gather { .. }));
        let results = loads.filter_map(|i| i.results.first().copied());
        results.filter(|r| self.consumed.contains(r) && !self.after.contains(r)).collect()
    }

    /// Instructions of the loop that those values need, without what is loaded, the products, and what needs them.
    fn computed_for(&self, roots: Vec<ValueId>, loads: &[ValueId]) -> Vec<&'a tile::Inst> {
        let (mut seen, mut pending) = (HashSet::new(), roots);
        while let Some(v) = pending.pop() {
            let stops = loads.contains(&v) || self.c.is_product(v);
            if seen.insert(v)
                && !stops
                && let Some(inst) = self.defs.get(&v)
            {
                pending.extend(tile::operands(&inst.op));
            }
        }
        let wanted = |r: &ValueId| seen.contains(r) && !loads.contains(r) && !self.after.contains(r);
        self.c.body.insts.iter().filter(|i| i.results.first().is_some_and(wanted)).collect()
    }

    /// Loads what the round `offset` after `counter` is scaled by.
    fn load_round(
        &mut self,
        (counter, offset): (ValueId, u32),
        names: &Names,
        out: &mut Vec<Inst>,
    ) -> Option<Vec<ValueId>> {
        let loads = self.round_loads();
        let operands = loads.iter().filter_map(|v| self.defs.get(v)).flat_map(|i| tile::operands(&i.op)).collect();
        let mut names = names.clone();
        let (inst, at) = self.plus(counter, offset);
        out.push(inst);
        names.insert(self.c.body.args[0], at);
        for inst in self.computed_for(operands, &[]) {
            let place = self.place(inst)?;
            out.push(self.values.copied(inst, place, &mut names)?);
        }
        for load in &loads {
            let inst = *self.defs.get(load)?;
            let place = self.place(inst)?;
            out.push(self.values.copied(inst, place, &mut names)?);
        }
        loads.iter().map(|v| names.get(v).copied()).collect()
    }

    /// Names of what partial sums of a round are scaled by, which is computed; `loaded` is of the round.
    fn factors(&mut self, loaded: &[ValueId], names: &Names, out: &mut Vec<Inst>) -> Option<Names> {
        let c = self.c.clone();
        let loads = self.round_loads();
        let mut names = names.clone();
        names.extend(loads.iter().copied().zip(loaded.iter().copied()));
        let scaled =
            |i: &&'a tile::Inst| i.results.first().is_some_and(|r| self.after.contains(r) && !c.is_product(*r));
        let operands = c.body.insts.iter().filter(scaled).flat_map(|i| tile::operands(&i.op)).collect();
        for inst in self.computed_for(operands, &loads) {
            let column = self.tile(inst.results[0])?.shape == [c.shape()[0], 1];
            let place = match self.place(inst)? {
                Place::Lazy if column && !self.config.transposed => self.fragment(),
                place => place,
            };
            out.push(self.values.copied(inst, place, &mut names)?);
        }
        Some(names)
    }

    /// Adds the partial sums of one product of a round to its accumulator; `names` has the round's factors. With the `last` product its
    /// stages are given back, the waits for so many younger rounds after theirs.
    fn promote(
        &mut self,
        (mut accs, partial): (Vec<ValueId>, ValueId),
        (product, last): (usize, Option<u32>),
        names: &Names,
        out: &mut Vec<Inst>,
    ) -> Option<Vec<ValueId>> {
        let c = self.c.clone();
        let parts = c.step / c.stage_k();
        for part in 0..last.map_or(0, |_| parts) {
            out.push(plain(Op::Release { channel: RING, lag: (last? + 1) * parts - 1 - part }));
        }
        let mut names = names.clone();
        names.insert(c.dots[product].results[0], partial);
        names.extend(c.body.args[1..].iter().copied().zip(accs.iter().copied()));
        let wanted = self.slice(vec![c.body.yields[product]]);
        let after = |i: &&'a tile::Inst| {
            i.results.first().is_some_and(|r| wanted.contains(r) && self.after.contains(r) && !c.is_product(*r))
        };
        let maps: Vec<&'a tile::Inst> = c.body.insts.iter().filter(after).collect();
        for inst in maps {
            out.push(self.combination(inst, &mut names)?);
        }
        accs[product] = *names.get(&c.body.yields[product])?;
        Some(accs)
    }

    /// An instruction of the loop that comes after the products.
    fn combination(&mut self, inst: &tile::Inst, names: &mut Names) -> Option<Inst> {
        let place = if self.c.body.yields.contains(&inst.results[0]) { self.fragment() } else { Place::Lazy };
        let floats = inst
            .results
            .iter()
            .chain(&tile::operands(&inst.op))
            .all(|&v| self.tile(v).is_some_and(|t| t.dtype == DType::F32));
        let mut new = self.values.copied(inst, place, names)?;
        if let Op::Tile(tile::Op::Map { body, .. }) = &mut new.op
            && floats
        {
            contract(body);
        }
        Some(new)
    }
}

/// Makes one fused operation of each product that is used by one sum only: it is rounded once instead of twice.
fn contract(body: &mut MapFn) {
    let uses = |body: &MapFn, i: usize| {
        let by = body.insts.iter().flat_map(|n| &n.args).chain([&body.result]);
        by.filter(|a| **a == MapArg::Inst(i as u32)).count()
    };
    for at in 0..body.insts.len() {
        let MapInst { op: ScalarOp::Add, args } = body.insts[at].clone() else { continue };
        let &[a, b] = args.as_slice() else { continue };
        for (product, other) in [(b, a), (a, b)] {
            let MapArg::Inst(i) = product else { continue };
            let factors = body.insts[i as usize].clone();
            if factors.op == ScalarOp::Mul && uses(body, i as usize) == 1 {
                body.insts[at] = MapInst { op: ScalarOp::Fma, args: vec![factors.args[0], factors.args[1], other] };
                break;
            }
        }
    }
    drop_unused(body);
}

/// Removes instructions that nothing uses.
fn drop_unused(body: &mut MapFn) {
    while let Some(dead) = (0..body.insts.len() as u32).rev().find(|&i| {
        let used = |a: &MapArg| *a == MapArg::Inst(i);
        !used(&body.result) && !body.insts.iter().flat_map(|n| &n.args).any(used)
    }) {
        body.insts.remove(dead as usize);
        for a in body.insts.iter_mut().flat_map(|n| &mut n.args).chain([&mut body.result]) {
            if let MapArg::Inst(i) = a
                && *i > dead
            {
                *i -= 1;
            }
        }
    }
}
