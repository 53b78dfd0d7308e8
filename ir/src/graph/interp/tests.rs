use super::super::infer::{Rule, infer};
use super::super::{Quant, RopeLayout, StateFormat, TensorType};
use super::*;
use crate::Extent;

type T = TensorData<f32>;

fn fixed(shape: &[usize]) -> Vec<Extent> {
    shape.iter().map(|&n| Extent::from(n as u32)).collect()
}

fn r(shape: &[usize], data: &[f32]) -> T {
    T::real(shape.to_vec(), data.to_vec())
}

fn i(shape: &[usize], data: &[i32]) -> T {
    T::int(shape.to_vec(), data.to_vec())
}

/// Runs one op on constant shapes, checking its type rule on the way.
fn run(op: Op, inputs: &[T], out: Elem, shape: &[usize]) -> T {
    all(op, inputs, out, shape).remove(0)
}

/// As [`run`], every result; `out` and `shape` are the first's.
fn all(op: Op, inputs: &[T], out: Elem, shape: &[usize]) -> Vec<T> {
    let ty = |t: &T| {
        let elem = match &t.data {
            Data::Real(_) => Elem::Plain(DType::F32),
            Data::Int(_) => Elem::Plain(DType::I32),
            Data::Quant { quant, .. } => Elem::Quant(*quant),
        };
        ValueType::Tensor(TensorType { shape: fixed(&t.shape), elem })
    };
    let types: Vec<ValueType> = inputs.iter().map(ty).collect();
    let declared = TensorType { shape: fixed(shape), elem: out };
    match &infer(&op, &types, &[ValueType::Tensor(declared.clone())]).expect("types that fit")[0] {
        Rule::Tensor(shape, elems) => assert!(*shape == declared.shape && elems.allow(out), "{shape:?}"),
        Rule::State(_) => panic!("a cache"),
    }
    let syms = SymValues::default();
    let fed = inputs.iter().map(|t| StepValue::Tensor(Arc::new(t.clone()))).collect();
    let eval = Eval { fed, outs: vec![Out::new(&declared, &syms).expect("a size")], syms };
    let made = eval.op(&op).expect("a result");
    made.iter().map(|value| value.tensor().expect("a tensor").clone()).collect()
}

const F32: Elem = Elem::Plain(DType::F32);
const I32: Elem = Elem::Plain(DType::I32);

fn floats(op: Op, inputs: &[T], shape: &[usize]) -> Vec<f32> {
    run(op, inputs, F32, shape).values().to_vec()
}

fn close(got: &[f32], wanted: &[f32]) {
    assert_eq!(got.len(), wanted.len());
    for (a, b) in got.iter().zip(wanted) {
        assert!((a - b).abs() <= 2e-6 * b.abs().max(1.0), "{got:?} is not {wanted:?}");
    }
}

#[test]
fn lookups() {
    let table = r(&[3, 2], &[0., 1., 2., 3., 4., 5.]);
    close(&floats(Op::Embed, &[i(&[2], &[2, 0]), table.clone()], &[2, 2]), &[4., 5., 0., 1.]);
    close(&floats(Op::TakeRows, &[table.clone(), i(&[1], &[1])], &[1, 2]), &[2., 3.]);
    close(&floats(Op::TakeAlong, &[table, i(&[3, 1], &[1, 0, 1])], &[3, 1]), &[1., 2., 5.]);
}

