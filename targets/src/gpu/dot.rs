//! Matrix products of tiles in shared memory: the chip's instruction where the types allow, else fused multiply-adds.
//!
//! Operands are read from padded rows (see [`super::schedule`]), so that neighbouring rows lie in different banks.

use super::emit::Emitter;
use super::fragment::Spread;
use super::isa::{self, Left, Product};
use super::mlir::{Ty, Val, i32};
use dsc_ir::DType;
use dsc_ir::sched::{Atom, Block, Buffer, BufferId, Op, Place};
use dsc_ir::tile::{self, ValueId};
use std::collections::HashSet;

/// Steps of `k` written out in a loop's body.
const STEPS: u32 = 4;

impl<'a> Emitter<'a> {
    /// `acc + a · b`.
    pub fn dot(&mut self, r: ValueId, (a, b): (ValueId, ValueId), acc: Option<ValueId>, trans_b: bool) {
        let Place::Fragment(f) = self.place(r) else { unreachable!("products are fragments") };
        let s = Spread::new(self, *f, self.shape(r));
        let acc = match acc {
            Some(acc) => self.fragment(acc, &s),
            None => self.zeros(&s),
        };
        let b_buffer = self.root_buffer(b);
        let k = self.shape(a).last().copied().unwrap_or(1);
        let values = match f.atom {
            Atom::Fma => {
                self.dot_fma(&s, (self.root_buffer(a), self.dtype(a)), (b_buffer, self.dtype(b)), k, trans_b, acc)
            }
            atom => {
                let ready = [a, b].map(|v| self.root(v).is_some_and(|b| self.ready.contains(&b)));
                let first = [a, b].map(|v| self.stage_byte(v));
                let held = self.held_left(a);
                let left = match &held {
                    Some(held) => Left::Held(held),
                    None => Left::Shared(self.root_buffer(a)),
                };
                let p = Product { atom, dtype: self.dtype(a), a: left, b: b_buffer, first, ready, k, trans_b };
                self.t.arch.product(self, &s, &p, acc)
            }
        };
        self.set_registers(r, &values);
    }

    /// Buffers that hold what matrix instructions take, where these take other bits than memory holds: filled from memory or by
    /// arithmetic, and read by products only, so that each element is converted once.
    pub fn only_multiplied(&self) -> HashSet<BufferId> {
        let (mut filled, mut read) = (HashSet::new(), HashSet::new());
        self.follow(&self.s.common, &mut filled, &mut read);
        filled.retain(|b| !read.contains(b));
        filled
    }

    /// Adds the buffers that are filled with convertible elements, and those that something else reads or writes.
    fn follow(&self, block: &Block, filled: &mut HashSet<BufferId>, other: &mut HashSet<BufferId>) {
        other.extend(block.args.iter().chain(&block.yields).filter_map(|&v| self.root(v)));
        for inst in &block.insts {
            let op = match &inst.op {
                Op::Tile(op) => op,
                Op::For { init, body, .. } => {
                    other.extend(init.iter().filter_map(|&v| self.root(v)));
                    self.follow(body, filled, other);
                    continue;
                }
                Op::If { then, otherwise, .. } => {
                    self.follow(then, filled, other);
                    self.follow(otherwise, filled, other);
                    continue;
                }
                _ => continue,
            };
            let elementwise = matches!(op, tile::Op::Load { .. } | tile::Op::Gather { .. } | tile::Op::Map { .. });
            for &r in &inst.results {
                let Place::Shared(b) = self.place(r) else { continue };
                if elementwise && self.t.arch.converts(self.dtype(r)) {
                    filled.insert(*b);
                } else {
                    other.insert(*b);
                }
            }
            match op {
                tile::Op::Dot { .. } if !matches!(self.place(inst.results[0]), Place::Fragment(f) if f.atom == Atom::Fma) =>
                    {}
                // What it reads is what its own uses read.
                tile::Op::Reshape { .. } => {}
                // A fragment is stored by its owners, who do not convert.
                tile::Op::Map { inputs, .. } if inputs.iter().any(|&i| self.is_fragment(i)) => {
                    other.extend(inst.results.iter().filter_map(|&r| self.root(r)));
                    other.extend(inputs.iter().filter_map(|&v| self.root(v)));
                }
                op => other.extend(tile::operands(op).into_iter().filter_map(|v| self.root(v))),
            }
        }
    }

    /// Elements of an operand as matrix instructions take them: words of them, or fewer than a word has.
    pub fn operand(&mut self, dtype: DType, values: &[Val]) -> Vec<Val> {
        let arch = self.t.arch;
        let words = self.words(values);
        let convert = |e: &mut Self, v: Val| {
            let (ty, word) = (v.ty(), if v.ty() == Ty::I32 { v } else { e.t.f.cast("zext", v, Ty::I32) });
            let word = arch.operand_word(&mut e.t.f, dtype, word);
            if ty == Ty::I32 { word } else { e.t.f.cast("trunc", word, ty) }
        };
        words.into_iter().map(|v| convert(self, v)).collect()
    }

