//! Streaming top-k: a buffer of candidates a row, cut back to the `k` best whenever it fills.
//!
//! A row's state is a header (count, threshold) and two arrays of `capacity` values and numbers, in the order offered. A push
//! compares four values at once with the threshold; only what exceeds it is appended, so once the buffer has been cut the
//! scan of the rest runs at four values a few cycles. An equal value that comes later loses to the `k` kept ones, which
//! have lower numbers: "exceeds" is exactly the tie rule. The threshold starts at −inf, which excludes −inf and (as a
//! comparison is false) NaN.
//!
//! Cutting finds the `k`-th largest by radix selection: a histogram of 256 bins for each of the four bytes of an order-preserving
//! integer, most significant first. Then one stable pass keeps what is greater, and of what is equal the first so
//! many as still fit. So the survivors stay in ascending order of number, and the selection needs no sort.
//!
//! With a capacity of `2k + 1024` a cut handles at least `k + 1024` new values: amortised, a few cycles a survivor.

use super::emit::{Bound, Fun, Loop, Routine, mem};
use cranelift_codegen::ir::condcodes::{FloatCC, IntCC};
use cranelift_codegen::ir::{InstBuilder, StackSlotData, StackSlotKind, Value, types};

const COUNT: i32 = 0;
const THRESHOLD: i32 = 8;
const HEADER: i32 = 64;
/// Candidates examined between two checks of the room left.
const CHUNK: i64 = 256;

/// Candidates a row holds.
pub(crate) fn capacity(k: u32) -> u64 {
    2 * u64::from(k) + 1024
}

/// Bytes of one row's state.
pub(crate) fn row_bytes(k: u32) -> u64 {
    (HEADER as u64 + capacity(k) * 8).next_multiple_of(64)
}

/// Makes a row's state empty.
pub(crate) fn emit_reset(f: &mut Fun, state: Value) {
    let none = f.i64(0);
    f.b.ins().store(mem(), none, state, COUNT);
    let lowest = f.f32(f32::NEG_INFINITY);
    f.b.ins().store(mem(), lowest, state, THRESHOLD);
}

fn arrays(f: &mut Fun, state: Value, capacity: Value) -> (Value, Value) {
    let values = f.add_const(state, HEADER.into());
    let bytes = f.mul_const(capacity, 4);
    let numbers = f.b.ins().iadd(values, bytes);
    (values, numbers)
}

fn element(f: &mut Fun, array: Value, i: Value) -> Value {
    let bytes = f.mul_const(i, 4);
    f.b.ins().iadd(array, bytes)
}

/// `fn(state, k, capacity, values, n, base)`.
pub(crate) fn emit_push(f: &mut Fun, p: &[Value]) {
    let &[state, k, capacity, source, n, base] = p else { unreachable!("six parameters") };
    let (values, numbers) = arrays(f, state, capacity);
    let zero = f.i64(0);
    let chunks = f.begin_loop(zero, Bound::Value(n), CHUNK, &[]);
    let start = chunks.i;
    make_room(f, state, k, capacity);
    let count = f.b.ins().load(types::I64, mem(), state, COUNT);
    let threshold = f.b.ins().load(types::F32, mem(), state, THRESHOLD);
    let thresholds = f.b.ins().splat(types::F32X4, threshold);
    let end = f.add_const(start, CHUNK);
    let end = f.b.ins().smin(end, n);
    let length = f.b.ins().isub(end, start);
    let whole = f.b.ins().band_imm_s(length, -4);
    let split = f.b.ins().iadd(start, whole);
    let append = |f: &mut Fun, i: Value, count: Value| {
        let from = element(f, source, i);
        let value = f.b.ins().load(types::F32, mem(), from, 0);
        let (to_value, to_number) = (element(f, values, count), element(f, numbers, count));
        f.b.ins().store(mem(), value, to_value, 0);
        let number = f.b.ins().iadd(base, i);
        f.b.ins().istore32(mem(), number, to_number, 0);
        let better = f.b.ins().fcmp(FloatCC::GreaterThan, value, threshold);
        let better = f.b.ins().uextend(types::I64, better);
        f.b.ins().iadd(count, better)
    };
    let by_4 = f.begin_loop(start, Bound::Value(split), 4, &[count]);
    let from = element(f, source, by_4.i);
    let four = f.b.ins().load(types::F32X4, mem(), from, 0);
    let better = f.b.ins().fcmp(FloatCC::GreaterThan, four, thresholds);
    let (some, next) = (f.block(&[]), f.block(&[types::I64]));
    let any = f.b.ins().vany_true(better);
    f.branch(any, some, &[], next, &[by_4.accs[0]]);
    f.switch(some);
    let mut grown = by_4.accs[0];
    for lane in 0..4 {
        let i = f.add_const(by_4.i, lane);
        grown = append(f, i, grown);
    }
    f.jump(next, &[grown]);
    let grown = f.switch(next);
    let count = f.end_loop(by_4, &grown);
    let by_1 = f.begin_loop(split, Bound::Value(end), 1, &count);
    let grown = append(f, by_1.i, by_1.accs[0]);
    let count = f.end_loop(by_1, &[grown]);
    f.b.ins().store(mem(), count[0], state, COUNT);
    f.end_loop(chunks, &[]);
}

