//! Runs every file of `tests/filetests`: text of an IR, what to do with it, and what must come of it.
//!
//! Lines that start with `;` are for this harness; `//` starts a comment for people. A file opens with what it tests:
//!
//! ```text
//! ; test print             the text is canonical: printing it gives it back
//! ; test verify            `; error:` lines behind a text are what the parser or the verifier says of it; none: it is valid
//! ; test run               each `; run` behind a kernel is a launch of it, on the interpreter and on every target; a scheduled kernel
//!                          runs on the interpreter alone, with its roles interleaved in several ways
//! ; test pass NAME [FLAG]  the second graph of the file is what that pass makes of the first; FLAG: exact, fp8, bf16, mha
//! ```
//!
//! How launches are written is at the top of `filetests/launch.rs`. `DSC_BLESS=1 cargo test --test filetests` writes what comes of a
//! file into it: errors, graphs, canonical text, the values of `out` lines. A kernel that a target gets wrong is never blessed.

#[path = "filetests/launch.rs"]
mod launch;

use dsc::passes::{self, Class, Cx};
use dsc_ir::SymValues;
use dsc_ir::artifact::Numerics;
use dsc_ir::graph::{self, Graph};
use dsc_ir::sched::{self, Budget, Scheduled};
use dsc_ir::tile::{self, Program};
use launch::{launch, launch_scheduled};
use libtest_mimic::{Arguments, Trial};
use std::fs;
use std::path::{Path, PathBuf};

type Outcome<T = ()> = Result<T, Box<dyn std::error::Error>>;

