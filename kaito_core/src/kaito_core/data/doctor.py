"""The data doctor: what is in the training data, before a GPU is paid for.

Two silent failures cost people most: data in which nothing is trained (every label masked, loss 0.0), and data in which the
stop token is never trained (the model answers and never ends). Both are hard errors here.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kaito_core.data.chat import Rendered
from kaito_core.data.formats import Conversation, Text
from kaito_core.data.tokens import ChatTokenizer, Example
from kaito_core.problems import Problem, UserError, errors

FEW_ROWS = 10
MUCH_TRUNCATED = 0.05
MANY_DUPLICATES = 0.02
SHOWN = 4000
"""Characters of the sample that are kept."""


@dataclass(frozen=True, slots=True)
class Report:
    """What the doctor found. Shares are fractions of 1; lengths are in tokens, before truncation."""

    format: str
    rows: int
    """As read, training and evaluation together."""
    dropped: int
    """Rows in which nothing would be trained; they are left out."""
    train_rows: int
    eval_rows: int
    max_length: int
    tokens: int
    """After truncation, of the rows that are kept."""
    trained_tokens: int
    length_p50: int
    length_p95: int
    length_max: int
    histogram: tuple[tuple[int, int], ...]
    """(longest length in the bucket, rows); buckets double."""
    truncated: int
    """Rows longer than ``max_length``."""
    duplicates: int
    """Rows that are exactly the same as an earlier one."""
    differing_answers: int
    """Prompts that occur with more than one answer."""
    empty_answers: int
    """Rows in which the assistant says nothing at least once."""
    control_tokens: int
    """Rows whose text spells a special token."""
    columns_not_used: tuple[str, ...]
    """Columns and message keys that hold something in some row and are not trained on, ids and the like left out."""
    sample: tuple[tuple[str, bool], ...]
    """One rendered example in pieces, each with whether it is trained."""
    problems: tuple[Problem, ...]

    @property
    def trained_share(self) -> float:
        return self.trained_tokens / self.tokens if self.tokens else 0.0

    @property
    def truncated_share(self) -> float:
        return self.truncated / self.rows if self.rows else 0.0

    @property
    def duplicate_share(self) -> float:
        return self.duplicates / self.rows if self.rows else 0.0

    @property
    def ok(self) -> bool:
        """No error; warnings may be there."""
        return not errors(self.problems)

    def to_json(self) -> dict[str, Any]:
        """A plain dict for ``--json`` and ``doctor.json``."""
        shares = {"trained_share": self.trained_share, "truncated_share": self.truncated_share,
                  "duplicate_share": self.duplicate_share}  # fmt: skip
        sample = [{"text": text, "trained": trained} for text, trained in self.sample]
        return {**asdict(self), **{k: round(v, 4) for k, v in shares.items()}, "ok": self.ok, "sample": sample,
                "sample_text": self.sample_text(), "problems": [p.to_json() for p in self.problems]}  # fmt: skip

    def sample_text(self) -> str:
        """The sample as plain text, with what is trained between ⟦ and ⟧."""
        return "".join(f"⟦{text}⟧" if trained else text for text, trained in self.sample)

    def lines(self) -> list[str]:
        """The findings for people, a line each, without the sample and the problems."""
        split = (
            f"{self.train_rows} for training, {self.eval_rows} for evaluation" if self.eval_rows else "all for training"
        )
        widest = max((rows for _, rows in self.histogram), default=1)
        bars = [
            f"    ≤ {upto:>7}  {rows:>8}  {'█' * max(1, round(30 * rows / widest))}" for upto, rows in self.histogram
        ]
        return [
            f"format           {self.format}",
            f"rows             {self.rows}: {split}" + (f", {self.dropped} dropped" if self.dropped else ""),
            f"tokens           {self.tokens}, of which {self.trained_share:.1%} are trained",
            f"length           {self.length_p50} (median), {self.length_p95} (95 of 100 are shorter), {self.length_max} (longest)",
            *bars,
            f"truncated        {self.truncated} rows ({self.truncated_share:.1%}) are longer than {self.max_length} tokens",
            f"duplicates       {self.duplicates} rows ({self.duplicate_share:.1%})",
            f"differing        {self.differing_answers} prompts have more than one answer",
            f"empty answers    {self.empty_answers} rows",
            *([f"columns not used: {', '.join(self.columns_not_used)}"] if self.columns_not_used else []),
        ]


class BadData(UserError):
    """Training on this data would be wasted; ``report`` says what was found."""

    def __init__(self, report: Report) -> None:
        super().__init__(errors(report.problems))
        self.report = report


class Doctor:
    """Looks at every example once, and then reports."""

    def __init__(self, tokenizer: ChatTokenizer, max_length: int) -> None:
        self._tokenizer, self._max_length = tokenizer, max_length
        self._stops = set(tokenizer.stop_ids.values())
        self._lengths: list[int] = []
        self._seen: set[bytes] = set()
        self._answers: dict[bytes, bytes] = {}
        self._differing: set[bytes] = set()
        self._duplicates = self._dropped = self._empty = self._control = 0
        self._tokens = self._trained = 0
        self._stopped = self._stopped_before_cut = False
        self._sample: tuple[tuple[str, bool], ...] = ()

    def look(self, sample: Conversation | Text, rendered: Rendered | Text, whole: Example, cut: Example) -> bytes:
        """Take one example into account, ``whole`` before truncation and ``cut`` after; the digest of its content."""
        key = _digest(sample)
        self._lengths.append(len(whole))
        self._duplicates += key in self._seen
        self._seen.add(key)
        self._control += self._tokenizer.has_control_tokens(sample)
        if isinstance(sample, Conversation):
            self._empty += any(not a.strip() for a in sample.answers)
            prompt, answer = _digest(Conversation(sample.prompt)), _digest(Text(sample.messages[-1].content))
            if self._answers.setdefault(prompt, answer) != answer:
                self._differing.add(prompt)
        self._stopped_before_cut = self._stopped_before_cut or self._stops_in(whole)
        if not cut.trained_tokens:
            self._dropped += 1
            return key
        self._tokens += len(cut)
        self._trained += cut.trained_tokens
        self._stopped = self._stopped or self._stops_in(cut)
        if not self._sample:
            self._sample = _pieces(rendered)
        return key

    def _stops_in(self, example: Example) -> bool:
        return any(t and i in self._stops for i, t in zip(example.input_ids, example.trained, strict=True))

    def report(
        self, form: str, train_rows: int, eval_rows: int, notes: Sequence[Problem] = (), unused: Iterable[str] = ()
    ) -> Report:
        """What was found; ``notes`` are problems found elsewhere (in the configuration), ``unused`` the columns not used."""
        lengths = sorted(self._lengths)
        truncated = sum(n > self._max_length for n in lengths)
        return Report(
            format=form, rows=len(lengths), dropped=self._dropped, train_rows=train_rows, eval_rows=eval_rows,
            max_length=self._max_length, tokens=self._tokens, trained_tokens=self._trained,
            length_p50=_rank(lengths, 0.5), length_p95=_rank(lengths, 0.95), length_max=lengths[-1] if lengths else 0,
            histogram=_histogram(lengths), truncated=truncated, duplicates=self._duplicates,
            differing_answers=len(self._differing), empty_answers=self._empty, control_tokens=self._control,
            columns_not_used=tuple(unused), sample=self._sample, problems=(*self._errors(), *notes, *self._warnings(truncated)),
        )  # fmt: skip

    def _errors(self) -> list[Problem]:
        if not self._lengths:
            return [Problem("there is no row in the training data", "give at least one file with data in it")]
        if not self._trained:
            why = (
                f"every answer begins behind max_length ({self._max_length} tokens)"
                if min(self._lengths) > self._max_length else "no row has a token that the assistant says"
            )  # fmt: skip
            return [Problem(f"nothing would be trained: {why}",
                            "raise max_length, or give data in which the assistant answers")]  # fmt: skip
        if not self._stopped:
            names = " or ".join(self._tokenizer.stop_ids)
            why, remedy = (
                (f"every row is cut at max_length ({self._max_length} tokens) before its end", "raise max_length, or shorten the rows")
                if self._stopped_before_cut else
                ("the chat template does not write it behind the answers",
                 "let the template write it directly behind each answer, and inside {% generation %} where it has these marks")
            )  # fmt: skip
            return [
                Problem(
                    f"the stop token {names} is never trained: {why}; the tuned model would not stop answering", remedy
                )
            ]
        return []

    def _warnings(self, truncated: int) -> list[Problem]:
        rows = len(self._lengths)
        found: list[tuple[bool, str, str]] = [
            (rows < FEW_ROWS, f"only {rows} rows: that teaches little", "give more data"),
            (truncated > MUCH_TRUNCATED * rows,
             f"{truncated} of {rows} rows are cut at max_length ({self._max_length} tokens)",
             f"raise max_length; 95 of 100 rows have at most {_rank(sorted(self._lengths), 0.95)} tokens"),
            (self._duplicates > MANY_DUPLICATES * rows, f"{self._duplicates} of {rows} rows repeat an earlier one exactly",
             "leave repeated rows out; each is learnt as often as it stands there"),
            (self._dropped > 0, f"{self._dropped} rows are left out: nothing in them would be trained",
             "see whether their answers are empty or begin behind max_length"),
            (self._empty > 0, f"{self._empty} rows have an empty answer: that teaches the model to say nothing",
             "leave them out unless that is meant"),
            (self._control > 0, f"{self._control} rows spell a special token of the model in their text, which is read as that token",
             "take it out of the text"),
        ]  # fmt: skip
        return [Problem(message, remedy, severity="warning") for so, message, remedy in found if so and rows]


def _digest(sample: Conversation | Text) -> bytes:
    parts = (
        [p for m in sample.messages for p in (m.role, m.content)] if isinstance(sample, Conversation) else [sample.text]
    )
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.digest()


def _pieces(rendered: Rendered | Text) -> tuple[tuple[str, bool], ...]:
    if isinstance(rendered, Text):
        return ((rendered.text[:SHOWN], True),)
    pieces, at = [], 0
    for start, end in rendered.spans:
        pieces += [(rendered.text[at:start], False), (rendered.text[start:end], True)]
        at = end
    pieces.append((rendered.text[at:], False))
    room, shown = SHOWN, []
    for text, trained in pieces:
        if text[:room]:
            shown.append((text[:room], trained))
        room -= len(text[:room])
    return tuple(shown)


def _rank(ordered: Sequence[int], share: float) -> int:
    """The smallest length that at least this share of the rows does not exceed (nearest rank)."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0


def _histogram(lengths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    counts = Counter(max(32, 1 << max(0, n - 1).bit_length()) for n in lengths)
    return tuple(sorted(counts.items()))
