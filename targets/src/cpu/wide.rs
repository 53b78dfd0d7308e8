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

    fn emit(&mut self) -> Option<()> {
        for r in SAVED {
            self.a.push(r);
        }
        if !self.spec.n.is_multiple_of(LANES) {
            self.a.mov_imm(RAX, (1 << (self.spec.n % LANES)) - 1);
            self.a.kmovw(K_TAIL, RAX);
        }
        let mut next = POINTERS.iter();
        for (i, access) in self.spec.accesses.iter().enumerate() {
            match access.kind {
                Kind::Row(_) | Kind::Repeated(_) => {
                    let r = *next.next()?;
                    self.a.load64(r, at(ARGS, i as i32 * 8));
                    self.pointers[i] = Some(r);
                }
                Kind::Splat => {
                    let r = self.reg()?;
                    self.a.v(Width::Z, PBROADCASTD, r, 0, at(ARGS, i as i32 * 8));
                    self.pinned[i] = Some(r);
                }
                Kind::Coordinate(_) => self.pinned[i] = Some(self.reg()?),
                Kind::Constant(_) => {}
            }
        }
        // What a row repeats, if it does not change within the row.
        let per_row: Vec<usize> = (0..self.spec.accesses.len())
            .filter(|&i| {
                let a = &self.spec.accesses[i];
                matches!(a.kind, Kind::Repeated(_)) && a.middle == Step::Const(0) && i > 0
            })
            .collect();
        for &i in &per_row {
            self.pinned[i] = Some(self.reg()?);
        }
        let top = (self.spec.rows > 1).then(|| {
            self.a.mov_imm(ROWS, self.spec.rows);
            self.a.here_aligned()
        });
        for &i in &per_row {
            let (r, p) = (self.pinned[i]?, self.pointers[i]?);
            self.a.v(Width::Z, BROADCASTSS, r, 0, at(p, 0));
        }
        match self.spec.form {
            Form::Map => self.map_row()?,
            Form::ReduceInner(kind) => self.reduce_row(kind)?,
            Form::ReduceMiddle(kind, count) => self.reduce_columns(kind, count)?,
        }
        if let Some(top) = top {
            for i in 0..self.spec.accesses.len() {
                self.step_access(i, self.spec.accesses[i].row);
            }
            self.a.dec(ROWS);
            self.a.jump_if(NOT_ZERO, top);
        }
        self.a.vzeroupper();
        for r in SAVED.into_iter().rev() {
            self.a.pop(r);
        }
        self.a.ret();
        Some(())
    }

    /// Moves an access along an axis that is not `i`. A coordinate's base is kept in its argument.
    fn step_access(&mut self, i: usize, step: Step) {
        match (self.pointers[i], step) {
            (_, Step::Const(0)) => {}
            (Some(p), Step::Const(c)) => self.a.add_imm(p, c as i32),
            (Some(p), Step::Arg(word)) => self.a.add_mem(p, self.word(word as usize)),
            (None, Step::Const(c)) if matches!(self.spec.accesses[i].kind, Kind::Coordinate(_)) => {
                self.a.add_mem32_imm(self.word(i), c as i32);
            }
            (None, _) => {}
        }
    }

    /// Sets coordinates to the first vector of the row.
    fn start_coordinates(&mut self) -> Option<()> {
        for i in 0..self.spec.accesses.len() {
            if let Kind::Coordinate(step) = self.spec.accesses[i].kind {
                let r = self.pinned[i]?;
                self.a.v(Width::Z, PBROADCASTD, r, 0, self.word(i));
                if step != 0 {
                    let label = self.constants_of((0..i64::from(LANES)).map(|lane| (step * lane) as u32).collect());
                    let t = self.reg()?;
                    self.a.v_const(Width::Z, MOVUPS_LOAD, t, label);
                    self.z(PADDD, r, r, t);
                    self.give(t);
                }
            }
        }
        Some(())
    }

    fn advance_coordinates(&mut self) -> Option<()> {
        for i in 0..self.spec.accesses.len() {
            if let Kind::Coordinate(step) = self.spec.accesses[i].kind
                && step != 0
            {
                let r = self.pinned[i]?;
                self.zc(PADDD, r, r, (step * i64::from(LANES)) as u32);
            }
        }
        Some(())
    }

    /// Runs `body` for each whole vector of a row and then for the partial one.
    fn along(&mut self, body: &mut dyn FnMut(&mut Self) -> Option<()>) -> Option<()> {
        let whole = self.spec.n / LANES * LANES;
        self.start_coordinates()?;
        self.a.mov_imm(INDEX, 0);
        if whole > 0 {
            let top = (whole > LANES).then(|| self.a.here_aligned());
            body(self)?;
            self.advance_coordinates()?;
            self.a.add_imm(INDEX, LANES as i32);
            if let Some(top) = top {
                self.a.cmp_imm(INDEX, whole as i32);
                self.a.jump_if(BELOW, top);
            }
        }
        if whole != self.spec.n {
            self.tail = true;
            body(self)?;
            self.tail = false;
        }
        Some(())
    }

    fn map_row(&mut self) -> Option<()> {
        self.along(&mut |g| {
            let r = g.value()?;
            g.store_vector(r)?;
            g.give(r);
            Some(())
        })
    }

    /// The element at `INDEX` of a contiguous access.
    fn element(&self, i: usize, bytes: i64) -> Option<Mem> {
        Some(Mem { base: self.pointers[i]?, index: Some((INDEX, bytes as u8)), disp: 0 })
    }

    fn store_vector(&mut self, r: u8) -> Option<()> {
        let dtype = self.spec.accesses[0].dtype;
        let bytes = super::tile::element_bytes(dtype);
        let m = self.element(0, bytes)?;
        let op = match bytes {
            4 => MOVUPS_STORE,
            2 => PMOVDW,
            _ => PMOVDB,
        };
        let mask = if self.tail { K_TAIL } else { 0 };
        self.a.z_merging(op, r, 0, m, mask);
        Some(())
    }

    fn combine(&mut self, kind: ReduceKind, acc: u8, x: u8) {
        let float = self.spec.accesses[0].dtype == DType::F32;
        let mask = if self.tail { K_TAIL } else { 0 };
        let op = match (kind, float) {
            (ReduceKind::Sum, true) => ADDPS,
            (ReduceKind::Sum, false) => PADDD,
            (ReduceKind::Max, true) => MAXPS,
            (ReduceKind::Max, false) => PMAXSD,
        };
        // `maxps` gives its second operand if either is NaN: the accumulator stays clean, and NaN is noted beside it.
        self.a.z_merging(op, acc, x, acc, mask);
        if kind == ReduceKind::Max && float {
            self.a.z_compare(CMPPS, K_TEMP, x, x, 3);
            // Lanes beyond the row are zero when they come from loads; others could only be NaN if an operand is.
            if self.tail {
                self.a.kandw(K_TEMP, K_TAIL);
            }
            self.a.korw(K_NAN, K_TEMP);
        }
    }

    fn identity(&mut self, kind: ReduceKind, r: u8) {
        match (kind, self.spec.accesses[0].dtype) {
            (ReduceKind::Sum, _) => self.a.zero(r),
            (ReduceKind::Max, DType::F32) => self.splat_constant(r, f32::NEG_INFINITY.to_bits()),
            (ReduceKind::Max, _) => self.splat_constant(r, i32::MIN as u32),
        }
        if kind == ReduceKind::Max {
            self.a.kclear(K_NAN);
        }
    }

    /// One number a row. Two accumulators take vectors by turns through a swap, which costs nothing: registers are renamed.
    fn reduce_row(&mut self, kind: ReduceKind) -> Option<()> {
        let (acc, other, spare) = (self.reg()?, self.reg()?, self.reg()?);
        self.identity(kind, acc);
        self.identity(kind, other);
        self.along(&mut |g| {
            let r = g.value()?;
            g.mov(spare, acc);
            g.mov(acc, other);
            g.mov(other, spare);
            g.combine(kind, acc, r);
            g.give(r);
            Some(())
        })?;
        let float = self.spec.accesses[0].dtype == DType::F32;
        let op = match (kind, float) {
            (ReduceKind::Sum, true) => ADDPS,
            (ReduceKind::Sum, false) => PADDD,
            (ReduceKind::Max, true) => MAXPS,
            (ReduceKind::Max, false) => PMAXSD,
        };
        self.z(op, acc, acc, other);
        self.a.vi(Width::Z, EXTRACTF64X4, acc, 0, spare, 1);
        self.a.v(Width::Y, op, acc, acc, spare);
        self.a.vi(Width::Y, EXTRACTF128, acc, 0, spare, 1);
        self.a.v(Width::X, op, acc, acc, spare);
        for shuffle in [0x4e, 0xb1] {
            self.a.vi(Width::X, PSHUFD, spare, 0, acc, shuffle);
            self.a.v(Width::X, op, acc, acc, spare);
        }
        if kind == ReduceKind::Max && float {
            self.nan_if_noted(acc);
        }
        let p = self.pointers[0]?;
        self.a.v(Width::X, MOVSS_STORE, acc, 0, at(p, 0));
        for r in [acc, other, spare] {
            self.give(r);
        }
        Some(())
    }

    /// All lanes NaN if any lane was.
    fn nan_if_noted(&mut self, acc: u8) {
        let skip = self.a.label();
        self.a.kmovw_out(RAX, K_NAN);
        self.a.test32(RAX);
        self.a.jump_if(ZERO, skip);
        self.splat_constant(acc, f32::NAN.to_bits());
        self.a.bind(skip);
    }

    /// A vector a row, over `count` steps of the middle axis.
    fn reduce_columns(&mut self, kind: ReduceKind, count: u32) -> Option<()> {
        let acc = self.reg()?;
        let coordinates =
            self.spec.accesses.iter().any(|a| matches!(a.kind, Kind::Coordinate(_)) && a.middle != Step::Const(0));
        if coordinates {
            return None;
        }
        self.along(&mut |g| {
            g.identity(kind, acc);
            g.a.mov_imm(MIDDLE, count);
            let top = g.a.here_aligned();
            let r = g.value()?;
            // The store is masked; here all lanes may take part.
            let tail = std::mem::replace(&mut g.tail, false);
            g.combine(kind, acc, r);
            g.tail = tail;
            g.give(r);
            for i in 1..g.spec.accesses.len() {
                g.step_access(i, g.spec.accesses[i].middle);
            }
            g.a.dec(MIDDLE);
            g.a.jump_if(NOT_ZERO, top);
            for i in 1..g.spec.accesses.len() {
                g.step_back(i, count)?;
            }
            if kind == ReduceKind::Max && g.spec.accesses[0].dtype == DType::F32 {
                let label = g.constant(f32::NAN.to_bits());
                g.a.kmovk(K_TEMP, K_NAN);
                g.a.v_masked_splat_const_load(acc, label, K_TEMP);
            }
            g.store_vector(acc)?;
            Some(())
        })?;
        self.give(acc);
        Some(())
    }

    /// Undoes `count` steps of the middle axis.
    fn step_back(&mut self, i: usize, count: u32) -> Option<()> {
        match (self.pointers[i], self.spec.accesses[i].middle) {
            (Some(p), Step::Const(c)) if c != 0 => {
                self.a.add_imm(p, i32::try_from(-c * i64::from(count)).ok()?);
            }
            (Some(p), Step::Arg(word)) => {
                self.a.load64(R15, self.word(word as usize));
                self.a.imul_imm(R15, R15, count as i32);
                self.a.sub(p, R15);
            }
            _ => {}
        }
        Some(())
    }

    /// Evaluates the expression at the current vector; the register is the caller's.
    fn value(&mut self) -> Option<u8> {
        self.regs = vec![None; self.nodes.len()];
        let count = self.nodes.len();
        for i in 0..count {
            if self.uses[i].is_none() {
                continue;
            }
            let node = self.nodes[i].clone();
            let r = match &node.what {
                What::Leaf(access) => self.leaf(i, *access)?,
                What::Op(op, args) => self.op(i, *op, args)?,
                What::CompareSelect(op, args) => self.compare_select(i, *op, args)?,
            };
            self.regs[i] = Some(r);
            for a in operands(&node.what) {
                self.release(a, i);
            }
        }
        let r = self.regs[count - 1].take()?;
        if self.is_pinned(r) {
            let copy = self.reg()?;
            self.mov(copy, r);
            return Some(copy);
        }
        Some(r)
    }

    fn is_pinned(&self, r: u8) -> bool {
        self.pinned.contains(&Some(r))
    }

    /// Frees an operand's register after its last use, unless it was taken over.
    fn release(&mut self, node: usize, at: usize) {
        if self.uses[node] == Some(at)
            && let Some(r) = self.regs[node].take()
            && !self.is_pinned(r)
            && self.regs[at] != Some(r)
        {
            self.give(r);
        }
    }

    /// Whether every use of a node converts it to f32, so that it may be loaded as that.
    fn only_cast(&self, node: usize) -> bool {
        node + 1 != self.nodes.len()
            && self.nodes.iter().enumerate().all(|(i, n)| {
                self.uses[i].is_none()
                    || !operands(&n.what).contains(&node)
                    || matches!(n.what, What::Op(ScalarOp::Cast(DType::F32), _))
            })
    }

    fn leaf(&mut self, node: usize, access: usize) -> Option<u8> {
        if let Some(r) = self.pinned[access] {
            return Some(r);
        }
        let r = self.reg()?;
        match self.spec.accesses[access].kind {
            Kind::Constant(bits) => self.splat_constant(r, bits),
            Kind::Repeated(_) => {
                let p = self.pointers[access]?;
                self.a.v(Width::Z, BROADCASTSS, r, 0, at(p, 0));
            }
            Kind::Row(dtype) => {
                let m = self.element(access, super::tile::element_bytes(dtype))?;
                let convert = self.only_cast(node);
                self.load(dtype, convert, r, m)?;
            }
            Kind::Splat | Kind::Coordinate(_) => return None,
        }
        Some(r)
    }

    fn load_masked(&mut self, width: Width, op: Op, r: u8, m: Mem) {
        if self.tail {
            self.a.v_zeroing(width, op, r, m, K_TAIL);
        } else {
            self.a.v(width, op, r, 0, m);
        }
    }

    fn load(&mut self, dtype: DType, as_f32: bool, r: u8, m: Mem) -> Option<()> {
        match (dtype, as_f32) {
            (DType::F32 | DType::I32 | DType::Bool, _) => self.load_masked(Width::Z, MOVUPS_LOAD, r, m),
            (DType::Bf16, true) => {
                self.load_masked(Width::Z, PMOVZXWD, r, m);
                self.a.shift(Width::Z, PSHIFTD_IMM, 6, r, r, 16);
            }
            (DType::F16, true) => self.load_masked(Width::Z, CVTPH2PS, r, m),
            (DType::E4m3, true) => {
                self.load_masked(Width::Y, PMOVZXBW, r, m);
                self.e4m3_words_to_f32(r)?;
            }
            (DType::Bf16 | DType::F16, false) => self.load_masked(Width::Z, PMOVZXWD, r, m),
            (DType::E4m3, false) => self.load_masked(Width::Z, PMOVZXBD, r, m),
        }
        Some(())
    }

    /// Sixteen codes in words to f32, by way of the f16 of 1/256 of them; see [`super::atoms`].
    fn e4m3_words_to_f32(&mut self, r: u8) -> Option<()> {
        let (t, u) = (self.reg()?, self.reg()?);
        let magnitude = self.constant(0x3f80_3f80);
        let sign = self.constant(0x4000_4000);
        self.a.shift(Width::Y, PSHIFTW_IMM, 6, r, r, 7);
        self.a.v_const(Width::Y, PBROADCASTD, u, magnitude);
        self.a.v(Width::Y, PAND, t, r, u);
        // Word comparisons outside the lower registers go to a mask.
        self.a.y_compare_words(K_TEMP, t, u);
        self.a.v_const(Width::Y, PBROADCASTD, u, sign);
        self.a.v(Width::Y, PAND, t, r, u);
        self.a.v(Width::Y, PADDW, r, r, t);
        self.a.v(Width::Z, CVTPH2PS, r, 0, r);
        self.zc(MULPS, r, r, 256f32.to_bits());
        let nan = self.constant(f32::NAN.to_bits());
        self.a.v_masked_splat_const_load(r, nan, K_TEMP);
        self.give(t);
        self.give(u);
        Some(())
    }

    /// The register of an operand.
    fn arg(&self, node: usize) -> Option<u8> {
        self.regs[node]
    }

    /// The bits of an operand that is a constant.
    fn literal(&self, node: usize) -> Option<u32> {
        match self.nodes[node].what {
            What::Leaf(access) => match self.spec.accesses[access].kind {
                Kind::Constant(bits) => Some(bits),
                _ => None,
            },
            What::Op(ScalarOp::Const(c), _) => Some(scalar_bits(c)),
            _ => None,
        }
    }

    /// A register for a result: that of an operand that is not needed any more, if `reuse` names one.
    fn result(&mut self, node: usize, reuse: &[usize]) -> Option<u8> {
        for &a in reuse {
            if self.uses[a] == Some(node)
                && let Some(r) = self.regs[a]
                && !self.is_pinned(r)
            {
                return Some(r);
            }
        }
        self.reg()
    }

    fn op(&mut self, node: usize, op: ScalarOp, args: &[usize]) -> Option<u8> {
        let from = args.first().map_or(DType::F32, |&a| self.nodes[a].dtype);
        let float = from == DType::F32;
        let two = |f: Op, i: Op| if float { f } else { i };
        match op {
            ScalarOp::Const(c) => {
                let r = self.reg()?;
                self.splat_constant(r, scalar_bits(c));
                Some(r)
            }
            ScalarOp::Add => self.binary(node, two(ADDPS, PADDD), args),
            ScalarOp::Sub => self.binary(node, two(SUBPS, PSUBD), args),
            ScalarOp::Mul => self.binary(node, two(MULPS, PMULLD), args),
            ScalarOp::Div if float => self.binary(node, DIVPS, args),
            ScalarOp::Div => self.divide(args, false),
            ScalarOp::Rem => self.divide(args, true),
            ScalarOp::Min | ScalarOp::Max => self.extreme(node, op == ScalarOp::Max, float, args),
            ScalarOp::And => self.binary(node, PAND, args),
            ScalarOp::Or => self.binary(node, POR, args),
            ScalarOp::Xor => self.binary(node, PXOR, args),
            ScalarOp::Shl | ScalarOp::Shr => self.shift(node, op == ScalarOp::Shl, args),
            ScalarOp::Fma => {
                let (a, b, c) = (self.arg(args[0])?, self.arg(args[1])?, self.arg(args[2])?);
                // The result's register starts as the addend; it must not be an operand that is still to be read.
                let r = if c != a && c != b { self.result(node, &args[2..])? } else { self.reg()? };
                self.mov(r, c);
                self.z(FMADD231PS, r, a, b);
                Some(r)
            }
            ScalarOp::Neg if float => self.unary_const(node, PXOR, args, 0x8000_0000),
            ScalarOp::Neg => {
                let (r, zero) = (self.reg()?, self.reg()?);
                self.a.zero(zero);
                let a = self.arg(args[0])?;
                self.z(PSUBD, r, zero, a);
                self.give(zero);
                Some(r)
            }
            ScalarOp::Abs => self.unary_const(node, PAND, args, 0x7fff_ffff),
            ScalarOp::Sqrt => {
                let r = self.result(node, args)?;
                let a = self.arg(args[0])?;
                self.z(SQRTPS, r, 0, a);
                Some(r)
            }
            ScalarOp::Exp2 => self.exp2(args[0]),
            ScalarOp::Lt | ScalarOp::Le | ScalarOp::Eq => {
                self.compare(op, args)?;
                let r = self.reg()?;
                self.z(PMOVM2D, r, 0, K_TEMP);
                Some(r)
            }
            ScalarOp::Select => {
                let r = self.reg()?;
                let (c, a, b) = (self.arg(args[0])?, self.arg(args[1])?, self.arg(args[2])?);
                self.mov(r, c);
                self.a.vi(Width::Z, PTERNLOGD, r, a, b, 0xca);
                Some(r)
            }
            ScalarOp::Cast(to) => self.cast(node, args[0], from, to),
            ScalarOp::Bitcast(_) => {
                let r = self.result(node, args)?;
                let a = self.arg(args[0])?;
                self.mov(r, a);
                Some(r)
            }
        }
    }

    fn binary(&mut self, node: usize, op: Op, args: &[usize]) -> Option<u8> {
        let (a, b) = (self.arg(args[0])?, self.arg(args[1])?);
        let r = self.result(node, args)?;
        self.z(op, r, a, b);
        Some(r)
    }

    fn unary_const(&mut self, node: usize, op: Op, args: &[usize], bits: u32) -> Option<u8> {
        let a = self.arg(args[0])?;
        let r = self.result(node, args)?;
        self.zc(op, r, a, bits);
        Some(r)
    }

    /// NaN wins: `minps`/`maxps` give the second operand if either is NaN, so a first operand that is NaN is put back;
    /// a constant is put first, where it needs no check.
    fn extreme(&mut self, node: usize, max: bool, float: bool, args: &[usize]) -> Option<u8> {
        let op = match (max, float) {
            (true, true) => MAXPS,
            (false, true) => MINPS,
            (true, false) => PMAXSD,
            (false, false) => PMINSD,
        };
        if !float {
            return self.binary(node, op, args);
        }
        let number = |g: &Self, n: usize| g.literal(n).is_some_and(|bits| !f32::from_bits(bits).is_nan());
        let (first, second) = if number(self, args[1]) { (args[1], args[0]) } else { (args[0], args[1]) };
        let (a, b) = (self.arg(first)?, self.arg(second)?);
        if number(self, first) {
            let r = self.result(node, args)?;
            self.z(op, r, a, b);
            return Some(r);
        }
        let r = self.reg()?;
        self.a.z_compare(CMPPS, K_TEMP, a, a, 3);
        self.z(op, r, a, b);
        self.a.z_merging(MOVUPS_LOAD, r, 0, a, K_TEMP);
        Some(r)
    }

    fn shift(&mut self, node: usize, left: bool, args: &[usize]) -> Option<u8> {
        let a = self.arg(args[0])?;
        if let Some(by) = self.literal(args[1]) {
            let r = self.result(node, &args[..1])?;
            self.a.shift(Width::Z, PSHIFTD_IMM, if left { 6 } else { 2 }, r, a, (by & 31) as u8);
            return Some(r);
        }
        let (r, t) = (self.reg()?, self.reg()?);
        let by = self.arg(args[1])?;
        self.zc(PAND, t, by, 31);
        self.z(if left { PSLLVD } else { PSRLVD }, r, a, t);
        self.give(t);
        Some(r)
    }

    /// i32 by a power of two, towards zero. Other divisors are refused.
    fn divide(&mut self, args: &[usize], remainder: bool) -> Option<u8> {
        let divisor = self.literal(args[1])?;
        if !divisor.is_power_of_two() {
            return None;
        }
        let a = self.arg(args[0])?;
        let r = self.reg()?;
        self.a.shift(Width::Z, PSHIFTD_IMM, 4, r, a, 31);
        self.zc(PAND, r, r, divisor - 1);
        self.z(PADDD, r, r, a);
        if remainder {
            self.zc(PAND, r, r, !(divisor - 1));
            self.z(PSUBD, r, a, r);
        } else {
            self.a.shift(Width::Z, PSHIFTD_IMM, 4, r, r, divisor.trailing_zeros() as u8);
        }
        Some(r)
    }

    /// Into the temporary mask.
    fn compare(&mut self, op: ScalarOp, args: &[usize]) -> Option<()> {
        let (a, b) = (self.arg(args[0])?, self.arg(args[1])?);
        let float = self.nodes[args[0]].dtype == DType::F32;
        let (float_predicate, int_predicate) = match op {
            ScalarOp::Lt => (0x11, 1),
            ScalarOp::Le => (0x12, 2),
            _ => (0x00, 0),
        };
        if float {
            self.a.z_compare(CMPPS, K_TEMP, a, b, float_predicate);
        } else {
            self.a.z_compare(PCMPD, K_TEMP, a, b, int_predicate);
        }
        Some(())
    }

    fn compare_select(&mut self, node: usize, op: ScalarOp, args: &[usize; 4]) -> Option<u8> {
        self.compare(op, &args[..2])?;
        let (yes, no) = (self.arg(args[2])?, self.arg(args[3])?);
        // The result starts as `no`.
        let r = if no != yes { self.result(node, &args[3..])? } else { self.reg()? };
        self.mov(r, no);
        self.a.z_merging(MOVUPS_LOAD, r, 0, yes, K_TEMP);
        Some(r)
    }

    /// The same polynomial as [`super::math`].
    fn exp2(&mut self, arg: usize) -> Option<u8> {
        let c = super::math::EXP2;
        let x = self.arg(arg)?;
        let (shifted, t, p) = (self.reg()?, self.reg()?, self.reg()?);
        let magic = super::math::EXP2_MAGIC.to_bits();
        self.zc(ADDPS, shifted, x, magic);
        self.zc(SUBPS, t, shifted, magic);
        self.z(SUBPS, t, x, t);
        self.splat_constant(p, c[5].to_bits());
        for &c in c[..5].iter().rev() {
            self.zc(FMADD213PS, p, t, c.to_bits());
        }
        self.zc(FMADD213PS, p, t, 1f32.to_bits());
        self.a.shift(Width::Z, PSHIFTD_IMM, 6, shifted, shifted, 23);
        self.z(PADDD, p, p, shifted);
        // Not below 128: infinity, or NaN if x is. Below -126: zero.
        self.splat_constant(t, 128f32.to_bits());
        self.a.z_compare(CMPPS, K_TEMP, x, t, 0x05);
        self.zc(ADDPS, t, x, f32::INFINITY.to_bits());
        self.a.z_merging(MOVUPS_LOAD, p, 0, t, K_TEMP);
        self.splat_constant(t, (-126f32).to_bits());
        self.a.z_compare(CMPPS, K_TEMP, x, t, 0x11);
        self.a.zero(t);
        self.a.z_merging(MOVUPS_LOAD, p, 0, t, K_TEMP);
        self.give(shifted);
        self.give(t);
        Some(p)
    }

    fn cast(&mut self, node: usize, arg: usize, from: DType, to: DType) -> Option<u8> {
        let a = self.arg(arg)?;
        if from == to || (to == DType::F32 && self.loaded_as_f32(arg)) {
            let r = self.result(node, &[arg])?;
            self.mov(r, a);
            return Some(r);
        }
        match (from, to) {
            (DType::Bf16, DType::F32) => {
                let r = self.result(node, &[arg])?;
                self.a.shift(Width::Z, PSHIFTD_IMM, 6, r, a, 16);
                Some(r)
            }
            (DType::F16, DType::F32) => {
                let r = self.reg()?;
                self.a.v(Width::Z, PMOVDW, a, 0, r);
                self.z(CVTPH2PS, r, 0, r);
                Some(r)
            }
            (DType::E4m3, DType::F32) => {
                let r = self.reg()?;
                self.a.v(Width::Z, PMOVDW, a, 0, r);
                self.e4m3_words_to_f32(r)?;
                Some(r)
            }
            (DType::I32, DType::F32) => {
                let r = self.result(node, &[arg])?;
                self.z(CVTDQ2PS, r, 0, a);
                Some(r)
            }
            (DType::F32, DType::Bf16) => self.encode_bf16(a),
            (DType::F32, DType::F16) => {
                let r = self.reg()?;
                self.a.vi(Width::Z, CVTPS2PH, a, 0, r, 0);
                self.z(PMOVZXWD, r, 0, r);
                Some(r)
            }
            (DType::F32, DType::E4m3) => self.encode_e4m3(a),
            (DType::F32, DType::I32) => self.encode_i32(a),
            (DType::F32, DType::Bool) => {
                let (r, zero) = (self.reg()?, self.reg()?);
                self.a.zero(zero);
                self.a.z_compare(CMPPS, K_TEMP, a, zero, 0x04);
                self.z(PMOVM2D, r, 0, K_TEMP);
                self.give(zero);
                Some(r)
            }
            _ => None,
        }
    }

    fn loaded_as_f32(&self, node: usize) -> bool {
        match self.nodes[node].what {
            What::Leaf(access) => matches!(self.spec.accesses[access].kind, Kind::Row(_)) && self.only_cast(node),
            _ => false,
        }
    }

    /// `(bits + half - 1 + lowest kept bit) >> by` into `r`.
    fn round_bits(&mut self, r: u8, bits: u8, by: u8) {
        self.a.shift(Width::Z, PSHIFTD_IMM, 2, r, bits, by);
        self.zc(PAND, r, r, 1);
        self.z(PADDD, r, r, bits);
        self.zc(PADDD, r, r, (1 << (by - 1)) - 1);
        self.a.shift(Width::Z, PSHIFTD_IMM, 2, r, r, by);
    }

    fn encode_bf16(&mut self, a: u8) -> Option<u8> {
        let (r, t) = (self.reg()?, self.reg()?);
        self.round_bits(r, a, 16);
        self.a.z_compare(CMPPS, K_TEMP, a, a, 3);
        self.a.shift(Width::Z, PSHIFTD_IMM, 2, t, a, 16);
        self.zc(POR, t, t, 0x40);
        self.a.z_merging(MOVUPS_LOAD, r, 0, t, K_TEMP);
        self.give(t);
        Some(r)
    }

    fn encode_e4m3(&mut self, a: u8) -> Option<u8> {
        let (r, t, m) = (self.reg()?, self.reg()?, self.reg()?);
        self.zc(PAND, m, a, 0x7fff_ffff);
        self.zc(PMINSD, m, m, 448f32.to_bits());
        self.round_bits(r, m, 20);
        self.zc(PSUBD, r, r, 120 << 3);
        // Below 2^-6: multiples of 2^-9, the ulp of 2^14.
        self.splat_constant(t, 0.015_625f32.to_bits());
        self.a.z_compare(CMPPS, K_TEMP, m, t, 0x11);
        self.zc(ADDPS, t, m, 16384f32.to_bits());
        self.zc(PSUBD, t, t, 16384f32.to_bits());
        self.a.z_merging(MOVUPS_LOAD, r, 0, t, K_TEMP);
        self.a.z_compare(CMPPS, K_TEMP, a, a, 3);
        let nan = self.constant(0x7f);
        self.a.v_masked_splat_const_load(r, nan, K_TEMP);
        self.a.shift(Width::Z, PSHIFTD_IMM, 2, t, a, 24);
        self.zc(PAND, t, t, 0x80);
        self.z(POR, r, r, t);
        self.give(t);
        self.give(m);
        Some(r)
    }

    /// Truncates and saturates; NaN gives 0. The conversion itself gives 0x80000000 for all that do not fit.
    fn encode_i32(&mut self, a: u8) -> Option<u8> {
        let (r, t) = (self.reg()?, self.reg()?);
        self.z(CVTTPS2DQ, r, 0, a);
        self.splat_constant(t, 2_147_483_648f32.to_bits());
        self.a.z_compare(CMPPS, K_TEMP, a, t, 0x0d);
        let most = self.constant(i32::MAX as u32);
        self.a.v_masked_splat_const_load(r, most, K_TEMP);
        self.a.z_compare(CMPPS, K_TEMP, a, a, 3);
        self.a.zero(t);
        self.a.z_merging(MOVUPS_LOAD, r, 0, t, K_TEMP);
        self.give(t);
        Some(r)
    }
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
