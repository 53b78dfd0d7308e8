//! Loads that the lanes of a quad share out.
//!
//! What the sums of a round are scaled by is an element a row, and lanes of a quad have the same rows: four lanes ask for one word, and the eight
//! quads for words of eight lines, which takes as long as eight reads of shared memory do, and those are what products wait for. Loads of four
//! neighbours along an axis become one instead: lane `q` of each quad loads the `q`-th of them and gives it to the others when it is wanted.

use super::config::ROWS;
use super::emit::{Emit, Held};
use super::fragment::Register;
use super::ptx;
use super::tensor_map::view_type;
use crate::nvidia::lower::arith;
use crate::nvidia::lower::mlir::{Ty, Val, i32};
use dsc_ir::DType;
use dsc_ir::sched::{Atom, Block, Inst, Op, Place};
use dsc_ir::tile::{self, Index, MapArg, Scalar, ScalarOp, ValueId};

/// Lanes with the same rows.
const QUAD: u32 = 4;

/// A load's part in a load of four.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// The load that is made for all, the first of them.
    pub leader: ValueId,
    /// The axis along which they are neighbours.
    axis: usize,
    /// The lane of each quad that has this load's elements.
    pub lane: u32,
}

/// Where a load takes its elements from.
struct Source<'a> {
    view: ValueId,
    /// Numbers of the rows, if they are no neighbours; the index is then of the other axes.
    rows: Option<ValueId>,
    index: &'a [Index],
    shape: &'a [u32],
}

