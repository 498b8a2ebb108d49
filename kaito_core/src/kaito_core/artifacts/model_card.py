"""The ``README.md`` of an adapter: a model card as the Hugging Face hub reads it.

The front matter's keys are those of https://huggingface.co/docs/hub/model-cards. What is not known is left out, never
guessed. Text that comes from data goes into code blocks or is escaped, so that it stays text.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt, and what the model says to it before and after tuning."""

    prompt: str
    before: str = ""
    after: str = ""


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What is known about an adapter. Every field but ``name`` may be left empty.

    ``base_model`` is a name on the hub, ``preset`` the name of kaito's preset for it. A base model that is on no hub has a
    ``base_folder``, the folder's own name without its path; ``base_revision`` is a digest then. ``license`` is the base
    model's, as an SPDX identifier in lower case. ``datasets`` are names on the hub. Losses are mean cross-entropies in nats per
    token on data that was held out from training.
    """

    name: str
    base_model: str = ""
    base_revision: str = ""
    base_folder: str = ""
    preset: str = ""
    license: str = ""
    tags: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    data_digest: str = ""
    data_rows: int | None = None
    method: str = ""
    hyper_parameters: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    held_out_rows: int | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    samples: tuple[Sample, ...] = ()
    image: str = ""
    made_with: str = ""


def model_card(facts: CardFacts) -> str:
    """The card as Markdown with YAML front matter, ending in a line break."""
    sections = (
        f"---\n{_yaml(_front_matter(facts))}---",
        f"# {_text(facts.name)}",
        _what(facts),
        _data(facts),
        _method(facts),
        _metrics(facts),
        _samples(facts),
        _use(facts),
    )
    return "\n\n".join(s.strip("\n") for s in sections if s) + "\n"


def _front_matter(facts: CardFacts) -> dict[str, Any]:
    known = {
        "base_model": facts.base_model,
        "base_model_relation": "adapter" if facts.base_model else "",
        "library_name": "peft",
        "license": facts.license,
        "datasets": list(facts.datasets),
        "tags": list(dict.fromkeys(("kaito", *([facts.method] if facts.method else ()), *facts.tags))),
    }
    return {k: v for k, v in known.items() if v}


def _what(facts: CardFacts) -> str:
    base = f" for {_code(facts.base_model)}" if facts.base_model else ""
    base += f" at revision {_code(facts.base_revision)}" if facts.base_model and facts.base_revision else ""
    if facts.base_folder:
        digest = f", with the digest {_code(facts.base_revision)}" if facts.base_revision else ""
        base = f" for the model in a folder {_code(facts.base_folder)}{digest}"
    made = f", made with {_text(facts.made_with)}" if facts.made_with else ""
    lines = [f"A LoRA adapter{base}{made}. It holds the difference to the base model, not the model itself."]
    if facts.preset:
        lines.append(f"\nkaito preset: {_code(facts.preset)}.")
    if facts.license:
        lines.append(f"\nThe base model's licence, {_text(facts.license)}, applies to what is made with it.")
    return "\n".join(lines)


def _data(facts: CardFacts) -> str:
    return _table(
        "Training data",
        {
            "data sets": ", ".join(map(_code, facts.datasets)),
            "rows": "" if facts.data_rows is None else f"{facts.data_rows:,}",
            "digest": _code(facts.data_digest),
        },
    )


def _method(facts: CardFacts) -> str:
    shown = {
        _code(k): _code(json.dumps(v) if isinstance(v, bool) else str(v)) for k, v in facts.hyper_parameters.items()
    }
    return _table("Method", {"method": _code(facts.method), **shown})


def _metrics(facts: CardFacts) -> str:
    return _table(
        "Evaluation",
        {
            "held-out rows": "" if facts.held_out_rows is None else f"{facts.held_out_rows:,}",
            "held-out loss before": "" if facts.loss_before is None else f"{facts.loss_before:.4f}",
            "held-out loss after": "" if facts.loss_after is None else f"{facts.loss_after:.4f}",
        },
    )


def _samples(facts: CardFacts) -> str:
    if not facts.samples:
        return ""
    parts = ["## Samples"]
    for number, sample in enumerate(facts.samples, 1):
        parts.append(f"### Sample {number}")
        for title, text in (("Prompt", sample.prompt), ("Before", sample.before), ("After", sample.after)):
            if text:
                parts.append(f"{title}:\n\n{_fenced('text', text)}")
    return "\n\n".join(parts)


def _use(facts: CardFacts) -> str:
    parts = ["## How to use it"]
    if facts.base_model:
        revision = f", revision={json.dumps(facts.base_revision)}" if facts.base_revision else ""
        parts.append(
            "With peft, from the folder that holds this file:\n\n"
            + _fenced(
                "python",
                "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
                f"base = AutoModelForCausalLM.from_pretrained({json.dumps(facts.base_model)}{revision})\n"
                'model = PeftModel.from_pretrained(base, ".")',
            )
        )
        served = f"vllm serve {_shell(facts.base_model)}"
        served += f" --revision {_shell(facts.base_revision)}" if facts.base_revision else ""
        served += f" --enable-lora --lora-modules {_shell(facts.name + '=.')}"
        parts.append("With vLLM:\n\n" + _fenced("sh", served))
    if facts.image and (served := _named(facts)):
        inference = {
            "preset": {"name": served},
            "adapters": [{"source": {"name": facts.name, "image": facts.image}}],
        }
        parts.append("With kaito, in a workspace:\n\n" + _fenced("yaml", _yaml({"inference": inference})))
    return "\n\n".join(parts) if len(parts) > 1 else ""


def _named(facts: CardFacts) -> str:
    """The base model as a workspace names it: the preset, ``org/name@revision`` of the hub, or a folder beside the workspace's file."""
    if facts.preset:
        return facts.preset
    if facts.base_model:
        return f"{facts.base_model}@{facts.base_revision}" if facts.base_revision else facts.base_model
    return f"./{facts.base_folder}" if facts.base_folder else ""


def _table(title: str, rows: Mapping[str, str]) -> str:
    known = [f"| {name} | {value} |" for name, value in rows.items() if value]
    return "\n".join((f"## {title}\n", "| | |", "|---|---|", *known)) if known else ""


def _text(text: str) -> str:
    """Text on one line that Markdown and HTML leave as it is."""
    line = _line(text)
    return re.sub(
        r"([\\`*_{}\[\]()#+!|~])", r"\\\1", line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    )


def _code(text: str) -> str:
    """A code span; also safe in a cell of a table, where a bar ends the cell even within a span."""
    line = _line(text).replace("|", "\\|")
    if not line:
        return ""
    ticks = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{ticks}{line}{ticks}" if ticks == "`" else f"{ticks} {line} {ticks}"


def _fenced(language: str, text: str) -> str:
    """A code block whose fence is longer than any run of backticks within."""
    text = "".join(c for c in text.replace("\r\n", "\n").replace("\r", "\n") if c in "\n\t" or c.isprintable()).strip(
        "\n"
    )
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _shell(text: str) -> str:
    return shlex.quote(_line(text))


def _line(text: str) -> str:
    return "".join(c for c in " ".join(text.split()) if c.isprintable())


def _yaml(value: Any) -> str:
    import yaml

    result: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
    return result
