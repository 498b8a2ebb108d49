"""The command line of ``vllm serve`` for a job: pure, so that every one that can come out can be held against vLLM's own parser."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from kaito_core.plugins.types import Preset
from kaito_core.workloads.serving import ADAPTERS, PORT, ServingJob
from kaito_runtime_vllm import flags
from kaito_runtime_vllm.config import CPU_CACHE
from kaito_runtime_vllm.estimate import GIB, cpu_cache_bytes
from kaito_runtime_vllm.known import known

FACE: Final = "kaito_core.serving.face.Face"

MASTER_PORT: Final = 29501
"""Where the machines of one endpoint find each other: vLLM's own ``--master-port``."""

RPC_PORT: Final = 29550
"""Where copies on other machines ask the leader for work: vLLM's own ``--data-parallel-rpc-port``."""

DECIDED: Final = frozenset(
    ("dtype", "max-model-len", "max-num-seqs", "gpu-memory-utilization", "tensor-parallel-size", "pipeline-parallel-size",
     "data-parallel-size", "max-lora-rank", "max-loras", "enable-lora", "chat-template", "generation-config",
     "kv-cache-memory-bytes")
)  # fmt: skip
"""Flags that come from the plan or from what lies here; the plan has taken the user's into account."""


@dataclass(frozen=True)
class Loaded:
    """An adapter on this machine."""

    name: str
    folder: str
    rank: int


@dataclass(frozen=True)
class Here:
    """What only the machine that serves can know; the defaults are a container's."""

    weights: str = "/workspace/weights"
    host: str = "0.0.0.0"  # noqa: S104 – a container's own network
    port: int = PORT
    adapters: tuple[Loaded, ...] = ()
    chat_template: str = ""
    """The file with the template of this endpoint; empty: the one in the tokenizer's files."""
    generation_config: str = ""
    """The folder with the ``generation_config.json`` of this endpoint; empty: the weights' own."""
    memory: int = 0
    """Bytes of RAM that may be used, for a cache beside the GPU's."""
    rank: int = 0
    """Which of the endpoint's machines this is; 0 leads and listens."""
    machines: int = 1
    leader: str = ""
    """Where machine 0 is found."""


def here_in_a_container(job: ServingJob) -> Here:
    """For showing the command line before there is a machine: adapters have the highest rank that is allowed."""
    from kaito_runtime_vllm.estimate import rank_allowed

    rank = rank_allowed(job.config["vllm"])
    return Here(
        adapters=tuple(Loaded(a.name, f"{ADAPTERS}/{a.name}", rank) for a in job.adapters), machines=job.machines
    )


def arguments(job: ServingJob, here: Here | None = None) -> tuple[str, ...]:
    """The words after ``vllm``: ``serve``, the model, and the flags.

    Machine 0 has the HTTP server; the others get the same engine without one (``--headless``)."""
    here = here or here_in_a_container(job)
    vllm: Mapping[str, Any] = job.config["vllm"]
    words: list[str] = ["serve", here.weights]
    for name, value in _decided(job, here):
        words += flags.argv(known().flags[name], value)
    if here.rank == 0:
        words += [
            f"--host={here.host}",
            f"--port={here.port}",
            f"--served-model-name={job.preset.name}",
            f"--middleware={FACE}",
        ]
        if here.chat_template:
            words.append(f"--chat-template={here.chat_template}")
        if here.adapters:
            # As JSON, not NAME=PATH: a path may hold a comma.
            words += ["--lora-modules", *(_module(a, job.preset) for a in here.adapters)]
    for name, value in vllm.items():
        if name not in DECIDED:
            words += flags.argv(known().flags[name], value)
    return tuple(words)


def _module(adapter: Loaded, preset: Preset) -> str:
    return json.dumps({"name": adapter.name, "path": adapter.folder, "base_model_name": preset.name})


def _decided(job: ServingJob, here: Here) -> Iterator[tuple[str, Any]]:
    c, vllm = job.configuration, job.config["vllm"]
    yield "dtype", c.dtype
    yield "max-model-len", c.context
    yield "max-num-seqs", c.requests
    if c.device == "cpu":
        yield "kv-cache-memory-bytes", cpu_cache_bytes(job.preset, vllm, c)
        if "enforce-eager" not in vllm:
            # Compiling wants a C++ compiler on the machine that serves, and takes far longer than loading a model that a CPU can serve.
            yield "enforce-eager", True
    else:
        yield "gpu-memory-utilization", c.memory_share
        if vllm.get("kv-cache-memory-bytes", -1) > 0:
            yield "kv-cache-memory-bytes", vllm["kv-cache-memory-bytes"]
    yield "tensor-parallel-size", c.tensor
    yield "pipeline-parallel-size", c.pipeline
    yield "data-parallel-size", c.data
    if here.adapters or vllm.get("enable-lora"):
        yield "enable-lora", True
        yield "max-loras", vllm.get("max-loras") or max(1, len(here.adapters))
        yield "max-lora-rank", _rank(vllm, here)
    if here.generation_config:
        yield "generation-config", here.generation_config
    offloaded = _offloaded(job, here)
    if offloaded:
        yield "kv-offloading-size", offloaded
    if here.machines > 1:
        yield "nnodes", here.machines
        yield "node-rank", here.rank
        yield "master-addr", here.leader
        yield "master-port", MASTER_PORT
        yield "distributed-executor-backend", "mp"
        if c.data > 1:
            yield "data-parallel-rpc-port", RPC_PORT
        if here.rank:
            yield "headless", True


def _rank(vllm: Mapping[str, Any], here: Here) -> int:
    """The smallest rank that vLLM knows and that holds every adapter; what the user has asked for, if anything."""
    if "max-lora-rank" in vllm:
        return int(vllm["max-lora-rank"])
    highest = max((a.rank for a in here.adapters), default=1)
    return int(next(r for r in known().flags["max-lora-rank"].choices if r >= highest))


def _offloaded(job: ServingJob, here: Here) -> float:
    """GiB of RAM for cache that the GPU has no room for; as in KAITO not for several copies, nor along a pipeline."""
    c = job.configuration
    elsewhere = {"kv-offloading-size", "kv-transfer-config"} & set(job.config["vllm"])
    if c.device == "cpu" or c.data > 1 or c.pipeline > 1 or elsewhere:
        return 0.0
    share = float(job.config.get(CPU_CACHE, 0.0))
    return round(share * here.memory / GIB, 1)
