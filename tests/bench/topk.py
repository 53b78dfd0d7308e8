#!/usr/bin/env python3
"""Top-k of kernel libraries on this machine's GPU: checks all of them against a stable sort (lowest number of equals, ascending), on values of many kinds, ragged
rows and a rerun; then times those that are right in turns on the same rows, replaying a CUDA graph of launches.

    PYTHONPATH=python DSC_LIBRARY=target/release/libdsc_capi.so python3 tests/bench/topk.py OUT.json before=old.dsc now=new.dsc
"""
import json
import math
import statistics
import sys

import dsc_kernels
import torch

DEV = "cuda"
libs = {name: dsc_kernels.open(path) for name, path in (a.split("=") for a in sys.argv[2:])}
K = next(iter(libs.values())).facts["topk"]
out = {"gpu": torch.cuda.get_device_name(0), "checks": [], "failed": [], "times": [], "adversarial": []}
torch.manual_seed(5)


def save():
    json.dump(out, open(sys.argv[1], "w"))


def kinds(rows, n):
    c = torch.arange(n, device=DEV)
    r = torch.randn(rows, n, device=DEV)
    yield "normal", r
    yield "equal", torch.full_like(r, 1.5)
    yield "few", torch.randint(0, 5, (rows, n), device=DEV).float()
    yield "ascending", c.float().expand(rows, n).contiguous()
    yield "descending", (-c.float()).expand(rows, n).contiguous()
    yield "lowbits", (torch.randint(0, 1024, (rows, n), device=DEV, dtype=torch.int32) + 0x3f800000).view(torch.float32)
    bits = torch.randint(0, 1 << 20, (rows, n), device=DEV, dtype=torch.int32)
    yield "negative lowbits", -(bits + 0x3f800000).view(torch.float32)
    yield "mostly -inf", torch.where(c % 13 == 0, r, float("-inf")).contiguous()
    yield "one of eight stretches", (r + 10 * ((c // 128) % 8 == 3)).contiguous()
    yield "a burst", (r + 10 * ((c > n // 3) & (c < n // 3 + 1500))).contiguous()
    yield "infinite", torch.where(c % 97 == 5, float("inf"), r).contiguous()
    yield "zeros", torch.where(c % 2 == 0, 0.0, -0.0).expand(rows, n).contiguous()
    yield "wide", torch.exp(r * 20) * torch.sign(torch.randn_like(r))


def reference(x, starts, ends):
    m = torch.arange(x.shape[1], device=DEV)[None]
    x = x.masked_fill((m >= ends[:, None]) | (m < starts[:, None]), float("-inf"))
    v, i = torch.sort(x, dim=-1, descending=True, stable=True)
    v, i = v[:, :K], i[:, :K].int()
    if i.shape[1] < K:
        i = torch.nn.functional.pad(i, (0, K - i.shape[1]))
        v = torch.nn.functional.pad(v, (0, K - v.shape[1]), value=float("-inf"))
    i = torch.where(v == float("-inf"), 1 << 30, i).sort(-1).values
    return torch.where(i == 1 << 30, -1, i)


def check(rows, n, prefill):
    ends = torch.randint(max(1, n - 700), n + 1, (rows,), device=DEV, dtype=torch.int32)
    ends[0] = n
    starts = torch.randint(0, 500, (rows,), device=DEV, dtype=torch.int32) if prefill else torch.zeros_like(ends)
    for name, x in kinds(rows, n):
        want = reference(x, starts, ends)
        for lib, l in libs.items():
            run = (lambda: l.topk_prefill(x, starts, ends)) if prefill else (lambda: l.topk_decode(x, ends))
            got, again = run(), run()
            ok = bool(torch.equal(got, want)) and bool(torch.equal(got, again))
            out["checks"].append((lib, rows, n, prefill, name, ok))
            if not ok:
                bad = (got != want).any(-1).nonzero().flatten()[:4].tolist()
                out["failed"].append((lib, rows, n, prefill, name, bad))
                print("FAIL", lib, rows, n, prefill, name, bad or "rerun", flush=True)


def graph_us(calls):
    for c in calls[:2]:
        c()
    torch.cuda.synchronize()
    a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    a.record()
    calls[0]()
    b.record()
    torch.cuda.synchronize()
    reps = max(1, min(400 // len(calls), math.ceil(500 / (max(a.elapsed_time(b) * 1e3, 3) * len(calls)))))
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g):
        for _ in range(reps):
            for c in calls:
                c()
    g.replay()
    torch.cuda.synchronize()
    return g, reps * len(calls)


def one(g, n, k):
    evs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(k)]
    for a, b in evs:
        a.record()
        g.replay()
        b.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) * 1e3 / n for a, b in evs)


def case(rows, n, prefill, sets, name=None):
    if prefill:
        lengths = torch.arange(n - rows + 1, n + 1, dtype=torch.int32, device=DEV)
    else:
        lengths = torch.full((rows,), n, dtype=torch.int32, device=DEV)
    zeros = torch.zeros(rows, dtype=torch.int32, device=DEV)
    res = torch.empty(rows, K, dtype=torch.int32, device=DEV)
    graphs = {}
    for v, l in libs.items():
        def call(x, l=l):
            if prefill:
                return lambda: l.topk_prefill(x, zeros, lengths, out=res)
            return lambda: l.topk_decode(x, lengths, out=res)

        graphs[v] = graph_us([call(x) for x in sets])
    us = {v: [] for v in libs}
    for r in range(4):
        for v in libs:
            us[v].append(one(*graphs[v], 4 if rows > 1000 else 12))
    row = dict(rows=rows, n=n, prefill=prefill, **({"data": name} if name else {}),
               us={v: round(statistics.median(t), 3) for v, t in us.items()},
               rounds={v: [round(x, 2) for x in t] for v, t in us.items()})
    out["adversarial" if name else "times"].append(row)
    print(rows, n, "prefill" if prefill else "", name or "", row["us"], flush=True)


checked = [
    (1, 131072, 0), (16, 131072, 0), (70, 32768, 1), (1, 32768, 0), (3, 100003, 0), (16, 9001, 0), (24, 131072, 0),
    (40, 65537, 0), (64, 32768, 0), (100, 20481, 0), (140, 30011, 1), (200, 16501, 0), (20, 140000, 0), (5, 5000, 0),
    (128, 8192, 0), (150, 50000, 1),
]
for rows, n, p in checked:
    check(rows, n, bool(p))
save()
print("checked", len(out["checks"]), "failed", len(out["failed"]), flush=True)
good = [v for v in libs if not any(f[0] == v for f in out["failed"])]
libs = {v: libs[v] for v in good}
shapes = [
    (1, 131072, 0), (16, 131072, 0), (4096, 32768, 1), (1, 32768, 0), (1, 8192, 0), (16, 8192, 0), (16, 32768, 0),
    (64, 8192, 0), (64, 32768, 0), (64, 131072, 0), (128, 8192, 0), (128, 32768, 0), (128, 131072, 0),
    (4096, 131072, 1), (4096, 8192, 1), (8, 131072, 0), (3, 100000, 0), (32, 131072, 0), (48, 131072, 0),
    (48, 32768, 0), (3, 5000, 0), (48, 5000, 0), (16, 100000, 0), (3, 32768, 0), (8, 32768, 0), (32, 32768, 0),
    (8, 65536, 0), (16, 65536, 0), (1, 65536, 0), (1, 16384, 0), (64, 65536, 0), (128, 65536, 0), (128, 16384, 0),
    (1024, 32768, 1), (4096, 16384, 1), (4096, 65536, 1), (96, 131072, 0), (1024, 131072, 1), (300, 32768, 0),
]
for rows, n, p in shapes:
    count = max(1, min(96, math.ceil(200e6 / (rows * n * 4)), int(6e9 // (rows * n * 4))))
    case(rows, n, bool(p), [torch.randn(rows, n, device=DEV) for _ in range(count)])
    torch.cuda.empty_cache()
    save()
for rows, n, p in [(1, 131072, 0), (16, 131072, 0), (1, 32768, 0), (4096, 32768, 1)]:
    for name, x in kinds(min(rows, 256), n):
        if name in ("equal", "ascending", "lowbits", "one of eight stretches", "few"):
            case(rows, n, bool(p), [x.repeat(rows // x.shape[0], 1)], name)
    save()
save()
