//! How a weight is made from a checkpoint, and what a tensor holds once it is made.
//!
//! [`materialize`] applies a [`WeightSource`]: it stacks rows and columns of stored tensors, dequantises or copies block-quantised
//! ones, and computes rope tables and Hadamard matrices. The runtime applies the same rules on its own buffers; these are the
//! reference:
//!
//! * A part is rows and columns of a stored matrix; a vector counts as one row. Parts are stacked by rows until they fill the
//!   weight, whose leading dims count as rows too: `[E, N, K]` is `E · N` rows.
//! * Plain weight: stored floats as they are, e4m3 codes times the scale of their block (in f32, or in f64 when that is how the
//!   reader computes), then rounded to the weight's element type.
//! * Quantised weight: codes and scales are copied. Scale blocks start anew in each matrix of the last two dims; every block of
//!   the weight must lie in stored blocks of one and the same scale, which holds when parts start on block boundaries.
//! * Rope table: row `p` has the cosines, then the sines, of the f32 products `p · frequency`, computed in f64.

use super::{Elem, Quant, Weight};
use crate::artifact::{TensorPart, WeightSource};
use crate::dtype::{DType, e4m3_to_f32};
use std::fmt::Debug;
use std::ops::{Add, AddAssign, Div, Mul, Sub};
use std::sync::OnceLock;

/// Most elements of one tensor here: what a reference run can still hold.
pub const MAX_ELEMENTS: u64 = 1 << 33;

/// A number the interpreter computes in: f32 or f64.
pub trait Real:
    Copy
    + Debug
    + Default
    + PartialOrd
    + Send
    + Sync
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + AddAssign
    + 'static
{
    /// Exact from f32.
    fn from_f32(x: f32) -> Self;
    /// Rounded from f64.
    fn from_f64(x: f64) -> Self;
    /// Rounded to f32.
    fn to_f32(self) -> f32;
    /// Exact to f64.
    fn to_f64(self) -> f64;
    /// As a plain element of that type holds it. f64 stands in for f32: it stays unrounded.
    fn round(self, dtype: DType) -> Self;
    /// `e^self`.
    fn exp(self) -> Self;
    /// Natural logarithm.
    fn ln(self) -> Self;
    /// Square root.
    fn sqrt(self) -> Self;
}

impl Real for f32 {
    fn from_f32(x: f32) -> f32 {
        x
    }
    fn from_f64(x: f64) -> f32 {
        x as f32
    }
    fn to_f32(self) -> f32 {
        self
    }
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
    fn round(self, dtype: DType) -> f32 {
        dtype.round(self)
    }
    fn exp(self) -> f32 {
        f32::exp(self)
    }
    fn ln(self) -> f32 {
        f32::ln(self)
    }
    fn sqrt(self) -> f32 {
        f32::sqrt(self)
    }
}

impl Real for f64 {
    fn from_f32(x: f32) -> f64 {
        f64::from(x)
    }
    fn from_f64(x: f64) -> f64 {
        x
    }
    fn to_f32(self) -> f32 {
        self as f32
    }
    fn to_f64(self) -> f64 {
        self
    }
    fn round(self, dtype: DType) -> f64 {
        match dtype {
            DType::F32 => self,
            DType::Bf16 => half::bf16::from_f64(self).to_f64(),
            DType::F16 => half::f16::from_f64(self).to_f64(),
            other => f64::from(other.round(self as f32)),
        }
    }
    fn exp(self) -> f64 {
        f64::exp(self)
    }
    fn ln(self) -> f64 {
        f64::ln(self)
    }
    fn sqrt(self) -> f64 {
        f64::sqrt(self)
    }
}

/// The elements of a tensor, row-major.
#[derive(Clone, Debug)]
pub enum Data<F> {
    /// Plain floats, already rounded to their element type.
    Real(Vec<F>),
    /// Plain integers.
    Int(Vec<i32>),
    /// e4m3 codes, and the scales of the blocks of the last two dims.
    Quant {
        /// One code an element.
        codes: Vec<u8>,
        /// One multiplier a block, row-major, in the shape of [`super::TensorType::scale_shape`].
        scales: Vec<f32>,
        /// How elements share scales.
        quant: Quant,
    },
}

