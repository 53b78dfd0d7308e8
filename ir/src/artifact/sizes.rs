//! How much weights, parameters and launches take.

use super::{KernelEntry, ParamEntry, SCALE_ALIGN, WeightEntry, WeightSource};
use crate::extent::SymValues;
use crate::graph::Elem;
use std::ops::Range;

/// Blocks of one launch.
const MAX_BLOCKS: u64 = 1 << 48;

impl WeightEntry {
    /// The shape with the open dim of a rope table bound.
    pub fn bound_shape(&self, context_rows: u32) -> Vec<u32> {
        let mut shape = self.shape.clone();
        if let (WeightSource::RopeTable { .. }, Some(rows)) = (&self.source, shape.first_mut()) {
            *rows = context_rows;
        }
        shape
    }

    /// Bytes of plain elements or of codes; `None` on overflow.
    pub fn code_bytes(&self, context_rows: u32) -> Option<u64> {
        self.bound_shape(context_rows).iter().try_fold(self.elem.bytes(), |bytes, &n| bytes.checked_mul(u64::from(n)))
    }

    /// Where the scales of a quantised weight are: from its start, in bytes. `None` if it has none, or on overflow.
    pub fn scale_range(&self) -> Option<Range<u64>> {
        let Elem::Quant(quant) = self.elem else { return None };
        let start = self.code_bytes(0)?.checked_next_multiple_of(SCALE_ALIGN)?;
        let rank = self.shape.len();
        let mut count = 1u64;
        for (dim, &n) in self.shape.iter().enumerate() {
            let block = match rank - dim {
                1 => quant.block[1],
                2 => quant.block[0],
                _ => 1,
            };
            count = count.checked_mul(u64::from(n.div_ceil(block.max(1))))?;
        }
        Some(start..start.checked_add(count.checked_mul(4)?)?)
    }

    /// Bytes of the weight in device memory, when the context capacity is `context_rows` tokens: codes, then at the next multiple
    /// of [`SCALE_ALIGN`] the f32 scales. `None` on overflow.
    pub fn bytes(&self, context_rows: u32) -> Option<u64> {
        match self.elem {
            Elem::Plain(_) => self.code_bytes(context_rows),
            Elem::Quant(_) => self.scale_range().map(|r| r.end),
        }
    }
}

impl ParamEntry {
    /// The bytes the view can touch relative to the bound address when symbols are at most `limits`, first and past-the-end;
    /// `Ok(None)` if it is empty, `Err` if the arithmetic overflows.
    pub fn span(&self, limits: &SymValues) -> Result<Option<(i128, i128)>, Overflow> {
        let mut low = i128::from(self.view.offset);
        let mut high = low;
        for (extent, stride) in self.view.shape.iter().zip(&self.view.strides) {
            let count = extent.eval(limits);
            if count == 0 {
                return Ok(None);
            }
            let step = i128::from(stride.bytes) * stride.sym.map_or(1, |s| i128::from(limits.get(s)));
            let reach = step.checked_mul(i128::from(count - 1)).ok_or(Overflow)?;
            let end = if reach < 0 { &mut low } else { &mut high };
            *end = end.checked_add(reach).ok_or(Overflow)?;
        }
        Ok(Some((low, high + self.view.dtype.bytes() as i128)))
    }

    /// Checks that the view, bound at byte `at` of a buffer of `bytes`, stays inside while symbols are at most `limits`.
    pub fn check_binding(&self, at: u64, bytes: u64, limits: &SymValues) -> Result<(), String> {
        let name = &self.name;
        if !at.is_multiple_of(self.view.dtype.bytes() as u64) {
            return Err(format!(
                "parameter {name} is bound at byte {at}, which is not aligned to its {}",
                self.view.dtype
            ));
        }
        match self.span(limits) {
            Err(Overflow) => Err(format!("parameter {name}: the size of {} overflows", self.view)),
            Ok(None) => Ok(()),
            Ok(Some((low, high))) if i128::from(at) + low < 0 || high > i128::from(bytes) - i128::from(at) => {
                Err(format!(
                    "parameter {name}: {} spans bytes {low}..{high} from byte {at} of a buffer of {bytes} at limits {:?}",
                    self.view, limits.0
                ))
            }
            Ok(Some(_)) => Ok(()),
        }
    }
}

/// A size does not fit its integer type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overflow;

impl KernelEntry {
    /// Blocks of a launch; `None` beyond reason (2^48).
    pub fn blocks(&self, syms: &SymValues) -> Option<u64> {
        self.grid.iter().try_fold(1u64, |n, dim| n.checked_mul(dim.eval(syms))).filter(|&n| n <= MAX_BLOCKS)
    }
}
