"""Examples, rows and batches.

An optimizer step takes a fixed number of *rows* of about ``max_length`` tokens, each row one or several whole examples.
What is computed at once is a *batch*: as many examples of the step, in order, as its token budget allows, laid one after
another without padding. The budget can shrink while training (out of memory) and changes nothing about the result, because
the loss is normalised over the step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from kaito_core.data.packing import pack
from kaito_core.data.prepared import read_batches
from kaito_tuner_qlora.loss import IGNORED


class Example(NamedTuple):
    """One rendered example: tokens [n] int32, and which of them carry loss [n] bool."""

    input_ids: np.ndarray
    trained: np.ndarray

    @property
    def loss_tokens(self) -> int:
        """Tokens that are predicted and carry loss: the first one is never predicted."""
        return int(self.trained[1:].sum())


class Examples(Sequence[Example]):
    """The examples of prepared files, cut to ``limit`` tokens; those that then carry no loss are left out.

    The tokens stay in the page cache (Arrow, memory-mapped); what is held per example is three numbers."""

    def __init__(self, parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], limit: int) -> None:
        """``parts``: tokens, their loss flags, and the n + 1 offsets of n examples in both."""
        self._parts = parts
        where, starts, lengths, losses = [], [], [], []
        for number, (_, trained, offsets) in enumerate(parts):
            start, length = offsets[:-1].astype(np.int64), np.minimum(np.diff(offsets), limit).astype(np.int64)
            before = np.concatenate([[0], np.cumsum(trained, dtype=np.int64)])
            loss = before[start + length] - before[np.minimum(start + 1, start + length)]
            keep = loss > 0
            where.append(np.full(int(keep.sum()), number, dtype=np.int32))
            starts.append(start[keep])
            lengths.append(length[keep])
            losses.append(loss[keep])
        self._where, self._starts = (np.concatenate(x) if x else np.zeros(0, np.int64) for x in (where, starts))
        self.lengths, self.loss_tokens = (np.concatenate(x) if x else np.zeros(0, np.int64) for x in (lengths, losses))

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        tokens, trained, _ = self._parts[self._where[index]]
        place = slice(self._starts[index], self._starts[index] + self.lengths[index])
        return Example(tokens[place], trained[place])


def read(path: Path, limit: int) -> Examples:
    """The examples of a file that the `check` stage wrote (`kaito_core.data.prepared`), each at most ``limit`` tokens."""
    if not path.is_file():
        return Examples([], limit)
    batches, _ = read_batches(path)
    return Examples([
        (ids.values.to_numpy(), trained.values.to_numpy(zero_copy_only=False).astype(bool), ids.offsets.to_numpy())
        for ids, trained in batches
    ], limit)  # fmt: skip


def rows(lengths: Sequence[int], capacity: int, packing: bool) -> list[list[int]]:
    """Which examples share a row of ``capacity`` tokens."""
    return pack(lengths, capacity) if packing else [[i] for i in range(len(lengths))]


@dataclass(frozen=True)
class Batch:
    """Examples one after another in one row of T tokens."""

    input_ids: torch.Tensor  # [1, T]
    position_ids: torch.Tensor  # [1, T], from 0 in every example
    labels: torch.Tensor  # [1, T], the next token where it carries loss, else -100
    bounds: torch.Tensor  # [examples + 1] int32: first positions, and T
    longest: int

    @property
    def tokens(self) -> int:
        return self.input_ids.shape[1]


def batch(examples: Sequence[Example]) -> Batch:
    """Lays examples one after another."""
    lengths = [len(e.input_ids) for e in examples]
    labels = []
    for e in examples:
        following = np.full(len(e.input_ids), IGNORED, dtype=np.int64)
        following[:-1][e.trained[1:]] = e.input_ids[1:][e.trained[1:]]
        labels.append(following)
    return Batch(
        input_ids=torch.from_numpy(np.concatenate([e.input_ids for e in examples]).astype(np.int64))[None],
        position_ids=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))[None],
        labels=torch.from_numpy(np.concatenate(labels))[None],
        bounds=torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)),
        longest=max(lengths),
    )


def batches(examples: Iterable[Example], budget: int) -> Iterator[list[Example]]:
    """Examples in order, in groups of at most ``budget`` tokens, or of one."""
    group: list[Example] = []
    tokens = 0
    for e in examples:
        if group and tokens + len(e.input_ids) > budget:
            yield group
            group, tokens = [], 0
        group.append(e)
        tokens += len(e.input_ids)
    if group:
        yield group
