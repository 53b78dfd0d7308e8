//! Places and tables: buffers, channels and roles that make sense by themselves, and a place for every value that its operation and type allow.
//!
//! | place | values |
//! |---|---|
//! | `@view` | parameters |
//! | `@uniform` | one element; every loop counter |
//! | `@lazy` | results of elementwise operations, loads and changes of shape |
//! | `@shared` | tiles of the buffer's type that fit its rows and columns; top-k states; not of a channel's buffer |
//! | `@slot` | what `take` gives, and nothing else |
//! | `@frag` | tiles of more than one element, by as many warps (`wgmma`: groups of four) as the unit has; with sums, top-k states |
//!
//! A loop's results lie where its carried values do, so that they need not move. A single thread (`elected`) has no fragments, meets no
//! barrier and writes no shared memory but through copies. What `common` of a persistent kernel computes is the same for all tiles.

use super::{Report, location, matrix};
use crate::sched::ring::{Unit, channel_of, unit_name, units};
use crate::sched::visit::{Definitions, operands};
use crate::sched::{Atom, Block, Buffer, BufferId, ChannelId, Cluster, Fragment, Inst, Op, Place, Scheduled};
use crate::tile::verify::is_identifier;
use crate::tile::{self, Type, ValueId};
use std::collections::HashSet;

pub(super) fn check(kernel: &Scheduled, report: &mut Report) {
    let before = report.diagnostics.len();
    tables(kernel, report);
    roles(kernel, report);
    if report.diagnostics.len() > before {
        return;
    }
    if kernel.persistent.is_some() && kernel.roles.is_empty() {
        report.add("", "a persistent kernel has roles, which run once a tile");
    }
    if kernel.persistent == Some(0) {
        report.add("", "a band of tiles has at least one");
    }
    if kernel.folded && kernel.persistent.is_none() {
        report.add("", "turns that go back and forth are those of a persistent kernel");
    }
    if kernel.dies == 0 {
        report.add("", "blocks are dealt to at least one die");
    }
    if kernel.alternate && !kernel.threads.is_multiple_of(64) {
        report.add("", format!("{} threads have no two halves of whole warps that take turns", kernel.threads));
    }
    parts(kernel, report);
    super::turns::check(kernel, report);
    cluster(kernel, report);
    super::team::check(kernel, report);
    for p in &kernel.params {
        if kernel.places[p.value.0 as usize] != Place::View {
            report.add(&format!(", %{}", p.name), "a parameter's place is @view");
        }
    }
    let mut places = Places { kernel, report, unit: 0 };
    for (unit, block) in units(kernel).into_iter().enumerate() {
        places.unit = unit;
        places.block(block);
    }
}

fn values_of(indices: [tile::Index; 2]) -> Vec<ValueId> {
    let value = |i| if let tile::Index::Value(v) = i { Some(v) } else { None };
    indices.into_iter().filter_map(value).collect()
}

/// Where blocks divide the rounds of tiles, all roles do so, of the same rounds.
fn parts(kernel: &Scheduled, report: &mut Report) {
    let is_part = |i: &&Inst| matches!(i.op, Op::Part { .. });
    let mut all = 0;
    for (unit, block) in units(kernel).into_iter().enumerate() {
        let own: Vec<&Inst> = block.insts.iter().filter(is_part).collect();
        let mut pending: Vec<&Block> = block.insts.iter().flat_map(|i| i.op.blocks()).collect();
        while let Some(inner) = pending.pop() {
            all += inner.insts.iter().filter(is_part).count();
            pending.extend(inner.insts.iter().flat_map(|i| i.op.blocks()));
        }
        let pair = match own.as_slice() {
            [a, b] => match (&a.op, &b.op) {
                (Op::Part { lo, hi, end }, Op::Part { lo: l, hi: h, end: e }) => (lo, hi) == (l, h) && end != e,
                _ => false,
            },
            other => other.is_empty() && !kernel.parts(),
        };
        if unit > 0 && !pair || unit == 0 && !own.is_empty() {
            report.add(
                &format!(", {}", unit_name(kernel, unit)),
                "all roles have both ends of their part of a tile, once",
            );
        }
    }
    let plain = kernel.persistent.is_some() && !kernel.folded && kernel.cluster.is_none() && kernel.team == 1;
    if all > 0 || kernel.parts() && !plain {
        report.add(
            "",
            "parts of tiles are those of blocks that are persistent and each by themselves, in the bodies of roles",
        );
    }
}

