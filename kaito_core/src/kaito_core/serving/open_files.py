"""How many files, and so how many connections, a process that serves may have open."""

from __future__ import annotations

from contextlib import suppress
from typing import Final

FILES: Final = 65536
"""At least so many where the system allows it: a connection needs one, a request that is handed on two."""


def allow_many() -> None:
    """Raise the process's own limit, as programs in Go do: it is 1,024 on many systems, for select()'s sake."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = FILES if hard == resource.RLIM_INFINITY else min(hard, FILES)
        if soft != resource.RLIM_INFINITY and soft < most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
