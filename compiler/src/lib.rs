//! Ahead-of-time compiler for the DeepSeek-V3.2 model family.
//!
//! [`compile`] is the way down from a model folder to an artifact and the table of contents of this crate. The `dsc` command
//! ([`cli`]) also runs artifacts; built without the `compile` feature it does only that.

pub mod cli;
#[cfg(feature = "compile")]
pub mod compile;
#[cfg(feature = "compile")]
pub mod front;
#[cfg(feature = "compile")]
pub mod kernels;
#[cfg(feature = "compile")]
pub mod library;
pub mod microbench;
#[cfg(feature = "compile")]
pub mod passes;
#[cfg(feature = "compile")]
pub mod plan;
#[cfg(feature = "compile")]
pub mod remember;
pub mod tune;
