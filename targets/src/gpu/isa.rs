//! The seam between the shared lowering and a chip: its limits, the instructions that threads exchange values with, conversions, and the
//! matrix products it has.

use super::block::Threads;
use super::emit::Emitter;
use super::fragment::Spread;
use super::mlir::{Fn, Ty, Val};
use dsc_ir::DType;
use dsc_ir::sched::{Atom, Buffer};

/// How an element of a type is held between memory and arithmetic.
pub fn stored(dtype: DType) -> Ty {
    match dtype {
        DType::F32 => Ty::F32,
        DType::I32 => Ty::I32,
        DType::Bf16 | DType::F16 => Ty::I16,
        DType::E4m3 => Ty::I8,
        DType::Bool => Ty::I1,
    }
}

/// A left operand in registers: by step of the product and block of rows, a lane's 16 bytes as [`Isa::keep_left`] gives them.
pub type HeldLeft = Vec<Vec<Val>>;

/// Where the left operand of a product is.
#[derive(Clone, Copy)]
pub enum Left<'a> {
    /// In shared memory, rows padded with zeros to whole steps of `k`.
    Shared(&'a Buffer),
    /// In registers ([`Isa::holds_left`]).
    Held(&'a HeldLeft),
}

/// A matrix product of tiles in shared memory, as [`Isa::product`] takes it.
pub struct Product<'a> {
    /// The instruction, one of those that [`Isa::matrix_atom`] gives.
    pub atom: Atom,
    /// Type of both operands.
    pub dtype: DType,
    /// The left operand, `[m, k]`.
    pub a: Left<'a>,
    /// The right operand, `[n, k]` if `trans_b`, else `[k, n]`; padded as the left one is in shared memory.
    pub b: &'a Buffer,
    /// Whether the elements of `a` and `b` are as [`Isa::operand_word`] makes them.
    pub ready: [bool; 2],
    /// Where in their buffers they begin, in bytes (i32).
    pub first: [Val; 2],
    /// Contracted length.
    pub k: u32,
    /// Whether the right operand lies transposed.
    pub trans_b: bool,
}

/// A chip's instructions. Lanes that exchange values come in groups of 32, called warps here, whatever the hardware's width: a wider one
/// runs several groups at once. All lanes of a group take part in an exchange.
pub trait Isa: Sync {
    /// The name that `--target` takes.
    fn name(&self) -> &'static str;

    /// Bytes of shared memory that the tiles of a block can have.
    fn shared_per_block(&self) -> u32;

    /// Bytes of it that [`barrier_any`](Isa::barrier_any) takes in kernels that use it.
    fn meeting_bytes(&self) -> u32 {
        0
    }

    /// The matrix instruction for operands of that type (the right one transposed in memory or not), if there is one.
    fn matrix_atom(&self, dtype: DType, trans_b: bool) -> Option<Atom>;

    /// A better one for results of `n` columns, all of whose products have right operands that lie as they are multiplied.
    fn columns_atom(&self, dtype: DType, n: u32) -> Option<Atom> {
        let _ = (dtype, n);
        None
    }

    /// Elements of `k` that one matrix instruction takes.
    fn matrix_step(&self, dtype: DType) -> u32;

    /// Whether the matrix instructions take other bits of that type than memory holds.
    fn converts(&self, dtype: DType) -> bool {
        let _ = dtype;
        false
    }

    /// 32 bits of elements as matrix instructions take them; for types that it [`converts`](Isa::converts).
    fn operand_word(&self, f: &mut Fn, dtype: DType, word: Val) -> Val {
        let _ = (f, dtype);
        word
    }

    /// Whether tiles go from global to shared memory by words; else by elements, which the assembler packs.
    fn moves_words(&self) -> bool {
        false
    }

    /// Bytes of registers that a thread has for loads a round ahead of a loop's products.
    fn ahead_bytes(&self) -> u32 {
        0
    }

    /// Bytes of registers that a thread of a block of so many has for loads that are made before they are wanted, where a schedule asks for
    /// that ([`Schedule::early`](dsc_ir::schedule::Schedule::early)).
    fn early_bytes(&self, threads: u32) -> u32 {
        let _ = threads;
        0
    }

    /// Bytes that a lane moves from global to shared memory in an instruction that needs no registers for them, if there is one.
    fn copies_bytes(&self) -> Option<u32> {
        None
    }

