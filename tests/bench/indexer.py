#!/usr/bin/env python3
"""The lightning indexer on a Hopper GPU: scores and selection, checked and timed.

    cargo run --release -p dsc-targets --features nvidia --example indexer DIR
    python3 tests/bench/indexer.py DIR [--quick | --between] [--out FILE.json]

Needs torch and the driver. Scores are compared with f32 arithmetic on the same codes (norm of the difference over norm), selections
with a stable sort, exactly. Times are medians of replays of a CUDA graph whose launches take turns with inputs beyond the cache.
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
DEV, PAGE, DIM = "cuda", 64, 128
PAGE_BYTES = PAGE * (DIM + 4)
FP8 = torch.float8_e4m3fn
ELEMENT = {FP8: 0, torch.float32: 7}
CACHE_BYTES = 160 << 20


def check(code, what):
    if code:
        sys.exit(f"CUDA error {code}: {what}")


class Config(ctypes.Structure):
    _fields_ = [("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint), ("stream", ctypes.c_void_p),
                ("attributes", ctypes.c_void_p), ("count", ctypes.c_uint)]


class Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_uint), ("pad", ctypes.c_uint), ("value", ctypes.c_uint * 16)]


class TensorMap:
    def __init__(self, tensor, tile, swizzle):
        self.memory = ctypes.create_string_buffer(192)
        self.address = (ctypes.addressof(self.memory) + 63) & ~63
        rank = tensor.dim()
        dims = (ctypes.c_uint64 * rank)(*reversed(tensor.shape))
        strides = [s * tensor.element_size() for s in tensor.stride()]
        strides = (ctypes.c_uint64 * max(rank - 1, 1))(*reversed(strides[:-1]))
        box, ones = (ctypes.c_uint32 * rank)(*reversed(tile)), (ctypes.c_uint32 * rank)(*([1] * rank))
        code = cuda.cuTensorMapEncodeTiled(
            ctypes.c_void_p(self.address), ELEMENT[tensor.dtype], rank, ctypes.c_void_p(tensor.data_ptr()), dims, strides, box, ones,
            0, {0: 0, 128: 3}[swizzle], 3, 0)
        check(code, f"tensor map {tuple(tensor.shape)} tile {tile}")


class Kernel:
    def __init__(self, folder, entry):
        self.__dict__.update(entry)
        module, self.function = ctypes.c_void_p(), ctypes.c_void_p()
        check(cuda.cuModuleLoad(ctypes.byref(module), str(folder / f"{self.name}.cubin").encode()), f"loading {self.name}")
        check(cuda.cuModuleGetFunction(ctypes.byref(self.function), module, self.name.encode()), self.name)
        check(cuda.cuFuncSetAttribute(self.function, 8, self.shared_bytes), "shared memory")

    def bind(self, tensors, syms, tiles, sms):
        """A call of the kernel; `tensors` by name of the parameter."""
        syms = torch.tensor(syms, dtype=torch.int32, device=DEV)
        order = [tensors[p] for p in self.params]
        syms = [syms]
        if self.scratch:
            syms.append(torch.empty(self.scratch * sms * self.blocks_per_sm, dtype=torch.uint8, device=DEV))
        maps = [TensorMap(order[m["param"]], m["tile"], m["swizzle"]) for m in self.maps]
        pointers = [ctypes.c_uint64(t.data_ptr()) for t in [*order, *syms]]
        args = [ctypes.addressof(p) for p in pointers] + [m.address for m in maps]
        args = (ctypes.c_void_p * len(args))(*args)
        blocks = tiles * self.cluster
        if self.persistent:
            blocks = min(blocks, sms * self.blocks_per_sm // self.cluster * self.cluster)
        cluster = Attribute(4, 0, (ctypes.c_uint * 16)(self.cluster, 1, 1))
        dependent = Attribute(6, 0, (ctypes.c_uint * 16)(1))
        wanted = [a for a, is_wanted in ((cluster, self.cluster > 1), (dependent, self.dependent)) if is_wanted]
        attributes = (Attribute * 2)(*wanted)

        def call(keep=(syms, order, maps, pointers, attributes)):
            config = Config((blocks, 1, 1), (self.threads, 1, 1), self.shared_bytes, torch.cuda.current_stream().cuda_stream,
                            ctypes.addressof(attributes), len(wanted))
            check(cuda.cuLaunchKernelEx(ctypes.byref(config), self.function, args, None), f"launch of {self.name}")

        return call


def timed(calls, rounds=7, least_us=500.0):
    """Median microseconds of a call."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    calls[0]()
    end.record()
    torch.cuda.synchronize()
    repeats = max(1, min(400, int(least_us / max(1e3 * start.elapsed_time(end), 3.0)))) // len(calls) + 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()
    times = []
    graph.replay()
    for _ in range(rounds):
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / repeats / len(calls))
    return statistics.median(times)


