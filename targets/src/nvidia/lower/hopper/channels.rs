//! Rings and their barriers as the bodies of the roles ask for them: who fills a channel's stages, who gives them back, and how.

use super::emit::Emit;
use super::ptx;
use super::ring::{Delivery, Ring, share_phases};
use super::team;
use crate::nvidia::arch::Arch;
use crate::nvidia::lower::isa;
use crate::nvidia::lower::mlir::i32;
use dsc_ir::sched::{Block, ChannelId, Op, Role, Scheduled};
use dsc_ir::tile;

/// The rings of all channels, whose barriers lie from that byte of shared memory on; and where these end.
pub fn rings(s: &Scheduled, mut barriers: u32) -> (Vec<Ring>, u32) {
    let mut rings = Vec::new();
    for channel in &s.channels {
        let number = ChannelId(rings.len() as u32);
        // Threads that read a slot themselves give it back themselves.
        let all_arrive = channel.slots.iter().any(|b| s.buffers[b.0 as usize].swizzle == 0);
        let mut ring = Ring::new(channel, barriers, delivery(s, number), all_arrive);
        ring.warps_arrive = s.roles.iter().any(|r| gives_back_apart(&r.body, number));
        ring.shared = s.roles.iter().any(|r| any(&r.body, &|op| is_shared(op, number)));
        rings.push(ring);
        barriers += 2 * 8 * channel.stages;
    }
    share_phases(s, &mut rings);
    (rings, barriers)
}

impl Emit<'_> {
    /// Makes the barriers of all rings, before anyone uses them.
    pub fn init_barriers(&mut self) {
        let cluster = self.cluster;
        let tid = self.t.tid;
        let one = self.t.f.cmp("eq", tid, i32(0));
        let (s, rings, meeting): (&Scheduled, Vec<Ring>, u32) = (self.s, self.rings.clone(), self.meeting);
        self.t.when(one, |t| {
            for (number, ring) in rings.iter().enumerate() {
                let consumers = s.roles.iter().filter(|r| waits(&r.body, ChannelId(number as u32)));
                let consumers: u32 =
                    consumers.map(|r| if ring.all_arrive { threads(r) } else { threads(r) / ring.arriving() }).sum();
                // A stage that others fill too is free when it is free in all of them.
                let consumers = if ring.shared { consumers * cluster } else { consumers } / ring.turns;
                for stage in 0..ring.stages {
                    let full = t.f.add(t.shared32, i32((ring.barriers + 8 * stage).into()));
                    ptx::barrier_init(&mut t.f, full, ring.delivery.arrivals());
                    let empty = t.f.add(t.shared32, i32((ring.barriers + 8 * (ring.stages + stage)).into()));
                    ptx::barrier_init(&mut t.f, empty, consumers);
                }
            }
            if s.apart() {
                team::init_meeting(t, meeting);
            }
            ptx::barrier_init_fence(&mut t.f);
        });
        match self.fewer {
            true => isa::named_barrier(&mut self.t.f, 0, s.threads),
            false => self.t.barrier(),
        }
        if self.cluster > 1 {
            ptx::cluster_barrier(&mut self.t.f);
        }
    }
}

/// Whether an operation like that is in a block.
pub fn any(block: &Block, is: &dyn Fn(&Op) -> bool) -> bool {
    block.insts.iter().any(|i| is(&i.op) || i.op.blocks().into_iter().any(|b| any(b, is)))
}

/// Whether a block waits for stages of a channel.
pub fn waits(block: &Block, number: ChannelId) -> bool {
    any(block, &|op| matches!(op, Op::Wait(c) if *c == number))
}

/// Whether a block gives back stages of a channel though nothing has brought the warps together since it waited for them: a product of its
/// own that reads what it took (those in loops may have no round), or a barrier.
fn gives_back_apart(block: &Block, number: ChannelId) -> bool {
    let (mut waited, mut together, mut taken) = (false, true, Vec::new());
    for inst in &block.insts {
        match &inst.op {
            Op::Wait(c) if *c == number => (waited, together) = (true, false),
            Op::Take { channel, .. } if *channel == number => taken.extend(inst.results.iter().copied()),
            Op::Barrier => together = true,
            Op::Tile(tile::Op::Dot { a, b, .. }) if taken.contains(a) || taken.contains(b) => together = true,
            Op::Release { channel, .. } if *channel == number && waited && !together => return true,
            _ => {}
        }
    }
    block.insts.iter().any(|i| i.op.blocks().into_iter().any(|b| gives_back_apart(b, number)))
}

/// How stages of a channel become full.
fn delivery(s: &Scheduled, number: ChannelId) -> Delivery {
    for role in &s.roles {
        if any(&role.body, &|op| matches!(op, Op::Fill { channel, .. } if *channel == number)) {
            return Delivery::Written(threads(role));
        }
        if any(&role.body, &|op| matches!(op, Op::Copy { channel, rows: Some(_), .. } if *channel == number)) {
            let engine =
                any(&role.body, &|op| matches!(op, Op::Copy { channel, rows: None, .. } if *channel == number));
            return if engine { Delivery::Both(threads(role)) } else { Delivery::Gathered(threads(role)) };
        }
    }
    Delivery::Engine
}

/// Whether an operation brings to all blocks of a cluster what goes through a channel.
fn is_shared(op: &Op, number: ChannelId) -> bool {
    matches!(op, Op::Copy { channel, shared: true, .. } | Op::Fill { channel, shared: true, .. } if *channel == number)
}

/// Threads of a role.
fn threads(role: &Role) -> u32 {
    (role.warps[1] - role.warps[0]) * Arch::WARP
}
