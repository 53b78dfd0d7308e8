//! Programs of which each block runs one of two halves, by its number: kernels side by side.
//!
//! ```text
//! %p = block_id 1
//! %c = map(%p) { lt a, 140 }
//! if %c { .. } else { .. }
//! ```
//!
//! Each half is planned as the program that it would be alone, in a grid of its own blocks, and walks its tiles by numbers among these. A block of the
//! launch goes one way or the other before it does anything else: both have their own roles, barriers and rings, in the same shared memory. So a
//! half takes as long as in a launch of its own, or less by the launch; where one needs fewer threads the others end.

use super::contraction::regions;
use super::emit::{Emit, How, module, occupancy};
use super::plan::for_each;
use super::tensor_map::Maps;
use super::values::plus;
use super::{plan, select, team};
use crate::Kernel;
use crate::nvidia::arch::Arch;
use crate::nvidia::lower::isa;
use crate::nvidia::lower::mlir::{Fn, Ty, i32};
use dsc_ir::DType;
use dsc_ir::artifact::GpuKernel;
use dsc_ir::extent::GridDim;
use dsc_ir::sched::Scheduled;
use dsc_ir::tile::{
    Inst, MapArg, MapFn, MapInst, Op, Program, Region, Scalar, ScalarOp, TileType, Type, ValueId, operands,
};

/// The axis of the grid by which halves are told apart.
const AXIS: u32 = 1;

/// Two halves, and the number of blocks along that axis which run the first.
pub struct Halves<T> {
    /// What each runs.
    pub halves: [T; 2],
    /// Blocks of the first.
    pub first: u32,
}

/// Schedule of both halves, MLIR and launch of a kernel; none if it has no halves, or one is no contraction of this path.
pub fn compile(kernel: &Kernel, arch: &Arch, symbols: Ty) -> Option<(String, String, GpuKernel)> {
    let Halves { halves, first } = apart(&kernel.program)?;
    let plan = |program: Program| {
        let scheduled = plan::plan(&Kernel { program, schedule: kernel.schedule.clone() }, arch)?;
        alone(&scheduled).then_some(scheduled)
    };
    let [a, b] = halves;
    let both = Halves { halves: [plan(a)?, plan(b)?], first };
    let (mlir, gpu) = lower(&both, arch, How::of(&kernel.schedule, symbols)).ok()?;
    let sched = both.halves.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
    Some((sched, mlir, gpu))
}

/// Whether blocks of a kernel need nothing of others.
fn alone(s: &Scheduled) -> bool {
    s.cluster.is_none() && s.team <= 1 && !s.apart() && !s.parts() && super::emit::scratch_bytes(s) == 0
}

/// The halves of a program, each as a program with all parameters.
pub fn apart(program: &Program) -> Option<Halves<Program>> {
    let (last, front) = program.body.insts.split_last()?;
    let Op::If { cond, then, otherwise } = &last.op else { return None };
    let made = |v: ValueId| front.iter().find(|i| i.results == [v]).map(|i| &i.op);
    let Op::Map { inputs, body } = made(*cond)? else { return None };
    let first = below(body)?;
    let by_number = matches!(inputs[..], [v] if matches!(made(v), Some(Op::BlockId { axis: AXIS })));
    let blocks = program.grid.get(AXIS as usize).filter(|d| d.tile == 1)?.extent.constant()?;
    let scalars = front.iter().all(|i| matches!(i.op, Op::BlockId { .. } | Op::Map { .. } | Op::Full { .. }));
    if !by_number || !scalars || !last.results.is_empty() || program.grid.len() != 2 || !(1..blocks).contains(&first) {
        return None;
    }
    let front = || front.iter().filter(|i| i.results != [*cond]).cloned().collect::<Vec<_>>();
    let half = |region: &Region, blocks: u32, front: Vec<Inst>| {
        let mut half = Program { body: Region::default(), ..program.clone() };
        half.grid[AXIS as usize] = GridDim { extent: blocks.into(), tile: 1 };
        half.body.insts = front.into_iter().chain(region.insts.iter().cloned()).collect();
        half
    };
    let a = half(then, first, front());
    let mut b = half(otherwise, blocks - first, front());
    count_from(&mut b, first);
    let mut halves = [a, b];
    halves.iter_mut().for_each(remove_unused);
    Some(Halves { halves, first })
}

/// The constant that a comparison of an integer asks it to be below.
fn below(body: &MapFn) -> Option<u32> {
    let [MapInst { op: ScalarOp::Const(Scalar::I32(n)), .. }, MapInst { op: ScalarOp::Lt, args }] = &body.insts[..]
    else {
        return None;
    };
    let compares = args[..] == [MapArg::Input(0), MapArg::Inst(0)] && body.result == MapArg::Inst(1);
    u32::try_from(*n).ok().filter(|_| compares)
}

/// Has a program that ran from that block on run from block 0 on.
fn count_from(program: &mut Program, first: u32) {
    let mut insts = Vec::new();
    for inst in std::mem::take(&mut program.body.insts) {
        if !matches!(inst.op, Op::BlockId { axis: AXIS }) {
            insts.push(inst);
            continue;
        }
        program.types.push(Type::Tile(TileType::scalar(DType::I32)));
        let own = ValueId(program.types.len() as u32 - 1);
        insts.push(Inst { results: vec![own], op: inst.op });
        insts.push(Inst { results: inst.results, op: plus(own, first as i32) });
    }
    program.body.insts = insts;
}

