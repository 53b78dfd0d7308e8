//! One kernel of the library alone, on random data: what `dsc bench --kernel` times.
//!
//! ```text
//! name, sizes -> families: a graph of the op and of what feeds it   (nodes `setup..` and `kernel..`)
//!             -> passes, plan, target                               (as for a model)
//!             -> run: memory, bindings, times of the `kernel..` launches
//! ```
//!
//! What runs is what a model of these sizes would run: the same passes, schedules and code. Nothing here names a target.

mod data;
#[cfg(feature = "compile")]
mod families;
#[cfg(feature = "compile")]
mod prepare;
mod run;

#[cfg(feature = "compile")]
pub use families::{Choice, FAMILIES, Family};
#[cfg(feature = "compile")]
pub use prepare::{Bench, BenchError, prepare};
pub use run::{TimedLaunch, Timing, results, time};
