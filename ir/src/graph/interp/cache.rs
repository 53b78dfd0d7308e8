//! Caches: rows by slot, in the precision of their format.

use super::super::weights::{Data, Real, TensorData};
use super::super::{PAGE_TOKENS, StateFormat};
use crate::dtype::DType;
use std::sync::Arc;

/// The contents of a cache: rows by slot.
#[derive(Clone, Debug)]
pub struct Cache<F> {
    format: StateFormat,
    slots: usize,
    /// Codes of the quantised part, and its scales.
    codes: Vec<u8>,
    scales: Vec<f32>,
    /// The plain part.
    plain: Vec<F>,
}

impl<F: Real> Cache<F> {
    /// An empty cache.
    pub fn new(format: StateFormat) -> Cache<F> {
        Cache { format, slots: 0, codes: Vec::new(), scales: Vec::new(), plain: Vec::new() }
    }

    /// Elements a row has quantised (and how many share a scale), and plain.
    pub(super) fn layout(&self) -> (usize, usize, usize) {
        match self.format {
            StateFormat::LatentFp8 { latent, rope } => (latent as usize, StateFormat::GROUP as usize, rope as usize),
            StateFormat::Latent { latent, rope, .. } => (0, 1, (latent + rope) as usize),
            StateFormat::IndexFp8 { dim } => (dim as usize, dim as usize, 0),
            StateFormat::Index { dim, .. } => (0, 1, dim as usize),
        }
    }

    pub(super) fn grow(&mut self, slots: usize) {
        let (codes, group, plain) = self.layout();
        self.slots = self.slots.max(slots);
        self.codes.resize(self.slots * codes, 0);
        self.scales.resize(self.slots * codes.div_ceil(group), 0.0);
        self.plain.resize(self.slots * plain, F::default());
    }

    pub(super) fn write(&mut self, slot: usize, row: usize, parts: &[Arc<TensorData<F>>]) {
        self.grow(slot + 1);
        let (codes, group, plain) = self.layout();
        let mut at = slot * plain;
        for part in parts {
            match &part.data {
                Data::Quant { codes: c, scales: s, .. } => {
                    let n = codes.div_ceil(group);
                    self.codes[slot * codes..][..codes].copy_from_slice(&c[row * codes..][..codes]);
                    self.scales[slot * n..][..n].copy_from_slice(&s[row * n..][..n]);
                }
                Data::Real(x) => {
                    let columns = part.columns();
                    self.plain[at..at + columns].copy_from_slice(&x[row * columns..][..columns]);
                    at += columns;
                }
                Data::Int(_) => {}
            }
        }
    }

    /// The cache whose pages are these bytes, as [`StateFormat`] lays them out; what is left of a page is not looked at.
    pub fn from_bytes(format: StateFormat, bytes: &[u8]) -> Cache<F> {
        let page_bytes = format.page_bytes() as usize;
        let tokens = PAGE_TOKENS as usize;
        let mut cache = Cache::new(format);
        cache.grow(bytes.len() / page_bytes * tokens);
        let (codes, group, plain) = cache.layout();
        let (groups, pitch) = (codes.div_ceil(group), codes.next_multiple_of(4));
        let f32_at = |at: usize| f32::from_le_bytes([0, 1, 2, 3].map(|i| bytes[at + i]));
        for slot in 0..cache.slots {
            let (page, offset) = (slot / tokens * page_bytes, slot % tokens);
            let (row, scales) = match format {
                StateFormat::IndexFp8 { .. } => (page + offset * pitch, page + tokens * pitch + 4 * offset),
                _ => {
                    let row = page + offset * format.row_bytes() as usize;
                    (row, row + pitch)
                }
            };
            cache.codes[slot * codes..][..codes].copy_from_slice(&bytes[row..][..codes]);
            for g in 0..groups {
                cache.scales[slot * groups + g] = f32_at(scales + 4 * g);
            }
            let dtype = match format {
                StateFormat::Latent { dtype, .. } | StateFormat::Index { dtype, .. } => dtype,
                StateFormat::LatentFp8 { .. } | StateFormat::IndexFp8 { .. } => DType::Bf16,
            };
            let at = if codes == 0 { row } else { scales + 4 * groups };
            for i in 0..plain {
                let at = at + i * dtype.bytes();
                let x = match dtype {
                    DType::Bf16 => half::bf16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32(),
                    DType::F16 => half::f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32(),
                    _ => f32_at(at),
                };
                cache.plain[slot * plain + i] = F::from_f32(x);
            }
        }
        cache
    }

    /// All elements of the row in a slot, dequantised; `None` past the written slots.
    pub fn row(&self, slot: usize) -> Option<Vec<F>> {
        if slot >= self.slots {
            return None;
        }
        let (codes, group, plain) = self.layout();
        let scales = &self.scales[slot * codes.div_ceil(group)..];
        let decode =
            |(i, &code): (usize, &u8)| F::from_f32(crate::dtype::e4m3_to_f32(code)) * F::from_f32(scales[i / group]);
        let mut row: Vec<F> = self.codes[slot * codes..][..codes].iter().enumerate().map(decode).collect();
        row.extend_from_slice(&self.plain[slot * plain..][..plain]);
        Some(row)
    }
}
