#!/usr/bin/env python3
"""What the loops of AMD kernels issue, from their assembly.

    dsc compile MODEL --target gfx950 --emit asm --emit-dir DIR
    python3 tests/bench/loops.py DIR [TEXT]        # kernels whose name contains TEXT

For each loop with matrix instructions, without the loops inside it: how many of the instructions these are; their share of issue cycles if
nothing overlapped (a matrix instruction takes what its FLOP take at the chip's dense rate, any other 4 cycles); accesses of LDS and global memory that
move 16 bytes, of all; accesses of scratch; waits that drain a counter to zero. Not a measurement: it knows nothing of latency.
"""
import pathlib
import re
import sys

MFMA = re.compile(r"v_mfma_(?:scale_)?f32_(\d+)x(\d+)x(\d+)_(\w+)")


def loops(lines):
    """The loops' own lines: from a label to the last branch back to it, without loops inside."""
    labels, ends = {}, {}
    for at, line in enumerate(lines):
        if label := re.match(r"(\.LBB\d+_\d+):", line):
            labels[label[1]] = at
        branch = re.search(r"s_c?branch\w*\s+(\.LBB\d+_\d+)", line)
        if branch and branch[1] in labels:
            ends[labels[branch[1]]] = at
    for first, last in ends.items():
        inside = [(f, e) for f, e in ends.items() if f > first and e <= last]
        yield [line for at, line in enumerate(lines) if first <= at <= last and not any(f <= at <= e for f, e in inside)]


def cycles(op, per_cycle):
    """Issue cycles of a SIMD for one instruction, at `per_cycle` FLOP of bf16 a cycle and SIMD."""
    if not (m := MFMA.match(op)):
        return 4
    fast = 2 if "fp8" in m[4] or "f8" in m[4] else 1
    return 2 * int(m[1]) * int(m[2]) * int(m[3]) / (per_cycle * fast)


def report(path, text):
    lines = text.splitlines()
    per_cycle = 1024 if "gfx950" in text[:400] else 512
    for own in loops(lines):
        ops = [m[1] for line in own if (m := re.match(r"\s+([a-z]\w+)", line))]
        if not (matrix := [op for op in ops if MFMA.match(op)]):
            continue
        share = sum(cycles(op, per_cycle) for op in matrix) / sum(cycles(op, per_cycle) for op in ops)
        local = [op for op in ops if op.startswith(("ds_read", "ds_write"))]
        remote = [op for op in ops if op.startswith(("global_load", "global_store", "buffer_load"))]
        wide = lambda some: f"{sum(op.endswith(('b128', 'x4')) for op in some)}/{len(some)}"
        waits = [line for line in own if "s_waitcnt" in line]
        drains = sum(bool(re.search(r"cnt\(0\)", line)) for line in waits)
        scratch = sum(op.startswith("scratch") for op in ops)
        print(f"{path.stem}: {len(matrix)} of {len(ops)} matrix, {share:.0%} of issue cycles; 16 bytes: LDS {wide(local)}, "
              f"global {wide(remote)}; scratch {scratch}; waits {len(waits)}, to zero {drains}")


def main():
    folder, part = pathlib.Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else ""
    for path in sorted(folder.glob("*.s")):
        if part in path.stem:
            report(path, path.read_text())


if __name__ == "__main__":
    main()
