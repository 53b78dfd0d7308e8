//! Weights as the kernels read them, made from the tensors of a checkpoint, or made up.
//!
//! [`Weights`] says where each weight's bytes come from: `pieces` of about a megabyte that are dequantised,
//! converted, stacked, copied or computed, each by itself. A device with memory of its own streams them there. For the host
//! they are [made](Weights::make) once, by all threads, in one allocation; a weight that is one whole tensor in the wanted element
//! type then stays where it is, in the mapped file.

mod pieces;
mod random;

pub(crate) use pieces::{Filler, Piece, Work};
pub(crate) use random::Block;

use crate::checkpoint::{Checkpoint, StorageDtype, TensorView};
use crate::error::WeightError;
use dsc_ir::DType;
use dsc_ir::artifact::{SCALE_ALIGN, TensorPart, WeightEntry, WeightSource};
use dsc_ir::graph::{Elem, Weight};
use memmap2::MmapMut;
use random::Random;
use std::ops::Range;
use std::sync::Arc;

/// Bytes of a weight that one piece has, about.
const PIECE_BYTES: usize = 1 << 20;
/// Distance of made weights: what vector loads and DMA engines like.
const PLACE_ALIGN: u64 = 256;

/// The weights of a model.
pub struct Weights {
    entries: Vec<WeightEntry>,
    source: Source,
    context_rows: u32,
    /// Bytes of each.
    sizes: Vec<u64>,
    host: Option<Host>,
}

/// What weights are made of.
enum Source {
    Checkpoint(Arc<Checkpoint>),
    Random(Random),
}

/// Weights in host memory.
struct Host {
    made: MmapMut,
    places: Vec<Place>,
}

/// Where a weight is.
enum Place {
    /// In the checkpoint's mapped file: the tensor's name.
    File(String),
    /// In `Host::made`.
    Made(Range<usize>),
}

fn too_large(bytes: u64, reason: &str) -> WeightError {
    WeightError::Memory { bytes, reason: reason.to_string() }
}

impl Weights {
    /// The weights of an artifact, none of them made yet; rope tables have `context_rows` rows.
    ///
    /// # Errors
    /// The first problem of [`check`]; [`WeightError::Memory`] if a size overflows.
    pub fn open(
        entries: &[WeightEntry],
        checkpoint: &Arc<Checkpoint>,
        context_rows: u32,
    ) -> Result<Weights, WeightError> {
        if let Some(problem) = check(entries, checkpoint).into_iter().next() {
            return Err(problem);
        }
        Weights::of(entries, Source::Checkpoint(Arc::clone(checkpoint)), context_rows)
    }

    /// Made-up weights for measurements: matrices of variance 1/columns, gains near one, biases near zero, all of them the same
    /// for the same `seed` and name; rope tables (of `context_rows` rows) and Hadamard matrices are the true ones.
    ///
    /// # Errors
    /// [`WeightError::Memory`] if a size overflows.
    pub fn random(entries: &[WeightEntry], seed: u64, context_rows: u32) -> Result<Weights, WeightError> {
        Weights::of(entries, Source::Random(Random::new(entries, seed)), context_rows)
    }

    fn of(entries: &[WeightEntry], source: Source, context_rows: u32) -> Result<Weights, WeightError> {
        let size = |e: &WeightEntry| e.bytes(context_rows).ok_or_else(|| too_large(u64::MAX, "the size overflows"));
        let sizes: Vec<u64> = entries.iter().map(size).collect::<Result<_, _>>()?;
        let padded = |n: &u64| n.checked_next_multiple_of(PLACE_ALIGN);
        if sizes.iter().try_fold(0u64, |sum, n| sum.checked_add(padded(n)?)).is_none() {
            return Err(too_large(u64::MAX, "the size overflows"));
        }
        Ok(Weights { entries: entries.to_vec(), source, context_rows, sizes, host: None })
    }

