//! A step's launches as devices run them: in one go, or around those that are made for pieces of its tokens.

use crate::device::{Bound, BoundLaunch, Buffer, Device, LaunchTimes};
use crate::error::DeviceError;
use dsc_ir::artifact::{Arg, Header, Loop, Step};
use dsc_ir::{Sym, SymValues};
use std::ops::Range;

/// A step that is bound.
pub(super) struct Parts {
    /// All launches in one go, for steps within these limits: those that are one piece of the largest size, or all if there are no loops.
    whole: (SymValues, Bound),
    /// For steps beyond them.
    parts: Vec<Part>,
}

/// Launches that follow one another.
struct Part {
    launches: Range<usize>,
    how: How,
}

enum How {
    /// Each once.
    Once(Bound),
    /// All for each piece of the tokens, in the sizes that pieces come in.
    Pieces(Vec<Size>),
}

/// Pieces of one size.
struct Size {
    tokens: u32,
    /// The longest context that takes it.
    context: u32,
    pieces: Vec<Bound>,
}

/// What steps are bound to.
pub(super) struct Binding<'a> {
    pub(super) header: &'a Header,
    pub(super) limits: SymValues,
    /// Where an argument is.
    pub(super) address: &'a dyn Fn(&Arg) -> (Buffer, u64),
}

impl Parts {
    /// Binds a step.
    pub(super) fn bind(device: &mut dyn Device, step: &Step, binding: &Binding) -> Result<Parts, DeviceError> {
        let launches: Vec<BoundLaunch> = step.launches.iter().map(|l| binding.launch(l)).collect();
        let largest = step.loops.iter().filter_map(|l| l.sizes(&binding.limits).first().copied());
        let limits = largest.fold(binding.limits, |limits, size| {
            let least = |sym| size.get(sym).min(limits.get(sym));
            limits.with(Sym::T, least(Sym::T)).with(Sym::C, least(Sym::C))
        });
        let whole = (limits, device.bind(&launches, &limits)?);
        if step.loops.is_empty() {
            return Ok(Parts { whole, parts: Vec::new() });
        }
        let (mut parts, mut done) = (Vec::new(), 0);
        let once = |device: &mut dyn Device, range: Range<usize>| {
            let how = How::Once(device.bind_part(&launches[range.clone()], &binding.limits)?);
            Ok::<Part, DeviceError>(Part { launches: range, how })
        };
        for l in &step.loops {
            let range = l.range();
            parts.push(once(device, done..range.start)?);
            done = range.end;
            let how = How::Pieces(binding.sizes(device, step, l, &launches[range.clone()])?);
            parts.push(Part { launches: range, how });
        }
        parts.push(once(device, done..launches.len())?);
        Ok(Parts { whole, parts })
    }

    /// Runs a range of the step's launches, which cuts no loop.
    pub(super) fn run(
        &self,
        device: &mut dyn Device,
        launches: Range<usize>,
        syms: &SymValues,
        mut times: Option<&mut LaunchTimes>,
    ) -> Result<(), DeviceError> {
        let (limits, bound) = &self.whole;
        if self.parts.is_empty() || [Sym::T, Sym::C].iter().all(|&sym| syms.get(sym) <= limits.get(sym)) {
            return device.run(*bound, launches, syms, times);
        }
        for part in &self.parts {
            let (start, end) = (part.launches.start.max(launches.start), part.launches.end.min(launches.end));
            if start >= end {
                continue;
            }
            let range = start - part.launches.start..end - part.launches.start;
            let mut own = times.is_some().then(LaunchTimes::default);
            match &part.how {
                How::Once(bound) => device.run(*bound, range, syms, own.as_mut())?,
                How::Pieces(sizes) => run_pieces(device, sizes, &range, syms, own.as_mut())?,
            }
            if let (Some(times), Some(own)) = (times.as_deref_mut(), own) {
                times.add_all(part.launches.start, &own);
            }
        }
        Ok(())
    }
}

fn run_pieces(
    device: &mut dyn Device,
    sizes: &[Size],
    range: &Range<usize>,
    syms: &SymValues,
    mut times: Option<&mut LaunchTimes>,
) -> Result<(), DeviceError> {
    let (tokens, context) = (syms.get(Sym::T), syms.get(Sym::C));
    let misuse = || DeviceError::Misuse("symbols beyond the limits of the binding".into());
    let size = sizes.iter().find(|s| context <= s.context).ok_or_else(misuse)?;
    for number in 0..tokens.div_ceil(size.tokens) {
        let bound = *size.pieces.get(number as usize).ok_or_else(misuse)?;
        let piece = size.tokens.min(tokens - number * size.tokens);
        device.run(bound, range.clone(), &syms.with(Sym::T, piece), times.as_deref_mut())?;
    }
    Ok(())
}

impl Binding<'_> {
    fn launch(&self, l: &dsc_ir::artifact::Launch) -> BoundLaunch {
        BoundLaunch {
            kernel: l.kernel,
            node: l.node.clone(),
            args: l.args.iter().map(|arg| (self.address)(arg)).collect(),
        }
    }

    /// Every piece of every size, from its first token on.
    fn sizes(
        &self,
        device: &mut dyn Device,
        step: &Step,
        l: &Loop,
        launches: &[BoundLaunch],
    ) -> Result<Vec<Size>, DeviceError> {
        let all = self.limits.get(Sym::T);
        let mut sizes = Vec::new();
        for size in l.sizes(&self.limits) {
            let tokens = size.get(Sym::T);
            let mut pieces = Vec::new();
            for first in (0..all).step_by(tokens as usize) {
                let from = self.from(step, l, launches, first)?;
                pieces.push(device.bind_part(&from, &size.with(Sym::T, tokens.min(all - first)))?);
            }
            sizes.push(Size { tokens, context: size.get(Sym::C), pieces });
        }
        Ok(sizes)
    }

    /// The launches of a loop from a token on.
    fn from(
        &self,
        step: &Step,
        l: &Loop,
        launches: &[BoundLaunch],
        first: u32,
    ) -> Result<Vec<BoundLaunch>, DeviceError> {
        let mut from = launches.to_vec();
        for ((i, launch), planned) in from.iter_mut().enumerate().zip(&step.launches[l.range()]) {
            let params = &self.header.kernels[planned.kernel as usize].params;
            for (((_, at), &arg), param) in launch.args.iter_mut().zip(&planned.args).zip(params) {
                let fault = |what| DeviceError::Binding { launch: i, node: planned.node.clone(), what };
                *at += l.pitch(param, arg).map_err(fault)? * u64::from(first);
            }
        }
        Ok(from)
    }
}
