//! Parts of the keys by the blocks of a team, and what joins them.
//!
//! Of `n` blocks each runs every `n`-th round, so that its first does not depend on how many there are. It has of its keys the largest scores `m` of the rows, the sums `l` and the accumulator. Then
//!
//! ```text
//! put m, l                       those who score
//! meet                           nobody needs keys any more: their memory is free
//! put acc                        there, each group its columns; meanwhile: M = max m, w = 2^(m - M), L = Σ w l of all blocks
//! meet
//! acc = Σ w acc                  of all blocks, of the piece of rows and columns that has this block's number
//! what stands behind the loop    with M, L and that piece
//! meet                           nobody reads this block's memory any more
//! ```
//!
//! **Through memory** ([`Schedule::apart`](dsc_ir::schedule::Schedule::apart)) nothing waits for the memory of keys, and the accumulator is put at once:
//!
//! ```text
//! put m, l, p, acc / p           as f16; p = 2^n, so that a row of a group's columns has its range
//! meet
//! M, w, L, acc = Σ w p (acc / p) of all blocks, of the piece that has this block's number
//! what stands behind the loop
//! meet                           if there is another tile
//! ```
//!
//! Any blocks that run at once may be such a team, where clusters have to fit into groups of multiprocessors; but a block also writes its accumulator,
//! which takes as long as reading one. So it is rounded to the eleven bits of f16 there, with 64 heads 64 KiB: less than the softmax's weights in front of their product.
//!
//! Blocks read one another's pieces round the team, each from another, and add them in that order: the same bits each time. With 64 heads and 512
//! columns a block of a team of `n` reads 128 KiB, or those 64, (n − 1) / n of it from the others.

use super::*;
use crate::nvidia::lower::hopper::attention::Softmax;
use crate::nvidia::lower::hopper::team::MEETING;
use dsc_ir::sched::{MOST_APART, MOST_IN_CLUSTER};
use dsc_ir::tile::{MapArg, MapInst, ScalarOp};

/// Registers for what comes from other blocks at once, with many heads and with few.
const ROOM: u32 = 128;
const ROOM_OF_FEW: u32 = 32;
/// The same for all that comes through memory, whose way is long: rows, what they become, and the accumulator together.
const ROOM_APART: u32 = 192;
/// Registers for rows of all blocks, of those.
const ROOM_OF_ROWS: u32 = 128;
/// What parts of the accumulator are that go through memory.
const ROUNDED: DType = DType::F16;
/// A column outside of every view.
const OUTSIDE: i32 = 1 << 24;

/// How a kernel's keys are divided.
#[derive(Clone, Debug)]
pub(super) struct Team {
    /// Blocks.
    pub blocks: u32,
    /// Whether they exchange through memory.
    apart: bool,
    /// The carried rows that a softmax has.
    softmax: Softmax,
    /// Rows and columns of a group's accumulator that a block joins.
    piece: [u32; 2],
}

/// What a block has joined.
pub(super) struct Joined {
    /// The first row and column of its piece, among all.
    first: [Option<ValueId>; 2],
}

impl<'a> Planner<'a> {
    /// As many blocks as the schedule wants, if they can join what they have, or the most that can.
    pub(super) fn team_of(&self, wanted: u32, apart: bool) -> Option<Team> {
        let softmax = self.a.softmax(self.program, &self.defs)?;
        let [heads, _, columns] = self.a.shape;
        let (wide, shared) = (columns / self.groups, self.cluster.map_or(1, |c| c.blocks));
        let piece = |blocks: u32| {
            // Eight columns, or rows, are what an instruction has at least.
            let (down, across) = match self.transposed {
                false => (1, blocks),
                true => (blocks.div_ceil(wide / ROWS).min(heads / 8), blocks.min(wide / ROWS)),
            };
            let unit = if self.transposed { [8, ROWS] } else { [ROWS, 8] };
            let whole = heads.is_multiple_of(down * unit[0]) && wide.is_multiple_of(across * unit[1]);
            whole.then_some([heads / down, wide / across])
        };
        let most = if apart { MOST_APART } else { MOST_IN_CLUSTER / shared };
        let fits = |&blocks: &u32| blocks > 1 && blocks <= most;
        let mut counts = std::iter::successors(Some(wanted), |&n| (n > 2).then(|| n.next_power_of_two() / 2));
        counts
            .find_map(|n| Some(n).filter(fits).and_then(|n| Some(Team { blocks: n, apart, softmax, piece: piece(n)? })))
    }

