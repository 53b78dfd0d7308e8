//! A target for tests.

use dsc_ir::schedule::{KernelShape, Schedule};
use dsc_targets::{Kernel, Module, Target, TargetError};

/// The CPU, compiled for as if it ran many blocks at once.
pub(crate) struct Wide(pub(crate) Box<dyn Target>);

impl Target for Wide {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn multiplies_fp8(&self) -> bool {
        self.0.multiplies_fp8()
    }

    fn blocks(&self) -> u32 {
        8
    }

    fn block_bytes(&self) -> u32 {
        128 << 10
    }

    fn selects_from_memory(&self) -> bool {
        true
    }

    fn schedule(&self, shape: &KernelShape, tokens: u32) -> Schedule {
        self.0.schedule(shape, tokens)
    }

    fn compile(&self, kernels: &[Kernel]) -> Result<Module, TargetError> {
        self.0.compile(kernels)
    }
}
