"""The command line: what is in it, and that vLLM takes every one that can come out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm_models import A10, A100, GIB, H100, LLAMA_70B, PHI_3_MINI, PHI_4, PRESETS, T4, job_for, machine

from kaito_core.plugins import ServedAdapter
from kaito_core.problems import UserError
from kaito_core.workloads.serving import ServingJob
from kaito_runtime_vllm.arguments import FACE, Here, Loaded, arguments
from kaito_runtime_vllm.config import REFUSED
from kaito_runtime_vllm.known import Flag, known

ADAPTER = ServedAdapter("mine")


def test_the_whole_line_for_a_model_on_one_gpu() -> None:
    job = job_for(
        PHI_3_MINI, {"vllm": {"enforce-eager": True, "speculative-config": {"method": "ngram"}}}, machine(A100)
    )
    assert arguments(job) == (
        "serve",
        "/workspace/weights",
        "--dtype=bfloat16",
        "--max-model-len=131072",
        "--max-num-seqs=256",
        "--gpu-memory-utilization=0.92",
        "--tensor-parallel-size=1",
        "--pipeline-parallel-size=1",
        "--data-parallel-size=1",
        "--host=0.0.0.0",
        "--port=5000",
        "--served-model-name=phi-3-mini-128k-instruct",
        f"--middleware={FACE}",
        "--shutdown-timeout=90",
        "--disable-access-log-for-endpoints=/health,/healthz,/metrics",
        "--enforce-eager",
        '--speculative-config={"method":"ngram"}',
    )


def test_adapters_come_with_their_highest_rank_and_the_models_name() -> None:
    job = job_for(PHI_3_MINI, None, machine(A100), adapters=(ADAPTER, ServedAdapter("other")))
    here = Here(adapters=(Loaded("mine", "/mnt/adapter/mine", 8), Loaded("other", "/mnt/a,b/other", 24)))
    words = arguments(job, here)
    assert {"--enable-lora", "--max-loras=2", "--max-lora-rank=32"} <= set(words)
    at = words.index("--lora-modules")
    assert [json.loads(w) for w in words[at + 1 : at + 3]] == [
        {"name": "mine", "path": "/mnt/adapter/mine", "base_model_name": PHI_3_MINI.name},
        {"name": "other", "path": "/mnt/a,b/other", "base_model_name": PHI_3_MINI.name},
    ]


def test_a_cpu_gets_its_cache_in_bytes_and_not_a_share() -> None:
    words = arguments(job_for(PHI_3_MINI, {"vllm": {"max-model-len": 2048}}, machine(None)))
    assert "--dtype=float32" in words
    assert any(w.startswith("--kv-cache-memory-bytes=") for w in words)
    assert not any(w.startswith("--gpu-memory-utilization") for w in words)


def test_the_first_machine_listens_and_the_others_follow_it() -> None:
    job = job_for(PHI_4, None, machine(A10), machines=2, adapters=(ADAPTER,))
    mine = (Loaded("mine", "/mnt/adapter/mine", 16),)
    leader = arguments(job, Here(adapters=mine, machines=2, rank=0, leader="phi-0.phi"))
    worker = arguments(job, Here(adapters=mine, machines=2, rank=1, leader="phi-0.phi"))
    group = {"--pipeline-parallel-size=2", "--nnodes=2", "--master-addr=phi-0.phi", "--distributed-executor-backend=mp"}
    assert group | {"--node-rank=0", "--port=5000"} <= set(leader)
    assert group | {"--node-rank=1", "--headless", "--enable-lora", "--max-lora-rank=16"} <= set(worker)
    assert not [w for w in worker if w.startswith(("--port", "--host", "--middleware", "--lora-modules"))]


def test_memory_beside_the_gpu_is_a_share_of_what_the_container_has() -> None:
    job = job_for(PHI_3_MINI, {"kv_cache_cpu_memory_utilization": 0.5}, machine(A10))
    assert "--kv-offloading-size=32.0" in arguments(job, Here(memory=64 * GIB))
    copies = job_for(PHI_3_MINI, {"kv_cache_cpu_memory_utilization": 0.5}, machine(A10, 2))
    assert not [w for w in arguments(copies, Here(memory=64 * GIB)) if "offloading" in w]


# --- against vLLM's own parser ----------------------------------------------------------------------------------------

words = st.from_regex(r"[a-z][a-z0-9 ={}'\"-]{0,12}", fullmatch=True)


def values(flag: Flag) -> st.SearchStrategy[Any]:
    """Values that the flag is meant to take."""
    if flag.name in ("tool-call-parser", "reasoning-parser"):
        one: st.SearchStrategy[Any] = st.sampled_from(
            known().tool_parsers if "tool" in flag.name else known().reasoning_parsers
        )
    elif flag.name == "quantization":
        one = st.sampled_from(sorted(known().quantizations))
    elif flag.choices:
        one = st.sampled_from(flag.choices)
    else:
        one = {
            "bool": st.booleans(), "switch": st.booleans(), "int": st.integers(1, 9999), "float": st.floats(0.01, 1),
            "amount": st.integers(1, 10**6) | st.sampled_from(["4k", "1K", "2.5k", "auto"] if flag.name == "max-model-len" else ["4k", "1K"]),
            "text": words, "json": st.just({}), "json or text": st.dictionaries(words, st.integers(), max_size=2),
        }[flag.type]  # fmt: skip
    return st.lists(one, min_size=1, max_size=3) if flag.many else one


NOT_BY_SHAPE = {"optimization-level", "mamba-backend", "attention-backend", "mm-encoder-attn-backend", "default-mm-loras",
                "generation-config"}  # fmt: skip
"""Flags whose names vLLM looks up when it parses, beyond what is known here; `generation-config` has two values."""

free = sorted({f.name for f in known().flags.values()} - set(REFUSED) - NOT_BY_SHAPE)
flags_of_users = st.lists(st.sampled_from(free), max_size=6, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: values(known().flags[name]) for name in names})
)


@st.composite
def jobs(draw: st.DrawFn) -> ServingJob | None:
    gpu = draw(st.sampled_from([None, T4, A10, A100, H100]))
    adapters = tuple(ServedAdapter(f"a{n}") for n in range(draw(st.integers(0, 3))))
    user = {"vllm": draw(flags_of_users), "kv_cache_cpu_memory_utilization": draw(st.sampled_from([0, 0.5]))}
    try:
        return job_for(
            draw(st.sampled_from(PRESETS)),
            user,
            machine(gpu, draw(st.integers(1, 8))),
            draw(st.integers(1, 3)),
            adapters,
        )
    except UserError:
        return None


heres = st.builds(
    Here,
    weights=st.sampled_from(["/workspace/weights", "/home/me/a folder, with = and -- in it"]),
    adapters=st.sampled_from([(), (Loaded("mine", "/mnt/adapter/mine", 12),), (Loaded("a=b", "/x, y/z", 512), Loaded("c", "/c", 1))]),
    chat_template=st.sampled_from(["", __file__]),
    generation_config=st.sampled_from(["", "/where/it/is"]),
    memory=st.sampled_from([0, 64 * GIB]),
)  # fmt: skip


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(job=jobs(), here=heres, rank=st.integers(0, 2))
def test_vllm_takes_every_line(
    vllm_refuses: Callable[[Sequence[str]], str], job: ServingJob | None, here: Here, rank: int
) -> None:
    if job is None:
        return
    place = Here(here.weights, adapters=here.adapters, chat_template=here.chat_template, generation_config=here.generation_config,
                 memory=here.memory, machines=job.machines, rank=min(rank, job.machines - 1), leader="phi-0.phi")  # fmt: skip
    line = arguments(job, place)
    assert not vllm_refuses(line), line


@pytest.mark.parametrize("name", free)
def test_vllm_takes_each_flag_by_itself(vllm_refuses: Callable[[Sequence[str]], str], name: str) -> None:
    examples: dict[str, Any] = {
        "bool": True,
        "switch": True,
        "int": 8,
        "float": 0.5,
        "amount": "8k",
        "text": "word",
        "json": {},
    }
    flag = known().flags[name]
    value = flag.choices[0] if flag.choices else examples.get(flag.type, {"a": 1})
    value = {"tool-call-parser": "hermes", "reasoning-parser": "qwen3", "quantization": "fp8"}.get(name, value)
    job = job_for(LLAMA_70B, {"vllm": {"enable-log-requests": True, name: value}}, machine(H100, 8))
    assert not vllm_refuses(arguments(job)), name


def test_the_known_flags_are_those_of_the_installed_vllm(vllm_refuses: Callable[[Sequence[str]], str]) -> None:
    assert vllm_refuses(["serve", "/w", "--max-model-length=5"])
    assert vllm_refuses(["serve", "/w", "--dtype=float64"])
    assert not vllm_refuses(["serve", "/w"])
