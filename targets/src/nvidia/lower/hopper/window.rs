//! The columns that a selection is of, where they are a stretch of a row of f32 in memory: read four at a time.
//!
//! A program that selects from a row offers all columns of some whole steps, and says of those outside of its bounds that they are −inf.
//! Element by element that is a comparison, a conversion and an address each. Seen as bounds, it is a stretch of memory: vectors of 16
//! bytes, whole but for the first and the last.

use super::emit::Emit;
use super::ptx;
use super::select::Stream;
use super::tensor_map::view_type;
use crate::nvidia::lower::isa;
use crate::nvidia::lower::mlir::{Ty, Val, f32, i32, i64};
use dsc_ir::DType;
use dsc_ir::sched::Op;
use dsc_ir::tile::{self, Index, MapArg, MapFn, Scalar, ScalarOp, ValueId};

/// Columns of a vector.
pub const VECTOR: u32 = 4;

/// What a program says of the columns that it offers.
struct Bounds<'a> {
    view: ValueId,
    index: &'a [Index],
    /// First column, and one past the last, if there are such.
    first: Option<ValueId>,
    end: Option<ValueId>,
}

/// A stretch of a row.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    /// First column, and one past the last.
    pub from: Val,
    pub to: Val,
    /// Address of the row's first column.
    row: Val,
    /// First column of vector 0: `from`, or up to three before it.
    start: Val,
    /// Vectors.
    pub vectors: Val,
    /// The first that is whole, and how many are.
    pub whole: [Val; 2],
}

impl<'a> Emit<'a> {
    /// The stretch that a program selects from, and whether all of it is inside its view; none if its values are no such.
    pub fn window(&mut self, stream: &Stream, all: Val) -> Result<Option<(Window, Val)>, String> {
        let Some(bounds) = self.bounds(stream) else { return Ok(None) };
        let Some(ty) = view_type(&self.s.types, bounds.view).cloned() else { return Ok(None) };
        let step = ty.strides.last();
        if ty.dtype != DType::F32 || step.is_none_or(|s| s.sym.is_some() || s.bytes != 4) {
            return Ok(None);
        }
        let lo = self.index(stream.range.0)?;
        let hi = self.t.f.add(lo, all);
        let from = match bounds.first {
            Some(v) => {
                let first = self.flat_element(v, i32(0))?;
                self.t.f.intrinsic("smax", &[lo, first])
            }
            None => lo,
        };
        let to = match bounds.end {
            Some(v) => {
                let end = self.flat_element(v, i32(0))?;
                self.t.f.intrinsic("smin", &[hi, end])
            }
            None => hi,
        };
        let to = self.t.f.intrinsic("smax", &[to, from]);
        let mut at = Vec::new();
        for &i in &bounds.index[..bounds.index.len() - 1] {
            at.push(self.lazy_index(i)?);
        }
        at.push(i32(0));
        let (row, inside) = self.element_at(bounds.view, &at);
        let extent = self.extent(ty.shape[at.len() - 1]);
        let f = &mut self.t.f;
        let ends = f.cmp("sle", to, extent);
        let begins = f.cmp("sge", from, i32(0));
        let inside = f.bin("and", inside, ends);
        let inside = f.bin("and", inside, begins);
        // Words from a multiple of 16 bytes to the first column.
        let address = f.cast("ptrtoint", row, Ty::I64);
        let words = f.bin("lshr", address, i64(2));
        let words = f.cast("trunc", words, Ty::I32);
        let words = f.add(words, from);
        let before = f.bin("and", words, i32(3));
        let start = f.sub(from, before);
        let columns = f.sub(to, start);
        let up = f.add(columns, i32(3));
        let vectors = f.div(up, VECTOR);
        let first = f.add(before, i32(3));
        let first = f.div(first, VECTOR);
        let whole = f.div(columns, VECTOR);
        let whole = f.sub(whole, first);
        let whole = f.intrinsic("smax", &[whole, i32(0)]);
        Ok(Some((Window { from, to, row, start, vectors, whole: [first, whole] }, inside)))
    }

    /// The first column of a vector.
    pub fn column_of(&mut self, w: &Window, vector: Val) -> Val {
        let columns = self.t.f.mul(vector, i32(VECTOR.into()));
        self.t.f.add(w.start, columns)
    }

