//! Scores of index keys: a page at a time for a selection on chip, or the matrix of them.

use super::select::least;
use super::{output_of, queries, tokens_of_block};
use crate::kernels::cache::{self, Array, Cached};
use crate::kernels::linear::tile;
use crate::kernels::view::{Emit, divided, plus, product, sum, times};
use crate::kernels::{Class, Emitted, KernelError, Part};
use dsc_ir::DType;
use dsc_ir::extent::Sym;
use dsc_ir::graph::{Graph, NodeId, PAGE_TOKENS, Value, ValueType};
use dsc_ir::schedule::Schedule;
use dsc_ir::tile::{Access, Builder, Ix, ReduceKind, ValueId};

/// Where index keys come from, 64 at a time.
enum Keys {
    /// A cache, by the page table of a sequence.
    Paged(Cached, ValueId),
    /// A matrix: elements or codes, and scales.
    Matrix(ValueId, Option<ValueId>, u32),
}

impl Keys {
    fn new(e: &mut Emit, state: Value, pages: Option<Value>) -> Result<Keys, KernelError> {
        if let Some(pages) = pages {
            let keys = cache::array(e, state, Array::Key, Access::Read)?;
            return Ok(Keys::Paged(keys, e.page_table(pages)?));
        }
        let columns = e.dim(state, 1)?;
        let scales = match e.quant(state) {
            Some(quant) if quant.block[0] == 1 && quant.block[1] >= columns => {
                let rows = e.tensor(state).shape[0];
                Some(e.read_as("key_scales", state, Part::Scales, &[rows])?)
            }
            Some(_) => return Err(e.unsupported("index keys with several scales")),
            None => None,
        };
        Ok(Keys::Matrix(e.read("keys", state)?, scales, columns))
    }

    /// Keys `64 j..64 j + 64` of a sequence: `[64, D]`, and their scales.
    fn page(&self, b: &mut Builder, j: ValueId, seq: ValueId) -> (ValueId, Option<ValueId>) {
        match self {
            Keys::Paged(cached, pages) => {
                let page = b.load_scalar(*pages, &[j.into(), seq.into()]);
                cached.page(b, page)
            }
            Keys::Matrix(data, scales, columns) => {
                let row = times(b, j, PAGE_TOKENS);
                let keys = b.load(*data, &[row.into(), 0.into()], &[PAGE_TOKENS, *columns]);
                let scales = scales.map(|s| b.load(s, &[row.into()], &[PAGE_TOKENS]));
                (keys, scales)
            }
        }
    }
}

/// What scoring needs, loaded once a block.
pub(super) struct Indexer {
    q: ValueId,
    weights: ValueId,
    keys: Keys,
    pub(super) seq: ValueId,
    /// First visible column of each row, i32 `[R, 1]`, and the smallest; none: 0.
    starts: Option<(ValueId, ValueId)>,
    /// Last visible column of each row: i32 `[R, 1]`.
    positions: ValueId,
    /// The largest of them.
    last: ValueId,
    shape: [u32; 2],
}

