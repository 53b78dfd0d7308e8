//! Evaluation of tiles, by pieces of neighbours along the last axis.
//!
//! A tile is read by [`Emitter::chunk`]: some neighbours along its last axis, at coordinates that may be run-time values. Lazy
//! values are computed there and then, recursively; shared ones are loaded. Fragments are read only by the thread that has
//! them: [`super::fragment`].

use super::arith;
use super::emit::Emitter;
use super::interleave::is_dense;
use super::memory::Access;
use super::mlir::{Val, i32};
use super::schedule::matrix;
use dsc_ir::DType;
use dsc_ir::sched::{Buffer, Place};
use dsc_ir::tile::{self, Index, MapFn, ValueId};

/// Results for each of what they read, from which on most lanes read what others do.
const SHARED_BY: u32 = 4;

impl<'a> Emitter<'a> {
    /// The shared memory of a tile that lies there row by row without gaps.
    fn dense(&self, v: ValueId) -> Option<&'a Buffer> {
        let Place::Shared(b) = self.place(v) else { return None };
        let [rows, cols] = matrix(self.shape(v));
        let b = self.buffer(*b);
        (is_dense(b) && b.dtype == self.dtype(v) && b.shape == [rows, cols]).then_some(b)
    }

    /// How many neighbours along the last axis of a value can be read at once, starting at any multiple of that many.
    pub fn width(&self, v: ValueId) -> u32 {
        self.width_in(v, self.t.piece)
    }

    /// The same of what an op makes.
    pub fn width_of(&self, op: &tile::Op, v: ValueId) -> u32 {
        self.width_of_in(op, v, self.t.piece)
    }

    /// The same, in pieces of so many bytes.
    fn width_in(&self, v: ValueId, piece: Option<u32>) -> u32 {
        let last = self.shape(v).last().copied().unwrap_or(1);
        let most = power_of_two_in(last).min(16);
        match self.place(v) {
            Place::Lazy => self.defs.get(&v).map_or(1, |op| self.width_of_in(op, v, piece)).min(most),
            Place::Uniform => most,
            _ => most.min(self.elements_of(v, piece)),
        }
    }

    fn width_of_in(&self, op: &tile::Op, v: ValueId, piece: Option<u32>) -> u32 {
        let last = |v: ValueId| self.shape(v).last().copied().unwrap_or(1);
        let most = power_of_two_in(last(v)).min(16);
        match op {
            tile::Op::Map { inputs, .. } => {
                let all = |v: ValueId| self.shape(v).iter().product::<u32>();
                // Of what many results share, lanes read the same.
                let piece = |i: ValueId| piece.filter(|_| SHARED_BY * all(i) > all(v));
                let wide = inputs.iter().filter(|&&i| last(i) != 1);
                wide.map(|&i| self.width_in(i, piece(i))).min().unwrap_or(16).min(most)
            }
            tile::Op::Reshape { x, .. } if self.dense(*x).is_some() => most.min(self.elements_of(*x, piece)),
            tile::Op::Reshape { x, .. } => self.width_in(*x, piece).min(power_of_two_in(last(*x))).min(most),
            tile::Op::Slice { x, offsets, .. } => {
                let offset = offsets.last().copied().unwrap_or(0);
                let aligned = if offset == 0 { 16 } else { power_of_two_in(offset) };
                self.width_in(*x, piece).min(aligned).min(most)
            }
            tile::Op::Permute { x, perm } => {
                let keeps = perm.last().is_some_and(|&p| p as usize + 1 == perm.len());
                if keeps { self.width_in(*x, piece).min(most) } else { 1 }
            }
            tile::Op::Load { .. } | tile::Op::Gather { .. } => most.min(self.elements_of(v, piece)),
            _ => most,
        }
    }

    /// Elements of a tile in a piece.
    fn elements_of(&self, v: ValueId, piece: Option<u32>) -> u32 {
        piece.map_or(16, |bytes| bytes / self.dtype(v).bytes() as u32)
    }

    /// `n` neighbours along the last axis of a tile, from these coordinates; as they are stored ([`super::isa::stored`]).
    pub fn chunk(&mut self, v: ValueId, at: &[Val], n: u32) -> Vec<Val> {
        match self.place(v) {
            // Where only loads are asked for, the rest may be of another round.
            Place::Uniform if self.is_collecting() && !self.uniform.contains_key(&v) => self.nothing(v, n),
            Place::Uniform => vec![self.uniform[&v]; n as usize],
            Place::Shared(b) => self.load_buffer(self.buffer(*b), i32(0), self.dtype(v), (self.shape(v), at), n),
            Place::Slot(c, slot) => {
                let (b, stage) = (self.slot_buffer(*c, *slot), self.stage_byte(v));
                self.load_buffer(b, stage, self.dtype(v), (self.shape(v), at), n)
            }
            Place::Held => self.held_chunk(v, at, n),
            Place::Lazy => match self.defs.get(&v) {
                Some(&op) => self.evaluate(op, v, at, n),
                None => unreachable!("lazy %{} has a definition", v.0),
            },
            _ => unreachable!("%{} is read by its owner only", v.0),
        }
    }

    /// Row-major number of an element.
    pub fn linear(&mut self, at: &[Val], shape: &[u32]) -> Val {
        let mut n = i32(0);
        for (&c, &size) in at.iter().zip(shape) {
            n = self.t.f.mul(n, i32(size.into()));
            n = self.t.f.add(n, c);
        }
        n
    }

    /// Coordinates of a row-major number.
    pub fn delinear(&mut self, mut n: Val, shape: &[u32]) -> Vec<Val> {
        let mut at = vec![i32(0); shape.len()];
        for d in (0..shape.len()).rev() {
            if shape[..d].iter().all(|&s| s == 1) {
                at[d] = n;
                break;
            }
            at[d] = self.t.f.rem(n, shape[d]);
            n = self.t.f.div(n, shape[d]);
        }
        at
    }

    /// Coordinates of the first element of chunk `c`, of `n` neighbours each, of a tile.
    pub fn first_of(&mut self, c: Val, n: u32, shape: &[u32]) -> Vec<Val> {
        let first = self.t.f.mul(c, i32(n.into()));
        self.delinear(first, shape)
    }

    /// `n` neighbours of what an op makes.
    pub fn evaluate(&mut self, op: &'a tile::Op, r: ValueId, at: &[Val], n: u32) -> Vec<Val> {
        match op {
            tile::Op::BlockId { axis } => vec![self.blocks[*axis as usize]; n as usize],
            tile::Op::Sym(sym) => vec![self.syms[*sym as usize]; n as usize],
            tile::Op::Full { value, .. } => vec![arith::constant(*value); n as usize],
            tile::Op::Iota { axis, shape } => {
                let c = at[*axis as usize];
                if *axis as usize + 1 < shape.len() {
                    return vec![c; n as usize];
                }
                (0..n).map(|i| self.t.f.add(c, i32(i.into()))).collect()
            }
            tile::Op::Load { .. } | tile::Op::Gather { .. } => {
                let access = self.source(op, at, n).expect("it is in global memory");
                let values = self.load_from(&access, false);
                self.masked(&access, values)
            }
            tile::Op::Map { inputs, body } => {
                let args: Vec<Vec<(Val, DType)>> = inputs
                    .iter()
                    .enumerate()
                    .map(|(k, &i)| {
                        let shape = self.shape(i) == self.shape(r);
                        if shape
                            && arith::only_widens(body, k as u32)
                            && let Some(wide) = self.widened(i, at, n)
                        {
                            return wide.into_iter().map(|v| (v, DType::F32)).collect();
                        }
                        let dtype = self.dtype(i);
                        self.broadcast(i, at, n).into_iter().map(|v| (v, dtype)).collect()
                    })
                    .collect();
                let arch = self.t.arch;
                // Where nothing varies along the chunk, one evaluation does.
                if args.iter().all(|a| a.iter().all(|v| *v == a[0])) {
                    let one: Vec<Vec<(Val, DType)>> = args.iter().map(|a| vec![a[0]]).collect();
                    return vec![arith::apply_each(&mut self.t.f, arch, body, &one, 1)[0]; n as usize];
                }
                let floats = args.iter().flatten().all(|v| v.1 == DType::F32);
                // Of few elements, or what may be NaN, pairs gain nothing and ask for registers.
                let tame = |a: &Vec<(Val, DType)>| a.iter().all(|v| self.t.f.is_tame(v.0));
                if arch.pairs() && floats && n > 2 && n.is_multiple_of(2) && args.iter().any(tame) && arith::pairs(body)
                {
                    return self.in_pairs(body, &args, n as usize);
                }
                arith::apply_each(&mut self.t.f, arch, body, &args, n as usize)
            }
            tile::Op::Reshape { x, .. } => {
                let linear = self.linear(at, self.shape(r));
                if n > self.width(*x).min(power_of_two_in(self.shape(*x).last().copied().unwrap_or(1)))
                    && let Some(b) = self.dense(*x)
                {
                    let all = [1, b.shape[0] * b.shape[1]];
                    let row = Buffer { shape: all, pitch: all[1] * b.dtype.bytes() as u32, ..b.clone() };
                    return self.load_buffer(&row, i32(0), b.dtype, (&all, &[i32(0), linear]), n);
                }
                if n > 1 && self.width(*x) < n {
                    return self.one_by_one(n, linear, |e, c| {
                        let at = e.delinear(c, e.shape(*x));
                        e.chunk(*x, &at, 1)[0]
                    });
                }
                let at = self.delinear(linear, self.shape(*x));
                self.chunk(*x, &at, n)
            }
            tile::Op::Slice { x, offsets, .. } => {
                let at: Vec<Val> = at.iter().zip(offsets).map(|(&c, &o)| self.t.f.add(c, i32(o.into()))).collect();
                self.chunk(*x, &at, n)
            }
            tile::Op::Permute { x, perm } => {
                let back = |at: &[Val]| {
                    let mut from = vec![i32(0); at.len()];
                    for (i, &p) in perm.iter().enumerate() {
                        from[p as usize] = at[i];
                    }
                    from
                };
                if n == 1 || perm.last().is_some_and(|&p| p as usize + 1 == perm.len()) {
                    return self.chunk(*x, &back(at), n);
                }
                let (mut at, last) = (at.to_vec(), at.len() - 1);
                self.one_by_one(n, at[last], |e, c| {
                    at[last] = c;
                    e.chunk(*x, &back(&at), 1)[0]
                })
            }
            _ => unreachable!("{op:?} is no elementwise op"),
        }
    }

    /// A map of floats of which some are tame, two elements at a time. A factor of all of them is tamed once, which makes the results tame.
    fn in_pairs(&mut self, body: &MapFn, args: &[Vec<(Val, DType)>], n: usize) -> Vec<Val> {
        let (arch, f) = (self.t.arch, &mut self.t.f);
        let mut args: Vec<Vec<Val>> = args.iter().map(|a| a.iter().map(|v| v.0).collect()).collect();
        for a in args.iter_mut().filter(|a| a.iter().all(|&v| v == a[0])) {
            *a = vec![arch.tamed(f, a[0]); n];
        }
        let pairs = (0..n).step_by(2).flat_map(|i| {
            let args: Vec<[Val; 2]> = args.iter().map(|a| [a[i], a[i + 1]]).collect();
            arith::apply_pairs(f, body, &args)
        });
        pairs.collect()
    }

    /// Where neighbours of a tile that is loaded or gathered are in global memory; none for other tiles.
    pub fn source(&mut self, op: &'a tile::Op, at: &[Val], n: u32) -> Option<Access> {
        match op {
            tile::Op::Load { view, index, .. } => Some(self.access(*view, index, at, None, n)),
            tile::Op::Gather { view, rows, index, .. } => {
                let row = self.chunk(*rows, &at[..1], 1)[0];
                let mut index = index.clone();
                index.insert(0, Index::Const(0));
                Some(self.access(*view, &index, at, Some(row), n))
            }
            _ => None,
        }
    }

    /// Neighbours of a tile that is read from memory, shared or global, as f32, by words; none if the chip or the tile has no such way.
    pub fn widened(&mut self, v: ValueId, at: &[Val], n: u32) -> Option<Vec<Val>> {
        let (dtype, arch) = (self.dtype(v), self.t.arch);
        if !arch.widens_words(dtype) || !(n * dtype.bytes() as u32).is_multiple_of(4) {
            return None;
        }
        if self.place(v) == &Place::Held {
            let words = self.held_words(v, at, n)?;
            let wide = words.into_iter().map(|word| arch.widen_word(&mut self.t.f, word, dtype));
            return Some(wide.collect::<Option<Vec<_>>>()?.concat());
        }
        if let (Place::Shared(b), DType::Bf16 | DType::F16) = (self.place(v), dtype) {
            let words = self.load_words(self.buffer(*b), dtype, (self.shape(v), at), n)?;
            let wide = words.into_iter().map(|word| arch.widen_word(&mut self.t.f, word, dtype));
            return Some(wide.collect::<Option<Vec<_>>>()?.concat());
        }
        if self.place(v) != &Place::Lazy {
            return None;
        }
        let access = self.source(self.definition(v)?, at, n)?;
        if !access.whole {
            return None;
        }
        let words = self.load_from(&access, true);
        let words = self.masked(&access, words);
        let wide = words.into_iter().map(|word| arch.widen_word(&mut self.t.f, word, dtype));
        Some(wide.collect::<Option<Vec<_>>>()?.concat())
    }

    fn one_by_one(&mut self, n: u32, from: Val, mut one: impl FnMut(&mut Self, Val) -> Val) -> Vec<Val> {
        (0..n)
            .map(|i| {
                let c = self.t.f.add(from, i32(i.into()));
                one(self, c)
            })
            .collect()
    }

    /// A map's input at the coordinates of its result.
    pub fn broadcast(&mut self, v: ValueId, at: &[Val], n: u32) -> Vec<Val> {
        let shape = self.shape(v);
        if shape.is_empty() || self.place(v) == &Place::Uniform {
            let at = vec![i32(0); shape.len()];
            let one = self.chunk(v, &at, 1)[0];
            return vec![one; n as usize];
        }
        let at: Vec<Val> = at.iter().zip(shape).map(|(&c, &s)| if s == 1 { i32(0) } else { c }).collect();
        if shape.last() == Some(&1) {
            let one = self.chunk(v, &at, 1)[0];
            return vec![one; n as usize];
        }
        let step = self.width(v).min(n);
        if step == n {
            return self.chunk(v, &at, n);
        }
        let (mut at, last) = (at, shape.len() - 1);
        let first = at[last];
        let mut values = Vec::new();
        for i in (0..n).step_by(step as usize) {
            at[last] = self.t.f.add(first, i32(i.into()));
            values.extend(self.chunk(v, &at, step));
        }
        values
    }

    /// A map's arithmetic on one element.
    pub fn apply(&mut self, body: &MapFn, args: &[Val], dtypes: &[DType]) -> Val {
        let args: Vec<(Val, DType)> = args.iter().copied().zip(dtypes.iter().copied()).collect();
        arith::apply(&mut self.t.f, self.t.arch, body, &args).0
    }
}

/// The largest power of two that divides `n`; 1 for 0.
pub fn power_of_two_in(n: u32) -> u32 {
    if n == 0 { 1 } else { 1 << n.trailing_zeros() }
}
