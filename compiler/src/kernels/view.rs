//! From graph values to kernel parameters.
//!
//! A value is read through the tensor that holds it. [`resolve`] walks `slice_last` and `reshape` nodes up to that root and
//! applies them to the root's dense view: a slice moves the offset, a reshape merges and splits dims whose strides allow it
//! (the dims of each matching group must follow each other in memory). Scales of quantised tensors follow their elements.
//! Inside a fused body the walk goes on through the body's arguments into the graph around it.
//!
//! [`Emit`] is a [`Builder`] that knows the node it writes a kernel for, keeps one [`ArgRef`] a parameter, and gives the same
//! parameter for the same window on the same array.

use super::{ArgRef, Emitted, KernelError, Part};
use dsc_ir::DType;
use dsc_ir::extent::Extent;
use dsc_ir::graph::{Elem, Graph, NodeId, Op, Quant, StateFormat, TensorType, Value, ValueType};
use dsc_ir::tile::verify::verify;
use dsc_ir::tile::{Access, Builder, Ix, Stride, ValueId, ViewType};

/// The tensor that holds a value's elements (codes, if quantised), and the window on it that is the value.
pub fn resolve(graph: &Graph, value: Value) -> Result<(Value, ViewType), KernelError> {
    resolve_part(graph, value, Part::Data)
}

/// Like [`resolve`], for either array of a value.
pub fn resolve_part(graph: &Graph, value: Value, part: Part) -> Result<(Value, ViewType), KernelError> {
    let (root, steps) = chase(graph, value);
    let view = apply(graph.tensor(root), &steps, part);
    view.map(|v| (root, v)).map_err(|what| KernelError::Alias { node: graph.dag[value.node].name.clone(), what })
}

/// The [`Op::State`] (or body argument) that a state value is a later version of.
pub fn state_root(graph: &Graph, value: Value) -> Value {
    let node = &graph.dag[value.node];
    match &node.op {
        Op::CacheWrite => state_root(graph, graph.inputs(value.node)[0]),
        Op::Fused(fused) => {
            let inner = state_root(&fused.body, fused.body.outputs[value.output as usize].1);
            match fused.body.dag[inner.node].op {
                Op::Arg(n) => state_root(graph, graph.inputs(value.node)[n as usize]),
                _ => value,
            }
        }
        _ => value,
    }
}

enum Step {
    Slice(u32, u32),
    Reshape(Vec<Extent>),
}

/// Walks aliases up to their root; the steps lead back down.
fn chase(graph: &Graph, mut value: Value) -> (Value, Vec<Step>) {
    let mut steps = Vec::new();
    loop {
        match &graph.dag[value.node].op {
            Op::SliceLast { start, len } => steps.push(Step::Slice(*start, *len)),
            Op::Reshape => steps.push(Step::Reshape(graph.tensor(value).shape.clone())),
            // Made in place.
            Op::AllReduce { .. } => {}
            _ => break,
        }
        value = graph.inputs(value.node)[0];
    }
    steps.reverse();
    (value, steps)
}

/// The window on one array of a tensor after those steps.
fn apply(root: &TensorType, steps: &[Step], part: Part) -> Result<ViewType, String> {
    let block = match (root.elem, part) {
        (Elem::Quant(q), Part::Scales) => q.block,
        (_, Part::Data) => [1, 1],
        (Elem::Plain(_), Part::Scales) => return Err("the scales of a plain tensor".into()),
    };
    let mut view = match part {
        Part::Data => ViewType::dense(storage(root.elem), &root.shape),
        Part::Scales => {
            let shape = root.scale_shape().ok_or("a symbolic dim in blocks")?;
            ViewType::dense(DType::F32, &shape)
        }
    };
    let mut columns = root.shape.last().and_then(|e| e.constant());
    for step in steps {
        match step {
            Step::Slice(start, len) => {
                if start % block[1] != 0 {
                    return Err(format!("a slice from column {start} through blocks of {}", block[1]));
                }
                view = slice_last(&view, start / block[1], len.div_ceil(block[1]));
                columns = Some(*len);
            }
            Step::Reshape(shape) => {
                let last = shape.last().and_then(|e| e.constant());
                let whole = |n: Option<u32>| n.is_some_and(|n| n.is_multiple_of(block[1]));
                let fits = last == columns || (whole(last) && whole(columns));
                let mut shape = shape.clone();
                if let (Some(n), Some(end)) = (last, shape.last_mut()) {
                    *end = n.div_ceil(block[1]).into();
                }
                let reshaped = reshape_view(&view, &shape).filter(|_| block[0] == 1 && fits);
                view = reshaped.ok_or_else(|| format!("a reshape from {:?} to {shape:?}", view.shape))?;
                columns = last;
            }
        }
    }
    Ok(view)
}

