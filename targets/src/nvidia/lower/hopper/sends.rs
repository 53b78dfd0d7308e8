//! What the blocks of a cluster send each other while they select from a row.
//!
//! Words come with a barrier of the block that gets them, which counts their bytes: no block fences its memory, which would take longer than the way. A
//! barrier is used once, so that who waits for it waits for its first phase; a block that has waited for all of its barriers may end.

use super::emit::Emit;
use super::ptx;
use crate::nvidia::lower::block::Threads;
use crate::nvidia::lower::mlir::{Val, i32};

/// Makes barriers at those bytes of shared memory, of so many arrivals; the first is this thread's where the bytes that come are known. By one thread; the others of the cluster
/// see them behind a barrier of it.
pub fn make_barriers(t: &mut Threads, barriers: &[(u32, u32, u32)]) {
    for &(at, arrivals, bytes) in barriers {
        let barrier = t.f.add(t.shared32, i32(at.into()));
        ptx::barrier_init(&mut t.f, barrier, arrivals);
        if bytes > 0 {
            ptx::barrier_expect(&mut t.f, barrier, bytes);
        }
    }
    ptx::barrier_init_fence(&mut t.f);
}

impl Emit<'_> {
    /// Waits until a barrier that is used once has what was sent.
    pub fn wait_for(&mut self, barrier: u32) {
        let at = self.t.f.add(self.t.shared32, i32(barrier.into()));
        ptx::barrier_wait(&mut self.t.f, at, i32(0));
    }

    /// Sends words to a byte of each block's shared memory, and its barrier their bytes.
    pub fn send_all(&mut self, (byte, barrier): (Val, u32), words: &[Val]) {
        let to = self.t.f.cmp("slt", self.t.tid, i32(self.s.team.into()));
        let tid = self.t.tid;
        self.t.when(to, |t| {
            let at = t.f.add(t.shared32, byte);
            let barrier = t.f.add(t.shared32, i32(barrier.into()));
            let [at, barrier] = [at, barrier].map(|at| ptx::address_in(&mut t.f, at, tid));
            ptx::send_words(&mut t.f, at, barrier, words);
        });
    }
}
