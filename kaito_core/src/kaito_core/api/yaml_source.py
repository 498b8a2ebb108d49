"""YAML with the place of every value in the file, and safe to use on hostile text: the one reader of all YAML that a person wrote.

Why not ``yaml.safe_load``: it forgets where a value stood, takes the last of two equal keys without a word, reads
``1:30`` as a number (in time that grows with the square of its length) and ``2024-01-01`` as a date, expands aliases without
bound, and overruns the stack on deep nesting. The parser itself is PyYAML's.

There are two readings of plain values: resources are read as kubectl reads them (`parse`), and the settings inside a ConfigMap as
KAITO reads them, in Python (`parse_settings`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final

import yaml

from kaito_core.problems import Problem

MAX_BYTES: Final = 1 << 20
"""As much as etcd takes for one object; a file of resources is far below it."""
MAX_DEPTH: Final = 64
MAX_VALUES: Final = 100_000
"""Values in one file after its aliases are expanded."""
MAX_SETTINGS: Final = 5_000
"""Values in the settings of one ConfigMap. KAITO's own have a hundred; each costs its reader and the checks behind it some time."""
MAX_DOCUMENTS: Final = 1000
"""Documents in one file."""
MAX_PATH_CHARS: Final = 16 << 20
"""Characters in the paths of all values of one file together: names of a thousand characters, each below the other, are no
resource, and their paths would take gigabytes."""
MAX_PROBLEMS: Final = 100
"""Problems that are told of one file; a person mends these first."""

Mark = tuple[int, int]
"""Line and column, from 1."""

_TAG = "tag:yaml.org,2002:"
_BOOLS = {
    **dict.fromkeys(("y", "Y", "yes", "Yes", "YES", "true", "True", "TRUE", "on", "On", "ON"), True),
    **dict.fromkeys(("n", "N", "no", "No", "NO", "false", "False", "FALSE", "off", "Off", "OFF"), False),
}
_NULLS = ("", "~", "null", "Null", "NULL")
_INT = re.compile(r"([-+]?)(?:(0[bB])([01]+)|(0[xX])([0-9a-fA-F]+)|(0[oO]?)([0-7]+)|(0|[1-9][0-9]*))\Z")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
_SPECIAL_FLOAT = re.compile(r"[-+]?\.(inf|Inf|INF)\Z|\.(nan|NaN|NAN)\Z")
_PYTHON_INT = re.compile(r"[-+]?(0b[01_]+|0[0-7_]+|(0|[1-9][0-9_]*)|0x[0-9a-fA-F_]+)\Z")
_PYTHON_FLOAT = re.compile(r"([-+]?[0-9][0-9_]*\.[0-9_]*([eE][-+][0-9]+)?|\.[0-9][0-9_]*([eE][-+][0-9]+)?)\Z")
_MARKER = re.compile(r"^---(?=[ \t\r\n]|\Z)", re.MULTILINE)


@dataclass(frozen=True)
class YamlDocument:
    """One document: plain values, and where each stands. Paths are as people write them: ``tuning.input.urls[0]``."""

    value: Any = field(repr=False)  # it may be a Secret
    file: str
    values: Mapping[str, Mark] = field(repr=False)
    keys: Mapping[str, Mark] = field(repr=False)
    literals: Mapping[str, Mark] = field(default_factory=dict, repr=False)
    """Where the text of each ``|`` block begins."""
    prefix: str = ""
    """The path of this object inside the document, when it is an item of a List."""

    def place(self, path: str, *, key: bool = False) -> Mark:
        """The place of the value at ``path`` (or of its key), or of the nearest thing above it that exists."""
        full = join(self.prefix, path)
        while full:
            for marks in (self.keys, self.values) if key else (self.values, self.keys):
                if full in marks:
                    return marks[full]
            key = True
            full = parent(full)
        return self.values.get("", (1, 1))

    def locate(self, problem: Problem, *, key: bool = False) -> Problem:
        """The problem with the place of its field."""
        return problem.at(self.file, *self.place(problem.field, key=key))

    def item(self, path: str, value: Any) -> YamlDocument:
        """An object inside this one, as a document of its own."""
        return YamlDocument(value, self.file, self.values, self.keys, self.literals, join(self.prefix, path))


def join(path: str, step: str | int) -> str:
    """``urls`` and 0 → ``urls[0]``; ``tuning`` and ``input`` → ``tuning.input``."""
    if isinstance(step, int):
        return f"{path}[{step}]"
    return f"{path}.{step}" if path and step else path or step