#[test]
fn elementwise() {
    let (a, b) = (r(&[2, 2], &[1., 2., 3., 4.]), r(&[2], &[10., 20.]));
    close(&floats(Op::Add, &[a.clone(), b], &[2, 2]), &[11., 22., 13., 24.]);
    close(&floats(Op::Scale { factor: 0.5 }, std::slice::from_ref(&a), &[2, 2]), &[0.5, 1., 1.5, 2.]);
    close(&floats(Op::Sigmoid, &[r(&[2], &[0., 2.])], &[2]), &[0.5, 0.880_797]);
    close(&floats(Op::SwiGlu, &[r(&[1], &[2.]), r(&[1], &[3.])], &[1]), &[5.284_782]);
    close(&floats(Op::SliceLast { start: 1, len: 1 }, std::slice::from_ref(&a), &[2, 1]), &[2., 4.]);
    close(&floats(Op::Reshape, &[a], &[4, 1]), &[1., 2., 3., 4.]);
    let bf16 = run(Op::Cast, &[r(&[1], &[1.003_906_3])], Elem::Plain(DType::Bf16), &[1]);
    close(bf16.values(), &[1.0]);
    let op = Op::Normalize { factor: 2.5, by_sum: true };
    close(&floats(op, &[r(&[1, 2], &[1., 3.])], &[1, 2]), &[0.625, 1.875]);
}

#[test]
fn norms() {
    let x = r(&[1, 2], &[3., 4.]);
    close(&floats(Op::RmsNorm { eps: 0.0 }, &[x.clone(), r(&[2], &[1., 2.])], &[1, 2]), &[0.848_528_1, 2.262_741_7]);
    let inputs = [x, r(&[2], &[1., 2.]), r(&[2], &[0., 1.])];
    close(&floats(Op::LayerNorm { eps: 0.0 }, &inputs, &[1, 2]), &[-1., 3.]);
}

#[test]
fn products() {
    let w = r(&[3, 2], &[1., 0., 0., 1., 1., 1.]);
    close(&floats(Op::Linear, &[r(&[1, 2], &[5., 7.]), w], &[1, 3]), &[5., 7., 12.]);
    // Two heads with two rows each: head 0 has rows [1 2], [3 4]; head 1 has [5 6], [7 8].
    let w = r(&[4, 2], &[1., 2., 3., 4., 5., 6., 7., 8.]);
    let op = |transposed| Op::HeadLinear { first: 1, count: 1, transposed };
    close(&floats(op(false), &[r(&[1, 2, 1], &[1., 2.]), w.clone()], &[1, 2, 2]), &[3., 4., 14., 16.]);
    close(&floats(op(true), &[r(&[1, 2, 2], &[1., 1., 1., 2.]), w], &[1, 2, 1]), &[7., 23.]);
}

/// The vector of the model facts: x_j = (j + 1) / 64, position 5, with the frequencies of 64 dims under YaRN.
#[test]
fn rope_vectors() {
    let ramp = |i: f64| ((i - 10.0) / 13.0).clamp(0.0, 1.0);
    let omega = |i: usize| {
        let theta = 10000f64.powf(-(i as f64) / 32.0);
        (theta / 40.0 * ramp(i as f64) + theta * (1.0 - ramp(i as f64))) as f32
    };
    let angles: Vec<f64> = (0..32).map(|i| f64::from(5.0 * omega(i))).collect();
    let row: Vec<f32> = angles.iter().map(|a| a.cos() as f32).chain(angles.iter().map(|a| a.sin() as f32)).collect();
    let x: Vec<f32> = (1..=64).map(|j| j as f32 / 64.0).collect();
    let inputs = [r(&[1, 64], &x), i(&[1], &[0]), r(&[1, 64], &row)];
    let rope = |layout| floats(Op::Rope { layout, start: 0 }, &inputs, &[1, 64]);
    let y = rope(RopeLayout::Interleaved);
    close(&y[..4], &[0.034_398_6, -0.006_118_7, -0.002_782_4, -0.078_075_4]);
    close(&y[31..34], &[0.519_745_2, 0.500_822_5, 0.545_227]);
    let y = rope(RopeLayout::Half);
    close(&y[..4], &[0.498_877_6, 0.277_759_4, -0.221_499_5, -0.515_138_4]);
    close(&y[62..], &[0.984_385_8, 1.000_008_3]);
}

