//! Routines that kernels share: plain copies, and the dispatch to top-k and atoms.
//!
//! Each is compiled once a module. They exist to keep kernels small: a masked load or a store of a tile is a call with
//! clipped sizes instead of a loop nest of its own.

use super::emit::{Bound, Fun, Routine, mem};
use super::topk;
use cranelift_codegen::ir::condcodes::IntCC;
use cranelift_codegen::ir::{InstBuilder, Value, types};

/// Emits the body of a routine that Cranelift compiles (all but atoms).
pub(crate) fn emit(f: &mut Fun, routine: &Routine, params: &[Value]) {
    match routine {
        Routine::CopyRows => copy_rows(f, params),
        Routine::Clear => clear(f, params),
        Routine::TopkPush => topk::emit_push(f, params),
        Routine::TopkCompact => topk::emit_compact(f, params),
        Routine::TopkTake => topk::emit_take(f, params),
        Routine::Atom(_) | Routine::Wide(_) => unreachable!("these are assembled"),
    }
    f.b.ins().return_(&[]);
}

/// Copies `rows` rows of `bytes` bytes. From 16 bytes on the end of a row is copied as the last 16 bytes, over some that are
/// already there.
fn copy_rows(f: &mut Fun, p: &[Value]) {
    let &[dst, ld_dst, src, ld_src, rows, bytes] = p else { unreachable!("six parameters") };
    let zero = f.i64(0);
    let outer = f.begin_loop(zero, Bound::Value(rows), 1, &[dst, src]);
    let (d, s) = (outer.accs[0], outer.accs[1]);
    let (long, short, next) = (f.block(&[]), f.block(&[]), f.block(&[]));
    let is_long = f.b.ins().icmp_imm_s(IntCC::SignedGreaterThanOrEqual, bytes, 16);
    f.branch(is_long, long, &[], short, &[]);

    f.switch(long);
    let at = |f: &mut Fun, p: Value, i: Value| f.b.ins().iadd(p, i);
    let by_64 = f.b.ins().band_imm_s(bytes, -64);
    let wide = f.begin_loop(zero, Bound::Value(by_64), 64, &[]);
    let (from, to) = (at(f, s, wide.i), at(f, d, wide.i));
    let parts: Vec<Value> = (0..4).map(|u| f.b.ins().load(types::I8X16, mem(), from, u * 16)).collect();
    for (u, part) in parts.into_iter().enumerate() {
        f.b.ins().store(mem(), part, to, u as i32 * 16);
    }
    f.end_loop(wide, &[]);
    let by_16 = f.b.ins().band_imm_s(bytes, -16);
    let narrow = f.begin_loop(by_64, Bound::Value(by_16), 16, &[]);
    let (from, to) = (at(f, s, narrow.i), at(f, d, narrow.i));
    let part = f.b.ins().load(types::I8X16, mem(), from, 0);
    f.b.ins().store(mem(), part, to, 0);
    f.end_loop(narrow, &[]);
    let last = f.add_const(bytes, -16);
    let (from, to) = (at(f, s, last), at(f, d, last));
    let part = f.b.ins().load(types::I8X16, mem(), from, 0);
    f.b.ins().store(mem(), part, to, 0);
    f.jump(next, &[]);

    f.switch(short);
    let by_4 = f.b.ins().band_imm_s(bytes, -4);
    for (lo, hi, step, ty) in [(zero, by_4, 4, types::I32), (by_4, bytes, 1, types::I8)] {
        let l = f.begin_loop(lo, Bound::Value(hi), step, &[]);
        let (from, to) = (at(f, s, l.i), at(f, d, l.i));
        let part = f.b.ins().load(ty, mem(), from, 0);
        f.b.ins().store(mem(), part, to, 0);
        f.end_loop(l, &[]);
    }
    f.jump(next, &[]);

    f.switch(next);
    let (d, s) = (f.b.ins().iadd(d, ld_dst), f.b.ins().iadd(s, ld_src));
    f.end_loop(outer, &[d, s]);
}

/// Clears `bytes` bytes, rounded up to 64: the room of every slot is.
fn clear(f: &mut Fun, p: &[Value]) {
    let &[dst, bytes] = p else { unreachable!("two parameters") };
    let zero = f.i64(0);
    let none = f.i32x4([0; 4]);
    let l = f.begin_loop(zero, Bound::Value(bytes), 64, &[]);
    let to = f.b.ins().iadd(dst, l.i);
    for u in 0..4 {
        f.b.ins().store(mem(), none, to, u * 16);
    }
    f.end_loop(l, &[]);
}