    /// Where copies come from: `base` (i64, the same in all lanes) and what is behind it up to [`BOUND`](super::direct::BOUND), or nothing if
    /// `inside` does not hold. By its name in the text. This and what follows is asked of chips that copy only.
    fn copy_source(&self, f: &mut Fn, base: Val, inside: Val) -> String {
        let _ = (f, base, inside);
        unreachable!("{} does not copy", self.name())
    }

    /// Brings `bytes` of each lane, `from` bytes behind the source's base, to consecutive places from `to` (i32, the same in all lanes); zeros
    /// from beyond the bound.
    fn copy(&self, f: &mut Fn, source: &str, to: Val, from: Val, bytes: u32) {
        let _ = (f, source, to, from, bytes);
        unreachable!("{} does not copy", self.name())
    }

    /// Waits until at most `left` copies of this thread are under way.
    fn wait_copies(&self, f: &mut Fn, left: u32) {
        let _ = (f, left);
        unreachable!("{} does not copy", self.name())
    }

    /// A value that is the same in all lanes that share instructions, as one that the compiler knows to be.
    fn uniform(&self, f: &mut Fn, v: Val) -> Val {
        let _ = f;
        v
    }

    /// Whether loads from the same address by all lanes are cheaper where memory is known to stay as it is.
    fn loads_once(&self) -> bool {
        false
    }

    /// The value in a register of its own, where the compiler is not to know that it is the same.
    fn moved(&self, f: &mut Fn, v: Val) -> Val {
        let _ = f;
        v
    }

    /// Whether registers of fragments stay together by fours from block to block: what the instruction leaves and takes.
    fn keeps_quads(&self, atom: Atom) -> bool {
        let _ = atom;
        false
    }

    /// Whether a left operand of `k` elements a row can stay in registers.
    fn holds_left(&self, dtype: DType, k: u32) -> bool {
        let _ = (dtype, k);
        false
    }

    /// The first of the 16 bytes' elements that a lane has of its rows of a left operand, in a step of the product.
    fn left_column(&self, f: &mut Fn, s: &Spread, dtype: DType, step: u32) -> Val {
        let _ = (f, s, dtype, step);
        unreachable!("{} holds no operands", self.name())
    }

    /// These 16 bytes, of words as [`Isa::operand_word`] makes them, in registers beside each other where products take them from.
    fn keep_left(&self, f: &mut Fn, words: &[Val]) -> Val {
        let _ = (f, words);
        unreachable!("{} holds no operands", self.name())
    }

    /// Whether what is one number for each row of a product stays in registers, with those who have the row.
    fn keeps_lines(&self) -> bool {
        false
    }

    /// Whether shared memory is spared at the price of conversions and loads of what is near, where a block does not load ahead: it says how many
    /// blocks run beside each other.
    fn spares_shared(&self) -> bool {
        false
    }

    /// Whether sums and products of two f32 beside each other are one instruction.
    fn pairs(&self) -> bool {
        false
    }

    /// The elements of a word as f32, if that is cheaper than one by one.
    fn widen_word(&self, f: &mut Fn, word: Val, from: DType) -> Option<Vec<Val>> {
        let _ = (f, word, from);
        None
    }

    /// Whether [`Isa::widen_word`] takes a type.
    fn widens_words(&self, from: DType) -> bool {
        let _ = from;
        false
    }

    /// Whether [`Isa::narrow_pair`] takes a type.
    fn narrows_pairs(&self, to: DType) -> bool {
        let _ = to;
        false
    }

    /// Two f32 rounded to neighbours, as [`Isa::narrow`] rounds one.
    fn narrow_pair(&self, f: &mut Fn, pair: [Val; 2], to: DType) -> [Val; 2] {
        pair.map(|v| self.narrow(f, v, to))
    }

    /// A float, or a tame NaN ([`Fn::set_tame`]) if it is NaN, where it pays to know.
    fn tamed(&self, f: &mut Fn, v: Val) -> Val {
        let _ = f;
        v
    }

    /// Lanes that share instructions.
    fn lanes(&self) -> u32 {
        32
    }

    /// All threads meet, and no instruction moves across; memory is not ordered.
    fn turn(&self, f: &mut Fn) {
        self.barrier(f);
    }

    /// The same when what was read from shared memory is there.
    fn turn_behind_reads(&self, f: &mut Fn) {
        self.barrier(f);
    }

