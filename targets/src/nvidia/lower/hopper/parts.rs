//! Blocks that divide the rounds of all tiles ([`Op::Part`]).
//!
//! Tiles in order, the rounds of each in order, are one row of rounds, of which every block has a range; ranges are equal but for one round. Which
//! range begins in which tile follows from the rounds of the tiles before it, which nobody has counted: every warp does so for itself, before the
//! roles begin. Each lane counts a stretch of tiles; the stretch with the range's first round, whose tiles all lanes then count again, is found by
//! what lanes have before them.
//!
//! ```text
//! tile, before = ..                          // the first tile, rounds of those before it
//! while before < end {
//!     rounds = max(hi - lo, 0)               // of this tile
//!     for k = lo + clamp(begin - before, 0, rounds) to lo + clamp(end - before, 0, rounds) {..}
//!     tile += 1; before += rounds
//! }
//! ```

use super::emit::Emit;
use super::loops::ALL_ROWS;
use crate::nvidia::arch::Arch;
use crate::nvidia::lower::isa;
use crate::nvidia::lower::mlir::{Ty, Val, i32};
use dsc_ir::sched::{Block, Op, Role};
use dsc_ir::tile::ValueId;

/// Tiles whose bounds a lane reads at a time.
const TOGETHER: u32 = 4;

/// A block's range of the rounds of all tiles.
#[derive(Clone, Copy, Debug)]
pub struct Range {
    /// Its first round, and its end; 0 if it has none.
    bounds: [Val; 2],
    /// The first tile of which it has some.
    tile: Val,
    /// Rounds of the tiles before this one.
    before: Val,
    /// Rounds of this tile, where that is known.
    rounds: Val,
}

impl<'a> Emit<'a> {
    /// Finds this block's range, if blocks have such.
    pub fn find_range(&mut self) -> Result<(), String> {
        let s = self.s;
        if !s.parts() {
            return Ok(());
        }
        // What a single thread computes, every lane can compute for a tile of its own.
        let role = s.roles.iter().find(|r| r.elected).ok_or("parts of tiles without a role of one thread")?;
        let place = self.place_among_blocks();
        self.find_range_of(role, place)
    }

    /// The same for that block of so many; a role of one thread says what its bounds are.
    fn find_range_of(&mut self, role: &'a Role, [block, blocks]: [Val; 2]) -> Result<(), String> {
        let sizes = self.tiles_along_axes();
        let tiles = self.all_tiles(sizes);
        let up = self.t.f.add(tiles, i32(i64::from(Arch::WARP) - 1));
        let each = self.t.f.div(up, Arch::WARP);
        let lane = self.t.lane;
        let stretch = self.t.f.mul(lane, each);
        let sums = self.counted((i32(0), each, i32(TOGETHER.into())), &[i32(0)], |e, first, sum| {
            let mut sum = sum[0];
            for i in 0..TOGETHER {
                let place = e.t.f.add(first, i32(i.into()));
                let rounds = e.rounds_in(&role.body, (stretch, place, each), (tiles, sizes))?;
                sum = e.t.f.add(sum, rounds);
            }
            Ok(vec![sum])
        })?;
        let upto = self.added_up(sums[0]);
        let total = isa::reduce_warp(&mut self.t.f, "umax", upto);
        let [begin, end] = self.share_of(total, block, blocks);
        let before = self.t.f.sub(upto, sums[0]);
        let [stretch, before] = self.first_beyond(begin, [lane, upto, before]);
        let first = self.t.f.mul(stretch, each);
        // In a stretch of one tile that is it.
        let (look, found) = (self.t.f.label(), self.t.f.label());
        let several = self.t.f.cmp("slt", i32(1), each);
        self.t.f.cond_br(several, (look, &[]), (found, &[first, before]));
        self.t.f.start(look, &[]);
        let rounds = self.rounds_in(&role.body, (first, lane, each), (tiles, sizes))?;
        let upto = self.added_up(rounds);
        let upto = self.t.f.add(upto, before);
        let own = self.t.f.sub(upto, rounds);
        let tile = self.t.f.add(first, lane);
        let found_here = self.first_beyond(begin, [tile, upto, own]);
        self.t.f.br(found, &found_here);
        let state = self.t.f.start(found, &[Ty::I32; 2]);
        let (tile, before) = (state[0], state[1]);
        self.range = Some(Range { bounds: [begin, end], tile, before, rounds: i32(0) });
        Ok(())
    }

