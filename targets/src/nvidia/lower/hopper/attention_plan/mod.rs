//! Attention to scheduled tile IR with roles.
//!
//! | role | does |
//! |---|---|
//! | `keys` | a warpgroup: gathers rows of keys, or computes them from gathered rows (dequantises); two with few heads |
//! | `a`, `b` | a warpgroup each: score in turn, and have half of the accumulator's columns each: [`turns`] |
//! | `scores` | where heads are few, or columns: a warpgroup that brings the queries; scores, softmax; hands weights and factors on |
//! | `values` | there one or two warpgroups, each with its columns of the accumulator: rescale it, add weights · values |
//!
//! Keys lie in rings, one for each range of columns, so that each is given back as soon as its own readers are done. What one role computes
//! and another uses (weights, factors a row) goes through a channel too.
//!
//! A schedule may have several blocks divide the keys of a tile: [`join`].
//!
//! With 64 heads, 64 keys a round, 512 + 64 columns: queries 72 KiB, two rounds of keys 144 KiB, weights 8 KiB. A round is
//! 64·64·(576 + 512) multiply-adds, 2176 cycles of the multipliers; it brings 72 KiB.

mod join;
mod keys;
mod memory;
mod scores;
mod turns;
mod values;

use super::attention::Attention;
use super::config::{ROWS, WARPGROUP};
use super::contraction::{STEP_BYTES, definitions};
use super::fill::ROW_THREADS;
use super::plan::for_each;
use super::tensor_map::{can_describe, view_type};
use super::values::{Names, Values, arithmetic, constant, mapped, plain, plus, rename_index, renamed, slice, value_of};
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
/// Registers of a thread that brings keys and of those of `a` and `b`: where keys are copied, computed, and computed by two blocks. Together at
/// most 504, three times the 168 of the launch. `a` keeps the carried rows besides.
const TURNS_GATHERING: [u32; 3] = [56, 240, 208];
const TURNS_COMPUTING: [u32; 3] = [96, 208, 200];
const TURNS_PAIRED: [u32; 3] = [88, 208, 208];
/// Registers of a thread that brings keys, that scores, and that has values, for few heads, where two warpgroups compute keys.
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
    let (cluster, team, exchanges) = (None, None, 0);
    let mut planner = Planner { program, a, defs, parts, transposed, groups, cluster, team, exchanges, values };
    planner.cluster = planner.pair(kernel.schedule.cluster);
    planner.team = planner.team_of(kernel.schedule.split, kernel.schedule.apart);
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

struct Planner<'a> {
    program: &'a Program,
    a: Attention<'a>,
    defs: HashMap<ValueId, &'a tile::Inst>,
    parts: Vec<Part>,
    transposed: bool,
    groups: u32,
    /// Blocks that each compute a part of the keys for all of them.
    cluster: Option<Cluster>,
    /// Blocks that have a part of the keys each.
    team: Option<join::Team>,
    /// The first buffer through which they join.
    exchanges: u32,
    values: Values<'a>,
}

