//! The weights of a Hugging Face folder, mapped into memory and never copied.
//!
//! A folder holds either `model.safetensors`, or shards and a `model.safetensors.index.json` that
//! says which shard holds which tensor. Headers are read and checked when the checkpoint is opened,
//! data only when it is used: opening the 163 shards of DeepSeek-V3.2 reads about 10 MB.
//!
//! The header's vocabulary (dtypes, offsets) is that of the `safetensors` crate. The walk over it
//! is ours, because the crate's own neither names the tensor at fault nor notices a name given
//! twice.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::marker::PhantomData;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::tensor::{Dtype, TensorInfo};
use serde::Deserialize;
use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, Visitor};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Largest header the format allows, in bytes.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Why a checkpoint, or a tensor of it, cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The system refused a file.
    #[error("cannot read {path}: {source}", path = .path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The folder has no weights.
    #[error("{dir} has neither {SINGLE} nor {INDEX}; give the folder of a Hugging Face checkpoint", dir = .dir.display())]
    NoWeights {
        /// The folder.
        dir: PathBuf,
    },
    /// A file breaks the format.
    #[error("{path} is damaged: {what}; download it again", path = .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong, with the tensor's name.
        what: String,
    },
    /// The checkpoint has no tensor of that name.
    #[error("the checkpoint has no tensor `{name}`{hint}", hint = did_you_mean(.similar))]
    Missing {
        /// The name asked for.
        name: String,
        /// Up to three names that look like it, the most alike first.
        similar: Vec<String>,
    },
    /// The tensor is stored in a dtype that dsc does not read.
    #[error("tensor `{name}` is stored as {dtype}; dsc reads F32, BF16, F16, F8_E4M3, I32, I64 and U8")]
    Unsupported {
        /// The tensor.
        name: String,
        /// Its dtype as the file spells it.
        dtype: String,
    },
    /// Rows were asked for that the tensor does not have.
    #[error("tensor `{name}` of shape {shape:?} has no rows {}..{}", .rows.start, .rows.end)]
    Rows {
        /// The tensor.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
        /// The rows asked for.
        rows: Range<usize>,
    },
}

fn did_you_mean(similar: &[String]) -> String {
    match similar {
        [] => String::new(),
        names => format!("; did you mean `{}`?", names.join("`, `")),
    }
}

/// How a tensor's elements are stored, little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StorageDtype {
    /// IEEE single precision.
    F32,
    /// The upper half of an F32.
    BF16,
    /// IEEE half precision.
    F16,
    /// Four exponent and three mantissa bits, no infinity (e4m3fn).
    F8E4M3,
    /// Signed 32-bit integer.
    I32,
    /// Signed 64-bit integer.
    I64,
    /// Byte.
    U8,
}

impl StorageDtype {
    /// Bytes an element.
    pub fn size(self) -> usize {
        match self {
            StorageDtype::I64 => 8,
            StorageDtype::F32 | StorageDtype::I32 => 4,
            StorageDtype::BF16 | StorageDtype::F16 => 2,
            StorageDtype::F8E4M3 | StorageDtype::U8 => 1,
        }
    }

    fn from_file(dtype: Dtype) -> Option<StorageDtype> {
        match dtype {
            Dtype::F32 => Some(StorageDtype::F32),
            Dtype::BF16 => Some(StorageDtype::BF16),
            Dtype::F16 => Some(StorageDtype::F16),
            Dtype::F8_E4M3 => Some(StorageDtype::F8E4M3),
            Dtype::I32 => Some(StorageDtype::I32),
            Dtype::I64 => Some(StorageDtype::I64),
            Dtype::U8 => Some(StorageDtype::U8),
            _ => None,
        }
    }
}

/// One tensor of a checkpoint, in the mapped file.
#[derive(Clone, Copy)]
pub struct TensorView<'a> {
    /// Name in the file.
    pub name: &'a str,
    /// Element type.
    pub dtype: StorageDtype,
    /// Sizes, outermost first; empty for a scalar.
    pub shape: &'a [usize],
    /// Row-major elements: product of `shape` times `dtype.size()` bytes, not necessarily aligned.
    pub data: &'a [u8],
}

impl fmt::Debug for TensorView<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {:?} {:?}", self.name, self.dtype, self.shape)
    }
}

