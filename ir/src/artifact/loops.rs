//! Launches that a step makes for pieces of its tokens.

use super::{Arg, ParamEntry, Pieces, Step};
use crate::extent::{Extent, Sym, SymValues};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Launches of a step that are made in pieces of its tokens: all of them for the first tokens, then for the next, so that a matrix between
/// them, of f32 with a row a token and a column a position, never holds all tokens.
///
/// What has a row a token is passed from a piece's first on. The matrix is not: all pieces have it in one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loop {
    /// The first of them.
    pub first: u32,
    /// How many.
    pub launches: u32,
    /// Where the matrix is in the arena.
    pub matrix: u64,
    /// Tokens of a piece, and bytes of the matrix: at most so many, but for [`Pieces::FEWEST`] tokens.
    pub pieces: Pieces,
}

/// Bytes of an element of the matrix.
const ELEMENT: u64 = 4;

impl Loop {
    /// Its launches.
    pub fn range(&self) -> Range<usize> {
        let first = self.first as usize;
        first..first.saturating_add(self.launches as usize)
    }

    /// The sizes that pieces come in, the largest first: what symbols are at most, tokens those of a piece. A step takes the first whose context
    /// holds its own; the last holds all that `max` does.
    pub fn sizes(&self, max: &SymValues) -> Vec<SymValues> {
        let mut tokens = self.pieces.tokens.max(1);
        // One piece that holds all tokens is enough.
        while tokens > Pieces::FEWEST && tokens / 2 >= max.get(Sym::T) {
            tokens /= 2;
        }
        let mut sizes = Vec::new();
        loop {
            let last = tokens <= Pieces::FEWEST;
            let columns = self.pieces.bytes / (ELEMENT * u64::from(tokens));
            let columns = if last { u64::MAX } else { columns }.min(max.get(Sym::C).into()) as u32;
            if columns > 0 {
                sizes.push(max.with(Sym::T, tokens).with(Sym::C, columns));
            }
            if last || columns == max.get(Sym::C) {
                return sizes;
            }
            tokens /= 2;
        }
    }

    /// Bytes that the matrix takes in steps of at most `max`.
    pub fn matrix_bytes(&self, max: &SymValues) -> u64 {
        let bytes = |size: &SymValues| {
            let rows = size.get(Sym::T).min(max.get(Sym::T));
            ELEMENT * u64::from(rows) * u64::from(size.get(Sym::C))
        };
        self.sizes(max).iter().map(bytes).max().unwrap_or(0)
    }

    /// Whether a step of at most `max` is always one piece.
    pub fn is_whole(&self, max: &SymValues) -> bool {
        matches!(self.sizes(max).as_slice(), [size] if size.get(Sym::T) >= max.get(Sym::T))
    }

    /// Bytes from what a parameter has of a token to what it has of the next; 0 of what pieces share.
    ///
    /// # Errors
    /// How it has tokens otherwise than as rows.
    pub fn pitch(&self, param: &ParamEntry, arg: Arg) -> Result<u64, String> {
        if arg == Arg::Arena(self.matrix) {
            return Ok(0);
        }
        let view = &param.view;
        let tokens = |e: &Extent| e.sym == Some(Sym::T);
        let further = view.shape.iter().skip(1).any(tokens) || view.strides.iter().any(|s| s.sym == Some(Sym::T));
        match (view.shape.first().filter(|e| tokens(e)), view.strides.first()) {
            (None, _) if !further => Ok(0),
            (Some(rows), Some(stride)) if !further && rows.factor == 1 && stride.sym.is_none() => {
                u64::try_from(stride.bytes).map_err(|_| format!("parameter {}: rows go backwards", param.name))
            }
            _ => Err(format!("parameter {}: tokens are not its rows", param.name)),
        }
    }
}

impl Step {
    /// The loop that a launch is in.
    pub fn loop_of(&self, launch: usize) -> Option<&Loop> {
        self.loops.iter().find(|l| l.range().contains(&launch))
    }

