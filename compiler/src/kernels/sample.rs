//! `arg_max` and `sample`: from logits to tokens, as [`dsc_ir::sample`] defines it.
//!
//! `arg_max`: a block takes a part of a row: the largest number of each tile, then the first column that has it.
//!
//! `sample`: a block takes a row. It joins the parts; a greedy row is done then, as all loops that follow get no iterations. Else it
//! reads the row once for the sum of weights; once a bit of [`LIKELIEST`] to find the nucleus's cut bit by bit, if not everything is in
//! it; once for the tile in which the running sum reaches its target; then that tile by smaller ones, and the last one by a running
//! sum. Nothing is sorted, and nothing is kept but sums.
//!
//! Floors: the logits, read once, 4 bytes each. A draw reads them up to 16 times more from the cache, in one block: for 129280
//! columns some 100 microseconds, next to nothing beside a step of such a model, in which one row is one sequence.

use super::view::{Emit, sum, times};
use super::{Class, Emitted, KernelError, Part, unsupported};
use dsc_ir::DType;
use dsc_ir::graph::{Graph, NodeId, Op, part_columns};
use dsc_ir::sample::LIKELIEST;
use dsc_ir::schedule::Schedule;
use dsc_ir::tile::{Builder, MapBuilder, MapVal, ReduceKind, ValueId};
use std::f32::consts::LOG2_E;

/// Columns of a tile where a tile gives one number.
const COLUMNS: u32 = 16384;
/// Columns of the tiles that the tile of a token is searched by.
const NARROW: u32 = 1024;
/// Columns of a line of the last tile: its lines' running sums are made side by side.
const LINE: u32 = 128;

/// The kernel of an [`Op::ArgMax`] node.
pub fn emit_arg_max(graph: &Graph, node: NodeId, _: &Schedule, _: &Class) -> Result<Emitted, KernelError> {
    let Op::ArgMax { parts } = graph.dag[node].op else { return Err(unsupported(graph, node, "not an arg_max")) };
    let x = graph.inputs(node)[0];
    let mut e = Emit::new(graph, node, None, &format!("arg_max_p{parts}"));
    let (rows, n) = (e.tensor(x).shape[0], e.dim(x, 1)?);
    let x = e.read("x", x)?;
    let (values, columns) = (e.write("largest", 0, Part::Data, None)?, e.write("columns", 1, Part::Data, None)?);
    let width = part_columns(n, parts);
    let tile = width.min(COLUMNS);

    let b = &mut e.b;
    let (row, part) = (b.grid(rows, 1), b.grid(parts, 1));
    let first = times(b, part, width);
    let end = super::view::plus(b, first, width as i32);
    let (lowest, none) = (b.full(f32::NEG_INFINITY, &[]), b.full_i32(-1, &[]));
    let best = b.for_(first, end, tile, &[lowest, none], |b, at, best| {
        let x = b.load(x, &[row.into(), at.into()], &[1, tile]);
        let numbers = b.iota(1, &[1, tile]);
        let last = b.full_i32(n as i32, &[]);
        let least = |b: &mut Builder, v: ValueId| {
            b.map(&[v, last, end], |m, v| {
                let last = m.min(v[1], v[2]);
                m.sub(last, v[0])
            })
        };
        // Columns of the row's and the part's that are left from here.
        let left = least(b, at);
        let value = b.map(&[x, numbers, left], |m, v| {
            let inside = m.lt(v[1], v[2]);
            let number = m.eq(v[0], v[0]);
            let counts = m.and(inside, number);
            let none = m.f32(f32::NEG_INFINITY);
            m.select(counts, v[0], none)
        });
        let value = scalar_of(b, value, ReduceKind::Max);
        let hits = b.map(&[x, numbers, left, value, at], |m, v| {
            let inside = m.lt(v[1], v[2]);
            let largest = m.eq(v[0], v[3]);
            let hit = m.and(inside, largest);
            let column = m.add(v[1], v[4]);
            first_hit(m, hit, column)
        });
        let column = scalar_of(b, hits, ReduceKind::Max);
        let column = from_hit(b, column);
        let better = |m: &mut MapBuilder, v: &[MapVal]| {
            let (zero, found) = (m.i32(0), m.i32(0));
            let found = m.le(found, v[1]);
            let larger = m.lt(v[2], v[0]);
            let first = m.lt(v[3], zero);
            let better = m.or(larger, first);
            m.and(found, better)
        };
        let inputs = [value, column, best[0], best[1]];
        let value = b.map(&inputs, |m, v| {
            let better = better(m, v);
            m.select(better, v[0], v[2])
        });
        let column = b.map(&inputs, |m, v| {
            let better = better(m, v);
            m.select(better, v[1], v[3])
        });
        vec![value, column]
    });
    for (view, value) in [(values, best[0]), (columns, best[1])] {
        let value = b.reshape(value, &[1, 1]);
        b.store(view, &[row.into(), part.into()], value);
    }
    e.finish(format!("arg_max: {n} columns in {parts} parts"))
}