#[test]
fn quantisation_vector() {
    let x: Vec<f32> = (0..128).map(|i| ((37 * i % 101) - 50) as f32 / 16.0).collect();
    let quant = Elem::Quant(Quant { block: [1, 128], pow2: true });
    let q = run(Op::Quantize, &[r(&[1, 128], &x)], quant, &[1, 128]);
    let Data::Quant { codes, scales, .. } = &q.data else { panic!("not quantised") };
    assert_eq!(scales, &[2f32.powi(-7)]);
    assert_eq!(codes[..8], [0xfc, 0xed, 0x74, 0xfa, 0xdc, 0x78, 0xf7, 0x66]);
    let y = floats(Op::Dequantize, &[q], &[1, 128]);
    assert_eq!(y.iter().sum::<f32>(), -4.8125);
    assert_eq!(y.iter().map(|v| v * v).sum::<f32>(), 422.738_28);
}

#[test]
fn hadamard_is_natural_order() {
    close(&floats(Op::Hadamard, &[r(&[1, 4], &[1., 2., 3., 4.])], &[1, 4]), &[5., -1., -2., 0.]);
}

#[test]
fn topk_takes_the_lowest_of_equals_and_never_minus_infinity() {
    let x = r(&[2, 4], &[1., 3., 1., 1., f32::NEG_INFINITY, 0., f32::NEG_INFINITY, f32::NEG_INFINITY]);
    assert_eq!(run(Op::TopK { k: 2 }, std::slice::from_ref(&x), I32, &[2, 2]).ints(), [0, 1, 1, -1]);
    let (starts, ends) = (i(&[2], &[1, 0]), i(&[2], &[9, 1]));
    assert_eq!(run(Op::TopK { k: 2 }, &[x.clone(), ends.clone()], I32, &[2, 2]).ints(), [0, 1, -1, -1]);
    assert_eq!(run(Op::TopK { k: 2 }, &[x, starts, ends], I32, &[2, 2]).ints(), [1, 2, -1, -1]);
}

/// The gate vector of the model facts.
#[test]
fn gate_vector() {
    let logits: Vec<f32> =
        (0..256).map(|i| (2.0 * (0.37 * i as f64).sin() + 0.3 * (1.91 * i as f64).cos()) as f32).collect();
    let bias: Vec<f32> = (0..256).map(|i| 0.05 * ((7 * i % 13) - 6) as f32).collect();
    let scores = run(Op::Sigmoid, &[r(&[1, 256], &logits)], F32, &[1, 256]);
    let biased = run(Op::Add, &[scores.clone(), r(&[256], &bias)], F32, &[1, 256]);
    let ids = run(Op::GroupTopK { groups: 8, keep: 4, k: 8 }, &[biased], I32, &[1, 8]);
    assert_eq!(ids.ints(), [72, 89, 139, 141, 174, 191, 241, 243]);
    let chosen = run(Op::TakeAlong, &[scores, ids], F32, &[1, 8]);
    let weights = floats(Op::Normalize { factor: 2.5, by_sum: true }, &[chosen], &[1, 8]);
    let wanted =
        [0.316_734_8, 0.318_421_1, 0.302_474_5, 0.312_165_4, 0.317_085_7, 0.318_378_2, 0.303_239_4, 0.311_500_9];
    close(&weights, &wanted);
}

#[test]
fn tokens_are_chosen() {
    let nan = f32::NAN;
    let x = r(&[3, 130], &[&[1., 3., 3.][..], &[0.; 125], &[7., 2.], &[nan; 130], &[0.; 129], &[9.]].concat());
    let made = all(Op::ArgMax { parts: 2 }, std::slice::from_ref(&x), F32, &[3, 2]);
    let none = f32::NEG_INFINITY;
    assert_eq!(made[0].values(), [3., 7., none, none, 0., 9.]);
    assert_eq!(made[1].ints(), [1, 128, -1, -1, 0, 129]);
    let draw = Draw { temperature: 2.0, top_p: 1.0, quantile: 0.0 };
    let draws = i(&[3, 3], &[Draw::GREEDY, draw, draw].map(Draw::bits).concat());
    let inputs = [x, made[0].clone(), made[1].clone(), draws];
    assert_eq!(run(Op::Sample, &inputs, I32, &[3]).ints(), [128, -1, 0]);
}

