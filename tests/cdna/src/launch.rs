//! Launches: registers as the hardware sets them, blocks on threads, waves of a block in turn.

use crate::decode::Inst;
use crate::fault::{Cause, Error, Fault};
use crate::isa::{Cx, Env};
use crate::lds::Lds;
use crate::memory::Memory;
use crate::object::{CodeObject, Kernel};
use crate::wave::{State, Wave};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

/// How to run a launch.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How waves of a block take turns: until they wait for 0, else some instructions at a time, by this seed.
    pub seed: u64,
    /// Blocks that run at the same time.
    pub threads: usize,
    /// Instructions that a wave may run.
    pub limit: u64,
}

impl Default for Options {
    fn default() -> Options {
        Options { seed: 0, threads: 2, limit: 1 << 26 }
    }
}

/// What a launch runs.
#[derive(Clone, Debug)]
pub struct Launch<'a> {
    /// The kernel's name.
    pub kernel: &'a str,
    /// Blocks in each dimension.
    pub grid: [u32; 3],
    /// Threads of a block in each dimension.
    pub block: [u32; 3],
    /// LDS beside the kernel's own, in bytes.
    pub dynamic_lds: u32,
    /// The arguments that the caller gives, as they lie in memory.
    pub arguments: &'a [u8],
}

/// What was run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Instructions of waves.
    pub instructions: u64,
}

/// Addresses of what a launch maps beside the caller's memory.
struct Mapped {
    kernarg: u64,
    packet: u64,
    image: u64,
}

/// What is the same for all blocks.
struct Grid<'a> {
    object: &'a CodeObject,
    kernel: &'a Kernel,
    launch: &'a Launch<'a>,
    env: Env<'a>,
    mapped: Mapped,
    lds_bytes: usize,
    options: Options,
}

impl CodeObject {
    /// Runs all blocks of a launch. What the kernel may touch is what `memory` has allocated.
    ///
    /// # Errors
    /// If the launch does not suit the kernel, or what a wave did wrong; of several blocks, the first one's.
    pub fn launch(&self, launch: &Launch<'_>, memory: &mut Memory, options: Options) -> Result<Stats, Error> {
        let kernel = self.kernel(launch.kernel)?;
        let bad = |reason: String| Error::Launch { kernel: kernel.name.clone(), reason };
        let threads: u64 = launch.block.iter().map(|&n| u64::from(n)).product();
        if threads == 0 || threads > u64::from(kernel.max_threads.min(1024)) {
            return Err(bad(format!("blocks of {threads} threads, of {} at most", kernel.max_threads)));
        }
        let lds_bytes = kernel.lds_bytes + launch.dynamic_lds as usize;
        if lds_bytes > self.chip.lds_bytes {
            return Err(bad(format!("{lds_bytes} bytes of LDS, {} has {}", self.chip.name, self.chip.lds_bytes)));
        }
        let end = kernel.arguments.iter().map(|a| a.offset + a.size).max().unwrap_or(0);
        if launch.arguments.len() < end || launch.arguments.len() > kernel.kernarg_bytes {
            return Err(bad(format!("{} bytes of arguments, it takes {end}", launch.arguments.len())));
        }
        let count = memory.count();
        let mapped = Mapped {
            kernarg: memory.alloc_read_only(&kernarg(kernel, launch)),
            packet: memory.alloc_read_only(&packet(kernel, launch, lds_bytes)),
            image: memory.alloc_read_only(&self.image),
        };
        let addresses: Vec<u64> = self.code.iter().map(|i| i.address).collect();
        let env = Env { memory: &*memory, chip: self.chip, image: mapped.image, addresses: &addresses };
        let grid = Grid { object: self, kernel, launch, env, mapped, lds_bytes, options };
        let result = grid.run(threads as usize);
        memory.truncate(count);
        result
    }
}