    /// Blocks of the team.
    pub(super) fn blocks(&self) -> u32 {
        self.team.as_ref().map_or(1, |t| t.blocks)
    }

    /// Bytes of shared memory for the meetings of a block's roles.
    pub(super) fn meeting(&self) -> u32 {
        self.team.as_ref().map_or(0, |t| if t.apart { MEETING } else { 0 })
    }

    /// Buffers through which blocks join: rows, and behind them each group's columns, in the memory of keys.
    pub(super) fn exchange(&self, buffers: &mut Vec<Buffer>, channels: &[Channel]) -> Option<()> {
        let Some(team) = &self.team else { return Some(()) };
        let [heads, _, columns] = self.a.shape;
        if team.apart {
            let mut offset = 0;
            let [rows, wide] = [1, columns / self.groups];
            let parts = ["part_largest", "part_totals"].map(|name| (name.to_owned(), rows));
            let (sums, powers) = if self.halved(team) { (ROUNDED, self.groups) } else { (DType::F32, 0) };
            let groups = (0..self.groups).map(|group| (format!("part_sums{group}"), wide, sums));
            let powers = (0..powers).map(|group| (format!("part_powers{group}"), rows, DType::F32));
            let parts = parts.into_iter().map(|(name, n)| (name, n, DType::F32));
            for (name, wide, dtype) in parts.chain(groups).chain(powers) {
                let (column, pitch) = (memory::column(name, heads), wide * dtype.bytes() as u32);
                buffers.push(Buffer { dtype, shape: [heads, wide], pitch, offset, outside: true, ..column });
                offset += heads * pitch;
            }
            return Some(());
        }
        let end = |buffers: &[Buffer]| buffers.iter().map(|b| b.offset + b.bytes()).max().unwrap_or(0);
        for name in ["part_largest", "part_totals"] {
            let offset = end(buffers);
            buffers.push(Buffer { offset, ..memory::column(name.into(), heads) });
        }
        let keys: Vec<&Buffer> =
            channels[1..=self.parts.len()].iter().map(|c| &buffers[c.slots[0].0 as usize]).collect();
        let mut offset = keys.iter().map(|b| b.offset).min()?;
        let room = keys.iter().map(|b| b.offset + b.bytes()).max()?;
        for group in 0..self.groups {
            let (name, wide) = (format!("part_sums{group}"), columns / self.groups);
            let part = Buffer { shape: [heads, wide], pitch: wide * 4, offset, ..memory::column(name, heads) };
            offset += part.bytes();
            buffers.push(part);
        }
        (offset <= room).then_some(())
    }

    /// Whether a part of the accumulator is [`ROUNDED`] on its way through memory. With few heads pieces are too small to be pairs.
    fn halved(&self, team: &Team) -> bool {
        team.apart && !self.transposed
    }

    /// The `n`-th of these buffers.
    fn exchanged(&self, n: u32) -> BufferId {
        BufferId(self.exchanges + n)
    }

    /// This block's number in the team.
    pub(super) fn number(&mut self, out: &mut Vec<Inst>) -> ValueId {
        let v = self.values.fresh(self.program.ty(self.a.body.args[0]).clone(), Place::Uniform);
        out.push(Inst { results: vec![v], op: Op::Number, scratch: None });
        v
    }

