"""What fits where, against published measurements and by its shape."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm_models import (
    A10,
    A100,
    GIB,
    H100,
    LATENT,
    LLAMA_70B,
    PHI_3_MINI,
    PHI_4,
    PHI_4_MINI,
    PRESETS,
    T4,
    V100,
    machine,
)

from kaito_core.plugins import Gpu, Preset, ServedAdapter, ServingFit
from kaito_runtime_vllm import estimate, layout
from kaito_runtime_vllm.config import resolve


def fit(
    preset: Preset, gpu: Gpu | None, gpus: int = 1, machines: int = 1, adapters: int = 0, **user: Any
) -> ServingFit:
    served = tuple(ServedAdapter(f"a{n}") for n in range(adapters))
    config = resolve(preset, {"vllm": {k.replace("_", "-"): v for k, v in user.items()}}, served)
    return estimate.fit(preset, config, machine(gpu, gpus), machines, served)


def item(found: ServingFit, name: str) -> int:
    return next(i.bytes for i in found.memory.items if i.name == name)


def spread(found: ServingFit) -> tuple[int, int, int]:
    c = found.configuration
    return c.tensor, c.pipeline, c.data


# Activations that llm-d-planner measured with vLLM on an H100, 1024 requests at once: GiB by the vocabulary.
MEASURED = [(201_088, 7.38), (151_936, 5.56), (151_936, 5.64), (128_256, 4.76), (128_256, 4.84)]


@pytest.mark.parametrize(("vocab", "gib"), MEASURED)
def test_activations_are_what_was_measured_within_three_percent(vocab: int, gib: float) -> None:
    preset = replace(
        LLAMA_70B, architecture=replace(LLAMA_70B.architecture, vocab=vocab, hidden=2048, intermediate=8192)
    )
    assert item(fit(preset, H100, 8), "activations") / GIB == pytest.approx(gib, rel=0.03)


@pytest.mark.parametrize(("preset", "bytes_"), [(PHI_3_MINI, 393_216), (PHI_4_MINI, 131_072), (PHI_4, 204_800)])
def test_a_token_in_the_cache_is_what_its_shape_says(preset: Preset, bytes_: int) -> None:
    found = fit(preset, A100, max_model_len=4096)
    assert item(found, "cache") == 4096 * bytes_


def test_the_cache_is_shared_by_the_gpus_of_a_group_as_far_as_it_has_heads() -> None:
    def token(preset: Preset, **user: Any) -> float:
        return item(fit(preset, H100, 8, max_model_len=4096, **user), "cache") / 4096

    whole = 2 * 80 * 8 * 128 * 2
    assert token(LLAMA_70B, tensor_parallel_size=8) == whole / 8
    assert token(LLAMA_70B, tensor_parallel_size=4, pipeline_parallel_size=2) == whole / 8
    assert token(LLAMA_70B, tensor_parallel_size=8, kv_cache_dtype="fp8") == whole / 16
    latent = 27 * 576 * 2
    assert token(LATENT, tensor_parallel_size=8) == latent


def test_the_context_is_the_longest_that_has_room() -> None:
    assert fit(PHI_3_MINI, A100).configuration.context == 131_072
    found = fit(PHI_3_MINI, A10)
    assert 25_000 < found.configuration.context < found.cache_tokens
    assert "requests of" in found.notes[0]
    assert found.fits


def test_the_gpu_share_is_vllms_own_or_what_is_free_beside_cudas_context() -> None:
    assert fit(PHI_3_MINI, A100).configuration.memory_share == 0.92
    small = Gpu("a slice", 6 * GIB, (8, 0))
    assert fit(PHI_4_MINI, small).configuration.memory_share == 0.89
    assert fit(PHI_3_MINI, A100, gpu_memory_utilization=0.5).capacity == int(0.5 * A100.memory)
    assert "may be more than is free" in fit(PHI_3_MINI, T4, gpu_memory_utilization=0.99, max_model_len=512).notes[-1]


def test_light_models_are_copied_and_heavy_ones_spread() -> None:
    assert spread(fit(PHI_3_MINI, A100, 4)) == (1, 1, 4)
    assert spread(fit(PHI_4, A10, 4)) == (2, 1, 2)  # ten heads of keys and values: two GPUs can share them, four cannot
    assert spread(fit(LLAMA_70B, A100, 4)) == (4, 1, 1)
    assert spread(fit(LLAMA_70B, H100, 8)) == (8, 1, 1)


def test_several_machines_hold_copies_or_stages_of_one() -> None:
    assert spread(fit(PHI_3_MINI, A10, 1, machines=2)) == (1, 1, 2)
    assert spread(fit(PHI_4, A10, 1, machines=2)) == (1, 2, 1)
    assert spread(fit(LLAMA_70B, A10, 4, machines=3)) == (4, 3, 1)
    assert spread(fit(LLAMA_70B, H100, 8, machines=2)) == (8, 1, 2)


def test_what_the_user_sets_wins_and_is_held_against_the_machine() -> None:
    assert spread(fit(PHI_3_MINI, A100, 4, tensor_parallel_size=4)) == (4, 1, 1)
    assert spread(fit(PHI_3_MINI, A100, 4, tensor_parallel_size=2)) == (2, 1, 2)
    found = fit(PHI_3_MINI, A10, max_model_len=100_000)
    assert not found.fits
    assert found.notes[0].startswith("max-model-len 100,000: the cache has room for 31,")
    assert spread(fit(PHI_3_MINI, A10, 4, max_model_len=100_000)) == (4, 1, 1)
    nowhere = fit(LLAMA_70B, A100, 2, tensor_parallel_size=8)
    assert not nowhere.fits
    assert "need 8 GPUs, the same number on every machine; here are 2 GPUs" in nowhere.notes[0]


def test_fewer_requests_at_once_where_there_is_no_room_for_many() -> None:
    assert fit(PHI_4_MINI, A100).configuration.requests == 256
    assert fit(PHI_4_MINI, H100).configuration.requests == 1024
    twelve = Gpu("12 GiB", 12 * GIB, (8, 6))
    found = fit(PHI_4_MINI, twelve)
    assert found.configuration.requests < 256
    assert found.configuration.context >= 8192
    assert fit(PHI_4_MINI, H100, max_num_seqs=7).configuration.requests == 7


def test_machines_that_cannot_be_used_say_why_first() -> None:
    found = fit(PHI_3_MINI, V100)
    assert (found.fits, found.capacity) == (False, 0)
    assert found.notes[0] == "vLLM needs a GPU of compute capability 7.5; the V100 has 7.0"
    assert "mxfp4 needs a GPU of compute capability 8.0" in fit(replace(PHI_3_MINI, quantization="mxfp4"), T4).notes[0]
    assert "no bfloat16" in fit(PHI_3_MINI, T4, dtype="bfloat16").notes[0]
    assert "no build" in fit(PHI_3_MINI, replace(A100, vendor="other", compute_capability=None)).notes[0]
    assert "take the runtime transformers" in fit(PHI_3_MINI, None, machines=2).notes[0]


def test_gpus_without_bfloat16_compute_in_float16_and_cpus_in_float32() -> None:
    assert fit(PHI_3_MINI, T4).configuration.dtype == "float16"
    found = fit(PHI_3_MINI, None)
    assert (found.configuration.device, found.configuration.dtype) == ("cpu", "float32")
    assert item(found, "weights") == round(1.02 * 2 * PHI_3_MINI.weights_bytes)


def test_adapters_and_quantisation_change_the_memory() -> None:
    plain = fit(PHI_3_MINI, A100)
    with_two = fit(PHI_3_MINI, A100, adapters=2)
    assert item(with_two, "adapters") > 2 * PHI_3_MINI.architecture.lora_parameters(64, PHI_3_MINI.architecture.linears)
    assert item(fit(PHI_3_MINI, A100, adapters=2, max_lora_rank=16), "adapters") * 4 == item(with_two, "adapters")
    assert item(fit(PHI_3_MINI, A100, quantization="fp8"), "weights") < 0.55 * item(plain, "weights")
    assert item(plain, "weights") - item(fit(PHI_3_MINI, A100, cpu_offload_gb=2), "weights") == 2 * GIB


gpus = st.builds(Gpu, st.just("some GPU"), st.integers(2 * GIB, 200 * GIB), st.sampled_from([(7, 5), (8, 0), (9, 0)]))


@given(st.sampled_from(PRESETS), gpus, st.integers(1, 8), st.integers(1, 4), st.integers(0, 3))
def test_every_layout_can_be_started(preset: Preset, gpu: Gpu, count: int, machines: int, adapters: int) -> None:
    found = fit(preset, gpu, count, machines, adapters)
    c, a = found.configuration, preset.architecture
    assert layout.divides(a, c.tensor)
    assert c.gpus <= count * machines
    assert c.gpus % machines == 0
    assert c.tensor <= count
    assert 1 <= c.context <= a.context
    assert 0 < c.memory_share <= 0.92
    if found.fits:
        assert found.cache_tokens is not None
        assert found.cache_tokens >= c.context


@given(st.sampled_from(PRESETS), st.integers(8, 100), st.integers(1, 60))
def test_more_memory_never_makes_the_context_shorter(preset: Preset, gib: int, more: int) -> None:
    less = fit(preset, Gpu("some GPU", gib * GIB, (8, 0)))
    larger = fit(preset, Gpu("some GPU", (gib + more) * GIB, (8, 0)), max_num_seqs=less.configuration.requests,
                 max_num_batched_tokens=2048)  # fmt: skip
    if less.fits:
        assert larger.fits
        assert larger.configuration.context >= less.configuration.context
