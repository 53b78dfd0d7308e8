//! The text form of graphs.
//!
//! One line a weight, a cache, an argument, a node, an output; nodes in [`Graph::order`], numbered from 0:
//!
//! ```text
//! graph {
//!   weight 0 "lm_head.weight" : [512, 128] f32 = {"tensors":[{"tensor":"lm_head.weight",..}]}
//!   state 0 "layers.0.latent" : latent_fp8[latent=512, rope=64]
//!   %0 = input[tokens]() : [T] i32 "tokens"
//!   %7 = rms_norm[eps=1e-6](%5, %6) : [T, 128] bf16 "layers.0.input_layernorm"
//!   %8 = quantize(%7) : [T, 128] e4m3[1x128, pow2] "layers.0.input_layernorm.quant"
//!   %9 = fused[kind=row, select_all_below=0](%7, %8) : [T, 128] bf16, [T, 128] f32 "norm" {
//!     ...
//!   }
//!   output "logits" = %9.1
//! }
//! ```
//!
//! `%9.1` is output 1 of node 9; `%9` is output 0. Names are JSON strings, weight sources JSON. What is in an op's brackets are the
//! fields of its Rust type. `//` starts a comment where a line could start.
//!
//! [`parse`] takes any text without panicking, and what it gives is acyclic, since uses follow definitions; the rest is for the
//! verifier. `parse(print(graph)) == graph` for every graph that verifies.

use super::verify::MAX_DEPTH;
use super::{
    Argument, Edge, Elem, Fused, Graph, Node, NodeId, Op, Quant, State, StateFormat, TensorType, Value, ValueType,
    Weight,
};
use crate::dtype::DType;
use crate::extent::{Extent, Sym};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Number, Value as Json};
use std::collections::HashMap;
use std::fmt;

// ---- print ----

impl fmt::Display for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("graph ")?;
        print_body(self, f, 0)?;
        f.write_str("\n")
    }
}

impl fmt::Display for Elem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Elem::Plain(dtype) => write!(f, "{dtype}"),
            Elem::Quant(Quant { block: [rows, columns], pow2 }) => {
                write!(f, "e4m3[{rows}x{columns}{}]", if *pow2 { ", pow2" } else { "" })
            }
        }
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {}", self.shape, self.elem)
    }
}

impl fmt::Display for ValueType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ValueType::Tensor(t) => t.fmt(f),
            ValueType::State(format) => f.write_str(&tagged(format)),
        }
    }
}

/// A unit variant as `name`, others as `name[fields]`.
fn tagged(x: &impl Serialize) -> String {
    match serde_json::to_value(x) {
        Ok(Json::String(name)) => name,
        Ok(Json::Object(map)) => map.iter().map(|(name, fields)| format!("{name}[{}]", attributes(fields))).collect(),
        _ => String::new(),
    }
}

fn attributes(fields: &Json) -> String {
    match fields {
        Json::Object(map) => map.iter().map(|(k, v)| format!("{k}={}", scalar(v))).collect::<Vec<_>>().join(", "),
        other => scalar(other),
    }
}

fn scalar(x: &Json) -> String {
    match x {
        Json::String(s) => s.clone(),
        // All floats of the IR are f32; one that JSON cannot hold is null.
        Json::Number(n) if n.is_f64() => format!("{:?}", n.as_f64().unwrap_or(0.0) as f32),
        other => other.to_string(),
    }
}

fn quoted(name: &str) -> String {
    Json::String(name.into()).to_string()
}

fn reference(numbers: &HashMap<NodeId, usize>, v: &Value) -> String {
    match (numbers.get(&v.node), v.output) {
        (None, _) => "%?".into(),
        (Some(n), 0) => format!("%{n}"),
        (Some(n), output) => format!("%{n}.{output}"),
    }
}

