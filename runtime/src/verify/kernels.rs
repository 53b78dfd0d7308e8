//! Every kernel of an artifact, on a device, against the tile interpreter on the same random memory.
//!
//! Kernels have the shapes and schedules that run, but each is run by itself, on memory as [`launches`](super::launches) makes it.
//! Buffers lie between guard bytes, which must stay as they are.

use super::launches::{Contents, Errors, Launch, Sizes};
use crate::artifact::Artifact;
use crate::device::{BoundLaunch, Buffer, Code, Device};
use crate::error::{CallError, DeviceError, Error};
use dsc_ir::DType;
use dsc_ir::artifact::{Header, KernelEntry, ParamEntry};
use dsc_ir::tile::{self, Program};
use std::collections::{BTreeMap, HashMap};

/// Bytes around buffers that must stay as they are.
const GUARD: usize = 256;
const GUARD_BYTE: u8 = 0x5a;

/// How one kernel did.
#[derive(Clone, Debug, serde::Serialize)]
pub struct KernelReport {
    /// Its name.
    pub kernel: String,
    /// What it computes.
    pub what: String,
    /// Launches compared.
    pub launches: u32,
    /// Worst element of each type: relative to the larger of itself and the root mean square of its tensor.
    pub worst: BTreeMap<String, f64>,
    /// What went wrong, with the launch.
    pub failures: Vec<String>,
    /// Why it was not run.
    pub skipped: Option<String>,
}

/// Runs every kernel of an artifact whose name contains `filter` on a fresh device, and compares it with the interpreter.
/// `progress` is told the kernels done and to be done.
///
/// # Errors
/// [`Error`] if the artifact has no readable tile programs, or the device refuses it.
pub fn verify_kernels(
    artifact: &Artifact,
    device: &mut dyn Device,
    filter: &str,
    progress: &dyn Fn(usize, usize, &str),
) -> Result<Vec<KernelReport>, Error> {
    let header = artifact.header();
    if header.steps.is_empty() {
        return Err(CallError::NoModel { path: artifact.path().to_path_buf() }.into());
    }
    let text = std::str::from_utf8(artifact.section("tile")?).unwrap_or_default();
    let programs: HashMap<String, Program> = tile::parse(text)
        .map_err(|e| DeviceError::Misuse(format!("the artifact's tile programs cannot be read: {e}")))?
        .into_iter()
        .map(|p| (p.name.clone(), p))
        .collect();
    let portable = if header.section("asm").is_some() { artifact.section("asm")? } else { &[] };
    device.load_code(header, Code { native: artifact.section("code")?, portable })?;
    let mut seen = vec![false; header.kernels.len()];
    let mut reports = Vec::new();
    for (s, step) in header.steps.iter().enumerate() {
        for (l, planned) in step.launches.iter().enumerate() {
            let entry = &header.kernels[planned.kernel as usize];
            if std::mem::replace(&mut seen[planned.kernel as usize], true) || !entry.name.contains(filter) {
                continue;
            }
            progress(reports.len(), header.kernels.len(), &entry.name);
            let mut report = KernelReport {
                kernel: entry.name.clone(),
                what: entry.what.clone(),
                launches: 0,
                worst: BTreeMap::new(),
                failures: Vec::new(),
                skipped: None,
            };
            match programs.get(&entry.name) {
                Some(program) => match same_kernel(program, entry) {
                    Ok(()) => check_kernel(header, (s, l), program, device, &mut report)?,
                    Err(what) => report.failures.push(format!("its tile program is not the kernel's: {what}")),
                },
                None => report.skipped = Some("the artifact has no tile program of it".into()),
            }
            reports.push(report);
        }
    }
    Ok(reports)
}

/// Whether a tile program is sound and has the grid and parameters that the header says of the kernel: it is text beside the code,
/// which nothing else reads, so it need not be either.
fn same_kernel(program: &Program, entry: &KernelEntry) -> Result<(), String> {
    if let Some(problem) = tile::verify(program).first() {
        return Err(format!("{}: {}", problem.location, problem.message));
    }
    if program.grid != entry.grid {
        return Err(format!("a grid of {:?}, the artifact's header has {:?}", program.grid, entry.grid));
    }
    let same = |(p, e): (&tile::Param, &ParamEntry)| {
        p.name == e.name && program.view(p.value) == Some(&e.view) && p.access.writes() == e.write
    };
    if program.params.len() != entry.params.len() || !program.params.iter().zip(&entry.params).all(same) {
        return Err("parameters other than those of the artifact's header".into());
    }
    Ok(())
}