def parent(path: str) -> str:
    """The path without its last step."""
    return re.sub(r"(\[\d+\]|\.?[^.\[]*|\])\Z", "", path, count=1)


def parse(
    text: str, file: str = "", *, first_line: int = 1, first_column: int = 1
) -> tuple[list[YamlDocument], list[Problem]]:
    """All documents in a text, and all that is wrong with it as YAML. Empty documents are left out.

    A syntax error costs the document that it stands in and no other. ``first_line`` and ``first_column`` say where the
    text begins in its file, for text inside a ``|`` block."""
    if len(text.encode("utf-8", "replace")) > MAX_BYTES:
        return [], [Problem(f"is larger than {MAX_BYTES >> 20} MiB", "put fewer resources into one file", file=file)]
    starts = [0, *(m.start() for m in islice(_MARKER.finditer(text), MAX_DOCUMENTS + 1) if m.start())]
    if len(starts) > MAX_DOCUMENTS:
        words = f"has more than {MAX_DOCUMENTS:,} documents"
        return [], [Problem(words, "put fewer resources into one file", file=file)]
    documents: list[YamlDocument] = []
    problems: list[Problem] = []
    budget, line = _Budget(MAX_VALUES), first_line
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        reader = _Reader(text[start:end], file, line, first_column, _Loader, budget)
        documents += reader.documents()
        problems += reader.problems
        line += text.count("\n", start, end)
    return documents, problems


def parse_settings(text: str) -> tuple[Any, list[Problem]]:
    """The one document of a ConfigMap's settings as plain values, and all that is wrong with it; line and column of the problems
    count from the text's own beginning.

    KAITO reads these settings in Python (``yaml.safe_load``), where ``1e-4`` and ``y`` are text. So they are here, that what runs
    keeps its meaning; only ``1:30`` and dates are text in place of a number and an object, and infinities are refused."""
    if len(text.encode("utf-8", "replace")) > MAX_BYTES:
        return None, [Problem(f"is larger than {MAX_BYTES >> 20} MiB", "leave out what is no setting")]
    reader = _Reader(text, "", 1, 1, _SettingsLoader, _Budget(MAX_SETTINGS))
    found = list(islice(reader.documents(), 2))
    if len(found) > 1 and not reader.problems:
        reader.problems.append(
            Problem("has more than one document", "keep one, and remove the line `---`").at("", *found[1].place(""))
        )
    return found[0].value if found else None, reader.problems


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """PyYAML's parser with go-yaml's reading of plain scalars."""

    def resolve(self, kind: type[yaml.Node], value: str | None, implicit: Any) -> str:
        if kind is yaml.MappingNode:
            return _TAG + "map"
        if kind is yaml.SequenceNode:
            return _TAG + "seq"
        return _TAG + (self.scalar_type(value or "") if implicit[0] else "str")

    @staticmethod
    def scalar_type(text: str) -> str:
        if text in _NULLS:
            return "null"
        if text in _BOOLS:
            return "bool"
        if text == "<<":
            return "merge"
        plain = text.replace("_", "")
        if _INT.match(plain):
            return "int"
        return "float" if _FLOAT.match(plain) or _SPECIAL_FLOAT.match(text) else "str"


class _SettingsLoader(_Loader):
    """PyYAML's parser with its own reading of plain scalars (yaml/resolver.py), but for sexagesimals and dates."""

    @staticmethod
    def scalar_type(text: str) -> str:
        if text in _NULLS:
            return "null"
        if text in _BOOLS and len(text) > 1:
            return "bool"
        if text == "<<":
            return "merge"
        if _PYTHON_INT.match(text):
            return "int"
        return "float" if _PYTHON_FLOAT.match(text) or _SPECIAL_FLOAT.match(text) else "str"


@dataclass
class _Budget:
    """What the documents of one file may still hold."""

    values: int
    path_chars: int = MAX_PATH_CHARS


def _int(text: str) -> int:
    match = _INT.match(text.replace("_", ""))
    if not match:
        raise ValueError(f"{text!r} is not a whole number")
    sign, _, binary, _, hexadecimal, _, octal, decimal = match.groups()
    digits, base = (
        (binary, 2) if binary else (hexadecimal, 16) if hexadecimal else (octal, 8) if octal else (decimal, 10)
    )
    if len(digits) > 64:
        raise ValueError("the number has too many digits")
    return int(sign + digits, base)


