"""How a model can be spread over GPUs and machines: pure arithmetic on its shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kaito_core.plugins.types import Architecture


@dataclass(frozen=True)
class Layout:
    """One way to spread a model."""

    tensor: int = 1
    """GPUs that share every layer; always in one machine, since they talk after every layer."""
    pipeline: int = 1
    """Groups of such GPUs that follow one another."""
    data: int = 1
    """Copies of the whole."""

    @property
    def copy(self) -> int:
        """GPUs of one copy."""
        return self.tensor * self.pipeline

    @property
    def gpus(self) -> int:
        return self.copy * self.data


def divides(architecture: Architecture, tensor: int) -> bool:
    """Whether so many GPUs can share every layer.

    vLLM's attention layers (``LlamaAttention`` and those made after it) want the heads divisible by the number of GPUs, and the
    heads of keys and values either divisible by it or, to be copied, a divisor of it; the parallel linear layers want the
    intermediate size divisible."""
    a = architecture
    kv = a.kv_heads or a.heads
    shared = kv % tensor == 0 if kv >= tensor else tensor % kv == 0
    return tensor == 1 or (a.heads % tensor == 0 and shared and a.intermediate % tensor == 0)


def tensor_sizes(architecture: Architecture, most: int) -> list[int]:
    """Every number of GPUs up to ``most`` that can share the layers."""
    return [t for t in range(1, most + 1) if divides(architecture, t)]


def candidates(architecture: Architecture, gpus: int, machines: int, pipelines: bool = True) -> Iterator[Layout]:
    """Every layout on ``machines`` with ``gpus`` each in which all machines are used alike.

    vLLM counts its workers through the machines, so many on each (``--nnodes``): a copy is within one machine, or covers a
    whole number of them evenly."""
    for tensor in tensor_sizes(architecture, gpus):
        for spanned in (s for s in range(1, machines + 1) if machines % s == 0):
            for here in range(1, gpus // tensor + 1):  # stages of one copy on one machine
                pipeline = here * spanned
                if pipeline > architecture.layers or (pipeline > 1 and not pipelines):
                    continue
                most = gpus // (tensor * here) if spanned == 1 else 1
                for copies in range(1, most + 1):
                    yield Layout(tensor, pipeline, copies * machines // spanned)


def placeable(layout: Layout, gpus: int, machines: int) -> bool:
    """Whether a layout that somebody asks for has a place: as in `candidates`, but the machines need not be full."""
    if layout.copy <= gpus:
        return layout.data % machines == 0 and layout.copy * layout.data // machines <= gpus
    return any(
        machines % s == 0 and layout.pipeline % s == 0 and layout.copy // s <= gpus and layout.data == machines // s
        for s in range(2, machines + 1)
    )
