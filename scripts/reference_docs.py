"""Writes the generated pages of docs/reference from the models that they describe; a test checks that they are up to date."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs" / "reference"


def pages() -> dict[str, str]:
    """The generated pages by file name."""
    from kaito_core.api.crd import crd_yaml, inference_set_crd
    from kaito_core.api.reference import markdown as workspace

    return {
        "workspace.md": workspace(),
        "training-config.md": training_config(),
        "workspace-crd.yaml": crd_yaml(),
        "inference-set-crd.yaml": crd_yaml(inference_set_crd()),
    }


def training_config() -> str:
    """The sections of ``training_config`` as the qlora tuner documents them."""
    from kaito_tuner_qlora import config

    schema = config.schema()
    definitions = schema["$defs"]
    parts = [
        "# Training configuration",
        "Generated from the models in `kaito_tuner_qlora.sections`; do not edit.",
        "`tuning.config` names a ConfigMap whose key `training_config.yaml` holds these sections below `training_config`. "
        "KAITO's own files are read unchanged; what is left out keeps the default. Further fields of `peft.LoraConfig` and "
        "`transformers.TrainingArguments` are passed on to those libraries.",
    ]
    for _, raw in schema["properties"].items():
        section = definitions[(raw.get("$ref") or raw["allOf"][0]["$ref"]).rpartition("/")[2]]
        parts.append(f"## `{section['title']}`\n\n{section.get('description', '').strip()}")
        rows = ["| Field | Type | Default | Meaning |", "|---|---|---|---|"]
        rows += [f"| {' | '.join(c.replace('|', chr(92) + '|') for c in row)} |" for row in _fields(section)]
        parts.append("\n".join(rows))
    return "\n\n".join(parts) + "\n"


def _fields(section: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    for name, field in section.get("properties", {}).items():
        default = field.get("default")
        shown = "" if default in (None, []) else f"`{json.dumps(default)}`"
        yield f"`{name}`", _type(field), shown, " ".join(field.get("description", "").split())


def _type(field: Mapping[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(t for t in (_type(option) for option in field["anyOf"]) if t)
    if "enum" in field or "const" in field:
        return " or ".join(f"`{v}`" for v in field.get("enum", [field.get("const")]))
    names = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false", "null": ""}
    if field.get("type") == "array":
        return f"list of {_type(field['items'])}"
    return names.get(str(field.get("type")), "anything")


if __name__ == "__main__":
    made = pages()
    stale = [
        n for n, text in made.items() if not (DOCS / n).is_file() or (DOCS / n).read_text(encoding="utf-8") != text
    ]
    if "--check" in sys.argv:
        sys.exit(f"out of date: {', '.join(stale)}; run `make docs`" if stale else 0)
    DOCS.mkdir(parents=True, exist_ok=True)
    for name, text in made.items():
        (DOCS / name).write_text(text, encoding="utf-8")
