//! Results to memory.
//!
//! 16-bit results are turned through shared memory. From there the copy engine takes boxes of 64 rows and columns of each warpgroup, which goes
//! on meanwhile; where it cannot, each warp turns its own rows, and they leave as 16-byte pieces of whole rows. Others go straight from the registers. Elements outside the view are dropped by a predicate each.

use super::config::{ROWS, WARPGROUP};
use super::emit::Emit;
use super::fragment::{Geometry, Register};
use super::plan::divisor;
use super::ptx;
use super::tensor_map::{can_describe, view_type};
use crate::nvidia::lower::isa;
use crate::nvidia::lower::mlir::{Val, i32};
use dsc_ir::sched::{BufferId, Op};
use dsc_ir::tile::{Index, ValueId, ViewType};
use std::collections::HashMap;

/// Bytes of a row of staging: one span of the swizzle.
const PANEL: u32 = 128;
/// Bytes that a lane moves at a time.
const PIECE: u32 = 16;
/// 16-bit elements in that.
const PIECE_ELEMENTS: u32 = PIECE / 2;
/// Lanes that have neighbouring columns of a row.
const QUAD: u32 = 4;
/// Columns of a box that the copy engine stores.
const BOX: u32 = PANEL / 2;

/// A tile being stored.
struct Target {
    view: ValueId,
    /// The tile's first element.
    start: Vec<Val>,
    /// The axis of the tile's rows; its columns are the last.
    row_axis: usize,
    /// Numbers of the rows in the view, if they are not neighbours.
    rows: Option<ValueId>,
    /// What divides the column that the tile starts at.
    aligned: u32,
}

/// Whether rows of the view can be written in pieces of 16 bytes by tiles whose columns start at multiples of `columns`.
pub fn in_pieces(view: &ViewType, columns: u32) -> bool {
    let piece = i64::from(PIECE);
    let Some((last, outer)) = view.strides.split_last() else { return false };
    view.dtype.bytes() == 2
        && last.bytes == 2
        && last.sym.is_none()
        && outer.iter().all(|s| s.bytes % piece == 0)
        && view.offset as i64 % piece == 0
        && view.shape.last().is_some_and(|n| n.factor % PIECE_ELEMENTS == 0)
        && columns.is_multiple_of(PIECE_ELEMENTS)
}

