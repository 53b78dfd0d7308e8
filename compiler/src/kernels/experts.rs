//! Mixture of experts: `route` and `expert_linear`.
//!
//! `route` sorts the flat rows `t·k + j` by expert: a counting sort in one block. Rows come in chunks; a chunk's one-hot matrix
//! `[rows, E]` gives its counts by a sum over rows and each row's rank in its expert by a running sum over rows.
//! Pass one counts, a running sum over experts gives `offsets`; pass two scatters each row's number to `start + rank`. Exact
//! and the same on every run, for any number of rows. Cost: `2 T k E` additions of integers. With `tile_n` in the schedule a block does so
//! for that many experts, on devices that run many blocks at once.
//!
//! `expert_linear`: a block takes one expert and `tile_n` outputs, and loops over the expert's rows (none, for most experts of a
//! decode step) by `tile_m`: gathers rows of `x` through `order` (row `order / k` where all experts of a token share its row;
//! sorted rows lie together),
//! multiplies as [`linear`](super::linear) does, and scatters to the flat rows of the result. Each expert's weights are read
//! once while its rows fit one tile. Where a step has fewer rows than there are experts, a block takes a place of `order` instead of an
//! expert, and works if a group starts there: there are as many as rows. Floors: `2 T k N K` operations; the weights of the experts that occur.

use super::epilogue::Epilogue;
use super::linear::{Contraction, LoadScales, WeightRows, k_step, tile};
use super::view::{Emit, divided, extent, plus, range, remainder, sum, times, where_below};
use super::{Class, Emitted, KernelError, Part, elem_name, unsupported};
use dsc_ir::graph::{Graph, NodeId, Op, Value};
use dsc_ir::schedule::Schedule;
use dsc_ir::tile::{Builder, Ix, ReduceKind, ValueId};
use dsc_ir::{DType, Extent};

/// Blocks that share an expert's rows where there are more rows than a tile for every expert, but not several.
const ROW_PARTS: u32 = 4;

/// Rows of a tile that can be left out together.
const GRAIN: u32 = 64;

