//! Tiles spread over registers as a matrix product leaves them.
//!
//! A thread has the elements at some rows and, in each, at some groups of neighbouring columns ([`Spread`]): register
//! `(row * groups + group) * width + e`. Coordinates beyond the tile are clamped for reading and masked for everything that is seen.

use super::arith;
use super::emit::Emitter;
use super::mlir::{Ty, Val, f32, i32};
use super::schedule::matrix;
use dsc_ir::DType;
use dsc_ir::sched::{Atom, Buffer, Fragment, Place};
use dsc_ir::tile::{self, Index, ValueId};
use std::collections::HashMap;

/// Which elements of a tile a thread has.
pub struct Spread {
    /// Rows, clamped, and whether they exist.
    pub rows: Vec<(Val, Val)>,
    /// First columns of the groups, clamped, and whether they exist.
    pub groups: Vec<(Val, Val)>,
    /// Columns of a group. They lie by fours in registers, each four every `width / 4`-th column, where there are more than that.
    pub width: u32,
    /// Rows and columns of the tile.
    pub shape: [u32; 2],
    /// Bits of the lane that tell apart threads of one row.
    pub column_lanes: Vec<u32>,
    /// Bits of the lane that tell apart threads of one column.
    pub row_lanes: Vec<u32>,
    /// This thread's lane, among those that share an instruction's result.
    pub lane: Val,
    /// The number of these lanes along rows and along columns.
    pub warp: [Val; 2],
    /// How many there are along rows and columns.
    pub warps: [u32; 2],
    /// Rows and columns of one of them.
    pub block: [u32; 2],
}

/// How one instruction's result lies in registers: lane `l` of `lanes` has the rows `(l / div mod count) * step` of `row` plus each of
/// `row_steps`, and `width` neighbours from the column of the same form.
pub struct Layout {
    /// Lanes that share the result; threads of a larger unit than a warp count as one fragment's.
    pub lanes: u32,
    /// Rows and columns.
    pub unit: [u32; 2],
    /// Columns of a register group.
    pub width: u32,
    /// Divisor, count and step of a lane's first row.
    pub row: [u32; 3],
    /// Divisor, count and step of a lane's first column.
    pub col: [u32; 3],
    /// Further rows of the lane.
    pub row_steps: &'static [u32],
}

impl Layout {
    /// The layout that an instruction leaves, as [`Atom`] says.
    pub fn of(atom: Atom) -> Layout {
        let one = |row, col| Layout { lanes: 32, unit: [16, 8], width: 2, row, col, row_steps: &[0, 8] };
        match atom {
            Atom::Fma => Layout { unit: [16, 32], width: 4, row_steps: &[0, 1, 2, 3], ..one([8, 4, 4], [1, 8, 4]) },
            Atom::Mfma16x16 => {
                Layout { lanes: 64, unit: [16, 16], width: 4, row_steps: &[0], ..one([1, 16, 1], [16, 4, 4]) }
            }
            Atom::Mfma16x64 => {
                Layout { lanes: 64, unit: [16, 64], width: 16, row_steps: &[0], ..one([1, 16, 1], [16, 4, 16]) }
            }
            Atom::Mfma16x128 => {
                Layout { lanes: 64, unit: [16, 128], width: 32, row_steps: &[0], ..one([1, 16, 1], [16, 4, 32]) }
            }
            _ => one([4, 8, 1], [1, 4, 2]),
        }
    }

    /// Bits of the lane that a coordinate depends on.
    fn bits([div, count, _]: [u32; 3]) -> Vec<u32> {
        (0..count.ilog2()).map(|b| div << b).collect()
    }
}

fn block_of(f: Fragment, shape: [u32; 2]) -> [u32; 2] {
    let unit = Layout::of(f.atom).unit;
    [0, 1].map(|d| shape[d].div_ceil(f.warps[d]).next_multiple_of(unit[d]))
}

impl Spread {
    /// Registers of a thread.
    pub fn count(f: Fragment, shape: &[u32]) -> usize {
        let [rows, cols] = block_of(f, matrix(shape));
        (rows * cols / Layout::of(f.atom).lanes) as usize
    }