    /// No instruction moves across.
    fn keep_order(&self, f: &mut Fn) {
        let _ = f;
    }

    /// Whether these threads go first where several could issue.
    fn hurry(&self, f: &mut Fn, on: bool) {
        let _ = (f, on);
    }

    /// `acc + a · b` by matrix instructions, over all of `k`; `acc` as the spread says.
    fn product(&self, e: &mut Emitter, s: &Spread, p: &Product, acc: Vec<Val>) -> Vec<Val>;

    /// This thread's number in the block (i32).
    fn thread(&self, f: &mut Fn) -> Val;

    /// The block's number along an axis of the grid (i32).
    fn block(&self, f: &mut Fn, axis: usize) -> Val;

    /// All threads of the block wait for one another.
    fn barrier(&self, f: &mut Fn);

    /// All threads of the block wait for one another; whether a truth value holds in any of them. Between two passes of the same
    /// place in the program there is another barrier.
    fn barrier_any(&self, t: &mut Threads, c: Val) -> Val;

    /// The value of the lane whose number differs in the bits of `mask`.
    fn shuffle_xor(&self, t: &mut Threads, v: Val, mask: u32) -> Val;

    /// The value of the lane `by` below; a lane without one keeps its own.
    fn shuffle_up(&self, t: &mut Threads, v: Val, by: u32) -> Val;

    /// The value of that lane.
    fn shuffle_from(&self, t: &mut Threads, v: Val, lane: Val) -> Val;

    /// The lanes for which a truth value holds, as bits.
    fn ballot(&self, t: &mut Threads, c: Val) -> Val;

    /// The values of each group of `n` neighbouring lanes combined; `n` is a power of two, at most [`Isa::lanes`]. The group's lane
    /// [`Isa::combined_lane`] has the result; others may.
    fn combine_lanes(
        &self,
        t: &mut Threads,
        v: Val,
        n: u32,
        combine: &dyn std::ops::Fn(&mut Fn, Val, Val) -> Val,
    ) -> Val {
        (0..n.ilog2()).rev().fold(v, |v, bit| {
            let other = self.shuffle_xor(t, v, 1 << bit);
            combine(&mut t.f, v, other)
        })
    }

    /// The lane of a group of `n` that has what [`Isa::combine_lanes`] leaves.
    fn combined_lane(&self, n: u32) -> u32 {
        let _ = n;
        0
    }

    /// A result that is there behind this place. A compiler may otherwise move all of its arithmetic into branches that use it, and keep
    /// the operands until then.
    fn settled(&self, f: &mut Fn, v: Val) -> Val {
        let _ = f;
        v
    }

    /// The values of all 32 lanes of a group combined: `add`, `umin` or `umax` of i32.
    fn reduce_warp(&self, t: &mut Threads, how: &str, v: Val) -> Val;

    /// Zeros above the highest bit set: 32 if none is.
    fn leading_zeros(&self, f: &mut Fn, v: Val) -> Val;

    /// Bits set.
    fn popcount(&self, f: &mut Fn, v: Val) -> Val;

    /// Adds to a 32-bit word of shared memory (address in i32).
    fn shared_atomic_add(&self, f: &mut Fn, at: Val, v: Val);

    /// Writes neighbours (of a type that memory holds; at most 16 bytes) where `c` holds.
    fn store_global_if(&self, t: &mut Threads, c: Val, at: Val, words: &[Val]);

    /// `2^x`, relative error at most 2^-22; 0 where that is below 2^-126, if the chip likes.
    fn exp2(&self, f: &mut Fn, x: Val) -> Val;

    /// `a / b` of f32.
    fn divide(&self, f: &mut Fn, a: Val, b: Val) -> Val {
        f.bin("fdiv", a, b)
    }

    /// An element as f32 or i32 arithmetic takes it, from how it is stored ([`stored`]).
    fn widen(&self, f: &mut Fn, v: Val, from: DType) -> Val;

    /// An f32 (i32 for integers) rounded to how a type is stored: bf16 and f16 as I16, e4m3 as I8.
    fn narrow(&self, f: &mut Fn, v: Val, to: DType) -> Val;

    /// f32 to i32, towards zero, saturating; NaN gives 0.
    fn truncate(&self, f: &mut Fn, v: Val) -> Val;
}