    /// Opens the weights of an artifact and makes them in host memory, on `threads` threads. `progress` is told the bytes
    /// made and the bytes to make.
    ///
    /// # Errors
    /// As [`Weights::open`] and [`Weights::make`].
    pub fn load(
        entries: &[WeightEntry],
        checkpoint: &Arc<Checkpoint>,
        context_rows: u32,
        threads: usize,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Weights, WeightError> {
        let mut weights = Weights::open(entries, checkpoint, context_rows)?;
        weights.make(threads, progress)?;
        Ok(weights)
    }

    /// Makes the weights in host memory, on `threads` threads, but for those that can be read in the mapped files. `progress` is
    /// told the bytes made and the bytes to make.
    ///
    /// # Errors
    /// [`WeightError::Memory`].
    pub fn make(&mut self, threads: usize, progress: &(dyn Fn(u64, u64) + Sync)) -> Result<(), WeightError> {
        let (mut places, mut end) = (Vec::with_capacity(self.len()), 0u64);
        for (entry, bytes) in self.entries.iter().zip(&self.sizes) {
            if let Some(view) = self.whole_tensor(entry) {
                places.push(Place::File(view.name.to_string()));
                continue;
            }
            let start = end.next_multiple_of(PLACE_ALIGN);
            end = start + bytes;
            places.push(Place::Made(start as usize..end as usize));
        }
        let mut made = MmapMut::map_anon((end as usize).max(1)).map_err(|e| too_large(end, &e.to_string()))?;
        #[cfg(target_os = "linux")]
        let _ = made.advise(memmap2::Advice::HugePage); // only speed
        let of = |(i, place): (usize, &Place)| match place {
            Place::Made(range) => self.pieces(i).into_iter().map(|p| (range.start + p.at, p)).collect(),
            Place::File(_) => Vec::new(),
        };
        let pieces: Vec<(usize, Piece<'_>)> = places.iter().enumerate().flat_map(of).collect();
        let total = pieces.iter().map(|(_, p)| p.bytes as u64).sum();
        Filler::new(threads, total, progress).fill_zeros(&mut made, pieces.into_iter());
        self.host = Some(Host { made, places });
        Ok(())
    }

    /// The bytes of a weight in host memory; none before they are [made](Weights::make).
    pub fn bytes(&self, index: usize) -> &[u8] {
        let Some(host) = &self.host else { return &[] };
        match (&host.places[index], &self.source) {
            (Place::Made(range), _) => &host.made[range.clone()],
            (Place::File(name), Source::Checkpoint(checkpoint)) => {
                checkpoint.tensor(name).map_or(&[], |view| view.data)
            }
            (Place::File(_), Source::Random(_)) => &[],
        }
    }

    /// Number of weights.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Rows of rope tables: the longest context that can be served.
    pub fn context_rows(&self) -> u32 {
        self.context_rows
    }

    /// Whether they are in host memory.
    pub fn is_made(&self) -> bool {
        self.host.is_some()
    }

    /// Bytes of a weight.
    pub fn weight_bytes(&self, index: usize) -> u64 {
        self.sizes[index]
    }

    /// Bytes of all weights.
    pub fn total_bytes(&self) -> u64 {
        self.sizes.iter().sum()
    }

    /// Bytes that are not in the checkpoint's files but in host memory of their own.
    pub fn made_bytes(&self) -> u64 {
        self.host.as_ref().map_or(0, |host| host.made.len() as u64)
    }

    /// The tensor that is the weight as it is, if there is one.
    fn whole_tensor(&self, entry: &WeightEntry) -> Option<TensorView<'_>> {
        match &self.source {
            Source::Checkpoint(checkpoint) => whole_tensor(entry, checkpoint),
            Source::Random(_) => None,
        }
    }

    /// What a weight is made of, in order of place. Bytes between pieces are padding.
    pub(crate) fn pieces(&self, index: usize) -> Vec<Piece<'_>> {
        let entry = &self.entries[index];
        let mut cut = pieces::Cutter::default();
        match (&entry.source, &self.source) {
            (WeightSource::RopeTable { frequencies }, _) => {
                cut.rows(self.context_rows as usize, 8 * frequencies.len(), |row| Work::Rope(frequencies, row));
            }
            (WeightSource::Hadamard { n }, _) => {
                let Elem::Plain(dtype) = entry.elem else { unreachable!("`Header::check` rules it out") };
                let bytes = *n as usize * dtype.bytes();
                cut.rows(*n as usize, bytes, |row| Work::Hadamard(*n, row, dtype));
            }
            (WeightSource::Tensors(_), Source::Random(random)) => random.cut(entry, &mut cut),
            (WeightSource::Tensors(specs), Source::Checkpoint(checkpoint)) => match whole_tensor(entry, checkpoint) {
                Some(view) => cut.rows(view.data.len(), 1, |at| Work::Bytes(&view.data[at..])),
                None => cut_parts(entry, specs, checkpoint, &mut cut),
            },
        }
        cut.pieces
    }
}

