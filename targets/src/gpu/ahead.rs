//! Loads some rounds ahead. What a loop of products brings from global to shared memory by registers is loaded a round before it is put down, so
//! that the round's products run while the next one's bytes are on their way:
//!
//! ```text
//! for j ..:                                     load a, b of round 0
//!   a = load ..            (to shared memory)   for j ..: (carrying a, b)
//!   b = gather [rows c]                           put a down; load a of round j + 1
//!   products                           ──▶        put b down
//!                                                 c of round j + 1; load b of round j + 1
//!                                                 products
//! ```
//!
//! Where rows are chosen by what is loaded itself, that is put down a round before, and loaded another one: a selection of keys by positions,
//! whose pages are in a table, is three loads deep. A thread's wait for a load so never is for the last one that it issued.
//!
//! Rounds beyond the last are loaded for nothing; bounds hold for them as for all. It costs the registers that the tiles take, of which
//! [`Isa::ahead_bytes`](super::isa::Isa::ahead_bytes) says how many there may be.

use super::reduce;
use super::ring::made_in;
use super::schedule::{SMALL, Scheduler};
use dsc_ir::sched::{Atom, Block, Inst, Op, Place};
use dsc_ir::tile::{self, Index, MapArg, MapFn, ValueId};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

/// A tile that a loop puts down in shared memory from loads that can be made ahead.
struct Fill {
    result: ValueId,
    op: tile::Op,
    /// Rounds that it is put down ahead: 0, unless it says where further loads come from.
    lead: u32,
    /// Whether it reads what its round makes: then it stays where it is, and the next round's loads are issued behind it.
    stays: bool,
    /// What is loaded for it, in order of issue.
    leaves: Vec<Leaf>,
}

/// A load or gather for a fill.
struct Leaf {
    load: ValueId,
    /// Rounds that it is issued ahead.
    lead: u32,
    /// What a round finds of it, of the round that the fill is for first; made when the loop is rewritten.
    carried: Vec<ValueId>,
}

/// What loads ahead may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Bytes of a thread's registers.
    pub bytes: u32,
    /// Whether tiles are put down where their round has them, so that they take no more shared memory, and not at its beginning.
    pub in_place: bool,
}

/// A round from which an instruction is, as the code of another one sees it.
struct Round {
    /// Names there of what the body makes, the counter among them.
    renamed: HashMap<ValueId, ValueId>,
    /// Whether it is the round whose code it is in.
    same: bool,
}

/// What is issued in a round for further ones, by fill and leaf.
type Issued = BTreeMap<(usize, usize), ValueId>;

/// What rewriting a loop goes by.
struct Rewriting {
    /// Values that the body makes.
    made: HashSet<ValueId>,
    /// The loop's counter.
    counter: ValueId,
}