fn print_body(g: &Graph, f: &mut fmt::Formatter<'_>, depth: usize) -> fmt::Result {
    let pad = "  ".repeat(depth + 1);
    f.write_str("{\n")?;
    for (i, w) in g.weights.iter().enumerate() {
        let source = serde_json::to_string(&w.source).map_err(|_| fmt::Error)?;
        writeln!(f, "{pad}weight {i} {} : {} = {source}", quoted(&w.name), w.ty)?;
    }
    for (i, s) in g.states.iter().enumerate() {
        writeln!(f, "{pad}state {i} {} : {}", quoted(&s.name), tagged(&s.format))?;
    }
    for (i, a) in g.args.iter().enumerate() {
        writeln!(f, "{pad}arg {i} {} : {}", quoted(&a.name), a.ty)?;
    }
    let order = g.order();
    let numbers: HashMap<NodeId, usize> = order.iter().enumerate().map(|(i, &n)| (n, i)).collect();
    for (i, &id) in order.iter().enumerate() {
        let node = &g.dag[id];
        let op = match &node.op {
            Op::Fused(x) => format!("fused[kind={}, select_all_below={}]", tagged(&x.kind), x.select_all_below),
            op => tagged(op),
        };
        let inputs: Vec<String> = g.inputs(id).iter().map(|v| reference(&numbers, v)).collect();
        let types: Vec<String> = node.outputs.iter().map(ValueType::to_string).collect();
        write!(f, "{pad}%{i} = {op}({}) : {} {}", inputs.join(", "), types.join(", "), quoted(&node.name))?;
        if let Op::Fused(x) = &node.op {
            f.write_str(" ")?;
            print_body(&x.body, f, depth + 1)?;
        }
        f.write_str("\n")?;
    }
    for (name, v) in &g.outputs {
        writeln!(f, "{pad}output {} = {}", quoted(name), reference(&numbers, v))?;
    }
    write!(f, "{}}}", "  ".repeat(depth))
}

// ---- parse ----

/// Where and why a text is not a graph.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{line}:{col}: {message}")]
pub struct ParseError {
    /// Line, from 1.
    pub line: usize,
    /// Character of the line, from 1.
    pub col: usize,
    /// What was expected.
    pub message: String,
}

/// Reads a graph.
///
/// # Errors
/// The first place where the text leaves the form.
pub fn parse(text: &str) -> Result<Graph, ParseError> {
    let mut p = Parser { text, at: 0 };
    let graph = p.graph().map_err(|message| p.error(message))?;
    Ok(graph)
}

type Parsed<T> = Result<T, String>;

struct Parser<'a> {
    text: &'a str,
    /// Byte of the next character.
    at: usize,
}

impl<'a> Parser<'a> {
    fn error(&self, message: String) -> ParseError {
        let before = &self.text[..self.at];
        let line = before.rfind('\n').map_or(before, |i| &before[i + 1..]);
        ParseError { line: before.matches('\n').count() + 1, col: line.chars().count() + 1, message }
    }

    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    /// Skips blanks, newlines and comments.
    fn space(&mut self) {
        loop {
            let rest = self.rest();
            self.at += rest.len() - rest.trim_start().len();
            if !self.rest().starts_with("//") {
                return;
            }
            self.at += self.rest().find('\n').unwrap_or(self.rest().len());
        }
    }

    fn eat(&mut self, token: &str) -> bool {
        self.space();
        let found = self.rest().starts_with(token);
        if found {
            self.at += token.len();
        }
        found
    }

    fn expect(&mut self, token: &str) -> Parsed<()> {
        if self.eat(token) { Ok(()) } else { Err(format!("expected `{token}`")) }
    }