    fn dot_fma(
        &mut self,
        s: &Spread,
        (a, a_type): (&Buffer, DType),
        (b, b_type): (&Buffer, DType),
        k: u32,
        trans_b: bool,
        acc: Vec<Val>,
    ) -> Vec<Val> {
        let arch = self.t.arch;
        // Neighbours along k in one load.
        let n = super::evaluate::power_of_two_in(k).min(4);
        let row_bytes = |e: &mut Self, row: Val, b: &Buffer| {
            let byte = e.t.f.mul(row, i32(b.pitch.into()));
            e.t.f.add(byte, i32(b.offset.into()))
        };
        let a_rows: Vec<Val> = s.rows.iter().map(|&(row, _)| row_bytes(self, row, a)).collect();
        let columns: Vec<Val> = s
            .groups
            .iter()
            .flat_map(|&(col, _)| (0..s.width).map(move |i| (col, i)))
            .map(|(col, i)| {
                let c = self.t.f.add(col, i32(i.into()));
                let ragged = s.block[1] * s.warps[1] > s.shape[1] || !s.even();
                self.at_most(c, s.shape[1] - 1, ragged)
            })
            .collect();
        let b_rows: Vec<Val> = columns
            .iter()
            .map(|&c| {
                if trans_b {
                    row_bytes(self, c, b)
                } else {
                    let byte = self.t.f.mul(c, i32(b_type.bytes() as i64));
                    self.t.f.add(byte, i32(b.offset.into()))
                }
            })
            .collect();
        let read = |e: &mut Self, byte: Val, dtype: DType, n: u32| -> Vec<Val> {
            let ty = isa::stored(dtype);
            let most = n.min(16 / ty.bytes());
            let mut out = Vec::new();
            for i in (0..n).step_by(most as usize) {
                let byte = e.t.f.add(byte, i32((i * ty.bytes()).into()));
                let values = e.t.load_shared(byte, ty, most);
                out.extend(values.into_iter().map(|v| {
                    let wide = arch.widen(&mut e.t.f, v, dtype);
                    if wide.ty() == Ty::I32 { e.t.f.cast("sitofp", wide, Ty::F32) } else { wide }
                }));
            }
            out
        };
        let (a_bytes, b_bytes) = (a_type.bytes() as i64, b_type.bytes() as i64);
        let sums = self.steps((k / n, 0), Atom::Fma, acc, |e, acc, at| {
            let a_at = e.t.f.mul(at, i32(i64::from(n) * a_bytes));
            let lefts: Vec<Vec<Val>> = a_rows
                .iter()
                .map(|&row| {
                    let byte = e.t.f.add(row, a_at);
                    read(e, byte, a_type, n)
                })
                .collect();
            for (c, &row) in b_rows.iter().enumerate() {
                let right: Vec<Val> = if trans_b {
                    let b_at = e.t.f.mul(at, i32(i64::from(n) * b_bytes));
                    let byte = e.t.f.add(row, b_at);
                    read(e, byte, b_type, n)
                } else {
                    (0..n)
                        .map(|i| {
                            let kk = e.t.f.mul(at, i32(n.into()));
                            let kk = e.t.f.add(kk, i32(i.into()));
                            let b_at = e.t.f.mul(kk, i32(b.pitch.into()));
                            let byte = e.t.f.add(row, b_at);
                            read(e, byte, b_type, 1)[0]
                        })
                        .collect()
                };
                let (group, i) = (c / s.width as usize, c as u32 % s.width);
                for (ri, left) in lefts.iter().enumerate() {
                    let r = s.register(ri, group, i);
                    for kk in 0..n as usize {
                        acc[r] = e.t.f.intrinsic("fma", &[left[kk], right[kk], acc[r]]);
                    }
                }
            }
        });
        sums.into_iter().map(|v| arch.settled(&mut self.t.f, v)).collect()
    }

    /// `v`, but no more than `limit` if it may be.
    pub fn at_most(&mut self, v: Val, limit: u32, needed: bool) -> Val {
        if needed { self.t.f.intrinsic("smin", &[v, i32(limit.into())]) } else { v }
    }

    /// Runs `body` for steps `0..count` on the accumulators: written out if few, or no more than `straight`, else looped over.
    pub fn steps(
        &mut self,
        (count, straight): (u32, u32),
        atom: Atom,
        mut acc: Vec<Val>,
        mut body: impl FnMut(&mut Self, &mut [Val], Val),
    ) -> Vec<Val> {
        let unrolled = if acc.len() > 64 { STEPS / 2 } else { STEPS };
        if count <= straight.max(2 * unrolled) {
            for i in 0..count {
                body(self, &mut acc, i32(i.into()));
            }
            return acc;
        }
        let looped = count / unrolled * unrolled;
        let kept = self.together(atom, &acc);
        let l = self.t.f.open_loop(i32(0), i32(looped.into()), &kept);
        acc = self.apart(&l.args[1..]);
        for i in 0..unrolled {
            let at = self.t.f.add(l.args[0], i32(i.into()));
            body(self, &mut acc, at);
        }
        let kept = self.together(atom, &acc);
        self.t.f.close_loop(&l, i32(unrolled.into()), &kept);
        acc = self.apart(&l.done[1..]);
        for i in looped..count {
            body(self, &mut acc, i32(i.into()));
        }
        acc
    }
}
