"""From files to what the trainer reads: rows, conversations, examples, the doctor's report, and the split."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from kaito_core.data.cache import digest_file
from kaito_core.data.chat import ChatError, Rendered
from kaito_core.data.doctor import BadData, Doctor, Report
from kaito_core.data.formats import MOST_PROBLEMS, Conversation, Text, samples
from kaito_core.data.packing import pack
from kaito_core.data.prepared import write_examples
from kaito_core.data.rows import Row, data_files, read_rows
from kaito_core.data.tokens import ChatTokenizer, Example
from kaito_core.plugins.types import DataFacts, Preset
from kaito_core.problems import Problem, UserError

__all__ = ["BadData", "Prepared", "data_files", "digest_files", "prepare"]

TRAIN, EVAL, REPORT = "train.arrow", "eval.arrow", "doctor.json"
BATCH = 512
"""Rows that are tokenised together."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Training data that is ready, or that was only looked at (``train`` None)."""

    facts: DataFacts
    """Of the training part: what a plan needs."""
    report: Report
    """Of everything that was read."""
    train: Path | None = None
    eval: Path | None = None
    """None when there is no evaluation part."""


def prepare(
    files: Sequence[Path],
    preset: Preset,
    tokenizer_dir: Path,
    config: Mapping[str, Any],
    into: Path | None = None,
    *,
    sequence: int | None = None,
) -> Prepared:
    """Read ``files`` (or the data files of folders), and make them what the model of ``preset`` is trained on.

    ``tokenizer_dir`` is the model's folder, with ``tokenizer.json``. ``config`` is a tuner's resolved ``training_config``:
    from ``DatasetConfig`` the column names, ``train_test_split`` (share for training; 1: no evaluation), ``shuffle_dataset``
    and ``shuffle_seed``; from ``TrainingArguments`` ``max_length`` (tokens; absent: the model's context) and ``packing``.
    ``sequence`` is the length that the plan chose, in tokens, where that is shorter.
    With ``into`` the examples are written there (`TRAIN`, `EVAL`, `REPORT`). Raises `UserError` for data that cannot be read,
    `BadData` (with the report) for data that would be trained on in vain.
    """
    dataset, arguments = _section(config, "DatasetConfig"), _section(config, "TrainingArguments")
    max_length, notes = _max_length(arguments, preset)
    max_length = min(max_length, sequence or max_length)
    fraction = _fraction(dataset)
    paths = [p for given in files for p in (data_files(given) if given.is_dir() else [given])]
    template = str(_section(config, "ModelConfig").get("chat_template") or "")
    tokenizer = ChatTokenizer(tokenizer_dir, replace(preset.chat, template=template) if template else preset.chat)
    doctor = Doctor(tokenizer, max_length)
    found, rows = samples(read_rows(paths), dataset)
    kept: list[tuple[bytes, Example]] = []
    for sample, rendered, whole in _encoded(rows, tokenizer):
        cut = Example(whole.input_ids[:max_length], whole.trained[:max_length])
        key = doctor.look(sample, rendered, whole, cut)
        if cut.trained_tokens:
            kept.append((key, cut))
    form = ", ".join(dict.fromkeys(f.name for f in found.forms.values()))
    train, held_out = _split(kept, fraction, dataset)
    if fraction < 1 and kept and not held_out:
        notes.append(Problem("too few different rows to hold some out for evaluation", field="DatasetConfig.train_test_split",
                             severity="warning"))  # fmt: skip
    report = doctor.report(form, len(train), len(held_out), notes, found.unused)
    digest = digest_files(paths)
    if into is not None:
        into.mkdir(parents=True, exist_ok=True)
        written = {**report.to_json(), "digest": digest}
        (into / REPORT).write_text(json.dumps(written, ensure_ascii=False, indent=2), encoding="utf-8")
    if not report.ok:
        raise BadData(report)
    packing = bool(arguments.get("packing", False))
    facts = DataFacts(
        rows=len(train), tokens=sum(len(e) for e in train), trained_tokens=sum(e.trained_tokens for e in train),
        longest=report.length_max, sequences=len(pack([len(e) for e in train], max_length)) if packing else len(train),
        digest=digest, format=form,
    )  # fmt: skip
    if into is None:
        return Prepared(facts, report)
    return _written(into, facts, report, train, held_out)


