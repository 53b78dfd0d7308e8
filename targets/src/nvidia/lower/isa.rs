//! PTX instructions that the MLIR dialects do not have, or not in the form wanted.

use super::mma;
use crate::gpu::block::Threads;
use crate::gpu::emit::Emitter;
use crate::gpu::fragment::Spread;
use crate::gpu::isa::{Isa, Product};
use crate::gpu::mlir::{Fn, Ty, Val, f32, i32};
use crate::nvidia::arch::Arch;
use dsc_ir::DType;
use dsc_ir::sched::Atom;

pub use crate::gpu::isa::stored;

impl Isa for Arch {
    fn name(&self) -> &'static str {
        self.name
    }

    fn shared_per_block(&self) -> u32 {
        self.shared_per_block
    }

    fn matrix_atom(&self, dtype: DType, trans_b: bool) -> Option<Atom> {
        match dtype {
            DType::Bf16 | DType::F16 => Some(Atom::Mma16x8),
            DType::E4m3 => (self.has_fp8_mma && trans_b).then_some(Atom::Mma16x8),
            _ => None,
        }
    }

    fn early_bytes(&self, threads: u32) -> u32 {
        // Half of what a thread has, of 64 K registers, when its block is alone.
        match threads {
            0..=512 => 264,
            _ => 64,
        }
    }

    fn matrix_step(&self, dtype: DType) -> u32 {
        32 / dtype.bytes() as u32
    }

    fn product(&self, e: &mut Emitter, s: &Spread, p: &Product, acc: Vec<Val>) -> Vec<Val> {
        mma::product(e, s, p, acc)
    }

    fn thread(&self, f: &mut Fn) -> Val {
        sreg(f, "tid.x")
    }

    fn block(&self, f: &mut Fn, axis: usize) -> Val {
        sreg(f, ["ctaid.x", "ctaid.y", "ctaid.z"][axis])
    }

    fn barrier(&self, f: &mut Fn) {
        barrier(f);
    }

    fn barrier_any(&self, t: &mut Threads, c: Val) -> Val {
        barrier_any(&mut t.f, c)
    }

    fn shuffle_xor(&self, t: &mut Threads, v: Val, mask: u32) -> Val {
        shuffle_xor(&mut t.f, v, mask)
    }

    fn shuffle_up(&self, t: &mut Threads, v: Val, by: u32) -> Val {
        shuffle_up(&mut t.f, v, by)
    }

    fn shuffle_from(&self, t: &mut Threads, v: Val, lane: Val) -> Val {
        shuffle_from(&mut t.f, v, lane)
    }

    fn ballot(&self, t: &mut Threads, c: Val) -> Val {
        ballot(&mut t.f, c)
    }

    fn reduce_warp(&self, t: &mut Threads, how: &str, v: Val) -> Val {
        reduce_warp(&mut t.f, how, v)
    }

    fn leading_zeros(&self, f: &mut Fn, v: Val) -> Val {
        leading_zeros(f, v)
    }

    fn popcount(&self, f: &mut Fn, v: Val) -> Val {
        popcount(f, v)
    }

    fn shared_atomic_add(&self, f: &mut Fn, at: Val, v: Val) {
        shared_atomic_add(f, at, v);
    }

    fn store_global_if(&self, t: &mut Threads, c: Val, at: Val, words: &[Val]) {
        store_global_if(&mut t.f, c, at, words);
    }

    fn exp2(&self, f: &mut Fn, x: Val) -> Val {
        exp2(f, x)
    }

    fn divide(&self, f: &mut Fn, a: Val, b: Val) -> Val {
        if self.exact_division {
            return f.bin("fdiv", a, b);
        }
        f.asm("div.full.f32 $0, $1, $2;", "=f,f,f", &[a, b], &[Ty::F32], false, false)[0]
    }

    fn widen(&self, f: &mut Fn, v: Val, from: DType) -> Val {
        widen(f, self, v, from)
    }

    fn narrow(&self, f: &mut Fn, v: Val, to: DType) -> Val {
        narrow(f, self, v, to)
    }

    fn truncate(&self, f: &mut Fn, v: Val) -> Val {
        truncate(f, v)
    }

    fn spares_shared(&self) -> bool {
        true
    }

    fn widens_words(&self, from: DType) -> bool {
        from == DType::Bf16
    }

    fn widen_word(&self, f: &mut Fn, word: Val, from: DType) -> Option<Vec<Val>> {
        if from != DType::Bf16 {
            return None;
        }
        let halves = [f.bin("shl", word, i32(16)), f.bin("and", word, i32(-0x1_0000))];
        Some(halves.map(|bits| f.cast("bitcast", bits, Ty::F32)).to_vec())
    }

    fn narrows_pairs(&self, to: DType) -> bool {
        to == DType::Bf16 || to == DType::E4m3 && self.has_fp8_mma
    }

    fn narrow_pair(&self, f: &mut Fn, [a, b]: [Val; 2], to: DType) -> [Val; 2] {
        let (name, out, whole, each) = match to {
            DType::Bf16 => ("bf16x2", "=r", Ty::I32, Ty::I16),
            _ => ("satfinite.e4m3x2", "=h", Ty::I16, Ty::I8),
        };
        let pair =
            f.asm(&format!("cvt.rn.{name}.f32 $0, $2, $1;"), &format!("{out},f,f"), &[a, b], &[whole], false, false)[0];
        let upper = f.bin("lshr", pair, Val::Int(8 * i64::from(each.bytes()), whole));
        [pair, upper].map(|v| f.cast("trunc", v, each))
    }
}