#[test]
fn experts() {
    let w = r(&[2, 1, 2], &[1., 1., 10., 0.]);
    let (x, ids) = (r(&[2, 2], &[1., 2., 3., 4.]), i(&[2, 2], &[1, 0, 0, 1]));
    let op = Op::ExpertLinear { per_token: 2, x_sorted: false, y_sorted: false };
    let y = run(op.clone(), &[x.clone(), w.clone(), ids.clone()], F32, &[2, 2, 1]);
    close(y.values(), &[10., 3., 7., 30.]);
    let (order, offsets) = (i(&[4], &[1, 2, 0, 3]), i(&[3], &[0, 2, 4]));
    let routed = all(Op::Route { experts: 2 }, &[ids], I32, &[4]);
    let owners = i(&[4], &[0, 0, 1, 1]);
    assert_eq!([0, 1, 2].map(|o| routed[o].ints()), [order.ints(), offsets.ints(), owners.ints()]);
    close(&floats(op.clone(), &[x.clone(), w.clone(), order.clone(), offsets.clone(), owners], &[2, 2, 1]), y.values());
    close(&floats(op, &[x.clone(), w.clone(), order.clone(), offsets.clone()], &[2, 2, 1]), y.values());
    // Sorted, a row's result is where the order has the row, and so is what the next product takes.
    let sorted = |x_sorted, y_sorted| Op::ExpertLinear { per_token: 2, x_sorted, y_sorted };
    let h = floats(sorted(false, true), &[x, w.clone(), order.clone(), offsets.clone()], &[2, 2, 1]);
    close(&h, &[3., 7., 10., 30.]);
    let each = r(&[2, 2, 2], &[h[0], 0., h[1], 0., h[2], 0., h[3], 0.]);
    close(&floats(sorted(true, false), &[each, w, order, offsets], &[2, 2, 1]), &[100., 3., 7., 300.]);
    close(&floats(Op::WeightedSum, &[y, r(&[2, 2], &[0.5, 1., 2., 0.1])], &[2, 1]), &[8., 17.]);
}

