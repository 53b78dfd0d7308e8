//! Kernels to compile: those of the file tests.

use dsc_ir::tile::{self, Program};
use std::path::Path;

/// Valid kernels of the file tests.
pub fn programs() -> Vec<Program> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/filetests/tile");
    let mut paths: Vec<_> =
        std::fs::read_dir(folder).expect("file tests").map(|e| e.expect("an entry").path()).collect();
    paths.sort();
    let mut programs = Vec::new();
    for path in paths {
        let text = std::fs::read_to_string(&path).expect("text");
        // Lines of the harness stand between kernels.
        let lines: Vec<&str> = text.lines().collect();
        let texts = lines.split(|line| line.starts_with(';')).map(|lines| lines.join("\n"));
        programs
            .extend(texts.filter_map(|text| tile::parse(&text).ok()).flatten().filter(|p| tile::verify(p).is_empty()));
    }
    assert!(programs.len() > 20, "{} kernels", programs.len());
    programs
}
