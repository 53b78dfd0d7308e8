//! Pieces of code into one blob.
//!
//! Every piece starts on a cache line: kernels in the order given, then the routines they call, sorted. The only relocations are
//! calls between pieces, relative to the program counter, so the blob runs wherever it is mapped.

use super::emit::Routine;

/// Alignment of every piece.
pub(crate) const ALIGN: usize = 64;

/// A compiled function.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) code: Vec<u8>,
    /// Calls to patch: where the 32-bit displacement is, what is added to it, and the callee.
    pub(crate) calls: Vec<(u32, i64, Routine)>,
}

/// Joins `kernels` and `routines`; gives the blob and where each piece starts.
pub(crate) fn link(kernels: &[Piece], routines: &[(Routine, Piece)]) -> (Vec<u8>, Vec<u64>) {
    let mut code = Vec::new();
    let mut starts = Vec::new();
    for piece in kernels.iter().chain(routines.iter().map(|r| &r.1)) {
        // int3 between pieces.
        code.resize(code.len().next_multiple_of(ALIGN), 0xcc);
        starts.push(code.len());
        code.extend_from_slice(&piece.code);
    }
    for (start, piece) in starts.iter().zip(kernels.iter().chain(routines.iter().map(|r| &r.1))) {
        for (at, addend, callee) in &piece.calls {
            let callee = routines.iter().position(|r| r.0 == *callee).expect("the caller collected every routine");
            let at = start + *at as usize;
            let displacement = starts[kernels.len() + callee] as i64 + addend - at as i64;
            code[at..at + 4].copy_from_slice(&(displacement as i32).to_le_bytes());
        }
    }
    (code, starts.into_iter().map(|s| s as u64).collect())
}
