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

use super::verify::{Diagnostic, verify};
use super::{Index, MapArg, MapFn, Op, Program, ReduceKind, Region, Scalar, ScalarOp, Type, ValueId};
use crate::dtype::{DType, e4m3_to_f32, f32_to_e4m3};
use crate::extent::SymValues;
use half::{bf16, f16};
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

/// The elements of a tile in row-major order, or a top-k state.
#[derive(Clone, Debug)]
pub(crate) enum Data {
    F32(Vec<f32>),
    I32(Vec<i32>),
    Bool(Vec<bool>),
    Bf16(Vec<u16>),
    F16(Vec<u16>),
    E4m3(Vec<u8>),
    Topk(Topk),
}

/// One expression for whichever vector of elements the data holds; rewraps as the same kind of data.
macro_rules! rewrap {
    ($data:expr, $v:ident => $body:expr) => {
        match $data {
            Data::F32($v) => Data::F32($body),
            Data::I32($v) => Data::I32($body),
            Data::Bool($v) => Data::Bool($body),
            Data::Bf16($v) => Data::Bf16($body),
            Data::F16($v) => Data::F16($body),
            Data::E4m3($v) => Data::E4m3($body),
            Data::Topk(t) => Data::Topk(t.clone()),
        }
    };
}

impl Data {
    fn zeros(dtype: DType, n: usize) -> Data {
        match dtype {
            DType::F32 => Data::F32(vec![0.0; n]),
            DType::I32 => Data::I32(vec![0; n]),
            DType::Bool => Data::Bool(vec![false; n]),
            DType::Bf16 => Data::Bf16(vec![0; n]),
            DType::F16 => Data::F16(vec![0; n]),
            DType::E4m3 => Data::E4m3(vec![0; n]),
        }
    }

    fn splat(value: Scalar, n: usize) -> Data {
        match value {
            Scalar::F32(x) => Data::F32(vec![x; n]),
            Scalar::I32(x) => Data::I32(vec![x; n]),
            Scalar::Bool(x) => Data::Bool(vec![x; n]),
        }
    }

    /// What memory holds, element by element.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        match self {
            Data::F32(v) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Data::I32(v) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Data::Bool(v) => v.iter().map(|&x| x.into()).collect(),
            Data::Bf16(v) | Data::F16(v) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Data::E4m3(v) => v.clone(),
            Data::Topk(_) => Vec::new(),
        }
    }

    /// The tile that memory holds.
    pub(crate) fn from_bytes(dtype: DType, bytes: &[u8]) -> Data {
        let halves = || bytes.as_chunks::<2>().0.iter().map(|&b| u16::from_le_bytes(b)).collect();
        match dtype {
            DType::F32 => Data::F32(bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect()),
            DType::I32 => Data::I32(bytes.as_chunks::<4>().0.iter().map(|&b| i32::from_le_bytes(b)).collect()),
            DType::Bool => Data::Bool(bytes.iter().map(|&b| b != 0).collect()),
            DType::Bf16 => Data::Bf16(halves()),
            DType::F16 => Data::F16(halves()),
            DType::E4m3 => Data::E4m3(bytes.to_vec()),
        }
    }

    fn len(&self) -> usize {
        match self {
            Data::F32(v) => v.len(),
            Data::I32(v) => v.len(),
            Data::Bool(v) => v.len(),
            Data::Bf16(v) | Data::F16(v) => v.len(),
            Data::E4m3(v) => v.len(),
            Data::Topk(_) => 0,
        }
    }

    /// The elements at those positions.
    fn pick(&self, at: &[usize]) -> Data {
        rewrap!(self, v => at.iter().map(|&i| v[i]).collect())
    }

    /// Appends a part of data of the same kind.
    fn append(&mut self, from: &Data, part: Range<usize>) {
        match (self, from) {
            (Data::F32(a), Data::F32(b)) => a.extend_from_slice(&b[part]),
            (Data::I32(a), Data::I32(b)) => a.extend_from_slice(&b[part]),
            (Data::Bool(a), Data::Bool(b)) => a.extend_from_slice(&b[part]),
            (Data::Bf16(a), Data::Bf16(b)) | (Data::F16(a), Data::F16(b)) => a.extend_from_slice(&b[part]),
            (Data::E4m3(a), Data::E4m3(b)) => a.extend_from_slice(&b[part]),
            _ => {}
        }
    }

    /// As f32; only floats convert.
    fn floats(&self) -> Option<std::borrow::Cow<'_, [f32]>> {
        Some(match self {
            Data::F32(v) => v.as_slice().into(),
            Data::Bf16(v) => v.iter().map(|&x| bf16::from_bits(x).to_f32()).collect(),
            Data::F16(v) => v.iter().map(|&x| f16::from_bits(x).to_f32()).collect(),
            Data::E4m3(v) => {
                let table: [f32; 256] = std::array::from_fn(|c| e4m3_to_f32(c as u8));
                v.iter().map(|&x| table[usize::from(x)]).collect()
            }
            _ => return None,
        })
    }

    /// Conversion as [`ScalarOp::Cast`] defines it.
    fn cast(&self, to: DType) -> Option<Data> {
        if let (Data::I32(v), DType::F32) = (self, to) {
            return Some(Data::F32(v.iter().map(|&x| x as f32).collect()));
        }
        if matches!((self, to), (Data::I32(_), DType::I32) | (Data::Bool(_), DType::Bool)) {
            return Some(self.clone());
        }
        let x = self.floats()?;
        Some(match to {
            DType::F32 => Data::F32(x.into_owned()),
            DType::I32 => Data::I32(x.iter().map(|&x| x as i32).collect()),
            DType::Bool => Data::Bool(x.iter().map(|&x| x != 0.0).collect()),
            DType::Bf16 if matches!(self, Data::Bf16(_)) => self.clone(),
            DType::F16 if matches!(self, Data::F16(_)) => self.clone(),
            DType::E4m3 if matches!(self, Data::E4m3(_)) => self.clone(),
            DType::Bf16 => Data::Bf16(x.iter().map(|&x| bf16::from_f32(x).to_bits()).collect()),
            DType::F16 => Data::F16(x.iter().map(|&x| f16::from_f32(x).to_bits()).collect()),
            DType::E4m3 => Data::E4m3(x.iter().map(|&x| f32_to_e4m3(x)).collect()),
        })
    }
}

