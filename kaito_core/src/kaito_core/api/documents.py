"""From files to resources: Workspaces, InferenceSets, and the ConfigMaps and Secrets that they refer to.

A mistake in one document hides no other document, and every problem names its file, line and column. What is wrong with
a file as such (missing, binary, empty) is a problem too, so that the other files are still read.
"""

from __future__ import annotations

import base64
import binascii
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Final

from kaito_core.api import names
from kaito_core.api.inference_set import InferenceSet
from kaito_core.api.reading import read_inference_set, read_workspace
from kaito_core.api.suggest import closest
from kaito_core.api.workspace import VERSIONS, Workspace
from kaito_core.api.yaml_source import MAX_BYTES, Mark, YamlDocument, join, parse
from kaito_core.problems import Problem, errors

STDIN: Final = "-"
KINDS: Final = ("Workspace", "InferenceSet")
"""The kinds of kaito.sh that files may hold."""


@dataclass(frozen=True)
class ConfigMap:
    """A ConfigMap of the files: settings that a Workspace refers to by name."""

    name: str
    namespace: str
    data: Mapping[str, str]


@dataclass(frozen=True)
class Secret:
    """A Secret of the files, decoded. What it holds is never shown."""

    name: str
    namespace: str
    type: str
    data: Mapping[str, bytes] = field(repr=False)


@dataclass(frozen=True)
class Document:
    """One document of a file, and what it turned out to be."""

    source: YamlDocument = field(repr=False)
    resource: Workspace | InferenceSet | ConfigMap | Secret | None
    """None when it is something else, or its structure is broken."""
    problems: tuple[Problem, ...] = ()

    @property
    def file(self) -> str:
        return self.source.file

    @property
    def line(self) -> int:
        """The line in which it begins."""
        return self.source.place("")[0]

    def locate(self, problem: Problem) -> Problem:
        """A later problem (of the planner, say) with the place of its field in this document."""
        return problem if problem.file else self.source.locate(problem)

    def within(self, key: str, problem: Problem) -> Problem:
        """A problem whose line and column count from the beginning of the text ``data[key]`` of a ConfigMap, with its place in the
        file; text that is no ``|`` block has other line breaks than the file, and all of it is where its key is."""
        path = join("data", key)
        literal = self.source.literals.get(join(self.source.prefix, path))
        if literal is None or problem.line is None or problem.column is None:
            return problem.at(self.file, *self.source.place(path, key=True))
        return problem.at(self.file, literal[0] + problem.line - 1, literal[1] + problem.column - 1)

    def embedded(self, key: str) -> tuple[list[YamlDocument], list[Problem]]:
        """The YAML inside ``data[key]`` of a ConfigMap; inside a ``|`` block with its places in the file."""
        path = join("data", key)
        text = self.resource.data.get(key, "") if isinstance(self.resource, ConfigMap) else ""
        literal: Mark | None = self.source.literals.get(join(self.source.prefix, path))
        if literal:
            return _parsed(text, self.file, *literal)
        inner, problems = _parsed(text, self.file)
        # Folded or quoted text has other line breaks than the file: all of it is where its key is.
        at = self.source.place(path, key=True)
        here = [YamlDocument(d.value, d.file, {"": at}, {}) for d in inner]
        return here, [p.at(self.file, *at) for p in problems]


@lru_cache(maxsize=4)
def _parsed(text: str, file: str, line: int = 1, column: int = 1) -> tuple[list[YamlDocument], list[Problem]]:
    """Remembered, since each of thousands of problems in a ConfigMap asks for its place."""
    return parse(text, file, first_line=line, first_column=column)


@dataclass(frozen=True)
class Documents:
    """All that was read, in the order of the files, and all that is wrong with it, sorted by place."""

    documents: tuple[Document, ...]
    problems: tuple[Problem, ...]

    @property
    def workspaces(self) -> tuple[Workspace, ...]:
        """Those whose structure is right; their values may still have problems."""
        return tuple(d.resource for d in self.documents if isinstance(d.resource, Workspace))

    @property
    def inference_sets(self) -> tuple[InferenceSet, ...]:
        """As ``workspaces``."""
        return tuple(d.resource for d in self.documents if isinstance(d.resource, InferenceSet))

    @property
    def config_maps(self) -> tuple[ConfigMap, ...]:
        return tuple(d.resource for d in self.documents if isinstance(d.resource, ConfigMap))

    @property
    def secrets(self) -> tuple[Secret, ...]:
        return tuple(d.resource for d in self.documents if isinstance(d.resource, Secret))

    @property
    def valid(self) -> bool:
        return not errors(self.problems)

    def document(self, resource: Workspace | InferenceSet | ConfigMap | Secret) -> Document:
        """The document that one of these resources was read from."""
        return next(d for d in self.documents if d.resource is resource)

    def config_map(self, name: str, namespace: str) -> ConfigMap | None:
        """The ConfigMap of this name, if the files have one."""
        return next((c for c in self.config_maps if (c.name, c.namespace) == (name, namespace)), None)

    def secret(self, name: str, namespace: str) -> Secret | None:
        """The Secret of this name, if the files have one."""
        return next((s for s in self.secrets if (s.name, s.namespace) == (name, namespace)), None)


