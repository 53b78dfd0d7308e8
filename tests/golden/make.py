#!/usr/bin/env python3
"""Makes golden cases: expected outputs of an implementation that is not ours, with a stated rule for ties.

    python make.py golden FOLDER...   golden-lowest.safetensors for checkpoint folders that have golden.safetensors
    python make.py new NAME...        the cases of CASES below, beside this file: config, random weights, golden
    python make.py search NAME        worst margins of a new case for some seeds, to choose one that rounding cannot flip

The implementation is Hugging Face transformers (5.17), float64, eager, on the CPU, one forward pass over the whole text without
a cache. Its top-k is `torch.topk`, which leaves open which of equal scores it takes. Here `torch.topk` is replaced by a stable
descending sort, so that **of equal scores the lowest position is selected**: the rule of dsc. Equal scores are common in small
indexers: a score is a weighted sum of ReLUs, and with few heads all of them are often zero.

`golden-lowest.safetensors` holds

    input_ids   [T] i32
    logits      [T, vocab] f32
    hidden.i    [T, hidden] f32   0: the embedding; i: what goes into layer i; the last: after the final norm
    topk.L      [T, k] i32        layer L's selection, ascending; -1 from there on where a row sees fewer than k positions
    greedy_ids  [24] i32          the greedy continuation

Needs numpy, torch, safetensors, transformers. The same versions give the same bytes.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

HERE = Path(__file__).resolve().parent
GREEDY = 24

V32_ODD = {
    "architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32", "torch_dtype": "bfloat16",
    "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "ep_size": 1, "moe_layer_freq": 1,
    "bos_token_id": 0, "eos_token_id": 1, "vocab_size": 300, "hidden_size": 96, "num_hidden_layers": 3,
    "num_nextn_predict_layers": 1, "first_k_dense_replace": 1, "intermediate_size": 152, "moe_intermediate_size": 40,
    "n_routed_experts": 12, "n_shared_experts": 2, "num_experts_per_tok": 3, "n_group": 3, "topk_group": 2,
    "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    "num_attention_heads": 6, "num_key_value_heads": 6, "q_lora_rank": 96, "kv_lora_rank": 80, "qk_nope_head_dim": 40,
    "qk_rope_head_dim": 16, "v_head_dim": 24, "index_n_heads": 6, "index_head_dim": 48, "index_topk": 24,
    "rms_norm_eps": 1e-06, "rope_theta": 10000, "max_position_embeddings": 163840,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "initializer_range": 0.02, "tie_word_embeddings": False, "use_cache": True,
}
GLM_ODD = {
    "architectures": ["GlmMoeDsaForCausalLM"], "model_type": "glm_moe_dsa", "torch_dtype": "bfloat16",
    "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu",
    "bos_token_id": 0, "eos_token_id": [1, 2], "vocab_size": 131, "hidden_size": 80, "num_hidden_layers": 5,
    "first_k_dense_replace": 2, "intermediate_size": 104, "moe_intermediate_size": 24,
    "n_routed_experts": 6, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 1.5,
    "num_attention_heads": 3, "num_key_value_heads": 3, "q_lora_rank": 48, "kv_lora_rank": 56, "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8, "v_head_dim": 40, "index_n_heads": 5, "index_head_dim": 24, "index_topk": 4,
    "index_topk_freq": 2, "index_skip_topk_offset": 2, "indexer_rope_interleave": True,
    "rms_norm_eps": 1e-05, "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "max_position_embeddings": 163840, "initializer_range": 0.02, "tie_word_embeddings": False, "use_cache": True,
}
CASES = {
    "v32-odd": {"config": V32_ODD, "seed": 10, "prompt": 500},
    "glm-odd": {"config": GLM_ODD, "seed": 11, "prompt": 7},
}


class LowestPosition:
    """While entered, `topk` takes the lowest of equals, and notes how near to a tie its rows of `row` scores are."""

    def __init__(self):
        self.margin = float("inf")

    def __enter__(self):
        self.saved = torch.Tensor.topk, torch.topk

        def topk(x, k, dim=-1, largest=True, sorted=True):
            assert largest
            values, indices = torch.sort(x, dim=dim, descending=True, stable=True)
            if x.shape[dim] > k:
                last, next = values.select(dim, k - 1), values.select(dim, k)
                near = (next > torch.finfo(torch.float32).min) & (last != next)  # masked positions are far below that
                if near.any():
                    self.margin = min(self.margin, (last - next)[near].min().item())
            return torch.return_types.topk((values.narrow(dim, 0, k), indices.narrow(dim, 0, k)))

        torch.Tensor.topk = torch.topk = topk
        return self

    def __exit__(self, *_):
        torch.Tensor.topk, torch.topk = self.saved


def golden(folder, input_ids):
    """Expected outputs of a checkpoint, and margins: of selections (experts and positions), and of each greedy token."""
    config = AutoConfig.from_pretrained(folder)
    torch.set_default_dtype(torch.float64)
    model = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    torch.set_default_dtype(torch.float32)
    chosen = {}
    for i, layer in enumerate(model.model.layers):
        if (indexer := getattr(layer.self_attn, "indexer", None)) is not None:
            indexer.register_forward_hook(lambda _m, _i, out, i=i: chosen.__setitem__(i, out[0]))
    ids = torch.as_tensor(np.asarray(input_ids), dtype=torch.long)[None]
    with torch.no_grad(), LowestPosition() as rule:
        out = model(ids, output_hidden_states=True, use_cache=False)
        tensors = {"input_ids": ids[0].int(), "logits": out.logits[0].float().contiguous()}
        assert len(out.hidden_states) == config.num_hidden_layers + 1
        for i, hidden in enumerate(out.hidden_states):
            tensors[f"hidden.{i}"] = hidden[0].float().contiguous()
        rows = torch.arange(ids.shape[1])[:, None]
        for i, selected in chosen.items():
            k, beyond = selected.shape[-1], 1 << 30
            seen = torch.where(selected <= rows, selected, beyond).sort(dim=-1).values
            tensors[f"topk.{i}"] = torch.where(seen == beyond, -1, seen).int().contiguous()
            assert ((tensors[f"topk.{i}"] >= 0).sum(-1) == (rows[:, 0] + 1).clamp(max=k)).all(), "a visible one was left out"
        logits, text, margins = out.logits[0, -1], ids, []
        greedy = []
        for _ in range(GREEDY):
            two = logits.sort(descending=True).values[:2]
            margins.append((two[0] - two[1]).item())
            greedy.append(int(logits.argmax()))
            text = torch.cat([text, torch.tensor([[greedy[-1]]])], dim=1)
            logits = model(text, use_cache=False).logits[0, -1]
        tensors["greedy_ids"] = torch.tensor(greedy, dtype=torch.int32)
    return tensors, rule.margin, margins


def write_golden(folder, tensors):
    save_file(tensors, folder / "golden-lowest.safetensors", metadata={"ties": "lowest position"})


def weights(config, seed):
    """Random weights by the names of the hub. A projection keeps the scale of what it gets, so that no part of the model is
    lost in another's noise; norms and biases differ from 1 and 0; the router's bias is large enough to change choices."""
    rng = np.random.default_rng(seed)
    out = {}

    def normal(name, *shape, scale=None, mean=0.0, dtype=torch.bfloat16):
        scale = shape[-1] ** -0.5 if scale is None else scale
        values = mean + scale * rng.standard_normal(shape)
        out[name] = torch.from_numpy(values).to(torch.float32).to(dtype)

    def mlp(at, width):
        normal(f"{at}.gate_proj.weight", width, hidden)
        normal(f"{at}.up_proj.weight", width, hidden)
        normal(f"{at}.down_proj.weight", hidden, width)

    c = config
    hidden, heads, q_lora, kv_lora = c["hidden_size"], c["num_attention_heads"], c["q_lora_rank"], c["kv_lora_rank"]
    nope, rope, v = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    normal("model.embed_tokens.weight", c["vocab_size"], hidden, scale=1.0)
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        normal(f"{at}.input_layernorm.weight", hidden, scale=0.1, mean=1.0)
        normal(f"{at}.post_attention_layernorm.weight", hidden, scale=0.1, mean=1.0)
        a = f"{at}.self_attn"
        normal(f"{a}.q_a_proj.weight", q_lora, hidden)
        normal(f"{a}.q_a_layernorm.weight", q_lora, scale=0.1, mean=1.0)
        normal(f"{a}.q_b_proj.weight", heads * (nope + rope), q_lora)
        normal(f"{a}.kv_a_proj_with_mqa.weight", kv_lora + rope, hidden)
        normal(f"{a}.kv_a_layernorm.weight", kv_lora, scale=0.1, mean=1.0)
        normal(f"{a}.kv_b_proj.weight", heads * (nope + v), kv_lora)
        normal(f"{a}.o_proj.weight", hidden, heads * v)
        frequency, offset = c.get("index_topk_freq", 1), c.get("index_skip_topk_offset", 2)
        if max(i - offset + 1, 0) % frequency == 0:
            x = f"{a}.indexer"
            normal(f"{x}.wq_b.weight", c["index_n_heads"] * c["index_head_dim"], q_lora)
            normal(f"{x}.wk.weight", c["index_head_dim"], hidden)
            normal(f"{x}.k_norm.weight", c["index_head_dim"], scale=0.1, mean=1.0)
            normal(f"{x}.k_norm.bias", c["index_head_dim"], scale=0.1)
            normal(f"{x}.weights_proj.weight", c["index_n_heads"], hidden)
        if i < c["first_k_dense_replace"]:
            mlp(f"{at}.mlp", c["intermediate_size"])
            continue
        experts, width = c["n_routed_experts"], c["moe_intermediate_size"]
        normal(f"{at}.mlp.gate.weight", experts, hidden)
        normal(f"{at}.mlp.gate.e_score_correction_bias", experts, scale=0.2, dtype=torch.float32)
        for e in range(experts):
            mlp(f"{at}.mlp.experts.{e}", width)
        mlp(f"{at}.mlp.shared_experts", width * c["n_shared_experts"])
    normal("model.norm.weight", hidden, scale=0.1, mean=1.0)
    normal("lm_head.weight", c["vocab_size"], hidden, scale=2 * hidden**-0.5)
    return out


def new(name, seed, folder):
    case = CASES[name]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(case["config"], indent=1) + "\n")
    save_file(weights(case["config"], seed), folder / "model.safetensors", metadata={"format": "pt"})
    rng = np.random.default_rng([seed, 1])
    prompt = [0, *rng.integers(3, case["config"]["vocab_size"], case["prompt"] - 1)]
    tensors, select, greedy = golden(folder, prompt)
    write_golden(folder, tensors)
    facts = {
        "name": name, "seed": seed, "prompt": case["prompt"], "select_margin": select, "greedy_margin": greedy,
        "source": "transformers 5.17.0, float64, eager, ties to the lowest position",
    }
    (folder / "case.json").write_text(json.dumps(facts, indent=1) + "\n")
    return select, min(greedy)


def main(args):
    torch.set_num_threads(1)
    match args:
        case ["golden", *folders] if folders:
            for folder in map(Path, folders):
                ids = load_file(folder / "golden.safetensors")["input_ids"]
                tensors, select, greedy = golden(folder, ids)
                write_golden(folder, tensors)
                print(f"{folder.name}: least margin of a selection {select:.1e}, of a greedy token {min(greedy):.1e}")
        case ["new", *names] if names:
            for name in names:
                select, greedy = new(name, CASES[name]["seed"], HERE / name)
                print(f"{name}: least margin of a selection {select:.1e}, of a greedy token {greedy:.1e}")
        case ["search", name]:
            import tempfile

            with tempfile.TemporaryDirectory() as folder:
                for seed in range(1, 13):
                    select, greedy = new(name, seed, Path(folder))
                    print(f"seed {seed}: selection {select:.1e}, greedy {greedy:.1e}", flush=True)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
