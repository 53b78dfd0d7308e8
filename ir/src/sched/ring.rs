//! The counters of a channel: who may go on, and what is misuse. The verifier and the interpreter run the same ones.

use super::{ChannelId, Op, Scheduled};

/// A unit that runs code by itself: 0 is `common`, `n` is role `n - 1`.
pub(crate) type Unit = usize;

/// A channel's stages, counted from the start and not modulo its depth.
#[derive(Clone, Debug)]
pub(crate) struct Ring {
    stages: u64,
    acquired: u64,
    committed: u64,
    readers: Vec<Reader>,
}

#[derive(Clone, Debug)]
struct Reader {
    unit: Unit,
    waited: u64,
    released: u64,
}

impl Ring {
    pub(crate) fn new(stages: u32, readers: &[Unit]) -> Ring {
        let readers = readers.iter().map(|&unit| Reader { unit, waited: 0, released: 0 }).collect();
        Ring { stages: stages.into(), acquired: 0, committed: 0, readers }
    }

    /// Depth of the ring.
    pub(crate) fn stages(&self) -> u64 {
        self.stages
    }

    /// Whether a stage is free to be filled.
    pub(crate) fn has_free(&self) -> bool {
        self.acquired < self.readers.iter().map(|r| r.released).min().unwrap_or(0) + self.stages
    }

    /// Takes the next stage to fill; none while every stage is in use.
    pub(crate) fn acquire(&mut self) -> Result<Option<u64>, String> {
        if self.acquired > self.committed {
            return Err("acquires a stage before it committed the last one".into());
        }
        if !self.has_free() {
            return Ok(None);
        }
        self.acquired += 1;
        Ok(Some(self.acquired - 1))
    }

    /// The stage being filled.
    pub(crate) fn filling(&self) -> Result<u64, String> {
        if self.acquired > self.committed {
            Ok(self.committed)
        } else {
            Err("fills a stage that it did not acquire".into())
        }
    }

    /// Hands on the stage being filled.
    pub(crate) fn commit(&mut self) -> Result<u64, String> {
        let stage = self.filling().map_err(|_| "commits a stage that it did not acquire")?;
        self.committed += 1;
        Ok(stage)
    }

    fn reader(&mut self, unit: Unit) -> Result<&mut Reader, String> {
        self.readers.iter_mut().find(|r| r.unit == unit).ok_or_else(|| "does not wait for this channel".into())
    }

    /// Takes the next committed stage; none while there is none.
    pub(crate) fn wait(&mut self, unit: Unit) -> Result<Option<u64>, String> {
        let committed = self.committed;
        let reader = self.reader(unit)?;
        if reader.waited >= committed {
            return Ok(None);
        }
        reader.waited += 1;
        Ok(Some(reader.waited - 1))
    }

    /// The stage waited for last.
    pub(crate) fn taken(&mut self, unit: Unit) -> Result<u64, String> {
        let waited = self.reader(unit)?.waited;
        waited.checked_sub(1).ok_or_else(|| "takes from a stage before it waits for one".into())
    }

    /// Gives back the stage waited for `lag` waits before the last one, if there was one.
    pub(crate) fn release(&mut self, unit: Unit, lag: u32) -> Result<(), String> {
        let reader = self.reader(unit)?;
        let stage = reader.waited.checked_sub(1 + u64::from(lag));
        let stage = stage.ok_or_else(|| format!("releases with a lag of {lag} after {} waits", reader.waited))?;
        if stage != reader.released {
            let (stage, next) = (stage + 1, reader.released + 1);
            return Err(format!("releases stage {stage} where {next} is the next in order"));
        }
        reader.released += 1;
        Ok(())
    }

    /// Whether a reader still holds a stage that it waited for.
    pub(crate) fn holds(&mut self, unit: Unit, stage: u64) -> bool {
        self.reader(unit).is_ok_and(|r| r.released <= stage && stage < r.waited)
    }

    /// What does not come out even at the end. `name` gives the name of a unit.
    pub(crate) fn uneven(&self, name: &dyn Fn(Unit) -> String) -> Option<String> {
        let committed = self.committed;
        if self.acquired > committed {
            return Some(format!("stage {} is acquired and never committed", self.acquired));
        }
        self.readers.iter().find_map(|Reader { unit, waited, released }| match (*waited, *released) {
            (w, _) if w != committed => {
                Some(format!("{committed} stages are committed, but {} waits for {w}", name(*unit)))
            }
            (w, r) if r != w => Some(format!("{} waits for {w} stages and releases {r}", name(*unit))),
            _ => None,
        })
    }
}

/// Which units fill and which empty a channel, in order and each once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Users {
    pub(crate) producers: Vec<Unit>,
    pub(crate) consumers: Vec<Unit>,
}

/// The users of every channel, by [`ChannelId`]; channels that do not exist are left out.
pub(crate) fn users(kernel: &Scheduled) -> Vec<Users> {
    let mut users = vec![Users::default(); kernel.channels.len()];
    for (unit, block) in units(kernel).into_iter().enumerate() {
        let mut pending = vec![block];
        while let Some(block) = pending.pop() {
            for inst in &block.insts {
                pending.extend(inst.op.blocks());
                let produces = matches!(inst.op, Op::Acquire(_) | Op::Copy { .. } | Op::Fill { .. } | Op::Commit(_));
                let Some(of) = channel_of(&inst.op).and_then(|c| users.get_mut(c.0 as usize)) else { continue };
                let list = if produces { &mut of.producers } else { &mut of.consumers };
                if list.last() != Some(&unit) {
                    list.push(unit);
                }
            }
        }
    }
    users
}

/// The code of every unit.
pub(crate) fn units(kernel: &Scheduled) -> Vec<&super::Block> {
    [&kernel.common].into_iter().chain(kernel.roles.iter().map(|r| &r.body)).collect()
}

/// `common`, or a role's name.
pub(crate) fn unit_name(kernel: &Scheduled, unit: Unit) -> String {
    match unit.checked_sub(1).and_then(|i| kernel.roles.get(i)) {
        Some(role) => role.name.clone(),
        None => "common".into(),
    }
}

/// Rings of all channels at the start.
pub(crate) fn rings(kernel: &Scheduled) -> Vec<Ring> {
    let users = users(kernel);
    kernel.channels.iter().zip(users).map(|(c, users)| Ring::new(c.stages, &users.consumers)).collect()
}

/// The channel an instruction works on.
pub(crate) fn channel_of(op: &Op) -> Option<ChannelId> {
    match op {
        Op::Acquire(c) | Op::Commit(c) | Op::Wait(c) => Some(*c),
        Op::Copy { channel, .. } | Op::Fill { channel, .. } => Some(*channel),
        Op::Take { channel, .. } | Op::Release { channel, .. } => Some(*channel),
        _ => None,
    }
}