    /// The spread of a tile of that shape.
    pub fn new(e: &mut Emitter, f: Fragment, shape: &[u32]) -> Spread {
        let shape = matrix(shape);
        let block = block_of(f, shape);
        let layout = Layout::of(f.atom);
        let (unit, width) = (layout.unit, layout.width);
        let (warp, lane) = e.t.lanes(layout.lanes);
        let warp = [e.t.f.div(warp, f.warps[1]), e.t.f.rem(warp, f.warps[1])];
        let first_row = e.t.f.mul(warp[0], i32(block[0].into()));
        let first_col = e.t.f.mul(warp[1], i32(block[1].into()));
        let [lane_row, lane_col] = [layout.row, layout.col].map(|[div, count, step]| {
            let n = e.t.f.div(lane, div);
            let n = if div * count == layout.lanes { n } else { e.t.f.rem(n, count) };
            e.t.f.mul(n, i32(step.into()))
        });
        let row0 = e.t.f.add(first_row, lane_row);
        let col0 = e.t.f.add(first_col, lane_col);
        let ragged = [0, 1].map(|d| block[d] * f.warps[d] > shape[d]);
        let mut rows = Vec::new();
        for tile in (0..block[0]).step_by(unit[0] as usize) {
            for &step in layout.row_steps {
                let row = e.t.f.add(row0, i32((tile + step).into()));
                rows.push(clamp(e, row, shape[0], 1, ragged[0]));
            }
        }
        let groups = (0..block[1])
            .step_by(unit[1] as usize)
            .map(|tile| {
                let col = e.t.f.add(col0, i32(tile.into()));
                clamp(e, col, shape[1], width, ragged[1])
            })
            .collect();
        let (column_lanes, row_lanes) = (Layout::bits(layout.col), Layout::bits(layout.row));
        Spread { rows, groups, width, shape, column_lanes, row_lanes, lane, warp, warps: f.warps, block }
    }

    /// The same of what is one number for each row.
    pub fn line(self) -> Spread {
        Spread { groups: vec![(i32(0), Val::Int(1, Ty::I1))], width: 1, ..self }
    }

    /// Number of the register of a row's column `e` of a group.
    pub fn register(&self, row: usize, group: usize, e: u32) -> usize {
        let fours = (self.width / 4).max(1);
        (row * self.groups.len() + group) * self.width as usize + (e % fours * 4 + e / fours) as usize
    }

    /// A group's registers in the order of its columns.
    fn columns(&self, row: usize, group: usize, values: &[Val]) -> Vec<Val> {
        (0..self.width).map(|e| values[self.register(row, group, e)]).collect()
    }

    /// A group's columns in the order of its registers.
    fn in_registers(&self, columns: &[Val]) -> Vec<Val> {
        let fours = (self.width / 4).max(1);
        (0..self.width).map(|r| columns[(r % 4 * fours + r / 4) as usize]).collect()
    }

    /// Whether every group of columns is whole.
    pub fn even(&self) -> bool {
        self.shape[1].is_multiple_of(self.width)
    }
}

/// A coordinate that can be read, and whether it is in the tile (whole groups: columns inside a group are masked one by one where
/// the tile is not a multiple of them).
fn clamp(e: &mut Emitter, at: Val, limit: u32, width: u32, ragged: bool) -> (Val, Val) {
    if !ragged {
        return (at, Val::Int(1, Ty::I1));
    }
    let ok = e.t.f.cmp("slt", at, i32(limit.into()));
    let last = (limit - 1) / width * width;
    (e.t.f.select(ok, at, i32(last.into())), ok)
}

impl<'a> Emitter<'a> {
    /// Whether column `e` of a group exists.
    pub fn column_exists(&mut self, s: &Spread, group: usize, e: u32) -> Val {
        let (col, ok) = s.groups[group];
        if s.even() {
            return ok;
        }
        let inside = self.t.f.cmp("slt", col, i32(i64::from(s.shape[1]) - i64::from(e)));
        self.t.f.bin("and", ok, inside)
    }

    /// A value's registers: its own, or read at the coordinates of the spread.
    pub fn fragment(&mut self, v: ValueId, s: &Spread) -> Vec<Val> {
        if self.is_fragment(v) {
            return self.registers_of(v);
        }
        self.fragment_input(v, self.shape(v), s)
    }

