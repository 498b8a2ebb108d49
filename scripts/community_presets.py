"""Makes the presets of kaito_preset_community from a table of open models.

    .venv/bin/python scripts/community_presets.py open-models.csv
    .venv/bin/python scripts/community_presets.py --check open-models.csv

The table has one model a line: hub_id, license, weights_gib, architecture, context_tokens, hidden_size, layers, attention_heads,
kv_heads, head_dim, kv_lora_rank, qk_rope_head_dim, quant_method, load_format, config_format, tokenizer_mode, kaito_preset_name,
revision. What it lacks is derived below where that can be checked, and left out where it cannot: such a model can be served and
planned, and not tuned. The same table gives the same file, byte for byte. What could not be known is printed.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kaito_core.models.architecture import Dense, linears_of

TARGET = (
    Path(__file__).resolve().parent.parent / "plugins/kaito_preset_community/src/kaito_preset_community/presets.json"
)
GIB = 1 << 30

ELSEWHERE = ("microsoft/phi-", "microsoft/Phi-")
"""Models of kaito_preset_phi3: two plugins with one name would be an error."""

VOCABULARY = {
    # Defaults of these classes' configurations in transformers 5.24; a test compares them.
    "DeepseekV32ForCausalLM": 129_280,
    "DeepseekV3ForCausalLM": 129_280,
    "DeepseekV4ForCausalLM": 129_280,
    "Gemma3ForConditionalGeneration": 262_208,
    "Gemma4ForConditionalGeneration": 262_144,
    "Gemma4UnifiedForConditionalGeneration": 262_144,
    "GlmMoeDsaForCausalLM": 154_880,
    "GptOssForCausalLM": 201_088,
    "MiniMaxM2ForCausalLM": 200_064,
    "Mistral3ForConditionalGeneration": 131_072,
    "NemotronHForCausalLM": 131_072,
    "Qwen3ForCausalLM": 151_936,
    "Qwen3_5ForConditionalGeneration": 248_320,
    "Qwen3_5MoeForConditionalGeneration": 248_320,
    # Of these models themselves: Llama 3, Qwen 2.5 from 7 billion parameters on, Mistral 7B 0.3, Granite 4. `_intermediate` finds a
    # whole number of 256 features only when they are right.
    "GraniteForCausalLM": 100_352,
    "LlamaForCausalLM": 128_256,
    "MistralForCausalLM": 32_768,
    "Qwen2ForCausalLM": 152_064,
    # Of the makers' other models, and not checked: Mistral's tokenizer since Nemo, Kimi K2, Nemotron Nano 2.
    "KimiK25ForConditionalGeneration": 163_840,
    "MistralLarge3ForCausalLM": 131_072,
    "NemotronH_Nano_VL_V2": 131_072,
}
"""Entries of the embeddings by architecture, which the table lacks: serving needs memory for them."""

STOPS = {
    "LlamaForCausalLM": ("<|eot_id|>", "<|end_of_text|>"),
    "MistralForCausalLM": ("</s>",),
    "Qwen2ForCausalLM": ("<|im_end|>", "<|endoftext|>"),
    "deepseek-ai/DeepSeek-R1-Distill": ("<｜end▁of▁sentence｜>",),
}
"""Tokens that end an answer, by the beginning of a hub id or by architecture; only models that can be tuned need them here."""

BIASED = ("Qwen2ForCausalLM",)
"""Architectures with a bias at query, key and value."""

SERVED_ONLY = {
    "GraniteForCausalLM": "it scales its logits, which the loss that is computed in chunks does not do",
}
"""Architectures whose layers are known and that are not tuned all the same."""

QUANTIZATIONS = {
    "MIXED_PRECISION": "modelopt_mixed",
    "float-quantized": "compressed-tensors",
    "nvfp4-pack-quantized": "compressed-tensors",
    "pack-quantized": "compressed-tensors",
}
"""vLLM's names of what the table calls by its form in the files."""

GATED = ("llama3", "gemma")
"""Beginnings of licences whose models are given out on the hub after their terms have been accepted. The table does not say it."""