/// A tensor with its values.
#[derive(Clone, Debug)]
pub struct TensorData<F> {
    /// Size of each dim.
    pub shape: Vec<usize>,
    /// The elements.
    pub data: Data<F>,
    /// Dequantised elements, once somebody asked.
    dense: OnceLock<Vec<F>>,
}

impl<F: Real> TensorData<F> {
    /// A tensor; the caller sees to it that `data` has as many elements as `shape` says.
    pub fn new(shape: Vec<usize>, data: Data<F>) -> TensorData<F> {
        TensorData { shape, data, dense: OnceLock::new() }
    }

    /// Floats.
    pub fn real(shape: Vec<usize>, data: Vec<F>) -> TensorData<F> {
        TensorData::new(shape, Data::Real(data))
    }

    /// Integers.
    pub fn int(shape: Vec<usize>, data: Vec<i32>) -> TensorData<F> {
        TensorData::new(shape, Data::Int(data))
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        match &self.data {
            Data::Real(x) => x.len(),
            Data::Int(x) => x.len(),
            Data::Quant { codes, .. } => codes.len(),
        }
    }

    /// The values as floats; dequantised where need be. Integers have none.
    pub fn values(&self) -> &[F] {
        match &self.data {
            Data::Real(x) => x,
            Data::Int(_) => &[],
            Data::Quant { codes, scales, quant } => {
                self.dense.get_or_init(|| dequantize(&self.shape, codes, scales, *quant))
            }
        }
    }

    /// The integers; floats have none.
    pub fn ints(&self) -> &[i32] {
        match &self.data {
            Data::Int(x) => x,
            _ => &[],
        }
    }

    /// Size of the last dim; 1 without dims.
    pub fn columns(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }
}

/// Rows and columns of one scale matrix: of the last two dims.
fn matrix(shape: &[usize]) -> (usize, usize) {
    let columns = shape.last().copied().unwrap_or(1);
    (if shape.len() > 1 { shape[shape.len() - 2] } else { 1 }, columns)
}

/// Codes times scales.
fn dequantize<F: Real>(shape: &[usize], codes: &[u8], scales: &[f32], quant: Quant) -> Vec<F> {
    let (rows, columns) = matrix(shape);
    let [block_rows, block_columns] = quant.block.map(|b| b.max(1) as usize);
    let (scale_rows, scale_columns) = (rows.div_ceil(block_rows), columns.div_ceil(block_columns));
    let table: Vec<F> = (0..=255).map(|code| F::from_f32(e4m3_to_f32(code))).collect();
    let mut out = Vec::with_capacity(codes.len());
    for (i, row) in codes.chunks(columns.max(1)).enumerate() {
        let (m, r) = (i / rows.max(1), i % rows.max(1));
        let first = (m * scale_rows + r / block_rows) * scale_columns;
        for (part, scale) in row.chunks(block_columns).zip(&scales[first..]) {
            let scale = F::from_f32(*scale);
            out.extend(part.iter().map(|&code| table[code as usize] * scale));
        }
    }
    out
}

/// A tensor as a checkpoint stores it, little-endian.
#[derive(Clone, Debug)]
pub struct Stored<'a> {
    /// Element type: F32, Bf16, F16 or E4m3.
    pub dtype: DType,
    /// Size of each dim.
    pub shape: Vec<usize>,
    /// The elements.
    pub bytes: &'a [u8],
}

/// Why a weight cannot be made. All but [`WeightError::Shape`] are faults of the checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WeightError {
    /// The checkpoint lacks it.
    #[error("weight `{weight}`: the checkpoint has no tensor `{tensor}`")]
    Missing {
        /// The weight.
        weight: String,
        /// The tensor.
        tensor: String,
    },
    /// It is not as the graph expects.
    #[error("weight `{weight}`: tensor `{tensor}` {message}")]
    Tensor {
        /// The weight.
        weight: String,
        /// The tensor.
        tensor: String,
        /// What is wrong.
        message: String,
    },
    /// The parts do not fill the weight: a fault of the graph.
    #[error("weight `{weight}`: {message}")]
    Shape {
        /// The weight.
        weight: String,
        /// What is wrong.
        message: String,
    },
}

