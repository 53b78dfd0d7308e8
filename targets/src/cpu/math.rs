//! Scalar operations of a map, on one element or on four.
//!
//! How an element is held in a register, by type: f32 as f32; i32 as i32; the storage types as their code, zero-extended to
//! 32 bits; bool as 0 or 1 in 8 bits when alone and as 0 or −1 in 32 bits when in a vector. [`Lanes`] says which.
//!
//! Rounding follows `dsc_ir::dtype`, bit for bit. No sequence here puts an f32 denormal into a multiplier for inputs that
//! are normal: on x86 each would trap to microcode. So [`exp2`] gives zero below 2^-126.

use super::emit::Fun;
use cranelift_codegen::ir::condcodes::{FloatCC, IntCC};
use cranelift_codegen::ir::{InstBuilder, Type, Value, types};
use dsc_ir::DType;
use dsc_ir::tile::{MapArg, MapFn, Scalar, ScalarOp};

/// Added to a number below 2^22, it leaves the nearest integer in the low bits.
pub(crate) const EXP2_MAGIC: f32 = 12_582_912.0;

/// `(2^t - 1) / t`, interpolated at Chebyshev nodes of [-1/2, 1/2]: relative error 9.2e-9 before rounding. The constant term of
/// `2^t` is one, so that 2^0 is exact.
pub(crate) const EXP2: [f32; 6] =
    [std::f32::consts::LN_2, 0.240_226_5, 0.055_503_57, 0.009_618_083, 0.001_339_086_3, 0.000_154_531_63];

/// One element, or a vector of four.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lanes {
    One,
    Four,
}

impl Lanes {
    /// The register type of an element type.
    pub(crate) fn ty(self, dtype: DType) -> Type {
        match (self, dtype) {
            (Lanes::One, DType::F32) => types::F32,
            (Lanes::One, DType::Bool) => types::I8,
            (Lanes::One, _) => types::I32,
            (Lanes::Four, DType::F32) => types::F32X4,
            (Lanes::Four, _) => types::I32X4,
        }
    }

    fn int(self) -> Type {
        self.ty(DType::I32)
    }

    fn float(self) -> Type {
        self.ty(DType::F32)
    }
}

/// The types of a body's instructions, and of its result. The body is well-typed: `dsc_ir` has verified it.
pub(crate) fn inst_types(body: &MapFn, inputs: &[DType]) -> (Vec<DType>, DType) {
    let mut types: Vec<DType> = Vec::with_capacity(body.insts.len());
    let of = |types: &[DType], a: &MapArg| match *a {
        MapArg::Input(i) => inputs[i as usize],
        MapArg::Inst(i) => types[i as usize],
    };
    for inst in &body.insts {
        types.push(match inst.op {
            ScalarOp::Const(c) => c.dtype(),
            ScalarOp::Lt | ScalarOp::Le | ScalarOp::Eq => DType::Bool,
            ScalarOp::Cast(to) | ScalarOp::Bitcast(to) => to,
            ScalarOp::Select => of(&types, &inst.args[1]),
            _ => of(&types, &inst.args[0]),
        });
    }
    let result = of(&types, &body.result);
    (types, result)
}

/// The emitter of maps at one width.
pub(crate) struct Math<'f, 'a> {
    pub(crate) f: &'f mut Fun<'a>,
    pub(crate) lanes: Lanes,
}

/// A constant as an element.
pub(crate) fn scalar_const(f: &mut Fun, value: Scalar) -> Value {
    match value {
        Scalar::F32(x) => f.f32(x),
        Scalar::I32(x) => f.i32(x),
        Scalar::Bool(x) => f.b.ins().iconst(types::I8, i64::from(x)),
    }
}

/// One element in all four lanes.
pub(crate) fn splat(f: &mut Fun, dtype: DType, v: Value) -> Value {
    match dtype {
        DType::F32 => f.b.ins().splat(types::F32X4, v),
        DType::Bool => {
            let mask = f.b.ins().bmask(types::I32, v);
            f.b.ins().splat(types::I32X4, mask)
        }
        _ => f.b.ins().splat(types::I32X4, v),
    }
}