    /// This block's share of the rounds `lo..hi` of that step: every so many-th. Which its first is does not depend on where they end.
    pub(super) fn part_of(
        &mut self,
        (lo, hi, step): (Index, Index, u32),
        out: &mut Vec<Inst>,
    ) -> Option<(Index, Index, u32)> {
        let blocks = self.blocks();
        if blocks == 1 {
            return Some((lo, hi, step));
        }
        let (number, lo) = (self.number(out), self.scalar_of(lo, out)?);
        let from = vec![
            constant(step as i32),
            arithmetic(ScalarOp::Mul, &[MapArg::Input(1), MapArg::Inst(0)]),
            arithmetic(ScalarOp::Add, &[MapArg::Input(0), MapArg::Inst(1)]),
        ];
        let from = self.scalar(mapped(vec![lo, number], from), out);
        Some((Index::Value(from), hi, step * blocks))
    }

    /// What a role without accumulator or rows does while the others join.
    pub(super) fn looks_on(&self, out: &mut Vec<Inst>) {
        if let Some(team) = &self.team {
            out.extend((0..if team.apart { 2 } else { 3 }).map(|_| plain(Op::Meet)));
        }
    }

    fn behind_loop(&self, carried: usize) -> ValueId {
        self.a.key_loop.results[carried]
    }

    /// [`Planner::join`], if there are others to join with.
    pub(super) fn joins(
        &mut self,
        puts: bool,
        group: Option<u32>,
        names: &mut Names,
        out: &mut Vec<Inst>,
    ) -> Option<Option<Joined>> {
        if self.team.is_none() { Some(None) } else { self.join(puts, group, names, out).map(Some) }
    }

    /// Joins the rows of all blocks and, if there is a group, its columns of the accumulator, up to the second meeting; gives the rest names of
    /// the values behind the loop. `puts` says who has the rows.
    pub(super) fn join(
        &mut self,
        puts: bool,
        group: Option<u32>,
        names: &mut Names,
        out: &mut Vec<Inst>,
    ) -> Option<Joined> {
        let team = self.team.clone()?;
        let [largest, totals] = [team.softmax.largest, team.softmax.total].map(|i| self.behind_loop(i));
        let acc = self.behind_loop(self.a.acc);
        self.put_own((puts.then_some([largest, totals]), group.map(|g| (g, acc))), &team, names, out)?;
        // Who has no accumulator has the rows whole.
        let rows = if group.is_some() { team.piece[0] } else { self.a.shape[0] };
        let own = rows < self.a.shape[0];
        let each = if self.transposed { rows / 4 } else { 2 };
        let registers = team.piece[0] * team.piece[1] / WARPGROUP;
        let all = 2 * each * team.blocks;
        let (rows_joined, early) = if team.apart && !self.transposed && all <= ROOM_OF_ROWS {
            // All on its way together, rows and as much of the accumulator as there is room for.
            let [m, l] =
                [0, 1].map(|n| (0..team.blocks).map(|after| self.got_rows(n, after, rows, own, out)).collect());
            let some = ((ROOM_APART.saturating_sub(all)) / registers.max(1)).clamp(1, team.blocks);
            let early = group.map(|g| self.pieces(g, 0..some, &team, out)).unwrap_or_default();
            (self.join_rows(m, l, out), early)
        } else {
            // What many blocks' parts count takes registers, too.
            let room = if team.apart && !self.transposed { 6 * each } else { 2 * each };
            (self.join_rows_by_parts(&team, (rows, own, room), out)?, Vec::new())
        };
        let (most, total, mut weights) = rows_joined;
        if !team.apart {
            out.push(plain(Op::Meet));
        }
        names.insert(largest, most);
        names.insert(totals, total);
        let Some(group) = group else { return Some(Joined { first: [None; 2] }) };
        if puts {
            // While pieces are on their way.
            self.finish_rows_once(None, names, out)?;
        }
        if self.halved(&team) {
            weights = self.times_powers(weights, (group, rows, own), &team, out);
        }
        let begun = early.len() as u32;
        let mut sum =
            (begun > 0).then(|| self.made(team.piece, weighted(early, &weights[..begun as usize], None), out));
        let room = registers * if all >= ROOM { 2 } else { 1 };
        for some in self.some_of(begun..team.blocks, room) {
            let weights = &weights[some.start as usize..some.end as usize];
            let parts = self.pieces(group, some, &team, out);
            sum = Some(self.made(team.piece, weighted(parts, weights, sum), out));
        }
        names.insert(acc, sum?);
        Some(self.piece_at(&team, group, out))
    }

