//! Tile programs of the lightning indexer, as the compiler's kernel library writes them: scores of all visible keys, as a matrix or with
//! the best `k` of each row selected as they are made.

use dsc_ir::tile::{Access, Builder, Ix, Program, ReduceKind, Stride, ValueId, ViewType};
use dsc_ir::{DType, Extent, Sym};

/// Keys of a page.
pub const PAGE: u32 = 64;
/// Elements of a head.
pub const DIM: u32 = 128;

/// `score[t, s] = scale[s] · Σ_h max(q[t, h] · key[s], 0) · w[t, h]`, −inf beyond the token's position.
#[derive(Clone, Copy, Debug)]
pub struct Scores {
    /// Heads of the indexer.
    pub heads: u32,
    /// Tokens of one sequence that a block takes.
    pub rows: u32,
    /// Pages of keys that a block takes; a block that selects takes all.
    pub pages: u32,
    /// Whether keys lie in pages, of 64 rows and then 64 scales, that a table gives; else as one matrix, with a vector of scales.
    pub paged: bool,
    /// Whether queries have scales.
    pub scaled: bool,
    /// Whether what no token sees is written.
    pub fill: bool,
    /// Keys to select, if any.
    pub select: Option<u32>,
}

fn times(b: &mut Builder, v: ValueId, n: u32) -> ValueId {
    b.map(&[v], |m, v| {
        let n = m.i32(n as i32);
        m.mul(v[0], n)
    })
}

fn product(b: &mut Builder, u: ValueId, v: ValueId) -> ValueId {
    b.map(&[u, v], |m, v| m.mul(v[0], v[1]))
}

