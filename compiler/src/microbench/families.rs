//! The kernel families, their sizes, and a small graph of each.

use super::prepare::BenchError;
use dsc_ir::artifact::{TensorPart, WeightSource};
use dsc_ir::graph::{
    Elem, Graph, Op, PAGE_TOKENS, Quant, State, StateFormat, StepInput, TensorType, Value, ValueType, Weight,
};
use dsc_ir::{DType, Extent, Sym, SymValues};
use std::collections::BTreeMap;

/// A family of kernels.
pub struct Family {
    /// What `--kernel` takes.
    pub name: &'static str,
    /// The op of its kernels, as [`KernelShape::op`](dsc_ir::schedule::KernelShape::op) calls it.
    pub op: &'static str,
    /// What it computes.
    pub what: &'static str,
    /// Sizes and their defaults, which are DeepSeek-V3.2's at one token where that is not too large to play with.
    pub sizes: &'static [(&'static str, u32)],
    /// Element types of its operands, the default first; none: it has only one form.
    pub dtypes: &'static [&'static str],
    build: fn(&Choice) -> Case,
}

/// Every family.
pub const FAMILIES: &[Family] = &[
    Family {
        name: "linear",
        op: "linear",
        what: "x [m, k] times the transposed matrix [n, k]",
        sizes: &[("m", 1), ("n", 4096), ("k", 7168)],
        dtypes: &["bf16", "fp8", "f32"],
        build: linear,
    },
    Family {
        name: "head_linear",
        op: "head_linear",
        what: "for each head x [m, k] times the matrix [k, n]",
        sizes: &[("m", 1), ("heads", 128), ("n", 512), ("k", 128)],
        dtypes: &["bf16", "f32"],
        build: head_linear,
    },
    Family {
        name: "expert_linear",
        op: "expert_linear",
        what: "rows of m tokens times the matrices [n, k] of topk experts each, with the routing",
        sizes: &[("m", 1), ("experts", 16), ("topk", 8), ("n", 4096), ("k", 7168)],
        dtypes: &["bf16", "fp8", "f32"],
        build: expert_linear,
    },
    Family {
        name: "attention",
        op: "attention",
        what: "attention over topk selected latents, m tokens in each of batch sequences",
        sizes: &[
            ("batch", 1),
            ("m", 1),
            ("context", 4096),
            ("heads", 128),
            ("latent", 512),
            ("rope", 64),
            ("topk", 2048),
        ],
        dtypes: &["fp8", "bf16", "f32"],
        build: attention,
    },
    Family {
        name: "sparse_attention",
        op: "sparse_attention",
        what: "indexer logits, top-k and attention over the selection",
        sizes: &[
            ("batch", 1),
            ("m", 1),
            ("context", 4096),
            ("heads", 128),
            ("latent", 512),
            ("rope", 64),
            ("topk", 2048),
            ("index_heads", 64),
            ("index_dim", 128),
        ],
        dtypes: &["fp8", "bf16", "f32"],
        build: sparse_attention,
    },
    Family {
        name: "indexer_logits",
        op: "indexer_logits",
        what: "scores of all cached index keys, to memory",
        sizes: &[("batch", 1), ("m", 1), ("context", 4096), ("heads", 64), ("dim", 128)],
        dtypes: &["fp8", "bf16", "f32"],
        build: indexer_logits,
    },
    Family {
        name: "top_k",
        op: "top_k",
        what: "the k largest of context scores a token",
        sizes: &[("m", 1), ("context", 4096), ("k", 2048)],
        dtypes: &[],
        build: top_k,
    },
    Family {
        name: "mha",
        op: "mha_attention",
        what: "attention with expanded keys and values, m tokens of one sequence",
        sizes: &[("m", 512), ("context", 512), ("heads", 16), ("nope", 128), ("rope", 64), ("value", 128)],
        dtypes: &["bf16", "f32"],
        build: mha,
    },
    Family {
        name: "gate",
        op: "gate",
        what: "router logits to experts and weights",
        sizes: &[("m", 1), ("experts", 256), ("groups", 8), ("keep", 4), ("topk", 8)],
        dtypes: &[],
        build: gate,
    },
    Family {
        name: "rows",
        op: "row",
        what: "residual sum, RMS norm and quantisation of rows [m, n]",
        sizes: &[("m", 1), ("n", 7168)],
        dtypes: &[],
        build: rows,
    },
    Family {
        name: "embed",
        op: "embed",
        what: "rows of the table [vocab, n]",
        sizes: &[("m", 1), ("n", 7168), ("vocab", 32768)],
        dtypes: &["bf16", "f32"],
        build: embed,
    },
];

