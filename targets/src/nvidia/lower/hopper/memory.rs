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
        self.element_from(view, at, None, None, (0, 0))
    }

    /// The same so many places behind `at` along an axis, and with `moving`, an axis and what is added to the coordinate along it, which changes from
    /// round to round while `at` stays. These are added to the address last: what stays is computed once, and what multiplies to 64 bits would wait
    /// long for registers that products use too. `anchor` is where `at` is, if that is known.
    pub fn element_from(
        &mut self,
        view: ValueId,
        at: &[Val],
        anchor: Option<Val>,
        moving: Option<(usize, Val)>,
        (axis, behind): (usize, u32),
    ) -> (Val, Val) {
        let Some(ty) = view_type(&self.s.types, view).cloned() else { return (i64(0), Val::Int(0, Ty::I1)) };
        let (mut offset, mut inside) = (i64(ty.offset as i64), Val::Int(1, Ty::I1));
        let (mut moved, mut apart) = (None, 0);
        for (d, &stays) in at.iter().enumerate() {
            let extent = self.extent(ty.shape[d]);
            let by = moving.filter(|m| m.0 == d).map(|m| m.1);
            let constant = if d == axis { behind } else { 0 };
            let near = self.t.f.add(stays, i32(constant.into()));
            let whole = by.map_or(near, |by| self.t.f.add(near, by));
            // Unsigned: a negative coordinate is outside too.
            let ok = self.t.f.cmp("ult", whole, extent);
            inside = self.t.f.bin("and", inside, ok);
            let bytes = ty.strides[d].bytes;
            let mut stride = i64(bytes);
            if let Some(sym) = ty.strides[d].sym {
                let sym = self.t.f.cast("zext", self.syms[sym as usize], Ty::I64);
                stride = self.t.f.mul(stride, sym);
            }
            let most = extent.int().and_then(|n| n.checked_mul(stride.int()?));
            let narrow = most.is_some_and(|n| (0..1 << 31).contains(&n));
            let c = match by {
                Some(by) if narrow || anchor.is_some() => {
                    moved = Some(if narrow {
                        let part = self.t.f.mul(by, i32(bytes));
                        self.t.f.cast("zext", part, Ty::I64)
                    } else {
                        let by = self.t.f.cast("sext", by, Ty::I64);
                        self.t.f.mul(by, stride)
                    });
                    near
                }
                None if constant > 0 && stride.int().is_some() => {
                    apart = i64::from(constant) * bytes;
                    stays
                }
                _ => whole,
            };
            let wide = self.t.f.cast("sext", c, Ty::I64);
            let part = self.t.f.mul(wide, stride);
            offset = self.t.f.add(offset, part);
        }
        let base = self.param(view);
        let address = anchor.unwrap_or_else(|| self.t.f.offset(base, offset));
        let address = moved.map_or(address, |bytes| self.t.f.offset(address, bytes));
        (self.t.f.offset(address, i64(apart)), inside)
    }

    /// The parameter that a view is.
    pub fn param(&self, view: ValueId) -> Val {
        let number = self.s.params.iter().position(|p| p.value == view).unwrap_or(0);
        Val::Arg(number as u32, Ty::Global)
    }
}
