//! Shape and type rules of the graph ops.
//!
//! [`infer`] gives, for one op and the types of its inputs, what each output must be: a shape and the element types it may
//! have, or a cache format. The element type is a choice of whoever builds the graph (that is how `exact` and `deployed` differ),
//! so rules bound it rather than give it. [`Op::Reshape`] and [`Op::Quantize`] take part of their result from the declared
//! output. Nothing here looks at a graph: what an op refers to outside its inputs ([`Op::Weight`], [`Op::State`], [`Op::Arg`],
//! [`Op::Fused`]) is for the verifier.
//!
//! Dims match when they are the same [`Extent`]: two symbols are never equal, a symbol never equals a constant.

use super::{Elem, Op, Quant, StateFormat, TensorType, ValueType};
use crate::dtype::DType;
use crate::extent::{Extent, Sym};

/// Element types an output may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Elems {
    /// This one.
    Is(Elem),
    /// Plain f32, bf16 or f16.
    Float,
    /// Quantised with blocks of one row.
    QuantRows,
}

impl Elems {
    /// Whether `elem` is one of them.
    pub fn allow(self, elem: Elem) -> bool {
        match self {
            Elems::Is(e) => e == elem,
            Elems::Float => matches!(elem, Elem::Plain(DType::F32 | DType::Bf16 | DType::F16)),
            Elems::QuantRows => matches!(elem, Elem::Quant(Quant { block: [1, n], .. }) if n > 0),
        }
    }
}

/// What an output must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rule {
    /// A tensor of this shape with one of these element types.
    Tensor(Vec<Extent>, Elems),
    /// A cache.
    State(StateFormat),
}

/// The fewest and most inputs of an op; [`Op::Fused`] takes any number.
pub fn arity(op: &Op) -> (usize, usize) {
    match op {
        Op::Input(_) | Op::Weight(_) | Op::State(_) | Op::Arg(_) => (0, 0),
        Op::Cast
        | Op::Scale { .. }
        | Op::SliceLast { .. }
        | Op::Reshape
        | Op::Hadamard
        | Op::Quantize
        | Op::Dequantize
        | Op::Sigmoid
        | Op::GroupTopK { .. }
        | Op::Normalize { .. }
        | Op::SumPartials
        | Op::Append { .. }
        | Op::ArgMax { .. }
        | Op::AllReduce { .. }
        | Op::Route { .. } => (1, 1),
        Op::Embed
        | Op::TakeRows
        | Op::Add
        | Op::RmsNorm { .. }
        | Op::Linear
        | Op::LinearPartial { .. }
        | Op::HeadLinear { .. }
        | Op::CacheLatent
        | Op::CacheRope
        | Op::CacheRows
        | Op::SwiGlu
        | Op::TakeAlong
        | Op::WeightedSum => (2, 2),
        Op::LayerNorm { .. } | Op::Rope { .. } | Op::MqaCombine => (3, 3),
        Op::TopK { .. } => (1, 3),
        Op::CacheWrite => (3, 4),
        Op::ExpertLinear { .. } => (3, 5),
        Op::Sample => (4, 4),
        Op::MhaAttention { .. } => (5, 5),
        Op::IndexerLogits => (5, 6),
        Op::MqaAttention { .. } | Op::MqaPartial { .. } => (4, 6),
        Op::Fused(_) => (0, usize::MAX),
    }
}

