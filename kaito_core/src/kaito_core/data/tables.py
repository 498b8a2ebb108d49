"""Rows from parquet and Arrow files: checked before they are looked at, in pieces of bounded size.

Arrow reads offsets and lengths as they stand in the file and follows them wherever they lead: unchecked, a file of 500 bytes ends the
process, and one of 1 kB unpacks to 10 GB. So every batch is validated in full, what it would take as Python values is computed from
lengths alone, and the whole file is read once by a child process with bounded memory (`vetted`) before this process touches it.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kaito_core.data.bounds import CHILD_BYTES, DEEPEST_TYPE, LONGEST_ROW, VALUE_BYTES, most_unpacked
from kaito_core.problems import Failure

BATCH_ROWS = 128
"""Rows that are unpacked together at most."""
BATCH_BYTES = 16 << 20
"""Bytes of them, as far as a parquet file's own figures can be believed."""
READ_BYTES = 1 << 20
"""Of a parquet column, read at once: a row group of gigabytes is never held."""
_CHILD = "kaito_core.data.tables"


class TableError(ValueError):
    """A file that is no table, or goes beyond `bounds`; ``row`` is the number of the first one that cannot be read."""

    def __init__(self, words: str, row: int = 1) -> None:
        super().__init__(words)
        self.row = row


