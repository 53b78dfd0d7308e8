#!/usr/bin/env python3
"""Matrix products on a Hopper GPU: checked against double precision, and timed beside torch in the same run.

    cargo run --release -p dsc-targets --features nvidia --example hopper DIR
    python3 tests/bench/hopper.py DIR [--only TEXT] [--out FILE.json]

Needs torch and the driver. Candidates of one product take turns, round by round; each is a CUDA graph of several launches, and figures are
medians over rounds. A product with few rows reads its weights from memory, so it gets a new copy of them each launch, more copies than the
cache holds. cuBLAS is `torch.matmul` for bf16; for e4m3 `torch._scaled_mm` with one scale a tensor (which is less work) and, where it takes the
shape, with scales of 1x128 and 128x128.
"""

import argparse
import ctypes
import json
import pathlib
import statistics
import sys
import time

import torch

cuda = ctypes.CDLL("libcuda.so.1")
MAP_BYTES = 128
MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
LARGE_CLUSTERS = 14  # CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
ELEMENT = {torch.bfloat16: 9, torch.float8_e4m3fn: 0, torch.float32: 7}  # CUtensorMapDataType
SWIZZLE = {0: 0, 32: 1, 64: 2, 128: 3}
CACHE_BYTES = 160 << 20


def check(code, what):
    if code:
        sys.exit(f"CUDA error {code}: {what}")


def load(path, name, shared_bytes):
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    check(cuda.cuModuleLoad(ctypes.byref(module), str(path).encode()), f"loading {path}")
    check(cuda.cuModuleGetFunction(ctypes.byref(function), module, name.encode()), name)
    check(cuda.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED, shared_bytes), "shared memory")
    check(cuda.cuFuncSetAttribute(function, LARGE_CLUSTERS, 1), "clusters of more than eight blocks")
    return function


class TensorMap:
    """A CUtensorMap of a tensor, at an address that is a multiple of 64."""

    def __init__(self, tensor, tile, swizzle):
        self.memory = ctypes.create_string_buffer(MAP_BYTES + 64)
        self.address = (ctypes.addressof(self.memory) + 63) & ~63
        rank = tensor.dim()
        dims = (ctypes.c_uint64 * rank)(*reversed(tensor.shape))
        strides = [s * tensor.element_size() for s in tensor.stride()]
        strides = (ctypes.c_uint64 * max(rank - 1, 1))(*reversed(strides[:-1]))
        box = (ctypes.c_uint32 * rank)(*reversed(tile))
        ones = (ctypes.c_uint32 * rank)(*([1] * rank))
        code = cuda.cuTensorMapEncodeTiled(
            ctypes.c_void_p(self.address), ELEMENT[tensor.dtype], rank, ctypes.c_void_p(tensor.data_ptr()), dims, strides, box, ones,
            0, SWIZZLE[swizzle], 3, 0,
        )
        check(code, f"tensor map {tuple(tensor.shape)} tile {tile}")


class Attribute(ctypes.Structure):
    """A CUlaunchAttribute that is a cluster's dims."""

    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("dims", ctypes.c_uint * 3), ("rest", ctypes.c_char * 52)]


class Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint), ("stream", ctypes.c_void_p),
                ("attributes", ctypes.POINTER(Attribute)), ("count", ctypes.c_uint)]


CLUSTER_DIMENSION = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION


