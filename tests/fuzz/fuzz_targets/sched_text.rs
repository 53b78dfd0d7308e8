//! Text of scheduled kernels: nothing panics; what verifies prints to text that parses to the same kernel.
#![no_main]

use dsc_fuzz::texts;
use dsc_ir::sched::{Budget, canonical, parse, verify};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = str::from_utf8(data) else { return };
    texts(text).iter().for_each(|text| read(text));
});

fn read(text: &str) {
    let kernels = match parse(text) {
        Ok(kernels) => kernels,
        Err(e) => return assert!(e.line >= 1 && e.column >= 1 && !e.to_string().is_empty()),
    };
    for kernel in &kernels {
        let (diagnostics, text) = (verify(kernel, &Budget::UNLIMITED), kernel.to_string());
        if diagnostics.is_empty() {
            let numbered = canonical(kernel);
            assert_eq!(parse(&text).as_deref(), Ok([numbered.clone()].as_slice()), "{text}");
            assert_eq!(verify(&numbered, &Budget::UNLIMITED), [], "{text}");
        } else {
            assert!(diagnostics.iter().all(|d| !d.to_string().is_empty()));
        }
    }
}
