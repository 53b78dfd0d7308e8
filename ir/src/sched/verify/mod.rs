//! The verifier of scheduled kernels. All breaches are collected. A kernel without diagnostics satisfies:
//!
//! * what tile programs satisfy ([`crate::tile::verify()`]), with every role a scope of its own inside `common` (`types`);
//! * every value has a place that its operation and its type allow, and buffers and channels are sound tables (`places`);
//! * threads, roles' warps and registers, shared memory and barriers are within the [`Budget`] (`budget`);
//! * channels pair up: one producer, at least one consumer, and runs over many trip counts neither hang, nor leave a stage open, nor read a
//!   stage that was given back (`channels`);
//! * the blocks of a team meet in all roles alike, and exchange tiles that fit (`team`);
//! * buffers that live at once do not overlap (`lifetimes`);
//! * between a write of shared memory and another thread's read of it, and between a read and the next write, lies a barrier on every
//!   path (`hazards`).
//!
//! The later rules are checked only where the first two hold.
//!
//! **Cost.** Linear in the code but for overlaps (pairs of buffers) and channels (a bounded number of steps of a bounded number of runs).

mod budget;
mod channels;
mod hazards;
mod lifetimes;
mod places;
mod team;
mod turns;
mod types;

use super::{Scheduled, Type};
use crate::tile::Diagnostic;

pub use budget::registers;

/// What a block may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Bytes of shared memory of a block.
    pub shared_bytes: u32,
    /// 32-bit registers of all threads of a block together.
    pub registers: u32,
    /// 32-bit registers of one thread.
    pub thread_registers: u32,
    /// Barriers that a part of a block can wait at, each by a number of its own.
    pub named_barriers: u32,
    /// Threads of a block.
    pub threads: u32,
}

impl Budget {
    /// No limits.
    pub const UNLIMITED: Budget = Budget {
        shared_bytes: u32::MAX,
        registers: u32::MAX,
        thread_registers: u32::MAX,
        named_barriers: u32::MAX,
        threads: u32::MAX,
    };
}

/// Everything that is wrong with a kernel.
pub fn verify(kernel: &Scheduled, limits: &Budget) -> Vec<Diagnostic> {
    let mut report = Report::new(kernel);
    report.diagnostics = structure(kernel);
    if !report.diagnostics.is_empty() {
        return report.diagnostics;
    }
    budget::check(kernel, limits, &mut report);
    channels::check(kernel, &mut report);
    lifetimes::check(kernel, &mut report);
    hazards::check(kernel, &mut report);
    report.diagnostics
}

/// What is wrong with types, scopes, places and tables: without this a kernel cannot even be run.
pub(crate) fn structure(kernel: &Scheduled) -> Vec<Diagnostic> {
    let mut report = Report::new(kernel);
    if kernel.places.len() != kernel.types.len() {
        let (places, types) = (kernel.places.len(), kernel.types.len());
        report.add("", format!("{places} places for {types} values"));
        return report.diagnostics;
    }
    report.diagnostics = types::check(kernel);
    if report.diagnostics.is_empty() {
        places::check(kernel, &mut report);
    }
    report.diagnostics
}

/// Collects what is wrong; the same is said once.
struct Report<'a> {
    kernel: &'a Scheduled,
    diagnostics: Vec<Diagnostic>,
}

impl<'a> Report<'a> {
    fn new(kernel: &'a Scheduled) -> Report<'a> {
        Report { kernel, diagnostics: Vec::new() }
    }

    /// `place` follows the kernel's name, such as `, role producer`.
    fn add(&mut self, place: &str, message: impl Into<String>) {
        let location = format!("kernel {}{place}", self.kernel.name);
        let diagnostic = Diagnostic { location, message: message.into() };
        if !self.diagnostics.contains(&diagnostic) {
            self.diagnostics.push(diagnostic);
        }
    }
}

/// Rows and columns of a tile: all axes but the last, and the last.
fn matrix(ty: &Type) -> [u64; 2] {
    match ty {
        Type::Tile(t) => match t.shape.split_last() {
            Some((&columns, rows)) => [rows.iter().map(|&n| u64::from(n)).product(), columns.into()],
            None => [1, 1],
        },
        _ => [1, 1],
    }
}

/// `, role producer, inst %12`, `, common, acquire c0`: where an instruction is.
fn location(kernel: &Scheduled, unit: super::ring::Unit, inst: &super::Inst) -> String {
    use super::Op;
    let name = super::ring::unit_name(kernel, unit);
    let of = if unit == 0 { format!(", {name}") } else { format!(", role {name}") };
    let what = match (&inst.op, inst.results.first()) {
        (_, Some(v)) => format!("inst %{}", v.0),
        (Op::Acquire(c), _) => format!("acquire {c}"),
        (Op::Commit(c), _) => format!("commit {c}"),
        (Op::Wait(c), _) => format!("wait {c}"),
        (Op::Copy { channel, slot, .. }, _) => format!("copy {channel}.{slot}"),
        (Op::Fill { channel, slot, .. }, _) => format!("fill {channel}.{slot}"),
        (Op::Take { channel, slot }, _) => format!("take {channel}.{slot}"),
        (Op::Release { channel, .. }, _) => format!("release {channel}"),
        (Op::Barrier, _) => "barrier".into(),
        (Op::Meet, _) => "meet".into(),
        (Op::Put { buffer, .. }, _) => format!("put {buffer}"),
        (Op::Get { buffer, .. }, _) => format!("get {buffer}"),
        (Op::Number, _) => "number".into(),
        (Op::Part { .. }, _) => "part".into(),
        (Op::For { body, .. }, _) => format!("loop of %{}", body.args.first().map_or(0, |v| v.0)),
        (Op::If { cond, .. }, _) => format!("branch on %{}", cond.0),
        (Op::Tile(crate::tile::Op::Store { value, .. } | crate::tile::Op::Scatter { value, .. }), _) => {
            format!("store of %{}", value.0)
        }
        (Op::Tile(_), None) => "an operation".into(),
    };
    format!("{of}, {what}")
}

#[cfg(test)]
mod tests;
