//! What can go wrong between an artifact and its output.

use crate::checkpoint::{CheckpointError, StorageDtype};
use crate::device::Vendor;
use crate::sample::SampleError;
use crate::tokenizer::TokenizerError;
use dsc_ir::artifact::ArtifactError;
use std::path::PathBuf;

/// Any failure of the runtime. The message says whose fault it is and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The system refused a file.
    #[error("cannot read {path}: {source}", path = .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is not an artifact, or a damaged one, or one of another version.
    #[error("{path}: {source}", path = .path.display())]
    Artifact {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: ArtifactError,
    },
    /// The checkpoint cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The checkpoint does not fit the artifact.
    #[error(transparent)]
    Weight(#[from] WeightError),
    /// The device cannot run the artifact.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The request cannot be served.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// No token can be chosen.
    #[error(transparent)]
    Sample(#[from] SampleError),
    /// Text cannot be turned into tokens or back.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A kernel library was called wrongly.
    #[error(transparent)]
    Call(#[from] CallError),
    /// A file of expected outputs does not say what to run or to expect.
    #[error("the golden file is not usable: {0}")]
    Golden(String),
}

/// Why an operation of a kernel library cannot be called so.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CallError {
    /// The artifact has no entry points.
    #[error("{path} holds a model, not a kernel library; compile one with `dsc compile --kernels dsa`", path = .path.display())]
    NoLibrary {
        /// The artifact.
        path: PathBuf,
    },
    /// The artifact has no steps.
    #[error("{path} holds a kernel library, not a model; compile a model folder with `dsc compile DIR`", path = .path.display())]
    NoModel {
        /// The artifact.
        path: PathBuf,
    },
    /// The library has no such operation.
    #[error("the library has no operation {op}; it has {known}")]
    NoOperation {
        /// What was asked for.
        op: String,
        /// What there is.
        known: String,
    },
    /// Too few or too many arguments.
    #[error("{op} has {found} arguments, and wants: {wants}")]
    Count {
        /// The operation.
        op: String,
        /// Arguments given.
        found: usize,
        /// Their names.
        wants: String,
    },
    /// An argument by itself is not as it must be.
    #[error("argument {name} {what}")]
    Argument {
        /// The argument.
        name: String,
        /// What is wrong.
        what: String,
    },
    /// Arguments do not fit together, or are beyond what was compiled.
    #[error("{op}: {what}; these sizes do not fit together, or the library is compiled for smaller ones")]
    Sizes {
        /// The operation.
        op: String,
        /// What is wrong.
        what: String,
    },
    /// The workspace is too small.
    #[error("the workspace has {have} bytes, and the call needs {need}: ask for them before, with the same arguments")]
    Workspace {
        /// Bytes given.
        have: u64,
        /// Bytes needed.
        need: u64,
    },
    /// The device refused.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// How a weight of the artifact and the tensors of the checkpoint disagree.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WeightError {
    /// The tensor is missing or unreadable.
    #[error("weight {weight}: {source}")]
    Tensor {
        /// The weight.
        weight: String,
        /// What the checkpoint said.
        source: CheckpointError,
    },
    /// The tensor has another shape than the artifact was compiled for.
    #[error(
        "weight {weight}: tensor `{tensor}` has shape {found:?}, the artifact expects {expected:?}: the weights are not of the model it was compiled for"
    )]
    Shape {
        /// The weight.
        weight: String,
        /// The tensor.
        tensor: String,
        /// Rows and columns expected; vectors have one row.
        expected: [u32; 2],
        /// The stored shape.
        found: Vec<usize>,
    },
    /// The tensor has an element type that the weight cannot be made of.
    #[error(
        "weight {weight}: tensor `{tensor}` is stored as {found:?}, of which {wanted} cannot be made: compile for these weights"
    )]
    Dtype {
        /// The weight.
        weight: String,
        /// The tensor.
        tensor: String,
        /// How it is stored.
        found: StorageDtype,
        /// What the kernels read.
        wanted: String,
    },
    /// A quantised tensor comes without scales.
    #[error(
        "weight {weight}: tensor `{tensor}` is stored as F8_E4M3, but the artifact knows no scales for it: compile for these weights"
    )]
    NoScale {
        /// The weight.
        weight: String,
        /// The tensor.
        tensor: String,
    },
    /// The scales of a tensor are not one f32 a block.
    #[error(
        "weight {weight}: scales `{scale}` are {found:?} {shape:?}, expected F32 {expected:?}: one for each block of {block:?}"
    )]
    Scale {
        /// The weight.
        weight: String,
        /// The scales' name.
        scale: String,
        /// Their stored type.
        found: StorageDtype,
        /// Their stored shape.
        shape: Vec<usize>,
        /// The shape they should have.
        expected: [u32; 2],
        /// Rows and columns of one scale.
        block: [u32; 2],
    },
    /// The artifact keeps a tensor in bf16, which would round this one.
    #[error(
        "weight {weight}: the artifact has exact numerics and keeps tensor `{tensor}` in bf16, which would round it: compile for these weights"
    )]
    Rounded {
        /// The weight.
        weight: String,
        /// The tensor.
        tensor: String,
    },
    /// The weights do not fit in memory.
    #[error("no memory for {bytes} bytes of weights: {reason}")]
    Memory {
        /// Bytes asked for.
        bytes: u64,
        /// What the system said.
        reason: String,
    },
}

