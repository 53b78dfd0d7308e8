//! Attention to scheduled tile IR with roles.
//!
//! | role | does |
//! |---|---|
//! | `keys` | a warpgroup: gathers rows of keys, or computes them from gathered rows (dequantises); two with few heads |
//! | `scores` | a warpgroup: brings the queries; scores, softmax; hands weights and factors on |
//! | `values` | one or two warpgroups, each with its columns of the accumulator: rescale it, add weights · values |
//!
//! Keys lie in rings, one for each range of columns, so that each is given back as soon as its own readers are done: scores of the
//! next round are made while this round's weights multiply values. What one role computes and another uses (weights, factors a row) goes
//! through a channel too.
//!
//! With 64 heads, 64 keys a round, 512 + 64 columns: queries 72 KiB, two rounds of keys 144 KiB, weights 8 KiB. A round is
//! 64·64·(576 + 512) multiply-adds, 2176 cycles of the multipliers; it brings 72 KiB.

use super::attention::Attention;
use super::config::{ROWS, WARPGROUP};
use super::contraction::{STEP_BYTES, definitions};
use super::fill::ROW_THREADS;
use super::plan::for_each;
use super::tensor_map::{can_describe, view_type};
use super::values::{Names, Values, plain, rename_index, renamed, slice, value_of};
use crate::Kernel;
use crate::nvidia::arch::Arch;
use dsc_ir::DType;
use dsc_ir::sched::{
    Atom, Block, Buffer, BufferId, Channel, ChannelId, Cluster, Fragment, Inst, Op, Place, Role, Scheduled,
};
use dsc_ir::tile::{self, Index, Program, Region, TileType, Type, ValueId};
use std::collections::{HashMap, HashSet};

/// Columns of the accumulator that a warpgroup holds at most.
const MOST_COLUMNS: u32 = 256;
/// Most rounds of keys in flight.
const MOST_STAGES: u32 = 4;
/// Registers of a thread that brings keys, that scores, and that has values: where keys are copied, where they are computed, and where two
/// blocks compute half of them each.
const GATHERING: [u32; 3] = [48, 144, 160];
const COMPUTING: [u32; 3] = [112, 80, 160];
const PAIRED: [u32; 3] = [104, 88, 160];
/// The same for few heads, where two warpgroups compute keys.
const FEW_HEADS: [u32; 3] = [104, 88, 88];
/// Fewest heads whose rows, not columns, are the instruction's rows.
const STRAIGHT_FROM: u32 = 64;
/// Tiles of axis 0, tokens, that are walked together: tiles of heads of one token read the same rows.
const BAND: u32 = 1;
/// Bytes to which operands of products are aligned.
const ALIGN: u32 = 1024;

/// A range of columns of the keys, with a channel of its own.
#[derive(Clone, Debug)]
struct Part {
    /// Which score.
    score: usize,
    /// First column and number of columns.
    columns: [u32; 2],
    /// Which of so many.
    of: [u32; 2],
    /// Whose values they are.
    group: Option<u32>,
    /// Whether they are computed, not copied.
    computed: bool,
}

/// The schedule of a program that is attention; none if it is not, or if a block has no room for it.
pub fn plan(kernel: &Kernel, arch: &Arch) -> Option<Scheduled> {
    let program = &kernel.program;
    let a = Attention::of(program)?;
    let mut defs = HashMap::new();
    definitions(&program.body, &mut defs);
    let [heads, keys, columns] = a.shape;
    let transposed = heads < STRAIGHT_FROM;
    let groups = columns.div_ceil(MOST_COLUMNS);
    let whole = heads == STRAIGHT_FROM || transposed && heads.is_multiple_of(8);
    if !whole || keys != ROWS || groups > 2 || !columns.is_multiple_of(groups * ROWS) {
        return None;
    }
    let mut parts = Vec::new();
    for (score, s) in a.scores.iter().enumerate() {
        let values = s.keys == a.keys;
        let count = if values { groups } else { 1 };
        let wide = s.columns / count;
        can_describe(view_type(&program.types, s.queries.view)?).then_some(())?;
        (s.columns == wide * count && wide.is_multiple_of(STEP_BYTES / 2)).then_some(())?;
        let computed = copied_from(program, &defs, s.keys).is_none();
        for n in 0..count {
            let group = values.then_some(n);
            parts.push(Part { score, columns: [n * wide, wide], of: [n, count], group, computed });
        }
    }
    // Copies are under way while other columns are computed.
    parts.sort_by_key(|p| p.computed);
    let values = Values::new(program);
    let mut planner = Planner { program, a, defs, parts, transposed, groups, cluster: None, values };
    planner.cluster = planner.pair(kernel.schedule.cluster);
    planner.scheduled(arch)
}

/// The gather behind keys that are rows as they lie in memory.
fn copied_from<'a>(
    program: &Program,
    defs: &HashMap<ValueId, &'a tile::Inst>,
    keys: ValueId,
) -> Option<&'a tile::Inst> {
    let inst = *defs.get(&keys)?;
    let tile::Op::Gather { view, index, shape, .. } = &inst.op else { return None };
    let view = view_type(&program.types, *view)?;
    let whole = view.shape.last()?.constant()? == *shape.last()? && index.as_slice() == [Index::Const(0)];
    (shape.len() == 2 && whole && can_describe(view)).then_some(inst)
}

