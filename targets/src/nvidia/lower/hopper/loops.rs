//! Loops: over the tiles of a block, and those of the kernel.

use super::emit::{Emit, Held};
use super::front::in_lists;
use crate::nvidia::lower::isa;
use crate::nvidia::lower::mlir::{Ty, Val, i32};
use dsc_ir::sched::{Block, Inst, Place};
use dsc_ir::tile::{Index, Type, ValueId};
use std::collections::HashMap;

/// How a loop carries a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Carry {
    /// As the thread's elements.
    Elements,
    /// As what lanes have loaded for each other; in the loop that is loaded for this value.
    Shared(ValueId),
    /// The same registers as that other value.
    With(usize),
}

/// A band of all tiles of axis 0, however many there are.
pub const ALL_ROWS: u32 = i32::MAX as u32;

/// A block's way over the tiles of a grid of two axes, axis 0 fastest.
struct Walk {
    /// Coordinates of the first tile.
    at: [Val; 2],
    /// What is added to each from one tile to the next, before the first of them goes back by its size.
    by: [Val; 2],
    size: Val,
}

impl<'a> Emit<'a> {
    /// Runs a role's body for every tile of this block: tile numbers from the block's on, in steps of the number of blocks, so that any
    /// launch grid does all the work.
    pub fn tiles(&mut self, body: &'a Block) -> Result<(), String> {
        if self.range.is_some() {
            return self.tiles_of_range(body);
        }
        let [first, blocks] = self.place_among_blocks();
        let sizes = self.tiles_along_axes();
        let tiles = self.all_tiles(sizes);
        let band = self.s.persistent.unwrap_or(1);
        let mut state: Vec<Val> = self.ring_state();
        let counters = state.len();
        let dealt = [tiles, blocks];
        let (front, nest) = (self.front(body), self.nest(body));
        let mut bounds = 0;
        let loaded = match (front, nest) {
            (Some(front), _) => {
                let block = self.tile_or_first(first, dealt, sizes, band);
                self.run_front(front, block)?
            }
            (None, Some(nest)) => {
                let block = self.tile_or_first(first, dealt, sizes, band);
                let (scalars, known) = self.bounds_of(nest, block, None)?;
                bounds = known.len();
                state.extend(known);
                self.first_front(nest, &scalars)?
            }
            (None, None) => Vec::new(),
        };
        let lengths: Vec<usize> = loaded.iter().map(Vec::len).collect();
        state.extend(loaded.into_iter().flatten());
        let walks = band == ALL_ROWS && !self.s.folded && self.s.cluster.is_none() && front.is_none() && nest.is_none();
        let walk = walks.then(|| self.walk(first, blocks, sizes));
        state.extend(walk.iter().flat_map(|w| w.at));
        let end = self.counted((first, tiles, blocks), &state, |e, tile, state| {
            let (rings, carried) = state.split_at(counters);
            let (known, loaded) = carried.split_at(bounds);
            e.resume(rings);
            e.block = match &walk {
                Some(_) => [loaded[0], loaded[1], i32(0)],
                None => e.tile_at(tile, dealt, sizes, band),
            };
            if e.s.apart() {
                let next = e.t.f.add(tile, blocks);
                e.more = Some(e.t.f.cmp("slt", next, tiles));
            }
            let loaded = in_lists(loaded, &lengths);
            let mut after = Vec::new();
            let made = match (front, nest) {
                (Some(front), _) => {
                    let next = e.t.f.add(tile, blocks);
                    let next = e.tile_or_first(next, dealt, sizes, band);
                    e.block_behind_front(front, &loaded, |e| e.run_front(front, next))?
                }
                (None, Some(nest)) => {
                    let here = e.block;
                    let (here, _) = e.bounds_of(nest, here, Some(known))?;
                    let next = e.t.f.add(tile, blocks);
                    let next = e.tile_or_first(next, dealt, sizes, band);
                    let (scalars, known) = e.bounds_of(nest, next, None)?;
                    after = known;
                    e.run_nest(nest, [&here, &scalars], &loaded)?
                }
                (None, None) => {
                    e.block(body)?;
                    Vec::new()
                }
            };
            e.settle_all();
            if let Some(walk) = &walk {
                after = e.next_of(walk, [e.block[0], e.block[1]]).to_vec();
            }
            Ok(e.ring_state().into_iter().chain(after).chain(made.into_iter().flatten()).collect())
        })?;
        let end = &end[..counters];
        self.resume(end);
        Ok(())
    }