/// Cuts the row if a whole chunk might not fit any more.
fn make_room(f: &mut Fun, state: Value, k: Value, capacity: Value) {
    let count = f.b.ins().load(types::I64, mem(), state, COUNT);
    let filled = f.add_const(count, CHUNK);
    // An append writes before it knows whether it keeps: one more must fit.
    let full = f.b.ins().icmp(IntCC::SignedGreaterThanOrEqual, filled, capacity);
    let (cut, next) = (f.block(&[]), f.block(&[]));
    f.branch(full, cut, &[], next, &[]);
    f.switch(cut);
    f.call(Routine::TopkCompact, &[state, k, capacity]);
    f.jump(next, &[]);
    f.switch(next);
}

/// An unsigned integer that orders like the float. Both zeros give the same.
fn order_key(f: &mut Fun, value: Value) -> Value {
    let plus_zero = f.f32(0.0);
    let value = f.b.ins().fadd(value, plus_zero);
    let bits = f.cast_bits(types::I32, value);
    let sign = f.b.ins().sshr_imm_u(bits, 31);
    let flip = f.b.ins().bor_imm_u(sign, 0x8000_0000);
    f.b.ins().bxor(bits, flip)
}

fn load_key(f: &mut Fun, values: Value, i: Value) -> Value {
    let at = element(f, values, i);
    let value = f.b.ins().load(types::F32, mem(), at, 0);
    order_key(f, value)
}

/// `fn(state, k, capacity)`. Needs more than `k` candidates.
pub(crate) fn emit_compact(f: &mut Fun, p: &[Value]) {
    let &[state, k, capacity] = p else { unreachable!("three parameters") };
    let (values, numbers) = arrays(f, state, capacity);
    let count = f.b.ins().load(types::I64, mem(), state, COUNT);
    let (cut, done) = (f.block(&[]), f.block(&[]));
    let too_many = f.b.ins().icmp(IntCC::SignedGreaterThan, count, k);
    f.branch(too_many, cut, &[], done, &[]);
    f.switch(cut);
    let slot = f.b.create_sized_stack_slot(StackSlotData::new(StackSlotKind::ExplicitSlot, 1024, 4));
    let bins = f.b.ins().stack_addr(types::I64, slot, 0);
    // `prefix`: the bytes of the k-th key found so far; `wanted`: its rank among the keys with that prefix.
    let (mut prefix, mut wanted) = (f.i32(0), k);
    for shift in [24, 16, 8, 0] {
        (prefix, wanted) = radix_step(f, values, count, bins, shift, prefix, wanted);
    }
    // `wanted` of the keys equal to `prefix` stay, and all greater ones.
    let zero = f.i64(0);
    let keep = f.begin_loop(zero, Bound::Value(count), 1, &[zero, wanted]);
    let (kept, ties) = (keep.accs[0], keep.accs[1]);
    let (from_value, from_number) = (element(f, values, keep.i), element(f, numbers, keep.i));
    let value = f.b.ins().load(types::F32, mem(), from_value, 0);
    let number = f.b.ins().load(types::I32, mem(), from_number, 0);
    let (to_value, to_number) = (element(f, values, kept), element(f, numbers, kept));
    f.b.ins().store(mem(), value, to_value, 0);
    f.b.ins().store(mem(), number, to_number, 0);
    let key = order_key(f, value);
    let greater = f.b.ins().icmp(IntCC::UnsignedGreaterThan, key, prefix);
    let equal = f.b.ins().icmp(IntCC::Equal, key, prefix);
    let open = f.b.ins().icmp_imm_s(IntCC::SignedGreaterThan, ties, 0);
    let tie = f.b.ins().band(equal, open);
    let stays = f.b.ins().bor(greater, tie);
    let (stays, tie) = (f.b.ins().uextend(types::I64, stays), f.b.ins().uextend(types::I64, tie));
    let kept = f.b.ins().iadd(kept, stays);
    let ties = f.b.ins().isub(ties, tie);
    f.end_loop(keep, &[kept, ties]);
    f.b.ins().store(mem(), k, state, COUNT);
    // The key back to the float.
    let sign = f.b.ins().sshr_imm_u(prefix, 31);
    let sign = f.b.ins().bnot(sign);
    let flip = f.b.ins().bor_imm_u(sign, 0x8000_0000);
    let bits = f.b.ins().bxor(prefix, flip);
    f.b.ins().store(mem(), bits, state, THRESHOLD);
    f.jump(done, &[]);
    f.switch(done);
}

