"""Rows from files of every kind, and clear words for what is no data."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaito_core.data.bounds import LONGEST_ROW
from kaito_core.data.json_rows import json_values
from kaito_core.data.rows import data_files, file_kind, read_rows
from kaito_core.problems import KaitoError, UserError

ROWS = [{"prompt": f"é {i}", "completion": "x" * i} for i in range(3)]


def parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def arrow(rows: list[dict[str, Any]], *, stream: bool) -> bytes:
    import pyarrow as pa

    table, sink = pa.Table.from_pylist(rows), io.BytesIO()
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


LINES = "".join(json.dumps(r) + "\n" for r in ROWS).encode()
FILES = {
    "a.parquet": parquet(ROWS),
    "b.arrow": arrow(ROWS, stream=False),
    "c.arrow": arrow(ROWS, stream=True),
    "d.json": json.dumps(ROWS, indent=1).encode(),
    "e.json": json.dumps({"version": 1, "data": ROWS}).encode(),
    "f.json": json.dumps({k: [r[k] for r in ROWS] for k in ROWS[0]}).encode(),
    "g.json": LINES,
    "h.jsonl": b"\xef\xbb\xbf" + LINES + b"\n\n",
    "i.ndjson": LINES.rstrip(),
    "j.csv": "prompt,completion\r\né 0,\r\né 1,x\r\n\"é 2\",xx\r\n".encode(),
    "k.tsv": "prompt\tcompletion\né 0\t\né 1\tx\né 2\txx\n".encode(),
    "l.jsonl.gz": gzip.compress(LINES),
    "m.csv.gz": gzip.compress("prompt,completion\né 0,\né 1,x\né 2,xx\n".encode()),
    "n": LINES,
    "o.bin": parquet(ROWS),
    "my.parquet.jsonl": LINES,
    "packed.jsonl": gzip.compress(LINES),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_every_kind_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    """KAITO picks the kind by a piece of the name (defect 14): `my.parquet.jsonl` is JSON lines, and `o.bin` is parquet."""
    (tmp_path / name).write_bytes(FILES[name])
    rows = list(read_rows([tmp_path / name]))
    assert [r.values for r in rows] == ROWS
    assert [r.number for r in rows] == [1, 2, 3]


def test_text_is_a_row_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\r\n")
    assert [(r.number, r.values) for r in read_rows([tmp_path / "a.txt"])] == [
        (1, {"text": "one"}),
        (3, {"text": "two"}),
    ]


def test_all_files_of_a_folder_count_in_sorted_order(tmp_path: Path) -> None:
    """KAITO reads the first file that it meets and leaves the others out (defect 14)."""
    for name in ("b.jsonl", "a/z.csv", ".cache/x.jsonl", "README.md", "dataset_info.json", "c.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(
            FILES["a.parquet"] if name == "c.parquet" else FILES["j.csv"] if "z" in name else LINES
        )
    assert [r.file for r in read_rows(data_files(tmp_path))] == ["z.csv"] * 3 + ["b.jsonl"] * 3 + ["c.parquet"] * 3
    with pytest.raises(UserError, match="no data"):
        data_files(tmp_path / ".cache" / "none")


def zipped() -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as z:
        z.writestr("a.jsonl", LINES)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl.zip", zipped(), "zip archive"),
        ("a.json", zipped(), "zip archive"),
        ("a.parquet", LINES, "the name says parquet"),
        ("a.parquet", FILES["a.parquet"][:-100], "row 1"),
        ("a.jsonl", b"", "empty"),
        ("a.jsonl", b" \n", "empty"),
        ("a.json", b"[]", "no row"),
        ("a.jsonl", LINES + b"{'x': 1}\n", "row 4: not JSON"),
        ("a.jsonl", LINES + b"[1]\n", "row 4: a row is an object"),
        ("a.jsonl", b'{"x": NaN}', "NaN is not JSON"),
        ("a.json", b'[{"x": 1}, {"x"', "row 2"),
        ("a.json", b'[{"x": 1}', "ends in the middle"),
        ("a.json", b"[" * 100_000, "row 1"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", "3 fields where the first line names 2"),
        ("a.csv", b"a,a\n1,2\n", "twice"),
        ("a.jsonl", '{"x": "é"}'.encode("latin-1"), "not UTF-8"),
        ("a.jsonl", '{"x": 1}'.encode("utf-16"), "UTF-16"),
        ("a.jsonl.gz", gzip.compress(LINES * 1000)[:100], "not a whole gzip file"),
        (
            "a.jsonl.gz",
            gzip.compress("".join(f'{{"x": {i}}}\n' for i in range(9000)).encode())[:15000],
            "row [0-9]{3}",
        ),
        ("a.tar.gz", gzip.compress(b"\0" * 257 + b"ustar\0"), "tar archive"),
        ("a.dat", b"\x80\x04\x95", "pickle"),
        ("a.dat", b"what is this", "cannot tell"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_what_cannot_be_read_names_file_and_row(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as e:
        list(read_rows([tmp_path / name]))
    assert e.value.problems[0].file == name
    assert e.value.problems[0].remedy


def test_a_gzip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b" " * (100 << 20)))
    with pytest.raises(UserError, match="times its size|longer than|empty"):
        list(read_rows([tmp_path / "a.jsonl.gz"]))


@given(st.lists(st.recursive(st.none() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False),
                             lambda x: st.lists(x) | st.dictionaries(st.text(), x), max_leaves=5)), st.integers(1, 7))  # fmt: skip
def test_streamed_json_is_what_the_standard_parser_reads(values: list[Any], step: int) -> None:
    class Slow(io.StringIO):
        def read(self, size: int | None = -1) -> str:
            return super().read(step)

    assert list(json_values(Slow(json.dumps(values)), LONGEST_ROW)) == values
    if values and not isinstance(values[0], list):
        assert list(json_values(Slow("\n".join(json.dumps(v) for v in values)), LONGEST_ROW)) == values


@given(
    st.binary(max_size=300),
    st.sampled_from(["a.json", "a.jsonl", "a.csv", "a.parquet", "a.arrow", "a.gz", "a.txt", "a"]),
)
def test_any_bytes_are_rows_or_a_user_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, name: str
) -> None:
    path = tmp_path_factory.getbasetemp() / name
    for prefix in (b"", b"PAR1", b"ARROW1\0\0", b"\xff\xff\xff\xff", b"\x1f\x8b\x08"):
        path.write_bytes(prefix + content)
        with suppress(KaitoError):
            list(read_rows([path]))


def test_the_kind_needs_no_more_than_the_beginning(tmp_path: Path) -> None:
    (tmp_path / "A.JSONL.GZ").write_bytes(FILES["l.jsonl.gz"])
    assert file_kind(tmp_path / "A.JSONL.GZ") == "jsonl"
