//! Stepping through the code of one unit (`common` or a role): loops and branches are resolved here, everything else is the host's.

use super::{Block, Inst, Op};
use crate::tile::{Index, ValueId};

/// Who runs the instructions, and knows the values.
pub(crate) trait Host {
    /// What ends the walk.
    type Error;
    /// The value of a loop's bound.
    fn integer(&mut self, i: &Index) -> Result<i64, Self::Error>;
    /// The value of a branch's condition.
    fn truth(&mut self, v: ValueId) -> Result<bool, Self::Error>;
    /// Gives a loop's counter its value.
    fn count(&mut self, counter: ValueId, i: i64) -> Result<(), Self::Error>;
    /// `to = from`, all at once: carried values, and what blocks yield.
    fn hand(&mut self, from: &[ValueId], to: &[ValueId]) -> Result<(), Self::Error>;
    /// Whether a loop is of interest; one that is not is left out, its results without a value.
    fn enters(&self, _loop_inst: &Inst) -> bool {
        true
    }
}

enum Kind<'a> {
    Body,
    Loop { inst: &'a Inst, i: i64, hi: i64, step: i64 },
    Arm { inst: &'a Inst },
}

struct Frame<'a> {
    block: &'a Block,
    at: usize,
    kind: Kind<'a>,
}

/// A place in a block.
pub(crate) struct Walker<'a> {
    frames: Vec<Frame<'a>>,
}

impl<'a> Walker<'a> {
    /// Goes through a block so many times.
    pub(crate) fn repeat(block: &'a Block, times: usize) -> Walker<'a> {
        Walker { frames: (0..times).map(|_| Frame { block, at: 0, kind: Kind::Body }).collect() }
    }

    /// The next instruction that is no loop and no branch, which the caller runs; none at the end.
    pub(crate) fn next<H: Host>(&mut self, host: &mut H) -> Result<Option<&'a Inst>, H::Error> {
        while let Some(frame) = self.frames.last_mut() {
            let Some(inst) = frame.block.insts.get(frame.at) else {
                self.leave(host)?;
                continue;
            };
            frame.at += 1;
            match &inst.op {
                Op::For { lo, hi, step, init, body } if host.enters(inst) => {
                    let (i, hi) = (host.integer(lo)?, host.integer(hi)?);
                    if i < hi {
                        let kind = Kind::Loop { inst, i, hi, step: i64::from(*step).max(1) };
                        self.frames.push(Frame { block: body, at: 0, kind });
                        round(host, body, i, init)?;
                    } else {
                        host.hand(init, &inst.results)?;
                    }
                }
                Op::For { .. } => {}
                Op::If { cond, then, otherwise } => {
                    let block = if host.truth(*cond)? { then } else { otherwise };
                    self.frames.push(Frame { block, at: 0, kind: Kind::Arm { inst } });
                }
                _ => return Ok(Some(inst)),
            }
        }
        Ok(None)
    }

    /// At the end of a block: another round of its loop, or out of it.
    fn leave<H: Host>(&mut self, host: &mut H) -> Result<(), H::Error> {
        let Some(Frame { block, at, kind }) = self.frames.last_mut() else { return Ok(()) };
        let block: &Block = block;
        match kind {
            Kind::Loop { i, hi, step, .. } if i.saturating_add(*step) < *hi => {
                *i += *step;
                *at = 0;
                round(host, block, *i, &block.yields)
            }
            Kind::Loop { inst, .. } | Kind::Arm { inst } => {
                let inst: &Inst = inst;
                self.frames.pop();
                host.hand(&block.yields, &inst.results)
            }
            Kind::Body => {
                self.frames.pop();
                Ok(())
            }
        }
    }
}

/// Starts a round of a loop.
fn round<H: Host>(host: &mut H, body: &Block, i: i64, carried: &[ValueId]) -> Result<(), H::Error> {
    let Some((&counter, args)) = body.args.split_first() else { return Ok(()) };
    host.hand(carried, args)?;
    host.count(counter, i)
}
