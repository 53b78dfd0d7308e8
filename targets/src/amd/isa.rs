//! Instructions of the AMDGPU back end, as [`Isa`] asks for them.
//!
//! The shared lowering thinks of groups of 32 lanes in scans and selections; a wave holds two of them, which stay apart there. Reductions take the
//! wave as it is: lines go through all of its lanes, and rows of products across bit 5.

use super::arch::{Arch, Fp8};
use super::{fp8, mfma};
use crate::gpu::block::Threads;
use crate::gpu::direct::BOUND;
use crate::gpu::emit::Emitter;
use crate::gpu::fragment::Spread;
use crate::gpu::isa::{Isa, Product};
use crate::gpu::mlir::{Fn, Ty, Val, f32, i32};
use dsc_ir::DType;
use dsc_ir::sched::Atom;

/// Bytes of shared memory behind the tiles, where waves tell one another whether a truth value holds in them: two sets of 16 words.
pub const MEET_BYTES: u32 = 2 * 16 * 4;

/// Control words of DPP (LLVM's AMDGPU usage document): lanes of four in that order, and rows of 16 turned by `n`.
const QUAD: [u32; 4] = [0b11_10_01_00, 0b10_11_00_01, 0b01_00_11_10, 0b00_01_10_11];
const ROW_TURN: u32 = 0x120;
/// What makes halves of groups meet, from two lanes to 64, if all lanes of a half have the same: pairs and quads exchange, eights and
/// rows are mirrored; then the last lane of each row goes to the next row, and lane 31 to the upper half.
const MEET: [u32; 6] = [QUAD[1], QUAD[2], 0x141, 0x140, 0x142, 0x143];

/// Calls an intrinsic.
pub fn call(f: &mut Fn, name: &str, args: &[Val], ty: Ty) -> Val {
    let types: Vec<&str> = args.iter().map(|a| a.ty().name()).collect();
    let types = types.join(", ");
    let names: Vec<String> = args.iter().map(|&a| f.name(a)).collect();
    f.op(&format!("llvm.call_intrinsic \"{name}\"({}) : ({types}) -> {}", names.join(", "), ty.name()), ty)
}

/// Runs `how` on the value's bits.
fn as_word(f: &mut Fn, v: Val, how: impl FnOnce(&mut Fn, Val) -> Val) -> Val {
    if v.ty() != Ty::F32 {
        return how(f, v);
    }
    let bits = f.cast("bitcast", v, Ty::I32);
    let bits = how(f, bits);
    f.cast("bitcast", bits, Ty::F32)
}

fn wave_lane(t: &mut Threads) -> Val {
    t.lanes(Arch::WAVE).1
}

/// The value of that lane of the wave.
fn permute(t: &mut Threads, v: Val, lane: Val) -> Val {
    let at = t.f.mul(lane, i32(4));
    as_word(&mut t.f, v, |f, v| call(f, "llvm.amdgcn.ds.bpermute", &[at, v], Ty::I32))
}

fn dpp(f: &mut Fn, v: Val, control: u32) -> Val {
    let truth = Val::Int(1, Ty::I1);
    let args = [v, v, i32(control.into()), i32(15), i32(15), truth];
    call(f, "llvm.amdgcn.update.dpp.i32", &args, Ty::I32)
}

/// A float type that values are held in as bits.
fn float(dtype: DType) -> &'static str {
    if dtype == DType::Bf16 { "bf16" } else { "f16" }
}

