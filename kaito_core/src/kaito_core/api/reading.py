"""From a mapping to a Workspace or an InferenceSet, with everything that is wrong with it as problems in plain words.

Pydantic stops at the structure: with one unknown field there is no model, and no rule could look at the rest. So what
does not fit is cut out (or, where it is required, replaced by a stand-in), the rules see what is left, and what they
say about the cut places is dropped. A person sees all mistakes at once; a model comes out only without any cut.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from kaito_core.api.inference_set import InferenceSet, validate_inference_set
from kaito_core.api.suggest import closest
from kaito_core.api.validation import validate_workspace
from kaito_core.api.workspace import Workspace
from kaito_core.api.yaml_source import join
from kaito_core.foreign_json import MAX_DEPTH, deeper
from kaito_core.problems import Problem

_Path = tuple[str | int, ...]
_Read = TypeVar("_Read", bound=BaseModel)
_STAND_IN = "stand-in"


def read_workspace(data: Mapping[str, Any], *, allow_private: bool = False) -> tuple[Workspace | None, list[Problem]]:
    """The Workspace, unless its structure is broken, and all problems. ``status`` is accepted and passed over."""
    return _read(Workspace, data, lambda w: validate_workspace(w, allow_private=allow_private))


def read_inference_set(
    data: Mapping[str, Any], *, allow_private: bool = False
) -> tuple[InferenceSet | None, list[Problem]]:
    """The InferenceSet, as `read_workspace` reads a Workspace."""
    return _read(InferenceSet, data, lambda s: validate_inference_set(s, allow_private=allow_private))


def _read(
    model: type[_Read], data: Mapping[str, Any], validate: Callable[[_Read], list[Problem]]
) -> tuple[_Read | None, list[Problem]]:
    data = {k: v for k, v in data.items() if k != "status"}
    # Before recursive code sees it: what is below a pod's template is anything at all.
    deep = [k for k, v in data.items() if k != "metadata" and deeper(v, MAX_DEPTH)]  # its managedFields mirror the rest
    if deep:
        return None, [
            Problem(f"is nested more than {MAX_DEPTH} deep", "no resource is; check the brackets", k) for k in deep
        ]
    try:
        found = model.model_validate(data)
    except ValidationError as e:
        problems = _problems(model, e)
        rest, cut = _without_faults(model, data, e)
        if rest is not None:
            problems += [p for p in validate(rest) if not any(_touches(p.field, path) for path in cut)]
        return None, problems
    return found, validate(found)


def path_of(steps: _Path) -> str:
    """``("tuning", "input", "urls", 0)`` → ``tuning.input.urls[0]``."""
    path = ""
    for step in steps:
        path = join(path, step)
    return path


def _touches(field: str, cut: str) -> bool:
    return field == cut or cut.startswith((f"{field}.", f"{field}[")) or field.startswith((f"{cut}.", f"{cut}["))


# --- cutting faults out


def _without_faults(
    model: type[_Read], data: Mapping[str, Any], error: ValidationError
) -> tuple[_Read | None, set[str]]:
    rest: Any = copy.deepcopy(dict(data))
    cut: set[str] = set()
    for _ in range(8):  # each round cuts at least one level higher than the round before
        # The last item first, so that the numbers of the others stay right.
        for detail in sorted(error.errors(), key=lambda d: path_of(d["loc"]), reverse=True):
            steps = detail["loc"]
            while path_of(steps) in cut and steps:
                steps = steps[:-1]
            cut.add(path_of(steps))
            _cut(model, rest, steps, stand_in=detail["type"] == "missing")
        try:
            return model.model_validate(rest), cut
        except ValidationError as e:
            error = e
    return None, cut


def _cut(of: type[BaseModel], data: Any, steps: _Path, *, stand_in: bool) -> None:
    for step in steps[:-1]:
        try:
            data = data[step]
        except (KeyError, IndexError, TypeError):
            return
    if not steps:
        return
    last = steps[-1]
    if stand_in and isinstance(data, dict):
        data[last] = {} if _model(_field_type(of, steps)) else _STAND_IN
    elif isinstance(data, dict):
        data.pop(last, None)
    elif isinstance(data, list) and isinstance(last, int) and last < len(data):
        del data[last]


# --- what pydantic says, in plain words


def _problems(of: type[BaseModel], error: ValidationError) -> list[Problem]:
    details = error.errors()
    # A required field under a wrong name is one mistake, not two.
    misspelt = {(*d["loc"][:-1], _meant(of, d["loc"])) for d in details if d["type"] == "extra_forbidden"}
    return [_problem(of, d) for d in details if d["type"] != "missing" or d["loc"] not in misspelt]


def _problem(of: type[BaseModel], error: ErrorDetails) -> Problem:
    steps, kind, value = error["loc"], error["type"], error["input"]
    field, context = path_of(steps), error.get("ctx", {})
    name = str(steps[-1]) if steps else ""
    if kind == "missing":
        about = _description(of, steps)
        return Problem(f"{name} is required", f"add '{name}:'" + (f" – {about}" if about else ""), field)
    if kind == "extra_forbidden":
        return _unknown(of, steps, name, field)
    if kind == "literal_error":
        allowed = context.get("expected", "").replace("'", "")
        close = closest(str(value), allowed.replace(" or ", ", ").split(", "))
        meant = f"; did you mean '{close}'?" if close else ""
        return Problem(f"{_shown(value)} is not possible here{meant}", f"write {allowed}", field)
    if kind == "string_type" and isinstance(value, bool | int | float):
        return Problem(f"must be text, and is {_shown(value)}", "put the value in quotes", field)
    if kind in ("int_type", "int_parsing", "int_from_float"):
        remedy = "remove the quotes" if isinstance(value, str) and value.isdecimal() else "write a number like 1"
        return Problem(f"must be a whole number, and is {_shown(value)}", remedy, field)
    if kind in ("model_type", "model_attributes_type", "dict_type", "mapping_type"):
        return Problem(
            f"must hold fields, and is {_shown(value)}", f"write the fields of '{name}' below it, indented", field
        )
    if kind in ("tuple_type", "list_type"):
        return Problem(f"must be a list, and is {_shown(value)}", "begin each item with '- '", field)
    if kind in ("too_long", "string_too_long"):
        unit = "characters" if kind == "string_too_long" else "items"
        return Problem(f"has more than {context.get('max_length')} {unit}", "shorten it", field)
    if kind == "greater_than_equal":
        return Problem(f"must be {context.get('ge')} or more, and is {_shown(value)}", "write a larger number", field)
    if kind == "less_than_equal":
        return Problem(f"must be {context.get('le')} or less, and is {_shown(value)}", "write a smaller number", field)
    what = {"string_type": "must be text"}.get(kind, error["msg"][:1].lower() + error["msg"][1:])
    return Problem(f"{what}, and is {_shown(value)}", "write one value on the same line as its name", field)


def _unknown(of: type[BaseModel], steps: _Path, name: str, field: str) -> Problem:
    if steps == ("spec",) and of is Workspace:
        remedy = "write resource, inference and tuning at the top level"
        return Problem("a Workspace has no 'spec'", remedy, field)
    if close := _meant(of, steps):
        return Problem(f"unknown field '{name}'; did you mean '{close}'?", f"write '{close}'", field)
    elsewhere = [path for path in _all_fields(of) if path.rpartition(".")[2] == name]
    if elsewhere:
        return Problem(f"unknown field '{name}' here; there is {' and '.join(elsewhere)}",
                       "check the indentation", field)  # fmt: skip
    return Problem(f"unknown field '{name}'", f"remove it; known here are {', '.join(_known(of, steps))}", field)


def _known(of: type[BaseModel], steps: _Path) -> list[str]:
    model = _model(_field_type(of, steps[:-1]))
    return [f.alias or n for n, f in model.model_fields.items()] if model else []


def _meant(of: type[BaseModel], steps: _Path) -> str:
    return closest(str(steps[-1]), _known(of, steps))


def _shown(value: Any) -> str:
    """A value in a few words; long texts and whole objects are not repeated."""
    match value:
        case bool():
            return str(value).lower()
        case int() | float():
            return f"the number {value}"
        case None:
            return "empty"
        case str():
            return f"the text '{value}'" if len(value) <= 60 else "a long text"
        case list() | tuple():
            return "a list"
        case dict():
            return "a group of fields"
    return f"a {type(value).__name__}"


def _model(annotation: Any) -> type[BaseModel] | None:
    """The model inside ``Model``, ``Model | None``, ``tuple[Model, ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for m in map(_model, get_args(annotation)) if m), None)


def _field_type(model: type[BaseModel], steps: _Path) -> Any:
    """The type at a path of aliases and indexes; None where there is none."""
    here: Any = model
    for step in steps:
        if isinstance(step, int):
            continue
        inside = _model(here)
        field = next((f for n, f in inside.model_fields.items() if (f.alias or n) == step), None) if inside else None
        if field is None:
            return None
        here = field.annotation
    return here


def _description(of: type[BaseModel], steps: _Path) -> str:
    inside = _model(_field_type(of, steps[:-1]))
    fields = inside.model_fields.items() if inside else ()
    text = next((f.description for n, f in fields if (f.alias or n) == steps[-1]), None) or ""
    return text.split(". ")[0].rstrip(".")


def _all_fields(model: type[BaseModel], path: str = "") -> list[str]:
    found = []
    for name, field in model.model_fields.items():
        if path == "" and name in ("metadata", "status"):
            continue
        here = join(path, field.alias or name)
        found.append(here)
        inside = _model(field.annotation)
        found += _all_fields(inside, here) if inside else []
    return found
