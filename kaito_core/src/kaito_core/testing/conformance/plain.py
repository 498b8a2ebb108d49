"""Laws of configurations and workloads that tuners and runtimes share."""

from __future__ import annotations

import copy as copying
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pytest

from kaito_core.problems import Problem, UserError
from kaito_core.workloads.workload import Workload


def copy(value: Any) -> Any:
    """A deep copy: what is done to it is seen by nobody."""
    return copying.deepcopy(value)


def same_after_json(value: Any) -> None:
    """Fails when it is not what JSON makes of it."""
    try:
        again = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as e:
        pytest.fail(f"it is not plain data: {e}", pytrace=False)
    assert again == value, f"JSON changes it: {difference(value, again)}"


def difference(one: Any, other: Any, place: str = "") -> str:
    """Where two values differ first, in words."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in [*one, *(k for k in other if k not in one)]:
            at = f"{place}.{key}" if place else str(key)
            if key not in one or key not in other:
                return f"{at} is there only once"
            if one[key] != other[key]:
                return difference(one[key], other[key], at)
    return f"{place or 'it'} is {one!r} and {other!r}"


def refused(resolve: Callable[[], Any]) -> tuple[Problem, ...]:
    """The problems with which it is refused. Fails when it is not."""
    try:
        found = resolve()
    except UserError as e:
        return e.problems
    pytest.fail(f"what nobody knows is taken without a word: {found!r:.300}", pytrace=False)


def worded(error: UserError, given: Any) -> None:
    """Fails when a problem has no words."""
    assert error.problems, f"{given!r:.200} is refused without a problem"
    assert all(p.message.strip() for p in error.problems), f"{given!r:.200} is refused without a word"


def all_named(problems: Iterable[Problem], *names: str) -> None:
    """Fails when one of the names is in no problem's words or field."""
    said = [f"{p.field}: {p.message}" for p in problems]
    for name in names:
        assert any(name in s for s in said), f"{name} is wrong, and is not named: {said}"


def a_number(config: Mapping[str, Any]) -> tuple[str, str, int] | None:
    """A whole number in a section that can be made larger by a little: a seed where there is one, else a rank."""
    found = [
        (section, name, value)
        for section, fields in config.items()
        if isinstance(fields, Mapping)
        for name, value in fields.items()
        if type(value) is int and value > 0
    ]
    for wanted in ("seed", "rank", "lora_r", "r", "max_seq", "max-num-seqs"):
        for place in found:
            if place[1] == wanted or (wanted == "seed" and "seed" in place[1]):
                return place
    return None


def nonsense(config: Mapping[str, Any]) -> Iterator[Any]:
    """Files that a person may write by mistake."""
    values: tuple[Any, ...] = (None, 1, "text", [], True, {"deep": {"er": []}})
    for value in values:
        yield {"": value}
        for section in config:
            yield {section: value}
            fields = config[section]
            if isinstance(fields, Mapping):
                for name in list(fields)[:12]:
                    yield {section: {name: value}}
    yield {section: {"x" * 300: float("nan")} for section in config}
    yield {"\x00": {"\ud800": 1 << 200}}


def closed_sections(schema: Mapping[str, Any]) -> list[str]:
    """Sections whose schema lists all of their fields."""
    sections = {n: _meant(s, schema) for n, s in (schema.get("properties") or {}).items()}
    return [n for n, s in sections.items() if s.get("properties") and s.get("additionalProperties") is False]


def lacking(schema: Mapping[str, Any], within: Mapping[str, Any] | None = None, place: str = "") -> Iterator[str]:
    """The fields of a schema without a description, or without a default that it or the description says."""
    for name, said in (_meant(within or schema, schema).get("properties") or {}).items():
        at, about = f"{place}.{name}" if place else name, _meant(said, schema)
        if about.get("properties"):
            yield from lacking(schema, about, at)
        elif not about.get("description") or not ("default" in about or "default" in about["description"].lower()):
            yield at


def _meant(about: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """With what a ``$ref`` to ``$defs`` stands for."""
    name = str(about.get("$ref", "")).removeprefix("#/$defs/")
    return {**(schema.get("$defs") or {}).get(name, {}), **about} if name else about


def sound_workload(workload: Workload, *, gpus: int) -> None:
    """What holds for every workload: names, commands, mounts and files are whole, and agree with each other."""
    assert isinstance(workload, Workload)
    names = [s.name for s in workload.stages]
    assert names, "no stages"
    assert len(set(names)) == len(names), f"two stages have the same name: {names}"
    for stage in workload.stages:
        assert isinstance(stage.command, tuple), f"{stage.name}: command is not a tuple"
        assert stage.command, f"{stage.name} has no command"
        assert all(isinstance(w, str) and w for w in stage.command), f"{stage.name}: {stage.command}"
    assert all(s.key for s in workload.stages if s.name != "serve"), "a stage without a key is never done"
    for what in ("name", "env", "path"):
        values = [getattr(m, what) for m in workload.mounts]
        assert len(set(values)) == len(values), f"two mounts have the same {what}: {values}"
        assert all(values), f"a mount without {what}"
    assert all(m.path.startswith("/") for m in workload.mounts)
    assert all(p.startswith("/") for p in workload.files)
    assert all(isinstance(v, str) for v in workload.env.values()), f"the environment is text: {dict(workload.env)}"
    assert workload.env.get("KAITO_JOB") in workload.files, "KAITO_JOB names the file with the job"
    assert workload.gpus == gpus, f"{workload.gpus} GPUs, and the layout is for {gpus}"
    assert any(s.gpu for s in workload.stages) == (gpus > 0), (
        "a stage uses a GPU where the layout has one, and only there"
    )