/// Why a device cannot run an artifact.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The artifact wants other devices beside this one.
    #[error(
        "the artifact is rank {rank} of {ranks}: models split over several devices can be compiled, but not run yet; compile with --tp 1"
    )]
    Ranks {
        /// Its rank.
        rank: u32,
        /// All of them.
        ranks: u32,
    },
    /// The artifact is for something else.
    #[error(
        "the artifact is for target {target}, and this runtime has only {available}: compile it with `--target {available}`"
    )]
    Target {
        /// The artifact's target.
        target: String,
        /// What this runtime can run on.
        available: String,
    },
    /// The processor lacks what the code uses.
    #[error("this processor lacks {}, which the artifact uses: compile it on or for this machine", .missing.join(", "))]
    Features {
        /// Features it lacks.
        missing: Vec<String>,
    },
    /// No memory.
    #[error("no memory for {bytes} bytes of {what}: {reason}; use a smaller context")]
    Memory {
        /// What for.
        what: &'static str,
        /// Bytes asked for.
        bytes: u64,
        /// What the system said.
        reason: String,
    },
    /// The system refused to map code as executable.
    #[error(
        "the system does not let code be mapped as executable: {0}; run where the process may map executable memory"
    )]
    Code(String),
    /// A thread could not be started.
    #[error("cannot start worker thread {thread}: {reason}; use fewer threads")]
    Thread {
        /// Its number.
        thread: usize,
        /// What the system said.
        reason: String,
    },
    /// A launch would leave its buffers: a fault of the artifact or of the runtime.
    #[error("launch {launch} ({node}): {what}; this is a bug of the dsc that wrote the artifact")]
    Binding {
        /// Its number.
        launch: usize,
        /// The graph node.
        node: String,
        /// What is wrong.
        what: String,
    },
    /// The library of the GPU's driver cannot be loaded.
    #[error(
        "no {}, which artifacts for {} targets need: cannot load {library} ({reason}); use a machine with {}, or compile with `--target cpu`",
        .vendor.driver(), .vendor.targets(), .vendor.package()
    )]
    NoDriver {
        /// Whose.
        vendor: Vendor,
        /// The library.
        library: String,
        /// What the system said.
        reason: String,
    },
    /// The driver lacks something.
    #[error("the {} is too old: it serves {found}, and {wants} is needed; update {}", .vendor.driver(), .vendor.package())]
    DriverOld {
        /// Whose.
        vendor: Vendor,
        /// What it serves.
        found: String,
        /// What is needed.
        wants: String,
    },
    /// There is no GPU of that number.
    #[error("there is no GPU {ordinal}, the driver sees {count}; {remedy}", remedy = if *.count == 0 {
        format!("use a machine with one, and see that {} not hide it", .vendor.hides())
    } else {
        "give another number with the `device` option".to_owned()
    })]
    NoGpu {
        /// Whose.
        vendor: Vendor,
        /// The number.
        ordinal: u32,
        /// GPUs there are.
        count: u32,
    },
    /// The GPU does not run the artifact's code.
    #[error(
        "the artifact is for {target}, which {gpu}, does not run; compile it with the `--target` of this GPU, or give another with the `device` option"
    )]
    Architecture {
        /// The artifact's target.
        target: String,
        /// The GPU and its architecture.
        gpu: String,
    },
    /// The driver refused a kernel's code.
    #[error(
        "the driver refuses the {kind} of kernel {kernel}: {log}; update {}, or compile the model again", .vendor.package()
    )]
    Assembly {
        /// Whose driver.
        vendor: Vendor,
        /// The kernel.
        kernel: String,
        /// `machine code` or `assembly`.
        kind: &'static str,
        /// What it said.
        log: String,
    },
    /// A call of the driver failed.
    #[error("{call} failed with {code}: {what}")]
    Driver {
        /// The function.
        call: &'static str,
        /// What it returned.
        code: u32,
        /// The driver's words for it.
        what: String,
    },
    /// The device was used in a way its contract forbids: a fault of the runtime.
    #[error("the runtime used its device wrongly, which is a bug of dsc: {0}")]
    Misuse(String),
}