/// The kernel of a grouped [`Op::ExpertLinear`] node, or of a fused one.
pub fn emit(graph: &Graph, node: NodeId, schedule: &Schedule, class: &Class) -> Result<Emitted, KernelError> {
    let fused = super::body_of(graph, node)?;
    let body = &fused.body;
    let epilogue = Epilogue::of(graph, node, body)?;
    let Op::ExpertLinear { per_token, x_sorted, y_sorted } = body.dag[epilogue.product].op else {
        return Err(unsupported(graph, node, "not an expert_linear"));
    };
    let (x, w, order, offsets, owners) = match *body.inputs(epilogue.product).as_slice() {
        [x, w, order, offsets] => (x, w, order, offsets, None),
        [x, w, order, offsets, owners] => (x, w, order, offsets, Some(owners)),
        _ => return Err(unsupported(graph, node, "expert_linear without routing: run group_experts first")),
    };
    let types = [body.ty(x), body.ty(w), &graph.dag[node].outputs[0]].map(elem_name);
    let shape = &body.tensor(w).shape;
    let (experts, rows_of_w, k) = (shape[0].factor, shape[1].factor, shape[2].factor);
    let shared = body.tensor(x).shape.len() == 2;
    let rows = match (shared, x_sorted) {
        (true, _) => "shared",
        (_, false) => "own",
        (_, true) => "sorted",
    };
    let form = format!("{}_{rows}{}", epilogue.name(), if y_sorted { "_to_sorted" } else { "" });
    let name = format!("expert_linear{form}_{}_{}_{}_e{experts}_n{rows_of_w}_k{k}", types[0], types[1], types[2]);
    let mut e = Emit::new(graph, node, Some(body), &name);
    let n = epilogue.columns(rows_of_w);
    let flat = e.tensor(order).shape[0];
    let step = k_step(&e, x, w, schedule)?;
    let tm = tile(schedule.tile_m, 16, flat.eval(&class.max));
    let tn = epilogue.tile_n(tile(schedule.tile_n, 64, n.into()));
    let (qx, qw) = (e.quant(x), e.quant(w));
    let x_rows: Extent = if shared { e.tensor(x).shape[0] } else { flat };
    let xs = e.read_as("x", x, Part::Data, &[x_rows, k.into()])?;
    let ws = e.read_as("w", w, Part::Data, &[(experts * rows_of_w).into(), k.into()])?;
    let sx = match qx {
        Some(q) => Some(e.read_as("x_scales", x, Part::Scales, &[x_rows, k.div_ceil(q.block[1]).into()])?),
        None => None,
    };
    let sw = match qw {
        Some(q) => {
            let (rows, columns) = (rows_of_w.div_ceil(q.block[0]), k.div_ceil(q.block[1]));
            let shape = [(experts * rows).into(), columns.into()];
            let (arg, view) = e.view(w, Part::Scales)?;
            let view = super::view::reshape_view(&view, &shape).ok_or_else(|| e.unsupported("scales of experts"))?;
            Some((e.param("w_scales", arg, view, dsc_ir::tile::Access::Read), q.block[0], rows))
        }
        None => None,
    };
    let (orders, bounds) = (e.read("order", order)?, e.read("offsets", offsets)?);
    let owners = owners.map(|owners| e.read("owners", owners)).transpose()?;
    let y = epilogue.write(&mut e, 0, n, &|columns| vec![flat, columns.into()])?;

    let b = &mut e.b;
    let most = flat.eval(&class.max);
    // Where every expert has several tall tiles, blocks take turns at them along an axis of their own: all columns of one part are neighbours,
    // and blocks have about as much to do each. Else one expert may still have all rows; then parts are neighbours, and find the expert's
    // weights in the cache.
    let each = most / u64::from(experts.max(1));
    let apart = owners.is_none() && tm > 2 * GRAIN && each >= u64::from(2 * tm);
    let parts = match most > u64::from(experts * tm) {
        true if apart => each.div_ceil(tm.into()) as u32,
        true => ROW_PARTS,
        false => 1,
    };
    let groups = if owners.is_some() { most as u32 } else { experts };
    let columns = n.div_ceil(tn);
    let place = b.grid(if apart { columns } else { columns * parts }, 1);
    let own_axis = apart.then(|| b.grid(parts, 1));
    let group = b.grid(groups, 1);
    let column = if apart { place } else { divided(b, place, parts) };
    let n0 = times(b, column, tn);
    let part = own_axis.unwrap_or_else(|| remainder(b, place, parts));
    // From the last on: a shared expert is the last, has every row, and should not be what all others wait for.
    let group = b.map(&[group], |m, v| {
        let last = m.i32(groups as i32 - 1);
        m.sub(last, v[0])
    });
    let expert = owners.map_or(group, |owners| b.load_scalar(owners, &[group.into()]));
    let row = times(b, expert, rows_of_w);
    let row = sum(b, row, n0);
    let first_scale = sw.map(|(_, _, rows)| times(b, expert, rows));
    let lo = b.load_scalar(bounds, &[expert.into()]);
    let next = plus(b, expert, 1);
    let hi = b.load_scalar(bounds, &[next.into()]);
    // A place in the middle of a group has nothing to do, nor has one behind the last row, whatever its owner.
    let lo = match owners {
        Some(_) => b.map(&[lo, group, hi], |m, v| {
            let starts = m.eq(v[0], v[1]);
            m.select(starts, v[0], v[2])
        }),
        None => lo,
    };
    let latest = apart.then(|| latest_tile(b, [lo, hi], tm));
    let first = times(b, part, tm);
    let start = sum(b, lo, first);
    b.for_(start, hi, tm * parts, &[], |b, at, _| {
        let [at, hi] = latest.map_or([at, hi], |latest| tile_among(b, [at, latest, hi], tm));
        let place = range(b, at, tm);
        let order = (!x_sorted || !y_sorted).then(|| b.load(orders, &[at.into()], &[tm]));
        let to = where_below(b, order.filter(|_| !y_sorted).unwrap_or(place), place, hi);
        let from = order.filter(|_| !x_sorted).map(|order| {
            let source = if shared { divided(b, order, per_token) } else { order };
            where_below(b, source, place, hi)
        });
        // Of sorted rows, those behind the group's end are another's: what becomes of them is not stored.
        let rows = move |b: &mut Builder, view: ValueId, column: Ix, width: u32| match from {
            Some(from) => b.gather(view, from, &[column], &[tm, width]),
            None => b.load(view, &[at.into(), column], &[tm, width]),
        };
        let left = |b: &mut Builder, kk: Ix, width: u32| rows(b, xs, kk, width);
        let left_scales = sx.map(|s| move |b: &mut Builder, block: ValueId| rows(b, s, block.into(), 1));
        // A ragged tile of outputs reads into the next expert (or from gate into up); those columns are not stored.
        let scales = sw.map(|(view, share, _)| (view, share, first_scale));
        let weight = WeightRows { view: ws, first: [row, n0], n: tn, scales };
        let product = Contraction {
            shape: [tm, tn],
            k,
            step,
            part: None,
            left: &left,
            left_scales: left_scales.as_ref().map(|f| f as &LoadScales),
            rights: weight.at(&epilogue.offsets(n)),
            transposed: true,
        };
        let accs = product.emit(b);
        epilogue.finish(b, y, accs, n0, &|b, view, column, x| {
            let dtype = b.dtype(view);
            let x = b.cast(x, dtype);
            b.scatter(view, to, &[column.into()], x);
        });
        vec![]
    });
    let what = epilogue.what();
    let matrices = format!("{experts} of [{rows_of_w} x {k}]{what}");
    e.finish(format!("expert_linear {} x {}: {matrices}, {per_token} a token", types[0], types[1]))
}