/// A streaming selection: for each row the candidates that may still win, in ascending order of number.
#[derive(Clone, Debug)]
pub(crate) struct Topk {
    k: usize,
    /// The next candidate number that may be offered.
    next: i64,
    rows: Vec<TopkRow>,
}

#[derive(Clone, Debug, Default)]
struct TopkRow {
    members: Vec<(f32, i32)>,
    /// Once more than `k` were offered: later candidates win only above this.
    threshold: Option<f32>,
}

impl TopkRow {
    /// Keeps the `k` winners, in ascending order of number.
    fn prune(&mut self, k: usize) {
        if self.members.len() > k {
            // No NaN gets here. The zeros are equal, so not `total_cmp`.
            let by_value = |a: &(f32, i32), b: &(f32, i32)| b.0.partial_cmp(&a.0).unwrap_or(std::cmp::Ordering::Equal);
            self.members.sort_unstable_by(|a, b| by_value(a, b).then(a.1.cmp(&b.1)));
            self.members.truncate(k);
            self.threshold = self.members.last().map(|m| m.0);
        }
        self.members.sort_unstable_by_key(|m| m.1);
    }
}

impl Topk {
    fn push(&mut self, values: &[f32], base: i32) -> Result<(), String> {
        let n = values.len() / self.rows.len().max(1);
        let end = i64::from(base) + n as i64;
        if i64::from(base) < self.next || end > i64::from(i32::MAX) + 1 {
            return Err(format!("top-k is offered candidates {base}..{end}, but the next in order is {}", self.next));
        }
        self.next = end;
        for (row, values) in self.rows.iter_mut().zip(values.chunks(n.max(1))) {
            for (j, &x) in values.iter().enumerate() {
                if x > f32::NEG_INFINITY && row.threshold.is_none_or(|t| x > t) {
                    row.members.push((x, base + j as i32));
                }
            }
            if row.members.len() >= 4 * self.k {
                row.prune(self.k);
            }
        }
        Ok(())
    }

    fn take(mut self) -> (Data, Data) {
        let (mut values, mut numbers) = (Vec::new(), Vec::new());
        for row in &mut self.rows {
            row.prune(self.k);
            let tail = self.k - row.members.len();
            values.extend(row.members.iter().map(|m| m.0).chain(std::iter::repeat_n(f32::NEG_INFINITY, tail)));
            numbers.extend(row.members.iter().map(|m| m.1).chain(std::iter::repeat_n(-1, tail)));
        }
        (Data::F32(values), Data::I32(numbers))
    }
}

/// A parameter bound to a buffer, its symbols evaluated.
struct Bound {
    name: String,
    dtype: DType,
    shape: Vec<i128>,
    strides: Vec<i128>,
    buffer: usize,
    base: i128,
}

/// Neighbouring elements of a tile that lie in the view: `count` from tile position `at`, the first at byte `addr`.
struct Run {
    at: usize,
    addr: i128,
    step: i128,
    count: usize,
}