impl Indexer {
    pub(super) fn new(
        e: &mut Emit,
        body: &Graph,
        node: NodeId,
        (rows, token): (u32, ValueId),
        class: &Class,
    ) -> Result<Indexer, KernelError> {
        let inputs = body.inputs(node);
        let &[q, weights, state, ..] = inputs.as_slice() else {
            return Err(e.unsupported("indexer_logits without its inputs"));
        };
        let matrix = matches!(body.ty(state), ValueType::Tensor(_));
        let (ends, seqs, pages) = match (inputs.len(), matrix) {
            (6, false) => (inputs[3], Some(inputs[4]), Some(inputs[5])),
            (5, false) => (inputs[3], None, Some(inputs[4])),
            (5, true) => (inputs[4], None, None),
            _ => return Err(e.unsupported("indexer_logits in none of its forms")),
        };
        let (heads, dim) = (e.dim(q, 1)?, e.dim(q, 2)?);
        let scale = match e.quant(q) {
            Some(quant) if quant.block[0] == 1 && quant.block[1] >= dim => Some(e.read_scales("q_scales", q)?),
            Some(_) => return Err(e.unsupported("index queries with several scales a head")),
            None => None,
        };
        let (qs, ws) = (e.read("q", q)?, e.read("weights", weights)?);
        let keys = Keys::new(e, state, pages)?;
        let positions = e.read(if inputs.len() == 6 { "positions" } else { "ends" }, ends)?;
        let seqs = seqs.map(|seqs| e.read("seqs", seqs)).transpose()?;
        let starts = if matrix { Some(e.read("starts", inputs[3])?) } else { None };
        let b = &mut e.b;
        let seq = match seqs {
            Some(seqs) => b.load_scalar(seqs, &[token.into()]),
            None => divided(b, token, queries(class)),
        };
        let mut positions = b.load(positions, &[token.into()], &[rows]);
        if inputs.len() == 5 {
            let columns = b.sym(Sym::C);
            positions = b.map(&[positions, columns], |m, v| {
                let one = m.i32(1);
                let end = m.min(v[0], v[1]);
                m.sub(end, one)
            });
        }
        let last = b.reduce(positions, 0, ReduceKind::Max);
        let last = b.reshape(last, &[]);
        let positions = b.reshape(positions, &[rows, 1]);
        let starts = starts.map(|starts| {
            let starts = b.load(starts, &[token.into()], &[rows]);
            let starts = b.map(&[starts], |m, v| {
                let zero = m.i32(0);
                m.max(v[0], zero)
            });
            (b.reshape(starts, &[rows, 1]), least(b, starts))
        });
        let q = b.load(qs, &[token.into(), 0.into(), 0.into()], &[rows, heads, dim]);
        let q = b.reshape(q, &[rows * heads, dim]);
        let weights = b.load(ws, &[token.into(), 0.into()], &[rows, heads]);
        let mut weights = b.cast(weights, DType::F32);
        weights = b.reshape(weights, &[rows * heads, 1]);
        if let Some(scale) = scale {
            let scale = b.load(scale, &[token.into(), 0.into(), 0.into()], &[rows, heads, 1]);
            let scale = b.reshape(scale, &[rows * heads, 1]);
            weights = product(b, weights, scale);
        }
        Ok(Indexer { q, weights, keys, seq, starts, positions, last, shape: [rows, heads] })
    }

    /// f32 `[R, 64]`: scores of the keys of page number `j` of the sequence, −inf where a row may not look.
    fn scores(&self, b: &mut Builder, j: ValueId) -> ValueId {
        let [rows, heads] = self.shape;
        let (keys, scales) = self.keys.page(b, j, self.seq);
        let dots = b.dot_t(self.q, keys, None);
        let weighted = b.map(&[dots, self.weights], |m, v| {
            let zero = m.f32(0.0);
            let relu = m.max(v[0], zero);
            m.mul(relu, v[1])
        });
        let weighted = b.reshape(weighted, &[rows, heads, PAGE_TOKENS]);
        let scores = b.reduce(weighted, 1, ReduceKind::Sum);
        let mut scores = b.reshape(scores, &[rows, PAGE_TOKENS]);
        if let Some(scales) = scales {
            let scales = b.reshape(scales, &[1, PAGE_TOKENS]);
            scores = product(b, scores, scales);
        }
        self.masked(b, j, scores)
    }

    /// f32 `[R, 64]`: 0 for visible keys of a page and −inf for others.
    fn unscored(&self, b: &mut Builder, j: ValueId) -> ValueId {
        let zeros = b.full(0.0, &[1, PAGE_TOKENS]);
        self.masked(b, j, zeros)
    }

    /// Scores of page `j`, −inf where a row may not look.
    fn masked(&self, b: &mut Builder, j: ValueId, scores: ValueId) -> ValueId {
        let first = times(b, j, PAGE_TOKENS);
        let columns = b.iota(1, &[1, PAGE_TOKENS]);
        let mut inputs = vec![scores, columns, first, self.positions];
        inputs.extend(self.starts.map(|s| s.0));
        b.map(&inputs, |m, v| {
            let key = m.add(v[1], v[2]);
            let (mut visible, none) = (m.le(key, v[3]), m.f32(f32::NEG_INFINITY));
            if let Some(&start) = v.get(4) {
                let begun = m.le(start, key);
                visible = m.and(visible, begun);
            }
            m.select(visible, v[0], none)
        })
    }

    /// At least as many columns, less one, as a row may look at.
    pub(super) fn span(&self, b: &mut Builder) -> ValueId {
        let Some((_, start)) = self.starts else { return self.last };
        b.map(&[self.last, start], |m, v| m.sub(v[0], v[1]))
    }