impl std::fmt::Debug for Weights {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} weights of {} bytes, {} made", self.len(), self.total_bytes(), self.made_bytes())
    }
}

/// Cuts a weight that is stacked from parts of tensors.
fn cut_parts<'a>(
    entry: &WeightEntry,
    specs: &'a [TensorPart],
    checkpoint: &'a Checkpoint,
    cut: &mut pieces::Cutter<'a>,
) {
    let find = |spec| Part::find(entry, spec, checkpoint).expect("found when the weights were opened");
    let parts: Vec<Part<'a>> = specs.iter().map(find).collect();
    for &part in &parts {
        match entry.elem {
            Elem::Plain(dtype) if dtype != DType::I32 => {
                let bytes = part.columns() * dtype.bytes();
                cut.rows(part.rows(), bytes, |row| Work::Convert(part, row, dtype));
            }
            _ => {
                let bytes = part.columns() * part.view.dtype.size();
                cut.rows(part.rows(), bytes, |row| Work::Copy(part, row));
            }
        }
    }
    if let Elem::Quant(quant) = entry.elem {
        cut.align(SCALE_ALIGN as usize);
        for &part in &parts {
            let blocks = part.rows().div_ceil(quant.block[0] as usize);
            let bytes = 4 * part.columns().div_ceil(quant.block[1] as usize);
            cut.push(blocks * bytes, Work::Scales(part, quant));
        }
    }
}

/// Compares every tensor that `entries` name with the checkpoint's headers, without touching data. Entries are ones that
/// passed [`Header::check`](dsc_ir::artifact::Header::check).
pub fn check(entries: &[WeightEntry], checkpoint: &Checkpoint) -> Vec<WeightError> {
    let mut problems = Vec::new();
    for entry in entries {
        if let WeightSource::Tensors(parts) = &entry.source {
            problems.extend(parts.iter().filter_map(|part| Part::find(entry, part, checkpoint).err()));
        }
    }
    problems
}

/// Whether bf16 holds every matrix that `weights` name exactly: stored in bf16, or in e4m3 with power-of-two scales. False for
/// tensors that are not there.
pub fn bf16_exact(weights: &[Weight], checkpoint: &Checkpoint) -> bool {
    let matrices = weights.iter().filter(|w| w.ty.shape.len() >= 2);
    matrices.filter_map(|w| parts_of(&w.source)).flatten().all(|part| part_is_bf16_exact(part, checkpoint))
}

/// Finds a weight that would be rounded on its way to bf16, which an artifact of exact numerics must not do.
///
/// # Errors
/// The first problem of [`check`]; then [`WeightError::Rounded`].
pub fn check_exact(entries: &[WeightEntry], checkpoint: &Checkpoint) -> Result<(), WeightError> {
    // Of a tensor that is missing or of another shape nothing can be said, least of all this.
    if let Some(problem) = check(entries, checkpoint).into_iter().next() {
        return Err(problem);
    }
    for entry in entries.iter().filter(|e| e.elem == Elem::Plain(DType::Bf16)) {
        for part in parts_of(&entry.source).into_iter().flatten() {
            if !part_is_bf16_exact(part, checkpoint) {
                return Err(WeightError::Rounded { weight: entry.name.clone(), tensor: part.tensor.clone() });
            }
        }
    }
    Ok(())
}

