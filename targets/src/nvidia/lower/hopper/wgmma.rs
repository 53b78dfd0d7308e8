//! Products of warpgroups, and when to wait for them.
//!
//! A product is issued and its group committed; it stays in flight until one of its results is read, or until a stage that it reads
//! is released. Then `wait_group n` leaves the `n` younger groups alone. Groups end in order.

use super::config::ROWS;
use super::emit::{Emit, Held};
use super::fragment::Geometry;
use super::ptx;
use crate::nvidia::lower::mlir::{Val, i32};
use dsc_ir::sched::{Block, Buffer, ChannelId, Op};
use dsc_ir::tile::{self, ValueId};

/// Bytes of `k` of one instruction.
const K_BYTES: u32 = 32;
/// Columns of an operand whose rows run across `k` that a panel has.
const PANEL_ROWS: u32 = 64;
/// Instructions of a chain from which it is split, registers that its accumulators may take, and most of them.
const LONG_CHAIN: u32 = 8;
const SPLIT_REGISTERS: u32 = 32;
const MOST_SPLIT: u32 = 4;
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

    /// Whether any product is in flight.
    pub fn is_busy(&self) -> bool {
        !self.0.is_empty()
    }

    /// Whether every result in flight is one of these values.
    pub fn all_among(&self, values: &[ValueId]) -> bool {
        self.0.iter().all(|g| g.value.is_none_or(|v| values.contains(&v)))
    }
}

/// The instruction's first operand: words of registers, or a buffer's stage from there on.
enum Left<'a> {
    Words(Vec<Val>),
    Stage(&'a Buffer, Val),
}

/// The instruction's operands of a product, and whether the rows of each run across `k`.
fn in_order(g: Geometry, [a, b]: [ValueId; 2], trans_b: bool) -> ([ValueId; 2], [bool; 2]) {
    if g.transposed { ([b, a], [!trans_b, false]) } else { ([a, b], [false, !trans_b]) }
}

/// Bytes from the start of an operand to its `k`-th step of [`K_BYTES`].
fn step(data: &Buffer, k: u32, across: bool) -> u32 {
    if across {
        k * K_BYTES / data.dtype.bytes() as u32 * data.pitch
    } else {
        k * K_BYTES / data.pitch * data.panel_bytes() + k * K_BYTES % data.pitch
    }
}

impl<'a> Emit<'a> {
    /// Chains of products of a block that are over within it and leave registers for it are made in several accumulators: each
    /// instruction waits for the one before it that adds to the same.
    pub fn split_chains(&mut self, block: &Block) -> Result<(), String> {
        // A single ring feeds a contraction, whose products are in flight from round to round.
        if self.s.channels.len() == 1 {
            return Ok(());
        }
        let dots: Vec<(ValueId, ValueId, Option<ValueId>)> = block
            .insts
            .iter()
            .filter_map(|i| match &i.op {
                Op::Tile(tile::Op::Dot { a, acc, .. }) => Some((i.results[0], *a, *acc)),
                _ => None,
            })
            .collect();
        for &(first, ..) in dots.iter().filter(|d| d.2.is_none()) {
            let mut chain = vec![first];
            while let Some(next) = dots.iter().find(|d| d.2 == chain.last().copied()) {
                chain.push(next.0);
            }
            let k_bytes = |v: ValueId| {
                let a = dots.iter().find(|d| d.0 == v).map_or(v, |d| d.1);
                self.shape(a).last().copied().unwrap_or(0) * self.dtype(a).bytes() as u32
            };
            let steps: u32 = chain.iter().map(|&v| k_bytes(v) / K_BYTES).sum();
            let carried = chain.iter().any(|v| block.yields.contains(v));
            if carried || steps < LONG_CHAIN {
                continue;
            }
            let g = self.geometry(first)?;
            let count = (SPLIT_REGISTERS / (g.subs * g.wide / 2)).clamp(1, MOST_SPLIT) as usize;
            self.split.extend(chain.into_iter().map(|v| (v, count)));
        }
        Ok(())
    }

    /// Computes the descriptors of the operands of a product once, for stage 0. `trans_b` as of the product.
    pub fn prepare_descriptors(&mut self, g: Geometry, operands: [ValueId; 2], trans_b: bool) -> Result<(), String> {
        let (operands, across) = in_order(g, operands, trans_b);
        for (number, v) in operands.into_iter().enumerate().filter(|o| !self.lefts.contains(&o.1)).collect::<Vec<_>>() {
            let second = number == 1;
            let buffer = match self.defs.get(&v).map(|i| &i.op) {
                Some(Op::Take { channel, slot }) => self.s.channels[channel.0 as usize].slots[*slot as usize],
                _ => return Err("a product of what is in no ring".into()),
            };
            let data = &self.s.buffers[buffer.0 as usize];
            if data.swizzle != 128 || data.pitch != 128 {
                return Err(format!("operand {} without the 128-byte swizzle", data.name));
            }
            let base = self.t.f.add(self.t.shared32, i32(data.offset.into()));
            let at = if across[number] {
                // A single group: its rows are all the columns.
                base
            } else {
                let rows = self.t.f.mul(g.first[number], i32(data.pitch.into()));
                self.t.f.add(base, rows)
            };
            let leading = if across[number] { data.panel_bytes() } else { ptx::DESCRIPTOR_UNIT };
            let start = ptx::descriptor_start(&mut self.t.f, at, leading);
            // Only rows across `k` need the step between panels, and those along `k` do not mind it.
            if across[number] || !self.descriptors.contains_key(&(buffer, second)) {
                self.descriptors.insert((buffer, second), start);
            }
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
        let at = self.t.f.add(base, offset);
        // Of the only stage of a ring descriptors are the same in all rounds.
        if stage.int().is_none() { Ok(at) } else { Ok(self.anew(at)) }
    }

    /// The descriptor of an operand so many bytes behind a start.
    fn described(&mut self, start: Val, bytes: u32) -> Val {
        let at = self.t.f.add(start, i32((bytes / ptx::DESCRIPTOR_UNIT).into()));
        ptx::descriptor(&mut self.t.f, at, EIGHT_ROWS)
    }

    /// Columns of one instruction: the assembler wants its accumulators to fit the registers that threads start with.
    fn most_columns(&self) -> u32 {
        if self.s.threads > 3 * super::config::WARPGROUP { 128 } else { 256 }
    }

    fn buffer_of(&self, v: ValueId) -> Result<&'a Buffer, String> {
        match self.held.get(&v) {
            Some(&Held::Stage(buffer, _)) => Ok(&self.s.buffers[buffer.0 as usize]),
            _ => Err("a product of no stage".into()),
        }
    }