/// Why a request cannot be served as it is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// There is nothing to run.
    #[error("the request has no tokens; give at least one")]
    Empty,
    /// A token is not of the vocabulary.
    #[error(
        "token {token} at place {place} is outside the vocabulary of {vocab}; give ids below {vocab}, of this model's tokenizer"
    )]
    Token {
        /// The token.
        token: u32,
        /// Its place in the sequence's new tokens.
        place: usize,
        /// Vocabulary size.
        vocab: u32,
    },
    /// A sequence would be longer than is served.
    #[error("a context of {wanted} tokens is beyond the limit of {limit}: {remedy}")]
    Context {
        /// Tokens the sequence would have.
        wanted: u64,
        /// Tokens it may have.
        limit: u32,
        /// What to do about it.
        remedy: String,
    },
    /// All pages are taken.
    #[error(
        "the cache has {free} free pages of 64 tokens, {wanted} are needed: end a sequence, or open the model with a larger `context_tokens`"
    )]
    Pages {
        /// Pages needed.
        wanted: u64,
        /// Pages free.
        free: usize,
    },
    /// The sequence was removed, or is of another session.
    #[error("the sequence was removed, or belongs to another session; give one that this session has")]
    Sequence,
    /// The same sequence twice in one step.
    #[error("the same sequence occurs twice in one step; give its tokens as one input")]
    Twice,
    /// Samplers and inputs do not go together.
    #[error("there are {samplers} samplers for {inputs} inputs; give one for each")]
    Samplers {
        /// Samplers.
        samplers: usize,
        /// Inputs.
        inputs: usize,
    },
    /// A wanted row is not there.
    #[error(
        "the logits of token {row} are wanted, but the step has {tokens} tokens; ask for rows below {tokens}, in ascending order"
    )]
    Row {
        /// The row.
        row: u32,
        /// Tokens in the step.
        tokens: usize,
    },
    /// No compiled step admits the request.
    #[error("no step of the artifact admits a token at context {context} with {pages} pages: {remedy}")]
    NoStep {
        /// Context of the token.
        context: u32,
        /// Pages of the cache.
        pages: u32,
        /// What to do about it.
        remedy: String,
    },
    /// A text is shorter than one window.
    #[error("{tokens} tokens fill no window of {window}: give a longer text or a smaller window of at least 2")]
    Window {
        /// Tokens of the text.
        tokens: usize,
        /// Window size.
        window: usize,
    },
}