class _Rejected(Exception):
    """A document that cannot be used; holds its problem."""

    def __init__(self, message: str, remedy: str, node: yaml.Node | yaml.Event, field: str = "") -> None:
        self.message, self.remedy, self.node, self.field = message, remedy, node, field


class _Reader:
    """Reads one chunk of text, between two ``---``."""

    def __init__(
        self, text: str, file: str, first_line: int, first_column: int, loader: type[_Loader], budget: _Budget
    ) -> None:
        self.text, self.file, self.loader, self.budget = text, file, loader, budget
        self.lines: list[str] = []
        self.first_line, self.first_column = first_line, first_column
        self.problems: list[Problem] = []
        self.values: dict[str, Mark] = {}
        self.keys: dict[str, Mark] = {}
        self.literals: dict[str, Mark] = {}

    def documents(self) -> Iterator[YamlDocument]:
        try:
            self._check_size()
            for node in yaml.compose_all(self.text, Loader=self.loader):
                try:
                    self.values, self.keys, self.literals = {}, {}, {}
                    value = self._value(node, "", self._mark(node.start_mark), 0)
                except _Rejected as e:
                    self._problem(e.message, e.remedy, self._mark(e.node.start_mark), e.field)
                else:
                    if value is not None:
                        yield YamlDocument(value, self.file, self.values, self.keys, self.literals)
        except _Rejected as e:
            self._problem(e.message, e.remedy, self._mark(e.node.start_mark), e.field)
        except yaml.YAMLError as e:
            self._syntax_error(e)
        except UnicodeEncodeError:
            self._problem(
                "holds half of a character (a lone surrogate)", "save the file as UTF-8 text", (self.first_line, 1)
            )

    def _check_size(self) -> None:
        """Before any recursive code sees the text, and before an object is made of each of its values."""
        depth = count = 0
        for event in yaml.parse(self.text, Loader=self.loader):
            count += isinstance(event, yaml.NodeEvent)
            if count > self.budget.values:
                raise _Rejected("has too many values", "leave out what is not needed", event)
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
                if depth > MAX_DEPTH:
                    raise _Rejected(
                        f"is nested more than {MAX_DEPTH} deep", "no resource is; check the brackets", event
                    )
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1

    # --- values

    def _value(self, node: yaml.Node, path: str, mark: Mark, depth: int) -> Any:
        self.budget.values -= 1
        self.budget.path_chars -= len(path)
        if self.budget.path_chars < 0:
            raise _Rejected("the names of its fields are too long", "shorten them", node)
        if self.budget.values < 0 or depth > MAX_DEPTH:
            raise _Rejected("grows without measure when its aliases are expanded", "write the values out", node)
        # A block collection begins on the line below its key; people look at the key.
        own = self._mark(node.start_mark)
        flow = isinstance(node, yaml.ScalarNode) or getattr(node, "flow_style", False)
        self.values[path] = own if flow else mark
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, path, depth)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [
                self._value(n, join(path, i), self._mark(n.start_mark), depth + 1) for i, n in enumerate(node.value)
            ]
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        raise self._bad_tag(node, path)

    def _mapping(self, node: yaml.MappingNode, path: str, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            mark = self._mark(key_node.start_mark)
            if key_node.tag == _TAG + "merge":
                for source in value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]:
                    if not isinstance(source, yaml.MappingNode):
                        raise _Rejected("'<<' needs an alias of a mapping", "write '<<: *name'", key_node, path)
                    for name, value in self._value(source, path, mark, depth + 1).items():
                        merged.setdefault(name, value)  # of several sources the first one counts
                continue
            key = self._key(key_node, path)
            where = join(path, key)
            if key in result:
                line = self.keys[where][0]
                self._problem(
                    f"the field '{key[:80]}' is given twice (first in line {line})", "keep one of the two", mark, where
                )
                continue
            self.keys[where] = mark
            result[key] = self._value(value_node, where, mark, depth + 1)
        return {**merged, **result}

    def _key(self, node: yaml.Node, path: str) -> str:
        value = self._scalar(node, path) if isinstance(node, yaml.ScalarNode) else None
        if value is None:
            raise _Rejected("a field's name must be plain text", "put the name in quotes", node, path)
        return str(value).lower() if isinstance(value, bool) else str(value)

    def _scalar(self, node: yaml.ScalarNode, path: str) -> Any:
        text: str = node.value
        try:
            match node.tag.removeprefix(_TAG):
                case "str" | "merge":
                    if node.style == "|":
                        self.literals[path] = self._literal(node)
                    return text
                case "int":
                    return _int(text)
                case "bool":
                    return _BOOLS[text]
                case "null":
                    return None
                case "float":
                    if _SPECIAL_FLOAT.match(text):
                        raise ValueError(f"{text} has no place in JSON, in which Kubernetes keeps its objects")
                    number = float(text.replace("_", ""))
                    if number in (float("inf"), float("-inf")):
                        raise ValueError(f"{text[:40]} is too large")
                    return number
        except (ValueError, KeyError) as e:
            words = str(e) if isinstance(e, ValueError) else f"{text[:40]!r} is not true or false"
            raise _Rejected(words, "put the value in quotes when it is meant as text", node, path) from None
        raise self._bad_tag(node, path)

    def _literal(self, node: yaml.ScalarNode) -> Mark:
        """Where the first character of a ``|`` block's text stands."""
        self.lines = self.lines or self.text.split("\n")
        lines = islice(self.lines, node.start_mark.line + 1, node.end_mark.line + 1)
        indent = next((len(text) - len(text.lstrip(" ")) for text in lines if text.strip()), 0)
        return self.first_line + node.start_mark.line + 1, self.first_column + indent

    def _bad_tag(self, node: yaml.Node, path: str) -> _Rejected:
        tag = str(node.tag).replace(_TAG, "!!")
        return _Rejected(f"the tag {tag[:80]} is not allowed here", "write the plain value, without a tag", node, path)

    # --- problems

    def _mark(self, mark: Any) -> Mark:
        return self.first_line + mark.line, self.first_column + mark.column

    def _problem(self, message: str, remedy: str, mark: Mark, field: str = "") -> None:
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(Problem(message, remedy, field).at(self.file, *mark))

    def _syntax_error(self, error: yaml.YAMLError) -> None:
        if isinstance(error, yaml.MarkedYAMLError):
            unclosed = re.search("quoted scalar|flow (sequence|mapping)", str(error.context))
            mark = (unclosed and error.context_mark) or error.problem_mark or error.context_mark
            words = ", ".join(str(w) for w in (error.context, error.problem) if w)
            remedy = self._remedy(error, self.text.split("\n")[mark.line : mark.line + 1] if mark else [])
            at = self._mark(mark) if mark else (self.first_line, self.first_column)
            if "nesting depth" in words:  # PyYAML's own limit (since 6.0.4), which looks further ahead than ours
                self._problem(f"is nested more than {MAX_DEPTH} deep", "no resource is; check the brackets", at)
                return
            written = self.text.rstrip()
            if mark and mark.line > written.count("\n"):  # the end of the text is where its last word is
                at = self.first_line + written.count("\n"), len(written) - written.rfind("\n")
            self._problem(f"is not YAML: {words}", remedy, at)
        elif isinstance(error, yaml.reader.ReaderError):
            before = self.text[: error.position]
            at = self.first_line + before.count("\n"), len(before) - before.rfind("\n")
            character = error.character if isinstance(error.character, int) else ord(str(error.character)[:1] or "\0")
            self._problem(f"is not YAML: the character U+{character:04X} is not allowed", "remove it", at)
        else:
            self._problem(f"is not YAML: {error}", "check quotes, brackets and indentation", (self.first_line, 1))

    @staticmethod
    def _remedy(error: yaml.MarkedYAMLError, lines: list[str]) -> str:
        line = lines[0] if lines else ""
        words = f"{error.context} {error.problem}"
        column = error.problem_mark.column if error.problem_mark else 0
        if "\t" in line[: len(line) - len(line.lstrip())] or line[column : column + 1] == "\t":
            return "indent with spaces: this line has a tab"
        if "cannot start any token" in words:
            return f"put the value in quotes: a value cannot begin with {line[column : column + 1]!r}"
        if "quoted scalar" in words:
            return "close the quote that opens here"
        if "mapping values are not allowed" in words:
            return "put a value that holds ': ' in quotes, or indent this line like the one above it"
        if "alias" in words or "anchor" in words:
            return "put a value that begins with '*' or '&' in quotes, or define the anchor above its alias"
        if "flow node" in words:
            return "finish the list or mapping: after '[', '{' or ',' comes an item or the closing bracket"
        if "flow" in words:
            return "close the bracket that opens here, and put a comma between its items"
        if "directive" in words or "document start" in words:
            return "remove the line that begins with '%': resources need no directives"
        return "check this line and the one above: fields of one object begin in one column, and every quote is closed"
