"""Examples on disk: one Arrow IPC file, read through the page cache, so that a million examples cost no memory.

Columns: ``input_ids`` list<int32> and ``trained`` list<bool>; what is known of the whole stands in the schema's metadata.
"""

from __future__ import annotations

import json
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from kaito_core.data.tokens import Example
from kaito_core.problems import Failure, Problem

ROWS_PER_BATCH = 1024
_KEY = b"kaito"


def write_examples(path: Path, examples: Sequence[Example], metadata: Mapping[str, Any]) -> None:
    """Write all examples and ``metadata`` (JSON-able) to ``path``; the file appears when it is complete."""
    import pyarrow as pa

    schema = _schema().with_metadata({_KEY: json.dumps(dict(metadata)).encode()})
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    with pa.OSFile(str(beside), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for start in range(0, len(examples), ROWS_PER_BATCH):
            rows = examples[start : start + ROWS_PER_BATCH]
            offsets = pa.array(accumulate((len(e) for e in rows), initial=0), pa.int32())
            ids = array("i")
            flags = bytearray()
            for example in rows:
                ids.extend(example.input_ids)
                flags.extend(example.trained)
            numbers = pa.Array.from_buffers(pa.int32(), len(ids), [None, pa.py_buffer(ids)])
            bits = pa.Array.from_buffers(pa.uint8(), len(flags), [None, pa.py_buffer(flags)]).cast(pa.bool_())
            columns = [pa.ListArray.from_arrays(offsets, numbers), pa.ListArray.from_arrays(offsets, bits)]
            writer.write_batch(pa.record_batch(columns, schema=schema))
    beside.replace(path)


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema([("input_ids", pa.list_(pa.int32())), ("trained", pa.list_(pa.bool_()))])


def read_batches(path: Path) -> tuple[list[tuple[Any, Any]], dict[str, Any]]:
    """``input_ids`` and ``trained`` (`pyarrow.ListArray`) of each batch in the file, memory-mapped, and the metadata.

    The lists are checked, since Arrow would follow a wrong offset out of the file: valid, without nulls, flags as many as tokens.
    `Failure` when ``path`` is missing or not what `write_examples` writes."""
    import pyarrow as pa

    batches = []
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        if not reader.schema.equals(_schema()):
            raise ValueError(f"it has the columns {', '.join(reader.schema.names):.200}")
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            batch.validate(full=True)
            ids, trained = batch.columns
            if any(column.null_count or column.values.null_count for column in (ids, trained)):
                raise ValueError(f"batch {number} has nulls")
            if not ids.offsets.equals(trained.offsets):
                raise ValueError(f"batch {number} has another number of flags than of tokens")
            batches.append((ids, trained))
        return batches, json.loads((reader.schema.metadata or {})[_KEY])
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, MemoryError) as e:
        raise Failure(
            Problem(f"the prepared data cannot be read: {e}", "run the stage `check` again", file=str(path))
        ) from e


class PreparedFile(Sequence[Example]):
    """The examples of a file, each read when it is asked for. Safe to use from several threads and after a fork."""

    def __init__(self, path: Path) -> None:
        """Failure when ``path`` is missing or not what `write_examples` writes."""
        self.path = path
        self._batches, self.metadata = read_batches(path)
        self._ends = list(accumulate(len(ids) for ids, _ in self._batches))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        batch = bisect_right(self._ends, index)
        row = index - (self._ends[batch - 1] if batch else 0)
        ids, trained = self._batches[batch]
        return Example(ids[row].as_py(), trained[row].as_py())

    def __iter__(self) -> Iterator[Example]:
        for ids, trained in self._batches:
            for row in range(len(ids)):
                yield Example(ids[row].as_py(), trained[row].as_py())

    @property
    def lengths(self) -> list[int]:
        """Tokens of every example, without reading them: what `kaito_core.data.packing.pack` wants."""
        import pyarrow.compute as pc

        return [n for ids, _ in self._batches for n in pc.list_value_length(ids).to_pylist()]
