//! What can go wrong: in reading a code object, in launching it, and in a wave.

use std::fmt;

/// Why a code object could not be read, launched or run to its end.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Error {
    /// A program of LLVM is missing or failed.
    #[error("{0}")]
    Tool(String),
    /// The code object is not what a loader expects.
    #[error("code object: {0}")]
    Object(String),
    /// The launch does not suit the kernel or the chip.
    #[error("launch of {kernel}: {reason}")]
    Launch {
        /// The kernel.
        kernel: String,
        /// What is wrong.
        reason: String,
    },
    /// A wave did what hardware faults on, or must not depend on.
    #[error("{0}")]
    Fault(Box<Fault>),
}

/// A fault and where it happened.
#[derive(Clone, Debug, PartialEq)]
pub struct Fault {
    /// The kernel.
    pub kernel: String,
    /// The block (workgroup).
    pub block: [u32; 3],
    /// The wave in it.
    pub wave: usize,
    /// Address of the instruction in the code object.
    pub address: u64,
    /// The instruction as LLVM prints it.
    pub text: String,
    /// What it did.
    pub cause: Cause,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [x, y, z] = self.block;
        write!(
            f,
            "{}, block ({x}, {y}, {z}), wave {}, at {:#x} `{}`: {}",
            self.kernel, self.wave, self.address, self.text, self.cause
        )
    }
}

/// What an instruction did wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Cause {
    /// An instruction, or a form of one, that the interpreter does not have.
    #[error("the interpreter has no `{0}`; add it in tests/cdna/src/isa")]
    Unknown(String),
    /// A global access that no allocation contains.
    #[error("lane {lane} {what} {bytes} bytes at {address:#x}, outside of every allocation{near}")]
    GlobalBounds {
        /// The lane, 0 of scalar accesses.
        lane: usize,
        /// "reads" or "writes".
        what: &'static str,
        /// The first byte.
        address: u64,
        /// How many.
        bytes: usize,
        /// Where the nearest allocation lies.
        near: String,
    },
    /// A write to memory that the kernel may only read.
    #[error("lane {lane} writes to read-only memory at {address:#x}")]
    ReadOnly {
        /// The lane.
        lane: usize,
        /// The address.
        address: u64,
    },
    /// An access outside of the block's LDS.
    #[error("lane {lane} accesses {bytes} bytes of LDS at {address:#x}, of {size:#x}")]
    LdsBounds {
        /// The lane.
        lane: usize,
        /// The first byte.
        address: u64,
        /// How many.
        bytes: usize,
        /// Bytes that the block has.
        size: usize,
    },
    /// An access outside of the lane's scratch.
    #[error("lane {lane} accesses {bytes} bytes of scratch at {address:#x}, of {size:#x}")]
    ScratchBounds {
        /// The lane.
        lane: usize,
        /// The first byte.
        address: u64,
        /// How many.
        bytes: usize,
        /// Bytes that the lane has.
        size: usize,
    },
    /// An address that is not a multiple of what the access needs.
    #[error("lane {lane} accesses {bytes} bytes at {address:#x}, which is not aligned")]
    Misaligned {
        /// The lane.
        lane: usize,
        /// The address.
        address: u64,
        /// Bytes of the access.
        bytes: usize,
    },
    /// A register is touched while a load to it is under way.
    #[error("{0} has a load under way that no s_waitcnt has waited for")]
    Pending(String),
    /// Something decides or leaves the wave that was never written.
    #[error("{0} was never written")]
    Undefined(String),
    /// Accesses of LDS that no barrier orders.
    #[error("LDS byte {address:#x}: {what}")]
    Race {
        /// The byte.
        address: u64,
        /// Between whom.
        what: String,
    },
    /// A register that the kernel descriptor does not allocate.
    #[error("{0} is outside of what the kernel descriptor allocates")]
    Register(String),
    /// A jump to where no instruction is.
    #[error("control goes to {0:#x}, where no instruction begins")]
    Jump(u64),
    /// A wave ran for too long.
    #[error("the wave ran {0} instructions without an end")]
    Endless(u64),
}
