//! The C interface of kernel libraries; `capi/include/dsc.h` is made of this file.
//!
//! **Invariants.** No panic crosses the boundary, and every function that can fail returns a [`DscStatus`] and keeps a message for
//! its thread. Pointers are the caller's word; everything that they point to is checked as far as it can be.

use dsc_ir::DType;
use dsc_runtime::library::Tensor;
use dsc_runtime::{CallError, Error, Library};
use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// What a function returns.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DscStatus {
    /// Done.
    Ok = 0,
    /// A pointer is null, a number is out of range, or a text is no UTF-8.
    Misuse = 1,
    /// The artifact cannot be read, or is damaged, or is no kernel library.
    Artifact = 2,
    /// There is no device for it, or the device refused.
    Device = 3,
    /// There is no such operation.
    NoOperation = 4,
    /// An argument has the wrong type, shape, strides, alignment or address.
    Argument = 5,
    /// The arguments' sizes do not fit together, or are beyond what was compiled.
    Sizes = 6,
    /// The workspace is too small.
    Workspace = 7,
    /// A bug of dsc.
    Internal = 8,
}

/// Types of elements.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DscType {
    /// Bytes: pages of a cache.
    Bytes = 0,
    /// 32-bit float.
    F32 = 1,
    /// bfloat16.
    Bf16 = 2,
    /// IEEE half.
    F16 = 3,
    /// 8-bit float e4m3 (finite, with NaN).
    E4m3 = 4,
    /// 32-bit integer.
    I32 = 5,
}

/// An array. Its memory is that of the library's device, aligned to 16 bytes, and stays the caller's.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct DscTensor {
    /// The first element.
    pub data: *mut c_void,
    /// A DscType.
    pub type_: u32,
    /// Dims: at most 8.
    pub rank: u32,
    /// Size of each dim.
    pub shape: *const i64,
    /// Distance of neighbours along each dim, in elements; null: row-major and dense.
    pub strides: *const i64,
}

/// A kernel library on a device. Any number of threads may use it at once.
pub struct DscLibrary {
    library: Library,
    description: CString,
}

thread_local! {
    static MESSAGE: RefCell<CString> = RefCell::default();
}

fn fail(status: DscStatus, message: impl std::fmt::Display) -> DscStatus {
    let text: String = message.to_string().chars().filter(|&c| c != '\0').collect();
    MESSAGE.with(|m| *m.borrow_mut() = CString::new(text).unwrap_or_default());
    status
}

/// Runs `body`; a panic is a bug, and not the caller's.
fn guarded(body: impl FnOnce() -> Result<(), DscStatus>) -> DscStatus {
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => DscStatus::Ok,
        Ok(Err(status)) => status,
        Err(_) => fail(DscStatus::Internal, "dsc failed inside: a bug; its message is on stderr"),
    }
}

fn misuse(what: &str) -> DscStatus {
    fail(DscStatus::Misuse, what)
}

fn refused(error: CallError) -> DscStatus {
    let status = match &error {
        CallError::NoLibrary { .. } => DscStatus::Artifact,
        CallError::NoOperation { .. } => DscStatus::NoOperation,
        CallError::Count { .. } | CallError::Argument { .. } => DscStatus::Argument,
        CallError::Sizes { .. } => DscStatus::Sizes,
        CallError::Workspace { .. } => DscStatus::Workspace,
        CallError::Device(_) => DscStatus::Device,
        _ => DscStatus::Internal,
    };
    fail(status, error)
}

/// # Safety
/// A text that ends in a zero, or null.
unsafe fn text<'a>(pointer: *const c_char, what: &str) -> Result<&'a str, DscStatus> {
    if pointer.is_null() {
        return Err(misuse(&format!("{what} is null")));
    }
    // SAFETY: not null; the caller vouches for the rest.
    unsafe { CStr::from_ptr(pointer) }.to_str().map_err(|_| misuse(&format!("{what} is not UTF-8")))
}

/// What went wrong in the last call of this thread that did not return DSC_STATUS_OK: what it is about, and what to do. The text is
/// valid until the next such call.
#[unsafe(no_mangle)]
pub extern "C" fn dsc_message() -> *const c_char {
    MESSAGE.with(|m| m.borrow().as_ptr())
}

/// Opens a kernel library that `dsc compile --kernels` wrote. One for a GPU is loaded on GPU `device`, as the CUDA driver counts, in
/// its primary context, which is the one of CUDA's runtime; one for the CPU runs on as many threads as `threads` says (0: as many
/// as the system grants).
///
/// # Safety
/// `path` is a text, `library` a place for a pointer. The file stays as it is while the library is open.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dsc_library_open(
    path: *const c_char,
    device: u32,
    threads: u32,
    library: *mut *mut DscLibrary,
) -> DscStatus {
    guarded(|| {
        if library.is_null() {
            return Err(misuse("library is null"));
        }
        // SAFETY: the caller's word.
        let path = unsafe { text(path, "path") }?;
        let opened = Library::open(Path::new(path), threads as usize, device).map_err(|e| match e {
            Error::Call(e) => refused(e),
            Error::Device(e) => fail(DscStatus::Device, e),
            e => fail(DscStatus::Artifact, e),
        })?;
        let header = opened.header();
        let description = serde_json::json!({
            "target": header.target,
            "gpu": opened.on_gpu(),
            "library": header.library,
            "entries": header.entries,
        });
        let description = CString::new(description.to_string()).unwrap_or_default();
        // SAFETY: not null; a place for a pointer, says the caller.
        unsafe { *library = Box::into_raw(Box::new(DscLibrary { library: opened, description })) };
        Ok(())
    })
}

