//! Entry points of a kernel library: graphs that declare arguments.
//!
//! Arguments and named results are the caller's memory, in the order of [`Graph::args`] and [`Graph::outputs`]; a quantised one is
//! two arrays, codes and scales. Intermediate results are parts of a workspace whose sizes follow from those of the call: they
//! are few, so none shares memory with another.

use super::{Interned, Plan, PlanError, Scheduler, launch, launch_order, memory};
use crate::kernels::{ArgRef, Part, state_root};
use crate::passes::Class;
use dsc_ir::artifact::{Arg, ArgElem, Entry, EntryArg, Pieces, WorkspacePart};
use dsc_ir::graph::{Elem, Graph, Op, Value, ValueType};
use dsc_ir::{DType, Extent, Sym};
use std::collections::HashMap;

/// One operation for one class.
pub struct Function {
    /// Its name, such as `topk`.
    pub op: String,
    /// The calls it serves.
    pub class: Class,
    /// What is computed, after all passes.
    pub graph: Graph,
    /// See [`Entry::relations`].
    pub relations: Vec<(Extent, Extent)>,
    /// How the launches up to the last that has a matrix of scores are made, if there is one; see [`Entry::pieces`].
    pub pieces: Option<Pieces>,
}

/// Plans entry points, of each operation in the order the runtime should try them.
///
/// # Errors
/// [`PlanError`].
pub fn plan_entries(functions: &[Function], scheduler: &Scheduler) -> Result<Plan, PlanError> {
    let mut plan = Plan::default();
    let mut interned = Interned::default();
    for function in functions {
        let entry = plan_entry(&mut plan, &mut interned, function, scheduler)?;
        plan.entries.push(entry);
    }
    Ok(plan)
}

fn plan_entry(
    plan: &mut Plan,
    interned: &mut Interned,
    function: &Function,
    scheduler: &Scheduler,
) -> Result<Entry, PlanError> {
    let Function { op, class, graph, relations, pieces } = function;
    let mut memory = Memory::of(graph);
    let (launches, _) = launch_order(graph);
    for &node in &launches {
        for (output, ty) in graph.dag[node].outputs.iter().enumerate() {
            memory.work(Value { node, output: output as u32 }, ty);
        }
    }
    let mut entry = Entry {
        op: op.clone(),
        class: class.name.clone(),
        max: class.max,
        relations: relations.clone(),
        args: memory.args.clone(),
        workspace: memory.workspace.clone(),
        launches: Vec::new(),
        pieces: None,
        pieced: 0,
    };
    let bind = |arg: &ArgRef| {
        memory.bind(graph, arg).ok_or_else(|| PlanError::Unbound {
            class: class.name.clone(),
            node: graph.dag[arg.value.node].name.clone(),
        })
    };
    for &node in &launches {
        entry.launches.push(launch(plan, interned, (class, graph, node), scheduler, &bind)?);
    }
    if let Some(pieces) = pieces {
        entry.pieced = up_to_matrices(&entry);
        entry.pieces = (entry.pieced > 0).then_some(*pieces);
    }
    Ok(entry)
}

/// How many launches there are up to the last that has a matrix in the workspace with a row a token and a column a position.
fn up_to_matrices(entry: &Entry) -> u32 {
    let matrix = |arg: &Arg| match arg {
        Arg::Workspace(i) => entry.workspace[*i as usize].shape == [Sym::T.into(), Sym::C.into()],
        _ => false,
    };
    entry.launches.iter().rposition(|l| l.args.iter().any(matrix)).map_or(0, |last| last as u32 + 1)
}

/// What each array is bound to.
#[derive(Default)]
struct Memory {
    args: Vec<EntryArg>,
    workspace: Vec<WorkspacePart>,
    /// Of arguments by number.
    given: HashMap<(u32, Part), Arg>,
    /// Of results and intermediate results.
    made: HashMap<(Value, Part), Arg>,
}

impl Memory {
    fn of(graph: &Graph) -> Memory {
        let mut memory = Memory::default();
        for (i, arg) in graph.args.iter().enumerate() {
            for (part, array) in arrays(&arg.name, &arg.ty, false) {
                memory.given.insert((i as u32, part), Arg::Caller(memory.args.len() as u32));
                memory.args.push(array);
            }
        }
        for (name, value) in &graph.outputs {
            let (root, _) = memory::root(graph, *value);
            for (part, array) in arrays(name, graph.ty(*value), true) {
                memory.made.insert((root, part), Arg::Caller(memory.args.len() as u32));
                memory.args.push(array);
            }
        }
        memory
    }

    /// Gives an output of a launch that is no result a place in the workspace.
    fn work(&mut self, value: Value, ty: &ValueType) {
        for (part, array) in arrays("", ty, true) {
            let number = self.workspace.len() as u32;
            if let std::collections::hash_map::Entry::Vacant(new) = self.made.entry((value, part)) {
                new.insert(Arg::Workspace(number));
                self.workspace.push(WorkspacePart { element_bytes: array.elem.bytes() as u32, shape: array.shape });
            }
        }
    }

    fn bind(&self, graph: &Graph, arg: &ArgRef) -> Option<Arg> {
        let value = match graph.ty(arg.value) {
            ValueType::State(_) => state_root(graph, arg.value),
            ValueType::Tensor(_) => memory::root(graph, arg.value).0,
        };
        match graph.dag[value.node].op {
            Op::Arg(i) => self.given.get(&(i, arg.part)).copied(),
            _ => self.made.get(&(value, arg.part)).copied(),
        }
    }
}

/// The arrays of a value: elements, codes and scales, or pages.
fn arrays(name: &str, ty: &ValueType, write: bool) -> Vec<(Part, EntryArg)> {
    let array = |name: String, elem: ArgElem, shape: Vec<Extent>| EntryArg { name, elem, shape, write };
    match ty {
        ValueType::State(format) => {
            let shape = vec![Sym::N.into(), format.page_bytes().into()];
            vec![(Part::Data, array(name.into(), ArgElem::Pages(*format), shape))]
        }
        ValueType::Tensor(tensor) => {
            let dtype = match tensor.elem {
                Elem::Plain(dtype) => dtype,
                Elem::Quant(_) => DType::E4m3,
            };
            let mut all = vec![(Part::Data, array(name.into(), ArgElem::Plain(dtype), tensor.shape.clone()))];
            if let Some(shape) = tensor.scale_shape() {
                all.push((Part::Scales, array(format!("{name}_scales"), ArgElem::Plain(DType::F32), shape)));
            }
            all
        }
    }
}