impl<'a> Source<'a> {
    fn of(op: &'a Op) -> Option<Source<'a>> {
        if let Op::Tile(op) = op { Source::of_tile(op) } else { None }
    }

    fn of_tile(op: &'a tile::Op) -> Option<Source<'a>> {
        match op {
            tile::Op::Load { view, index, shape } => Some(Source { view: *view, rows: None, index, shape }),
            tile::Op::Gather { view, rows, index, shape } => {
                Some(Source { view: *view, rows: Some(*rows), index, shape })
            }
            _ => None,
        }
    }
}

impl<'a> Emit<'a> {
    /// Finds the loads of a block that can be shared out.
    pub fn share_loads(&mut self, block: &'a Block) {
        // A single ring feeds a contraction.
        if self.elected || self.s.channels.len() > 1 {
            return;
        }
        struct Group<'a> {
            axis: usize,
            base: (ValueId, u32),
            first: &'a Inst,
            loads: Vec<(u32, ValueId)>,
        }
        let mut groups: Vec<Group<'a>> = Vec::new();
        for inst in &block.insts {
            let Some(load) = Source::of(&inst.op).filter(|_| self.same_in_quads(inst)) else { continue };
            for (axis, &at) in load.index.iter().enumerate() {
                let Some((base, by)) = self.sum(at) else { continue };
                let (base, load) = ((base, by / QUAD), (by % QUAD, inst.results[0]));
                let known =
                    groups.iter_mut().find(|g| g.axis == axis && g.base == base && self.beside(g.first, inst, axis));
                match known {
                    Some(group) => group.loads.push(load),
                    None => groups.push(Group { axis, base, first: inst, loads: vec![load] }),
                }
            }
        }
        for Group { axis, first, loads, .. } in groups {
            // In this order, the leader is loaded before the others are wanted.
            if loads.iter().map(|l| l.0).eq(0..QUAD) {
                let leader = first.results[0];
                self.shares.extend(loads.into_iter().map(|(lane, v)| (v, Share { leader, axis, lane })));
            }
        }
    }

    /// Whether two loads are of one view, and their indices alike but along that axis.
    fn beside(&self, a: &Inst, b: &Inst, axis: usize) -> bool {
        let (Some(a), Some(b)) = (Source::of(&a.op), Source::of(&b.op)) else { return false };
        let alike = |d: usize| d == axis || self.alike(a.index[d], b.index[d]);
        (a.view, a.rows, a.shape) == (b.view, b.rows, b.shape) && (0..a.index.len()).all(alike)
    }

    /// Whether two indices are computed in the same way.
    fn alike(&self, a: Index, b: Index) -> bool {
        let map = |v: ValueId| match self.defs.get(&v).map(|i| &i.op) {
            Some(Op::Tile(tile::Op::Map { inputs, body })) => Some((inputs, body)),
            _ => None,
        };
        match (a, b) {
            _ if a == b => true,
            (Index::Value(a), Index::Value(b)) => match (map(a), map(b)) {
                (Some((a, x)), Some((b, y))) => {
                    let inputs = |(&a, &b): (&ValueId, &ValueId)| self.alike(Index::Value(a), Index::Value(b));
                    x == y && a.len() == b.len() && a.iter().zip(b).all(inputs)
                }
                _ => false,
            },
            _ => false,
        }
    }

    /// Whether a load gives the lanes of a quad the same elements: one for all, or one a row.
    fn same_in_quads(&self, load: &Inst) -> bool {
        let r = load.results[0];
        let shape = self.shape(r);
        self.dtype(r) == DType::F32
            && match &self.s.places[r.0 as usize] {
                Place::Uniform => true,
                Place::Fragment(f) => f.atom == Atom::Wgmma && matches!(shape, &[rows, 1] if rows > 1),
                _ => false,
            }
    }

    /// A value and the constant that an index adds to it.
    fn sum(&self, index: Index) -> Option<(ValueId, u32)> {
        let Index::Value(v) = index else { return None };
        let Some(Op::Tile(tile::Op::Map { inputs, body })) = self.defs.get(&v).map(|i| &i.op) else { return None };
        let (&[base], [constant, sum]) = (inputs.as_slice(), body.insts.as_slice()) else { return None };
        let ScalarOp::Const(Scalar::I32(by)) = constant.op else { return None };
        let adds = sum.op == ScalarOp::Add && sum.args == [MapArg::Input(0), MapArg::Inst(0)];
        (adds && body.result == MapArg::Inst(1)).then_some(())?;
        Some((base, u32::try_from(by).ok()?))
    }

    /// Makes the load of four if this is the first of them.
    pub fn load_shared_out(&mut self, r: ValueId, share: Share, load: &tile::Op) -> Result<(), String> {
        let load = Source::of_tile(load).ok_or("no load")?;
        let by_row = self.s.places[r.0 as usize] != Place::Uniform;
        if r == share.leader {
            let mut start = load.index.iter().map(|&i| self.index(i)).collect::<Result<Vec<_>, _>>()?;
            let quad = self.t.f.rem(self.t.lane, QUAD);
            let moving = std::mem::replace(&mut start[share.axis], quad);
            let axis = share.axis + usize::from(load.rows.is_some());
            let places: Vec<(Vec<Val>, u32)> = match load.rows {
                _ if !by_row => vec![(start, 0)],
                Some(rows) => {
                    let numbers = self.gathered_numbers(rows)?;
                    numbers.into_iter().map(|number| ([&[number], start.as_slice()].concat(), 0)).collect()
                }
                None => {
                    let geometry = self.the_geometry()?;
                    // Rows of a thread lie apart by what is known, those of the halves of a tile too: one address for all.
                    let (first, by) = match self.sum(load.index[0]) {
                        Some((first, by)) => (self.uniform(first)?, by),
                        None => (start[0], 0),
                    };
                    let own = self.first_row()?;
                    start[0] = self.t.f.add(first, own);
                    let behind = |r: Register| by + ROWS * r.sub + 8 * r.h;
                    geometry.varying(true, false).into_iter().map(|r| (start.clone(), behind(r))).collect()
                }
            };
            let mut values = Vec::new();
            for (at, behind) in places {
                let anchor = self.anchors.get(&r).copied();
                let (at, inside) = self.element_from(load.view, &at, anchor, Some((axis, moving)), (0, behind));
                // Left to itself, the assembler loads as late as it can, between products.
                values.push(ptx::load_f32_here_if(&mut self.t.f, inside, at));
            }
            self.shared_out.insert(r, values);
        }
        let values = self.shared_out.get(&share.leader).cloned().ok_or("a load before the one it is part of")?;
        self.held.insert(r, Held::Shared(values, [by_row, false], share.lane));
        Ok(())
    }

    /// Finds, in front of a loop, where its shared loads of rows or of one element start, but for what its counter adds. The assembler would compute that again in
    /// every turn, to save the register, in the middle of a product; what lanes exchange it cannot.
    pub fn anchor_loads(&mut self, body: &'a Block) -> Result<(), String> {
        self.anchors.clear();
        // Where rows are gathered, each has an address of its own, and no register is left.
        if body.insts.iter().any(|i| Source::of(&i.op).is_some_and(|load| load.rows.is_some())) {
            return Ok(());
        }
        let mut made: Vec<(ValueId, Vec<Val>, Val)> = Vec::new();
        for inst in &body.insts {
            let r = inst.results.first().copied();
            let share = r.and_then(|r| self.shares.get(&r).copied().filter(|s| s.leader == r));
            let (Some(r), Some(share), Some(load)) = (r, share, Source::of(&inst.op)) else { continue };
            let by_row = self.s.places[r.0 as usize] != Place::Uniform;
            let mut start = Vec::new();
            for (axis, &index) in load.index.iter().enumerate() {
                let first =
                    if axis == 0 && by_row { self.sum(index).map(|(first, _)| Index::Value(first)) } else { None };
                let stays = if axis == share.axis { Some(i32(0)) } else { self.before(first.unwrap_or(index), body)? };
                start.extend(stays);
            }
            let fixed = view_type(&self.s.types, load.view).is_some_and(|t| t.strides.iter().all(|s| s.sym.is_none()));
            if start.len() < load.index.len() || !fixed {
                continue;
            }
            let known = made.iter().find(|m| m.0 == load.view && m.1 == start).map(|m| m.2);
            let anchor = match known {
                Some(known) => known,
                None => {
                    let mut at = start.clone();
                    at[share.axis] = self.t.f.rem(self.t.lane, QUAD);
                    if by_row {
                        let own = self.first_row()?;
                        at[0] = self.t.f.add(at[0], own);
                    }
                    let (address, _) = self.element_at(load.view, &at);
                    let lane = self.t.lane;
                    ptx::own_address(&mut self.t.f, address, lane)
                }
            };
            made.push((load.view, start, anchor));
            self.anchors.insert(r, anchor);
        }
        Ok(())
    }

    /// A scalar of a loop's body that its counter is no part of, as it is in front of the loop.
    fn before(&mut self, index: Index, body: &'a Block) -> Result<Option<Val>, String> {
        let Index::Value(v) = index else { return self.index(index).map(Some) };
        if let Some(Held::Scalar(x)) = self.held.get(&v) {
            return Ok(Some(*x));
        }
        let inst = body.insts.iter().find(|i| i.results.contains(&v));
        let Some(Op::Tile(tile::Op::Map { inputs, body: map })) = inst.map(|i| &i.op) else { return Ok(None) };
        let mut args = Vec::new();
        for &input in inputs {
            let Some(x) = self.before(Index::Value(input), body)? else { return Ok(None) };
            args.push((x, self.dtype(input)));
        }
        Ok(Some(arith::apply(&mut self.t.f, self.t.arch, map, &args).0))
    }

    /// The first of the running thread's rows in the tile.
    fn first_row(&mut self) -> Result<Val, String> {
        let geometry = self.the_geometry()?;
        let [own, _] = geometry.coordinates(&mut self.t, Register { sub: 0, j: 0, h: 0, e: 0 });
        Ok(own)
    }

    /// Gives every lane what the quad's lanes have loaded for it.
    pub fn hand_out(&mut self, v: ValueId) {
        let Some(Held::Shared(values, varies, lane)) = self.held.get(&v).cloned() else { return };
        let lane = match self.settled {
            None => i32(lane.into()),
            Some(sum) => {
                // The assembler would move the exchange up between products, which then wait for it.
                let bits = self.t.f.cast("bitcast", sum, Ty::I32);
                let zero = self.t.f.bin("and", bits, self.never);
                self.t.f.add(zero, i32(lane.into()))
            }
        };
        let values: Vec<Val> = values.into_iter().map(|x| ptx::from_quad(&mut self.t.f, x, lane)).collect();
        let held = if varies == [false; 2] { Held::Scalar(values[0]) } else { Held::Registers(values, varies) };
        self.held.insert(v, held);
    }
}