    /// Rounds of the tile at that place of a stretch of so many, of so many in all; 0 if there is none.
    fn rounds_in(
        &mut self,
        body: &'a Block,
        (stretch, place, each): (Val, Val, Val),
        (tiles, sizes): (Val, [Val; 3]),
    ) -> Result<Val, String> {
        let f = &mut self.t.f;
        let tile = f.add(stretch, place);
        let within = f.cmp("slt", place, each);
        let there = f.cmp("slt", tile, tiles);
        let there = f.bin("and", within, there);
        let tile = f.select(there, tile, i32(0));
        let at = self.at(tile, sizes);
        let (here, held) = (std::mem::replace(&mut self.block, at), self.held.clone());
        let mut bounds = None;
        for inst in &body.insts {
            if let Op::Part { lo, hi, .. } = inst.op {
                bounds = Some([lo, hi]);
                break;
            }
            self.inst(inst)?;
        }
        let [lo, hi] = bounds.ok_or("a role without its part of a tile")?;
        let rounds = self.rounds([lo, hi])?;
        (self.block, self.held) = (here, held);
        Ok(self.t.f.select(there, rounds, i32(0)))
    }

    /// Coordinates of that tile.
    fn at(&mut self, tile: Val, sizes: [Val; 3]) -> [Val; 3] {
        let one_axis = sizes[1..].iter().all(|n| n.int() == Some(1));
        if one_axis { [tile, i32(0), i32(0)] } else { self.coordinates(tile, sizes, ALL_ROWS) }
    }

    fn rounds(&mut self, [lo, hi]: [ValueId; 2]) -> Result<Val, String> {
        let [lo, hi] = [self.uniform(lo)?, self.uniform(hi)?];
        let rounds = self.t.f.sub(hi, lo);
        Ok(self.t.f.intrinsic("smax", &[rounds, i32(0)]))
    }

    /// The sum of what this lane and those before it have.
    fn added_up(&mut self, own: Val) -> Val {
        let mut sum = own;
        for bit in 0..Arch::WARP.ilog2() {
            let by = 1 << bit;
            let other = isa::shuffle_up(&mut self.t.f, sum, by);
            let has = self.t.f.cmp("sge", self.t.lane, i32(by.into()));
            let other = self.t.f.select(has, other, i32(0));
            sum = self.t.f.add(sum, other);
        }
        sum
    }

    /// The first round and the end of what that block of so many has of so many rounds; an end of 0 if it has none.
    fn share_of(&mut self, total: Val, block: Val, blocks: Val) -> [Val; 2] {
        let f = &mut self.t.f;
        let each = f.bin("udiv", total, blocks);
        let even = f.mul(each, blocks);
        let rest = f.sub(total, even);
        let more = f.intrinsic("smin", &[block, rest]);
        let begin = f.mul(block, each);
        let begin = f.add(begin, more);
        let one_more = f.cmp("slt", block, rest);
        let one_more = f.cast("zext", one_more, Ty::I32);
        let end = f.add(begin, each);
        let end = f.add(end, one_more);
        let some = f.cmp("slt", begin, end);
        [begin, f.select(some, end, i32(0))]
    }

    /// Of lanes that have a number each, what they and those before have, and what those before have: of the first that has more than `begin`
    /// the number, or of the last lane; and what those before it have.
    fn first_beyond(&mut self, begin: Val, [number, upto, before]: [Val; 3]) -> [Val; 2] {
        let f = &mut self.t.f;
        let beyond = f.cmp("sgt", upto, begin);
        let last = f.cmp("eq", self.t.lane, i32(i64::from(Arch::WARP) - 1));
        let candidate = f.bin("or", beyond, last);
        let number = f.select(candidate, number, i32(i32::MAX.into()));
        let number = isa::reduce_warp(f, "umin", number);
        let reached = f.cmp("sle", before, begin);
        let before = f.select(reached, before, i32(0));
        [number, isa::reduce_warp(f, "umax", before)]
    }