/// Blocks of a cluster share what is the same for all of them, as often.
fn cluster(kernel: &Scheduled, report: &mut Report) {
    let axis = kernel.cluster.map(|c| c.axis);
    if let Some(Cluster { axis, blocks }) = kernel.cluster
        && (kernel.persistent.is_none() || axis > 1 || axis as usize >= kernel.grid.len() || !(2..=8).contains(&blocks))
    {
        report.add("", "a cluster has two to eight blocks along axis 0 or 1 of the grid of a persistent kernel");
    }
    let definitions = Definitions::new(kernel);
    let differs = |vs: &[ValueId]| {
        let (mut seen, mut pending) = (HashSet::new(), vs.to_vec());
        while let Some(v) = pending.pop() {
            match definitions.inst(v).map(|i| &i.op) {
                Some(Op::Tile(tile::Op::BlockId { axis: a })) if Some(*a) == axis => return true,
                Some(op) if seen.insert(v) => pending.extend(operands(op)),
                _ => {}
            }
        }
        false
    };
    for (unit, block) in units(kernel).into_iter().enumerate() {
        let mut pending = vec![block];
        while let Some(block) = pending.pop() {
            for inst in &block.insts {
                pending.extend(inst.op.blocks());
                let problem = match &inst.op {
                    Op::Copy { shared: true, .. } if axis.is_none() => "a copy is shared by the blocks of a cluster",
                    Op::Copy { shared: true, rows: Some(_), .. } => "rows chosen by number are not shared",
                    op @ Op::Copy { shared: true, .. } if differs(&operands(op)) => {
                        "a copy that a cluster shares is the same for all its blocks"
                    }
                    Op::Fill { shared: true, .. } if axis.is_none() => "a tile is shared by the blocks of a cluster",
                    Op::Fill { shared: true, value, .. } if differs(&[*value]) => {
                        "a tile that a cluster shares is the same for all its blocks"
                    }
                    Op::Fill { shared: true, value, .. } if !divides(kernel, *value) => {
                        "a tile that a cluster shares has rows for each of its blocks"
                    }
                    Op::For { lo, hi, .. } if axis.is_some() && differs(&values_of([*lo, *hi])) => {
                        "the blocks of a cluster run a loop equally often"
                    }
                    _ => continue,
                };
                report.add(&location(kernel, unit, inst), problem);
            }
        }
    }
}

/// Whether the blocks of the cluster can have an equal number of the rows of a tile.
fn divides(kernel: &Scheduled, v: ValueId) -> bool {
    let blocks = kernel.cluster.map_or(1, |c| c.blocks).max(1);
    match &kernel.types[v.0 as usize] {
        Type::Tile(t) => t.shape.len() == 2 && t.shape[0].is_multiple_of(blocks),
        _ => false,
    }
}

fn tables(kernel: &Scheduled, report: &mut Report) {
    let named = |name: &str| is_identifier(name);
    for (i, buffer) in kernel.buffers.iter().enumerate() {
        let place = format!(", buffer b{i}");
        if !named(&buffer.name) {
            report.add(&place, format!("`{}` is no identifier", buffer.name));
        }
        if let Some(problem) = buffer_problem(buffer) {
            report.add(&place, problem);
        }
    }
    let mut owners: Vec<Option<usize>> = vec![None; kernel.buffers.len()];
    for (i, channel) in kernel.channels.iter().enumerate() {
        let place = format!(", channel c{i}");
        if !named(&channel.name) {
            report.add(&place, format!("`{}` is no identifier", channel.name));
        }
        if channel.stages == 0 || channel.slots.is_empty() {
            report.add(&place, "a channel has at least one stage and one slot");
        }
        if channel.turns == 0 || !channel.stages.is_multiple_of(channel.turns) {
            report.add(&place, format!("{} stages are no multiple of {} turns", channel.stages, channel.turns));
        }
        for slot in &channel.slots {
            let Some(buffer) = kernel.buffers.get(slot.0 as usize) else {
                report.add(&place, format!("there is no buffer {slot}"));
                continue;
            };
            if buffer.copies != channel.stages {
                report.add(&place, format!("{slot} has {} copies for {} stages", buffer.copies, channel.stages));
            }
            // Whether two channels may have it in common is seen where they run.
            if owners[slot.0 as usize].replace(i) == Some(i) {
                report.add(&place, format!("{slot} is a slot twice"));
            }
        }
    }
    for (i, buffer) in kernel.buffers.iter().enumerate() {
        if owners[i].is_none() && buffer.copies != 1 {
            report.add(&format!(", buffer b{i}"), "only a slot of a channel has more than one copy");
        }
    }
}

