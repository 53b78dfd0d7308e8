//! The reference interpreter of tile programs: the oracle that every kernel on every target is compared with.
//!
//! It executes a launch block by block, in order, axis 0 of the grid fastest. A tile is one vector of its elements; storage
//! types are kept as the codes that memory holds, so copies are exact to the bit (NaN payloads too), and decoded only by
//! casts and dots. A map is evaluated instruction by instruction over whole vectors.
//!
//! Where [`super::Op`] leaves freedom the interpreter takes the most exact choice: [`super::Op::Dot`], sums and running sums
//! accumulate in f64 and round to f32 once; `exp2` is computed in f64. Maxima and minima keep their first operand among equals
//! (`-0 = +0`). Shift counts are taken modulo 32. Top-k states check their contract: candidate numbers ascend.
//!
//! **Invariants.** Programs are verified before they run. A load or store is checked twice: against its view, where leaving is
//! legal and masked, and then against the bytes of the bound buffer, where leaving is [`InterpError::OutOfBuffer`].
//! With [`Options::check_races`] every byte remembers the blocks that touched it, so that a program which depends on
//! the order of blocks is an error on any input that shows it.
//!
//! **Cost.** One allocation an instruction, linear in the elements; races cost eight bytes of bookkeeping a buffer byte.

mod data;
mod memory;

pub(crate) use data::{Data, Topk, eval_map};

use super::verify::{Diagnostic, verify};
use super::{Index, MapFn, Op, Program, ReduceKind, Region, Type, ValueId};
use crate::extent::SymValues;
use data::{TopkRow, elements, fold, inner_product, iota, max, rewrap, row_major, strided};
use memory::{Bound, MANY, Races, Run};
use std::collections::HashSet;
use std::ops::Range;
use std::rc::Rc;

/// Where a parameter lives: element zero of its view (before the view's own offset) is at byte `offset` of that buffer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Binding {
    /// Index into the launch's buffers.
    pub buffer: usize,
    /// Byte offset, added to the view's.
    pub offset: usize,
}

/// How to run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Whether to fail when two blocks write one byte, when one block reads what another writes, or when one scatter has
    /// equal rows.
    pub check_races: bool,
}

/// Why a launch could not be executed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InterpError {
    /// The program breaks a rule of the IR.
    #[error("kernel {kernel} is not valid: {}", .diagnostics.iter().map(|d| d.to_string()).collect::<Vec<_>>().join("; "))]
    Invalid {
        /// The kernel's name.
        kernel: String,
        /// Everything that is wrong with it.
        diagnostics: Vec<Diagnostic>,
    },
    /// The launch does not fit the program: bindings, buffers or the block range.
    #[error("kernel {kernel}: {message}")]
    Launch {
        /// The kernel's name.
        kernel: String,
        /// What does not fit.
        message: String,
    },
    /// An access inside the view but outside the bound buffer.
    #[error("kernel {kernel}: %{param}{index:?} is at byte {byte} of a buffer of {buffer_bytes} bytes")]
    OutOfBuffer {
        /// The kernel's name.
        kernel: String,
        /// The parameter's name.
        param: String,
        /// Coordinates of the first element outside.
        index: Vec<i128>,
        /// Its first byte, from the start of the buffer.
        byte: i128,
        /// Bytes in the buffer.
        buffer_bytes: usize,
    },
    /// Two blocks (or two rows of one scatter) touch the same memory and at least one writes.
    #[error("kernel {kernel}: race on %{param}: {message}")]
    Race {
        /// The kernel's name.
        kernel: String,
        /// The parameter through which the second access came.
        param: String,
        /// Which byte and which blocks.
        message: String,
    },
    /// An operation's contract was broken by the values it met.
    #[error("kernel {kernel}: {message}")]
    Contract {
        /// The kernel's name.
        kernel: String,
        /// What was broken.
        message: String,
    },
}

/// Runs every block of a launch. `bindings` has one entry a parameter; several may name one buffer.
pub fn run(
    program: &Program,
    syms: &SymValues,
    buffers: &mut [Vec<u8>],
    bindings: &[Binding],
) -> Result<(), InterpError> {
    let blocks = 0..block_count(program, syms).unwrap_or(u64::MAX);
    run_blocks(program, syms, buffers, bindings, blocks, Options::default())
}

