//! What emitters of every instruction need: the function being written and who the running thread is.

use super::isa::Isa;
use super::mlir::{Fn, Ty, Val, i32};

/// A block of threads at work.
pub struct Threads<'a> {
    /// The function.
    pub f: Fn,
    /// The chip.
    pub arch: &'a dyn Isa,
    /// Threads that run this code: a power of two, at least 32.
    pub threads: u32,
    /// This thread's number among them.
    pub tid: Val,
    /// Its lane in its warp.
    pub lane: Val,
    /// Its warp's number.
    pub warp: Val,
    /// Shared memory of the block, as [`Ty::Shared`].
    pub shared: Val,
    /// The same as an address in i32, for inline assembly.
    pub shared32: Val,
    /// Places so far where all threads ask whether something holds in any ([`Isa::barrier_any`]).
    pub meetings: u32,
    /// Where the kernel's parameter behind the addresses points to, from which symbols are read: global memory, or itself, if
    /// it holds their values.
    pub symbols: Ty,
    /// What a kernel begins with once the symbols are on their way, which no launch writes: where launches overlap, it lets the next one start.
    pub begin: fn(&mut Fn),
    /// What waits for the launches before, where launches overlap and `begin` does not.
    pub wait: Option<fn(&mut Fn)>,
    /// Bytes that a lane reads or writes of neighbours at most, so that lanes side by side do not meet in banks of shared memory; as many as there are
    /// if none.
    pub piece: Option<u32>,
}

impl<'a> Threads<'a> {
    /// The whole block, at the start of the function's body.
    pub fn new(mut f: Fn, arch: &'a dyn Isa, threads: u32) -> Threads<'a> {
        let tid = arch.thread(&mut f);
        f.set_below(tid, threads.into());
        let lane = f.bin("and", tid, i32(31));
        let warp = f.bin("lshr", tid, i32(5));
        let shared = f.op("llvm.mlir.addressof @shared : !llvm.ptr<3>", Ty::Shared);
        let shared32 = f.cast("ptrtoint", shared, Ty::I32);
        let begin = |_: &mut Fn| ();
        Threads {
            f,
            arch,
            threads,
            tid,
            lane,
            warp,
            shared,
            shared32,
            meetings: 0,
            symbols: Ty::Global,
            begin,
            wait: None,
            piece: None,
        }
    }

    /// The number of the group of `count` threads (a power of two) that this one is in, and its lane there.
    pub fn lanes(&mut self, count: u32) -> (Val, Val) {
        if count == 32 {
            return (self.warp, self.lane);
        }
        (self.f.div(self.tid, count), self.f.rem(self.tid, count))
    }

    /// The address of a byte of shared memory.
    pub fn shared_at(&mut self, byte: Val) -> Val {
        self.f.offset(self.shared, byte)
    }

    /// Loads `n` neighbours from shared memory.
    pub fn load_shared(&mut self, byte: Val, ty: Ty, n: u32) -> Vec<Val> {
        let at = self.shared_at(byte);
        self.f.load(at, ty, n)
    }

    /// Stores neighbours to shared memory.
    pub fn store_shared(&mut self, byte: Val, values: &[Val]) {
        let at = self.shared_at(byte);
        self.f.store(at, values);
    }

    /// All threads wait for one another.
    pub fn barrier(&mut self) {
        self.arch.barrier(&mut self.f);
    }

    /// Runs `body` where `c` holds (a branch).
    pub fn when(&mut self, c: Val, body: impl FnOnce(&mut Self)) {
        match c {
            Val::Int(0, _) => return,
            Val::Int(..) => return body(self),
            _ => {}
        }
        let after = self.f.open_if(c);
        body(self);
        self.f.close_if(after);
    }

    /// What `body` gives where `c` holds (a branch), and `otherwise` elsewhere.
    pub fn when_value(&mut self, c: Val, otherwise: Val, body: impl FnOnce(&mut Self) -> Val) -> Val {
        match c {
            Val::Int(0, _) => return otherwise,
            Val::Int(..) => return body(self),
            _ => {}
        }
        let (inside, after) = (self.f.label(), self.f.label());
        self.f.cond_br(c, (inside, &[]), (after, &[otherwise]));
        self.f.start(inside, &[]);
        let value = body(self);
        self.f.br(after, &[value]);
        self.f.start(after, &[value.ty()])[0]
    }

    /// `for i in lo..hi step step` (i32, signed), carrying values; `body` gives the next ones.
    pub fn for_loop(
        &mut self,
        (lo, hi, step): (Val, Val, Val),
        carried: &[Val],
        body: impl FnOnce(&mut Self, Val, &[Val]) -> Vec<Val>,
    ) -> Vec<Val> {
        let l = self.f.open_loop(lo, hi, carried);
        let next = body(self, l.args[0], &l.args[1..]);
        self.f.close_loop(&l, step, &next);
        l.done[1..].to_vec()
    }
}
