//! Contraction to scheduled tile IR with roles.
//!
//! A producer (one thread that drives the copy engine; a warpgroup, where rows are gathered by number) fills a ring of stages with tiles of both operands; consumer warpgroups multiply from
//! it and store. Everything else of the program goes to the roles that need it: scalars to both, scales and the
//! epilogue to the consumers. What each role runs is in [`super::roles`], sums with scales in [`super::promote`].

use super::config::{Config, Epilogue, ROWS, WARPGROUP, part_bytes};
use super::contraction::{Contraction, STEP_BYTES, definitions};
use super::fragment::varies;
use super::halves::halves;
use super::store::in_pieces;
use super::tensor_map::{can_copy, view_type};
use super::values::{Names, Values, plain, plus, rename_index, slice, value_of};
use crate::Kernel;
use crate::nvidia::arch::Arch;
use dsc_ir::DType;
use dsc_ir::sched::{
    Atom, Block, Buffer, BufferId, Channel, ChannelId, Cluster, Fragment, Inst, Op, Place, Role, Scheduled,
};
use dsc_ir::tile::{self, Access, Index, MapArg, Program, Region, Scalar, ScalarOp, TileType, Type, ValueId};
use std::collections::{HashMap, HashSet};

/// Row tiles that are walked together: their rows of the left operand and a few columns of the right one stay in the cache.
const BAND: u32 = 16;
/// Registers of a thread of the producer and of the consumers, where there are two consumer warpgroups.
const REGISTERS: [u32; 2] = [24, 240];
/// The same where the producer's threads gather rows.
const GATHERING_REGISTERS: [u32; 2] = [40, 232];
/// Registers where there are three.
const REGISTERS_OF_THREE: [u32; 2] = [32, 160];
/// What is asked of the alignment of columns, in elements, is never more.
const MOST_ALIGNED: u32 = 1 << 16;
/// The only channel.
pub const RING: ChannelId = ChannelId(0);

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
    if c.across && !c.can_lie_across(&config) {
        return None;
    }
    let mut planner = Planner::new(program, c, config);
    planner.cluster = planner.shared_copies(cluster);
    planner.scheduled()
}

/// What the program does with the product; none if it stores nothing.
fn epilogue(program: &Program) -> Option<Epilogue> {
    let mut defs = HashMap::new();
    definitions(&program.body, &mut defs);
    let (mut stores, mut written, mut reduced) = (Vec::new(), HashSet::new(), false);
    for_each(&program.body, &mut |inst| match &inst.op {
        tile::Op::Store { view, index, .. } | tile::Op::Scatter { view, index, .. } => {
            written.insert(*view);
            stores.push(index.last().map_or(1, |&i| divisor(i, &|v| defs.get(&v).map(|inst| &inst.op))));
        }
        tile::Op::Reduce { .. } => reduced = true,
        _ => {}
    });
    let columns = *stores.iter().min()?;
    let mut written = written.into_iter();
    let staged = match (written.next()?, written.next()) {
        (one, None) => in_pieces(view_type(&program.types, one)?, columns),
        _ => false,
    };
    Some(Epilogue { staged, stores: stores.len() as u32, reduced })
}

/// A role that fills stages and one that empties them: warps and what they run, registers of a thread of each if they are not as launched, and
/// whether one thread fills.
pub fn two_roles(
    [(produces, producer), (consumes, consumer)]: [([u32; 2], Vec<Inst>); 2],
    registers: Option<[u32; 2]>,
    elected: bool,
) -> Vec<Role> {
    let role = |name: &str, number: usize, warps, elected, insts| Role {
        name: name.into(),
        warps,
        registers: registers.map(|r| r[number]),
        elected,
        body: Block { insts, ..Block::default() },
    };
    vec![role("producer", 0, produces, elected, producer), role("consumer", 1, consumes, false, consumer)]
}