    /// The registers of a fragment.
    pub fn registers_of(&mut self, v: ValueId) -> Vec<Val> {
        let kept = self.fragments[&v].clone();
        self.apart(&kept)
    }

    /// Sets the registers of a fragment.
    pub fn set_registers(&mut self, v: ValueId, values: &[Val]) {
        let Place::Fragment(f) = self.place(v) else { unreachable!("a fragment") };
        let kept = if self.is_line(v) { values.to_vec() } else { self.together(f.atom, values) };
        self.fragments.insert(v, kept);
    }

    /// Registers as they go from block to block.
    pub fn together(&mut self, atom: Atom, values: &[Val]) -> Vec<Val> {
        let floats = values.len().is_multiple_of(4) && values.iter().all(|v| v.ty() == Ty::F32);
        if floats && self.t.arch.keeps_quads(atom) { self.t.f.quads(values) } else { values.to_vec() }
    }

    /// The same back.
    pub fn apart(&mut self, kept: &[Val]) -> Vec<Val> {
        if kept.iter().all(|v| v.ty() == Ty::Quad) { self.t.f.of_quads(kept) } else { kept.to_vec() }
    }

    /// `v`, broadcast to a result of `shape`, at the coordinates of the spread.
    pub fn fragment_input(&mut self, v: ValueId, shape: &[u32], s: &Spread) -> Vec<Val> {
        let own = self.shape(v);
        let leading = &shape[..shape.len().saturating_sub(1)];
        let uniform = own.is_empty() || self.place(v) == &Place::Uniform;
        let per_row = !uniform && own[..own.len() - 1].iter().any(|&n| n != 1);
        let per_col = !uniform && own.last() != Some(&1);
        let mut seen: HashMap<(usize, usize), Vec<Val>> = HashMap::new();
        let mut out = Vec::new();
        for (ri, &(row, _)) in s.rows.iter().enumerate() {
            for (gi, &(col, _)) in s.groups.iter().enumerate() {
                let key = (if per_row { ri } else { 0 }, if per_col { gi } else { 0 });
                if let Some(values) = seen.get(&key) {
                    out.extend(values.iter().copied());
                    continue;
                }
                let mut at = self.delinear(row, leading);
                at.push(col);
                let values = if s.even() || !per_col {
                    self.broadcast(v, &at, s.width)
                } else {
                    let last = at.len() - 1;
                    (0..s.width)
                        .map(|e| {
                            let c = self.t.f.add(col, i32(e.into()));
                            let ok = self.t.f.cmp("slt", c, i32(s.shape[1].into()));
                            at[last] = self.t.f.select(ok, c, i32(i64::from(s.shape[1]) - 1));
                            self.broadcast(v, &at, 1)[0]
                        })
                        .collect()
                };
                let values = if s.width > 4 { s.in_registers(&values) } else { values };
                out.extend(values.iter().copied());
                seen.insert(key, values);
            }
        }
        out
    }

    /// What an op makes, by registers.
    pub fn fragment_of(&mut self, op: &'a tile::Op, r: ValueId, s: &Spread) -> Vec<Val> {
        match op {
            tile::Op::Map { inputs, body } => {
                let shape = self.shape(r);
                let mut args: Vec<Vec<Val>> = Vec::new();
                for &i in inputs {
                    args.push(match self.early.remove(&(r, i)) {
                        Some(values) => values,
                        None if self.is_line(i) => {
                            let each = s.groups.len() * s.width as usize;
                            self.registers_of(i).into_iter().flat_map(|v| vec![v; each]).collect()
                        }
                        None if self.is_fragment(i) => self.registers_of(i),
                        None => self.fragment_input(i, shape, s),
                    });
                }
                let dtypes: Vec<DType> = inputs.iter().map(|&i| self.dtype(i)).collect();
                let count = s.rows.len() * s.groups.len() * s.width as usize;
                let floats = dtypes.iter().all(|&t| t == DType::F32);
                if self.t.arch.pairs() && floats && s.width.is_multiple_of(2) && arith::pairs(body) {
                    let pairs = (0..count).step_by(2).flat_map(|n| {
                        let args: Vec<[Val; 2]> = args.iter().map(|a| [a[n], a[n + 1]]).collect();
                        arith::apply_pairs(&mut self.t.f, body, &args)
                    });
                    return pairs.collect();
                }
                let args: Vec<Vec<(Val, DType)>> =
                    args.iter().zip(&dtypes).map(|(a, &t)| a.iter().map(|&v| (v, t)).collect()).collect();
                let arch = self.t.arch;
                arith::apply_each(&mut self.t.f, arch, body, &args, count)
            }
            tile::Op::Reshape { x, .. } => self.registers_of(*x),
            _ => unreachable!("{op:?} does not make fragments"),
        }
    }