fn parts_of(source: &WeightSource) -> Option<&[TensorPart]> {
    match source {
        WeightSource::Tensors(parts) => Some(parts),
        WeightSource::RopeTable { .. } | WeightSource::Hadamard { .. } => None,
    }
}

fn part_is_bf16_exact(part: &TensorPart, checkpoint: &Checkpoint) -> bool {
    let Ok(view) = checkpoint.tensor(&part.tensor) else { return false };
    let scales = || part.scale.as_ref().and_then(|name| checkpoint.tensor(name).ok());
    match view.dtype {
        StorageDtype::BF16 => true,
        StorageDtype::F8E4M3 => scales().is_some_and(|s| {
            // A normal power of two has no mantissa; far from the ends of the range no product is subnormal.
            let plain = |b: &[u8]| {
                let bits = u32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                bits & 0x7f_ffff == 0 && (64..192).contains(&(bits >> 23))
            };
            s.dtype == StorageDtype::F32 && s.data.chunks_exact(4).all(plain)
        }),
        _ => false,
    }
}

/// A part of a weight, found in the checkpoint and compared with it.
#[derive(Clone, Copy)]
pub(crate) struct Part<'a> {
    spec: &'a TensorPart,
    view: TensorView<'a>,
    /// Scales, if the stored tensor has some: their bytes.
    scales: Option<&'a [u8]>,
}

