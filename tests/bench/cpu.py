#!/usr/bin/env python3
"""The tiny model on the CPU: dsc and Hugging Face transformers, one after the other in one run.

    python3 tests/bench/cpu.py target/release/dsc [--out FILE.json]      (`cargo xtask bench` builds dsc and calls this)

Decode is one sequence, 64 steps after a context of 384 tokens; prefill is 1024 tokens; figures are medians. transformers runs
in float32 with its KV cache on, two threads, eager attention (`hf_baseline.py` beside this file says how); it is left out,
and the file says so, where torch and transformers are not installed. Run it on an idle machine.
"""

import argparse
import json
import pathlib
import platform
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
MODEL = HERE.parent.parent / "examples" / "tiny-model"


def bench_dsc(dsc, numerics, folder):
    bundle = folder / f"{numerics}.dsc"
    start = time.perf_counter()
    subprocess.run([dsc, "compile", MODEL, "-o", bundle, "--numerics", numerics, "--json"], check=True, stdout=subprocess.DEVNULL)
    compile_s = time.perf_counter() - start
    out = subprocess.run(
        [dsc, "bench", bundle, "--weights", MODEL, "--threads", "2", "--steps", "256", "--json"],
        check=True, capture_output=True, text=True,
    ).stdout
    result = json.loads(out)
    return {
        "compile_s": round(compile_s, 3),
        "decode_ms_per_token": result["decode"]["median_us"] / 1e3,
        "prefill_1024_ms": result["prefill"]["median_us"] / 1e3,
        "raw": {k: result[k] for k in ("decode", "prefill", "device")},
    }


def bench_transformers(folder):
    out = folder / "hf.json"
    run = subprocess.run([sys.executable, HERE / "hf_baseline.py", MODEL, "--json", out], capture_output=True, text=True)
    if run.returncode != 0:
        return {"skipped": (run.stderr.strip().splitlines() or ["failed"])[-1]}
    return json.loads(out.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dsc")
    parser.add_argument("--out", type=pathlib.Path, help="also write the results here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        results = {
            "date": time.strftime("%Y-%m-%d"),
            "cpu": cpu_name(),
            "command": "cargo xtask bench",
            "dsc": {n: bench_dsc(args.dsc, n, folder) for n in ("deployed", "exact")},
            "transformers": bench_transformers(folder),
        }
    text = json.dumps(results, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


def cpu_name():
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