/// The one element of a tile `[1, n]`, combined.
fn scalar_of(b: &mut Builder, x: ValueId, kind: ReduceKind) -> ValueId {
    let x = b.reduce(x, 1, kind);
    b.reshape(x, &[])
}

/// What the maximum of gives the lowest column among hits: its distance from the largest integer, −1 where there is none.
fn first_hit(m: &mut MapBuilder, hit: MapVal, column: MapVal) -> MapVal {
    let (most, none) = (m.i32(i32::MAX), m.i32(-1));
    let distance = m.sub(most, column);
    m.select(hit, distance, none)
}

/// The column of a maximum of [`first_hit`]; −1 if there was no hit.
fn from_hit(b: &mut Builder, hit: ValueId) -> ValueId {
    b.map(&[hit], |m, v| {
        let (most, zero, none) = (m.i32(i32::MAX), m.i32(0), m.i32(-1));
        let column = m.sub(most, v[0]);
        let nothing = m.lt(v[0], zero);
        m.select(nothing, none, column)
    })
}

/// The kernel of an [`Op::Sample`] node.
pub fn emit(graph: &Graph, node: NodeId, _: &Schedule, _: &Class) -> Result<Emitted, KernelError> {
    let &[x, largest, columns, draws] = graph.inputs(node).as_slice() else {
        return Err(unsupported(graph, node, "not a sample"));
    };
    let mut e = Emit::new(graph, node, None, "sample");
    let (rows, n, parts) = (e.tensor(x).shape[0], e.dim(x, 1)?, e.dim(largest, 1)?);
    let view = e.read("x", x)?;
    let (largest, columns) = (e.read("largest", largest)?, e.read("columns", columns)?);
    let draws = e.read("draws", draws)?;
    let y = e.write("tokens", 0, Part::Data, None)?;

    let b = &mut e.b;
    let row = b.grid(rows, 1);
    let (most, best) = join(b, [largest, columns], row, parts);
    let draw: Vec<ValueId> = (0..3)
        .map(|i| {
            let bits = b.load_scalar(draws, &[row.into(), i.into()]);
            b.map(&[bits], |m, v| m.bitcast(v[0], DType::F32))
        })
        .collect();
    let (temperature, top_p, quantile) = (draw[0], draw[1], draw[2]);
    // Where the loops end: at once for a greedy row, and for one whose largest logit is infinite.
    let end = b.map(&[temperature, most], |m, v| {
        let (zero, n, none, infinite) = (m.f32(0.0), m.i32(n as i32), m.i32(0), m.f32(f32::INFINITY));
        let warm = m.lt(zero, v[0]);
        let size = m.abs(v[1]);
        let finite = m.lt(size, infinite);
        let drawn = m.and(warm, finite);
        m.select(drawn, n, none)
    });
    let row = Row { view, row, n, most, temperature };

    let zero = b.full(0.0, &[]);
    let everything = b.full_i32(0, &[]);
    let all = row.mass(b, end, everything);
    let target = b.map(&[all, top_p], |m, v| m.mul(v[0], v[1]));
    let bits = LIKELIEST.ilog2() + 1;
    let passes = b.map(&[top_p, end], |m, v| {
        let (one, bits, none) = (m.f32(1.0), m.i32(bits as i32), m.i32(0));
        let part = m.lt(v[0], one);
        let drawn = m.lt(none, v[1]);
        let both = m.and(part, drawn);
        m.select(both, bits, none)
    });
    let cut = b.for_(0, passes, 1, &[everything, all], |b, pass, carried| {
        let higher = b.map(&[carried[0], pass], |m, v| {
            let (one, top) = (m.i32(1), m.i32(bits as i32 - 1));
            let bit = m.sub(top, v[1]);
            let bit = m.shl(one, bit);
            m.add(v[0], bit)
        });
        let mass = row.mass(b, end, higher);
        let choose = |b: &mut Builder, new: ValueId, old: ValueId| {
            b.map(&[mass, target, new, old], |m, v| {
                let enough = m.le(v[1], v[0]);
                m.select(enough, v[2], v[3])
            })
        };
        vec![choose(b, higher, carried[0]), choose(b, mass, carried[1])]
    });
    let (cut, kept) = (cut[0], cut[1]);

    let target = b.map(&[kept, quantile], |m, v| m.mul(v[0], v[1]));
    let start = b.full_i32(0, &[]);
    let wide = n.min(COLUMNS);
    let place = row.advance(b, [start, end], wide, cut, target, [start, zero]);
    let narrow_end = b.map(&[place[0], end], |m, v| {
        let (wide, none) = (m.i32(wide as i32), m.i32(0));
        let next = m.add(v[0], wide);
        let drawn = m.lt(none, v[1]);
        m.select(drawn, next, none)
    });
    let place = row.advance(b, [place[0], narrow_end], NARROW, cut, target, [place[0], place[1]]);
    let token = row.token(b, [place[0], end], cut, target, place[1]);
    let token = b.map(&[token, best], |m, v| {
        let zero = m.i32(0);
        let none = m.lt(v[0], zero);
        m.select(none, v[1], v[0])
    });
    let token = b.reshape(token, &[1]);
    b.store(y, &[row.row.into()], token);
    e.finish(format!("sample: of {n} columns"))
}

