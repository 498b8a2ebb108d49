"""Whether a record is what its fields say, and copies of what is handed to plugins.

Python checks no annotation: a preset without an architecture would break the planner, far from whom it came from. So what a
plugin hands over is held against the annotations of `kaito_core.plugins.types` where it comes in."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, TypeVar, Union

T = TypeVar("T")

Check = Callable[[Any, str], str]
"""What is wrong with a value, in words that begin with its name (the second argument); empty when nothing."""


def flaw(record: Any, cls: type) -> str:
    """The first field of a ``cls``, or of a record in it, that has another type than it says: ``licence is None (NoneType), not a
    str``. Empty when there is none. Of a behaviour its class attributes are looked at."""
    return _flaw(record, "", cls)


def shown(value: object) -> str:
    """A value that is not what it should be, as an error shows it."""
    try:
        text = f"{value!r:.60}"
    except BaseException:
        text = "something that cannot be shown"
    return f"{text} ({type(value).__name__})"


def own_copy(value: T) -> T:
    """A copy that shares nothing that can be changed: dicts, lists and sets, in records too. Behaviours stay themselves."""
    return typing.cast(T, _copied(value, {}))


def _flaw(record: Any, path: str, cls: type) -> str:
    for name, check in _checks(cls):
        place = f"{path}.{name}" if path else name
        try:
            value = getattr(record, name)
        except AttributeError:
            return f"{place} is missing"
        if wrong := check(value, place):
            return wrong
    return ""


@functools.cache
def _checks(cls: type) -> tuple[tuple[str, Check], ...]:
    hints = _hints(cls)
    if dataclasses.is_dataclass(cls):
        names = [f.name for f in dataclasses.fields(cls)]
    else:
        names = [n for n, h in hints.items() if typing.get_origin(h) is ClassVar]
    return tuple((n, _check(hints[n])) for n in names)


def _hints(cls: type) -> dict[str, Any]:
    """The annotations. What is only there for type checkers (`typing.TYPE_CHECKING`) counts as anything."""
    unknown: dict[str, Any] = {}
    while True:
        try:
            return typing.get_type_hints(cls, localns=unknown)
        except NameError as e:
            name = str(e.name)
            unknown[name] = _late(name)


def _late(name: str) -> Any:
    if name != "Kind":
        return Any
    from kaito_core.kube.kinds import Kind

    return Kind


def _check(hint: Any) -> Check:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is ClassVar:
        return _check(arguments[0])
    if origin in (Union, types.UnionType):
        return _one_of(hint, tuple(map(_check, arguments)))
    if origin is Literal:
        said = " or ".join(repr(a) for a in arguments)
        return _is(lambda v: any(type(v) is type(a) and v == a for a in arguments), said)
    if origin is tuple:
        return _tuple(arguments)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _mapping(_check(arguments[0]), _check(arguments[1]))
    if hint is float:
        return _is(lambda v: isinstance(v, int | float) and not isinstance(v, bool) and v == v, "a number")
    if hint is int:
        return _is(lambda v: isinstance(v, int) and not isinstance(v, bool), "a whole number")
    if origin is not None and isinstance(origin, type):
        return _is(lambda v: isinstance(v, origin), f"a {origin.__name__}")
    if hint is Any or not isinstance(hint, type):
        return lambda value, path: ""
    if dataclasses.is_dataclass(hint):
        return _record(hint)
    return _is(lambda v: isinstance(v, hint), "None" if hint is type(None) else f"a {hint.__name__}")


def _is(right: Callable[[Any], bool], said: str) -> Check:
    return lambda value, path: "" if right(value) else f"{path} is {shown(value)}, not {said}"


def _one_of(hint: Any, checks: tuple[Check, ...]) -> Check:
    def check(value: Any, path: str) -> str:
        wrong = [c(value, path) for c in checks]
        return "" if "" in wrong else wrong[0]

    return check


def _tuple(arguments: tuple[Any, ...]) -> Check:
    if arguments[-1] is ...:
        each = _check(arguments[0])

        def check(value: Any, path: str) -> str:
            if not isinstance(value, tuple):
                return f"{path} is {shown(value)}, not a tuple"
            return next(filter(None, (each(v, f"{path}[{i}]") for i, v in enumerate(value))), "")

        return check
    parts = tuple(map(_check, arguments))

    def check_parts(value: Any, path: str) -> str:
        if not isinstance(value, tuple) or len(value) != len(parts):
            return f"{path} is {shown(value)}, not a tuple of {len(parts)}"
        return next(filter(None, (c(v, f"{path}[{i}]") for i, (c, v) in enumerate(zip(parts, value, strict=True)))), "")

    return check_parts


def _mapping(key: Check, each: Check) -> Check:
    def check(value: Any, path: str) -> str:
        if not isinstance(value, Mapping):
            return f"{path} is {shown(value)}, not a mapping"
        for k, v in value.items():
            if wrong := key(k, f"a key of {path}") or each(v, f"{path}[{k!r:.40}]"):
                return wrong
        return ""

    return check


def _record(cls: type) -> Check:
    def check(value: Any, path: str) -> str:
        return _flaw(value, path, cls) if isinstance(value, cls) else f"{path} is {shown(value)}, not a {cls.__name__}"

    return check


def _copied(value: Any, known: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in (str, int, float, bool, type(None)):
        return value
    if id(value) in known:
        return known[id(value)]
    made: Any = value
    if isinstance(value, Mapping):
        made = {k: _copied(v, known) for k, v in value.items()}
    elif kind is list:
        made = [_copied(v, known) for v in value]
    elif kind is tuple:
        parts = [_copied(v, known) for v in value]
        made = tuple(parts) if any(p is not v for p, v in zip(parts, value, strict=True)) else value
    elif kind is set:
        made = set(value)
    elif hasattr(kind, "model_copy"):  # pydantic, which need not be imported for this
        made = value.model_copy(deep=True)
    elif dataclasses.is_dataclass(kind):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(kind)}
        copies = {n: _copied(v, known) for n, v in fields.items()}
        if any(copies[n] is not v for n, v in fields.items()):
            made = object.__new__(kind)
            for name, each in copies.items():
                object.__setattr__(made, name, each)
    known[id(value)] = made
    return made