class Launch:
    """One kernel with its arguments."""

    def __init__(self, function, kernel, tensors, syms, grid, sms):
        tiles = grid[0] * grid[1] * grid[2]
        cluster = kernel["cluster"]
        held = min(tiles, sms * kernel["blocks_per_sm"] // cluster * cluster)
        if kernel["turns"]:
            held = -(-tiles // kernel["turns"])
        self.grid = (-(-held // cluster) * cluster, 1, 1) if kernel["persistent"] else grid
        self.attribute = Attribute(CLUSTER_DIMENSION, b"", (cluster, 1, 1))
        self.function, self.kernel = function, kernel
        self.maps = [TensorMap(tensors[m["param"]], m["tile"], m["swizzle"]) for m in kernel["maps"]]
        self.pointers = [ctypes.c_uint64(t.data_ptr()) for t in [*tensors, syms]]
        addresses = [ctypes.addressof(p) for p in self.pointers] + [m.address for m in self.maps]
        self.args = (ctypes.c_void_p * len(addresses))(*addresses)

    def __call__(self):
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        clustered = int(self.kernel["cluster"] > 1)
        config = Config(self.grid, (self.kernel["threads"], 1, 1), self.kernel["shared_bytes"], stream,
                        ctypes.pointer(self.attribute), clustered)
        code = cuda.cuLaunchKernelEx(ctypes.byref(config), self.function, self.args, None)
        check(code, f"launch of {self.kernel['name']}")


def timed(candidates, rounds=7):
    """Median, least and greatest microseconds of a call; each candidate is a list of calls that belong together."""
    graphs = {}
    for name, calls in candidates.items():
        for call in calls[:2]:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graphs[name] = (graph, len(calls))
    times = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, (graph, count) in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            graph.replay()
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end) * 1e3 / count)
    return {name: (statistics.median(t), min(t), max(t)) for name, t in times.items()}


def dequantised(codes, scales, rows):
    """The values of codes with a scale for each `rows` x 128 block."""
    wide = scales.double().repeat_interleave(rows, 0)[: codes.shape[0]].repeat_interleave(128, 1)[:, : codes.shape[1]]
    return codes.double() * wide


def measure(kernel, function, rows, sms):
    n, k, fp8, glu = kernel["n"], kernel["k"], kernel["dtype"] == "e4m3", kernel["glu"]
    w_rows, parts = n * (2 if glu else 1), -(-k // kernel["part"]) if kernel["part"] else 1
    element = torch.float8_e4m3fn if fp8 else torch.bfloat16
    out = torch.bfloat16 if kernel["out"] == "bf16" else torch.float32
    x = torch.randn(rows, k, device="cuda").to(element)
    copies = 1 if rows > 256 else max(2, min(24, CACHE_BYTES // (w_rows * k * x.element_size()) + 1))
    w = torch.randn(w_rows, k, device="cuda").to(element)
    weights = [w] + [w.clone() for _ in range(copies - 1)]
    scales = []
    if fp8:
        blocks = -(-k // 128)
        scales = [torch.rand(rows, blocks, device="cuda") + 0.5, torch.rand(-(-w_rows // 128), blocks, device="cuda") + 0.5]
    syms = torch.tensor([rows, 1, 1, 1, 1, 1], dtype=torch.int32, device="cuda")
    # Memory behind the result must stay as it was.
    guard = 64
    y = torch.full((rows + guard, n * parts), float("nan"), device="cuda", dtype=out)
    grid = (-(-rows // kernel["tile"][0]), -(-n // kernel["tile"][1]), parts)
    launches = [Launch(function, kernel, [x, w, *scales, y[:rows]], syms, grid, sms) for w in weights]
    launches[0]()
    torch.cuda.synchronize()
    error, nans, first_last = 0.0, int(y[:rows].isnan().sum()), sorted({0, max(0, rows - 256)})
    for first in first_last:
        part = slice(first, min(rows, first + 256))
        a = dequantised(x[part], scales[0][part], 1) if fp8 else x[part].double()
        b = dequantised(w, scales[1], 128) if fp8 else w.double()
        want = a @ b.T
        if glu:
            want = torch.nn.functional.silu(want[:, :n]) * want[:, n:]
        got = y[part].double().view(-1, parts, n).sum(1)
        error = max(error, ((got - want).norm() / want.norm()).item())
        del a, b, want
    again = y.clone()
    launches[0]()
    torch.cuda.synchronize()
    bits = torch.int16 if out == torch.bfloat16 else torch.int32
    same = bool((again.view(bits) == y.view(bits)).all())
    touched = int((~y[rows:].isnan()).sum())
    result = {"name": kernel["name"], "rows": rows, "error": error, "nan": nans, "written_outside": touched, "same_bits_again": same}

    candidates = {"dsc": launches}
    if fp8:
        one = torch.ones((), device="cuda")
        candidates["cublas per-tensor"] = [
            lambda w=w: torch._scaled_mm(x, w.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=False) for w in weights
        ]
        sa, sb = scales[0].T.contiguous().T, scales[1]
        candidates["cublas blockwise"] = [
            lambda w=w: torch._scaled_mm(x, w.T, sa, sb.contiguous().T, out_dtype=torch.bfloat16) for w in weights
        ]
    elif out == torch.bfloat16:
        buffer = torch.empty(rows, n, device="cuda", dtype=out)
        candidates["cublas"] = [lambda w=w: torch.matmul(x, w.T, out=buffer) for w in weights]
    for name in list(candidates):
        try:
            candidates[name][0]()
        except RuntimeError as e:
            result.setdefault("refused", {})[name] = str(e).split("\n")[0][:120]
            del candidates[name]
    repeats = max(1, 10 // copies)
    times = timed({name: calls * repeats for name, calls in candidates.items()})
    moved = (rows + w_rows) * k * x.element_size() + rows * n * parts * y.element_size()
    result["times"] = {
        name: {"us": round(t[0], 2), "min": round(t[1], 2), "max": round(t[2], 2), "tflops": round(2 * rows * w_rows * k / t[0] / 1e6, 1),
               "gb_per_s": round(moved / t[0] / 1e3)}
        for name, t in times.items()
    }
    return result


def measure_experts(kernel, function, rows, sms):
    n, k, experts, per_token, glu = (kernel[name] for name in ("n", "k", "experts", "per_token", "glu"))
    tokens = rows // per_token if per_token else rows
    w_rows = 2 * n if glu else n
    blocks, scale_rows = k // 128, w_rows // 128
    x = torch.randn(tokens, k, device="cuda").to(torch.float8_e4m3fn)
    w = torch.empty(experts * w_rows, k, device="cuda", dtype=torch.float8_e4m3fn)
    for e in range(experts):
        w[e * w_rows : (e + 1) * w_rows] = torch.randn(w_rows, k, device="cuda").to(torch.float8_e4m3fn)
    xs = torch.rand(tokens, blocks, device="cuda") + 0.5
    ws = torch.rand(experts * scale_rows, blocks, device="cuda") + 0.5
    # Each token goes to different experts, as a router would have it.
    picks = torch.rand(tokens if per_token else -(-rows // 8), experts, device="cuda").argsort(1)[:, :8].flatten()[:rows]
    order = picks.argsort(stable=True).int()
    counts = torch.bincount(picks, minlength=experts)
    offsets = torch.cat([torch.zeros(1, device="cuda", dtype=torch.int64), counts.cumsum(0)]).int()
    # Half a kernel with SwiGLU is a product; its result is e4m3 with a scale for every 128 columns.
    y = torch.full((rows + 64, n), float("nan"), device="cuda", dtype=torch.float8_e4m3fn if glu else torch.bfloat16)
    y_scales = torch.full((rows, n // 128), float("nan"), device="cuda")
    syms = torch.tensor([tokens, 1, 1, rows, 1, 1], dtype=torch.int32, device="cuda")
    # Of sorted rows those of an expert lie together.
    source = order.long() // per_token if per_token else order.long()
    rows_x = (x[source], xs[source]) if kernel["sorted"] else (x, xs)
    launch = Launch(function, kernel, [rows_x[0], w, rows_x[1], ws, order, offsets, y[:rows], *([y_scales] if glu else [])], syms,
                    (-(-n // kernel["tile"][1]) * kernel["parts"], experts, 1), sms)
    launch()
    torch.cuda.synchronize()
    error, bounds = 0.0, offsets.tolist()
    for e in sorted({0, experts // 2, experts - 1, int(counts.argmax())}):
        mine = order[bounds[e] : bounds[e + 1]].long()
        if not len(mine):
            continue
        source = mine // per_token if per_token else mine
        a = dequantised(x[source], xs[source], 1)
        b = dequantised(w[e * w_rows : (e + 1) * w_rows], ws[e * scale_rows : (e + 1) * scale_rows], 128)
        want = a @ b.T
        if glu:
            want = torch.nn.functional.silu(want[:, :n]) * want[:, n:]
        got = dequantised(y[mine], y_scales[mine], 1) if glu else y[mine].double()
        error = max(error, ((got - want).norm() / want.norm()).item())
    again = y.clone()
    launch()
    torch.cuda.synchronize()
    same = bool((again.view(torch.int8) == y.view(torch.int8)).all())
    touched = int((~y[rows:].float().isnan()).sum())
    used = int((counts > 0).sum())
    moved = used * w_rows * k + rows * k + rows * n * 2
    us, low, high = timed({"dsc": [launch] * 5})["dsc"]
    times = {"dsc": {"us": round(us, 2), "min": round(low, 2), "max": round(high, 2), "tflops": round(2 * rows * w_rows * k / us / 1e6, 1),
                     "gb_per_s": round(moved / us / 1e3)}}
    nans = int(y[:rows].float().isnan().sum())
    return {"name": kernel["name"], "rows": rows, "error": error, "nan": nans, "written_outside": touched, "same_bits_again": same, "times": times}


def measure_heads(kernel, function, rows, sms):
    n, k, heads = (kernel[name] for name in ("n", "k", "heads"))
    x = torch.randn(rows, heads, k, device="cuda").bfloat16()
    w = torch.randn(heads, k, n, device="cuda").bfloat16()
    y = torch.full((rows + 64, heads, n), float("nan"), device="cuda", dtype=torch.bfloat16)
    syms = torch.tensor([rows, 1, 1, 1, 1, 1], dtype=torch.int32, device="cuda")
    grid = (-(-rows // kernel["tile"][0]), -(-n // kernel["tile"][1]), heads)
    launch = Launch(function, kernel, [x, w.view(heads * k, n), y[:rows]], syms, grid, sms)
    launch()
    torch.cuda.synchronize()
    want = torch.bmm(x.transpose(0, 1).double(), w.double()).transpose(0, 1)
    error = ((y[:rows].double() - want).norm() / want.norm()).item()
    again = y.clone()
    launch()
    torch.cuda.synchronize()
    same = bool((again.view(torch.int16) == y.view(torch.int16)).all())
    touched, nans = int((~y[rows:].isnan()).sum()), int(y[:rows].isnan().sum())
    out = torch.empty(rows, heads, n, device="cuda", dtype=torch.bfloat16).transpose(0, 1)
    times = timed({"dsc": [launch] * 10, "cublas": [lambda: torch.bmm(x.transpose(0, 1), w, out=out)] * 10})
    moved = (rows * heads * (k + n) + heads * k * n) * 2
    return {
        "name": kernel["name"], "rows": rows, "error": error, "nan": nans, "written_outside": touched, "same_bits_again": same,
        "times": {
            name: {"us": round(t[0], 2), "min": round(t[1], 2), "max": round(t[2], 2),
                   "tflops": round(2 * rows * heads * n * k / t[0] / 1e6, 1), "gb_per_s": round(moved / t[0] / 1e3)}
            for name, t in times.items()
        },
    }


def show(result):
    flags = f"nan {result['nan']} outside {result['written_outside']} repeats {result['same_bits_again']}"
    print(f"{result['name']} rows {result['rows']}: error {result['error']:.2e} {flags} {result.get('refused', '')}", flush=True)
    for name, t in result["times"].items():
        print(f"    {name:18s} {t['us']:9.2f} us [{t['min']:.2f} {t['max']:.2f}] {t['tflops']:7.1f} TFLOP/s {t['gb_per_s']:6d} GB/s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--only", default="", help="only kernels with this in their names")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    torch.manual_seed(1)
    torch.zeros(1, device="cuda")
    properties = torch.cuda.get_device_properties(0)
    header = {"device": properties.name, "sms": properties.multi_processor_count, "torch": torch.__version__, "date": time.strftime("%F")}
    print(header, flush=True)
    results = []
    for kernel in json.loads((options.folder / "manifest.json").read_text()):
        if options.only not in kernel["name"]:
            continue
        function = load(options.folder / f"{kernel['name']}.cubin", kernel["name"], kernel["shared_bytes"])
        for rows in kernel["rows"]:
            how = {"experts": measure_experts, "heads": measure_heads}.get(kernel["kind"], measure)
            results.append(how(kernel, function, rows, header["sms"]))
            show(results[-1])
            torch.cuda.empty_cache()
    if options.out:
        options.out.write_text(json.dumps({**header, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
