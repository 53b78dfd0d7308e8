//! Scalar arithmetic of maps.

use super::isa::{self, Isa};
use super::mlir::{Fn, Ty, Val, f32, i32};
use dsc_ir::DType;
use dsc_ir::tile::{MapArg, MapFn, MapInst, Scalar, ScalarOp};

/// A map's arithmetic on one element, given as it is stored ([`isa::stored`]), with its type.
pub fn apply(f: &mut Fn, arch: &dyn Isa, body: &MapFn, args: &[(Val, DType)]) -> (Val, DType) {
    let mut done: Vec<(Val, DType)> = Vec::with_capacity(body.insts.len());
    let arg = |done: &[(Val, DType)], a: &MapArg| match a {
        MapArg::Input(i) => args[*i as usize],
        MapArg::Inst(i) => done[*i as usize],
    };
    for inst in &body.insts {
        let a: Vec<(Val, DType)> = inst.args.iter().map(|a| arg(&done, a)).collect();
        let value = scalar(f, arch, inst.op, &a);
        done.push(value);
    }
    arg(&done, &body.result)
}

/// A map's arithmetic on several elements: `args` has those of each input. Neighbours that end rounded are rounded in pairs, where the chip
/// has that.
pub fn apply_each(f: &mut Fn, arch: &dyn Isa, body: &MapFn, args: &[Vec<(Val, DType)>], count: usize) -> Vec<Val> {
    let at = |n: usize| -> Vec<(Val, DType)> { args.iter().map(|a| a[n]).collect() };
    let last = match (body.insts.split_last(), body.result) {
        (Some((MapInst { op: ScalarOp::Cast(to), args }, before)), MapArg::Inst(i)) if i as usize == before.len() => {
            (arch.narrows_pairs(*to) && count.is_multiple_of(2)).then_some((*to, before, args[0]))
        }
        _ => None,
    };
    let Some((to, before, result)) = last else {
        return (0..count).map(|n| apply(f, arch, body, &at(n)).0).collect();
    };
    let before = MapFn { insts: before.to_vec(), result };
    let wide: Vec<(Val, DType)> = (0..count).map(|n| apply(f, arch, &before, &at(n))).collect();
    let pairs = wide.chunks(2).flat_map(|pair| match *pair {
        [(a, DType::F32), (b, DType::F32)] => arch.narrow_pair(f, [a, b], to).to_vec(),
        _ => pair.iter().map(|&(v, from)| cast(f, arch, v, from, to)).collect(),
    });
    pairs.collect()
}

/// Whether a map takes an input for nothing but its value in f32.
pub fn only_widens(body: &MapFn, input: u32) -> bool {
    let is = |a: &MapArg| *a == MapArg::Input(input);
    !is(&body.result) && body.insts.iter().all(|i| matches!(i.op, ScalarOp::Cast(DType::F32)) || !i.args.iter().any(is))
}

/// Whether [`apply_pairs`] takes a map of f32.
pub fn pairs(body: &MapFn) -> bool {
    let takes =
        |op: ScalarOp| matches!(op, ScalarOp::Add | ScalarOp::Sub | ScalarOp::Mul | ScalarOp::Const(Scalar::F32(_)));
    !body.insts.is_empty() && body.insts.iter().all(|i| takes(i.op))
}

/// As [`apply`], on two elements of f32 at once.
pub fn apply_pairs(f: &mut Fn, body: &MapFn, args: &[[Val; 2]]) -> [Val; 2] {
    const PAIR: &str = "vector<2xf32>";
    let pair = |f: &mut Fn, [a, b]: [Val; 2]| {
        let mut built = f.op(&format!("llvm.mlir.undef : {PAIR}"), Ty::F32);
        for (i, v) in [a, b].into_iter().enumerate() {
            let (v, i, before) = (f.name(v), f.name(i32(i as i64)), f.name(built));
            built = f.op(&format!("llvm.insertelement {v}, {before}[{i} : i32] : {PAIR}"), Ty::F32);
        }
        built
    };
    let tame = args.iter().flatten().all(|&a| f.is_tame(a));
    let args: Vec<Val> = args.iter().map(|&a| pair(f, a)).collect();
    let mut done: Vec<Val> = Vec::with_capacity(body.insts.len());
    let arg = |done: &[Val], a: &MapArg| match a {
        MapArg::Input(i) => args[*i as usize],
        MapArg::Inst(i) => done[*i as usize],
    };
    for inst in &body.insts {
        let name = match inst.op {
            ScalarOp::Add => "fadd",
            ScalarOp::Sub => "fsub",
            ScalarOp::Mul => "fmul",
            ScalarOp::Const(c) => {
                let c = constant(c);
                done.push(pair(f, [c, c]));
                continue;
            }
            op => unreachable!("{op:?} is not for pairs"),
        };
        let (a, b) = (arg(&done, &inst.args[0]), arg(&done, &inst.args[1]));
        let (a, b) = (f.name(a), f.name(b));
        done.push(f.op(&format!("llvm.{name} {a}, {b} : {PAIR}"), Ty::F32));
    }
    let result = arg(&done, &body.result);
    let result = f.name(result);
    [0, 1].map(|i| {
        let i = f.name(i32(i));
        let v = f.op(&format!("llvm.extractelement {result}[{i} : i32] : {PAIR}"), Ty::F32);
        if tame {
            f.set_tame(v);
        }
        v
    })
}