/// The indexer vector of the model facts: 4 heads, 6 keys, fp8 with Hadamard, one token that sees all keys.
#[test]
fn indexer_vector() {
    let mut g = Graph::default();
    let shape = |dims: &[u32]| dims.iter().map(|&n| Extent::from(n)).collect::<Vec<_>>();
    let source = || crate::artifact::WeightSource::Tensors(Vec::new());
    let weight = |g: &mut Graph, name: &str, dtype: DType, dims: &[u32]| {
        let ty = TensorType::plain(dtype, &shape(dims));
        g.weights.push(Weight { name: name.into(), ty: ty.clone(), source: source() });
        g.add1(name, Op::Weight(g.weights.len() as u32 - 1), &[], ty)
    };
    let ints = |g: &mut Graph, input: StepInput| {
        g.add1("in", Op::Input(input), &[], TensorType::plain(DType::I32, &input.shape()))
    };
    let t: Extent = Sym::T.into();
    let tokens = ints(&mut g, StepInput::Tokens);
    let fp8 = Quant { block: [1, 128], pow2: true };
    let prepare = |g: &mut Graph, x: Value, dims: &[Extent]| {
        let h = g.add1("h", Op::Hadamard, &[x], TensorType::plain(DType::Bf16, dims));
        g.add1("quant", Op::Quantize, &[h], TensorType::quant(fp8, dims))
    };
    let table = weight(&mut g, "k", DType::F32, &[6, 128]);
    let k = g.add1("keys", Op::Embed, &[tokens, table], TensorType::plain(DType::F32, &[t, 128.into()]));
    let k = prepare(&mut g, k, &[t, 128.into()]);
    let table = weight(&mut g, "q", DType::F32, &[6, 512]);
    let q = g.add1("queries", Op::Embed, &[tokens, table], TensorType::plain(DType::F32, &[t, 512.into()]));
    let dims = [t, 4.into(), 128.into()];
    let q = g.add1("heads", Op::Reshape, &[q], TensorType::plain(DType::F32, &dims));
    let q = prepare(&mut g, q, &dims);
    let table = weight(&mut g, "w", DType::F32, &[6, 4]);
    let w = g.add1("by_head", Op::Embed, &[tokens, table], TensorType::plain(DType::F32, &[t, 4.into()]));
    let format = StateFormat::IndexFp8 { dim: 128 };
    g.states.push(super::super::State { name: "index".into(), format });
    let state = Value { node: g.add("index", Op::State(0), &[], vec![ValueType::State(format)]), output: 0 };
    let slots = ints(&mut g, StepInput::Slots);
    let state =
        Value { node: g.add("write", Op::CacheWrite, &[state, slots, k], vec![ValueType::State(format)]), output: 0 };
    let rest = [StepInput::Positions, StepInput::Seqs, StepInput::PageTable].map(|x| ints(&mut g, x));
    let inputs = [&[q, w, state][..], &rest].concat();
    let logits = g.add1("logits", Op::IndexerLogits, &inputs, TensorType::plain(DType::F32, &[t, Sym::C.into()]));
    g.outputs = vec![("index".into(), state), ("logits".into(), logits)];

    let value = |n: &str| -> Vec<f32> {
        match n {
            "k" => (0..6 * 128).map(|j| ((29 * (j / 128) + 23 * (j % 128)) % 53 - 26) as f32 / 16.0).collect(),
            "q" => (0..6 * 512).map(|j| ((31 * (j % 512 / 128) + 17 * (j % 128)) % 61 - 30) as f32 / 16.0).collect(),
            _ => (0..24).map(|j| ((5 * (j % 4)) % 7 - 3) as f32 / 4.0 * 0.5 * 128f32.powf(-0.5)).collect(),
        }
    };
    let make = |w: &Weight| -> Result<T, String> {
        let data = value(&w.name);
        Ok(r(&w.ty.shape.iter().map(|e| e.factor as usize).collect::<Vec<_>>(), &data))
    };
    let mut interp = Interp::<f32>::new(&g, &make).expect("a valid graph");
    let out = interp.step(&StepInputs::sequence(&[0, 1, 2, 3, 4, 5], 0)).expect("a step");
    let logits = out["logits"].tensor().expect("logits").values();
    let wanted = [0.000_759_317_6, -0.129_324_06, -0.133_698_23, -0.056_778_21, 0.095_072_5, -0.052_494_74];
    close(&logits[30..], &wanted);
    assert_eq!(logits[29], f32::NEG_INFINITY);
}

#[test]
fn attention_forms_agree_and_bad_steps_are_refused() {
    let kv = r(&[1, 3, 2], &[1., 10., 2., 20., 3., 30.]);
    let (q, rope) = (r(&[1, 1, 2], &[0., 1.]), r(&[1, 3, 1], &[0., 0., 2f32.ln()]));
    let inputs = [q, kv, rope, i(&[1, 3], &[0, 2, -1]), i(&[1], &[0])];
    let op = Op::MhaAttention { scale: 1.0, nope: 1, value: 1, narrow: false };
    close(&floats(op, &inputs, &[1, 1]), &[(10. + 2. * 30.) / 3.]);

    let mut inputs = StepInputs::sequence(&[1, 2], 0);
    assert!(inputs.syms().is_ok());
    inputs.seqs[1] = 1;
    assert!(inputs.syms().is_err());
}