    /// What is wrong with its loops, but for their launches.
    pub(super) fn check_loops(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut end = 0;
        for (i, l) in self.loops.iter().enumerate() {
            let mut expect = |ok: bool, what: &str| {
                if !ok {
                    problems.push(format!("loop {i}: {what}"));
                }
            };
            let range = l.range();
            expect(range.start >= end && range.end <= self.sampling as usize && !range.is_empty(), "no such launches");
            end = range.end;
            let inside = |after: u32| range.start < after as usize && (after as usize) < range.end;
            let read = self.taps.iter().map(|t| t.after).chain(self.collectives.iter().map(|c| c.after));
            expect(!read.into_iter().any(inside), "something is read before all of its pieces are done");
            let even = l.pieces.tokens.is_power_of_two() && l.pieces.tokens >= Pieces::FEWEST;
            expect(even, "pieces of tokens that are no power of two, or too few");
            let end = l.matrix.checked_add(l.matrix_bytes(&self.max));
            let placed = l.matrix.is_multiple_of(ELEMENT) && end.is_some_and(|end| end <= self.arena_bytes);
            expect(placed, "its matrix is not inside the arena");
        }
        problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::tile::{Stride, ViewType};

    fn pieces(tokens: u32, bytes: u64) -> Loop {
        Loop { first: 0, launches: 2, matrix: 4096, pieces: Pieces { tokens, bytes } }
    }

    fn sizes(l: &Loop, tokens: u32, context: u32) -> Vec<(u32, u32)> {
        let max = SymValues([tokens, 1, 1, 1, 1, context]);
        let sizes = l.sizes(&max);
        assert!(l.matrix_bytes(&max) <= l.pieces.bytes.max(u64::from(Pieces::FEWEST * context) * ELEMENT));
        sizes.iter().map(|s| (s.get(Sym::T), s.get(Sym::C))).collect()
    }

    #[test]
    fn the_longer_the_context_the_fewer_tokens() {
        let l = pieces(2048, 256 << 20);
        assert_eq!(sizes(&l, 4096, 163_840), [(2048, 32768), (1024, 65536), (512, 131_072), (256, 163_840)]);
        assert_eq!(sizes(&l, 4096, 20000), [(2048, 20000)]);
        assert_eq!(sizes(&l, 300, 70000), [(512, 70000)]);
        assert_eq!(sizes(&l, 3, 70000), [(64, 70000)]);
        // The fewest take what they take.
        assert_eq!(sizes(&pieces(128, 1), 4096, 1000), [(64, 1000)]);
        assert_eq!(sizes(&pieces(128, 51200), 4096, 1000), [(128, 100), (64, 1000)]);
        let whole = |tokens, context| l.is_whole(&SymValues([tokens, 1, 1, 1, 1, context]));
        assert_eq!(
            [whole(300, 70000), whole(2048, 32768), whole(2048, 32769), whole(2049, 64)],
            [true, true, false, false]
        );
    }

    #[test]
    fn rows_of_tokens_have_a_pitch() {
        let l = pieces(64, 1);
        let of = |shape: &[Extent], edit: &dyn Fn(&mut ViewType)| {
            let mut view = ViewType::dense(DType::F32, shape);
            edit(&mut view);
            let param = ParamEntry { name: "x".into(), view, write: false };
            l.pitch(&param, Arg::Arena(0)).map_err(|_| ())
        };
        let tokens = Extent::from(Sym::T);
        assert_eq!(of(&[tokens, 3.into(), 5.into()], &|_| ()), Ok(60));
        assert_eq!(of(&[tokens, 4.into()], &|v| v.strides[0].bytes = 64), Ok(64));
        assert_eq!(of(&[Sym::S.into(), Sym::P.into()], &|_| ()), Ok(0));
        for shape in [[4.into(), tokens], [tokens.times(2), 4.into()], [tokens, Sym::C.into()]] {
            assert_eq!(of(&shape, &|_| ()), Err(()), "{shape:?}");
        }
        assert_eq!(of(&[tokens], &|v| v.strides[0].bytes = -4), Err(()));
        assert_eq!(of(&[4.into()], &|v| v.strides[0] = Stride { bytes: 4, sym: Some(Sym::T) }), Err(()));
        let matrix =
            ParamEntry { name: "y".into(), view: ViewType::dense(DType::F32, &[tokens, Sym::C.into()]), write: true };
        assert_eq!(l.pitch(&matrix, Arg::Arena(4096)), Ok(0));
    }
}
