"""Rows from files: parquet, Arrow, JSON, JSON lines, CSV, TSV and text, each also gzipped.

Every file counts, in sorted order. What a file is, its content says where the content is unmistakable (magic numbers), else
the end of its name; never a piece of its name. Rows are streamed; a row knows the file and the number it came from.
"""

from __future__ import annotations

import csv
import gzip
import io
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from kaito_core.data.bounds import INFLATION, LONGEST_ROW, MOST_CELLS, most_unpacked
from kaito_core.data.json_rows import json_rows, json_values
from kaito_core.data.tables import TableError, table_rows
from kaito_core.problems import Problem, UserError

KINDS = {
    ".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow", ".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl",
    ".csv": "csv", ".tsv": "tsv", ".txt": "text",
}  # fmt: skip
ACCEPTED = "parquet, arrow, json, jsonl, csv, tsv or txt, each also with .gz"
NOT_DATA = re.compile(
    r"(readme|license|licence|notice)(\..*)?|.*\.(md|py|ya?ml)|dataset_infos?\.json|dataset_dict\.json|state\.json|lost\+found",
    re.IGNORECASE,
)
"""What lies beside data in dataset folders (those of the hub and of ``datasets.save_to_disk``) and is none."""
MAGIC = ((b"PAR1", "parquet"), (b"ARROW1", "arrow"), (b"\xff\xff\xff\xff", "arrow"), (b"\x1f\x8b", "gzip"))
UNREADABLE = (
    (b"PK\x03\x04", "a zip archive", "unpack it and give the files inside"),
    (b"PK\x05\x06", "an empty zip archive", "unpack it and give the files inside"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it and give the files inside"),
    (b"Rar!", "a rar archive", "unpack it and give the files inside"),
    (b"BZh", "bzip2-compressed", "unpack it, or compress it with gzip"),
    (b"\xfd7zXZ", "xz-compressed", "unpack it, or compress it with gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed", "unpack it, or compress it with gzip"),
    (b"\x80\x04", "a Python pickle, which can run code when it is read", "save the data as parquet or jsonl"),
    (b"\xff\xfe", "UTF-16 text", "save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "save it as UTF-8"),
    (b"%PDF", "a PDF", f"make it {ACCEPTED}"),
    (
        b"version https://git-lfs",
        "a Git LFS pointer and not the file itself",
        "fetch the file with `git lfs pull`, or by its URL",
    ),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One row, and where it came from."""

    file: str
    number: int
    """Counts from 1; the line in files of lines."""
    values: dict[str, Any]


def data_files(folder: Path) -> list[Path]:
    """The data files below ``folder``, sorted by path: hidden files and what usually lies beside data are left out."""
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and not NOT_DATA.fullmatch(path.name)
    ]
    if not found:
        raise UserError(f"{folder}: there is no data in this folder", f"put files there: {ACCEPTED}")
    return found


def read_rows(files: Iterable[Path]) -> Iterator[Row]:
    """Rows of all files, in the given order. UserError names the file and the row when something cannot be read."""
    for path in files:
        empty = True
        number = 0
        try:
            for number, values in _rows_of(path):
                empty = False
                if not isinstance(values, dict):
                    raise _unreadable(
                        path, number, f"a row is an object with named fields, not {_kind_of_value(values)}"
                    )
                yield Row(path.name, number, values)
        except UnicodeDecodeError as e:
            raise _unreadable(
                path, number + 1, f"not UTF-8 text (byte {e.start}: {e.reason})", "save it as UTF-8"
            ) from e
        except TableError as e:
            raise _unreadable(path, e.row, str(e), "write the file again, or give the rows as JSON lines") from e
        except (
            ValueError,
            csv.Error,
            OSError,
            EOFError,
            zlib.error,
            NotImplementedError,
            ArithmeticError,
        ) as e:  # pyarrow's too
            raise _unreadable(path, number + 1, str(e).splitlines()[0] if str(e) else type(e).__name__) from e
        if empty:
            raise UserError(
                Problem("there is no row in this file", "give a file with data in it, or leave it out", file=path.name)
            )


def _unreadable(path: Path, number: int, why: str, remedy: str = "mend the file, or leave it out") -> UserError:
    return UserError(Problem(f"row {number}: {why}", remedy, file=path.name))


def _kind_of_value(value: Any) -> str:
    return {list: "a list", str: "a text", type(None): "null"}.get(type(value), f"a {type(value).__name__}")


def _rows_of(path: Path) -> Iterator[tuple[int, Any]]:
    kind = file_kind(path)
    if kind in ("parquet", "arrow"):
        return table_rows(path, kind)
    return _text_rows(path, kind)


def file_kind(path: Path) -> str:
    """``parquet``, ``arrow``, ``json``, ``jsonl``, ``csv``, ``tsv`` or ``text``. UserError for anything else."""
    suffixes = [s.lower() for s in path.suffixes]
    named = KINDS.get(suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else (suffixes or [""])[-1], "")
    with path.open("rb") as f:
        head = f.read(1024)
    kind = _by_content(path, head)
    if kind == "gzip":
        with _bounded(path) as unpacked:
            try:
                head = unpacked.read(1024)
            except (OSError, EOFError, zlib.error) as e:
                raise UserError(Problem(f"not a whole gzip file: {e}", "compress it again", file=path.name)) from e
        kind = _by_content(path, head)
        if kind in ("parquet", "arrow", "gzip"):
            raise UserError(
                Problem(
                    f"{kind} inside gzip", "unpack the file; parquet and Arrow compress by themselves", file=path.name
                )
            )
        if b"ustar" in head[257:265]:
            raise UserError(Problem("a tar archive", "unpack it and give the files inside", file=path.name))
    if kind:
        return kind
    if named in ("parquet", "arrow") and head:
        raise UserError(
            Problem(f"the name says {named}, the content is not", "give the file its right name", file=path.name)
        )
    if not head.strip():
        raise UserError(Problem("the file is empty", "give a file with data in it, or leave it out", file=path.name))
    if named:
        return named
    first = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if first == b"[":
        return "json"
    if first == b"{":
        return "jsonl"
    raise UserError(
        Problem("kaito cannot tell what kind of data this is", f"name the file by its kind: {ACCEPTED}", file=path.name)
    )


def _by_content(path: Path, head: bytes) -> str:
    for magic, what, remedy in UNREADABLE:
        if head.startswith(magic):
            raise UserError(Problem(f"this is {what}", remedy, file=path.name))
    return next((kind for magic, kind in MAGIC if head.startswith(magic)), "")


def _text_rows(path: Path, kind: str) -> Iterator[tuple[int, Any]]:
    with _opened(path) as binary, io.TextIOWrapper(binary, encoding="utf-8-sig", newline="") as text:
        if kind == "json":
            yield from enumerate(json_rows(text, LONGEST_ROW), 1)
        elif kind == "jsonl":
            yield from _lines_of_json(text)
        elif kind == "text":
            yield from ((n, {"text": line.rstrip("\r\n")}) for n, line in _lines(text) if line.strip())
        else:
            yield from _table(text, "\t" if kind == "tsv" else ",")


def _lines(text: IO[str]) -> Iterator[tuple[int, str]]:
    number = 0
    while line := text.readline(LONGEST_ROW):
        number += 1
        if len(line) == LONGEST_ROW and not line.endswith("\n"):
            raise ValueError(f"a line longer than {LONGEST_ROW >> 20} MiB is no row")
        yield number, line


def _lines_of_json(text: IO[str]) -> Iterator[tuple[int, Any]]:
    for number, line in _lines(text):
        if not line.strip():
            continue
        values = iter(json_values(io.StringIO(line), LONGEST_ROW))
        try:
            yield number, next(values)
            extra = next(values, None)
        except ValueError as e:
            raise ValueError(f"not JSON: {e}") from e
        if extra is not None:
            raise ValueError("more than one JSON value in a line")


class _RecordLines(Iterator[str]):
    """The lines of a table, as the CSV reader asks for them; a record may have several."""

    def __init__(self, text: IO[str], delimiter: str) -> None:
        self._lines, self._delimiter = _lines(text), delimiter
        self.next_record()

    def next_record(self) -> None:
        self._chars = self._cells = 0

    def __next__(self) -> str:
        _, line = next(self._lines)
        self._chars += len(line)
        self._cells += line.count(self._delimiter)
        if self._chars > LONGEST_ROW or self._cells > MOST_CELLS:
            raise ValueError(
                f"a record of more than {LONGEST_ROW >> 20} MiB or {MOST_CELLS:,} fields: a quote is not closed, or this is no table"
            )
        return line


def _table(text: IO[str], delimiter: str) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(LONGEST_ROW)
    lines = _RecordLines(text, delimiter)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header = [name.strip() for name in next(reader, [])]
    if len(set(header)) != len(header):
        raise ValueError(f"the first line names a column twice: {', '.join(header):.300}")
    lines.next_record()
    for number, cells in enumerate((c for c in reader if c), 1):
        lines.next_record()
        if len(cells) != len(header):
            raise ValueError(f"{len(cells)} fields where the first line names {len(header)} (record {number})")
        yield number, dict(zip(header, cells, strict=True))


def _opened(path: Path) -> IO[bytes]:
    with path.open("rb") as f:
        zipped = f.read(2) == b"\x1f\x8b"
    return _bounded(path) if zipped else path.open("rb")


def _bounded(path: Path) -> IO[bytes]:
    """A gzip file, unpacked as it is read, that stops at what no honest file unpacks to."""
    limit = most_unpacked(path)

    class Bounded(io.RawIOBase):
        def __init__(self) -> None:
            self._file = gzip.GzipFile(path, "rb")
            self._count = 0

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            got = self._file.read(len(buffer))
            self._count += len(got)
            if self._count > limit:
                raise ValueError(f"unpacks to more than {INFLATION} times its size: not unpacked further")
            buffer[: len(got)] = got
            return len(got)

        def close(self) -> None:
            self._file.close()
            super().close()

    return io.BufferedReader(Bounded(), 1 << 16)