fn check_kernel(
    header: &Header,
    (s, l): (usize, usize),
    program: &Program,
    device: &mut dyn Device,
    report: &mut KernelReport,
) -> Result<(), Error> {
    let step = &header.steps[s];
    let e4m3 = |p: &&tile::Param| program.view(p.value).is_some_and(|v| v.dtype == DType::E4m3);
    let fp8 = program.params.iter().any(|p| e4m3(&p));
    for (i, sizes) in Sizes::of(&step.max).into_iter().enumerate() {
        for wild in [false, true] {
            let seed = u64::from(step.launches[l].kernel) * 100 + 2 * i as u64 + u64::from(wild);
            let contents = Contents { seed, wild, pow2_scales: true };
            let Some(launch) = Launch::new(step, l, program, sizes, contents) else {
                report.skipped = Some("its buffers are too large for the interpreter".into());
                return Ok(());
            };
            let name = format!(
                "{} tokens of {} sequences after {} in {}{}",
                sizes.tokens,
                sizes.seqs,
                sizes.before,
                step.name,
                if wild { ", with bad indices" } else { "" }
            );
            report.launches += 1;
            match check(device, step.launches[l].kernel, &launch)? {
                Err(e) => report.failures.push(format!("{name}: {e}")),
                Ok(errors) => {
                    for (dtype, w) in errors {
                        if w.error > tolerance(dtype, fp8) {
                            report.failures.push(format!("{name}: {:.1e}: {}", w.error, w.what));
                        }
                        let all = report.worst.entry(dtype.name().into()).or_default();
                        *all = all.max(w.error);
                    }
                }
            }
        }
    }
    Ok(())
}

/// Largest error that another order of sums explains, in results of a kernel with e4m3 operands or without. Elements of small types may
/// round the other way: one unit.
pub fn tolerance(dtype: DType, fp8: bool) -> f64 {
    match dtype {
        // Matrix units keep fewer bits of sums of e4m3 products than f32 has.
        DType::F32 if fp8 => 2e-3,
        DType::F32 => 1e-4,
        DType::Bf16 => 1e-2,
        DType::F16 => 2e-3,
        _ => 0.13,
    }
}