/// How elements of that kind lie in memory.
pub(crate) fn storage(elem: Elem) -> DType {
    match elem {
        Elem::Plain(d) => d,
        Elem::Quant(_) => DType::E4m3,
    }
}

/// Columns `start..start + len` of the last dim.
fn slice_last(view: &ViewType, start: u32, len: u32) -> ViewType {
    let mut view = view.clone();
    if let (Some(n), Some(stride)) = (view.shape.last_mut(), view.strides.last()) {
        *n = len.into();
        view.offset += u64::from(start) * stride.bytes.unsigned_abs();
    }
    view
}

/// A product of extents: the constant, and how often each symbol occurs.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Product(u64, [u8; 6]);

impl Product {
    fn of(e: Extent) -> Product {
        Product(1, [0; 6]).times(e)
    }

    fn times(mut self, e: Extent) -> Product {
        self.0 *= u64::from(e.factor);
        if let Some(sym) = e.sym {
            self.1[sym as usize] += 1;
        }
        self
    }

    fn smaller(&self, other: &Product) -> bool {
        let symbols = |p: &Product| p.1.iter().map(|&n| u32::from(n)).sum::<u32>();
        (symbols(self), self.0) < (symbols(other), other.0)
    }
}

fn stride_times(stride: Stride, e: Extent) -> Option<Stride> {
    let sym = match (stride.sym, e.sym) {
        (Some(_), Some(_)) => return None,
        (a, b) => a.or(b),
    };
    Some(Stride { bytes: stride.bytes * i64::from(e.factor), sym })
}

/// The same elements in row-major order under another shape, if strides can say so.
pub(crate) fn reshape_view(view: &ViewType, shape: &[Extent]) -> Option<ViewType> {
    let one = Extent::from(1);
    let old: Vec<(Extent, Stride)> =
        view.shape.iter().copied().zip(view.strides.iter().copied()).filter(|d| d.0 != one).collect();
    let new: Vec<usize> = (0..shape.len()).filter(|&d| shape[d] != one).collect();
    let mut strides = vec![Stride { bytes: view.dtype.bytes() as i64, sym: None }; shape.len()];
    let (mut i, mut j) = (0, 0);
    while i < old.len() && j < new.len() {
        let (first, to) = (i, j);
        let (mut a, mut b) = (Product::of(old[i].0), Product::of(shape[new[j]]));
        (i, j) = (i + 1, j + 1);
        while a != b {
            if a.smaller(&b) {
                a = a.times(old.get(i)?.0);
                i += 1;
            } else {
                b = b.times(shape[*new.get(j)?]);
                j += 1;
            }
        }
        if (first..i - 1).any(|d| Some(old[d].1) != stride_times(old[d + 1].1, old[d + 1].0)) {
            return None;
        }
        let mut stride = old[i - 1].1;
        for d in (to..j).rev() {
            strides[new[d]] = stride;
            if d > to {
                stride = stride_times(stride, shape[new[d]])?;
            }
        }
    }
    (i == old.len() && j == new.len()).then(|| ViewType { shape: shape.to_vec(), strides, ..view.clone() })
}

/// Writes one kernel.
pub(crate) struct Emit<'g> {
    /// The program under construction.
    pub b: Builder,
    graph: &'g Graph,
    node: NodeId,
    body: Option<&'g Graph>,
    inputs: Vec<Value>,
    params: Vec<(ArgRef, ViewType, Access, ValueId)>,
    names: Vec<String>,
    name: String,
}