/// Looks a tensor up by name.
pub type Fetch<'a> = dyn Fn(&str) -> Option<Stored<'a>> + 'a;

/// Makes a weight; a rope table gets `rope_rows` rows.
///
/// # Errors
/// [`WeightError`] when tensors are missing or differ from what the source says.
pub fn materialize<F: Real>(weight: &Weight, rope_rows: usize, fetch: &Fetch) -> Result<TensorData<F>, WeightError> {
    let shape_error = |message: String| WeightError::Shape { weight: weight.name.clone(), message };
    match &weight.source {
        WeightSource::Tensors(parts) => {
            let shape: Option<Vec<usize>> = weight.ty.shape.iter().map(|e| e.constant().map(|n| n as usize)).collect();
            let shape = shape.ok_or_else(|| shape_error(format!("its shape {:?} is not constant", weight.ty.shape)))?;
            stack(weight, shape, parts, fetch)
        }
        WeightSource::RopeTable { frequencies } => {
            let Elem::Plain(dtype) = weight.ty.elem else { return Err(shape_error("a rope table is plain".into())) };
            let columns = 2 * frequencies.len();
            limit(&[rope_rows, columns]).map_err(shape_error)?;
            let mut table = Vec::with_capacity(rope_rows * columns);
            for p in 0..rope_rows {
                let angles = || frequencies.iter().map(|f| f64::from(p as f32 * f));
                table.extend(angles().map(|a| F::from_f64(a.cos()).round(dtype)));
                table.extend(angles().map(|a| F::from_f64(a.sin()).round(dtype)));
            }
            Ok(TensorData::real(vec![rope_rows, columns], table))
        }
        WeightSource::Hadamard { n } => {
            let Elem::Plain(dtype) = weight.ty.elem else {
                return Err(shape_error("a Hadamard matrix is plain".into()));
            };
            let n = *n as usize;
            limit(&[n, n]).map_err(shape_error)?;
            let x = F::from_f64((n as f64).powf(-0.5)).round(dtype);
            let sign = |i: usize, j: usize| if (i & j).count_ones().is_multiple_of(2) { x } else { F::default() - x };
            Ok(TensorData::real(vec![n, n], (0..n * n).map(|ij| sign(ij / n, ij % n)).collect()))
        }
    }
}

/// The number of elements, if it is not absurd.
pub(super) fn limit(shape: &[usize]) -> Result<usize, String> {
    let n = shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d as u64)).filter(|&n| n <= MAX_ELEMENTS);
    n.map(|n| n as usize).ok_or_else(|| format!("{shape:?} has too many elements"))
}

/// A part, found and checked.
struct Found<'p, 'd> {
    part: &'p TensorPart,
    stored: Stored<'d>,
    /// Stored scales and how many a row of blocks has, if the tensor is e4m3.
    scales: Option<(Vec<f32>, usize)>,
}

impl Found<'_, '_> {
    fn scale(&self, row: usize, column: usize) -> f32 {
        let [rows, columns] = self.part.scale_block.map(|b| b.max(1) as usize);
        self.scales.as_ref().map_or(1.0, |(scales, per_row)| scales[row / rows * per_row + column / columns])
    }
}