impl Math<'_, '_> {
    /// The result of a map's body; `types` are those of its instructions.
    pub(crate) fn map(&mut self, body: &MapFn, types: &[DType], input_types: &[DType], inputs: &[Value]) -> Value {
        let mut values: Vec<Value> = Vec::with_capacity(body.insts.len());
        for inst in &body.insts {
            let get = |a: &MapArg| match *a {
                MapArg::Input(i) => (inputs[i as usize], input_types[i as usize]),
                MapArg::Inst(i) => (values[i as usize], types[i as usize]),
            };
            let args: Vec<(Value, DType)> = inst.args.iter().map(get).collect();
            let value = match (inst.op, &inst.args[..]) {
                (ScalarOp::Div | ScalarOp::Rem, [_, MapArg::Inst(i)]) if args[0].1 == DType::I32 => {
                    let ScalarOp::Const(Scalar::I32(divisor)) = body.insts[*i as usize].op else {
                        unreachable!("`infer` accepts constant divisors only")
                    };
                    self.divide(args[0].0, divisor, inst.op == ScalarOp::Rem)
                }
                _ => self.op(inst.op, &args),
            };
            values.push(value);
        }
        match body.result {
            MapArg::Input(i) => inputs[i as usize],
            MapArg::Inst(i) => values[i as usize],
        }
    }

    fn constant(&mut self, value: Scalar) -> Value {
        match (self.lanes, value) {
            (Lanes::One, value) => scalar_const(self.f, value),
            (Lanes::Four, Scalar::F32(x)) => self.float(x),
            (Lanes::Four, Scalar::I32(x)) => self.int(x),
            (Lanes::Four, Scalar::Bool(x)) => self.int(-i32::from(x)),
        }
    }

    fn int(&mut self, x: i32) -> Value {
        match self.lanes {
            Lanes::One => self.f.i32(x),
            Lanes::Four => self.f.i32x4([x; 4]),
        }
    }

    fn float(&mut self, x: f32) -> Value {
        match self.lanes {
            Lanes::One => self.f.f32(x),
            Lanes::Four => {
                let bits = self.f.i32x4([x.to_bits() as i32; 4]);
                self.f.cast_bits(types::F32X4, bits)
            }
        }
    }

    fn bits(&mut self, v: Value) -> Value {
        let ty = self.lanes.int();
        self.f.cast_bits(ty, v)
    }

    fn as_float(&mut self, v: Value) -> Value {
        let ty = self.lanes.float();
        self.f.cast_bits(ty, v)
    }

    fn fcmp(&mut self, cc: FloatCC, a: Value, b: Value) -> Value {
        self.f.b.ins().fcmp(cc, a, b)
    }

    fn icmp(&mut self, cc: IntCC, a: Value, b: Value) -> Value {
        self.f.b.ins().icmp(cc, a, b)
    }

    /// `c ? a : b`, `c` a truth value of this width.
    pub(crate) fn select(&mut self, c: Value, a: Value, b: Value) -> Value {
        if self.lanes == Lanes::One {
            return self.f.b.ins().select(c, a, b);
        }
        let ty = self.f.b.func.dfg.value_type(a);
        let (a, b) = (self.bits(a), self.bits(b));
        let v = self.f.b.ins().blendv(c, a, b);
        self.f.cast_bits(ty, v)
    }

    fn and(&mut self, a: Value, mask: i32) -> Value {
        let mask = self.int(mask);
        self.f.b.ins().band(a, mask)
    }

    fn add(&mut self, a: Value, c: i32) -> Value {
        let c = self.int(c);
        self.f.b.ins().iadd(a, c)
    }

    fn shl(&mut self, a: Value, by: i64) -> Value {
        self.f.b.ins().ishl_imm_u(a, by)
    }

    fn shr(&mut self, a: Value, by: i64) -> Value {
        self.f.b.ins().ushr_imm_u(a, by)
    }

