//! Loads on their way ([`Place::Held`]): made by each thread for its pieces of the tile that they are put down in, and carried in registers until then.
//!
//! Which elements of a load a thread needs, the tile says that reads it: it is evaluated as when it is put down, and where that reads the load it is
//! made instead. What is outside of its view is masked when it is read, as only then it is there.

use super::emit::Emitter;
use super::fill::Fill;
use super::fragment::Spread;
use super::isa::{self, HeldLeft};
use super::mlir::{Ty, Val, f32, i32};
use dsc_ir::sched::{Block, Inst, Op, Place};
use dsc_ir::tile::{self, Index, ValueId};
use std::collections::{HashMap, HashSet};

/// What a thread has of a load for one piece.
#[derive(Clone)]
pub struct Piece {
    /// Words of elements, or elements where they are no words.
    words: Vec<Val>,
    /// All bits if it is inside of the view, else none (i32).
    mask: Val,
}

/// The tile that reads a load where it is put down.
#[derive(Clone, Copy)]
struct Reader<'a> {
    fill: ValueId,
    op: &'a tile::Op,
    /// What it reads the load as.
    leaf: ValueId,
}

/// A load that is being made.
struct Collecting<'a> {
    leaf: ValueId,
    op: &'a tile::Op,
    found: Option<Piece>,
}

/// The loads on their way.
#[derive(Default)]
pub struct Held<'a> {
    pieces: HashMap<ValueId, Vec<Piece>>,
    readers: HashMap<ValueId, Reader<'a>>,
    /// Tiles that are put down from loads.
    fills: HashSet<ValueId>,
    /// Loads that are left operands, with the products that read them.
    products: HashMap<ValueId, ValueId>,
    /// Left operands.
    lefts: HashMap<ValueId, HeldLeft>,
    /// What a load takes the place of in the next round, which is carried on elsewhere.
    older: HashMap<ValueId, ValueId>,
    /// That, in other registers: those of a load under way are not to be moved.
    moved: HashMap<ValueId, Vec<Piece>>,
    /// The piece that is being evaluated.
    piece: usize,
    collecting: Option<Collecting<'a>>,
}

impl<'a> Emitter<'a> {
    /// Finds out who reads which load.
    pub fn find_readers(&mut self, block: &'a Block) {
        for inst in &block.insts {
            if let (Op::Tile(op), [r]) = (&inst.op, &inst.results[..])
                && let Place::Shared(_) = self.place(*r)
            {
                let mut leaves = Vec::new();
                self.find_held(op, &mut leaves);
                for leaf in leaves {
                    self.held.fills.insert(*r);
                    self.held.readers.insert(leaf, Reader { fill: *r, op, leaf });
                }
            }
            if let (Op::Tile(tile::Op::Dot { a, .. }), [r]) = (&inst.op, &inst.results[..])
                && let Some(load) = self.held_root(*a)
            {
                self.held.products.insert(load, *r);
            }
            inst.op.blocks().into_iter().for_each(|inner| self.find_readers(inner));
            if let Op::For { init, body, .. } = &inst.op {
                // What becomes an argument is read as it is; an argument may become another one.
                for _ in 0..body.args.len() {
                    for (k, &arg) in body.args[1..].iter().enumerate() {
                        let Some(&reader) = self.held.readers.get(&arg) else { continue };
                        for v in [init[k], body.yields[k]] {
                            self.held.readers.entry(v).or_insert(reader);
                        }
                        if body.yields.contains(&arg) {
                            self.held.older.insert(body.yields[k], arg);
                        }
                    }
                }
            }
        }
    }

    fn find_held(&self, op: &'a tile::Op, leaves: &mut Vec<ValueId>) {
        for v in tile::operands(op) {
            match (self.place(v), self.definition(v)) {
                (Place::Held, _) => leaves.push(v),
                (Place::Lazy, Some(op)) => self.find_held(op, leaves),
                _ => {}
            }
        }
    }

    /// Whether a tile is put down from loads that were made before.
    pub fn is_put_down(&self, r: ValueId) -> bool {
        self.held.fills.contains(&r)
    }

    /// The load that a left operand is, if it is one in registers.
    fn held_root(&self, mut v: ValueId) -> Option<ValueId> {
        loop {
            match (self.place(v), self.definition(v)) {
                (Place::Held, _) => return Some(v),
                (Place::Lazy, Some(tile::Op::Reshape { x, .. })) => v = *x,
                _ => return None,
            }
        }
    }

    /// A left operand in registers.
    pub fn held_left(&self, a: ValueId) -> Option<HeldLeft> {
        self.held.lefts.get(&self.held_root(a)?).cloned()
    }