    /// Puts the largest scores and sums of rows, and a group's columns of the accumulator; between them or behind them the team meets.
    fn put_own(
        &mut self,
        (rows, columns): (Option<[ValueId; 2]>, Option<(u32, ValueId)>),
        team: &Team,
        names: &Names,
        out: &mut Vec<Inst>,
    ) -> Option<()> {
        for (n, v) in (0..).zip(rows.into_iter().flatten()) {
            out.push(plain(Op::Put { buffer: self.exchanged(n), value: *names.get(&v)? }));
        }
        if !team.apart {
            out.push(plain(Op::Meet));
        }
        if let Some((group, acc)) = columns {
            let mut value = *names.get(&acc)?;
            if self.halved(team) {
                value = self.put_powers(group, value, out);
            }
            out.push(plain(Op::Put { buffer: self.exchanged(2 + group), value }));
        }
        if team.apart {
            out.push(plain(Op::Meet));
        }
        Some(())
    }

    /// What each block's part counts, times the powers that a group's columns were divided by.
    fn times_powers(
        &mut self,
        mut weights: Vec<ValueId>,
        (group, rows, own): (u32, u32, bool),
        team: &Team,
        out: &mut Vec<Inst>,
    ) -> Vec<ValueId> {
        let n = 2 + self.groups + group;
        let powers: Vec<ValueId> = (0..team.blocks).map(|after| self.got_rows(n, after, rows, own, out)).collect();
        let product = vec![arithmetic(ScalarOp::Mul, &[MapArg::Input(0), MapArg::Input(1)])];
        for (weight, power) in weights.iter_mut().zip(powers) {
            *weight = self.made([rows, 1], mapped(vec![*weight, power], product.clone()), out);
        }
        weights
    }

    /// Puts a power of two for each row of a group's columns; gives these divided by them, as f16. Where a row's largest is no number, or none at all, it is 1.
    fn put_powers(&mut self, group: u32, acc: ValueId, out: &mut Vec<Inst>) -> ValueId {
        let shape = [self.a.shape[0], self.a.shape[2] / self.groups];
        let lazy = |p: &mut Self, dtype, op, out: &mut Vec<Inst>| {
            let v = p.values.fresh(Type::Tile(TileType { dtype, shape: shape.to_vec() }), Place::Lazy);
            out.push(Inst { results: vec![v], op: Op::Tile(op), scratch: None });
            v
        };
        let sizes = mapped(vec![acc], vec![arithmetic(ScalarOp::Abs, &[MapArg::Input(0)])]);
        let sizes = lazy(self, DType::F32, sizes, out);
        let most = tile::Op::Reduce { x: sizes, axis: 1, kind: tile::ReduceKind::Max };
        let most = self.made([shape[0], 1], most, out);
        let [power, inverse] = [power_of_two(false), power_of_two(true)]
            .map(|body| self.made([shape[0], 1], mapped(vec![most], body), out));
        out.push(plain(Op::Put { buffer: self.exchanged(2 + self.groups + group), value: power }));
        let rounded = vec![
            arithmetic(ScalarOp::Mul, &[MapArg::Input(0), MapArg::Input(1)]),
            arithmetic(ScalarOp::Cast(ROUNDED), &[MapArg::Inst(0)]),
        ];
        lazy(self, ROUNDED, mapped(vec![acc, inverse], rounded), out)
    }

    /// The largest score of each row among all blocks, the sum, and what each block's part counts, where all rows of all blocks are held.
    fn join_rows(&mut self, m: Vec<ValueId>, l: Vec<ValueId>, out: &mut Vec<Inst>) -> (ValueId, ValueId, Vec<ValueId>) {
        let (shape, count) = (self.rows_shape(m[0]), m.len() as u32);
        let most = self.made(shape, mapped(m.clone(), folded(ScalarOp::Max, count)), out);
        let weights = self.weights_of_parts(m, most, out);
        let total = self.made(shape, weighted(l, &weights, None), out);
        (most, total, weights)
    }

