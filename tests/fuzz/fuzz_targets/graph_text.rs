//! Text of graphs: nothing panics, and what verifies prints to text that parses to the same graph.
#![no_main]

use dsc_fuzz::texts;
use dsc_ir::graph::text::parse;
use dsc_ir::graph::verify::verify;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = str::from_utf8(data) else { return };
    texts(text).iter().for_each(|text| read(text));
});

fn read(text: &str) {
    match parse(text) {
        Ok(graph) => {
            let diagnostics = verify(&graph);
            let text = graph.to_string();
            if !diagnostics.is_empty() {
                assert!(diagnostics.iter().all(|d| !d.to_string().is_empty()));
                return;
            }
            let again = parse(&text).unwrap_or_else(|e| panic!("{e}\n{text}"));
            assert!(again == graph, "{text}");
            assert_eq!(again.to_string(), text);
        }
        Err(e) => assert!(e.line >= 1 && e.col >= 1 && !e.to_string().is_empty()),
    }
}