    fn op(&mut self, op: ScalarOp, args: &[(Value, DType)]) -> Value {
        let v = |i: usize| args[i].0;
        let dtype = args.first().map_or(DType::F32, |a| a.1);
        let float = dtype == DType::F32;
        match op {
            ScalarOp::Const(c) => self.constant(c),
            ScalarOp::Add if float => self.f.b.ins().fadd(v(0), v(1)),
            ScalarOp::Add => self.f.b.ins().iadd(v(0), v(1)),
            ScalarOp::Sub if float => self.f.b.ins().fsub(v(0), v(1)),
            ScalarOp::Sub => self.f.b.ins().isub(v(0), v(1)),
            ScalarOp::Mul if float => self.f.b.ins().fmul(v(0), v(1)),
            ScalarOp::Mul => self.f.b.ins().imul(v(0), v(1)),
            ScalarOp::Div | ScalarOp::Rem => self.f.b.ins().fdiv(v(0), v(1)),
            ScalarOp::Min => self.extreme(float, false, v(0), v(1)),
            ScalarOp::Max => self.extreme(float, true, v(0), v(1)),
            ScalarOp::Fma => self.f.b.ins().fma(v(0), v(1), v(2)),
            ScalarOp::Neg if float => self.f.b.ins().fneg(v(0)),
            ScalarOp::Neg => self.f.b.ins().ineg(v(0)),
            ScalarOp::Abs => self.f.b.ins().fabs(v(0)),
            ScalarOp::Sqrt => self.f.b.ins().sqrt(v(0)),
            ScalarOp::Exp2 => self.exp2(v(0)),
            ScalarOp::And => self.f.b.ins().band(v(0), v(1)),
            ScalarOp::Or => self.f.b.ins().bor(v(0), v(1)),
            ScalarOp::Xor => self.f.b.ins().bxor(v(0), v(1)),
            ScalarOp::Shl => self.shift(true, v(0), v(1)),
            ScalarOp::Shr => self.shift(false, v(0), v(1)),
            ScalarOp::Lt if float => self.fcmp(FloatCC::LessThan, v(0), v(1)),
            ScalarOp::Lt => self.icmp(IntCC::SignedLessThan, v(0), v(1)),
            ScalarOp::Le if float => self.fcmp(FloatCC::LessThanOrEqual, v(0), v(1)),
            ScalarOp::Le => self.icmp(IntCC::SignedLessThanOrEqual, v(0), v(1)),
            ScalarOp::Eq if float => self.fcmp(FloatCC::Equal, v(0), v(1)),
            ScalarOp::Eq => self.icmp(IntCC::Equal, v(0), v(1)),
            ScalarOp::Select => self.select(v(0), v(1), v(2)),
            ScalarOp::Cast(to) => self.convert(v(0), dtype, to),
            ScalarOp::Bitcast(DType::F32) => self.as_float(v(0)),
            ScalarOp::Bitcast(_) => self.bits(v(0)),
        }
    }

    /// Minimum or maximum where NaN wins: `minps`/`maxps` give their second operand if either is NaN, so only a NaN in the
    /// first has to be put back.
    pub(crate) fn extreme(&mut self, float: bool, max: bool, a: Value, b: Value) -> Value {
        if !float {
            let ins = self.f.b.ins();
            return if max { ins.smax(a, b) } else { ins.smin(a, b) };
        }
        let less = if max { self.fcmp(FloatCC::LessThan, b, a) } else { self.fcmp(FloatCC::LessThan, a, b) };
        let picked = match self.lanes {
            Lanes::One => self.f.b.ins().select(less, a, b),
            Lanes::Four => {
                let mask = self.f.cast_bits(types::F32X4, less);
                self.f.b.ins().bitselect(mask, a, b)
            }
        };
        let nan = self.fcmp(FloatCC::Unordered, a, a);
        self.select(nan, a, picked)
    }

    /// Shifts each lane by its own amount. x86 vectors shift by one amount for all unless AVX2's variable shifts are used,
    /// which Cranelift lacks: lanes are done one at a time. Constant amounts are rare in maps that are hot.
    fn shift(&mut self, left: bool, a: Value, by: Value) -> Value {
        let one = |f: &mut Fun, a: Value, by: Value| {
            if left { f.b.ins().ishl(a, by) } else { f.b.ins().ushr(a, by) }
        };
        if self.lanes == Lanes::One {
            return one(self.f, a, by);
        }
        self.lane_by_lane(a, by, one)
    }

    fn lane_by_lane(&mut self, a: Value, b: Value, mut one: impl FnMut(&mut Fun, Value, Value) -> Value) -> Value {
        let mut out = a;
        for lane in 0..4u8 {
            let (x, y) = (self.f.b.ins().extractlane(a, lane), self.f.b.ins().extractlane(b, lane));
            let z = one(self.f, x, y);
            out = self.f.b.ins().insertlane(out, z, lane);
        }
        out
    }