impl Emit<'_> {
    /// Stores a tile at `index` of a view, or in rows of it chosen by number.
    pub fn store(
        &mut self,
        (view, numbers, index): (ValueId, Option<ValueId>, &[Index]),
        value: ValueId,
        scratch: Option<BufferId>,
    ) -> Result<(), String> {
        let geometry = self.seen_in(value)?;
        let shape = self.shape(value);
        let mut start = index.iter().map(|&i| self.index(i)).collect::<Result<Vec<_>, _>>()?;
        if numbers.is_some() {
            start.insert(0, i32(0));
        }
        let columns = shape.len().checked_sub(1).ok_or("a store of a scalar")?;
        let rows = (0..columns).find(|&d| shape[d] > 1).or(columns.checked_sub(1)).ok_or("a store of a vector")?;
        // A value a row, laid out along the view's last axis.
        let root = self.before_reshapes(value);
        let made = |v: ValueId| match self.defs.get(&v).map(|i| &i.op) {
            Some(Op::Tile(op)) => Some(op),
            _ => None,
        };
        let aligned = index.last().map_or(1, |&i| divisor(i, &made));
        if shape.last() == Some(&geometry.shape[0]) && self.shape(root) == [geometry.shape[0], 1] && numbers.is_none() {
            return self.one_a_row(&geometry, &Target { view, start, row_axis: columns, rows: None, aligned }, root);
        }
        let row_axis = if numbers.is_some() { 0 } else { rows };
        let target = Target { view, start, row_axis, rows: numbers, aligned };
        if shape.last() == Some(&1) && geometry.shape[1] > 1 {
            return self.one_a_row(&geometry, &target, value);
        }
        match scratch {
            Some(buffer) if self.by_boxes(&geometry, &target) => {
                // A map knows how many rows there can be, not how many there are: what is cut goes piece by piece.
                self.settle_all();
                let extent = view_type(&self.s.types, view).map(|t| t.shape[target.row_axis]);
                let extent = self.extent(extent.ok_or("a store to no view")?);
                let first = self.t.f.add(target.start[target.row_axis], geometry.first[0]);
                let end = self.t.f.add(first, i32((geometry.subs * ROWS).into()));
                let whole = self.t.f.cmp("sle", end, extent);
                let (boxes, pieces, after) = (self.t.f.label(), self.t.f.label(), self.t.f.label());
                self.t.f.cond_br(whole, (boxes, &[]), (pieces, &[]));
                self.t.f.start(boxes, &[]);
                self.boxes(&geometry, &target, value, buffer)?;
                self.t.f.br(after, &[]);
                self.t.f.start(pieces, &[]);
                self.stores_waited(0);
                self.staged(&geometry, &target, value, buffer)?;
                self.t.f.br(after, &[]);
                self.t.f.start(after, &[]);
                Ok(())
            }
            Some(buffer) if geometry.transposed => self.staged_transposed(&geometry, &target, value, buffer),
            Some(buffer) => self.staged(&geometry, &target, value, buffer),
            None => self.direct(&geometry, &target, value),
        }
    }

    /// Coordinate in the view of a row of the tile.
    fn row_in_view(&mut self, target: &Target, row: Val) -> Result<Val, String> {
        match target.rows {
            Some(rows) => self.row_element(rows, row),
            None => Ok(self.t.f.add(target.start[target.row_axis], row)),
        }
    }

    /// Address of an element of the tile, and whether it is in the tile and the view.
    fn target_at(&mut self, g: &Geometry, target: &Target, row: Val, column: Val) -> Result<(Val, Val), String> {
        let there = self.row_in_view(target, row)?;
        Ok(self.target_in(g, target, (row, there), column))
    }

    /// The same where the row's coordinate in the view is known.
    fn target_in(&mut self, g: &Geometry, target: &Target, (row, there): (Val, Val), column: Val) -> (Val, Val) {
        let last = target.start.len() - 1;
        let mut at = target.start.clone();
        at[target.row_axis] = there;
        at[last] = self.t.f.add(at[last], column);
        let (at, inside) = self.element_at(target.view, &at);
        // Rows are made eight and turned sixteen at a time: a tile with fewer has none of the others.
        if !g.transposed || g.shape[0].is_multiple_of(16) {
            return (at, inside);
        }
        let own = self.t.f.cmp("ult", row, i32(g.shape[0].into()));
        (at, self.t.f.bin("and", inside, own))
    }

    /// A tile of one column: of the threads that have a row, the one that has its first column writes it.
    fn one_a_row(&mut self, g: &Geometry, target: &Target, value: ValueId) -> Result<(), String> {
        let mut seen = HashMap::new();
        for at in g.varying(true, false) {
            let [row, column] = g.coordinates(&mut self.t, at);
            let (address, inside) = self.target_at(g, target, row, i32(0))?;
            let first = self.t.f.cmp("eq", column, i32(0));
            let inside = self.t.f.bin("and", inside, first);
            let word = self.element(value, at, &mut seen)?;
            isa::store_global_if(&mut self.t.f, inside, address, &[word]);
        }
        Ok(())
    }

    /// Straight from registers: two columns at a time where they are neighbours in memory.
    fn direct(&mut self, g: &Geometry, target: &Target, value: ValueId) -> Result<(), String> {
        let ty = view_type(&self.s.types, target.view).cloned().ok_or("a store to no view")?;
        let bytes = ty.dtype.bytes() as i64;
        let aligned = ty.strides.iter().rev().skip(1).all(|s| s.bytes % (2 * bytes) == 0);
        let pairs = !g.transposed
            && aligned
            && ty.strides.last().is_some_and(|s| s.bytes == bytes && s.sym.is_none())
            && ty.offset as i64 % (2 * bytes) == 0
            && ty.shape.last().is_some_and(|n| n.factor.is_multiple_of(2));
        if !g.transposed && g.wide.is_multiple_of(8 * QUAD) && target.rows.is_none() && in_pieces(&ty, target.aligned) {
            return self.by_quads(g, target, value);
        }
        let (mut seen, mut rows) = (HashMap::new(), HashMap::new());
        for at in g.registers().into_iter().filter(|r| !pairs || r.e == 0) {
            let [row, column] = g.coordinates(&mut self.t, at);
            let number = g.position(at, true, false);
            let there = match rows.get(&number) {
                Some(&known) => known,
                None => self.row_in_view(target, row)?,
            };
            rows.insert(number, there);
            let (address, inside) = self.target_in(g, target, (row, there), column);
            let next = Register { e: 1, ..at };
            let words = match (pairs, bytes) {
                (true, 1 | 2) => vec![self.packed(value, [at, next], &mut seen)?],
                (true, _) => vec![self.element(value, at, &mut seen)?, self.element(value, next, &mut seen)?],
                _ => vec![self.element(value, at, &mut seen)?],
            };
            isa::store_global_if(&mut self.t.f, inside, address, &words);
        }
        Ok(())
    }

    /// Straight from registers of 16-bit elements, 16 bytes a lane: of four times eight columns of a row, of which each lane of a quad has two
    /// everywhere, it gets all of one eight.
    fn by_quads(&mut self, g: &Geometry, target: &Target, value: ValueId) -> Result<(), String> {
        let within = self.t.f.rem(self.t.lane, QUAD);
        let odd = self.t.f.bin("and", within, i32(1));
        let odd = self.t.f.cmp("ne", odd, i32(0));
        let upper = self.t.f.cmp("uge", within, i32(2));
        let own = self.t.f.mul(within, i32(8));
        let mut seen = HashMap::new();
        for (sub, h) in (0..g.subs).flat_map(|sub| [(sub, 0), (sub, 1)]) {
            let at = Register { sub, j: 0, h, e: 0 };
            let [row, _] = g.coordinates(&mut self.t, at);
            let there = self.row_in_view(target, row)?;
            for first in (0..g.wide / 8).step_by(QUAD as usize) {
                let mut words = Vec::new();
                for j in first..first + QUAD {
                    words.push(self.packed(value, [0, 1].map(|e| Register { j, e, ..at }), &mut seen)?);
                }
                let words = self.turned_in_quad(&words, odd, upper);
                let column = self.t.f.add(g.first[1], i32((8 * first).into()));
                let column = self.t.f.add(column, own);
                let (address, inside) = self.target_in(g, target, (row, there), column);
                isa::store_global_if(&mut self.t.f, inside, address, &words);
            }
        }
        Ok(())
    }

    /// Word `n` of every lane of a quad to lane `n`, in order of lanes: first among neighbours, then between pairs of them.
    fn turned_in_quad(&mut self, words: &[Val], odd: Val, upper: Val) -> [Val; 4] {
        let f = &mut self.t.f;
        let mut pairs = Vec::new();
        for pair in words.chunks(2) {
            let given = f.select(odd, pair[0], pair[1]);
            let got = isa::shuffle_xor(f, given, 1);
            pairs.push([f.select(odd, got, pair[0]), f.select(odd, pair[1], got)]);
        }
        let mut both = [[i32(0); 2]; 2];
        for side in 0..2 {
            let given = f.select(upper, pairs[0][side], pairs[1][side]);
            let got = isa::shuffle_xor(f, given, 2);
            both[side] = [f.select(upper, got, pairs[0][side]), f.select(upper, pairs[1][side], got)];
        }
        [both[0][0], both[1][0], both[0][1], both[1][1]]
    }

    /// The warp's own part of the staging buffer as an address: rows of [`PANEL`] bytes from its group's first.
    fn staging(&mut self, buffer: BufferId, group_bytes: u32) -> Val {
        let offset = self.s.buffers[buffer.0 as usize].offset;
        let group = self.t.f.div(self.role_tid, WARPGROUP);
        let own = self.t.f.mul(group, i32(group_bytes.into()));
        let base = self.t.f.add(self.t.shared32, i32(offset.into()));
        self.t.f.add(base, own)
    }

    /// Byte of 16-byte piece `piece` of row `row` in the swizzle.
    pub fn swizzled(&mut self, row: Val, piece: Val) -> Val {
        let turn = self.t.f.bin("and", row, i32(7));
        let at = self.t.f.bin("xor", piece, turn);
        let at = self.t.f.mul(at, i32(PIECE.into()));
        let row = self.t.f.mul(row, i32(PANEL.into()));
        self.t.f.add(row, at)
    }

    /// Whether the copy engine can store the tile.
    fn by_boxes(&self, g: &Geometry, target: &Target) -> bool {
        let described = view_type(&self.s.types, target.view).is_some_and(can_describe);
        !g.transposed && target.rows.is_none() && g.wide.is_multiple_of(BOX) && described
    }

    /// At the end of a role: its shared memory stays until the copy engine has read it.
    pub fn end_stores(&mut self) {
        if self.stores_boxes {
            let drives = self.drives_stores();
            self.t.when(drives, |t| ptx::stores_wait(&mut t.f, 0));
        }
    }

    /// The warpgroup's boxes, but those of the last `but` stores, have been read.
    fn stores_waited(&mut self, but: u32) {
        let drives = self.drives_stores();
        self.t.when(drives, |t| ptx::stores_wait(&mut t.f, but));
        self.group_waits();
    }

    /// Buffers in which results are staged.
    fn staging_buffers(&self) -> u32 {
        let slots = self.s.channels.iter().map(|c| c.slots.len()).sum::<usize>();
        let staged = self.s.buffers.iter().skip(slots).filter(|b| b.dtype.bytes() == 2).count();
        u32::try_from(staged).unwrap_or(1).max(1)
    }

    /// Whether this thread drives the copy engine for its warpgroup.
    fn drives_stores(&mut self) -> Val {
        let within = self.t.f.rem(self.role_tid, WARPGROUP);
        self.t.f.cmp("eq", within, i32(0))
    }

    /// Each warpgroup writes panels of 64 rows and columns, which one of its threads hands to the copy engine.
    fn boxes(&mut self, g: &Geometry, target: &Target, value: ValueId, buffer: BufferId) -> Result<(), String> {
        let groups = g.shape[0] * g.shape[1] / (g.subs * ROWS * g.wide);
        let group_bytes = self.s.buffers[buffer.0 as usize].bytes() / groups;
        let together = group_bytes / (ROWS * PANEL);
        let staging = self.staging(buffer, group_bytes);
        let mut tile = vec![1; target.start.len()];
        let last = tile.len() - 1;
        (tile[target.row_axis], tile[last]) = (ROWS, BOX);
        let number = self.maps.number(self.s, target.view, &tile, PANEL).ok_or("a store to what is no parameter")?;
        let map = self.map(number);
        let lane = self.t.lane;
        let top = self.t.f.mul(g.warp, i32(16));
        let write_row = self.t.f.rem(lane, 16);
        let write_row = self.t.f.add(top, write_row);
        let half = self.t.f.div(lane, 16);
        let places: Vec<Val> = (0..BOX / 8)
            .step_by(2)
            .map(|j| {
                let piece = self.t.f.add(half, i32(j.into()));
                let byte = self.swizzled(write_row, piece);
                self.t.f.add(staging, byte)
            })
            .collect();
        let drives = self.drives_stores();
        self.stores_boxes = true;
        // Stores take turns at the buffers that there are, one group each; after one in pieces there are fewer groups, and none that it left.
        let once = g.subs == 1 && g.wide / BOX <= together;
        let others = if once { self.staging_buffers() - 1 } else { 0 };
        let mut seen = HashMap::new();
        for sub in 0..g.subs {
            for first in (0..g.wide / BOX).step_by(together as usize) {
                let panels = (g.wide / BOX - first).min(together);
                self.stores_waited(others);
                for (panel, j) in (0..panels).flat_map(|p| (0..BOX / 8).step_by(2).map(move |j| (p, j))) {
                    let mut words = Vec::new();
                    for (j, h) in [(j, 0), (j, 1), (j + 1, 0), (j + 1, 1)] {
                        let at = [0, 1].map(|e| Register { sub, j: (first + panel) * (BOX / 8) + j, h, e });
                        words.push(self.packed(value, at, &mut seen)?);
                    }
                    let to = self.t.f.add(places[j as usize / 2], i32((panel * ROWS * PANEL).into()));
                    ptx::store_matrix(&mut self.t.f, to, &words, false);
                }
                ptx::fence_async(&mut self.t.f);
                self.group_waits();
                let row = self.t.f.add(target.start[target.row_axis], g.first[0]);
                let row = self.t.f.add(row, i32((sub * ROWS).into()));
                let column = self.t.f.add(target.start[last], g.first[1]);
                let mut boxes = Vec::new();
                for panel in 0..panels {
                    let mut at = target.start.clone();
                    at[target.row_axis] = row;
                    at[last] = self.t.f.add(column, i32(((first + panel) * BOX).into()));
                    at.reverse();
                    boxes.push((self.t.f.add(staging, i32((panel * ROWS * PANEL).into())), at));
                }
                self.t.when(drives, |t| {
                    boxes.iter().for_each(|(from, at)| ptx::store_box(&mut t.f, map, *from, at));
                    ptx::stores_commit(&mut t.f);
                });
            }
        }
        Ok(())
    }

    /// Each warp writes its 16 rows, some panels of 64 columns at a time, and reads them back row by row.
    fn staged(&mut self, g: &Geometry, target: &Target, value: ValueId, buffer: BufferId) -> Result<(), String> {
        let groups = g.shape[0] * g.shape[1] / (g.subs * ROWS * g.wide);
        let group_bytes = self.s.buffers[buffer.0 as usize].bytes() / groups;
        let panels = group_bytes / (ROWS * PANEL);
        let per_panel = PANEL / 2;
        let staging = self.staging(buffer, group_bytes);
        let lane = self.t.lane;
        let top = self.t.f.mul(g.warp, i32(16));
        let write_row = self.t.f.rem(lane, 16);
        let write_row = self.t.f.add(top, write_row);
        let half = self.t.f.div(lane, 16);
        let read_row = self.t.f.div(lane, 8);
        let read_piece = self.t.f.rem(lane, 8);
        let mut seen = HashMap::new();
        for sub in 0..g.subs {
            // Numbers of rows come from memory: all are asked for before the first is wanted.
            let mut rows = Vec::new();
            for four in 0..4 {
                let row = self.t.f.add(read_row, i32(4 * four));
                let row = self.t.f.add(top, row);
                let within = self.t.f.add(row, g.first[0]);
                let within = self.t.f.add(within, i32((sub * ROWS).into()));
                rows.push((row, within, self.row_in_view(target, within)?));
            }
            for first in (0..g.wide).step_by((panels * per_panel) as usize) {
                let columns = (g.wide - first).min(panels * per_panel);
                ptx::warp_barrier(&mut self.t.f);
                for j in (0..columns / 8).step_by(2) {
                    let at = |j: u32, h: u32| [0, 1].map(|e| Register { sub, j: first / 8 + j, h, e });
                    let two = j + 1 < columns / 8;
                    let mut words = Vec::new();
                    for (j, h) in [(j, 0), (j, 1), (j + 1, 0), (j + 1, 1)].into_iter().take(if two { 4 } else { 2 }) {
                        words.push(self.packed(value, at(j, h), &mut seen)?);
                    }
                    let piece = self.t.f.add(half, i32((j % 8).into()));
                    let byte = self.swizzled(write_row, piece);
                    let byte = self.t.f.add(byte, i32((j / 8 * ROWS * PANEL).into()));
                    let to = self.t.f.add(staging, byte);
                    ptx::store_matrix(&mut self.t.f, to, &words, false);
                }
                ptx::warp_barrier(&mut self.t.f);
                for panel in 0..columns.div_ceil(per_panel) {
                    for &(row, in_tile, there) in &rows {
                        let byte = self.swizzled(row, read_piece);
                        let byte = self.t.f.add(byte, i32((panel * ROWS * PANEL).into()));
                        let from = self.t.f.add(staging, byte);
                        let words = ptx::load_shared_words(&mut self.t.f, from);
                        let within = self.t.f.mul(read_piece, i32(PIECE_ELEMENTS.into()));
                        let within = self.t.f.add(within, i32((first + panel * per_panel).into()));
                        let column = self.t.f.add(g.first[1], within);
                        let (at, mut inside) = self.target_in(g, target, (in_tile, there), column);
                        if !g.wide.is_multiple_of(per_panel) {
                            let own = self.t.f.cmp("ult", within, i32(g.wide.into()));
                            inside = self.t.f.bin("and", inside, own);
                        }
                        isa::store_global_if(&mut self.t.f, inside, at, &words);
                    }
                }
            }
        }
        Ok(())
    }

    /// Each warp has 16 columns of the tile: it writes them turned, and reads back 32 bytes of each row.
    fn staged_transposed(
        &mut self,
        g: &Geometry,
        target: &Target,
        value: ValueId,
        buffer: BufferId,
    ) -> Result<(), String> {
        let rows = g.wide.next_multiple_of(16);
        let staging = self.staging(buffer, rows * PANEL);
        let lane = self.t.lane;
        let pieces = self.t.f.mul(g.warp, i32(2));
        let (matrix, matrix_row) = (self.t.f.div(lane, 8), self.t.f.rem(lane, 8));
        let (side, below) = (self.t.f.rem(matrix, 2), self.t.f.div(matrix, 2));
        let below = self.t.f.mul(below, i32(8));
        let write_row = self.t.f.add(matrix_row, below);
        let write_piece = self.t.f.add(pieces, side);
        let (read_row, read_side) = (self.t.f.div(lane, 2), self.t.f.rem(lane, 2));
        let read_piece = self.t.f.add(pieces, read_side);
        let mut seen = HashMap::new();
        for sub in 0..g.subs {
            ptx::warp_barrier(&mut self.t.f);
            for j in (0..g.wide / 8).step_by(2) {
                let two = j + 1 < g.wide / 8;
                let mut words = Vec::new();
                for (j, h) in [(j, 0), (j, 1), (j + 1, 0), (j + 1, 1)].into_iter().take(if two { 4 } else { 2 }) {
                    words.push(self.packed(value, [0, 1].map(|e| Register { sub, j, h, e }), &mut seen)?);
                }
                let row = self.t.f.add(write_row, i32((8 * j).into()));
                let byte = self.swizzled(row, write_piece);
                let to = self.t.f.add(staging, byte);
                ptx::store_matrix(&mut self.t.f, to, &words, true);
            }
            ptx::warp_barrier(&mut self.t.f);
            for first in (0..rows).step_by(16) {
                let row = self.t.f.add(read_row, i32(first.into()));
                let byte = self.swizzled(row, read_piece);
                let from = self.t.f.add(staging, byte);
                let words = ptx::load_shared_words(&mut self.t.f, from);
                let column = self.t.f.mul(read_piece, i32(PIECE_ELEMENTS.into()));
                let column = self.t.f.add(column, i32((sub * ROWS).into()));
                let column = self.t.f.add(column, g.first[0]);
                let row = self.t.f.add(row, g.first[1]);
                let (at, inside) = self.target_at(g, target, row, column)?;
                isa::store_global_if(&mut self.t.f, inside, at, &words);
            }
        }
        Ok(())
    }
}