impl<'a> TensorView<'a> {
    /// The bytes of rows `rows` of a tensor of shape `[rows, columns]`.
    ///
    /// # Errors
    /// [`CheckpointError::Rows`] when the tensor is not 2-D, or the range is reversed or ends past
    /// the last row.
    pub fn rows(&self, rows: Range<usize>) -> Result<&'a [u8], CheckpointError> {
        let bytes = || {
            let &[count, columns] = self.shape else {
                return None;
            };
            let row_bytes = columns.checked_mul(self.dtype.size())?;
            if rows.end > count {
                return None;
            }
            self.data.get(rows.start.checked_mul(row_bytes)?..rows.end.checked_mul(row_bytes)?)
        };
        bytes().filter(|_| rows.start <= rows.end).ok_or_else(|| CheckpointError::Rows {
            name: self.name.to_string(),
            shape: self.shape.to_vec(),
            rows: rows.clone(),
        })
    }
}

/// The tensors of a checkpoint, by name.
///
/// The files are mapped: they must not be truncated or rewritten while the checkpoint is open.
#[derive(Debug)]
pub struct Checkpoint {
    shards: Vec<Shard>,
    tensors: BTreeMap<String, Stored>,
}

/// Where a tensor lies.
#[derive(Debug)]
struct Stored {
    /// Index into `Checkpoint::shards`.
    shard: usize,
    /// Checked against the shard when it was opened.
    info: TensorInfo,
}

#[derive(Deserialize)]
struct Index {
    weight_map: UniqueMap<String>,
}

impl Checkpoint {
    /// Opens the weights in `dir`: the single file where there is one, else the shards of the
    /// index.
    ///
    /// # Errors
    /// [`CheckpointError::NoWeights`], [`CheckpointError::Io`], or [`CheckpointError::Damaged`] for
    /// a header or index that breaks the format, a missing shard, or a tensor that its shard does
    /// not hold.
    pub fn open(dir: &Path) -> Result<Checkpoint, CheckpointError> {
        let single = dir.join(SINGLE);
        if exists(&single)? {
            return Checkpoint::open_file(&single);
        }
        let index = dir.join(INDEX);
        if exists(&index)? {
            return Checkpoint::open_shards(dir, &index);
        }
        Err(CheckpointError::NoWeights { dir: dir.to_path_buf() })
    }

    /// Opens one safetensors file, whatever its name.
    ///
    /// # Errors
    /// [`CheckpointError::Io`], or [`CheckpointError::Damaged`] for a header that breaks the
    /// format.
    pub fn open_file(path: &Path) -> Result<Checkpoint, CheckpointError> {
        let (shard, header) = Shard::open(path)?;
        let tensors = header.into_iter().map(|(name, info)| (name, Stored { shard: 0, info })).collect();
        Ok(Checkpoint { shards: vec![shard], tensors })
    }

    /// Opens each shard once and takes from it the tensors that the index maps to it.
    fn open_shards(dir: &Path, index_path: &Path) -> Result<Checkpoint, CheckpointError> {
        let damaged = |what| CheckpointError::Damaged { path: index_path.to_path_buf(), what };
        let text =
            fs::read(index_path).map_err(|source| CheckpointError::Io { path: index_path.to_path_buf(), source })?;
        let index: Index = serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;

        let mut shards = Vec::new();
        let mut opened: BTreeMap<String, (usize, Header)> = BTreeMap::new();
        let mut tensors = BTreeMap::new();
        for (name, file) in index.weight_map.0 {
            if !is_plain_name(&file) {
                return Err(damaged(format!(
                    "tensor `{name}` is mapped to `{file}`, which is not the name of a file beside it"
                )));
            }
            let (shard, header) = match opened.entry(file) {
                Entry::Occupied(entry) => entry.into_mut(),
                Entry::Vacant(entry) => {
                    let path = dir.join(entry.key());
                    if !exists(&path)? {
                        return Err(damaged(format!(
                            "tensor `{name}` is mapped to `{}`, which is missing",
                            entry.key()
                        )));
                    }
                    let (shard, header) = Shard::open(&path)?;
                    shards.push(shard);
                    entry.insert((shards.len() - 1, header))
                }
            };
            let Some(info) = header.remove(&name) else {
                let path = &shards[*shard].path;
                return Err(damaged(format!(
                    "tensor `{name}` is mapped to {}, which does not hold it",
                    path.display()
                )));
            };
            tensors.insert(name, Stored { shard: *shard, info });
        }
        Ok(Checkpoint { shards, tensors })
    }

