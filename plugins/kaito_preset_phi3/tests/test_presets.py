"""The data is complete and agrees with itself: counts with shapes, templates with stop tokens."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from kaito_core.data.chat import ChatError, render, render_prompt
from kaito_core.data.formats import Message
from kaito_core.plugins import Preset
from kaito_preset_phi3.plugin import kaito_presets

PRESETS = {p.name: p for p in kaito_presets()}
GIB = 1 << 30

TALK = [
    Message("system", "Be brief."),
    Message("user", "2+2?"),
    Message("assistant", "4"),
    Message("user", "3+3?"),
    Message("assistant", "6"),
]

WRITTEN = {
    "phi-3.5-mini-instruct": "<|system|>\nBe brief.<|end|>\n<|user|>\n2+2?<|end|>\n<|assistant|>\n4<|end|>\n"
    "<|user|>\n3+3?<|end|>\n<|assistant|>\n6<|end|>\n",
    "phi-4-mini-instruct": "<|system|>Be brief.<|end|><|user|>2+2?<|end|><|assistant|>4<|end|>"
    "<|user|>3+3?<|end|><|assistant|>6<|end|>",
    "phi-4": "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>2+2?<|im_end|>"
    "<|im_start|>assistant<|im_sep|>4<|im_end|><|im_start|>user<|im_sep|>3+3?<|im_end|>"
    "<|im_start|>assistant<|im_sep|>6<|im_end|>",
}


def test_these_are_the_presets() -> None:
    assert set(PRESETS) == {
        "phi-3-mini-4k-instruct",
        "phi-3-mini-128k-instruct",
        "phi-3-medium-4k-instruct",
        "phi-3-medium-128k-instruct",
        "phi-3.5-mini-instruct",
        "phi-4-mini-instruct",
        "phi-4",
    }


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda p: p.name)
def test_the_parameter_count_comes_out_of_the_shapes(preset: Preset) -> None:
    a = preset.architecture
    embeddings = a.vocab * a.hidden * (1 if a.tied_embeddings else 2)
    norms = a.hidden * (2 * a.layers + 1)
    assert a.parameters == embeddings + a.linear_parameters + norms
    assert a.other_parameters == embeddings + norms
    assert a.linears["qkv_proj"] == (a.hidden, (a.heads + 2 * a.kv_heads) * a.head_dim)
    assert a.linears["o_proj"] == (a.heads * a.head_dim, a.hidden)


@pytest.mark.parametrize(
    ("name", "gib"),
    [
        ("phi-3-mini-4k-instruct", 7.12),
        ("phi-3-medium-128k-instruct", 26.00),
        ("phi-4-mini-instruct", 7.15),
        ("phi-4", 27.31),
    ],
)
def test_the_weights_are_as_large_as_the_published_files(name: str, gib: float) -> None:
    assert PRESETS[name].weights_bytes / GIB == pytest.approx(gib, abs=0.005)


@pytest.mark.parametrize(
    ("name", "millions"), [("phi-3-mini-4k-instruct", 25.17), ("phi-4-mini-instruct", 23.07), ("phi-4", 55.71)]
)
def test_lora_on_all_linears_with_rank_16(name: str, millions: float) -> None:
    preset = PRESETS[name]
    assert preset.architecture.lora_parameters(16, preset.lora_targets) / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda p: p.name)
def test_the_source_is_pinned_and_free(preset: Preset) -> None:
    assert len(preset.source.revision) == 40
    assert preset.source.hub.startswith("microsoft/")
    assert preset.licence == "MIT"
    assert not preset.gated


@pytest.mark.parametrize("name", WRITTEN)
def test_a_conversation_is_written_as_the_family_writes_it(name: str) -> None:
    chat = PRESETS[name].chat
    rendered = render(TALK, chat)
    assert rendered.text == WRITTEN[name]
    stop = chat.stop_tokens[0]
    assert [rendered.text[a:b] for a, b in rendered.spans] == ["4" + stop, "6" + stop]
    assert rendered.text.startswith(render_prompt(TALK[:-1], chat))
    assert rendered.text.removeprefix(render_prompt(TALK[:-1], chat)).startswith("6")


@pytest.mark.parametrize("name", WRITTEN)
def test_a_role_that_the_family_does_not_know_is_refused(name: str) -> None:
    with pytest.raises(ChatError, match="narrator"):
        render([Message("narrator", "Once upon a time")], PRESETS[name].chat)  # type: ignore[arg-type]


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]], ids=["without", "with"])
def test_phi_4_mini_writes_tools_into_the_system_turn(system: list[dict[str, str]]) -> None:
    words = system[0]["content"] if system else ""
    prompt = tools_prompt([*system, {"role": "user", "content": "Rain?"}], [{"name": "weather"}])
    assert prompt == (
        f'<|system|>{words}<|tool|>[{{"name": "weather"}}]<|/tool|><|end|><|user|>Rain?<|end|><|assistant|>'
    )


def test_phi_4_mini_takes_tools_from_the_system_message_too() -> None:
    talk = [{"role": "system", "content": "Be brief.", "tools": '[{"name": "weather"}]'}]
    assert tools_prompt(talk, None) == '<|system|>Be brief.<|tool|>[{"name": "weather"}]<|/tool|><|end|><|assistant|>'


def tools_prompt(messages: list[dict[str, str]], tools: list[dict[str, str]] | None) -> str:
    """What transformers makes of the template."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    (text,), _ = utils.render_jinja_template(
        [messages], tools=tools, chat_template=PRESETS["phi-4-mini-instruct"].chat.template, add_generation_prompt=True
    )
    return str(text)


def test_the_plugin_is_light() -> None:
    code = (
        "import sys; from kaito_preset_phi3.plugin import kaito_presets; list(kaito_presets());"
        "heavy = {'torch', 'transformers', 'pydantic', 'jinja2', 'httpx', 'rich', 'click'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_presets_of_a_family_differ_only_in_name_context_and_source() -> None:
    mini, long = PRESETS["phi-3-mini-4k-instruct"], PRESETS["phi-3.5-mini-instruct"]
    assert replace(long.architecture, context=4096, sliding_window=2047) == mini.architecture
    assert long.chat == mini.chat


def test_only_phi_4_mini_calls_tools() -> None:
    vllm = {"tool-call-parser": "phi4_mini_json"}
    assert {n: dict(p.inference) for n, p in PRESETS.items() if p.inference} == {"phi-4-mini-instruct": {"vllm": vllm}}
