//! Runs a compiled module in this process, on one thread: for the tests of this crate, and of `tests`.

use dsc_ir::SymValues;
use dsc_targets::Module;

/// A module mapped as executable memory.
pub struct Mapped {
    base: *mut libc::c_void,
    bytes: usize,
    module: Module,
}

/// Bytes behind the scratch that must stay as they are.
const GUARD: usize = 256;

type Entry = unsafe extern "C" fn(*const *mut u8, *const i32, *mut u8, u64, u64);

impl Mapped {
    /// Copies the code into a mapping and makes that executable.
    pub fn new(module: Module) -> Mapped {
        let bytes = module.code.len().max(1);
        // SAFETY: a fresh private mapping; it is written before it becomes executable, and within its size.
        let base = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let base = libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
            assert_ne!(base, libc::MAP_FAILED);
            std::ptr::copy_nonoverlapping(module.code.as_ptr(), base.cast(), module.code.len());
            assert_eq!(libc::mprotect(base, bytes, libc::PROT_READ | libc::PROT_EXEC), 0);
            base
        };
        Mapped { base, bytes, module }
    }

    /// Calls kernel `kernel` over the blocks `first..last`. `args` are the buffers' addresses.
    pub fn call(&self, kernel: usize, args: &[*mut u8], syms: &SymValues, first: u64, last: u64) {
        let code = &self.module.kernels[kernel];
        let mut scratch = vec![0xa5u8; code.scratch_bytes as usize + 64 + GUARD];
        let skip = scratch.as_ptr().align_offset(64);
        let end = skip + code.scratch_bytes as usize;
        let syms: Vec<i32> = syms.0.iter().map(|&s| s as i32).collect();
        // SAFETY: the entry is a function of this signature in the mapping, the caller's buffers are as the views say, and the
        // scratch is what the kernel asks for.
        unsafe {
            let entry: Entry = std::mem::transmute(self.base.cast::<u8>().add(code.entry as usize));
            entry(args.as_ptr(), syms.as_ptr(), scratch[skip..].as_mut_ptr(), first, last);
        }
        assert!(scratch[end..].iter().all(|&b| b == 0xa5), "{} wrote behind its scratch", code.name);
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nothing runs in it any more.
        unsafe {
            libc::munmap(self.base, self.bytes);
        }
    }
}