    /// The same where there may be no registers for all of them: what was got is got again. Rows, whether they are a piece, and registers that a
    /// block's take.
    fn join_rows_by_parts(
        &mut self,
        team: &Team,
        (rows, own, registers): (u32, bool, u32),
        out: &mut Vec<Inst>,
    ) -> Option<(ValueId, ValueId, Vec<ValueId>)> {
        let mut most = None;
        for some in self.some_of(0..team.blocks, registers) {
            let mut largest: Vec<ValueId> = some.map(|after| self.got_rows(0, after, rows, own, out)).collect();
            largest.extend(most);
            let count = largest.len() as u32;
            most = Some(self.made([rows, 1], mapped(largest, folded(ScalarOp::Max, count)), out));
        }
        let (most, mut total, mut weights) = (most?, None, Vec::new());
        for some in self.some_of(0..team.blocks, registers) {
            let m: Vec<ValueId> = some.clone().map(|after| self.got_rows(0, after, rows, own, out)).collect();
            let l: Vec<ValueId> = some.map(|after| self.got_rows(1, after, rows, own, out)).collect();
            let w = self.weights_of_parts(m, most, out);
            total = Some(self.made([rows, 1], weighted(l, &w, total), out));
            weights.extend(w);
        }
        Some((most, total?, weights))
    }

    /// `2^(m − M)`.
    fn weights_of_parts(&mut self, m: Vec<ValueId>, most: ValueId, out: &mut Vec<Inst>) -> Vec<ValueId> {
        let shape = self.rows_shape(most);
        let weight = vec![
            arithmetic(ScalarOp::Sub, &[MapArg::Input(0), MapArg::Input(1)]),
            arithmetic(ScalarOp::Exp2, &[MapArg::Inst(0)]),
        ];
        m.into_iter().map(|m| self.made(shape, mapped(vec![m, most], weight.clone()), out)).collect()
    }

    fn rows_shape(&self, v: ValueId) -> [u32; 2] {
        match &self.values.types[v.0 as usize] {
            Type::Tile(t) => [t.shape[0], 1],
            _ => [1, 1],
        }
    }

    /// This block's piece of what some blocks have of a group's columns.
    fn pieces(&mut self, group: u32, some: std::ops::Range<u32>, team: &Team, out: &mut Vec<Inst>) -> Vec<ValueId> {
        let (dtype, shape) = (if self.halved(team) { ROUNDED } else { DType::F32 }, team.piece);
        some.map(|after| self.got(2 + group, after, TileType { dtype, shape: shape.to_vec() }, true, out)).collect()
    }

    /// Where this block's piece of a group's columns lies.
    fn piece_at(&mut self, team: &Team, group: u32, out: &mut Vec<Inst>) -> Joined {
        let ([heads, _, columns], [rows, wide]) = (self.a.shape, team.piece);
        let (down, first) = (heads / rows, (group * columns / self.groups) as i32);
        let pieces = down * (columns / self.groups / wide);
        let number = self.number(out);
        let mut column = vec![
            constant(down as i32),
            arithmetic(ScalarOp::Div, &[MapArg::Input(0), MapArg::Inst(0)]),
            constant(wide as i32),
            arithmetic(ScalarOp::Mul, &[MapArg::Inst(1), MapArg::Inst(2)]),
            constant(first),
            arithmetic(ScalarOp::Add, &[MapArg::Inst(3), MapArg::Inst(4)]),
        ];
        if pieces < team.blocks {
            // Others join what nobody stores.
            column.extend([
                constant(pieces as i32),
                arithmetic(ScalarOp::Lt, &[MapArg::Input(0), MapArg::Inst(6)]),
                constant(OUTSIDE),
                arithmetic(ScalarOp::Select, &[MapArg::Inst(7), MapArg::Inst(5), MapArg::Inst(8)]),
            ]);
        }
        let column = self.scalar(mapped(vec![number], column), out);
        let row = (down > 1).then(|| {
            let row = vec![
                constant(down as i32),
                arithmetic(ScalarOp::Rem, &[MapArg::Input(0), MapArg::Inst(0)]),
                constant(rows as i32),
                arithmetic(ScalarOp::Mul, &[MapArg::Inst(1), MapArg::Inst(2)]),
            ];
            self.scalar(mapped(vec![number], row), out)
        });
        Joined { first: [row, Some(column)] }
    }