/// What the outputs of `op` must be.
///
/// # Errors
/// What is wrong with the inputs or attributes, or that the op needs its graph ([`Op::Weight`] and the like).
pub fn infer(op: &Op, inputs: &[ValueType], declared: &[ValueType]) -> Result<Vec<Rule>, String> {
    let (least, most) = arity(op);
    if !(least..=most).contains(&inputs.len()) {
        return Err(format!(
            "has {} inputs, takes {least}{}",
            inputs.len(),
            if most > least { " or more" } else { "" }
        ));
    }
    if let Op::Scale { factor: x }
    | Op::RmsNorm { eps: x }
    | Op::LayerNorm { eps: x }
    | Op::MhaAttention { scale: x, .. }
    | Op::MqaAttention { scale: x, .. }
    | Op::MqaPartial { scale: x, .. }
    | Op::Append { value: x }
    | Op::Normalize { factor: x, .. } = op
        && !x.is_finite()
    {
        return Err(format!("its constant is {x}"));
    }
    let one = |shape: Vec<Extent>, elems: Elems| Ok(vec![Rule::Tensor(shape, elems)]);
    let cx = Inputs(inputs);
    match op {
        Op::Input(input) => one(input.shape(), Elems::Is(Elem::Plain(DType::I32))),
        Op::Weight(_) | Op::State(_) | Op::Arg(_) | Op::Fused(_) => Err("its type depends on its graph".into()),
        Op::Embed | Op::TakeRows | Op::TakeAlong => cx.lookup(op),
        Op::Cast | Op::Scale { .. } | Op::Sigmoid | Op::Normalize { .. } => {
            one(cx.float(0)?.shape.clone(), Elems::Float)
        }
        Op::Add | Op::SwiGlu => cx.pair(op),
        Op::RmsNorm { .. } | Op::LayerNorm { .. } => cx.norm(),
        Op::Linear => cx.linear(),
        Op::LinearPartial { parts } => {
            positive("parts", *parts)?;
            let [Rule::Tensor(shape, _)] = &cx.linear()?[..] else { return Err("x is no matrix".into()) };
            let &[t, n] = shape.as_slice() else { return Err(format!("the result is {shape:?}, wants 2 dims")) };
            one(vec![t, (*parts).into(), n], Elems::Is(Elem::Plain(DType::F32)))
        }
        Op::SumPartials => {
            let x = cx.typed(0, DType::F32, 3)?;
            constant(x.shape[1], "parts")?;
            one(vec![x.shape[0], x.shape[2]], Elems::Float)
        }
        Op::HeadLinear { first, count, transposed } => cx.head_linear(*first, *count, *transposed),
        Op::SliceLast { start, len } => cx.slice_last(*start, *len),
        Op::Reshape => cx.reshape(declared),
        Op::Rope { start, .. } => cx.rope(*start),
        Op::Hadamard => {
            let x = cx.float(0)?;
            match last(x)?.constant() {
                Some(n) if n.is_power_of_two() => one(x.shape.clone(), Elems::Float),
                _ => Err(format!("the last dim of {:?} is not a power of two", x.shape)),
            }
        }
        Op::Quantize => {
            let x = cx.float(0)?;
            last(x)?.constant().ok_or("the last dim must be constant")?;
            one(x.shape.clone(), Elems::QuantRows)
        }
        Op::Dequantize => match cx.tensor(0)? {
            TensorType { elem: Elem::Quant(_), shape } => one(shape.clone(), Elems::Float),
            _ => Err("input 0 is not quantised".into()),
        },
        Op::CacheWrite => cx.cache_write(),
        Op::CacheLatent | Op::CacheRope => cx.cache_read(op, declared),
        Op::CacheRows => {
            let (latent, rope) = cx.latent(0)?;
            cx.page_table(1)?;
            let columns = latent.checked_add(rope).ok_or("a dim overflows")?;
            one(vec![Sym::C.into(), columns.into()], Elems::Float)
        }
        Op::IndexerLogits => cx.indexer_logits(),
        Op::TopK { k } => {
            let x = cx.typed(0, DType::F32, 2)?;
            positive("k", *k)?;
            for i in 1..inputs.len() {
                cx.shaped(i, "bounds", DType::I32, &x.shape[..1])?;
            }
            one(vec![x.shape[0], (*k).into()], Elems::Is(Elem::Plain(DType::I32)))
        }
        Op::MhaAttention { nope, value, .. } => cx.mha(*nope, *value),
        Op::MqaAttention { .. } => attended(cx.mqa()?, declared),
        Op::MqaPartial { parts, .. } => {
            positive("parts", *parts)?;
            let mut shape = cx.mqa()?;
            shape.insert(2, (*parts).into());
            let f32s = Elems::Is(Elem::Plain(DType::F32));
            let each = Rule::Tensor(shape[..3].to_vec(), f32s);
            Ok(vec![Rule::Tensor(shape, f32s), each.clone(), each])
        }
        Op::MqaCombine => {
            let [t, h, p, l] = dims(cx.typed(0, DType::F32, 4)?, "sums")?;
            constant(p, "parts")?;
            cx.shaped(1, "largest", DType::F32, &[t, h, p])?;
            cx.shaped(2, "totals", DType::F32, &[t, h, p])?;
            attended(vec![t, h, l], declared)
        }
        Op::GroupTopK { groups, keep, k } => cx.group_topk(*groups, *keep, *k),
        Op::ExpertLinear { per_token, x_sorted, y_sorted } => cx.expert_linear(*per_token, [*x_sorted, *y_sorted]),
        Op::Append { .. } => {
            let x = cx.tensor(0)?;
            let [t, k] = dims(x, "x")?;
            let k = constant(k, "columns")?.checked_add(1).ok_or("a dim overflows")?;
            match x.elem {
                Elem::Quant(_) => Err("x is quantised".into()),
                elem => one(vec![t, k.into()], Elems::Is(elem)),
            }
        }
        Op::Route { experts } => {
            let ids = cx.typed(0, DType::I32, 2)?;
            let per_token = ids.shape[1].constant().ok_or("the experts of a token must be constant in number")?;
            let ints = Elems::Is(Elem::Plain(DType::I32));
            let offsets = experts.checked_add(1).ok_or("too many experts")?;
            let rows = || Ok::<_, String>(Rule::Tensor(vec![times(ids.shape[0], per_token)?], ints));
            Ok(vec![rows()?, Rule::Tensor(vec![offsets.into()], ints), rows()?])
        }
        Op::AllReduce { ranks } => {
            positive("ranks", *ranks)?;
            let x = cx.float(0)?;
            one(x.shape.clone(), Elems::Is(x.elem))
        }
        Op::ArgMax { parts } => {
            let x = cx.typed(0, DType::F32, 2)?;
            positive("parts", *parts)?;
            constant(x.shape[1], "columns")?;
            let shape = vec![x.shape[0], (*parts).into()];
            let rule = |dtype| Rule::Tensor(shape.clone(), Elems::Is(Elem::Plain(dtype)));
            Ok(vec![rule(DType::F32), rule(DType::I32)])
        }
        Op::Sample => {
            let x = cx.typed(0, DType::F32, 2)?;
            constant(x.shape[1], "columns")?;
            let (rows, parts) = (x.shape[0], constant(cx.typed(1, DType::F32, 2)?.shape[1], "parts")?);
            cx.shaped(1, "the largest", DType::F32, &[rows, parts.into()])?;
            cx.shaped(2, "columns", DType::I32, &[rows, parts.into()])?;
            cx.shaped(3, "draws", DType::I32, &[rows, 3.into()])?;
            one(vec![rows], Elems::Is(Elem::Plain(DType::I32)))
        }
        Op::WeightedSum => {
            let y = cx.float(0)?;
            let [t, k, d] = dims(y, "y")?;
            cx.shaped(1, "weights", DType::F32, &[t, k])?;
            one(vec![t, d], Elems::Float)
        }
    }
}

