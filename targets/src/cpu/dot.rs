//! Dot products: operands into the form an atom takes, accumulators in place.
//!
//! From [`PACK_ROWS`] rows on, `b` given as `[n, k]` is decoded and packed into panels, and the packed form is multiplied: the
//! rearrangement costs about a sixth of a cycle an element, the products `m / 32`. Below, the `[n, k]` form reads `b`
//! where it is, decoding on the way; that is the case of decode, where every weight is used once or a few times.

use super::atoms::{self, Atom, Right};
use super::emit::Routine;
use super::lower::{Cg, Val};
use super::tile::{Base, Coef, Expr, Leaf, MapNode, MemTile, Slot, Tile, element_bytes};
use cranelift_codegen::ir::Value;
use dsc_ir::DType;
use dsc_ir::tile::{MapArg, MapFn, MapInst, ScalarOp, ValueId};
use std::rc::Rc;

/// Rows from which packing pays.
const PACK_ROWS: u32 = 12;

/// Sizes of a dot product.
#[derive(Clone, Copy)]
struct Size {
    m: u32,
    n: u32,
    k: u32,
}

impl Cg<'_> {
    /// [`dsc_ir::tile::Op::Dot`].
    pub(crate) fn dot(&mut self, a: ValueId, b: ValueId, acc: Option<ValueId>, trans_b: bool, out: &[u32]) -> Val {
        let (b_shape, a_shape) = (self.shape(b), self.shape(a));
        let size = Size { m: out[0], n: out[1], k: a_shape[1] };
        let a_mem = self.rows_of(a, &a_shape, &[DType::F32]);
        let c = self.accumulator(acc, out, &[a, b]);
        let zero = acc.is_none();
        let (a_at, lda) = self.rows(&a_mem);
        if !trans_b {
            // Few rows: decoded on the way, since each vector of `b` is used about once.
            let formats = if size.m <= 8 { vec![DType::F32, DType::Bf16, DType::F16] } else { vec![DType::F32] };
            let native: Vec<DType> = formats.into_iter().filter(|&d| atoms::decodes(self.width(), d, size.n)).collect();
            let b_mem = self.rows_of(b, &b_shape, &native);
            let (b_at, ldb) = self.rows(&b_mem);
            let right = Right::Rows(b_mem.dtype);
            let atom = Atom::GemmNn { m: size.m, n: size.n, k: size.k, b: right, zero };
            self.gemm(atom, [a_at, lda, b_at, ldb], &c, size);
        } else if size.m < PACK_ROWS {
            let formats = [DType::F32, DType::Bf16, DType::F16, DType::E4m3];
            let native: Vec<DType> = formats.into_iter().filter(|&d| atoms::decodes(self.width(), d, size.k)).collect();
            let b_mem = self.rows_of(b, &b_shape, &native);
            let (b_at, ldb) = self.rows(&b_mem);
            let atom = Atom::GemmNt { m: size.m, n: size.n, k: size.k, b: b_mem.dtype, zero };
            self.gemm(atom, [a_at, lda, b_at, ldb], &c, size);
        } else {
            let b_mem = self.rows_of(b, &b_shape, &[DType::F32, DType::Bf16]);
            let (b_at, ldb) = self.rows(&b_mem);
            let packed = Slot::new(&self.arena, atoms::packed_bytes(self.width(), size.n, size.k));
            let packed_at = self.address(&Base::Slot(packed.clone(), 0));
            self.f.call(Routine::Atom(Atom::Pack { n: size.n, k: size.k, from: b_mem.dtype }), &[packed_at, b_at, ldb]);
            let atom = Atom::GemmNn { m: size.m, n: size.n, k: size.k, b: Right::Packed, zero };
            self.gemm(atom, [a_at, lda, packed_at, ldb], &c, size);
        }
        self.tile_value(c, out)
    }

    fn gemm(&mut self, atom: Atom, operands: [Value; 4], c: &MemTile, size: Size) {
        let c_at = self.address(&c.base);
        let ldc = self.f.i64(i64::from(size.n) * 4);
        let [a, lda, b, ldb] = operands;
        self.f.call(Routine::Atom(atom), &[a, lda, b, ldb, c_at, ldc]);
    }

    /// Address of a matrix and the bytes between its rows.
    fn rows(&mut self, m: &MemTile) -> (Value, Value) {
        let at = self.address(&m.base);
        let ld = self.coef(m.coefs[0]);
        (at, ld)
    }

    /// An operand in memory with contiguous rows, in one of the element types `formats`, else as f32.
    fn rows_of(&mut self, id: ValueId, shape: &[u32], formats: &[DType]) -> MemTile {
        let tile = match self.take(id) {
            Val::Tile(tile) => tile,
            _ => {
                let m = self.dense(id);
                Tile { dtype: m.dtype, shape: shape.to_vec(), expr: Expr::Leaf(Leaf::Mem(m)) }
            }
        };
        let memory = tile.expr.memory().filter(|m| shape[1] == 1 || m.coefs[1] == Coef::Const(element_bytes(m.dtype)));
        match memory {
            Some(m) if formats.contains(&m.dtype) => m.clone(),
            Some(m) => {
                let m = m.clone();
                self.converted(&tile, Some(&m))
            }
            None if formats.contains(&tile.dtype) => self.materialise(&tile),
            None => self.converted(&tile, None),
        }
    }

    /// A matrix converted to f32 in a slot.
    fn converted(&mut self, tile: &Tile, memory: Option<&MemTile>) -> MemTile {
        let slot = self.slot_for(DType::F32, &tile.shape);
        let dst = MemTile::dense(&slot, DType::F32, &tile.shape);
        let (rows, cols) = (tile.shape[0], tile.shape[1]);
        if let Some(m) = memory
            && atoms::decodes(self.width(), m.dtype, cols)
        {
            let (from, ld_from) = self.rows(m);
            let (to, ld_to) = self.rows(&dst);
            self.f.call(Routine::Atom(Atom::Cast { rows, cols, from: m.dtype }), &[to, ld_to, from, ld_from]);
        } else {
            self.evaluate_into(&dst, &cast_tile(tile));
        }
        dst
    }

    /// The slot that a dot adds to, holding `acc`. It is `acc`'s own if nothing else needs that any more.
    fn accumulator(&mut self, acc: Option<ValueId>, shape: &[u32], operands: &[ValueId]) -> MemTile {
        let Some(acc) = acc else {
            let slot = self.slot_for(DType::F32, shape);
            return MemTile::dense(&slot, DType::F32, shape);
        };
        if operands.contains(&acc) {
            let m = self.dense(acc);
            let slot = self.slot_for(DType::F32, shape);
            let dst = MemTile::dense(&slot, DType::F32, shape);
            let expr = Expr::Leaf(Leaf::Mem(m));
            self.evaluate_into(&dst, &Tile { dtype: DType::F32, shape: shape.to_vec(), expr });
            return dst;
        }
        match self.take(acc) {
            Val::Tile(tile) => self.materialise_over(acc, &tile),
            _ => self.dense(acc),
        }
    }
}

/// A tile converted to f32 element by element.
fn cast_tile(tile: &Tile) -> Tile {
    let body = MapFn {
        insts: vec![MapInst { op: ScalarOp::Cast(DType::F32), args: vec![MapArg::Input(0)] }],
        result: MapArg::Inst(0),
    };
    let node = MapNode { body, types: vec![DType::F32; 2], inputs: vec![tile.dtype] };
    Tile { dtype: DType::F32, shape: tile.shape.clone(), expr: Expr::Map(Rc::new(node), vec![tile.expr.clone()]) }
}