/// A special register, such as `tid.x` or `ctaid.y`.
pub fn sreg(f: &mut Fn, name: &str) -> Val {
    f.op(&format!("nvvm.read.ptx.sreg.{name} : i32"), Ty::I32)
}

/// All threads of the block wait for one another.
pub fn barrier(f: &mut Fn) {
    f.raw("nvvm.barrier0");
}

/// Threads of barrier `id` (below 16), `threads` of them, wait for one another.
pub fn named_barrier(f: &mut Fn, id: u32, threads: u32) {
    f.asm(&format!("bar.sync {id}, {threads};"), "", &[], &[], true, true);
}

/// The value of the lane whose number differs in the bits of `mask`.
pub fn shuffle_xor(f: &mut Fn, v: Val, mask: u32) -> Val {
    shuffle(f, "bfly", v, i32(mask.into()), 31)
}

/// The value of the lane `by` below; a lane without one keeps its own.
pub fn shuffle_up(f: &mut Fn, v: Val, by: u32) -> Val {
    shuffle(f, "up", v, i32(by.into()), 0)
}

/// The same, and whether there is such a lane: what the exchange says is no comparison, and no truth value that lives from one exchange to the next.
pub fn shuffle_up_if(f: &mut Fn, v: Val, by: u32) -> (Val, Val) {
    let [mask, v, by, clamp] = [i32(-1), v, i32(by.into()), i32(0)].map(|v| f.name(v));
    let both = "!llvm.struct<(i32, i1)>";
    let text = format!("nvvm.shfl.sync up {mask}, {v}, {by}, {clamp} {{return_value_and_is_valid}} : i32 -> {both}");
    let got = f.op(&text, Ty::I32);
    let got = f.name(got);
    let [below, has] =
        [(0, Ty::I32), (1, Ty::I1)].map(|(i, ty)| f.op(&format!("llvm.extractvalue {got}[{i}] : {both}"), ty));
    (below, has)
}

/// The value of that lane.
pub fn shuffle_from(f: &mut Fn, v: Val, lane: Val) -> Val {
    shuffle(f, "idx", v, lane, 31)
}

/// All lanes of the warp take part, as in everything here that lanes do together. These are operations of the dialect because
/// LLVM knows of those, but not of inline assembly, that they must not be copied into the two sides of a branch.
fn shuffle(f: &mut Fn, how: &str, v: Val, from: Val, clamp: i64) -> Val {
    let ty = v.ty();
    let (mask, v, from, clamp) = (f.name(i32(-1)), f.name(v), f.name(from), f.name(i32(clamp)));
    f.op(&format!("nvvm.shfl.sync {how} {mask}, {v}, {from}, {clamp} : {0} -> {0}", ty.name()), ty)
}