fn buffer_problem(b: &Buffer) -> Option<String> {
    let [rows, columns] = b.shape.map(u64::from);
    let element = b.dtype.bytes() as u64;
    let bytes = rows.saturating_mul(b.pitch.into()).saturating_mul(b.panels().into()).saturating_mul(b.copies.into());
    if rows == 0 || columns == 0 || b.copies == 0 {
        return Some("a buffer has rows, columns and copies".into());
    }
    // A row of several panels takes each of them whole.
    let panels =
        b.swizzle > 0 && b.pitch == b.swizzle && columns.saturating_mul(element).is_multiple_of(b.pitch.into());
    if u64::from(b.pitch) < columns.saturating_mul(element) && !panels {
        return Some(format!("{columns} columns of {} need more than a pitch of {} bytes", b.dtype, b.pitch));
    }
    if !matches!(b.swizzle, 0 | 32 | 64 | 128) || (b.swizzle > 0 && !b.pitch.is_multiple_of(b.swizzle)) {
        return Some(format!(
            "a swizzle is 0, 32, 64 or 128 bytes and divides the pitch, {}; not {}",
            b.pitch, b.swizzle
        ));
    }
    if !u64::from(b.offset).is_multiple_of(element) || !u64::from(b.pitch).is_multiple_of(element) {
        return Some(format!("offset {} or pitch {} is not a multiple of an element", b.offset, b.pitch));
    }
    (u64::from(b.offset) + bytes > u32::MAX.into()).then(|| "the buffer ends beyond 4 GiB".into())
}

fn roles(kernel: &Scheduled, report: &mut Report) {
    let warps = kernel.threads / 32;
    if kernel.threads == 0 || !kernel.threads.is_multiple_of(32) {
        report.add("", format!("{} threads are no number of warps of 32", kernel.threads));
    }
    for (i, role) in kernel.roles.iter().enumerate() {
        let place = format!(", role {}", role.name);
        let [first, end] = role.warps;
        if !is_identifier(&role.name) || kernel.roles[..i].iter().any(|r| r.name == role.name) {
            report.add(&place, "roles have different names, each an identifier");
        }
        if first >= end || end > warps {
            report.add(&place, format!("warps {first}..{end} are not within the block's {warps}"));
        }
        if let Some(other) = kernel.roles[..i].iter().find(|r| r.warps[0] < end && first < r.warps[1]) {
            let [from, to] = other.warps;
            report.add(&place, format!("warps {first}..{end} are also of role {}, {from}..{to}", other.name));
        }
        if role.registers.is_some() && !(first.is_multiple_of(4) && end.is_multiple_of(4)) {
            report.add(&place, "registers move between groups of four warps, so the role's warps are such groups");
        }
        if role.registers.is_some_and(|r| !r.is_multiple_of(8) || r == 0) {
            report.add(&place, "registers of a thread come in multiples of 8");
        }
    }
}

struct Places<'a, 'r, 'k> {
    kernel: &'a Scheduled,
    report: &'r mut Report<'k>,
    unit: Unit,
}