/// Closes a library; null is nothing. Work that uses it must be done.
///
/// # Safety
/// `library` is of dsc_library_open, and not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dsc_library_close(library: *mut DscLibrary) {
    if !library.is_null() {
        // SAFETY: made by `dsc_library_open`, given back once.
        drop(unsafe { Box::from_raw(library) });
    }
}

/// What the library is, as JSON: its target, the dims that it was compiled for, and each operation with arguments and limits. The
/// text lives as long as the library; null for null.
///
/// # Safety
/// `library` is open, or null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dsc_library_describe(library: *const DscLibrary) -> *const c_char {
    // SAFETY: the caller's word.
    unsafe { library.as_ref() }.map_or(std::ptr::null(), |l| l.description.as_ptr())
}

/// Bytes of workspace that a call of an operation with these arguments needs; their addresses are not looked at.
///
/// # Safety
/// `library` is open, `operation` a text, `tensors` an array of `count`, each with arrays of `rank` sizes and strides; `bytes` is a
/// place for a number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dsc_workspace_bytes(
    library: *const DscLibrary,
    operation: *const c_char,
    tensors: *const DscTensor,
    count: u32,
    bytes: *mut u64,
) -> DscStatus {
    guarded(|| {
        // SAFETY: the caller's word.
        let (library, operation, tensors) = unsafe { call(library, operation, tensors, count) }?;
        if bytes.is_null() {
            return Err(misuse("bytes is null"));
        }
        let needed = library.library.workspace_bytes(operation, &tensors).map_err(refused)?;
        // SAFETY: not null; a place for a number, says the caller.
        unsafe { *bytes = needed };
        Ok(())
    })
}

/// Puts a call of an operation in the queue `stream`: a CUstream or cudaStream_t, null for the default one. Arguments are in the
/// operation's order, results last. `workspace` has at least as many bytes as dsc_workspace_bytes says, is aligned to 256, and needs
/// no contents.
///
/// Nothing is allocated, and nothing waited for; so the call may be captured as part of a CUDA graph, which then keeps its sizes
/// and addresses. A library for the CPU ignores the stream, and has done the work when this returns.
///
/// # Safety
/// As dsc_workspace_bytes. The arrays and the workspace are memory of the library's device until the work is done, and results
/// overlap nothing else; the stream is one of the device. Calls of one opened library must not run at the same time, in two streams
/// say: some kernels share memory of the library. Open it once for each stream that overlaps others.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dsc_launch(
    library: *const DscLibrary,
    operation: *const c_char,
    tensors: *const DscTensor,
    count: u32,
    workspace: *mut c_void,
    workspace_bytes: u64,
    stream: *mut c_void,
) -> DscStatus {
    guarded(|| {
        // SAFETY: the caller's word.
        let (library, operation, tensors) = unsafe { call(library, operation, tensors, count) }?;
        let workspace = (workspace, workspace_bytes);
        // SAFETY: as above.
        unsafe { library.library.launch(operation, &tensors, workspace, stream) }.map_err(refused)
    })
}

type Arguments<'a> = (&'a DscLibrary, &'a str, Vec<Tensor<'a>>);

/// # Safety
/// As [`dsc_workspace_bytes`].
unsafe fn call<'a>(
    library: *const DscLibrary,
    operation: *const c_char,
    tensors: *const DscTensor,
    count: u32,
) -> Result<Arguments<'a>, DscStatus> {
    // SAFETY: open or null, says the caller.
    let library = unsafe { library.as_ref() }.ok_or_else(|| misuse("library is null"))?;
    // SAFETY: the caller's word.
    let operation = unsafe { text(operation, "operation") }?;
    if tensors.is_null() || count > 64 {
        return Err(misuse("tensors is null, or they are more than 64"));
    }
    // SAFETY: an array of `count`, says the caller.
    let tensors = unsafe { std::slice::from_raw_parts(tensors, count as usize) };
    // SAFETY: as above.
    let tensors = tensors.iter().map(|t| unsafe { tensor(t) }).collect::<Result<_, _>>()?;
    Ok((library, operation, tensors))
}

/// # Safety
/// Shape, and strides if not null, are arrays of `rank`.
unsafe fn tensor(t: &DscTensor) -> Result<Tensor<'_>, DscStatus> {
    let dtype = [
        (DscType::Bytes, None),
        (DscType::F32, Some(DType::F32)),
        (DscType::Bf16, Some(DType::Bf16)),
        (DscType::F16, Some(DType::F16)),
        (DscType::E4m3, Some(DType::E4m3)),
        (DscType::I32, Some(DType::I32)),
    ];
    let known = dtype.iter().find(|(code, _)| *code as u32 == t.type_);
    let (_, dtype) = *known.ok_or_else(|| misuse(&format!("there is no type {}", t.type_)))?;
    if t.rank == 0 || t.rank > 8 || t.shape.is_null() {
        return Err(misuse("a tensor without shape, or of more than 8 dims"));
    }
    let rank = t.rank as usize;
    // SAFETY: not null; arrays of `rank`, says the caller.
    let shape = unsafe { std::slice::from_raw_parts(t.shape, rank) };
    // SAFETY: as above.
    let strides = (!t.strides.is_null()).then(|| unsafe { std::slice::from_raw_parts(t.strides, rank) });
    Ok(Tensor { data: t.data, dtype, shape, strides })
}