    /// Characters that pass.
    fn take(&mut self, what: &str, pass: impl Fn(char) -> bool) -> Parsed<&'a str> {
        self.space();
        let rest = self.rest();
        let word = &rest[..rest.find(|c| !pass(c)).unwrap_or(rest.len())];
        if word.is_empty() {
            return Err(format!("expected {what}"));
        }
        self.at += word.len();
        Ok(word)
    }

    fn word(&mut self) -> Parsed<&'a str> {
        self.take("a word", |c| c.is_ascii_alphanumeric() || c == '_')
    }

    /// Runs `read`; on an error, goes back to where it started so that the error points there.
    fn or_back<T>(&mut self, read: impl FnOnce(&mut Self) -> Parsed<T>) -> Parsed<T> {
        self.space();
        let start = self.at;
        read(self).inspect_err(|_| self.at = start)
    }

    fn number(&mut self) -> Parsed<u32> {
        self.or_back(|p| {
            let digits = p.take("a number", |c| c.is_ascii_digit())?;
            digits.parse().map_err(|_| format!("{digits} is too large"))
        })
    }

    fn json<T: DeserializeOwned>(&mut self, what: &str) -> Parsed<T> {
        self.space();
        let mut stream = serde_json::Deserializer::from_str(self.rest()).into_iter::<T>();
        let value = stream.next();
        let length = stream.byte_offset();
        match value {
            Some(Ok(value)) => {
                self.at += length;
                Ok(value)
            }
            Some(Err(e)) => Err(format!("expected {what}: {e}")),
            None => Err(format!("expected {what}")),
        }
    }

    fn name(&mut self) -> Parsed<String> {
        self.json("a name in quotes")
    }

    fn graph(&mut self) -> Parsed<Graph> {
        self.expect("graph")?;
        let graph = self.body(1)?;
        self.space();
        if self.rest().is_empty() { Ok(graph) } else { Err("expected the end".into()) }
    }

    fn body(&mut self, depth: usize) -> Parsed<Graph> {
        if depth > MAX_DEPTH {
            return Err(format!("bodies nest deeper than {MAX_DEPTH}"));
        }
        self.expect("{")?;
        let mut g = Graph::default();
        let mut nodes: Vec<NodeId> = Vec::new();
        while !self.eat("}") {
            if self.eat("%") {
                self.node(&mut g, &mut nodes, depth)?;
            } else if self.eat("weight") {
                self.index(g.weights.len())?;
                let name = self.name()?;
                self.expect(":")?;
                let ty = self.tensor()?;
                self.expect("=")?;
                g.weights.push(Weight { name, ty, source: self.json("a weight source")? });
            } else if self.eat("state") {
                self.index(g.states.len())?;
                let name = self.name()?;
                self.expect(":")?;
                g.states.push(State { name, format: self.tagged("a cache format")? });
            } else if self.eat("arg") {
                self.index(g.args.len())?;
                let name = self.name()?;
                self.expect(":")?;
                g.args.push(Argument { name, ty: self.value_type()? });
            } else if self.eat("output") {
                let name = self.name()?;
                self.expect("=")?;
                let value = self.value(&g, &nodes)?;
                g.outputs.push((name, value));
            } else {
                return Err("expected `%`, `weight`, `state`, `arg`, `output` or `}`".into());
            }
        }
        Ok(g)
    }

    /// The number of an item, which must be the next one.
    fn index(&mut self, next: usize) -> Parsed<()> {
        self.or_back(|p| match p.number()? {
            n if n as usize == next => Ok(()),
            n => Err(format!("expected number {next}, not {n}")),
        })
    }

    fn node(&mut self, g: &mut Graph, nodes: &mut Vec<NodeId>, depth: usize) -> Parsed<()> {
        self.index(nodes.len())?;
        self.expect("=")?;
        let (op, fused) = self.op()?;
        self.expect("(")?;
        let mut inputs = Vec::new();
        while !self.eat(")") {
            if !inputs.is_empty() {
                self.expect(",")?;
            }
            inputs.push(self.value(g, nodes)?);
        }
        self.expect(":")?;
        let mut outputs = vec![self.value_type()?];
        while self.eat(",") {
            outputs.push(self.value_type()?);
        }
        let name = self.name()?;
        let op = match (op, fused) {
            (_, Some(mut fused)) => {
                fused.body = self.body(depth + 1)?;
                Op::Fused(Box::new(fused))
            }
            (Some(op), None) => op,
            (None, None) => return Err("expected an op".into()),
        };
        let id = g.dag.add_node(Node { op, outputs, name });
        for (input, v) in inputs.iter().enumerate() {
            g.dag.add_edge(v.node, id, Edge { output: v.output, input: input as u32 });
        }
        nodes.push(id);
        Ok(())
    }

    /// An op, or a fused one that waits for its body.
    fn op(&mut self) -> Parsed<(Option<Op>, Option<Fused>)> {
        self.or_back(|p| {
            let json = p.tagged_json()?;
            match &json {
                Json::Object(map) if map.contains_key("fused") => {
                    let fields = &map["fused"];
                    let kind = serde_json::from_value(fields["kind"].clone()).map_err(|e| format!("kind: {e}"))?;
                    let below = serde_json::from_value(fields["select_all_below"].clone())
                        .map_err(|e| format!("select_all_below: {e}"))?;
                    Ok((None, Some(Fused { kind, select_all_below: below, body: Graph::default() })))
                }
                _ => Ok((Some(serde_json::from_value(json).map_err(|e| format!("not an op: {e}"))?), None)),
            }
        })
    }

    /// What [`tagged`] prints.
    fn tagged<T: DeserializeOwned>(&mut self, what: &str) -> Parsed<T> {
        self.or_back(|p| serde_json::from_value(p.tagged_json()?).map_err(|e| format!("not {what}: {e}")))
    }

    fn tagged_json(&mut self) -> Parsed<Json> {
        let name = self.word()?.to_string();
        if !self.rest().starts_with('[') {
            return Ok(Json::String(name));
        }
        self.expect("[")?;
        let mut fields = Map::new();
        loop {
            let word = self.take("an attribute", |c| c.is_ascii_alphanumeric() || "_+-.".contains(c))?;
            if !self.eat("=") {
                self.expect("]")?;
                let only = if fields.is_empty() { scalar_json(word)? } else { return Err("expected `=`".into()) };
                return Ok(Json::Object(Map::from_iter([(name, only)])));
            }
            let value = self.take("a value", |c| c.is_ascii_alphanumeric() || "_+-.".contains(c))?;
            fields.insert(word.to_string(), scalar_json(value)?);
            if !self.eat(",") {
                self.expect("]")?;
                return Ok(Json::Object(Map::from_iter([(name, Json::Object(fields))])));
            }
        }
    }

    fn value(&mut self, g: &Graph, nodes: &[NodeId]) -> Parsed<Value> {
        self.or_back(|p| {
            p.expect("%")?;
            let n = p.number()?;
            let output = if p.rest().starts_with('.') {
                p.at += 1;
                p.number()?
            } else {
                0
            };
            match nodes.get(n as usize) {
                Some(&node) if (output as usize) < g.dag[node].outputs.len() => Ok(Value { node, output }),
                Some(_) => Err(format!("%{n} has no output {output}")),
                None => Err(format!("%{n} is not defined above")),
            }
        })
    }

    fn value_type(&mut self) -> Parsed<ValueType> {
        self.space();
        if self.rest().starts_with('[') {
            return Ok(ValueType::Tensor(self.tensor()?));
        }
        let format: StateFormat = self.tagged("a type")?;
        Ok(ValueType::State(format))
    }

    fn tensor(&mut self) -> Parsed<TensorType> {
        self.expect("[")?;
        let mut shape: Vec<Extent> = Vec::new();
        while !self.eat("]") {
            if !shape.is_empty() {
                self.expect(",")?;
            }
            shape.push(self.extent()?);
        }
        let elem = self.elem()?;
        Ok(TensorType { shape, elem })
    }

    fn extent(&mut self) -> Parsed<Extent> {
        self.space();
        let factor = if self.rest().starts_with(|c: char| c.is_ascii_digit()) { Some(self.number()?) } else { None };
        if factor.is_some() && !self.eat("*") {
            return Ok(factor.unwrap_or(1).into());
        }
        self.or_back(|p| {
            let sym = Sym::from_name(p.word()?).ok_or("expected one of T, S, P, L, N, C")?;
            Ok(Extent { factor: factor.unwrap_or(1), sym: Some(sym) })
        })
    }

    fn elem(&mut self) -> Parsed<Elem> {
        let dtype = self.or_back(|p| DType::from_name(p.word()?).ok_or_else(|| "expected an element type".into()))?;
        if dtype != DType::E4m3 || !self.rest().starts_with('[') {
            return Ok(Elem::Plain(dtype));
        }
        self.expect("[")?;
        let rows = self.number()?;
        self.expect("x")?;
        let columns = self.number()?;
        let pow2 = self.eat(",");
        if pow2 {
            self.expect("pow2")?;
        }
        self.expect("]")?;
        Ok(Elem::Quant(Quant { block: [rows, columns], pow2 }))
    }
}