fn find<'p, 'd>(weight: &Weight, part: &'p TensorPart, fetch: &Fetch<'d>) -> Result<Found<'p, 'd>, WeightError> {
    let missing = |tensor: &str| WeightError::Missing { weight: weight.name.clone(), tensor: tensor.to_string() };
    let wrong = |tensor: &str, message: String| WeightError::Tensor {
        weight: weight.name.clone(),
        tensor: tensor.to_string(),
        message,
    };
    let stored = fetch(&part.tensor).ok_or_else(|| missing(&part.tensor))?;
    let [rows, columns] = part.shape.map(|n| n as usize);
    let fits = match stored.shape[..] {
        [n] => rows == 1 && n == columns,
        [r, c] => [r, c] == [rows, columns],
        _ => false,
    };
    if !fits {
        return Err(wrong(&part.tensor, format!("has shape {:?}, expected {:?}", stored.shape, part.shape)));
    }
    let within = |[first, end]: [u32; 2], n: u32| first <= end && end <= n;
    if !within(part.rows, part.shape[0]) || !within(part.cols, part.shape[1]) {
        return Err(wrong(&part.tensor, format!("has no rows {:?}, columns {:?}", part.rows, part.cols)));
    }
    if !matches!(stored.dtype, DType::F32 | DType::Bf16 | DType::F16 | DType::E4m3) {
        return Err(wrong(&part.tensor, format!("is stored as {}", stored.dtype)));
    }
    if Some(stored.bytes.len()) != rows.checked_mul(columns).and_then(|n| n.checked_mul(stored.dtype.bytes())) {
        return Err(wrong(&part.tensor, format!("has {} bytes", stored.bytes.len())));
    }
    if stored.dtype != DType::E4m3 {
        return Ok(Found { part, stored, scales: None });
    }
    let name = part.scale.as_ref().ok_or_else(|| wrong(&part.tensor, "is e4m3, its scales are unknown".into()))?;
    let scale = fetch(name).ok_or_else(|| missing(name))?;
    let [block_rows, block_columns] = part.scale_block.map(|b| b.max(1) as usize);
    let shape = [rows.div_ceil(block_rows), columns.div_ceil(block_columns)];
    if scale.dtype != DType::F32 || scale.shape != shape || scale.bytes.len() != 4 * shape[0] * shape[1] {
        return Err(wrong(name, format!("is {} {:?}, expected f32 {shape:?}", scale.dtype, scale.shape)));
    }
    let scales = (0..shape[0] * shape[1]).map(|i| float_at(scale.bytes, DType::F32, i)).collect();
    Ok(Found { part, stored, scales: Some((scales, shape[1])) })
}

/// Element `i` of little-endian elements. The caller has checked the length.
fn float_at(bytes: &[u8], dtype: DType, i: usize) -> f32 {
    match dtype {
        DType::F32 => f32::from_le_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]]),
        DType::Bf16 => half::bf16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]).to_f32(),
        DType::F16 => half::f16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]).to_f32(),
        _ => e4m3_to_f32(bytes[i]),
    }
}

fn stack<F: Real>(
    weight: &Weight,
    shape: Vec<usize>,
    parts: &[TensorPart],
    fetch: &Fetch,
) -> Result<TensorData<F>, WeightError> {
    let wrong = |message: String| WeightError::Shape { weight: weight.name.clone(), message };
    let elements = limit(&shape).map_err(wrong)?;
    let columns = shape.last().copied().unwrap_or(1);
    let rows = elements.checked_div(columns).unwrap_or(0);
    let given: u64 = parts.iter().map(|p| u64::from(p.rows[1].saturating_sub(p.rows[0]))).sum();
    let width = |p: &TensorPart| p.cols[1].saturating_sub(p.cols[0]) as usize;
    if given != rows as u64 || parts.iter().any(|p| width(p) != columns) {
        return Err(wrong(format!("its parts have {given} rows, its shape is {shape:?}")));
    }
    let data = match weight.ty.elem {
        Elem::Plain(dtype) => {
            let mut out = Vec::with_capacity(elements);
            for part in parts {
                copy_plain(&find(weight, part, fetch)?, dtype, &mut out);
            }
            Data::Real(out)
        }
        Elem::Quant(quant) => {
            let mut copy = QuantCopy::new(quant, &shape);
            for part in parts {
                copy.part(&find(weight, part, fetch)?).map_err(|message| WeightError::Tensor {
                    weight: weight.name.clone(),
                    tensor: part.tensor.clone(),
                    message,
                })?;
            }
            let scales = copy.scales.into_iter().map(|s| s.unwrap_or(0.0)).collect();
            Data::Quant { codes: copy.codes, scales, quant }
        }
    };
    Ok(TensorData::new(shape, data))
}

