#!/usr/bin/env python3
"""Checks every operation of a kernel library on this machine's GPU against float32 torch, with ragged rows, empty rows, invalid
indices and rows that are NaN outside what may be looked at; the same bits on a rerun, and from a captured graph.

    PYTHONPATH=python DSC_LIBRARY=target/release/libdsc_capi.so python3 tests/bench/library.py dsa.dsc [OUT.json]
"""
import json
import sys

import dsc_kernels
import torch

DEV, FP8 = "cuda", torch.float8_e4m3fn
lib = dsc_kernels.open(sys.argv[1])
f = lib.facts
H, HI, D, L, R, K, SCALE = (f[n] for n in ("heads", "index_heads", "index_dim", "latent", "rope", "topk", "scale"))
results, failed = [], []
torch.manual_seed(3)


def fp8(*shape, mul=100.0):
    return (torch.randn(*shape, device=DEV) * mul).clamp_(-448, 448).to(FP8)


def index_pages(n):
    p = torch.empty(n, 64 * (D + 4), dtype=torch.uint8, device=DEV)
    p[:, :64 * D] = fp8(n, 64 * D).view(torch.uint8)
    p[:, 64 * D:] = (torch.rand(n, 64, device=DEV) * 0.01 + 0.005).view(torch.uint8)
    return p.view(n, 64, 1, D + 4)


def latent_pages(n):
    g = L // 128
    p = torch.zeros(n, 64, L + 4 * g + 2 * R, dtype=torch.uint8, device=DEV)
    p[..., :L] = fp8(n, 64, L).view(torch.uint8)
    p[..., L:L + 4 * g] = torch.pow(2.0, torch.randint(-8, -5, (n, 64, g), device=DEV).float()).view(torch.uint8)
    p[..., L + 4 * g:] = torch.randn(n, 64, R, device=DEV).bfloat16().view(torch.uint8)
    return p[:, :, None]


def latent_rows(pages):
    g = L // 128
    p = pages.reshape(-1, pages.shape[-1])
    scales = p[:, L:L + 4 * g].contiguous().view(torch.float32).repeat_interleave(128, -1)
    rope = p[:, L + 4 * g:].contiguous().view(torch.bfloat16).float()
    return torch.cat([p[:, :L].contiguous().view(FP8).float() * scales, rope], -1)


def scores(q, k, scale, w):
    return torch.cat([torch.einsum("mht,mh->mt", torch.einsum("mhd,td->mht", q[i:i + 32].float(), k).relu_(), w[i:i + 32])
                      for i in range(0, len(q), 32)]) * scale


def attend(q, rows, idx):
    """Reference of one batch of rows: out, lse, largest."""
    out, lse, most = [], [], []
    for t in range(len(q)):
        sel = idx[t][(idx[t] >= 0) & (idx[t] < len(rows))].long()
        k = rows[sel]
        s = q[t].float() @ k.T * SCALE
        out.append(torch.softmax(s, -1) @ k[:, :L] if len(sel) else torch.zeros(len(q[t]), L, device=DEV))
        lse.append(torch.logsumexp(s, -1) if len(sel) else torch.full((len(q[t]),), float("inf"), device=DEV))
        most.append(s.amax(-1) if len(sel) else torch.full((len(q[t]),), float("-inf"), device=DEV))
    return torch.stack(out), torch.stack(lse), torch.stack(most)


def report(op, case, ok, **numbers):
    results.append(dict(op=op, case=case, ok=bool(ok), **numbers))
    if not ok:
        failed.append(op)
    print("ok  " if ok else "FAIL", op, case, numbers, flush=True)