impl Bound {
    /// The part of a tile that lies in the view. Dim 0 is `rows` if given; other dims start at `start`.
    fn runs(&self, start: &[i128], rows: Option<&[i32]>, shape: &[u32]) -> Vec<Run> {
        let rank = shape.len();
        // The innermost dim is walked as a run, unless rows choose it.
        let split = if rank == 0 || (rank == 1 && rows.is_some()) { rank } else { rank - 1 };
        let (mut lo, mut hi, mut inner, mut step, mut base) = (0, 1, 1, 0, self.base);
        if split < rank {
            inner = i128::from(shape[split]);
            step = self.strides[split];
            lo = start[split].saturating_neg().max(0);
            hi = self.shape[split].saturating_sub(start[split]).min(inner);
            base = base.saturating_add(start[split].saturating_add(lo).saturating_mul(step));
        }
        let outer: usize = shape[..split].iter().map(|&n| n as usize).product();
        let mut runs = Vec::new();
        'rows: for o in (0..outer).filter(|_| lo < hi) {
            let (mut addr, mut rest) = (base, o);
            for d in (0..split).rev() {
                let i = rest % shape[d] as usize;
                rest /= shape[d] as usize;
                let c = match rows {
                    Some(rows) if d == 0 => i128::from(rows[i]),
                    _ => start[d].saturating_add(i as i128),
                };
                if c < 0 || c >= self.shape[d] {
                    continue 'rows;
                }
                addr = addr.saturating_add(c.saturating_mul(self.strides[d]));
            }
            runs.push(Run { at: o * inner as usize + lo as usize, addr, step, count: (hi - lo) as usize });
        }
        runs
    }

    /// View coordinates of the element at a tile position.
    fn coordinates(&self, start: &[i128], rows: Option<&[i32]>, shape: &[u32], mut at: usize) -> Vec<i128> {
        let mut index = vec![0; shape.len()];
        for d in (0..shape.len()).rev() {
            let i = at % shape[d] as usize;
            at /= shape[d] as usize;
            index[d] = match rows {
                Some(rows) if d == 0 => i128::from(rows[i]),
                _ => start[d].saturating_add(i as i128),
            };
        }
        index
    }
}

/// Which blocks touched each byte of each buffer: 0 none, n block n-1, [`MANY`] several.
struct Races {
    readers: Vec<Vec<u32>>,
    writers: Vec<Vec<u32>>,
}

const MANY: u32 = u32::MAX;

impl Races {
    /// Records an access; the block (number + 1) it conflicts with, if any.
    fn touch(&mut self, buffer: usize, byte: usize, block: u32, write: bool) -> Option<u32> {
        let (reader, writer) = (&mut self.readers[buffer][byte], &mut self.writers[buffer][byte]);
        let foreign = |b: u32| (b != 0 && b != block).then_some(b);
        if write {
            let clash = foreign(*writer).or(foreign(*reader));
            *writer = block;
            return clash;
        }
        *reader = if *reader == 0 || *reader == block { block } else { MANY };
        foreign(*writer)
    }
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

impl Run {
    /// Byte of element `e`; the run was checked to lie in its buffer.
    fn byte(&self, e: usize) -> usize {
        (self.addr + self.step * e as i128) as usize
    }

    fn read<T, const N: usize>(&self, memory: &[u8], tile: &mut [T], decode: impl Fn([u8; N]) -> T) {
        let tile = &mut tile[self.at..self.at + self.count];
        if self.step == N as i128 {
            let (first, end) = (self.byte(0), self.byte(self.count));
            for (x, code) in tile.iter_mut().zip(memory[first..end].as_chunks::<N>().0) {
                *x = decode(*code);
            }
            return;
        }
        for (e, x) in tile.iter_mut().enumerate() {
            if let Some(code) = memory[self.byte(e)..].first_chunk() {
                *x = decode(*code);
            }
        }
    }

