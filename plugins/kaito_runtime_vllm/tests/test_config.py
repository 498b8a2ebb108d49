"""KAITO's inference_config.yaml, and what is said about mistakes in it."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm_models import LATENT, LLAMA_70B, PHI_3_MINI, PHI_4

from kaito_core.plugins import Preset, ServedAdapter
from kaito_core.problems import UserError
from kaito_runtime_vllm import flags
from kaito_runtime_vllm.config import REFUSED, resolve
from kaito_runtime_vllm.known import known


def vllm(user: dict[str, Any], preset: Preset = PHI_3_MINI) -> dict[str, Any]:
    return resolve(preset, {"vllm": user})["vllm"]


def complaint(user: Any, preset: Preset = PHI_3_MINI, adapters: tuple[ServedAdapter, ...] = ()) -> str:
    with pytest.raises(UserError) as e:
        resolve(preset, user, adapters)
    return str(e.value)


def test_kaitos_template_is_read_as_it_is() -> None:
    found = resolve(
        PHI_3_MINI, {"kv_cache_cpu_memory_utilization": 0.5, "max_probe_steps": 6, "vllm": {"cpu-offload-gb": 0}}
    )
    assert found["vllm"]["cpu-offload-gb"] == 0
    assert found["kv_cache_cpu_memory_utilization"] == 0.5
    assert "max_probe_steps" in found["notes"][0]


def test_the_users_flags_stand_over_the_presets_over_ours() -> None:
    preset = replace(PHI_3_MINI, inference={"vllm": {"max-model-len": 8192, "reasoning-parser": "qwen3"}})
    found = vllm({"max_model_len": "4K", "shutdown-timeout": 5}, preset)
    assert (found["max-model-len"], found["reasoning-parser"], found["shutdown-timeout"]) == (4096, "qwen3", 5)
    assert vllm({})["shutdown-timeout"] == 90


def test_flags_may_be_written_in_every_way_that_vllm_takes() -> None:
    assert vllm({"--max-model-len": "32k"})["max-model-len"] == 32_000
    assert vllm({"tp": 4}, LLAMA_70B)["tensor-parallel-size"] == 4
    assert vllm({"no-enable-prefix-caching": True})["enable-prefix-caching"] is False
    assert vllm({"compilation-config": '{"mode": 3}'})["compilation-config"] == {"mode": 3}
    assert vllm({"max-model-len": "auto"})["max-model-len"] == -1


def test_a_parser_of_tool_calls_is_used_without_being_asked_twice() -> None:
    assert vllm({}, LLAMA_70B)["enable-auto-tool-choice"] is True
    assert vllm({"enable-auto-tool-choice": False}, LLAMA_70B)["enable-auto-tool-choice"] is False


@pytest.mark.parametrize(
    ("user", "words"),
    [
        ({"vllm": {"max-model-length": 1}}, "did you mean `max-model-len`?"),
        ({"vllm": {"max-model-len": "many"}}, "is not a number such as 32768"),
        ({"vllm": {"max-model-len": 200_000}}, "reads at most 131,072 tokens, not 200,000"),
        ({"vllm": {"tensor-parallel-size": 3}}, "tensor-parallel-size can be 1, 2, 4, 8, 16, 32"),
        ({"vllm": {"kv-cache-dtype": "fp9"}}, "is none of auto, bfloat16"),
        ({"vllm": {"tool-call-parser": "hermez"}}, "did you mean `hermes`?"),
        ({"vllm": {"quantization": "fp7"}}, "did you mean `fp8`?"),
        ({"vllm": {"enforce-eager": "perhaps"}}, "neither true nor false"),
        ({"vllm": {"gpu-memory-utilization": 90}}, "a share from 0 to 1"),
        ({"vllm": {"max-num-seqs": 0}}, "must be 1 or more"),
        ({"vllm": {"max-num-seqs": 512, "max-num-batched-tokens": 64}}, "each request needs a token in every step"),
        ({"vllm": {"allowed-media-domains": ["--host=evil"]}}, "would be taken for another flag"),
        ({"vllm": {"speculative-config": "{"}}, "neither a mapping nor JSON"),
        ({"vllm": {"max-model-len": 5, "max_model_len": 6}}, "is there twice"),
        ({"vllm": ["--max-model-len"]}, "flags are a mapping"),
        ({"vllm": {"response-role": "a\0b"}}, "zero byte"),
        ({"vllm": {"response-role": "x" * 200_000}}, "no command line takes"),
        ({"vllm": {"enable-log-outputs": True}}, "`enable-log-outputs` needs `enable-log-requests`"),
        ({"max-model-len": 5}, "write it below `vllm:`"),
        ({"vlm": {}}, "did you mean `vllm`?"),
        ({"kv_cache_cpu_memory_utilization": 50}, "no share of the machine's memory"),
        ([], "not a mapping"),
    ],
)
def test_mistakes_are_said_in_words_with_a_remedy(user: Any, words: str) -> None:
    if user == []:
        user = ["a"]
    assert words in complaint(user)


def test_everything_that_is_wrong_is_said_at_once() -> None:
    text = complaint({"vlm": {}, "vllm": {"port": 80, "max-model-length": 1, "dtype": "float64"}})
    assert text.count("error:") == 4


SECRET = "/run/kaito/docker/config.json"
LIKE_FILES = re.compile(r"path|file|dir|folder|template|plugin|tokenizer|lora|media|overrides|loader|config$|uds|ssl")
"""Words in the names of flags that take files, folders, or a whole configuration of something."""

REVIEWED = {
    "chat-template": "only a template passes",
    "generation-config": "only auto and vllm pass",
    "lora-target-modules": "names of modules", "max-lora-cls-labels": "a number",
    "io-processor-plugin": "the name of an entry point of the image", "profiler-config": "written, and not read",
    "allowed-media-domains": "hosts of URLs in requests", "media-io-kwargs": "numbers of frames and the like",
    "tokenizer-mode": "the name of a class", "tokenizer-revision": "of the preset's own tokenizer",
    "default-chat-template-kwargs": "variables of the template", "hf-overrides": "fields of config.json",
    "model-loader-extra-config": "of the preset's own weights", "model-class-overrides": "classes of the image",
    **dict.fromkeys(
        ("additional-config", "attention-config", "aux-output-config", "compilation-config", "diffusion-config", "ec-manager-config",
         "ec-transfer-config", "engram-config", "eplb-config", "fault-tolerance-config", "kernel-config", "kv-events-config",
         "kv-transfer-config", "logging-config", "override-generation-config", "pooler-config", "quantization-config",
         "reasoning-config", "speculative-config", "structured-outputs-config", "watermark-config", "weight-transfer-config"),
        "settings of a part of the engine; what a path in them names comes back in no answer",
    ),
}  # fmt: skip


def test_every_flag_that_may_name_a_file_was_looked_at() -> None:
    """What vLLM reads of a file of the container may come back in an answer or an error. A new version may add flags: look at them."""
    taking = {f.name for f in known().flags.values() if f.type in ("text", "json", "json or text") and not f.choices}
    assert {n for n in taking - set(REFUSED) if LIKE_FILES.search(n)} == {n for n in REVIEWED if n in taking}


@pytest.mark.parametrize("named", [SECRET, "../../etc/passwd", "mine.jinja"])
def test_a_path_of_the_container_is_no_chat_template(named: str) -> None:
    assert "vllm.chat-template: " in complaint({"vllm": {"chat-template": named}})
    assert vllm({"chat-template": "{{ messages }}"})["chat-template"] == "{{ messages }}"
    assert "vllm.generation-config" in complaint({"vllm": {"generation-config": named}})


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_flags_that_would_break_the_endpoint_are_refused_with_the_reason(name: str) -> None:
    value: Any = True if known().flags[name].type in ("bool", "switch") else "1"
    assert REFUSED[name] in complaint({"vllm": {name: value}})


def test_code_from_the_weights_is_run_only_when_the_person_says_so() -> None:
    trusting = replace(PHI_3_MINI, inference={"vllm": {"trust-remote-code": True}})
    assert "trust-remote-code" not in vllm({}, trusting)
    found = resolve(PHI_3_MINI, {"vllm": {"trust-remote-code": True}})
    assert found["vllm"]["trust-remote-code"] is True
    assert "code that came with the weights" in found["notes"][0]


def test_flags_that_vllm_no_longer_has_stop_nobody() -> None:
    found = resolve(PHI_3_MINI, {"vllm": {"swap-space": 4}})
    assert "swap-space" not in found["vllm"]
    assert "no longer has this flag" in found["notes"][0]


def test_adapters_are_checked_against_the_model_and_its_flags() -> None:
    one = ServedAdapter("mine")
    assert "the model's own name" in complaint(None, PHI_3_MINI, (ServedAdapter(PHI_3_MINI.name),))
    assert "is the name of 2 adapters" in complaint(None, PHI_3_MINI, (one, one))
    assert "`enable-lora: false` forbids" in complaint({"vllm": {"enable-lora": False}}, PHI_3_MINI, (one,))
    assert "strength" in complaint(None, PHI_3_MINI, (ServedAdapter("mine", strength=1.5),))
    falcon = replace(PHI_3_MINI, architecture=replace(PHI_3_MINI.architecture, name="FalconForCausalLM"))
    assert "cannot serve a FalconForCausalLM with adapters" in complaint(None, falcon, (one,))
    resolve(PHI_4, None, (one,))
    resolve(LATENT, None, (one,))


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(sorted(known().flags)) | st.text(max_size=12), anything, max_size=4), anything)
def test_no_input_gives_a_traceback(given_flags: dict[str, Any], share: Any) -> None:
    try:
        found = resolve(PHI_3_MINI, {"vllm": given_flags, "kv_cache_cpu_memory_utilization": share})
    except UserError:
        return
    for name, value in found["vllm"].items():
        words = flags.argv(known().flags[name], value)
        assert all(isinstance(w, str) and "\0" not in w for w in words)
