"""The reference of all fields of a Workspace, generated from the models so that it cannot go stale."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kaito_core.api.workspace import Workspace


def markdown() -> str:
    """A page with one table per part of the Workspace: path, type, default, meaning, and how it differs from KAITO."""
    model = Workspace.model_json_schema(mode="validation")
    parts = [
        "# Workspace",
        "Generated from the models in `kaito_core.api`; do not edit.",
        "`apiVersion: kaito.sh/v1beta1` and `kaito.sh/v1alpha1` have the same fields. There is no `spec`: `resource`, "
        "`inference`, `tuning` and `status` stand at the top level.",
    ]
    for name in ("", "metadata", "resource", "tuning", "inference", "status"):
        rows = list(_rows(model, model["$defs"], name))
        parts.append(f"## `{name}`" if name else "## Top level")
        table = ["| Field | Type | Default | Meaning | Note |", "|---|---|---|---|---|"]
        table += [f"| {' | '.join(_cell(c) for c in row)} |" for row in rows]
        parts.append("\n".join(table))
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _rows(model: Mapping[str, Any], definitions: Mapping[str, Any], part: str) -> Iterator[tuple[str, ...]]:
    if not part:
        for row in _walk(model, definitions, ""):
            if "." not in row[0]:
                yield row
    else:
        yield from _walk(_plain(model["properties"][part], definitions), definitions, part)


def _walk(node: Mapping[str, Any], definitions: Mapping[str, Any], path: str) -> Iterator[tuple[str, ...]]:
    required = node.get("required", ())
    for name, raw in node.get("properties", {}).items():
        field = _plain(raw, definitions)
        here = f"{path}.{name}" if path else name
        default = "required" if name in required else _default(raw.get("default"))
        note = str(raw.get("note") or field.get("note") or "")
        yield f"`{here}`", _type(field, definitions), default, " ".join(field.get("description", "").split()), note
        inside, suffix = field, ""
        if field.get("type") == "array":
            inside, suffix = _plain(field["items"], definitions), "[]"
        elif isinstance(field.get("additionalProperties"), Mapping):
            inside, suffix = _plain(field["additionalProperties"], definitions), ".*"
        if path:
            yield from _walk(inside, definitions, here + suffix)


def _plain(node: Mapping[str, Any], definitions: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema behind references and ``or null``; what is said where the field stands wins."""
    if "$ref" in node:
        rest = {k: v for k, v in node.items() if k != "$ref"}
        return {**_plain(definitions[node["$ref"].rpartition("/")[2]], definitions), **rest}
    if "anyOf" in node:
        only = next(option for option in node["anyOf"] if option.get("type") != "null")
        return {**_plain(only, definitions), **{k: v for k, v in node.items() if k != "anyOf"}}
    return node


def _type(field: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    if "enum" in field:
        return " or ".join(f"`{v}`" for v in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if field.get("type") == "array":
        return f"list of {_type(_plain(field['items'], definitions), definitions)}"
    if field.get("type") == "object":
        values = field.get("additionalProperties")
        if isinstance(values, Mapping) and values:
            return f"map to {_type(_plain(values, definitions), definitions)}"
        return "object" if "properties" in field else "any object"
    return {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false"}[field["type"]]


def _default(value: Any) -> str:
    return "" if value in (None, "", [], {}) else f"`{value}`"