    /// Blocks by as many as have room in registers at once, where each takes so many.
    fn some_of(&self, blocks: std::ops::Range<u32>, registers: u32) -> Vec<std::ops::Range<u32>> {
        let room = if self.transposed { ROOM_OF_FEW } else { ROOM };
        let (some, end) = ((room / registers.max(1)).max(1), blocks.end);
        blocks.step_by(some as usize).map(|first| first..(first + some).min(end)).collect()
    }

    fn got_rows(&mut self, n: u32, after: u32, rows: u32, own: bool, out: &mut Vec<Inst>) -> ValueId {
        self.got(n, after, TileType { dtype: DType::F32, shape: vec![rows, 1] }, own, out)
    }

    fn got(&mut self, n: u32, after: u32, ty: TileType, own: bool, out: &mut Vec<Inst>) -> ValueId {
        let v = self.values.fresh(Type::Tile(ty), self.fragment());
        out.push(Inst { results: vec![v], op: Op::Get { buffer: self.exchanged(n), after, own }, scratch: None });
        v
    }

    fn made(&mut self, shape: [u32; 2], op: tile::Op, out: &mut Vec<Inst>) -> ValueId {
        let ty = TileType { dtype: DType::F32, shape: shape.to_vec() };
        let v = self.values.fresh(Type::Tile(ty), self.fragment());
        out.push(Inst { results: vec![v], op: Op::Tile(op), scratch: None });
        v
    }

    /// What stands behind the loop and needs the accumulator, of a block's piece; then nobody needs its memory.
    pub(super) fn finish_piece(&mut self, joined: &Joined, names: &mut Names, out: &mut Vec<Inst>) -> Option<()> {
        let (after, [rows, wide]) = (self.after(&[], true), self.team.as_ref()?.piece);
        let [heads, _, columns] = self.a.shape;
        for inst in self.behind() {
            let made = inst.results.first();
            match &inst.op {
                tile::Op::Store { value, .. } if self.of_acc(*value) => {}
                _ if !made.is_some_and(|r| after.contains(r)) => continue,
                _ => {}
            }
            let place = match made {
                Some(&r) if self.tile(r)?.elements() == 1 => Place::Uniform,
                Some(&r) if self.of_rows(r) && !self.of_acc(r) => self.fragment(),
                _ => Place::Lazy,
            };
            let mut new = self.copied(inst, place, names)?;
            let cut = |shape: &mut [u32], of_acc: bool| {
                let n = shape.len();
                if n >= 2 && shape[n - 2] == heads {
                    shape[n - 2] = rows;
                }
                if of_acc && shape[n - 1] == columns {
                    shape[n - 1] = wide;
                }
            };
            for (&old, &v) in inst.results.iter().zip(&new.results) {
                let of_acc = self.of_acc(old);
                if let Type::Tile(t) = &mut self.values.types[v.0 as usize]
                    && t.elements() > 1
                {
                    cut(&mut t.shape, of_acc);
                }
            }
            let of_acc = made.is_some_and(|&r| self.of_acc(r));
            match &mut new.op {
                Op::Tile(tile::Op::Reshape { shape, .. } | tile::Op::Full { shape, .. }) if shape.len() > 1 => {
                    cut(shape, of_acc)
                }
                Op::Tile(tile::Op::Store { index, .. }) => {
                    let n = index.len();
                    *index.last_mut()? = Index::Value(joined.first[1]?);
                    if let Some(row) = joined.first[0] {
                        let place = index.get_mut(n.checked_sub(2)?)?;
                        let before = self.scalar_of(*place, out)?;
                        let sum = vec![arithmetic(ScalarOp::Add, &[MapArg::Input(0), MapArg::Input(1)])];
                        *place = Index::Value(self.scalar(mapped(vec![before, row], sum), out));
                    }
                }
                Op::Tile(tile::Op::Map { .. }) => {}
                _ if !of_acc => {}
                _ => return None,
            }
            out.push(new);
        }
        out.push(plain(Op::Meet));
        Some(())
    }

