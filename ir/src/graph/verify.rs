//! The verifier of graphs: every rule of the IR that the Rust types do not hold.
//!
//! All breaches are collected, each with the name of the node where it was found. A graph without diagnostics satisfies:
//!
//! * it is acyclic; the inputs of each node are numbered `0..n`, each fed by one edge from an output that exists;
//! * every op has the number of outputs, the shapes and the element types that [`super::infer`] allows;
//! * weights and states are in range and of their declared types; their names are unique, and so are those of outputs;
//! * quantised types have blocks of at least 1 and a shape of their scales; dims of weights are constant but for the rows of
//!   rope tables; dims are at most [`MAX_DIM`];
//! * a cache that is written is used by nothing else in its old state, so that writing in place is legal;
//! * [`Op::Arg`] has the type of that input of the fused node in bodies, and of that argument in graphs that declare some; bodies
//!   and graphs with arguments have no step inputs, weights or caches of their own; their outputs are the node's; they nest at most [`MAX_DEPTH`] deep.
//!
//! **Cost.** Linear in nodes and edges.

use super::infer::{Rule, infer};
use super::{Elem, Fused, Graph, Node, NodeId, Op, StateFormat, TensorType, Value, ValueType};
use crate::artifact::WeightSource;
use petgraph::Direction;
use petgraph::visit::EdgeRef;
use std::collections::HashSet;
use std::fmt;

/// Deepest nesting of fused bodies.
pub const MAX_DEPTH: usize = 8;
/// Largest constant factor of a dim.
pub const MAX_DIM: u32 = 1 << 28;

/// One thing that is wrong with a graph.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostic {
    /// Name of the node, with the names of the fused nodes around it before it; or `weight NAME`, `state NAME`, `output NAME`.
    pub node: String,
    /// What.
    pub message: String,
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.node, self.message)
    }
}

/// Everything that is wrong with a graph.
pub fn verify(graph: &Graph) -> Vec<Diagnostic> {
    let declared: Vec<ValueType> = graph.args.iter().map(|a| a.ty.clone()).collect();
    let args = (!declared.is_empty()).then_some(declared.as_slice());
    let mut v = Verifier { graph, args, within: String::new(), depth: 0, diagnostics: Vec::new() };
    v.run();
    v.diagnostics
}

struct Verifier<'a> {
    graph: &'a Graph,
    /// Input types of the fused node whose body this is, or of the graph's arguments.
    args: Option<&'a [ValueType]>,
    /// Names of the fused nodes around, each followed by a slash.
    within: String,
    depth: usize,
    diagnostics: Vec<Diagnostic>,
}

