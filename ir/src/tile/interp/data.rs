//! The elements of a tile, and arithmetic on all of them.

use super::super::{MapArg, MapFn, Scalar, ScalarOp};
use crate::dtype::{DType, e4m3_to_f32, f32_to_e4m3};
use half::{bf16, f16};
use std::ops::Range;
use std::rc::Rc;

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

pub(super) use rewrap;

impl Data {
    pub(super) fn zeros(dtype: DType, n: usize) -> Data {
        match dtype {
            DType::F32 => Data::F32(vec![0.0; n]),
            DType::I32 => Data::I32(vec![0; n]),
            DType::Bool => Data::Bool(vec![false; n]),
            DType::Bf16 => Data::Bf16(vec![0; n]),
            DType::F16 => Data::F16(vec![0; n]),
            DType::E4m3 => Data::E4m3(vec![0; n]),
        }
    }

    pub(super) fn splat(value: Scalar, n: usize) -> Data {
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

    pub(super) fn len(&self) -> usize {
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
    pub(super) fn pick(&self, at: &[usize]) -> Data {
        rewrap!(self, v => at.iter().map(|&i| v[i]).collect())
    }

    /// Appends a part of data of the same kind.
    pub(super) fn append(&mut self, from: &Data, part: Range<usize>) {
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
    pub(super) fn floats(&self) -> Option<std::borrow::Cow<'_, [f32]>> {
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
    pub(super) fn cast(&self, to: DType) -> Option<Data> {
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
    pub(super) k: usize,
    /// The next candidate number that may be offered.
    pub(super) next: i64,
    pub(super) rows: Vec<TopkRow>,
}

#[derive(Clone, Debug, Default)]
pub(super) struct TopkRow {
    pub(super) members: Vec<(f32, i32)>,
    /// Once more than `k` were offered: later candidates win only above this.
    pub(super) threshold: Option<f32>,
}

impl TopkRow {
    /// Keeps the `k` winners, in ascending order of number.
    pub(super) fn prune(&mut self, k: usize) {
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
    pub(super) fn push(&mut self, values: &[f32], base: i32) -> Result<(), String> {
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

    pub(super) fn take(mut self) -> (Data, Data) {
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

pub(super) fn elements(shape: &[u32]) -> usize {
    shape.iter().map(|&n| n as usize).product()
}

pub(super) fn iota(axis: usize, shape: &[u32]) -> Vec<i32> {
    let inner = elements(&shape[axis + 1..]);
    (0..elements(shape)).map(|i| (i / inner % shape[axis] as usize) as i32).collect()
}

/// Distances between neighbours of a row-major tile, in elements.
pub(super) fn row_major(shape: &[u32]) -> Vec<usize> {
    (0..shape.len()).map(|d| elements(&shape[d + 1..])).collect()
}

/// Positions `base + Σ i_d * strides_d` in row-major order of `i`.
pub(super) fn strided(shape: &[u32], strides: &[usize], base: usize) -> Vec<usize> {
    let mut at = vec![base];
    for (&n, &stride) in shape.iter().zip(strides) {
        at = at.iter().flat_map(|&p| (0..n as usize).map(move |i| p + i * stride)).collect();
    }
    at
}

/// Sum of products in f64. Eight partial sums, so that it vectorises; the order is fixed.
pub(super) fn inner_product(a: &[f32], b: &[f32]) -> f64 {
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
pub(super) fn fold<T: Copy, A: Copy>(
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

pub(super) fn max(a: f32, b: f32) -> f32 {
    if a.is_nan() || a >= b { a } else { b }
}

pub(super) fn min(a: f32, b: f32) -> f32 {
    if a.is_nan() || a <= b { a } else { b }
}

/// `f` over two vectors, of one length or of length one.
pub(super) fn zip<A: Copy, B: Copy, R>(a: &[A], b: &[B], f: impl Fn(A, B) -> R) -> Vec<R> {
    match (a, b) {
        (&[a], _) => b.iter().map(|&b| f(a, b)).collect(),
        (_, &[b]) => a.iter().map(|&a| f(a, b)).collect(),
        _ => a.iter().zip(b).map(|(&a, &b)| f(a, b)).collect(),
    }
}

/// `f` over three vectors, of one length or of length one.
pub(super) fn zip3<A: Copy, B: Copy, C: Copy, R>(a: &[A], b: &[B], c: &[C], f: impl Fn(A, B, C) -> R) -> Vec<R> {
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

pub(super) fn nullary(op: ScalarOp) -> Option<Data> {
    match op {
        ScalarOp::Const(value) => Some(Data::splat(value, 1)),
        _ => None,
    }
}

pub(super) fn unary(op: ScalarOp, a: &Data) -> Option<Data> {
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

pub(super) fn binary(op: ScalarOp, a: &Data, b: &Data) -> Option<Data> {
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

pub(super) fn integer_op(op: ScalarOp) -> Option<fn(i32, i32) -> i32> {
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

pub(super) fn ternary(op: ScalarOp, a: &Data, b: &Data, c: &Data) -> Option<Data> {
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
