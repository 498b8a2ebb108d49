"""Parquet and Arrow files that a stranger wrote give rows or a named error: no crash, no traceback, no gigabytes."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaito_core.data import tables
from kaito_core.data.prepared import PreparedFile, write_examples
from kaito_core.data.rows import read_rows
from kaito_core.data.tokens import Example
from kaito_core.problems import Failure, UserError

MIB = 1 << 20
LEAST = pa.table({"a": ["x", "yy"]})
CHATS = pa.Table.from_pylist(
    [
        {
            "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
            "id": 1,
            "tags": ["x", None],
        }
    ]
    * 2
)
TYPES = pa.table(
    {
        "dictionary": pa.array(["x", "yy", "x"]).dictionary_encode(),
        "view": pa.array(["a text of its own, not inline", "b", None], pa.string_view()),
        "pairs": pa.array([[1, 2], [3, 4], None], pa.list_(pa.int8(), 2)),
        "map": pa.array([[("a", 1)], [], [("b", 2)]], pa.map_(pa.string(), pa.int32())),
    }
)


def ipc(table: pa.Table, *, stream: bool = False, compression: str | None = None) -> bytes:
    sink = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    return sink.getvalue()


def parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", store_schema=False)
    return sink.getvalue()


FILES = {
    "file.arrow": ipc(LEAST),
    "stream.arrow": ipc(LEAST, stream=True),
    "zstd.arrow": ipc(LEAST, compression="zstd"),
    "types.arrow": ipc(TYPES),
    "least.parquet": parquet(LEAST),
    "chats.parquet": parquet(CHATS),
}
MUTATE = """
import sys, resource
from pathlib import Path
from kaito_core.data.tables import TableError, table_batches
resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, 1 << 30))
path, step = Path(sys.argv[1]), int(sys.argv[2])
whole, read, refused = path.read_bytes(), 0, 0
for place in range(0, len(whole), step):
    for value in {0, 1, 0x7F, 0x80, 0xFF, whole[place] ^ 4} - {whole[place]}:
        path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
        try:
            for batch in table_batches(path, path.suffix[1:]):
                batch.to_pylist()
            read += 1
        except (TableError, OSError) as e:
            refused += bool(str(e))
print(read, refused)
"""
"""Reads a file with each byte changed in turn, in one process: without the child that reads every file first in the product."""


@pytest.mark.parametrize("name", FILES)
def test_no_changed_byte_ends_the_process(tmp_path: Path, name: str) -> None:
    """`pyarrow` follows a wrong offset out of the buffer: SIGSEGV, and the GPU node's stage is gone without a word."""
    path = tmp_path / name
    path.write_bytes(FILES[name])
    step = 1 if name == "file.arrow" else len(FILES[name]) // 150
    done = subprocess.run(
        [sys.executable, "-c", MUTATE, str(path), str(step)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    read, refused = map(int, done.stdout.split())
    assert read > 100
    assert refused > 100


def with_offset(offset: int) -> bytes:
    offsets = pa.py_buffer(array("i", [0, offset, 5]))
    return ipc(pa.table({"text": pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"hello")])}))


def replaced(data: bytes, number: int, by: int) -> bytes:
    assert data.count(number.to_bytes(8, "little"))
    return data.replace(number.to_bytes(8, "little"), by.to_bytes(8, "little"))


def repeated(text: str, times: int) -> pa.Table:
    values = pa.DictionaryArray.from_arrays(pa.array(np.zeros(times, np.int8)), pa.array([text]))
    return pa.table({"prompt": values, "completion": values})


