//! The interpreter as a device of the runtime, so that sessions run on it.

use dsc_cdna::{CodeObject, Memory};
use dsc_ir::SymValues;
use dsc_ir::artifact::{Header, KernelEntry};
use dsc_runtime::device::{Bound, BoundLaunch, Buffer, Code, Device, LaunchTimes};
use dsc_runtime::{DeviceError, Weights};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ops::Range;
use std::sync::Arc;

/// Runs code objects of an artifact on the interpreter.
#[derive(Default)]
pub struct Interpreted {
    memory: Memory,
    kernels: Vec<KernelEntry>,
    objects: HashMap<u64, CodeObject>,
    buffers: Vec<(u64, u64)>,
    bound: Vec<Vec<BoundLaunch>>,
}

fn misuse(what: impl ToString) -> DeviceError {
    DeviceError::Misuse(what.to_string())
}

impl Interpreted {
    fn launch(&mut self, launch: &BoundLaunch, syms: &SymValues) -> Result<(), DeviceError> {
        let entry = &self.kernels[launch.kernel as usize];
        let mut grid = [1; 3];
        for (axis, dim) in grid.iter_mut().zip(&entry.grid) {
            *axis = dim.eval(syms) as u32;
        }
        if grid.contains(&0) {
            return Ok(());
        }
        let count = self.memory.count();
        let symbols: Vec<u8> = syms.0.iter().flat_map(|s| s.to_le_bytes()).collect();
        let symbols = self.memory.alloc_read_only(&symbols);
        let addresses = launch.args.iter().map(|(buffer, at)| self.buffers[buffer.0].0 + at);
        let arguments: Vec<u8> = addresses.chain([symbols]).flat_map(u64::to_le_bytes).collect();
        let object = &self.objects[&entry.entry];
        let run = dsc_cdna::Launch {
            kernel: &object.kernels[0].name,
            grid,
            block: [entry.gpu.as_ref().map_or(0, |g| g.threads), 1, 1],
            dynamic_lds: 0,
            arguments: &arguments,
        };
        let result = object.launch(&run, &mut self.memory, dsc_cdna::Options::default());
        self.memory.truncate(count);
        result.map(drop).map_err(|e| misuse(format!("{}: {e}", launch.node)))
    }
}

impl Device for Interpreted {
    fn describe(&self) -> String {
        "an interpreter of AMD's instructions".into()
    }

    fn load_code(&mut self, header: &Header, code: Code<'_>) -> Result<(), DeviceError> {
        for kernel in &header.kernels {
            let bytes = &code.native[kernel.entry as usize..][..kernel.code_bytes as usize];
            if let Entry::Vacant(free) = self.objects.entry(kernel.entry) {
                free.insert(CodeObject::parse(bytes).map_err(misuse)?);
            }
        }
        self.kernels.clone_from(&header.kernels);
        Ok(())
    }

    fn load_weights(
        &mut self,
        weights: &Arc<Weights>,
        _: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Vec<Buffer>, DeviceError> {
        let first = self.buffers.len();
        for i in 0..weights.len() {
            let bytes = weights.bytes(i);
            self.buffers.push((self.memory.alloc_read_only(bytes), bytes.len() as u64));
        }
        Ok((first..self.buffers.len()).map(Buffer).collect())
    }

    fn alloc(&mut self, bytes: u64, _: &'static str) -> Result<Buffer, DeviceError> {
        self.buffers.push((self.memory.alloc(&vec![0; bytes as usize]), bytes));
        Ok(Buffer(self.buffers.len() - 1))
    }

    fn upload(&mut self, buffer: Buffer, at: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        let done = self.memory.write_at(self.buffers[buffer.0].0 + at, bytes);
        done.then_some(()).ok_or_else(|| misuse("an upload outside of its buffer"))
    }

    fn read(&mut self, buffer: Buffer, at: u64, bytes: &mut [u8]) -> Result<(), DeviceError> {
        let done = self.memory.read_at(self.buffers[buffer.0].0 + at, bytes);
        done.then_some(()).ok_or_else(|| misuse("a read outside of its buffer"))
    }

    fn bind(&mut self, launches: &[BoundLaunch], limits: &SymValues) -> Result<Bound, DeviceError> {
        for launch in launches {
            for (param, &(buffer, at)) in self.kernels[launch.kernel as usize].params.iter().zip(&launch.args) {
                param.check_binding(at, self.buffers[buffer.0].1, limits).map_err(misuse)?;
            }
        }
        self.bound.push(launches.to_vec());
        Ok(Bound(self.bound.len() - 1))
    }

    fn run(
        &mut self,
        bound: Bound,
        launches: Range<usize>,
        syms: &SymValues,
        _: Option<&mut LaunchTimes>,
    ) -> Result<(), DeviceError> {
        for launch in launches {
            let launch = self.bound[bound.0][launch].clone();
            self.launch(&launch, syms)?;
        }
        Ok(())
    }
}
