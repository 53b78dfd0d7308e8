//! Runs the text that [`super::mlir::Fn`] writes on the threads of blocks: what the emitters mean, checked without a GPU.
//!
//! The lanes of a warp run together where they are at the same instruction; warps one after another between the points where all
//! must meet, in an order that a seed chooses. Stricter than the hardware: the lanes of a warp must meet at the same exchange and all
//! threads at the same barrier, accesses must be aligned and inside their memory, no shift may be as wide as its type, and two
//! threads that touch a byte between two barriers, one of them writing, are a race unless both are atomic.
//!
//! The blocks of a cluster run together. A barrier of any of them counts for all, so races of two blocks may go unseen.
//!
//! | file | does |
//! |---|---|
//! | `parse` | text to instructions |
//! | `scalar` | arithmetic of one thread |
//! | `warp` | products, matrices and exchanges of 32 lanes |
//! | `launch` | a lowered kernel on buffers, as the tile interpreter takes them |

mod launch;
mod parse;
mod scalar;
mod warp;

pub use launch::run_blocks;

use parse::{Body, Code, Goto, Inst, Slot};
use std::ops::Range;
use warp::Lanes;

/// The memory a block sees, and what running it took.
#[derive(Debug, Default)]
pub struct Machine {
    /// Shared memory of a block; what the kernel has not written is whatever the caller left.
    pub shared: Vec<u8>,
    /// Blocks of a cluster; 0 is 1.
    pub team: u32,
    /// Global memory: an address is an offset.
    pub global: Vec<u8>,
    /// The only parts of global memory that may be touched, if there are any.
    pub buffers: Vec<Range<u64>>,
    /// The function's arguments.
    pub args: Vec<u64>,
    /// Chooses the order of warps between barriers.
    pub seed: u64,
    /// Instructions that thread 0 ran.
    pub steps: u64,
    /// Barriers that the block passed.
    pub barriers: u64,
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum At {
    Running,
    Warp,
    Barrier,
    Done,
}

/// 32 threads.
struct Warp {
    number: usize,
    slots: Vec<Lanes>,
    pc: [usize; 32],
    at: [At; 32],
}

/// Who touched a byte since the last barrier: thread + 1, or 0; [`MANY`] threads.
#[derive(Clone, Copy, Default)]
struct Touch {
    epoch: u32,
    read: u32,
    write: u32,
    atomic: u32,
}

const MANY: u32 = u32::MAX;

#[derive(Clone, Copy, PartialEq)]
enum How {
    Read,
    Write,
    Atomic,
}

/// A function on its memory.
struct Run<'a> {
    m: &'a mut Machine,
    p: &'a Body,
    /// Threads of a block, and bytes of its shared memory.
    threads: u32,
    size: u64,
    block: [u32; 3],
    epoch: u32,
    touched_shared: Vec<Touch>,
    touched_global: Vec<Touch>,
}

impl Machine {
    /// Runs a function's body on one block of `threads` threads.
    ///
    /// # Errors
    /// What the body does that hardware would not, or not always, do as meant; with the instruction.
    pub fn run(&mut self, text: &str, threads: u32) -> Result<(), String> {
        self.run_grid(text, threads, &[[0; 3]])
    }

    /// Runs a function, alone or in its module, on these blocks, one after another.
    ///
    /// # Errors
    /// As [`Machine::run`].
    pub fn run_grid(&mut self, text: &str, threads: u32, blocks: &[[u32; 3]]) -> Result<(), String> {
        let p = parse::parse(text)?;
        (self.steps, self.barriers) = (0, 0);
        let (team, size) = (self.team.max(1), self.shared.len() as u64);
        self.shared = self.shared.repeat(team as usize);
        let (shared, global) = (vec![Touch::default(); self.shared.len()], vec![Touch::default(); self.global.len()]);
        let fresh = self.shared.clone();
        let mut warps: Vec<Warp> = (0..(threads * team) as usize / 32).map(|n| Warp::new(n, &p, &self.args)).collect();
        let mut run = Run {
            m: self,
            p: &p,
            threads,
            size,
            block: [0; 3],
            epoch: 0,
            touched_shared: shared,
            touched_global: global,
        };
        let mut random = run.m.seed;
        for (i, &block) in blocks.iter().enumerate() {
            if i > 0 {
                run.m.shared.copy_from_slice(&fresh);
                warps.iter_mut().for_each(Warp::restart);
            }
            run.block = block;
            run.block(&mut warps, &mut random).map_err(|e| format!("block {block:?}: {e}"))?;
        }
        Ok(())
    }
}