/// Adding a constant.
fn plus(n: u32) -> tile::MapFn {
    let constant = tile::ScalarOp::Const(tile::Scalar::I32(n as i32));
    let insts = vec![
        tile::MapInst { op: constant, args: Vec::new() },
        tile::MapInst { op: tile::ScalarOp::Add, args: vec![tile::MapArg::Input(0), tile::MapArg::Inst(0)] },
    ];
    tile::MapFn { insts, result: tile::MapArg::Inst(1) }
}

struct Planner<'a> {
    program: &'a Program,
    a: Attention<'a>,
    defs: HashMap<ValueId, &'a tile::Inst>,
    parts: Vec<Part>,
    transposed: bool,
    groups: u32,
    /// Blocks that each compute a part of the keys for all of them.
    cluster: Option<Cluster>,
    values: Values<'a>,
}

/// Which values each role computes.
struct Split {
    /// Computed by scores in the loop and used by values there: after the weights, slots of the channel.
    factors: Vec<ValueId>,
    /// The same after the loop.
    totals: Vec<ValueId>,
    /// What the loop has for the weights and factors, then what it has besides.
    weighing: HashSet<ValueId>,
    carrying: HashSet<ValueId>,
}

const QUERIES: ChannelId = ChannelId(0);

impl<'a> Planner<'a> {
    fn key_channel(&self, part: usize) -> ChannelId {
        ChannelId(1 + part as u32)
    }

    fn weight_channel(&self) -> ChannelId {
        ChannelId(1 + self.parts.len() as u32)
    }

    fn total_channel(&self) -> ChannelId {
        ChannelId(2 + self.parts.len() as u32)
    }

    fn scheduled(mut self, arch: &Arch) -> Option<Scheduled> {
        let split = self.split()?;
        let (buffers, channels) = self.memory(&split, arch)?;
        let scratch = (self.transposed).then(|| buffers.len() as u32 - 2);
        let mut roles: Vec<Role> = Vec::new();
        let mut first = 0;
        let mut role = |name: String, registers: u32, insts: Vec<Inst>| {
            let warps = [first, first + WARPGROUP / Arch::WARP];
            first = warps[1];
            let body = Block { insts, ..Block::default() };
            roles.push(Role { name, warps, registers: (registers > 0).then_some(registers), elected: false, body });
        };
        let bringing = self.bringing();
        let threads = (bringing + 1 + self.groups) * WARPGROUP;
        let registers = self.registers();
        for n in 0..bringing {
            // Parts of the values take turns; the others go with the last.
            let of = |p: &Part| p.group.unwrap_or(bringing - 1) % bringing;
            let parts: Vec<usize> = (0..self.parts.len()).filter(|&i| of(&self.parts[i]) == n).collect();
            let insts = self.keys(&parts, &mut self.values.names.clone())?;
            role(format!("keys{n}"), registers[0], insts);
        }
        let insts = self.scores(&split, scratch, &mut self.values.names.clone())?;
        role("scores".into(), registers[1], insts);
        for group in 0..self.groups {
            let insts = self.values(&split, group, &mut self.values.names.clone())?;
            role(format!("values{group}"), registers[2], insts);
        }
        Some(Scheduled {
            name: self.program.name.clone(),
            grid: self.program.grid.clone(),
            persistent: Some(BAND),
            cluster: self.cluster,
            team: 1,
            folded: false,
            alternate: false,
            dies: 1,
            params: self.values.params,
            threads,
            buffers,
            channels,
            types: self.values.types,
            places: self.values.places,
            common: Block::default(),
            roles,
        })
    }

    /// Neighbours along an axis of the grid on which neither keys nor the number of rounds depend: other heads of the same token. Computing a
    /// key takes longer than multiplying it, so two blocks compute half of the keys each, and write them to both. `wanted` as of a
    /// schedule: 0 is a pair where keys are computed.
    fn pair(&self, wanted: u32) -> Option<Cluster> {
        const BLOCKS: u32 = 2;
        let computed: Vec<&Part> = self.parts.iter().filter(|p| p.computed).collect();
        let rows = self.a.shape[1].is_multiple_of(BLOCKS * WARPGROUP / ROW_THREADS);
        if !matches!(wanted, 0 | BLOCKS) || computed.is_empty() || self.transposed || !rows {
            return None;
        }
        let keys = computed.iter().map(|p| self.a.scores[p.score].keys);
        let same = self.slice(keys.chain(self.bounds()).collect());
        let axis_of = |v: &ValueId| match self.defs.get(v).map(|i| &i.op) {
            Some(tile::Op::BlockId { axis }) => Some(*axis),
            _ => None,
        };
        let differ: HashSet<u32> = same.iter().filter_map(axis_of).collect();
        let even = |axis: &u32| {
            let dim = self.program.grid.get(*axis as usize);
            dim.is_some_and(|d| d.extent.constant().is_some_and(|n| n.is_multiple_of(d.tile * BLOCKS)))
        };
        let axis = (0..2).find(|axis| !differ.contains(axis) && even(axis))?;
        Some(Cluster { axis, blocks: BLOCKS })
    }