/// The result of attention, `[T, H, L]`, and as many of its further outputs as are declared.
fn attended(shape: Vec<Extent>, declared: &[ValueType]) -> Result<Vec<Rule>, String> {
    let each = Rule::Tensor(shape[..2].to_vec(), Elems::Is(Elem::Plain(DType::F32)));
    let mut rules = vec![Rule::Tensor(shape, Elems::Float)];
    rules.resize(declared.len().clamp(1, 3), each);
    Ok(rules)
}

/// `extent · factor` without overflow.
fn times(extent: Extent, factor: u32) -> Result<Extent, String> {
    let factor = extent.factor.checked_mul(factor).ok_or("a dim overflows")?;
    Ok(Extent { factor, sym: extent.sym })
}

fn last(t: &TensorType) -> Result<Extent, String> {
    t.shape.last().copied().ok_or_else(|| "a tensor without dims".to_string())
}

fn positive(what: &str, n: u32) -> Result<(), String> {
    if n == 0 { Err(format!("{what} is 0")) } else { Ok(()) }
}

fn dims<const N: usize>(t: &TensorType, what: &str) -> Result<[Extent; N], String> {
    t.shape.clone().try_into().map_err(|shape: Vec<Extent>| format!("{what} is {shape:?}, wants {N} dims"))
}

fn constant(extent: Extent, what: &str) -> Result<u32, String> {
    extent.constant().ok_or_else(|| format!("{what} is {extent}, wants a constant"))
}

fn same(what: &str, a: Extent, b: Extent) -> Result<(), String> {
    if a == b { Ok(()) } else { Err(format!("{what}: {a} does not match {b}")) }
}

/// The constant factor and the sorted symbols of a number of elements.
fn elements(shape: &[Extent]) -> Option<(u128, Vec<Sym>)> {
    let mut syms: Vec<Sym> = shape.iter().filter_map(|e| e.sym).collect();
    syms.sort_unstable();
    let factor = shape.iter().try_fold(1u128, |n, e| n.checked_mul(u128::from(e.factor)))?;
    Some((factor, syms))
}

