"""Work on files that strangers wrote, in a process of its own with limits on memory and time.

Parsing takes many times the memory of the text: 30 MB of nested brackets become 3 GB of lists, and the process that holds them is
killed by its container's limit, with everything else that it was doing. So what is large is parsed in a child:

    run("kaito_core.models.description:model", {"folder": "/tmp/…"}, large=True)

The child is spawned, not forked (this process has threads), and one at a time, so that its limit and this process together stay
below the container's. Its answer is JSON, never a pickle. On macOS the kernel keeps no limit on memory: there the bounds on bytes
and depth of what reads the files are all there is.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any, Final, NoReturn


@dataclass(frozen=True)
class Limits:
    """What a child may take."""

    memory_bytes: int = 224 << 20
    """Of its own data (RLIMIT_DATA). With the libraries it takes some 20 MB more. The controller begins with 65 MB, and the chart
    gives both 512 Mi."""
    cpu_seconds: int = 10
    """Of computing; what fits the memory takes two or three."""
    wall_seconds: int = 60
    """Of waiting, for a machine that is busy with something else."""
    answer_bytes: int = 4 << 20
    """Of the answer: a caller wants a few numbers and texts."""


MODEL_FILES: Final = Limits()
"""For the files of one model."""

_TOO_MUCH_MEMORY: Final = 78
_TOO_LONG_AN_ANSWER: Final = 79
_NOTE: Final = "kaito-limited: "

_one_at_a_time = threading.Lock()


class Exceeded(Exception):
    """The work needs more than it may have, or ended the process that did it; the message says which bound, and at which file."""


def run(function: str, argument: dict[str, Any], *, large: bool, limits: Limits = MODEL_FILES) -> Any:
    """What ``module:function`` makes of ``argument``; both are JSON-able. It is called here when its input is small, and in a
    child with limits when it is ``large``. Raises `Exceeded`, and `RuntimeError` when the function itself is broken."""
    if not large:
        return _function(function)(argument)
    import subprocess  # not needed where nothing large is read

    with _one_at_a_time:
        # -P: the folder that the user is in may hold a stranger's json.py.
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "kaito_core.limited", function],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            answer, said = child.communicate(json.dumps([argument, asdict(limits)]).encode(), limits.wall_seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            _, said = child.communicate()
            raise Exceeded(_at(said, f"takes more than {limits.wall_seconds} s")) from None
        except BaseException:  # Ctrl-C: nothing goes on behind the user's back
            child.kill()
            child.wait()
            raise
    if child.returncode:
        raise _ended(child.returncode, said, limits)
    return json.loads(answer)


def working_on(what: str) -> None:
    """Note what is being read, so that an `Exceeded` can name it. Does nothing outside of a child."""
    if _in_child:
        sys.stderr.write(f"{_NOTE}{what}\n")
        sys.stderr.flush()


def _ended(code: int, said: bytes, limits: Limits) -> Exception:
    if code == _TOO_MUCH_MEMORY or -code == signal.SIGKILL:
        return Exceeded(_at(said, f"takes more than {limits.memory_bytes >> 20} MiB of memory"))
    if -code in (getattr(signal, "SIGXCPU", None), getattr(signal, "SIGALRM", None)):
        return Exceeded(_at(said, f"takes more than {limits.cpu_seconds} s of computing"))
    if code == _TOO_LONG_AN_ANSWER:
        return Exceeded(_at(said, f"gives a description of more than {limits.answer_bytes >> 20} MiB"))
    if code < 0:
        return Exceeded(_at(said, f"ended its process ({signal.Signals(-code).name})"))
    last = said.decode("utf-8", "replace").strip().rpartition("\n")[2]
    return RuntimeError(f"the process that reads files has failed: {last:.300}")


def _at(said: bytes, words: str) -> str:
    notes = [line for line in said.decode("utf-8", "replace").splitlines() if line.startswith(_NOTE)]
    return f"reading {notes[-1].removeprefix(_NOTE) if notes else 'it'} {words}"


def _function(name: str) -> Callable[[dict[str, Any]], Any]:
    module, _, attribute = name.partition(":")
    found: Callable[[dict[str, Any]], Any] = getattr(import_module(module), attribute)
    return found


# --- in the child

_in_child = False


def _limit(limits: Limits) -> None:
    """From here on. `RLIMIT_DATA` counts what is written to and not what is mapped: libraries and files cost nothing."""
    if sys.platform != "linux":
        return
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (limits.memory_bytes, limits.memory_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (limits.cpu_seconds, limits.cpu_seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(limits.wall_seconds + 1)  # in case the parent is gone


def _main(name: str) -> NoReturn:
    try:
        work = _function(name)
        argument, given = json.loads(sys.stdin.buffer.read())
        limits = Limits(**given)
        _limit(limits)
        answer = json.dumps(work(argument)).encode()
        code = _TOO_LONG_AN_ANSWER if len(answer) > limits.answer_bytes else 0
        if not code:
            sys.stdout.buffer.write(answer)
            sys.stdout.buffer.flush()
    except MemoryError:
        code = _TOO_MUCH_MEMORY
    with suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(code)  # freeing a million objects one by one takes seconds


if __name__ == "__main__":
    from kaito_core import limited  # this module under its name, which the work imports too

    limited._in_child = True
    limited._main(sys.argv[1])
