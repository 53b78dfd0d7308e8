//! Tiles that take turns along the last axis, as the two halves of rotated pairs do:
//!
//! ```text
//! x: .. x m x 2      u = x[.., 0], v = x[.., 1]: .. x m x 1      concat(f(u, v), g(u, v)): .. x m x 2
//! ```
//!
//! Of such parts each has one element in a row, so that along the last axis nothing has neighbours. Along the axis before it has: of parts that are read
//! there, a thread loads `2 n` neighbours of what they are slices of, makes `n` of each part, and puts them down as `2 n` neighbours.

use super::arith;
use super::emit::Emitter;
use super::evaluate::power_of_two_in;
use super::mlir::{Val, i32};
use dsc_ir::DType;
use dsc_ir::sched::{Buffer, Place};
use dsc_ir::tile::{self, ValueId};

/// Whether the elements of a buffer lie in row-major order without gaps, as they are stored.
pub fn is_dense(b: &Buffer) -> bool {
    b.dtype != DType::Bool && b.swizzle == 0 && b.copies == 1 && b.pitch == b.shape[1] * b.dtype.bytes() as u32
}

/// Most elements that a thread has of a part at once.
const MOST: u32 = 4;

impl<'a> Emitter<'a> {
    /// How many of each part can be made at once; none if the parts do not take turns, or lie where that gains nothing.
    fn turns(&self, xs: &[ValueId], axis: usize, (shape, b): (&[u32], &Buffer)) -> Option<u32> {
        let rows = shape.len().checked_sub(2)?;
        let single = axis == rows + 1
            && xs.len().is_power_of_two()
            && xs.iter().all(|&x| self.shape(x).last() == Some(&1))
            && is_dense(b);
        let n = xs.iter().map(|&x| self.width_across(x)).min()?.min(power_of_two_in(shape[rows])).min(MOST);
        (single && n > 1).then_some(n)
    }

    /// How many neighbours along the axis before the last can be read at once of a tile with one element in a row; 1 if they are read one by one.
    fn width_across(&self, v: ValueId) -> u32 {
        let shape = self.shape(v);
        let Some(&[along, 1]) = shape.last_chunk::<2>() else { return 1 };
        if self.place(v) == &Place::Uniform || along == 1 {
            return 16;
        }
        match (self.place(v), self.defs.get(&v)) {
            (Place::Lazy, Some(tile::Op::Map { inputs, .. })) => {
                let same = inputs.iter().all(|&i| self.shape(i).len() == shape.len() || self.shape(i).is_empty());
                let inputs = inputs.iter().filter(|&&i| !self.shape(i).is_empty());
                if same { inputs.map(|&i| self.width_across(i)).min().unwrap_or(1) } else { 1 }
            }
            (Place::Lazy, Some(tile::Op::Reshape { x, .. })) if self.shape(*x).last() == Some(&along) => self.width(*x),
            (Place::Lazy, Some(tile::Op::Slice { .. })) => {
                self.one_of_each(v).map_or(1, |(x, of, _)| self.width(x) / of)
            }
            _ => 1,
        }
    }

    /// The tile of which a slice is one of so many neighbours everywhere, as a reshape sets them apart, with how many, and which.
    fn one_of_each(&self, v: ValueId) -> Option<(ValueId, u32, u32)> {
        let tile::Op::Slice { x: groups, offsets, .. } = self.defs.get(&v)? else { return None };
        let tile::Op::Reshape { x, .. } = self.defs.get(groups)? else { return None };
        let (which, before) = offsets.split_last()?;
        let &[along, of] = self.shape(*groups).last_chunk::<2>()?;
        let whole =
            before.iter().all(|&o| o == 0) && self.shape(v)[..before.len()] == self.shape(*groups)[..before.len()];
        let lazy = self.place(v) == &Place::Lazy && self.place(*groups) == &Place::Lazy;
        (whole && lazy && of.is_power_of_two() && self.shape(*x).last() == Some(&(along * of)))
            .then_some((*x, of, *which))
    }

    /// `n` neighbours along the axis before the last, where the last has one element; of an axis of one, that one.
    fn chunk_across(&mut self, v: ValueId, at: &[Val], n: u32) -> Vec<Val> {
        let shape = self.shape(v);
        let at: Vec<Val> = at.iter().zip(shape).map(|(&c, &s)| if s == 1 { i32(0) } else { c }).collect();
        let along = shape.len().checked_sub(2).map_or(1, |axis| shape[axis]);
        if self.place(v) == &Place::Uniform || along == 1 {
            let one = self.chunk(v, &at, 1)[0];
            return vec![one; n as usize];
        }
        if let Some((x, of, which)) = self.one_of_each(v) {
            let first = self.linear(&at, shape);
            let first = self.t.f.mul(first, i32(of.into()));
            let at = self.delinear(first, self.shape(x));
            let all = self.chunk(x, &at, n * of);
            return all.into_iter().skip(which as usize).step_by(of as usize).collect();
        }
        match self.defs.get(&v) {
            Some(tile::Op::Map { inputs, body }) => {
                let mut args: Vec<Vec<(Val, DType)>> = Vec::new();
                for &i in inputs {
                    let dtype = self.dtype(i);
                    args.push(self.chunk_across(i, &at, n).into_iter().map(|v| (v, dtype)).collect());
                }
                arith::apply_each(&mut self.t.f, self.t.arch, body, &args, n as usize)
            }
            Some(tile::Op::Reshape { x, .. }) => {
                let linear = self.linear(&at, shape);
                let at = self.delinear(linear, self.shape(*x));
                self.chunk(*x, &at, n)
            }
            _ => unreachable!("%{} has neighbours across", v.0),
        }
    }

    /// Puts down parts that take turns along the last axis; false if they do not.
    pub fn concat_in_turns(&mut self, r: ValueId, xs: &'a [ValueId], axis: usize, b: &'a Buffer) -> bool {
        let dtype = self.dtype(r);
        let Some(n) = self.turns(xs, axis, (self.shape(r), b)) else { return false };
        let (from, parts) = (self.shape(xs[0]), xs.len());
        self.each_chunk(
            from.iter().product::<u32>() / n,
            |e, c| {
                let at = e.first_of(c, n, from);
                let made: Vec<Vec<Val>> = xs.iter().map(|&x| e.chunk_across(x, &at, n)).collect();
                (0..n as usize * parts).map(|i| made[i % parts][i / parts]).collect::<Vec<_>>()
            },
            |e, c, values, ok| {
                // Rows follow one another without gaps, as the pieces do.
                let first = e.t.f.mul(c, i32(i64::from(n) * parts as i64 * dtype.bytes() as i64));
                let first = e.t.f.add(first, i32(b.offset.into()));
                e.guarded(ok, |e| {
                    let most = 16 / dtype.bytes();
                    for (i, part) in values.chunks(most).enumerate() {
                        let byte = e.t.f.add(first, i32((i * most * dtype.bytes()) as i64));
                        e.t.store_shared(byte, part);
                    }
                });
            },
        );
        true
    }
}