/// Where the last tile of rows `lo .. hi` starts at the latest: so that it has half a tile's rows or all there are, not a few that leave most of
/// a block idle.
fn latest_tile(b: &mut Builder, [lo, hi]: [ValueId; 2], tm: u32) -> ValueId {
    let least = (tm / 2).next_multiple_of(GRAIN);
    b.map(&[lo, hi], |m, v| {
        let [up, grain, least] = [GRAIN - 1, GRAIN, least].map(|n| m.i32(n as i32));
        let rows = m.sub(v[1], v[0]);
        let rows = m.add(rows, up);
        let rows = m.div(rows, grain);
        let rows = m.mul(rows, grain);
        let last = m.sub(rows, least);
        let zero = m.i32(0);
        let last = m.max(last, zero);
        m.add(v[0], last)
    })
}

/// Where the tile at `at` starts and ends, if the last one starts at `latest` and ends at `end`.
fn tile_among(b: &mut Builder, [at, latest, end]: [ValueId; 3], tm: u32) -> [ValueId; 2] {
    let start = b.map(&[at, latest], |m, v| m.min(v[0], v[1]));
    let next = plus(b, at, tm as i32);
    let end = b.map(&[next, latest, end], |m, v| {
        let more = m.lt(v[0], v[2]);
        let end = m.min(v[0], v[1]);
        m.select(more, end, v[2])
    });
    [start, end]
}

/// Lines of all its experts that a block of a route ranks by, one a thread; and of one of them at least.
const ALL_LINES: u32 = 256;
const LINES: u32 = 32;