/// Blocks in a launch's grid; none if there are more than 2^64.
pub fn block_count(program: &Program, syms: &SymValues) -> Option<u64> {
    program.grid.iter().try_fold(1u64, |n, g| n.checked_mul(g.eval(syms)))
}

/// Runs the blocks of that range only, numbered with axis 0 of the grid fastest.
pub fn run_blocks(
    program: &Program,
    syms: &SymValues,
    buffers: &mut [Vec<u8>],
    bindings: &[Binding],
    blocks: Range<u64>,
    options: Options,
) -> Result<(), InterpError> {
    let diagnostics = verify(program);
    if !diagnostics.is_empty() {
        return Err(InterpError::Invalid { kernel: program.name.clone(), diagnostics });
    }
    let mut machine = Machine::new(program, *syms, buffers, bindings, options)?;
    let sizes: Vec<u64> = program.grid.iter().map(|g| g.eval(syms)).collect();
    if block_count(program, syms).is_none_or(|n| blocks.end > n) {
        return Err(machine.launch_error(format!("blocks {blocks:?} of a grid of {sizes:?}")));
    }
    for block in blocks {
        machine.enter_block(block, &sizes);
        machine.region(&program.body)?;
    }
    Ok(())
}

/// A memory access, its operands evaluated.
pub(crate) struct Access {
    param: usize,
    start: Vec<i128>,
    rows: Option<Rc<Data>>,
    shape: Vec<u32>,
}

/// Executes operations; values are in an environment by number.
pub(crate) struct Machine<'a> {
    program: &'a Program,
    syms: SymValues,
    params: Vec<Bound>,
    buffers: &'a mut [Vec<u8>],
    races: Option<Races>,
    env: Vec<Option<Rc<Data>>>,
    block: [i32; 3],
    block_number: u64,
}

