//! Requests on a model without kernels: how they are cut, what they leave in the cache.

use super::*;
use crate::device::{Bound, BoundLaunch, Code};
use crate::session::tests::toy::{VOCAB, model};
use crate::{Options, Weights};
use dsc_ir::artifact::Numerics;
use dsc_ir::graph::StepInput;
use std::ops::ControlFlow;

/// A model without kernels: the device below stands in for them.
mod toy {
    use super::*;
    use crate::testing::{header, write_artifact, write_checkpoint};

    pub(super) const VOCAB: u32 = 11;

    pub(super) fn model(steps: &[(&str, [u32; 6])], context: Option<u32>) -> Result<(Model, tempfile::TempDir), Error> {
        let mut header = header();
        header.model.vocab = VOCAB;
        header.model.eos = vec![10];
        header.model.max_context = 1000;
        header.kernels.clear();
        let step = |(name, max): &(&str, [u32; 6])| Step {
            name: name.to_string(),
            max: SymValues(*max),
            arena_bytes: 1 << 16,
            launches: Vec::new(),
            loops: Vec::new(),
            collectives: Vec::new(),
            sampling: 0,
            taps: vec![Tap { name: "hidden.0".into(), after: 0, at: 64, columns: 2, dtype: DType::Bf16 }],
        };
        header.steps = steps.iter().map(step).collect();
        let dir = tempfile::tempdir().unwrap();
        write_checkpoint(dir.path());
        let path = write_artifact(dir.path(), &mut header, &[0xc3]);
        let options = Options { threads: 1, context_tokens: context, ..Options::default() };
        Model::open(&path, dir.path(), &options).map(|m| (m, dir))
    }
}

/// Keeps what it is given, and makes logits that depend on all tokens of the sequence, read through the page table.
#[derive(Default)]
struct FakeDevice {
    buffers: Vec<Vec<u8>>,
    names: Vec<&'static str>,
    cache: BTreeMap<u32, u32>,
    bound: Vec<Layout>,
    runs: Arc<std::sync::Mutex<Vec<SymValues>>>,
}

impl FakeDevice {
    fn buffer(&self, name: &str) -> usize {
        self.names.iter().position(|n| *n == name).unwrap()
    }
    fn input(&self, bound: Bound, input: StepInput) -> Vec<u32> {
        let bytes = &self.buffers[self.buffer("step inputs")][self.bound[bound.0].at(input) as usize..];
        bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    }
}