    /// What stands behind the loop and needs no accumulator, by one block of the team.
    pub(super) fn finish_rows_once(
        &mut self,
        scratch: Option<u32>,
        names: &mut Names,
        out: &mut Vec<Inst>,
    ) -> Option<()> {
        let after = self.after(&[], false);
        let mut insts = Vec::new();
        self.finish_rows(&after, names, scratch, &mut insts)?;
        if insts.is_empty() {
            return Some(());
        }
        let lo = Index::Value(self.number(out));
        let counter = self.values.fresh(self.program.ty(self.a.body.args[0]).clone(), Place::Uniform);
        let body = Block { args: vec![counter], insts, yields: Vec::new() };
        // The first block's number is the only one below 1.
        let once = Op::For { lo, hi: Index::Const(1), step: 1, init: Vec::new(), body };
        out.push(plain(once));
        Some(())
    }
}

/// Of a size a power of two, or its inverse, such that sizes up to this one divided by it are less than 2^14, and this one at least 2^13; 1 of what is no number.
fn power_of_two(inverse: bool) -> Vec<MapInst> {
    // Sizes below 2^-67 are as that one: divided they lose bits, but are no part of what is larger by 2^80.
    let [exponents, least, one, range, turned] = [0x7f80_0000, 60 << 23, 127 << 23, 13 << 23, 254 << 23];
    let (input, at) = (MapArg::Input(0), MapArg::Inst);
    let op = arithmetic;
    let mut insts = vec![
        op(ScalarOp::Bitcast(DType::I32), &[input]),
        constant(exponents),
        op(ScalarOp::And, &[at(0), at(1)]),
        op(ScalarOp::Lt, &[at(2), at(1)]),
        constant(least),
        op(ScalarOp::Max, &[at(2), at(4)]),
        constant(range),
        op(ScalarOp::Sub, &[at(5), at(6)]),
        constant(one),
        op(ScalarOp::Select, &[at(3), at(7), at(8)]),
    ];
    if inverse {
        insts.extend([constant(turned), op(ScalarOp::Sub, &[at(10), at(9)])]);
    }
    insts.push(op(ScalarOp::Bitcast(DType::F32), &[at(insts.len() as u32 - 1)]));
    insts
}

/// All of so many inputs, in order.
fn folded(op: ScalarOp, inputs: u32) -> Vec<MapInst> {
    let first = arithmetic(op, &[MapArg::Input(0), MapArg::Input(1)]);
    let rest = (2..inputs).map(|n| arithmetic(op, &[MapArg::Inst(n - 2), MapArg::Input(n)]));
    [first].into_iter().chain(rest).collect()
}

/// The sum of values times weights, in order, behind what there is already.
fn weighted(values: Vec<ValueId>, weights: &[ValueId], before: Option<ValueId>) -> tile::Op {
    let parts = values.len() as u32;
    // A cast of what is f32 already is nothing.
    let each = |n: u32| {
        let [value, weight] = [2 * n, parts + n];
        let wide = arithmetic(ScalarOp::Cast(DType::F32), &[MapArg::Input(n)]);
        let of = |to: Option<MapArg>| match to {
            Some(to) => arithmetic(ScalarOp::Fma, &[MapArg::Inst(value), MapArg::Input(weight), to]),
            None => arithmetic(ScalarOp::Mul, &[MapArg::Inst(value), MapArg::Input(weight)]),
        };
        let to = if n > 0 { Some(MapArg::Inst(value - 1)) } else { before.map(|_| MapArg::Input(2 * parts)) };
        [wide, of(to)]
    };
    let sum = (0..parts).flat_map(each).collect();
    let inputs = values.into_iter().chain(weights.iter().copied()).chain(before).collect();
    mapped(inputs, sum)
}