/// A family with its sizes.
#[derive(Clone)]
pub struct Choice {
    /// The family.
    pub family: &'static Family,
    /// Every size of the family.
    pub sizes: BTreeMap<&'static str, u32>,
    /// One of the family's types; empty if it has only one form.
    pub dtype: &'static str,
}

/// Largest size that is taken.
const MOST: u32 = 1 << 24;

impl Choice {
    /// Reads `KEY=VALUE`s; what is not given is the default.
    ///
    /// # Errors
    /// [`BenchError::Name`], [`BenchError::Shape`].
    pub fn parse(name: &str, pairs: &[String]) -> Result<Choice, BenchError> {
        let Some(family) = FAMILIES.iter().find(|f| f.name == name) else {
            let known: Vec<&str> = FAMILIES.iter().map(|f| f.name).collect();
            return Err(BenchError::Name { name: name.into(), known: known.join(", ") });
        };
        let dtype = family.dtypes.first().copied().unwrap_or_default();
        let mut choice = Choice { family, sizes: family.sizes.iter().copied().collect(), dtype };
        let mut seen = Vec::new();
        for pair in pairs {
            let wrong = |what: String| Err(BenchError::Shape(what));
            let Some((key, value)) = pair.split_once('=') else {
                return wrong(format!("--shape {pair}: give a key and a value, such as {}=1", family.sizes[0].0));
            };
            if seen.contains(&key) {
                return wrong(format!("--shape has {key} twice: give each once"));
            }
            seen.push(key);
            let size = family.sizes.iter().find(|(k, _)| *k == key).map(|(k, _)| *k);
            match (size, key) {
                (Some(size), _) => match value.parse() {
                    Ok(n) if (1..=MOST).contains(&n) => *choice.sizes.entry(size).or_default() = n,
                    _ => return wrong(format!("--shape {pair}: give a whole number from 1 to {MOST}")),
                },
                (None, "dtype") if !family.dtypes.is_empty() => {
                    let Some(dtype) = family.dtypes.iter().find(|d| **d == value) else {
                        return wrong(format!("--shape {pair}: give {}", either(family.dtypes)));
                    };
                    choice.dtype = dtype;
                }
                _ => return wrong(format!("{name} has no `{key}`: give {}", either(&family.keys()))),
            }
        }
        choice.check()?;
        Ok(choice)
    }

    /// What a step rules out whatever the kernel.
    fn check(&self) -> Result<(), BenchError> {
        let (m, batch) = (self.get("m"), self.sizes.get("batch").copied().unwrap_or(1));
        let too_many = |what: String| Err(BenchError::Shape(what));
        match self.sizes.get("context") {
            Some(&context) if context < m => {
                return too_many(format!(
                    "context={context} is shorter than the m={m} tokens in it: give at least {m}"
                ));
            }
            Some(&context) if u64::from(context) * u64::from(batch) > u64::from(MOST) => {
                return too_many(format!("batch={batch} sequences of context={context} are more than {MOST} tokens"));
            }
            _ => {}
        }
        match m.checked_mul(batch) {
            Some(tokens) if tokens <= MOST => Ok(()),
            _ => too_many(format!("batch={batch} times m={m} are more than {MOST} tokens")),
        }
    }

    /// A size; 1 if the family has none of that name.
    pub fn get(&self, key: &str) -> u32 {
        self.sizes.get(key).copied().unwrap_or(1)
    }

