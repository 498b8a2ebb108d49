"""What the processes of one training, one a GPU, do together.

Collective operations must be the same, in the same order, in every process; otherwise all of them wait for each other. So what
only one process knows (its clock, a signal, an error) is brought together here before anything follows from it. With one
process everything here is what that process says.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta

import torch
from torch import distributed

from kaito_core.problems import Failure, Problem

TEXT_BYTES = 1024
"""Most of a failure's words that the other processes are told."""


def join(device: torch.device, timeout_seconds: float) -> None:
    """Come together with the other processes that torchrun has started; after this long without one of them each gives up.

    transformers would do it too, and on a CPU without the limit."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))


def count() -> int:
    """How many there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """The number of this one, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def add(tensor: torch.Tensor) -> None:
    """The sum over all processes, in place. Raises `Failure` when another process is gone or does not come."""
    _reduce(tensor, distributed.ReduceOp.SUM)


def agree(values: Sequence[int], device: torch.device) -> list[int]:
    """The largest of what the processes say, one by one; none goes on before all have said theirs.

    Raises `Failure` when another process is gone or does not come."""
    together = torch.tensor(values, dtype=torch.int64, device=device)
    _reduce(together, distributed.ReduceOp.MAX)
    return [int(value) for value in together.tolist()]


def first_failure(own: Failure | None, device: torch.device) -> Failure | None:
    """The failure of one of the processes that have one, None when none has; all processes ask, and all get the same."""
    (number,) = agree([rank() + 1 if own else 0], device)
    if not number or count() == 1:
        return own
    problem = own.problems[0] if own and rank() == number - 1 else Problem("")
    words = [_shared(text, device) for text in (problem.message, problem.remedy, problem.field)]
    return Failure(Problem(*words))


def _shared(text: str, device: torch.device) -> str:
    """The text of the one process that has one."""
    own = text.encode()[:TEXT_BYTES]
    return bytes(agree([*own, *[0] * (TEXT_BYTES - len(own))], device)).rstrip(b"\0").decode(errors="ignore")


def _reduce(tensor: torch.Tensor, operation: distributed.ReduceOp.RedOpType) -> None:
    if count() == 1:
        return
    try:
        distributed.all_reduce(tensor, operation)
    except RuntimeError as e:
        text = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise Failure(f"process {rank()} of {count()} has lost another one of this training: {text}",
                      "the log has that process's own words; the same command goes on from the newest checkpoint") from e  # fmt: skip
