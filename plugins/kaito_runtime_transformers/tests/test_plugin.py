"""What the core sees of the runtime."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaito_core.plugins.types import Preset, ServedAdapter
from kaito_core.problems import UserError
from kaito_core.workloads.serving import ServingJob
from kaito_runtime_transformers import estimate, plugin

from .conftest import DEMO, GIB, LAPTOP, PHI, RUNTIME, gpu

DEFAULTS = RUNTIME.resolve(PHI, None, ())


def problems(user: Any, adapters: tuple[ServedAdapter, ...] = ()) -> list[str]:
    with pytest.raises(UserError) as e:
        RUNTIME.resolve(PHI, user, adapters)
    return [f"{p.field}: {p.message} ({p.remedy})" if p.remedy else f"{p.field}: {p.message}" for p in e.value.problems]


def test_the_hook_gives_one_runtime_that_vllm_goes_before() -> None:
    (runtime,) = plugin.kaito_runtimes()
    assert (runtime.name, runtime.priority) == ("transformers", 0)


def test_it_serves_what_transformers_knows_and_can_load() -> None:
    assert RUNTIME.serves(PHI) is None

    def reason(preset: Preset) -> str:
        problem = RUNTIME.serves(preset)
        assert problem is not None
        return problem.message

    remote = dataclasses.replace(PHI.architecture, name="Phi3SmallForCausalLM")
    assert "has no causal language model 'Phi3SmallForCausalLM'" in reason(
        dataclasses.replace(PHI, architecture=remote)
    )
    assert "quantised as awq" in reason(dataclasses.replace(PHI, quantization="awq"))


# --- inference_config.yaml


def test_kaitos_own_file_means_the_defaults() -> None:
    """The ConfigMap that KAITO installs, as it stands."""
    kaitos = {"kv_cache_cpu_memory_utilization": 0.5, "max_probe_steps": 6, "vllm": {"cpu-offload-gb": 0}}
    assert RUNTIME.resolve(PHI, kaitos, ()) == DEFAULTS


@pytest.mark.parametrize("named", ["/run/kaito/docker/config.json", "../config.json", "mine.jinja"])
def test_a_chat_template_is_no_file_of_the_container(named: str) -> None:
    [said] = problems({"transformers": {"chat-template": named}})
    assert said.startswith(
        "transformers.chat-template: chat-template must be a Jinja template, or the name of a file of the ConfigMap"
    )
    assert RUNTIME.resolve(PHI, {"transformers": {"chat_template": "{{ m }}"}}, ())["chat-template"] == "{{ m }}"


def test_names_of_kaito_vllm_and_transformers_serve() -> None:
    user = {"torch_dtype": "float16", "load_in_4bit": True, "gpu-memory-utilization": 0.8, "max_model_len": 4096,
            "pipeline": "text-generation", "device_map": "auto", "trust_remote_code": False}  # fmt: skip
    config = RUNTIME.resolve(PHI, {"transformers": user}, ())
    assert (config["dtype"], config["quantization"], config["memory-share"], config["max-model-len"]) == (
        "float16", "bnb-4bit", 0.8, 4096,
    )  # fmt: skip


def test_everything_that_is_wrong_is_said_at_once() -> None:
    user = {"transformers": {"max-model-len": 200_000, "dytpe": "float16", "trust_remote_code": True, "max-num-seqs": True},
            "transformer": {}, "max-num-seqs": 4}  # fmt: skip
    assert problems(user) == [
        "transformer: there is no setting `transformer` (did you mean `transformers`?)",
        "max-num-seqs: `max-num-seqs` stands outside of a section (write it below `transformers:`)",
        "transformers.dytpe: there is no setting `dytpe` for transformers (did you mean `dtype`?)",
        "transformers.trust_remote_code: trust_remote_code cannot be set: code from a model repository is never run "
        "(leave it out)",
        "transformers.max-num-seqs: max-num-seqs must be a whole number from 1 to 1024, or nothing, not True",
        "transformers.max-model-len: max-model-len is 200,000 tokens, and phi-3-mini reads 131,072 at most "
        "(set it to 131072 or less, or leave it out)",
    ]


def test_adapters_need_names_of_their_own() -> None:
    adapters = (ServedAdapter("phi-3-mini"), ServedAdapter("a", strength=1.5), ServedAdapter("a"))
    assert [p.partition(":")[0] for p in problems(None, adapters)] == [
        "inference.adapters[0].source.name", "inference.adapters[1].strength", "inference.adapters[2].source.name",
    ]  # fmt: skip


@given(
    st.dictionaries(st.text(max_size=20) | st.just("transformers"),
                    st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
                                 lambda x: st.dictionaries(st.text(max_size=20), x, max_size=3), max_leaves=5), max_size=4)
)  # fmt: skip
def test_any_file_is_a_configuration_or_a_list_of_problems(user: dict[str, Any]) -> None:
    try:
        config = RUNTIME.resolve(PHI, user, ())
    except UserError as e:
        assert e.problems
    else:
        assert config.keys() == DEFAULTS.keys()
        assert RUNTIME.resolve(PHI, {"transformers": config}, ()) == config


# --- fit


def test_a_gpu_computes_in_16_bit_and_a_cpu_in_32() -> None:
    assert RUNTIME.fit(PHI, DEFAULTS, gpu(24), 1, ()).configuration.dtype == "bfloat16"
    assert RUNTIME.fit(PHI, DEFAULTS, gpu(16, model="T4", capability=(7, 5)), 1, ()).configuration.dtype == "float16"
    on_cpu = RUNTIME.fit(PHI, DEFAULTS, gpu(0, 0), 1, ()).configuration
    assert (on_cpu.device, on_cpu.dtype, on_cpu.gpus) == ("cpu", "float32", 0)


def test_the_context_is_shortened_to_what_fits() -> None:
    """Phi-3-mini-128k: 7.1 GiB of weights and 384 KiB of cache a token (reference figures of the model's card)."""
    fit = RUNTIME.fit(PHI, DEFAULTS, gpu(24), 1, ())
    assert fit.fits
    assert 2048 <= fit.configuration.context < 131_072
    assert "instead of 131,072" in fit.notes[0]
    assert fit.cache_tokens is not None
    assert fit.cache_tokens >= fit.configuration.context
    weights = next(i for i in fit.memory.items if i.name == "weights")
    assert weights.bytes == pytest.approx(7.12 * GIB, rel=0.03)
    cache = next(i for i in fit.memory.items if i.name == "cache")
    assert cache.bytes == fit.cache_tokens * 393_216


def test_what_the_user_sets_is_not_shortened_but_checked() -> None:
    config = RUNTIME.resolve(PHI, {"transformers": {"max-model-len": 100_000}}, ())
    fit = RUNTIME.fit(PHI, config, gpu(24), 1, ())
    assert fit.configuration.context == 100_000
    assert not fit.fits


def test_a_model_that_does_not_fit_says_the_smallest_layout() -> None:
    fit = RUNTIME.fit(PHI, DEFAULTS, gpu(6), 1, ())
    assert not fit.fits
    assert fit.configuration.context == 2048
    quantised = RUNTIME.resolve(PHI, {"transformers": {"load_in_4bit": True}}, ())
    assert RUNTIME.fit(PHI, quantised, gpu(6), 1, ()).fits


def test_several_gpus_hold_the_layers_one_after_the_other() -> None:
    fit = RUNTIME.fit(PHI, DEFAULTS, gpu(16, 4, "T4", (7, 5)), 1, ())
    assert fit.configuration.pipeline == 4  # the whole context needs all of them
    assert fit.fits
    assert "one at a time" in fit.notes[-1]
    short = RUNTIME.resolve(PHI, {"transformers": {"max-model-len": 4096}}, ())
    assert RUNTIME.fit(PHI, short, gpu(16, 4, "T4", (7, 5)), 1, ()).configuration.pipeline == 1


@given(st.floats(1, 640), st.integers(0, 8), st.booleans(), st.integers(0, 3), st.none() | st.integers(16, 131_072))
def test_the_server_gets_a_cache_within_what_was_planned(
    gib: float, gpus: int, batching: bool, adapters: int, length: int | None
) -> None:
    served = tuple(ServedAdapter(f"a{n}") for n in range(adapters))
    user = {"transformers": {"continuous-batching": batching, "max-model-len": length}}
    config = RUNTIME.resolve(PHI, user, served)
    offer = gpu(gib, gpus)
    fit = RUNTIME.fit(PHI, config, offer, 1, served)
    layout = fit.configuration
    assert 16 <= layout.context <= (length or 131_072)
    tokens = estimate.cache_tokens(PHI, config, layout, served, offer.device_memory)
    if batching and layout.pipeline == 1:
        assert tokens == fit.cache_tokens
        assert tokens >= layout.context
    else:
        assert (tokens, fit.cache_tokens, layout.requests) == (0, layout.context, 1)
    assert all(i.bytes >= 0 for i in fit.memory.items)


def test_the_workload_is_the_servers_command() -> None:
    config = RUNTIME.resolve(DEMO, None, ())
    job = ServingJob(
        "w", "default", DEMO, "transformers", config, RUNTIME.fit(DEMO, config, LAPTOP, 1, ()).configuration
    )
    workload = RUNTIME.workload(job)
    assert workload.stages[-1].command == ("python", "-m", "kaito_runtime_transformers")
    assert ServingJob.from_json(job.to_json()) == job


def test_planning_imports_no_torch() -> None:
    code = (
        "import sys; import kaito_runtime_transformers.plugin as p; from kaito_preset_demo.plugin import kaito_presets as k; "
        "from kaito_core.plugins.types import Offer; (d,) = k(); r = p.TransformersRuntime(); c = r.resolve(d, None, ()); "
        "r.fit(d, c, Offer('x', 1, 1 << 33), 1, ()); r.serves(d); r.missing(); "
        "print([m for m in ('torch', 'transformers', 'uvicorn', 'pydantic') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