/// The kernel of an [`Op::Route`] node.
pub fn emit_route(graph: &Graph, node: NodeId, schedule: &Schedule, class: &Class) -> Result<Emitted, KernelError> {
    let Op::Route { experts } = graph.dag[node].op else {
        return Err(unsupported(graph, node, "not a route"));
    };
    let ids = graph.inputs(node)[0];
    let mut e = Emit::new(graph, node, None, &format!("route_e{experts}"));
    let flat = graph.tensor(Value { node, output: 0 }).shape[0];
    let chunk = tile(schedule.tile_m, 64, flat.eval(&class.max));
    let ids = e.read_as("experts", ids, Part::Data, &[flat])?;
    let (order, offsets) = (e.write("order", 0, Part::Data, None)?, e.write("offsets", 1, Part::Data, None)?);
    let owners = e.write("owners", 2, Part::Data, None)?;

    if schedule.tile_n > 0 {
        let whole = u64::from(chunk) >= flat.eval(&class.max);
        route_by_experts(&mut e.b, (ids, flat, experts), [order, offsets, owners], ([schedule.tile_n, chunk], whole));
        return e.finish(format!("route: {flat} rows to {experts} experts"));
    }
    let b = &mut e.b;
    b.grid(1, 1);
    let rows = extent(b, flat);
    let counts = b.full_i32(0, &[1, experts]);
    let counts = b.for_(0, rows, chunk, &[counts], |b, at, counts| {
        let hot = one_hot(b, ids, at, rows, [chunk, experts]);
        let more = b.reduce(hot, 0, ReduceKind::Sum);
        vec![sum(b, counts[0], more)]
    })[0];
    let ends = b.scan(counts, 1, ReduceKind::Sum);
    let zero = b.full_i32(0, &[1]);
    b.store(offsets, &[0.into()], zero);
    let flat_ends = b.reshape(ends, &[experts]);
    b.store(offsets, &[1.into()], flat_ends);
    let starts = b.map(&[ends, counts], |m, v| m.sub(v[0], v[1]));
    b.for_(0, rows, chunk, &[starts], |b, at, next| {
        let hot = one_hot(b, ids, at, rows, [chunk, experts]);
        let ranks = b.scan(hot, 0, ReduceKind::Sum);
        // start + rank where the row's expert is, -1 elsewhere: the maximum finds it, and leaves -1 for rows past the end.
        let places = b.map(&[hot, ranks, next[0]], |m, v| {
            let (one, none) = (m.i32(1), m.i32(-1));
            let place = m.add(v[1], v[2]);
            let place = m.sub(place, one);
            let here = m.eq(v[0], one);
            m.select(here, place, none)
        });
        let places = b.reduce(places, 1, ReduceKind::Max);
        let places = b.reshape(places, &[chunk]);
        let numbers = range(b, at, chunk);
        b.scatter(order, places, &[], numbers);
        let experts = b.load(ids, &[at.into()], &[chunk]);
        b.scatter(owners, places, &[], experts);
        let more = b.reduce(hot, 0, ReduceKind::Sum);
        vec![sum(b, next[0], more)]
    });
    e.finish(format!("route: {flat} rows to {experts} experts"))
}