/// Warps that gather so many rows of a stage, where operands change places: each brings four at a time, and a thread's rows are a multiple of eight apart.
/// The fewer, the more registers two blocks of a multiprocessor have.
fn gathering_warps(rows: u32) -> u32 {
    if rows <= 4 { 1 } else { 2 }
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

/// A power of two that divides an index, at most [`MOST_ALIGNED`]; `made` says by what a value is.
pub fn divisor<'a>(i: Index, made: &dyn Fn(ValueId) -> Option<&'a tile::Op>) -> u32 {
    let power = |n: i64| if n == 0 { MOST_ALIGNED } else { 1 << n.trailing_zeros().min(MOST_ALIGNED.ilog2()) };
    let op = match i {
        Index::Const(c) => return power(c),
        Index::Value(v) => made(v),
    };
    let Some(tile::Op::Map { inputs, body }) = op else { return 1 };
    let mut all: Vec<u32> = Vec::new();
    for inst in &body.insts {
        let of = |a: &MapArg| match a {
            MapArg::Inst(i) => all.get(*i as usize).copied().unwrap_or(1),
            MapArg::Input(i) => inputs.get(*i as usize).map_or(1, |&v| divisor(Index::Value(v), made)),
        };
        all.push(match (inst.op, inst.args.as_slice()) {
            (ScalarOp::Const(Scalar::I32(n)), _) => power(n.into()),
            (ScalarOp::Mul, [a, b]) => (of(a).saturating_mul(of(b))).min(MOST_ALIGNED),
            (ScalarOp::Add | ScalarOp::Sub, [a, b]) => of(a).min(of(b)),
            _ => 1,
        });
    }
    match body.result {
        MapArg::Inst(last) => all.get(last as usize).copied().unwrap_or(1),
        MapArg::Input(i) => inputs.get(i as usize).map_or(1, |&v| divisor(Index::Value(v), made)),
    }
}