/// The lanes for which a truth value holds, as bits.
pub fn ballot(f: &mut Fn, c: Val) -> Val {
    let (mask, c) = (f.name(i32(-1)), f.name(c));
    f.op(&format!("nvvm.vote.sync ballot {mask}, {c} -> i32"), Ty::I32)
}

/// The values of all lanes combined: `add`, `max`, `umin` or `umax` of i32. The assembler knows that the result is the same for all.
pub fn reduce_warp(f: &mut Fn, how: &str, v: Val) -> Val {
    let (v, mask) = (f.name(v), f.name(i32(-1)));
    f.op(&format!("nvvm.redux.sync {how} {v}, {mask} : i32 -> i32"), Ty::I32)
}

/// All threads of the block wait for one another; whether a truth value holds in any of them.
pub fn barrier_any(f: &mut Fn, c: Val) -> Val {
    let c = f.cast("zext", c, Ty::I32);
    let c = f.name(c);
    let any = f.op(&format!("nvvm.barrier #nvvm.reduction<or> {c} -> i32"), Ty::I32);
    f.cmp("ne", any, i32(0))
}

/// Zeros above the highest bit set: 32 if none is.
pub fn leading_zeros(f: &mut Fn, v: Val) -> Val {
    f.asm("clz.b32 $0, $1;", "=r,r", &[v], &[Ty::I32], false, false)[0]
}

/// Bits set.
pub fn popcount(f: &mut Fn, v: Val) -> Val {
    f.asm("popc.b32 $0, $1;", "=r,r", &[v], &[Ty::I32], false, false)[0]
}

/// Adds to a 32-bit word of shared memory (address in i32); what was there before.
pub fn shared_atomic_add(f: &mut Fn, at: Val, v: Val) -> Val {
    f.asm("atom.shared.add.u32 $0, [$1], $2;", "=r,r,r", &[at, v], &[Ty::I32], true, true)[0]
}

/// Lets the next launch start, whose blocks take what room there is, and waits until the launches before this one are done and what they
/// wrote is visible; in that order, or, if it is `late`, the other way round. Nothing touches global memory in front of it but
/// for symbols, which are there before a step's first launch.
pub fn launch_wait(f: &mut Fn, late: bool) {
    if late {
        await_launches(f);
    }
    launch_next(f);
    if !late {
        await_launches(f);
    }
}

/// Lets the next launch start.
pub fn launch_next(f: &mut Fn) {
    f.asm("griddepcontrol.launch_dependents;", "", &[], &[], true, true);
}

/// Waits until the launches before this one are done.
pub fn await_launches(f: &mut Fn) {
    f.asm("griddepcontrol.wait;", "", &[], &[], true, true);
}

/// Two words at an address of shared memory (in i32), of the block of that rank in the cluster.
pub fn load_cluster_pair(f: &mut Fn, at: Val, rank: Val) -> Vec<Val> {
    let text = "{\n.reg .b32 a;\nmapa.shared::cluster.u32 a, $2, $3;\nld.shared::cluster.v2.b32 {$0, $1}, [a];\n}";
    f.asm(text, "=r,=r,r,r", &[at, rank], &[Ty::I32; 2], true, true)
}

/// `2^x`, relative error at most 2^-22.
pub fn exp2(f: &mut Fn, x: Val) -> Val {
    f.asm("ex2.approx.ftz.f32 $0, $1;", "=f,f", &[x], &[Ty::F32], false, false)[0]
}

/// Two f32 as bf16 or f16, packed; the first is the low half.
pub fn pack(f: &mut Fn, to: DType, lo: Val, hi: Val) -> Val {
    let ty = if to == DType::Bf16 { "bf16x2" } else { "f16x2" };
    f.asm(&format!("cvt.rn.{ty}.f32 $0, $1, $2;"), "=r,f,f", &[hi, lo], &[Ty::I32], false, false)[0]
}

