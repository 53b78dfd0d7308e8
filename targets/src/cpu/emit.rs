//! A function under construction: constants, loops and calls on top of Cranelift's builder.
//!
//! Everything the lowering emits goes through [`Fun`], for kernels and for the routines they share ([`super::routines`]).
//! Loops are opened and closed explicitly ([`Fun::begin_loop`], [`Fun::end_loop`]); they test at the bottom, and carry their
//! counter and accumulators as block parameters, so no variables have to be turned into SSA form afterwards.

use super::atoms::Atom;
use super::wide::Code;
use cranelift_codegen::ir::condcodes::IntCC;
use cranelift_codegen::ir::{
    AbiParam, Block, BlockArg, ConstantData, Endianness, ExtFuncData, ExternalName, FuncRef, InstBuilder, MemFlagsData,
    Signature, Type, UserExternalName, Value, types,
};
use cranelift_codegen::isa::{CallConv, TargetFrontendConfig};
use cranelift_frontend::FunctionBuilder;

/// Code that kernels call: linked into the module once, however many kernels use it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Routine {
    /// `fn(dst, ld_dst, src, ld_src, rows, row_bytes)`: rows that do not overlap.
    CopyRows,
    /// `fn(dst, bytes)`: clears.
    Clear,
    /// `fn(state, k, capacity, values, n, base)`: offers one row of candidates; see [`super::topk`].
    TopkPush,
    /// `fn(state, k, capacity)`: keeps the `k` best.
    TopkCompact,
    /// `fn(state, k, capacity, values, indices)`: writes the selection.
    TopkTake,
    /// See [`Atom`].
    Atom(Atom),
    /// `fn(args)`: a loop nest over an expression; see [`super::wide`].
    Wide(Code),
}

impl Routine {
    fn arguments(&self) -> usize {
        match self {
            Routine::CopyRows | Routine::TopkPush => 6,
            Routine::Clear => 2,
            Routine::TopkCompact => 3,
            Routine::TopkTake => 5,
            Routine::Atom(Atom::GemmNn { .. } | Atom::GemmNt { .. }) => 6,
            Routine::Atom(Atom::Pack { .. }) => 3,
            Routine::Atom(Atom::Cast { .. }) => 4,
            Routine::Wide(_) => 1,
        }
    }

    /// Its Cranelift signature: pointers and sizes, all 64 bits.
    pub(crate) fn signature(&self) -> Signature {
        let mut signature = Signature::new(CallConv::SystemV);
        signature.params = vec![AbiParam::new(types::I64); self.arguments()];
        signature
    }
}

/// How many rounds a loop has.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Bound {
    Const(i64),
    Value(Value),
}

/// A loop being emitted.
pub(crate) struct Loop {
    top: Block,
    exit: Block,
    /// The counter, i64.
    pub(crate) i: Value,
    /// The accumulators at the start of a round.
    pub(crate) accs: Vec<Value>,
    hi: Bound,
    step: i64,
}

/// A function under construction and the routines it calls.
pub(crate) struct Fun<'a> {
    pub(crate) b: FunctionBuilder<'a>,
    routines: Vec<(Routine, FuncRef)>,
    config: TargetFrontendConfig,
}

/// Flags of every memory access: bounds were checked, nothing is known of alignment.
pub(crate) fn mem() -> MemFlagsData {
    MemFlagsData::new().with_notrap()
}

fn args(values: &[Value]) -> Vec<BlockArg> {
    values.iter().map(|&v| BlockArg::Value(v)).collect()
}