def load_documents(
    sources: Sequence[str | Path], stdin: BinaryIO | None = None, *, allow_private: bool = False
) -> Documents:
    """Read files; ``-`` is standard input. Raises nothing for what they hold: see ``Documents.problems``.

    ``allow_private``: URLs of a v1beta1 Workspace may name hosts inside a network."""
    documents: list[Document] = []
    problems: list[Problem] = []
    for source in sources:
        name = "<stdin>" if str(source) == STDIN else str(source)
        text, problem = _read(source, name, stdin)
        if problem:
            problems.append(problem)
        else:
            more = load_text(text, name, allow_private=allow_private)
            documents += more.documents
            problems += more.problems
    order = {("<stdin>" if str(s) == STDIN else str(s)): i for i, s in reversed(list(enumerate(sources)))}
    problems += _named_twice(documents)
    problems.sort(key=lambda p: (order.get(p.file, 0), p.line or 0, p.column or 0))
    return Documents(tuple(documents), tuple(problems))


def load_text(text: str, file: str = "", *, allow_private: bool = False) -> Documents:
    """What a text holds, as if it were the file ``file``."""
    sources, problems = parse(text, file)
    documents = [_document(item, allow_private) for source in sources for item in _items(source)]
    problems += [p for d in documents for p in d.problems]
    if not sources and not problems:
        problems.append(Problem("is empty", "write a Workspace into it", file=file))
    problems.sort(key=lambda p: (p.line or 0, p.column or 0))
    return Documents(tuple(documents), tuple(problems))


def _read(source: str | Path, name: str, stdin: BinaryIO | None) -> tuple[str, Problem | None]:
    try:
        if str(source) == STDIN:
            data = (stdin or sys.stdin.buffer).read(MAX_BYTES + 1)
        else:
            with Path(source).open("rb") as f:
                data = f.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return "", Problem("there is no such file", "check the path", file=name)
    except IsADirectoryError:
        return "", Problem("is a folder", f"name a file in it, for example {Path(name) / 'workspace.yaml'}", file=name)
    except (OSError, ValueError) as e:
        words = (e.strerror if isinstance(e, OSError) else None) or str(e)
        return "", Problem(f"cannot be read: {words}", "check the path and its permissions", file=name)
    if len(data) > MAX_BYTES:
        return "", Problem(f"is larger than {MAX_BYTES >> 20} MiB", "put fewer resources into one file", file=name)
    try:
        return data.decode("utf-8-sig"), None
    except UnicodeDecodeError as e:
        return "", Problem(f"is not UTF-8 text (byte {e.start})", "name a YAML file, saved as UTF-8", file=name)


def _items(source: YamlDocument) -> Iterator[YamlDocument]:
    """The document, or what a List (``kubectl get … -o yaml``) holds."""
    value = source.value
    if isinstance(value, dict) and str(value.get("kind", "")).endswith("List") and isinstance(value.get("items"), list):
        for i, item in enumerate(value["items"]):
            yield from _items(source.item(f"items[{i}]", item))
    else:
        yield source


def _document(source: YamlDocument, allow_private: bool) -> Document:
    value = source.value
    if not isinstance(value, dict):
        return _broken(source, Problem("is not a resource: it has no fields", "begin with 'apiVersion:' and 'kind:'"))
    version, kind = value.get("apiVersion"), value.get("kind")
    for name, given in (("apiVersion", version), ("kind", kind)):
        if not isinstance(given, str) or not given:
            example = VERSIONS[-1] if name == "apiVersion" else "Workspace"
            return _broken(source, Problem(f"{name} is required", f"add '{name}: {example}'", name))
    if version == "v1" and kind in ("ConfigMap", "Secret"):
        return _core(source, value, _config_map if kind == "ConfigMap" else _secret)
    if str(version).lower().startswith("kaito.sh/") or kind == "Workspace":
        return _of_kaito(source, value, str(version), str(kind), allow_private)
    return _broken(source, Problem(f"{kind} ({version}) is ignored", "kaito reads Workspaces, InferenceSets, and the "
                                   "ConfigMaps and Secrets they refer to", "kind", severity="warning"))  # fmt: skip


