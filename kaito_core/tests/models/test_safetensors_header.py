"""The header of a safetensors file: what it says is exact, and whatever is wrong with it is refused in words."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaito_core.models.safetensors_header import (
    LARGEST,
    PREFIX,
    BadHeader,
    Header,
    Tensor,
    all_tensors,
    header_length,
    parse,
)


def header(**tensors: Any) -> bytes:
    return json.dumps(tensors).encode()


def tensor(dtype: str, shape: list[Any], start: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


ONE = tensor("BF16", [2, 3], 0, 12)


def test_names_types_shapes_and_sizes() -> None:
    text = header(__metadata__={"format": "pt"}, a=ONE, b=tensor("F32", [], 12, 16), empty=tensor("I64", [0], 12, 12))
    found = parse(text, PREFIX + len(text) + 16)
    assert found.tensors["a"] == Tensor("BF16", (2, 3))
    assert (found.tensors["a"].numbers, found.tensors["a"].bytes, found.tensors["b"].bytes) == (6, 12, 4)
    assert found.bytes == 16
    assert found.metadata == {"format": "pt"}


def test_numbers_smaller_than_a_byte() -> None:
    assert parse(header(a=tensor("F4", [4], 0, 2))).tensors["a"].bytes == 2


def test_it_reads_what_the_formats_own_library_writes() -> None:
    pytest.importorskip("safetensors")
    numpy = pytest.importorskip("numpy")
    from safetensors.numpy import save

    data = save({"a": numpy.zeros((2, 3), "float16"), "b": numpy.ones(5, "int64")}, {"format": "pt"})
    length = header_length(data[:PREFIX], len(data))
    found = parse(data[PREFIX : PREFIX + length], len(data))
    assert found.tensors == {"a": Tensor("F16", (2, 3)), "b": Tensor("I64", (5,))}


@pytest.mark.parametrize(
    ("prefix", "size", "says"),
    [
        (b"\x02\0\0", None, "only 3 bytes"),
        (bytes(8), 100, "the header is empty"),
        (b"\xff" * 8, 100, "in a file of 100"),
        (b"\xff" * 8, None, "more than"),
        ((LARGEST + 1).to_bytes(8, "little"), LARGEST * 2, "more than"),
        ((93).to_bytes(8, "little"), 100, "in a file of 100"),
    ],
)
def test_a_length_that_cannot_be_is_refused_before_anything_is_read(prefix: bytes, size: int | None, says: str) -> None:
    with pytest.raises(BadHeader, match=says):
        header_length(prefix, size)


BAD = {
    "not UTF-8": (b'{"\xff": 1}', "not UTF-8"),
    "not JSON": (b"{", "not JSON"),
    "not an object": (b"[1]", "not a JSON object"),
    "nested": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
    "a digit too many": (b'{"a": ' + b"1" * 5000 + b"}", "not JSON"),
    "twice": (b'{"a": 1, "a": 2}', "'a' is there twice"),
    "twice inside": (b'{"a": {"dtype": "F32", "dtype": "F16"}}', "'dtype' is there twice"),
    "no tensor": (header(a=3), "needs dtype, shape and data_offsets"),
    "one field too many": (header(a={**ONE, "url": "x"}), "and nothing else"),
    "unknown type": (header(a=tensor("F99", [1], 0, 4)), "unknown type 'F99'"),
    "type is a list": (header(a={**ONE, "dtype": ["F32"]}), "unknown type"),
    "negative shape": (header(a=tensor("F32", [-1], 0, 4)), "has no shape"),
    "true is no number": (header(a=tensor("F32", [True], 0, 4)), "has no shape"),
    "fraction": (header(a=tensor("F32", [1.0], 0, 4)), "has no shape"),
    "huge shape": (header(a=tensor("F32", [2**62, 2**62], 0, 4)), "does not fill"),
    "larger than any file": (header(a=tensor("F32", [2**70], 0, 4)), "has no shape"),
    "wrong size": (header(a=tensor("F32", [2], 0, 4)), "does not fill the bytes 0 to 4"),
    "half a byte": (header(a=tensor("F4", [3], 0, 1)), "does not fill"),
    "backwards": (header(a=tensor("F32", [1], 4, 0)), "does not fill"),
    "three offsets": (header(a={**ONE, "data_offsets": [0, 12, 24]}), "has no data_offsets"),
    "overlap": (header(a=ONE, b=tensor("BF16", [6], 4, 16)), "'b' overlaps"),
    "the same bytes": (header(a=ONE, b=ONE), "overlaps"),
    "gap": (header(a=ONE, b=tensor("BF16", [1], 14, 16)), "'b' leaves a gap"),
    "metadata is no mapping": (header(__metadata__=[1], a=ONE), "__metadata__"),
    "metadata is no text": (header(__metadata__={"a": 1}), "__metadata__"),
}


@pytest.mark.parametrize(("text", "says"), BAD.values(), ids=BAD)
def test_a_header_that_contradicts_itself_is_refused(text: bytes, says: str) -> None:
    with pytest.raises(BadHeader, match=says) as e:
        parse(text)
    assert len(str(e.value)) < 400


@pytest.mark.parametrize("size", [19, 21, 1 << 40])
def test_tensors_end_where_the_file_ends(size: int) -> None:
    text = header(a=ONE)
    with pytest.raises(BadHeader, match="cut off, or another file"):
        parse(text, PREFIX + len(text) + size)


def test_two_files_with_one_tensor_are_refused() -> None:
    one = Header({"a": Tensor("F32", (1,))})
    with pytest.raises(BadHeader, match="two files have the tensor 'a'"):
        all_tensors((one, one))


@given(st.binary(max_size=400))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with suppress(BadHeader):
        length = header_length(data[:PREFIX], len(data))
        parse(data[PREFIX : PREFIX + length], len(data))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
NEARLY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F4", "U8"]) | JSON,
        "shape": st.lists(st.integers(-2, 2**64), max_size=4) | JSON,
        "data_offsets": st.lists(st.integers(-2, 2**64), min_size=2, max_size=2) | JSON,
    }
)


@given(st.dictionaries(st.text(max_size=6), NEARLY | JSON, max_size=4))
def test_any_json_is_read_or_refused(value: Any) -> None:
    with suppress(BadHeader):
        parse(json.dumps(value).encode())


@given(st.lists(st.tuples(st.sampled_from(["F32", "BF16", "U8"]), st.lists(st.integers(0, 5), max_size=3)), max_size=6))
def test_what_is_well_made_is_read_exactly(parts: list[tuple[str, list[int]]]) -> None:
    made: dict[str, Any] = {}
    at = 0
    for number, (dtype, shape) in enumerate(parts):
        size = Tensor(dtype, tuple(shape)).bytes
        made[f"t{number}"] = tensor(dtype, shape, at, at + size)
        at += size
    text = header(**made)
    found = parse(text, PREFIX + len(text) + at)
    assert found.bytes == at
    assert list(found.tensors.values()) == [Tensor(d, tuple(s)) for d, s in parts]