    /// This block's number, or its cluster's, and how many there are.
    pub fn place_among_blocks(&mut self) -> [Val; 2] {
        if let Some(share) = self.share {
            return share;
        }
        let f = &mut self.t.f;
        let ids = ["x", "y", "z"].map(|axis| isa::sreg(f, &format!("ctaid.{axis}")));
        let counts = ["x", "y", "z"].map(|axis| isa::sreg(f, &format!("nctaid.{axis}")));
        let plane = f.mul(counts[1], ids[2]);
        let plane = f.add(plane, ids[1]);
        let plane = f.mul(plane, counts[0]);
        let first = f.add(plane, ids[0]);
        let blocks = f.mul(counts[0], counts[1]);
        let blocks = f.mul(blocks, counts[2]);
        // Clusters take tiles that lie together.
        let together = self.cluster * self.team;
        [f.div(first, together), f.div(blocks, together)]
    }

    /// Tiles along the axes of the grid, or clusters.
    pub fn tiles_along_axes(&mut self) -> [Val; 3] {
        let mut sizes = [i32(1); 3];
        for (size, dim) in sizes.iter_mut().zip(&self.s.grid) {
            let extent = self.extent(dim.extent);
            let up = self.t.f.add(extent, i32(i64::from(dim.tile) - 1));
            *size = self.t.f.div(up, dim.tile);
        }
        if let Some(cluster) = self.s.cluster {
            let size = &mut sizes[cluster.axis as usize];
            let up = self.t.f.add(*size, i32(i64::from(cluster.blocks) - 1));
            *size = self.t.f.div(up, cluster.blocks);
        }
        sizes
    }

    /// How many that are.
    pub fn all_tiles(&mut self, sizes: [Val; 3]) -> Val {
        let tiles = self.t.f.mul(sizes[0], sizes[1]);
        self.t.f.mul(tiles, sizes[2])
    }

    /// The walk from that tile on, in steps of the number of blocks.
    fn walk(&mut self, first: Val, blocks: Val, sizes: [Val; 3]) -> Walk {
        let f = &mut self.t.f;
        let [at, by] = [first, blocks].map(|n| {
            let whole = f.bin("udiv", n, sizes[0]);
            let before = f.mul(whole, sizes[0]);
            [f.sub(n, before), whole]
        });
        Walk { at, by, size: sizes[0] }
    }

    /// Coordinates of a block's next tile, without the divisions that take longer than finding that a tile has nothing to do.
    fn next_of(&mut self, walk: &Walk, at: [Val; 2]) -> [Val; 2] {
        let f = &mut self.t.f;
        let within = f.add(at[0], walk.by[0]);
        let over = f.cmp("sge", within, walk.size);
        let less = f.sub(within, walk.size);
        let number = f.add(at[1], walk.by[1]);
        let after = f.add(number, i32(1));
        [f.select(over, less, within), f.select(over, after, number)]
    }

    /// Coordinates of the tile of this block in the cluster's tile of that number; `dealt`: how many tiles to how many blocks or clusters.
    fn tile_at(&mut self, tile: Val, dealt: [Val; 2], sizes: [Val; 3], band: u32) -> [Val; 3] {
        let tile = if self.s.folded { self.folded(tile, dealt) } else { tile };
        let mut block = self.coordinates(tile, sizes, band);
        if self.s.folded {
            let last = self.s.grid.len() - 1;
            let end = self.t.f.sub(sizes[last], i32(1));
            block[last] = self.t.f.sub(end, block[last]);
        }
        if let Some(cluster) = self.s.cluster {
            let at = &mut block[cluster.axis as usize];
            let first = self.t.f.mul(*at, i32(cluster.blocks.into()));
            *at = self.t.f.add(first, self.rank);
        }
        block
    }

    /// The same of the first tile if there are not so many: a front may run for a tile that nobody has.
    fn tile_or_first(&mut self, tile: Val, dealt: [Val; 2], sizes: [Val; 3], band: u32) -> [Val; 3] {
        let there = self.t.f.cmp("ult", tile, dealt[0]);
        let tile = self.t.f.select(there, tile, i32(0));
        self.tile_at(tile, dealt, sizes, band)
    }

    /// The tile that stands there if every second turn of all blocks, as far as turns are whole, goes backwards: of so many tiles, by so many blocks.
    fn folded(&mut self, tile: Val, [tiles, blocks]: [Val; 2]) -> Val {
        let f = &mut self.t.f;
        let turn = f.bin("udiv", tile, blocks);
        let first = f.mul(turn, blocks);
        let next = f.add(first, blocks);
        let whole = f.cmp("sle", next, tiles);
        let odd = f.bin("and", turn, i32(1));
        let odd = f.cmp("ne", odd, i32(0));
        let back = f.bin("and", whole, odd);
        let both = f.add(first, next);
        let both = f.sub(both, i32(1));
        let mirrored = f.sub(both, tile);
        f.select(back, mirrored, tile)
    }

