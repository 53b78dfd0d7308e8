#!/usr/bin/env python3
"""Sparse attention on a Hopper GPU: checked against f32, and timed.

    cargo run --release -p dsc-targets --features nvidia --example attention DIR
    python3 tests/bench/attention.py DIR [--only TEXT] [--out FILE.json]
    python3 tests/bench/attention.py DIR --beside OLD --cases prefill_h128:4096,decode_h128_p1:64 [--out FILE.json]

Needs torch and the driver. A figure is the median of replays of a CUDA graph of several launches; decode launches read different rows
each, more than the cache holds. Prefill repeats one launch. Rows are uniform over the cache and unsorted.
"""

import argparse
import ctypes
import json
import math
import pathlib
import statistics
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from hopper import CLUSTER_DIMENSION, Attribute, Config, TensorMap, check, cuda, load  # noqa: E402

LATENT, ROPE, GROUP = 512, 64, 128
SCALE = (LATENT + ROPE) ** -0.5
TOKENS, ROWS = 0, 5  # symbols
DEPENDENT = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
COUNTERS = 64 * 1024  # in front of blocks' memory: a counter a team, zeros at first
SCRATCH = {}
OVERLAP = False


class Launch:
    """One kernel with its arguments: by name the tensors that hold parameters, and for tensor maps the views."""

    def __init__(self, function, kernel, tensors, views, syms, grid):
        tiles = math.prod(grid)
        sms = torch.cuda.get_device_properties(0).multi_processor_count
        cluster, apart = kernel["cluster"], kernel.get("apart", False)
        # Blocks that exchange through memory all run at once.
        together = cluster * (kernel["team"] if apart else 1)
        held = min(tiles * max(1, kernel["team"]), sms * kernel["blocks_per_sm"] // together * together)
        self.grid = (-(-held // cluster) * cluster, 1, 1) if kernel["persistent"] else (*grid, 1, 1)[:3]
        attributes = [Attribute(CLUSTER_DIMENSION, b"", (cluster, 1, 1))] if cluster > 1 else []
        attributes += [Attribute(DEPENDENT, b"", (1, 0, 0))] if OVERLAP and kernel["dependent"] else []
        self.attributes = (Attribute * max(1, len(attributes)))(*attributes)
        self.count = len(attributes)
        self.function, self.kernel = function, kernel
        names = kernel["params"]
        self.maps = [TensorMap(views[names[m["param"]]], m["tile"], m["swizzle"]) for m in kernel["maps"]]
        self.keep = [tensors[n] for n in names] + [syms]
        self.pointers = [ctypes.c_uint64(t.data_ptr()) for t in self.keep]
        if kernel.get("apart"):
            if kernel["name"] not in SCRATCH:
                SCRATCH[kernel["name"]] = torch.zeros(COUNTERS + kernel["scratch"] * sms, dtype=torch.uint8, device="cuda")
            self.keep.append(SCRATCH[kernel["name"]])
            self.pointers.append(ctypes.c_uint64(self.keep[-1].data_ptr() + COUNTERS))
        addresses = [ctypes.addressof(p) for p in self.pointers] + [m.address for m in self.maps]
        self.args = (ctypes.c_void_p * len(addresses))(*addresses)

    def __call__(self):
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        k = self.kernel
        config = Config(self.grid, (k["threads"], 1, 1), k["shared_bytes"], stream, self.attributes, self.count)
        code = cuda.cuLaunchKernelEx(ctypes.byref(config), self.function, self.args, None)
        check(code, f"launch of {k['name']}")


def timed(calls, replays=9):
    """Median microseconds of a call."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times[2:])


def codes(rows):
    """Rows of 656 bytes."""
    latent = torch.randn(rows, LATENT, device="cuda").to(torch.float8_e4m3fn)
    scales = 2.0 ** torch.randint(-2, 2, (rows, LATENT // GROUP), device="cuda").float()
    rope = torch.randn(rows, ROPE, device="cuda").bfloat16()
    raw = torch.cat([latent.view(torch.uint8), scales.view(torch.uint8), rope.view(torch.uint8)], 1).contiguous()
    return raw


def decoded(raw):
    latent = raw[:, :LATENT].contiguous().view(torch.float8_e4m3fn).float()
    scales = raw[:, LATENT : LATENT + 16].contiguous().view(torch.float32).repeat_interleave(GROUP, 1)
    rope = raw[:, LATENT + 16 :].contiguous().view(torch.bfloat16).float()
    return torch.cat([(latent * scales).bfloat16().float(), rope], 1)


def reference(q, cache, indices, lengths, fp8):
    out = []
    for t in range(q.shape[0]):
        at = indices[t, : int(lengths[t])].long()
        at = at[(at >= 0) & (at < cache.shape[0])]
        kv = decoded(cache[at]) if fp8 else cache[at].float()
        p = torch.softmax(q[t].float() @ kv.T * SCALE, 1)
        out.append(p @ kv[:, :LATENT])
    return torch.stack(out)


class Case:
    def __init__(self, functions, kernels, name, tokens, rows, sets, cache):
        kernel = kernels[name]
        self.heads, self.parts, self.k, self.fp8 = kernel["heads"], kernel["parts"], kernel["k"], kernel["fp8"]
        self.cache = cache
        self.q = torch.randn(tokens, self.heads, LATENT + ROPE, device="cuda").bfloat16()
        self.indices = [torch.randint(0, rows, (tokens, self.k), device="cuda", dtype=torch.int32) for _ in range(sets)]
        self.lengths = torch.full((tokens,), self.k, device="cuda", dtype=torch.int32)
        self.y = torch.full((tokens, self.heads, LATENT), float("nan"), device="cuda", dtype=torch.bfloat16)
        self.syms = torch.tensor([tokens, 1, 1, 1, 1, rows], dtype=torch.int32, device="cuda")
        views = {"q": self.q[..., :LATENT], "q_rope": self.q[..., LATENT:]}
        shared = {"q": self.q, "q_rope": self.q, "latent": cache, "scales": cache, "rope": cache, "lengths": self.lengths, "y": self.y}
        shared["largest_scores"] = torch.empty(tokens, self.heads, device="cuda")
        grid = [tokens, self.heads // kernel["tile"]]
        joins = []
        if self.parts:
            grid.append(self.parts)
            shape = (tokens, self.heads, self.parts)
            shared["sums"] = torch.full((*shape, LATENT), float("nan"), device="cuda")
            shared["largest"], shared["totals"] = (torch.full(shape, float("nan"), device="cuda") for _ in range(2))
            join = f"combine_h{self.heads}_p{self.parts}"
            joins = [Launch(functions[join], kernels[join], shared, {}, self.syms, [self.heads, tokens, 1])]
        self.calls = [[Launch(functions[name], kernel, {**shared, "indices": i}, views, self.syms, grid), *joins] for i in self.indices]

    def run(self, number=0):
        for call in self.calls[number]:
            call()

    def error(self):
        some = sorted({0, 1, self.q.shape[0] // 2, self.q.shape[0] - 1} & set(range(self.q.shape[0])))
        want = reference(self.q[some], self.cache, self.indices[0][some], self.lengths[some], self.fp8)
        got = self.y[some].float()
        return ((got - want).norm() / want.norm()).item(), int(self.y.isnan().sum()), (got - want).abs().max().item()


def beside(folders, cases, rows, out):
    """Kernels of several builds by name and tokens, on the same inputs: checked, then timed in turns."""
    builds = []
    for folder in folders:
        kernels = {k["name"]: k for k in json.loads((folder / "manifest.json").read_text())}
        builds.append((folder, kernels, {n: load(folder / f"{n}.cubin", n, k["shared_bytes"]) for n, k in kernels.items()}))
    results, caches = [], {}
    for name, tokens in cases:
        prefill = name.startswith("prefill")
        if prefill not in caches:
            caches[prefill] = torch.randn(rows[prefill], LATENT + ROPE, device="cuda").bfloat16() if prefill else codes(rows[prefill])
        running = []
        for folder, kernels, functions in builds:
            torch.manual_seed(1)
            sets = 1 if prefill else max(2, min(40, (160 << 20) // (tokens * 2048 * 656)))
            case = Case(functions, kernels, name, tokens, rows[prefill], sets, caches[prefill])
            case.run()
            torch.cuda.synchronize()
            error, first = case.error(), case.y.clone()
            case.run()
            torch.cuda.synchronize()
            same = bool((first.view(torch.int16) == case.y.view(torch.int16)).all())
            calls = [call for calls in case.calls for call in calls]
            calls *= max(1, (200 if tokens <= 256 else 2) // len(calls))
            running.append((str(folder), case, calls, error, same, []))
        for _ in range(4):
            for _, case, calls, *_, times in running:
                times.append(timed(calls, 5) * (2 if case.parts else 1))
        for folder, _, _, error, same, times in running:
            result = {"build": folder, "name": name, "tokens": tokens, "us": round(statistics.median(times), 2), "all": [round(t, 1) for t in sorted(times)]}
            results.append(result | {"error": error[0], "nan": error[1], "same_bits_again": same})
            print(json.dumps(results[-1]), flush=True)
    if out:
        facts = {"gpu": torch.cuda.get_device_name(0), "torch": torch.__version__, "results": results}
        out.write_text(json.dumps(facts, indent=1))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--quick", action="store_true", help="check, and time little")
    parser.add_argument("--beside", type=pathlib.Path, help="the folder of another build, whose kernels take turns with these")
    parser.add_argument("--cases", default="", help="which of them: name:tokens,..")
    parser.add_argument("--overlap", action="store_true", help="a launch may start while the one before ends, as in a library")
    args = parser.parse_args()
    global OVERLAP
    OVERLAP = args.overlap
    torch.manual_seed(0)
    torch.empty(1, device="cuda")
    if args.beside:
        cases = [(name, int(tokens)) for name, tokens in (case.split(":") for case in args.cases.split(","))]
        return beside([args.beside, args.folder], cases, {True: 32768, False: 1 << 20}, args.out)
    described = json.loads((args.folder / "manifest.json").read_text())
    kernels = {k["name"]: k for k in described}
    functions = {n: load(args.folder / f"{n}.cubin", n, k["shared_bytes"]) for n, k in kernels.items()}
    results = []

    def measure(name, tokens, rows, cache, sets):
        print(name, tokens, flush=True)
        case = Case(functions, kernels, name, tokens, rows, sets, cache)
        case.lengths[:] = torch.randint(1, case.k + 1, (tokens,), device="cuda", dtype=torch.int32)
        case.lengths[0] = case.k
        case.indices[0][:, ::7] = -1
        propagates = True
        if case.fp8:
            # Scales that are no powers of two, and a code that is NaN, take another way.
            scales, kept = cache[::13, LATENT : LATENT + 16], cache[::13, LATENT : LATENT + 16].clone()
            scales.copy_((torch.rand(scales.shape[0], 4, device="cuda") + 0.5).view(torch.uint8))
            row = int(case.indices[0][0, 1])
            code = int(cache[row, 5])
            cache[row, 5] = 0x7F
            case.run()
            torch.cuda.synchronize()
            propagates = bool(case.y[0].isnan().all())
            cache[row, 5] = code
        case.run()
        torch.cuda.synchronize()
        ragged = case.error()
        if case.fp8:
            scales.copy_(kept)
        case.lengths[:] = case.k
        case.indices[0].random_(0, rows)
        case.run()
        torch.cuda.synchronize()
        full, first = case.error(), case.y.clone()
        case.run()
        torch.cuda.synchronize()
        same = bool((first.view(torch.int16) == case.y.view(torch.int16)).all())
        result = {"name": name, "tokens": tokens, "rows": rows, "error": full[0], "ragged_error": ragged[0], "nan": full[1] + ragged[1],
                  "same_bits_again": same, "nan_propagates": propagates}
        good = propagates and full[0] < 1e-2 and ragged[0] < 1e-2 and same and not result["nan"]
        if good:
            calls = [call for calls in case.calls for call in calls]
            calls *= max(1, 200 // len(calls)) if tokens <= 256 else 1
            us = timed(calls) * (2 if case.parts else 1)
            flop = 2 * tokens * case.heads * case.k * (2 * LATENT + ROPE)
            result |= {"us": round(us, 2), "tflops": round(flop / us / 1e6, 1)}
            if case.parts:
                alone = [calls[0] for calls in case.calls]
                result["parts_us"] = round(timed(alone * max(1, 200 // len(alone))), 2)
        print(json.dumps(result), flush=True)
        results.append(result)

    wanted = [n for n in kernels if args.only in n]
    for rows in [32768] if args.quick else [32768, 131072]:
        kv = torch.randn(rows, LATENT + ROPE, device="cuda").bfloat16()
        for name in [n for n in wanted if n.startswith("prefill")]:
            for tokens in [256, 4096]:
                measure(name, tokens, rows, kv, 1)
        del kv
    rows = 1 << 20
    cache = codes(rows)
    chosen = set(filter(None, args.cases.split(",")))
    usual = [1, 16, 128] if args.quick else [1, 3, 4, 16, 48, 64, 96, 128]
    for tokens in sorted({int(case.split(":")[1]) for case in chosen}) or usual:
        for name in [n for n in wanted if n.startswith("decode")]:
            kernel = kernels[name]
            blocks = tokens * kernel["heads"] // kernel["tile"] * max(1, kernel["parts"])
            blocks *= max(1, kernel["team"])
            if chosen:
                if f"{name}:{tokens}" not in chosen:
                    continue
            elif (blocks > 600 and kernel["parts"]) or (blocks > 264 and kernel["team"]) or blocks < 30:
                continue
            measure(name, tokens, rows, cache, max(2, min(40, (160 << 20) // (tokens * 2048 * 656))))
    if args.out:
        facts = {"gpu": torch.cuda.get_device_name(0), "torch": torch.__version__, "results": results}
        args.out.write_text(json.dumps(facts, indent=1))


main()