/// The input types of one op.
struct Inputs<'a>(&'a [ValueType]);

impl<'a> Inputs<'a> {
    fn tensor(&self, i: usize) -> Result<&'a TensorType, String> {
        self.0[i].tensor().ok_or_else(|| format!("input {i} is a cache, wants a tensor"))
    }

    fn state(&self, i: usize) -> Result<StateFormat, String> {
        match &self.0[i] {
            ValueType::State(format) => Ok(*format),
            ValueType::Tensor(_) => Err(format!("input {i} is a tensor, wants a cache")),
        }
    }

    /// A plain float tensor.
    fn float(&self, i: usize) -> Result<&'a TensorType, String> {
        let t = self.tensor(i)?;
        if Elems::Float.allow(t.elem) { Ok(t) } else { Err(format!("input {i} is {:?}, wants plain floats", t.elem)) }
    }

    /// A plain float tensor, or a quantised one; activations are quantised by rows.
    fn operand(&self, i: usize, weight: bool) -> Result<&'a TensorType, String> {
        let t = self.tensor(i)?;
        match t.elem {
            Elem::Quant(q) if weight || q.block[0] == 1 => Ok(t),
            _ => self.float(i),
        }
    }

    fn typed(&self, i: usize, dtype: DType, rank: usize) -> Result<&'a TensorType, String> {
        let t = self.tensor(i)?;
        if t.elem != Elem::Plain(dtype) {
            return Err(format!("input {i} is {:?}, wants {dtype}", t.elem));
        }
        if t.shape.len() != rank {
            return Err(format!("input {i} is {:?}, wants {rank} dims", t.shape));
        }
        Ok(t)
    }

    fn shaped(&self, i: usize, what: &str, dtype: DType, shape: &[Extent]) -> Result<(), String> {
        let t = self.typed(i, dtype, shape.len())?;
        if t.shape == shape { Ok(()) } else { Err(format!("{what} is {:?}, wants {shape:?}", t.shape)) }
    }

    fn page_table(&self, i: usize) -> Result<Extent, String> {
        Ok(self.typed(i, DType::I32, 2)?.shape[0])
    }

    fn lookup(&self, op: &Op) -> Result<Vec<Rule>, String> {
        let rule = match op {
            Op::Embed => {
                let ids = self.typed(0, DType::I32, 1)?;
                let [_, d] = dims(self.float(1)?, "the table")?;
                Rule::Tensor(vec![ids.shape[0], d], Elems::Float)
            }
            Op::TakeRows => {
                let (x, rows) = (self.tensor(0)?, self.typed(1, DType::I32, 1)?);
                if x.shape.is_empty() || matches!(x.elem, Elem::Quant(q) if q.block[0] != 1 || x.shape.len() < 2) {
                    return Err(format!("cannot take rows of {:?} {:?}", x.shape, x.elem));
                }
                let mut shape = x.shape.clone();
                shape[0] = rows.shape[0];
                Rule::Tensor(shape, Elems::Is(x.elem))
            }
            _ => {
                let (x, columns) = (self.tensor(0)?, self.typed(1, DType::I32, 2)?);
                let [t, _] = dims(x, "x")?;
                same("rows of x and columns", t, columns.shape[0])?;
                if matches!(x.elem, Elem::Quant(_)) {
                    return Err("x is quantised".into());
                }
                Rule::Tensor(columns.shape.clone(), Elems::Is(x.elem))
            }
        };
        Ok(vec![rule])
    }

    fn pair(&self, op: &Op) -> Result<Vec<Rule>, String> {
        let (a, b) = (self.float(0)?, self.float(1)?);
        let row = matches!(op, Op::Add) && b.shape.len() == 1 && a.shape.last() == b.shape.first();
        if a.shape != b.shape && !row {
            return Err(format!("operands are {:?} and {:?}", a.shape, b.shape));
        }
        Ok(vec![Rule::Tensor(a.shape.clone(), Elems::Float)])
    }

    fn norm(&self) -> Result<Vec<Rule>, String> {
        let x = self.float(0)?;
        let d = last(x)?;
        for i in 1..self.0.len() {
            let g = self.float(i)?;
            if g.shape != [d] {
                return Err(format!("input {i} is {:?}, wants [{d}]", g.shape));
            }
        }
        Ok(vec![Rule::Tensor(x.shape.clone(), Elems::Float)])
    }

    /// Blocks along the contracted dim must agree when both sides are quantised.
    fn blocks(x: &TensorType, w: &TensorType) -> Result<(), String> {
        match (x.elem, w.elem) {
            (Elem::Quant(a), Elem::Quant(b)) if a.block[1] != b.block[1] => {
                Err(format!("scale blocks of {} and {} columns", a.block[1], b.block[1]))
            }
            _ => Ok(()),
        }
    }

    fn linear(&self) -> Result<Vec<Rule>, String> {
        let (x, w) = (self.operand(0, false)?, self.operand(1, true)?);
        let [n, k] = dims(w, "the weight")?;
        same("contracted dims", last(x)?, k)?;
        Self::blocks(x, w)?;
        let mut shape = x.shape.clone();
        if let Some(d) = shape.last_mut() {
            *d = n;
        }
        Ok(vec![Rule::Tensor(shape, Elems::Float)])
    }

    fn head_linear(&self, first: u32, count: u32, transposed: bool) -> Result<Vec<Rule>, String> {
        let (x, w) = (self.operand(0, false)?, self.operand(1, true)?);
        let ([t, h, a], [rows, k]) = (dims(x, "x")?, dims(w, "the weight")?);
        let (heads, rows) = (constant(h, "heads")?, constant(rows, "weight rows")?);
        if heads == 0 || rows % heads != 0 {
            return Err(format!("{rows} weight rows do not divide among {heads} heads"));
        }
        if first.checked_add(count).is_none_or(|end| end > rows / heads) {
            return Err(format!("rows {first}+{count} of {} rows a head", rows / heads));
        }
        let (contracted, result) = if transposed { (k, count.into()) } else { (count.into(), k) };
        same("contracted dims", a, contracted)?;
        Ok(vec![Rule::Tensor(vec![t, h, result], Elems::Float)])
    }

    fn slice_last(&self, start: u32, len: u32) -> Result<Vec<Rule>, String> {
        let x = self.tensor(0)?;
        let d = constant(last(x)?, "the last dim")?;
        positive("len", len)?;
        if start.checked_add(len).is_none_or(|end| end > d) {
            return Err(format!("columns {start}+{len} of {d}"));
        }
        if matches!(x.elem, Elem::Quant(q) if q.block[1] == 0 || !start.is_multiple_of(q.block[1]) || (!len.is_multiple_of(q.block[1]) && start + len != d))
        {
            return Err("the slice cuts a scale block".into());
        }
        let mut shape = x.shape.clone();
        if let Some(d) = shape.last_mut() {
            *d = len.into();
        }
        Ok(vec![Rule::Tensor(shape, Elems::Is(x.elem))])
    }

    fn reshape(&self, declared: &[ValueType]) -> Result<Vec<Rule>, String> {
        let x = self.tensor(0)?;
        let Some(ValueType::Tensor(out)) = declared.first() else { return Err("declares no tensor".into()) };
        if elements(&x.shape).is_none() || elements(&x.shape) != elements(&out.shape) {
            return Err(format!("{:?} and {:?} differ in elements", x.shape, out.shape));
        }
        if let Elem::Quant(q) = x.elem {
            let whole = |t: &TensorType| {
                t.shape.len() > 1
                    && last(t).ok().and_then(Extent::constant).is_some_and(|d| q.block[1] > 0 && d % q.block[1] == 0)
            };
            if q.block[0] != 1 || (last(x)? != last(out)? && !(whole(x) && whole(out))) {
                return Err("the reshape cuts scale blocks".into());
            }
        }
        Ok(vec![Rule::Tensor(out.shape.clone(), Elems::Is(x.elem))])
    }

    fn rope(&self, start: u32) -> Result<Vec<Rule>, String> {
        let (x, positions) = (self.float(0)?, self.typed(1, DType::I32, 1)?);
        if x.shape.len() < 2 {
            return Err(format!("x is {:?}, wants 2 dims or more", x.shape));
        }
        same("rows and positions", x.shape[0], positions.shape[0])?;
        let [_, dim] = dims(self.float(2)?, "the table")?;
        let (dim, d) = (constant(dim, "the table's columns")?, constant(last(x)?, "the last dim")?);
        if dim % 2 != 0 || start.checked_add(dim).is_none_or(|end| end > d) {
            return Err(format!("rotates elements {start}+{dim} of {d}"));
        }
        Ok(vec![Rule::Tensor(x.shape.clone(), Elems::Float)])
    }

    fn cache_write(&self) -> Result<Vec<Rule>, String> {
        let format = self.state(0)?;
        let t = self.typed(1, DType::I32, 1)?.shape[0];
        let fp8 = |n: u32| Elem::Quant(Quant { block: [1, n], pow2: true });
        let parts: Vec<(u32, Elem)> = match format {
            StateFormat::LatentFp8 { latent, rope } => {
                vec![(latent, fp8(StateFormat::GROUP)), (rope, Elem::Plain(DType::Bf16))]
            }
            StateFormat::Latent { latent, rope, dtype } => {
                vec![(latent, Elem::Plain(dtype)), (rope, Elem::Plain(dtype))]
            }
            StateFormat::IndexFp8 { dim } => vec![(dim, fp8(dim))],
            StateFormat::Index { dim, dtype } => vec![(dim, Elem::Plain(dtype))],
        };
        if self.0.len() != parts.len() + 2 {
            return Err(format!("has {} inputs, this cache takes {}", self.0.len(), parts.len() + 2));
        }
        for (i, (columns, elem)) in parts.into_iter().enumerate() {
            let part = self.tensor(i + 2)?;
            let wanted = TensorType { shape: vec![t, columns.into()], elem };
            if *part != wanted {
                return Err(format!("input {} is {part:?}, wants {wanted:?}", i + 2));
            }
        }
        Ok(vec![Rule::State(format)])
    }

    fn cache_read(&self, op: &Op, declared: &[ValueType]) -> Result<Vec<Rule>, String> {
        let (latent, rope) = self.latent(0)?;
        let s = self.page_table(1)?;
        let columns = if matches!(op, Op::CacheLatent) { latent } else { rope };
        let codes = Elem::Quant(Quant { block: [1, StateFormat::GROUP], pow2: true });
        let as_stored = matches!(op, Op::CacheLatent)
            && matches!(self.state(0)?, StateFormat::LatentFp8 { .. })
            && matches!(declared.first(), Some(ValueType::Tensor(t)) if t.elem == codes);
        let elems = if as_stored { Elems::Is(codes) } else { Elems::Float };
        Ok(vec![Rule::Tensor(vec![s, Sym::C.into(), columns.into()], elems)])
    }

    fn latent(&self, i: usize) -> Result<(u32, u32), String> {
        match self.state(i)? {
            StateFormat::LatentFp8 { latent, rope } | StateFormat::Latent { latent, rope, .. } => Ok((latent, rope)),
            other => Err(format!("input {i} is {other:?}, wants a latent cache")),
        }
    }

    fn indexer_logits(&self) -> Result<Vec<Rule>, String> {
        let codes = self.0.len() == 5 && self.tensor(0)?.elem == Elem::Plain(DType::E4m3);
        let [t, h, d] = dims(if codes { self.tensor(0)? } else { self.operand(0, false)? }, "q")?;
        self.shaped(1, "weights", DType::F32, &[t, h])?;
        match &self.0[2] {
            ValueType::State(StateFormat::IndexFp8 { dim } | StateFormat::Index { dim, .. }) => {
                same("key elements", d, (*dim).into())?;
            }
            ValueType::State(other) => return Err(format!("input 2 is {other:?}, wants an index cache")),
            ValueType::Tensor(_) => {
                let keys = self.operand(2, false)?;
                let [c, dim] = dims(keys, "the matrix of keys")?;
                same("keys and columns", c, Sym::C.into())?;
                same("key elements", d, dim)?;
                self.shaped(3, "starts", DType::I32, &[t])?;
                self.shaped(4, "ends", DType::I32, &[t])?;
                if self.0.len() != 5 {
                    return Err(format!("has {} inputs, a matrix of keys takes 5", self.0.len()));
                }
            }
        }
        if let ValueType::State(_) = &self.0[2] {
            self.shaped(3, "positions or ends", DType::I32, &[t])?;
            if self.0.len() == 6 {
                self.shaped(4, "seqs", DType::I32, &[t])?;
            }
            self.page_table(self.0.len() - 1)?;
        }
        Ok(vec![Rule::Tensor(vec![t, Sym::C.into()], Elems::Is(Elem::Plain(DType::F32)))])
    }

    fn selected(&self, i: usize, t: Extent) -> Result<(), String> {
        same("rows and selected rows", t, self.typed(i, DType::I32, 2)?.shape[0])
    }

    fn mha(&self, nope: u32, value: u32) -> Result<Vec<Rule>, String> {
        let [t, h, qk] = dims(self.float(0)?, "q")?;
        let [s, c, columns] = dims(self.float(1)?, "kv")?;
        let [rope_s, rope_c, r] = dims(self.float(2)?, "rope")?;
        let (heads, r) = (constant(h, "heads")?, constant(r, "rope elements")?);
        let sum = |a: u32, b: u32| a.checked_add(b).map(Extent::from).ok_or("a dim overflows");
        same("query elements", qk, sum(nope, r)?)?;
        same("kv columns", columns, times(sum(nope, value)?, heads)?)?;
        same("sequences", s, rope_s)?;
        same("contexts", c, rope_c)?;
        self.selected(3, t)?;
        self.shaped(4, "seqs", DType::I32, &[t])?;
        Ok(vec![Rule::Tensor(vec![t, times(value.into(), heads)?], Elems::Float)])
    }

    /// The shape of the result.
    fn mqa(&self) -> Result<Vec<Extent>, String> {
        let [t, h, l] = dims(self.float(0)?, "q_latent")?;
        let [t2, h2, r] = dims(self.float(1)?, "q_rope")?;
        same("rows", t, t2)?;
        same("heads", h, h2)?;
        if let (ValueType::Tensor(_), 4) = (&self.0[2], self.0.len()) {
            let [c, columns] = dims(self.float(2)?, "the matrix of keys")?;
            same("rows of keys", c, Sym::C.into())?;
            let sum = constant(l, "latent elements")?.checked_add(constant(r, "rope elements")?);
            same("key elements", sum.ok_or("a dim overflows")?.into(), columns)?;
        } else {
            let (latent, rope) = self.latent(2)?;
            same("latent elements", l, latent.into())?;
            same("rope elements", r, rope.into())?;
        }
        self.selected(3, t)?;
        if self.0.len() == 6 {
            self.shaped(4, "seqs", DType::I32, &[t])?;
        }
        if self.0.len() > 4 {
            self.page_table(self.0.len() - 1)?;
        }
        Ok(vec![t, h, l])
    }

    fn group_topk(&self, groups: u32, keep: u32, k: u32) -> Result<Vec<Rule>, String> {
        let x = self.typed(0, DType::F32, 2)?;
        let e = constant(x.shape[1], "columns")?;
        if groups == 0
            || e == 0
            || e % groups != 0
            || !(1..=groups).contains(&keep)
            || !(1..=e / groups * keep).contains(&k)
        {
            return Err(format!("cannot select {k} of {keep} of {groups} groups of {e} columns"));
        }
        Ok(vec![Rule::Tensor(vec![x.shape[0], k.into()], Elems::Is(Elem::Plain(DType::I32)))])
    }

    fn expert_linear(&self, per_token: u32, sorted: [bool; 2]) -> Result<Vec<Rule>, String> {
        positive("per_token", per_token)?;
        let (x, w) = (self.operand(0, false)?, self.operand(1, true)?);
        let [e, n, k] = dims(w, "the weight")?;
        if x.shape.len() != 2 && (x.shape.len() != 3 || x.shape[1] != per_token.into()) {
            return Err(format!("x is {:?}, wants [T, K] or [T, {per_token}, K]", x.shape));
        }
        same("contracted dims", last(x)?, k)?;
        Self::blocks(x, w)?;
        let t = x.shape[0];
        if sorted[0] && x.shape.len() != 3 || sorted.contains(&true) && self.0.len() == 3 {
            return Err("sorted rows want an order, and those of x one for each expert of a token".into());
        }
        if self.0.len() == 3 {
            self.shaped(2, "experts", DType::I32, &[t, per_token.into()])?;
        } else {
            let offsets = constant(e, "experts")?.checked_add(1).ok_or("too many experts")?;
            self.shaped(2, "order", DType::I32, &[times(t, per_token)?])?;
            self.shaped(3, "offsets", DType::I32, &[offsets.into()])?;
            if self.0.len() > 4 {
                self.shaped(4, "owners", DType::I32, &[times(t, per_token)?])?;
            }
        }
        Ok(vec![Rule::Tensor(vec![t, per_token.into(), n], Elems::Float)])
    }
}