    /// Coordinates of a tile by its number: planes of axis 2; in a plane bands of so many tiles of axis 0; in a band, axis 0 fastest.
    pub fn coordinates(&mut self, tile: Val, sizes: [Val; 3], band: u32) -> [Val; 3] {
        let f = &mut self.t.f;
        let of_plane = f.mul(sizes[0], sizes[1]);
        let (z, within) = if sizes[2].int() == Some(1) {
            (i32(0), tile)
        } else {
            (f.bin("udiv", tile, of_plane), f.bin("urem", tile, of_plane))
        };
        if band == 1 {
            // Axis 1 fastest, with one division.
            let number = f.bin("udiv", within, sizes[1]);
            let before = f.mul(number, sizes[1]);
            return [number, f.sub(within, before), z];
        }
        if band == ALL_ROWS {
            return [f.bin("urem", within, sizes[0]), f.bin("udiv", within, sizes[0]), z];
        }
        let of_band = f.mul(sizes[1], i32(band.into()));
        let number = f.bin("udiv", within, of_band);
        let within = f.bin("urem", within, of_band);
        let first = f.mul(number, i32(band.into()));
        let left = f.sub(sizes[0], first);
        let short = f.cmp("slt", left, i32(band.into()));
        let rows = f.select(short, left, i32(band.into()));
        let row = f.bin("urem", within, rows);
        [f.add(first, row), f.bin("udiv", within, rows), z]
    }

    /// `for i in lo..hi step step`, tested first; what it carries at its end.
    pub fn counted(
        &mut self,
        (lo, hi, step): (Val, Val, Val),
        carried: &[Val],
        body: impl FnOnce(&mut Self, Val, &[Val]) -> Result<Vec<Val>, String>,
    ) -> Result<Vec<Val>, String> {
        let (head, inside, after) = (self.t.f.label(), self.t.f.label(), self.t.f.label());
        let args: Vec<Val> = [lo].into_iter().chain(carried.iter().copied()).collect();
        let types: Vec<Ty> = args.iter().map(|a| a.ty()).collect();
        self.t.f.br(head, &args);
        let args = self.t.f.start(head, &types);
        let more = self.t.f.cmp("slt", args[0], hi);
        self.t.f.cond_br(more, (inside, &[]), (after, &[]));
        self.t.f.start(inside, &[]);
        let next = body(self, args[0], &args[1..])?;
        let counter = self.t.f.add(args[0], step);
        let next: Vec<Val> = [counter].into_iter().chain(next).collect();
        self.t.f.br(head, &next);
        self.t.f.start(after, &[]);
        Ok(args[1..].to_vec())
    }

    /// Registers of a value that a loop carries.
    fn registers(&mut self, v: ValueId) -> Result<Vec<Val>, String> {
        if matches!(self.s.types[v.0 as usize], Type::Topk { .. }) {
            return Ok(Vec::new());
        }
        match self.held.get(&v) {
            Some(Held::Scalar(x)) => return Ok(vec![*x]),
            Some(Held::Registers(values, _) | Held::Shared(values, ..) | Held::Lanes(values) | Held::Sums(values)) => {
                return Ok(values.clone());
            }
            _ => {}
        }
        let mut seen = HashMap::new();
        let [rows, columns] = self.spread(v)?;
        let registers = self.seen_in(v)?.varying(rows, columns);
        registers.into_iter().map(|at| self.element(v, at, &mut seen)).collect()
    }

    /// How a loop carries a value from `init` that becomes the last of `yields`, after others.
    fn carry(&self, others: &[ValueId], init: ValueId, yields: &[ValueId]) -> Carry {
        let share = |v: &ValueId| self.shares.get(v).copied();
        let (Some(Held::Shared(..)), Some(from), Some(to)) =
            (self.held.get(&init), share(&init), yields.last().and_then(share))
        else {
            return Carry::Elements;
        };
        let same = |(a, b): (&ValueId, &ValueId)| {
            let (Some(a), Some(b)) = (share(a), share(b)) else { return false };
            a.leader == from.leader && b.leader == to.leader && a.lane == b.lane
        };
        match others.iter().zip(yields).position(same) {
            _ if from.lane != to.lane => Carry::Elements,
            Some(first) => Carry::With(first),
            None => Carry::Shared(to.leader),
        }
    }

    /// Hands out whatever lanes have for each other but these: what is handed out in a loop is not known behind it.
    fn hand_out_but(&mut self, kept: &[ValueId]) {
        let shared =
            |(v, held): (&ValueId, &Held)| (matches!(held, Held::Shared(..)) && !kept.contains(v)).then_some(*v);
        let mut rest: Vec<ValueId> = self.held.iter().filter_map(shared).collect();
        rest.sort_unstable();
        rest.into_iter().for_each(|v| self.hand_out(v));
    }