fn main() -> std::process::ExitCode {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("filetests");
    let mut paths = Vec::new();
    find(&root, &mut paths);
    paths.sort();
    let trial = |path: PathBuf| {
        let name = path.strip_prefix(&root).unwrap_or(&path).display().to_string();
        Trial::test(name, move || Ok(check(&path)?))
    };
    let trials = paths.into_iter().map(trial).collect();
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

fn find(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("a folder of tests").map(|e| e.expect("an entry").path()) {
        match entry.extension().and_then(|e| e.to_str()) {
            _ if entry.is_dir() => find(&entry, found),
            Some("tile" | "graph" | "sched") => found.push(entry),
            _ => {}
        }
    }
}

/// Text of an IR and the harness's lines behind it.
#[derive(Default)]
struct Section {
    text: String,
    notes: Vec<String>,
}

impl Section {
    /// Puts what is wrong with the text in the place of the notes before its launches.
    fn expect_errors<E: ToString>(&mut self, errors: impl IntoIterator<Item = E>) {
        let launches = self.notes.iter().position(|n| n.starts_with("run")).unwrap_or(self.notes.len());
        let errors: Vec<String> = errors.into_iter().map(|e| format!("error: {}", e.to_string())).collect();
        self.notes.splice(..launches, errors.iter().flat_map(|e| e.lines()).map(str::to_string));
    }

    /// Runs every launch of the notes.
    fn expect_runs(&mut self, launch: &dyn Fn(&[String]) -> Outcome<Vec<String>>) -> Outcome {
        let launches: Vec<&[String]> = self.notes.chunk_by(|_, next| !next.starts_with("run")).collect();
        if launches.is_empty() {
            return Err("the kernel has no `; run`".into());
        }
        let ran = launches.iter().map(|notes| launch(notes)).collect::<Outcome<Vec<_>>>()?;
        self.notes = ran.concat();
        Ok(())
    }

    /// Takes over the canonical form, if it is not the text but for comments and empty lines.
    fn expect_text(&mut self, printed: &str) -> Outcome {
        let comment = |l: &&str| l.trim_start().starts_with("//") || l.trim().is_empty();
        let head: usize = self.text.split_inclusive('\n').take_while(comment).map(str::len).sum();
        let body = self.text[head..].trim_end();
        if body.lines().filter(|l| !comment(l)).eq(printed.lines().filter(|l| !l.is_empty())) {
            return Ok(());
        }
        if body.lines().any(|l| l.trim_start().starts_with("//")) {
            return Err(format!("the text has comments inside, so write it yourself:\n{printed}").into());
        }
        let end = head + body.len();
        self.text.replace_range(head..end, printed.trim_end());
        Ok(())
    }
}

/// Every test rewrites what a file expects; then the file must be as it was.
fn check(path: &Path) -> Outcome {
    let before = fs::read_to_string(path)?;
    let header: Vec<&str> = before.lines().take_while(|l| l.starts_with(';')).collect();
    let mut sections = vec![Section::default()];
    for line in before.lines().skip(header.len()) {
        let last = sections.last_mut().expect("there is one");
        match line.strip_prefix(';') {
            Some(note) => last.notes.push(note.strip_prefix(' ').unwrap_or(note).to_string()),
            None if last.notes.is_empty() => last.text += &format!("{line}\n"),
            None => sections.push(Section { text: format!("{line}\n"), notes: Vec::new() }),
        }
    }
    let is_graph = path.extension().is_some_and(|e| e == "graph");
    let is_sched = path.extension().is_some_and(|e| e == "sched");
    for line in &header {
        let words: Vec<&str> = line.trim_start_matches(';').split_whitespace().collect();
        match words.as_slice() {
            ["test", "pass", name, flags @ ..] if is_graph => pass_test(&mut sections, name, flags)?,
            ["test", test] => {
                let test_of = match (is_graph, is_sched) {
                    (true, _) => graph_test,
                    (_, true) => sched_test,
                    _ => tile_test,
                };
                let mut sections = sections.iter_mut().filter(|s| !s.text.trim().is_empty());
                sections.try_for_each(|section| test_of(section, test))?;
            }
            _ => return Err(format!("`{line}` is no test").into()),
        }
    }
    if header.is_empty() {
        return Err("the file does not say what it tests".into());
    }
    let mut after: String = header.iter().map(|l| format!("{l}\n")).collect();
    for section in &sections {
        after += &section.text;
        section.notes.iter().for_each(|n| after += &format!("{}\n", format!("; {n}").trim_end()));
    }
    if before == after {
        Ok(())
    } else if std::env::var_os("DSC_BLESS").is_some() {
        Ok(fs::write(path, after)?)
    } else {
        let at = before.lines().zip(after.lines()).take_while(|(a, b)| a == b).count();
        let show = |text: &str| text.lines().skip(at).take(12).map(|l| format!("    {l}\n")).collect::<String>();
        Err(format!("line {}: the file has\n{}but it should be\n{}", at + 1, show(&before), show(&after)).into())
    }
}

fn graph_test(section: &mut Section, test: &str) -> Outcome {
    let parsed = graph::text::parse(&section.text);
    match (test, parsed) {
        ("print", Ok(graph)) => section.expect_text(&graph.to_string())?,
        ("verify", Ok(graph)) => {
            section.expect_errors(graph::verify::verify(&graph));
        }
        ("verify", Err(e)) => section.expect_errors([e]),
        (_, Err(e)) => return Err(e.into()),
        _ => return Err(format!("graphs have no test `{test}`").into()),
    }
    Ok(())
}

/// The second section becomes what the pass makes of the first.
fn pass_test(sections: &mut Vec<Section>, name: &str, flags: &[&str]) -> Outcome {
    let pass: fn(&mut Graph, &Cx) -> usize = match name {
        "share_repeats" => passes::share_repeats,
        "absorb_mla" => passes::absorb_mla,
        "expand_fp8" => passes::expand_fp8,
        "match_operands" => passes::match_operands,
        "narrow_weights" => passes::narrow_weights,
        "merge_shared_expert" => passes::merge_shared_expert,
        "merge_projections" => passes::merge_projections,
        "split_products" => passes::split_products,
        "fuse_sparse_attention" => passes::fuse_sparse_attention,
        "skip_short_selection" => passes::skip_short_selection,
        "fuse_gate" => passes::fuse_gate,
        "group_experts" => passes::group_experts,
        "sort_experts" => passes::sort_experts,
        "fuse_heads" => passes::fuse_heads,
        "fuse_products" => passes::fuse_products,
        "fuse_rows" => passes::fuse_rows,
        "fuse_beside" => passes::fuse_beside,
        "compact_tables" => passes::compact_tables,
        _ => return Err(format!("there is no pass {name}").into()),
    };
    let class = Class { name: "test".into(), max: SymValues([8; 6]), keep_mha: flags.contains(&"mha"), pieces: None };
    let numerics = if flags.contains(&"exact") { Numerics::Exact } else { Numerics::Deployed };
    let cx = Cx {
        class,
        target_fp8: flags.contains(&"fp8"),
        bf16_weights: flags.contains(&"bf16"),
        blocks: if flags.contains(&"wide") { 132 } else { 0 },
        block_bytes: 192 << 10,
        boxes: true,
        beside: true,
        teams: Default::default(),
        numerics,
        index_topk: 4,
    };
    let [before, rest @ ..] = sections.as_mut_slice() else { return Err("there is no graph".into()) };
    let mut graph = graph::text::parse(&before.text)?;
    check_valid("the input", &graph)?;
    let rewrites = pass(&mut graph, &cx);
    graph.remove_dead();
    check_valid(name, &graph)?;
    before.notes = vec![format!("{name}: {rewrites}")];
    match rest {
        [] => sections.push(Section { text: format!("\n{graph}"), notes: Vec::new() }),
        [after, ..] => after.expect_text(&graph.to_string())?,
    }
    Ok(())
}

fn check_valid(after: &str, graph: &Graph) -> Outcome {
    let problems = graph::verify::verify(graph);
    if problems.is_empty() { Ok(()) } else { Err(format!("after {after}: {problems:#?}\n{graph}").into()) }
}

fn tile_test(section: &mut Section, test: &str) -> Outcome {
    let parsed = tile::parse(&section.text);
    match (test, parsed) {
        ("print", Ok(programs)) => {
            section.expect_text(&programs.iter().map(Program::to_string).collect::<Vec<_>>().join("\n"))?;
        }
        ("verify", Ok(programs)) => {
            let problems = programs.iter().flat_map(|p| tile::verify(&tile::canonical(p)));
            section.expect_errors(problems);
        }
        ("verify", Err(e)) => section.expect_errors([e]),
        ("run", Ok(programs)) => {
            let [program] = programs.as_slice() else { return Err("launches follow one kernel".into()) };
            section.expect_runs(&|notes| launch(program, notes))?;
        }
        (_, Err(e)) => return Err(e.into()),
        _ => return Err(format!("kernels have no test `{test}`").into()),
    }
    Ok(())
}

/// What a block may use in tests: a GPU of these days, but for shared memory, which is small so that texts are.
const LIMITS: Budget =
    Budget { shared_bytes: 65536, registers: 65536, thread_registers: 255, named_barriers: 15, threads: 1024 };

fn sched_test(section: &mut Section, test: &str) -> Outcome {
    let parsed = sched::parse(&section.text);
    match (test, parsed) {
        ("print", Ok(kernels)) => {
            section.expect_text(&kernels.iter().map(Scheduled::to_string).collect::<Vec<_>>().join("\n"))?;
        }
        ("verify", Ok(kernels)) => {
            section.expect_errors(kernels.iter().flat_map(|k| sched::verify(&sched::canonical(k), &LIMITS)));
        }
        ("verify", Err(e)) => section.expect_errors([e]),
        ("run", Ok(kernels)) => {
            let [kernel] = kernels.as_slice() else { return Err("launches follow one kernel".into()) };
            section.expect_runs(&|notes| launch_scheduled(kernel, notes))?;
        }
        (_, Err(e)) => return Err(e.into()),
        _ => return Err(format!("scheduled kernels have no test `{test}`").into()),
    }
    Ok(())
}