impl Verifier<'_> {
    fn report(&mut self, place: &str, message: impl Into<String>) {
        self.diagnostics.push(Diagnostic { node: format!("{}{place}", self.within), message: message.into() });
    }

    fn run(&mut self) {
        self.tables();
        let graph = self.graph;
        let ordered: HashSet<NodeId> = graph.order().into_iter().collect();
        for id in graph.dag.node_indices() {
            if !ordered.contains(&id) {
                self.report(&graph.dag[id].name, "is on a cycle, or fed by one");
            }
            for ty in &graph.dag[id].outputs {
                if let Err(e) = check_type(ty, false) {
                    self.report(&graph.dag[id].name, e);
                }
            }
            if let Some(inputs) = self.edges(id) {
                self.node(id, &inputs);
            }
            self.writes(id);
        }
        self.outputs();
    }

    /// Names and types of weights and states.
    fn tables(&mut self) {
        let graph = self.graph;
        let mut names = HashSet::new();
        for w in &graph.weights {
            let place = format!("weight {}", w.name);
            if !names.insert(&w.name) {
                self.report(&place, "the name is not unique");
            }
            let rows_vary = matches!(w.source, WeightSource::RopeTable { .. });
            if w.ty.shape.iter().skip(usize::from(rows_vary)).any(|e| e.sym.is_some()) {
                self.report(&place, format!("its shape {:?} is not constant", w.ty.shape));
            }
            if let Err(e) = check_type(&ValueType::Tensor(w.ty.clone()), true) {
                self.report(&place, e);
            }
        }
        let mut names = HashSet::new();
        for s in &graph.states {
            let place = format!("state {}", s.name);
            if !names.insert(&s.name) {
                self.report(&place, "the name is not unique");
            }
            if let Err(e) = check_type(&ValueType::State(s.format), true) {
                self.report(&place, e);
            }
        }
        if self.args.is_some() && !(graph.weights.is_empty() && graph.states.is_empty()) {
            self.report("body", "a graph with arguments has weights or states of its own");
        }
        let mut names = HashSet::new();
        for a in &graph.args {
            let place = format!("argument {}", a.name);
            if !names.insert(&a.name) {
                self.report(&place, "the name is not unique");
            }
            if self.depth > 0 {
                self.report(&place, "a fused body declares none: they are its node's inputs");
            }
            if let Err(e) = check_type(&a.ty, true) {
                self.report(&place, e);
            }
        }
    }

    /// The values that feed a node, if its edges are sound.
    fn edges(&mut self, id: NodeId) -> Option<Vec<Value>> {
        let graph = self.graph;
        let name = &graph.dag[id].name;
        let before = self.diagnostics.len();
        let mut numbers: Vec<u32> = Vec::new();
        for e in graph.dag.edges_directed(id, Direction::Incoming) {
            numbers.push(e.weight().input);
            let source = &graph.dag[e.source()];
            if e.weight().output as usize >= source.outputs.len() {
                self.report(
                    name,
                    format!(
                        "input {} is output {} of `{}`, which has {}",
                        e.weight().input,
                        e.weight().output,
                        source.name,
                        source.outputs.len()
                    ),
                );
            }
        }
        numbers.sort_unstable();
        if !numbers.iter().copied().eq(0..numbers.len() as u32) {
            self.report(name, format!("its inputs are numbered {numbers:?}"));
        }
        (self.diagnostics.len() == before).then(|| graph.inputs(id))
    }

    fn node(&mut self, id: NodeId, inputs: &[Value]) {
        let graph = self.graph;
        let node = &graph.dag[id];
        let types: Vec<ValueType> = inputs.iter().map(|&v| graph.ty(v).clone()).collect();
        let fixed = match &node.op {
            Op::Weight(i) => graph
                .weights
                .get(*i as usize)
                .map(|w| ValueType::Tensor(w.ty.clone()))
                .ok_or(format!("there is no weight {i}")),
            Op::State(i) => graph
                .states
                .get(*i as usize)
                .map(|s| ValueType::State(s.format))
                .ok_or(format!("there is no state {i}")),
            Op::Arg(i) => match self.args {
                Some(args) => args.get(*i as usize).cloned().ok_or(format!("there is no argument {i}")),
                None => Err("an argument outside of a fused body".into()),
            },
            Op::Fused(fused) => return self.fused(node, fused, &types),
            op => return self.results(node, infer(op, &types, &node.outputs)),
        };
        if !inputs.is_empty() {
            self.report(&node.name, format!("has {} inputs, takes none", inputs.len()));
        }
        if self.args.is_some() && !matches!(node.op, Op::Arg(_)) {
            self.report(&node.name, "a fused body takes weights and states as arguments");
        }
        match fixed {
            Ok(ty) if node.outputs == [ty.clone()] => {}
            Ok(ty) => self.report(&node.name, format!("its outputs are {:?}, must be {ty:?}", node.outputs)),
            Err(e) => self.report(&node.name, e),
        }
    }

    fn results(&mut self, node: &Node, rules: Result<Vec<Rule>, String>) {
        if self.args.is_some() && matches!(node.op, Op::Input(_)) {
            self.report(&node.name, "a fused body takes step inputs as arguments");
        }
        let rules = match rules {
            Ok(rules) => rules,
            Err(e) => return self.report(&node.name, e),
        };
        if rules.len() != node.outputs.len() {
            self.report(&node.name, format!("has {} outputs, makes {}", node.outputs.len(), rules.len()));
        }
        for (rule, ty) in rules.iter().zip(&node.outputs) {
            let fits = match (rule, ty) {
                (Rule::Tensor(shape, elems), ValueType::Tensor(t)) => t.shape == *shape && elems.allow(t.elem),
                (Rule::State(format), ValueType::State(f)) => format == f,
                _ => false,
            };
            if !fits {
                self.report(&node.name, format!("its output is {ty:?}, must be {rule:?}"));
            }
        }
    }

    fn fused(&mut self, node: &Node, fused: &Fused, types: &[ValueType]) {
        if self.depth + 1 >= MAX_DEPTH {
            return self.report(&node.name, format!("fused bodies nest deeper than {MAX_DEPTH}"));
        }
        let mut body = Verifier {
            graph: &fused.body,
            args: Some(types),
            within: format!("{}{}/", self.within, node.name),
            depth: self.depth + 1,
            diagnostics: Vec::new(),
        };
        body.run();
        let sound = body.diagnostics.is_empty();
        self.diagnostics.append(&mut body.diagnostics);
        if sound {
            let made: Vec<&ValueType> = fused.body.outputs.iter().map(|(_, v)| fused.body.ty(*v)).collect();
            if !made.iter().copied().eq(&node.outputs) {
                self.report(&node.name, format!("its outputs are {:?}, its body makes {made:?}", node.outputs));
            }
        }
    }

    /// A cache that is overwritten must have no other reader.
    fn writes(&mut self, id: NodeId) {
        let graph = self.graph;
        for (output, ty) in graph.dag[id].outputs.iter().enumerate() {
            if !matches!(ty, ValueType::State(_)) {
                continue;
            }
            let value = Value { node: id, output: output as u32 };
            let users = graph.users(value);
            let written =
                users.iter().any(|(user, input)| *input == 0 && matches!(graph.dag[*user].op, Op::CacheWrite));
            if written && (users.len() > 1 || graph.is_output(value)) {
                self.report(&graph.dag[id].name, "is overwritten and has other uses");
            }
        }
    }

    fn outputs(&mut self) {
        let graph = self.graph;
        let mut names = HashSet::new();
        for (name, value) in &graph.outputs {
            let place = format!("output {name}");
            if !names.insert(name) {
                self.report(&place, "the name is not unique");
            }
            let exists = graph.dag.node_weight(value.node).is_some_and(|n| (value.output as usize) < n.outputs.len());
            if !exists {
                self.report(&place, "names a value that does not exist");
            }
        }
    }
}

