//! From optimised graphs to an executable plan: which kernels run, in what order, on which memory.
//!
//! One step graph a shape class comes in (see [`crate::passes::Class`]); out come
//!
//! * one table of unique kernels: layers and classes that need the same tile program share it;
//! * one table of weights and one of caches for all classes;
//! * for each class a list of launches with every argument bound to an offset ([`memory`] gives each intermediate its place
//!   in one arena).

pub mod entry;
pub mod memory;
mod pieces;
#[cfg(test)]
pub(crate) mod wide;

use crate::kernels::{self, ArgRef, Emitted, Part};
use crate::passes::Class;
use dsc_ir::artifact::{Arg, Collective, Entry, Launch, Step, Tap, WeightEntry};
use dsc_ir::graph::{Elem, Graph, NodeId, Op, State, TensorType, Value, ValueType};
use dsc_ir::schedule::Schedule;
use dsc_ir::tile::Program;
use dsc_ir::work::Work;
use dsc_ir::{Sym, SymValues};
use dsc_targets::Kernel;
use std::collections::HashMap;

/// Distance in bytes between the codes and the scales of a quantised tensor is a multiple of this, and so is every offset.
pub const ALIGN: u64 = 256;

/// A kernel that some launch needs.
#[derive(Clone, Debug)]
pub struct PlannedKernel {
    /// The tile program, under its unique name.
    pub program: Program,
    /// How the target runs it.
    pub schedule: Schedule,
    /// What it computes, for people.
    pub what: String,
    /// What it has to compute and to move.
    pub work: Work,
}

/// Everything of an artifact but machine code.
#[derive(Debug, Default)]
pub struct Plan {
    /// Unique kernels.
    pub kernels: Vec<PlannedKernel>,
    /// Weights of all classes.
    pub weights: Vec<WeightEntry>,
    /// Caches.
    pub states: Vec<State>,
    /// One step a class, in the order the runtime should try them.
    pub steps: Vec<Step>,
    /// Entry points of a kernel library.
    pub entries: Vec<Entry>,
}

/// Why a plan could not be made. All are faults of the compiler or of a target's limits, not of the model.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// A node has no kernel.
    #[error("no kernel for `{node}` in class {class}: {source}")]
    Kernel {
        /// The node's name.
        node: String,
        /// The shape class.
        class: String,
        /// Why.
        source: kernels::KernelError,
    },
    /// A tile program breaks the rules of the IR.
    #[error("kernel {kernel} is not valid: {message}")]
    Invalid {
        /// The kernel.
        kernel: String,
        /// The verifier's messages.
        message: String,
    },
    /// A value is bound that has no memory.
    #[error("class {class}: `{node}` has no memory to bind")]
    Unbound {
        /// The shape class.
        class: String,
        /// The node that makes the value.
        node: String,
    },
}

/// How kernels are scheduled; a target's business.
pub struct Scheduler<'a> {
    /// The schedule of a kernel, from its shape.
    pub choose: &'a dyn Fn(&kernels::KernelShape, &Class) -> Schedule,
    /// Whether the target has room for a program at that schedule; if not, its tiles shrink.
    pub fits: &'a dyn Fn(&Kernel) -> bool,
}

/// Plans every class. `graphs` are in the order the runtime should try them.
pub fn plan(graphs: &[(Class, Graph)], scheduler: &Scheduler) -> Result<Plan, PlanError> {
    let mut plan = Plan::default();
    let mut interned = Interned::default();
    for (class, graph) in graphs {
        let step = plan_class(&mut plan, &mut interned, class, graph, scheduler)?;
        plan.steps.push(step);
    }
    Ok(plan)
}

/// Finds equal kernels and weights again.
#[derive(Default)]
struct Interned {
    kernels: HashMap<(String, Schedule), u32>,
    kernel_names: HashMap<String, u32>,
    weights: HashMap<String, u32>,
}

fn plan_class(
    plan: &mut Plan,
    interned: &mut Interned,
    class: &Class,
    graph: &Graph,
    scheduler: &Scheduler,
) -> Result<Step, PlanError> {
    let (mut launches, sampling) = launch_order(graph);
    let looped = pieces::find(graph, class, &mut launches);
    let memory = memory::place(graph, &launches, &class.max, &looped);
    let weights: Vec<u32> = graph.weights.iter().map(|w| intern_weight(plan, interned, w)).collect();
    let states: Vec<u32> = graph.states.iter().map(|s| intern_state(plan, s)).collect();
    let mut step = Step {
        name: class.name.to_string(),
        max: class.max,
        arena_bytes: memory.bytes,
        launches: Vec::with_capacity(launches.len()),
        loops: looped.iter().filter_map(|l| l.placed(&launches, *memory.offsets.get(&l.matrix)?)).collect(),
        collectives: collectives(graph, &launches, &memory),
        sampling: sampling as u32,
        taps: taps(graph, &launches, &memory),
    };
    let binder = Binder { graph, class, memory: &memory, weights: &weights, states: &states };
    for &node in &launches {
        step.launches.push(launch(plan, interned, (class, graph, node), scheduler, &|arg| binder.bind(arg))?);
    }
    Ok(step)
}