impl<'a> Fun<'a> {
    pub(crate) fn new(b: FunctionBuilder<'a>, config: TargetFrontendConfig) -> Fun<'a> {
        Fun { b, routines: Vec::new(), config }
    }

    /// Ends the construction.
    pub(crate) fn finish(mut self) {
        self.b.seal_all_blocks();
        self.b.finalize(self.config);
    }

    /// The routines called so far; a relocation names one by its place here.
    pub(crate) fn routines(&self) -> Vec<Routine> {
        self.routines.iter().map(|r| r.0.clone()).collect()
    }

    pub(crate) fn i64(&mut self, v: i64) -> Value {
        self.b.ins().iconst(types::I64, v)
    }

    pub(crate) fn i32(&mut self, v: i32) -> Value {
        self.b.ins().iconst(types::I32, i64::from(v as u32))
    }

    pub(crate) fn f32(&mut self, v: f32) -> Value {
        self.b.ins().f32const(v)
    }

    /// Four given dwords.
    pub(crate) fn i32x4(&mut self, v: [i32; 4]) -> Value {
        let bytes: Vec<u8> = v.iter().flat_map(|x| x.to_le_bytes()).collect();
        let constant = self.b.func.dfg.constants.insert(ConstantData::from(bytes));
        self.b.ins().vconst(types::I32X4, constant)
    }

    /// The same bits as another type of the same size.
    pub(crate) fn cast_bits(&mut self, to: Type, v: Value) -> Value {
        if self.b.func.dfg.value_type(v) == to {
            return v;
        }
        self.b.ins().bitcast(to, MemFlagsData::new().with_endianness(Endianness::Little), v)
    }

    /// `a + c`, i64.
    pub(crate) fn add_const(&mut self, a: Value, c: i64) -> Value {
        if c == 0 { a } else { self.b.ins().iadd_imm_s(a, c) }
    }

    /// `a * c`, i64.
    pub(crate) fn mul_const(&mut self, a: Value, c: i64) -> Value {
        match c {
            1 => a,
            c if c > 0 && (c as u64).is_power_of_two() => self.b.ins().ishl_imm_u(a, i64::from(c.trailing_zeros())),
            c => self.b.ins().imul_imm_s(a, c),
        }
    }

    /// A new block, with parameters.
    pub(crate) fn block(&mut self, params: &[Type]) -> Block {
        let block = self.b.create_block();
        for &ty in params {
            self.b.append_block_param(block, ty);
        }
        block
    }

    pub(crate) fn jump(&mut self, to: Block, values: &[Value]) {
        let values = args(values);
        self.b.ins().jump(to, &values);
    }

    pub(crate) fn branch(&mut self, cond: Value, yes: Block, yes_values: &[Value], no: Block, no_values: &[Value]) {
        let (yes_values, no_values) = (args(yes_values), args(no_values));
        self.b.ins().brif(cond, yes, &yes_values, no, &no_values);
    }

    /// Continues in `block` and gives its parameters.
    pub(crate) fn switch(&mut self, block: Block) -> Vec<Value> {
        self.b.switch_to_block(block);
        self.b.block_params(block).to_vec()
    }

    fn bound(&mut self, bound: Bound) -> Value {
        match bound {
            Bound::Const(c) => self.i64(c),
            Bound::Value(v) => v,
        }
    }

    /// Opens `for i in (lo..hi).step_by(step)` with accumulators. Constant bounds must allow one round.
    pub(crate) fn begin_loop(&mut self, lo: Value, hi: Bound, step: i64, init: &[Value]) -> Loop {
        let tys: Vec<Type> = init.iter().map(|&v| self.b.func.dfg.value_type(v)).collect();
        let mut top_tys = vec![types::I64];
        top_tys.extend(&tys);
        let (top, exit) = (self.block(&top_tys), self.block(&tys));
        let mut entry = vec![lo];
        entry.extend(init);
        match hi {
            Bound::Const(_) => self.jump(top, &entry),
            Bound::Value(hi) => {
                let some = self.b.ins().icmp(IntCC::SignedLessThan, lo, hi);
                self.branch(some, top, &entry, exit, init);
            }
        }
        let params = self.switch(top);
        Loop { top, exit, i: params[0], accs: params[1..].to_vec(), hi, step }
    }

    /// Opens `for i in (0..n).step_by(step)`, `n` positive and static.
    pub(crate) fn begin_count(&mut self, n: i64, step: i64) -> Loop {
        let zero = self.i64(0);
        self.begin_loop(zero, Bound::Const(n), step, &[])
    }

    /// Closes a loop with the accumulators of the next round; gives them as they are after the last.
    pub(crate) fn end_loop(&mut self, l: Loop, next: &[Value]) -> Vec<Value> {
        let i = self.add_const(l.i, l.step);
        let hi = self.bound(l.hi);
        let more = self.b.ins().icmp(IntCC::SignedLessThan, i, hi);
        let mut again = vec![i];
        again.extend(next);
        self.branch(more, l.top, &again, l.exit, next);
        self.switch(l.exit)
    }

    /// Calls a routine of the module.
    pub(crate) fn call(&mut self, routine: Routine, values: &[Value]) {
        let known = self.routines.iter().find(|r| r.0 == routine).map(|r| r.1);
        let callee = known.unwrap_or_else(|| {
            let signature = self.b.import_signature(routine.signature());
            let name = UserExternalName::new(0, self.routines.len() as u32);
            let name = ExternalName::user(self.b.func.declare_imported_user_function(name));
            let callee = self.b.import_function(ExtFuncData { name, signature, colocated: true, patchable: false });
            self.routines.push((routine, callee));
            callee
        });
        self.b.ins().call(callee, values);
    }
}
