//! A target that compiles equal kernels once: the ranks of a model differ in their weights, seldom in their kernels.

use dsc_ir::schedule::{KernelShape, Schedule, Teams};
use dsc_ir::tile::Program;
use dsc_targets::{Kernel, Level, Module, Target, TargetError};
use std::cell::RefCell;
use std::collections::HashMap;

/// A target with the last module it made, and which kernels fit it.
pub struct Remember<'t> {
    target: &'t dyn Target,
    last: RefCell<Option<(Vec<Kernel>, Module)>>,
    fits: RefCell<HashMap<(Program, Schedule), bool>>,
}

impl<'t> Remember<'t> {
    /// Nothing yet of that target.
    pub fn new(target: &'t dyn Target) -> Remember<'t> {
        Remember { target, last: RefCell::default(), fits: RefCell::default() }
    }
}

impl Target for Remember<'_> {
    fn name(&self) -> &'static str {
        self.target.name()
    }

    fn levels(&self) -> &'static [Level] {
        self.target.levels()
    }

    fn multiplies_fp8(&self) -> bool {
        self.target.multiplies_fp8()
    }

    fn blocks(&self) -> u32 {
        self.target.blocks()
    }

    fn chunk(&self) -> u32 {
        self.target.chunk()
    }

    fn batch(&self) -> u32 {
        self.target.batch()
    }

    fn schedule(&self, shape: &KernelShape, tokens: u32) -> Schedule {
        self.target.schedule(shape, tokens)
    }

    fn copies_boxes(&self) -> bool {
        self.target.copies_boxes()
    }

    fn runs_beside(&self) -> bool {
        self.target.runs_beside()
    }

    fn selects_from_memory(&self) -> bool {
        self.target.selects_from_memory()
    }

    fn teams(&self) -> Teams {
        self.target.teams()
    }

    fn block_bytes(&self) -> u32 {
        self.target.block_bytes()
    }

    fn fits(&self, kernel: &Kernel) -> bool {
        let key = (kernel.program.clone(), kernel.schedule.clone());
        *self.fits.borrow_mut().entry(key).or_insert_with(|| self.target.fits(kernel))
    }

    fn compile(&self, kernels: &[Kernel]) -> Result<Module, TargetError> {
        let equal = |a: &Kernel, b: &Kernel| a.program == b.program && a.schedule == b.schedule;
        if let Some((known, module)) = &*self.last.borrow()
            && known.len() == kernels.len()
            && known.iter().zip(kernels).all(|(a, b)| equal(a, b))
        {
            return Ok(module.clone());
        }
        let module = self.target.compile(kernels)?;
        *self.last.borrow_mut() = Some((kernels.to_vec(), module.clone()));
        Ok(module)
    }
}
