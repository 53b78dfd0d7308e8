//! Threads that share the tasks of one launch after another.
//!
//! A decode step is about a hundred launches of some microseconds, so handing out work must cost about one. The whole
//! protocol is one counter, `left`: the tasks of the current job that nobody has taken. The caller writes the job, then sets
//! `left`; whoever lowers it by one owns the task of that number, and only then reads the job. The caller takes part, and
//! returns when `done` has counted every task. So
//!
//! * the caller never waits for a thread that took nothing: a sleeping or descheduled worker costs no time;
//! * a thread that comes late finds `left` at zero, or a task of a newer job, which is as good;
//! * the job is written only while no task is owned.
//!
//! Workers look for work for [`SPIN`], then sleep until a job with more than one task comes.

use crate::error::DeviceError;
use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long an idle worker looks for work before it sleeps: longer than a launch that only one worker has a task of, and than
/// the sampling between two steps, because waking takes some 50 us.
const SPIN: Duration = Duration::from_micros(400);
/// Looks between two readings of the clock.
const LOOKS: u32 = 64;

/// Runs one task: the worker's number and the task's.
type Task<'a> = &'a (dyn Fn(usize, u64) + Sync);

/// A pool of threads; the one that calls [`Pool::run`] is worker 0.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    /// Tasks of the job that nobody has taken yet.
    left: AtomicU64,
    /// Tasks of the job that are finished.
    done: AtomicU64,
    /// The job. Written by `run` while `left` is 0 and all tasks are done; read by owners of a task.
    job: UnsafeCell<Job>,
    /// The first panic of a task.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    panicked: AtomicBool,
    /// Workers that sleep or are about to.
    sleepers: AtomicUsize,
    sleep: Mutex<()>,
    wake: Condvar,
    stop: AtomicBool,
}

#[derive(Clone, Copy)]
struct Job {
    tasks: u64,
    /// Valid while the call of `run` that wrote it has not returned.
    task: Option<Task<'static>>,
}

// SAFETY: all fields but `job` are Sync. `job` is written by one thread only (`run` takes `&mut Pool`), while no task is owned;
// the write happens before the release store to `left`, and readers own a task through an acquiring exchange of `left`.
unsafe impl Sync for Shared {}
// SAFETY: `job` holds a reference to something Sync, which may be used from any thread; everything else is Send.
unsafe impl Send for Shared {}

impl Pool {
    /// A pool of `workers` threads, the caller's included.
    pub(crate) fn new(workers: usize) -> Result<Pool, DeviceError> {
        let shared = Arc::new(Shared {
            left: AtomicU64::new(0),
            done: AtomicU64::new(0),
            job: UnsafeCell::new(Job { tasks: 0, task: None }),
            panic: Mutex::new(None),
            panicked: AtomicBool::new(false),
            sleepers: AtomicUsize::new(0),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
            stop: AtomicBool::new(false),
        });
        let mut pool = Pool { shared, threads: Vec::new() };
        for worker in 1..workers {
            let shared = Arc::clone(&pool.shared);
            let thread = std::thread::Builder::new()
                .name(format!("dsc-worker-{worker}"))
                .spawn(move || shared.work(worker))
                .map_err(|e| DeviceError::Thread { thread: worker, reason: e.to_string() })?;
            pool.threads.push(thread);
        }
        Ok(pool)
    }

    /// Threads, the caller's included.
    pub(crate) fn workers(&self) -> usize {
        self.threads.len() + 1
    }

    /// Runs tasks `0..tasks`, each once, in any order and concurrently; returns when all are done. A single task runs right here.
    pub(crate) fn run(&mut self, tasks: u64, task: Task<'_>) {
        if tasks <= 1 || self.threads.is_empty() {
            (0..tasks).for_each(|i| task(0, i));
            return;
        }
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. The reference is used by owners of a task, and this call returns (or unwinds, in
        // `finish`) only after `done` has counted every task.
        let task = unsafe { std::mem::transmute::<Task<'_>, Task<'static>>(task) };
        // SAFETY: `left` is 0 and every task of the last job is done, so nobody reads the job; `&mut self` keeps writers out.
        unsafe { *shared.job.get() = Job { tasks, task: Some(task) } };
        shared.done.store(0, Ordering::Relaxed);
        shared.left.store(tasks, Ordering::SeqCst);
        if shared.sleepers.load(Ordering::SeqCst) > 0 {
            drop(shared.sleep.lock().unwrap_or_else(PoisonError::into_inner));
            shared.wake.notify_all();
        }
        while shared.take_one(0) {}
        shared.finish(tasks);
    }
}

impl Shared {
    /// Runs one task of the current job, if there is one left.
    fn take_one(&self, worker: usize) -> bool {
        let lower = |left: u64| left.checked_sub(1);
        let Ok(left) = self.left.fetch_update(Ordering::AcqRel, Ordering::Acquire, lower) else { return false };
        // SAFETY: this thread owns a task, so the job was written before (acquired with `left`) and stays until it is done.
        let job = unsafe { *self.job.get() };
        if let Some(task) = job.task
            && let Err(panic) = catch_unwind(AssertUnwindSafe(|| task(worker, job.tasks - left)))
        {
            self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
            self.panicked.store(true, Ordering::Relaxed);
        }
        self.done.fetch_add(1, Ordering::Release);
        true
    }