impl<'g> Emit<'g> {
    /// A kernel for a node. Values are those of `body`, if given, else of `graph`.
    pub fn new(graph: &'g Graph, node: NodeId, body: Option<&'g Graph>, name: &str) -> Emit<'g> {
        Emit {
            b: Builder::new(name),
            graph,
            node,
            body,
            inputs: graph.inputs(node),
            params: Vec::new(),
            names: Vec::new(),
            name: name.to_owned(),
        }
    }

    /// The program, its name completed by its hash.
    pub fn finish(self, what: impl Into<String>) -> Result<Emitted, KernelError> {
        let node = self.graph.dag[self.node].name.clone();
        let mut program = self.b.finish().map_err(|message| KernelError::Build { node: node.clone(), message })?;
        let hash = blake3::hash(format!("{program:?}").as_bytes()).to_hex();
        program.name = format!("{}_{}", self.name, &hash.as_str()[..8]);
        let wrong: Vec<String> = verify(&program).iter().map(|d| d.to_string()).collect();
        if !wrong.is_empty() {
            return Err(KernelError::Build { node, message: wrong.join("; ") });
        }
        let args = self.params.iter().map(|p| p.0).collect();
        Ok(Emitted { program, args, what: what.into() })
    }

    /// An error about this node.
    pub fn unsupported(&self, what: impl Into<String>) -> KernelError {
        super::unsupported(self.graph, self.node, what)
    }

    fn scope(&self) -> &'g Graph {
        self.body.unwrap_or(self.graph)
    }

    /// The type of a tensor value.
    pub fn tensor(&self, value: Value) -> &'g TensorType {
        self.scope().tensor(value)
    }

    /// How a value is quantised, if it is.
    pub fn quant(&self, value: Value) -> Option<Quant> {
        match self.tensor(value).elem {
            Elem::Quant(q) => Some(q),
            Elem::Plain(_) => None,
        }
    }

    /// A dim of a tensor value that must be constant.
    pub fn dim(&self, value: Value, d: usize) -> Result<u32, KernelError> {
        let shape = &self.tensor(value).shape;
        let size = shape.get(d).and_then(|e| e.constant());
        size.ok_or_else(|| self.unsupported(format!("dim {d} of {shape:?} is not constant")))
    }

    /// Whether a value of the body is an alias of one of its arguments.
    pub fn is_argument(&self, value: Value) -> bool {
        let (root, _) = chase(self.scope(), value);
        self.body.is_none() || matches!(self.scope().dag[root.node].op, Op::Arg(_))
    }

    /// The array that holds one part of a value, and the window on it.
    pub fn view(&self, value: Value, part: Part) -> Result<(ArgRef, ViewType), KernelError> {
        let (mut root, mut steps) = chase(self.scope(), value);
        if self.body.is_some() {
            let Op::Arg(n) = self.scope().dag[root.node].op else {
                return Err(self.unsupported("the operand is made in the body, not read from memory"));
            };
            let (outer, mut before) = chase(self.graph, self.inputs[n as usize]);
            before.append(&mut steps);
            (root, steps) = (outer, before);
        }
        let node = || self.graph.dag[self.node].name.clone();
        let view = apply(self.graph.tensor(root), &steps, part);
        view.map(|v| (ArgRef { value: root, part }, v)).map_err(|what| KernelError::Alias { node: node(), what })
    }

    /// The parameter of that window; declared on first use.
    pub fn param(&mut self, name: &str, arg: ArgRef, view: ViewType, access: Access) -> ValueId {
        let is_weight = matches!(self.graph.dag[arg.value.node].op, Op::Weight(_));
        let access = if is_weight && access == Access::Read { Access::Constant } else { access };
        let known = self.params.iter().find(|p| p.0 == arg && p.1 == view && p.2 == access);
        if let Some(p) = known {
            return p.3;
        }
        let mut unique = name.to_owned();
        while self.names.contains(&unique) {
            unique = format!("{name}_{}", self.names.len());
        }
        let value = self.b.param_view(&unique, view.clone(), access);
        self.names.push(unique);
        self.params.push((arg, view, access, value));
        value
    }

    /// A parameter to read a value's elements or codes.
    pub fn read(&mut self, name: &str, value: Value) -> Result<ValueId, KernelError> {
        let (arg, view) = self.view(value, Part::Data)?;
        Ok(self.param(name, arg, view, Access::Read))
    }

    /// A parameter to read a value's scales.
    pub fn read_scales(&mut self, name: &str, value: Value) -> Result<ValueId, KernelError> {
        let (arg, view) = self.view(value, Part::Scales)?;
        Ok(self.param(name, arg, view, Access::Read))
    }

    /// A parameter to read one part of a value under another shape.
    pub fn read_as(&mut self, name: &str, value: Value, part: Part, shape: &[Extent]) -> Result<ValueId, KernelError> {
        let (arg, view) = self.view(value, part)?;
        let reshaped = reshape_view(&view, shape).ok_or_else(|| KernelError::Alias {
            node: self.graph.dag[self.node].name.clone(),
            what: format!("{:?} as {shape:?}", view.shape),
        })?;
        Ok(self.param(name, arg, reshaped, Access::Read))
    }

    /// A parameter to write one part of an output of the node, under its own or another shape.
    pub fn write(
        &mut self,
        name: &str,
        output: u32,
        part: Part,
        shape: Option<&[Extent]>,
    ) -> Result<ValueId, KernelError> {
        let value = Value { node: self.node, output };
        let ty = self.graph.tensor(value);
        let wrong = || self.unsupported(format!("output {output} of type {ty:?} cannot be written as {shape:?}"));
        let mut view = apply(ty, &[], part).map_err(|_| wrong())?;
        if let Some(shape) = shape {
            view = reshape_view(&view, shape).ok_or_else(wrong)?;
        }
        Ok(self.param(name, ArgRef { value, part }, view, Access::Write))
    }

    /// The format of a cache and a maker of parameters on it.
    pub fn state(&self, value: Value) -> Result<(ArgRef, StateFormat), KernelError> {
        let mut root = state_root(self.scope(), value);
        if self.body.is_some() {
            let Op::Arg(n) = self.scope().dag[root.node].op else {
                return Err(self.unsupported("the cache is not an argument of the fused body"));
            };
            root = self.inputs[n as usize];
        }
        let root = state_root(self.graph, root);
        match self.graph.ty(root) {
            ValueType::State(format) => Ok((ArgRef { value: root, part: Part::Data }, *format)),
            ValueType::Tensor(_) => Err(self.unsupported("a tensor where a cache is wanted")),
        }
    }

    /// The page table as `[P, S]`, so that pages can be gathered by number.
    pub fn page_table(&mut self, value: Value) -> Result<ValueId, KernelError> {
        let (arg, mut view) = self.view(value, Part::Data)?;
        view.shape.reverse();
        view.strides.reverse();
        Ok(self.param("page_table", arg, view, Access::Read))
    }
}

