//! Products of warpgroups, and when to wait for them.
//!
//! A product is issued and its group committed; it stays in flight until one of its results is read, or until a stage that it reads
//! is released. Then `wait_group n` leaves the `n` younger groups alone. Groups end in order.

use super::config::ROWS;
use super::emit::{Emit, Held};
use super::fragment::Geometry;
use super::ptx;
use crate::nvidia::lower::mlir::{Val, i32};
use dsc_ir::sched::{BufferId, ChannelId, Op};
use dsc_ir::tile::ValueId;

/// Bytes of `k` of one instruction.
const K_BYTES: u32 = 32;
/// Bytes from eight rows to the next eight in the 128-byte swizzle.
const EIGHT_ROWS: u32 = 1024;

/// One group.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Group {
    /// Its result, unless another product has taken it over.
    value: Option<ValueId>,
    /// Channels it reads, and how many waits ago the stage was waited for.
    stages: Vec<(ChannelId, u32)>,
}

/// Groups in flight, the oldest first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Flight(Vec<Group>);

impl Flight {
    /// A wait for a channel's next stage happens.
    pub fn waited(&mut self, channel: ChannelId) {
        for group in &mut self.0 {
            group.stages.iter_mut().filter(|(c, _)| *c == channel).for_each(|(_, since)| *since += 1);
        }
    }

    /// The youngest group that reads the stage waited for `lag` waits before the last, or an older one.
    pub fn readers(&self, channel: ChannelId, lag: u32) -> Option<usize> {
        self.0.iter().rposition(|g| g.stages.iter().any(|&(c, since)| c == channel && since >= lag))
    }

    /// The same with values renamed; a value without a new name is in nobody's reach any more.
    pub fn renamed(&self, from: &[ValueId], to: &[ValueId]) -> Flight {
        let name = |v: ValueId| from.iter().position(|&f| f == v).map(|i| to[i]);
        Flight(self.0.iter().map(|g| Group { value: g.value.and_then(name), stages: g.stages.clone() }).collect())
    }

    /// Whether every result in flight is one of these values.
    pub fn all_among(&self, values: &[ValueId]) -> bool {
        self.0.iter().all(|g| g.value.is_none_or(|v| values.contains(&v)))
    }
}

impl<'a> Emit<'a> {
    /// Computes the descriptors of the operands of a product once, for stage 0.
    pub fn prepare_descriptors(&mut self, g: Geometry, operands: [ValueId; 2]) -> Result<(), String> {
        let operands = if g.transposed { [operands[1], operands[0]] } else { operands };
        for (second, v) in [false, true].into_iter().zip(operands) {
            let buffer = match self.defs.get(&v).map(|i| &i.op) {
                Some(Op::Take { channel, slot }) => self.s.channels[channel.0 as usize].slots[*slot as usize],
                _ => return Err("a product of what is in no ring".into()),
            };
            let data = &self.s.buffers[buffer.0 as usize];
            if data.swizzle != 128 || data.pitch != 128 {
                return Err(format!("operand {} without the 128-byte swizzle", data.name));
            }
            let rows = self.t.f.mul(g.first[usize::from(second)], i32(data.pitch.into()));
            let base = self.t.f.add(self.t.shared32, i32(data.offset.into()));
            let at = self.t.f.add(base, rows);
            let start = ptx::descriptor_start(&mut self.t.f, at);
            self.descriptors.insert((buffer, second), start);
        }
        Ok(())
    }

    fn operand(&mut self, v: ValueId, second: bool) -> Result<Val, String> {
        let Some(&Held::Stage(buffer, stage)) = self.held.get(&v) else {
            return Err(format!("%{} is in no ring", v.0));
        };
        let base = *self.descriptors.get(&(buffer, second)).ok_or("an operand without descriptor")?;
        let bytes = self.s.buffers[buffer.0 as usize].copy_bytes();
        let offset = self.t.f.mul(stage, i32((bytes / ptx::DESCRIPTOR_UNIT).into()));
        Ok(self.t.f.add(base, offset))
    }