impl<'a> Machine<'a> {
    pub(crate) fn new(
        program: &'a Program,
        syms: SymValues,
        buffers: &'a mut [Vec<u8>],
        bindings: &[Binding],
        options: Options,
    ) -> Result<Machine<'a>, InterpError> {
        let marks = |buffers: &[Vec<u8>]| buffers.iter().map(|b| vec![0; b.len()]).collect::<Vec<_>>();
        let races = options.check_races.then(|| Races { readers: marks(buffers), writers: marks(buffers) });
        let env = vec![None; program.types.len()];
        let mut machine =
            Machine { program, syms, params: Vec::new(), buffers, races, env, block: [0; 3], block_number: 0 };
        if bindings.len() != program.params.len() {
            let message = format!("{} bindings for {} parameters", bindings.len(), program.params.len());
            return Err(machine.launch_error(message));
        }
        for (param, binding) in program.params.iter().zip(bindings) {
            let Some(view) = program.view(param.value).filter(|_| binding.buffer < machine.buffers.len()) else {
                let message = format!("%{} is bound to buffer {}, which does not exist", param.name, binding.buffer);
                return Err(machine.launch_error(message));
            };
            let stride = |s: &super::Stride| i128::from(s.bytes) * s.sym.map_or(1, |sym| i128::from(syms.get(sym)));
            machine.params.push(Bound {
                name: param.name.clone(),
                dtype: view.dtype,
                shape: view.shape.iter().map(|e| i128::from(e.eval(&syms))).collect(),
                strides: view.strides.iter().map(stride).collect(),
                buffer: binding.buffer,
                base: i128::from(view.offset) + binding.offset as i128,
            });
        }
        Ok(machine)
    }

    fn launch_error(&self, message: String) -> InterpError {
        InterpError::Launch { kernel: self.program.name.clone(), message }
    }

    pub(crate) fn contract(&self, message: impl Into<String>) -> InterpError {
        InterpError::Contract { kernel: self.program.name.clone(), message: message.into() }
    }

    pub(crate) fn get(&self, v: ValueId) -> Result<Rc<Data>, InterpError> {
        let slot = self.env.get(v.0 as usize).and_then(Option::as_ref);
        slot.cloned().ok_or_else(|| self.contract(format!("%{} is used before it has a value", v.0)))
    }

    /// Like `get`, but moves a top-k state out: it is used once.
    pub(crate) fn get_once(&mut self, v: ValueId) -> Result<Rc<Data>, InterpError> {
        let data = self.get(v)?;
        if let (Data::Topk(_), Some(slot)) = (&*data, self.env.get_mut(v.0 as usize)) {
            *slot = None;
        }
        Ok(data)
    }

    /// All values there are, for others in their place.
    pub(crate) fn swapped(&mut self, values: Vec<Option<Rc<Data>>>) -> Vec<Option<Rc<Data>>> {
        std::mem::replace(&mut self.env, values)
    }

    pub(crate) fn set(&mut self, v: ValueId, data: Rc<Data>) {
        if let Some(slot) = self.env.get_mut(v.0 as usize) {
            *slot = Some(data);
        }
    }

    fn set_all(&mut self, vs: &[ValueId], data: Vec<Rc<Data>>) {
        for (&v, data) in vs.iter().zip(data) {
            self.set(v, data);
        }
    }

    fn scalar_i32(&self, v: ValueId) -> Result<i32, InterpError> {
        match &*self.get(v)? {
            Data::I32(x) if x.len() == 1 => Ok(x[0]),
            _ => Err(self.contract(format!("%{} is no i32 scalar", v.0))),
        }
    }

    pub(crate) fn index(&self, index: &Index) -> Result<i64, InterpError> {
        match index {
            Index::Const(c) => Ok(*c),
            Index::Value(v) => Ok(self.scalar_i32(*v)?.into()),
        }
    }

    fn shape(&self, v: ValueId) -> &'a [u32] {
        match self.program.types.get(v.0 as usize) {
            Some(Type::Tile(t)) => &t.shape,
            _ => &[],
        }
    }

    fn region(&mut self, region: &Region) -> Result<(), InterpError> {
        for inst in &region.insts {
            let results = match &inst.op {
                Op::For { lo, hi, step, init, body } => self.for_loop((lo, hi, *step), init, body)?,
                Op::If { cond, then, otherwise } => {
                    let taken = matches!(&*self.get(*cond)?, Data::Bool(b) if b.first() == Some(&true));
                    let arm = if taken { then } else { otherwise };
                    self.region(arm)?;
                    arm.yields.iter().map(|&v| self.get_once(v)).collect::<Result<_, _>>()?
                }
                op => self.results(op)?,
            };
            self.set_all(&inst.results, results);
        }
        Ok(())
    }

    /// Results of an operation without regions; its operands have values.
    pub(crate) fn results(&mut self, op: &Op) -> Result<Vec<Rc<Data>>, InterpError> {
        if let Op::TopkTake { state } = op {
            let state = Rc::unwrap_or_clone(self.get_once(*state)?);
            let Data::Topk(state) = state else { return Err(self.contract("top-k of a tile")) };
            let (values, numbers) = state.take();
            return Ok(vec![Rc::new(values), Rc::new(numbers)]);
        }
        Ok(self.op(op)?.into_iter().collect())
    }

    /// Which block the next operations are of.
    pub(crate) fn enter_block(&mut self, number: u64, sizes: &[u64]) {
        let mut rest = number;
        for (axis, &n) in sizes.iter().enumerate() {
            self.block[axis] = (rest % n.max(1)) as i32;
            rest /= n.max(1);
        }
        self.block_number = number;
    }

    fn for_loop(
        &mut self,
        (lo, hi, step): (&Index, &Index, u32),
        init: &[ValueId],
        body: &Region,
    ) -> Result<Vec<Rc<Data>>, InterpError> {
        let (lo, hi) = (self.index(lo)?, self.index(hi)?);
        let mut carried = init.iter().map(|&v| self.get_once(v)).collect::<Result<Vec<_>, _>>()?;
        let mut i = lo;
        while i < hi {
            let counter = i32::try_from(i).map_err(|_| self.contract(format!("loop counter {i} is no i32")))?;
            if let Some((&first, rest)) = body.args.split_first() {
                self.set(first, Rc::new(Data::I32(vec![counter])));
                self.set_all(rest, carried);
            }
            self.region(body)?;
            carried = body.yields.iter().map(|&v| self.get_once(v)).collect::<Result<_, _>>()?;
            i = i.saturating_add(i64::from(step.max(1)));
        }
        Ok(carried)
    }

    /// Operations without regions and with at most one result.
    fn op(&mut self, op: &Op) -> Result<Option<Rc<Data>>, InterpError> {
        let data = match op {
            Op::BlockId { axis } => Data::I32(vec![self.block.get(*axis as usize).copied().unwrap_or(0)]),
            Op::Sym(sym) => Data::I32(vec![self.syms.get(*sym) as i32]),
            Op::Full { value, shape } => Data::splat(*value, elements(shape)),
            Op::Iota { axis, shape } => Data::I32(iota(*axis as usize, shape)),
            Op::Load { view, index, shape } => self.load(self.access(*view, index, None, shape)?)?,
            Op::Gather { view, rows, index, shape } => self.load(self.access(*view, index, Some(*rows), shape)?)?,
            Op::Store { view, index, value } => {
                self.store(self.access(*view, index, None, self.shape(*value))?, *value)?;
                return Ok(None);
            }
            Op::Scatter { view, rows, index, value } => {
                self.store(self.access(*view, index, Some(*rows), self.shape(*value))?, *value)?;
                return Ok(None);
            }
            Op::Map { inputs, body } => return self.map(inputs, body).map(Some),
            Op::Reduce { x, axis, kind } => self.fold(*x, *axis as usize, *kind, false)?,
            Op::Scan { x, axis, kind } => self.fold(*x, *axis as usize, *kind, true)?,
            Op::Dot { a, b, acc, trans_b } => self.dot(*a, *b, *acc, *trans_b)?,
            Op::Reshape { x, .. } => return self.get(*x).map(Some),
            Op::Permute { x, perm } => {
                let (strides, shape) = (row_major(self.shape(*x)), self.shape(*x));
                let (shape, strides): (Vec<u32>, Vec<usize>) =
                    perm.iter().map(|&p| (shape[p as usize], strides[p as usize])).unzip();
                self.get(*x)?.pick(&strided(&shape, &strides, 0))
            }
            Op::Slice { x, offsets, shape } => {
                let strides = row_major(self.shape(*x));
                let base = offsets.iter().zip(&strides).map(|(&o, s)| o as usize * s).sum();
                self.get(*x)?.pick(&strided(shape, &strides, base))
            }
            Op::Concat { xs, axis } => self.concat(xs, *axis as usize)?,
            Op::TopkInit { rows, k } => {
                let rows = vec![TopkRow::default(); *rows as usize];
                Data::Topk(Topk { k: *k as usize, next: i64::MIN, rows })
            }
            Op::TopkPush { state, values, base } => return self.topk_push(*state, *values, *base).map(Some),
            Op::TopkTake { .. } | Op::For { .. } | Op::If { .. } => return Ok(None),
        };
        Ok(Some(Rc::new(data)))
    }

    fn topk_push(&mut self, state: ValueId, values: ValueId, base: ValueId) -> Result<Rc<Data>, InterpError> {
        let (mut state, values, base) = (self.get_once(state)?, self.get(values)?, self.scalar_i32(base)?);
        if let (Data::Topk(topk), Data::F32(values)) = (Rc::make_mut(&mut state), &*values) {
            topk.push(values, base).map_err(|e| self.contract(e))?;
        }
        Ok(state)
    }

    fn concat(&self, xs: &[ValueId], axis: usize) -> Result<Data, InterpError> {
        let parts = xs.iter().map(|&x| self.get(x)).collect::<Result<Vec<_>, _>>()?;
        let first = self.shape(xs[0]);
        let outer = elements(&first[..axis]);
        let mut out = rewrap!(&*parts[0], v => v[..0].to_vec());
        for o in 0..outer {
            for part in &parts {
                let n = part.len() / outer;
                out.append(part, o * n..(o + 1) * n);
            }
        }
        Ok(out)
    }

    fn map(&self, inputs: &[ValueId], body: &MapFn) -> Result<Rc<Data>, InterpError> {
        let rank = inputs.iter().map(|&v| self.shape(v).len()).max().unwrap_or(0);
        let mut shape = vec![1; rank];
        for &v in inputs {
            for (out, &n) in shape.iter_mut().zip(self.shape(v)) {
                *out = n.max(*out);
            }
        }
        let n = elements(&shape);
        let args = inputs.iter().map(|&v| self.expand(v, &shape)).collect::<Result<Vec<_>, _>>()?;
        let result = eval_map(body, &args).ok_or_else(|| self.contract("a map's types do not agree"))?;
        Ok(if result.len() == n { result } else { Rc::new(result.pick(&vec![0; n])) })
    }

    /// A map's input at the full shape, or as one element if it has only one.
    fn expand(&self, v: ValueId, shape: &[u32]) -> Result<Rc<Data>, InterpError> {
        let (data, own) = (self.get(v)?, self.shape(v));
        if data.len() == 1 || own == shape {
            return Ok(data);
        }
        let mut strides = row_major(own);
        for (stride, &n) in strides.iter_mut().zip(own) {
            *stride = if n == 1 { 0 } else { *stride };
        }
        Ok(Rc::new(data.pick(&strided(shape, &strides, 0))))
    }

    /// Reduce, or scan if `running`.
    fn fold(&self, x: ValueId, axis: usize, kind: ReduceKind, running: bool) -> Result<Data, InterpError> {
        let (data, shape) = (self.get(x)?, self.shape(x));
        let (n, inner) = (shape[axis] as usize, elements(&shape[axis + 1..]));
        let geometry = (n, inner, running);
        Ok(match (&*data, kind) {
            (Data::F32(v), ReduceKind::Sum) => {
                Data::F32(fold(v, geometry, f64::from, |a, x| a + f64::from(x), |a| a as f32))
            }
            (Data::F32(v), ReduceKind::Max) => Data::F32(fold(v, geometry, |x| x, max, |a| a)),
            (Data::I32(v), ReduceKind::Sum) => Data::I32(fold(v, geometry, |x| x, i32::wrapping_add, |a| a)),
            (Data::I32(v), ReduceKind::Max) => Data::I32(fold(v, geometry, |x| x, i32::max, |a| a)),
            _ => return Err(self.contract("reduction of a storage type")),
        })
    }

    fn dot(&self, a: ValueId, b: ValueId, acc: Option<ValueId>, trans_b: bool) -> Result<Data, InterpError> {
        let (k, n) = match (self.shape(b), trans_b) {
            ([n, k], true) | ([k, n], false) => (*k as usize, *n as usize),
            _ => return Err(self.contract("dot of other than matrices")),
        };
        let (a, b, acc) = (self.get(a)?, self.get(b)?, acc.map(|acc| self.get(acc)).transpose()?);
        let (Some(a), Some(b)) = (a.floats(), b.floats()) else { return Err(self.contract("dot of integers")) };
        let acc = acc.as_deref().and_then(Data::floats);
        let mut out = Vec::with_capacity(a.len() / k * n);
        for (i, row) in a.chunks_exact(k).enumerate() {
            let mut sums: Vec<f64> = match &acc {
                Some(acc) => acc[i * n..(i + 1) * n].iter().map(|&x| x.into()).collect(),
                None => vec![0.0; n],
            };
            if trans_b {
                for (sum, column) in sums.iter_mut().zip(b.chunks_exact(k)) {
                    *sum += inner_product(row, column);
                }
            } else {
                for (&x, line) in row.iter().zip(b.chunks_exact(n)) {
                    for (sum, &y) in sums.iter_mut().zip(line) {
                        *sum += f64::from(x) * f64::from(y);
                    }
                }
            }
            out.extend(sums.iter().map(|&x| x as f32));
        }
        Ok(Data::F32(out))
    }

    pub(crate) fn access(
        &self,
        view: ValueId,
        index: &[Index],
        rows: Option<ValueId>,
        shape: &[u32],
    ) -> Result<Access, InterpError> {
        let param = self.program.params.iter().position(|p| p.value == view);
        let param = param.ok_or_else(|| self.contract(format!("%{} is no parameter", view.0)))?;
        let mut start = if rows.is_some() { vec![0] } else { vec![] };
        for i in index {
            start.push(self.index(i)?.into());
        }
        Ok(Access { param, start, rows: rows.map(|r| self.get(r)).transpose()?, shape: shape.to_vec() })
    }

    /// The runs of an access, each with its first byte, checked against the buffer and against races.
    fn runs(&mut self, access: &Access, write: bool) -> Result<Vec<Run>, InterpError> {
        let rows = match access.rows.as_deref() {
            Some(Data::I32(rows)) => Some(rows.as_slice()),
            _ => None,
        };
        let bound = &self.params[access.param];
        let kernel = || self.program.name.clone();
        let buffer_bytes = self.buffers[bound.buffer].len();
        let bytes = bound.dtype.bytes();
        let inside = |addr: i128| addr >= 0 && addr.saturating_add(bytes as i128) <= buffer_bytes as i128;
        let runs = bound.runs(&access.start, rows, &access.shape);
        for run in &runs {
            let address = |e: usize| run.addr.saturating_add(run.step.saturating_mul(e as i128));
            if !inside(run.addr) || !inside(address(run.count - 1)) {
                let e = (0..run.count).find(|&e| !inside(address(e))).unwrap_or(0);
                let index = bound.coordinates(&access.start, rows, &access.shape, run.at + e);
                let (param, byte) = (bound.name.clone(), address(e));
                return Err(InterpError::OutOfBuffer { kernel: kernel(), param, index, byte, buffer_bytes });
            }
            let Some(races) = &mut self.races else { continue };
            let block = self.block_number.min(u64::from(MANY) - 2) as u32 + 1;
            for byte in (0..run.count).flat_map(|e| address(e) as usize..address(e) as usize + bytes) {
                if let Some(other) = races.touch(bound.buffer, byte, block, write) {
                    let other = if other == MANY { "several".into() } else { format!("block {}", other - 1) };
                    let verb = if write { "writes" } else { "reads" };
                    let message = format!("block {} {verb} byte {byte}, which {other} touched", block - 1);
                    return Err(InterpError::Race { kernel: kernel(), param: bound.name.clone(), message });
                }
            }
        }
        if let (Some(_), Some(rows), true) = (&self.races, rows, write) {
            let mut seen = HashSet::new();
            let twice = rows.iter().find(|&&r| r >= 0 && i128::from(r) < bound.shape[0] && !seen.insert(r));
            if let Some(row) = twice {
                let message = format!("row {row} is scattered to twice");
                return Err(InterpError::Race { kernel: kernel(), param: bound.name.clone(), message });
            }
        }
        Ok(runs)
    }

    pub(crate) fn load(&mut self, access: Access) -> Result<Data, InterpError> {
        let runs = self.runs(&access, false)?;
        let bound = &self.params[access.param];
        let memory = &self.buffers[bound.buffer];
        let mut data = Data::zeros(bound.dtype, elements(&access.shape));
        for run in &runs {
            match &mut data {
                Data::F32(v) => run.read(memory, v, f32::from_le_bytes),
                Data::I32(v) => run.read(memory, v, i32::from_le_bytes),
                Data::Bf16(v) | Data::F16(v) => run.read(memory, v, u16::from_le_bytes),
                Data::E4m3(v) => run.read(memory, v, u8::from_le_bytes),
                Data::Bool(_) | Data::Topk(_) => {}
            }
        }
        Ok(data)
    }

    fn store(&mut self, access: Access, value: ValueId) -> Result<(), InterpError> {
        let (runs, data) = (self.runs(&access, true)?, self.get(value)?);
        let memory = &mut self.buffers[self.params[access.param].buffer];
        for run in &runs {
            match &*data {
                Data::F32(v) => run.write(memory, v, f32::to_le_bytes),
                Data::I32(v) => run.write(memory, v, i32::to_le_bytes),
                Data::Bf16(v) | Data::F16(v) => run.write(memory, v, u16::to_le_bytes),
                Data::E4m3(v) => run.write(memory, v, u8::to_le_bytes),
                Data::Bool(_) | Data::Topk(_) => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