    /// Runs a role's body for every tile of which the block has rounds.
    pub fn tiles_of_range(&mut self, body: &'a Block) -> Result<(), String> {
        let range = self.range.ok_or("a block without its range")?;
        let sizes = self.tiles_along_axes();
        let (head, inside, after) = (self.t.f.label(), self.t.f.label(), self.t.f.label());
        let state: Vec<Val> = [range.tile, range.before].into_iter().chain(self.ring_state()).collect();
        let types: Vec<Ty> = state.iter().map(|x| x.ty()).collect();
        self.t.f.br(head, &state);
        let state = self.t.f.start(head, &types);
        let (tile, before) = (state[0], state[1]);
        let more = self.t.f.cmp("slt", before, range.bounds[1]);
        self.t.f.cond_br(more, (inside, &[]), (after, &[]));
        self.t.f.start(inside, &[]);
        self.resume(&state[2..]);
        self.block = self.at(tile, sizes);
        self.range = Some(Range { before, ..range });
        self.block(body)?;
        self.settle_all();
        let rounds = self.range.map_or(i32(0), |r| r.rounds);
        let (tile, before) = (self.t.f.add(tile, i32(1)), self.t.f.add(before, rounds));
        let next: Vec<Val> = [tile, before].into_iter().chain(self.ring_state()).collect();
        self.t.f.br(head, &next);
        self.t.f.start(after, &[]);
        self.resume(&state[2..]);
        // The next role begins where this one did.
        self.range = Some(range);
        Ok(())
    }

    /// Rounds of this block in the tiles before this one.
    pub fn rounds_done(&mut self) -> Option<Val> {
        let range = self.range?;
        let done = self.t.f.sub(range.before, range.bounds[0]);
        Some(self.t.f.intrinsic("smax", &[done, i32(0)]))
    }

