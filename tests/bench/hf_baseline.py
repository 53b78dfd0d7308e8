#!/usr/bin/env python3
"""CPU baseline: Hugging Face transformers on a model in the official DeepSeek-V3.2 FP8 layout.

Needs torch, transformers >= 5.17 (DeepseekV32ForCausalLM), safetensors, tokenizers; --compile needs a C++ compiler.
The e4m3 weights are dequantised once to float32 (the MTP layer is dropped), so what is timed is float32 PyTorch in
eval mode under no_grad, batch 1, KV cache on:
  decode   384-token golden prompt, then 64 greedy tokens one at a time: median ms per token (model call and argmax)
  prefill  bos + the first 1023 tokens of eval.txt, logits of the last position only: median ms of 5
Each attention (eager, sdpa) x experts (eager, batched_mm, grouped_mm) setting of transformers is timed, decode with a
dynamic and a static cache, and the best of each figure reported; --compile adds the same for torch.compile (static
cache). Every setting checks itself first: last logits of the golden prompt (relative error < 1e-3), golden greedy
tokens; compiled ones by their tokens, and by the prefill logits of the others.
MODEL_DIR also holds golden.safetensors, eval.txt and tokenizer.json.

glibc by default returns each large buffer to the system and faults it in anew, which costs PyTorch 40 % of the prefill
time. So the script restarts itself with glibc.malloc tunables that keep the memory; --plain-malloc leaves it alone.

usage: hf_baseline.py MODEL_DIR [--threads 2] [--compile] [--plain-malloc] [--json OUT]
"""
import argparse
import json
import os
import re
import statistics
import sys
import time
from pathlib import Path

import tokenizers
import torch
import transformers
from safetensors.torch import load_file
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM, DynamicCache, StaticCache

ATTENTION = ("eager", "sdpa")
EXPERTS = ("eager", "batched_mm", "grouped_mm")
PROMPT, NEW, PREFILL, REPEATS = 384, 64, 1024, 5
TOLERANCE = 1e-3
MALLOC = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4000000000:glibc.malloc.trim_threshold=8000000000"


def read_weights(folder, config):
    """The official tensors as float32 under the names of DeepseekV32ForCausalLM."""
    raw = {}
    for file in sorted(folder.glob("model*.safetensors")):
        raw.update(load_file(file))
    rows, cols = config.quantization_config["weight_block_size"]
    out = {}
    for name, tensor in raw.items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if name.endswith("_scale_inv") or (layer and int(layer[1]) >= config.num_hidden_layers):
            continue
        tensor = tensor.float()
        scale = raw.get(name + "_scale_inv")
        if scale is not None:
            scale = scale.repeat_interleave(rows, 0).repeat_interleave(cols, 1)
            tensor = tensor * scale[: tensor.shape[0], : tensor.shape[1]]
        out[name] = tensor
    # transformers stacks the experts: gate over up, one tensor per layer
    for i in range(config.first_k_dense_replace, config.num_hidden_layers):
        path = f"model.layers.{i}.mlp.experts"
        gate, up, down = (
            torch.stack([out.pop(f"{path}.{e}.{part}_proj.weight") for e in range(config.n_routed_experts)])
            for part in ("gate", "up", "down")
        )
        out[f"{path}.gate_up_proj"] = torch.cat((gate, up), dim=1)
        out[f"{path}.down_proj"] = down
    return out


def load_model(folder):
    config = DeepseekV32Config.from_pretrained(folder)
    weights = read_weights(folder, config)
    del config.quantization_config  # the weights are float32 by now
    config.dtype = torch.float32
    model = DeepseekV32ForCausalLM(config).float().eval()
    model.load_state_dict(weights, strict=True)  # strict: every name and shape has to match
    return model


def relative_error(got, want):
    return ((got - want).norm() / want.norm()).item()