PARSERS: tuple[tuple[str, str, str], ...] = (
    ("deepseek-ai/DeepSeek-R1-Distill", "", "deepseek_r1"),
    ("deepseek-ai/DeepSeek-R1", "deepseek_v3", "deepseek_r1"),
    ("deepseek-ai/DeepSeek-V3-", "deepseek_v3", ""),
    ("deepseek-ai/DeepSeek-V3.2", "deepseek_v32", "deepseek_v3"),
    ("deepseek-ai/DeepSeek-V4", "deepseek_v4", "deepseek_v4"),
    ("google/gemma-4", "gemma4", "gemma4"),
    ("meta-llama/Llama-3", "llama3_json", ""),
    ("mistralai/Mistral-7B-v", "", ""),  # a base model: it was not taught to call tools
    ("mistralai/", "mistral", ""),
    ("MiniMaxAI/MiniMax-M2", "minimax_m2", "minimax_m2"),
    ("moonshotai/Kimi-K2", "kimi_k2", "kimi_k2"),
    ("openai/gpt-oss", "openai", "openai_gptoss"),
    ("Qwen/Qwen2.5", "hermes", ""),
    ("Qwen/Qwen3-", "hermes", "qwen3"),
    ("Qwen/Qwen3.", "qwen3_coder", "qwen3"),
)
"""vLLM's parsers of tool calls and of reasoning by the beginning of the hub id, the first that fits; as vLLM 0.32 names them (its
guides "Tool Calling" and "Reasoning Outputs")."""


def presets(rows: list[Mapping[str, str]]) -> tuple[dict[str, Any], list[str]]:
    """The presets by name in the table's order, and what is not known of them. ValueError for two presets of one name."""
    found: dict[str, Any] = {}
    owners: dict[str, str] = {}
    unknown: list[str] = []
    for row in rows:
        if row["hub_id"].startswith(ELSEWHERE):
            continue
        name, preset, lacks = _preset(row)
        for each in (name, *preset["aliases"]):
            if owners.setdefault(each, row["hub_id"]) != row["hub_id"]:
                raise ValueError(f"{row['hub_id']} and {owners[each]} would both be called {each}")
        found[name] = preset
        unknown += [f"{name}: {each}" for each in lacks]
    return found, unknown


def _preset(row: Mapping[str, str]) -> tuple[str, dict[str, Any], list[str]]:
    hub, short = row["hub_id"], row["hub_id"].rpartition("/")[2].lower()
    name = row["kaito_preset_name"] or short
    lacks = [] if row["revision"] else ["the table pins no revision: the branch main is taken"]
    architecture, tunable, missing = _architecture(row)
    quantization = QUANTIZATIONS.get(row["quant_method"], row["quant_method"])
    weights = round(float(row["weights_gib"]) * GIB)
    licence, vllm = row["license"], _vllm(row)
    if not any(k.endswith("parser") for k in vllm):
        lacks.append("no parser of tool calls is known")
    description = (
        f"{hub.rpartition('/')[2]}, {float(row['weights_gib']):g} GiB, {int(row['context_tokens']):,} tokens of context"
    )
    preset: dict[str, Any] = {
        "aliases": [short] if short != name else [],
        "hub": hub,
        "revision": row["revision"] or "main",
        "licence": licence,
        "gated": licence.startswith(GATED),
        "description": description,
        "architecture": architecture,
        "stop_tokens": list(_stops(row)) if tunable else [],
        "quantization": quantization,
        "weights": 0 if tunable else weights,
        "vllm": vllm,
    }
    return name, preset, lacks + missing


