//! What a step is fed with, in one buffer: so that feeding it is one copy.

use dsc_ir::SymValues;
use dsc_ir::graph::StepInput;
use dsc_ir::sample::Draw;

/// Distance of inputs in the buffer: what wide loads want.
const ALIGN: u64 = 64;
/// Where inputs lie, one behind the other: the page table last, as it is by far the largest and seldom full.
const ORDER: [StepInput; StepInput::ALL.len()] = [
    StepInput::Tokens,
    StepInput::Positions,
    StepInput::Seqs,
    StepInput::Slots,
    StepInput::LogitRows,
    StepInput::Draws,
    StepInput::PageTable,
];

/// The inputs of one step.
#[derive(Clone, Debug, Default)]
pub(crate) struct Feed {
    pub(crate) tokens: Vec<u32>,
    pub(crate) positions: Vec<u32>,
    pub(crate) seqs: Vec<u32>,
    pub(crate) slots: Vec<u32>,
    /// Row by row.
    pub(crate) page_table: Vec<u32>,
    pub(crate) logit_rows: Vec<u32>,
    /// One a row with logits, or none where no tokens are wanted.
    pub(crate) draws: Vec<Draw>,
}

/// Where the inputs of a step class lie.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Layout {
    at: [u64; StepInput::ALL.len()],
    bytes: u64,
}

impl Layout {
    /// With room for steps whose symbols are at most `limits`.
    pub(crate) fn new(limits: &SymValues) -> Layout {
        let mut layout = Layout::default();
        for input in ORDER {
            layout.bytes = layout.bytes.next_multiple_of(ALIGN);
            layout.at[input as usize] = layout.bytes;
            layout.bytes += 4 * input.shape().iter().map(|e| e.eval(limits)).product::<u64>();
        }
        layout
    }

    /// Bytes of the buffer.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Where an input starts.
    pub(crate) fn at(&self, input: StepInput) -> u64 {
        self.at[input as usize]
    }

    /// The buffer's bytes, up to the last that is used.
    pub(crate) fn pack(&self, feed: &Feed) -> Vec<u8> {
        let draws: Vec<u32> = feed.draws.iter().flat_map(|d| d.bits()).map(|b| b as u32).collect();
        let mut bytes = Vec::new();
        for input in ORDER {
            let values = match input {
                StepInput::Tokens => &feed.tokens,
                StepInput::Positions => &feed.positions,
                StepInput::Seqs => &feed.seqs,
                StepInput::Slots => &feed.slots,
                StepInput::LogitRows => &feed.logit_rows,
                StepInput::Draws => &draws,
                StepInput::PageTable => &feed.page_table,
            };
            bytes.resize(self.at(input) as usize, 0);
            bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inputs_lie_apart_and_in_one_piece() {
        let limits = SymValues([5, 2, 3, 4, 9, 9]);
        let layout = Layout::new(&limits);
        let mut places: Vec<(u64, u64)> = StepInput::ALL
            .into_iter()
            .map(|i| (layout.at(i), 4 * i.shape().iter().map(|e| e.eval(&limits)).product::<u64>()))
            .collect();
        places.sort_unstable();
        assert!(places.windows(2).all(|p| p[0].0 + p[0].1 <= p[1].0), "{places:?}");
        assert_eq!(places.last().map(|p| p.0 + p.1), Some(layout.bytes()));
        let draws = vec![Draw { temperature: 1.0, top_p: 0.5, quantile: 0.25 }];
        let feed = Feed { tokens: vec![7, 8], page_table: vec![3, u32::MAX], draws, ..Feed::default() };
        let bytes = layout.pack(&feed);
        let word = |input, i: usize| {
            let at = layout.at(input) as usize + 4 * i;
            bytes[at..at + 4].try_into().map(u32::from_le_bytes).ok()
        };
        assert_eq!(word(StepInput::Tokens, 1), Some(8));
        assert_eq!(word(StepInput::Draws, 1), Some(0.5f32.to_bits()));
        assert_eq!(word(StepInput::PageTable, 1), Some(u32::MAX));
        assert_eq!(bytes.len() as u64, layout.at(StepInput::PageTable) + 8);
    }
}