/// Writes neighbours (I32 words, one to four) where `c` holds.
pub fn store_global_if(f: &mut Fn, c: Val, at: Val, words: &[Val]) {
    if c.int() == Some(0) {
        return;
    }
    let c = f.cast("zext", c, Ty::I32);
    let (n, ty, class) = (words.len(), words[0].ty(), class_of(words[0].ty()));
    let bits = ty.bytes() * 8;
    let vector = if n > 1 { format!(".v{n}") } else { String::new() };
    let list: Vec<String> = (0..n).map(|i| format!("${}", i + 2)).collect();
    let list = if n > 1 { format!("{{{}}}", list.join(", ")) } else { list.concat() };
    let text = format!("{{\n.reg .pred p;\nsetp.ne.b32 p, $0, 0;\n@p st.global{vector}.b{bits} [$1], {list};\n}}");
    let mut args = vec![c, at];
    args.extend_from_slice(words);
    let constraints = format!("r,l{}", format!(",{class}").repeat(n));
    f.asm(&text, &constraints, &args, &[], true, true);
}

fn class_of(ty: Ty) -> &'static str {
    match ty {
        Ty::I8 | Ty::I16 => "h",
        Ty::F32 => "f",
        _ => "r",
    }
}

/// An element as f32 or i32 arithmetic takes it, from how it is stored ([`stored`]).
pub fn widen(f: &mut Fn, arch: &Arch, v: Val, from: DType) -> Val {
    match from {
        DType::F32 | DType::I32 | DType::Bool => v,
        DType::Bf16 => {
            let wide = f.cast("zext", v, Ty::I32);
            let bits = f.bin("shl", wide, i32(16));
            f.cast("bitcast", bits, Ty::F32)
        }
        DType::F16 => f.asm("cvt.f32.f16 $0, $1;", "=f,h", &[v], &[Ty::F32], false, false)[0],
        DType::E4m3 if arch.has_fp8_mma => {
            let wide = f.cast("zext", v, Ty::I16);
            let text = "{\n.reg .b32 w;\n.reg .b16 a, b;\ncvt.rn.f16x2.e4m3x2 w, $1;\nmov.b32 {a, b}, w;\ncvt.f32.f16 $0, a;\n}";
            f.asm(text, "=f,h", &[wide], &[Ty::F32], false, false)[0]
        }
        DType::E4m3 => {
            // The same exponent and mantissa bits in an f16 are 2^-8 of the value: exact, subnormals too.
            let wide = f.cast("zext", v, Ty::I32);
            let sign = f.bin("and", wide, i32(0x80));
            let sign = f.bin("shl", sign, i32(8));
            let rest = f.bin("and", wide, i32(0x7f));
            let shifted = f.bin("shl", rest, i32(7));
            let bits = f.bin("or", sign, shifted);
            let half = f.cast("trunc", bits, Ty::I16);
            let small = f.asm("cvt.f32.f16 $0, $1;", "=f,h", &[half], &[Ty::F32], false, false)[0];
            let value = f.bin("fmul", small, f32(256.0));
            let nan = f.cmp("eq", rest, i32(0x7f));
            f.select(nan, f32(f32::NAN), value)
        }
    }
}

/// An f32 (i32 for integers) rounded to how a type is stored: bf16 and f16 as I16, e4m3 as I8.
pub fn narrow(f: &mut Fn, arch: &Arch, v: Val, to: DType) -> Val {
    match to {
        DType::F32 | DType::I32 | DType::Bool => v,
        DType::Bf16 => f.asm("cvt.rn.bf16.f32 $0, $1;", "=h,f", &[v], &[Ty::I16], false, false)[0],
        DType::F16 => f.asm("cvt.rn.f16.f32 $0, $1;", "=h,f", &[v], &[Ty::I16], false, false)[0],
        DType::E4m3 if arch.has_fp8_mma => {
            let text = "cvt.rn.satfinite.e4m3x2.f32 $0, $2, $1;";
            let pair = f.asm(text, "=h,f,f", &[v, f32(0.0)], &[Ty::I16], false, false)[0];
            f.cast("trunc", pair, Ty::I8)
        }
        DType::E4m3 => narrow_e4m3(f, v),
    }
}