    /// Whether everything is f32.
    pub fn exact(&self) -> bool {
        self.dtype == "f32"
    }

    /// `m=1,n=4096,..`.
    pub fn describe(&self) -> String {
        let mut parts: Vec<String> = self.family.sizes.iter().map(|(k, _)| format!("{k}={}", self.get(k))).collect();
        if !self.dtype.is_empty() {
            parts.push(format!("dtype={}", self.dtype));
        }
        parts.join(",")
    }

    /// The graph.
    pub(super) fn build(&self) -> Case {
        (self.family.build)(self)
    }

    /// Type of activations.
    fn act(&self) -> DType {
        if self.exact() { DType::F32 } else { DType::Bf16 }
    }

    fn latent(&self) -> StateFormat {
        let (latent, rope) = (self.get("latent"), self.get("rope"));
        match self.dtype {
            "fp8" => StateFormat::LatentFp8 { latent, rope },
            _ => StateFormat::Latent { latent, rope, dtype: self.act() },
        }
    }

    fn index(&self, dim: u32) -> StateFormat {
        match self.dtype {
            "fp8" => StateFormat::IndexFp8 { dim },
            _ => StateFormat::Index { dim, dtype: self.act() },
        }
    }
}

impl Family {
    /// Every key of `--shape`.
    pub fn keys(&self) -> Vec<&'static str> {
        let dtype = (!self.dtypes.is_empty()).then_some("dtype");
        self.sizes.iter().map(|(k, _)| *k).chain(dtype).collect()
    }
}

/// `a, b or c`.
fn either(words: &[&str]) -> String {
    match words {
        [init @ .., last] if !init.is_empty() => format!("{} or {last}", init.join(", ")),
        _ => words.concat(),
    }
}

/// A graph under construction, and the step it is for.
pub(super) struct Case {
    pub graph: Graph,
    pub keep_mha: bool,
    /// Keys the indexer selects.
    pub selected: u32,
    /// Token ids are below this.
    pub vocab: u32,
    pub context: u32,
    tokens: u32,
    sequences: u32,
    inputs: BTreeMap<StepInput, Value>,
}

const T: Extent = Extent { factor: 1, sym: Some(Sym::T) };
/// Rows of the tables that activations are taken from.
const ROWS: u32 = 64;

/// Shapes from numbers and symbols.
macro_rules! dims {
    ($($d:expr),*) => { &[$(Extent::from($d)),*] };
}

impl Case {
    fn new(choice: &Choice) -> Case {
        let (m, batch) = (choice.get("m"), choice.get("batch"));
        Case {
            graph: Graph::default(),
            keep_mha: false,
            selected: choice.get("topk"),
            vocab: ROWS,
            context: choice.sizes.get("context").copied().unwrap_or(m),
            tokens: m * batch,
            sequences: batch,
            inputs: BTreeMap::new(),
        }
    }

    /// The step's symbols.
    pub fn syms(&self) -> SymValues {
        let pages = self.context.div_ceil(PAGE_TOKENS);
        SymValues::default()
            .with(Sym::T, self.tokens)
            .with(Sym::S, self.sequences)
            .with(Sym::P, pages)
            .with(Sym::L, self.tokens)
            .with(Sym::N, pages * self.sequences)
            .with(Sym::C, self.context)
    }

    fn input(&mut self, input: StepInput) -> Value {
        let graph = &mut self.graph;
        let make =
            || graph.add1(format!("{input:?}"), Op::Input(input), &[], TensorType::plain(DType::I32, &input.shape()));
        *self.inputs.entry(input).or_insert_with(make)
    }

    fn op(&mut self, name: &str, op: Op, inputs: &[Value], dtype: DType, shape: &[Extent]) -> Value {
        self.graph.add1(name, op, inputs, TensorType::plain(dtype, shape))
    }

