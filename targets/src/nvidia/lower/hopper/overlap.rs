//! Rounds whose last sums are made while the next round multiplies.
//!
//! A round that makes one product or two and then the sums of each has nothing to multiply while it makes the last of them. So a loop makes several rounds
//! in one, and issues the first product of the next before those sums:
//!
//! ```text
//! for j in lo..hi {                     for j in lo..hi - 1 step 2 {
//!     take b at j                           take b at j; p = a0·b; q = a1·b; sums of p
//!     p = a0·b; q = a1·b          =>        take b' at j + 1; p' = a0·b'
//!     sums of p                             release b; sums of q
//!     release; sums of q                    q' = a1·b'; sums of p'
//! }                                         release b'; sums of q'
//!                                       }
//!                                       the rest as before
//! ```
//!
//! A round of one product is such a round without `p` and its sums.
//!
//! No product is in flight across the loop's end: the assembler would not have sums of it made while another is.

use super::values::{Names, added, added_number, arithmetic, constant, mapped, plain, plus, renamed};
use dsc_ir::sched::{Block, ChannelId, Inst, Op, Scheduled};
use dsc_ir::tile::{self, Index, MapArg, ScalarOp, Type, ValueId};

/// Rows of the resident operand of which rounds of a single product are made so too, where blocks do not divide rounds. Of fewer, more blocks share a multiprocessor, and what
/// one sums hides behind products of the others; of more, registers do not hold two products.
pub const ALONE: u32 = 128;
/// Rounds in one.
const ROUNDS: u32 = 2;

/// The kernel with such loops changed.
pub fn overlapped(mut s: Scheduled) -> Scheduled {
    if s.parts() {
        // What one part of a role sums, or one block, hides behind products of the others.
        return s;
    }
    for role in 0..s.roles.len() {
        let mut body = std::mem::take(&mut s.roles[role].body);
        change(&mut body, &mut s);
        s.roles[role].body = body;
    }
    s
}

fn change(block: &mut Block, s: &mut Scheduled) {
    let mut at = 0;
    while at < block.insts.len() {
        if let Some((changed, rest)) = Rounds::of(&block.insts[at], &s.types).and_then(|rounds| rounds.changed(s)) {
            if let Op::For { lo, .. } = &mut block.insts[at].op {
                *lo = Index::Value(rest);
            }
            let n = changed.len();
            block.insts.splice(at..at, changed);
            at += n;
        } else if let Op::For { body, .. } = &mut block.insts[at].op {
            change(body, s);
        }
        at += 1;
    }
}

/// A loop of that form.
struct Rounds {
    lo: ValueId,
    hi: ValueId,
    counter: ValueId,
    channel: ChannelId,
    /// What a round begins with, and its products.
    begin: Vec<Inst>,
    products: Vec<Inst>,
    /// What is made of the first of two products, and of the last.
    sums: [Vec<Inst>; 2],
}

impl Rounds {
    fn of(inst: &Inst, types: &[Type]) -> Option<Rounds> {
        let Op::For { lo: Index::Value(lo), hi: Index::Value(hi), step: 1, init, body } = &inst.op else { return None };
        let insts = &body.insts;
        let is_product = |i: &Inst| matches!(i.op, Op::Tile(tile::Op::Dot { acc: None, .. }));
        let first = insts.iter().position(is_product)?;
        let released = insts.iter().position(|i| matches!(i.op, Op::Release { lag: 0, .. }))?;
        let Op::Release { channel, .. } = insts[released].op else { return None };
        let products: Vec<Inst> = insts[first..].iter().take_while(|i| is_product(i)).cloned().collect();
        let all = insts.iter().filter(|i| is_product(i)).count() == products.len();
        let enough =
            products.len() == 2 || products.len() == 1 && rows(&types[insts[first].results[0].0 as usize]) == ALONE;
        let sums = [insts.get(first + products.len()..released)?.to_vec(), insts[released + 1..].to_vec()];
        let plain = sums.iter().flatten().all(|i| matches!(i.op, Op::Tile(_)));
        let whole = init.is_empty() && body.yields.is_empty() && all && enough && plain;
        whole.then_some(())?;
        Some(Rounds {
            lo: *lo,
            hi: *hi,
            counter: body.args[0],
            channel,
            begin: insts[..first].to_vec(),
            products,
            sums,
        })
    }

