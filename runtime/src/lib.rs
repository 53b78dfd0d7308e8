//! Loads a dsc artifact with the original weights and runs the model: no compiler, no LLVM, no Python.
//!
//! ```text
//! Model    an Artifact (mapped, checked) and its Weights (mapped or made), shared by sessions
//! Session  sequences, their pages of the cache, and a Device that runs the artifact's launches
//! Device   memory and launches: the CPU, or an NVIDIA or AMD GPU
//! Library  operations that other programs call on their own memory
//! ```
//!
//! ```no_run
//! use dsc_runtime::{GenerateOptions, Model, Options};
//! use std::ops::ControlFlow;
//! use std::path::Path;
//!
//! # fn main() -> Result<(), dsc_runtime::Error> {
//! let weights = Path::new("DeepSeek-V3.2");
//! let model = Model::open(Path::new("DeepSeek-V3.2.dsc"), weights, &Options::default())?;
//! let tokenizer = model.tokenizer()?;
//! let mut session = model.session()?;
//! let prompt = tokenizer.encode("The fox said")?;
//! let options = GenerateOptions { max_new_tokens: 64, ..GenerateOptions::default() };
//! let mut text = tokenizer.detokenizer(true);
//! let generation = session.generate(&prompt, &options, &mut |token| {
//!     if let Ok(Some(piece)) = text.push(token) {
//!         print!("{piece}");
//!     }
//!     ControlFlow::Continue(())
//! })?;
//! println!("\n{:?}: {:.1} tokens/s", generation.finish_reason, generation.timings.decode_tokens_per_s());
//! # Ok(())
//! # }
//! ```
//!
//! **Invariants.** Nothing read from a file is trusted with memory: headers are checked before they are used
//! ([`dsc_ir::artifact`]), and a device refuses launches whose views could leave their buffers. The same artifact, weights and
//! requests give the same bits, whatever the number of threads.

pub mod artifact;
pub mod checkpoint;
mod cpu;
mod cpu_limits;
pub mod device;
mod error;
pub mod evaluate;
mod gpu;
mod inputs;
pub mod library;
pub mod limits;
pub mod model;
mod pool;
pub mod sample;
pub mod session;
#[cfg(test)]
mod testing;
pub mod tokenizer;
pub mod verify;
pub mod weights;

pub use artifact::Artifact;
pub use checkpoint::Checkpoint;
pub use cpu::CpuDevice;
pub use device::{Device, Vendor};
pub use error::{CallError, DeviceError, Error, RequestError, WeightError};
pub use evaluate::Evaluation;
pub use gpu::GpuDevice;
pub use library::Library;
pub use limits::Limits;
pub use model::{Model, Opening, Options, WeightsFrom};
pub use sample::Sampler;
pub use session::{
    FinishReason, GenerateOptions, Generation, LogitsWanted, ProfileRow, SeqId, SequenceInput, Session, StepOutput,
    TapData, TapOutput, Timings,
};
pub use tokenizer::Tokenizer;
pub use verify::{KernelReport, Report, Tolerances, verify_kernels};
pub use weights::Weights;