    /// So many vectors of the running lane, from the one of a warp's first on, every `step`th: −inf where a column is outside of the stretch. `again`: whatever has been
    /// read of them before. Most warps find whole vectors only, and one address is enough.
    pub fn batch(&mut self, w: &Window, (first, step, count): (Val, u32, u32), again: bool) -> Vec<Val> {
        let own = self.t.f.add(first, self.t.lane);
        // No addresses are kept from the first time.
        let own = if again { ptx::pin_word(&mut self.t.f, own) } else { own };
        let f = &mut self.t.f;
        let behind = f.sub(first, w.whole[0]);
        let last = f.add(behind, i32(i64::from((count - 1) * step) + 31));
        let begun = f.cmp("sge", behind, i32(0));
        let open = f.cmp("slt", last, w.whole[1]);
        let whole = f.bin("and", begun, open);
        let [all, some, join] = [0; 3].map(|_| self.t.f.label());
        self.t.f.cond_br(whole, (all, &[]), (some, &[]));
        self.t.f.start(all, &[]);
        let column = self.column_of(w, own);
        let at = self.column_address(w, column);
        let mut values = Vec::new();
        for i in 0..count {
            let at = self.t.f.offset(at, i64((i * step * VECTOR * 4).into()));
            values.extend(ptx::load_four(&mut self.t.f, at, again));
        }
        self.t.f.br(join, &values);
        self.t.f.start(some, &[]);
        let numbers: Vec<Val> = (0..count).map(|i| self.t.f.add(own, i32((i * step).into()))).collect();
        let values = self.vectors_read(w, &numbers, again);
        self.t.f.br(join, &values);
        self.t.f.start(join, &vec![Ty::F32; values.len()])
    }

    /// Vectors of these numbers, −inf where a column is outside of the stretch.
    pub fn vectors(&mut self, w: &Window, numbers: &[Val]) -> Vec<Val> {
        self.vectors_read(w, numbers, false)
    }

    fn vectors_read(&mut self, w: &Window, numbers: &[Val], again: bool) -> Vec<Val> {
        let mut loaded = Vec::new();
        let mut edges = Vec::new();
        for &number in numbers {
            let column = self.column_of(w, number);
            let f = &mut self.t.f;
            let from_whole = f.sub(number, w.whole[0]);
            let whole = f.cmp("ult", from_whole, w.whole[1]);
            let some = f.cmp("slt", number, w.vectors);
            let rest = f.bin("xor", whole, Val::Int(1, Ty::I1));
            let edge = f.bin("and", some, rest);
            let at = self.column_address(w, column);
            loaded.extend(ptx::load_four_if(&mut self.t.f, whole, at, again));
            edges.push((edge, column));
        }
        self.with_edges(w, &edges, loaded)
    }

    /// Vectors with the columns of those that are in part outside of the stretch, one after another: of a row there are two.
    fn with_edges(&mut self, w: &Window, edges: &[(Val, Val)], loaded: Vec<Val>) -> Vec<Val> {
        let f = &mut self.t.f;
        let mut mask = i32(0);
        for (i, &(edge, _)) in edges.iter().enumerate() {
            let bit = f.select(edge, i32(1 << i), i32(0));
            mask = f.bin("or", mask, bit);
        }
        let count = isa::popcount(f, mask);
        let carried: Vec<Val> = [mask].into_iter().chain(loaded).collect();
        let l = self.t.f.open_loop(i32(0), count, &carried);
        let (mask, values) = (l.args[1], &l.args[2..]);
        let f = &mut self.t.f;
        let others = f.sub(mask, i32(1));
        let others = f.bin("and", mask, others);
        let bit = f.bin("xor", mask, others);
        let here: Vec<Val> = (0..edges.len()).map(|i| f.cmp("eq", bit, i32(1 << i))).collect();
        let mut first = edges[0].1;
        for (&it, &(_, column)) in here.iter().zip(edges).skip(1) {
            first = f.select(it, column, first);
        }
        let mut mended = Vec::new();
        for j in 0..VECTOR {
            let column = self.t.f.add(first, i32(j.into()));
            let begun = self.t.f.cmp("sge", column, w.from);
            let open = self.t.f.cmp("slt", column, w.to);
            let inside = self.t.f.bin("and", begun, open);
            let at = self.column_address(w, column);
            let one = ptx::load_f32_if(&mut self.t.f, inside, at);
            mended.push(self.t.f.select(inside, one, f32(f32::NEG_INFINITY)));
        }
        let mut next = vec![others];
        for (i, &v) in values.iter().enumerate() {
            let (vector, j) = (i / VECTOR as usize, i % VECTOR as usize);
            next.push(self.t.f.select(here[vector], mended[j], v));
        }
        self.t.f.close_loop(&l, i32(1), &next);
        l.args[2..].to_vec()
    }