def decode(model, golden, static=False, step=None):
    """Median ms of the steps after the prompt; their tokens have to begin with the golden ones."""
    prompt = golden["prompt_ids"].long()[None]
    assert prompt.shape[1] == PROMPT
    cache = StaticCache(model.config, max_cache_len=PROMPT + NEW) if static else DynamicCache(config=model.config)
    token = model(prompt, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
    step = step or model
    tokens, seconds = [token.item()], []
    for position in range(PROMPT, PROMPT + NEW):
        start = time.perf_counter()
        out = step(token, past_key_values=cache, position_ids=torch.tensor([[position]]))
        token = out.logits.argmax(-1)
        tokens.append(token.item())
        seconds.append(time.perf_counter() - start)
    greedy = golden["greedy.long.ids"].tolist()
    assert tokens[: len(greedy)] == greedy, "greedy tokens differ from the golden ones"
    return 1e3 * statistics.median(seconds)


def prefill(forward, ids):
    """Median ms of the calls (the first is the warm-up), and the last logits."""
    seconds = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        logits = forward(ids, use_cache=True, logits_to_keep=1).logits[0, -1]
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds[1:]), logits


def cpu_name():
    try:
        return re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return "unknown"


def settings(model):
    for attention in ATTENTION:
        for experts in EXPERTS:
            model.set_attn_implementation(attention)
            model.set_experts_implementation(experts)
            yield {"attention": attention, "experts": experts}


def best(runs, prefix=""):
    out = {}
    for figure in ("decode_ms_per_token", "prefill_1024_ms"):
        run = min((run for run in runs if figure in run), key=lambda run: run[figure])
        out[prefix + figure] = run[figure]
        out[prefix + figure + "_setting"] = {k: run[k] for k in ("attention", "experts")}
    return out


@torch.no_grad()
def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("model_dir", type=Path)
    args.add_argument("--threads", type=int, default=2)
    args.add_argument("--compile", action="store_true", help="torch.compile too (minutes)")
    args.add_argument("--plain-malloc", action="store_true", help="leave glibc.malloc as it is")
    args.add_argument("--json", type=Path, help="also write the result here")
    args = args.parse_args()

    torch.set_num_threads(args.threads)
    model = load_model(args.model_dir)
    golden = load_file(args.model_dir / "golden.safetensors")
    tokenizer = tokenizers.Tokenizer.from_file(str(args.model_dir / "tokenizer.json"))
    text = (args.model_dir / "eval.txt").read_text(encoding="utf-8")
    text = tokenizer.encode(text, add_special_tokens=False).ids
    ids = torch.tensor([[model.config.bos_token_id] + text])[:, :PREFILL]

    runs, compiled = [], []
    for run in settings(model):
        got = model(golden["prompt_ids"].long()[None]).logits[0, -1]
        error = relative_error(got, golden["logits"][-1])
        assert error < TOLERANCE, f"{run}: last logits are off by {error:.2e}"
        run["last_logits_rel_error"] = error
        run["decode_ms_dynamic_cache"] = decode(model, golden)
        run["decode_ms_static_cache"] = decode(model, golden, static=True)
        run["decode_ms_per_token"] = min(run["decode_ms_dynamic_cache"], run["decode_ms_static_cache"])
        run["prefill_1024_ms"], reference = prefill(model, ids)
        runs.append(run)

    for run in settings(model) if args.compile else ():
        if run["experts"] == "eager":
            continue  # its loop over the experts does not compile to one graph
        torch.compiler.reset()
        forward = torch.compile(model.forward, dynamic=False)
        decode(model, golden, static=True, step=forward)  # compiles
        run["decode_ms_per_token"] = decode(model, golden, static=True, step=forward)
        run["prefill_1024_ms"], logits = prefill(forward, ids)
        error = relative_error(logits, reference)
        assert error < TOLERANCE, f"{run}: compiled prefill logits are off by {error:.2e}"
        compiled.append(run)

    result = best(runs)
    if compiled:
        result |= best(compiled, "compiled_")
    result |= {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "malloc": os.environ.get("GLIBC_TUNABLES", "plain"),
        "runs": runs,
        "compiled_runs": compiled,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    if "GLIBC_TUNABLES" not in os.environ and "--plain-malloc" not in sys.argv:
        os.environ["GLIBC_TUNABLES"] = MALLOC
        os.execv(sys.executable, [sys.executable, *sys.argv])
    main()