impl Scheduler<'_> {
    /// Makes loops of products load ahead. Whether any does.
    pub(super) fn load_ahead(&mut self, block: &mut Block, room: Room) -> bool {
        let mut any = false;
        let mut out = Vec::with_capacity(block.insts.len());
        for mut inst in std::mem::take(&mut block.insts) {
            match &mut inst.op {
                Op::For { body, .. } if self.multiplies(body) => {
                    if room.bytes > 0 {
                        self.separate(body);
                    }
                    let mut fills = self.fills(body, room);
                    if !fills.is_empty() && self.put_down_factors(body) {
                        fills = self.fills(body, room);
                    }
                    if !fills.is_empty() {
                        self.hold(inst, fills, &mut out);
                        any = true;
                        continue;
                    }
                }
                Op::For { body, .. } => any |= self.load_ahead(body, room),
                Op::If { then, otherwise, .. } => {
                    any |= self.load_ahead(then, room);
                    any |= self.load_ahead(otherwise, room);
                }
                _ => {}
            }
            out.push(inst);
        }
        block.insts = out;
        any
    }

    /// Whether a body multiplies by matrix instructions, and waits for no ring.
    fn multiplies(&self, body: &Block) -> bool {
        let product = |inst: &Inst| match (&inst.op, inst.results.first()) {
            (Op::Tile(tile::Op::Dot { .. }), Some(&r)) => {
                matches!(self.place(r), Place::Fragment(f) if f.atom != Atom::Fma)
            }
            _ => false,
        };
        body.insts.iter().any(product) && !body.insts.iter().any(|i| matches!(i.op, Op::Wait(_)))
    }

    /// What says which rows are gathered, and is read for something else too, is evaluated there once more.
    fn separate(&mut self, body: &mut Block) {
        let how = Rewriting { made: made_in(body), counter: body.args[0] };
        let shared = |s: &Self, i: &Inst| matches!((&i.op, &i.results[..]), (Op::Tile(tile::Op::Map { .. }), [r]) if matches!(s.place(*r), Place::Shared(_)));
        let mut rows_of = BTreeSet::new();
        for inst in &body.insts {
            if let Op::Tile(tile::Op::Gather { rows, .. }) = &inst.op {
                self.sources(*rows, &[], &mut rows_of);
            }
        }
        let says = |s: &Self, v: &ValueId| {
            let loads = s.defs.get(v).is_some_and(|op| !s.loads_of(*v, op).is_empty());
            rows_of.contains(v) && loads && body.insts.iter().any(|i| i.results.contains(v) && shared(s, i))
        };
        let rows: BTreeSet<ValueId> = rows_of.iter().copied().filter(|v| says(self, v)).collect();
        let mut out = Vec::with_capacity(body.insts.len());
        for mut inst in std::mem::take(&mut body.insts) {
            if let Op::Tile(op) = &inst.op
                && shared(self, &inst)
                && !rows.contains(&inst.results[0])
            {
                let (op, mut read) = (op.clone(), BTreeSet::new());
                tile::operands(&op).into_iter().for_each(|v| self.directly(v, &mut read));
                let mut round = Round { renamed: HashMap::new(), same: true };
                for v in read.intersection(&rows) {
                    let again = self.fresh(self.types[v.0 as usize].clone(), Place::Lazy);
                    self.emit(again, self.defs[v].clone(), &mut out);
                    round.renamed.insert(*v, again);
                }
                if !round.renamed.is_empty() {
                    let op = self.op_in(&op, &how, (&mut round, &HashMap::new()), &mut out);
                    self.defs.insert(inst.results[0], op.clone());
                    inst.op = Op::Tile(op);
                }
            }
            out.push(inst);
        }
        body.insts = out;
    }

    /// What is loaded for a store only gets a place in shared memory, where it is little: then it can be loaded ahead as well. Whether anything does.
    fn put_down_factors(&mut self, body: &Block) -> bool {
        let mut read = BTreeSet::new();
        for inst in &body.insts {
            if let Op::Tile(tile::Op::Store { value, .. }) = &inst.op {
                self.find_lazy_loads(*value, &mut read);
            }
        }
        let little = |s: &Self, v: ValueId| match &s.types[v.0 as usize] {
            tile::Type::Tile(t) => t.elements() * t.dtype.bytes() <= SMALL as usize,
            _ => false,
        };
        let here = made_in(body);
        read.retain(|v| here.contains(v) && little(self, *v));
        for &v in &read {
            let place = self.shared(v);
            self.set(v, place);
        }
        !read.is_empty()
    }

    /// Loads that evaluating a value makes.
    fn find_lazy_loads(&self, v: ValueId, into: &mut BTreeSet<ValueId>) {
        if self.place(v) != &Place::Lazy {
            return;
        }
        match self.defs.get(&v) {
            Some(tile::Op::Load { .. }) => {
                into.insert(v);
            }
            Some(tile::Op::Gather { .. }) | None => {}
            Some(op) => tile::operands(op).into_iter().for_each(|x| self.find_lazy_loads(x, into)),
        }
    }

    /// What evaluating a value reads, which rows are gathered aside.
    fn directly(&self, v: ValueId, into: &mut BTreeSet<ValueId>) {
        match self.defs.get(&v) {
            Some(tile::Op::Gather { .. }) if self.place(v) == &Place::Lazy => {}
            Some(op) if self.place(v) == &Place::Lazy => {
                tile::operands(op).into_iter().for_each(|x| self.directly(x, into));
            }
            _ => {
                into.insert(v);
            }
        }
    }

    /// What a body can bring ahead, in its order.
    fn fills(&self, body: &Block, room: Room) -> Vec<Fill> {
        let how = Rewriting { made: made_in(body), counter: body.args[0] };
        let mut found: BTreeMap<usize, Fill> = BTreeMap::new();
        for (at, inst) in body.insts.iter().enumerate() {
            let (Op::Tile(op), [r]) = (&inst.op, &inst.results[..]) else { continue };
            let elementwise = matches!(op, tile::Op::Load { .. } | tile::Op::Gather { .. } | tile::Op::Map { .. });
            let takes = elementwise || self.sums_columns(op);
            if !takes || !matches!(self.place(*r), Place::Shared(_)) {
                continue;
            }
            let loads = self.loads_of(*r, op);
            if !loads.is_empty() {
                let leaves = loads.into_iter().map(|load| Leaf { load, lead: 1, carried: Vec::new() }).collect();
                found.insert(at, Fill { result: *r, op: op.clone(), lead: 0, stays: false, leaves });
            }
        }
        // What says where others come from is as good as they are, and the other way round.
        loop {
            let early = self.read_as_rows(body, &found);
            let bad = found.iter().find(|(_, f)| !self.can_be_early(f, &how, &early)).map(|(&at, _)| at);
            match bad {
                Some(at) => found.remove(&at),
                None => break,
            };
        }
        for f in found.values_mut() {
            f.stays = room.in_place || !self.is_known_whole(f, &how);
        }
        let mut fills: Vec<Fill> = found.into_values().collect();
        self.set_leads(&mut fills);
        for f in &mut fills {
            f.stays &= f.lead == 0;
        }
        let bytes: u32 = fills.iter().map(|f| self.bytes_of(f)).sum();
        if bytes > room.bytes { Vec::new() } else { fills }
    }

    /// Whether an op combines few lines of a tile, each thread its own columns.
    fn sums_columns(&self, op: &tile::Op) -> bool {
        let tile::Op::Reduce { x, axis, .. } = op else { return false };
        let tile::Type::Tile(t) = &self.types[x.0 as usize] else { return false };
        let axis = *axis as usize;
        t.shape[axis] <= reduce::LOADED && t.shape[axis + 1..].iter().any(|&n| n > 1)
    }

    /// Loads and gathers that evaluating a tile reads, further ones that say where these come from first.
    fn loads_of(&self, r: ValueId, op: &tile::Op) -> Vec<ValueId> {
        let mut found = Vec::new();
        if matches!(op, tile::Op::Load { .. } | tile::Op::Gather { .. }) {
            found.push(r);
        } else {
            for v in tile::operands(op) {
                self.find_loads(v, &mut found);
            }
        }
        // Deeper ones first.
        let depth = |v: &ValueId| self.depth(*v, &found);
        let mut order: Vec<(u32, ValueId)> = found.iter().map(|v| (depth(v), *v)).collect();
        order.sort_by_key(|o| std::cmp::Reverse(o.0));
        order.into_iter().map(|o| o.1).collect()
    }

    fn find_loads(&self, v: ValueId, found: &mut Vec<ValueId>) {
        if self.place(v) != &Place::Lazy {
            return;
        }
        let Some(op) = self.defs.get(&v) else { return };
        if let tile::Op::Load { .. } | tile::Op::Gather { .. } = op
            && !found.contains(&v)
        {
            found.push(v);
        }
        if !matches!(op, tile::Op::Gather { .. }) {
            tile::operands(op).into_iter().for_each(|x| self.find_loads(x, found));
        }
    }

    /// How many of `all`, at most, wait for one another behind a load.
    fn depth(&self, v: ValueId, all: &[ValueId]) -> u32 {
        let reads = |x: &ValueId| {
            *x != v && matches!(self.defs.get(x), Some(tile::Op::Gather { rows, .. }) if self.reaches(*rows, v))
        };
        all.iter().filter(|x| reads(x)).map(|x| 1 + self.depth(*x, all)).max().unwrap_or(0)
    }

    /// Whether evaluating `v` evaluates `x`.
    fn reaches(&self, v: ValueId, x: ValueId) -> bool {
        v == x
            || self.place(v) == &Place::Lazy
                && self.defs.get(&v).is_some_and(|op| tile::operands(op).into_iter().any(|y| self.reaches(y, x)))
    }

    /// What evaluating a value reads that lies somewhere, through lazies that are not in `stop`.
    pub(super) fn sources(&self, v: ValueId, stop: &[ValueId], into: &mut BTreeSet<ValueId>) {
        match self.defs.get(&v) {
            Some(op) if self.place(v) == &Place::Lazy && !stop.contains(&v) => {
                tile::operands(op).into_iter().for_each(|x| self.sources(x, stop, into));
            }
            _ => {
                into.insert(v);
            }
        }
    }

    /// Which fills only say which rows fills gather, and nothing else reads.
    fn read_as_rows(&self, body: &Block, found: &BTreeMap<usize, Fill>) -> BTreeSet<ValueId> {
        let mut other = BTreeSet::new();
        let mut rows_of = BTreeSet::new();
        for (at, inst) in body.insts.iter().enumerate() {
            let lazy = |r: &ValueId| self.place(*r) == &Place::Lazy;
            if !inst.results.is_empty() && inst.results.iter().all(lazy) {
                continue;
            }
            match (&inst.op, found.get(&at)) {
                (_, Some(f)) => {
                    let loads: Vec<ValueId> = f.leaves.iter().map(|l| l.load).collect();
                    for leaf in &loads {
                        if let Some(tile::Op::Gather { rows, .. }) = self.op_of(f, *leaf) {
                            self.sources(*rows, &loads, &mut rows_of);
                        }
                    }
                    if !loads.contains(&f.result) {
                        tile::operands(&f.op).into_iter().for_each(|v| self.sources(v, &loads, &mut other));
                    }
                }
                (Op::Tile(op), None) => tile::operands(op).into_iter().for_each(|v| self.sources(v, &[], &mut other)),
                (op, None) => dsc_ir::sched::operands(op).into_iter().for_each(|v| self.sources(v, &[], &mut other)),
            }
            if let Op::For { .. } | Op::If { .. } = &inst.op {
                self.read_inside(inst, &mut other);
            }
        }
        body.yields.iter().for_each(|&v| self.sources(v, &[], &mut other));
        let results = found.values().map(|f| f.result);
        results.filter(|r| rows_of.contains(r) && !other.contains(r)).collect()
    }

    fn read_inside(&self, inst: &Inst, into: &mut BTreeSet<ValueId>) {
        for block in inst.op.blocks() {
            for inside in &block.insts {
                dsc_ir::sched::operands(&inside.op).into_iter().for_each(|v| self.sources(v, &[], into));
                self.read_inside(inside, into);
            }
            block.yields.iter().for_each(|&v| self.sources(v, &[], into));
        }
    }

    /// The load or gather of a fill: the fill itself, or a lazy value.
    fn op_of<'b>(&'b self, f: &'b Fill, load: ValueId) -> Option<&'b tile::Op> {
        if load == f.result { Some(&f.op) } else { self.defs.get(&load) }
    }

    /// Whether all that a fill reads is known ahead: `early` are those fills that are put down ahead.
    fn can_be_early(&self, f: &Fill, how: &Rewriting, early: &BTreeSet<ValueId>) -> bool {
        let known = |v: ValueId| self.is_known(v, how);
        let loads: Vec<ValueId> = f.leaves.iter().map(|l| l.load).collect();
        let mut read = BTreeSet::new();
        if !loads.contains(&f.result) {
            tile::operands(&f.op).into_iter().for_each(|v| self.sources(v, &loads, &mut read));
        }
        // Where it reads what its round makes, by others than those who have parts of products, it can stay where it is.
        let whole = self.is_known_whole(f, how);
        let fragment = |v: &ValueId| matches!(self.place(*v), Place::Fragment(_));
        if !whole && (early.contains(&f.result) || read.iter().any(fragment)) {
            return false;
        }
        let leaf = |&load: &ValueId| {
            let (view, rows, index) = match self.op_of(f, load) {
                Some(tile::Op::Load { view, index, .. }) => (view, None, index),
                Some(tile::Op::Gather { view, rows, index, .. }) => (view, Some(*rows), index),
                _ => return false,
            };
            let fixed = index.iter().all(|i| !matches!(i, Index::Value(v) if !known(*v)));
            let mut from = BTreeSet::new();
            rows.into_iter().for_each(|v| self.sources(v, &loads, &mut from));
            // What says where another load comes from is read where the tile is put down, too: that is how a thread knows its part.
            let said = |v: &ValueId| loads.contains(v) && read.contains(v);
            self.only_reads(*view) && fixed && from.iter().all(|v| known(*v) || early.contains(v) || said(v))
        };
        loads.iter().all(leaf) && (whole || loads.iter().all(|&l| self.depth(l, &loads) == 0))
    }

    /// Whether all that a fill reads besides its loads is known ahead.
    fn is_known_whole(&self, f: &Fill, how: &Rewriting) -> bool {
        let loads: Vec<ValueId> = f.leaves.iter().map(|l| l.load).collect();
        let mut read = BTreeSet::new();
        if !loads.contains(&f.result) {
            tile::operands(&f.op).into_iter().for_each(|v| self.sources(v, &loads, &mut read));
        }
        read.iter().all(|v| loads.contains(v) || self.is_known(*v, how))
    }

    /// Rounds ahead: what says where others come from a round before them.
    fn set_leads(&self, fills: &mut [Fill]) {
        for i in (0..fills.len()).rev() {
            let (f, loads) = (&fills[i], fills[i].leaves.iter().map(|l| l.load).collect::<Vec<_>>());
            let leads: Vec<u32> = loads.iter().map(|&load| f.lead + 1 + self.depth(load, &loads)).collect();
            let mut from = Vec::new();
            for (&load, &lead) in loads.iter().zip(&leads) {
                let mut rows_of = BTreeSet::new();
                if let Some(tile::Op::Gather { rows, .. }) = self.op_of(f, load) {
                    self.sources(*rows, &loads, &mut rows_of);
                }
                from.push((rows_of, lead));
            }
            for (leaf, lead) in fills[i].leaves.iter_mut().zip(leads) {
                leaf.lead = lead;
            }
            for (rows_of, lead) in from {
                for g in fills[..i].iter_mut().filter(|g| rows_of.contains(&g.result)) {
                    g.lead = g.lead.max(lead);
                }
            }
        }
    }

    /// Bytes of a thread's registers that a fill's loads take, about.
    fn bytes_of(&self, f: &Fill) -> u32 {
        let whole = self.elements(f.result);
        let leaf = |l: &Leaf| {
            let bytes = match &self.types[l.load.0 as usize] {
                tile::Type::Tile(t) => t.dtype.bytes() as u32,
                _ => 4,
            };
            let pieces = whole.div_ceil(16 * self.threads);
            let own = (self.elements(l.load) * bytes).div_ceil(self.threads).max(4 * pieces);
            (own.next_multiple_of(4) + 4 * pieces) * (l.lead - f.lead)
        };
        f.leaves.iter().map(leaf).sum()
    }

    fn elements(&self, v: ValueId) -> u32 {
        match &self.types[v.0 as usize] {
            tile::Type::Tile(t) => t.elements() as u32,
            _ => 1,
        }
    }

    /// Rewrites a loop.
    fn hold(&mut self, mut inst: Inst, mut fills: Vec<Fill>, out: &mut Vec<Inst>) {
        let Op::For { lo, step, init, body, .. } = &mut inst.op else { unreachable!("a loop") };
        let (counter, step) = (body.args[0], *step);
        let how = Rewriting { made: made_in(body), counter };
        for f in &mut fills {
            for leaf in &mut f.leaves {
                let ty = self.types[leaf.load.0 as usize].clone();
                leaf.carried = (f.lead..leaf.lead).map(|_| self.fresh(ty.clone(), Place::Held)).collect();
            }
        }
        let first = self.bound(*lo, out);
        let begun = self.begin(&fills, &how, (first, step), out);
        // What is single and known goes first: loads come from there.
        let put: HashSet<ValueId> = fills.iter().filter(|f| !f.stays).map(|f| f.result).collect();
        let rest = std::mem::take(&mut body.insts).into_iter().filter(|i| !i.results.iter().any(|r| put.contains(r)));
        let known = |i: &Inst| !i.results.is_empty() && i.results.iter().all(|&r| self.is_known(r, &how));
        let (mut insts, rest): (Vec<Inst>, Vec<Inst>) = rest.partition(known);
        let (mut next, mut rounds) = self.round(&fills, &how, step, &mut insts);
        for inst in rest {
            let at = fills.iter().position(|f| f.stays && inst.results.contains(&f.result));
            let Some(i) = at else {
                insts.push(inst);
                continue;
            };
            let f = &fills[i];
            let own = f.leaves.iter().map(|l| (l.load, l.carried[0])).collect();
            let mut same = Round { renamed: HashMap::new(), same: true };
            self.put_down(f, f.result, &how, (&mut same, &own), &mut insts);
            for (l, leaf) in f.leaves.iter().enumerate() {
                if let Some(round) = rounds.get_mut(&leaf.lead) {
                    next.insert((i, l), self.issue(f, leaf, &how, (round, &HashMap::new()), &mut insts));
                }
            }
        }
        body.insts = insts;
        for (leaf, next) in fills.iter().flat_map(|f| &f.leaves).zip(next.into_values()) {
            for (age, &v) in leaf.carried.iter().enumerate() {
                body.args.push(v);
                init.push(begun[&v]);
                body.yields.push(leaf.carried.get(age + 1).copied().unwrap_or(next));
                let done = self.fresh(self.types[leaf.load.0 as usize].clone(), Place::Held);
                inst.results.push(done);
            }
        }
        // What the first round puts down again has been read.
        if fills.iter().any(|f| f.lead > 0) {
            out.push(Inst { results: Vec::new(), op: Op::Barrier, scratch: None });
        }
        out.push(inst);
    }

    /// In front of a loop: what its first round finds, by what carries it.
    fn begin(
        &mut self,
        fills: &[Fill],
        how: &Rewriting,
        (first, step): (ValueId, u32),
        out: &mut Vec<Inst>,
    ) -> HashMap<ValueId, ValueId> {
        let rounds = fills.iter().flat_map(|f| f.leaves.iter().map(|l| l.lead)).max().unwrap_or(0);
        let mut begun = HashMap::new();
        for ahead in 0..rounds {
            let at = self.plus(first, i64::from(ahead * step), out);
            let mut round = Round { renamed: HashMap::from([(how.counter, at)]), same: false };
            for f in fills {
                let mut own = HashMap::new();
                for leaf in f.leaves.iter().filter(|l| ahead < l.lead) {
                    let v = self.issue(f, leaf, how, (&mut round, &own), out);
                    own.insert(leaf.load, v);
                    if let Some(&carried) = ahead.checked_sub(f.lead).and_then(|age| leaf.carried.get(age as usize)) {
                        begun.insert(carried, v);
                    }
                }
                if ahead < f.lead {
                    let r = self.fresh(self.types[f.result.0 as usize].clone(), self.place(f.result).clone());
                    self.put_down(f, r, how, (&mut round, &own), out);
                    round.renamed.insert(f.result, r);
                }
            }
        }
        begun
    }

    /// The beginning of a body: puts tiles down, and issues loads. Gives what these are, by fill and leaf, and names of the rounds.
    fn round(
        &mut self,
        fills: &[Fill],
        how: &Rewriting,
        step: u32,
        insts: &mut Vec<Inst>,
    ) -> (Issued, BTreeMap<u32, Round>) {
        let mut rounds: BTreeMap<u32, Round> = BTreeMap::new();
        let leads: BTreeSet<u32> = fills.iter().flat_map(|f| f.leaves.iter().map(|l| l.lead).chain([f.lead])).collect();
        for ahead in leads {
            let at = self.plus(how.counter, i64::from(ahead * step), insts);
            rounds.insert(ahead, Round { renamed: HashMap::from([(how.counter, at)]), same: ahead == 0 });
        }
        let early: BTreeSet<ValueId> = fills.iter().filter(|f| f.lead > 0).map(|f| f.result).collect();
        let mut next = Issued::new();
        let mut late: Vec<(usize, usize)> = Vec::new();
        let mut order: Vec<usize> = (0..fills.len()).filter(|&i| !fills[i].stays).collect();
        order.sort_by_key(|&i| fills[i].lead);
        for i in order {
            let f = &fills[i];
            let own = f.leaves.iter().map(|l| (l.load, l.carried[0])).collect();
            let Some(round) = rounds.get_mut(&f.lead) else { continue };
            self.put_down(f, f.result, how, (round, &own), insts);
            for (l, leaf) in f.leaves.iter().enumerate() {
                // What comes from where this round's fills say has to wait for them; so does what says where they come from.
                if f.lead > 0 || self.rows_of(f, leaf).iter().any(|v| early.contains(v) || own.contains_key(v)) {
                    late.push((i, l));
                } else if let Some(round) = rounds.get_mut(&leaf.lead) {
                    next.insert((i, l), self.issue(f, leaf, how, (round, &HashMap::new()), insts));
                }
            }
        }
        // What is issued last is waited for last.
        late.sort_by_key(|&(i, l)| fills[i].leaves[l].lead);
        for (i, l) in late {
            let (f, leaf) = (&fills[i], &fills[i].leaves[l]);
            let age = (leaf.lead - f.lead) as usize;
            let own = f.leaves.iter().filter_map(|o| Some((o.load, *o.carried.get(age)?))).collect();
            if let Some(round) = rounds.get_mut(&leaf.lead) {
                next.insert((i, l), self.issue(f, leaf, how, (round, &own), insts));
            }
        }
        (next, rounds)
    }

    /// What says where a leaf comes from, besides its index.
    fn rows_of(&self, f: &Fill, leaf: &Leaf) -> BTreeSet<ValueId> {
        let loads: Vec<ValueId> = f.leaves.iter().map(|l| l.load).collect();
        let mut from = BTreeSet::new();
        if let Some(tile::Op::Gather { rows, .. }) = self.op_of(f, leaf.load) {
            self.sources(*rows, &loads, &mut from);
        }
        from
    }

    /// Puts a fill down as `r`, from `own` by load.
    fn put_down(
        &mut self,
        f: &Fill,
        r: ValueId,
        how: &Rewriting,
        (round, own): (&mut Round, &HashMap<ValueId, ValueId>),
        out: &mut Vec<Inst>,
    ) {
        let op = match own.get(&f.result) {
            Some(&held) => {
                tile::Op::Map { inputs: vec![held], body: MapFn { insts: Vec::new(), result: MapArg::Input(0) } }
            }
            None => self.op_in(&f.op, how, (round, own), out),
        };
        self.emit(r, op, out);
    }

    /// Issues a load for a round; `own` are others of the same fill.
    fn issue(
        &mut self,
        f: &Fill,
        leaf: &Leaf,
        how: &Rewriting,
        (round, own): (&mut Round, &HashMap<ValueId, ValueId>),
        out: &mut Vec<Inst>,
    ) -> ValueId {
        let op = self.op_of(f, leaf.load).cloned().expect("it is a load");
        let op = self.op_in(&op, how, (round, own), out);
        let v = self.fresh(self.types[leaf.load.0 as usize].clone(), Place::Held);
        self.emit(v, op, out);
        v
    }

    /// An op on what its operands are in a round.
    fn op_in(
        &mut self,
        op: &tile::Op,
        how: &Rewriting,
        (round, own): (&mut Round, &HashMap<ValueId, ValueId>),
        out: &mut Vec<Inst>,
    ) -> tile::Op {
        let mut op = op.clone();
        let mut again = HashMap::new();
        for v in tile::operands(&op) {
            again.insert(v, self.in_round(v, how, (round, own), out));
        }
        tile::for_each_operand(&mut op, &mut |v| *v = again.get(v).copied().unwrap_or(*v));
        op
    }

    /// What a value is in a round: single ones and lazy ones are made anew.
    fn in_round(
        &mut self,
        v: ValueId,
        how: &Rewriting,
        (round, own): (&mut Round, &HashMap<ValueId, ValueId>),
        out: &mut Vec<Inst>,
    ) -> ValueId {
        if let Some(&v) = own.get(&v).or_else(|| round.renamed.get(&v)) {
            return v;
        }
        let single = self.place(v) == &Place::Uniform;
        let lazy = self.place(v) == &Place::Lazy;
        let Some(op) = self.defs.get(&v).cloned().filter(|_| how.made.contains(&v) && (lazy || single && !round.same))
        else {
            return v;
        };
        let op = self.op_in(&op, how, (round, own), out);
        let again = self.fresh(self.types[v.0 as usize].clone(), self.place(v).clone());
        self.emit(again, op, out);
        if single {
            round.renamed.insert(v, again);
        }
        again
    }

    /// Whether a single value of a body is known from the counter, from outside, and from memory that nobody writes.
    fn is_known(&self, v: ValueId, how: &Rewriting) -> bool {
        if v == how.counter || !how.made.contains(&v) {
            return true;
        }
        let Some(op) = self.defs.get(&v).filter(|_| self.place(v) == &Place::Uniform) else { return false };
        let again = match op {
            tile::Op::Map { .. } | tile::Op::Full { .. } | tile::Op::Reshape { .. } => true,
            tile::Op::Load { view, .. } => self.only_reads(*view),
            _ => false,
        };
        again && tile::operands(op).into_iter().all(|x| self.is_view(x) || self.is_known(x, how))
    }

    fn is_view(&self, v: ValueId) -> bool {
        self.place(v) == &Place::View
    }

    pub(super) fn only_reads(&self, view: ValueId) -> bool {
        tile::access_of(&self.program.params, view).is_some_and(|a| !a.writes())
    }
}
