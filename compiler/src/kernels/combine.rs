//! `mqa_combine` by itself: joins the parts of a split attention, where no product takes that in.
//!
//! ```text
//! block = token, tile of heads
//!     m, l = largest, totals                    [h, parts]
//!     w = 2^(m - max m); w = w / Σ w l          0 where nothing was selected
//!     y = Σ_p w_p sums_p                        [h, L]
//! ```
//!
//! Floor: the bytes of the parts, `4 H parts L` a token, once.

use super::linear::tile;
use super::softmax::{normalized, statistics, store_statistics};
use super::view::{Emit, product, times};
use super::{Class, Emitted, KernelError, Part, unsupported};
use dsc_ir::Sym;
use dsc_ir::graph::{Graph, NodeId};
use dsc_ir::schedule::Schedule;
use dsc_ir::tile::{Builder, ReduceKind, ValueId};

/// The kernel of an [`MqaCombine`](dsc_ir::graph::Op::MqaCombine) node.
pub fn emit(graph: &Graph, node: NodeId, schedule: &Schedule, _class: &Class) -> Result<Emitted, KernelError> {
    let &[sums, largest, totals] = graph.inputs(node).as_slice() else {
        return Err(unsupported(graph, node, "mqa_combine without its three inputs"));
    };
    let outputs = graph.dag[node].outputs.len() as u32;
    let mut e = Emit::new(graph, node, None, "mqa_combine");
    let [heads, parts, l] = [e.dim(sums, 1)?, e.dim(sums, 2)?, e.dim(sums, 3)?];
    let h = tile(schedule.tile_h, 1, heads.into());
    let (sums, largest, totals) = (e.read("sums", sums)?, e.read("largest", largest)?, e.read("totals", totals)?);
    let y = e.write("y", 0, Part::Data, None)?;
    let further = statistics(&mut e, |i| (i < outputs).then_some(i))?;
    let b = &mut e.b;
    let token = b.grid(Sym::T, 1);
    let head = b.grid(heads, h);
    let head = times(b, head, h);
    let load = |b: &mut Builder, view: ValueId| {
        let x = b.load(view, &[token.into(), head.into(), 0.into()], &[1, h, parts]);
        b.reshape(x, &[h, parts])
    };
    let (largest, totals) = (load(b, largest), load(b, totals));
    let most = b.reduce(largest, 1, ReduceKind::Max);
    let weights = b.map(&[largest, most], |m, v| {
        let d = m.sub(v[0], v[1]);
        m.exp2(d)
    });
    let total = product(b, weights, totals);
    let total = b.reduce(total, 1, ReduceKind::Sum);
    store_statistics(b, further, (token, head), [most, most], total);
    let weights = normalized(b, total, weights);
    let weights = b.reshape(weights, &[h, parts, 1]);
    let x = b.load(sums, &[token.into(), head.into(), 0.into(), 0.into()], &[1, h, parts, l]);
    let x = b.reshape(x, &[h, parts, l]);
    let x = product(b, x, weights);
    let x = b.reduce(x, 1, ReduceKind::Sum);
    let x = b.reshape(x, &[1, h, l]);
    let to = b.dtype(y);
    let x = b.cast(x, to);
    b.store(y, &[token.into(), head.into(), 0.into()], x);
    e.finish(format!("joins {parts} parts of attention"))
}