/// Runs a launch on the device and on the interpreter.
fn check(device: &mut dyn Device, kernel: u32, launch: &Launch) -> Result<Result<Errors, String>, Error> {
    let mut on_device: Vec<Buffer> = Vec::new();
    for bytes in &launch.buffers {
        let guarded = [vec![GUARD_BYTE; GUARD], bytes.clone(), vec![GUARD_BYTE; GUARD]].concat();
        let buffer = device.alloc(guarded.len() as u64, "a kernel's check")?;
        device.upload(buffer, 0, &guarded)?;
        on_device.push(buffer);
    }
    let args = launch.bindings.iter().map(|b| (on_device[b.buffer], GUARD as u64)).collect();
    let bound = device.bind(&[BoundLaunch { kernel, node: launch.program.name.clone(), args }], &launch.syms)?;
    device.run(bound, 0..1, &launch.syms, None)?;
    let mut got = Vec::new();
    for (i, bytes) in launch.buffers.iter().enumerate() {
        let mut guarded = vec![0; bytes.len() + 2 * GUARD];
        device.read(on_device[i], 0, &mut guarded)?;
        let outside = guarded[..GUARD].iter().chain(&guarded[GUARD + bytes.len()..]);
        if outside.copied().any(|b| b != GUARD_BYTE) {
            return Ok(Err(format!("it wrote outside of buffer {i}")));
        }
        got.push(guarded[GUARD..GUARD + bytes.len()].to_vec());
    }
    Ok(launch.compare(&got))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::header;
    use dsc_ir::tile::Access;

    /// What stands beside the code need not be what the code was made of.
    #[test]
    fn foreign_programs_are_refused() {
        let entry = header().kernels.remove(0);
        let builder = |rows: u32| {
            let mut b = tile::Builder::new(&entry.name);
            for p in &entry.params {
                let access = if p.write { Access::Write } else { Access::Read };
                b.param_view(&p.name, p.view.clone(), access);
            }
            let mut program = b.finish().unwrap();
            program.grid = entry.grid.clone();
            program.grid[0].tile *= rows;
            program
        };
        let refused = |program: &Program| same_kernel(program, &entry).unwrap_err();
        assert_eq!(same_kernel(&builder(1), &entry), Ok(()));
        assert!(refused(&builder(2)).contains("a grid of"));
        let mut other = builder(1);
        other.params.pop();
        assert!(refused(&other).contains("parameters other than"));
        let mut other = builder(1);
        other.params[0].name.push('x');
        assert!(refused(&other).contains("parameters other than"));
        // A parameter whose value is not there would be indexed with.
        let mut other = builder(1);
        other.params[0].value = tile::ValueId(99);
        assert!(!refused(&other).is_empty());
        assert!(
            Launch::new(&header().steps[0], 9, &builder(1), Sizes { tokens: 1, seqs: 1, before: 0 }, WILD).is_none()
        );
    }

    /// A scale on the other side of a power of two is another way to write the same values, if it is one of few.
    #[test]
    fn values_count_not_their_scales() {
        use dsc_ir::tile::{ViewType, interp::Binding};
        let mut b = tile::Builder::new("k");
        b.grid(1, 1);
        let y = b.param_view("y", ViewType::dense(DType::E4m3, &[4.into(), 256.into()]), Access::Write);
        let scales = b.param_view("y_scales", ViewType::dense(DType::F32, &[4.into(), 2.into()]), Access::Write);
        let codes = b.full(96.0, &[4, 256]);
        let codes = b.cast(codes, DType::E4m3);
        b.store(y, &[0.into(), 0.into()], codes);
        let half = b.full(0.5, &[4, 2]);
        b.store(scales, &[0.into(), 0.into()], half);
        let program = b.finish().unwrap();
        let bindings = vec![Binding { buffer: 0, offset: 0 }, Binding { buffer: 1, offset: 0 }];
        let buffers = vec![vec![0; 1024], vec![0; 32]];
        let launch = Launch { program: &program, syms: Default::default(), buffers, bindings };
        let worst = |groups: &[usize], code: f32| {
            let mut got = launch.interpret().unwrap();
            for &g in groups {
                got[0][128 * g..128 * (g + 1)].fill(dsc_ir::dtype::f32_to_e4m3(code));
                got[1][4 * g..4 * (g + 1)].copy_from_slice(&1f32.to_le_bytes());
            }
            launch.compare(&got).unwrap().values().map(|w| w.error).fold(0.0, f64::max)
        };
        assert_eq!(worst(&[5], 48.0), 0.0);
        assert!(worst(&[5], 96.0) > 0.4, "twice the value");
        assert!(worst(&[4, 5], 48.0) >= 0.5, "too many");
    }

    const WILD: Contents = Contents { seed: 1, wild: true, pow2_scales: false };

    /// Views that the header's check cannot refuse, as they are empty or small where they are bound.
    #[test]
    fn views_beyond_reason_are_left_out() {
        use dsc_ir::tile::{Stride, ViewType};
        let step = header().steps.remove(0);
        let made = |edit: &dyn Fn(&mut ViewType)| {
            let mut view = ViewType::dense(DType::F32, &[4.into(), 4.into()]);
            edit(&mut view);
            let mut b = tile::Builder::new("k");
            b.param_view("x", view, Access::Read);
            let program = b.finish().unwrap();
            let sizes = Sizes { tokens: 1, seqs: 1, before: 0 };
            Launch::new(&step, 0, &program, sizes, WILD).map(|l| l.buffers[0].len())
        };
        assert_eq!(made(&|_| ()), Some(64));
        assert_eq!(made(&|v| v.strides[0] = Stride { bytes: -16, sym: None }), None);
        assert_eq!(made(&|v| v.strides[0] = Stride { bytes: i64::MAX, sym: Some(dsc_ir::Sym::N) }), None);
        assert_eq!(made(&|v| v.offset = u64::MAX), None);
        assert_eq!(
            made(&|v| {
                v.shape = vec![u32::MAX.into(); 2];
                v.strides = vec![Stride { bytes: 0, sym: None }; 2];
            }),
            None
        );
    }
}