    /// Which values go from role to role; none if some have no way.
    fn split(&self) -> Option<Split> {
        let body = self.a.body;
        let acc = self.a.carried_acc();
        let tile::Op::Map { inputs, .. } = &self.a.rescale.op else { return None };
        let rows: Vec<ValueId> =
            body.yields.iter().copied().enumerate().filter(|&(i, _)| i != self.a.acc).map(|(_, y)| y).collect();
        let mut factors = Vec::new();
        for &v in inputs.iter().filter(|&&v| v != acc) {
            if self.of_rows(v) && !factors.contains(&v) {
                factors.push(v);
            }
        }
        let weighing = self.slice(factors.iter().copied().chain([self.a.weights]).collect());
        let carrying = self.slice(rows);
        // Nothing that scores need may come from the accumulator.
        if weighing.iter().chain(&carrying).any(|&v| v == acc || v == self.a.values.results[0]) {
            return None;
        }
        let mut totals = Vec::new();
        let mut stores = false;
        for inst in &self.program.body.insts {
            let tile::Op::Store { index, value, .. } = &inst.op else {
                if matches!(inst.op, tile::Op::Scatter { .. }) {
                    return None;
                }
                continue;
            };
            stores = true;
            if !self.of_acc(*value) {
                continue;
            }
            matches!(index.last(), Some(Index::Const(0))).then_some(())?;
            let mut pending = vec![*value];
            while let Some(v) = pending.pop() {
                if self.a.key_loop.results.contains(&v) {
                    continue;
                }
                let inst = self.defs.get(&v)?;
                for v in tile::operands(&inst.op) {
                    if self.of_acc(v) {
                        pending.push(v);
                    } else if self.of_rows(v) && !totals.contains(&v) {
                        totals.push(v);
                    }
                }
            }
        }
        let row = |v: &ValueId| {
            self.program.tile(*v).is_some_and(|t| t.dtype == DType::F32 && t.shape == [self.a.shape[0], 1])
        };
        (stores && factors.iter().chain(&totals).all(row)).then_some(Split { factors, totals, weighing, carrying })
    }

    /// These values and what they are computed from in the program; products, and what the loop carries, are not followed.
    fn slice(&self, roots: Vec<ValueId>) -> HashSet<ValueId> {
        slice(&self.defs, roots, |v| self.a.is_product(v) || self.a.key_loop.results.contains(&v))
    }

    /// Whether a value is computed from the accumulator.
    fn of_acc(&self, v: ValueId) -> bool {
        let (result, carried) = (self.a.key_loop.results[self.a.acc], self.a.carried_acc());
        self.slice(vec![v]).iter().any(|&v| v == result || v == carried || v == self.a.values.results[0])
    }

    /// Whether a value is computed from scores or carried rows.
    fn of_rows(&self, v: ValueId) -> bool {
        let carried = |v: &ValueId| {
            self.a.body.args[1..].contains(v)
                || self.a.key_loop.results.contains(v)
                || self.a.scores.iter().any(|s| s.dot.results[0] == *v)
        };
        self.slice(vec![v]).iter().any(carried)
    }

    fn memory(&self, split: &Split, arch: &Arch) -> Option<(Vec<Buffer>, Vec<Channel>)> {
        let [heads, keys, _] = self.a.shape;
        let mut buffers: Vec<Buffer> = Vec::new();
        let mut channels = Vec::new();
        let mut end = 0u32;
        let panel = |name: String, rows: u32, columns: u32, copies: u32| Buffer {
            name,
            dtype: self.a.dtype,
            shape: [rows, columns],
            pitch: STEP_BYTES,
            swizzle: STEP_BYTES,
            copies,
            offset: 0,
        };
        let factor = |name: String, rows: u32| Buffer {
            name,
            dtype: DType::F32,
            shape: [rows, 1],
            pitch: 4,
            swizzle: 0,
            copies: 1,
            offset: 0,
        };
        let query_bytes: u32 = self.parts.iter().map(|p| heads * p.columns[1] * 2).sum();
        let key_bytes: u32 = self.parts.iter().map(|p| keys * p.columns[1] * 2).sum();
        let vectors = (split.factors.len() + split.totals.len()) as u32 * heads * 4;
        let exchange = if self.transposed { 2 * 4 * heads * 4 } else { 0 };
        let beside = query_bytes + (heads * keys * 2).next_multiple_of(ALIGN) + vectors + exchange + ALIGN;
        let stages = (arch.shared_per_block.checked_sub(beside)? / key_bytes).min(MOST_STAGES);
        if stages < 2 {
            return None;
        }
        let mut place = |mut b: Buffer, buffers: &mut Vec<Buffer>| {
            end = if b.swizzle > 0 { end.next_multiple_of(ALIGN) } else { end };
            b.offset = end;
            end += b.bytes();
            buffers.push(b);
            BufferId(buffers.len() as u32 - 1)
        };
        let mut channel = |name: &str, stages: u32, slots: Vec<BufferId>| {
            channels.push(Channel { name: name.into(), stages, slots });
        };
        let mut slots = Vec::new();
        for (i, p) in self.parts.iter().enumerate() {
            slots.push(place(panel(format!("queries{i}"), heads, p.columns[1], 1), &mut buffers));
        }
        channel("queries", 1, slots);
        for (i, p) in self.parts.iter().enumerate() {
            let slot = place(panel(format!("keys{i}"), keys, p.columns[1], stages), &mut buffers);
            channel(&format!("keys{i}"), stages, vec![slot]);
        }
        let mut slots = vec![place(panel("weights".into(), heads, keys, 1), &mut buffers)];
        for i in 0..split.factors.len() {
            slots.push(place(factor(format!("factors{i}"), heads), &mut buffers));
        }
        channel("weights", 1, slots);
        if !split.totals.is_empty() {
            let slots = (0..split.totals.len()).map(|i| place(factor(format!("totals{i}"), heads), &mut buffers));
            let slots = slots.collect();
            channel("totals", 1, slots);
        }
        if self.transposed {
            for name in ["maxima", "sums"] {
                let lines = Buffer { shape: [4, heads], pitch: heads * 4, ..factor(name.into(), 4) };
                place(lines, &mut buffers);
            }
        }
        Some((buffers, channels))
    }