    /// A matrix, or one for each of the first dim.
    fn weight(&mut self, name: &str, elem: Elem, shape: &[u32]) -> Value {
        let [count, rows, columns] = match *shape {
            [n] => [1, 1, n],
            [n, k] => [1, n, k],
            [.., e, n, k] => [e, n, k],
            [] => [1, 1, 1],
        };
        let block = match elem {
            Elem::Quant(q) => q.block,
            Elem::Plain(_) => [1, 1],
        };
        let part = |i: u32| TensorPart {
            tensor: format!("{name}.{i}"),
            scale: matches!(elem, Elem::Quant(_)).then(|| format!("{name}.{i}.scale")),
            scale_block: block,
            shape: [rows, columns],
            rows: [0, rows],
            cols: [0, columns],
        };
        let source = WeightSource::Tensors((0..count).map(part).collect());
        let ty = TensorType { shape: shape.iter().map(|&n| n.into()).collect(), elem };
        let index = self.graph.weights.len() as u32;
        self.graph.weights.push(Weight { name: name.into(), ty: ty.clone(), source });
        self.graph.add1(name, Op::Weight(index), &[], ty)
    }

    /// A weight as the choice stores matrices.
    fn matrix(&mut self, choice: &Choice, shape: &[u32]) -> Value {
        let elem = match choice.dtype {
            "fp8" => Elem::Quant(Quant { block: [128, 128], pow2: false }),
            _ => Elem::Plain(choice.act()),
        };
        self.weight("w", elem, shape)
    }

    /// Random activations `[T, ..]`.
    fn act(&mut self, name: &str, dtype: DType, dims: &[u32]) -> Value {
        let columns = dims.iter().product::<u32>();
        let table = self.weight(&format!("setup.{name}.table"), Elem::Plain(dtype), &[ROWS, columns]);
        let tokens = self.input(StepInput::Tokens);
        let x = self.op(&format!("setup.{name}"), Op::Embed, &[tokens, table], dtype, dims![T, columns]);
        if dims.len() == 1 {
            return x;
        }
        let shape: Vec<Extent> = [T].into_iter().chain(dims.iter().map(|&d| d.into())).collect();
        self.op(&format!("setup.{name}.view"), Op::Reshape, &[x], dtype, &shape)
    }

    fn quantized(&mut self, x: Value, quant: Quant) -> Value {
        let ty = TensorType::quant(quant, &self.graph.tensor(x).shape.clone());
        let name = format!("{}.quant", self.graph.dag[x.node].name);
        self.graph.add1(name, Op::Quantize, &[x], ty)
    }

    /// Activations that are multiplied with a [`matrix`](Case::matrix).
    fn operand(&mut self, choice: &Choice, dims: &[u32]) -> Value {
        let x = self.act("x", choice.act(), dims);
        match choice.dtype {
            "fp8" => self.quantized(x, Quant { block: [1, 128], pow2: false }),
            _ => x,
        }
    }

    fn state(&mut self, name: &str, format: StateFormat) -> Value {
        let index = self.graph.states.len() as u32;
        self.graph.states.push(State { name: name.into(), format });
        let node = self.graph.add(name, Op::State(index), &[], vec![ValueType::State(format)]);
        Value { node, output: 0 }
    }

    fn out(&mut self, name: &str, value: Value) {
        self.graph.outputs.push((name.into(), value));
    }

    fn done(mut self, result: Value) -> Case {
        self.out("result", result);
        self
    }

    /// Index logits over a cache; `kind` is `setup` or `kernel`.
    fn logits(&mut self, kind: &str, choice: &Choice, heads: u32, dim: u32) -> Value {
        let mut q = self.act("index_q", choice.act(), &[heads, dim]);
        if choice.dtype == "fp8" {
            q = self.quantized(q, Quant { block: [1, dim], pow2: true });
        }
        let weights = self.act("index_weights", DType::F32, &[heads]);
        let keys = self.state("index", choice.index(dim));
        let place = [StepInput::Positions, StepInput::Seqs, StepInput::PageTable].map(|i| self.input(i));
        let inputs = [&[q, weights, keys][..], &place].concat();
        self.op(&format!("{kind}.logits"), Op::IndexerLogits, &inputs, DType::F32, dims![T, Sym::C])
    }

