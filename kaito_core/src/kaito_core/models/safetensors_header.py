"""The header of a safetensors file: names, types and shapes of its tensors, before the first byte of a weight.

A file begins with the header's length (8 bytes, little endian), then the header (JSON), then the tensors one behind the other.
The rules are those of the format's own reader (github.com/huggingface/safetensors, safetensors/src/tensor.rs): tensors cover the
rest of the file without a gap and without an overlap, and each is as long as its shape and type say.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

PREFIX = 8
"""Bytes before the header: its length."""

LARGEST = 16 << 20
"""Bytes of a header that are read at most. The format allows 100 MB; the largest published models have some ten thousand tensors
to a file, which is a few MiB."""

BITS: Mapping[str, int] = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64,
    "I64": 64, "U64": 64,
}  # fmt: skip
"""Size of one number of each type."""


class BadHeader(ValueError):
    """The bytes are not a safetensors header, or contradict themselves; the message says how."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numbers(self) -> int:
        """How many numbers are in it."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return self.numbers * BITS[self.dtype] // 8


@dataclass(frozen=True)
class Header:
    """What a file says that it holds."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(t.bytes for t in self.tensors.values())


def header_length(prefix: bytes, file_size: int | None = None) -> int:
    """Bytes of the header, from the first 8 of the file. `BadHeader` when they cannot be a length."""
    if len(prefix) < PREFIX:
        raise BadHeader(f"the file has only {len(prefix)} bytes")
    length = int.from_bytes(prefix[:PREFIX], "little")
    if length < 2:
        raise BadHeader("the header is empty")
    if file_size is not None and length > file_size - PREFIX:
        raise BadHeader(f"the header would be {length} bytes long, in a file of {file_size}")
    if length > LARGEST:
        raise BadHeader(f"the header would be {length} bytes long, and more than {LARGEST} are not read")
    return length


def parse(text: bytes, file_size: int | None = None) -> Header:
    """The header whose bytes (without the 8 before it) are ``text``. With ``file_size`` the tensors must fill the file exactly.

    Raises `BadHeader`."""
    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=_no_twice)
    except UnicodeDecodeError as e:
        raise BadHeader("the header is not UTF-8") from e
    except RecursionError as e:
        raise BadHeader("the header is nested too deeply") from e
    except BadHeader:
        raise
    except ValueError as e:
        raise BadHeader(f"the header is not JSON: {e}") from e
    if not isinstance(parsed, dict):
        raise BadHeader("the header is not a JSON object")
    metadata = parsed.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise BadHeader("__metadata__ is not a mapping of texts")
    tensors: dict[str, Tensor] = {}
    parts: list[tuple[int, int, str]] = []
    for name, about in parsed.items():
        tensor, start, end = _tensor(name, about)
        tensors[name] = tensor
        parts.append((start, end, name))
    last = 0
    for start, end, name in sorted(parts):
        if start != last:
            how = "overlaps the one before it" if start < last else "leaves a gap before it"
            raise BadHeader(f"the tensor {_shown(name)} {how}: it begins at byte {start}, not at {last}")
        last = end
    if file_size is not None and PREFIX + len(text) + last != file_size:
        raise BadHeader(
            f"the tensors end at byte {PREFIX + len(text) + last} of a file of {file_size}: it is cut off, or another file"
        )
    return Header(tensors, metadata)


def _tensor(name: str, about: Any) -> tuple[Tensor, int, int]:
    if not isinstance(about, dict) or set(about) != {"dtype", "shape", "data_offsets"}:
        raise BadHeader(f"the tensor {_shown(name)} needs dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = about["dtype"], about["shape"], about["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise BadHeader(f"the tensor {_shown(name)} has the unknown type {_shown(dtype)}")
    if not _naturals(shape):
        raise BadHeader(f"the tensor {_shown(name)} has no shape, but {_shown(shape)}")
    if not _naturals(offsets) or len(offsets) != 2:
        raise BadHeader(f"the tensor {_shown(name)} has no data_offsets, but {_shown(offsets)}")
    start, end = offsets
    bits = math.prod(shape) * BITS[dtype]
    if bits % 8 or start + bits // 8 != end:
        raise BadHeader(f"the tensor {_shown(name)} of {dtype} {shape} does not fill the bytes {start} to {end}")
    return Tensor(dtype, tuple(shape)), start, end


def _naturals(value: Any) -> bool:
    """Whether it is a list of whole numbers that a file could have; ``true`` is none."""
    return isinstance(value, list) and len(value) <= 16 and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _no_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise BadHeader(f"the name {_shown(key)} is there twice")
        found[key] = value
    return found


def _shown(value: Any) -> str:
    """Foreign text in a message: short, in one line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def all_tensors(headers: Iterator[Header] | tuple[Header, ...]) -> dict[str, Tensor]:
    """The tensors of all files of a model by name. `BadHeader` when two files have one name."""
    found: dict[str, Tensor] = {}
    for header in headers:
        twice = found.keys() & header.tensors.keys()
        if twice:
            raise BadHeader(f"two files have the tensor {_shown(min(twice))}")
        found.update(header.tensors)
    return found
