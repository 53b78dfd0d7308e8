//! Every emitter against the graph's meaning: a small graph runs on the graph interpreter and, launch by launch, as tile programs
//! on the tile interpreter (races checked, memory full of NaN before), and the outputs are compared.

use super::*;
use crate::front::config::ModelConfig;
use crate::front::model::BuildOptions;
use crate::passes::Cx;
use crate::{front, passes};
use dsc_ir::artifact::Numerics;
use dsc_ir::artifact::WeightSource;
use dsc_ir::dtype::{e4m3_to_f32, pow2_ceil};
use dsc_ir::graph::interp::{Interp, StepInputs, StepValue};
use dsc_ir::graph::weights::{Data, TensorData, materialize};
use dsc_ir::graph::{
    Elem, Fused, PAGE_TOKENS, Quant, RopeLayout, State, StateFormat, StepInput, TensorType, ValueType, Weight,
};
use dsc_ir::sample::Draw;
use dsc_ir::tile::interp::{Binding, Options, block_count, run_blocks};
use dsc_ir::tile::{self, Region};
use dsc_ir::{Extent, SymValues};
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

const ROWS: Quant = Quant { block: [1, 128], pow2: true };
const BLOCKS: Quant = Quant { block: [128, 128], pow2: false };
const T: Sym = Sym::T;
const L: Sym = Sym::L;

/// Shapes from numbers and symbols.
macro_rules! dims {
    ($($d:expr),*) => { &[$(Extent::from($d)),*] };
}

fn plain(dtype: DType, shape: &[Extent]) -> TensorType {
    TensorType::plain(dtype, shape)
}

fn f32s(shape: &[Extent]) -> TensorType {
    plain(DType::F32, shape)
}

/// A graph under construction and its random weights.
struct Lab {
    g: Graph,
    weights: HashMap<String, TensorData<f32>>,
    seed: u64,
    schedule: Schedule,
    vocab: u32,
    races: bool,
}

impl Lab {
    fn new(seed: u64) -> Lab {
        let schedule = Schedule { tile_m: 4, tile_n: 16, tile_k: 32, ..Schedule::default() };
        Lab { g: Graph::default(), weights: HashMap::new(), seed, schedule, vocab: 19, races: true }
    }

    fn random(&mut self) -> f32 {
        self.seed = self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.seed >> 40) as f32) / (1u64 << 23) as f32 - 1.0
    }

    fn input(&mut self, input: StepInput) -> Value {
        self.g.add1(format!("{input:?}"), Op::Input(input), &[], plain(DType::I32, &input.shape()))
    }

    fn weight(&mut self, ty: TensorType) -> Value {
        let shape: Vec<usize> = ty.shape.iter().map(|e| e.constant().unwrap() as usize).collect();
        let n: usize = shape.iter().product();
        let data = match ty.elem {
            Elem::Plain(dtype) => Data::Real((0..n).map(|_| dtype.round(self.random())).collect()),
            Elem::Quant(quant) => {
                let codes = (0..n).map(|_| dsc_ir::dtype::f32_to_e4m3(self.random() * 100.0)).collect();
                let scales: u32 = ty.scale_shape().unwrap().iter().map(|e| e.factor).product();
                let scales = (0..scales).map(|_| (self.random() + 1.5) * 0.01).collect();
                Data::Quant { codes, scales, quant }
            }
        };
        self.weight_of(ty, TensorData::new(shape, data))
    }

    fn weight_of(&mut self, ty: TensorType, data: TensorData<f32>) -> Value {
        let index = self.g.weights.len() as u32;
        let name = format!("w{index}");
        self.weights.insert(name.clone(), data);
        self.g.weights.push(Weight { name: name.clone(), ty: ty.clone(), source: WeightSource::Tensors(vec![]) });
        self.g.add1(name, Op::Weight(index), &[], ty)
    }

    fn rope_table(&mut self, dim: u32) -> Value {
        let mut data = Vec::new();
        for p in 0..512 {
            let angle = |i: u32| f64::from(p) * 100f64.powf(-f64::from(2 * i) / f64::from(dim));
            data.extend((0..dim / 2).map(|i| angle(i).cos() as f32));
            data.extend((0..dim / 2).map(|i| angle(i).sin() as f32));
        }
        let data = TensorData::real(vec![512, dim as usize], data);
        self.weight_of(f32s(dims![512, dim]), data)
    }

    /// A state.
    fn state(&mut self, format: StateFormat) -> Value {
        let index = self.g.states.len() as u32;
        let name = format!("state{index}");
        self.g.states.push(State { name: name.clone(), format });
        let node = self.g.add(name, Op::State(index), &[], vec![ValueType::State(format)]);
        Value { node, output: 0 }
    }

    /// The state of that index after the step.
    fn keep(&mut self, index: usize, value: Value) {
        let name = self.g.states[index].name.clone();
        self.g.outputs.push((name, value));
    }

    fn op(&mut self, op: Op, inputs: &[Value], ty: TensorType) -> Value {
        let name = format!("{}.{}", op_name(&op), self.g.dag.node_count());
        self.g.add1(name, op, inputs, ty)
    }

    fn out(&mut self, value: Value) {
        let name = format!("out.{}", self.g.outputs.len());
        self.g.outputs.push((name, value));
    }

    /// Random activations `[T, ..]`: an embedding.
    fn act(&mut self, dtype: DType, dims: &[u32]) -> Value {
        let columns: u32 = dims.iter().product();
        let (vocab, mut ids) =
            (self.vocab, self.g.dag.node_indices().find(|&n| self.g.dag[n].op == Op::Input(StepInput::Tokens)));
        let ids = match ids.take() {
            Some(node) => Value { node, output: 0 },
            None => self.input(StepInput::Tokens),
        };
        let table = self.weight(plain(dtype, dims![vocab, columns]));
        let x = self.op(Op::Embed, &[ids, table], plain(dtype, dims![T, columns]));
        if dims.len() == 1 {
            return x;
        }
        let shape: Vec<Extent> = [T.into()].into_iter().chain(dims.iter().map(|&d| d.into())).collect();
        self.op(Op::Reshape, &[x], plain(dtype, &shape))
    }

    fn quantized(&mut self, x: Value, quant: Quant) -> Value {
        let shape = self.g.tensor(x).shape.clone();
        self.op(Op::Quantize, &[x], TensorType::quant(quant, &shape))
    }

    fn dequantized(&mut self, x: Value) -> Value {
        let shape = self.g.tensor(x).shape.clone();
        self.op(Op::Dequantize, &[x], f32s(&shape))
    }

    fn fused(
        &mut self,
        kind: FusedKind,
        below: u32,
        inputs: &[Value],
        make: impl FnOnce(&mut Graph, &[Value]) -> Vec<Value>,
    ) -> Vec<Value> {
        let mut body = Graph::default();
        let mut args = Vec::new();
        for (i, &v) in inputs.iter().enumerate() {
            let node = body.add(format!("arg.{i}"), Op::Arg(i as u32), &[], vec![self.g.ty(v).clone()]);
            args.push(Value { node, output: 0 });
        }
        let outputs = make(&mut body, &args);
        let types: Vec<ValueType> = outputs.iter().map(|&v| body.ty(v).clone()).collect();
        body.outputs = outputs.into_iter().enumerate().map(|(i, v)| (format!("out.{i}"), v)).collect();
        let n = types.len() as u32;
        let fused = Fused { kind, select_all_below: below, body };
        let node = self.g.add(format!("fused.{}", self.g.dag.node_count()), Op::Fused(Box::new(fused)), inputs, types);
        (0..n).map(|output| Value { node, output }).collect()
    }

    /// Runs steps both ways and compares. Several classes: exactly fitting, and roomy.
    fn check(&self, steps: &[StepInputs]) {
        for roomy in [false, true] {
            let mut interp = Interp::<f32>::new(&self.g, &|w| Ok::<_, String>(self.weights[&w.name].clone())).unwrap();
            let mut machine = Machine::default();
            for step in steps {
                let expected = interp.step(step).unwrap();
                let pages = step.page_table.iter().flatten().max().map_or(1, |&p| p as u32 + 1).max(8);
                let syms = step.syms().unwrap().with(Sym::N, pages);
                let got = machine.step(self, step, &syms, roomy, &HashMap::new());
                for (name, value) in &self.g.outputs {
                    if let (StepValue::Tensor(e), Some(g)) = (&expected[name], got.get(value)) {
                        compare(name, e, g, self.g.tensor(*value));
                    }
                }
            }
        }
    }
}