/// Rules of a type by itself; `stored` ones have no empty dims.
fn check_type(ty: &ValueType, stored: bool) -> Result<(), String> {
    match ty {
        ValueType::Tensor(t) => check_tensor(t, stored),
        ValueType::State(format) => {
            let (a, b) = match *format {
                StateFormat::LatentFp8 { latent, rope } | StateFormat::Latent { latent, rope, .. } => (latent, rope),
                StateFormat::IndexFp8 { dim } | StateFormat::Index { dim, .. } => (dim, 1),
            };
            let float = match *format {
                StateFormat::Latent { dtype, .. } | StateFormat::Index { dtype, .. } => {
                    super::infer::Elems::Float.allow(Elem::Plain(dtype))
                }
                _ => true,
            };
            if a == 0 || b == 0 || a > 1 << 20 || b > 1 << 20 || !float {
                return Err(format!("{format:?} is not a cache format"));
            }
            Ok(())
        }
    }
}

fn check_tensor(t: &TensorType, stored: bool) -> Result<(), String> {
    if t.shape.iter().any(|e| e.factor > MAX_DIM || (e.factor == 0 && stored)) {
        return Err(format!("a dim of {:?} is out of range", t.shape));
    }
    match t.elem {
        Elem::Plain(crate::DType::Bool) => Err("truth values are not stored".into()),
        Elem::Quant(q) if q.block.contains(&0) => Err(format!("scale blocks of {}x{}", q.block[0], q.block[1])),
        Elem::Quant(q) if t.shape.len() < 2 || t.scale_shape().is_none() => {
            Err(format!("{:?} cannot have scale blocks of {}x{}", t.shape, q.block[0], q.block[1]))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::text::parse;
    use super::*;

    /// The diagnostics of a graph in text form, one a line.
    fn check(body: &str, wanted: &[&str]) {
        let graph = parse(&format!("graph {{\n{body}\n}}")).expect("a graph");
        let got: Vec<String> = verify(&graph).iter().map(Diagnostic::to_string).collect();
        assert_eq!(got.len(), wanted.len(), "{got:#?}");
        for (g, w) in got.iter().zip(wanted) {
            assert!(g.contains(w), "{g}\nlacks {w}");
        }
    }

    const X: &str = "%0 = input[tokens]() : [T] i32 \"t\"\n";

    #[test]
    fn types() {
        check(X, &[]);
        check("%0 = input[tokens]() : [S] i32 \"t\"", &["t: its output"]);
        check("%0 = weight[0]() : [2, 2] f32 \"w\"", &["there is no weight 0"]);
        check("%0 = state[0]() : index_fp8[dim=4] \"s\"", &["there is no state 0"]);
        check("%0 = arg[0]() : [T] f32 \"a\"", &["outside of a fused body"]);
        check(&format!("{X}%1 = sigmoid(%0) : [T] f32 \"s\""), &["wants plain floats"]);
        check(
            &format!("{X}%1 = sigmoid(%0, %0) : [T] f32 \"s\"\n%2 = cast() : [T] f32 \"c\""),
            &["has 2 inputs", "has 0 inputs"],
        );
    }

    #[test]
    fn tables() {
        let weight = "\"w\" : [2, T] f32 = {\"hadamard\":{\"n\":2}}";
        check(&format!("weight 0 {weight}\nweight 1 {weight}"), &["not constant", "not unique", "not constant"]);
        check("weight 0 \"w\" : [2, 2] e4m3[0x1] = {\"hadamard\":{\"n\":2}}", &["scale blocks of 0x1"]);
        check(
            "state 0 \"s\" : index[dim=4, dtype=i32]\nstate 1 \"s\" : index_fp8[dim=4]",
            &["not a cache format", "not unique"],
        );
        check(&format!("{X}output \"a\" = %0\noutput \"a\" = %0"), &["not unique"]);
    }

    #[test]
    fn bodies() {
        let fused = |out: &str, arg: &str| {
            format!(
                "{X}%1 = fused[kind=row, select_all_below=0](%0) : [T] {out} \"f\" {{\n%0 = arg[0]() : [T] {arg} \"a\"\noutput \"x\" = %0\n}}"
            )
        };
        check(&fused("i32", "i32"), &[]);
        check(&fused("f32", "i32"), &["f: its outputs"]);
        check(&fused("i32", "f32"), &["f/a: its outputs"]);
    }

    #[test]
    fn arguments() {
        let declared = "arg 0 \"x\" : [T] f32\narg 1 \"s\" : index[dim=4, dtype=f32]\n";
        let used = "%0 = arg[0]() : [T] f32 \"x\"\n%1 = arg[1]() : index[dim=4, dtype=f32] \"s\"\n";
        check(&format!("{declared}{used}"), &[]);
        check(&format!("{declared}%0 = arg[0]() : [T] bf16 \"x\""), &["x: its outputs"]);
        check(&format!("{declared}%0 = arg[2]() : [T] f32 \"x\""), &["there is no argument 2"]);
        check(&format!("{declared}{X}"), &["takes step inputs as arguments"]);
        check("arg 0 \"x\" : [T] f32\narg 1 \"x\" : [T] f32", &["argument x: the name is not unique"]);
        let graph = parse(&format!("graph {{\n{declared}{used}}}")).expect("a graph");
        assert_eq!(parse(&graph.to_string()).expect("a graph"), graph);
    }

    #[test]
    fn a_written_cache_has_no_other_use() {
        let state = "state 0 \"s\" : index[dim=4, dtype=f32]\n%0 = state[0]() : index[dim=4, dtype=f32] \"s\"\n%1 = input[slots]() : [T] i32 \"i\"\n%2 = arg[0]() : [T, 4] f32 \"k\"\n%3 = cache_write(%0, %1, %2) : index[dim=4, dtype=f32] \"w\"\n";
        check(&format!("{state}output \"s\" = %3"), &["outside of a fused body"]);
        check(&format!("{state}output \"s\" = %0"), &["s: is overwritten", "outside of a fused body"]);
    }

    #[test]
    fn edges() {
        let mut g = parse(&format!("graph {{\n{X}%1 = take_rows(%0, %0) : [T] i32 \"r\"\n}}")).expect("a graph");
        let (a, b) = (NodeId::new(0), NodeId::new(1));
        g.dag.add_edge(b, a, super::super::Edge { output: 3, input: 5 });
        let messages: Vec<String> = verify(&g).iter().map(Diagnostic::to_string).collect();
        assert_eq!(messages.len(), 4, "{messages:#?}");
    }
}