impl Device for FakeDevice {
    fn describe(&self) -> String {
        "fake".into()
    }
    fn load_code(&mut self, _: &Header, _: Code<'_>) -> Result<(), DeviceError> {
        Ok(())
    }
    fn load_weights(&mut self, _: &Arc<Weights>, _: &(dyn Fn(u64, u64) + Sync)) -> Result<Vec<Buffer>, DeviceError> {
        Ok(vec![Buffer(usize::MAX); 8])
    }
    fn alloc(&mut self, bytes: u64, what: &'static str) -> Result<Buffer, DeviceError> {
        self.buffers.push(vec![0; bytes as usize]);
        self.names.push(what);
        Ok(Buffer(self.buffers.len() - 1))
    }
    fn upload(&mut self, buffer: Buffer, at: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        self.buffers[buffer.0][at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }
    fn read(&mut self, buffer: Buffer, at: u64, bytes: &mut [u8]) -> Result<(), DeviceError> {
        bytes.copy_from_slice(&self.buffers[buffer.0][at as usize..at as usize + bytes.len()]);
        Ok(())
    }
    fn bind(&mut self, _: &[BoundLaunch], limits: &SymValues) -> Result<Bound, DeviceError> {
        self.bound.push(Layout::new(limits));
        Ok(Bound(self.bound.len() - 1))
    }
    fn run(
        &mut self,
        bound: Bound,
        _: std::ops::Range<usize>,
        syms: &SymValues,
        _: Option<&mut LaunchTimes>,
    ) -> Result<(), DeviceError> {
        self.runs.lock().unwrap().push(*syms);
        let [tokens, positions, seqs] =
            [StepInput::Tokens, StepInput::Positions, StepInput::Seqs].map(|i| self.input(bound, i));
        let [slots, table, rows, draws] =
            [StepInput::Slots, StepInput::PageTable, StepInput::LogitRows, StepInput::Draws]
                .map(|i| self.input(bound, i));
        for t in 0..syms.get(Sym::T) as usize {
            self.cache.insert(slots[t], tokens[t]);
        }
        let (logits, chosen) = (self.buffer("logits"), self.buffer("tokens"));
        for (l, &row) in rows.iter().take(syms.get(Sym::L) as usize).enumerate() {
            let row = row as usize;
            let mut sum = 7u32;
            for p in 0..=positions[row] {
                let page = table[(seqs[row] * syms.get(Sym::P) + p / PAGE_TOKENS) as usize];
                sum = sum.wrapping_mul(31).wrapping_add(self.cache[&(page * PAGE_TOKENS + p % PAGE_TOKENS)]);
            }
            let row: Vec<f32> = (0..VOCAB).map(|v| (sum.wrapping_mul(v + 1) >> 8) as f32).collect();
            for (v, x) in row.iter().enumerate() {
                let at = (l * VOCAB as usize + v) * 4;
                self.buffers[logits][at..at + 4].copy_from_slice(&x.to_le_bytes());
            }
            let draw = Draw::from_bits([draws[3 * l], draws[3 * l + 1], draws[3 * l + 2]].map(|b| b as i32));
            let token = draw.pick(&row.iter().map(|&x| f64::from(x)).collect::<Vec<_>>()).map_or(-1, |t| t as i32);
            self.buffers[chosen][4 * l..4 * l + 4].copy_from_slice(&token.to_le_bytes());
        }
        Ok(())
    }
}

const STEPS: &[(&str, [u32; 6])] = &[
    ("decode", [4, 4, 1000, 4, 1 << 20, 1000]),
    ("prefill_short", [100, 1, 1000, 100, 1 << 20, 50]),
    ("prefill", [100, 1, 1000, 100, 1 << 20, 1000]),
];

type Runs = Arc<std::sync::Mutex<Vec<SymValues>>>;

fn session(context: u32) -> (Session, Runs, tempfile::TempDir) {
    let (model, dir) = model(STEPS, Some(context)).unwrap();
    let device = FakeDevice::default();
    let runs = Arc::clone(&device.runs);
    (model.session_on(Box::new(device)).unwrap(), runs, dir)
}

fn text(length: usize, salt: u32) -> Vec<u32> {
    (0..length as u32).map(|i| (i * 7 + salt) % VOCAB).collect()
}

#[test]
fn chunks_do_not_change_results() {
    let (mut session, runs, _dir) = session(1024);
    let tokens = text(300, 3);
    let whole = session.add_sequence();
    let all = session.step(&[SequenceInput { seq: whole, tokens: &tokens }], LogitsWanted::All, true).unwrap();
    assert_eq!((all.rows, all.logits.len()), (300, 300 * VOCAB as usize));
    assert_eq!(all.taps["hidden.0"].columns, 2);
    assert_eq!(all.taps["hidden.0"].data, TapData::F32(vec![0.0; 600]));
    let lengths: Vec<u32> = runs.lock().unwrap().iter().map(|s| s.get(Sym::T)).collect();
    assert_eq!(lengths, [100, 100, 100, 100, 100, 100], "two runs a chunk: before and after the tap");

    let (mut at, split) = (0, session.add_sequence());
    for length in [1, 2, 63, 64, 65, 105] {
        let input = SequenceInput { seq: split, tokens: &tokens[at..at + length] };
        let last = session.step(&[input], LogitsWanted::Last, false).unwrap();
        at += length;
        assert_eq!(last.row(0), all.row(at - 1));
    }
    session.truncate_sequence(split, 70);
    let again = SequenceInput { seq: split, tokens: &tokens[70..80] };
    assert_eq!(session.step(&[again], LogitsWanted::Rows(&[0, 9]), false).unwrap().row(1), all.row(79));
}

#[test]
fn batches_do_not_change_results() {
    let (mut session, runs, _dir) = session(512);
    let texts = [text(3, 1), text(70, 2), text(1, 3), text(2, 4), text(1, 5)];
    let alone: Vec<Vec<f32>> = texts
        .iter()
        .map(|tokens| {
            let seq = session.add_sequence();
            let out = session.step(&[SequenceInput { seq, tokens }], LogitsWanted::Last, false).unwrap();
            session.remove_sequence(seq);
            out.logits
        })
        .collect();
    runs.lock().unwrap().clear();
    let inputs: Vec<SequenceInput<'_>> =
        texts.iter().map(|tokens| SequenceInput { seq: session.add_sequence(), tokens }).collect();
    let together = session.step(&inputs, LogitsWanted::Last, false).unwrap();
    assert_eq!(together.rows, 5);
    for (i, logits) in alone.iter().enumerate() {
        assert_eq!(together.row(i), logits);
    }
    let shapes: Vec<(u32, u32)> = runs.lock().unwrap().iter().map(|s| (s.get(Sym::T), s.get(Sym::S))).collect();
    assert_eq!(shapes, [(4, 2), (69, 1), (4, 3)]);
}

#[test]
fn pages_come_back_and_limits_have_names() {
    let (mut session, _, _dir) = session(128);
    assert_eq!(session.context_limit(), 128);
    let (a, b) = (session.add_sequence(), session.add_sequence());
    let mut run = |seq, tokens: &[u32]| {
        session.step(&[SequenceInput { seq, tokens }], LogitsWanted::Last, false).map(drop).map_err(|e| e.to_string())
    };
    run(a, &text(64, 0)).unwrap();
    run(b, &text(64, 0)).unwrap();
    assert!(run(a, &[1]).unwrap_err().contains("0 free pages of 64 tokens, 1 are needed"));
    let long = run(a, &text(65, 0)).unwrap_err();
    assert!(long.contains("129 tokens is beyond the limit of 128") && long.contains("context_tokens"), "{long}");
    assert!(run(a, &[VOCAB]).unwrap_err().contains("outside the vocabulary of 11"));
    assert!(run(a, &[]).unwrap_err().contains("no tokens"));
    assert!(run(SeqId(99), &[1]).unwrap_err().contains("another session"));
    session.remove_sequence(b);
    let input = SequenceInput { seq: a, tokens: &[1] };
    assert!(session.step(&[input, input], LogitsWanted::Last, false).is_err());
    assert!(session.step(&[input], LogitsWanted::Rows(&[1]), false).is_err());
    session.step(&[input], LogitsWanted::Last, false).unwrap();
    assert_eq!(session.sequence_tokens(a), Some(65));
}

#[test]
fn forks_have_pages_of_their_own() {
    let (mut session, _, _dir) = session(512);
    let seq = session.add_sequence();
    session.step(&[SequenceInput { seq, tokens: &text(70, 2) }], LogitsWanted::Last, false).unwrap();
    let fork = session.fork(seq).unwrap();
    assert_eq!(session.sequence_tokens(fork), Some(70));
    let pages = |s: SeqId| session.sequences[&s].pages.clone();
    assert_eq!((pages(seq), pages(fork)), (vec![0, 1], vec![2, 3]));
    for _ in 0..2 {
        session.fork(seq).unwrap();
    }
    assert!(session.fork(seq).unwrap_err().to_string().contains("0 free pages"));
    assert!(session.fork(SeqId(99)).is_err());
}

#[test]
fn one_rank_of_several_is_refused() {
    let mut header = crate::testing::header();
    (header.model.ranks, header.model.rank) = (8, 3);
    let dir = tempfile::tempdir().unwrap();
    let path = crate::testing::write_artifact(dir.path(), &mut header, &[0xc3; 18]);
    let error = Model::open(&path, dir.path(), &Options::default()).unwrap_err().to_string();
    assert!(error.contains("rank 3 of 8") && error.contains("--tp 1"), "{error}");
}

#[test]
fn capacity_beyond_the_kernels_is_refused() {
    let steps = [("decode", [4, 4, 2, 4, 2, 1000])];
    assert!(model(&steps, Some(129)).unwrap_err().to_string().contains("beyond the limit of 128"));
    assert!(model(&steps, Some(128)).is_ok());
    assert!(model(&steps, Some(0)).is_err());
}

#[test]
fn generates() {
    let (mut session, _, _dir) = session(128);
    let options = GenerateOptions { max_new_tokens: 500, ignore_eos: true, ..GenerateOptions::default() };
    let mut seen = Vec::new();
    let all = session
        .generate(&text(100, 1), &options, &mut |t| {
            seen.push(t);
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!((all.finish_reason, all.token_ids.len()), (FinishReason::Context, 29));
    assert_eq!(seen, all.token_ids);
    let short = GenerateOptions { max_new_tokens: 3, ..options.clone() };
    let three = session.generate(&text(100, 1), &short, &mut |_| ControlFlow::Continue(())).unwrap();
    assert_eq!((three.finish_reason, &three.token_ids[..]), (FinishReason::Length, &all.token_ids[..3]));
    let stop = GenerateOptions { eos: Some(vec![all.token_ids[1]]), ignore_eos: false, ..options.clone() };
    let stopped = session.generate(&text(100, 1), &stop, &mut |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(stopped.finish_reason, FinishReason::Stop);
    assert_eq!(stopped.token_ids.last(), Some(&all.token_ids[1]));
    let one = session.generate(&text(100, 1), &options, &mut |_| ControlFlow::Break(())).unwrap();
    assert_eq!((one.finish_reason, one.token_ids.len()), (FinishReason::Cancelled, 1));
}

#[test]
fn evaluates_by_windows() {
    let (mut session, _, _dir) = session(128);
    let result = session.evaluate(&text(35, 2), 11, 0).unwrap();
    assert_eq!((result.scored_tokens, result.window_nats.len()), (30, 3));
    assert!((result.nats_per_token - result.window_nats.iter().sum::<f64>() / 30.0).abs() < 1e-9);
    assert!(session.evaluate(&text(5, 2), 11, 0).unwrap_err().to_string().contains("fill no window"));
    assert!(session.evaluate(&text(5, 2), 1, 0).is_err());
}

#[test]
fn verifies_both_layouts() {
    use crate::testing::{RawTensor, write_tensors};
    use crate::verify::Tolerances;
    let (mut session, _, dir) = session(256);
    let prompt = text(40, 1);
    let seq = session.add_sequence();
    let all = session.step(&[SequenceInput { seq, tokens: &prompt }], LogitsWanted::All, true).unwrap();
    session.remove_sequence(seq);
    let options = GenerateOptions { max_new_tokens: 6, ignore_eos: true, ..GenerateOptions::default() };
    let greedy = session.generate(&prompt, &options, &mut |_| ControlFlow::Continue(())).unwrap().token_ids;
    let ids = |ids: &[u32]| ids.iter().flat_map(|t| t.to_le_bytes()).collect::<Vec<u8>>();
    let floats = |values: &[f32]| values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    let path = dir.path().join("golden.safetensors");
    let mut verify = |tensors: &[RawTensor<'_>]| {
        write_tensors(&path, tensors);
        session.verify(&path, &Tolerances::of(Numerics::Exact))
    };

    let logits = ("logits", "F32", &[40, 11][..], floats(&all.logits));
    let report = verify(&[
        ("input_ids", "I32", &[40], ids(&prompt)),
        logits.clone(),
        ("hidden.0", "F32", &[40, 2], floats(&[0.0; 80])),
        ("hidden.7", "F32", &[40, 2], floats(&[0.0; 80])),
        ("greedy_ids", "I32", &[6], ids(&greedy)),
    ])
    .unwrap();
    assert!(report.passed(), "{report:?}");
    assert_eq!(
        (report.greedy[0].equal, report.hidden.len(), &report.not_compared[..]),
        (6, 1, &["hidden.7".into()][..])
    );

    let mut wrong = greedy.clone();
    wrong[2] = (wrong[2] + 1) % VOCAB;
    let report = verify(&[
        ("prompt_ids", "I32", &[40], ids(&prompt)),
        logits,
        ("greedy.long.ids", "I32", &[6], ids(&greedy)),
        ("greedy.0.prompt_ids", "I32", &[40], ids(&prompt)),
        ("greedy.0.ids", "I32", &[3], ids(&wrong[..3])),
    ])
    .unwrap();
    assert_eq!(report.failures, ["greedy.0.ids: 2 of 3 greedy tokens agree"]);
    assert_eq!(report.greedy[0].first_difference.map(|d| d.0), Some(2));
    assert!(verify(&[("x", "U8", &[1], vec![0])]).unwrap_err().to_string().contains("no input_ids"));
    assert!(verify(&[("input_ids", "I32", &[1], ids(&[3]))]).is_err());
}

#[test]
fn admits_the_longest_prefix() {
    let limits = SymValues([8, 2, 100, 3, 100, 20]);
    let tokens = [0; 30];
    let left = |parts: &[(u32, usize)]| -> Vec<(SeqId, u32, &[u32])> {
        parts.iter().rev().map(|&(start, n)| (SeqId(0), start, &tokens[..n])).collect()
    };
    assert_eq!(admitted(&limits, &left(&[(0, 5)]), 0, &[4]), 5);
    assert_eq!(admitted(&limits, &left(&[(0, 30)]), 0, &[29]), 8);
    assert_eq!(admitted(&limits, &left(&[(15, 30)]), 0, &[29]), 5, "context");
    assert_eq!(admitted(&limits, &left(&[(0, 1), (0, 1), (0, 1)]), 7, &[7, 8, 9]), 2, "sequences");
    assert_eq!(admitted(&limits, &left(&[(0, 8)]), 10, &[10, 11, 13, 16]), 6, "rows");
    assert_eq!(admitted(&limits, &left(&[(20, 1)]), 0, &[]), 0);
}