/// The JSON of an attribute: a number, a truth value or a word. Floats go through f32, which is what they all are.
fn scalar_json(word: &str) -> Parsed<Json> {
    if let Ok(n) = word.parse::<u64>() {
        return Ok(Json::from(n));
    }
    match word {
        "true" => return Ok(Json::Bool(true)),
        "false" => return Ok(Json::Bool(false)),
        _ => {}
    }
    if word.starts_with(|c: char| c.is_ascii_digit() || c == '-') {
        let number = word.parse::<f32>().ok().and_then(|x| Number::from_f64(f64::from(x)));
        return number.map(Json::Number).ok_or_else(|| format!("`{word}` is not a number"));
    }
    Ok(Json::String(word.into()))
}

#[cfg(test)]
mod tests {
    use super::super::verify::verify;
    use super::super::{FusedKind, RopeLayout, StepInput};
    use super::*;
    use crate::artifact::{TensorPart, WeightSource};
    use proptest::prelude::*;

    /// A small graph with a fused body, caches, all weight sources and odd names.
    fn sample() -> Graph {
        let mut g = Graph::default();
        let (t, d): (Extent, Extent) = (Sym::T.into(), 128.into());
        let ty = TensorType::plain(DType::F32, &[t, d]);
        let part = TensorPart {
            tensor: "a \"b\"\\".into(),
            scale: Some("s".into()),
            scale_block: [128, 128],
            shape: [128, 256],
            rows: [0, 128],
            cols: [128, 256],
        };
        let matrix = TensorType::quant(Quant { block: [128, 128], pow2: false }, &[d, d]);
        let table = TensorType::plain(DType::F32, &[Sym::C.into(), 4.into()]);
        let sources = [
            ("w", matrix.clone(), WeightSource::Tensors(vec![part])),
            ("rope", table.clone(), WeightSource::RopeTable { frequencies: vec![1.0, 0.1] }),
            ("h", TensorType::plain(DType::Bf16, &[d, d]), WeightSource::Hadamard { n: 128 }),
        ];
        g.weights = sources.into_iter().map(|(n, ty, source)| Weight { name: n.into(), ty, source }).collect();
        let input = |g: &mut Graph, x: StepInput| {
            g.add1(format!("{x:?}"), Op::Input(x), &[], TensorType::plain(DType::I32, &x.shape()))
        };
        let (tokens, positions) = (input(&mut g, StepInput::Tokens), input(&mut g, StepInput::Positions));
        let w = g.add1("w", Op::Weight(0), &[], matrix);
        let rope = g.add1("rope // no comment", Op::Weight(1), &[], table);
        let h = g.add1("h", Op::Weight(2), &[], g.weights[2].ty.clone());
        let x = g.add1("line\nbreak é", Op::Embed, &[tokens, h], ty.clone());
        let x = g.add1("linear", Op::Linear, &[x, w], ty.clone());
        let x = g.add1("rope", Op::Rope { layout: RopeLayout::Half, start: 3 }, &[x, positions, rope], ty.clone());

        let mut body = Graph::default();
        let a = body.add1("a", Op::Arg(0), &[], ty.clone());
        let scaled = body.add1("scale", Op::Scale { factor: 0.1 }, &[a], ty.clone());
        let q = TensorType::quant(Quant { block: [1, 128], pow2: true }, &[t, d]);
        let quant = body.add1("quant", Op::Quantize, &[scaled], q.clone());
        body.outputs = vec![("x".into(), scaled), ("q".into(), quant)];
        let outputs = vec![ValueType::Tensor(ty), ValueType::Tensor(q.clone())];
        let fused = Fused { kind: FusedKind::SparseAttention, select_all_below: 7, body };
        let node = g.add("fused", Op::Fused(Box::new(fused)), &[x], outputs);

        let format = StateFormat::IndexFp8 { dim: 128 };
        g.states.push(State { name: "index".into(), format });
        let state = Value { node: g.add("state", Op::State(0), &[], vec![ValueType::State(format)]), output: 0 };
        let slots = input(&mut g, StepInput::Slots);
        let write =
            g.add("write", Op::CacheWrite, &[state, slots, Value { node, output: 1 }], vec![ValueType::State(format)]);
        g.outputs = vec![("out".into(), Value { node, output: 0 }), ("index".into(), Value { node: write, output: 0 })];
        g
    }