def codes(shape):
    return (torch.randn(shape, device=DEV) * 100).clamp_(-448, 448).to(FP8)


class Pool:
    """Pages of index keys: 64 rows of codes, then 64 scales."""

    def __init__(self, pages):
        self.bytes = torch.empty(pages, PAGE_BYTES, dtype=torch.uint8, device=DEV)
        for i in range(0, pages, 16384):
            n = min(16384, pages - i)
            self.bytes[i:i + n, :PAGE * DIM] = codes((n, PAGE * DIM)).view(torch.uint8)
            self.bytes[i:i + n, PAGE * DIM:] = (torch.rand(n, PAGE, device=DEV) * 0.01 + 0.005).view(torch.uint8)
        self.keys = self.bytes.view(FP8).as_strided((pages, PAGE, DIM), (PAGE_BYTES, DIM, 1))
        self.scales = self.bytes.view(torch.float32).as_strided((pages, PAGE), (PAGE_BYTES // 4, 1), PAGE * DIM // 4)
        self.order = torch.randperm(pages, device=DEV).int()


def reference(q, w, keys, scales):
    """[T, C] of q [T, H, 128], w [T, H], keys [C, 128]."""
    out = torch.empty(q.shape[0], keys.shape[0], device=DEV)
    k = keys.float()
    for i in range(0, q.shape[0], 32):
        s = torch.einsum("mhd,td->mht", q[i:i + 32].float(), k).relu_()
        out[i:i + 32] = torch.einsum("mht,mh->mt", s, w[i:i + 32])
    return out * scales


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


def decode_sets(kernel, pool, contexts, sms, width=0):
    """Calls with different pages, and the first one's inputs. Of several tokens of a sequence the last sees all of its context."""
    batch, longest, each = len(contexts), max(max(contexts), width), kernel.rows
    pages = -(-max(contexts) // PAGE)
    sets = max(1, min(64, CACHE_BYTES // (batch * pages * PAGE_BYTES) + 1, pool.order.numel() // (batch * pages)))
    calls, first = [], None
    positions = torch.tensor([c - each + i for c in contexts for i in range(each)], dtype=torch.int32, device=DEV)
    tokens = batch * each
    seqs = torch.arange(tokens, dtype=torch.int32, device=DEV) // each
    y = torch.full((tokens + 1, longest), float("nan"), device=DEV)
    for i in range(sets):
        table = pool.order[i * batch * pages:(i + 1) * batch * pages].view(batch, pages).contiguous()
        q, w = codes((tokens, kernel.heads, DIM)), torch.randn(tokens, kernel.heads, device=DEV) * 0.01
        tensors = dict(q=q, weights=w, keys=pool.keys, scales=pool.scales, positions=positions, seqs=seqs, pages=table, y=y[:tokens])
        syms = [tokens, batch, pages, tokens, pool.keys.shape[0], longest]
        tiles = -(-longest // (PAGE * kernel.pages)) * batch
        calls.append(kernel.bind(tensors, syms, tiles, sms))
        first = first or (q, w, table, y)
    return calls, first


def check_decode(kernel, pool, contexts, sms):
    calls, (q, w, table, y) = decode_sets(kernel, pool, contexts, sms)
    y.fill_(float("nan"))
    calls[0]()
    torch.cuda.synchronize()
    worst, bad = 0.0, 0
    for t in range(len(contexts) * kernel.rows):
        b, late = divmod(t, kernel.rows)
        context = max(contexts[b] - kernel.rows + late + 1, 0)
        keys = pool.keys[table[b].long()].reshape(-1, DIM)[:context]
        scales = pool.scales[table[b].long()].reshape(-1)[:context]
        want = reference(q[t:t + 1], w[t:t + 1], keys, scales)[0]
        bad += int(y[t, :context].isnan().sum())
        worst = max(worst, relative(y[t, :context], want)) if context else worst
        rest = y[t, context:]
        bad += int((rest != float("-inf")).sum()) if kernel.fill else int((~rest[63:].isnan() & (rest[63:] != float("-inf"))).sum())
    again = y.clone()
    calls[0]()
    same = torch.equal(again.view(torch.int32), y.view(torch.int32))
    outside = int((~y[len(contexts) * kernel.rows:].isnan()).sum())
    return dict(name=kernel.name, contexts=contexts, error=worst, bad=bad, outside=outside, same=same)


def prefill_inputs(kernel, tokens, context):
    q, w = codes((tokens, kernel.heads, DIM)), torch.randn(tokens, kernel.heads, device=DEV) * 0.01
    keys, scales = codes((context, DIM)), torch.rand(context, device=DEV) * 0.01 + 0.005
    positions = torch.arange(context - tokens, context, dtype=torch.int32, device=DEV)
    return dict(q=q, weights=w, keys=keys, scales=scales, positions=positions)


def prefill(kernel, tokens, context, sms, checked):
    t = prefill_inputs(kernel, tokens, context)
    syms = [tokens, 1, 1, tokens, 1, context]
    rows = -(-tokens // kernel.rows)
    if kernel.kind == "best":
        t["selected"] = torch.full((tokens, kernel.k), -7, dtype=torch.int32, device=DEV)
        call = kernel.bind(t, syms, rows, sms)
    else:
        t["y"] = torch.full((tokens, context), float("nan"), device=DEV)
        call = kernel.bind(t, syms, rows * -(-context // (PAGE * kernel.pages)), sms)
    result = dict(name=kernel.name, tokens=tokens, context=context)
    call()
    torch.cuda.synchronize()
    if checked:
        seen = torch.arange(context, device=DEV)[None] <= t["positions"][:, None]
        want = reference(t["q"], t["w" if "w" in t else "weights"], t["keys"], t["scales"])
        if kernel.kind == "best":
            want.masked_fill_(~seen, float("-inf"))
            chosen = t["selected"].long()
            ascending = bool(((chosen[:, 1:] > chosen[:, :-1]) | (chosen[:, 1:] < 0)).all())
            count = seen.sum(1).clamp(max=kernel.k)
            result["counts"] = bool(((chosen >= 0).sum(1) == count).all())
            least = want.gather(1, chosen.clamp(min=0)).masked_fill(chosen < 0, float("inf")).min(1).values
            best = want.topk(min(kernel.k, context), 1).values
            true = best.gather(1, (count - 1)[:, None])[:, 0]
            result["below"] = ((true - least).clamp(min=0) / want[seen].std()).max().item()
            result["ascending"] = ascending
        else:
            got = t["y"].masked_fill(~seen, 0)
            result["bad"] = int(got.isnan().sum())
            result["error"] = relative(got, want.masked_fill_(~seen, 0))
        out = t["selected"] if kernel.kind == "best" else t["y"].masked_fill(~seen, 0)
        before = out.clone()
        call()
        out = t["selected"] if kernel.kind == "best" else t["y"].masked_fill(~seen, 0)
        result["same"] = torch.equal(before.view(torch.int32), out.view(torch.int32))
        del want, seen
    result["us"] = round(timed([call], rounds=5, least_us=20000.0), 1)
    pairs = float((t["positions"].double() + 1).sum())
    result["tflops"] = round(2 * pairs * kernel.heads * DIM / result["us"] / 1e6, 1)
    return result


HARD = {
    "normal": lambda r, n: torch.randn(r, n, device=DEV),
    "equal": lambda r, n: torch.full((r, n), 1.5, device=DEV),
    "low bits": lambda r, n: (torch.randint(0, 1024, (r, n), device=DEV, dtype=torch.int32) | 0x3F800000).view(torch.float32),
    "shared lead": lambda r, n: (torch.randint(0, 1 << 21, (r, n), device=DEV, dtype=torch.int32) | 0x40000000).view(torch.float32),
    "few values": lambda r, n: torch.randint(0, 5, (r, n), device=DEV).float(),
    "ascending": lambda r, n: torch.arange(n, device=DEV).float().expand(r, n).contiguous(),
    "zeros": lambda r, n: torch.where(torch.rand(r, n, device=DEV) < 0.5, 0.0, -0.0),
    "holes": lambda r, n: torch.where(torch.rand(r, n, device=DEV) < 0.9, float("-inf"), torch.randn(r, n, device=DEV)),
}


def select_sets(kernel, x, lengths, sms):
    rows, n = x.shape
    pages = -(-n // PAGE)
    positions = torch.tensor([l - 1 for l in lengths], dtype=torch.int32, device=DEV)
    table = torch.randperm(rows * pages, device=DEV).int().view(rows, pages).contiguous()
    y = torch.full((rows, kernel.k), -7, dtype=torch.int32, device=DEV)
    tensors = dict(x=x, positions=positions, seqs=torch.arange(rows, dtype=torch.int32, device=DEV), pages=table, selected=y)
    return kernel.bind(tensors, [rows, rows, pages, rows, rows * pages, n], rows, sms), y, table


def check_select(kernel, rows, n, lengths, sms):
    wrong = []
    for name, make in HARD.items():
        x = make(rows, n)
        call, y, table = select_sets(kernel, x, lengths, sms)
        call()
        torch.cuda.synchronize()
        for r, length in enumerate(lengths):
            row = x[r, :length] + 0.0
            some = int((row > float("-inf")).sum())
            order = torch.sort(row, descending=True, stable=True).indices[:min(kernel.k, some)].sort().values
            want = torch.full((kernel.k,), -1, dtype=torch.int64, device=DEV)
            want[:order.numel()] = table[r].long()[order // PAGE] * PAGE + order % PAGE if kernel.slots else order
            if not torch.equal(want, y[r].long()):
                wrong.append((name, r, length, int((want != y[r]).sum())))
    return dict(name=kernel.name, rows=rows, columns=n, wrong=wrong[:4])


def time_select(kernel, rows, n, sms, width=0):
    width = max(width, n)
    sets = max(1, min(96, CACHE_BYTES // (rows * n * 4) + 1))
    xs = [torch.randn(rows, width, device=DEV) for _ in range(sets)]
    calls = [select_sets(kernel, x, [n] * rows, sms)[0] for x in xs]
    us = timed(calls)
    return dict(name=kernel.name, rows=rows, columns=n, width=width, us=round(us, 2), gbs=round(rows * n * 4 / us / 1e3))


def time_select_prefill(kernel, rows, n, sms):
    """Rows of a chunk at the end of n columns: row i has n - rows + i + 1."""
    x = torch.randn(rows, n, device=DEV)
    lengths = list(range(n - rows + 1, n + 1))
    us = timed([select_sets(kernel, x, lengths, sms)[0]], rounds=5, least_us=5000.0)
    return dict(name=kernel.name, rows=rows, columns=n, causal=True, us=round(us, 1), gbs=round(sum(lengths) * 4 / us / 1e3))


def between(kernels, pool, sms, note):
    """Batches and contexts between those of the tables, with the tiles and clusters that the compiler takes for them."""
    kernels = {k.name: k for k in kernels}

    def scores(contexts, width=0, tag=""):
        for rows in (1, 2):
            tokens = len(contexts) * rows
            pages = next(p for most, p in ((1, 1), (8, 2), (24, 4), (128, 8), (2048, 16)) if tokens <= most)
            kernel = kernels.get(f"decode_h64_r{rows}_p{pages}")
            if kernel:
                us = timed(decode_sets(kernel, pool, contexts, sms, width)[0], rounds=5)
                note(dict(name=kernel.name, batch=len(contexts), context=max(contexts), keys=sum(contexts), tag=tag, us=round(us, 2)))

    for batch in (1, 3, 16, 48, 64, 96, 128):
        for context in (5000, 8192, 20480, 32768, 65536, 100000, 131072):
            if batch * -(-context // PAGE) <= pool.order.numel():
                scores([context] * batch)
        scores([8192] * batch, 131072, "wide")
        if batch > 16 and batch < 128:
            generator = torch.Generator().manual_seed(4)
            scores(torch.randint(1000, 100001, (batch,), generator=generator).tolist(), tag="ragged")
    for rows in (1, 3, 4, 8, 16, 32, 48, 64, 96, 128):
        cluster = 8 if rows <= 8 else 4 if rows <= 16 else 2 if rows <= 66 else 1
        for k in (2048, 1024, 512):
            kernel = kernels.get(f"select{k}_c{cluster}")
            for n in (5000, 8192, 20480, 32768, 65536, 100000, 131072):
                if kernel:
                    note(time_select(kernel, rows, n, sms))
    for name in ("prefill_h64_r8_p64", "best2048_h64_r8_p64"):
        for context in (5000, 8192, 20480, 32768, 65536, 100000, 131072):
            if name in kernels:
                note(prefill(kernels[name], 4096, context, sms, False))
                torch.cuda.empty_cache()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--quick", action="store_true", help="checks, and few times")
    parser.add_argument("--between", action="store_true", help="checks, and times of batches and contexts between the usual ones")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    torch.manual_seed(1)
    torch.zeros(1, device=DEV)
    properties = torch.cuda.get_device_properties(0)
    sms = properties.multi_processor_count
    header = {"device": properties.name, "sms": sms, "torch": torch.__version__, "date": time.strftime("%F"), "command": " ".join(sys.argv)}
    print(header, flush=True)
    results = []

    def note(result):
        results.append(result)
        print({k: v if not isinstance(v, float) else float(f"{v:.3g}") if abs(v) < 1 else v for k, v in result.items()}, flush=True)
        if options.out:
            options.out.write_text(json.dumps({**header, "results": results}, indent=1) + "\n")

    kernels = [Kernel(options.folder, e) for e in json.loads((options.folder / "manifest.json").read_text()) if options.only in e["name"]]
    for k in kernels:
        print(k.name, "registers", k.registers, "spills", k.spills, "blocks", k.blocks_per_sm, "shared", k.shared_bytes, flush=True)
    pool = Pool(65536 if options.quick else 262144)
    for k in kernels:
        if k.kind == "scores" and k.paged:
            note(check_decode(k, pool, [8192, 5000, 2, 64, 65, 66, 2049], sms))
        elif k.kind in ("scores", "best"):
            note(prefill(k, 256, 5000, sms, True))
            note(prefill(k, 77, 20480, sms, True))
        else:
            note(check_select(k, 3, 8192, [8192, 5000, 100], sms))
            note(check_select(k, 4, 20003, [20003, 8193, 2049, 9001], sms))
            note(check_select(k, 3, 32768, [32768, 12345, 32767], sms))
            note(check_select(k, 3, 65539, [65539, 65537, 33001], sms))
            note(check_select(k, 2, 131072, [131072, 100001], sms))
            note(check_select(k, 2, 163840, [163840, 131077], sms))
            note(check_select(k, 1, 400000, [400000], sms))
    if options.between:
        return between(kernels, pool, sms, note)
    for k in kernels:
        if k.kind == "scores" and k.paged and not k.fill and k.heads == 64:
            for batch in (1, 4, 16, 64, 128):
                for context in (8192, 32768, 131072):
                    if batch * context // PAGE > pool.order.numel() or (options.quick and batch * context > 1 << 22):
                        continue
                    calls, _ = decode_sets(k, pool, [context] * batch, sms)
                    us = timed(calls)
                    note(dict(name=k.name, batch=batch, context=context, us=round(us, 2), gbs=round(batch * context * 132 / us / 1e3)))
        elif k.kind in ("scores", "best") and not k.paged:
            for context in (8192, 32768, 131072):
                note(prefill(k, 4096, context, sms, False))
                torch.cuda.empty_cache()
        elif k.kind == "select":
            for rows in (1, 4, 16, 64, 128):
                for n in (8192, 32768, 131072):
                    if k.cluster * rows <= 512:
                        note(time_select(k, rows, n, sms))
            if k.cluster == 1 and k.k == 2048 and not k.slots:
                for n in (32768, 131072):
                    note(time_select_prefill(k, 4096, n, sms))
                    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