    fn selection(&mut self, kind: &str, choice: &Choice, heads: u32, dim: u32, k: u32) -> Value {
        let logits = self.logits(kind, choice, heads, dim);
        self.op(&format!("{kind}.topk"), Op::TopK { k }, &[logits], DType::I32, dims![T, k])
    }

    /// Attention over the latents that `selected` names.
    fn mqa(&mut self, choice: &Choice, selected: Value) -> Value {
        let [heads, latent, rope] = ["heads", "latent", "rope"].map(|k| choice.get(k));
        let q_latent = self.act("q_latent", choice.act(), &[heads, latent]);
        let q_rope = self.act("q_rope", choice.act(), &[heads, rope]);
        let cache = self.state("latent", choice.latent());
        let (seqs, pages) = (self.input(StepInput::Seqs), self.input(StepInput::PageTable));
        let op = Op::MqaAttention { scale: ((latent + rope) as f32).sqrt().recip(), narrow: false };
        let inputs = [q_latent, q_rope, cache, selected, seqs, pages];
        self.op("kernel.attention", op, &inputs, choice.act(), dims![T, heads, latent])
    }
}

fn linear(choice: &Choice) -> Case {
    let mut case = Case::new(choice);
    let (n, k) = (choice.get("n"), choice.get("k"));
    let (x, w) = (case.operand(choice, &[k]), case.matrix(choice, &[n, k]));
    let y = case.op("kernel", Op::Linear, &[x, w], choice.act(), dims![T, n]);
    case.done(y)
}

fn head_linear(choice: &Choice) -> Case {
    let mut case = Case::new(choice);
    let [heads, n, k] = ["heads", "n", "k"].map(|key| choice.get(key));
    let (x, w) = (case.act("x", choice.act(), &[heads, k]), case.matrix(choice, &[heads.saturating_mul(k), n]));
    let op = Op::HeadLinear { first: 0, count: k, transposed: false };
    let y = case.op("kernel", op, &[x, w], choice.act(), dims![T, heads, n]);
    case.done(y)
}

fn expert_linear(choice: &Choice) -> Case {
    let mut case = Case::new(choice);
    let [experts, per_token, n, k] = ["experts", "topk", "n", "k"].map(|key| choice.get(key));
    let scores = case.act("scores", DType::F32, &[experts]);
    let op = Op::GroupTopK { groups: 1, keep: 1, k: per_token };
    let ids = case.op("setup.experts", op, &[scores], DType::I32, dims![T, per_token]);
    let (x, w) = (case.operand(choice, &[k]), case.matrix(choice, &[experts, n, k]));
    let y = case.op(
        "kernel",
        Op::ExpertLinear { per_token, x_sorted: false, y_sorted: false },
        &[x, w, ids],
        choice.act(),
        dims![T, per_token, n],
    );
    case.done(y)
}

fn attention(choice: &Choice) -> Case {
    let mut case = Case::new(choice);
    let selected = case.selection("setup", choice, 1, 16, choice.get("topk"));
    // Something else wants the selection too, so it is a kernel of its own.
    case.out("selection", selected);
    let y = case.mqa(choice, selected);
    case.done(y)
}

fn sparse_attention(choice: &Choice) -> Case {
    let mut case = Case::new(choice);
    let selected =
        case.selection("kernel", choice, choice.get("index_heads"), choice.get("index_dim"), choice.get("topk"));
    let y = case.mqa(choice, selected);
    case.done(y)
}

fn indexer_logits(choice: &Choice) -> Case {
    let mut case = Case::new(choice);
    let y = case.logits("kernel", choice, choice.get("heads"), choice.get("dim"));
    case.done(y)
}

fn top_k(choice: &Choice) -> Case {
    let mut case = Case::new(choice);
    let logits = case.logits("setup", choice, 1, 16);
    // Something else wants the logits too, so they are a kernel of their own.
    case.out("scores", logits);
    let k = choice.get("k");
    let y = case.op("kernel.topk", Op::TopK { k }, &[logits], DType::I32, dims![T, k]);
    case.done(y)
}