    /// Writes a fragment to its shared copy; padding is zero.
    pub fn spill_fragment(&mut self, v: ValueId, b: &'a Buffer) {
        let Place::Fragment(f) = self.place(v) else { unreachable!("a fragment") };
        let s = self.spread(*f, v);
        let dtype = self.dtype(v);
        let values = self.registers_of(v);
        if self.is_line(v) {
            let lanes = self.t.f.bin("and", s.lane, i32(s.column_lanes.iter().sum::<u32>().into()));
            let beside = self.t.f.bin("or", lanes, s.warp[1]);
            let first = self.t.f.cmp("eq", beside, i32(0));
            for (&(row, exists), &value) in s.rows.iter().zip(&values) {
                let ok = self.t.f.bin("and", first, exists);
                self.guarded(ok, |e| e.store_buffer(b, dtype, row, i32(0), &[value]));
            }
            return;
        }
        if b.shape != s.shape {
            self.zero_buffer(b);
            self.t.barrier();
        }
        for (ri, &(row, row_ok)) in s.rows.iter().enumerate() {
            for (gi, &(col, col_ok)) in s.groups.iter().enumerate() {
                let group = &s.columns(ri, gi, &values)[..];
                if s.even() {
                    let ok = self.t.f.bin("and", row_ok, col_ok);
                    self.guarded(ok, |e| e.store_buffer(b, dtype, row, col, group));
                    continue;
                }
                for (i, &value) in group.iter().enumerate() {
                    let exists = self.column_exists(&s, gi, i as u32);
                    let ok = self.t.f.bin("and", row_ok, exists);
                    let c = self.t.f.add(col, i32(i as i64));
                    self.guarded(ok, |e| e.store_buffer(b, dtype, row, c, &[value]));
                }
            }
        }
    }

    fn zero_buffer(&mut self, b: &Buffer) {
        let words = b.bytes() / 4;
        self.each_chunk(
            words,
            |_, _| (),
            |e, c, (), ok| {
                let byte = e.t.f.mul(c, i32(4));
                let byte = e.t.f.add(byte, i32(b.offset.into()));
                e.guarded(ok, |e| e.t.store_shared(byte, &[i32(0)]));
            },
        );
    }

    /// Stores a fragment to a view.
    pub fn store_fragment(&mut self, view: ValueId, index: &'a [Index], v: ValueId) {
        let Place::Fragment(f) = self.place(v) else { unreachable!("a fragment") };
        let s = Spread::new(self, *f, self.shape(v));
        let leading = &self.shape(v)[..self.shape(v).len() - 1];
        let values = self.registers_of(v);
        for (ri, &(row, row_ok)) in s.rows.iter().enumerate() {
            let mut at = self.delinear(row, leading);
            at.push(i32(0));
            let last = at.len() - 1;
            for (gi, &(col, col_ok)) in s.groups.iter().enumerate() {
                let group = &s.columns(ri, gi, &values)[..];
                if s.even() {
                    at[last] = col;
                    let ok = self.t.f.bin("and", row_ok, col_ok);
                    self.store_global(view, index, &at, (None, ok), group);
                    continue;
                }
                for (i, &value) in group.iter().enumerate() {
                    at[last] = self.t.f.add(col, i32(i as i64));
                    let exists = self.column_exists(&s, gi, i as u32);
                    let ok = self.t.f.bin("and", row_ok, exists);
                    self.store_global(view, index, &at, (None, ok), &[value]);
                }
            }
        }
    }

    /// Zeros, one a register.
    pub fn zeros(&self, s: &Spread) -> Vec<Val> {
        vec![f32(0.0); s.rows.len() * s.groups.len() * s.width as usize]
    }
}