/// The launch of a node, at a schedule that fits the target; `bind` says what its kernel's parameters are bound to.
fn launch(
    plan: &mut Plan,
    interned: &mut Interned,
    (class, graph, node): (&Class, &Graph, NodeId),
    scheduler: &Scheduler,
    bind: &dyn Fn(&ArgRef) -> Result<Arg, PlanError>,
) -> Result<Launch, PlanError> {
    let name = &graph.dag[node].name;
    let mut schedule = (scheduler.choose)(&kernels::shape_of(graph, node, class), class);
    let emitted = loop {
        let emitted = kernels::emit(graph, node, &schedule, class).map_err(|source| PlanError::Kernel {
            node: name.clone(),
            class: class.name.to_string(),
            source,
        })?;
        let known = interned.kernels.contains_key(&(emitted.program.to_string(), schedule.clone()));
        let fits = || (scheduler.fits)(&Kernel { program: emitted.program.clone(), schedule: schedule.clone() });
        if known || fits() || !schedule.shrink() {
            break emitted;
        }
    };
    let args = emitted.args.iter().map(bind).collect::<Result<Vec<_>, _>>()?;
    let kernel = intern_kernel(plan, interned, emitted, schedule, || kernels::work_of(graph, node))?;
    Ok(Launch { kernel, args, node: name.clone() })
}

/// Nodes that launch a kernel, in an order that respects every dependence, and how many of them come before those that choose
/// tokens. Inputs, weights and caches are just there; slices and reshapes are views on their source.
pub fn launch_order(graph: &Graph) -> (Vec<NodeId>, usize) {
    let launches = |op: &Op| {
        !matches!(
            op,
            Op::Input(_)
                | Op::Weight(_)
                | Op::State(_)
                | Op::Arg(_)
                | Op::SliceLast { .. }
                | Op::Reshape
                | Op::AllReduce { .. }
        )
    };
    let order = graph.order().into_iter().filter(|&n| launches(&graph.dag[n].op));
    // Nothing but tokens is made of what these two make, so they may come last.
    let (sampling, mut order): (Vec<NodeId>, Vec<NodeId>) =
        order.partition(|&n| matches!(graph.dag[n].op, Op::ArgMax { .. } | Op::Sample));
    let first = order.len();
    order.extend(sampling);
    (order, first)
}

/// Where taps can be read: right after the launch that makes them. `[T, heads, width]` is read as `[T, heads · width]`.
fn taps(graph: &Graph, launches: &[NodeId], memory: &memory::Placement) -> Vec<Tap> {
    let mut taps = Vec::new();
    for (name, value) in &graph.outputs {
        let (root, _) = memory::root(graph, *value);
        let Some(after) = launches.iter().position(|&n| n == root.node) else { continue };
        let (Some(&at), ValueType::Tensor(ty)) = (memory.offsets.get(&root), graph.ty(*value)) else { continue };
        let (Elem::Plain(dtype), Some(columns)) = (ty.elem, row_elements(ty)) else { continue };
        // A slice of wider rows is no matrix in memory.
        if graph.ty(root).tensor().and_then(row_elements) == Some(columns) {
            taps.push(Tap { name: name.clone(), after: after as u32 + 1, at, columns, dtype });
        }
    }
    taps
}

/// Sums over ranks: each right after the launch that makes what is added.
fn collectives(graph: &Graph, launches: &[NodeId], memory: &memory::Placement) -> Vec<Collective> {
    let mut sums: Vec<Collective> = Vec::new();
    for node in graph.order().into_iter().filter(|&n| matches!(graph.dag[n].op, Op::AllReduce { .. })) {
        let value = Value { node, output: 0 };
        let (root, _) = memory::root(graph, value);
        let Some(after) = launches.iter().position(|&n| n == root.node) else { continue };
        let (Some(&at), ValueType::Tensor(ty)) = (memory.offsets.get(&root), graph.ty(value)) else { continue };
        let (Elem::Plain(dtype), Some(columns)) = (ty.elem, row_elements(ty)) else { continue };
        sums.push(Collective { after: after as u32 + 1, at, columns, dtype });
    }
    sums.sort_by_key(|sum| sum.after);
    sums
}

/// Elements of a row of `[T, ..]`.
fn row_elements(ty: &TensorType) -> Option<u32> {
    let (rows, columns) = ty.shape.split_first()?;
    let elements = columns.iter().map(|e| e.constant()).try_fold(1u32, |n, e| n.checked_mul(e?))?;
    (rows.sym == Some(Sym::T) && rows.factor == 1 && !columns.is_empty()).then_some(elements)
}

