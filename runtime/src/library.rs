//! Kernel libraries: artifacts whose entry points run on memory and in a queue of the caller.
//!
//! ```text
//! Library::open    maps and checks the artifact, loads its code           once
//! workspace_bytes  what a call needs besides its arguments                for each new size
//! launch           checks the arguments, puts the launches in the queue   each call
//! ```
//!
//! A launch allocates nothing on the device and waits for nothing: sizes go to kernels by value and so do tensor maps, which are
//! made on the host at each launch. So a launch may be captured as part of a graph, which then holds the sizes and
//! addresses of that call. On the CPU `launch` returns when it is done.
//!
//! Shapes bind the sizes ([`Entry::symbols`]); each view of each kernel is compared with the memory it is given, at the sizes of the
//! call. What is not checked, and asked of the caller, is that the memory is there and on the right device.

use crate::artifact::Artifact;
use crate::cpu::CpuDevice;
use crate::device::{Code, Device, Vendor};
use crate::error::{CallError, DeviceError, Error};
use crate::gpu::GpuFunctions;
use dsc_ir::artifact::{ArgElem, Entry, EntryArg, Header, Misfit, WORKSPACE_ALIGN};
use dsc_ir::{DType, Sym, SymValues};
use std::ffi::c_void;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// Bytes that every array must be aligned to.
pub const ARGUMENT_ALIGN: usize = 16;

/// An array of a caller.
#[derive(Clone, Copy, Debug)]
pub struct Tensor<'a> {
    /// Its first element, in the memory of the library's device.
    pub data: *mut c_void,
    /// The type of its elements; none: bytes, as pages of a cache have.
    pub dtype: Option<DType>,
    /// Its shape.
    pub shape: &'a [i64],
    /// Distances of neighbours along each dim, in elements; none: row-major and dense.
    pub strides: Option<&'a [i64]>,
}

/// A kernel library on a device.
pub struct Library {
    artifact: Artifact,
    device: Place,
}

enum Place {
    Cpu(Mutex<CpuDevice>),
    Gpu(GpuFunctions),
}

/// A call whose arguments fit.
struct Call<'a> {
    entry: &'a Entry,
    syms: SymValues,
    /// Sizes of the pieces that it is made in, but for the last.
    piece: SymValues,
    /// Parts of the workspace, and bytes of all.
    parts: Vec<u64>,
    workspace: u64,
}

/// A call's arguments from one of its pieces on.
#[derive(Clone, Copy)]
struct PieceOf<'a, 'b> {
    call: &'a Call<'a>,
    tensors: &'a [Tensor<'b>],
    workspace: *mut c_void,
    /// Pieces before.
    number: usize,
    syms: SymValues,
}

impl Library {
    /// Opens a library: on the CPU with `threads` threads (0: as many as the system grants), or on GPU `ordinal`, as its target says.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Artifact`]; [`Error::Call`] if it is a model; [`Error::Device`].
    pub fn open(path: &Path, threads: usize, ordinal: u32) -> Result<Library, Error> {
        let artifact = Artifact::open(path)?;
        let header = artifact.header();
        if header.entries.is_empty() {
            return Err(CallError::NoLibrary { path: path.to_path_buf() }.into());
        }
        let portable = if header.section("asm").is_some() { artifact.section("asm")? } else { &[] };
        let code = Code { native: artifact.section("code")?, portable };
        let device = match Vendor::of(&header.target) {
            Some(vendor) => Place::Gpu(GpuFunctions::open(vendor, ordinal, header, code)?),
            None => {
                let mut device = CpuDevice::new(threads)?;
                device.load_code(header, code)?;
                Place::Cpu(Mutex::new(device))
            }
        };
        Ok(Library { artifact, device })
    }

    /// The artifact's description.
    pub fn header(&self) -> &Header {
        self.artifact.header()
    }

    /// Whether arrays are in the memory of a GPU.
    pub fn on_gpu(&self) -> bool {
        matches!(self.device, Place::Gpu(_))
    }

    /// Bytes of the workspace that a call of operation `op` with these arguments needs. Their addresses are not looked at.
    ///
    /// # Errors
    /// [`CallError`], as [`Library::launch`].
    pub fn workspace_bytes(&self, op: &str, tensors: &[Tensor]) -> Result<u64, CallError> {
        Ok(self.call(op, tensors)?.workspace)
    }