def _broken(source: YamlDocument, *problems: Problem) -> Document:
    return Document(source, None, tuple(source.locate(p) for p in problems))


def _of_kaito(source: YamlDocument, value: Any, version: str, kind: str, allow_private: bool) -> Document:
    if kind not in KINDS:
        if close := closest(kind, KINDS):
            return _broken(
                source, Problem(f"unknown kind '{kind}'; did you mean '{close}'?", f"write '{close}'", "kind")
            )
        return _broken(source, Problem(f"{kind} ({version}) is ignored", f"of kaito.sh kaito reads {names.listed(KINDS)}",
                                       "kind", severity="warning"))  # fmt: skip
    read: Callable[..., tuple[Workspace | InferenceSet | None, list[Problem]]] = (
        read_workspace if kind == "Workspace" else read_inference_set
    )
    if version not in VERSIONS:
        close = closest(version, VERSIONS)
        meant = f"; did you mean '{close}'?" if close else ""
        problem = Problem(f"unknown version '{version}'{meant}", f"write {' or '.join(VERSIONS)}", "apiVersion")
        # The rest is the same in all versions, so its mistakes can be told already.
        _, more = read({**value, "apiVersion": VERSIONS[-1]}, allow_private=allow_private)
        return Document(source, None, tuple(_located(source, [problem, *more])))
    resource, problems = read(value, allow_private=allow_private)
    return Document(source, resource, tuple(_located(source, problems)))


def _located(source: YamlDocument, problems: Iterable[Problem]) -> Iterator[Problem]:
    for problem in problems:
        yield source.locate(problem, key=problem.message.startswith(("unknown field", "a Workspace has no")))


# --- ConfigMaps and Secrets


def _core(
    source: YamlDocument,
    value: Mapping[str, Any],
    make: Callable[[str, str, Mapping[str, Any], list[Problem]], ConfigMap | Secret],
) -> Document:
    found: list[Problem] = []
    metadata = value.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    name, namespace = metadata.get("name"), metadata.get("namespace") or "default"
    if not isinstance(name, str) or not name:
        found.append(Problem("name is required", "add 'name:', by which the Workspace refers to it", "metadata.name"))
    resource = make(str(name), str(namespace), value, found)
    return Document(source, None if errors(found) else resource, tuple(source.locate(p) for p in found))


def _config_map(name: str, namespace: str, value: Mapping[str, Any], found: list[Problem]) -> ConfigMap:
    return ConfigMap(name, namespace, dict(_strings(value, "data", found)))


def _secret(name: str, namespace: str, value: Mapping[str, Any], found: list[Problem]) -> Secret:
    data: dict[str, bytes] = {}
    for key, text in _strings(value, "data", found):
        try:
            data[key] = base64.b64decode("".join(text.split()), validate=True)
        except (binascii.Error, ValueError):
            found.append(Problem("is not base64", "encode it (base64 -w0), or write it under stringData as it is",
                                 join("data", key)))  # fmt: skip
    # Kubernetes lets stringData win.
    data |= {key: text.encode("utf-8", "replace") for key, text in _strings(value, "stringData", found)}
    return Secret(name, namespace, str(value.get("type") or "Opaque"), data)


def _strings(value: Mapping[str, Any], part: str, found: list[Problem]) -> Iterator[tuple[str, str]]:
    data = value.get(part)
    if data is None:
        return
    if not isinstance(data, dict):
        found.append(Problem("must hold fields", f"write the fields of '{part}' below it, indented", part))
        return
    for key, text in data.items():
        if isinstance(text, str):
            yield key, text
        else:
            remedy = (
                "write a '|' behind the name, so that what follows is one text" if isinstance(text, dict | list) else ""
            )
            found.append(Problem("must be text", remedy or "put the value in quotes", join(part, key)))


def _named_twice(documents: Iterable[Document]) -> Iterator[Problem]:
    first: dict[tuple[str, str, str], Document] = {}
    for document in documents:
        resource = document.resource
        if resource is not None:
            key = type(resource).__name__, resource.namespace, resource.name
            other = first.setdefault(key, document)
            if other is not document:
                yield document.locate(Problem(f"the {key[0]} {key[2]} is there already, at {other.file}:{other.line}",
                                              "give one of them another name", "metadata.name"))  # fmt: skip
