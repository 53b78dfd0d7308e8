//! e4m3: OCP codes in memory, and what the chip's instructions take.
//!
//! A FNUZ code means half of what the OCP code of the same bits does, except that 0x80 is NaN (OCP: −0) and 0x7f and 0xff are ±240 (OCP:
//! NaN). So an operand's −0 becomes 0, its NaN becomes 0x80, and a product of two converted operands is a fourth of the product.

use super::arch::Fp8;
use super::isa::{call, clamp};
use crate::gpu::mlir::{Fn, Ty, Val, f32, i32};

/// The largest e4m3.
const MOST: f32 = 448.0;

/// The f32 of an OCP code (I8), by integer and f16 arithmetic: exact, NaN and −0 included.
pub fn widen(f: &mut Fn, v: Val) -> Val {
    // The same exponent and mantissa bits in an f16 are 2^-8 of the value, also of subnormals.
    let wide = f.cast("zext", v, Ty::I32);
    let sign = f.bin("and", wide, i32(0x80));
    let sign = f.bin("shl", sign, i32(8));
    let rest = f.bin("and", wide, i32(0x7f));
    let shifted = f.bin("shl", rest, i32(7));
    let bits = f.bin("or", sign, shifted);
    let half = f.cast("trunc", bits, Ty::I16);
    let half = f.name(half);
    let half = f.op(&format!("llvm.bitcast {half} : i16 to f16"), Ty::I16);
    let half = f.name(half);
    let small = f.op(&format!("llvm.fpext {half} : f16 to f32"), Ty::F32);
    let value = f.bin("fmul", small, f32(256.0));
    let nan = f.cmp("eq", rest, i32(0x7f));
    f.select(nan, f32(f32::NAN), value)
}

/// The OCP code (I8) of an f32, rounded to even and saturating. With FNUZ instructions what rounds to −0 becomes 0.
pub fn narrow(f: &mut Fn, fp8: Fp8, v: Val) -> Val {
    let zero = i32(0);
    let convert =
        |f: &mut Fn, v: Val| call(f, "llvm.amdgcn.cvt.pk.fp8.f32", &[v, v, zero, Val::Int(0, Ty::I1)], Ty::I32);
    let word = match fp8 {
        Fp8::Ocp => {
            let v = clamp(f, v, MOST);
            convert(f, v)
        }
        Fp8::Fnuz => {
            let half = f.bin("fmul", v, f32(0.5));
            let half = clamp(f, half, MOST / 2.0);
            let code = convert(f, half);
            let nan = f.fcmp("une", v, v);
            f.select(nan, i32(0x7f), code)
        }
    };
    f.cast("trunc", word, Ty::I8)
}

/// Four OCP codes of a word as FNUZ codes that mean half as much.
pub fn to_fnuz(f: &mut Fn, word: Val) -> Val {
    const TOP: i64 = 0x8080_8080_u32 as i32 as i64;
    let size = f.bin("and", word, i32(0x7f7f_7f7f));
    // No byte carries into the next. Bit 7: the size is not 0; the size is 0x7f.
    let some = f.add(size, i32(0x7f7f_7f7f));
    let nan = f.add(size, i32(0x0101_0101));
    // One more is 0x80 where it is NaN, whatever its sign.
    let nan = f.bin("lshr", nan, i32(7));
    let one = f.bin("and", nan, i32(0x0101_0101));
    let code = f.add(size, one);
    let signs = f.bin("and", word, some);
    let signs = f.bin("and", signs, i32(TOP));
    f.bin("or", signs, code)
}

#[cfg(all(test, any(feature = "nvidia", feature = "emulate")))]
mod tests {
    use super::*;
    use crate::amd::arch::ARCHS;
    use crate::gpu::block::Threads;
    use crate::nvidia::arch;
    use crate::nvidia::lower::emulate::Machine;

    /// Integer arithmetic means the same everywhere, so any chip's emulator can run it.
    #[test]
    fn operands_keep_their_value() {
        assert!(ARCHS.iter().any(|a| a.fp8 == Fp8::Fnuz));
        let mut t = Threads::new(Fn::default(), &arch::ARCHS[0], 64);
        let byte = t.f.mul(t.tid, i32(4));
        let word = t.load_shared(byte, Ty::I32, 1)[0];
        let word = to_fnuz(&mut t.f, word);
        t.store_shared(byte, &[word]);
        t.f.raw("llvm.return");
        let mut m = Machine { shared: (0..=255).collect(), ..Machine::default() };
        m.run(t.f.text(), 64).unwrap_or_else(|e| panic!("{e}"));
        for (code, &got) in (0u8..=255).zip(&m.shared) {
            let expected = match code {
                0x7f | 0xff => 0x80,
                0x80 => 0,
                code => code,
            };
            assert_eq!(got, expected, "of {code:#x}");
        }
    }
}
