//! Addresses and bounds of views.

use crate::nvidia::lower::mlir::{Ty, Val, i32, i64};
use dsc_ir::Extent;
use dsc_ir::tile::ValueId;

use super::emit::Emit;
use super::tensor_map::view_type;

impl Emit<'_> {
    /// The value of a size.
    pub fn extent(&mut self, e: Extent) -> Val {
        match e.sym {
            None => i32(e.factor.into()),
            Some(sym) => {
                let n = self.syms[sym as usize];
                self.t.f.mul(n, i32(e.factor.into()))
            }
        }
    }

    /// Address of the element at `at`, and whether it is inside the view.
    pub fn element_at(&mut self, view: ValueId, at: &[Val]) -> (Val, Val) {
        let Some(ty) = view_type(&self.s.types, view).cloned() else { return (i64(0), Val::Int(0, Ty::I1)) };
        let (mut offset, mut inside) = (i64(ty.offset as i64), Val::Int(1, Ty::I1));
        for (d, &c) in at.iter().enumerate() {
            let extent = self.extent(ty.shape[d]);
            // Unsigned: a negative coordinate is outside too.
            let ok = self.t.f.cmp("ult", c, extent);
            inside = self.t.f.bin("and", inside, ok);
            let mut stride = i64(ty.strides[d].bytes);
            if let Some(sym) = ty.strides[d].sym {
                let sym = self.t.f.cast("zext", self.syms[sym as usize], Ty::I64);
                stride = self.t.f.mul(stride, sym);
            }
            let wide = self.t.f.cast("sext", c, Ty::I64);
            let part = self.t.f.mul(wide, stride);
            offset = self.t.f.add(offset, part);
        }
        let base = self.param(view);
        (self.t.f.offset(base, offset), inside)
    }

    /// The parameter that a view is.
    pub fn param(&self, view: ValueId) -> Val {
        let number = self.s.params.iter().position(|p| p.value == view).unwrap_or(0);
        Val::Arg(number as u32, Ty::Global)
    }
}
