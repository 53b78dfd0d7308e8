"""Registers the kernels of dsc with a benchmark of sparse-attention kernels that has an `impl(section, name)` decorator, beside
the kernels of others and on the same inputs:

    dsc compile --kernels dsa --target sm_90a --scale 0.041666668 -o libs/dsa-h128.dsc         # and --heads 64, 16: dsa-h64.dsc, ..
    DSC_KERNELS=libs PYTHONPATH=python DSC_LIBRARY=target/release/libdsc_capi.so \\
        python3 bench_peers.py --extra tests/bench/ours.py --out results.json

The module is `bench_peers`; a section hands over a case with the fields used here. A call is a closure on one set of inputs; it is
captured in a CUDA graph. Where no library has the case's heads, nothing is registered for it. DSC_NAME is the name in the results.

Implementations of a case are timed one after the other. Where the work meets the GPU's power cap, the clock falls from one to the next, and the last
has the slowest, which is this one; DSC_FIRST=1 times it first. DSC_REST=0.2 lets the GPU rest for so many seconds before each is timed, those of others too.
"""
import glob
import os
import time

import bench_peers
import dsc_kernels
import torch
from bench_peers import impl

NAME = os.environ.get("DSC_NAME", "dsc")
REST = float(os.environ.get("DSC_REST", 0))
LIBRARIES = {}
for _path in sorted(glob.glob(os.path.join(os.environ.get("DSC_KERNELS", "."), "*.dsc"))):
    _library = dsc_kernels.open(_path)
    LIBRARIES.setdefault(_library.facts["heads"], _library)


def rested(measure):
    def after_rest(*args, **kwargs):
        torch.cuda.synchronize()
        time.sleep(REST)
        return measure(*args, **kwargs)

    return after_rest


if REST:
    bench_peers.time_calls = rested(bench_peers.time_calls)


def library(heads=None):
    """The library for so many heads; for operations without heads, any."""
    return LIBRARIES.get(heads) if heads is not None else next(iter(LIBRARIES.values()), None)


def empty(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="cuda")


@impl("indexer_decode", NAME)
def _(c):
    lib = library()
    if lib is None or c.nn not in lib.facts["queries"]:
        return None
    outs = [empty(c.b * c.nn, c.width) for _ in c.sets[:4]]
    return [lambda s=s, o=outs[i % 4]: lib.paged_logits(s.q, c.pool, s.w, c.ctxl, s.bt, out=o)
            for i, s in enumerate(c.sets)]


@impl("indexer_prefill", NAME)
def _(c):
    lib = library()
    if lib is None:
        return None
    out = empty(c.sq, c.kv)
    return [lambda s=s: lib.ragged_logits(s.q, s.k, s.s, s.w, c.ks, c.ke, out=out) for s in c.sets]


@impl("topk_decode", NAME)
def _(c):
    lib = library()
    return lib and [lambda s=s: lib.topk_decode(s.logits, c.lengths, out=c.out) for s in c.sets]


@impl("topk_prefill", NAME)
def _(c):
    lib = library()
    return lib and [lambda s=s: lib.topk_prefill(s.logits, c.zeros, c.lengths, out=c.out) for s in c.sets]


@impl("mla_decode", NAME)
def _(c):
    lib = library(c.h)
    return lib and [lambda s=s: lib.mla_decode(s.q, c.pool, s.idx)[0] for s in c.sets]


@impl("mla_prefill", NAME)
def _(c):
    lib = library(c.h)
    return lib and [lambda s=s: lib.mla_prefill(s.q, s.kv, s.idx)[0] for s in c.sets]


@impl("chain_decode", NAME)
def _(c):
    lib = library(c.h)
    return lib and [lambda s=s: lib.decode(s.q, c.pool, s.w, c.lengths, s.bt, s.qm, c.mla)[0] for s in c.sets]


@impl("chain_prefill", NAME)
def _(c):
    lib = library(c.params["heads"])
    return lib and [lambda s=s: lib.prefill(s.q, s.k, s.s, s.w, c.ks, c.ke, s.qm, s.kvm)[0] for s in c.sets]


if os.environ.get("DSC_FIRST"):
    for _all in bench_peers.IMPLS.values():
        _all.sort(key=lambda one: one[0] != NAME)