fn intern_weight(plan: &mut Plan, interned: &mut Interned, weight: &dsc_ir::graph::Weight) -> u32 {
    let shape = weight.ty.shape.iter().map(|e| e.constant().unwrap_or(0)).collect();
    let entry = WeightEntry { name: weight.name.clone(), shape, elem: weight.ty.elem, source: weight.source.clone() };
    if let Some(&i) = interned.weights.get(&weight.name)
        && plan.weights[i as usize] == entry
    {
        return i;
    }
    // The same tensor in another storage, for another class: kept beside the first under a name that says so.
    if let Some(i) = plan.weights.iter().position(|w| *w == WeightEntry { name: w.name.clone(), ..entry.clone() }) {
        return i as u32;
    }
    let i = plan.weights.len() as u32;
    let name = match interned.weights.contains_key(&entry.name) {
        true => format!("{}#{i}", entry.name),
        false => entry.name.clone(),
    };
    interned.weights.insert(name.clone(), i);
    plan.weights.push(WeightEntry { name, ..entry });
    i
}

/// Classes number caches each for itself; one name is one cache.
fn intern_state(plan: &mut Plan, state: &State) -> u32 {
    let known = plan.states.iter().position(|s| s.name == state.name);
    known.unwrap_or_else(|| {
        plan.states.push(state.clone());
        plan.states.len() - 1
    }) as u32
}

fn intern_kernel(
    plan: &mut Plan,
    interned: &mut Interned,
    emitted: Emitted,
    schedule: Schedule,
    work: impl FnOnce() -> Work,
) -> Result<u32, PlanError> {
    let key = (emitted.program.to_string(), schedule.clone());
    if let Some(&i) = interned.kernels.get(&key) {
        return Ok(i);
    }
    let problems = dsc_ir::tile::verify(&emitted.program);
    if let Some(first) = problems.first() {
        let message = format!("{}: {}", first.location, first.message);
        return Err(PlanError::Invalid { kernel: emitted.program.name, message });
    }
    let mut program = emitted.program;
    let seen = interned.kernel_names.entry(program.name.clone()).or_insert(0);
    *seen += 1;
    if *seen > 1 {
        program.name = format!("{}_v{}", program.name, *seen);
    }
    let i = plan.kernels.len() as u32;
    interned.kernels.insert(key, i);
    plan.kernels.push(PlannedKernel { program, schedule, what: emitted.what, work: work() });
    Ok(i)
}

/// Bytes of a tensor's data when symbols have these values, without the scales of a quantised one.
pub fn data_bytes(ty: &TensorType, max: &SymValues) -> u64 {
    let elements: u64 = ty.shape.iter().map(|e| e.eval(max)).product();
    elements * ty.elem.bytes()
}

/// Bytes of a tensor with its scales, which start at the next multiple of [`ALIGN`].
pub fn total_bytes(ty: &TensorType, max: &SymValues) -> u64 {
    let data = data_bytes(ty, max);
    match ty.scale_shape() {
        None => data,
        Some(scales) => data.next_multiple_of(ALIGN) + scales.iter().map(|e| e.eval(max)).product::<u64>() * 4,
    }
}

/// Turns the values a kernel takes into the runtime's arguments.
struct Binder<'a> {
    graph: &'a Graph,
    class: &'a Class,
    memory: &'a memory::Placement,
    weights: &'a [u32],
    states: &'a [u32],
}

impl Binder<'_> {
    fn bind(&self, arg: &ArgRef) -> Result<Arg, PlanError> {
        let (root, _) = memory::root(self.graph, arg.value);
        let scales = match (arg.part, self.graph.ty(root)) {
            (Part::Scales, ValueType::Tensor(ty)) => data_bytes(ty, &self.class.max).next_multiple_of(ALIGN),
            _ => 0,
        };
        if let ValueType::State(_) = self.graph.ty(root) {
            let state = memory::state_of(self.graph, root).ok_or_else(|| self.unbound(root))?;
            return Ok(Arg::State(self.states[state as usize]));
        }
        match self.graph.dag[root.node].op {
            Op::Weight(i) => Ok(Arg::Weight(self.weights[i as usize], scales)),
            Op::Input(input) => Ok(Arg::Input(input)),
            _ if self.is_output("logits", root) => Ok(Arg::Logits),
            _ if self.is_output("tokens", root) => Ok(Arg::Tokens),
            _ => match self.memory.offsets.get(&root) {
                Some(offset) => Ok(Arg::Arena(offset + scales)),
                None => Err(self.unbound(root)),
            },
        }
    }

    fn is_output(&self, name: &str, value: Value) -> bool {
        self.graph.outputs.iter().any(|(n, v)| n == name && *v == value)
    }

    fn unbound(&self, value: Value) -> PlanError {
        PlanError::Unbound { class: self.class.name.to_string(), node: self.graph.dag[value.node].name.clone() }
    }
}