impl<'a> Part<'a> {
    fn find(entry: &WeightEntry, spec: &'a TensorPart, checkpoint: &'a Checkpoint) -> Result<Part<'a>, WeightError> {
        let tensor = |name: &str| {
            checkpoint.tensor(name).map_err(|source| WeightError::Tensor { weight: entry.name.clone(), source })
        };
        let view = tensor(&spec.tensor)?;
        if matrix_shape(view.shape) != spec.shape.map(|n| n as usize) {
            return Err(WeightError::Shape {
                weight: entry.name.clone(),
                tensor: spec.tensor.clone(),
                expected: spec.shape,
                found: view.shape.to_vec(),
            });
        }
        let makes = match entry.elem {
            Elem::Quant(_) => view.dtype == StorageDtype::F8E4M3,
            Elem::Plain(DType::I32) => view.dtype == StorageDtype::I32,
            Elem::Plain(_) => !matches!(view.dtype, StorageDtype::I32 | StorageDtype::I64 | StorageDtype::U8),
        };
        if !makes {
            return Err(WeightError::Dtype {
                weight: entry.name.clone(),
                tensor: spec.tensor.clone(),
                found: view.dtype,
                wanted: match entry.elem {
                    Elem::Plain(dtype) => dtype.to_string(),
                    Elem::Quant(quant) => format!("e4m3 with scales for blocks of {:?}", quant.block),
                },
            });
        }
        let mut scales = None;
        if view.dtype == StorageDtype::F8E4M3 {
            let Some(name) = &spec.scale else {
                return Err(WeightError::NoScale { weight: entry.name.clone(), tensor: spec.tensor.clone() });
            };
            let scale = tensor(name)?;
            let expected = [0, 1].map(|d| spec.shape[d].div_ceil(spec.scale_block[d].max(1)));
            if scale.dtype != StorageDtype::F32 || matrix_shape(scale.shape) != expected.map(|n| n as usize) {
                return Err(WeightError::Scale {
                    weight: entry.name.clone(),
                    scale: name.clone(),
                    found: scale.dtype,
                    shape: scale.shape.to_vec(),
                    expected,
                    block: spec.scale_block,
                });
            }
            scales = Some(scale.data);
        }
        Ok(Part { spec, view, scales })
    }

    fn rows(&self) -> usize {
        (self.spec.rows[1] - self.spec.rows[0]) as usize
    }

    fn columns(&self) -> usize {
        (self.spec.cols[1] - self.spec.cols[0]) as usize
    }

    /// Bytes of the part's columns in its row `row`.
    fn row(&self, row: usize) -> &'a [u8] {
        let size = self.view.dtype.size();
        let start = (self.spec.rows[0] as usize + row) * self.spec.shape[1] as usize + self.spec.cols[0] as usize;
        &self.view.data[start * size..(start + self.columns()) * size]
    }

    /// The scale of block `(row, column)` of the stored tensor.
    fn scale(&self, row: usize, column: usize) -> f32 {
        let across = self.spec.shape[1].div_ceil(self.spec.scale_block[1]) as usize;
        self.scales.map_or(1.0, |bytes| f32_at(bytes, row * across + column))
    }

    /// Row `row` of the part in f32, dequantised.
    fn row_f32(&self, row: usize, out: &mut Vec<f32>, codes: &[f32; 256]) {
        let bytes = self.row(row);
        out.clear();
        match self.view.dtype {
            StorageDtype::F32 => out.extend((0..self.columns()).map(|i| f32_at(bytes, i))),
            StorageDtype::BF16 => {
                out.extend(bytes.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32()))
            }
            StorageDtype::F16 => {
                out.extend(bytes.chunks_exact(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32()))
            }
            StorageDtype::F8E4M3 => {
                let [block_rows, block_columns] = self.spec.scale_block.map(|n| n as usize);
                let scale_row = (self.spec.rows[0] as usize + row) / block_rows;
                let mut column = self.spec.cols[0] as usize;
                let mut rest = bytes;
                while !rest.is_empty() {
                    let (block, after) = rest.split_at(rest.len().min(block_columns - column % block_columns));
                    let scale = self.scale(scale_row, column / block_columns);
                    out.extend(block.iter().map(|&code| codes[code as usize] * scale));
                    (column, rest) = (column + block.len(), after);
                }
            }
            StorageDtype::I32 | StorageDtype::I64 | StorageDtype::U8 => unreachable!("`find` rules integers out"),
        }
    }
}

/// Rows and columns of a stored shape: all but the last dim are rows.
fn matrix_shape(shape: &[usize]) -> [usize; 2] {
    match shape.split_last() {
        None => [1, 1],
        Some((&columns, rows)) => [rows.iter().product(), columns],
    }
}

fn f32_at(bytes: &[u8], i: usize) -> f32 {
    f32::from_le_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]])
}