    #[test]
    fn sample_round_trips() {
        let g = sample();
        assert_eq!(verify(&g), []);
        let text = g.to_string();
        let back = parse(&text).expect("what was printed");
        assert!(back == g, "{text}");
        assert_eq!(back.to_string(), text);
    }

    #[test]
    fn errors_have_places() {
        let check = |text: &str, line: usize, col: usize, part: &str| {
            let e = parse(text).expect_err(text);
            assert_eq!((e.line, e.col), (line, col), "{e}");
            assert!(e.message.contains(part), "{e}");
        };
        check("grph", 1, 1, "expected `graph`");
        check("graph {\n  %0 = linear(%1) : [T] f32 \"x\"\n}", 2, 15, "not defined");
        check("graph {\n  %0 = liner() : [T] f32 \"x\"\n}", 2, 8, "not an op");
        check("graph {\n  %0 = arg[0]() : [T] f33 \"x\"\n}", 2, 23, "element type");
        check("graph {\n  %0 = arg[99999999999]() : [T] f32 \"x\"\n}", 2, 8, "not an op");
        check("graph {", 1, 8, "expected");
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) })]
        /// Cutting and overwriting the text never panics, and what still parses can be verified and printed.
        #[test]
        fn damaged_text_is_refused_or_read(at in 0usize..4000, len in 0usize..20, with in "[ -~\n]{0,8}") {
            let text: Vec<char> = sample().to_string().chars().collect();
            let at = at % text.len();
            let end = (at + len).min(text.len());
            let damaged: String = text[..at].iter().copied().chain(with.chars()).chain(text[end..].iter().copied()).collect();
            if let Ok(g) = parse(&damaged) {
                let sound = verify(&g).is_empty();
                let again = parse(&g.to_string());
                prop_assert!(!sound || again.is_ok_and(|h| h == g));
            }
        }
    }
}