fn scalar(f: &mut Fn, arch: &dyn Isa, op: ScalarOp, a: &[(Val, DType)]) -> (Val, DType) {
    let dtype = a.first().map_or(DType::F32, |a| a.1);
    let float = dtype == DType::F32;
    let v = |i: usize| a[i].0;
    let same = |x: Val| (x, dtype);
    match op {
        ScalarOp::Const(c) => (constant(c), c.dtype()),
        ScalarOp::Add if float => same(f.bin("fadd", v(0), v(1))),
        ScalarOp::Add => same(f.add(v(0), v(1))),
        ScalarOp::Sub if float => same(f.bin("fsub", v(0), v(1))),
        ScalarOp::Sub => same(f.sub(v(0), v(1))),
        ScalarOp::Mul if float => same(f.bin("fmul", v(0), v(1))),
        ScalarOp::Mul => same(f.mul(v(0), v(1))),
        ScalarOp::Div if float => same(arch.divide(f, v(0), v(1))),
        ScalarOp::Div => same(f.bin("sdiv", v(0), v(1))),
        ScalarOp::Rem => same(f.bin("srem", v(0), v(1))),
        ScalarOp::Min if float => same(f.intrinsic("minimum", &[v(0), v(1)])),
        ScalarOp::Max if float => same(f.intrinsic("maximum", &[v(0), v(1)])),
        ScalarOp::Min => same(f.intrinsic("smin", &[v(0), v(1)])),
        ScalarOp::Max => same(f.intrinsic("smax", &[v(0), v(1)])),
        ScalarOp::Fma => same(f.intrinsic("fma", &[v(0), v(1), v(2)])),
        ScalarOp::Neg if float => {
            let name = f.name(v(0));
            same(f.op(&format!("llvm.fneg {name} : f32"), Ty::F32))
        }
        ScalarOp::Neg => same(f.sub(i32(0), v(0))),
        ScalarOp::Abs => same(f.intrinsic("fabs", &[v(0)])),
        ScalarOp::Sqrt => same(f.intrinsic("sqrt", &[v(0)])),
        ScalarOp::Exp2 => same(arch.exp2(f, v(0))),
        ScalarOp::And => same(f.bin("and", v(0), v(1))),
        ScalarOp::Or => same(f.bin("or", v(0), v(1))),
        ScalarOp::Xor => same(f.bin("xor", v(0), v(1))),
        ScalarOp::Shl => same(f.bin("shl", v(0), v(1))),
        ScalarOp::Shr => same(f.bin("lshr", v(0), v(1))),
        ScalarOp::Lt if float => (f.fcmp("olt", v(0), v(1)), DType::Bool),
        ScalarOp::Le if float => (f.fcmp("ole", v(0), v(1)), DType::Bool),
        ScalarOp::Eq if float => (f.fcmp("oeq", v(0), v(1)), DType::Bool),
        ScalarOp::Lt => (f.cmp("slt", v(0), v(1)), DType::Bool),
        ScalarOp::Le => (f.cmp("sle", v(0), v(1)), DType::Bool),
        ScalarOp::Eq => (f.cmp("eq", v(0), v(1)), DType::Bool),
        ScalarOp::Select => (f.select(v(0), v(1), v(2)), a[1].1),
        ScalarOp::Bitcast(to) => (f.cast("bitcast", v(0), isa::stored(to)), to),
        ScalarOp::Cast(to) => (cast(f, arch, v(0), dtype, to), to),
    }
}

/// A constant as a value.
pub fn constant(c: Scalar) -> Val {
    match c {
        Scalar::F32(x) => f32(x),
        Scalar::I32(x) => i32(x.into()),
        Scalar::Bool(x) => Val::Int(x.into(), Ty::I1),
    }
}

/// Converts between element types as [`ScalarOp::Cast`] says.
pub fn cast(f: &mut Fn, arch: &dyn Isa, v: Val, from: DType, to: DType) -> Val {
    if from == to {
        return v;
    }
    let wide = arch.widen(f, v, from);
    match (from, to) {
        (DType::Bool, DType::I32) => f.cast("zext", wide, Ty::I32),
        (DType::Bool, _) => {
            let x = f.select(wide, f32(1.0), f32(0.0));
            arch.narrow(f, x, to)
        }
        (DType::I32, DType::Bool) => f.cmp("ne", wide, i32(0)),
        (_, DType::Bool) => f.fcmp("une", wide, f32(0.0)),
        (DType::I32, _) => {
            let x = f.cast("sitofp", wide, Ty::F32);
            arch.narrow(f, x, to)
        }
        (_, DType::I32) => arch.truncate(f, wide),
        _ => arch.narrow(f, wide, to),
    }
}