/// The tensor that is the weight as it is, if there is one.
fn whole_tensor<'a>(entry: &WeightEntry, checkpoint: &'a Checkpoint) -> Option<TensorView<'a>> {
    let (WeightSource::Tensors(parts), Elem::Plain(dtype)) = (&entry.source, entry.elem) else { return None };
    let [part] = &parts[..] else { return None };
    let view = checkpoint.tensor(&part.tensor).ok()?;
    let whole = part.rows == [0, part.shape[0]] && part.cols == [0, part.shape[1]];
    let same = matches!(
        (view.dtype, dtype),
        (StorageDtype::F32, DType::F32)
            | (StorageDtype::BF16, DType::Bf16)
            | (StorageDtype::F16, DType::F16)
            | (StorageDtype::I32, DType::I32)
    );
    let aligned = view.data.as_ptr().addr().is_multiple_of(dtype.bytes());
    (whole && same && aligned && cfg!(target_endian = "little")).then_some(view)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{RawTensor, part, write_tensors};
    use dsc_ir::graph::Quant;

    fn f32s(values: impl IntoIterator<Item = f32>) -> Vec<u8> {
        values.into_iter().flat_map(f32::to_le_bytes).collect()
    }

    fn entry(name: &str, shape: &[u32], elem: Elem, source: WeightSource) -> WeightEntry {
        WeightEntry { name: name.into(), shape: shape.to_vec(), elem, source }
    }

    fn scaled(tensor: &str, shape: [u32; 2], block: [u32; 2]) -> TensorPart {
        TensorPart { scale: Some(format!("{tensor}_scale_inv")), scale_block: block, ..part(tensor, shape) }
    }

    fn load(tensors: &[RawTensor<'_>], entries: &[WeightEntry], threads: usize) -> Result<Weights, WeightError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        write_tensors(&path, tensors);
        let checkpoint = Arc::new(Checkpoint::open(dir.path()).unwrap());
        Weights::load(entries, &checkpoint, 5, threads, &|done, total| assert!(done <= total))
    }

    fn floats(bytes: &[u8]) -> Vec<f32> {
        (0..bytes.len() / 4).map(|i| f32_at(bytes, i)).collect()
    }

    const F32: Elem = Elem::Plain(DType::F32);

    #[test]
    fn whole_tensors_stay_in_the_file() {
        let tensors = [("a", "F32", &[2, 2][..], f32s([1.0, 2.0, 3.0, 4.0]))];
        let tensors_of = |rows| WeightSource::Tensors(vec![TensorPart { rows, ..part("a", [2, 2]) }]);
        let entries = [
            entry("whole", &[2, 2], F32, tensors_of([0, 2])),
            entry("row", &[1, 2], F32, tensors_of([1, 2])),
            entry("half", &[2, 2], Elem::Plain(DType::Bf16), tensors_of([0, 2])),
        ];
        let weights = load(&tensors, &entries, 1).unwrap();
        assert!(matches!(weights.host.as_ref().unwrap().places[..], [Place::File(_), Place::Made(_), Place::Made(_)]));
        assert_eq!(floats(weights.bytes(0)), [1.0, 2.0, 3.0, 4.0]);
        assert_eq!(floats(weights.bytes(1)), [3.0, 4.0]);
        assert_eq!(weights.bytes(2), [0x80, 0x3f, 0x00, 0x40, 0x40, 0x40, 0x80, 0x40]);
    }

    #[test]
    fn fp8_is_dequantised_by_blocks_and_stacked() {
        // 3 x 5 codes of 1.0 with 2 x 2 blocks; columns 1..4 of rows 1..3, under a row in f16.
        let tensors = [
            ("q", "F8_E4M3", &[3, 5][..], vec![0x38; 15]),
            ("q_scale_inv", "F32", &[2, 3][..], f32s([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])),
            (
                "h",
                "F16",
                &[3][..],
                [0.5f32, -1.0, 2.0].iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()).collect(),
            ),
        ];
        let q = TensorPart { rows: [1, 3], cols: [1, 4], ..scaled("q", [3, 5], [2, 2]) };
        let entries = [entry("w", &[3, 3], F32, WeightSource::Tensors(vec![part("h", [1, 3]), q]))];
        for threads in [1, 3] {
            let weights = load(&tensors, &entries, threads).unwrap();
            assert_eq!(floats(weights.bytes(0)), [0.5, -1.0, 2.0, 1.0, 2.0, 2.0, 4.0, 5.0, 5.0]);
        }
    }

    #[test]
    fn quantised_weights_keep_codes_and_scales() {
        let codes: Vec<u8> = (0..24).collect();
        let tensors = [
            ("q", "F8_E4M3", &[4, 6][..], codes.clone()),
            ("q_scale_inv", "F32", &[2, 3][..], f32s([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])),
        ];
        let elem = Elem::Quant(Quant { block: [2, 2], pow2: false });
        let whole = scaled("q", [4, 6], [2, 2]);
        let lower = TensorPart { rows: [2, 4], cols: [2, 6], ..whole.clone() };
        let entries = [
            entry("twice", &[2, 4, 6], elem, WeightSource::Tensors(vec![whole.clone(), whole])),
            entry("lower", &[2, 4], elem, WeightSource::Tensors(vec![lower])),
        ];
        let weights = load(&tensors, &entries, 2).unwrap();
        let twice = weights.bytes(0);
        assert_eq!((&twice[..24], &twice[24..48], twice.len()), (&codes[..], &codes[..], 256 + 48));
        assert_eq!(floats(&twice[256..]), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let lower = weights.bytes(1);
        assert_eq!(&lower[..8], [14, 15, 16, 17, 20, 21, 22, 23]);
        assert_eq!(floats(&lower[256..]), [5.0, 6.0]);
    }

    #[test]
    fn tables_are_computed() {
        let frequencies = vec![1.0, 0.3];
        let entries = [
            entry("rope", &[0, 4], F32, WeightSource::RopeTable { frequencies }),
            entry("hadamard", &[4, 4], F32, WeightSource::Hadamard { n: 4 }),
        ];
        let weights = load(&[("x", "U8", &[1], vec![0])], &entries, 2).unwrap();
        let rope = floats(weights.bytes(0));
        assert_eq!(rope.len(), 20);
        assert_eq!(&rope[..4], [1.0, 1.0, 0.0, 0.0]);
        let angle = f64::from(4.0 * 0.3f32);
        assert_eq!(&rope[16..], [4f64.cos() as f32, angle.cos() as f32, 4f64.sin() as f32, angle.sin() as f32]);
        let h = floats(weights.bytes(1));
        assert_eq!(&h[4..12], [0.5, -0.5, 0.5, -0.5, 0.5, 0.5, -0.5, -0.5]);
    }

    #[test]
    fn many_jobs_give_the_same_bytes() {
        let values: Vec<f32> = (0..700_000).map(|i| (i as f32).sin()).collect();
        let tensors = [("a", "F32", &[700, 1000][..], f32s(values.iter().copied()))];
        let entries =
            [entry("a", &[700, 1000], Elem::Plain(DType::F16), WeightSource::Tensors(vec![part("a", [700, 1000])]))];
        let expected: Vec<u8> = values.iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()).collect();
        for threads in [1, 4] {
            assert!(load(&tensors, &entries, threads).unwrap().bytes(0) == expected);
        }
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let tensors = [
            ("a", "F32", &[2, 2][..], f32s([0.0; 4])),
            ("q", "F8_E4M3", &[2, 2][..], vec![0; 4]),
            ("s", "F8_E4M3", &[2, 2][..], vec![0; 4]),
            ("s_scale_inv", "F32", &[2, 1][..], f32s([0.0; 2])),
            ("i", "I32", &[2, 2][..], vec![0; 16]),
        ];
        let quant = Elem::Quant(Quant { block: [128, 128], pow2: false });
        let error = |part: TensorPart, elem| {
            load(&tensors, &[entry("w", &[2, 2], elem, WeightSource::Tensors(vec![part]))], 1)
                .map_err(|e| e.to_string())
                .unwrap_err()
        };
        let has = |text: String, words: &str| assert!(text.starts_with("weight w: ") && text.contains(words), "{text}");
        has(error(part("b", [2, 2]), F32), "no tensor `b`");
        has(error(part("a", [2, 3]), F32), "`a` has shape [2, 2], the artifact expects [2, 3]");
        has(error(part("i", [2, 2]), F32), "`i` is stored as I32, of which f32 cannot be made");
        has(error(scaled("a", [2, 2], [128, 128]), quant), "`a` is stored as F32, of which e4m3 with scales");
        has(error(part("q", [2, 2]), F32), "knows no scales");
        has(error(scaled("q", [2, 2], [128, 128]), F32), "no tensor `q_scale_inv`");
        has(error(scaled("s", [2, 2], [128, 128]), F32), "`s_scale_inv` are F32 [2, 1], expected F32 [1, 1]");
    }
}