    /// The descriptor of an operand so many bytes behind a start.
    fn described(&mut self, start: Val, bytes: u32) -> Val {
        let at = self.t.f.add(start, i32((bytes / ptx::DESCRIPTOR_UNIT).into()));
        ptx::descriptor(&mut self.t.f, at, ptx::DESCRIPTOR_UNIT, EIGHT_ROWS)
    }

    fn width(&self, buffer: BufferId) -> u32 {
        let b = &self.s.buffers[buffer.0 as usize];
        b.shape[1] * b.dtype.bytes() as u32
    }

    /// `result = acc + a · bᵀ`, in flight.
    pub fn dot(&mut self, result: ValueId, a: ValueId, b: ValueId, acc: Option<ValueId>) -> Result<(), String> {
        let g = self.geometry(result)?;
        let (first, second) = if g.transposed { (b, a) } else { (a, b) };
        let Some(&Held::Stage(buffer, _)) = self.held.get(&first) else { return Err("a product of no stage".into()) };
        let dtype = self.s.buffers[buffer.0 as usize].dtype;
        let (left, right) = (self.operand(first, false)?, self.operand(second, true)?);
        let per_sub = (g.wide / 2) as usize;
        let mut sums: Vec<Option<Vec<Val>>> = vec![None; g.subs as usize];
        if let Some(acc) = acc {
            let Some(Held::Registers(values, [true, true])) = self.held.get(&acc) else {
                return Err(format!("accumulator %{} is no fragment", acc.0));
            };
            sums = values.chunks(per_sub).map(|c| Some(c.to_vec())).collect();
            for group in self.flight.0.iter_mut().filter(|g| g.value == Some(acc)) {
                group.value = None;
            }
        }
        ptx::wgmma_fence(&mut self.t.f);
        for k in 0..self.width(buffer) / K_BYTES {
            let step = k * K_BYTES;
            let right = self.described(right, step);
            for (sub, sum) in sums.iter_mut().enumerate() {
                let left = self.described(left, step + sub as u32 * ROWS * 128);
                *sum = Some(ptx::wgmma(&mut self.t.f, dtype, g.wide, sum.as_deref(), left, right, false));
            }
        }
        ptx::wgmma_commit(&mut self.t.f);
        let values = sums.into_iter().flatten().flatten().collect();
        self.held.insert(result, Held::Registers(values, [true, true]));
        let stages = [a, b].into_iter().filter_map(|v| match self.defs.get(&v).map(|i| &i.op) {
            Some(Op::Take { channel, .. }) => Some((*channel, 0)),
            _ => None,
        });
        let mut stages: Vec<(ChannelId, u32)> = stages.collect();
        stages.dedup();
        self.flight.0.push(Group { value: Some(result), stages });
        Ok(())
    }

    /// Waits for the groups up to that one. Their results are then as written, and no use of them may be moved before.
    pub fn finish(&mut self, last: usize) {
        ptx::wgmma_wait(&mut self.t.f, self.flight.0.len() - 1 - last);
        for group in self.flight.0.drain(..=last).collect::<Vec<_>>() {
            let Some(v) = group.value else { continue };
            if let Some(Held::Registers(values, varies)) = self.held.get(&v).cloned() {
                let pinned = ptx::pin(&mut self.t.f, &values);
                self.held.insert(v, Held::Registers(pinned, varies));
            }
        }
    }

    /// Waits for a value's product if it is in flight.
    pub fn settle(&mut self, v: ValueId) {
        if let Some(at) = self.flight.0.iter().position(|g| g.value == Some(v)) {
            self.finish(at);
        }
    }

    /// Waits for everything in flight.
    pub fn settle_all(&mut self) {
        if let Some(last) = self.flight.0.len().checked_sub(1) {
            self.finish(last);
        }
    }
}
