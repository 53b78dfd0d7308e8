//! Which elements of a tile a thread of a warpgroup has after a product.
//!
//! In the instruction's own terms, 64 rows: thread `t` of the group, `w = t / 32`, `l = t mod 32`, has, for each 8 columns `j`, rows
//! `16 w + l / 4 + 8 h` and columns `8 j + 2 (l mod 4) + e`. A group with more rows repeats that `sub` times. For a transposed
//! fragment rows of the instruction are columns of the tile.

use crate::nvidia::lower::block::Threads;
use crate::nvidia::lower::mlir::{Val, i32};
use dsc_ir::sched::{Atom, Fragment};

use super::config::{ROWS, WARPGROUP};

/// One register of a fragment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Register {
    /// Which 64 rows of the group's.
    pub sub: u32,
    /// Which 8 columns.
    pub j: u32,
    /// Upper or lower 8 rows of 16.
    pub h: u32,
    /// Left or right of two columns.
    pub e: u32,
}

/// How a tile's elements lie in the warpgroups that run, seen by one thread.
#[derive(Clone, Copy, Debug)]
pub struct Geometry {
    /// Whether the instruction's rows are the tile's columns.
    pub transposed: bool,
    /// Rows and columns of the tile.
    pub shape: [u32; 2],
    /// Repetitions of 64 rows.
    pub subs: u32,
    /// Columns of the instruction.
    pub wide: u32,
    /// The group's first row and column, in the instruction's terms.
    pub first: [Val; 2],
    /// The thread's row and column within the group's.
    pub own: [Val; 2],
    /// The warp's number in its group.
    pub warp: Val,
}

impl Geometry {
    /// Of that tile for a thread of the warp with that number in its role.
    pub fn new(t: &mut Threads<'_>, warp: Val, fragment: Fragment, shape: [u32; 2]) -> Geometry {
        let transposed = fragment.atom == Atom::WgmmaTransposed;
        let swap = |[a, b]: [u32; 2]| if transposed { [b, a] } else { [a, b] };
        let ([long, short], groups) = (swap(shape), swap(fragment.warps));
        let (rows, wide) = (long / groups[0], short / groups[1]);
        let group = t.f.div(warp, WARPGROUP / 32);
        let (down, right) = (t.f.rem(group, groups[0]), t.f.div(group, groups[0]));
        let first = [t.f.mul(down, i32(rows.into())), t.f.mul(right, i32(wide.into()))];
        let warp = t.f.rem(warp, 4);
        let (quad, within) = (t.f.div(t.lane, 4), t.f.rem(t.lane, 4));
        let row = t.f.mul(warp, i32(16));
        let own = [t.f.add(row, quad), t.f.mul(within, i32(2))];
        Geometry { transposed, shape, subs: rows / ROWS, wide: wide.next_multiple_of(8), first, own, warp }
    }

    /// Registers of a whole tile.
    pub fn registers(&self) -> Vec<Register> {
        self.varying(true, true)
    }

    /// Registers of a tile that varies along rows and columns of the tile or not.
    pub fn varying(&self, rows: bool, columns: bool) -> Vec<Register> {
        let (down, across) = if self.transposed { (columns, rows) } else { (rows, columns) };
        let all = |on: bool, n: u32| if on { n } else { 1 };
        let mut out = Vec::new();
        for sub in 0..all(down, self.subs) {
            for j in 0..all(across, self.wide / 8) {
                for h in 0..all(down, 2) {
                    out.extend((0..all(across, 2)).map(|e| Register { sub, j, h, e }));
                }
            }
        }
        out
    }

    /// Place of a register among [`Geometry::varying`].
    pub fn position(&self, r: Register, rows: bool, columns: bool) -> usize {
        let (down, across) = if self.transposed { (columns, rows) } else { (rows, columns) };
        let pick = |on: bool, n: u32| if on { n } else { 0 };
        let (js, hs, es) =
            (if across { self.wide / 8 } else { 1 }, if down { 2 } else { 1 }, if across { 2 } else { 1 });
        let at = (pick(down, r.sub) * js + pick(across, r.j)) * hs + pick(down, r.h);
        (at * es + pick(across, r.e)) as usize
    }

    /// Row and column of a register's element in the tile.
    pub fn coordinates(&self, t: &mut Threads<'_>, r: Register) -> [Val; 2] {
        let row = t.f.add(self.first[0], self.own[0]);
        let row = t.f.add(row, i32((ROWS * r.sub + 8 * r.h).into()));
        let column = t.f.add(self.first[1], self.own[1]);
        let column = t.f.add(column, i32((8 * r.j + r.e).into()));
        if self.transposed { [column, row] } else { [row, column] }
    }
}

/// Whether a tile varies along its rows and along its columns, axes of one element left out; a vector is of rows.
pub fn varies(shape: &[u32]) -> [bool; 2] {
    match shape {
        [] => [false, false],
        [rows] => [*rows > 1, false],
        [outer @ .., columns] => [outer.iter().any(|&n| n > 1), *columns > 1],
    }
}
