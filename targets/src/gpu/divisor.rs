//! Numbers that divide integers of a program: what alignment is known by.

use dsc_ir::tile::{self, Index, MapArg, Scalar, ScalarOp};

/// More than any alignment that is asked for.
const MOST: i64 = 1 << 30;

/// A divisor of a constant.
pub fn of_constant(n: i64) -> i64 {
    if n == 0 { MOST } else { n.abs() }
}

/// A number that divides what integer arithmetic makes, from divisors of what it reads.
pub fn of(op: &tile::Op, known: &dyn Fn(Index) -> i64) -> i64 {
    match op {
        tile::Op::Full { value: Scalar::I32(n), .. } => of_constant((*n).into()),
        tile::Op::Reshape { x, .. } => known(Index::Value(*x)),
        tile::Op::Map { inputs, body } => {
            let mut made: Vec<i64> = Vec::new();
            let arg = |made: &[i64], a: &MapArg| match a {
                MapArg::Input(i) => known(Index::Value(inputs[*i as usize])),
                MapArg::Inst(i) => made[*i as usize],
            };
            for inst in &body.insts {
                let a: Vec<i64> = inst.args.iter().map(|a| arg(&made, a)).collect();
                made.push(match inst.op {
                    ScalarOp::Const(Scalar::I32(n)) => of_constant(n.into()),
                    ScalarOp::Add | ScalarOp::Sub => gcd(a[0], a[1]),
                    ScalarOp::Mul => a[0].saturating_mul(a[1]).min(MOST),
                    ScalarOp::Select => gcd(a[1], a[2]),
                    _ => 1,
                });
            }
            arg(&made, &body.result)
        }
        _ => 1,
    }
}

/// The greatest common divisor.
pub fn gcd(a: i64, b: i64) -> i64 {
    if b == 0 { a } else { gcd(b, a % b) }
}