def table_rows(path: Path, kind: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a ``parquet`` or ``arrow`` file, numbered from 1. Raises `TableError`."""
    vetted(path, kind)
    number = 0
    for batch in table_batches(path, kind):
        try:
            rows = batch.to_pylist()
        except (ValueError, ArithmeticError) as e:  # a date that Python has not, for example
            raise TableError(_first_line(e), number + 1) from e
        yield from enumerate(rows, number + 1)
        number += len(rows)


def vetted(path: Path, kind: str) -> None:
    """Let a child process read the whole file first, with `CHILD_BYTES` of memory. `TableError` when it cannot be read, or ends
    that process; `Failure` when the child itself is broken. On macOS, whose kernel keeps no such limit, the sizes alone are bounded."""
    _check_ends(path, kind)
    # -P: the folder that the user is in may hold a file named like one of our imports.
    child = subprocess.run(
        [sys.executable, "-P", "-m", _CHILD, kind, str(path)], stdin=subprocess.DEVNULL, capture_output=True
    )
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        raise TableError(f"reading it ended the process that did it ({name}): the file is damaged")
    try:
        found = json.loads(child.stdout)
    except ValueError:
        said = child.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise Failure(f"the process that reads {path.name} has failed: {said:.300}") from None
    if found:
        raise TableError(found["problem"], found["row"])


def _check_ends(path: Path, kind: str) -> None:
    """Check the marks at both ends of the file, which a broken download lacks. `TableError`."""
    size = path.stat().st_size
    with path.open("rb") as f:
        head = f.read(8)
        f.seek(max(0, size - 6))
        tail = f.read(6)
    if kind == "parquet" and (size < 12 or not tail.endswith((b"PAR1", b"PARE"))):
        raise TableError("the end of the parquet file is missing")
    if kind == "arrow" and head.startswith(b"ARROW1") and (size < 20 or tail != b"ARROW1"):
        raise TableError("the end of the Arrow file is missing")
    if (
        kind == "arrow"
        and head.startswith(b"\xff\xff\xff\xff")
        and not 0 < int.from_bytes(head[4:], "little") <= size - 8
    ):
        raise TableError("the Arrow stream has no schema")


def table_batches(path: Path, kind: str) -> Iterator[Any]:
    """Record batches, validated, each of at most `LONGEST_ROW` bytes; read one after the other. Raises `TableError`."""
    import pyarrow as pa

    room, row = most_unpacked(path), 1
    try:
        for batch in _parquet(path) if kind == "parquet" else _arrow(path):
            batch.validate(full=True)
            parts = [batch]
            while parts:
                part = parts.pop()
                size = part.num_rows * VALUE_BYTES + sum(_bytes(column) for column in part.columns)
                if size > room:
                    raise ValueError(
                        f"unpacks to more than {most_unpacked(path) >> 20} MiB, from {path.stat().st_size} bytes"
                    )
                if size <= LONGEST_ROW:
                    yield part
                    room, row = room - size, row + part.num_rows
                elif part.num_rows > 1:
                    half = part.num_rows // 2
                    parts += [part.slice(half), part.slice(0, half)]
                else:
                    raise ValueError(f"a row of {size >> 20} MiB; a row has at most {LONGEST_ROW >> 20} MiB")
    except MemoryError as e:
        raise TableError(f"takes too much memory when it is unpacked ({_first_line(e)})", row) from None
    except (
        pa.ArrowException,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as e:
        raise TableError(_first_line(e), row) from e


def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, buffer_size=READ_BYTES, pre_buffer=False) as file:
        _check_schema(file.schema_arrow)
        groups = [file.metadata.row_group(n) for n in range(file.metadata.num_row_groups)]
        widest = max((g.total_byte_size // g.num_rows for g in groups if g.num_rows > 0), default=1)
        yield from file.iter_batches(
            batch_size=max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, widest))), use_threads=False
        )


def _arrow(path: Path) -> Iterator[Any]:
    import pyarrow as pa

    with path.open("rb") as f:
        is_file = f.read(6) == b"ARROW1"
    with pa.memory_map(str(path)) as source:
        if is_file:
            reader = pa.ipc.open_file(source)
            _check_schema(reader.schema)
            yield from (reader.get_batch(n) for n in range(reader.num_record_batches))
        else:
            stream = pa.ipc.open_stream(source)
            _check_schema(stream.schema)
            yield from stream


def _check_schema(schema: Any) -> None:
    """Every name once at its level, and no deeper than `DEEPEST_TYPE`."""
    names = list(schema.names)
    todo = [(names, [schema.field(n).type for n in range(len(names))], 0)]
    while todo:
        names, types, depth = todo.pop()
        twice = {n for n in names if names.count(n) > 1} if len(set(names)) != len(names) else set()
        if twice:
            raise ValueError(f"the column {min(twice)[:80]!r} stands twice in the table")
        if depth > DEEPEST_TYPE:
            raise ValueError("nested too deeply")
        for t in types:
            fields = [t.field(n) for n in range(t.num_fields)]
            is_struct = str(t).startswith("struct<")
            todo.append(([f.name for f in fields] if is_struct else [], [f.type for f in fields], depth + 1))


def _bytes(array: Any) -> int:
    """What the values take when each is written out, shared ones as often as they occur. Computed from lengths; ``array`` is valid."""
    import pyarrow as pa
    import pyarrow.compute as pc

    t, count = array.type, len(array)
    size = VALUE_BYTES * count
    kind = pa.types
    if isinstance(t, pa.BaseExtensionType):
        return _bytes(array.storage)
    if str(t) in ("string_view", "binary_view"):  # pyarrow 15 does not know them
        words = memoryview(array.buffers()[1])
        lengths = words[: len(words) // 16 * 16].cast("i")[array.offset * 4 : (array.offset + count) * 4 : 4]
        return size + sum(lengths)
    if kind.is_string(t) or kind.is_binary(t) or kind.is_large_string(t) or kind.is_large_binary(t):
        return size + (pc.sum(pc.binary_length(array)).as_py() or 0)
    if kind.is_list(t) or kind.is_large_list(t) or kind.is_map(t):
        first, behind = (array.offsets[n].as_py() for n in (0, -1)) if count else (0, 0)
        return size + _bytes(array.values.slice(first, behind - first))
    if kind.is_fixed_size_list(t):
        return size + _bytes(array.values.slice(array.offset * t.list_size, count * t.list_size))
    if kind.is_struct(t):
        return size + sum(_bytes(array.field(n)) for n in range(t.num_fields))
    if kind.is_dictionary(t):
        return size + _dictionary_bytes(array)
    if kind.is_null(t) or kind.is_primitive(t) or kind.is_fixed_size_binary(t) or kind.is_decimal(t):
        return size + (0 if kind.is_null(t) else t.bit_width // 8 * count)
    raise ValueError(f"kaito does not read columns of the type {t!s:.80}")


def _dictionary_bytes(array: Any) -> int:
    import pyarrow as pa
    import pyarrow.compute as pc

    values, t = array.dictionary, array.type.value_type
    if any(
        is_it(t)
        for is_it in (pa.types.is_string, pa.types.is_binary, pa.types.is_large_string, pa.types.is_large_binary)
    ):
        return pc.sum(pc.take(pc.binary_length(values), array.indices)).as_py() or 0
    if t.num_fields:
        raise ValueError(f"kaito does not read columns of the type {array.type!s:.80}")
    return max((_bytes(values.slice(n, 1)) for n in range(len(values))), default=0) * len(array)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _read_all(kind: str, path: Path) -> dict[str, Any]:
    """What is wrong with the file, and at which row; empty when it can be read."""
    import pyarrow as pa

    pa.set_memory_pool(pa.system_memory_pool())  # gives back what it frees, so that the limit counts what is used
    if sys.platform == "linux":
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        limit = CHILD_BYTES if most == resource.RLIM_INFINITY else min(CHILD_BYTES, most)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        for _ in table_batches(path, kind):
            pass
    except TableError as e:
        return {"problem": str(e), "row": e.row}
    except (OSError, MemoryError) as e:
        return {"problem": _first_line(e), "row": 1}
    return {}


if __name__ == "__main__":
    from kaito_core.data import tables  # this module under its name: there is one `TableError`

    sys.stdout.write(json.dumps(tables._read_all(sys.argv[1], Path(sys.argv[2]))))
