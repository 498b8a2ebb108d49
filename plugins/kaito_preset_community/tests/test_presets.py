"""The data is complete, agrees with itself, and is what the script makes; nothing in it was written by hand."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from kaito_core.plugins import Preset
from kaito_core.problems import UserError
from kaito_preset_community import plugin

PRESETS = {p.name: p for p in plugin.kaito_presets()}
TUNABLE = {n: p for n, p in PRESETS.items() if p.architecture.linears}
ROOT = Path(__file__).resolve().parents[3]
GIB = 1 << 30


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("community_presets", ROOT / "scripts" / "community_presets.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(**fields: str) -> dict[str, str]:
    """A line of the table: Llama 3.1 8B, but for what is given."""
    names = (
        "hub_id,license,task,weights_gib,architecture,context_tokens,hidden_size,layers,attention_heads,kv_heads,head_dim,"
        "kv_lora_rank,qk_rope_head_dim,quant_method,quant_bits,base_model,load_format,config_format,tokenizer_mode,"
        "kaito_preset_name,revision"
    )
    line = "meta-llama/Llama-3.1-8B-Instruct,llama3.1,text-generation,14.96,LlamaForCausalLM,131072,4096,32,32,8"
    (found,) = csv.DictReader(io.StringIO(f"{names}\n{line},,,,,,,,,,llama-3.1-8b-instruct,0e9e39f249a1"))
    return {**found, **fields}


@pytest.mark.parametrize(
    "name",
    [
        "llama-3.1-8b-instruct", "llama-3.3-70b-instruct", "deepseek-r1-0528", "deepseek-v3-0324",
        "deepseek-r1-distill-llama-8b", "deepseek-r1-distill-qwen-14b", "mistral-7b", "mistral-7b-instruct",
        "ministral-3-3b-instruct", "ministral-3-8b-instruct", "ministral-3-14b-instruct", "mistral-large-3-675b-instruct",
        "qwen2.5-coder-7b-instruct", "qwen2.5-coder-32b-instruct", "gemma-3-4b-instruct", "gemma-3-27b-instruct",
        "gpt-oss-20b", "gpt-oss-120b",
    ],
)  # fmt: skip
def test_the_names_of_kaito_are_there_with_a_pinned_revision(name: str) -> None:
    assert len(PRESETS[name].source.revision) == 40


def test_models_of_another_package_are_left_out() -> None:
    assert not any(p.source.hub.startswith("microsoft/") for p in PRESETS.values())
    assert len(PRESETS) == 53


def test_no_two_presets_share_a_name() -> None:
    names = [n for p in PRESETS.values() for n in (p.name, *p.aliases)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda p: p.name)
def test_every_preset_can_be_planned_for_serving(preset: Preset) -> None:
    a = preset.architecture
    assert preset.weights_bytes > GIB
    assert min(a.layers, a.hidden, a.heads, a.kv_heads, a.head_dim, a.vocab, a.context, a.cache_numbers) > 0
    assert a.heads % a.kv_heads == 0
    assert preset.licence
    assert set(preset.inference) <= {"vllm"}


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("deepseek-r1-0528", 61 * (512 + 64)),  # latent attention
        ("llama-3.3-70b-instruct", 2 * 80 * 8 * 128),
        ("gemma-3-4b-instruct", 2 * 34 * 4 * 256),  # heads that are not hidden / heads wide
        ("mistral-small-4-119b-2603", 36 * (256 + 64)),
    ],
)
def test_the_cache_is_that_of_the_kind_of_attention(name: str, numbers: int) -> None:
    assert PRESETS[name].architecture.cache_numbers == numbers


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-3.1-8b-instruct", 8_030_261_248),
        ("llama-3.3-70b-instruct", 70_553_706_496),
        ("mistral-7b", 7_248_023_552),
        ("qwen2.5-coder-7b-instruct", 7_615_616_512),
        ("qwen2.5-coder-32b-instruct", 32_763_876_352),
        ("deepseek-r1-distill-qwen-14b", 14_770_033_664),
    ],
)
def test_derived_shapes_give_the_published_number_of_parameters(name: str, parameters: int) -> None:
    """The counts that the models' own safetensors files have."""
    assert PRESETS[name].architecture.parameters == parameters


@pytest.mark.parametrize("preset", TUNABLE.values(), ids=lambda p: p.name)
def test_what_can_be_tuned_has_all_that_tuning_needs(preset: Preset) -> None:
    a = preset.architecture
    assert preset.lora_targets == tuple(a.linears)
    assert a.linears["q_proj"] == (a.hidden, a.heads * a.head_dim)
    assert a.linears["down_proj"] == (a.intermediate, a.hidden)
    assert preset.chat.stop_tokens
    assert not preset.quantization
    assert a.parameters == a.linear_parameters + a.other_parameters
    assert 2 * a.vocab * a.hidden < a.other_parameters < 2.01 * a.vocab * a.hidden


