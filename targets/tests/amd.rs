//! Every kernel of the file tests becomes a code object for each AMD chip, whose metadata are what a loader expects.
#![cfg(feature = "amd")]

#[path = "support/programs.rs"]
mod programs;

use dsc_ir::schedule::Schedule;
use dsc_targets::amd::arch::ARCHS;
use dsc_targets::amd::lld::Lld;
use dsc_targets::amd::metadata::Metadata;
use dsc_targets::{Kernel, target};
use programs::programs;

#[test]
fn code_objects_say_what_they_need() {
    if let Err(reason) = Lld::find(None) {
        eprintln!("not tested: {reason}");
        return;
    }
    let kernels: Vec<Kernel> =
        programs().into_iter().map(|program| Kernel { program, schedule: Schedule::default() }).collect();
    for arch in ARCHS {
        let module = target(arch.name, false).unwrap().compile(&kernels).unwrap_or_else(|e| panic!("{e}"));
        for (kernel, code) in kernels.iter().zip(&module.kernels) {
            let object = &module.code[code.entry as usize..][..code.code_bytes as usize];
            let metadata = Metadata::read(object).unwrap_or_else(|e| panic!("{}: {e}", code.name));
            let gpu = code.gpu.as_ref().expect("a launch");
            let resources = gpu.resources.expect("machine code");
            assert_eq!(metadata.symbol, format!("{}.kd", kernel.program.name));
            assert_eq!((metadata.wave, metadata.scratch_bytes, metadata.spills), (64, 0, [0, 0]), "{}", code.name);
            assert_eq!(metadata.kernarg_bytes as usize, 8 * (kernel.program.params.len() + 1), "{}", code.name);
            assert_eq!((gpu.shared_bytes, resources.static_shared_bytes), (0, metadata.lds_bytes));
            assert!(metadata.lds_bytes <= arch.lds_bytes && resources.blocks_per_sm > 0, "{}", code.name);
        }
        assert_eq!(target(arch.name, false).unwrap().compile(&kernels).unwrap().code, module.code, "{}", arch.name);
    }
}

#[test]
fn broken_metadata_are_refused() {
    assert!(Metadata::read(b"no object").is_err());
    let mut header = vec![0; 64];
    header[..6].copy_from_slice(b"\x7fELF\x02\x01");
    assert!(Metadata::read(&header).unwrap_err().contains("no metadata"));
    header[32..40].copy_from_slice(&u64::MAX.to_le_bytes());
    header[56] = 1;
    assert!(Metadata::read(&header).is_err());
}