/// The largest number of a row and its first column, from those of its parts.
fn join(b: &mut Builder, [largest, columns]: [ValueId; 2], row: ValueId, parts: u32) -> (ValueId, ValueId) {
    let zero = b.full_i32(0, &[]);
    let values = b.load(largest, &[row.into(), zero.into()], &[1, parts]);
    let columns = b.load(columns, &[row.into(), zero.into()], &[1, parts]);
    // A part without numbers gives −inf, and is no hit below.
    let most = scalar_of(b, values, ReduceKind::Max);
    let hits = b.map(&[values, columns, most], |m, v| {
        let zero = m.i32(0);
        let largest = m.eq(v[0], v[2]);
        let number = m.le(zero, v[1]);
        let hit = m.and(largest, number);
        first_hit(m, hit, v[1])
    });
    let hit = scalar_of(b, hits, ReduceKind::Max);
    (most, from_hit(b, hit))
}

/// A row of logits, and what its weights depend on.
struct Row {
    view: ValueId,
    row: ValueId,
    n: u32,
    most: ValueId,
    temperature: ValueId,
}

impl Row {
    /// Weights of the columns from `at` on, `[1, width]`: 0 for those below the cut and those outside the row.
    fn weights(&self, b: &mut Builder, at: ValueId, width: u32, cut: ValueId) -> ValueId {
        let x = b.load(self.view, &[self.row.into(), at.into()], &[1, width]);
        let numbers = b.iota(1, &[1, width]);
        b.map(&[x, numbers, at, self.most, self.temperature, cut], |m, v| {
            let (zero, n, log2e, upper) = (m.f32(0.0), m.i32(self.n as i32), m.f32(LOG2_E), m.i32(16));
            let below = m.sub(v[0], v[3]);
            let scaled = m.div(below, v[4]);
            let scaled = m.mul(scaled, log2e);
            let weight = m.exp2(scaled);
            let bits = m.bitcast(weight, DType::I32);
            let likelihood = m.shr(bits, upper);
            let likely = m.le(v[5], likelihood);
            let column = m.add(v[1], v[2]);
            let inside = m.lt(column, n);
            let number = m.eq(v[0], v[0]);
            let counts = m.and(likely, inside);
            let counts = m.and(counts, number);
            m.select(counts, weight, zero)
        })
    }

