//! Kernels are compiled independently of one another: one a thread.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

/// Stack of a worker: code generators recurse over long chains of operations.
const STACK_BYTES: usize = 64 << 20;

/// `f` of every item, on as many threads as there are processors; results in order.
pub fn in_parallel<T: Sync, R: Send>(items: &[T], f: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let workers = thread::available_parallelism().map_or(1, |n| n.get()).min(items.len());
    let next = AtomicUsize::new(0);
    let results: Vec<Mutex<Option<R>>> = items.iter().map(|_| Mutex::new(None)).collect();
    let work = || {
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(i) else { break };
            let result = f(item);
            *results[i].lock().expect("no holder panics") = Some(result);
        }
    };
    thread::scope(|scope| {
        let spawned =
            (0..workers).filter(|_| thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, work).is_ok());
        if spawned.count() == 0 {
            work();
        }
    });
    let take = |r: Mutex<Option<R>>| r.into_inner().expect("no holder panics").expect("every item was taken");
    results.into_iter().map(take).collect()
}