/// Drops scalars of the body that only the other half used.
fn remove_unused(program: &mut Program) {
    for at in (0..program.body.insts.len()).rev() {
        let Inst { results, op } = &program.body.insts[at];
        let scalar = matches!(op, Op::BlockId { .. } | Op::Map { .. } | Op::Full { .. });
        if scalar && !results.iter().any(|&v| uses(&program.body, v)) {
            program.body.insts.remove(at);
        }
    }
}

/// Whether a region, or one in it, uses a value.
fn uses(region: &Region, v: ValueId) -> bool {
    let mut used = region.yields.contains(&v);
    for_each(region, &mut |i| {
        used |= operands(&i.op).contains(&v) || regions(&i.op).iter().any(|r| r.yields.contains(&v));
    });
    used
}

/// MLIR of both, and how they are launched.
fn lower(both: &Halves<Scheduled>, arch: &Arch, how: How) -> Result<(String, GpuKernel), String> {
    let arch = &Arch { exact_division: false, ..*arch };
    let threads = both.halves.iter().map(|s| s.threads).max().unwrap_or(0);
    if both.halves.iter().any(select::is_selection) {
        return Err("a selection beside another kernel".into());
    }
    // What a thread has at the start follows from the launch.
    if both.halves.iter().any(|s| s.threads < threads && s.roles.iter().any(|r| r.registers.is_some())) {
        return Err("registers that move between fewer threads than there are".into());
    }
    let mut f = Fn::default();
    let [x, y, columns, lines] =
        ["ctaid.x", "ctaid.y", "nctaid.x", "nctaid.y"].map(|register| isa::sreg(&mut f, register));
    let line = f.mul(y, columns);
    let number = f.add(line, x);
    let end_of_first = f.mul(columns, i32(both.first.into()));
    let all = f.mul(columns, lines);
    let starts = [f.label(), f.label()];
    let done = f.label();
    let is_first = f.cmp("ult", number, end_of_first);
    f.cond_br(is_first, (starts[0], &[]), (starts[1], &[]));
    let (mut maps, mut shared_bytes, mut sharing) = (Maps::default(), 0, u32::MAX);
    for ((s, start), from) in both.halves.iter().zip(starts).zip([i32(0), end_of_first]) {
        f.start(start, &[]);
        let to = if from == end_of_first { all } else { end_of_first };
        let share = [f.sub(number, from), f.sub(to, from)];
        let mut e = Emit::of_share(f, s, arch, how, share, s.threads < threads);
        e.maps = maps;
        half(&mut e)?;
        let bytes = e.meeting + team::meeting_bytes(s);
        shared_bytes = bytes.max(shared_bytes);
        sharing = occupancy(s, bytes, arch, how.sharing).min(sharing);
        (f, maps) = (e.t.f, e.maps);
        f.br(done, &[]);
    }
    f.start(done, &[]);
    let gpu = GpuKernel { threads, shared_bytes, cluster: 1, dependent: true, maps: maps.0, ..GpuKernel::default() };
    Ok((module(&both.halves[0], &gpu, how.symbols, sharing, f.text()), gpu))
}

/// What the threads do that one of the halves has.
fn half(e: &mut Emit<'_>) -> Result<(), String> {
    if !e.fewer {
        return e.kernel();
    }
    let (inside, after) = (e.t.f.label(), e.t.f.label());
    let mine = e.t.f.cmp("ult", e.t.tid, i32(e.s.threads.into()));
    e.t.f.cond_br(mine, (inside, &[]), (after, &[]));
    e.t.f.start(inside, &[]);
    e.kernel()?;
    e.t.f.br(after, &[]);
    e.t.f.start(after, &[]);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use dsc_ir::tile::parse;

    const PROGRAM: &str = "kernel k grid(T/16, 5/1)
    write %y: view<[T, 64] f32>
{
    %1 = block_id 0 : i32
    %2 = block_id 1 : i32
    %3 = map(%2) { a -> t0 = 3; t1 = lt a, t0; t1 } : bool
    if %3 {
        %4 = full 1.0 : tile<16x64xf32>
        store %y[%2, 0], %4
    } else {
        %5 = full 2.0 : tile<16x64xf32>
        store %y[%2, 0], %5
    }
}
";

    #[test]
    fn halves_count_their_own_blocks() {
        let program = |text: &str| parse(text).expect("a program").remove(0);
        let Halves { halves: [a, b], first } = apart(&program(PROGRAM)).expect("two halves");
        assert_eq!(first, 3);
        let blocks = |p: &Program| p.grid[1].extent.constant();
        assert_eq!((blocks(&a), blocks(&b)), (Some(3), Some(2)));
        for half in [&a, &b] {
            assert_eq!(dsc_ir::tile::verify(half), []);
        }
        assert!(a.to_string().contains("1.0") && !a.to_string().contains("2.0"), "{a}");
        assert!(b.to_string().contains("add a, 3"), "{b}");
        let changed = |from: &str, to: &str| apart(&program(&PROGRAM.replace(from, to))).is_some();
        assert!(changed("t0 = 3", "t0 = 4"));
        assert!(!changed("t0 = 3", "t0 = 5") && !changed("t0 = 3", "t0 = 0"), "one half has all blocks");
        assert!(!changed("5/1", "T/1"), "nobody knows how many blocks there are");
        assert!(!changed("map(%2)", "map(%1)"), "the other axis");
    }
}
