"""How much of a file that a stranger wrote is unpacked and held. Beyond these it is no data but a broken or a hostile file."""

from __future__ import annotations

from pathlib import Path

LONGEST_ROW = 64 << 20
"""Bytes of one line, one JSON value, one CSV record or one row of a table."""
MOST_CONTAINERS = 4_000_000
"""Lists and objects in one JSON value: each costs some hundred bytes of memory, whatever it holds."""
MOST_CELLS = 1_000_000
"""Fields of one CSV record."""
DEEPEST_TYPE = 64
"""Levels of lists and structs in the type of a column; Arrow's own limit for what it reads."""
INFLATION = 200
"""How many times its size a file may unpack to, beyond `SMALL_BYTES`: text shrinks 3- to 20-fold, a bomb 1000-fold and more."""
SMALL_BYTES = 64 << 20
"""What any file may unpack to."""
VALUE_BYTES = 8
"""What a value of a table counts at least, null or not: in Python each has a place in a list."""
CHILD_BYTES = 768 << 20
"""Memory of the process that reads a table first: the interpreter and Arrow take 120 MiB, a batch of honest rows at most as much again."""


def most_unpacked(path: Path) -> int:
    """Bytes that the file at ``path`` may unpack to."""
    return path.stat().st_size * INFLATION + SMALL_BYTES
