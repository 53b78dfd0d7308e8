#!/usr/bin/env python3
"""Builds of a kernel library in turns on the same inputs: operations of decoding, in captured graphs and as plain launches.

    PYTHONPATH=python:DIR DSC_LIBRARY=target/release/libdsc_capi.so \\
        python3 tests/bench/turns.py old=OLD.dsc new=NEW.dsc --cases chain:1:8192,mla:16:0 [--plain chain:1:8192] [--out FILE.json]

DIR has `bench_peers.py`, whose cases these are. A case is an operation (chain, mla, logits, topk), sequences and context (0 for mla), of chains and logits also the width of
the page table in tokens (0: the context), of logits also the query tokens of a sequence and the shortest context, if they are to differ: `logits:96:100000:0:2:1000`. The results of all builds are
compared with those of the first (a build that lacks the operation is left out), those of logits where they may be looked at; then each build's graph of all input sets is replayed in turns, after a
rest, and the median of a call is given. With --peers FOLDER DeepGEMM's logits of `bench_peers.py` take turns as well.
"""
import argparse
import json
import math
import statistics
import time

import bench_peers as bp
import dsc_kernels
import torch

PEER = "deepgemm"


def logits_case(batch, context, width, queries, shortest):
    """Contexts of any length, all the same or at random."""
    whole = -(-context // bp.PAGE) * bp.PAGE
    c = bp.indexer_decode_case(batch, whole, queries, width=width)
    lengths = torch.full((batch, 1), context, dtype=torch.int32, device="cuda")
    if shortest:
        lengths = torch.randint(shortest, context + 1, (batch, 1), dtype=torch.int32, device="cuda")
        lengths[0] = context
    c.ctxl.copy_(lengths - queries + 1 + torch.arange(queries, dtype=torch.int32, device="cuda"))
    c.mean = lengths.float().mean().item()
    return c


def calls_of(library, kind, c, outs):
    out, lse = outs
    if kind == "chain":
        return [lambda s=s: library.decode(s.q, c.pool, s.w, c.lengths, s.bt, s.qm, c.mla, out=out, lse=lse) for s in c.sets]
    if kind == "mla":
        return [lambda s=s: library.mla_decode(s.q, c.pool, s.idx, out=out, lse=lse) for s in c.sets]
    if kind == "logits" and library is None:
        return bp.dg_paged(bp.PEERS.dg_vllm)(c)
    if kind == "logits":
        return [lambda s=s: library.paged_logits(s.q, c.pool, s.w, c.ctxl, s.bt, out=out) for s in c.sets]
    return [lambda s=s: library.topk_decode(s.logits, c.lengths, out=out) for s in c.sets]


def case_of(kind, batch, context, width, heads, queries=1, shortest=0):
    make = lambda *shape, dtype=torch.float32: torch.empty(*shape, dtype=dtype, device="cuda")
    if kind in ("chain", "mla"):
        c = bp.chain_decode_case(batch, context, heads, width=width) if kind == "chain" else bp.mla_decode_case(batch, 1, heads)
        return c, (make(batch, 1, heads, 512, dtype=torch.bfloat16), make(batch, 1, heads))
    if kind == "logits":
        c = logits_case(batch, context, width, queries, shortest)
        return c, (make(batch * queries, c.width), None)
    c = bp.topk_case(batch, context)
    return c, (make(batch, 2048, dtype=torch.int32), None)


def captured(calls, least_us=600):
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    reps = max(1, math.ceil(least_us / 15 / len(calls)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(reps):
            for call in calls:
                call()
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    return graph, reps * len(calls)


def elapsed(run):
    a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    a.record()
    run()
    b.record()
    torch.cuda.synchronize()
    return a.elapsed_time(b) * 1e3


def plain(calls):
    """Launches that wait in the queue while the GPU is busy, so that the host is no part of it."""
    n = 60
    torch.cuda._sleep(40_000_000)
    us = elapsed(lambda: [calls[i % len(calls)]() for i in range(n)])
    return us / n


def compared(kind, c, first, other):
    if kind == "logits":
        seen = torch.arange(first[0].shape[1], device="cuda")[None] < c.ctxl.view(-1, 1)
        a, b = (x[0][:, :seen.shape[1]].float().masked_fill(~seen, 0) for x in (first, other))
        return [bp.rel_err(b, a), int((a != b).sum())]
    if kind == "topk":
        return float((first[0] != other[0]).sum())
    return max(bp.rel_err(b.float(), a.float()) for a, b in zip(first, other) if a is not None)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("builds", nargs="+")
    parser.add_argument("--cases", required=True)
    parser.add_argument("--plain", default="", help="cases that are also timed as plain launches")
    parser.add_argument("--out")
    parser.add_argument("--peers")
    parser.add_argument("--rest", type=float, default=0.001, help="seconds in front of a measurement")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--replays", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(1)
    libraries = {name: dsc_kernels.open(path) for name, path in (b.split("=") for b in args.builds)}
    heads = next(iter(libraries.values())).facts["heads"]
    if args.peers:
        bp.load_peers(args.peers)
        libraries[PEER] = None
    rows = []
    for text in args.cases.split(","):
        kind, *sizes = text.split(":")
        batch, context, width, queries, shortest = ([int(n) for n in sizes] + [0, 1, 0][len(sizes) - 2:])[:5]
        began = time.time()
        c, outs = case_of(kind, batch, context, width, heads, queries, shortest)
        graphs, errors, first = {}, {}, None
        for name, library in libraries.items():
            if library is None and kind != "logits":
                continue
            calls = calls_of(library, kind, c, outs)
            [o.fill_(0) for o in outs if o is not None]
            try:
                got = calls[0]()
            except dsc_kernels.DscError as e:
                print("#", name, text, str(e)[:120], flush=True)
                continue
            torch.cuda.synchronize()
            kept = [o.clone() if o is not None else None for o in (outs if library else (got, None))]
            first = first or kept
            errors[name] = compared(kind, c, first, kept)
            del kept, got
            graphs[name] = (*captured(calls), calls)
        times = {name: [] for name in graphs}
        queued = {name: [] for name in graphs}
        for _ in range(args.rounds):
            for name, (graph, n, calls) in graphs.items():
                time.sleep(args.rest)
                graph.replay()
                times[name].append(elapsed(lambda: [graph.replay() for _ in range(args.replays)]) / n / args.replays)
        if text in args.plain.split(","):
            for _ in range(3):
                for name, (_, _, calls) in graphs.items():
                    queued[name].append(plain(calls))
        us = {name: round(statistics.median(t), 2) for name, t in times.items()}
        row = dict(case=text, heads=heads, us=us, least={n: round(min(t), 2) for n, t in times.items()}, difference=errors)
        if text in args.plain.split(","):
            row["plain_us"] = {name: round(statistics.median(t), 2) for name, t in queued.items()}
        row["seconds"] = round(time.time() - began, 1)
        rows.append(row)
        print(json.dumps(row), flush=True)
        del graphs
    if args.out:
        facts = dict(gpu=torch.cuda.get_device_name(0), torch=torch.__version__, rows=rows)
        with open(args.out, "w") as f:
            json.dump(facts, f, indent=0)


main()
