//! Rows of an accumulator times a factor each.
//!
//! The factors of a softmax are mostly 1, and multiplying by 1 changes nothing: a warp whose factors all are leaves the accumulator as it is.
//! Beside another warpgroup's products, which read and write registers too, the multiplications take one and a half times their number of cycles.

use super::emit::{Emit, Held};
use super::ptx;
use dsc_ir::DType;
use dsc_ir::tile::{self, MapArg, ScalarOp, ValueId};
use std::collections::HashMap;

/// Registers of a thread from which on a look at the factors pays.
const FEWEST: usize = 64;

impl Emit<'_> {
    /// The matrix and the column of factors that a map multiplies it by, if that is all it does and the matrix is large.
    pub fn rescaled(&mut self, r: ValueId, op: &tile::Op) -> Option<[ValueId; 2]> {
        let tile::Op::Map { inputs, body } = op else { return None };
        let [only] = body.insts.as_slice() else { return None };
        let &[MapArg::Input(a), MapArg::Input(b)] = only.args.as_slice() else { return None };
        (only.op == ScalarOp::Mul && body.result == MapArg::Inst(0)).then_some(())?;
        let [x, factor] = [*inputs.get(a as usize)?, *inputs.get(b as usize)?];
        let column = [self.shape(r).first().copied()?, 1];
        let alike = self.shape(x) == self.shape(r) && self.shape(factor) == column.as_slice();
        let large = matches!(self.held.get(&x), Some(Held::Registers(v, [true, true])) if v.len() >= FEWEST);
        (alike && large && self.dtype(x) == DType::F32 && self.dtype(factor) == DType::F32).then_some([x, factor])
    }

    /// Makes `r`, rows of `x` times their factors.
    pub fn rescale(&mut self, r: ValueId, [x, factor]: [ValueId; 2]) -> Result<(), String> {
        self.settle(x);
        let Some(Held::Registers(values, [true, true])) = self.held.get(&x).cloned() else {
            return Err(format!("%{} is no fragment", x.0));
        };
        let g = self.seen_in(x)?;
        let mut seen = HashMap::new();
        let mut factors = Vec::new();
        for at in g.varying(true, false) {
            factors.push(self.element(factor, at, &mut seen)?);
        }
        let of: Vec<usize> = g.registers().into_iter().map(|at| g.position(at, true, false)).collect();
        let scaled = ptx::multiply_unless_one(&mut self.t.f, &values, &factors, &of);
        self.held.insert(r, Held::Registers(scaled, [true, true]));
        Ok(())
    }
}