fn mha(choice: &Choice) -> Case {
    const LATENT: u32 = 64;
    let mut case = Case { keep_mha: true, selected: choice.get("context"), ..Case::new(choice) };
    let [heads, nope, rope, value] = ["heads", "nope", "rope", "value"].map(|key| choice.get(key));
    let (dtype, columns) = (choice.act(), heads.saturating_mul(nope.saturating_add(value)));
    let cache = case.state("latent", StateFormat::Latent { latent: LATENT, rope, dtype });
    let (seqs, pages) = (case.input(StepInput::Seqs), case.input(StepInput::PageTable));
    let latent = case.op("setup.latent", Op::CacheLatent, &[cache, pages], dtype, dims![Sym::S, Sym::C, LATENT]);
    let k_rope = case.op("setup.rope", Op::CacheRope, &[cache, pages], dtype, dims![Sym::S, Sym::C, rope]);
    let w = case.weight("setup.kv.w", Elem::Plain(dtype), &[columns, LATENT]);
    let kv = case.op("setup.kv", Op::Linear, &[latent, w], dtype, dims![Sym::S, Sym::C, columns]);
    let selected = case.selection("setup", choice, 1, 16, choice.get("context"));
    let q = case.act("q", dtype, &[heads, nope.saturating_add(rope)]);
    let op = Op::MhaAttention { scale: ((nope + rope) as f32).sqrt().recip(), nope, value, narrow: false };
    let y = case.op("kernel", op, &[q, kv, k_rope, selected, seqs], dtype, dims![T, heads.saturating_mul(value)]);
    case.done(y)
}

fn gate(choice: &Choice) -> Case {
    let mut case = Case::new(choice);
    let [experts, groups, keep, k] = ["experts", "groups", "keep", "topk"].map(|key| choice.get(key));
    let logits = case.act("logits", DType::F32, &[experts]);
    let bias = case.weight("bias", Elem::Plain(DType::F32), &[experts]);
    let scores = case.op("kernel.sigmoid", Op::Sigmoid, &[logits], DType::F32, dims![T, experts]);
    let biased = case.op("kernel.biased", Op::Add, &[scores, bias], DType::F32, dims![T, experts]);
    let ids = case.op("kernel.topk", Op::GroupTopK { groups, keep, k }, &[biased], DType::I32, dims![T, k]);
    let chosen = case.op("kernel.chosen", Op::TakeAlong, &[scores, ids], DType::F32, dims![T, k]);
    let op = Op::Normalize { factor: 2.5, by_sum: true };
    let weights = case.op("kernel.weights", op, &[chosen], DType::F32, dims![T, k]);
    case.out("experts", ids);
    case.done(weights)
}

fn rows(choice: &Choice) -> Case {
    let mut case = Case::new(choice);
    let n = choice.get("n");
    let (x, residual) = (case.act("x", DType::Bf16, &[n]), case.act("residual", DType::Bf16, &[n]));
    let gain = case.weight("gain", Elem::Plain(DType::F32), &[n]);
    let sum = case.op("kernel.add", Op::Add, &[x, residual], DType::F32, dims![T, n]);
    let kept = case.op("kernel.residual", Op::Cast, &[sum], DType::Bf16, dims![T, n]);
    let normed = case.op("kernel.norm", Op::RmsNorm { eps: 1e-6 }, &[sum, gain], DType::Bf16, dims![T, n]);
    let quant = TensorType::quant(Quant { block: [1, 128], pow2: false }, dims![T, n]);
    let y = case.graph.add1("kernel.quant", Op::Quantize, &[normed], quant);
    case.out("residual", kept);
    case.done(y)
}

fn embed(choice: &Choice) -> Case {
    let mut case = Case { vocab: choice.get("vocab"), ..Case::new(choice) };
    let (n, vocab) = (choice.get("n"), choice.get("vocab"));
    let table = case.weight("w", Elem::Plain(choice.act()), &[vocab, n]);
    let tokens = case.input(StepInput::Tokens);
    let y = case.op("kernel", Op::Embed, &[tokens, table], choice.act(), dims![T, n]);
    case.done(y)
}