    fn tile(&self, v: ValueId) -> Option<&'a TileType> {
        self.program.tile(v)
    }

    fn fragment(&self) -> Place {
        let atom = if self.transposed { Atom::WgmmaTransposed } else { Atom::Wgmma };
        Place::Fragment(Fragment { atom, warps: [1, 1] })
    }

    /// Copies an instruction under new names.
    fn copied(&mut self, inst: &tile::Inst, place: Place, names: &mut Names) -> Option<Inst> {
        let op = match &inst.op {
            tile::Op::Reduce { x, axis, kind } => tile::Op::Reduce { x: *names.get(x)?, axis: *axis, kind: *kind },
            op => renamed(op, names)?,
        };
        Some(self.values.computed(inst, op, place, names))
    }

    /// What stands in front of the loop and these values need, for a role in which threads have no matrices.
    fn before(&mut self, roots: Vec<ValueId>, names: &mut Names) -> Option<Vec<Inst>> {
        let needed = self.slice(roots);
        let mut out = Vec::new();
        let (program, results) = (self.program, self.a.key_loop.results.clone());
        for inst in program.body.insts.iter().take_while(|i| i.results != results) {
            if inst.results.first().is_some_and(|r| needed.contains(r)) {
                let place = if self.tile(inst.results[0])?.elements() == 1 { Place::Uniform } else { Place::Lazy };
                out.push(self.copied(inst, place, names)?);
            }
        }
        Some(out)
    }

    fn bounds(&self) -> Vec<ValueId> {
        [self.a.range.0, self.a.range.1].into_iter().filter_map(value_of).collect()
    }

    /// The loop over rounds, with what it carries: values of the program's loop by number, and others that start as given.
    fn rounds(
        &mut self,
        carried: &[usize],
        others: &[(ValueId, ValueId)],
        names: &mut Names,
        body: impl FnOnce(&mut Self, &mut Names) -> Option<(Vec<Inst>, Vec<ValueId>)>,
    ) -> Option<Inst> {
        let tile::Op::For { init, .. } = &self.a.key_loop.op else { return None };
        let mut init = carried.iter().map(|&i| names.get(&init[i]).copied()).collect::<Option<Vec<_>>>()?;
        init.extend(others.iter().map(|&(_, first)| first));
        let (lo, hi, step) = self.a.range;
        let (lo, hi) = (rename_index(lo, names)?, rename_index(hi, names)?);
        let counter = self.values.fresh(self.program.ty(self.a.body.args[0]).clone(), Place::Uniform);
        names.insert(self.a.body.args[0], counter);
        let mut args = vec![counter];
        for (&i, &first) in carried.iter().zip(&init) {
            let ty = self.values.types[first.0 as usize].clone();
            let arg = self.values.fresh(ty, self.fragment());
            names.insert(self.a.body.args[1 + i], arg);
            args.push(arg);
        }
        for &(value, first) in others {
            let ty = self.values.types[first.0 as usize].clone();
            let arg = self.values.fresh(ty, self.fragment());
            names.insert(value, arg);
            args.push(arg);
        }
        let (insts, yields) = body(self, names)?;
        let mut results = Vec::new();
        for (&i, &first) in carried.iter().zip(&init) {
            let ty = self.values.types[first.0 as usize].clone();
            let result = self.values.fresh(ty, self.fragment());
            names.insert(self.a.key_loop.results[i], result);
            results.push(result);
        }
        for &(_, first) in others {
            let ty = self.values.types[first.0 as usize].clone();
            results.push(self.values.fresh(ty, self.fragment()));
        }
        Some(Inst { results, op: Op::For { lo, hi, step, init, body: Block { args, insts, yields } }, scratch: None })
    }

    /// Registers of threads that bring keys, that score, and that have values; zeros where they need not move.
    fn registers(&self) -> [u32; 3] {
        if self.groups < 2 || self.transposed && self.bringing() == 1 {
            return [0; 3];
        }
        match (self.bringing() > 1, self.parts.iter().any(|p| p.computed)) {
            (true, _) => FEW_HEADS,
            (_, true) if self.cluster.is_some() => PAIRED,
            (_, true) => COMPUTING,
            (_, false) => GATHERING,
        }
    }

    /// Warpgroups that bring keys: with many heads there are no registers for a second.
    fn bringing(&self) -> u32 {
        if self.transposed && self.parts.iter().any(|p| p.computed) { self.groups } else { 1 }
    }

    /// Brings a tile's queries, by the role that uses them: no other has the time to wait for them.
    fn queries(&mut self, names: &Names, out: &mut Vec<Inst>) -> Option<()> {
        // All products of the tile before have read theirs.
        out.push(plain(Op::Barrier));
        out.push(plain(Op::Acquire(QUERIES)));
        for (slot, part) in self.parts.clone().into_iter().enumerate() {
            let q = &self.a.scores[part.score].queries;
            let mut index = q.index.iter().map(|&i| rename_index(i, names)).collect::<Option<Vec<_>>>()?;
            let Index::Const(first) = index.last_mut()? else { return None };
            *first += i64::from(part.columns[0]);
            let mut shape = q.shape.to_vec();
            *shape.last_mut()? = part.columns[1];
            let view = *names.get(&q.view)?;
            out.push(plain(Op::Copy {
                channel: QUERIES,
                slot: slot as u32,
                view,
                rows: None,
                index,
                shape,
                shared: false,
            }));
        }
        out.push(plain(Op::Commit(QUERIES)));
        Some(())
    }

    /// A warpgroup brings these parts of the keys, round by round.
    fn keys(&mut self, parts: &[usize], names: &mut Names) -> Option<Vec<Inst>> {
        let mut gathers = Vec::new();
        for &i in parts {
            self.gathers(self.a.scores[self.parts[i].score].keys, &mut gathers);
        }
        let needed = self.slice(gathers.iter().flat_map(|g| tile::operands(&g.op)).collect());
        let mut out = self.before(self.bounds().into_iter().chain(needed.iter().copied()).collect(), names)?;
        out.push(self.rounds(&[], &[], names, |p, names| {
            let mut insts = Vec::new();
            for inst in &p.a.body.insts {
                if inst.results.first().is_some_and(|r| needed.contains(r)) {
                    let place = if p.tile(inst.results[0])?.elements() == 1 { Place::Uniform } else { Place::Lazy };
                    insts.push(p.copied(inst, place, names)?);
                }
            }
            for &i in parts {
                p.bring(i, names, &mut insts)?;
            }
            Some((insts, Vec::new()))
        })?);
        Some(out)
    }

    /// The gathers that a value is computed from.
    fn gathers(&self, v: ValueId, found: &mut Vec<&'a tile::Inst>) {
        let Some(&inst) = self.defs.get(&v) else { return };
        if let tile::Op::Gather { .. } = inst.op {
            found.push(inst);
        } else {
            tile::operands(&inst.op).into_iter().for_each(|v| self.gathers(v, found));
        }
    }

    /// Fills a stage of one part of the keys.
    fn bring(&mut self, number: usize, names: &Names, out: &mut Vec<Inst>) -> Option<()> {
        let (part, channel) = (self.parts[number].clone(), self.key_channel(number));
        let keys = self.a.scores[part.score].keys;
        let fill = match copied_from(self.program, &self.defs, keys) {
            Some(inst) => {
                let tile::Op::Gather { view, rows, .. } = &inst.op else { return None };
                let rows = Some(*names.get(rows)?);
                let [first, columns] = part.columns;
                let (index, shape) = (vec![Index::Const(first.into())], vec![self.a.shape[1], columns]);
                Op::Copy { channel, slot: 0, view: *names.get(view)?, rows, index, shape, shared: false }
            }
            None => {
                let value = self.share(keys, part.of, &mut names.clone(), out)?;
                Op::Fill { channel, slot: 0, value, shared: self.cluster.is_some() }
            }
        };
        out.extend([Op::Acquire(channel), fill, Op::Commit(channel)].map(plain));
        Some(())
    }

    /// An equal share of the columns of a computed tile: of axis 1 of all that it is computed from.
    fn share(&mut self, v: ValueId, of: [u32; 2], names: &mut Names, out: &mut Vec<Inst>) -> Option<ValueId> {
        if let Some(&known) = names.get(&v) {
            return Some(known);
        }
        let inst = *self.defs.get(&v)?;
        let mut ty = self.tile(v)?.clone();
        let [n, count] = of;
        let axis = ty.shape.get_mut(1)?;
        let own = if *axis == 1 { 1 } else { axis.is_multiple_of(count).then_some(*axis / count)? };
        *axis = own;
        let shape = ty.shape.clone();
        let op = match &inst.op {
            tile::Op::Gather { view, rows, index, .. } => {
                let mut index = index.clone();
                let Index::Const(first) = index.first_mut()? else { return None };
                *first += i64::from(n * own);
                tile::Op::Gather { view: *names.get(view)?, rows: *names.get(rows)?, index, shape }
            }
            tile::Op::Map { inputs, body } => {
                let mut own = Vec::new();
                for &v in inputs {
                    own.push(self.share(v, of, names, out)?);
                }
                tile::Op::Map { inputs: own, body: body.clone() }
            }
            tile::Op::Reshape { x, .. } => {
                // Axis 1 has to mean the same before and after: what follows it is split or joined.
                (self.tile(*x)?.shape.first() == shape.first()).then_some(())?;
                tile::Op::Reshape { x: self.share(*x, of, names, out)?, shape }
            }
            _ => return None,
        };
        let result = self.values.fresh(Type::Tile(ty), Place::Lazy);
        names.insert(v, result);
        out.push(Inst { results: vec![result], op: Op::Tile(op), scratch: None });
        Some(result)
    }

    /// Where a value of the scores' role lies.
    fn score_place(&self, inst: &tile::Inst) -> Option<Place> {
        let t = self.tile(inst.results[0])?;
        let [heads, keys, _] = self.a.shape;
        let uses = |v: ValueId| {
            let mut count = 0;
            for_each(&self.program.body, &mut |i| count += tile::operands(&i.op).iter().filter(|&&o| o == v).count());
            count
        };
        let beside = |v: ValueId| {
            let mut found = false;
            for_each(&self.program.body, &mut |i| {
                let matrix = i.results.first().and_then(|&r| self.tile(r)).is_some_and(|t| t.shape == [heads, keys]);
                found |= matrix && tile::operands(&i.op).contains(&v);
            });
            found
        };
        Some(match &inst.op {
            _ if t.elements() == 1 => Place::Uniform,
            tile::Op::Reduce { .. } if t.shape == [heads, 1] => self.fragment(),
            tile::Op::Map { .. } if t.shape == [heads, 1] => self.fragment(),
            tile::Op::Map { .. } if t.shape == [heads, keys] && uses(inst.results[0]) > 1 => self.fragment(),
            tile::Op::Load { .. } | tile::Op::Map { .. } | tile::Op::Reshape { .. }
                if t.shape == [1, keys] && beside(inst.results[0]) =>
            {
                self.fragment()
            }
            _ => Place::Lazy,
        })
    }

    /// An instruction of the scores' role.
    fn score_inst(
        &mut self,
        inst: &tile::Inst,
        scratch: Option<u32>,
        names: &mut Names,
        out: &mut Vec<Inst>,
    ) -> Option<()> {
        let place = self.score_place(inst)?;
        let mut new = self.copied(inst, place, names)?;
        if let (tile::Op::Reduce { kind, .. }, Some(first)) = (&inst.op, scratch)
            && self.tile(inst.results[0])?.elements() > 1
        {
            // Some thread may still read what was exchanged before.
            out.push(plain(Op::Barrier));
            new.scratch = Some(BufferId(first + u32::from(*kind == tile::ReduceKind::Sum)));
        }
        out.push(new);
        Some(())
    }

    /// Scores, softmax, and whatever needs no accumulator.
    fn scores(&mut self, split: &Split, scratch: Option<u32>, names: &mut Names) -> Option<Vec<Inst>> {
        let carried: Vec<usize> = (0..self.a.body.yields.len()).filter(|&i| i != self.a.acc).collect();
        let tile::Op::For { init, .. } = &self.a.key_loop.op else { return None };
        let mut roots = self.bounds();
        roots.extend(carried.iter().map(|&i| init[i]));
        roots.extend(split.weighing.iter().chain(&split.carrying));
        let after = self.after(&split.totals, false);
        roots.extend(&after);
        roots.extend(self.a.scores.iter().flat_map(|s| s.queries.index.iter().filter_map(|&i| value_of(i))));
        let mut out = self.before(roots, names)?;
        self.queries(names, &mut out)?;
        out.push(plain(Op::Wait(QUERIES)));
        let mut queries = Vec::new();
        for (slot, part) in self.parts.clone().into_iter().enumerate() {
            let shape = [self.a.shape[0], part.columns[1]];
            queries.push(self.take(QUERIES, slot as u32, self.a.dtype, &shape, &mut out));
        }
        let rows = self.rows_ahead(split);
        let first = self.first_round(names, &mut out)?;
        let known = self.known_in(split, first, names, &mut out)?;
        let others: Vec<(ValueId, ValueId)> =
            rows.into_iter().map(|r| Some((r, *known.get(&r)?))).collect::<Option<_>>()?;
        let round = self.rounds(&carried, &others, names, |p, names| {
            p.score_round(split, (&carried, &others), &queries, scratch, names)
        })?;
        out.push(round);
        out.push(plain(Op::Release { channel: QUERIES, lag: 0 }));
        for inst in self.behind() {
            let stores = matches!(&inst.op, tile::Op::Store { value, .. } if !self.of_acc(*value));
            if stores || inst.results.first().is_some_and(|r| after.contains(r)) {
                if stores {
                    let new = self.copied(inst, Place::Lazy, names)?;
                    out.push(new);
                } else {
                    self.score_inst(inst, scratch, names, &mut out)?;
                }
            }
        }
        if !split.totals.is_empty() {
            let channel = self.total_channel();
            out.push(plain(Op::Acquire(channel)));
            for (slot, v) in split.totals.iter().enumerate() {
                out.push(plain(Op::Fill { channel, slot: slot as u32, value: *names.get(v)?, shared: false }));
            }
            out.push(plain(Op::Commit(channel)));
        }
        Some(out)
    }

    /// Instructions behind the loop.
    fn behind(&self) -> Vec<&'a tile::Inst> {
        let insts = &self.program.body.insts;
        insts.iter().skip_while(|i| i.results != self.a.key_loop.results).skip(1).collect()
    }

    /// What stores of the accumulator (or of anything else) need of what is computed behind the loop.
    fn after(&self, totals: &[ValueId], of_acc: bool) -> HashSet<ValueId> {
        let mut roots = if of_acc { Vec::new() } else { totals.to_vec() };
        for inst in self.behind() {
            if let tile::Op::Store { value, .. } = &inst.op
                && self.of_acc(*value) == of_acc
            {
                roots.extend(tile::operands(&inst.op));
            }
        }
        self.slice(roots)
    }

    fn take(&mut self, channel: ChannelId, slot: u32, dtype: DType, shape: &[u32], out: &mut Vec<Inst>) -> ValueId {
        let ty = Type::Tile(TileType { dtype, shape: shape.to_vec() });
        let v = self.values.fresh(ty, Place::Slot(channel, slot));
        out.push(Inst { results: vec![v], op: Op::Take { channel, slot }, scratch: None });
        v
    }

    /// What scores are combined with and a round knows from its number alone, such as who is selected: threads have it a round ahead. A fence
    /// between what others wrote and products waits for loads.
    fn rows_ahead(&self, split: &Split) -> Vec<ValueId> {
        let results = self.a.body.insts.iter().filter_map(|i| Some((i, *i.results.first()?)));
        let fragment = |i: &tile::Inst| matches!(self.score_place(i), Some(Place::Fragment(_)));
        let ahead = results.filter(|(i, r)| self.known_ahead(split, *r) && fragment(i));
        ahead.map(|(_, r)| r).collect()
    }

    fn known_ahead(&self, split: &Split, r: ValueId) -> bool {
        (split.weighing.contains(&r) || split.carrying.contains(&r)) && !self.a.is_product(r) && !self.of_rows(r)
    }

    /// The number of the first round.
    fn first_round(&mut self, names: &Names, out: &mut Vec<Inst>) -> Option<ValueId> {
        let at = match self.a.range.0 {
            Index::Value(v) => return names.get(&v).copied(),
            Index::Const(at) => tile::Scalar::I32(i32::try_from(at).ok()?),
        };
        let v = self.values.fresh(self.program.ty(self.a.body.args[0]).clone(), Place::Uniform);
        out.push(Inst {
            results: vec![v],
            op: Op::Tile(tile::Op::Full { value: at, shape: Vec::new() }),
            scratch: None,
        });
        Some(v)
    }

    /// Computes what the round of that number knows from its number alone; gives the names.
    fn known_in(&mut self, split: &Split, round: ValueId, names: &Names, out: &mut Vec<Inst>) -> Option<Names> {
        let body: &'a Region = self.a.body;
        let mut known = names.clone();
        known.insert(body.args[0], round);
        for inst in &body.insts {
            if inst.results.first().is_some_and(|&r| self.known_ahead(split, r)) {
                self.score_inst(inst, None, &mut known, out)?;
            }
        }
        Some(known)
    }

    /// One round of the scores' role.
    fn score_round(
        &mut self,
        split: &Split,
        (carried, others): (&[usize], &[(ValueId, ValueId)]),
        queries: &[ValueId],
        scratch: Option<u32>,
        names: &mut Names,
    ) -> Option<(Vec<Inst>, Vec<ValueId>)> {
        let body: &'a Region = self.a.body;
        let [heads, keys, _] = self.a.shape;
        let mut insts = Vec::new();
        let mut done: HashSet<ValueId> = HashSet::new();
        let parts = self.parts.clone();
        // Products of the first columns run while the last are on their way.
        let mut sum = None;
        for (i, part) in parts.iter().enumerate() {
            insts.push(plain(Op::Wait(self.key_channel(i))));
            let b = self.take(self.key_channel(i), 0, self.a.dtype, &[keys, part.columns[1]], &mut insts);
            let ty = TileType { dtype: DType::F32, shape: vec![heads, keys] };
            let result = self.values.fresh(Type::Tile(ty), self.fragment());
            let op = tile::Op::Dot { a: queries[i], b, acc: sum, trans_b: true };
            insts.push(Inst { results: vec![result], op: Op::Tile(op), scratch: None });
            sum = Some(result);
        }
        names.insert(self.a.scores.last()?.dot.results[0], sum?);
        // While the products run: what the next round knows already.
        let counter = *names.get(&body.args[0])?;
        let next = self.values.fresh(self.values.types[counter.0 as usize].clone(), Place::Uniform);
        let op = tile::Op::Map { inputs: vec![counter], body: plus(self.a.range.2) };
        insts.push(Inst { results: vec![next], op: Op::Tile(op), scratch: None });
        let known = self.known_in(split, next, names, &mut insts)?;
        insts.extend((0..parts.len()).map(|i| plain(Op::Release { channel: self.key_channel(i), lag: 0 })));
        for inst in &body.insts {
            let Some(&r) = inst.results.first() else { continue };
            if split.weighing.contains(&r) && !self.a.is_product(r) && !others.iter().any(|o| o.0 == r) {
                self.score_inst(inst, scratch, names, &mut insts)?;
                done.insert(r);
            }
        }
        let channel = self.weight_channel();
        insts.push(plain(Op::Acquire(channel)));
        for (slot, v) in [self.a.weights].iter().chain(&split.factors).enumerate() {
            insts.push(plain(Op::Fill { channel, slot: slot as u32, value: *names.get(v)?, shared: false }));
        }
        insts.push(plain(Op::Commit(channel)));
        for inst in &body.insts {
            let Some(&r) = inst.results.first() else { continue };
            let ahead = others.iter().any(|o| o.0 == r);
            if split.carrying.contains(&r) && !self.a.is_product(r) && !done.contains(&r) && !ahead {
                self.score_inst(inst, scratch, names, &mut insts)?;
            }
        }
        let rows = others.iter().map(|o| known.get(&o.0).copied());
        let yields = carried.iter().map(|&i| names.get(&body.yields[i]).copied()).chain(rows);
        Some((insts, yields.collect::<Option<_>>()?))
    }

    /// The same type with this group's columns only, if it is as wide as the accumulator.
    fn narrowed(&self, v: ValueId) -> Option<Type> {
        let mut t = self.tile(v)?.clone();
        if t.shape.last() == Some(&self.a.shape[2]) {
            *t.shape.last_mut()? /= self.groups;
        }
        Some(Type::Tile(t))
    }

    /// One group's columns of the accumulator.
    fn values(&mut self, split: &Split, group: u32, names: &mut Names) -> Option<Vec<Inst>> {
        let tile::Op::For { init, .. } = &self.a.key_loop.op else { return None };
        let zero = init[self.a.acc];
        let after = self.after(&[], true);
        let mut roots = self.bounds();
        roots.extend(after.iter().filter(|&&v| !self.of_acc(v) && !self.of_rows(v)));
        let tile::Op::Map { inputs, .. } = &self.a.rescale.op else { return None };
        roots.extend(inputs.iter().filter(|&&v| v != self.a.carried_acc() && !self.of_rows(v)));
        let mut out = self.before(roots, names)?;
        let Type::Tile(t) = self.narrowed(zero)? else { return None };
        let full = tile::Op::Full { value: tile::Scalar::F32(0.0), shape: t.shape.clone() };
        let first = self.values.fresh(Type::Tile(t), Place::Lazy);
        names.insert(zero, first);
        out.push(Inst { results: vec![first], op: Op::Tile(full), scratch: None });
        let acc = self.a.acc;
        out.push(self.rounds(&[acc], &[], names, |p, names| p.value_round(split, group, names))?);
        let channel = self.total_channel();
        if !split.totals.is_empty() {
            out.push(plain(Op::Wait(channel)));
            for (slot, &v) in split.totals.iter().enumerate() {
                let taken = self.take(channel, slot as u32, DType::F32, &[self.a.shape[0], 1], &mut out);
                names.insert(v, taken);
            }
        }
        for inst in self.behind() {
            let place = match &inst.op {
                tile::Op::Store { value, .. } if self.of_acc(*value) => Place::Lazy,
                _ if !inst.results.first().is_some_and(|r| after.contains(r) && !split.totals.contains(r)) => continue,
                _ if self.of_rows(inst.results[0]) && !self.of_acc(inst.results[0]) => continue,
                _ if self.tile(inst.results[0])?.elements() == 1 => Place::Uniform,
                _ => Place::Lazy,
            };
            let mut new = self.copied(inst, place, names)?;
            self.narrow(inst, group, &mut new)?;
            out.push(new);
        }
        if !split.totals.is_empty() {
            out.push(plain(Op::Release { channel, lag: 0 }));
        }
        Some(out)
    }

    /// Makes a copied instruction one of this group's columns.
    fn narrow(&mut self, inst: &tile::Inst, group: u32, new: &mut Inst) -> Option<()> {
        for (&old, &v) in inst.results.iter().zip(&new.results) {
            if self.of_acc(old) {
                self.values.types[v.0 as usize] = self.narrowed(old)?;
            }
        }
        let columns = self.a.shape[2] / self.groups;
        match &mut new.op {
            Op::Tile(tile::Op::Reshape { shape, .. }) => *shape.last_mut()? = columns,
            Op::Tile(tile::Op::Store { index, .. }) => *index.last_mut()? = Index::Const((group * columns).into()),
            Op::Tile(tile::Op::Map { .. }) => {}
            // Anything else is computed alike in every group.
            _ if !inst.results.iter().any(|&r| self.of_acc(r)) => {}
            _ => return None,
        }
        Some(())
    }

    /// One round of a group.
    fn value_round(&mut self, split: &Split, group: u32, names: &mut Names) -> Option<(Vec<Inst>, Vec<ValueId>)> {
        let [heads, keys, columns] = self.a.shape;
        let mut insts = Vec::new();
        let weights = self.weight_channel();
        insts.push(plain(Op::Wait(weights)));
        let p = self.take(weights, 0, self.a.dtype, &[heads, keys], &mut insts);
        for (i, &v) in split.factors.iter().enumerate() {
            let taken = self.take(weights, 1 + i as u32, DType::F32, &[heads, 1], &mut insts);
            names.insert(v, taken);
        }
        let rescale = self.a.rescale;
        let place = self.fragment();
        let mut scaled = self.copied(rescale, place, names)?;
        self.narrow(rescale, group, &mut scaled)?;
        let acc = scaled.results[0];
        insts.push(scaled);
        let number = self.parts.iter().position(|p| p.group == Some(group))?;
        let channel = self.key_channel(number);
        insts.push(plain(Op::Wait(channel)));
        let v = self.take(channel, 0, self.a.dtype, &[keys, columns / self.groups], &mut insts);
        let ty = self.values.types[acc.0 as usize].clone();
        let result = self.values.fresh(ty, self.fragment());
        let op = tile::Op::Dot { a: p, b: v, acc: Some(acc), trans_b: false };
        insts.push(Inst { results: vec![result], op: Op::Tile(op), scratch: None });
        insts.push(plain(Op::Release { channel: weights, lag: 0 }));
        insts.push(plain(Op::Release { channel, lag: 0 }));
        Some((insts, vec![result]))
    }
}