fn copy_plain<F: Real>(found: &Found, dtype: DType, out: &mut Vec<F>) {
    let ([_, stride], [r0, r1], [c0, c1]) = (found.part.shape, found.part.rows, found.part.cols);
    let (stored, stride) = (&found.stored, stride as usize);
    for r in r0 as usize..r1 as usize {
        for c in c0 as usize..c1 as usize {
            let x = F::from_f32(float_at(stored.bytes, stored.dtype, r * stride + c));
            out.push(if found.scales.is_some() { x * F::from_f32(found.scale(r, c)) } else { x }.round(dtype));
        }
    }
}

/// A quantised weight while its parts are copied.
struct QuantCopy {
    quant: Quant,
    rows: usize,
    columns: usize,
    codes: Vec<u8>,
    scales: Vec<Option<f32>>,
}

impl QuantCopy {
    fn new(quant: Quant, shape: &[usize]) -> QuantCopy {
        let (rows, columns) = matrix(shape);
        let matrices = shape.iter().rev().skip(2).product::<usize>();
        let [block_rows, block_columns] = quant.block.map(|b| b.max(1) as usize);
        let scales = matrices * rows.div_ceil(block_rows) * columns.div_ceil(block_columns);
        QuantCopy {
            quant,
            rows,
            columns,
            codes: Vec::with_capacity(matrices * rows * columns),
            scales: vec![None; scales],
        }
    }

    fn part(&mut self, found: &Found) -> Result<(), String> {
        if found.scales.is_none() {
            return Err(format!("is stored as {}, expected e4m3", found.stored.dtype));
        }
        let ([_, stride], [r0, r1], [c0, c1]) = (found.part.shape, found.part.rows, found.part.cols);
        for r in r0 as usize..r1 as usize {
            let at = self.codes.len() / self.columns.max(1);
            self.scale_row(found, at, r)?;
            let first = r * stride as usize;
            self.codes.extend_from_slice(&found.stored.bytes[first + c0 as usize..first + c1 as usize]);
        }
        Ok(())
    }

