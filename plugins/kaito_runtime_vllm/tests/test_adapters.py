"""Adapter folders, good and bad, and what an endpoint takes from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from vllm_models import PHI_3_MINI

from kaito_core.problems import UserError
from kaito_runtime_vllm import adapters


def folder(at: Path, template: str = "", stops: list[str] | None = None, **config: Any) -> Path:
    at.mkdir(parents=True)
    written = {
        "peft_type": "LORA",
        "r": 16,
        "lora_alpha": 32,
        "base_model_name_or_path": PHI_3_MINI.source.hub,
        **config,
    }
    (at / "adapter_config.json").write_text(json.dumps(written))
    (at / "adapter_model.safetensors").write_bytes(b"weights")
    if template:
        (at / "chat_template.jinja").write_text(template)
    if stops is not None:
        (at / "kaito.json").write_text(json.dumps({"stop_tokens": stops}))
    return at


def look(at: Path, allowed: int = 64) -> adapters.Pinned:
    return adapters.look("mine", at, PHI_3_MINI, allowed)


def test_what_the_tuner_leaves_is_read(tmp_path: Path) -> None:
    found = look(folder(tmp_path / "a", "{{ x }}", ["<|end|>"], rank_pattern={"o_proj": 32}))
    assert (found.adapter.rank, found.template, found.stop_tokens) == (32, "{{ x }}", ("<|end|>",))


@pytest.mark.parametrize(
    "base", ["microsoft/phi-3-mini-128k-instruct", "Microsoft/Phi-3-Mini-128k-Instruct", "phi-3-mini-128k-instruct",
             "/workspace/tfs/weights", "./weights", ""]
)  # fmt: skip
def test_the_base_may_be_named_in_any_way_or_be_a_path_of_where_it_was_trained(tmp_path: Path, base: str) -> None:
    look(folder(tmp_path / "a", base_model_name_or_path=base))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"base_model_name_or_path": "meta-llama/Llama-3.1-8B"}, "was trained for meta-llama/Llama-3.1-8B, and the model here is microsoft/phi-3"),
        ({"r": 128}, "has rank 128, and there is room for rank 64"),
        ({"rank_pattern": {"o_proj": 200}}, "has rank 200"),
        ({"r": "16"}, "does not say its rank"),
        ({"r": True}, "does not say its rank"),
        ({"peft_type": "PROMPT_TUNING"}, "is of the kind PROMPT_TUNING"),
        ({"use_dora": True}, "has DoRA (`use_dora`), which vLLM cannot serve"),
        ({"modules_to_save": ["lm_head"]}, "has whole modules"),
        ({"bias": "all"}, "has trained biases"),
    ],
)  # fmt: skip
def test_what_vllm_would_stumble_over_is_said_in_words(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match="the adapter 'mine'") as e:
        look(folder(tmp_path / "a", **config))
    assert words in str(e.value)


def test_folders_that_are_no_adapters(tmp_path: Path) -> None:
    def complaint(at: Path) -> str:
        with pytest.raises(UserError) as e:
            look(at)
        return str(e.value)

    assert "is not there" in complaint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "has no adapter_config.json" in complaint(tmp_path / "empty")
    broken = folder(tmp_path / "broken")
    (broken / "adapter_config.json").write_text('{"r": ')
    assert "that is no JSON object" in complaint(broken)
    (broken / "adapter_config.json").write_text("[" * 100_000)
    assert "that is no JSON object" in complaint(broken)
    (broken / "adapter_config.json").write_bytes(b" " * (2 << 20))
    assert "more than any real one" in complaint(broken)
    pickled = folder(tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    assert "only a pickled file, which is never loaded" in complaint(pickled)


def test_the_template_of_the_training_is_the_endpoints(tmp_path: Path) -> None:
    plain, pinned = look(folder(tmp_path / "a")), look(folder(tmp_path / "b", "{{ b }}"))
    assert adapters.template_of((plain,), PHI_3_MINI) == PHI_3_MINI.chat.template
    assert adapters.template_of((plain, pinned), PHI_3_MINI) == "{{ b }}"
    same = look(folder(tmp_path / "c", "{{ b }}\n"))
    assert adapters.template_of((pinned, same), PHI_3_MINI) == "{{ b }}"
    with pytest.raises(UserError, match="trained with different chat templates"):
        adapters.template_of((pinned, look(folder(tmp_path / "d", "{{ d }}"))), PHI_3_MINI)


def test_an_answer_ends_where_the_chat_says(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "generation_config.json").write_text(json.dumps({"eos_token_id": 32000, "temperature": 0.7}))
    added = [
        {"id": 32000, "content": "<|endoftext|>"},
        {"id": 32007, "content": "<|end|>"},
        {"id": 32010, "content": "<|user|>"},
    ]
    (weights / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    assert adapters.generation_config(weights, (), PHI_3_MINI) == {"eos_token_id": [32000, 32007], "temperature": 0.7}
    assert adapters.generation_config(weights, (), PHI_3_MINI, neutral=True) == {"eos_token_id": [32000, 32007]}
    pinned = look(folder(tmp_path / "a", stops=["<|user|>", "unknown"]))
    assert adapters.generation_config(weights, (pinned,), PHI_3_MINI)["eos_token_id"] == [32000, 32007, 32010]


def test_strength_is_a_share_of_alpha(tmp_path: Path) -> None:
    weak = adapters.weaker(look(folder(tmp_path / "a", alpha_pattern={"o_proj": 8})), 0.25, tmp_path / "weak")
    config = json.loads((Path(weak.adapter.folder) / "adapter_config.json").read_text())
    assert (config["lora_alpha"], config["alpha_pattern"], config["r"]) == (8.0, {"o_proj": 2.0}, 16)
    assert (Path(weak.adapter.folder) / "adapter_model.safetensors").read_bytes() == b"weights"