    /// i32 quotient or remainder by a positive constant, rounding towards zero.
    fn divide(&mut self, a: Value, divisor: i32, remainder: bool) -> Value {
        let quotient = if self.lanes == Lanes::Four && (divisor as u32).is_power_of_two() {
            let shift = i64::from(divisor.trailing_zeros());
            let sign = self.f.b.ins().sshr_imm_u(a, 31);
            let bias = self.and(sign, divisor - 1);
            let biased = self.f.b.ins().iadd(a, bias);
            self.f.b.ins().sshr_imm_u(biased, shift)
        } else if self.lanes == Lanes::Four {
            self.lane_by_lane(a, a, |f, x, _| {
                let d = f.i32(divisor);
                f.b.ins().sdiv(x, d)
            })
        } else {
            let d = self.int(divisor);
            self.f.b.ins().sdiv(a, d)
        };
        if !remainder {
            return quotient;
        }
        let d = self.int(divisor);
        let whole = self.f.b.ins().imul(quotient, d);
        self.f.b.ins().isub(a, whole)
    }

    /// `2^x = 2^n * 2^t` with `n` the nearest integer, found by adding 1.5 * 2^23, whose low bits then hold it; a polynomial
    /// of degree 6 on `t` in [-1/2, 1/2]; and `n` added to the exponent. Outside [-126, 128) the result is set.
    fn exp2(&mut self, x: Value) -> Value {
        let magic = self.float(EXP2_MAGIC);
        let shifted = self.f.b.ins().fadd(x, magic);
        let n = self.f.b.ins().fsub(shifted, magic);
        let t = self.f.b.ins().fsub(x, n);
        let mut p = self.float(EXP2[5]);
        for &c in EXP2[..5].iter().rev() {
            let c = self.float(c);
            p = self.f.b.ins().fma(p, t, c);
        }
        let one = self.float(1.0);
        p = self.f.b.ins().fma(p, t, one);
        let shifted = self.bits(shifted);
        let exponent = self.shl(shifted, 23);
        let p = self.bits(p);
        let scaled = self.f.b.ins().iadd(p, exponent);
        let scaled = self.as_float(scaled);
        let (low, high) = (self.float(-126.0), self.float(128.0));
        let (zero, infinity) = (self.float(0.0), self.float(f32::INFINITY));
        let inside = self.fcmp(FloatCC::LessThan, x, high);
        // Not below 128: infinity, or NaN if x is.
        let above = self.f.b.ins().fadd(x, infinity);
        let r = self.select(inside, scaled, above);
        let under = self.fcmp(FloatCC::LessThan, x, low);
        self.select(under, zero, r)
    }

    /// [`ScalarOp::Cast`].
    pub(crate) fn convert(&mut self, x: Value, from: DType, to: DType) -> Value {
        match (from, to) {
            _ if from == to => x,
            (DType::Bf16, DType::F32) => {
                let bits = self.shl(x, 16);
                self.as_float(bits)
            }
            (DType::F16, DType::F32) => self.f16_to_f32(x),
            (DType::E4m3, DType::F32) => self.e4m3_to_f32(x),
            (DType::I32, DType::F32) => {
                let ty = self.lanes.float();
                self.f.b.ins().fcvt_from_sint(ty, x)
            }
            (DType::F32, DType::Bf16) => self.f32_to_bf16(x),
            (DType::F32, DType::F16) => self.f32_to_f16(x),
            (DType::F32, DType::E4m3) => self.f32_to_e4m3(x),
            (DType::F32, DType::I32) => {
                let ty = self.lanes.int();
                self.f.b.ins().fcvt_to_sint_sat(ty, x)
            }
            (DType::F32, DType::Bool) => {
                let zero = self.float(0.0);
                self.fcmp(FloatCC::NotEqual, x, zero)
            }
            _ => unreachable!("`infer` accepts casts from and to f32 only, and none from bool"),
        }
    }

    /// Bits rounded to nearest even at `shift`, not yet shifted: `(bits + half - 1 + lowest kept bit) >> shift`.
    fn round_bits(&mut self, bits: Value, shift: i64) -> Value {
        let low = self.shr(bits, shift);
        let odd = self.and(low, 1);
        let up = self.add(bits, (1 << (shift - 1)) - 1);
        let sum = self.f.b.ins().iadd(up, odd);
        self.shr(sum, shift)
    }

    fn f32_to_bf16(&mut self, x: Value) -> Value {
        let bits = self.bits(x);
        let rounded = self.round_bits(bits, 16);
        let kept = self.shr(bits, 16);
        let quiet = self.int(0x40);
        let quiet = self.f.b.ins().bor(kept, quiet);
        let nan = self.fcmp(FloatCC::Unordered, x, x);
        self.select(nan, quiet, rounded)
    }