impl Warp {
    fn new(number: usize, p: &Body, args: &[u64]) -> Warp {
        let mut slots = vec![[0; 32]; p.slots as usize];
        for &(slot, value) in &p.constants {
            slots[slot as usize] = [value; 32];
        }
        for &(argument, slot) in &p.args {
            slots[slot as usize] = [args.get(argument).copied().unwrap_or(0); 32];
        }
        Warp { number, slots, pc: [0; 32], at: [At::Running; 32] }
    }

    fn restart(&mut self) {
        self.pc = [0; 32];
        self.at = [At::Running; 32];
    }

    /// Lanes that run on from the lowest instruction, which they are at; where the next ones wait.
    fn front(&self) -> Option<(usize, u32, usize)> {
        let running = || (0..32).filter(|&l| self.at[l] == At::Running);
        let first = running().map(|l| self.pc[l]).min()?;
        let lanes = running().filter(|&l| self.pc[l] == first).fold(0, |m, l| m | 1 << l);
        let next = running().map(|l| self.pc[l]).filter(|&pc| pc > first).min().unwrap_or(usize::MAX);
        Some((first, lanes, next))
    }

    fn park(&mut self, lanes: u32, pc: usize, at: At) {
        for lane in each(lanes) {
            self.pc[lane] = pc;
            self.at[lane] = at;
        }
    }
}

/// The numbers of the bits set.
fn each(mut lanes: u32) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let lane = lanes.trailing_zeros();
        lanes &= lanes.wrapping_sub(1);
        (lane < 32).then_some(lane as usize)
    })
}