    /// Loads the rows of a left operand that a product's lanes take.
    fn hold_left(&mut self, r: ValueId, op: &'a tile::Op, product: ValueId) {
        let Place::Fragment(f) = self.place(product) else { return };
        let s = Spread::new(self, *f, self.shape(product));
        let (arch, dtype, shape) = (self.t.arch, self.dtype(r), self.shape(r));
        let (leading, k) = (&shape[..shape.len() - 1], shape[shape.len() - 1]);
        let n = 16 / dtype.bytes() as u32;
        let mut operand = Vec::new();
        for step in 0..k / arch.matrix_step(dtype) {
            let column = arch.left_column(&mut self.t.f, &s, dtype, step);
            let mut rows = Vec::new();
            for &(row, _) in &s.rows {
                let mut at = self.delinear(row, leading);
                at.push(column);
                let Some(access) = self.source(op, &at, n) else { return };
                let words = self.load_from(&access, true);
                let words = self.masked(&access, words);
                let words = self.words(&words);
                let convert = arch.converts(dtype);
                let f = &mut self.t.f;
                let taken: Vec<Val> =
                    words.into_iter().map(|w| if convert { arch.operand_word(f, dtype, w) } else { w }).collect();
                rows.push(arch.keep_left(f, &taken));
            }
            operand.push(rows);
        }
        self.held.lefts.insert(r, operand);
    }

    /// Makes a load.
    pub fn hold(&mut self, r: ValueId, op: &'a tile::Op) {
        if let Some(&product) = self.held.products.get(&r) {
            return self.hold_left(r, op, product);
        }
        let Some(Reader { fill, op: reads, leaf }) = self.held.readers.get(&r).copied() else {
            self.fault = Some(format!("nothing reads the load %{}", r.0));
            return;
        };
        if let Some(&older) = self.held.older.get(&r)
            && let Some(pieces) = self.held.pieces.get(&older).cloned()
        {
            let (arch, f) = (self.t.arch, &mut self.t.f);
            let mut copy = |p: Piece| Piece {
                words: p.words.iter().map(|&w| arch.moved(f, w)).collect(),
                mask: arch.moved(f, p.mask),
            };
            self.held.moved.insert(older, pieces.into_iter().map(&mut copy).collect());
        }
        let mut pieces = Vec::new();
        let mut collect = |e: &mut Self, evaluate: &mut dyn FnMut(&mut Self)| {
            e.held.collecting = Some(Collecting { leaf, op, found: None });
            evaluate(e);
            match e.held.collecting.take().and_then(|c| c.found) {
                Some(piece) => pieces.push(piece),
                None => e.fault = Some(format!("%{} does not read the load %{}", fill.0, r.0)),
            }
        };
        if let tile::Op::Reduce { x, axis, .. } = reads {
            let columns = self.columns(*x, *axis as usize);
            for i in 0..columns.total.div_ceil(self.t.threads) {
                let (c, _) = self.piece_round(columns.total, i);
                for k in 0..columns.lines {
                    collect(self, &mut |e| {
                        e.column(*x, &columns, c, k);
                    });
                }
            }
        } else {
            let fill = self.fill(reads, fill, self.root_buffer(fill));
            for i in 0..fill.rounds(self.t.threads) {
                let (c, _) = self.round_of(&fill, i);
                collect(self, &mut |e| {
                    e.evaluate_fill(&fill, c);
                });
            }
        }
        self.held.pieces.insert(r, pieces);
        // Behind what is put down next it would be the last under way when that is waited for.
        self.t.arch.keep_order(&mut self.t.f);
    }

    /// The chunk of a round of a fill that is written out, and whether there is one.
    fn round_of(&mut self, fill: &Fill, i: u32) -> (Val, Val) {
        self.set_piece(i);
        self.piece_round(fill.chunks(), i)
    }

    /// Which piece of loads on their way is read from here on.
    pub fn set_piece(&mut self, i: u32) {
        self.held.piece = i as usize;
    }

    /// The chunk of a round that is written out, of `total`, and whether there is one.
    pub fn piece_round(&mut self, total: u32, i: u32) -> (Val, Val) {
        let threads = self.t.threads;
        let partial = i + 1 == total.div_ceil(threads) && !total.is_multiple_of(threads);
        self.round(self.t.tid, i, partial.then_some(total))
    }

    /// Puts a tile down from loads that were made before, piece by piece.
    pub fn put_down(&mut self, fill: &Fill<'a>) {
        for i in 0..fill.rounds(self.t.threads) {
            let (c, ok) = self.round_of(fill, i);
            let values = self.chunk_of(fill, c);
            let ([row, col], ..) = self.place_of(fill, c);
            let dtype = self.dtype(fill.r);
            self.guarded(ok, |e| e.store_buffer(fill.b, dtype, row, col, &values));
        }
    }

    /// Makes the load that is asked for, from these coordinates of its tile.
    fn collect(&mut self, at: &[Val], n: u32) {
        // What says where it comes from may be loads that are there.
        let Some(mut c) = self.held.collecting.take() else { return };
        if c.found.is_none()
            && let Some(access) = self.source(c.op, at, n)
        {
            let words = self.load_from(&access, true);
            c.found = Some(if access.whole {
                let mask = self.t.f.select(access.inside[0], i32(-1), i32(0));
                Piece { words, mask }
            } else {
                let elements = self.masked(&access, words);
                Piece { words: self.words(&elements), mask: i32(-1) }
            });
        }
        self.held.collecting = Some(c);
    }