def _architecture(row: Mapping[str, str]) -> tuple[dict[str, Any], bool, list[str]]:
    """The numbers, whether they suffice for tuning, and what is missing."""
    name, layers, hidden, heads = (
        row["architecture"],
        int(row["layers"]),
        int(row["hidden_size"]),
        int(row["attention_heads"]),
    )
    kv_heads = int(row["kv_heads"])
    head_dim = int(row["head_dim"]) if row["head_dim"] else hidden // heads
    latent = int(row["kv_lora_rank"]) + int(row["qk_rope_head_dim"]) if row["kv_lora_rank"] else None
    found: dict[str, Any] = {
        "name": name,
        "parameters": 0,
        "layers": layers,
        "hidden": hidden,
        "intermediate": 0,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "vocab": VOCABULARY[name],
        "context": int(row["context_tokens"]),
        "linears": {},
        "tied_embeddings": False,
        "cache_width": latent,
    }
    bytes_ = float(row["weights_gib"]) * GIB
    intermediate = None if row["quant_method"] else _intermediate(found, bytes_)
    if intermediate is not None:
        queries, keys = heads * head_dim, kv_heads * head_dim
        linears = linears_of(Dense(), hidden, intermediate, queries, keys)
        found |= {"intermediate": intermediate, "parameters": _besides(found) + layers * 3 * hidden * intermediate}
        if name in SERVED_ONLY:
            return found, False, [f"not tuned: {SERVED_ONLY[name]}"]
        return {**found, "linears": linears}, True, []
    if not row["quant_method"]:
        found["parameters"] = round(bytes_ / 2)
        return (
            found,
            False,
            ["the shapes of its layers are not known; parameters from the size of the weights, two bytes each"],
        )
    sized = re.search(r"(?<![\d.])(\d+(?:\.\d+)?)B(?![A-Za-z])", row["hub_id"], re.I)
    if sized:
        found["parameters"] = round(float(sized[1]) * 1e9)
        return found, False, [f"the shapes of its layers are not known; parameters from its name ({sized[0]})"]
    return found, False, ["neither the shapes of its layers nor its parameters are known"]


def _besides(a: Mapping[str, Any]) -> int:
    """Parameters of everything but the feed-forward matrices: embeddings, head, attention, norms."""
    queries, keys = a["heads"] * a["head_dim"], a["kv_heads"] * a["head_dim"]
    layer = a["hidden"] * (queries + 2 * keys) + queries * a["hidden"] + 2 * a["hidden"]
    layer += queries + 2 * keys if a["name"] in BIASED else 0
    return int(2 * a["vocab"] * a["hidden"] + a["hidden"] + a["layers"] * layer)


def _intermediate(a: Mapping[str, Any], bytes_: float) -> int | None:
    """The feed-forward size that makes the weights as large as they are, in bfloat16; None for other kinds of layers.

    The table rounds to a hundredth of a GiB, which leaves a few features to choose from: one of them has to be a multiple of 256,
    as in all of these models. That one is found shows that the vocabulary and the rest are right as well."""
    if a["name"] not in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "GraniteForCausalLM"):
        return None
    one = 3 * a["hidden"] * a["layers"]
    exact, slack = (bytes_ / 2 - _besides(a)) / one, 0.005 * GIB / 2 / one
    nearest: int = round(exact / 256) * 256
    if abs(nearest - exact) > slack + 0.5:
        raise ValueError(
            f"{a['name']} of {bytes_ / GIB:.2f} GiB: the feed-forward size would be {exact:.1f}±{slack:.1f}"
        )
    return nearest


def _vllm(row: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for column in ("load_format", "config_format", "tokenizer_mode"):
        if row[column]:
            found[column.replace("_", "-")] = row[column]
    for start, tools, reasoning in PARSERS:
        if row["hub_id"].startswith(start):
            if tools:
                found["tool-call-parser"] = tools
            if reasoning:
                found["reasoning-parser"] = reasoning
            break
    return found


def _stops(row: Mapping[str, str]) -> tuple[str, ...]:
    for start, stops in STOPS.items():
        if row["hub_id"].startswith(start):
            return stops
    return STOPS[row["architecture"]]


def text_of(rows: list[Mapping[str, str]]) -> tuple[str, list[str]]:
    """The file, and what is not known."""
    found, unknown = presets(rows)
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n", unknown


def main(arguments: list[str]) -> int:
    check = "--check" in arguments
    files = [a for a in arguments if not a.startswith("-")]
    if len(files) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    with Path(files[0]).open(encoding="utf-8", newline="") as f:
        text, unknown = text_of(list(csv.DictReader(f)))
    if check:
        same = TARGET.is_file() and TARGET.read_text(encoding="utf-8") == text
        print("up to date" if same else f"{TARGET.name} is not what this table makes", file=sys.stderr)
        return 0 if same else 1
    TARGET.write_text(text, encoding="utf-8")
    for line in unknown:
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