/// The kernel's arguments, hidden ones filled in.
fn kernarg(kernel: &Kernel, launch: &Launch<'_>) -> Vec<u8> {
    let mut bytes = launch.arguments.to_vec();
    bytes.resize(kernel.kernarg_bytes, 0);
    // A loader allocates whole cache lines; LLVM rounds its loads up to 16 bytes.
    bytes.resize(kernel.kernarg_bytes.next_multiple_of(64), 0xa5);
    for hidden in &kernel.hidden {
        let axis = match hidden.kind.as_bytes().last() {
            Some(b'y') => 1,
            Some(b'z') => 2,
            _ => 0,
        };
        let value = match hidden.kind.as_str() {
            k if k.starts_with("hidden_block_count_") => launch.grid[axis],
            k if k.starts_with("hidden_group_size_") => launch.block[axis],
            "hidden_grid_dims" => 3,
            "hidden_dynamic_lds_size" => launch.dynamic_lds,
            _ => 0,
        };
        let size = hidden.size.min(4);
        bytes[hidden.offset..hidden.offset + size].copy_from_slice(&value.to_le_bytes()[..size]);
    }
    bytes
}

/// The dispatch packet of HSA, as far as kernels read it.
fn packet(kernel: &Kernel, launch: &Launch<'_>, lds_bytes: usize) -> Vec<u8> {
    let mut bytes = vec![0; 64];
    for d in 0..3 {
        bytes[4 + 2 * d..6 + 2 * d].copy_from_slice(&(launch.block[d] as u16).to_le_bytes());
        bytes[12 + 4 * d..16 + 4 * d].copy_from_slice(&(launch.block[d] * launch.grid[d]).to_le_bytes());
    }
    bytes[24..28].copy_from_slice(&(kernel.scratch_bytes as u32).to_le_bytes());
    bytes[28..32].copy_from_slice(&(lds_bytes as u32).to_le_bytes());
    bytes
}

