//! Loops of a step: scores of a chunk in memory, for as many of its tokens at a time as a bounded matrix holds.
//!
//! ```text
//! launches                                      launches, of them a loop
//! l   = fused sparse_attention (..) { logits }  for pieces of the tokens {
//! ..                                                l   = fused sparse_attention (..) { logits }
//! sel = fused sparse_attention (l) { topk }         sel = fused sparse_attention (l) { topk }
//!                                               }
//!                                               ..
//! ```
//!
//! No token of either needs another, and nothing else reads `l`: so its matrix, which all pieces have in one place, holds the tokens of a piece.
//! What either reads or makes lives while the whole loop does. A step whose largest is one piece has no loop.

use crate::passes::Class;
use dsc_ir::artifact::{Loop, Pieces};
use dsc_ir::graph::{Elem, Graph, NodeId, TensorType, Value};
use dsc_ir::{DType, Sym};

/// The launches of one loop, on the way.
pub(super) struct Looped {
    /// What makes the matrix, and what reads it.
    pub(super) nodes: [NodeId; 2],
    /// The matrix.
    pub(super) matrix: Value,
    /// Bytes that it takes.
    pub(super) bytes: u64,
    pieces: Pieces,
}

impl Looped {
    /// The loop in the artifact, once the order of launches and the matrix's place are known.
    pub(super) fn placed(&self, launches: &[NodeId], matrix: u64) -> Option<Loop> {
        let first = launches.iter().position(|&n| n == self.nodes[0])? as u32;
        Some(Loop { first, launches: self.nodes.len() as u32, matrix, pieces: self.pieces })
    }
}

/// Finds the matrices of scores that have to be made in pieces, and puts what reads one right behind what makes it.
pub(super) fn find(graph: &Graph, class: &Class, launches: &mut Vec<NodeId>) -> Vec<Looped> {
    let Some(pieces) = class.pieces else { return Vec::new() };
    let mut found = Vec::new();
    for &node in launches.iter() {
        let matrix = Value { node, output: 0 };
        let Some(reader) = only_reader(graph, matrix) else { continue };
        // With no matrix yet: sizes do not depend on its place.
        let sized = Loop { first: 0, launches: 2, matrix: 0, pieces };
        if launches.contains(&reader) && !sized.is_whole(&class.max) {
            found.push(Looped { nodes: [node, reader], matrix, bytes: sized.matrix_bytes(&class.max), pieces });
        }
    }
    for looped in &found {
        let [node, reader] = looped.nodes;
        launches.retain(|&n| n != reader);
        let at = launches.iter().position(|&n| n == node).map_or(launches.len(), |at| at + 1);
        launches.insert(at, reader);
    }
    found
}

/// The one node that reads a matrix of scores, and nothing else.
fn only_reader(graph: &Graph, matrix: Value) -> Option<NodeId> {
    let scores = TensorType { shape: vec![Sym::T.into(), Sym::C.into()], elem: Elem::Plain(DType::F32) };
    if graph.ty(matrix).tensor() != Some(&scores) || graph.is_output(matrix) {
        return None;
    }
    match graph.users(matrix).as_slice() {
        [(reader, _)] if graph.inputs(*reader) == [matrix] => Some(*reader),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compile::{self, Compiled};
    use crate::plan::wide::Wide;
    use dsc_ir::SymValues;
    use dsc_ir::artifact::{Numerics, Step};
    use dsc_runtime::{LogitsWanted, Model, Options, SequenceInput, Session};
    use std::path::{Path, PathBuf};

    const CHUNK: u32 = 200;

    fn model() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/v32-tiny")
    }

    /// A small model, whose chunks are one piece each, and the same in pieces of 128 tokens.
    fn both() -> [Compiled; 2] {
        let target = Wide(dsc_targets::target("cpu", false).expect("the CPU"));
        let numerics = Numerics::Exact;
        let options =
            compile::Options { numerics, chunk: Some(CHUNK), max_context: Some(512), ..compile::Options::default() };
        let whole = compile::compile_dir_for(&target, &model(), &options, &mut |_| ()).expect("it compiles");
        let mut graphs = whole.graphs.clone();
        for (class, _) in graphs.iter_mut().filter(|(class, _)| class.pieces.is_some()) {
            class.pieces = Some(Pieces { tokens: 128, bytes: 4 * 128 * 512 });
        }
        let facts = whole.header.model.clone();
        let cut = compile::lower(graphs, facts, numerics, (&target, &[]), None, &mut |_| ()).expect("it compiles");
        [whole, cut]
    }

    fn prefill(compiled: &Compiled) -> &Step {
        compiled.header.steps.iter().find(|s| s.name == "prefill").expect("a class of chunks")
    }

    fn open(compiled: &Compiled) -> Session {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("model.dsc");
        std::fs::write(&path, &compiled.bytes).expect("room");
        let options = Options { threads: 2, ..Options::default() };
        Model::open(&path, &model(), &options).and_then(|m| m.session()).unwrap_or_else(|e| panic!("{e}"))
    }

    #[test]
    fn pieces_do_not_change_results() {
        let [whole, cut] = both();
        let (step, layers) = (prefill(&cut), cut.header.model.layers as usize);
        assert_eq!((prefill(&whole).loops.len(), step.loops.len()), (0, layers));
        assert!(step.arena_bytes < prefill(&whole).arena_bytes);
        let sizes: Vec<SymValues> = step.loops[0].sizes(&step.max);
        assert_eq!(sizes, [step.max.with(Sym::T, 128)]);
        for l in &step.loops {
            let [scores, selection] = [0, 1].map(|i| &step.launches[l.range()][i]);
            assert!(scores.node.ends_with("logits") && selection.node.ends_with("topk"), "{}", selection.node);
        }

        // Chunks of 200, 130 and 100 tokens; the last is one piece.
        let tokens: Vec<u32> = (0..430).map(|i| (i * 37 + 11) % 256).collect();
        let [expected, found] = [&whole, &cut].map(|compiled| {
            let mut session = open(compiled);
            session.start_profile();
            let seq = session.add_sequence();
            let out = [0..330, 330..430].map(|range| {
                let input = SequenceInput { seq, tokens: &tokens[range] };
                session.step(&[input], LogitsWanted::All, true).unwrap_or_else(|e| panic!("{e}"))
            });
            (out, session.take_profile())
        });
        for (expected, found) in expected.0.iter().zip(&found.0) {
            assert!(found.taps.keys().any(|name| name.starts_with("topk")));
            assert!(expected.logits == found.logits && expected.taps == found.taps);
        }
        let runs = |profile: &[dsc_runtime::ProfileRow], name: &str| {
            let rows = profile.iter().filter(|row| row.node.ends_with(name));
            rows.map(|row| (row.launch, row.time.runs)).collect::<Vec<_>>()
        };
        let of = |runs: u64| step.loops.iter().map(|l| (l.first as usize, runs)).collect::<Vec<_>>();
        assert_eq!([runs(&expected.1, "logits"), runs(&found.1, "logits")], [of(3), of(2 + 2 + 1)]);
    }
}