/// Executes launches on the tile interpreter.
#[derive(Default)]
struct Machine {
    states: HashMap<u32, Vec<u8>>,
}

fn encode(dtype: DType, x: f32) -> Vec<u8> {
    match dtype {
        DType::F32 => x.to_le_bytes().to_vec(),
        DType::Bf16 => half::bf16::from_f32(x).to_le_bytes().to_vec(),
        DType::F16 => half::f16::from_f32(x).to_le_bytes().to_vec(),
        _ => panic!("not stored plain"),
    }
}

fn decode(dtype: DType, bytes: &[u8]) -> Vec<f32> {
    let words = |n: usize| bytes.chunks_exact(n);
    match dtype {
        DType::F32 => words(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect(),
        DType::I32 => words(4).map(|c| i32::from_le_bytes(c.try_into().unwrap()) as f32).collect(),
        DType::Bf16 => words(2).map(|c| half::bf16::from_le_bytes(c.try_into().unwrap()).to_f32()).collect(),
        DType::F16 => words(2).map(|c| half::f16::from_le_bytes(c.try_into().unwrap()).to_f32()).collect(),
        DType::E4m3 => bytes.iter().map(|&c| e4m3_to_f32(c)).collect(),
        DType::Bool => panic!("not stored"),
    }
}

/// A tensor as it lies in memory.
fn bytes(tensor: &TensorData<f32>, elem: Elem) -> Made {
    match (&tensor.data, elem) {
        (Data::Real(x), Elem::Plain(d)) => (x.iter().flat_map(|&x| encode(d, x)).collect(), vec![]),
        (Data::Quant { codes, scales, .. }, _) => {
            (codes.clone(), scales.iter().flat_map(|s| s.to_le_bytes()).collect())
        }
        (Data::Int(x), _) => (ints(x), vec![]),
        (Data::Real(_), Elem::Quant(_)) => panic!("plain data of a quantised type"),
    }
}

fn ints(values: &[i32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// Data and scales of a result.
type Made = (Vec<u8>, Vec<u8>);

impl Machine {
    /// Runs the launches of a step; results named in `expected` are compared, and given to later launches instead of ours.
    fn step(
        &mut self,
        lab: &Lab,
        step: &StepInputs,
        syms: &SymValues,
        roomy: bool,
        expected: &HashMap<Value, Arc<TensorData<f32>>>,
    ) -> HashMap<Value, Made> {
        let g = &lab.g;
        let mut class = Class { name: "test".into(), max: *syms, keep_mha: true, pieces: None };
        if roomy {
            for sym in [Sym::T, Sym::C, Sym::L] {
                class.max = class.max.with(sym, syms.get(sym) + 7);
            }
        }
        let mut made: HashMap<ArgRef, Vec<u8>> = HashMap::new();
        for node in g.order() {
            let value = Value { node, output: 0 };
            let arg = ArgRef { value, part: Part::Data };
            match &g.dag[node].op {
                Op::Input(i) => {
                    let bytes = match i {
                        StepInput::Tokens => ints(&step.tokens),
                        StepInput::Positions => ints(&step.positions),
                        StepInput::Seqs => ints(&step.seqs),
                        StepInput::Slots => ints(&step.slots),
                        StepInput::PageTable => ints(&step.page_table.concat()),
                        StepInput::LogitRows => ints(&step.logit_rows),
                        StepInput::Draws => ints(&step.draw_bits()),
                    };
                    made.insert(arg, bytes);
                }
                Op::Weight(i) => self.weight(lab, *i, value, &mut made),
                Op::State(i) => {
                    let pages = syms.get(Sym::N) as usize;
                    let bytes = vec![0xff; pages * g.states[*i as usize].format.page_bytes() as usize];
                    let state = self.states.entry(*i).or_insert(bytes);
                    state.resize(pages * g.states[*i as usize].format.page_bytes() as usize, 0xff);
                    made.insert(arg, state.clone());
                }
                _ if launches(g, node) => {
                    launch(lab, node, &class, syms, &mut made);
                    for output in 0..g.dag[node].outputs.len() as u32 {
                        let value = Value { node, output };
                        let Some(right) = expected.get(&value) else { continue };
                        let [data, scales] = [Part::Data, Part::Scales].map(|part| ArgRef { value, part });
                        let name = format!("{} ({})", g.dag[node].name, op_name(&g.dag[node].op));
                        compare(&name, right, &(made[&data].clone(), made[&scales].clone()), g.tensor(value));
                        let (d, s) = bytes(right, g.tensor(value).elem);
                        made.insert(data, d);
                        made.insert(scales, s);
                    }
                }
                _ => {}
            }
        }
        for (node, i) in g.dag.node_indices().filter_map(|n| match g.dag[n].op {
            Op::State(i) => Some((n, i)),
            _ => None,
        }) {
            let arg = ArgRef { value: Value { node, output: 0 }, part: Part::Data };
            self.states.insert(i, made[&arg].clone());
        }
        let outputs = g.outputs.iter().filter(|(_, v)| g.ty(*v).tensor().is_some());
        outputs
            .map(|(_, v)| {
                let (root, _) = resolve(g, *v).unwrap();
                let get = |part| made.get(&ArgRef { value: root, part }).cloned().unwrap_or_default();
                (*v, (get(Part::Data), get(Part::Scales)))
            })
            .collect()
    }

    fn weight(&self, lab: &Lab, i: u32, value: Value, made: &mut HashMap<ArgRef, Vec<u8>>) {
        let weight = &lab.g.weights[i as usize];
        let (data, scales) = bytes(&lab.weights[&weight.name], weight.ty.elem);
        made.insert(ArgRef { value, part: Part::Data }, data);
        made.insert(ArgRef { value, part: Part::Scales }, scales);
    }
}

fn bytes_of(ty: &TensorType, syms: &SymValues, part: Part) -> usize {
    let (shape, bytes) = match part {
        Part::Data => (Some(ty.shape.clone()), view::storage(ty.elem).bytes()),
        Part::Scales => (ty.scale_shape(), 4),
    };
    shape.map_or(0, |s| s.iter().map(|e| e.eval(syms) as usize).product::<usize>() * bytes)
}

fn launch(lab: &Lab, node: NodeId, class: &Class, syms: &SymValues, made: &mut HashMap<ArgRef, Vec<u8>>) {
    let emitted = emit(&lab.g, node, &lab.schedule, class).unwrap_or_else(|e| panic!("{e}"));
    let again = emit(&lab.g, node, &lab.schedule, class).unwrap();
    assert_eq!(emitted, again, "emission is deterministic");
    let _ = shape_of(&lab.g, node, class);
    for (output, ty) in lab.g.dag[node].outputs.iter().enumerate() {
        let value = Value { node, output: output as u32 };
        if let Some(ty) = ty.tensor() {
            for part in [Part::Data, Part::Scales] {
                made.insert(ArgRef { value, part }, vec![0xff; bytes_of(ty, syms, part)]);
            }
        }
    }
    assert_eq!(emitted.args.len(), emitted.program.params.len());
    let mut used: Vec<ArgRef> = emitted.args.clone();
    used.sort_unstable();
    used.dedup();
    let mut buffers: Vec<Vec<u8>> = used.iter().map(|a| made[a].clone()).collect();
    let bindings: Vec<Binding> =
        emitted.args.iter().map(|a| Binding { buffer: used.iter().position(|u| u == a).unwrap(), offset: 0 }).collect();
    let blocks = block_count(&emitted.program, syms).unwrap();
    let options = Options { check_races: lab.races };
    run_blocks(&emitted.program, syms, &mut buffers, &bindings, 0..blocks, options).unwrap_or_else(|e| panic!("{e}"));
    for (arg, bytes) in used.into_iter().zip(buffers) {
        made.insert(arg, bytes);
    }
}

/// NaN positions, then absolute or relative error; integers exactly; codes by value, a step apart at most.
fn compare(name: &str, expected: &TensorData<f32>, (data, scales): &Made, ty: &TensorType) {
    match (&expected.data, ty.elem) {
        (Data::Int(e), _) => {
            let got: Vec<i32> = data.chunks_exact(4).map(|c| i32::from_le_bytes(c.try_into().unwrap())).collect();
            assert_eq!(&got, e, "{name}");
        }
        (Data::Real(e), Elem::Plain(dtype)) => {
            let tolerance = if dtype == DType::F32 { 2e-5 } else { 1e-2 };
            close(name, e, &decode(dtype, data), tolerance);
        }
        (Data::Quant { scales: s, .. }, _) => {
            let got_scales = decode(DType::F32, scales);
            // Of cached codes the interpreter knows what they stand for only: it may write the same with half the scale.
            if !name.contains("cachelatent") {
                close(name, s, &got_scales, 1e-6);
            }
            let columns = *expected.shape.last().unwrap();
            let Elem::Quant(q) = ty.elem else { panic!("{name}: plain for quantised") };
            let groups = columns.div_ceil(q.block[1] as usize);
            let got: Vec<f32> = decode(DType::E4m3, data)
                .iter()
                .enumerate()
                .map(|(i, c)| c * got_scales[i / columns * groups + i % columns / q.block[1] as usize])
                .collect();
            close(name, expected.values(), &got, 0.1);
        }
        _ => panic!("{name}: {:?}", ty.elem),
    }
}

fn close(name: &str, expected: &[f32], got: &[f32], tolerance: f32) {
    assert_eq!(expected.len(), got.len(), "{name}");
    let size = expected.iter().filter(|x| x.is_finite()).fold(0f32, |m, x| m.max(x.abs()));
    for (i, (&e, &g)) in expected.iter().zip(got).enumerate() {
        let bad = e.is_nan() != g.is_nan() || (e != g && (e - g).abs() > tolerance * (e.abs() + 0.1 * size));
        assert!(!bad, "{name}[{i}]: {e} expected, {g} computed");
    }
}

/// Tokens of one sequence, with scrambled pages.
/// Tokens by temperature and nucleus, where every logit is in play, next to greedy rows and rows without numbers.
#[test]
fn sampling() {
    for (columns, parts) in [(40, 1), (300, 3), (20_000, 5)] {
        let mut lab = Lab::new(77);
        let rows = lab.input(StepInput::LogitRows);
        let x = lab.act(DType::F32, &[columns]);
        let x = lab.op(Op::Scale { factor: 8.0 }, &[x], f32s(dims![T, columns]));
        let x = lab.op(Op::TakeRows, &[x, rows], f32s(dims![L, columns]));
        let types = [DType::F32, DType::I32].map(|d| ValueType::Tensor(plain(d, dims![L, parts]))).to_vec();
        let node = lab.g.add("largest", Op::ArgMax { parts }, &[x], types);
        let [largest, numbers] = [0, 1].map(|output| Value { node, output });
        let draws = lab.input(StepInput::Draws);
        let tokens = lab.op(Op::Sample, &[x, largest, numbers, draws], plain(DType::I32, dims![L]));
        for value in [largest, numbers, tokens] {
            lab.out(value);
        }
        let mut step = sequence(12, 0);
        step.draws = (0..12)
            .map(|i| Draw {
                temperature: [0.0, 0.5, 2.0][i % 3],
                top_p: [1.0, 0.9, 0.3, 0.01][i % 4],
                quantile: i as f32 / 12.0 + 0.03,
            })
            .collect();
        lab.check(&[step]);
    }
}

fn sequence(n: usize, start: usize) -> StepInputs {
    let tokens: Vec<i32> = (start..start + n).map(|i| (i * 7 % 19) as i32).collect();
    let mut step = StepInputs::sequence(&tokens, start);
    let table: Vec<i32> = (0..step.page_table[0].len() as i32).map(|p| (p * 3 + 2) % 7).collect();
    step.slots = step.positions.iter().map(|&p| table[p as usize / 64] * 64 + p % 64).collect();
    step.page_table = vec![table];
    step
}

#[test]
fn linear_with_plain_operands() {
    for (dtype, weight, out) in [
        (DType::F32, DType::F32, DType::F32),
        (DType::Bf16, DType::Bf16, DType::Bf16),
        (DType::F32, DType::F16, DType::F32),
    ] {
        let mut lab = Lab::new(1);
        let x = lab.act(dtype, &[100]);
        let part = lab.op(Op::SliceLast { start: 10, len: 70 }, &[x], plain(dtype, dims![T, 70]));
        for (x, k) in [(x, 100), (part, 70)] {
            let w = lab.weight(plain(weight, dims![33, k]));
            let y = lab.op(Op::Linear, &[x, w], plain(out, dims![T, 33]));
            lab.out(y);
        }
        lab.check(&[sequence(1, 0), sequence(5, 0), sequence(17, 0)]);
    }
}

#[test]
fn linear_with_quantised_operands() {
    for (n, k, tile_n) in [(200, 300, 16), (130, 128, 128), (48, 96, 24), (576, 256, 64)] {
        let mut lab = Lab::new(2);
        lab.schedule.tile_n = tile_n;
        let x = lab.act(DType::Bf16, &[k]);
        let q = lab.quantized(x, ROWS);
        let w = lab.weight(TensorType::quant(BLOCKS, dims![n, k]));
        let p = lab.weight(f32s(dims![n, k]));
        for (a, b) in [(q, w), (x, w), (q, p)] {
            let y = lab.op(Op::Linear, &[a, b], f32s(dims![T, n]));
            lab.out(y);
        }
        lab.out(q);
        lab.check(&[sequence(1, 0), sequence(6, 0)]);
    }
}

#[test]
fn products_side_by_side() {
    let mut lab = Lab::new(31);
    let x = lab.act(DType::Bf16, &[256]);
    let codes = lab.quantized(x, ROWS);
    let (w, v) =
        (lab.weight(plain(DType::Bf16, dims![24, 256])), lab.weight(TensorType::quant(BLOCKS, dims![200, 256])));
    // In parts and whole, several tiles of columns and one.
    let made = lab.fused(FusedKind::Beside, 0, &[codes, v, x, w], |g, a| {
        let wide = g.add1("wide", Op::LinearPartial { parts: 2 }, &a[..2], f32s(dims![T, 2, 200]));
        let narrow = g.add1("narrow", Op::Linear, &a[2..], plain(DType::F32, dims![T, 24]));
        vec![wide, narrow]
    });
    made.into_iter().for_each(|v| lab.out(v));
    lab.check(&[sequence(13, 0), sequence(1, 13)]);
}

#[test]
fn head_linear_both_ways() {
    for dtype in [DType::F32, DType::Bf16] {
        let mut lab = Lab::new(3);
        let x = lab.act(dtype, &[6, 64]);
        let w = lab.weight(plain(dtype, dims![6 * 80, 96]));
        let nope = lab.op(Op::SliceLast { start: 0, len: 40 }, &[x], plain(dtype, dims![T, 6, 40]));
        let up = Op::HeadLinear { first: 0, count: 40, transposed: false };
        let latent = lab.op(up, &[nope, w], plain(dtype, dims![T, 6, 96]));
        let down = Op::HeadLinear { first: 40, count: 36, transposed: true };
        let value = lab.op(down, &[latent, w], plain(dtype, dims![T, 6, 36]));
        let flat = lab.op(Op::Reshape, &[value], plain(dtype, dims![T, 216]));
        lab.out(latent);
        lab.out(value);
        let wo = lab.weight(plain(dtype, dims![50, 216]));
        let y = lab.op(Op::Linear, &[flat, wo], plain(dtype, dims![T, 50]));
        lab.out(y);
        lab.check(&[sequence(1, 0), sequence(7, 0)]);
    }
}

/// Router to expert sum, as passes leave it; products look for their rows by place or by expert, and keep them sorted from one to the next.
fn moe(
    lab: &mut Lab,
    x: Value,
    quant: bool,
    [by_place, sorted]: [bool; 2],
    [experts, groups, keep, k]: [u32; 4],
    d: u32,
) {
    let router = lab.weight(f32s(dims![experts, d]));
    let bias = lab.weight(f32s(dims![experts]));
    let logits = lab.op(Op::Linear, &[x, router], f32s(dims![T, experts]));
    let gate = lab.fused(FusedKind::Gate, 0, &[logits, bias], |g, a| {
        let s = g.add1("s", Op::Sigmoid, &[a[0]], f32s(dims![T, experts]));
        let b = g.add1("b", Op::Add, &[s, a[1]], f32s(dims![T, experts]));
        let ids = g.add1("ids", Op::GroupTopK { groups, keep, k }, &[b], plain(DType::I32, dims![T, k]));
        let p = g.add1("p", Op::TakeAlong, &[s, ids], f32s(dims![T, k]));
        let w = g.add1("w", Op::Normalize { factor: 2.5, by_sum: true }, &[p], f32s(dims![T, k]));
        vec![ids, w]
    });
    let ints = |shape: &[Extent]| ValueType::Tensor(plain(DType::I32, shape));
    let types = vec![ints(&[Extent::from(T).times(k)]), ints(dims![experts + 1]), ints(&[Extent::from(T).times(k)])];
    let route = lab.g.add("route", Op::Route { experts }, &[gate[0]], types);
    let [order, offsets, owners] = [0, 1, 2].map(|output| Value { node: route, output });
    let inner = 72;
    let weight = |lab: &mut Lab, n: u32, k: u32| {
        lab.weight(if quant { TensorType::quant(BLOCKS, dims![experts, n, k]) } else { f32s(dims![experts, n, k]) })
    };
    let (up, down) = (weight(lab, inner, d), weight(lab, d, inner));
    let mut h_in = x;
    if quant {
        h_in = lab.quantized(x, ROWS);
    }
    let routed = &[order, offsets, owners][..if by_place { 3 } else { 2 }];
    let first = Op::ExpertLinear { per_token: k, x_sorted: false, y_sorted: sorted };
    let h = lab.op(first, &[&[h_in, up], routed].concat(), f32s(dims![T, k, inner]));
    let mut act = lab.op(Op::SwiGlu, &[h, h], f32s(dims![T, k, inner]));
    if quant {
        act = lab.quantized(act, ROWS);
    }
    let second = Op::ExpertLinear { per_token: k, x_sorted: sorted, y_sorted: false };
    let y = lab.op(second, &[&[act, down], routed].concat(), f32s(dims![T, k, d]));
    let total = lab.op(Op::WeightedSum, &[y, gate[1]], f32s(dims![T, d]));
    for v in [gate[0], gate[1], order, offsets, owners, h, total] {
        lab.out(v);
    }
}

#[test]
fn experts_gate_and_route() {
    // The tiles of the last two make routes of blocks: by lines of three rows, and of 21; of few experts, and of more than there are.
    for ((quant, rows), sizes, [tile_m, tile_n]) in [
        ((false, [false, false]), [12, 3, 2, 4], [4, 0]),
        ((true, [true, false]), [12, 3, 1, 3], [4, 16]),
        ((true, [false, true]), [12, 3, 1, 3], [4, 16]),
        ((false, [true, false]), [8, 1, 1, 2], [4, 0]),
        ((false, [false, true]), [8, 1, 1, 2], [4, 16]),
        ((false, [true, false]), [8, 8, 3, 2], [96, 3]),
        ((false, [false, false]), [12, 4, 4, 3], [700, 16]),
    ] {
        let mut lab = Lab::new(4);
        (lab.schedule.tile_m, lab.schedule.tile_n) = (tile_m, tile_n);
        let d = if quant { 160 } else { 40 };
        let x = lab.act(DType::F32, &[d]);
        moe(&mut lab, x, quant, rows, sizes, d);
        lab.check(&[sequence(1, 0), sequence(9, 0), sequence(40, 0)]);
    }
}

#[test]
fn experts_of_several_tall_tiles() {
    for sorted in [false, true] {
        let mut lab = Lab::new(4);
        (lab.schedule.tile_m, lab.schedule.tile_n) = (192, 32);
        let x = lab.act(DType::F32, &[40]);
        moe(&mut lab, x, false, [false, sorted], [4, 1, 1, 2], 40);
        lab.check(&[sequence(790, 0)]);
    }
}

#[test]
fn scores_that_vanish_weigh_nothing() {
    let mut lab = Lab::new(4);
    let x = lab.act(DType::F32, &[12]);
    let bias = lab.weight_of(f32s(dims![12]), TensorData::real(vec![12], vec![-300.0; 12]));
    let weights = lab.fused(FusedKind::Gate, 0, &[x, bias], |g, a| {
        let b = g.add1("b", Op::Add, &[a[0], a[1]], f32s(dims![T, 12]));
        let s = g.add1("s", Op::Sigmoid, &[b], f32s(dims![T, 12]));
        vec![g.add1("w", Op::Normalize { factor: 2.5, by_sum: true }, &[s], f32s(dims![T, 12]))]
    });
    lab.out(weights[0]);
    lab.check(&[sequence(3, 0)]);
    let mut interp = Interp::<f32>::new(&lab.g, &|w| Ok::<_, String>(lab.weights[&w.name].clone())).unwrap();
    let all = interp.step(&sequence(3, 0)).unwrap();
    let StepValue::Tensor(made) = &all[&lab.g.outputs[0].0] else { panic!("a tensor") };
    assert_eq!(made.values(), [0.0; 36]);
}

#[test]
fn rows_of_norms_and_sums() {
    for (dtype, tile_m, split) in [(DType::F32, 1, 0), (DType::Bf16, 1, 8), (DType::Bf16, 4, 2)] {
        let mut lab = Lab::new(5);
        (lab.schedule.tile_m, lab.schedule.split) = (tile_m, split);
        let (a, b) = (lab.act(dtype, &[200]), lab.act(dtype, &[200]));
        let (gain, bias) = (lab.weight(f32s(dims![200])), lab.weight(f32s(dims![200])));
        let head_gain = lab.weight(plain(dtype, dims![40]));
        let ty = plain(dtype, dims![T, 200]);
        let outs = lab.fused(FusedKind::Row, 0, &[a, b, gain, bias, head_gain], |g, x| {
            let s = g.add1("s", Op::Add, &[x[0], x[1]], f32s(dims![T, 200]));
            let h = g.add1("h", Op::Cast, &[s], ty.clone());
            let n = g.add1("n", Op::RmsNorm { eps: 1e-6 }, &[s, x[2]], ty.clone());
            let q = g.add1("q", Op::Quantize, &[n], TensorType::quant(ROWS, dims![T, 200]));
            let l = g.add1("l", Op::LayerNorm { eps: 1e-6 }, &[h, x[2], x[3]], ty.clone());
            let m = g.add1("m", Op::SwiGlu, &[l, n], ty.clone());
            let c = g.add1("c", Op::Scale { factor: 0.37 }, &[m], ty.clone());
            let heads = g.add1("heads", Op::Reshape, &[c], plain(dtype, dims![T, 5, 40]));
            let hn = g.add1("hn", Op::RmsNorm { eps: 1e-5 }, &[heads, x[4]], plain(dtype, dims![T, 5, 40]));
            let part = g.add1("part", Op::SliceLast { start: 8, len: 32 }, &[hn], plain(dtype, dims![T, 5, 32]));
            let w = g.add1("w", Op::Hadamard, &[part], plain(dtype, dims![T, 5, 32]));
            let wq = g.add1(
                "wq",
                Op::Quantize,
                &[w],
                TensorType::quant(Quant { block: [1, 32], pow2: true }, dims![T, 5, 32]),
            );
            let d = g.add1("d", Op::Dequantize, &[q], f32s(dims![T, 200]));
            let biased = g.add1("biased", Op::Add, &[d, x[3]], f32s(dims![T, 200]));
            let shifted =
                g.add1("shifted", Op::SliceLast { start: 60, len: 140 }, &[x[0]], plain(dtype, dims![T, 140]));
            let sg = g.add1("sg", Op::Sigmoid, &[shifted], plain(dtype, dims![T, 140]));
            vec![h, n, q, l, w, wq, biased, sg]
        });
        outs.into_iter().for_each(|v| lab.out(v));
        lab.check(&[sequence(1, 0), sequence(6, 0)]);
    }
}

#[test]
fn rope_in_both_layouts() {
    for (layout, tile_m) in
        [(RopeLayout::Interleaved, 1), (RopeLayout::Half, 1), (RopeLayout::Interleaved, 4), (RopeLayout::Half, 4)]
    {
        let mut lab = Lab::new(6);
        lab.schedule.tile_m = tile_m;
        let (positions, table) = (lab.input(StepInput::Positions), lab.rope_table(16));
        let (x, y) = (lab.act(DType::F32, &[6, 40]), lab.act(DType::Bf16, &[24]));
        for start in [0, 24, 11] {
            let r = lab.op(Op::Rope { layout, start }, &[x, positions, table], f32s(dims![T, 6, 40]));
            lab.out(r);
        }
        let r = lab.op(Op::Rope { layout, start: 0 }, &[y, positions, table], plain(DType::Bf16, dims![T, 24]));
        lab.out(r);
        lab.check(&[sequence(5, 0), sequence(1, 77)]);
    }
}

#[test]
fn heads_of_rows_in_groups() {
    // The last by products with a matrix: four tokens of five heads; and so many times in turn, the last of them past the last token.
    let all = [(0, 0, 0, 0), (1, 0, 0, 0), (2, 0, 0, 0), (4, 0, 0, 0), (0, 4, 16, 0), (0, 4, 16, 2), (0, 4, 16, 3)];
    for (tile_h, tile_m, tile_k, in_turn) in all {
        let mut lab = Lab::new(61);
        (lab.schedule.tile_h, lab.schedule.tile_m, lab.schedule.tile_k) = (tile_h, tile_m, tile_k);
        lab.schedule.in_turn = in_turn;
        let (positions, table) = (lab.input(StepInput::Positions), lab.rope_table(16));
        // Two sets of heads, as queries and those of an indexer: not as many, not as wide.
        let (q, iq) = (lab.act(DType::Bf16, &[6, 40]), lab.act(DType::Bf16, &[5, 32]));
        let layout = RopeLayout::Interleaved;
        let outs = lab.fused(FusedKind::Row, 0, &[q, iq, positions, table], |g, x| {
            let ty = |heads: u32, width: u32| plain(DType::Bf16, dims![T, heads, width]);
            let q = g.add1("q", Op::Rope { layout, start: 24 }, &[x[0], x[2], x[3]], ty(6, 40));
            let turned = g.add1("turned", Op::Rope { layout, start: 0 }, &[x[1], x[2], x[3]], ty(5, 32));
            let mixed = g.add1("mixed", Op::Hadamard, &[turned], ty(5, 32));
            let by = Quant { block: [1, 32], pow2: true };
            vec![q, g.add1("iq", Op::Quantize, &[mixed], TensorType::quant(by, dims![T, 5, 32]))]
        });
        outs.into_iter().for_each(|v| lab.out(v));
        lab.check(&[sequence(5, 0), sequence(1, 77)]);
    }
}

/// Heads of queries as a step has them: turned, multiplied, and those of an indexer.
fn heads(lab: &mut Lab) -> Vec<Value> {
    let (positions, table) = (lab.input(StepInput::Positions), lab.rope_table(16));
    let (rope, q, iq) =
        (lab.act(DType::Bf16, &[6, 16]), lab.act(DType::Bf16, &[6, 24]), lab.act(DType::Bf16, &[5, 32]));
    let w = lab.weight(plain(DType::Bf16, dims![6 * 44, 64]));
    let outs = lab.fused(FusedKind::Heads, 0, &[rope, q, iq, positions, table, w], |g, x| {
        let ty = |heads: u32, width: u32| plain(DType::Bf16, dims![T, heads, width]);
        let layout = RopeLayout::Interleaved;
        let rope = g.add1("rope", Op::Rope { layout, start: 0 }, &[x[0], x[3], x[4]], ty(6, 16));
        let up = Op::HeadLinear { first: 0, count: 24, transposed: false };
        let up = g.add1("up", up, &[x[1], x[5]], ty(6, 64));
        let mixed = g.add1("mixed", Op::Hadamard, &[x[2]], ty(5, 32));
        let by = Quant { block: [1, 32], pow2: true };
        vec![rope, up, g.add1("iq", Op::Quantize, &[mixed], TensorType::quant(by, dims![T, 5, 32]))]
    });
    outs.iter().for_each(|&v| lab.out(v));
    outs
}

#[test]
fn independent_results_in_blocks_of_their_own() {
    // All in one; one each; columns of the product in four, where blocks are allowed for all of them.
    for (split, tile_n, blocks) in [(0, 16, None), (2, 0, Some(2)), (8, 0, Some(3)), (5, 16, Some(3)), (8, 16, Some(6))]
    {
        let mut lab = Lab::new(62);
        (lab.schedule.split, lab.schedule.tile_n, lab.schedule.tile_m) = (split, tile_n, 2);
        let outs = heads(&mut lab);
        let class = Class { name: "test".into(), max: SymValues([8; 6]), keep_mha: false, pieces: None };
        let made = emit(&lab.g, outs[0].node, &lab.schedule, &class).unwrap();
        let along: Vec<Option<u32>> = made.program.grid.iter().map(|dim| dim.extent.constant()).collect();
        let expected: Vec<Option<u32>> = [None, Some(6)].into_iter().chain(blocks.map(Some)).collect();
        assert_eq!(along, expected, "split {split}, columns {tile_n}");
        lab.check(&[sequence(5, 0), sequence(1, 77)]);
    }
}

#[test]
fn embed_and_head() {
    let mut lab = Lab::new(7);
    let rows = lab.input(StepInput::LogitRows);
    let x = lab.act(DType::Bf16, &[96]);
    let (gain, head) = (lab.weight(f32s(dims![96])), lab.weight(plain(DType::Bf16, dims![30, 96])));
    let l = Sym::L;
    let normed = lab.fused(FusedKind::Row, 0, &[x, rows, gain], |g, a| {
        let taken = g.add1("taken", Op::TakeRows, &[a[0], a[1]], plain(DType::Bf16, dims![l, 96]));
        vec![g.add1("n", Op::RmsNorm { eps: 1e-6 }, &[taken, a[2]], f32s(dims![l, 96]))]
    })[0];
    let logits = lab.op(Op::Linear, &[normed, head], f32s(dims![l, 30]));
    lab.out(x);
    lab.out(logits);
    let mut some = sequence(9, 0);
    some.logit_rows = vec![8, 3];
    lab.check(&[sequence(1, 0), some]);
}

/// Writes rows of the step to a latent cache.
fn write_latent(lab: &mut Lab, format: StateFormat) -> Value {
    let (StateFormat::LatentFp8 { latent, rope } | StateFormat::Latent { latent, rope, .. }) = format else {
        panic!("a latent cache")
    };
    let dtype = if let StateFormat::Latent { dtype, .. } = format { dtype } else { DType::Bf16 };
    let (state, slots) = (lab.state(format), lab.input(StepInput::Slots));
    let (c, r) = (lab.act(dtype, &[latent]), lab.act(dtype, &[rope]));
    let index = lab.g.states.len() - 1;
    let fp8 = matches!(format, StateFormat::LatentFp8 { .. });
    let written = lab.fused(FusedKind::Row, 0, &[state, slots, c, r], |g, a| {
        let mut c = a[2];
        if fp8 {
            c = g.add1("q", Op::Quantize, &[c], TensorType::quant(ROWS, dims![T, latent]));
        }
        let node = g.add("write", Op::CacheWrite, &[a[0], a[1], c, a[3]], vec![ValueType::State(format)]);
        vec![Value { node, output: 0 }]
    })[0];
    lab.keep(index, written);
    written
}

/// Writes rows of the step to an index cache.
fn write_index(lab: &mut Lab, format: StateFormat) -> Value {
    let (StateFormat::IndexFp8 { dim } | StateFormat::Index { dim, .. }) = format else { panic!("an index cache") };
    let dtype = if let StateFormat::Index { dtype, .. } = format { dtype } else { DType::Bf16 };
    let (state, slots) = (lab.state(format), lab.input(StepInput::Slots));
    let mut key = lab.act(dtype, &[dim]);
    if let StateFormat::IndexFp8 { dim } = format {
        key = lab.quantized(key, Quant { block: [1, dim], pow2: true });
    }
    let index = lab.g.states.len() - 1;
    let node = lab.g.add("write", Op::CacheWrite, &[state, slots, key], vec![ValueType::State(format)]);
    let written = Value { node, output: 0 };
    lab.keep(index, written);
    written
}

const LATENTS: [StateFormat; 5] = [
    StateFormat::LatentFp8 { latent: 256, rope: 16 },
    StateFormat::LatentFp8 { latent: 96, rope: 8 },
    StateFormat::LatentFp8 { latent: 200, rope: 8 },
    StateFormat::Latent { latent: 96, rope: 16, dtype: DType::Bf16 },
    StateFormat::Latent { latent: 64, rope: 8, dtype: DType::F32 },
];

#[test]
fn latent_caches_are_read_back_by_position() {
    for format in LATENTS {
        for (tile_m, split) in [(1, 0), (4, 0), (1, 8), (4, 8)] {
            let mut lab = Lab::new(8);
            (lab.schedule.tile_m, lab.schedule.split) = (tile_m, split);
            let written = write_latent(&mut lab, format);
            let pages = lab.input(StepInput::PageTable);
            let (StateFormat::LatentFp8 { latent, rope } | StateFormat::Latent { latent, rope, .. }) = format else {
                panic!("a latent cache")
            };
            let c = lab.op(Op::CacheLatent, &[written, pages], f32s(dims![Sym::S, Sym::C, latent]));
            let r = lab.op(Op::CacheRope, &[written, pages], plain(DType::Bf16, dims![Sym::S, Sym::C, rope]));
            lab.out(c);
            lab.out(r);
            for dtype in [DType::Bf16, DType::F32] {
                let rows = lab.op(Op::CacheRows, &[written, pages], plain(dtype, dims![Sym::C, latent + rope]));
                lab.out(rows);
            }
            let q = lab.op(Op::Quantize, &[c], TensorType::quant(ROWS, dims![Sym::S, Sym::C, latent]));
            lab.out(q);
            let w = lab.weight(f32s(dims![20, latent]));
            for x in [c, q] {
                let y = lab.op(Op::Linear, &[x, w], f32s(dims![Sym::S, Sym::C, 20]));
                lab.out(y);
            }
            lab.check(&[sequence(70, 0), sequence(1, 70), sequence(5, 71)]);
        }
    }
}

/// Which ops of the chain run where.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    Whole,
    Split,
    Alone,
}

/// Indexer, selection and attention of GLM-like odd dims.
fn sparse(lab: &mut Lab, index: StateFormat, latent: StateFormat, k: u32, below: u32, form: Form) {
    let (keys, rows) = (write_index(lab, index), write_latent(lab, latent));
    let (positions, seqs, pages) =
        (lab.input(StepInput::Positions), lab.input(StepInput::Seqs), lab.input(StepInput::PageTable));
    let (StateFormat::IndexFp8 { dim } | StateFormat::Index { dim, .. }) = index else { panic!("an index cache") };
    let (StateFormat::LatentFp8 { latent: l, rope } | StateFormat::Latent { latent: l, rope, .. }) = latent else {
        panic!("a latent cache")
    };
    let mut q = lab.act(DType::Bf16, &[4, dim]);
    if matches!(index, StateFormat::IndexFp8 { .. }) {
        q = lab.quantized(q, Quant { block: [1, dim], pow2: true });
    }
    let weights = lab.act(DType::F32, &[4]);
    let (ql, qr) = (lab.act(DType::F32, &[6, l]), lab.act(DType::F32, &[6, rope + 8]));
    let qr = lab.op(Op::SliceLast { start: 8, len: rope }, &[qr], f32s(dims![T, 6, rope]));
    let (logits_ty, selected_ty) = (f32s(dims![T, Sym::C]), plain(DType::I32, dims![T, k]));
    let (logits, topk, mqa) = (Op::IndexerLogits, Op::TopK { k }, Op::MqaAttention { scale: 0.17, narrow: false });
    let o_ty = plain(DType::F32, dims![T, 6, l]);
    let args = [q, weights, keys, positions, seqs, pages, ql, qr, rows];
    match form {
        Form::Whole => {
            let outs = lab.fused(FusedKind::SparseAttention, below, &args, |g, a| {
                let x = g.add1("logits", logits, &a[..6], logits_ty);
                let s = g.add1("topk", topk, &[x], selected_ty);
                let o = g.add1("o", mqa, &[a[6], a[7], a[8], s, a[4], a[5]], o_ty);
                vec![o, s]
            });
            outs.into_iter().for_each(|v| lab.out(v));
        }
        Form::Split => {
            let s = lab.fused(FusedKind::SparseAttention, below, &args[..6], |g, a| {
                let x = g.add1("logits", logits, &a[..6], logits_ty);
                vec![g.add1("topk", topk, &[x], selected_ty)]
            })[0];
            let inputs = [ql, qr, rows, s, seqs, pages];
            let o = lab.fused(FusedKind::SparseAttention, 0, &inputs, |g, a| vec![g.add1("o", mqa, a, o_ty)])[0];
            lab.out(s);
            lab.out(o);
        }
        Form::Alone => {
            let x = lab.op(logits, &args[..6], logits_ty);
            let s = lab.op(topk, &[x], selected_ty);
            let o = lab.op(mqa, &[ql, qr, rows, s, seqs, pages], o_ty);
            [x, s, o].into_iter().for_each(|v| lab.out(v));
        }
    }
}

/// Three sequences decode a token each, after prompts of different lengths.
fn batch() -> Vec<StepInputs> {
    let lengths = [5usize, 130, 64];
    let table = vec![vec![6, -1, -1], vec![2, 0, 5], vec![3, 1, -1]];
    let slot = |s: usize, p: usize| table[s][p / 64] * 64 + (p % 64) as i32;
    let mut steps = Vec::new();
    for (s, &n) in lengths.iter().enumerate() {
        steps.push(StepInputs {
            tokens: (0..n).map(|i| ((i * 5 + s) % 19) as i32).collect(),
            positions: (0..n as i32).collect(),
            seqs: vec![s as i32; n],
            slots: (0..n).map(|p| slot(s, p)).collect(),
            page_table: table.clone(),
            logit_rows: vec![0],
            draws: Vec::new(),
        });
    }
    steps.push(StepInputs {
        tokens: vec![3, 1, 4],
        positions: lengths.iter().map(|&n| n as i32).collect(),
        seqs: vec![0, 1, 2],
        slots: lengths.iter().enumerate().map(|(s, &n)| slot(s, n)).collect(),
        page_table: table.clone(),
        logit_rows: vec![2],
        draws: Vec::new(),
    });
    steps
}

#[test]
fn sparse_attention_in_every_form_and_format() {
    let indexes = [
        StateFormat::IndexFp8 { dim: 48 },
        StateFormat::IndexFp8 { dim: 30 },
        StateFormat::Index { dim: 48, dtype: DType::Bf16 },
        StateFormat::Index { dim: 32, dtype: DType::F32 },
    ];
    for (i, form) in [Form::Whole, Form::Split, Form::Alone].into_iter().enumerate() {
        for (j, latent) in LATENTS.into_iter().enumerate() {
            let below = [0, 24, 10][(i + j) % 3];
            let mut lab = Lab::new(9 + j as u64);
            lab.schedule.tile_m = [3, 1, 4][j % 3];
            lab.schedule.tile_h = [0, 4, 2][j % 3];
            sparse(&mut lab, indexes[j % 4], latent, 24, below, form);
            lab.check(&[sequence(70, 0), sequence(1, 70), sequence(5, 71)]);
            lab.check(&[sequence(11, 0), sequence(1, 11)]);
            lab.check(&batch());
        }
    }
}

#[test]
fn selection_of_everything_is_not_scored() {
    let mut lab = Lab::new(10);
    sparse(&mut lab, StateFormat::IndexFp8 { dim: 32 }, LATENTS[1], 100, 100, Form::Whole);
    let node = lab
        .g
        .dag
        .node_indices()
        .find(|&n| matches!(&lab.g.dag[n].op, Op::Fused(f) if f.kind == FusedKind::SparseAttention));
    let max = SymValues([64, 1, 2, 1, 8, 100]);
    let class = Class { name: "short".into(), max, keep_mha: false, pieces: None };
    let short = emit(&lab.g, node.unwrap(), &lab.schedule, &class).unwrap();
    assert!(!format!("{:?}", short.program.body).contains("TopkPush"));
    let class = Class { max: max.with(Sym::C, 101), ..class };
    let long = emit(&lab.g, node.unwrap(), &lab.schedule, &class).unwrap();
    assert!(format!("{:?}", long.program.body).contains("TopkPush"));
    lab.check(&[sequence(70, 0), sequence(1, 70)]);
}

#[test]
fn mha_of_short_contexts() {
    for dtype in [DType::F32, DType::Bf16] {
        let mut lab = Lab::new(11);
        let latent = StateFormat::Latent { latent: 48, rope: 16, dtype };
        let rows = write_latent(&mut lab, latent);
        let keys = write_index(&mut lab, StateFormat::Index { dim: 32, dtype: DType::F32 });
        let (positions, seqs, pages) =
            (lab.input(StepInput::Positions), lab.input(StepInput::Seqs), lab.input(StepInput::PageTable));
        let (iq, weights) = (lab.act(DType::F32, &[2, 32]), lab.act(DType::F32, &[2]));
        let logits = lab.op(Op::IndexerLogits, &[iq, weights, keys, positions, seqs, pages], f32s(dims![T, Sym::C]));
        let selected = lab.op(Op::TopK { k: 150 }, &[logits], plain(DType::I32, dims![T, 150]));
        let c = lab.op(Op::CacheLatent, &[rows, pages], plain(dtype, dims![Sym::S, Sym::C, 48]));
        let rope = lab.op(Op::CacheRope, &[rows, pages], plain(dtype, dims![Sym::S, Sym::C, 16]));
        let w = lab.weight(plain(dtype, dims![6 * (40 + 24), 48]));
        let kv = lab.op(Op::Linear, &[c, w], plain(dtype, dims![Sym::S, Sym::C, 6 * 64]));
        let q = lab.act(dtype, &[6, 56]);
        let op = Op::MhaAttention { scale: 0.13, nope: 40, value: 24, narrow: false };
        let o = lab.op(op, &[q, kv, rope, selected, seqs], plain(dtype, dims![T, 6 * 24]));
        lab.out(o);
        lab.check(&[sequence(70, 0), sequence(1, 70), sequence(5, 71)]);
        lab.check(&batch());
    }
}

#[test]
fn names_and_programs_do_not_depend_on_the_layer() {
    let mut lab = Lab::new(12);
    let x = lab.act(DType::F32, &[40]);
    let y: Vec<NodeId> = (0..2)
        .map(|_| {
            let w = lab.weight(f32s(dims![24, 40]));
            lab.op(Op::Linear, &[x, w], f32s(dims![T, 24])).node
        })
        .collect();
    let class = Class { name: "test".into(), max: SymValues([8; 6]), keep_mha: false, pieces: None };
    let [a, b] = [y[0], y[1]].map(|n| emit(&lab.g, n, &lab.schedule, &class).unwrap());
    assert_eq!(a.program, b.program);
    assert_ne!(a.args, b.args);
}

#[test]
fn aliases_become_strided_views() {
    let mut lab = Lab::new(13);
    let x = lab.act(DType::Bf16, &[6, 64]);
    let part = lab.op(Op::SliceLast { start: 24, len: 40 }, &[x], plain(DType::Bf16, dims![T, 6, 40]));
    let (root, view) = resolve(&lab.g, part).unwrap();
    assert_eq!(lab.g.dag[root.node].op, Op::Embed);
    assert_eq!((view.offset, view.strides.iter().map(|s| s.bytes).collect::<Vec<_>>()), (48, vec![768, 128, 2]));
    // Heads of a slice do not follow each other: no view.
    let flat = lab.op(Op::Reshape, &[part], plain(DType::Bf16, dims![T, 240]));
    assert!(matches!(resolve(&lab.g, flat), Err(KernelError::Alias { .. })));
    let split = lab.op(Op::Reshape, &[part], plain(DType::Bf16, dims![T, 3, 2, 5, 8]));
    let strides: Vec<i64> = resolve(&lab.g, split).unwrap().1.strides.iter().map(|s| s.bytes).collect();
    assert_eq!(strides, [768, 256, 128, 16, 2]);
    let q = lab.act(DType::F32, &[512]);
    let q = lab.quantized(q, ROWS);
    let tail = lab.op(Op::SliceLast { start: 256, len: 256 }, &[q], TensorType::quant(ROWS, dims![T, 256]));
    let (_, scales) = resolve_part(&lab.g, tail, Part::Scales).unwrap();
    assert_eq!((scales.offset, scales.shape), (8, vec![T.into(), 2.into()]));
    assert_eq!(pow2_ceil(1.5), 2.0);
    assert_eq!(PAGE_TOKENS, 64);
    let d = lab.dequantized(tail);
    lab.out(d);
    lab.check(&[sequence(3, 0)]);
}

/// The graph of a model after all passes, with every result of a launch as an output, and random weights.
fn model(config: &ModelConfig, numerics: Numerics, (target_fp8, blocks): (bool, u32), class: &Class, seed: u64) -> Lab {
    let options = BuildOptions { numerics, layers: None, max_context: 512 };
    let mut lab = Lab::new(seed);
    lab.g = front::model::build(config, &options);
    let cx = Cx {
        class: class.clone(),
        target_fp8,
        bf16_weights: false,
        blocks,
        block_bytes: 192 << 10,
        teams: dsc_ir::schedule::Teams::default(),
        boxes: true,
        beside: true,
        numerics,
        index_topk: config.index_topk as u32,
    };
    passes::run(&mut lab.g, &cx, &mut |_, _, _| {}).unwrap_or_else(|e| panic!("{e}"));
    for weight in lab.g.weights.clone() {
        let shape = weight.ty.shape.iter().map(|e| e.constant().unwrap_or(512) as usize).collect::<Vec<_>>();
        let data = match &weight.source {
            WeightSource::Tensors(_) => random_weight(&mut lab, &weight, &shape),
            _ => materialize(&weight, 512, &|_| None).unwrap_or_else(|e| panic!("{e}")),
        };
        lab.weights.insert(weight.name.clone(), data);
    }
    lab
}

fn random_weight(lab: &mut Lab, weight: &Weight, shape: &[usize]) -> TensorData<f32> {
    let n: usize = shape.iter().product();
    let size = if shape.len() > 1 { (shape[shape.len() - 1] as f32).powf(-0.5) * 1.7 } else { 1.0 };
    match weight.ty.elem {
        Elem::Plain(d) => TensorData::real(shape.to_vec(), (0..n).map(|_| d.round(lab.random() * size)).collect()),
        Elem::Quant(quant) => {
            let codes = (0..n).map(|_| dsc_ir::dtype::f32_to_e4m3(lab.random() * 400.0)).collect();
            let scales: u32 = weight.ty.scale_shape().unwrap().iter().map(|e| e.factor).product();
            let scales = (0..scales).map(|_| (lab.random() * 0.3 + 1.0) * size / 400.0).collect();
            TensorData::new(shape.to_vec(), Data::Quant { codes, scales, quant })
        }
    }
}

/// Each launch of every golden model, on exactly the inputs that the graph interpreter has there.
#[test]
fn every_launch_of_small_models() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden");
    for name in ["v32-tiny", "glm-tiny", "v32-heads-fp8"] {
        let config = ModelConfig::read(&golden.join(name)).unwrap_or_else(|e| panic!("{e}"));
        for (numerics, target_fp8, blocks) in [
            (Numerics::Exact, false, 0),
            (Numerics::Deployed, false, 0),
            (Numerics::Deployed, true, 0),
            (Numerics::Exact, false, 132),
            (Numerics::Deployed, true, 132),
        ] {
            // The widest model is slow here: once, as deployed.
            let wide = name == "v32-heads-fp8";
            if wide && !target_fp8 {
                continue;
            }
            // Steps of many tokens, and, where it makes a difference, of few.
            let few = if blocks > 0 { vec![200, 64] } else { vec![64] };
            for (keep_mha, tokens) in [false, true].into_iter().flat_map(|mha| few.iter().map(move |&t| (mha, t))) {
                let k = config.index_topk as u32;
                let context = if keep_mha { k } else { 512 };
                let max = SymValues([tokens, 1, 8, tokens, 8, context]);
                let class = Class { name: "test".into(), max, keep_mha, pieces: None };
                let mut lab = model(&config, numerics, (target_fp8, blocks), &class, 14);
                lab.races = !wide;
                lab.schedule = Schedule { tile_m: 4, tile_n: 32, tile_k: 128, ..Schedule::default() };
                let first = if keep_mha { k - 1 } else { k + 9 };
                check_launches(&lab, &[sequence(first as usize, 0), sequence(1, first as usize)]);
            }
        }
    }
}

fn check_launches(lab: &Lab, steps: &[StepInputs]) {
    let mut g = lab.g.clone();
    let mut names = HashMap::new();
    for node in lab.g.dag.node_indices().filter(|&n| launches(&lab.g, n)) {
        for output in 0..lab.g.dag[node].outputs.len() as u32 {
            let value = Value { node, output };
            if lab.g.ty(value).tensor().is_some() {
                names.insert(format!("launch.{}.{output}", node.index()), value);
            }
        }
    }
    g.outputs.extend(names.iter().map(|(n, &v)| (n.clone(), v)));
    let mut interp = Interp::<f32>::new(&g, &|w| Ok::<_, String>(lab.weights[&w.name].clone())).unwrap();
    let mut machine = Machine::default();
    for step in steps {
        let outputs = interp.step(step).unwrap();
        let tensor = |name: &String| match &outputs[name] {
            StepValue::Tensor(t) => t.clone(),
            StepValue::State(_) => panic!("{name} is a cache"),
        };
        let expected = names.iter().map(|(name, &value)| (value, tensor(name))).collect();
        let syms = step.syms().unwrap().with(Sym::N, 8);
        machine.step(lab, step, &syms, false, &expected);
    }
}

/// Full-size models of every class have a valid program for every launch.
#[test]
fn every_launch_of_full_models_has_a_program() {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
    for name in ["deepseek-v3.2", "glm-5"] {
        let config = ModelConfig::read(&examples.join(name)).unwrap_or_else(|e| panic!("{e}"));
        for (numerics, target_fp8, blocks) in
            [(Numerics::Exact, false, 0), (Numerics::Deployed, true, 0), (Numerics::Deployed, true, 132)]
        {
            let options = BuildOptions { numerics, layers: Some(vec![0, 5]), max_context: 163_840 };
            let graph = front::model::build(&config, &options);
            for (tokens, seqs, context, keep_mha) in
                [(1, 1, 163_840, false), (16, 16, 163_840, false), (512, 1, 2048, true), (512, 1, 163_840, false)]
            {
                let max = SymValues([tokens, seqs, 2560, tokens, 1 << 24, context]);
                let class = Class { name: "test".into(), max, keep_mha, pieces: None };
                let mut g = graph.clone();
                let cx = Cx {
                    class: class.clone(),
                    target_fp8,
                    bf16_weights: false,
                    blocks,
                    block_bytes: 192 << 10,
                    teams: dsc_ir::schedule::Teams::default(),
                    boxes: true,
                    beside: true,
                    numerics,
                    index_topk: config.index_topk as u32,
                };
                passes::run(&mut g, &cx, &mut |_, _, _| {}).unwrap_or_else(|e| panic!("{e}"));
                for node in g.dag.node_indices().filter(|&n| launches(&g, n)) {
                    let shape = shape_of(&g, node, &class);
                    let schedule = match blocks {
                        0 => default_schedule(&shape, &class),
                        _ => Schedule::wide(&shape, tokens),
                    };
                    let made = emit(&g, node, &schedule, &class).unwrap_or_else(|e| panic!("{e}"));
                    if target_fp8 && numerics == Numerics::Deployed {
                        check_dots(&made.program, &made.program.body);
                    }
                }
            }
        }
    }
}

/// Deployed numerics on a target with matrix units: both operands of every product are e4m3, or both bf16.
fn check_dots(program: &Program, region: &Region) {
    for inst in &region.insts {
        match &inst.op {
            tile::Op::Dot { a, b, .. } => {
                let types = [a, b].map(|&v| program.tile(v).map(|t| t.dtype));
                let fits = [[Some(DType::E4m3); 2], [Some(DType::Bf16); 2]].contains(&types);
                assert!(fits, "{}: a product of {types:?}", program.name);
            }
            tile::Op::For { body, .. } => check_dots(program, body),
            tile::Op::If { then, otherwise, .. } => [then, otherwise].into_iter().for_each(|r| check_dots(program, r)),
            _ => {}
        }
    }
}