    /// The sum of weights of columns `0..end`.
    fn mass(&self, b: &mut Builder, end: ValueId, cut: ValueId) -> ValueId {
        let zero = b.full(0.0, &[]);
        let width = self.n.min(COLUMNS);
        b.for_(0, end, width, &[zero], |b, at, mass| {
            let weights = self.weights(b, at, width, cut);
            let more = scalar_of(b, weights, ReduceKind::Sum);
            vec![sum(b, mass[0], more)]
        })[0]
    }

    /// Goes over the tiles of `width` columns from `first` to `end`, up to the one in which the running sum, which is `place[1]` at
    /// column `place[0] = first`, exceeds the target: where that tile starts and the sum before it.
    fn advance(
        &self,
        b: &mut Builder,
        [first, end]: [ValueId; 2],
        width: u32,
        cut: ValueId,
        target: ValueId,
        place: [ValueId; 2],
    ) -> Vec<ValueId> {
        b.for_(first, end, width, &place, |b, at, place| {
            let weights = self.weights(b, at, width, cut);
            let more = scalar_of(b, weights, ReduceKind::Sum);
            let after = sum(b, place[1], more);
            let passes = |m: &mut MapBuilder, v: &[MapVal]| {
                let here = m.eq(v[0], v[1]);
                let short = m.le(v[2], v[3]);
                m.and(here, short)
            };
            let inputs = [at, place[0], after, target, place[1]];
            let start = b.map(&inputs, |m, v| {
                let passes = passes(m, v);
                let width = m.i32(width as i32);
                let next = m.add(v[0], width);
                m.select(passes, next, v[1])
            });
            let sum = b.map(&inputs, |m, v| {
                let passes = passes(m, v);
                m.select(passes, v[2], v[4])
            });
            vec![start, sum]
        })
    }

    /// The first column of the narrow tile at `start` at which the running sum, `before` its first one, exceeds the target; −1 if
    /// there is none, or `end` says that none is wanted.
    fn token(
        &self,
        b: &mut Builder,
        [start, end]: [ValueId; 2],
        cut: ValueId,
        target: ValueId,
        before: ValueId,
    ) -> ValueId {
        let none = b.full_i32(-1, &[]);
        let wanted = b.map(&[start, end], |m, v| {
            let (one, zero) = (m.i32(1), m.i32(0));
            let next = m.add(v[0], one);
            let drawn = m.lt(zero, v[1]);
            m.select(drawn, next, v[0])
        });
        b.for_(start, wanted, 1, &[none], |b, at, _| {
            let lines = NARROW / LINE;
            let weights = self.weights(b, at, NARROW, cut);
            let weights = b.reshape(weights, &[lines, LINE]);
            let along = b.scan(weights, 1, ReduceKind::Sum);
            let totals = b.reduce(weights, 1, ReduceKind::Sum);
            let ends = b.scan(totals, 0, ReduceKind::Sum);
            let (across, down) = (b.iota(1, &[1, LINE]), b.iota(0, &[lines, 1]));
            let hits = b.map(&[weights, along, totals, ends, before, target, across, down, at], |m, v| {
                let start = m.sub(v[3], v[2]);
                let start = m.add(start, v[4]);
                let sum = m.add(start, v[1]);
                let zero = m.f32(0.0);
                let weighs = m.lt(zero, v[0]);
                let exceeds = m.lt(v[5], sum);
                let hit = m.and(weighs, exceeds);
                let line = m.i32(LINE as i32);
                let column = m.mul(v[7], line);
                let column = m.add(column, v[6]);
                let column = m.add(column, v[8]);
                first_hit(m, hit, column)
            });
            let hits = b.reshape(hits, &[1, NARROW]);
            let hit = scalar_of(b, hits, ReduceKind::Max);
            vec![from_hit(b, hit)]
        })[0]
    }
}