    /// The tensor called `name`.
    ///
    /// # Errors
    /// [`CheckpointError::Missing`] with similar names; [`CheckpointError::Unsupported`] for a
    /// dtype dsc does not read.
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>, CheckpointError> {
        let Some((name, stored)) = self.tensors.get_key_value(name) else {
            return Err(CheckpointError::Missing { name: name.to_string(), similar: self.similar_names(name) });
        };
        let info = &stored.info;
        let dtype = StorageDtype::from_file(info.dtype)
            .ok_or_else(|| CheckpointError::Unsupported { name: name.clone(), dtype: info.dtype.to_string() })?;
        let (start, end) = info.data_offsets;
        let data = &self.shards[stored.shard].data()[start..end];
        Ok(TensorView { name, dtype, shape: &info.shape, data })
    }

    /// Names of all tensors, in byte order.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether there is a tensor called `name`.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Bytes of all tensors together, headers excluded.
    pub fn total_bytes(&self) -> u64 {
        let bytes = |stored: &Stored| (stored.info.data_offsets.1 - stored.info.data_offsets.0) as u64;
        self.tensors.values().map(bytes).sum()
    }

    /// Up to three names that share at least half of their letters with `name` at either end.
    fn similar_names(&self, name: &str) -> Vec<String> {
        let shared = |other: &str| {
            let ahead = name.bytes().zip(other.bytes()).take_while(|(a, b)| a == b).count();
            let behind = name.bytes().rev().zip(other.bytes().rev()).take_while(|(a, b)| a == b).count();
            (ahead + behind).min(name.len()).min(other.len())
        };
        let length = |other: &str| name.len().max(other.len());
        let alike = |other: &&str| 2 * shared(other) >= length(other);
        let mut names: Vec<&str> = self.names().filter(alike).collect();
        names.sort_by_key(|other| length(other) - shared(other));
        names.into_iter().take(3).map(str::to_string).collect()
    }
}

/// One mapped file.
#[derive(Debug)]
struct Shard {
    path: PathBuf,
    map: Mmap,
    /// Where the data starts, in bytes.
    data_start: usize,
}

type Header = BTreeMap<String, TensorInfo>;

impl Shard {
    fn open(path: &Path) -> Result<(Shard, Header), CheckpointError> {
        let io = |source| CheckpointError::Io { path: path.to_path_buf(), source };
        let damaged = |what| CheckpointError::Damaged { path: path.to_path_buf(), what };
        if !fs::metadata(path).map_err(io)?.is_file() {
            return Err(damaged("it is not a regular file".to_string()));
        }
        let file = File::open(path).map_err(io)?;
        // SAFETY: the map is read-only and owned by the shard, so no slice of it outlives it. The
        // file must not be truncated or rewritten while it is mapped: touching a lost page ends the
        // process. That is asked of the caller in the docs of `Checkpoint`; files of a checkpoint
        // are installed once and not edited in place.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        let (data_start, header) = parse_header(&map).map_err(damaged)?;
        Ok((Shard { path: path.to_path_buf(), map, data_start }, header))
    }

    fn data(&self) -> &[u8] {
        &self.map[self.data_start..]
    }
}