impl Isa for Arch {
    fn name(&self) -> &'static str {
        self.name
    }

    fn shared_per_block(&self) -> u32 {
        self.lds_bytes
    }

    fn meeting_bytes(&self) -> u32 {
        MEET_BYTES
    }

    fn matrix_atom(&self, dtype: DType, trans_b: bool) -> Option<Atom> {
        match dtype {
            DType::Bf16 | DType::F16 => Some(Atom::Mfma16x16),
            DType::E4m3 => trans_b.then_some(Atom::Mfma16x16),
            _ => None,
        }
    }

    fn columns_atom(&self, dtype: DType, n: u32) -> Option<Atom> {
        // Four waves side by side have 128 columns each of 512.
        let atom = if n.is_multiple_of(512) { Atom::Mfma16x128 } else { Atom::Mfma16x64 };
        (dtype.bytes() == 2 && n.is_multiple_of(64)).then_some(atom)
    }

    fn matrix_step(&self, dtype: DType) -> u32 {
        mfma::STEP_BYTES / dtype.bytes() as u32
    }

    fn converts(&self, dtype: DType) -> bool {
        dtype == DType::E4m3 && self.fp8 == Fp8::Fnuz
    }

    fn operand_word(&self, f: &mut Fn, _: DType, word: Val) -> Val {
        fp8::to_fnuz(f, word)
    }

    fn moves_words(&self) -> bool {
        true
    }

    fn ahead_bytes(&self) -> u32 {
        self.ahead_bytes
    }

    fn copies_bytes(&self) -> Option<u32> {
        Some(self.copy_bytes)
    }

    /// A buffer descriptor: address, stride 0, bytes, and a data format, which has to be one.
    fn copy_source(&self, f: &mut Fn, base: Val, inside: Val) -> String {
        const FORMAT: i64 = 0x0002_7000;
        let low = f.cast("trunc", base, Ty::I32);
        let high = f.bin("lshr", base, Val::Int(32, Ty::I64));
        let high = f.cast("trunc", high, Ty::I32);
        let high = f.bin("and", high, i32(0xffff));
        let bytes = f.select(inside, i32(-BOUND), i32(0));
        mfma::pack(f, &[low, high, bytes, i32(FORMAT)], "i32")
    }

    /// `buffer_load .. lds`. As text, because LLVM would wait for all copies before any read of LDS.
    fn copy(&self, f: &mut Fn, source: &str, to: Val, from: Val, bytes: u32) {
        let op = if bytes == 16 { "buffer_load_dwordx4" } else { "buffer_load_dword" };
        let (to, from) = (f.name(to), f.name(from));
        f.raw(&format!(
            "llvm.inline_asm has_side_effects asm_dialect = att \"s_mov_b32 m0, $0\\0A{op} $1, $2, 0 offen lds\", \
             \"s,v,s,~{{m0}},~{{memory}}\" {to}, {from}, {source} : (i32, i32, vector<4xi32>) -> !llvm.void"
        ));
    }

    fn wait_copies(&self, f: &mut Fn, left: u32) {
        f.asm(&format!("s_waitcnt vmcnt({left})"), "", &[], &[], true, true);
    }

    fn uniform(&self, f: &mut Fn, v: Val) -> Val {
        let ty = v.ty();
        if v.int().is_some() {
            return v;
        }
        if ty == Ty::I1 {
            let word = f.cast("zext", v, Ty::I32);
            let word = self.uniform(f, word);
            return f.cmp("ne", word, i32(0));
        }
        let same = call(f, &format!("llvm.amdgcn.readfirstlane.{}", ty.name()), &[v], ty);
        f.learn(|k| k.same(same, v));
        same
    }

    fn moved(&self, f: &mut Fn, v: Val) -> Val {
        if v.ty().bytes() != 4 {
            return v;
        }
        f.asm("v_mov_b32 $0, $1", "=v,v", &[v], &[v.ty()], false, false)[0]
    }

    fn keeps_quads(&self, atom: Atom) -> bool {
        atom != Atom::Fma
    }

    fn holds_left(&self, dtype: DType, k: u32) -> bool {
        mfma::holds_left(dtype, k)
    }

    fn left_column(&self, f: &mut Fn, s: &Spread, dtype: DType, step: u32) -> Val {
        let bytes = dtype.bytes() as u32;
        let chunk = f.div(s.lane, 16);
        let own = f.mul(chunk, i32((16 / bytes).into()));
        f.add(own, i32((step * mfma::STEP_BYTES / bytes).into()))
    }

    /// In accumulator registers: products take operands from there, and nothing else does.
    fn keep_left(&self, f: &mut Fn, words: &[Val]) -> Val {
        let floats: Vec<Val> = words.iter().map(|&w| f.cast("bitcast", w, Ty::F32)).collect();
        let quad = f.quads(&floats)[0];
        f.asm("", "=a,0", &[quad], &[Ty::Quad], false, false)[0]
    }

    fn keeps_lines(&self) -> bool {
        true
    }

    fn pairs(&self) -> bool {
        true
    }

    fn widens_words(&self, from: DType) -> bool {
        from == DType::E4m3
    }

    /// Of FNUZ codes half the value comes, and of −0 comes 0.
    fn widen_word(&self, f: &mut Fn, word: Val, from: DType) -> Option<Vec<Val>> {
        if from != DType::E4m3 {
            return None;
        }
        let word = if self.fp8 == Fp8::Fnuz { fp8::to_fnuz(f, word) } else { word };
        let name = f.name(word);
        let mut values = Vec::new();
        for upper in [0, 1] {
            let upper = f.name(Val::Int(upper, Ty::I1));
            let pair = f.op(
                &format!(
                    "llvm.call_intrinsic \"llvm.amdgcn.cvt.pk.f32.fp8\"({name}, {upper}) : (i32, i1) -> vector<2xf32>"
                ),
                Ty::F32,
            );
            let mut pair = f.name(pair);
            if self.fp8 == Fp8::Fnuz {
                let two = mfma::pack(f, &[f32(2.0); 2], "f32");
                let whole = f.op(&format!("llvm.fmul {pair}, {two} : vector<2xf32>"), Ty::F32);
                pair = f.name(whole);
            }
            values.extend([0, 1].map(|i| mfma::element(f, &pair, i, "vector<2xf32>", Ty::F32)));
        }
        values.iter().for_each(|&v| f.set_tame(v));
        Some(values)
    }

    fn narrows_pairs(&self, to: DType) -> bool {
        to == DType::Bf16
    }

    fn tamed(&self, f: &mut Fn, v: Val) -> Val {
        if self.cdna4 || f.is_tame(v) {
            return v;
        }
        let nan = f.fcmp("une", v, v);
        let v = f.select(nan, f32(f32::NAN), v);
        f.set_tame(v);
        v
    }

    /// CDNA 3 has no instruction for it. NaN has to be told from what overflows, but where it is tame.
    fn narrow_pair(&self, f: &mut Fn, pair: [Val; 2], to: DType) -> [Val; 2] {
        if !self.cdna4 {
            return if pair.iter().all(|&v| f.is_tame(v)) {
                round_pair(f, pair)
            } else {
                pair.map(|v| self.narrow(f, v, to))
            };
        }
        let (pair, ty) = (mfma::pack(f, &pair, "f32"), float(to));
        let halves = f.op(&format!("llvm.fptrunc {pair} : vector<2xf32> to vector<2x{ty}>"), Ty::I16);
        let halves = f.name(halves);
        let bits = f.op(&format!("llvm.bitcast {halves} : vector<2x{ty}> to vector<2xi16>"), Ty::I16);
        let bits = f.name(bits);
        [0, 1].map(|i| mfma::element(f, &bits, i, "vector<2xi16>", Ty::I16))
    }

    /// They go to scalar registers, and no wait for them is one for copies.
    fn loads_once(&self) -> bool {
        true
    }

    fn lanes(&self) -> u32 {
        Arch::WAVE
    }

    fn turn(&self, f: &mut Fn) {
        f.raw("rocdl.sched.barrier 0");
        f.raw("rocdl.s.barrier");
        f.raw("rocdl.sched.barrier 0");
    }

    fn turn_behind_reads(&self, f: &mut Fn) {
        f.raw("rocdl.sched.barrier 0");
        self.barrier(f);
        f.raw("rocdl.sched.barrier 0");
    }

    fn keep_order(&self, f: &mut Fn) {
        f.raw("rocdl.sched.barrier 0");
    }

    fn hurry(&self, f: &mut Fn, on: bool) {
        f.raw("rocdl.sched.barrier 0");
        f.raw(&format!("rocdl.s.setprio {}", u32::from(on)));
    }

    fn product(&self, e: &mut Emitter, s: &Spread, p: &Product, acc: Vec<Val>) -> Vec<Val> {
        mfma::product(self, e, s, p, acc)
    }

    fn thread(&self, f: &mut Fn) -> Val {
        f.op("rocdl.workitem.id.x : i32", Ty::I32)
    }

    fn block(&self, f: &mut Fn, axis: usize) -> Val {
        f.op(&format!("rocdl.workgroup.id.{} : i32", ["x", "y", "z"][axis]), Ty::I32)
    }

    fn barrier(&self, f: &mut Fn) {
        f.raw("llvm.fence syncscope(\"workgroup\") release");
        f.raw("rocdl.s.barrier");
        f.raw("llvm.fence syncscope(\"workgroup\") acquire");
    }

    /// Waves leave their answers in shared memory. Places in the program take the two sets of words in turns, so that a wave that
    /// is late at one place does not meet the next place's.
    fn barrier_any(&self, t: &mut Threads, c: Val) -> Val {
        t.meetings += 1;
        let waves = t.threads.div_ceil(Arch::WAVE);
        let set = t.f.op("llvm.mlir.addressof @meet : !llvm.ptr<3>", Ty::Shared);
        let set = t.f.offset(set, i32(i64::from(t.meetings % 2) * i64::from(MEET_BYTES / 2)));
        let lanes = call(&mut t.f, "llvm.amdgcn.ballot.i64", &[c], Ty::I64);
        let some = t.f.cmp("ne", lanes, Val::Int(0, Ty::I64));
        let some = t.f.cast("zext", some, Ty::I32);
        let (wave, lane) = t.lanes(Arch::WAVE);
        let first = t.f.cmp("eq", lane, i32(0));
        t.when(first, |t| {
            let byte = t.f.mul(wave, i32(4));
            let at = t.f.offset(set, byte);
            t.f.store(at, &[some]);
        });
        self.barrier(&mut t.f);
        let mut any = i32(0);
        for wave in 0..waves {
            let at = t.f.offset(set, i32(i64::from(wave) * 4));
            let some = t.f.load(at, Ty::I32, 1)[0];
            any = t.f.bin("or", any, some);
        }
        t.f.cmp("ne", any, i32(0))
    }

    fn shuffle_xor(&self, t: &mut Threads, v: Val, mask: u32) -> Val {
        match mask {
            1..=3 => as_word(&mut t.f, v, |f, v| dpp(f, v, QUAD[mask as usize])),
            8 => as_word(&mut t.f, v, |f, v| dpp(f, v, ROW_TURN + 8)),
            0..32 => as_word(&mut t.f, v, |f, v| {
                // Bits that stay, bits set, bits changed: five each.
                let pattern = i32(i64::from(mask << 10 | 0x1f));
                call(f, "llvm.amdgcn.ds.swizzle", &[v, pattern], Ty::I32)
            }),
            _ => {
                let lane = wave_lane(t);
                let other = t.f.bin("xor", lane, i32(mask.into()));
                permute(t, v, other)
            }
        }
    }

    fn shuffle_up(&self, t: &mut Threads, v: Val, by: u32) -> Val {
        let own = wave_lane(t);
        let below = t.f.sub(own, i32(by.into()));
        let has = t.f.cmp("sge", t.lane, i32(by.into()));
        let from = t.f.select(has, below, own);
        permute(t, v, from)
    }

    fn shuffle_from(&self, t: &mut Threads, v: Val, lane: Val) -> Val {
        let own = wave_lane(t);
        let half = t.f.bin("and", own, i32(32));
        let lane = t.f.bin("and", lane, i32(31));
        let lane = t.f.bin("or", half, lane);
        permute(t, v, lane)
    }

    fn ballot(&self, t: &mut Threads, c: Val) -> Val {
        let both = call(&mut t.f, "llvm.amdgcn.ballot.i64", &[c], Ty::I64);
        let upper = t.f.bin("lshr", both, Val::Int(32, Ty::I64));
        let (lower, upper) = (t.f.cast("trunc", both, Ty::I32), t.f.cast("trunc", upper, Ty::I32));
        let half = t.f.bin("and", t.tid, i32(32));
        let first = t.f.cmp("eq", half, i32(0));
        t.f.select(first, lower, upper)
    }

    /// Up to the whole wave without LDS: groups of more than 16 have it in their last lane alone.
    fn combine_lanes(
        &self,
        t: &mut Threads,
        v: Val,
        n: u32,
        combine: &dyn std::ops::Fn(&mut Fn, Val, Val) -> Val,
    ) -> Val {
        MEET[..n.ilog2() as usize].iter().fold(v, |v, &control| {
            let other = as_word(&mut t.f, v, |f, v| dpp(f, v, control));
            combine(&mut t.f, v, other)
        })
    }

    fn combined_lane(&self, n: u32) -> u32 {
        n - 1
    }

    fn settled(&self, f: &mut Fn, v: Val) -> Val {
        f.asm("", "=v,0", &[v], &[v.ty()], false, false)[0]
    }

    fn reduce_warp(&self, t: &mut Threads, how: &str, v: Val) -> Val {
        let combine = |f: &mut Fn, a, b| if how == "add" { f.add(a, b) } else { f.intrinsic(how, &[a, b]) };
        let v = self.combine_lanes(t, v, 16, &combine);
        let other = self.shuffle_xor(t, v, 16);
        combine(&mut t.f, v, other)
    }

    fn leading_zeros(&self, f: &mut Fn, v: Val) -> Val {
        call(f, "llvm.ctlz.i32", &[v, Val::Int(0, Ty::I1)], Ty::I32)
    }

    fn popcount(&self, f: &mut Fn, v: Val) -> Val {
        f.intrinsic("ctpop", &[v])
    }

    fn shared_atomic_add(&self, f: &mut Fn, at: Val, v: Val) {
        let at = f.cast("inttoptr", at, Ty::Shared);
        let (at, v) = (f.name(at), f.name(v));
        f.op(&format!("llvm.atomicrmw add {at}, {v} syncscope(\"workgroup\") monotonic : !llvm.ptr<3>, i32"), Ty::I32);
    }

    fn store_global_if(&self, t: &mut Threads, c: Val, at: Val, words: &[Val]) {
        t.when(c, |t| t.f.store(at, words));
    }

    fn exp2(&self, f: &mut Fn, x: Val) -> Val {
        call(f, "llvm.amdgcn.exp2.f32", &[x], Ty::F32)
    }

    /// By a reciprocal and a step of refinement. LLVM's sequence scales by `v_div_scale`, which the ISA documents describe in a way that
    /// overflows for large divisors, so that whoever emulates it by them gets NaN.
    fn divide(&self, f: &mut Fn, a: Val, b: Val) -> Val {
        const SCALE: f32 = (1u128 << 64) as f32;
        // Reciprocals of very large numbers are denormal, and those of very small ones infinite.
        let size = f.intrinsic("fabs", &[b]);
        let large = f.fcmp("ogt", size, f32(SCALE));
        let small = f.fcmp("olt", size, f32(1.0 / SCALE));
        let scale = f.select(small, f32(SCALE), f32(1.0));
        let scale = f.select(large, f32(1.0 / SCALE), scale);
        let b = f.bin("fmul", b, scale);
        let reciprocal = call(f, "llvm.amdgcn.rcp.f32", &[b], Ty::F32);
        let rough = f.bin("fmul", a, reciprocal);
        let minus = f.bin("fsub", f32(0.0), b);
        let rest = f.intrinsic("fma", &[minus, rough, a]);
        let fine = f.intrinsic("fma", &[rest, reciprocal, rough]);
        // Nothing to refine in 0, infinity and NaN.
        let size = f.intrinsic("fabs", &[rough]);
        let some = f.fcmp("ogt", size, f32(0.0));
        let finite = f.fcmp("olt", size, f32(f32::INFINITY));
        let regular = f.bin("and", some, finite);
        let quotient = f.select(regular, fine, rough);
        f.bin("fmul", quotient, scale)
    }

    fn widen(&self, f: &mut Fn, v: Val, from: DType) -> Val {
        match from {
            DType::F32 | DType::I32 | DType::Bool => v,
            DType::Bf16 => {
                let wide = f.cast("zext", v, Ty::I32);
                let bits = f.bin("shl", wide, i32(16));
                f.cast("bitcast", bits, Ty::F32)
            }
            DType::F16 => {
                let v = f.name(v);
                let half = f.op(&format!("llvm.bitcast {v} : i16 to f16"), Ty::I16);
                let half = f.name(half);
                f.op(&format!("llvm.fpext {half} : f16 to f32"), Ty::F32)
            }
            DType::E4m3 if self.fp8 == Fp8::Ocp => {
                let wide = f.cast("zext", v, Ty::I32);
                call(f, "llvm.amdgcn.cvt.f32.fp8", &[wide, i32(0)], Ty::F32)
            }
            DType::E4m3 => fp8::widen(f, v),
        }
    }

    fn narrow(&self, f: &mut Fn, v: Val, to: DType) -> Val {
        match to {
            DType::F32 | DType::I32 | DType::Bool => v,
            DType::Bf16 | DType::F16 => {
                let (v, ty) = (f.name(v), float(to));
                let half = f.op(&format!("llvm.fptrunc {v} : f32 to {ty}"), Ty::I16);
                let half = f.name(half);
                f.op(&format!("llvm.bitcast {half} : {ty} to i16"), Ty::I16)
            }
            DType::E4m3 => fp8::narrow(f, self.fp8, v),
        }
    }

    fn truncate(&self, f: &mut Fn, v: Val) -> Val {
        call(f, "llvm.fptosi.sat.i32.f32", &[v], Ty::I32)
    }
}

/// Two floats, tame if they are NaN, as bf16 that are nearest, or even: the lower half, and one more where the upper one is odd, carries over at a half.
fn round_pair(f: &mut Fn, pair: [Val; 2]) -> [Val; 2] {
    let [low, high] = pair.map(|v| {
        let bits = f.cast("bitcast", v, Ty::I32);
        let odd = f.bin("lshr", bits, i32(16));
        let odd = f.bin("and", odd, i32(1));
        let sum = f.add(bits, odd);
        f.add(sum, i32(0x7fff))
    });
    let word = call(f, "llvm.amdgcn.perm", &[high, low, i32(mfma::UPPER)], Ty::I32);
    [0, 16].map(|by| {
        let half = f.bin("lshr", word, i32(by));
        f.cast("trunc", half, Ty::I16)
    })
}

/// `x`, but no more than `limit` in size; NaN stays.
pub fn clamp(f: &mut Fn, x: Val, limit: f32) -> Val {
    let above = f.fcmp("ogt", x, f32(limit));
    let x = f.select(above, f32(limit), x);
    let below = f.fcmp("olt", x, f32(-limit));
    f.select(below, f32(-limit), x)
}