impl Run<'_> {
    fn block(&mut self, warps: &mut [Warp], random: &mut u64) -> Result<(), String> {
        self.epoch += 1;
        loop {
            let mut order: Vec<usize> = (0..warps.len()).collect();
            for i in (1..order.len()).rev() {
                *random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                order.swap(i, (*random >> 33) as usize % (i + 1));
            }
            for w in order {
                self.warp(&mut warps[w])?;
            }
            if warps.iter().all(|w| w.at == [At::Done; 32]) {
                return Ok(());
            }
            // Blocks pass their own barriers; where none can, they wait for one another.
            let mut passed = false;
            for own in warps.chunks_mut(self.threads as usize / 32) {
                let waits = |w: &Warp| match &self.p.insts.get(w.pc[0]).map(|i| (&i.code, &i.args)) {
                    _ if w.at != [At::Barrier; 32] => false,
                    Some((Code::Barrier { .. }, _)) => true,
                    Some((Code::Wait, args)) => self.is_over(w.slots[args[0] as usize][0], w.number),
                    _ => false,
                };
                if own.iter().any(waits) {
                    self.barrier(own)?;
                    passed = true;
                }
            }
            if !passed {
                let stuck = |w: &&Warp| matches!(self.p.insts.get(w.pc[0]), Some(Inst { code: Code::Wait, .. }));
                if let Some(w) = warps.iter().find(stuck) {
                    return Err(format!("bytes or arrivals that do not come: `{}`", self.line(w.pc[0])));
                }
                self.barrier(warps)?;
            }
        }
    }

    /// Runs a warp until its lanes wait for the block or end.
    fn warp(&mut self, w: &mut Warp) -> Result<(), String> {
        loop {
            while let Some((pc, lanes, next)) = w.front() {
                self.straight(w, pc, lanes, next)?;
            }
            if w.at.iter().any(|&at| at != w.at[0]) || w.pc.iter().any(|&pc| pc != w.pc[0]) {
                let line = |pc: &usize| self.line(*pc).to_owned();
                let mut at: Vec<String> = w.pc.iter().map(line).collect();
                at.dedup();
                return Err(format!("lanes of warp {} diverge: {at:#?}", w.number));
            }
            if w.at[0] != At::Warp {
                return Ok(());
            }
            self.together(w)?;
        }
    }

    fn line(&self, pc: usize) -> &str {
        self.p.insts.get(pc).map_or("the end", |i| &self.p.lines[i.line])
    }

    /// Whether a barrier in shared memory of that warp's block has all that it waits for.
    fn is_over(&self, at: u64, warp: usize) -> bool {
        let block = (warp * 32 / self.threads as usize) as u64 * self.size;
        let words = self.m.shared.get((block + at) as usize..).and_then(|m| m.get(..8));
        words.is_some_and(|w| w == [0; 8])
    }

    fn barrier(&mut self, warps: &mut [Warp]) -> Result<(), String> {
        let pc = warps[0].pc[0];
        if warps.iter().any(|w| w.at != [At::Barrier; 32] || w.pc != [pc; 32]) {
            let at: Vec<&str> = warps.iter().map(|w| self.line(w.pc[0])).collect();
            return Err(format!("not all warps meet at one barrier: {at:#?}"));
        }
        self.m.barriers += 1;
        self.epoch += 1;
        let inst = &self.p.insts[pc];
        let any = match inst.code {
            Code::Barrier { any: true } => warps.iter().any(|w| w.slots[inst.args[0] as usize] != [0; 32]),
            _ => false,
        };
        for w in warps {
            if let Some(&dst) = inst.dst.first() {
                w.slots[dst as usize] = [any.into(); 32];
            }
            w.park(u32::MAX, pc + 1, At::Running);
        }
        Ok(())
    }

    /// An instruction of all lanes of a warp.
    fn together(&mut self, w: &mut Warp) -> Result<(), String> {
        let pc = w.pc[0];
        let inst = &self.p.insts[pc];
        let arg = |i: usize| &w.slots[inst.args[i] as usize];
        let unknown = || format!("cannot run `{}`", self.line(pc));
        let results: Vec<Lanes> = match &inst.code {
            Code::Warp(how) => vec![warp::exchange(how, arg(0), arg(1)).ok_or_else(unknown)?],
            Code::Multiply(product) => {
                let c = [arg(0), arg(1), arg(2), arg(3)];
                product.multiply(c, [arg(4), arg(5), arg(6), arg(7)], [arg(8), arg(9)]).to_vec()
            }
            Code::Matrices { transposed } => {
                let at = *arg(0);
                let mut rows = [[0; 16]; 32];
                for lane in 0..32 {
                    let range = self.touch(true, at[lane], 16, 16, How::Read, thread(w, lane));
                    let range = range.map_err(|e| self.wrong(w, pc, lane, &e))?;
                    rows[lane].copy_from_slice(&self.m.shared[range]);
                }
                warp::load_matrices(&rows, *transposed).to_vec()
            }
            _ => return Err(unknown()),
        };
        for (&dst, v) in inst.dst.iter().zip(results) {
            w.slots[dst as usize] = v;
        }
        w.park(u32::MAX, pc + 1, At::Running);
        Ok(())
    }

    fn wrong(&self, w: &Warp, pc: usize, lane: usize, why: &str) -> String {
        let inst = &self.p.insts[pc];
        let args: Vec<u64> = inst.args.iter().map(|&a| w.slots[a as usize][lane]).collect();
        format!("{why}: thread {}, `{}`, {args:x?}", w.number * 32 + lane, self.line(pc))
    }

    /// Runs `lanes` from `pc` on, up to a branch, a meeting, or where other lanes wait.
    fn straight(&mut self, w: &mut Warp, mut pc: usize, lanes: u32, next: usize) -> Result<(), String> {
        let p = self.p;
        loop {
            if pc == next {
                w.park(lanes, pc, At::Running);
                return Ok(());
            }
            let inst = &p.insts[pc];
            if w.number == 0 {
                self.m.steps += u64::from(lanes & 1);
            }
            match &inst.code {
                Code::Warp(_) | Code::Multiply(_) | Code::Matrices { .. } => {
                    w.park(lanes, pc, At::Warp);
                    return Ok(());
                }
                Code::Barrier { .. } | Code::Cluster | Code::Wait => {
                    w.park(lanes, pc, At::Barrier);
                    return Ok(());
                }
                Code::Return => {
                    w.park(lanes, pc, At::Done);
                    return Ok(());
                }
                Code::Jump => {
                    self.jump(w, lanes, &inst.to[0]);
                    return Ok(());
                }
                Code::Branch => {
                    let c = &w.slots[inst.args[0] as usize];
                    let then = each(lanes).filter(|&l| c[l] & 1 == 1).fold(0, |m, l| m | 1 << l);
                    self.jump(w, then, &inst.to[0]);
                    self.jump(w, lanes & !then, &inst.to[1]);
                    return Ok(());
                }
                _ => self.step(w, pc, inst, lanes)?,
            }
            pc += 1;
        }
    }

    fn jump(&self, w: &mut Warp, lanes: u32, to: &Goto) {
        if lanes == 0 {
            return;
        }
        let (pc, args) = &self.p.labels[&to.label];
        let values: Vec<Lanes> = to.args.iter().map(|&a| w.slots[a as usize]).collect();
        for (&a, v) in args.iter().zip(values) {
            let slot = &mut w.slots[a as usize];
            if lanes == u32::MAX {
                *slot = v;
            } else {
                each(lanes).for_each(|l| slot[l] = v[l]);
            }
        }
        w.park(lanes, *pc, At::Running);
    }

    /// An instruction of each lane by itself.
    fn step(&mut self, w: &mut Warp, pc: usize, inst: &Inst, lanes: u32) -> Result<(), String> {
        let lanes = match inst.predicate {
            Some(p) => each(lanes).filter(|&l| w.slots[p as usize][l] != 0).fold(0, |m, l| m | 1 << l),
            None => lanes,
        };
        let get = |w: &Warp, s: Slot, lane: usize| w.slots[s as usize][lane];
        match &inst.code {
            Code::Scalar(f, from, to) => {
                const NONE: Lanes = [0; 32];
                let mask = scalar::mask(*to);
                let arg = |i: usize| inst.args.get(i).map_or(&NONE, |&s| &w.slots[s as usize]);
                let (a, b, c) = (arg(0), arg(1), arg(2));
                let mut out = w.slots[inst.dst[0] as usize];
                for (lane, out) in out.iter_mut().enumerate() {
                    if lanes >> lane & 1 == 0 {
                        continue;
                    }
                    match f([a[lane], b[lane], c[lane]], *from, *to) {
                        Some(v) => *out = v & mask,
                        None => return Err(self.wrong(w, pc, lane, "undefined")),
                    }
                }
                w.slots[inst.dst[0] as usize] = out;
            }
            Code::Thread => {
                let first = w.number * 32 % self.threads as usize;
                each(lanes).for_each(|l| w.slots[inst.dst[0] as usize][l] = (first + l) as u64);
            }
            Code::Rank => w.slots[inst.dst[0] as usize] = [(w.number * 32 / self.threads as usize) as u64; 32],
            Code::Block(axis) => w.slots[inst.dst[0] as usize] = [self.block[*axis].into(); 32],
            Code::Load { shared, bytes, align } => {
                for lane in each(lanes) {
                    let (at, n) = (get(w, inst.args[0], lane), bytes * inst.dst.len() as u64);
                    let range = self.touch(*shared, at, n, *align, How::Read, thread(w, lane));
                    let range = range.map_err(|e| self.wrong(w, pc, lane, &e))?;
                    let memory = if *shared { &self.m.shared } else { &self.m.global };
                    for (part, &dst) in memory[range].chunks(*bytes as usize).zip(&inst.dst) {
                        w.slots[dst as usize][lane] = part.iter().rev().fold(0, |v, &b| v << 8 | u64::from(b));
                    }
                }
            }
            Code::Store { shared, bytes, align } => {
                for lane in each(lanes) {
                    let (at, n) = (get(w, inst.args[0], lane), bytes * (inst.args.len() as u64 - 1));
                    let range = self.touch(*shared, at, n, *align, How::Write, thread(w, lane));
                    let range = range.map_err(|e| self.wrong(w, pc, lane, &e))?;
                    let memory = if *shared { &mut self.m.shared } else { &mut self.m.global };
                    for (part, &from) in memory[range].chunks_mut(*bytes as usize).zip(&inst.args[1..]) {
                        part.copy_from_slice(&get(w, from, lane).to_le_bytes()[..part.len()]);
                    }
                }
            }
            Code::Atomic(combine) => {
                for lane in each(lanes) {
                    let range = self.touch(true, get(w, inst.args[0], lane), 4, 4, How::Atomic, thread(w, lane));
                    let range = range.map_err(|e| self.wrong(w, pc, lane, &e))?;
                    let by = get(w, inst.args[1], lane) as u32;
                    let word = &mut self.m.shared[range];
                    let old = word.iter().rev().fold(0, |v, &b| v << 8 | u32::from(b));
                    word.copy_from_slice(&combine(old, by).to_le_bytes());
                    w.slots[inst.dst[0] as usize][lane] = old.into();
                }
            }
            _ => return Err(format!("cannot run `{}`", self.line(pc))),
        }
        Ok(())
    }

    /// The range of an access, after checks.
    fn touch(&mut self, shared: bool, at: u64, n: u64, align: u64, how: How, me: u32) -> Result<Range<usize>, String> {
        let size = if shared { self.size } else { self.m.global.len() as u64 };
        // Shared memory of this block, or of the one that the address names.
        let (at, rank) = match at.checked_shr(parse::RANK_SHIFT) {
            Some(0) | None if shared => (at, u64::from((me - 1) / self.threads)),
            Some(rank) if shared => (at & ((1 << parse::RANK_SHIFT) - 1), rank - 1),
            _ => (at, 0),
        };
        if rank >= u64::from(self.m.team.max(1)) {
            return Err(format!("block {rank} of a cluster of {}", self.m.team.max(1)));
        }
        let end = at.checked_add(n).filter(|&end| end <= size && at.is_multiple_of(align));
        let Some(end) = end else { return Err(format!("{n} bytes at {at} of {size}, align {align}")) };
        let buffers = &self.m.buffers;
        if !shared && !buffers.is_empty() && !buffers.iter().any(|b| b.start <= at && end <= b.end) {
            return Err(format!("{n} bytes at {at}, outside of all buffers"));
        }
        let first = if shared { rank * size } else { 0 };
        let range = (first + at) as usize..(first + end) as usize;
        let touched = if shared { &mut self.touched_shared } else { &mut self.touched_global };
        for seen in &mut touched[range.clone()] {
            if seen.epoch != self.epoch {
                *seen = Touch { epoch: self.epoch, ..Touch::default() };
            }
            let others = |who: u32| who != 0 && who != me;
            let race = match how {
                How::Read => others(seen.write) || others(seen.atomic),
                How::Write => others(seen.write) || others(seen.atomic) || others(seen.read),
                How::Atomic => others(seen.write) || others(seen.read),
            };
            if race {
                return Err(format!("race of thread {} with {:?}", me - 1, (seen.read, seen.write, seen.atomic)));
            }
            let slot = match how {
                How::Read => &mut seen.read,
                How::Write => &mut seen.write,
                How::Atomic => &mut seen.atomic,
            };
            *slot = if *slot == 0 || *slot == me { me } else { MANY };
        }
        Ok(range)
    }
}

/// A thread's mark in [`Touch`].
fn thread(w: &Warp, lane: usize) -> u32 {
    (w.number * 32 + lane) as u32 + 1
}