    /// i32 `[R, k]`: the visible columns, then −1.
    pub(super) fn all_visible(&self, b: &mut Builder, k: u32) -> ValueId {
        let mut numbers = b.iota(1, &[self.shape[0], k]);
        if let Some((starts, _)) = self.starts {
            numbers = sum(b, numbers, starts);
        }
        b.map(&[numbers, self.positions], |m, v| {
            let (visible, none) = (m.le(v[0], v[1]), m.i32(-1));
            m.select(visible, v[0], none)
        })
    }

    /// i32 `[R, k]`.
    pub(super) fn select(&self, b: &mut Builder, k: u32) -> ValueId {
        let pages = divided(b, self.last, PAGE_TOKENS);
        let pages = plus(b, pages, 1);
        let first: Ix = match self.starts {
            Some((_, start)) => divided(b, start, PAGE_TOKENS).into(),
            None => 0.into(),
        };
        let state = b.topk_init(self.shape[0], k);
        let state = b.for_(first, pages, 1, &[state], |b, j, state| {
            let scores = self.scores(b, j);
            let base = times(b, j, PAGE_TOKENS);
            vec![b.topk_push(state[0], scores, base)]
        })[0];
        b.topk_take(state).1
    }
}

/// The `[T, C]` matrix of indexer logits.
pub(super) fn logits(
    mut e: Emit,
    body: &Graph,
    node: NodeId,
    select_all_below: u32,
    schedule: &Schedule,
    class: &Class,
) -> Result<Emitted, KernelError> {
    let operands = body.inputs(node).len();
    let rows = tokens_of_block(schedule, class, operands);
    // Blocks that divide rounds take them from whole rows.
    let columns = if schedule.ranges { class.max.get(Sym::C) } else { schedule.tile_n };
    let pages = tile(columns, PAGE_TOKENS, class.max.get(Sym::C).into()).div_ceil(PAGE_TOKENS);
    let chunk = if schedule.ranges { e.b.full_i32(0, &[]) } else { e.b.grid(Sym::C, PAGE_TOKENS * pages) };
    let token = e.b.grid(Sym::T, rows);
    let token = times(&mut e.b, token, rows);
    let indexer = Indexer::new(&mut e, body, node, (rows, token), class)?;
    let output = output_of(body, node).ok_or_else(|| e.unsupported("logits that nothing reads"))?;
    let y = e.write("y", output, Part::Data, None)?;
    let b = &mut e.b;
    let lo = times(b, chunk, pages);
    let context = b.sym(Sym::C);
    // Pages that some token sees, if any are scored, then the others.
    let end = b.map(&[lo, context], |m, v| {
        let (pages, up, page) = (m.i32(pages as i32), m.i32(PAGE_TOKENS as i32 - 1), m.i32(PAGE_TOKENS as i32));
        let (end, all) = (m.add(v[0], pages), m.add(v[1], up));
        let all = m.div(all, page);
        m.min(end, all)
    });
    let middle = b.map(&[lo, end, indexer.last, context], |m, v| {
        let (up, page, below) = (m.i32(PAGE_TOKENS as i32), m.i32(PAGE_TOKENS as i32), m.i32(select_all_below as i32));
        // The last column may be −1.
        let seen = m.add(v[2], up);
        let seen = m.div(seen, page);
        let seen = m.min(seen, v[1]);
        let long = m.lt(below, v[3]);
        let scored = m.max(seen, v[0]);
        m.select(long, scored, v[0])
    });
    let first = match indexer.starts {
        Some((_, start)) => b.map(&[lo, start], |m, v| {
            let page = m.i32(PAGE_TOKENS as i32);
            let first = m.div(v[1], page);
            m.max(first, v[0])
        }),
        None => lo,
    };
    b.for_(first, middle, 1, &[], |b, j, _| {
        let scores = indexer.scores(b, j);
        let first = times(b, j, PAGE_TOKENS);
        b.store(y, &[token.into(), first.into()], scores);
        vec![]
    });
    if operands == 5 {
        // Nobody looks at other pages.
        return e.finish(format!("indexer logits, {pages} pages a block, where they are visible"));
    }
    b.for_(middle, end, 1, &[], |b, j, _| {
        let scores = indexer.unscored(b, j);
        let first = times(b, j, PAGE_TOKENS);
        b.store(y, &[token.into(), first.into()], scores);
        vec![]
    });
    e.finish(format!("indexer logits, {pages} pages a block"))
}
