//! Where buffers lie: what lives at once does not overlap.

use super::barriers::Reads;
use dsc_ir::sched::{Block, Buffer, BufferId, Op};
use std::collections::{BTreeMap, BTreeSet};

/// Gives every buffer an offset: buffers that live at once do not overlap, and those of at most `own` bytes never do, so that nobody waits for others
/// who still read what was there.
pub fn allocate(buffers: &mut [Buffer], block: &Block, reads: &Reads, own: u32) {
    let mut lives: BTreeMap<BufferId, [u32; 2]> = BTreeMap::new();
    let mut at = 0;
    lifetimes(block, reads, &mut at, &mut lives, &mut Vec::new());
    for (id, life) in &mut lives {
        if buffers[id.0 as usize].bytes() <= own {
            *life = [0, u32::MAX];
        }
    }
    let mut order: Vec<BufferId> = lives.keys().copied().collect();
    order.sort_by_key(|b| (std::cmp::Reverse(buffers[b.0 as usize].bytes()), *b));
    let mut placed: Vec<(BufferId, [u32; 2])> = Vec::new();
    for id in order {
        let (life, bytes) = (lives[&id], buffers[id.0 as usize].bytes());
        let mut busy: Vec<[u32; 2]> = placed
            .iter()
            .filter(|(other, _)| {
                let o = lives[other];
                o[0] <= life[1] && life[0] <= o[1]
            })
            .map(|&(_, span)| span)
            .collect();
        busy.sort_unstable();
        let mut offset = 0u32;
        for span in busy {
            if offset + bytes <= span[0] {
                break;
            }
            offset = offset.max(span[1].next_multiple_of(128));
        }
        buffers[id.0 as usize].offset = offset;
        placed.push((id, [offset, offset + bytes]));
    }
}

/// First and last position of every buffer's use. A use inside a loop of what exists outside lasts to the loop's end.
fn lifetimes(
    block: &Block,
    reads: &Reads,
    at: &mut u32,
    lives: &mut BTreeMap<BufferId, [u32; 2]>,
    loops: &mut Vec<(u32, BTreeSet<BufferId>)>,
) {
    for inst in &block.insts {
        *at += 1;
        let (r, w) = reads.touched(inst);
        for b in r.iter().chain(&w) {
            let here = *at;
            let life = lives.entry(*b).or_insert([here, here]);
            life[1] = life[1].max(here);
            for (start, used) in loops.iter_mut() {
                if life[0] < *start {
                    used.insert(*b);
                }
            }
        }
        match &inst.op {
            Op::For { body, .. } => {
                loops.push((*at, BTreeSet::new()));
                lifetimes(body, reads, at, lives, loops);
                *at += 1;
                let (_, used) = loops.pop().expect("just pushed");
                for b in used {
                    lives.entry(b).and_modify(|l| l[1] = l[1].max(*at));
                }
            }
            Op::If { then, otherwise, .. } => {
                lifetimes(then, reads, at, lives, loops);
                lifetimes(otherwise, reads, at, lives, loops);
                *at += 1;
            }
            _ => {}
        }
    }
    *at += 1;
    let mut yielded = BTreeSet::new();
    for &v in &block.yields {
        reads.of(v, &mut yielded);
    }
    for b in yielded {
        let here = *at;
        let life = lives.entry(b).or_insert([here, here]);
        life[1] = life[1].max(here);
        for (start, used) in loops.iter_mut() {
            if life[0] < *start {
                used.insert(b);
            }
        }
    }
}