/// Returns where the data starts, and the tensors: their offsets lie within the data and match
/// dtype and shape.
fn parse_header(file: &[u8]) -> Result<(usize, Header), String> {
    let Some((length, rest)) = file.split_first_chunk::<8>() else {
        return Err(format!("{} bytes are too few for a safetensors file", file.len()));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER_BYTES {
        return Err(format!("it declares a header of {length} bytes, at most {MAX_HEADER_BYTES} are allowed"));
    }
    let length = length as usize;
    let Some((header, data)) = rest.split_at_checked(length) else {
        return Err(format!("its header of {length} bytes runs past the end of the file, {} bytes", file.len()));
    };
    let UniqueMap(header) =
        serde_json::from_slice::<UniqueMap<TensorInfo>>(header).map_err(|error| format!("header: {error}"))?;
    check_layout(&header, data.len())?;
    Ok((8 + length, header))
}

/// Tensors must fill the data without gap or overlap.
fn check_layout(header: &Header, data_bytes: usize) -> Result<(), String> {
    let mut in_order: Vec<(&String, &TensorInfo)> = header.iter().collect();
    in_order.sort_by_key(|(_, info)| info.data_offsets);
    let mut filled = 0;
    for (name, info) in in_order {
        let (start, end) = info.data_offsets;
        let fault = |what| Err(format!("tensor `{name}`: {what}"));
        let TensorInfo { dtype, shape, .. } = info;
        let Some(bytes) = stored_bytes(info) else {
            return fault(format!("{dtype} {shape:?} is no whole number of bytes that fits in memory"));
        };
        if end.checked_sub(start) != Some(bytes) {
            return fault(format!("{dtype} {shape:?} is {bytes} bytes, but its offsets are {start}..{end}"));
        }
        if end > data_bytes {
            return fault(format!("it ends at byte {end} of the data, of which there are {data_bytes}"));
        }
        if start < filled {
            return fault(format!("it starts at byte {start} and overlaps a tensor that ends at {filled}"));
        }
        if start > filled {
            return fault(format!("it starts at byte {start} and leaves a gap from {filled}"));
        }
        filled = end;
    }
    if filled < data_bytes {
        return Err(format!("{} bytes follow the last tensor", data_bytes - filled));
    }
    Ok(())
}

/// Bytes of a tensor of this dtype and shape; `None` when they overflow or end inside a byte.
fn stored_bytes(info: &TensorInfo) -> Option<usize> {
    let bits = info.shape.iter().try_fold(info.dtype.bitsize(), |bits, size| bits.checked_mul(*size))?;
    bits.is_multiple_of(8).then_some(bits / 8)
}

fn exists(path: &Path) -> Result<bool, CheckpointError> {
    path.try_exists().map_err(|source| CheckpointError::Io { path: path.to_path_buf(), source })
}

/// Whether `file` names an entry of the folder itself on every system.
fn is_plain_name(file: &str) -> bool {
    !matches!(file, "" | "." | "..") && !file.contains(['/', '\\', ':', '\0'])
}

/// A JSON object whose keys must differ; `__metadata__`, which is no tensor, is left out.
struct UniqueMap<V>(BTreeMap<String, V>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for UniqueMap<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(UniqueMapVisitor(PhantomData))
    }
}

struct UniqueMapVisitor<V>(PhantomData<V>);

