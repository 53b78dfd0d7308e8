//! `cargo xtask loops DIR [TEXT] [--check]`: what the loops of AMD kernels issue, from the assembly that `dsc compile --target gfx950 --emit asm
//! --emit-dir DIR` leaves.
//!
//! A row for each loop with matrix instructions, without the loops inside it, of the kernels whose name contains TEXT: how many of its
//! instructions these are; their share of issue cycles if nothing overlapped ([`dsc_cdna::loops`]); accesses of LDS and of global memory that
//! move 16 bytes, of all, and how many of the latter go straight to LDS; accesses of scratch; waits for global memory, and those of them that
//! wait for all of it. `--check` fails if one touches scratch. Not a measurement: it knows nothing of latency.

use dsc_cdna::loops::loops;
use std::io::Write;
use std::path::Path;

/// Prints the table.
///
/// # Errors
/// Files that cannot be read; with `check`, loops that touch scratch.
pub fn run(args: &[String]) -> Result<(), String> {
    let check = args.iter().any(|a| a == "--check");
    let mut named = args.iter().filter(|a| *a != "--check");
    let folder = Path::new(named.next().ok_or("usage: cargo xtask loops DIR [TEXT] [--check]")?);
    let part = named.next().map_or("", String::as_str);
    let error = |e: std::io::Error| format!("{}: {e}", folder.display());
    let mut files: Vec<_> = std::fs::read_dir(folder).map_err(error)?.flatten().map(|f| f.path()).collect();
    files.retain(|f| f.extension().is_some_and(|e| e == "s"));
    files.sort();
    let mut table = format!(
        "{:64} {:>9} {:>6} {:>8} {:>8} {:>7} {:>8} {:>8} {:>11}",
        "loop", "matrix", "share", "LDS 16B", "mem 16B", "to LDS", "barriers", "scratch", "waits to 0"
    );
    table.push('\n');
    let mut faults = 0;
    for file in files {
        let name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        if !name.contains(part) {
            continue;
        }
        let text = std::fs::read_to_string(&file).map_err(error)?;
        for (i, l) in loops(&text).iter().enumerate() {
            let of = |[some, all]: [usize; 2]| format!("{some}/{all}");
            let share = 100.0 * l.cycles[0] / l.cycles[1];
            table += &format!(
                "{:64} {:>9} {share:5.0}% {:>8} {:>8} {:>7} {:>8} {:>8} {:>11}\n",
                format!("{name} {i}"),
                of(l.matrix),
                of(l.local),
                of(l.global),
                l.copies,
                l.barriers,
                l.scratch,
                of(l.waits)
            );
            faults += usize::from(l.scratch > 0);
        }
    }
    // Who reads it may have seen enough.
    match std::io::stdout().write_all(table.as_bytes()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => return Err(format!("standard output: {e}")),
        _ => {}
    }
    if check && faults > 0 { Err(format!("{faults} loops with matrix instructions touch scratch")) } else { Ok(()) }
}