impl Scores {
    /// The program. Parameters in order: q `[T, H, 128]`, weights `[T, H]`, query scales `[T, H, 1]` if any, keys, key scales,
    /// positions `[T]`, sequences `[T]` and page table `[S, P]` if paged, result: f32 `[T, C]` or i32 `[T, k]`.
    pub fn program(self, name: &str) -> Program {
        let (h, r) = (self.heads, self.rows);
        let mut b = Builder::new(name);
        let q = b.param("q", DType::E4m3, &[Sym::T.into(), h.into(), DIM.into()], Access::Read);
        let w = b.param("weights", DType::F32, &[Sym::T.into(), h.into()], Access::Read);
        let one = Extent::from(1);
        let qs = self.scaled.then(|| b.param("q_scales", DType::F32, &[Sym::T.into(), h.into(), one], Access::Read));
        let (keys, scales) = if self.paged {
            let bytes = i64::from(PAGE * (DIM + 4));
            let fixed = |bytes: i64| Stride { bytes, sym: None };
            let view = |dtype: DType, shape: &[Extent], strides: &[i64], offset: u64| ViewType {
                dtype,
                shape: shape.to_vec(),
                strides: strides.iter().map(|&s| fixed(s)).collect(),
                offset,
            };
            let keys = view(DType::E4m3, &[Sym::N.into(), PAGE.into(), DIM.into()], &[bytes, i64::from(DIM), 1], 0);
            let scales = view(DType::F32, &[Sym::N.into(), PAGE.into()], &[bytes, 4], u64::from(PAGE * DIM));
            (b.param_view("keys", keys, Access::Read), b.param_view("scales", scales, Access::Read))
        } else {
            let keys = b.param("keys", DType::E4m3, &[Sym::C.into(), DIM.into()], Access::Read);
            (keys, b.param("scales", DType::F32, &[Sym::C.into()], Access::Read))
        };
        let positions = b.param("positions", DType::I32, &[Sym::T.into()], Access::Read);
        let table = self.paged.then(|| {
            let seqs = b.param("seqs", DType::I32, &[Sym::T.into()], Access::Read);
            (seqs, b.param("pages", DType::I32, &[Sym::S.into(), Sym::P.into()], Access::Read))
        });
        let y = match self.select {
            None => b.param("y", DType::F32, &[Sym::T.into(), Sym::C.into()], Access::Write),
            Some(k) => b.param("selected", DType::I32, &[Sym::T.into(), k.into()], Access::Write),
        };
        let chunk = self.select.is_none().then(|| b.grid(Sym::C, PAGE * self.pages));
        let token = b.grid(Sym::T, r);
        let token = times(&mut b, token, r);
        let seq = table.map(|(seqs, pages)| (b.load_scalar(seqs, &[token.into()]), pages));
        let own = b.load(positions, &[token.into()], &[r]);
        let last = b.reduce(own, 0, ReduceKind::Max);
        let last = b.reshape(last, &[]);
        let own = b.reshape(own, &[r, 1]);
        let qt = b.load(q, &[token.into(), 0.into(), 0.into()], &[r, h, DIM]);
        let qt = b.reshape(qt, &[r * h, DIM]);
        let wt = b.load(w, &[token.into(), 0.into()], &[r, h]);
        let mut wt = b.reshape(wt, &[r * h, 1]);
        if let Some(qs) = qs {
            let s = b.load(qs, &[token.into(), 0.into(), 0.into()], &[r, h, 1]);
            let s = b.reshape(s, &[r * h, 1]);
            wt = product(&mut b, wt, s);
        }
        let scores = |b: &mut Builder, j: ValueId| -> ValueId {
            let first = times(b, j, PAGE);
            let (k, s) = match seq {
                Some((seq, pages)) => {
                    let page = b.load_scalar(pages, &[seq.into(), j.into()]);
                    let k = b.load(keys, &[page.into(), 0.into(), 0.into()], &[1, PAGE, DIM]);
                    let k = b.reshape(k, &[PAGE, DIM]);
                    (k, b.load(scales, &[page.into(), 0.into()], &[1, PAGE]))
                }
                None => {
                    let k = b.load(keys, &[first.into(), 0.into()], &[PAGE, DIM]);
                    let s = b.load(scales, &[first.into()], &[PAGE]);
                    (k, b.reshape(s, &[1, PAGE]))
                }
            };
            let dots = b.dot_t(qt, k, None);
            let weighted = b.map(&[dots, wt], |m, v| {
                let zero = m.f32(0.0);
                let relu = m.max(v[0], zero);
                m.mul(relu, v[1])
            });
            let weighted = b.reshape(weighted, &[r, h, PAGE]);
            let sums = b.reduce(weighted, 1, ReduceKind::Sum);
            let sums = b.reshape(sums, &[r, PAGE]);
            let sums = product(b, sums, s);
            let columns = b.iota(1, &[1, PAGE]);
            b.map(&[sums, columns, first, own], |m, v| {
                let key = m.add(v[1], v[2]);
                let (visible, none) = (m.le(key, v[3]), m.f32(f32::NEG_INFINITY));
                m.select(visible, v[0], none)
            })
        };
        let seen = b.map(&[last], |m, v| {
            let (page, one) = (m.i32(PAGE as i32), m.i32(1));
            let whole = m.div(v[0], page);
            m.add(whole, one)
        });
        if let Some(k) = self.select {
            let state = b.topk_init(r, k);
            let state = b.for_(0, seen, 1, &[state], |b, j, state| {
                let scores = scores(b, j);
                let base = times(b, j, PAGE);
                vec![b.topk_push(state[0], scores, base)]
            })[0];
            let (_, numbers) = b.topk_take(state);
            b.store(y, &[token.into(), 0.into()], numbers);
            return b.finish().expect("well-typed");
        }
        let lo = times(&mut b, chunk.expect("a grid axis"), self.pages);
        let context = b.sym(Sym::C);
        let end = b.map(&[lo, context], |m, v| {
            let (pages, up, page) = (m.i32(self.pages as i32), m.i32(PAGE as i32 - 1), m.i32(PAGE as i32));
            let all = m.add(v[1], up);
            let all = m.div(all, page);
            let end = m.add(v[0], pages);
            m.min(end, all)
        });
        let middle = b.map(&[lo, seen, end], |m, v| {
            let most = m.min(v[1], v[2]);
            m.max(most, v[0])
        });
        b.for_(lo, middle, 1, &[], |b, j, _| {
            let scores = scores(b, j);
            let first = times(b, j, PAGE);
            b.store(y, &[token.into(), first.into()], scores);
            vec![]
        });
        if self.fill {
            b.for_(Ix::from(middle), end, 1, &[], |b, j, _| {
                let none = b.full(f32::NEG_INFINITY, &[r, PAGE]);
                let first = times(b, j, PAGE);
                b.store(y, &[token.into(), first.into()], none);
                vec![]
            });
        }
        b.finish().expect("well-typed")
    }
}