    /// The first of a tile's rounds that is this block's, or the end of those.
    pub fn part(&mut self, lo: ValueId, hi: ValueId, end: bool) -> Result<Val, String> {
        let rounds = self.rounds([lo, hi])?;
        let lo = self.uniform(lo)?;
        let range = self.range.as_mut().ok_or("a part of a tile of a block without a range")?;
        range.rounds = rounds;
        let (bound, before) = (range.bounds[usize::from(end)], range.before);
        let f = &mut self.t.f;
        let within = f.sub(bound, before);
        let within = f.intrinsic("smax", &[within, i32(0)]);
        let within = f.intrinsic("smin", &[within, rounds]);
        Ok(f.add(lo, within))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nvidia::lower::emulate::Machine;
    use crate::nvidia::lower::hopper::emit::{How, module};
    use dsc_ir::artifact::GpuKernel;
    use dsc_ir::{Sym, SymValues, sched};

    const KERNEL: &str = "scheduled k grid(T/2) persistent 1 threads 64
        read %ends: view<[T] i32>
        write %y: view<[C] i32>
        { }
        role a warps 0..2 elected {
            %t = block_id 0 : i32 @uniform
            %token = map(%t) { a -> t0 = 2; t1 = mul a, t0; t1 } : i32 @uniform
            %own = load %ends[%token] : tile<2xi32> @lazy
            %most = reduce max %own axis 0 : tile<1xi32> @uniform
            %hi = reshape %most : i32 @uniform
            %lo = full 3 : i32 @uniform
            %p = part begin %lo to %hi : i32 @uniform
            %q = part end %lo to %hi : i32 @uniform
        }";

    /// First tile, rounds before it, first round and end of a block's range, as every warp finds them, where tiles end at `ends`.
    fn found(ends: &[i32], [block, blocks]: [i32; 2]) -> Vec<i32> {
        let s = &sched::parse(KERNEL).expect("is right")[0];
        let arch = Arch::named("sm_90a").expect("exists");
        let how = How { symbols: Ty::Global, sharing: 1, late: false };
        let mut e = Emit::new(s, arch, how);
        e.start();
        e.find_range_of(&s.roles[0], [block, blocks].map(|n| i32(n.into()))).expect("has parts");
        let range = e.range.expect("was found");
        let words = [range.tile, range.before, range.bounds[0], range.bounds[1]];
        let first = e.t.f.cmp("eq", e.t.lane, i32(0));
        let offset = e.t.f.mul(e.t.warp, i32(16));
        let offset = e.t.f.cast("zext", offset, Ty::I64);
        let at = e.t.f.offset(Val::Arg(1, Ty::Global), offset);
        isa::store_global_if(&mut e.t.f, first, at, &words);
        let text = module(s, &GpuKernel { threads: 64, ..GpuKernel::default() }, Ty::Global, 1, e.t.f.text());
        let tokens: Vec<i32> = ends.iter().flat_map(|&n| [n - 1, n]).collect();
        let syms = SymValues([1; 6]).with(Sym::T, tokens.len() as u32).with(Sym::C, 8);
        let mut m = Machine::default();
        let out = 256 + (tokens.len() * 4).next_multiple_of(16);
        m.global = vec![0; 256];
        m.global.extend(tokens.iter().flat_map(|n| n.to_le_bytes()));
        m.global.resize(out + 32, 0xff);
        m.global[..24].copy_from_slice(&syms.0.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<u8>>());
        m.args = vec![256, out as u64, 0];
        m.run(&text, 64).unwrap_or_else(|e| panic!("{e}"));
        let words = m.global[out..].chunks(4).map(|b| i32::from_le_bytes(b.try_into().expect("four")));
        words.collect()
    }

    /// The first round of a part in a tile with so many rounds before it, from `lo` on, of a block that begins with that round.
    fn own_round([begin, before]: [i32; 2], part: i32, lo: i32) -> i32 {
        let s = &sched::parse(KERNEL).expect("is right")[0];
        let how = How { symbols: Ty::Global, sharing: 1, late: false };
        let mut e = Emit::new(s, Arch::named("sm_90a").expect("exists"), how);
        e.start();
        // In registers, as a block has them.
        let [zero, begin, before, part, lo] = [0, begin, before, part, lo].map(|n| i32(n.into()));
        let nothing = e.t.f.mul(e.t.tid, zero);
        let [begin, before, lo] = [begin, before, lo].map(|n| e.t.f.add(n, nothing));
        e.part = e.t.f.add(part, nothing);
        e.range = Some(Range { bounds: [begin, i32(i32::MAX.into())], tile: i32(0), before, rounds: i32(0) });
        let first = e.own_round(lo, 4).expect("has a range");
        let one = e.t.f.cmp("eq", e.t.tid, i32(0));
        isa::store_global_if(&mut e.t.f, one, Val::Arg(1, Ty::Global), &[first]);
        let text = module(s, &GpuKernel { threads: 64, ..GpuKernel::default() }, Ty::Global, 1, e.t.f.text());
        let mut m = Machine { global: vec![0; 512], args: vec![256, 384, 0], ..Machine::default() };
        m.run(&text, 64).unwrap_or_else(|e| panic!("{e}"));
        i32::from_le_bytes(m.global[384..388].try_into().expect("four"))
    }

    #[test]
    fn parts_of_a_role_take_rounds_in_turns() {
        let (begin, mut before, mut done) = (5, 0, 0);
        // A tile of other blocks, one that begins in this one's range, short ones, one without rounds.
        for rounds in [4, 8, 1, 0, 9, 2, 7] {
            let lo = (begin - before).clamp(0, rounds);
            for part in 0..4 {
                let wants = (lo..).find(|k| (done + k - lo) % 4 == part).expect("has a turn");
                assert_eq!(own_round([begin, before], part, lo), wants, "part {part} behind {before} rounds");
            }
            (before, done) = (before + rounds, done + rounds - lo);
        }
    }

    #[test]
    fn ranges_are_equal_and_in_order() {
        // One row, as many as lanes, some that have nothing, and more than all lanes count at a time.
        let rows = |n: i32| (0..n).map(|i| 3 + i * 7 % 11 - i % 5 * 2).collect::<Vec<i32>>();
        for ends in [vec![20], rows(32), rows(45), vec![0, 0, 9, 3, 4], rows(300), vec![3; 40]] {
            for blocks in [1, 7, 50] {
                let rounds: Vec<i32> = ends.iter().map(|n| (n - 3).max(0)).collect();
                let total: i32 = rounds.iter().sum();
                let mut next = 0;
                for block in 0..blocks {
                    let (own, wants) =
                        (found(&ends, [block, blocks]), total / blocks + i32::from(block < total % blocks));
                    let (begin, end) = (next, next + wants);
                    next = end;
                    assert_eq!(own[..4], own[4..], "warps differ");
                    if wants == 0 {
                        assert!(own[1] >= own[3], "{own:?} is not empty");
                        continue;
                    }
                    let tile = (0..).find(|&t| rounds[..=t].iter().sum::<i32>() > begin).expect("is in a tile");
                    let before = rounds[..tile].iter().sum::<i32>();
                    assert_eq!(own[..4], [tile as i32, before, begin, end], "block {block} of {blocks}, {ends:?}");
                }
                assert_eq!(next, total);
            }
        }
    }
}
