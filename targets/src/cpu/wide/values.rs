//! The values of an expression, one vector at a time: leaves, arithmetic, and conversions of number formats.

use super::*;

impl Gen<'_> {
    /// Evaluates the expression at the current vector; the register is the caller's.
    pub(super) fn value(&mut self) -> Option<u8> {
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
                let m = self.element(access, crate::cpu::tile::element_bytes(dtype))?;
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

    /// The same polynomial as [`crate::cpu::math`].
    fn exp2(&mut self, arg: usize) -> Option<u8> {
        let c = crate::cpu::math::EXP2;
        let x = self.arg(arg)?;
        let (shifted, t, p) = (self.reg()?, self.reg()?, self.reg()?);
        let magic = crate::cpu::math::EXP2_MAGIC.to_bits();
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