    /// Puts a call in the queue `stream` (a `CUstream` or `hipStream_t`; null is the default one; the CPU has none). `workspace` has at least
    /// [`Library::workspace_bytes`], aligned to 256; its contents do not matter, and change.
    ///
    /// # Errors
    /// [`CallError`]: nothing was launched; of [`CallError::Device`] perhaps a part.
    ///
    /// # Safety
    /// Every tensor, of `shape` at `strides`, and the workspace must be memory of the library's device that stays until the work is
    /// done, and results must not overlap anything else. The stream is one of the GPU's primary context, and not in use by
    /// another thread.
    pub unsafe fn launch(
        &self,
        op: &str,
        tensors: &[Tensor],
        workspace: (*mut c_void, u64),
        stream: *mut c_void,
    ) -> Result<(), CallError> {
        let call = self.call(op, tensors)?;
        if call.syms.get(Sym::T) == 0 {
            return Ok(());
        }
        for (arg, tensor) in call.entry.args.iter().zip(tensors) {
            let bytes = arg.bytes(&call.syms).unwrap_or(u64::MAX);
            check_address(arg, tensor.data, bytes)?;
        }
        check_workspace(&call, workspace)?;
        let (in_pieces, once) = call.entry.launches.split_at(call.entry.pieced as usize);
        let whole = PieceOf { call: &call, tensors, workspace: workspace.0, number: 0, syms: call.syms };
        let each = call.piece.get(Sym::T);
        for number in (0..call.syms.get(Sym::T).div_ceil(each)).filter(|_| !in_pieces.is_empty()) {
            let tokens = each.min(call.syms.get(Sym::T) - number * each);
            let piece = PieceOf { number: number as usize, syms: call.syms.with(Sym::T, tokens), ..whole };
            // SAFETY: the caller vouches for the memory, of which this is a part.
            unsafe { self.launch_piece(&piece, in_pieces, stream)? };
        }
        // SAFETY: as above.
        unsafe { self.launch_piece(&whole, once, stream) }
    }

    /// # Safety
    /// As [`Library::launch`].
    unsafe fn launch_piece(
        &self,
        piece: &PieceOf,
        launches: &[dsc_ir::artifact::Launch],
        stream: *mut c_void,
    ) -> Result<(), CallError> {
        let kernels = &self.header().kernels;
        match &self.device {
            Place::Cpu(device) => {
                let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
                for launch in launches {
                    let kernel = launch.kernel as usize;
                    let places = piece.places(launch, &kernels[kernel].params)?;
                    let places: Vec<*mut u8> = places.into_iter().map(|p| p.cast()).collect();
                    // SAFETY: the caller vouches for the memory; `places` has compared every view with it.
                    unsafe { device.launch(kernel, &places, &piece.syms)? };
                }
            }
            Place::Gpu(functions) => {
                functions.enter()?;
                for launch in launches {
                    let kernel = launch.kernel as usize;
                    let places = piece.places(launch, &kernels[kernel].params)?;
                    let places = places.into_iter().map(|p| p.addr() as u64).collect();
                    // SAFETY: as above; the stream is the caller's word.
                    unsafe { functions.launch(stream, kernel, places, &piece.syms)? };
                }
            }
        }
        Ok(())
    }

    /// The first class of an operation that admits the arguments.
    fn call(&self, op: &str, tensors: &[Tensor]) -> Result<Call<'_>, CallError> {
        let entries = &self.header().entries;
        let mut refused: Option<Misfit> = None;
        for entry in entries.iter().filter(|e| e.op == op) {
            if tensors.len() != entry.args.len() {
                let wants = entry.args.iter().map(|a| a.name.as_str()).collect::<Vec<_>>().join(", ");
                return Err(CallError::Count { op: op.to_owned(), found: tensors.len(), wants });
            }
            let shapes = entry.args.iter().zip(tensors).map(|(a, t)| shape(a, t)).collect::<Result<Vec<_>, _>>()?;
            let shapes: Vec<&[u64]> = shapes.iter().map(Vec::as_slice).collect();
            match entry.symbols(&shapes) {
                Ok(syms) => {
                    let piece = entry.piece(&syms);
                    let (parts, workspace) = entry.workspace(&syms, &piece).unwrap_or((Vec::new(), u64::MAX));
                    return Ok(Call { entry, syms, piece, parts, workspace });
                }
                // Of classes that are refused for as good a reason, the last is the largest.
                Err(why) if refused.as_ref().is_none_or(|r| r.rank() <= why.rank()) => refused = Some(why),
                Err(_) => {}
            }
        }
        let known = || {
            let mut names: Vec<&str> = entries.iter().map(|e| e.op.as_str()).collect();
            names.dedup();
            CallError::NoOperation { op: op.to_owned(), known: names.join(", ") }
        };
        Err(refused.map_or_else(known, |why| CallError::Sizes { op: op.to_owned(), what: why.to_string() }))
    }
}