    /// `result = acc + a · b`, or `acc + a · bᵀ`, in flight.
    pub fn dot(
        &mut self,
        result: ValueId,
        [a, b]: [ValueId; 2],
        acc: Option<ValueId>,
        trans_b: bool,
    ) -> Result<(), String> {
        let g = self.geometry(result)?;
        let ([first, second], across) = in_order(g, [a, b], trans_b);
        let right_data = self.buffer_of(second)?;
        let dtype = right_data.dtype;
        let left = match self.held.get(&first) {
            Some(Held::Packed(words)) => Left::Words(words.clone()),
            _ => Left::Stage(self.buffer_of(first)?, self.operand(first, false)?),
        };
        let right = self.operand(second, true)?;
        let k_bytes = self.shape(a).last().copied().unwrap_or(0) * dtype.bytes() as u32;
        let per_sub = (g.wide / 2) as usize;
        let count = self.split.get(&result).copied().unwrap_or(1);
        let mut chains: Vec<Vec<Option<Vec<Val>>>> = vec![vec![None; g.subs as usize]; count];
        if let Some(acc) = acc {
            let Some(Held::Registers(values, [true, true])) = self.held.get(&acc) else {
                return Err(format!("accumulator %{} is no fragment", acc.0));
            };
            let others = self.others.remove(&acc).unwrap_or_default();
            for (chain, values) in chains.iter_mut().zip([values.clone()].into_iter().chain(others)) {
                *chain = values.chunks(per_sub).map(|c| Some(c.to_vec())).collect();
            }
            for group in self.flight.0.iter_mut().filter(|g| g.value == Some(acc)) {
                group.value = None;
            }
        }
        if std::mem::take(&mut self.unfenced) {
            ptx::fence_async(&mut self.t.f);
        }
        ptx::wgmma_fence(&mut self.t.f);
        let registers = g.subs as usize * per_sub;
        let spare = self.spare.iter().position(|s| s.len() == registers);
        let spare = spare.filter(|_| acc.is_none() && count == 1).map(|i| self.spare.remove(i));
        let pieces = g.wide.div_ceil(self.most_columns());
        let wide = g.wide / pieces;
        for k in 0..k_bytes / K_BYTES {
            let sums = &mut chains[k as usize % count];
            for (sub, sum) in sums.iter_mut().enumerate() {
                let left = match &left {
                    Left::Words(words) => ptx::Left::Registers(&words[4 * k as usize..][..4]),
                    Left::Stage(data, start) => {
                        let rows = if across[0] { data.panel_bytes() } else { ROWS * 128 };
                        let behind = step(data, k, across[0]) + sub as u32 * rows;
                        ptx::Left::Shared(self.described(*start, behind))
                    }
                };
                let mut all = Vec::new();
                for piece in 0..pieces {
                    let columns = if across[1] { wide / PANEL_ROWS * right_data.panel_bytes() } else { wide * 128 };
                    let behind = step(right_data, k, across[1]) + piece * columns;
                    let right = self.described(right, behind);
                    let own = (piece * wide / 2) as usize..((piece + 1) * wide / 2) as usize;
                    let onto = match (sum.as_ref(), &spare) {
                        (Some(sum), _) => ptx::Onto::Sum(&sum[own]),
                        (None, Some(spare)) => ptx::Onto::Over(&spare[sub * per_sub..][own]),
                        (None, None) => ptx::Onto::Zero,
                    };
                    all.extend(ptx::wgmma(&mut self.t.f, dtype, wide, onto, (left, right), across));
                }
                *sum = Some(all);
            }
        }
        ptx::wgmma_commit(&mut self.t.f);
        let mut chains: Vec<Vec<Val>> =
            chains.into_iter().map(|c| c.into_iter().flatten().flatten().collect()).collect();
        self.held.insert(result, Held::Registers(chains.remove(0), [true, true]));
        chains.retain(|c| !c.is_empty());
        self.others.insert(result, chains);
        let stages = [a, b].into_iter().filter_map(|v| match (self.defs.get(&v).map(|i| &i.op), self.held.get(&v)) {
            (Some(Op::Take { channel, .. }), Some(Held::Stage(_, stage))) => {
                Some((*channel, self.rings[channel.0 as usize].waits_since(*stage)))
            }
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
                let others = self.others.remove(&v).unwrap_or_default();
                let all: Vec<Val> = values.iter().copied().chain(others.into_iter().flatten()).collect();
                let all = ptx::pin(&mut self.t.f, &all);
                let (first, rest) = all.split_at(values.len());
                let mut pinned = first.to_vec();
                for other in rest.chunks(values.len()) {
                    for (sum, &x) in pinned.iter_mut().zip(other) {
                        *sum = self.t.f.bin("fadd", *sum, x);
                    }
                }
                self.settled = pinned.first().copied();
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