/// A schedule being made.
pub struct Planner<'a> {
    /// The program.
    pub program: &'a Program,
    /// Its contraction.
    pub c: Contraction<'a>,
    /// How it is run.
    pub config: Config,
    /// What defines each value.
    pub defs: HashMap<ValueId, &'a tile::Inst>,
    /// What the producer computes.
    pub produced: HashSet<ValueId>,
    /// What the consumers compute.
    pub consumed: HashSet<ValueId>,
    /// What of that needs the product.
    pub after: HashSet<ValueId>,
    /// Numbers of rows that scales are gathered by.
    pub scale_rows: HashSet<ValueId>,
    /// Results that maxima are taken of and that are used again: computed once, and kept in registers.
    pub kept: HashSet<ValueId>,
    /// Values of the schedule.
    pub values: Values<'a>,
    /// Blocks that share copies, and whether those are of the right operands, else of the left one.
    pub cluster: Option<(Cluster, bool)>,
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
        let whole = (2..=8).contains(&blocks)
            && share.is_multiple_of(blocks * 8)
            && !bounded
            && !self.gathers()
            && !self.c.across;
        whole.then_some((Cluster { axis, blocks }, rights))
    }

    /// Tiles of axis 0 that are walked together. Where axis 1 chooses the rows, as experts do, all of axis 0: it is the columns, and the rows
    /// stay in the cache until each of its tiles has had them.
    fn band(&self) -> u32 {
        let bounds = self.slice(self.bounds());
        let of_axis_1 = |v| matches!(self.defs.get(v).map(|i| &i.op), Some(tile::Op::BlockId { axis: 1 }));
        let columns = self.program.grid.first().and_then(|d| Some(d.extent.constant()?.div_ceil(d.tile.max(1))));
        columns.filter(|_| bounds.iter().any(of_axis_1)).unwrap_or(BAND)
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
    pub fn around(&self, inst: &'a tile::Inst) -> Option<(Index, Index, u32, &'a Region)> {
        let tile::Op::For { lo, hi, step, init, body } = &inst.op else { return None };
        let mut holds = false;
        for_each(body, &mut |i| holds |= i.results == self.c.k_loop.results);
        (holds && init.is_empty()).then_some((*lo, *hi, *step, body))
    }

    /// That loop as a role runs it.
    pub fn loop_around(
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
    pub fn slice(&self, roots: Vec<ValueId>) -> HashSet<ValueId> {
        slice(&self.defs, roots, |v| self.c.is_product(v))
    }

    /// A tile's type.
    pub fn tile(&self, v: ValueId) -> Option<&'a TileType> {
        self.program.tile(v)
    }

    /// Where products leave their results.
    pub fn fragment(&self) -> Place {
        let atom = if self.config.transposed { Atom::WgmmaTransposed } else { Atom::Wgmma };
        Place::Fragment(Fragment { atom, warps: self.config.groups })
    }

    /// Where an instruction's result lies; none if no thread can have it.
    pub fn place(&self, inst: &tile::Inst) -> Option<Place> {
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

    /// A constant.
    pub fn scalar(&mut self, value: i32) -> (Inst, ValueId) {
        let result = self.values.fresh(Type::Tile(TileType::scalar(DType::I32)), Place::Uniform);
        let op = tile::Op::Full { value: Scalar::I32(value), shape: Vec::new() };
        (Inst { results: vec![result], op: Op::Tile(op), scratch: None }, result)
    }

    /// `v + by`, a scalar.
    pub fn plus(&mut self, v: ValueId, by: u32) -> (Inst, ValueId) {
        let result = self.values.fresh(Type::Tile(TileType::scalar(DType::I32)), Place::Uniform);
        (Inst { results: vec![result], op: Op::Tile(plus(v, by as i32)), scratch: None }, result)
    }

    fn scheduled(mut self) -> Option<Scheduled> {
        let mut names = self.values.names.clone();
        let producer = self.producer(&self.program.body, &mut names)?;
        let mut names = self.values.names.clone();
        let consumer = self.consumer(&self.program.body, &mut names)?;
        let warps = self.config.warpgroups() * WARPGROUP / Arch::WARP;
        let gathers = self.gathers();
        // A thread for weights, and one for what is multiplied by them.
        let bring = if self.program.params.iter().any(|p| p.access == Access::Constant) { 2 } else { 1 };
        let groups = self.config.warpgroups();
        let redistributed = groups >= 2 && !self.config.transposed;
        // Registers move between whole warpgroups; without that, one warp is enough to drive the copy engine.
        let (produces, consumes) = match (redistributed, gathers) {
            (true, _) => ([0, 4], [4, 4 + warps]),
            (false, true) => ([warps, warps + gathering_warps(self.c.shape()[0])], [0, warps]),
            (false, false) => ([warps, warps + bring], [0, warps]),
        };
        let registers = match (groups, gathers) {
            (3, _) => REGISTERS_OF_THREE,
            (_, true) => GATHERING_REGISTERS,
            (_, false) => REGISTERS,
        };
        let registers = redistributed.then_some(registers);
        let roles = two_roles([(produces, producer), (consumes, consumer)], registers, !gathers);
        let buffers = self.buffers();
        Some(Scheduled {
            name: self.program.name.clone(),
            grid: self.program.grid.clone(),
            persistent: Some(self.band()),
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
                turns: 1,
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
            outside: false,
        };
        let (mut buffers, mut end) = (Vec::new(), 0);
        let slots = [("left", left, self.c.lefts.len()), ("right", right, self.c.rights.len())];
        for (name, bytes, _) in slots.into_iter().flat_map(|s| std::iter::repeat_n(s, s.2)) {
            let mut operand = slot(name, bytes, end);
            if self.c.across && name == "right" {
                operand.shape = [self.c.stage_k(), self.c.shape()[1]];
            }
            buffers.push(operand);
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
                outside: false,
            });
        }
        buffers
    }
}