    /// Words of a load for the present piece, with zeros outside of its view. While loads are made they are only asked for.
    pub fn held_words(&mut self, v: ValueId, at: &[Val], n: u32) -> Option<Vec<Val>> {
        if let Some(c) = &self.held.collecting {
            if c.leaf == v {
                self.collect(at, n);
            }
            return None;
        }
        let Some(Piece { words, mask }) = self.held.pieces.get(&v).and_then(|p| p.get(self.held.piece)).cloned() else {
            self.fault = Some(format!("the load %{} is read before it is made", v.0));
            return None;
        };
        let f = &mut self.t.f;
        let masked = words.into_iter().map(|word| match word.ty() {
            Ty::F32 => {
                let bits = f.cast("bitcast", word, Ty::I32);
                let bits = f.bin("and", bits, mask);
                f.cast("bitcast", bits, Ty::F32)
            }
            Ty::I32 => f.bin("and", word, mask),
            ty => {
                let mask = f.cast("trunc", mask, ty);
                f.bin("and", word, mask)
            }
        });
        Some(masked.collect())
    }

    /// Whether a tile is evaluated to see what it loads, and not for its elements.
    pub fn is_collecting(&self) -> bool {
        self.held.collecting.is_some()
    }

    /// Elements of nothing.
    pub fn nothing(&self, v: ValueId, n: u32) -> Vec<Val> {
        let ty = isa::stored(self.dtype(v));
        vec![if ty == Ty::F32 { f32(0.0) } else { Val::Int(0, ty) }; n as usize]
    }

    /// Elements of a load for the present piece.
    pub fn held_chunk(&mut self, v: ValueId, at: &[Val], n: u32) -> Vec<Val> {
        let ty = isa::stored(self.dtype(v));
        let Some(words) = self.held_words(v, at, n) else { return self.nothing(v, n) };
        if words.first().is_none_or(|w| w.ty() == ty) {
            return words;
        }
        let (per, bits) = (4 / ty.bytes(), 8 * ty.bytes());
        let f = &mut self.t.f;
        let element = |i: u32| {
            let part = f.bin("lshr", words[(i / per) as usize], i32((i % per * bits).into()));
            f.cast("trunc", part, ty)
        };
        (0..n).map(element).collect()
    }

    /// Registers of a load, as a loop carries them.
    pub fn held_registers(&self, v: ValueId) -> Vec<Val> {
        let pieces = self.held.moved.get(&v).or_else(|| self.held.pieces.get(&v)).into_iter().flatten();
        pieces.flat_map(|p| p.words.iter().copied().chain([p.mask])).collect()
    }

    /// A loop's argument has what it is given, of the same form.
    pub fn hold_argument(&mut self, arg: ValueId, given: ValueId, values: &[Val]) -> usize {
        let mut pieces = self.held.pieces.get(&given).cloned().unwrap_or_default();
        let mut left = values.iter().copied();
        let mut count = 0;
        for p in &mut pieces {
            for word in p.words.iter_mut().chain([&mut p.mask]) {
                if let Some(v) = left.next() {
                    *word = v;
                    count += 1;
                }
            }
        }
        self.held.pieces.insert(arg, pieces);
        count
    }

    /// Reads inputs of arithmetic on fragments further down, of which `now` says whether they can be; it is told what is made until then.
    pub fn read_early(&mut self, insts: &'a [Inst], now: impl Fn(&Self, ValueId, &HashSet<ValueId>) -> bool) {
        let mut made = HashSet::new();
        for inst in insts {
            made.extend(&inst.results);
            let (Op::Tile(tile::Op::Map { inputs, .. }), [r]) = (&inst.op, &inst.results[..]) else { continue };
            let Place::Fragment(f) = self.place(*r) else { continue };
            let lazy: Vec<ValueId> = inputs.iter().copied().filter(|&v| now(self, v, &made)).collect();
            if lazy.is_empty() {
                continue;
            }
            let (shape, spread) = (self.shape(*r), self.spread(*f, *r));
            for v in lazy {
                let values = self.fragment_input(v, shape, &spread);
                self.early.insert((*r, v), values);
            }
        }
    }

    /// Whether a value is a load from global memory, or a view of one, that depends on none of these.
    pub fn loads_only(&self, v: ValueId, made: &HashSet<ValueId>) -> bool {
        // A view is made wherever it is.
        match (self.place(v), self.definition(v)) {
            (Place::Lazy, Some(tile::Op::Load { index, .. })) => {
                !index.iter().any(|i| matches!(i, Index::Value(v) if made.contains(v)))
            }
            (Place::Lazy, Some(tile::Op::Reshape { x, .. })) => self.loads_only(*x, made),
            _ => false,
        }
    }
}