impl Grid<'_> {
    /// Blocks in order, on threads that take the next one.
    fn run(&self, threads: usize) -> Result<Stats, Error> {
        let [x, y, z] = self.launch.grid.map(u64::from);
        let count = x * y * z;
        let (next, instructions) = (AtomicU64::new(0), AtomicU64::new(0));
        let failed: Mutex<Option<(u64, Box<Fault>)>> = Mutex::new(None);
        let work = || {
            let mut lds = Lds::new(self.lds_bytes, threads.div_ceil(64));
            loop {
                let at = next.fetch_add(1, Ordering::Relaxed);
                if at >= count {
                    break;
                }
                let block = [at % x, at / x % y, at / x / y].map(|n| n as u32);
                lds.reset();
                match self.block(block, threads, &mut lds) {
                    Ok(n) => drop(instructions.fetch_add(n, Ordering::Relaxed)),
                    Err(fault) => {
                        // Later blocks need not start; earlier ones may still fail first.
                        next.store(count, Ordering::Relaxed);
                        let mut failed = failed.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                        if failed.as_ref().is_none_or(|(first, _)| at < *first) {
                            *failed = Some((at, fault));
                        }
                    }
                }
            }
        };
        let workers = self.options.threads.clamp(1, count.clamp(1, 64) as usize);
        thread::scope(|scope| {
            (1..workers).for_each(|_| drop(scope.spawn(work)));
            work();
        });
        match failed.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
            Some((_, fault)) => Err(Error::Fault(fault)),
            None => Ok(Stats { instructions: instructions.into_inner() }),
        }
    }

    /// Runs a block; returns how many instructions its waves ran.
    fn block(&self, block: [u32; 3], threads: usize, lds: &mut Lds) -> Result<u64, Box<Fault>> {
        let mut waves: Vec<Wave> = (0..threads.div_ceil(64)).map(|w| self.wave(block, w, threads)).collect();
        let mut random = self.options.seed ^ u64::from(block[0]) << 20 ^ u64::from(block[1]) << 40;
        let mut total = 0;
        loop {
            let running: Vec<usize> = (0..waves.len()).filter(|&w| waves[w].state == State::Running).collect();
            if running.is_empty() {
                // All that have not ended are at the barrier.
                let waiting = waves.iter_mut().filter(|w| w.state == State::Barrier);
                if waiting.map(|w| (w.state, w.epoch) = (State::Running, w.epoch + 1)).count() == 0 {
                    return Ok(total);
                }
                continue;
            }
            let (turn, quantum) = match self.options.seed {
                0 => (running[0], u64::MAX),
                _ => {
                    random = splitmix(random);
                    (running[(random >> 32) as usize % running.len()], 1 + random % 48)
                }
            };
            let wave = &mut waves[turn];
            let limit = self.options.limit.saturating_sub(total / threads as u64);
            let fault = |wave: &Wave, at: usize, cause: Cause| {
                let inst = self.object.code.get(at);
                Box::new(Fault {
                    kernel: self.kernel.name.clone(),
                    block,
                    wave: usize::from(wave.id),
                    address: inst.map_or(0, |i| i.address),
                    text: inst.map_or(String::new(), |i| i.text.clone()),
                    cause,
                })
            };
            match self.turn(wave, lds, quantum.min(limit)) {
                Ok(n) => total += n,
                Err((at, cause)) => return Err(fault(wave, at, cause)),
            }
            match wave.state {
                State::Barrier => lds.barrier(turn, wave.epoch, wave.done),
                State::Ended => lds.end(turn),
                State::Running if quantum > limit => return Err(fault(wave, wave.pc, Cause::Endless(limit))),
                State::Running => {}
            }
        }
    }

    /// Runs a wave until it stops, or for so many instructions.
    fn turn(&self, wave: &mut Wave, lds: &mut Lds, most: u64) -> Result<u64, (usize, Cause)> {
        let mut cx = Cx { w: wave, lds, env: &self.env };
        let code: &[Inst] = &self.object.code;
        for n in 0..most {
            let at = cx.w.pc;
            let Some(inst) = code.get(at) else { return Err((at, Cause::Jump(0))) };
            cx.w.pc = at + 1;
            (cx.w.known, cx.w.mask) = (!0, !0);
            (inst.run)(&mut cx, inst).map_err(|cause| (at, cause))?;
            if cx.w.state != State::Running {
                return Ok(n + 1);
            }
        }
        Ok(most)
    }

    /// A wave with registers as the hardware sets them.
    fn wave(&self, block: [u32; 3], id: usize, threads: usize) -> Wave {
        let kernel = self.kernel;
        let mut wave = Wave::new(id as u8, kernel.vector_registers, kernel.scratch_bytes, kernel.mode);
        wave.pc = kernel.entry;
        let left = threads - 64 * id;
        let exec = if left >= 64 { !0 } else { (1u64 << left) - 1 };
        wave.preset_s(126, exec as u32);
        wave.preset_s(127, (exec >> 32) as u32);
        let mut next = 0;
        let mut put = |wave: &mut Wave, words: &[u32]| {
            for &word in words {
                wave.preset_s(next, word);
                next += 1;
            }
        };
        let pair = |v: u64| [v as u32, (v >> 32) as u32];
        let on = |bit: u32| kernel.properties >> bit & 1 != 0;
        let pointers = [(1, self.mapped.packet), (2, 0), (3, self.mapped.kernarg), (4, 0), (5, 0)]
            .into_iter()
            .filter(|(b, _)| on(*b));
        if on(0) {
            put(&mut wave, &[0; 4]);
        }
        for (_, value) in pointers {
            put(&mut wave, &pair(value));
        }
        if on(6) {
            put(&mut wave, &[kernel.scratch_bytes as u32]);
        }
        let (words, from) = kernel.preload;
        let arguments = kernarg(kernel, self.launch);
        for chunk in arguments.chunks_exact(4).skip(from).take(words) {
            put(&mut wave, &[u32::from_le_bytes([chunk[0], chunk[1], chunk[2], chunk[3]])]);
        }
        // Then the block's numbers, as far as the kernel asks for them.
        let user = (kernel.rsrc2 >> 1 & 31) as usize;
        let mut at = user;
        for (d, number) in block.into_iter().enumerate() {
            if kernel.rsrc2 >> (7 + d) & 1 != 0 {
                wave.preset_s(at, number);
                at += 1;
            }
        }
        let [x, y, _] = self.launch.block.map(|n| n as usize);
        let thread = |l: usize| {
            let t = 64 * id + l;
            ((t % x) | (t / x % y) << 10 | (t / x / y) << 20) as u32
        };
        // Three numbers of ten bits each in one register.
        wave.preset_v(0, std::array::from_fn(thread));
        wave
    }
}

fn splitmix(state: u64) -> u64 {
    let mut z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