#[test]
fn mqa_reads_the_cache() {
    let mut cache = Cache::<f32>::new(StateFormat::Latent { latent: 2, rope: 1, dtype: DType::F32 });
    cache.write(64, 0, &[Arc::new(r(&[1, 2], &[1., 5.])), Arc::new(r(&[1, 1], &[0.]))]);
    cache.write(65, 0, &[Arc::new(r(&[1, 2], &[1., 8.])), Arc::new(r(&[1, 1], &[2f32.ln()]))]);
    let syms = SymValues::default().with(Sym::C, 2);
    let out = TensorType::plain(DType::F32, &fixed(&[1, 1, 2]));
    let tensors =
        [r(&[1, 1, 2], &[0., 0.]), r(&[1, 1, 1], &[1.]), i(&[1, 2], &[0, 1]), i(&[1], &[0]), i(&[1, 1], &[1])];
    let mut fed: Vec<StepValue<f32>> = tensors.into_iter().map(|t| StepValue::Tensor(Arc::new(t))).collect();
    fed.insert(2, StepValue::State(Arc::new(cache)));
    let eval = Eval { fed, outs: vec![Out::new(&out, &syms).expect("a size")], syms };
    let made = eval.op(&Op::MqaAttention { scale: 1.0, narrow: false }).expect("a result");
    close(made[0].tensor().expect("a tensor").values(), &[1., 7.]);
}

/// Of the first sequence, whose second page is not there.
#[test]
fn cached_rows_come_by_position() {
    let mut cache = Cache::<f32>::new(StateFormat::Latent { latent: 2, rope: 1, dtype: DType::F32 });
    cache.write(64, 0, &[Arc::new(r(&[1, 2], &[1., 5.])), Arc::new(r(&[1, 1], &[1.001]))]);
    cache.write(127, 0, &[Arc::new(r(&[1, 2], &[2., 6.])), Arc::new(r(&[1, 1], &[4.]))]);
    let syms = SymValues::default().with(Sym::C, 66);
    let out = TensorType::plain(DType::Bf16, &fixed(&[66, 3]));
    let pages = StepValue::Tensor(Arc::new(i(&[2, 2], &[1, -1, 0, 0])));
    let fed = vec![StepValue::State(Arc::new(cache)), pages];
    let eval = Eval { fed, outs: vec![Out::new(&out, &syms).expect("a size")], syms };
    let made = eval.op(&Op::CacheRows).expect("a result");
    let rows = made[0].tensor().expect("a tensor").values();
    assert_eq!([&rows[..3], &rows[189..192], &rows[192..]], [&[1., 5., 1.][..], &[2., 6., 4.], &[0.; 6]]);
}

/// Of a matrix of keys, with what is selected outside it, and nothing; logarithms of sums and largest scores too.
#[test]
fn mqa_reads_a_matrix() {
    let syms = SymValues::default().with(Sym::C, 2);
    let f32s = |shape: &[usize]| Out::new(&TensorType::plain(DType::F32, &fixed(shape)), &syms).expect("a size");
    let tensors = [
        r(&[2, 1, 2], &[0.; 4]),
        r(&[2, 1, 1], &[1., 1.]),
        r(&[2, 3], &[1., 5., 0., 1., 8., 2f32.ln()]),
        i(&[2, 3], &[0, 7, 1, -1, 2, -1]),
    ];
    let fed: Vec<StepValue<f32>> = tensors.into_iter().map(|t| StepValue::Tensor(Arc::new(t))).collect();
    let eval = Eval { fed, outs: vec![f32s(&[2, 1, 2]), f32s(&[2, 1]), f32s(&[2, 1])], syms };
    let made = eval.op(&Op::MqaAttention { scale: 1.0, narrow: false }).expect("results");
    let values = |n: usize| made[n].tensor().expect("a tensor").values().to_vec();
    close(&values(0), &[1., 7., 0., 0.]);
    close(&values(1)[..1], &[3f32.ln()]);
    close(&values(2)[..1], &[2f32.ln()]);
    assert_eq!([values(1)[1], values(2)[1]], [f32::INFINITY, f32::NEG_INFINITY]);
}