    fn hold(&mut self, v: ValueId, values: &[Val], varies: [bool; 2]) {
        // A selection lies in memory.
        if values.is_empty() {
            return;
        }
        let held = match &self.s.places[v.0 as usize] {
            _ if self.is_sums(v) => Held::Sums(values.to_vec()),
            Place::Fragment(_) => Held::Registers(values.to_vec(), varies),
            _ => Held::Scalar(values[0]),
        };
        self.held.insert(v, held);
    }

    /// A loop of the kernel. Products may be in flight across its ends if the same are in flight at both, as results that it carries.
    pub fn for_loop(
        &mut self,
        inst: &'a Inst,
        (lo, hi, step): (Index, Index, u32),
        init: &[ValueId],
        body: &'a Block,
    ) -> Result<(), String> {
        if self.computes_rows(body) {
            return self.pipelined(inst, (lo, hi, step), body);
        }
        if self.brings_rows(inst, body) {
            return self.gathering((lo, hi, step), body);
        }
        if !self.flight.all_among(init) {
            self.settle_all();
        }
        self.prepare_rows(body, false)?;
        self.anchor_loads(body)?;
        let (mut lo, hi, mut step) = (self.index(lo)?, self.index(hi)?, step);
        let turns = self.turns_in(body);
        if turns > 1 {
            (lo, step) = (self.own_round(lo, turns)?, turns);
        }
        let mut carried: Vec<Val> = self.ring_state();
        let counters = carried.len();
        let (mut carries, mut widths, mut varies) = (Vec::new(), Vec::new(), Vec::new());
        for (number, &v) in init.iter().enumerate() {
            let carry = self.carry(&init[..number], v, &body.yields[..=number]);
            if carry == Carry::Elements {
                self.hand_out(v);
            }
            varies.push(match self.held.get(&v) {
                Some(Held::Registers(_, varies) | Held::Shared(_, varies, _)) => *varies,
                _ => self.spread(v).unwrap_or([true, true]),
            });
            let values = match carry {
                Carry::With(_) => Vec::new(),
                _ => self.registers(v)?,
            };
            carries.push(carry);
            widths.push(values.len());
            carried.extend(values);
        }
        self.hand_out_but(init);
        let split = |values: &[Val]| -> Vec<Vec<Val>> {
            let mut rest = &values[counters..];
            let mut all: Vec<Vec<Val>> = Vec::new();
            for (carry, &n) in carries.iter().zip(&widths) {
                let (here, after) = rest.split_at(n);
                rest = after;
                all.push(match carry {
                    Carry::With(other) => all[*other].clone(),
                    _ => here.to_vec(),
                });
            }
            all
        };
        let lanes: Vec<Option<u32>> = init
            .iter()
            .zip(&carries)
            .map(|(v, carry)| match self.held.get(v) {
                Some(Held::Shared(_, _, lane)) if *carry != Carry::Elements => Some(*lane),
                _ => None,
            })
            .collect();
        let spread: Vec<bool> = init.iter().map(|v| matches!(self.held.get(v), Some(Held::Lanes(_)))).collect();
        let hold = |e: &mut Self, to: &[ValueId], values: &[Val]| {
            for ((((&v, values), &varies), lane), &spread) in
                to.iter().zip(split(values)).zip(&varies).zip(&lanes).zip(&spread)
            {
                match lane {
                    Some(lane) => _ = e.held.insert(v, Held::Shared(values, varies, *lane)),
                    None if spread => _ = e.held.insert(v, Held::Lanes(values)),
                    None => e.hold(v, &values, varies),
                }
            }
        };
        let at_entry = self.flight.renamed(init, &body.args[1..]);
        let unfenced = self.unfenced;
        let args = self.counted((lo, hi, i32(step.into())), &carried, |e, counter, values| {
            e.resume(values);
            e.held.insert(body.args[0], Held::Scalar(counter));
            hold(e, &body.args[1..], values);
            e.flight = at_entry.clone();
            e.spare.clear();
            e.settled = None;
            e.block_unless_idle(body)?;
            e.spare.clear();
            e.settled = None;
            if e.flight.renamed(&body.yields, &body.args[1..]) != at_entry {
                e.settle_all();
            }
            let mut next: Vec<Val> = e.ring_state();
            for (&v, carry) in body.yields.iter().zip(&carries) {
                match carry {
                    Carry::With(_) => {}
                    Carry::Shared(leader) => next.extend(e.shared_out.get(leader).cloned().unwrap_or_default()),
                    Carry::Elements => {
                        e.hand_out(v);
                        next.extend(e.registers(v)?);
                    }
                }
            }
            Ok(next)
        })?;
        self.resume(&args);
        hold(self, &inst.results, &args);
        self.flight = at_entry.renamed(&body.args[1..], &inst.results);
        // There may have been no round.
        self.unfenced |= unfenced;
        Ok(())
    }
}