/// [`narrow`] to e4m3 in integer arithmetic, for architectures without the conversion.
fn narrow_e4m3(f: &mut Fn, v: Val) -> Val {
    let bits = f.cast("bitcast", v, Ty::I32);
    let sign = f.bin("lshr", bits, i32(24));
    let sign = f.bin("and", sign, i32(0x80));
    let magnitude = f.bin("and", bits, i32(0x7fff_ffff));
    // Normal results: round the mantissa to three bits, to even, and move the exponent's bias from 127 to 7.
    let last = f.bin("lshr", magnitude, i32(20));
    let last = f.bin("and", last, i32(1));
    let rounded = f.add(magnitude, i32(0x7ffff));
    let rounded = f.add(rounded, last);
    let rounded = f.bin("lshr", rounded, i32(20));
    let normal = f.sub(rounded, i32(120 << 3));
    // Subnormal results: multiples of 2^-9; adding 2^14 leaves them in the lowest bits of an f32, rounded to even.
    let absolute = f.cast("bitcast", magnitude, Ty::F32);
    let small = f.bin("fadd", absolute, f32(16384.0));
    let small = f.cast("bitcast", small, Ty::I32);
    let small = f.sub(small, i32(i64::from(16384f32.to_bits())));
    let tiny = f.cmp("slt", magnitude, i32(i64::from(0.015_625f32.to_bits())));
    let code = f.select(tiny, small, normal);
    let big = f.cmp("sgt", code, i32(0x7e));
    let code = f.select(big, i32(0x7e), code);
    let nan = f.cmp("sgt", magnitude, i32(0x7f80_0000));
    let code = f.select(nan, i32(0x7f), code);
    let code = f.bin("or", sign, code);
    f.cast("trunc", code, Ty::I8)
}

/// f32 to i32, towards zero, saturating; NaN gives 0.
pub fn truncate(f: &mut Fn, v: Val) -> Val {
    f.asm("cvt.rzi.s32.f32 $0, $1;", "=r,f", &[v], &[Ty::I32], false, false)[0]
}

/// Copies 4, 8 or 16 bytes from global to shared memory (address in i32) without waiting; zeros where `c` does not hold.
pub fn copy_async(f: &mut Fn, to: Val, from: Val, bytes: u32, c: Val) {
    let size = f.select(c, i32(bytes.into()), i32(0));
    let cache = if bytes == 16 { "cg" } else { "ca" };
    let text = format!("cp.async.{cache}.shared.global [$0], [$1], {bytes}, $2;");
    f.asm(&text, "r,l,r", &[to, from, size], &[], true, true);
}

/// Waits for all copies of this thread.
pub fn copy_wait(f: &mut Fn) {
    f.asm("cp.async.wait_all;", "", &[], &[], true, true);
}

/// Reads four 8x8 matrices of 16-bit elements from rows whose addresses (i32) the lanes give; `transposed` on the way.
pub fn ldmatrix(f: &mut Fn, at: Val, transposed: bool) -> Vec<Val> {
    let how = if transposed { ".trans" } else { "" };
    let text = format!("ldmatrix.sync.aligned.m8n8.x4{how}.shared.b16 {{$0, $1, $2, $3}}, [$4];");
    f.asm(&text, "=r,=r,=r,=r,r", &[at], &[Ty::I32; 4], true, true)
}

/// `d += a · b` of a warp: 16x8 f32 results over 32 bytes of `k`; `a` four registers, `b` two.
pub fn mma(f: &mut Fn, dtype: DType, acc: &[Val], a: &[Val], b: &[Val]) -> Vec<Val> {
    let (shape, ty) = match dtype {
        DType::Bf16 => ("m16n8k16", "bf16"),
        DType::F16 => ("m16n8k16", "f16"),
        _ => ("m16n8k32", "e4m3"),
    };
    let text = format!(
        "mma.sync.aligned.{shape}.row.col.f32.{ty}.{ty}.f32 {{$0, $1, $2, $3}}, {{$8, $9, $10, $11}}, {{$12, $13}}, {{$4, $5, $6, $7}};"
    );
    let args: Vec<Val> = acc.iter().chain(a).chain(b).copied().collect();
    f.asm(&text, "=f,=f,=f,=f,f,f,f,f,r,r,r,r,r,r", &args, &[Ty::F32; 4], false, false)
}
