//! Access to shared and global memory.
//!
//! Bounds are part of the meaning: a global access is masked by its view unless the coordinates are provably inside. A masked load
//! reads the view's first element instead, so it needs no branch.

use super::emit::Emitter;
use super::isa;
use super::mlir::{Ty, Val, f32, i32, i64};
use dsc_ir::DType;
use dsc_ir::sched::Buffer;
use dsc_ir::tile::{self, Index, Type, ValueId, ViewType};

/// Where a chunk of global memory is.
pub struct Access {
    /// The view's first element.
    first: Val,
    /// Type of elements, and how many.
    dtype: DType,
    n: u32,
    /// Address of the first element.
    at: Val,
    /// Whether all elements may be moved at once.
    pub whole: bool,
    /// Whether the elements are inside the view: one for all if `whole`, else one each.
    pub inside: Vec<Val>,
    /// Bytes from element to element.
    step: Val,
}

impl<'a> Emitter<'a> {
    /// Neighbours from coordinates of a tile in a buffer, which begins `first` bytes behind the buffer's first byte.
    pub fn load_buffer(
        &mut self,
        b: &Buffer,
        first: Val,
        dtype: DType,
        (shape, at): (&[u32], &[Val]),
        n: u32,
    ) -> Vec<Val> {
        let row = self.linear(&at[..at.len().saturating_sub(1)], &shape[..shape.len().saturating_sub(1)]);
        let col = at.last().copied().unwrap_or(i32(0));
        let byte = self.buffer_byte(b, dtype, row, col);
        let byte = self.t.f.add(byte, first);
        let ty = if dtype == DType::Bool { Ty::I8 } else { isa::stored(dtype) };
        let most = (16 / ty.bytes()).min(n);
        let most = if b.pitch.is_multiple_of(most * ty.bytes()) || b.shape[0] == 1 { most } else { 1 };
        let mut values = Vec::new();
        for i in (0..n).step_by(most as usize) {
            let byte = self.t.f.add(byte, i32((i * ty.bytes()).into()));
            values.extend(self.t.load_shared(byte, ty, most));
        }
        if dtype == DType::Bool {
            values = values.into_iter().map(|v| self.t.f.cmp("ne", v, Val::Int(0, Ty::I8))).collect();
        }
        values
    }

    /// The same by words; none if they do not lie so.
    pub fn load_words(&mut self, b: &Buffer, dtype: DType, (shape, at): (&[u32], &[Val]), n: u32) -> Option<Vec<Val>> {
        let words = n * dtype.bytes() as u32 / 4;
        let most = words.min(4);
        if most == 0 || !b.pitch.is_multiple_of(4 * most) && b.shape[0] > 1 {
            return None;
        }
        let row = self.linear(&at[..at.len().saturating_sub(1)], &shape[..shape.len().saturating_sub(1)]);
        let col = at.last().copied().unwrap_or(i32(0));
        let byte = self.buffer_byte(b, dtype, row, col);
        let load = |i: u32| {
            let byte = self.t.f.add(byte, i32((4 * i).into()));
            self.t.load_shared(byte, Ty::I32, most)
        };
        Some((0..words).step_by(most as usize).flat_map(load).collect())
    }

    /// Byte of shared memory of an element.
    pub fn buffer_byte(&mut self, b: &Buffer, dtype: DType, row: Val, col: Val) -> Val {
        let row = self.t.f.mul(row, i32(b.pitch.into()));
        let col = self.t.f.mul(col, i32(dtype.bytes() as i64));
        let byte = self.t.f.add(row, col);
        self.t.f.add(byte, i32(b.offset.into()))
    }

    /// Stores neighbours to a row of a buffer.
    pub fn store_buffer(&mut self, b: &Buffer, dtype: DType, row: Val, col: Val, values: &[Val]) {
        let mut values = values.to_vec();
        if dtype == DType::Bool {
            values = values.into_iter().map(|v| self.t.f.cast("zext", v, Ty::I8)).collect();
        }
        let ty = values[0].ty();
        let byte = self.buffer_byte(b, dtype, row, col);
        let n = values.len() as u32;
        let most = (16 / ty.bytes()).min(n);
        let most = if b.pitch.is_multiple_of(most * ty.bytes()) || b.shape[0] == 1 { most } else { 1 };
        for (i, part) in values.chunks(most as usize).enumerate() {
            let byte = self.t.f.add(byte, i32((i as u32 * most * ty.bytes()).into()));
            self.t.store_shared(byte, part);
        }
    }