/// `v * factor` of an i32 scalar or tile.
pub(crate) fn times(b: &mut Builder, v: ValueId, factor: u32) -> ValueId {
    if factor == 1 {
        return v;
    }
    b.map(&[v], |m, v| {
        let factor = m.i32(factor as i32);
        m.mul(v[0], factor)
    })
}

/// `v / divisor` of an i32 scalar or tile, towards zero.
pub(crate) fn divided(b: &mut Builder, v: ValueId, divisor: u32) -> ValueId {
    if divisor == 1 {
        return v;
    }
    b.map(&[v], |m, v| {
        let divisor = m.i32(divisor as i32);
        m.div(v[0], divisor)
    })
}

/// `v % divisor` of an i32 scalar or tile that is not negative.
pub(crate) fn remainder(b: &mut Builder, v: ValueId, divisor: u32) -> ValueId {
    b.map(&[v], |m, v| {
        let divisor = m.i32(divisor as i32);
        m.rem(v[0], divisor)
    })
}

/// `v + offset` of an i32 scalar or tile.
pub(crate) fn plus(b: &mut Builder, v: ValueId, offset: i32) -> ValueId {
    if offset == 0 {
        return v;
    }
    b.map(&[v], |m, v| {
        let offset = m.i32(offset);
        m.add(v[0], offset)
    })
}

/// `u + v`, i32 or f32.
pub(crate) fn sum(b: &mut Builder, u: ValueId, v: ValueId) -> ValueId {
    b.map(&[u, v], |m, v| m.add(v[0], v[1]))
}

/// `u * v`, i32 or f32.
pub(crate) fn product(b: &mut Builder, u: ValueId, v: ValueId) -> ValueId {
    b.map(&[u, v], |m, v| m.mul(v[0], v[1]))
}

/// `base + i` along the first axis of a rank-1 tile.
pub(crate) fn range(b: &mut Builder, base: ValueId, n: u32) -> ValueId {
    let iota = b.iota(0, &[n]);
    sum(b, iota, base)
}

/// Turns `v < bound` into -1 elsewhere: `value` where `at < bound`.
pub(crate) fn where_below(b: &mut Builder, value: ValueId, at: ValueId, bound: ValueId) -> ValueId {
    b.map(&[value, at, bound], |m, v| {
        let inside = m.lt(v[1], v[2]);
        let none = m.i32(-1);
        m.select(inside, v[0], none)
    })
}

/// The product of dims of which at most one is symbolic.
pub(crate) fn merged(dims: &[Extent]) -> Option<Extent> {
    dims.iter().try_fold(Extent::from(1), |p, e| match (p.sym, e.sym) {
        (Some(_), Some(_)) => None,
        (a, b) => Some(Extent { factor: p.factor * e.factor, sym: a.or(b) }),
    })
}

/// Zero indices.
pub(crate) fn zeros(n: usize) -> Vec<Ix> {
    vec![0.into(); n]
}

/// The number of rows a symbolic dim counts, as a scalar.
pub(crate) fn extent(b: &mut Builder, e: Extent) -> ValueId {
    match e.sym {
        Some(sym) => {
            let n = b.sym(sym);
            times(b, n, e.factor)
        }
        None => b.full_i32(e.factor as i32, &[]),
    }
}