    /// What comes in front of the loop, and where that then begins.
    fn changed(&self, s: &mut Scheduled) -> Option<(Vec<Inst>, ValueId)> {
        let same: Names = (0..s.types.len() as u32).map(|n| (ValueId(n), ValueId(n))).collect();
        let release = |lag: u32| plain(Op::Release { channel: self.channel, lag });
        let counter = added_number(s);
        let mut insts = Vec::new();
        let mut before: Option<Names> = None;
        for round in 0..ROUNDS {
            let mut names = same.clone();
            let number = if round == 0 { counter } else { added_number(s) };
            if round > 0 {
                insts.push(computed(number, plus(counter, round as i32)));
            }
            names.insert(self.counter, number);
            for inst in self.begin.iter().chain(&self.products[..1]) {
                insts.push(copied(inst, &mut names, s)?);
            }
            if let Some(mut late) = before.take() {
                insts.push(release(1));
                for inst in &self.sums[1] {
                    insts.push(copied(inst, &mut late, s)?);
                }
            }
            for inst in self.products[1..].iter().chain(&self.sums[0]) {
                insts.push(copied(inst, &mut names, s)?);
            }
            before = Some(names);
        }
        insts.push(release(0));
        let mut late = before?;
        for inst in &self.sums[1] {
            insts.push(copied(inst, &mut late, s)?);
        }
        let (last, rest) = (added_number(s), added_number(s));
        let body = Block { args: vec![counter], insts, yields: Vec::new() };
        let (lo, hi) = (Index::Value(self.lo), Index::Value(last));
        let op = Op::For { lo, hi, step: ROUNDS, init: Vec::new(), body };
        let front = vec![
            computed(last, plus(self.hi, 1 - ROUNDS as i32)),
            plain(op),
            computed(rest, behind_whole(self.lo, self.hi)),
        ];
        Some((front, rest))
    }
}

/// Rows of a tile.
fn rows(ty: &Type) -> u32 {
    match ty {
        Type::Tile(t) => t.shape.first().copied().unwrap_or(1),
        _ => 1,
    }
}

/// Where what the rounds in one leave begins: `lo + max(hi − lo, 0) / n · n`.
fn behind_whole(lo: ValueId, hi: ValueId) -> tile::Op {
    let insts = vec![
        constant(0),
        constant(ROUNDS as i32),
        arithmetic(ScalarOp::Sub, &[MapArg::Input(1), MapArg::Input(0)]),
        arithmetic(ScalarOp::Max, &[MapArg::Inst(2), MapArg::Inst(0)]),
        arithmetic(ScalarOp::Div, &[MapArg::Inst(3), MapArg::Inst(1)]),
        arithmetic(ScalarOp::Mul, &[MapArg::Inst(4), MapArg::Inst(1)]),
        arithmetic(ScalarOp::Add, &[MapArg::Input(0), MapArg::Inst(5)]),
    ];
    mapped(vec![lo, hi], insts)
}

fn computed(result: ValueId, op: tile::Op) -> Inst {
    Inst { results: vec![result], op: Op::Tile(op), scratch: None }
}

/// A new value of the same type, in the same place.
fn like(v: ValueId, s: &mut Scheduled) -> ValueId {
    let (ty, place) = (s.types[v.0 as usize].clone(), s.places[v.0 as usize].clone());
    added(s, ty, place)
}

/// An instruction under new names, with new results.
fn copied(inst: &Inst, names: &mut Names, s: &mut Scheduled) -> Option<Inst> {
    let op = match &inst.op {
        Op::Tile(tile::Op::Dot { a, b, acc: None, trans_b }) => {
            Op::Tile(tile::Op::Dot { a: names[a], b: names[b], acc: None, trans_b: *trans_b })
        }
        Op::Tile(tile::Op::Reduce { x, axis, kind }) => {
            Op::Tile(tile::Op::Reduce { x: names[x], axis: *axis, kind: *kind })
        }
        Op::Tile(op) => Op::Tile(renamed(op, names)?),
        op @ (Op::Wait(_) | Op::Take { .. }) => op.clone(),
        _ => return None,
    };
    let results: Vec<ValueId> = inst.results.iter().map(|&r| like(r, s)).collect();
    names.extend(inst.results.iter().copied().zip(results.iter().copied()));
    Some(Inst { results, op, scratch: inst.scratch })
}