def close(a, b, rel):
    """Largest difference relative to the larger of the element and its tensor's root mean square; infinities must be equal."""
    a, b = a.float(), b.float()
    inf = torch.isinf(b)
    if not torch.equal(torch.isinf(a), inf) or not torch.equal(a[inf], b[inf]) or torch.isnan(a).any():
        return float("nan"), False
    a, b = a[~inf], b[~inf]
    if not len(a):
        return 0.0, True
    e = ((a - b).abs() / b.abs().clamp_min(b.pow(2).mean().sqrt() + 1e-30)).max().item()
    return e, e <= rel


def repeats(call, look=lambda x: x):
    """Results, and whether what `look` sees of them has the same bits in a rerun and from a captured graph."""
    first = [x.clone() for x in call()]
    again = [x.clone() for x in call()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()
    for x in kept:
        x.view(torch.uint8).fill_(0x55)
    graph.replay()
    torch.cuda.synchronize()
    bits = [look(x).contiguous().view(torch.uint8) for x in (*first, *again, *kept)]
    n = len(first)
    return first, all(torch.equal(bits[i], bits[i + n]) and torch.equal(bits[i], bits[i + 2 * n]) for i in range(n))


def check_selection(op, case, got, x, starts, ends):
    ok = True
    for t in range(len(x)):
        row, lo, hi = x[t], int(starts[t]), int(ends[t])
        n = min(K, hi - lo)
        # A stable sort in descending order puts the lowest column first among equals.
        best = torch.sort(row[lo:hi], descending=True, stable=True).indices[:n].sort().values + lo
        sel = got[t][:n].long()
        ok &= torch.equal(sel, best) and bool((got[t][n:] == -1).all())
    report(op, case, ok)


def section_logits():
    for s, n, ctx in ((1, 1, 5000), (3, 1, 2100), (4, 2, 8192), (70, 1, 640), (70, 2, 900), (300, 2, 640)):
        pages = -(-ctx // 64)
        pool, table = index_pages(s * pages + 3), torch.randperm(s * pages + 3, device=DEV)[:s * pages].int().view(s, pages)
        ends = torch.randint(0, ctx + 1, (s, n), device=DEV, dtype=torch.int32)
        ends[0] = ctx
        q, w = fp8(s, n, HI, D), torch.randn(s * n, HI, device=DEV)
        out = torch.full((s * n, pages * 64), float("nan"), device=DEV)
        seen = torch.arange(pages * 64, device=DEV)[None] < ends.view(-1, 1)
        (got,), same = repeats(lambda: [lib.paged_logits(q, pool, w, ends, table, out=out)], lambda x: x[seen])
        worst = 0.0
        for i in range(s * n):
            e = int(ends.view(-1)[i])
            pg = pool[table[i // n].long()].view(-1, 64 * (D + 4))
            k = pg[:, :64 * D].contiguous().view(FP8).float().view(-1, D)
            ks = pg[:, 64 * D:].contiguous().view(torch.float32).view(-1)
            worst = max(worst, close(got[i, :e], scores(q.view(-1, HI, D)[i:i + 1], k, ks, w[i:i + 1])[0, :e], 1)[0] if e else 0.0)
        report("paged_logits", (s, n, ctx), worst < 2e-3 and same, worst=worst, same_bits=same)
    for t, c in ((7, 1000), (200, 4100)):
        q, k, ks, w = fp8(t, HI, D), fp8(c, D), torch.rand(c, device=DEV) * 0.01 + 0.005, torch.randn(t, HI, device=DEV)
        ends = torch.randint(1, c + 1, (t,), device=DEV, dtype=torch.int32)
        starts = (ends - 900).clamp_min(0)
        out = torch.full((t, c), float("nan"), device=DEV)
        j = torch.arange(c, device=DEV)[None]
        mask = (j >= starts[:, None]) & (j < ends[:, None])
        (got,), same = repeats(lambda: [lib.ragged_logits(q, k, ks, w, starts, ends, out=out)], lambda x: x[mask])
        e, ok = close(got[mask], scores(q, k.float(), ks, w)[mask], 2e-3)
        report("ragged_logits", (t, c), ok and same, worst=e, same_bits=same)


def section_topk():
    for t, c in ((1, 5000), (3, 20480), (40, 3000), (100, 9000)):
        bases = {"normal": torch.randn(t, c, device=DEV), "equal": torch.full((t, c), 1.5, device=DEV),
                 "low bits": (torch.full((t, c), 0x3F800000, dtype=torch.int32, device=DEV)
                              + torch.randint(0, 1024, (t, c), device=DEV, dtype=torch.int32)).view(torch.float32)}
        for name, x in bases.items():
            ends = torch.randint(0, c + 1, (t,), device=DEV, dtype=torch.int32)
            ends[0] = c
            x = x.masked_fill(torch.arange(c, device=DEV)[None] >= ends[:, None], float("nan"))
            (got,), same = repeats(lambda: [lib.topk_decode(x, ends)])
            check_selection("topk_decode", (t, c, name), got, x, torch.zeros_like(ends), ends)
            starts = ends // 3
            (got,), same2 = repeats(lambda: [lib.topk_prefill(x, starts, ends)])
            check_selection("topk_prefill", (t, c, name), got, x, starts, ends)
            if not (same and same2):
                report("topk", (t, c, name), False, same_bits=False)


def some_selection(t, bound):
    idx = torch.stack([torch.randperm(bound, device=DEV)[torch.arange(K, device=DEV) % bound] for _ in range(t)]).int()
    if t > 2:
        idx[1] = -1
        idx[2, ::3] = -1
        idx[2, 1::7] = bound + 5
    return idx


def section_mla():
    pool = latent_pages(80)
    rows = latent_rows(pool)
    for s, n in ((1, 1), (3, 1), (4, 2), (20, 1), (70, 1)):
        q, idx = torch.randn(s, n, H, L + R, device=DEV).bfloat16(), some_selection(s * n, 80 * 64)
        (out, lse), same = repeats(lambda: lib.mla_decode(q, pool, idx.view(s, n, K)))
        ref = attend(q.view(-1, H, L + R), rows, idx)
        (e, ok), (e2, ok2) = close(out.view(-1, H, L), ref[0], 2e-2), close(lse.view(-1, H), ref[1], 1e-4)
        report("mla_decode", (s, n), ok and ok2 and same, out=e, lse=e2, same_bits=same)
    for t, c in ((5, 3000), (150, 2500)):
        q, kv = torch.randn(t, H, L + R, device=DEV).bfloat16(), torch.randn(c, 1, L + R, device=DEV).bfloat16()
        idx = some_selection(t, c)
        (out, most, lse), same = repeats(lambda: lib.mla_prefill(q, kv, idx.view(t, 1, K)))
        ref = attend(q, kv[:, 0].float(), idx)
        e = [close(a, b, r) for a, b, r in ((out, ref[0], 2e-2), (lse, ref[1], 1e-4), (most, ref[2], 1e-4))]
        report("mla_prefill", (t, c), all(x[1] for x in e) and same, out=e[0][0], lse=e[1][0], max=e[2][0], same_bits=same)


def section_short():
    """Selections of no row, one, and of about a round of keys, many times over: a tile that has no round must neither wait for
    one nor let a warp run ahead of the others."""
    lengths = torch.tensor([0, 0, 0, 1, 63, 64, 65, 129, K], device=DEV)
    pool, kv = latent_pages(80), torch.randn(3000, 1, L + R, device=DEV).bfloat16()
    rows = latent_rows(pool)
    for t in (5, 20, 150, 600):
        q = torch.randn(t, H, L + R, device=DEV).bfloat16()
        wrong = 0
        for i in range(25):
            n = lengths[torch.randint(0, len(lengths) if i % 5 else 3, (t,), device=DEV)]
            idx = torch.randint(0, 3000, (t, K), device=DEV).int().masked_fill(torch.arange(K, device=DEV)[None] >= n[:, None], -1)
            got = lib.mla_decode(q[:, None], pool, idx.view(t, 1, K)), lib.mla_prefill(q, kv, idx.view(t, 1, K))
            torch.cuda.synchronize()
            look = torch.randint(0, t, (5,), device=DEV)
            for g, keys, lse in ((got[0], rows, got[0][1].view(t, H)), (got[1], kv[:, 0].float(), got[1][2])):
                ref = attend(q[look], keys, idx[look])
                wrong += not (close(g[0].view(t, H, L)[look], ref[0], 3e-2)[1] and close(lse[look], ref[1], 1e-4)[1])
        report("short selections", (t,), wrong == 0, wrong=wrong)


def section_chains():
    """Against the operations one after the other, so that no near tie is decided otherwise."""
    for s, n, ctx in ((1, 1, 5000), (3, 1, 4096), (2, 2, 3000), (20, 1, 2500), (40, 2, 2500), (140, 1, 2200)):
        pages = -(-ctx // 64)
        total = s * pages + 3
        ipool, pool = index_pages(total), latent_pages(total)
        table = torch.randperm(total, device=DEV)[:s * pages].int().view(s, pages)
        ends = torch.randint(ctx // 2, ctx + 1, (s, n), device=DEV, dtype=torch.int32)
        iq, w, q = fp8(s, n, HI, D), torch.randn(s * n, HI, device=DEV), torch.randn(s, n, H, L + R, device=DEV).bfloat16()
        (out, lse), same = repeats(lambda: lib.decode(iq, ipool, w, ends, table, q, pool))
        sel = lib.topk_decode(lib.paged_logits(iq, ipool, w, ends, table), ends.view(-1))
        seq = torch.arange(s * n, device=DEV)[:, None] // n
        slots = torch.where(sel < 0, sel, table[seq, sel.clamp_min(0).long() // 64] * 64 + sel % 64)
        ref = lib.mla_decode(q, pool, slots.view(s, n, K))
        (e, ok), (e2, ok2) = close(out, ref[0], 2e-2), close(lse, ref[1], 1e-4)
        report("decode", (s, n, ctx), ok and ok2 and same, out=e, lse=e2, same_bits=same)
    for t, c in ((9, 3000), (200, 6000), (2500, 5000)):
        iq, k, ks, w = fp8(t, HI, D), fp8(c, D), torch.rand(c, device=DEV) * 0.01 + 0.005, torch.randn(t, HI, device=DEV)
        q, kv = torch.randn(t, H, L + R, device=DEV).bfloat16(), torch.randn(c, 1, L + R, device=DEV).bfloat16()
        ends = torch.arange(c - t + 1, c + 1, dtype=torch.int32, device=DEV)
        starts = torch.full_like(ends, 100)
        (out, lse), same = repeats(lambda: lib.prefill(iq, k, ks, w, starts, ends, q, kv))
        sel = lib.topk_prefill(lib.ragged_logits(iq, k, ks, w, starts, ends), starts, ends)
        ref = lib.mla_prefill(q, kv, sel)
        (e, ok), (e2, ok2) = close(out, ref[0], 2e-2), close(lse, ref[2], 1e-4)
        report("prefill", (t, c), ok and ok2 and same, out=e, lse=e2, same_bits=same)


for section in (section_logits, section_topk, section_mla, section_short, section_chains):
    try:
        section()
    except Exception as e:      # one section's failure is no reason to know nothing of the others
        report(section.__name__, "", False, error=f"{type(e).__name__}: {e}"[:500])
if len(sys.argv) > 2:
    gpu = torch.cuda.get_device_properties(0).name
    with open(sys.argv[2], "w") as out:
        json.dump(dict(gpu=gpu, torch=torch.__version__, facts=f, results=results), out, indent=0)
print(f"{len(results)} checks, {len(failed)} failed: {sorted(set(failed))}")
sys.exit(bool(failed))
