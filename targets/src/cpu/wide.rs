//! Elementwise loops in 512-bit vectors: a whole map, or a map and a reduction, as one assembled routine.
//!
//! Cranelift's vectors are a quarter as wide, so [`super::elementwise`] hands a loop nest to this file if it can: the two or
//! three innermost loops over an expression whose leaves are contiguous, repeated, or coordinates. The routine is generated
//! for that expression and those sizes; equal code is shared. What does not fit (a division by an odd constant, more
//! registers than there are) is refused, and Cranelift does it.
//!
//! Three forms, by [`Form`]: `out[r][i] = e`, `out[r] = Σ_i e`, and `out[r][i] = Σ_j e`. The last vector of a row is partial: its
//! loads clear what is beyond and its stores leave it alone.
//!
//! Registers: every value of the expression gets one, freed after its last use. Constants are memory operands repeated in
//! all lanes. Truth values are vectors of 0 and −1; a comparison that only feeds a selection stays in a mask register.
//!
//! A routine takes one pointer, to an array of 64-bit words: the address (or the bits) of each access, then strides that
//! are known only at run time. The destination is access 0.

use super::asm::*;
use dsc_ir::DType;
use dsc_ir::tile::{MapArg, ReduceKind, Scalar, ScalarOp};
use std::sync::Arc;

mod rows;
mod values;

/// What a routine computes over its rows `r` and elements `i`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    Map,
    /// Combines along `i`.
    ReduceInner(ReduceKind),
    /// Combines over that many `j`.
    ReduceMiddle(ReduceKind, u32),
}

/// What a step along an axis moves, in bytes (in units, for coordinates).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Const(i64),
    /// The word of the argument array that holds it.
    Arg(u32),
}

/// How an access is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Contiguous along `i`. The argument is an address.
    Row(DType),
    /// One element for all `i`. The argument is an address.
    Repeated(DType),
    /// The same element everywhere; the argument is its bits (of a bool, 0 or −1).
    Splat,
    /// i32 `argument + i * step`.
    Coordinate(i64),
    /// Those bits everywhere; no argument.
    Constant(u32),
}

/// One access: a leaf of the expression, or the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Access {
    pub(crate) kind: Kind,
    pub(crate) dtype: DType,
    /// Per row, and per `j`.
    pub(crate) row: Step,
    pub(crate) middle: Step,
}

/// A value of the expression.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) what: What,
    pub(crate) dtype: DType,
}

/// How a value comes about.
#[derive(Clone, Debug)]
pub(crate) enum What {
    /// The access of that number.
    Leaf(usize),
    Op(ScalarOp, Vec<usize>),
    /// `op(a, b) ? c : d`, of a comparison that nothing else uses.
    CompareSelect(ScalarOp, [usize; 4]),
}

/// A routine to make.
#[derive(Clone, Debug)]
pub(crate) struct Spec {
    pub(crate) form: Form,
    pub(crate) rows: u32,
    pub(crate) n: u32,
    /// The destination, then the leaves.
    pub(crate) accesses: Vec<Access>,
    /// In order of evaluation; the last one is the result.
    pub(crate) nodes: Vec<Node>,
}

/// Machine code of a routine; equal code is one routine.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Code(pub(crate) Arc<[u8]>);