    fn f32_to_f16(&mut self, x: Value) -> Value {
        let bits = self.bits(x);
        let sign = self.shr(bits, 16);
        let sign = self.and(sign, 0x8000);
        let magnitude = self.and(bits, 0x7fff_ffff);
        // Normal: rebias by 112. A carry out of the mantissa is right; beyond 65504 it gives the code of infinity or more.
        let rounded = self.round_bits(magnitude, 13);
        let rebias = self.add(rounded, -(112 << 10));
        let infinite = self.int(0x7c00);
        let normal = self.f.b.ins().smin(rebias, infinite);
        // Below 2^-14: multiples of 2^-24, the ulp of 1/2.
        let half = self.float(0.5);
        let a = self.as_float(magnitude);
        let small = self.f.b.ins().fadd(a, half);
        let small = self.bits(small);
        let small = self.add(small, -(0.5f32.to_bits() as i32));
        let limit = self.float(6.103_515_6e-5);
        let is_small = self.fcmp(FloatCC::LessThan, a, limit);
        let code = self.select(is_small, small, normal);
        let payload = self.shr(magnitude, 13);
        let payload = self.and(payload, 0x3ff);
        let quiet = self.int(0x7e00);
        let quiet = self.f.b.ins().bor(payload, quiet);
        let nan = self.fcmp(FloatCC::Unordered, x, x);
        let code = self.select(nan, quiet, code);
        self.f.b.ins().bor(sign, code)
    }

    fn f16_to_f32(&mut self, h: Value) -> Value {
        let sign = self.and(h, 0x8000);
        let sign = self.shl(sign, 16);
        let magnitude = self.and(h, 0x7fff);
        let shifted = self.shl(magnitude, 13);
        let normal = self.add(shifted, 112 << 23);
        let infinite = self.add(shifted, 224 << 23);
        let limit = self.int(0x7bff);
        let is_infinite = self.icmp(IntCC::SignedGreaterThan, magnitude, limit);
        let normal = self.select(is_infinite, infinite, normal);
        let code = self.subnormal(magnitude, 0x400, 2f32.powi(-24), normal);
        let code = self.f.b.ins().bor(code, sign);
        self.as_float(code)
    }

    /// Bits of `code * ulp` where `code < first_normal`, else `normal`. The integer is converted, so nothing is denormal.
    fn subnormal(&mut self, code: Value, first_normal: i32, ulp: f32, normal: Value) -> Value {
        let ty = self.lanes.float();
        let small = self.f.b.ins().fcvt_from_sint(ty, code);
        let ulp = self.float(ulp);
        let small = self.f.b.ins().fmul(small, ulp);
        let small = self.bits(small);
        let limit = self.int(first_normal);
        let is_small = self.icmp(IntCC::SignedLessThan, code, limit);
        self.select(is_small, small, normal)
    }

    fn e4m3_to_f32(&mut self, c: Value) -> Value {
        let sign = self.and(c, 0x80);
        let sign = self.shl(sign, 24);
        let magnitude = self.and(c, 0x7f);
        let shifted = self.shl(magnitude, 20);
        let normal = self.add(shifted, 120 << 23);
        let code = self.subnormal(magnitude, 8, 2f32.powi(-9), normal);
        let nan_code = self.int(0x7f);
        let is_nan = self.icmp(IntCC::Equal, magnitude, nan_code);
        let nan = self.int(0x7fc0_0000);
        let code = self.select(is_nan, nan, code);
        let code = self.f.b.ins().bor(code, sign);
        self.as_float(code)
    }

    fn f32_to_e4m3(&mut self, x: Value) -> Value {
        let bits = self.bits(x);
        let sign = self.shr(bits, 24);
        let sign = self.and(sign, 0x80);
        let magnitude = self.and(bits, 0x7fff_ffff);
        // Finite or infinite magnitudes order like their bits; NaN is put back at the end.
        let most = self.int(448f32.to_bits() as i32);
        let magnitude = self.f.b.ins().smin(magnitude, most);
        let rounded = self.round_bits(magnitude, 20);
        let normal = self.add(rounded, -(120 << 3));
        let base = self.float(16384.0);
        let a = self.as_float(magnitude);
        let small = self.f.b.ins().fadd(a, base);
        let small = self.bits(small);
        let small = self.add(small, -(16384f32.to_bits() as i32));
        let limit = self.float(0.015_625);
        let is_small = self.fcmp(FloatCC::LessThan, a, limit);
        let code = self.select(is_small, small, normal);
        let nan_code = self.int(0x7f);
        let nan = self.fcmp(FloatCC::Unordered, x, x);
        let code = self.select(nan, nan_code, code);
        self.f.b.ins().bor(sign, code)
    }
}