impl PieceOf<'_, '_> {
    /// The address of each parameter of a launch, whose view is inside the memory it is on.
    fn places(
        &self,
        launch: &dsc_ir::artifact::Launch,
        params: &[dsc_ir::artifact::ParamEntry],
    ) -> Result<Vec<*mut c_void>, CallError> {
        use dsc_ir::artifact::Arg;
        let Call { entry, piece, parts, .. } = self.call;
        let mut places = Vec::with_capacity(params.len());
        for (param, &arg) in params.iter().zip(&launch.args) {
            let before = if self.number > 0 { entry.piece_bytes(arg, piece) as usize * self.number } else { 0 };
            let start = match arg {
                Arg::Caller(i) => self.tensors.get(i as usize).map(|t| t.data),
                Arg::Workspace(i) => parts.get(i as usize).map(|&at| self.workspace.wrapping_byte_add(at as usize)),
                _ => None,
            };
            let base = start.map(|start| start.wrapping_byte_add(before));
            let fault = |what: String| DeviceError::Binding { launch: 0, node: launch.node.clone(), what };
            let missing = || fault(format!("parameter {} is bound to {arg:?}", param.name));
            let (bytes, at) = entry.buffer(arg, &self.syms).ok_or_else(missing)?;
            param.check_binding(at, bytes, &self.syms).map_err(fault)?;
            places.push(base.ok_or_else(missing)?.wrapping_byte_add(at as usize));
        }
        Ok(places)
    }
}

/// The shape of an argument as [`Entry::symbols`] takes it; its type and strides are checked.
fn shape(arg: &EntryArg, tensor: &Tensor) -> Result<Vec<u64>, CallError> {
    let fault = |what: String| CallError::Argument { name: arg.name.clone(), what };
    let wanted = match arg.elem {
        ArgElem::Plain(dtype) => Some(dtype),
        ArgElem::Pages(_) => None,
    };
    if tensor.dtype != wanted {
        let name = |d: Option<DType>| d.map_or("bytes".to_owned(), |d| d.to_string());
        return Err(fault(format!("holds {}, wants {}", name(tensor.dtype), name(wanted))));
    }
    if tensor.shape.len() != arg.shape.len() {
        return Err(fault(format!("has {} dims, wants {:?}", tensor.shape.len(), arg.shape)));
    }
    let mut shape: Vec<u64> = Vec::with_capacity(tensor.shape.len());
    for &n in tensor.shape {
        let n = u64::try_from(n).ok().filter(|&n| n <= i32::MAX as u64);
        shape.push(n.ok_or_else(|| fault(format!("has the shape {:?}", tensor.shape)))?);
    }
    let Some(strides) = tensor.strides else { return Ok(shape) };
    if strides.len() != shape.len() {
        return Err(fault(format!("has {} dims and {} strides", shape.len(), strides.len())));
    }
    let mut dense: u64 = 1;
    for d in (0..shape.len()).rev() {
        let stride = u64::try_from(strides[d]).unwrap_or(u64::MAX);
        if shape[d] > 1 && stride != dense {
            let may = d == 0 && arg.pitched() && stride > dense && stride <= i32::MAX as u64;
            if !may {
                let wants = "which is not dense in row-major order: make it contiguous";
                return Err(fault(format!("has the strides {strides:?} at {:?}, {wants}", tensor.shape)));
            }
            shape[1] = stride;
        }
        dense = dense.saturating_mul(shape[d].max(1));
    }
    Ok(shape)
}

fn check_address(arg: &EntryArg, data: *mut c_void, bytes: u64) -> Result<(), CallError> {
    let fault = |what: String| Err(CallError::Argument { name: arg.name.clone(), what });
    if bytes > 0 && data.is_null() {
        return fault("has no address".into());
    }
    if !data.addr().is_multiple_of(ARGUMENT_ALIGN) {
        return fault(format!("starts at {data:p}, which {ARGUMENT_ALIGN} bytes do not divide"));
    }
    Ok(())
}

fn check_workspace(call: &Call, (data, bytes): (*mut c_void, u64)) -> Result<(), CallError> {
    if bytes < call.workspace {
        return Err(CallError::Workspace { have: bytes, need: call.workspace });
    }
    if call.workspace > 0 && (data.is_null() || !(data.addr() as u64).is_multiple_of(WORKSPACE_ALIGN)) {
        let what = format!("is at {data:p}, wants an address that {WORKSPACE_ALIGN} divides");
        return Err(CallError::Argument { name: "workspace".into(), what });
    }
    Ok(())
}