def deep(levels: int) -> pa.Table:
    kind = pa.int8()
    for _ in range(levels):
        kind = pa.struct([("a", kind)])
    return pa.table({"a": pa.nulls(1, kind)})


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "offset.arrow": (lambda: with_offset(1 << 30), "out of bounds"),
    "backwards.arrow": (lambda: with_offset(-4), "Invalid"),
    "long_values.parquet": (lambda: parquet(repeated("x" * (10 * MIB), 1000)), "too much memory"),
    "dictionary.parquet": (lambda: parquet(repeated("x" * MIB, 3000)), "unpacks to more than|too much memory"),
    "runs.parquet": (lambda: parquet(repeated("ab", 3_000_000)), "unpacks to more than 6. MiB"),
    "row.arrow": (lambda: ipc(pa.table({"a": ["x" * (70 * MIB)]})), "a row of 70 MiB"),
    "dictionary.arrow": (lambda: ipc(repeated("x" * MIB, 5000)), "unpacks to more than"),
    "declared.arrow": (lambda: replaced(ipc(pa.table({"a": ["x" * 200_000]}), compression="zstd"), 200_000, 1 << 38), "too much memory"),
    "rows.arrow": (lambda: replaced(ipc(pa.table({"a": pa.nulls(7_777_777)})), 7_777_777, 1 << 40), "unpacks to more than"),
    "list.arrow": (
        lambda: ipc(pa.table({"a": pa.FixedSizeListArray.from_arrays(pa.nulls(1 << 30), 1 << 30)})), "unpacks to more than"),
    "deep.parquet": (lambda: parquet(deep(90)), "deep"),
    "twice.arrow": (lambda: ipc(pa.table([pa.array(["x"]), pa.array(["y"])], names=["a", "a"])), "column 'a' stands twice"),
    "inner_twice.parquet": (
        lambda: parquet(pa.table({"s": pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])})), "stands twice"),
    "union.arrow": (
        lambda: ipc(pa.table({"u": pa.UnionArray.from_sparse(pa.array([0], pa.int8()), [pa.array([1])])})), "columns of the type"),
    "cut.parquet": (lambda: FILES["least.parquet"][:-9], "the end of the parquet file is missing"),
    "cut.arrow": (lambda: FILES["file.arrow"][:-9], "the end of the Arrow file is missing"),
}  # fmt: skip
READ = """
import json, resource, sys
from pathlib import Path
from kaito_core.data.rows import read_rows
from kaito_core.problems import UserError
words = ""
try:
    for row in read_rows([Path(sys.argv[1])]):
        pass
except UserError as e:
    words = str(e)
own = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) if sys.platform == "linux" else 0
print(json.dumps([words, max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)]))
"""


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_table_is_a_named_error_and_takes_no_memory(tmp_path: Path, name: str) -> None:
    content, words = HOSTILE[name]
    path = tmp_path / name
    path.write_bytes(content())
    done = subprocess.run([sys.executable, "-c", READ, str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    said, kib = json.loads(done.stdout)
    assert name in said
    assert "row " in said
    assert "JSON lines" in said, "the remedy"

    assert re.search(words, said), said
    if sys.platform == "linux":
        assert kib < 1 << 20, "1 GiB"


def test_a_file_that_ends_the_child_is_an_error_that_names_the_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What no check here foresees happens in the child."""
    path = tmp_path / "a.arrow"
    path.write_bytes(FILES["file.arrow"])
    broken = tmp_path / "dies.py"
    broken.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(tables, "_CHILD", "dies")
    with pytest.raises(UserError, match=r"a.arrow: error: row 1: reading it ended the process that did it \(SIGSEGV\)"):
        list(read_rows([path]))
    monkeypatch.setattr(tables, "_CHILD", "no_such_module")
    with pytest.raises(Failure, match="No module named no_such_module"):
        list(read_rows([path]))


def test_honest_tables_are_read_whole(tmp_path: Path) -> None:
    wide = pa.table({"prompt": [f"{n:06} " + "words and words " * 40 for n in range(5_000)], "completion": ["the same"] * 5_000,
                     "empty": pa.nulls(5_000, pa.string())})  # fmt: skip
    for name, content in {
        "one_group.parquet": parquet(wide),
        "batch.arrow": ipc(wide),
        "types.arrow": FILES["types.arrow"],
    }.items():
        path = tmp_path / name
        path.write_bytes(content)
        rows = [(r.number, r.values) for r in read_rows([path])]
        expected = TYPES if name == "types.arrow" else wide
        assert rows == list(enumerate(expected.to_pylist(), 1))


def test_large_rows_are_read_in_small_pieces(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    path.write_bytes(ipc(pa.table({"text": [chr(97 + n) * (20 * MIB) for n in range(4)]})))
    sizes = [sum(len(t) for t in b.column(0).to_pylist()) // MIB for b in tables.table_batches(path, "arrow")]
    assert sizes == [40] * 2
    assert [r.values["text"][0] for r in read_rows([path])] == list("abcd")


kinds = st.recursive(
    st.sampled_from([pa.string(), pa.large_string(), pa.binary(), pa.int32(), pa.bool_(), pa.float64(), pa.null(), pa.timestamp("us")]),
    lambda k: st.one_of(k.map(pa.list_), k.map(pa.large_list), k.map(lambda t: pa.list_(t, 2)), st.lists(k, min_size=1, max_size=3).map(
        lambda ts: pa.struct([(f"f{n}", t) for n, t in enumerate(ts)])), k.map(lambda t: pa.map_(pa.string(), t))),
    max_leaves=5,
)  # fmt: skip


@given(kinds, st.data())
def test_the_size_that_is_computed_covers_what_python_gets(kind: pa.DataType, data: st.DataObject) -> None:
    def value(t: pa.DataType) -> Any:
        if data.draw(st.integers(0, 5)) == 0:
            return None
        if pa.types.is_map(t):
            return [(data.draw(st.text(max_size=3)), value(t.item_type)) for _ in range(data.draw(st.integers(0, 2)))]
        if pa.types.is_list(t) or pa.types.is_large_list(t) or pa.types.is_fixed_size_list(t):
            count = 2 if pa.types.is_fixed_size_list(t) else data.draw(st.integers(0, 3))
            return [value(t.value_type) for _ in range(count)]
        if pa.types.is_struct(t):
            return {f.name: value(f.type) for f in t}
        text = data.draw(st.text(st.characters(codec="utf-8"), max_size=5))
        if "string" in str(t) or "binary" in str(t):
            return text if "string" in str(t) else text.encode()
        return None if pa.types.is_null(t) else len(text) > 2 if pa.types.is_boolean(t) else len(text)

    def cost(v: Any) -> int:
        own = len(v.encode()) if isinstance(v, str) else len(v) if isinstance(v, bytes) else 0
        inner = v.values() if isinstance(v, dict) else v if isinstance(v, list | tuple) else ()
        return (0 if isinstance(v, tuple) else 8) + own + sum(map(cost, inner))

    column = pa.array([value(kind) for _ in range(5)], kind).slice(data.draw(st.integers(0, 4)))
    assert tables._bytes(column) >= sum(map(cost, column.to_pylist()))


@pytest.mark.parametrize(
    "table",
    [
        pa.table({"input_ids": [[1]], "trained": [[True]]}),
        pa.table(
            {"input_ids": pa.array([[1, 2]], pa.list_(pa.int32())), "trained": pa.array([[True]], pa.list_(pa.bool_()))}
        ),
        pa.table(
            {
                "input_ids": pa.array([[1, None]], pa.list_(pa.int32())),
                "trained": pa.array([[True, True]], pa.list_(pa.bool_())),
            }
        ),
        pa.table({"other": ["x"]}),
    ],
)
def test_prepared_data_that_is_not_as_it_was_written_is_an_error(tmp_path: Path, table: pa.Table) -> None:
    path = tmp_path / "train.arrow"
    path.write_bytes(ipc(table.replace_schema_metadata({"kaito": "{}"})))
    with pytest.raises(Failure, match="the prepared data cannot be read"):
        PreparedFile(path)


def test_no_wrong_offset_of_prepared_data_is_followed(tmp_path: Path) -> None:
    path = tmp_path / "train.arrow"
    write_examples(path, [Example([1, 2, 3], [0, 1, 1]), Example([4, 5], [0, 1])], {})
    whole = path.read_bytes()
    offsets = array("i", [0, 3, 5]).tobytes()
    assert whole.count(offsets) == 2
    path.write_bytes(whole.replace(offsets, array("i", [0, 1 << 28, 5]).tobytes()))
    with pytest.raises(Failure, match="the prepared data cannot be read"):
        PreparedFile(path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "a," * (1 << 20), "a record of more than"),
        ("a.csv", "a\n" + '"' + ("x" * MIB + "\n") * 70, "a record of more than|larger than"),
        ("a.jsonl", '{"a": [' + "{}," * (5 << 20) + "{}]}", "lists and objects in one value"),
        ("a.jsonl", '{"a": "' + "x" * (70 * MIB) + '"}', "longer than"),
    ],
)
def test_one_huge_record_is_an_error(tmp_path: Path, name: str, content: str, words: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError, match=words):
        list(read_rows([path]))