impl<'de, V: Deserialize<'de>> Visitor<'de> for UniqueMapVisitor<V> {
    type Value = UniqueMap<V>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with a tensor a key")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Self::Value, A::Error> {
        let mut map = BTreeMap::new();
        while let Some(name) = entries.next_key::<String>()? {
            if name == "__metadata__" {
                entries.next_value::<IgnoredAny>()?;
                continue;
            }
            let value = entries.next_value().map_err(|error| Error::custom(format!("tensor `{name}`: {error}")))?;
            match map.entry(name) {
                Entry::Occupied(entry) => {
                    return Err(Error::custom(format!("tensor `{}` is given twice", entry.key())));
                }
                Entry::Vacant(entry) => entry.insert(value),
            };
        }
        Ok(UniqueMap(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A safetensors file: header length, header, data.
    fn file(header: &str, data: &[u8]) -> Vec<u8> {
        let length = header.len() as u64;
        [&length.to_le_bytes(), header.as_bytes(), data].concat()
    }

    /// A folder with the given files.
    fn folder(files: &[(&str, &[u8])]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            fs::write(dir.path().join(name), bytes).unwrap();
        }
        dir
    }

    const PAIR: &str = r#"{"__metadata__": {"format": "pt"},
        "b": {"dtype": "BF16", "shape": [3, 2], "data_offsets": [4, 16]},
        "a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}"#;

    fn pair() -> Vec<u8> {
        file(PAIR, &(0..16).collect::<Vec<u8>>())
    }

    #[test]
    fn single_file() {
        let dir = folder(&[(SINGLE, &pair())]);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a", "b"]);
        assert!(checkpoint.contains("a") && !checkpoint.contains("c"));
        assert_eq!(checkpoint.total_bytes(), 16);

        let a = checkpoint.tensor("a").unwrap();
        assert_eq!((a.dtype, a.shape, a.data), (StorageDtype::F32, [].as_slice(), [0, 1, 2, 3].as_slice()));
        let b = checkpoint.tensor("b").unwrap();
        assert_eq!((b.name, b.dtype, b.shape), ("b", StorageDtype::BF16, [3, 2].as_slice()));
        assert_eq!(b.data.len(), 12);
    }

    #[test]
    fn rows_of_a_matrix() {
        let dir = folder(&[(SINGLE, &pair())]);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let b = checkpoint.tensor("b").unwrap();
        assert_eq!(b.rows(1..3).unwrap(), [8, 9, 10, 11, 12, 13, 14, 15]);
        assert_eq!(b.rows(0..3).unwrap(), b.data);
        assert!(b.rows(3..3).unwrap().is_empty());
        #[expect(clippy::reversed_empty_ranges)]
        for rows in [0..4, 4..4, 2..1, 0..usize::MAX, usize::MAX..usize::MAX] {
            let error = b.rows(rows).unwrap_err().to_string();
            assert!(error.contains("`b` of shape [3, 2] has no rows"), "{error}");
        }
        assert!(checkpoint.tensor("a").unwrap().rows(0..1).is_err());
    }

    #[test]
    fn shards() {
        let one = file(r#"{"x": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}"#, &[1, 2]);
        let index = r#"{"metadata": {"total_size": 18},
            "weight_map": {"a": "two.safetensors", "x": "one.safetensors", "b": "two.safetensors"}}"#;
        let dir = folder(&[("one.safetensors", &one), ("two.safetensors", &pair()), (INDEX, index.as_bytes())]);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a", "b", "x"]);
        assert_eq!(checkpoint.total_bytes(), 18);
        assert_eq!(checkpoint.tensor("x").unwrap().data, [1, 2]);
        assert_eq!(checkpoint.tensor("b").unwrap().data[0], 4);
    }

    #[test]
    fn missing_and_unsupported_tensors() {
        let header = r#"{
            "model.layers.3.mlp.gate.weight": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
            "model.layers.4.mlp.gate.weight": {"dtype": "F8_E5M2", "shape": [1], "data_offsets": [1, 2]},
            "lm_head.weight": {"dtype": "U8", "shape": [0], "data_offsets": [2, 2]}}"#;
        let dir = folder(&[(SINGLE, &file(header, &[0, 0]))]);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();

        let error = checkpoint.tensor("layers.4.mlp.gate.weight").unwrap_err().to_string();
        assert!(error.contains("did you mean `model.layers.4.mlp.gate.weight`, `model.layers.3"), "{error}");
        let error = checkpoint.tensor("x").unwrap_err().to_string();
        assert_eq!(error, "the checkpoint has no tensor `x`");
        let error = checkpoint.tensor("model.layers.4.mlp.gate.weight").unwrap_err().to_string();
        assert!(error.contains("gate.weight` is stored as F8_E5M2; dsc reads F32"), "{error}");
        assert!(checkpoint.tensor("lm_head.weight").unwrap().data.is_empty());
    }

    #[test]
    fn broken_files() {
        let tensor = |dtype: &str, shape: &str, offsets: &str| {
            format!(r#"{{"w": {{"dtype": "{dtype}", "shape": {shape}, "data_offsets": {offsets}}}}}"#)
        };
        let two = |a: &str, b: &str| {
            format!(
                r#"{{"a": {{"dtype": "U8", "shape": [4], "data_offsets": {a}}},
                     "b": {{"dtype": "U8", "shape": [4], "data_offsets": {b}}}}}"#
            )
        };
        let huge = u64::MAX.to_le_bytes();
        let twice = r#"{"w": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]},
                        "w": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}"#;
        #[rustfmt::skip]
        let cases: Vec<(&str, Vec<u8>)> = vec![
            ("0 bytes are too few", vec![]),
            ("7 bytes are too few", vec![0; 7]),
            ("header: EOF", vec![0; 8]),
            ("declares a header of 18446744073709551615 bytes", huge.to_vec()),
            ("header of 99 bytes runs past the end of the file, 10 bytes", [&99u64.to_le_bytes()[..], b"{}"].concat()),
            ("header: expected ident", file("not json", &[])),
            ("header: invalid type: sequence", file("[]", &[])),
            ("header: ", file("\u{1}\u{2}", &[])),
            ("header: tensor `w`: ", file(&format!(r#"{{"w": {}"#, "[".repeat(10_000)), &[])),
            ("tensor `w` is given twice", file(twice, &[])),
            ("tensor `w`: unknown variant `F7`", file(&tensor("F7", "[1]", "[0, 1]"), &[0])),
            ("tensor `w`: invalid value: integer `-1`", file(&tensor("U8", "[-1]", "[0, 1]"), &[0])),
            ("tensor `w`: invalid type: floating point", file(&tensor("U8", "[1]", "[0, 1.5]"), &[0])),
            ("tensor `w`: invalid length 1", file(&tensor("U8", "[1]", "[0]"), &[0])),
            ("tensor `w`: missing field `dtype`", file(r#"{"w": {"shape": [1], "data_offsets": [0, 1]}}"#, &[0])),
            ("tensor `w`: F32 [2] is 8 bytes, but its offsets are 0..4", file(&tensor("F32", "[2]", "[0, 4]"), &[0; 4])),
            ("tensor `w`: U8 [1] is 1 bytes, but its offsets are 1..0", file(&tensor("U8", "[1]", "[1, 0]"), &[0])),
            ("tensor `w`: F4 [3] is no whole number of bytes", file(&tensor("F4", "[3]", "[0, 2]"), &[0; 2])),
            ("is no whole number of bytes that fits", file(&tensor("U8", "[4294967296, 4294967296]", "[0, 0]"), &[])),
            ("tensor `w`: it ends at byte 4 of the data, of which there are 3", file(&tensor("U8", "[4]", "[0, 4]"), &[0; 3])),
            ("tensor `b`: it starts at byte 2 and overlaps", file(&two("[0, 4]", "[2, 6]"), &[0; 6])),
            ("tensor `b`: it starts at byte 0 and overlaps", file(&two("[0, 4]", "[0, 4]"), &[0; 4])),
            ("tensor `b`: it starts at byte 5 and leaves a gap from 4", file(&two("[0, 4]", "[5, 9]"), &[0; 9])),
            ("1 bytes follow the last tensor", file(&two("[0, 4]", "[4, 8]"), &[0; 9])),
        ];
        for (expected, bytes) in cases {
            let dir = folder(&[(SINGLE, &bytes)]);
            let error = Checkpoint::open(dir.path()).unwrap_err();
            assert!(matches!(error, CheckpointError::Damaged { .. }), "{error}");
            let error = error.to_string();
            assert!(error.contains(expected), "`{error}` lacks `{expected}`");
            assert!(error.contains(SINGLE), "{error}");
        }
    }

    #[test]
    fn broken_indices() {
        #[rustfmt::skip]
        let cases = [
            ("EOF", ""),
            ("missing field `weight_map`", "{}"),
            ("invalid type: sequence", r#"{"weight_map": []}"#),
            ("tensor `a`: invalid type: integer", r#"{"weight_map": {"a": 1}}"#),
            ("tensor `a` is given twice", r#"{"weight_map": {"a": "s.safetensors", "a": "t.safetensors"}}"#),
            ("`a` is mapped to `../s.safetensors`, which is not the name", r#"{"weight_map": {"a": "../s.safetensors"}}"#),
            ("`/etc/passwd`, which is not the name", r#"{"weight_map": {"a": "/etc/passwd"}}"#),
            ("`..`, which is not the name", r#"{"weight_map": {"a": ".."}}"#),
            ("``, which is not the name", r#"{"weight_map": {"a": ""}}"#),
            (r"`x\s`, which is not the name", r#"{"weight_map": {"a": "x\\s"}}"#),
            ("which is not the name", r#"{"weight_map": {"a": "x\u0000"}}"#),
            ("`a` is mapped to `t.safetensors`, which is missing", r#"{"weight_map": {"a": "t.safetensors"}}"#),
            ("tensor `c` is mapped to", r#"{"weight_map": {"c": "s.safetensors"}}"#),
            ("s.safetensors, which does not hold it", r#"{"weight_map": {"c": "s.safetensors"}}"#),
        ];
        for (expected, index) in cases {
            let dir = folder(&[("s.safetensors", &pair()), (INDEX, index.as_bytes())]);
            let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
            assert!(error.contains(expected), "`{error}` lacks `{expected}`");
            assert!(error.contains(INDEX), "{error}");
        }
    }

    #[test]
    fn broken_shards_and_folders() {
        let index = r#"{"weight_map": {"a": "s.safetensors"}}"#;
        let dir = folder(&[("s.safetensors", &pair()[..100]), (INDEX, index.as_bytes())]);
        let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("s.safetensors is damaged: its header"), "{error}");

        let dir = folder(&[]);
        let error = Checkpoint::open(dir.path()).unwrap_err();
        assert!(matches!(error, CheckpointError::NoWeights { .. }), "{error}");
        assert!(Checkpoint::open(&dir.path().join("none")).is_err());
        let error = Checkpoint::open_file(&dir.path().join("none")).unwrap_err();
        assert!(matches!(error, CheckpointError::Io { .. }) && error.to_string().contains("none"), "{error}");

        fs::create_dir(dir.path().join(SINGLE)).unwrap();
        let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("not a regular file"), "{error}");
    }
}