    fn write<T: Copy, const N: usize>(&self, memory: &mut [u8], tile: &[T], encode: impl Fn(T) -> [u8; N]) {
        for (e, &x) in tile[self.at..self.at + self.count].iter().enumerate() {
            let at = self.byte(e);
            memory[at..at + N].copy_from_slice(&encode(x));
        }
    }
}

fn elements(shape: &[u32]) -> usize {
    shape.iter().map(|&n| n as usize).product()
}

fn iota(axis: usize, shape: &[u32]) -> Vec<i32> {
    let inner = elements(&shape[axis + 1..]);
    (0..elements(shape)).map(|i| (i / inner % shape[axis] as usize) as i32).collect()
}

/// Distances between neighbours of a row-major tile, in elements.
fn row_major(shape: &[u32]) -> Vec<usize> {
    (0..shape.len()).map(|d| elements(&shape[d + 1..])).collect()
}

/// Positions `base + Σ i_d * strides_d` in row-major order of `i`.
fn strided(shape: &[u32], strides: &[usize], base: usize) -> Vec<usize> {
    let mut at = vec![base];
    for (&n, &stride) in shape.iter().zip(strides) {
        at = at.iter().flat_map(|&p| (0..n as usize).map(move |i| p + i * stride)).collect();
    }
    at
}

/// Sum of products in f64. Eight partial sums, so that it vectorises; the order is fixed.
fn inner_product(a: &[f32], b: &[f32]) -> f64 {
    let mut lanes = [0.0f64; 8];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    for (a, b) in a.iter().zip(b) {
        for (lane, (&x, &y)) in lanes.iter_mut().zip(a.iter().zip(b)) {
            *lane += f64::from(x) * f64::from(y);
        }
    }
    let rest: f64 = a_rest.iter().zip(b_rest).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum();
    lanes.iter().sum::<f64>() + rest
}

/// Folds lines of `n` elements at distance `inner`; gives the last state, or every state if `running`.
fn fold<T: Copy, A: Copy>(
    v: &[T],
    (n, inner, running): (usize, usize, bool),
    first: impl Fn(T) -> A,
    next: impl Fn(A, T) -> A,
    last: impl Fn(A) -> T,
) -> Vec<T> {
    let mut out = Vec::with_capacity(if running { v.len() } else { v.len() / n });
    for outer in v.chunks_exact(n * inner) {
        let mut state: Vec<A> = outer[..inner].iter().map(|&x| first(x)).collect();
        if running {
            out.extend(state.iter().map(|&a| last(a)));
        }
        for line in outer[inner..].chunks_exact(inner) {
            for (a, &x) in state.iter_mut().zip(line) {
                *a = next(*a, x);
            }
            if running {
                out.extend(state.iter().map(|&a| last(a)));
            }
        }
        if !running {
            out.extend(state.iter().map(|&a| last(a)));
        }
    }
    out
}

fn max(a: f32, b: f32) -> f32 {
    if a.is_nan() || a >= b { a } else { b }
}

fn min(a: f32, b: f32) -> f32 {
    if a.is_nan() || a <= b { a } else { b }
}

/// `f` over two vectors, of one length or of length one.
fn zip<A: Copy, B: Copy, R>(a: &[A], b: &[B], f: impl Fn(A, B) -> R) -> Vec<R> {
    match (a, b) {
        (&[a], _) => b.iter().map(|&b| f(a, b)).collect(),
        (_, &[b]) => a.iter().map(|&a| f(a, b)).collect(),
        _ => a.iter().zip(b).map(|(&a, &b)| f(a, b)).collect(),
    }
}

/// `f` over three vectors, of one length or of length one.
fn zip3<A: Copy, B: Copy, C: Copy, R>(a: &[A], b: &[B], c: &[C], f: impl Fn(A, B, C) -> R) -> Vec<R> {
    let n = a.len().max(b.len()).max(c.len());
    let (sa, sb, sc) = (usize::from(a.len() > 1), usize::from(b.len() > 1), usize::from(c.len() > 1));
    (0..n).map(|i| f(a[i * sa], b[i * sb], c[i * sc])).collect()
}

/// Evaluates a map's body over whole vectors; inputs have one length or are single elements. None if types do not agree.
pub(crate) fn eval_map(body: &MapFn, inputs: &[Rc<Data>]) -> Option<Rc<Data>> {
    let mut done: Vec<Rc<Data>> = Vec::with_capacity(body.insts.len());
    let arg = |done: &[Rc<Data>], a: MapArg| match a {
        MapArg::Input(i) => inputs.get(i as usize).cloned(),
        MapArg::Inst(i) => done.get(i as usize).cloned(),
    };
    for inst in &body.insts {
        let args = inst.args.iter().map(|&a| arg(&done, a)).collect::<Option<Vec<_>>>()?;
        let value = match args.as_slice() {
            [] => nullary(inst.op),
            [a] => unary(inst.op, a),
            [a, b] => binary(inst.op, a, b),
            [a, b, c] => ternary(inst.op, a, b, c),
            _ => None,
        };
        done.push(Rc::new(value?));
    }
    arg(&done, body.result)
}

fn nullary(op: ScalarOp) -> Option<Data> {
    match op {
        ScalarOp::Const(value) => Some(Data::splat(value, 1)),
        _ => None,
    }
}

fn unary(op: ScalarOp, a: &Data) -> Option<Data> {
    use Data::{F32, I32};
    let float = |a: &[f32], f: fn(f32) -> f32| Some(F32(a.iter().map(|&x| f(x)).collect()));
    match (op, a) {
        (ScalarOp::Neg, F32(a)) => Some(F32(a.iter().map(|&x| -x).collect())),
        (ScalarOp::Neg, I32(a)) => Some(I32(a.iter().map(|&x| x.wrapping_neg()).collect())),
        (ScalarOp::Abs, F32(a)) => float(a, f32::abs),
        (ScalarOp::Sqrt, F32(a)) => float(a, f32::sqrt),
        (ScalarOp::Exp2, F32(a)) => float(a, |x| f64::from(x).exp2() as f32),
        (ScalarOp::Cast(to), a) => a.cast(to),
        (ScalarOp::Bitcast(DType::I32), F32(a)) => Some(I32(a.iter().map(|&x| x.to_bits() as i32).collect())),
        (ScalarOp::Bitcast(DType::F32), I32(a)) => Some(F32(a.iter().map(|&x| f32::from_bits(x as u32)).collect())),
        (ScalarOp::Bitcast(DType::F32), F32(_)) | (ScalarOp::Bitcast(DType::I32), I32(_)) => Some(a.clone()),
        _ => None,
    }
}

fn binary(op: ScalarOp, a: &Data, b: &Data) -> Option<Data> {
    use ScalarOp::*;
    Some(match (a, b) {
        (Data::F32(a), Data::F32(b)) => match op {
            Add => Data::F32(zip(a, b, |a, b| a + b)),
            Sub => Data::F32(zip(a, b, |a, b| a - b)),
            Mul => Data::F32(zip(a, b, |a, b| a * b)),
            Div => Data::F32(zip(a, b, |a, b| a / b)),
            Min => Data::F32(zip(a, b, min)),
            Max => Data::F32(zip(a, b, max)),
            Lt => Data::Bool(zip(a, b, |a, b| a < b)),
            Le => Data::Bool(zip(a, b, |a, b| a <= b)),
            Eq => Data::Bool(zip(a, b, |a, b| a == b)),
            _ => return None,
        },
        (Data::I32(a), Data::I32(b)) => match op {
            Lt => Data::Bool(zip(a, b, |a, b| a < b)),
            Le => Data::Bool(zip(a, b, |a, b| a <= b)),
            Eq => Data::Bool(zip(a, b, |a, b| a == b)),
            _ => Data::I32(zip(a, b, integer_op(op)?)),
        },
        (Data::Bool(a), Data::Bool(b)) => match op {
            And => Data::Bool(zip(a, b, |a, b| a & b)),
            Or => Data::Bool(zip(a, b, |a, b| a | b)),
            Xor => Data::Bool(zip(a, b, |a, b| a ^ b)),
            _ => return None,
        },
        _ => return None,
    })
}

fn integer_op(op: ScalarOp) -> Option<fn(i32, i32) -> i32> {
    Some(match op {
        ScalarOp::Add => i32::wrapping_add,
        ScalarOp::Sub => i32::wrapping_sub,
        ScalarOp::Mul => i32::wrapping_mul,
        // The verifier has seen to positive divisors.
        ScalarOp::Div => |a, b| a.checked_div(b).unwrap_or(0),
        ScalarOp::Rem => |a, b| a.checked_rem(b).unwrap_or(0),
        ScalarOp::Min => i32::min,
        ScalarOp::Max => i32::max,
        ScalarOp::And => |a, b| a & b,
        ScalarOp::Or => |a, b| a | b,
        ScalarOp::Xor => |a, b| a ^ b,
        ScalarOp::Shl => |a, b| a.wrapping_shl(b as u32),
        ScalarOp::Shr => |a, b| (a as u32).wrapping_shr(b as u32) as i32,
        _ => return None,
    })
}

fn ternary(op: ScalarOp, a: &Data, b: &Data, c: &Data) -> Option<Data> {
    use Data::{Bf16, Bool, E4m3, F16, F32, I32};
    fn select<T: Copy>(a: &[bool], b: &[T], c: &[T]) -> Vec<T> {
        zip3(a, b, c, |a, b, c| if a { b } else { c })
    }
    Some(match (op, a, b, c) {
        (ScalarOp::Fma, F32(a), F32(b), F32(c)) => F32(zip3(a, b, c, f32::mul_add)),
        (ScalarOp::Select, Bool(a), F32(b), F32(c)) => F32(select(a, b, c)),
        (ScalarOp::Select, Bool(a), I32(b), I32(c)) => I32(select(a, b, c)),
        (ScalarOp::Select, Bool(a), Bool(b), Bool(c)) => Bool(select(a, b, c)),
        (ScalarOp::Select, Bool(a), Bf16(b), Bf16(c)) => Bf16(select(a, b, c)),
        (ScalarOp::Select, Bool(a), F16(b), F16(c)) => F16(select(a, b, c)),
        (ScalarOp::Select, Bool(a), E4m3(b), E4m3(c)) => E4m3(select(a, b, c)),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Sym;
    use crate::tile::{Access, Builder};

    fn bytes(x: &[f32]) -> Vec<u8> {
        x.iter().flat_map(|x| x.to_le_bytes()).collect()
    }

    fn floats(x: &[u8]) -> Vec<f32> {
        x.as_chunks::<4>().0.iter().map(|&x| f32::from_le_bytes(x)).collect()
    }

    fn one_each(n: usize) -> Vec<Binding> {
        (0..n).map(|buffer| Binding { buffer, offset: 0 }).collect()
    }

    /// One block: loads each input tile whole and stores what `body` makes of them, as f32.
    fn eval(inputs: &[(&[u32], &[f32])], body: impl FnOnce(&mut Builder, &[ValueId]) -> ValueId) -> Vec<f32> {
        let mut b = Builder::new("test");
        let views: Vec<ValueId> = inputs
            .iter()
            .enumerate()
            .map(|(i, (shape, _))| {
                let shape: Vec<_> = shape.iter().map(|&n| n.into()).collect();
                b.param(&format!("x{i}"), DType::F32, &shape, Access::Read)
            })
            .collect();
        b.grid(1, 1);
        let load = |b: &mut Builder, (v, i): (&ValueId, &(&[u32], &[f32]))| b.load(*v, &vec![0.into(); i.0.len()], i.0);
        let tiles: Vec<ValueId> = views.iter().zip(inputs).map(|pair| load(&mut b, pair)).collect();
        let out = body(&mut b, &tiles);
        let out = match b.dtype(out) {
            DType::Bool => b.map(&[out], |m, v| {
                let (one, zero) = (m.f32(1.0), m.f32(0.0));
                m.select(v[0], one, zero)
            }),
            _ => b.cast(out, DType::F32),
        };
        let shape = b.shape(out);
        let extents: Vec<_> = shape.iter().map(|&n| n.into()).collect();
        let y = b.param("y", DType::F32, &extents, Access::Write);
        b.store(y, &vec![0.into(); shape.len()], out);
        let mut buffers: Vec<Vec<u8>> = inputs.iter().map(|(_, x)| bytes(x)).collect();
        buffers.push(vec![0; elements(&shape) * 4]);
        let n = buffers.len();
        run(&b.finish().unwrap(), &SymValues::default(), &mut buffers, &one_each(n)).unwrap();
        floats(&buffers[n - 1])
    }

    fn ramp(n: usize) -> Vec<f32> {
        (0..n).map(|i| i as f32).collect()
    }

    #[test]
    fn map_broadcasts_scalars_and_unit_axes() {
        let out = eval(&[(&[2, 1], &[10., 20.]), (&[1, 3], &[1., 2., 3.])], |b, v| {
            let s = b.full(100.0, &[]);
            b.map(&[v[0], v[1], s], |m, v| {
                let t = m.add(v[0], v[1]);
                m.add(t, v[2])
            })
        });
        assert_eq!(out, [111., 112., 113., 121., 122., 123.]);
    }

    #[test]
    fn arithmetic_on_edges() {
        let nan = f32::NAN;
        let x: (&[u32], &[f32]) = (&[4], &[1.0, nan, -2.5, f32::NEG_INFINITY]);
        let y: (&[u32], &[f32]) = (&[4], &[nan, 1.0, 0.5, 3.0]);
        let max = eval(&[x, y], |b, v| b.map(v, |m, v| m.max(v[0], v[1])));
        assert!(max[0].is_nan() && max[1].is_nan());
        assert_eq!(max[2..], [0.5, 3.0]);
        let less = eval(&[x, y], |b, v| b.map(v, |m, v| m.lt(v[0], v[1])));
        assert_eq!(less, [0., 0., 1., 1.]);
        let exp = eval(&[x], |b, v| b.map(v, |m, v| m.exp2(v[0])));
        assert_eq!((exp[0], exp[3]), (2.0, 0.0));
        let int = eval(&[x], |b, v| {
            b.map(v, |m, v| {
                let (i, two) = (m.cast(v[0], DType::I32), m.i32(2));
                let q = m.div(i, two);
                m.cast(q, DType::F32)
            })
        });
        assert_eq!(int, [0., 0., -1., (i32::MIN / 2) as f32]);
    }

    #[test]
    fn integers_wrap_and_shift() {
        let out = eval(&[(&[1], &[0.0])], |b, _| {
            let x = b.full_i32(i32::MAX, &[1]);
            b.map(&[x], |m, v| {
                let one = m.i32(1);
                let wrapped = m.add(v[0], one);
                let n = m.i32(28);
                m.shr(wrapped, n)
            })
        });
        assert_eq!(out, [8.0]);
    }

    #[test]
    fn casts_round_to_nearest_even() {
        let x: (&[u32], &[f32]) = (&[3], &[257.0 / 256.0, 1000.0, 0.3]);
        let through = |to| eval(&[x], move |b, v| b.cast(v[0], to));
        assert_eq!(through(DType::E4m3), [1.0, 448.0, 0.312_5]);
        assert_eq!(through(DType::Bf16)[0], 1.0);
        assert_eq!(through(DType::F16)[0], 257.0 / 256.0);
    }

    #[test]
    fn reductions_and_scans() {
        let x: (&[u32], &[f32]) = (&[2, 3], &[1., 2., 3., -4., f32::NAN, 6.]);
        assert_eq!(eval(&[x], |b, v| b.reduce(v[0], 1, ReduceKind::Sum))[0], 6.0);
        let max = eval(&[x], |b, v| b.reduce(v[0], 0, ReduceKind::Max));
        assert_eq!((max[0], max[1].is_nan(), max[2]), (1.0, true, 6.0));
        assert_eq!(eval(&[x], |b, v| b.scan(v[0], 1, ReduceKind::Sum))[..3], [1., 3., 6.]);
        let down = eval(&[x], |b, v| b.scan(v[0], 0, ReduceKind::Sum));
        assert_eq!((down[3], down[4].is_nan(), down[5]), (-3.0, true, 9.0));
    }

    #[test]
    fn a_sum_is_rounded_once() {
        let x: (&[u32], &[f32]) = (&[1, 4], &[1e8, 1.0, -1e8, 1.0]);
        assert_eq!(eval(&[x], |b, v| b.reduce(v[0], 1, ReduceKind::Sum)), [2.0]);
        let ones: (&[u32], &[f32]) = (&[1, 4], &[1.0; 4]);
        assert_eq!(eval(&[x, ones], |b, v| b.dot_t(v[0], v[1], None)), [2.0]);
    }

    #[test]
    fn dots() {
        let (a, b) = (ramp(6), ramp(12));
        let plain = eval(&[(&[2, 3], &a), (&[3, 4], &b)], |b, v| b.dot(v[0], v[1], None));
        assert_eq!(plain, [20., 23., 26., 29., 56., 68., 80., 92.]);
        let transposed = eval(&[(&[2, 3], &a), (&[3, 4], &b)], |b, v| {
            let (t, acc) = (b.permute(v[1], &[1, 0]), b.full(1.0, &[2, 4]));
            let t = b.cast(t, DType::Bf16);
            b.dot_t(v[0], t, Some(acc))
        });
        assert_eq!(transposed, [21., 24., 27., 30., 57., 69., 81., 93.]);
    }

    #[test]
    fn shapes_move_elements() {
        let x = ramp(6);
        let x: (&[u32], &[f32]) = (&[2, 3], &x);
        assert_eq!(eval(&[x], |b, v| b.permute(v[0], &[1, 0])), [0., 3., 1., 4., 2., 5.]);
        assert_eq!(eval(&[x], |b, v| b.slice(v[0], &[0, 1], &[2, 2])), [1., 2., 4., 5.]);
        assert_eq!(eval(&[x], |b, v| b.reshape(v[0], &[3, 2])), ramp(6));
        assert_eq!(eval(&[x], |b, _| b.iota(1, &[2, 3])), [0., 1., 2., 0., 1., 2.]);
        let joined = eval(&[x], |b, v| {
            let column = b.slice(v[0], &[0, 0], &[2, 1]);
            b.concat(&[column, v[0]], 1)
        });
        assert_eq!(joined, [0., 0., 1., 2., 3., 3., 4., 5.]);
    }

    #[test]
    fn topk_keeps_the_largest_and_lowest_numbers() {
        let x: (&[u32], &[f32]) = (&[1, 8], &[3., f32::NAN, 7., 3., f32::NEG_INFINITY, 3., -0.0, 0.0]);
        let numbers = |k: u32, step: u32| {
            eval(&[x], |b, v| {
                let mut state = b.topk_init(1, k);
                for at in (0..8).step_by(step as usize) {
                    let (part, base) = (b.slice(v[0], &[0, at], &[1, step]), b.full_i32(at as i32, &[]));
                    state = b.topk_push(state, part, base);
                }
                b.topk_take(state).1
            })
        };
        for step in [1, 2, 8] {
            assert_eq!(numbers(1, step), [2.]);
            assert_eq!(numbers(3, step), [0., 2., 3.]);
            assert_eq!(numbers(5, step), [0., 2., 3., 5., 6.], "the zeros are equal: the lower number wins");
            assert_eq!(numbers(8, step), [0., 2., 3., 5., 6., 7., -1., -1.]);
        }
    }

    #[test]
    fn topk_contract_and_loops() {
        let mut b = Builder::new("streaming");
        let x = b.param("x", DType::F32, &[1.into(), Sym::C.into()], Access::Read);
        let y = b.param("y", DType::I32, &[1.into(), 2.into()], Access::Write);
        b.grid(1, 1);
        let (state, n) = (b.topk_init(1, 2), b.sym(Sym::C));
        let state = b.for_(0, n, 4, &[state], |b, i, carried| {
            let (tile, index) = (b.load(x, &[0.into(), i.into()], &[1, 4]), b.iota(1, &[1, 4]));
            let masked = b.map(&[tile, index, i, n], |m, v| {
                let (at, low) = (m.add(v[1], v[2]), m.f32(f32::NEG_INFINITY));
                let inside = m.lt(at, v[3]);
                m.select(inside, v[0], low)
            });
            vec![b.topk_push(carried[0], masked, i)]
        })[0];
        let (_, numbers) = b.topk_take(state);
        b.store(y, &[0.into(), 0.into()], numbers);
        let program = b.finish().unwrap();
        let mut buffers = [bytes(&[-5., -1., -2., -9., -3., -1.]), vec![0; 8]];
        run(&program, &SymValues::default().with(Sym::C, 6), &mut buffers, &one_each(2)).unwrap();
        assert_eq!(buffers[1], [1, 0, 0, 0, 5, 0, 0, 0]);

        let mut b = Builder::new("descending");
        b.grid(1, 1);
        let (state, values) = (b.topk_init(1, 2), b.full(0.0, &[1, 4]));
        let (four, zero) = (b.full_i32(4, &[]), b.full_i32(0, &[]));
        let state = b.topk_push(state, values, four);
        let state = b.topk_push(state, values, zero);
        b.topk_take(state);
        let error = run(&b.finish().unwrap(), &SymValues::default(), &mut [], &[]).unwrap_err();
        assert!(matches!(error, InterpError::Contract { .. }), "{error}");
    }

    /// `y[rows] = x[rows]` with rows from memory, one block for each two rows; C elements in x.
    fn copy_rows() -> Program {
        let mut b = Builder::new("copy_rows");
        let x = b.param("x", DType::F32, &[Sym::C.into(), 2.into()], Access::Read);
        let r = b.param("rows", DType::I32, &[Sym::T.into()], Access::Read);
        let y = b.param("y", DType::F32, &[Sym::C.into(), 2.into()], Access::Write);
        let block = b.grid(Sym::T, 2);
        let start = b.map(&[block], |m, v| {
            let two = m.i32(2);
            m.mul(v[0], two)
        });
        let rows = b.load(r, &[start.into()], &[2]);
        let tile = b.gather(x, rows, &[0.into()], &[2, 2]);
        b.scatter(y, rows, &[0.into()], tile);
        b.finish().unwrap()
    }

    fn ints(x: &[i32]) -> Vec<u8> {
        x.iter().flat_map(|x| x.to_le_bytes()).collect()
    }

    #[test]
    fn gather_and_scatter_mask_rows_outside() {
        let syms = SymValues::default().with(Sym::C, 3).with(Sym::T, 4);
        let mut buffers = [bytes(&ramp(6)), ints(&[2, -1, 3, 1]), vec![0; 24]];
        run(&copy_rows(), &syms, &mut buffers, &one_each(3)).unwrap();
        assert_eq!(floats(&buffers[2]), [0., 0., 2., 3., 4., 5.]);
    }

    #[test]
    fn races_are_found() {
        let program = copy_rows();
        let syms = SymValues::default().with(Sym::C, 3).with(Sym::T, 4);
        let check = |rows: &[i32; 4], bindings: &[Binding]| {
            let mut buffers = [bytes(&ramp(6)), ints(rows), vec![0; 24]];
            run_blocks(&program, &syms, &mut buffers, bindings, 0..2, Options { check_races: true })
        };
        assert_eq!(check(&[0, 7, 1, 2], &one_each(3)), Ok(()));
        for rows in [[0, 0, 1, 2], [0, 1, 2, 1]] {
            assert!(matches!(check(&rows, &one_each(3)), Err(InterpError::Race { .. })), "{rows:?}");
        }
        // In place: each block reads only what it writes; shifted by a row it reads what the other writes.
        let at = |buffer, offset| Binding { buffer, offset };
        assert_eq!(check(&[0, 7, 1, 2], &[at(0, 0), at(1, 0), at(0, 0)]), Ok(()));
        let shifted = check(&[0, 7, 1, 9], &[at(0, 8), at(1, 0), at(0, 0)]);
        assert!(matches!(shifted, Err(InterpError::Race { .. })), "{shifted:?}");
    }

    #[test]
    fn leaving_the_buffer_is_an_error_and_leaving_the_view_is_not() {
        let mut b = Builder::new("shift");
        let x = b.param("x", DType::F32, &[4.into()], Access::Read);
        let y = b.param("y", DType::F32, &[4.into()], Access::Write);
        b.grid(1, 1);
        let tile = b.load(x, &[(-2).into()], &[5]);
        b.store(y, &[1.into()], tile);
        let program = b.finish().unwrap();
        let mut buffers = [bytes(&[1., 2., 3., 4.]), bytes(&[9.; 4])];
        run(&program, &SymValues::default(), &mut buffers, &one_each(2)).unwrap();
        assert_eq!(floats(&buffers[1]), [9., 0., 0., 1.]);
        let error = run(&program, &SymValues::default(), &mut [vec![0; 16], vec![0; 10]], &one_each(2)).unwrap_err();
        assert_eq!(error.to_string(), "kernel shift: %y[2] is at byte 8 of a buffer of 10 bytes");
    }

    #[test]
    fn branches_and_carried_values() {
        for (n, want) in [(0, 5.0), (3, 8.0), (10, 0.0)] {
            let out = eval(&[(&[1], &[5.0])], |b, v| {
                let sum = b.for_(0, n, 1, &[v[0]], |b, _, carried| {
                    let one = b.full(1.0, &[1]);
                    vec![b.map(&[carried[0], one], |m, v| m.add(v[0], v[1]))]
                })[0];
                let scalar = b.reshape(sum, &[]);
                let small = b.map(&[scalar], |m, v| {
                    let ten = m.f32(10.0);
                    m.lt(v[0], ten)
                });
                b.if_(small, |_| vec![sum], |b| vec![b.full(0.0, &[1])])[0]
            });
            assert_eq!(out, [want]);
        }
    }
}