/// The route where each block takes `own` experts and looks at all rows, `chunk` at a time: once to count its experts' rows and those of
/// experts before them, which says where each of its groups starts, then once more for ranks. No block waits for another.
///
/// Ranks are sums along lines that each thread walks by itself; a line is of odd length, so that the threads of a warp meet no other's
/// memory bank.
fn route_by_experts(
    b: &mut Builder,
    (ids, flat, experts): (ValueId, Extent, u32),
    [order, offsets, owners]: [ValueId; 3],
    ([own, chunk], whole): ([u32; 2], bool),
) {
    let lines = (1 << (ALL_LINES / own).max(LINES).ilog2()).min(chunk);
    // All rows of a step at once, if that is what a chunk is to have.
    let len = if whole { chunk.div_ceil(lines) } else { (chunk / lines).saturating_sub(1) } | 1;
    let chunk = lines * len;
    // One expert more than there are: its group is empty, and starts where the last one ends.
    let first = b.grid(experts + 1, own);
    let first = times(b, first, own);
    let rows = extent(b, flat);
    let mine = b.iota(0, &[own, 1, 1]);
    let mine = b.map(&[mine, first], |m, v| m.add(v[0], v[1]));
    let load = |b: &mut Builder, at: ValueId| {
        let numbers = range(b, at, chunk);
        let x = b.load(ids, &[at.into()], &[chunk]);
        let x = where_below(b, x, numbers, rows);
        let x = b.map(&[x], |m, v| {
            let (experts, none) = (m.i32(experts as i32), m.i32(-1));
            let known = m.lt(v[0], experts);
            m.select(known, v[0], none)
        });
        (x, b.reshape(x, &[1, lines, len]), numbers)
    };
    let hot = |b: &mut Builder, ids: ValueId| {
        b.map(&[ids, mine], |m, v| {
            let (one, zero) = (m.i32(1), m.i32(0));
            let here = m.eq(v[0], v[1]);
            m.select(here, one, zero)
        })
    };
    let counted = |b: &mut Builder, hot: ValueId| {
        let by_line = b.reduce(hot, 2, ReduceKind::Sum);
        (by_line, b.reduce(by_line, 1, ReduceKind::Sum))
    };
    let init = [b.full_i32(0, &[own, 1, 1]), b.full_i32(0, &[1, 1, 1])];
    let counts = b.for_(0, rows, chunk, &init, |b, at, carried| {
        let (_, ids, _) = load(b, at);
        let here = hot(b, ids);
        let (_, here) = counted(b, here);
        let before = b.map(&[ids, first], |m, v| {
            let (one, zero) = (m.i32(1), m.i32(0));
            let (some, lower) = (m.le(zero, v[0]), m.lt(v[0], v[1]));
            let both = m.and(some, lower);
            m.select(both, one, zero)
        });
        let (_, before) = counted(b, before);
        vec![sum(b, carried[0], here), sum(b, carried[1], before)]
    });
    let ends = b.scan(counts[0], 0, ReduceKind::Sum);
    let starts = b.map(&[ends, counts[0], counts[1]], |m, v| {
        let start = m.sub(v[0], v[1]);
        m.add(start, v[2])
    });
    let flat_starts = b.reshape(starts, &[own]);
    b.store(offsets, &[first.into()], flat_starts);
    b.for_(0, rows, chunk, &[starts], |b, at, next| {
        let (known, ids, numbers) = load(b, at);
        let here = hot(b, ids);
        let ranks = b.scan(here, 2, ReduceKind::Sum);
        let (by_line, all) = counted(b, here);
        let ends = b.scan(by_line, 1, ReduceKind::Sum);
        let before = b.map(&[ends, by_line, next[0]], |m, v| {
            let before = m.sub(v[0], v[1]);
            m.add(before, v[2])
        });
        // The place where the row's expert is, -1 elsewhere: the maximum finds it.
        let places = b.map(&[here, ranks, before], |m, v| {
            let (one, none) = (m.i32(1), m.i32(-1));
            let place = m.add(v[1], v[2]);
            let place = m.sub(place, one);
            let hit = m.eq(v[0], one);
            m.select(hit, place, none)
        });
        let places = b.reduce(places, 0, ReduceKind::Max);
        let places = b.reshape(places, &[chunk]);
        b.scatter(order, places, &[], numbers);
        b.scatter(owners, places, &[], known);
        vec![sum(b, next[0], all)]
    });
}

/// i32 `[rows, experts]`: 1 where the row's expert is the column; rows past the end have none.
fn one_hot(b: &mut Builder, ids: ValueId, at: ValueId, end: ValueId, [rows, experts]: [u32; 2]) -> ValueId {
    let ids = b.load(ids, &[at.into()], &[rows]);
    let numbers = range(b, at, rows);
    let ids = where_below(b, ids, numbers, end);
    debug_assert!(b.dtype(ids) == DType::I32);
    let ids = b.reshape(ids, &[rows, 1]);
    let columns = b.iota(1, &[1, experts]);
    b.map(&[ids, columns], |m, v| {
        let (one, zero) = (m.i32(1), m.i32(0));
        let here = m.eq(v[0], v[1]);
        m.select(here, one, zero)
    })
}