def digest_files(paths: Sequence[Path]) -> str:
    """``sha256:…`` over the contents of the files; their names and order do not matter."""
    digests = sorted(digest_file(p) for p in paths)
    return "sha256:" + hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _encoded(
    rows: Iterator[tuple[Row, Conversation | Text]], tokenizer: ChatTokenizer
) -> Iterator[tuple[Conversation | Text, Rendered | Text, Example]]:
    """Every row rendered and tokenised, in blocks; rows that the template refuses are collected and raised at the end."""
    problems: list[Problem] = []
    while block := list(islice(rows, BATCH)):
        good: list[tuple[Conversation | Text, Rendered | Text]] = []
        for row, sample in block:
            try:
                good.append((sample, tokenizer.render(sample)))
            except ChatError as e:
                problems += [Problem(f"row {row.number}: {p.message}", p.remedy, file=row.file) for p in e.problems]
                if len(problems) >= MOST_PROBLEMS:
                    raise UserError(problems) from None
        for (sample, rendered), example in zip(good, tokenizer.encode([r for _, r in good]), strict=True):
            yield sample, rendered, example
    if problems:
        raise UserError(problems)


def _split(
    kept: Sequence[tuple[bytes, Example]], fraction: float, dataset: Mapping[str, Any]
) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples. Equal rows go to the same side: else the evaluation would reward learning by heart."""
    groups: dict[bytes, list[Example]] = {}
    for key, example in kept:
        groups.setdefault(key, []).append(example)
    order = list(groups.values())
    if dataset.get("shuffle_dataset", True):
        random.Random(int(dataset.get("shuffle_seed", 42))).shuffle(order)  # noqa: S311 – not a secret
    if fraction >= 1 or len(order) < 2:
        return [e for group in order for e in group], []
    wanted = max(1, round(len(kept) * (1 - fraction)))
    held_out: list[Example] = []
    while len(order) > 1 and len(held_out) < wanted:
        held_out += order.pop()
    return [e for group in order for e in group], held_out


def _written(
    into: Path, facts: DataFacts, report: Report, train: Sequence[Example], held_out: Sequence[Example]
) -> Prepared:
    metadata = {"digest": facts.digest, "format": facts.format, "max_length": report.max_length}
    write_examples(into / TRAIN, train, metadata)
    if held_out:
        write_examples(into / EVAL, held_out, metadata)
    else:
        (into / EVAL).unlink(missing_ok=True)
    return Prepared(facts, report, into / TRAIN, into / EVAL if held_out else None)


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = config.get(name) or {}
    if not isinstance(found, Mapping):
        raise UserError(Problem("expected a mapping", field=name))
    return found


def _max_length(arguments: Mapping[str, Any], preset: Preset) -> tuple[int, list[Problem]]:
    context = preset.architecture.context
    value = arguments.get("max_length")
    if value is None:
        return context, []
    field = "TrainingArguments.max_length"
    if not isinstance(value, int) or isinstance(value, bool) or value < 2:
        raise UserError(Problem(f"max_length is {value!r}", "give a number of tokens, at least 2", field))
    if value > context:
        words = f"max_length is {value}, and {preset.name} reads at most {context} tokens: {context} is used"
        return context, [Problem(words, f"write {context} or less", field, severity="warning")]
    return value, []


def _fraction(dataset: Mapping[str, Any]) -> float:
    value = dataset.get("train_test_split", 1)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise UserError(Problem(f"train_test_split is {value!r}", "give the share for training: above 0, and at most 1 (no evaluation)",
                                "DatasetConfig.train_test_split"))  # fmt: skip
    return float(value)
