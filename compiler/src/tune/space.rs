//! Schedules near the one that a target chooses, and an artifact of each.

use super::{Candidate, Candidates, LIST};
use crate::kernels::{KernelShape, shape_of};
use crate::microbench::{self, Bench, Choice};
use crate::plan::launch_order;
use dsc_ir::Sym;
use dsc_ir::schedule::{Rule, Schedule};
use dsc_targets::Target;
use std::collections::HashSet;
use std::path::Path;
use std::time::Instant;

/// Fields of a schedule that differ from the target's at most.
const CHANGES: usize = 2;
/// Largest of tile sides and of threads that are tried.
const LARGEST: u32 = 1024;

/// Compiles the kernel at the target's schedule and, until `end`, at others near it, the nearest first, into an existing folder;
/// `progress` is told how many of how many are done.
///
/// # Errors
/// If the kernel cannot be compiled at all, or the folder not be written.
pub fn compile(
    folder: &Path,
    choice: Choice,
    target: &dyn Target,
    end: Instant,
    progress: &dyn Fn(usize, usize),
) -> Result<Candidates, Box<dyn std::error::Error>> {
    let own = microbench::prepare(choice.clone(), target, &[])?;
    let (shape, tokens) = shape_of_kernel(&own)?;
    let chosen = target.schedule(&shape, tokens);
    let mut all = Candidates {
        kernel: own.choice.family.name.into(),
        shape: own.choice.describe(),
        target: target.name().into(),
        candidates: Vec::new(),
        dropped: 0,
    };
    let mut seen = HashSet::new();
    let space = near(&chosen);
    let mut own = Some(own);
    for (i, schedule) in space.iter().enumerate() {
        if i > 0 && Instant::now() > end {
            break;
        }
        progress(i, space.len());
        let rule = Rule::of(&shape, tokens, &chosen, schedule);
        let compiled = || microbench::prepare(choice.clone(), target, std::slice::from_ref(&rule)).ok();
        // The first is the target's own.
        let Some(bench) = own.take().or_else(compiled) else {
            all.dropped += 1;
            continue;
        };
        // Tiles that do not fit were made smaller, and some fields mean nothing to some kernels.
        let module = &bench.compiled.module;
        if !seen.insert((module.code.clone(), module.portable.clone())) {
            all.dropped += 1;
            continue;
        }
        let file = format!("{i}.dsc");
        std::fs::write(folder.join(&file), &bench.compiled.bytes)?;
        all.candidates.push(Candidate { file, rule });
    }
    // Last: where the list is, all else is.
    std::fs::write(folder.join(LIST), serde_json::to_string_pretty(&all)?)?;
    Ok(all)
}

/// The timed kernel's shape, and the most tokens of its step.
fn shape_of_kernel(bench: &Bench) -> Result<(KernelShape, u32), String> {
    let op = bench.choice.family.op;
    let (class, graph) = &bench.compiled.graphs[0];
    let (launches, _) = launch_order(graph);
    let timed = launches.into_iter().filter(|&node| !graph.dag[node].name.starts_with("setup"));
    let shape = timed.map(|node| shape_of(graph, node, class)).find(|shape| shape.op == op);
    let shape = shape.ok_or_else(|| format!("no kernel of op {op} is left of {}", bench.choice.family.name))?;
    Ok((shape, class.max.get(Sym::T)))
}

/// A field of a schedule, the values that it may take beside multiples of its own, each with how far it is, and whether those are for a
/// field that is left to the target only.
struct Field {
    of: fn(&mut Schedule) -> &mut u32,
    named: &'static [(u32, u32)],
    if_free: bool,
}

const FIELDS: [Field; 7] = [
    Field { of: |s| &mut s.tile_m, named: &[], if_free: true },
    Field { of: |s| &mut s.tile_n, named: &[], if_free: true },
    Field { of: |s| &mut s.tile_k, named: &[], if_free: true },
    Field { of: |s| &mut s.tile_h, named: &[], if_free: true },
    Field { of: |s| &mut s.cluster, named: &[(1, 1), (1, 2), (2, 4), (3, 8)], if_free: false },
    Field { of: |s| &mut s.threads, named: &[(2, 128), (2, 256), (3, 512)], if_free: true },
    Field { of: |s| &mut s.sharing, named: &[(1, 1), (1, 2)], if_free: false },
];

/// The schedule and those that differ in at most [`CHANGES`] fields, each a few steps away; the nearest first.
fn near(own: &Schedule) -> Vec<Schedule> {
    let of = |field: &Field, s: &Schedule| *(field.of)(&mut s.clone());
    let mut all: Vec<(u32, Schedule)> = vec![(0, own.clone())];
    let mut from = 0;
    for _ in 0..CHANGES {
        let until = all.len();
        for i in from..until {
            let (distance, base) = all[i].clone();
            // Fields before the last changed one are changed elsewhere.
            let first = FIELDS.iter().rposition(|f| of(f, &base) != of(f, own)).map_or(0, |f| f + 1);
            for field in &FIELDS[first..] {
                for (steps, value) in values(field, of(field, own)) {
                    let mut changed = base.clone();
                    *(field.of)(&mut changed) = value;
                    all.push((distance + steps, changed));
                }
            }
        }
        from = until;
    }
    all.sort_by_key(|(distance, _)| *distance);
    all.into_iter().map(|(_, schedule)| schedule).collect()
}

/// Other values of a field, and how far each is from its own.
fn values(field: &Field, own: u32) -> Vec<(u32, u32)> {
    if !field.if_free || own == 0 {
        return field.named.iter().copied().filter(|&(_, n)| n != own).collect();
    }
    let steps = [(1, 1, 2), (1, 2, 1), (2, 1, 4), (2, 4, 1), (2, 3, 2), (2, 3, 4)];
    let value = |(distance, times, over): (u32, u32, u32)| {
        let value = own.checked_mul(times)?;
        (value % over == 0 && (1..=LARGEST).contains(&(value / over))).then_some((distance, value / over))
    };
    steps.into_iter().filter_map(value).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_space_starts_with_the_own_schedule_and_has_each_once() {
        let own = Schedule { tile_m: 16, tile_n: 64, tile_k: 128, ..Schedule::default() };
        let space = near(&own);
        assert_eq!(space[0], own);
        assert_eq!(space.iter().collect::<HashSet<_>>().len(), space.len());
        let changed = |s: &Schedule| {
            let tiles = [s.tile_m != own.tile_m, s.tile_n != own.tile_n, s.tile_k != own.tile_k];
            tiles.into_iter().chain([s.cluster, s.threads, s.sharing].map(|n| n != 0)).filter(|&c| c).count()
        };
        assert!(space.iter().all(|s| changed(s) <= CHANGES && s.tile_h == 0 && s.tile_m > 0));
        assert!(space.contains(&Schedule { tile_m: 32, tile_n: 32, ..own.clone() }));
        assert!(space.contains(&Schedule { tile_n: 96, ..own }));
    }
}