/// One byte of the selection: counts it among the keys that share `prefix`, and walks down from the top to the bin that holds
/// rank `wanted`.
fn radix_step(
    f: &mut Fun,
    values: Value,
    count: Value,
    bins: Value,
    shift: i64,
    prefix: Value,
    wanted: Value,
) -> (Value, Value) {
    let zero = f.i64(0);
    let bytes = f.i64(1024);
    f.call(Routine::Clear, &[bins, bytes]);
    let scan: Loop = f.begin_loop(zero, Bound::Value(count), 1, &[]);
    let key = load_key(f, values, scan.i);
    let digit = f.b.ins().ushr_imm_u(key, shift);
    let digit = f.b.ins().band_imm_u(digit, 255);
    let digit = f.b.ins().uextend(types::I64, digit);
    let bin = element(f, bins, digit);
    let weight = if shift == 24 {
        f.i32(1)
    } else {
        let (high, prefix) = (f.b.ins().ushr_imm_u(key, shift + 8), f.b.ins().ushr_imm_u(prefix, shift + 8));
        let shares = f.b.ins().icmp(IntCC::Equal, high, prefix);
        f.b.ins().uextend(types::I32, shares)
    };
    let n = f.b.ins().load(types::I32, mem(), bin, 0);
    let n = f.b.ins().iadd(n, weight);
    f.b.ins().store(mem(), n, bin, 0);
    f.end_loop(scan, &[]);

    let (top, exit) = (f.block(&[types::I64, types::I64]), f.block(&[types::I64, types::I64]));
    let last = f.i64(255);
    f.jump(top, &[last, wanted]);
    let at = f.switch(top);
    let (digit, wanted) = (at[0], at[1]);
    let bin = element(f, bins, digit);
    let n = f.b.ins().uload32(mem(), bin, 0);
    let below = f.add_const(digit, -1);
    let left = f.b.ins().isub(wanted, n);
    let found = f.b.ins().icmp(IntCC::SignedLessThanOrEqual, wanted, n);
    f.branch(found, exit, &[digit, wanted], top, &[below, left]);
    let out = f.switch(exit);
    let digit = f.b.ins().ireduce(types::I32, out[0]);
    let digit = f.b.ins().ishl_imm_u(digit, shift);
    (f.b.ins().bor(prefix, digit), out[1])
}

/// `fn(state, k, capacity, values, indices)`.
pub(crate) fn emit_take(f: &mut Fun, p: &[Value]) {
    let &[state, k, capacity, out_values, out_numbers] = p else { unreachable!("five parameters") };
    f.call(Routine::TopkCompact, &[state, k, capacity]);
    let (values, numbers) = arrays(f, state, capacity);
    let count = f.b.ins().load(types::I64, mem(), state, COUNT);
    let zero = f.i64(0);
    let copy = f.begin_loop(zero, Bound::Value(count), 1, &[]);
    for (from, to) in [(values, out_values), (numbers, out_numbers)] {
        let (from, to) = (element(f, from, copy.i), element(f, to, copy.i));
        let x = f.b.ins().load(types::I32, mem(), from, 0);
        f.b.ins().store(mem(), x, to, 0);
    }
    f.end_loop(copy, &[]);
    let (lowest, none) = (f.f32(f32::NEG_INFINITY), f.i32(-1));
    let fill = f.begin_loop(count, Bound::Value(k), 1, &[]);
    let (to_value, to_number) = (element(f, out_values, fill.i), element(f, out_numbers, fill.i));
    f.b.ins().store(mem(), lowest, to_value, 0);
    f.b.ins().store(mem(), none, to_number, 0);
    f.end_loop(fill, &[]);
}