def test_what_is_not_known_cannot_be_tuned() -> None:
    assert set(TUNABLE) == {
        "deepseek-r1-distill-llama-8b", "deepseek-r1-distill-qwen-14b", "llama-3.1-8b-instruct", "llama-3.3-70b-instruct",
        "mistral-7b", "mistral-7b-instruct", "qwen2.5-coder-7b-instruct", "qwen2.5-coder-32b-instruct",
    }  # fmt: skip


def test_gated_models_say_so() -> None:
    assert PRESETS["llama-3.1-8b-instruct"].gated
    assert not PRESETS["mistral-7b"].gated


def test_the_parsers_are_those_of_the_family() -> None:
    vllm = PRESETS["llama-3.1-8b-instruct"].inference["vllm"]
    assert vllm == {"tool-call-parser": "llama3_json"}
    assert PRESETS["deepseek-r1-distill-llama-8b"].inference["vllm"] == {"reasoning-parser": "deepseek_r1"}
    assert PRESETS["mistral-7b"].inference["vllm"]["load-format"] == "mistral"
    assert "tool-call-parser" not in PRESETS["mistral-7b"].inference["vllm"]


def test_tuning_a_model_whose_layers_are_not_known_is_refused_with_what_to_do() -> None:
    """KAITO's defect 3: such presets pass, machines are bought, and then nothing comes of it."""
    config = pytest.importorskip("kaito_tuner_qlora.config")
    with pytest.raises(UserError, match="gpt-oss-20b can be served and not tuned") as e:
        config.resolve(PRESETS["gpt-oss-20b"], "qlora", None)
    (problem,) = e.value.problems
    assert problem.field == "tuning.preset.name"
    assert "write openai/gpt-oss-20b as the name" in problem.remedy
    assert config.resolve(PRESETS["mistral-7b"], "qlora", None)["LoraConfig"]["target_modules"][0] == "q_proj"


def test_vllm_can_read_every_one() -> None:
    """Its architecture, its quantisation, its flags and its parsers are known to the runtime's list of vLLM's own names."""
    runtimes = pytest.importorskip("kaito_runtime_vllm.plugin")
    (vllm,) = runtimes.kaito_runtimes()
    for preset in PRESETS.values():
        assert vllm.serves(preset) is None, preset.name
        vllm.resolve(preset, None, ())


def test_the_script_is_deterministic_and_says_what_it_does_not_know(script: ModuleType) -> None:
    rows = [row(), row(hub_id="org/Big-9B", architecture="Qwen3ForCausalLM", kaito_preset_name="", quant_method="awq")]
    text, unknown = script.text_of(rows)
    assert (text, unknown) == script.text_of(rows)
    made = json.loads(text)
    assert made["llama-3.1-8b-instruct"]["architecture"]["intermediate"] == 14336
    assert made["big-9b"]["architecture"]["linears"] == {}
    assert any(u.startswith("big-9b: the shapes of its layers are not known") for u in unknown)


def test_a_size_that_fits_no_shape_is_an_error_and_no_guess(script: ModuleType) -> None:
    with pytest.raises(ValueError, match="feed-forward size would be"):
        script.text_of([row(weights_gib="15.20")])


def test_two_models_of_one_name_are_an_error(script: ModuleType) -> None:
    with pytest.raises(ValueError, match="would both be called"):
        script.text_of([row(), row(hub_id="other/llama-3.1-8b-instruct", kaito_preset_name="")])


def test_the_vocabularies_are_those_of_the_classes(script: ModuleType) -> None:
    mapping = pytest.importorskip("transformers.models.auto.configuration_auto").CONFIG_MAPPING
    kinds = {
        "DeepseekV3ForCausalLM": "deepseek_v3", "Gemma3ForConditionalGeneration": "gemma3",
        "Gemma4ForConditionalGeneration": "gemma4", "GlmMoeDsaForCausalLM": "glm_moe_dsa", "GptOssForCausalLM": "gpt_oss",
        "MiniMaxM2ForCausalLM": "minimax_m2", "Mistral3ForConditionalGeneration": "mistral3",
        "NemotronHForCausalLM": "nemotron_h", "Qwen3ForCausalLM": "qwen3", "Qwen3_5ForConditionalGeneration": "qwen3_5",
        "Qwen3_5MoeForConditionalGeneration": "qwen3_5_moe",
    }  # fmt: skip
    for name, kind in kinds.items():
        if kind in mapping:
            assert mapping[kind]().get_text_config().vocab_size == script.VOCABULARY[name], name


def test_the_plugin_is_light() -> None:
    code = (
        "import sys; from kaito_preset_community.plugin import kaito_presets; list(kaito_presets());"
        "heavy = {'torch', 'transformers', 'pydantic', 'jinja2', 'httpx', 'rich', 'click'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
