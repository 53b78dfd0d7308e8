//! Shared memory of a block, its rings, and the registers of its roles.

use super::*;

impl<'a> Planner<'a> {
    pub(super) fn memory(&self, split: &Split, arch: &Arch) -> Option<(Vec<Buffer>, Vec<Channel>)> {
        let [heads, keys, _] = self.a.shape;
        let mut buffers: Vec<Buffer> = Vec::new();
        let mut channels = Vec::new();
        let mut end = 0u32;
        let panel = |name: String, rows: u32, columns: u32, copies: u32| Buffer {
            name,
            dtype: self.a.dtype,
            shape: [rows, columns],
            pitch: STEP_BYTES,
            swizzle: STEP_BYTES,
            copies,
            offset: 0,
        };
        let factor = |name: String, rows: u32| Buffer {
            name,
            dtype: DType::F32,
            shape: [rows, 1],
            pitch: 4,
            swizzle: 0,
            copies: 1,
            offset: 0,
        };
        let query_bytes: u32 = self.parts.iter().map(|p| heads * p.columns[1] * 2).sum();
        let key_bytes: u32 = self.parts.iter().map(|p| keys * p.columns[1] * 2).sum();
        let vectors = (split.factors.len() + split.totals.len()) as u32 * heads * 4;
        let exchange = if self.transposed { 2 * 4 * heads * 4 } else { 0 };
        let beside = query_bytes + (heads * keys * 2).next_multiple_of(ALIGN) + vectors + exchange + ALIGN;
        let stages = (arch.shared_per_block.checked_sub(beside)? / key_bytes).min(MOST_STAGES);
        if stages < 2 {
            return None;
        }
        let mut place = |mut b: Buffer, buffers: &mut Vec<Buffer>| {
            end = if b.swizzle > 0 { end.next_multiple_of(ALIGN) } else { end };
            b.offset = end;
            end += b.bytes();
            buffers.push(b);
            BufferId(buffers.len() as u32 - 1)
        };
        let mut channel = |name: &str, stages: u32, slots: Vec<BufferId>| {
            channels.push(Channel { name: name.into(), stages, slots });
        };
        let mut slots = Vec::new();
        for (i, p) in self.parts.iter().enumerate() {
            slots.push(place(panel(format!("queries{i}"), heads, p.columns[1], 1), &mut buffers));
        }
        channel("queries", 1, slots);
        for (i, p) in self.parts.iter().enumerate() {
            let slot = place(panel(format!("keys{i}"), keys, p.columns[1], stages), &mut buffers);
            channel(&format!("keys{i}"), stages, vec![slot]);
        }
        let mut slots = vec![place(panel("weights".into(), heads, keys, 1), &mut buffers)];
        for i in 0..split.factors.len() {
            slots.push(place(factor(format!("factors{i}"), heads), &mut buffers));
        }
        channel("weights", 1, slots);
        if !split.totals.is_empty() {
            let slots = (0..split.totals.len()).map(|i| place(factor(format!("totals{i}"), heads), &mut buffers));
            let slots = slots.collect();
            channel("totals", 1, slots);
        }
        if self.transposed {
            for name in ["maxima", "sums"] {
                let lines = Buffer { shape: [4, heads], pitch: heads * 4, ..factor(name.into(), 4) };
                place(lines, &mut buffers);
            }
        }
        Some((buffers, channels))
    }

    /// Registers of threads that bring keys, that score, and that have values; zeros where they need not move.
    pub(super) fn registers(&self) -> [u32; 3] {
        if self.groups < 2 || self.transposed && self.bringing() == 1 {
            return [0; 3];
        }
        match (self.bringing() > 1, self.parts.iter().any(|p| p.computed)) {
            (true, _) => FEW_HEADS,
            (_, true) if self.cluster.is_some() => PAIRED,
            (_, true) => COMPUTING,
            (_, false) => GATHERING,
        }
    }
}