impl std::fmt::Debug for Code {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

/// The code of `spec`, if it can be had.
pub(crate) fn assemble(spec: &Spec) -> Option<Code> {
    let mut nodes = spec.nodes.clone();
    fuse_comparisons(&mut nodes);
    let mut g = Gen {
        spec,
        uses: last_uses(&nodes),
        nodes,
        a: Asm::default(),
        free: (0..32).rev().collect(),
        regs: Vec::new(),
        pinned: vec![None; spec.accesses.len()],
        pointers: vec![None; spec.accesses.len()],
        constants: Vec::new(),
        tail: false,
    };
    g.emit()?;
    for (bits, label) in std::mem::take(&mut g.constants) {
        g.a.bind(label);
        bits.iter().for_each(|b| g.a.data(&b.to_le_bytes()));
    }
    Some(Code(g.a.finish().into()))
}

/// The bits of a constant as a lane has them.
pub(crate) fn scalar_bits(c: Scalar) -> u32 {
    match c {
        Scalar::F32(x) => x.to_bits(),
        Scalar::I32(x) => x as u32,
        Scalar::Bool(x) => {
            if x {
                u32::MAX
            } else {
                0
            }
        }
    }
}

/// Adds the nodes of a map's body; `inputs` are the nodes of its inputs. Gives the result's node.
pub(crate) fn add_body(nodes: &mut Vec<Node>, node: &super::tile::MapNode, inputs: &[usize]) -> usize {
    let mut insts: Vec<usize> = Vec::new();
    let find = |insts: &[usize], a: &MapArg| match *a {
        MapArg::Input(i) => inputs[i as usize],
        MapArg::Inst(i) => insts[i as usize],
    };
    for (inst, &dtype) in node.body.insts.iter().zip(&node.types) {
        let args = inst.args.iter().map(|a| find(&insts, a)).collect();
        nodes.push(Node { what: What::Op(inst.op, args), dtype });
        insts.push(nodes.len() - 1);
    }
    find(&insts, &node.body.result)
}

/// Turns `select(compare(a, b), c, d)` into one node where the comparison has no other use.
fn fuse_comparisons(nodes: &mut [Node]) {
    let mut counts = vec![0; nodes.len()];
    for node in nodes.iter() {
        if let What::Op(_, args) = &node.what {
            args.iter().for_each(|&a| counts[a] += 1);
        }
    }
    for i in 0..nodes.len() {
        let What::Op(ScalarOp::Select, args) = &nodes[i].what else { continue };
        let (cond, yes, no) = (args[0], args[1], args[2]);
        let What::Op(op @ (ScalarOp::Lt | ScalarOp::Le | ScalarOp::Eq), compared) = &nodes[cond].what else { continue };
        if counts[cond] == 1 && cond + 1 != nodes.len() {
            nodes[i].what = What::CompareSelect(*op, [compared[0], compared[1], yes, no]);
        }
    }
}

fn operands(what: &What) -> Vec<usize> {
    match what {
        What::Leaf(_) => vec![],
        What::Op(_, args) => args.clone(),
        What::CompareSelect(_, args) => args.to_vec(),
    }
}

/// The last node that uses each node; nothing for one that is never used.
fn last_uses(nodes: &[Node]) -> Vec<Option<usize>> {
    let mut uses = vec![None; nodes.len()];
    // Backwards, so that comparisons that were fused away do not keep their operands.
    let mut needed = vec![false; nodes.len()];
    needed[nodes.len() - 1] = true;
    for i in (0..nodes.len()).rev() {
        if !needed[i] {
            continue;
        }
        for a in operands(&nodes[i].what) {
            needed[a] = true;
            uses[a] = uses[a].max(Some(i));
        }
    }
    uses[nodes.len() - 1] = Some(nodes.len());
    uses
}

const ARGS: Gpr = RDI;
/// Counts elements along `i`.
const INDEX: Gpr = RAX;
const ROWS: Gpr = RBP;
const MIDDLE: Gpr = RSI;
const POINTERS: [Gpr; 10] = [RCX, RDX, RBX, R8, R9, R10, R11, R12, R13, R14];
const SAVED: [Gpr; 6] = [RBX, RBP, R12, R13, R14, R15];
const K_TAIL: u8 = 1;
const K_TEMP: u8 = 2;
const K_NAN: u8 = 3;
const LANES: u32 = 16;

struct Gen<'s> {
    spec: &'s Spec,
    nodes: Vec<Node>,
    uses: Vec<Option<usize>>,
    a: Asm,
    free: Vec<u8>,
    /// Register of each node of the expression being evaluated.
    regs: Vec<Option<u8>>,
    /// Register of each access that keeps one over a row.
    pinned: Vec<Option<u8>>,
    pointers: Vec<Option<Gpr>>,
    constants: Vec<(Vec<u32>, Label)>,
    tail: bool,
}

impl Gen<'_> {
    fn reg(&mut self) -> Option<u8> {
        self.free.pop()
    }

    fn give(&mut self, r: u8) {
        self.free.push(r);
    }

    fn constant(&mut self, bits: u32) -> Label {
        self.constants_of(vec![bits])
    }

    fn constants_of(&mut self, bits: Vec<u32>) -> Label {
        if let Some(c) = self.constants.iter().find(|c| c.0 == bits) {
            return c.1;
        }
        let label = self.a.label();
        self.constants.push((bits, label));
        label
    }

    fn z(&mut self, op: Op, dst: u8, a: u8, b: impl Into<Rm>) {
        self.a.v(Width::Z, op, dst, a, b);
    }

    /// `dst = op(a, constant)`.
    fn zc(&mut self, op: Op, dst: u8, a: u8, bits: u32) {
        let label = self.constant(bits);
        self.a.v_splat_const(op, dst, a, label);
    }

    fn splat_constant(&mut self, dst: u8, bits: u32) {
        let label = self.constant(bits);
        self.a.v_const(Width::Z, BROADCASTSS, dst, label);
    }

    fn mov(&mut self, dst: u8, src: u8) {
        if dst != src {
            self.z(MOVUPS_LOAD, dst, 0, src);
        }
    }

    fn word(&self, i: usize) -> Mem {
        at(ARGS, i as i32 * 8)
    }
}