    /// Waits until every task is done; hands on a panic.
    fn finish(&self, tasks: u64) {
        let mut looks = 0u32;
        while self.done.load(Ordering::Acquire) < tasks {
            looks += 1;
            // The owner of the last task may have lost its core, perhaps to this loop.
            if looks < 10_000 { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
        if self.panicked.swap(false, Ordering::Relaxed) {
            let panic = self.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
            resume_unwind(panic.unwrap_or_else(|| Box::new("a task panicked")));
        }
    }

    fn work(&self, worker: usize) {
        while !self.stop.load(Ordering::Acquire) {
            while self.take_one(worker) {}
            let start = Instant::now();
            while self.idle() && start.elapsed() < SPIN {
                for _ in 0..LOOKS {
                    if !self.idle() {
                        break;
                    }
                    std::hint::spin_loop();
                }
            }
            if self.idle() {
                self.nap();
            }
        }
    }

    fn idle(&self) -> bool {
        self.left.load(Ordering::Relaxed) == 0 && !self.stop.load(Ordering::Relaxed)
    }

    /// Sleeps until there is work. The caller sets `left`, then reads `sleepers`; this side raises `sleepers`, then reads
    /// `left`; all sequentially consistent, so one of them sees the other. The lock covers the time from here to the wait.
    fn nap(&self) {
        let mut guard = self.sleep.lock().unwrap_or_else(PoisonError::into_inner);
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        while self.left.load(Ordering::SeqCst) == 0 && !self.stop.load(Ordering::SeqCst) {
            guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        drop(self.shared.sleep.lock().unwrap_or_else(PoisonError::into_inner));
        self.shared.wake.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join(); // tasks' panics are caught; there is no other
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_in_every_job() {
        for workers in [1, 2, 3, 8] {
            let mut pool = Pool::new(workers).unwrap();
            assert_eq!(pool.workers(), workers);
            for round in 0..3000u64 {
                let tasks = round % 9;
                let counts: Vec<AtomicU64> = (0..tasks).map(|_| AtomicU64::new(0)).collect();
                pool.run(tasks, &|worker, task| {
                    assert!(worker < workers);
                    counts[task as usize].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|n| n.load(Ordering::Relaxed) == 1), "{workers} {round}");
            }
        }
    }

    #[test]
    fn wakes_from_sleep() {
        let mut pool = Pool::new(3).unwrap();
        for _ in 0..20 {
            std::thread::sleep(Duration::from_millis(2));
            let sum = AtomicU64::new(0);
            pool.run(100, &|_, task| {
                sum.fetch_add(task, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 4950);
        }
    }

    #[test]
    fn jobs_see_what_earlier_ones_wrote() {
        let mut pool = Pool::new(4).unwrap();
        let cells: Vec<AtomicU64> = (0..64).map(|_| AtomicU64::new(1)).collect();
        for _ in 0..500 {
            // Each task reads its neighbour's value of the job before.
            let old: Vec<u64> = cells.iter().map(|c| c.load(Ordering::Relaxed)).collect();
            pool.run(64, &|_, i| {
                cells[i as usize].store(old[(i as usize + 1) % 64].wrapping_mul(3) + i, Ordering::Relaxed)
            });
            for (i, cell) in cells.iter().enumerate() {
                assert_eq!(cell.load(Ordering::Relaxed), old[(i + 1) % 64].wrapping_mul(3) + i as u64);
            }
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let mut pool = Pool::new(2).unwrap();
        let result = catch_unwind(AssertUnwindSafe(|| pool.run(10, &|_, task| assert!(task != 7, "seven"))));
        assert!(result.is_err());
        let count = AtomicU64::new(0);
        pool.run(10, &|_, _| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(count.into_inner(), 10);
    }
}