    /// The address of a column.
    pub fn column_address(&mut self, w: &Window, column: Val) -> Val {
        let wide = self.t.f.cast("sext", column, Ty::I64);
        let byte = self.t.f.mul(wide, i64(4));
        self.t.f.offset(w.row, byte)
    }

    /// The key of a value, 0 if it can not be selected.
    pub fn key(&mut self, value: Val) -> Val {
        let some = self.t.f.fcmp("ogt", value, f32(f32::NEG_INFINITY));
        let key = self.ordered(value);
        self.t.f.select(some, key, i32(0))
    }

    /// What the program says of its columns, if it offers each under its own number: `select(first <= column && column < end, x, −inf)`.
    fn bounds(&self, stream: &Stream) -> Option<Bounds<'a>> {
        (stream.base == stream.counter).then_some(())?;
        let op = |mut v: ValueId| loop {
            match self.defs.get(&v).map(|i| &i.op) {
                // The same under another name.
                Some(Op::Tile(tile::Op::Map { inputs, body })) if matches!(body.result, MapArg::Input(_)) => {
                    let MapArg::Input(i) = body.result else { return None };
                    v = inputs[i as usize];
                }
                Some(Op::Tile(op)) => return Some(op),
                _ => return None,
            }
        };
        let tile::Op::Map { inputs, body } = op(stream.values)? else { return None };
        let MapArg::Inst(result) = body.result else { return None };
        let result = &body.insts[result as usize];
        let &[inside, MapArg::Input(x), nothing] = result.args.as_slice() else { return None };
        let lowest = ScalarOp::Const(Scalar::F32(f32::NEG_INFINITY));
        if result.op != ScalarOp::Select || scalar(body, nothing)?.op != lowest {
            return None;
        }
        let tile::Op::Load { view, index, shape } = op(*inputs.get(x as usize)?)? else { return None };
        let along = index.last() == Some(&Index::Value(stream.counter));
        let row = shape.split_last().is_some_and(|(_, outer)| outer.iter().all(|&n| n == 1));
        (along && row).then_some(())?;
        let columns = |v: u32| {
            let v = inputs[v as usize];
            let last = self.shape(v).len().checked_sub(1);
            matches!(op(v), Some(tile::Op::Iota { axis, .. }) if Some(*axis as usize) == last)
        };
        let counter = |v: u32| inputs[v as usize] == stream.counter;
        let is_column = |arg: MapArg| {
            let Some(sum) = scalar(body, arg).filter(|i| i.op == ScalarOp::Add) else { return false };
            matches!(sum.args[..], [MapArg::Input(a), MapArg::Input(b)] if columns(a) && counter(b) || columns(b) && counter(a))
        };
        let bound = |arg: MapArg| match arg {
            MapArg::Input(i) => {
                let v = inputs[i as usize];
                (self.shape(v).iter().all(|&n| n == 1)).then_some(v)
            }
            MapArg::Inst(_) => None,
        };
        let mut bounds = Bounds { view: *view, index, first: None, end: None };
        let mut pending = vec![inside];
        while let Some(arg) = pending.pop() {
            let inst = scalar(body, arg)?;
            match inst.op {
                ScalarOp::And => pending.extend(&inst.args),
                ScalarOp::Lt if bounds.end.is_none() && is_column(inst.args[0]) => {
                    bounds.end = Some(bound(inst.args[1])?);
                }
                ScalarOp::Le if bounds.first.is_none() && is_column(inst.args[1]) => {
                    bounds.first = Some(bound(inst.args[0])?);
                }
                _ => return None,
            }
        }
        Some(bounds)
    }
}

/// The instruction that gives an operand.
fn scalar(body: &MapFn, arg: MapArg) -> Option<&tile::MapInst> {
    match arg {
        MapArg::Inst(i) => body.insts.get(i as usize),
        MapArg::Input(_) => None,
    }
}