    /// Address and bounds of `n` elements of a view at `index + at`, with `row` instead of the first coordinate if given.
    pub fn access(&mut self, view: ValueId, index: &[Index], at: &[Val], row: Option<Val>, n: u32) -> Access {
        let Type::View(ty) = &self.s.types[view.0 as usize] else { unreachable!("verified: a view") };
        let ty: &'a ViewType = ty;
        let bytes = ty.dtype.bytes() as i64;
        let last = ty.shape.len().saturating_sub(1);
        let unit = i64::from(n) * bytes;
        let dense = n == 1 || ty.strides.last().is_some_and(|s| s.bytes == bytes && s.sym.is_none());
        let aligned = |stride: &tile::Stride| stride.bytes % unit.min(16) == 0;
        let whole = n == 1
            || (dense
                && ty.offset as i64 % unit.min(16) == 0
                && ty.strides[..last].iter().all(aligned)
                && self.divisor(index[last]) % i64::from(n) == 0
                && ty.shape[last].factor.is_multiple_of(n)
                && row.is_none_or(|_| last > 0));
        let mut offset = i64(ty.offset as i64);
        let mut inside = Val::Int(1, Ty::I1);
        let mut last_at = (i32(0), i32(1));
        for d in 0..ty.shape.len() {
            let start = self.index(index[d]);
            let c = match row {
                Some(row) if d == 0 => row,
                _ => self.t.f.add(start, at[d]),
            };
            let extent = self.extent(ty.shape[d]);
            if d == last {
                last_at = (c, extent);
            }
            if d < last || whole {
                let ok = self.within(c, extent);
                inside = self.t.f.bin("and", inside, ok);
            }
            let wide = self.t.f.cast("sext", c, Ty::I64);
            let stride = self.stride(ty, d);
            let part = self.t.f.mul(wide, stride);
            offset = self.t.f.add(offset, part);
        }
        let step = match ty.strides.last() {
            Some(s) => match s.sym {
                None => i64(s.bytes),
                Some(sym) => {
                    let sym = self.t.f.cast("sext", self.syms[sym as usize], Ty::I64);
                    self.t.f.mul(i64(s.bytes), sym)
                }
            },
            None => i64(bytes),
        };
        let inside = if whole {
            vec![inside]
        } else {
            (0..n)
                .map(|i| {
                    let c = self.t.f.add(last_at.0, i32(i.into()));
                    let ok = self.within(c, last_at.1);
                    self.t.f.bin("and", inside, ok)
                })
                .collect()
        };
        let at = self.t.f.offset(self.params[&view], offset);
        let first = self.t.f.offset(self.params[&view], i64(ty.offset as i64));
        Access { first, dtype: ty.dtype, n, at, whole, inside, step }
    }

    /// Bytes between neighbours along a dim (i64).
    pub fn stride(&mut self, ty: &ViewType, d: usize) -> Val {
        let stride = i64(ty.strides[d].bytes);
        match ty.strides[d].sym {
            Some(sym) => {
                let sym = self.t.f.cast("sext", self.syms[sym as usize], Ty::I64);
                self.t.f.mul(stride, sym)
            }
            None => stride,
        }
    }

    /// `0 <= c < extent`.
    pub fn within(&mut self, c: Val, extent: Val) -> Val {
        if c.int().is_some_and(|c| c < 0) {
            return Val::Int(0, Ty::I1);
        }
        self.t.f.cmp("ult", c, extent)
    }

    /// Loads a chunk, anything where it is outside; in words, if that is asked for and possible.
    pub fn load_from(&mut self, a: &Access, words: bool) -> Vec<Val> {
        let (mut ty, mut n) = (isa::stored(a.dtype), a.n);
        if words && a.whole && ty.bytes() < 4 && (n * ty.bytes()).is_multiple_of(4) {
            (ty, n) = (Ty::I32, n * ty.bytes() / 4);
        }
        let mut values = Vec::new();
        if a.whole {
            let from = self.t.f.select(a.inside[0], a.at, a.first);
            let most = (16 / ty.bytes()).min(n);
            for i in (0..n).step_by(most as usize) {
                let from = self.t.f.offset(from, i64((i * ty.bytes()).into()));
                values.extend(self.t.f.load(from, ty, most));
            }
            return values;
        }
        let mut element = a.at;
        for &inside in &a.inside {
            let from = self.t.f.select(inside, element, a.first);
            values.push(self.t.f.load(from, ty, 1)[0]);
            element = self.t.f.offset(element, a.step);
        }
        values
    }

    /// What [`Emitter::load_from`] gave, with zeros outside.
    pub fn masked(&mut self, a: &Access, values: Vec<Val>) -> Vec<Val> {
        let inside = |i: usize| if a.whole { a.inside[0] } else { a.inside[i] };
        let one = |(i, v): (usize, Val)| {
            let zero = if v.ty() == Ty::F32 { f32(0.0) } else { Val::Int(0, v.ty()) };
            self.t.f.select(inside(i), v, zero)
        };
        values.into_iter().enumerate().map(one).collect()
    }

    /// Stores neighbours where they are inside the view and `c` holds.
    pub fn store_global(
        &mut self,
        view: ValueId,
        index: &[Index],
        at: &[Val],
        (row, c): (Option<Val>, Val),
        values: &[Val],
    ) {
        let a = self.access(view, index, at, row, values.len() as u32);
        if a.whole {
            let ok = self.t.f.bin("and", a.inside[0], c);
            let most = (16 / values[0].ty().bytes()) as usize;
            let mut at = a.at;
            for part in values.chunks(most) {
                let words = self.words(part);
                self.t.arch.store_global_if(&mut self.t, ok, at, &words);
                at = self.t.f.offset(at, i64(i64::from(values[0].ty().bytes()) * part.len() as i64));
            }
            return;
        }
        let mut element = a.at;
        for (&v, &inside) in values.iter().zip(&a.inside) {
            let ok = self.t.f.bin("and", inside, c);
            let words = self.words(&[v]);
            self.t.arch.store_global_if(&mut self.t, ok, element, &words);
            element = self.t.f.offset(element, a.step);
        }
    }

    /// Small elements packed to 32-bit words where there are enough of them.
    pub fn words(&mut self, values: &[Val]) -> Vec<Val> {
        let per = (4 / values[0].ty().bytes()) as usize;
        if per == 1 || values.len() < per {
            return values.to_vec();
        }
        let pack = |part: &[Val]| {
            let mut word = i32(0);
            for (i, &v) in part.iter().enumerate() {
                let wide = self.t.f.cast("zext", v, Ty::I32);
                let moved = self.t.f.bin("shl", wide, i32((i * 32 / per) as i64));
                word = self.t.f.bin("or", word, moved);
            }
            word
        };
        values.chunks(per).map(pack).collect()
    }
}
