"""What a line of ``tuning.input.urls`` means: a pure parse, so that a wrong one is refused before anything is downloaded."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from kaito_core.problems import Problem, UserError

HUB = "https://huggingface.co"
"""The Hugging Face hub; ``$HF_ENDPOINT`` names a mirror of it, as in the hub's own client."""


@dataclass(frozen=True, slots=True)
class Source:
    """One place that data comes from: a URL to download, or a path on this machine."""

    name: str
    """The file name it gets: the last part of the path, without the query."""
    shown: str
    """How it is named in messages: without query and user info, which may hold secrets."""
    url: str = field(default="", repr=False)
    """``http`` or ``https``; empty for a path."""
    path: Path | None = None


def hub_endpoint() -> str:
    """Where the hub is: ``$HF_ENDPOINT``, else huggingface.co."""
    return (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")


def redacted(url: str) -> str:
    """``url`` without query, fragment, user and password."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return url.partition("?")[0].rpartition("@")[2]
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def parse_source(text: str, *, base: Path, field: str = "") -> Source:
    """What ``text`` means: ``https://…``, ``http://…``, ``hf://datasets/org/name[@revision]/path``, ``file://…`` or a path.

    ``hf://org/name/path`` is the same as with ``datasets/``: training data lives in dataset repositories. Relative paths
    belong to ``base``. Raises `UserError` that names ``field`` and what was given.
    """

    def refuse(why: str, remedy: str) -> UserError:
        return UserError(Problem(f"{redacted(text)!r}: {why}", remedy, field))

    stripped = text.strip()
    if not stripped:
        raise UserError(Problem("an empty line names no data", "give a URL or a path", field))
    scheme, separator, rest = stripped.partition("://")
    if not separator:
        path = (base / os.path.expanduser(stripped)).absolute()  # noqa: PTH111 – pathlib's raises for an unknown ~name
        return Source(file_name(path.name), stripped, path=path)
    scheme = scheme.lower()
    if scheme == "file":
        where = rest.removeprefix("localhost") if rest.startswith("localhost/") else rest
        if not where.strip("/"):
            raise refuse("the URL has no path", "write file:///folder/file.jsonl, or just the path")
        path = (base / unquote(where)).absolute()
        return Source(file_name(path.name), stripped, path=path)
    if scheme == "hf":
        return _hub_source(stripped, rest, refuse)
    if scheme not in ("http", "https"):
        raise refuse(f"kaito cannot read {scheme}://", "use https://, http://, hf://, file:// or a path")
    try:
        parts = urlsplit(stripped)
        host, _ = parts.hostname, parts.port  # reading the port checks it
    except ValueError as e:
        raise refuse(f"this is not a URL: {e}", "write https://host/path/file") from None
    if not host:
        raise refuse("the URL has no host", "write https://host/path/file")
    if re.search(r"[\x00-\x20\x7f]", stripped):
        raise refuse("the URL has a space or a control character in it", "write a space as %20")
    return Source(file_name(unquote(parts.path)), redacted(stripped), url=stripped)


def _hub_source(text: str, rest: str, refuse: object) -> Source:
    parts = [p for p in rest.split("?")[0].split("/") if p]
    if parts and parts[0] in ("models", "spaces"):
        raise refuse("training data lives in a dataset repository", "write hf://datasets/org/name/path")  # type: ignore[operator]
    if parts and parts[0] == "datasets":
        parts = parts[1:]
    if len(parts) < 3:
        raise refuse("the URL does not name a file", "write hf://datasets/org/name/path/to/file.parquet")  # type: ignore[operator]
    organisation, (name, _, revision), path = parts[0], parts[1].partition("@"), [unquote(p) for p in parts[2:]]
    if ".." in path:
        raise refuse("the path goes out of the repository", "write the path as the hub shows it")  # type: ignore[operator]
    at = quote(unquote(revision) or "main", safe="")
    url = f"{hub_endpoint()}/datasets/{organisation}/{name}/resolve/{at}/{quote('/'.join(path))}"
    return Source(file_name(path[-1]), text.split("?")[0], url=url)


def parse_sources(texts: Iterable[str], *, base: Path, field: str = "tuning.input.urls") -> list[Source]:
    """All of them, with every problem at once; files of one name get a number (``train.parquet``, ``train-2.parquet``)."""
    sources: list[Source] = []
    problems: list[Problem] = []
    for number, text in enumerate(texts):
        try:
            sources.append(parse_source(text, base=base, field=f"{field}[{number}]"))
        except UserError as e:
            problems.extend(e.problems)
    if problems:
        raise UserError(problems)
    return sources


def unused_name(name: str, used: set[str]) -> str:
    """``name``, or the first of ``name-2``, ``name-3`` … that is not in ``used``; it is added there. Suffixes stay last."""
    stem, dot, suffixes = name.partition(".")
    number, free = 1, name
    while free.lower() in used:
        number += 1
        free = f"{stem}-{number}{dot}{suffixes}"
    used.add(free.lower())
    return free


def file_name(path: str) -> str:
    """A safe file name from the last part of a decoded URL path: no folder, not hidden, at most 200 characters."""
    last = path.replace("\\", "/").rstrip("/").rpartition("/")[2]
    safe = re.sub(r"[^\w.+=-]+", "_", last).lstrip(".")
    return safe[-200:].lstrip(".") or "data"
