//! Shared memory of a block, its rings, and the registers of its roles.

use super::*;

/// Bytes of the barriers of a stage.
const BARRIERS: u32 = 16;

/// What is placed so far.
#[derive(Default)]
struct Placed {
    buffers: Vec<Buffer>,
    channels: Vec<Channel>,
    end: u32,
}

impl Placed {
    fn put(&mut self, mut b: Buffer) -> BufferId {
        self.end = if b.swizzle > 0 { self.end.next_multiple_of(ALIGN) } else { self.end };
        b.offset = self.end;
        self.end += b.bytes();
        self.buffers.push(b);
        BufferId(self.buffers.len() as u32 - 1)
    }

    fn channel(&mut self, name: &str, stages: u32, slots: Vec<Buffer>) {
        let slots = slots.into_iter().map(|b| self.put(b)).collect();
        self.channels.push(Channel { name: name.into(), stages, turns: 1, slots });
    }
}

impl<'a> Planner<'a> {
    /// An operand of products: panels of a swizzled span.
    fn panel(&self, name: String, rows: u32, columns: u32, copies: u32) -> Buffer {
        let (pitch, swizzle) = (STEP_BYTES, STEP_BYTES);
        Buffer { name, dtype: self.a.dtype, shape: [rows, columns], pitch, swizzle, copies, offset: 0, outside: false }
    }

    /// Weights, and what goes with them: a value a row each.
    fn weights(&self, name: &str, factors: usize) -> Vec<Buffer> {
        let [heads, keys, _] = self.a.shape;
        let mut slots = vec![self.panel(format!("weights{name}"), heads, keys, 1)];
        slots.extend((0..factors).map(|i| column(format!("factors{name}{i}"), heads)));
        slots
    }

    /// Queries, and rings of keys of these depths.
    fn operands(&self, depths: &[u32], placed: &mut Placed) {
        let [heads, keys, _] = self.a.shape;
        let queries = |(i, p): (usize, &Part)| self.panel(format!("queries{i}"), heads, p.columns[1], 1);
        placed.channel("queries", 1, self.parts.iter().enumerate().map(queries).collect());
        for (i, (p, &stages)) in self.parts.iter().zip(depths).enumerate() {
            let name = format!("keys{i}");
            placed.channel(&name, stages, vec![self.panel(name.clone(), keys, p.columns[1], stages)]);
        }
    }

    fn totals(&self, split: &Split, placed: &mut Placed) {
        // Where blocks join, each group computes them itself.
        if !split.totals.is_empty() && self.team.is_none() {
            let slots = (0..split.totals.len()).map(|i| column(format!("totals{i}"), self.a.shape[0]));
            placed.channel("totals", 1, slots.collect());
        }
    }

    /// Bytes of a stage of keys of each part.
    fn stage_bytes(&self) -> Vec<u32> {
        self.parts.iter().map(|p| self.a.shape[1] * p.columns[1] * 2).collect()
    }

    /// Bytes of queries and of a round's weights.
    fn query_bytes(&self) -> [u32; 2] {
        let [heads, keys, _] = self.a.shape;
        let queries = self.parts.iter().map(|p| heads * p.columns[1] * 2).sum();
        [queries, (heads * keys * 2).next_multiple_of(ALIGN)]
    }

    /// Where one warpgroup scores.
    pub(super) fn memory(&self, split: &Split, arch: &Arch) -> Option<(Vec<Buffer>, Vec<Channel>)> {
        let heads = self.a.shape[0];
        let [queries, weights] = self.query_bytes();
        let vectors = (split.factors.len() + split.totals.len()) as u32 * heads * 4;
        let exchange = if self.transposed { 2 * 4 * heads * 4 } else { 0 };
        let beside = queries + weights + vectors + exchange + ALIGN + self.meeting();
        let keys = self.stage_bytes().iter().sum::<u32>();
        let stages = (arch.shared_per_block.checked_sub(beside)? / keys).min(MOST_STAGES);
        if stages < 2 {
            return None;
        }
        let mut placed = Placed::default();
        self.operands(&vec![stages; self.parts.len()], &mut placed);
        placed.channel("weights", 1, self.weights("", split.factors.len()));
        self.totals(split, &mut placed);
        if self.transposed {
            for name in ["maxima", "sums"] {
                placed.put(Buffer { shape: [4, heads], pitch: heads * 4, ..column(name.into(), 4) });
            }
        }
        Some((placed.buffers, placed.channels))
    }

    /// Where two warpgroups score in turn: weights both ways, with factors and carried rows.
    pub(super) fn memory_of_turns(&self, split: &Split, arch: &Arch) -> Option<(Vec<Buffer>, Vec<Channel>)> {
        // Keys that are no values are held for the scores alone, so that one round of them fewer will do.
        let depths = |stages: u32, fewer: u32| -> Vec<u32> {
            self.parts.iter().map(|p| if p.group.is_none() { stages - fewer } else { stages }).collect()
        };
        let all = (2..=MOST_STAGES).rev().flat_map(|stages| [depths(stages, 0), depths(stages, 1)]);
        let mut placed = all.map(|depths| self.placed_in_turns(split, &depths));
        let barriers = |p: &Placed| p.channels.iter().map(|c| c.stages * BARRIERS).sum::<u32>();
        let fitting = |p: &Placed| p.end + barriers(p) + self.meeting();
        let placed = placed.find(|p| fitting(p) <= arch.shared_per_block)?;
        Some((placed.buffers, placed.channels))
    }

    /// The same with rings of keys of these depths.
    fn placed_in_turns(&self, split: &Split, depths: &[u32]) -> Placed {
        let [early, late] = [self.rows_early(split).len(), self.rows_late(split).len()];
        let heads = self.a.shape[0];
        let mut placed = Placed::default();
        self.operands(depths, &mut placed);
        let mut first = None;
        for name in ["_a", "_b"] {
            let mut slots = self.weights(name, split.factors.len());
            slots.extend((0..early).map(|i| column(format!("rows{name}{i}"), heads)));
            // Weights go one way at a time, so that both ways can have one buffer.
            let shared = first.filter(|_| self.shares_weights());
            slots.drain(..usize::from(shared.is_some()));
            let slots = shared.into_iter().chain(slots.into_iter().map(|b| placed.put(b))).collect::<Vec<_>>();
            first = slots.first().copied();
            placed.channels.push(Channel { name: format!("weights{name}"), stages: 1, turns: 1, slots });
        }
        for name in ["_a", "_b"].into_iter().filter(|_| late > 0) {
            let slots = (0..late).map(|i| column(format!("late{name}{i}"), heads));
            placed.channel(&format!("late{name}"), 1, slots.collect());
        }
        self.totals(split, &mut placed);
        placed
    }

    /// Registers of threads that bring keys, that score, and that have values; zeros where they need not move.
    pub(super) fn registers(&self) -> [u32; 3] {
        let computed = self.parts.iter().any(|p| p.computed);
        match (self.takes_turns(), computed, self.cluster) {
            (false, ..) => {
                if self.bringing() > 1 {
                    FEW_HEADS
                } else {
                    [0; 3]
                }
            }
            (true, false, _) => TURNS_GATHERING,
            (true, true, None) => TURNS_COMPUTING,
            (true, true, Some(_)) => TURNS_PAIRED,
        }
    }
}

/// An f32 a row.
pub(super) fn column(name: String, rows: u32) -> Buffer {
    Buffer { name, dtype: DType::F32, shape: [rows, 1], pitch: 4, swizzle: 0, copies: 1, offset: 0, outside: false }
}