/// A value that a loop carries, by the program's values that name it.
struct Carried {
    /// Its name in the loop.
    inside: ValueId,
    /// What it starts as.
    first: ValueId,
    /// Its name behind the loop.
    behind: ValueId,
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
        let takes_turns = self.takes_turns();
        let memory = if takes_turns { self.memory_of_turns(&split, arch) } else { self.memory(&split, arch) };
        let (mut buffers, channels) = memory?;
        let scratch = (self.transposed).then(|| buffers.len() as u32 - 2);
        self.exchanges = buffers.len() as u32;
        self.exchange(&mut buffers, &channels)?;
        let mut roles: Vec<Role> = Vec::new();
        let mut role = |name: String, registers: u32, insts: Vec<Inst>| {
            let first = roles.len() as u32 * (WARPGROUP / Arch::WARP);
            let warps = [first, first + WARPGROUP / Arch::WARP];
            let body = Block { insts, ..Block::default() };
            roles.push(Role { name, warps, registers: (registers > 0).then_some(registers), elected: false, body });
        };
        let bringing = self.bringing();
        let [bring, score, add] = self.registers();
        for n in 0..bringing {
            // Parts of the values take turns; the others go with the last.
            let of = |p: &Part| p.group.unwrap_or(bringing - 1) % bringing;
            let parts: Vec<usize> = (0..self.parts.len()).filter(|&i| of(&self.parts[i]) == n).collect();
            let insts = self.keys(&parts, takes_turns, &mut self.values.names.clone())?;
            role(format!("keys{n}"), bring, insts);
        }
        if takes_turns {
            for (number, name, registers) in [(0, "a", score), (1, "b", add)] {
                let insts = self.turn(&split, number, &mut self.values.names.clone())?;
                role(name.into(), registers, insts);
            }
        } else {
            let insts = self.scores(&split, scratch, &mut self.values.names.clone())?;
            role("scores".into(), score, insts);
            for group in 0..self.groups {
                let insts = self.values(&split, group, &mut self.values.names.clone())?;
                role(format!("values{group}"), add, insts);
            }
        }
        let threads = roles.len() as u32 * WARPGROUP;
        Some(Scheduled {
            name: self.program.name.clone(),
            grid: self.program.grid.clone(),
            persistent: Some(BAND),
            cluster: self.cluster,
            team: self.blocks(),
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
            if inst.results.first().is_some_and(|r| needed.contains(r) && !names.contains_key(r)) {
                let place = if self.tile(inst.results[0])?.elements() == 1 { Place::Uniform } else { Place::Lazy };
                out.push(self.copied(inst, place, names)?);
            }
        }
        Some(out)
    }

    fn bounds(&self) -> Vec<ValueId> {
        [self.a.range.0, self.a.range.1].into_iter().filter_map(value_of).collect()
    }

    /// What the program's loop carries by these numbers, as it starts.
    fn carried(&self, numbers: &[usize], names: &Names) -> Option<Vec<Carried>> {
        let tile::Op::For { init, .. } = &self.a.key_loop.op else { return None };
        let carried = |&i: &usize| {
            let (inside, behind) = (self.a.body.args[1 + i], self.a.key_loop.results[i]);
            Some(Carried { inside, first: *names.get(&init[i])?, behind })
        };
        numbers.iter().map(carried).collect()
    }

    /// The bounds and step of the program's loop, or of this block's part of it.
    fn range(&mut self, names: &Names, out: &mut Vec<Inst>) -> Option<(Index, Index, u32)> {
        let (lo, hi, step) = self.a.range;
        self.part_of((rename_index(lo, names)?, rename_index(hi, names)?, step), out)
    }

    /// From one round of a block to its next.
    fn step(&self) -> u32 {
        self.a.range.2 * self.blocks()
    }

    /// A loop over rounds.
    fn rounds(
        &mut self,
        (lo, hi, step): (Index, Index, u32),
        carried: &[Carried],
        names: &mut Names,
        body: impl FnOnce(&mut Self, &mut Names) -> Option<(Vec<Inst>, Vec<ValueId>)>,
    ) -> Option<Inst> {
        let counter = self.values.fresh(self.program.ty(self.a.body.args[0]).clone(), Place::Uniform);
        names.insert(self.a.body.args[0], counter);
        let mut args = vec![counter];
        args.extend(carried.iter().map(|c| self.handed(c.first, c.inside, names)).collect::<Vec<_>>());
        let (insts, yields) = body(self, names)?;
        let results = carried.iter().map(|c| self.handed(c.first, c.behind, names)).collect();
        let init = carried.iter().map(|c| c.first).collect();
        Some(Inst { results, op: Op::For { lo, hi, step, init, body: Block { args, insts, yields } }, scratch: None })
    }

    /// A value of a loop that is like another, under that name.
    fn handed(&mut self, like: ValueId, name: ValueId, names: &mut Names) -> ValueId {
        let v = self.values.fresh(self.values.types[like.0 as usize].clone(), self.fragment());
        names.insert(name, v);
        v
    }

    fn take(&mut self, channel: ChannelId, slot: u32, dtype: DType, shape: &[u32], out: &mut Vec<Inst>) -> ValueId {
        let ty = Type::Tile(TileType { dtype, shape: shape.to_vec() });
        let v = self.values.fresh(ty, Place::Slot(channel, slot));
        out.push(Inst { results: vec![v], op: Op::Take { channel, slot }, scratch: None });
        v
    }
}