    /// Sets the scales of row `at` from stored row `r`. A block of ours lies in few stored ones: its scale must be all theirs.
    fn scale_row(&mut self, found: &Found, at: usize, r: usize) -> Result<(), String> {
        let [block_rows, block_columns] = self.quant.block.map(|b| b.max(1) as usize);
        let per_matrix = self.rows.div_ceil(block_rows);
        let per_row = self.columns.div_ceil(block_columns);
        let row = at / self.rows.max(1) * per_matrix + at % self.rows.max(1) / block_rows;
        let source = found.part.scale_block[1].max(1) as usize;
        let c0 = found.part.cols[0] as usize;
        for block in 0..per_row {
            let end = ((block + 1) * block_columns).min(self.columns);
            let mut column = block * block_columns;
            while column < end {
                let scale = found.scale(r, c0 + column);
                let slot = &mut self.scales[row * per_row + block];
                if slot.is_some_and(|s| s.to_bits() != scale.to_bits()) {
                    return Err("has scale blocks that do not line up with the weight's".into());
                }
                *slot = Some(scale);
                column = (c0 + column) / source * source + source - c0;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::TensorType;
    use super::*;
    use crate::Extent;

    fn part(tensor: &str, shape: [u32; 2], rows: [u32; 2], cols: [u32; 2]) -> TensorPart {
        TensorPart {
            tensor: tensor.into(),
            scale: Some(format!("{tensor}.scale")),
            scale_block: [2, 2],
            shape,
            rows,
            cols,
        }
    }

    fn make(elem: Elem, shape: &[u32], parts: Vec<TensorPart>) -> Result<TensorData<f64>, WeightError> {
        let shape: Vec<Extent> = shape.iter().map(|&n| n.into()).collect();
        let weight = Weight { name: "w".into(), ty: TensorType { shape, elem }, source: WeightSource::Tensors(parts) };
        let codes: Vec<u8> = (0..12).map(|i| crate::dtype::f32_to_e4m3(i as f32)).collect();
        let scales: Vec<u8> = [1f32, 10., 100., 1000.].iter().flat_map(|s| s.to_le_bytes()).collect();
        let halves: Vec<u8> = [1.5f32, -2.0].iter().flat_map(|&s| half::bf16::from_f32(s).to_le_bytes()).collect();
        materialize(&weight, 0, &|name| match name {
            "q" => Some(Stored { dtype: DType::E4m3, shape: vec![3, 4], bytes: &codes }),
            "q.scale" => Some(Stored { dtype: DType::F32, shape: vec![2, 2], bytes: &scales }),
            "b" => Some(Stored { dtype: DType::Bf16, shape: vec![2], bytes: &halves }),
            _ => None,
        })
    }

    const F32: Elem = Elem::Plain(DType::F32);
    const FP8: Elem = Elem::Quant(Quant { block: [2, 2], pow2: false });

    #[test]
    fn dequantises_ranges() {
        let w = make(F32, &[2, 2], vec![part("q", [3, 4], [1, 3], [1, 3])]).expect("a weight");
        assert_eq!(w.values(), [5., 60., 900., 10000.]);
        let w = make(F32, &[2], vec![part("b", [1, 2], [0, 1], [0, 2])]).expect("a weight");
        assert_eq!(w.values(), [1.5, -2.]);
    }

    #[test]
    fn copies_codes_where_blocks_line_up() {
        let whole = || part("q", [3, 4], [0, 3], [0, 4]);
        let w = make(FP8, &[2, 3, 4], vec![whole(), whole()]).expect("a weight");
        let plain = make(F32, &[6, 4], vec![whole(), whole()]).expect("a weight");
        assert_eq!(w.values(), plain.values());
        assert!(matches!(make(FP8, &[6, 4], vec![whole(), whole()]), Err(WeightError::Tensor { .. })));
        assert!(make(FP8, &[2, 4], vec![part("q", [3, 4], [1, 3], [0, 4])]).is_err());
        assert!(make(FP8, &[2, 2], vec![part("q", [3, 4], [0, 2], [1, 3])]).is_err());
    }

    #[test]
    fn refuses_what_differs() {
        assert!(matches!(
            make(F32, &[1, 2], vec![part("x", [1, 2], [0, 1], [0, 2])]),
            Err(WeightError::Missing { .. })
        ));
        assert!(matches!(make(F32, &[2, 4], vec![part("q", [2, 4], [0, 2], [0, 4])]), Err(WeightError::Tensor { .. })));
        assert!(matches!(make(F32, &[4, 4], vec![part("q", [3, 4], [0, 3], [0, 4])]), Err(WeightError::Shape { .. })));
        assert!(make(F32, &[2, 4], vec![part("q", [3, 4], [2, 4], [0, 4])]).is_err());
    }

    #[test]
    fn makes_tables() {
        let weight =
            |source, shape: &[Extent]| Weight { name: "t".into(), ty: TensorType::plain(DType::F32, shape), source };
        let source = WeightSource::RopeTable { frequencies: vec![1.0, 0.5] };
        let rope: TensorData<f32> =
            materialize(&weight(source, &[crate::Sym::C.into(), 4.into()]), 3, &|_| None).expect("a table");
        assert_eq!(rope.values()[8..], [2f32.cos(), 1f32.cos(), 2f32.sin(), 1f32.sin()]);
        let hadamard = weight(WeightSource::Hadamard { n: 4 }, &[4.into(), 4.into()]);
        let h: TensorData<f32> = materialize(&hadamard, 0, &|_| None).expect("a matrix");
        assert_eq!(h.values()[4..8], [0.5, -0.5, 0.5, -0.5]);
    }
}