impl Places<'_, '_, '_> {
    fn place(&self, v: ValueId) -> &Place {
        &self.kernel.places[v.0 as usize]
    }

    fn elected(&self) -> bool {
        self.unit > 0 && self.kernel.roles[self.unit - 1].elected
    }

    fn block(&mut self, block: &Block) {
        for inst in &block.insts {
            for problem in self.inst(inst) {
                self.report.add(&location(self.kernel, self.unit, inst), problem);
            }
            inst.op.blocks().into_iter().for_each(|b| self.block(b));
        }
    }

    fn inst(&self, inst: &Inst) -> Vec<String> {
        let mut problems = Vec::new();
        let carried = match &inst.op {
            Op::For { body, .. } => {
                if body.args.first().is_some_and(|&v| *self.place(v) != Place::Uniform) {
                    problems.push("a loop's counter is @uniform".into());
                }
                for (&result, &arg) in inst.results.iter().zip(&body.args[1..]) {
                    let (here, there) = (self.place(result), self.place(arg));
                    if here != there {
                        problems.push(format!("%{} is {here}, but carried as %{}, {there}", result.0, arg.0));
                    }
                }
                &body.args[1..]
            }
            _ => &[],
        };
        problems.extend(carried.iter().chain(&inst.results).filter_map(|&v| self.value(v, inst)));
        problems.extend(self.channel(&inst.op));
        if let Some(b) = inst.scratch {
            problems.extend(self.owned(b));
        }
        if let Op::Put { buffer, .. } | Op::Get { buffer, .. } = inst.op
            && !self.kernel.buffers.get(buffer.0 as usize).is_some_and(|b| b.outside)
        {
            problems.extend(self.owned(buffer));
        }
        if matches!(&inst.op, Op::If { cond, .. } if matches!(self.place(*cond), Place::Fragment(_) | Place::Slot(..)))
        {
            problems.push("a branch's condition is the same in every thread".into());
        }
        let tile = matches!(inst.op, Op::Tile(tile::Op::BlockId { .. }));
        if tile && self.unit == 0 && self.kernel.persistent.is_some() {
            problems
                .push("common runs once for all tiles of a persistent block, so that it does not know which".into());
        }
        if self.elected() && (inst.op == Op::Barrier || inst.scratch.is_some()) {
            problems.push("a single thread meets no barrier and has no scratch memory".into());
        }
        problems
    }

    /// What is wrong with the place of a value that `inst` defines.
    fn value(&self, v: ValueId, inst: &Inst) -> Option<String> {
        let (ty, place) = (&self.kernel.types[v.0 as usize], self.place(v));
        let (name, one) = (format!("%{}, {ty},", v.0), matches!(ty, Type::Tile(t) if t.elements() == 1));
        if self.elected() && matches!(place, Place::Held | Place::Shared(_) | Place::Fragment(_)) {
            return Some(format!("{name} is {place}, but a single thread has values of its own only"));
        }
        match place {
            Place::View => Some(format!("{name} is no parameter, so it is not @view")),
            Place::Uniform if !one => Some(format!("{name} is no single element, so it is not @uniform")),
            Place::Lazy if !may_be_lazy(&inst.op) || !matches!(ty, Type::Tile(_)) => {
                Some(format!("{name} is @lazy, but only elementwise operations, loads and changes of shape are"))
            }
            Place::Held if !may_be_held(&inst.op) || !matches!(ty, Type::Tile(_)) => {
                Some(format!("{name} is @held, but only what loads, gathers and loops give is"))
            }
            Place::Shared(b) => self.owned(*b).or_else(|| self.fits(ty, *b).map(|problem| format!("{name} {problem}"))),
            Place::Slot(c, slot) => match inst.op {
                Op::Take { channel, slot: taken } if channel == *c && taken == *slot => {
                    if c.0 as usize >= self.kernel.channels.len() { None } else { self.slot(*c, *slot, ty) }
                }
                _ => Some(format!("{name} is {place}, which only a take from it gives")),
            },
            Place::Fragment(f) => self.fragment(ty, *f).map(|problem| format!("{name} {problem}")),
            Place::Uniform if matches!(inst.op, Op::Number | Op::Part { .. }) => None,
            _ if matches!(inst.op, Op::Number | Op::Part { .. }) => {
                Some(format!("{name} is {place}, but a block's number and its part are @uniform"))
            }
            _ if matches!(inst.op, Op::Get { .. }) => {
                Some(format!("{name} is {place}, but what another block has put comes to fragments"))
            }
            _ if matches!(inst.op, Op::Take { .. }) => {
                Some(format!("{name} is {place}, but what is taken lies in its slot"))
            }
            _ => None,
        }
    }

    /// A buffer that no channel has.
    fn owned(&self, b: BufferId) -> Option<String> {
        if b.0 as usize >= self.kernel.buffers.len() {
            return Some(format!("there is no buffer {b}"));
        }
        if self.kernel.buffers[b.0 as usize].outside {
            return Some(format!("{b} is outside of the block, for what others get"));
        }
        let channel = self.kernel.channels_of(b).next()?;
        Some(format!("{b} is a slot of channel {channel}"))
    }

    fn fits(&self, ty: &Type, b: BufferId) -> Option<String> {
        let buffer = &self.kernel.buffers[b.0 as usize];
        let Type::Tile(t) = ty else { return None };
        let ([rows, columns], shape) = (matrix(ty), buffer.shape);
        if t.dtype == buffer.dtype && rows <= shape[0].into() && columns <= shape[1].into() {
            return None;
        }
        Some(format!("does not fit {b}, {} {}x{}", buffer.dtype, shape[0], shape[1]))
    }

    fn fragment(&self, ty: &Type, f: Fragment) -> Option<String> {
        let [first, end] = match self.unit.checked_sub(1) {
            Some(role) => self.kernel.roles[role].warps,
            None => [0, self.kernel.threads / 32],
        };
        // Of parts that take turns each has all of it.
        let parts = self.unit.checked_sub(1).map_or(1, |role| self.kernel.turns(&self.kernel.roles[role]));
        let mut owners = (end - first) / parts;
        let grouped = matches!(f.atom, Atom::Wgmma | Atom::WgmmaTransposed | Atom::WgmmaSums);
        if grouped {
            if !first.is_multiple_of(4) || !owners.is_multiple_of(4) {
                return Some(format!("is by groups of four warps, but warps {first}..{end} are not such groups"));
            }
            owners /= 4;
        }
        if matches!(f.atom, Atom::Mfma16x16 | Atom::Mfma16x64 | Atom::Mfma16x128) {
            // Their waves are two warps each.
            if !owners.is_multiple_of(2) {
                return Some(format!("is by pairs of warps, but there are {owners}"));
            }
            owners /= 2;
        }
        let stated = u64::from(f.warps[0]) * u64::from(f.warps[1]);
        if stated != u64::from(owners) {
            let what = if grouped { "groups of warps" } else { "warps" };
            return Some(format!("is spread over {stated} {what}, but there are {owners}"));
        }
        match ty {
            Type::Tile(_) => None,
            Type::Topk { .. } if f.atom == Atom::WgmmaSums => None,
            _ => Some("is no tile, so it is no fragment".into()),
        }
    }

    fn channel(&self, op: &Op) -> Option<String> {
        let c = channel_of(op)?;
        let Some(channel) = self.kernel.channels.get(c.0 as usize) else {
            return Some(format!("there is no channel {c}"));
        };
        match op {
            Op::Copy { slot, view, shape, .. } => {
                let Type::View(view) = &self.kernel.types[view.0 as usize] else { return None };
                let tile = tile::TileType { dtype: view.dtype, shape: shape.clone() };
                self.slot(c, *slot, &Type::Tile(tile))
            }
            Op::Fill { slot, value, .. } => self.slot(c, *slot, &self.kernel.types[value.0 as usize]),
            Op::Release { lag, .. } if *lag >= channel.stages => {
                Some(format!("a lag of {lag} keeps all {} stages: the producer never gets one", channel.stages))
            }
            _ => None,
        }
    }

    fn slot(&self, c: ChannelId, slot: u32, ty: &Type) -> Option<String> {
        match self.kernel.channels[c.0 as usize].slots.get(slot as usize) {
            None => Some(format!("channel {c} has no slot {slot}")),
            Some(&b) => self.fits(ty, b).map(|problem| format!("{ty} {problem}")),
        }
    }
}

/// Whether an operation can have its result under way in registers.
fn may_be_held(op: &Op) -> bool {
    matches!(op, Op::Tile(tile::Op::Load { .. } | tile::Op::Gather { .. }) | Op::For { .. })
}

/// Whether an operation can be evaluated one element at a time where it is used.
fn may_be_lazy(op: &Op) -> bool {
    matches!(
        op,
        Op::Tile(
            tile::Op::BlockId { .. }
                | tile::Op::Sym(_)
                | tile::Op::Full { .. }
                | tile::Op::Iota { .. }
                | tile::Op::Load { .. }
                | tile::Op::Gather { .. }
                | tile::Op::Map { .. }
                | tile::Op::Reshape { .. }
                | tile::Op::Permute { .. }
                | tile::Op::Slice { .. }
                | tile::Op::Concat { .. }
        )
    )
}
