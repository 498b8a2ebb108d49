"""How a plugin's code is called: in a thread of its own, for a limited time, and with nothing that it may do to who calls.

A plugin can hang, call ``sys.exit``, raise ``KeyboardInterrupt``, or print into the JSON that a command writes. Here all of
that ends as a `Broke`, and what it prints becomes lines of the log that say whose they are. A real Ctrl-C reaches the main
thread, which waits here, and passes.

What this cannot stop: ``os._exit``, a crash of the interpreter, and C code that never lets other threads run.
"""

from __future__ import annotations

import contextvars
import io
import queue
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

T = TypeVar("T")

HOOK_SECONDS = 10.0
"""For importing a plugin, for a hook, and for a method of a tuner or a runtime, all of which are light."""

PROVISIONER_SECONDS = 60.0
"""For a method of a node provisioner, which may ask a cloud. None of them waits for machines."""

MOST = 100_000
"""Items that a plugin may yield in one go. More is a generator without an end."""

LINES = 20
"""Lines of one call that are logged when a plugin prints; what follows is dropped."""


class Hangs(TimeoutError):
    """A call did not return in time, or was not made because one before it has not returned."""


class Broke(Exception):
    """A call failed: ``error`` is what it raised, or `Hangs`; ``trace`` is for the plugin's author."""

    def __init__(self, error: BaseException, trace: str) -> None:
        super().__init__(type(error).__name__)
        self.error = error
        self.trace = trace


class Calls:
    """The calls of one plugin. ``who`` is how the log calls it."""

    def __init__(self, who: str) -> None:
        self._who = who
        self._hanging: dict[str, tuple[_Call[Any], ...]] = {}

    def run(self, what: str, function: Callable[[], T], seconds: float, line: str = "") -> T:
        """What ``function`` returns; raises `Broke` for whatever goes wrong.

        A thread cannot be ended from outside, so one that takes longer is left to itself, and nothing more is asked of the plugin
        while it goes on: threads would pile up. Calls on different ``line`` do not wait for each other."""
        hanging = next((c for c in self._hanging.get(line, ()) if not c.ended.is_set()), None)
        if hanging is not None:
            raise Broke(Hangs(f"{what} is not asked while {hanging.what} has not returned"), hanging.stack())
        call = _Call(self, what, function, _Said(self._who))
        if call.within_itself():
            raise Broke(RecursionError(f"{what} asks for itself"), "")
        returned = False
        with _sorted(call):
            worker = _IDLE.pop() if _IDLE else _Worker()
            call.worker = worker
            worker.todo.put(call)
            try:
                returned = call.ended.wait(seconds)
            finally:  # Ctrl-C too
                call.abandoned = not returned
        if not returned:
            # As many as there are threads that asked before the first of them had waited long enough.
            with _LOCK:
                self._hanging[line] = (*(c for c in self._hanging.get(line, ()) if not c.ended.is_set()), call)
            raise Broke(Hangs(f"{what} did not return within {seconds:g} seconds"), call.stack())
        _IDLE.append(worker)
        if call.error is not None:
            raise Broke(call.error, _trace(call.error))
        return call.result


def collected(items: Iterable[T], what: str) -> list[T]:
    """All of them. TypeError when it is not iterable, OverflowError when there is no end of them."""
    found: list[T] = []
    for item in items:
        found.append(item)
        if len(found) > MOST:
            raise OverflowError(f"{what} gave more than {MOST} of them")
    return found


def words(error: BaseException) -> str:
    """``ValueError: what it says``, on one line that can be printed. Never raises, whatever the exception's own methods do."""
    name = type(error).__name__
    try:
        said = " ".join("".join(c if c.isprintable() else " " for c in str(error)[:2000]).split())
    except BaseException:
        return name
    return f"{name}: {said[:500]}" if said else name


def _trace(error: BaseException) -> str:
    import traceback

    return "".join(traceback.format_exception(error))


class _Call(Generic[T]):
    """One call. It carries the log's context of the thread that asks."""

    result: T
    worker: _Worker

    def __init__(self, calls: Calls, what: str, function: Callable[[], T], said: _Said) -> None:
        self.calls = calls
        self.what = what
        self.said = said
        self.ended = threading.Event()
        self.error: BaseException | None = None
        self.abandoned = False
        self._function = function
        self._context = contextvars.copy_context()
        self._asking = _current()

    def go(self) -> None:
        try:
            self.result = self._context.run(self._function)
        except BaseException as e:
            self.error = e
        finally:
            self.said.close()
            self.ended.set()

    def within_itself(self) -> bool:
        """Whether the same question is being asked already by who asks: without this, threads would have no end."""
        asking = self._asking
        while asking is not None:
            if (asking.calls, asking.what) == (self.calls, self.what):
                return True
            asking = asking._asking
        return False

    def stack(self) -> str:
        """Where it is now, as a traceback."""
        import traceback

        frame = sys._current_frames().get(self.worker.ident or -1)
        return "".join(traceback.format_stack(frame)) if frame else ""


class _Worker(threading.Thread):
    """Makes one call after the other, and ends with one that took too long. Starting a thread for each would take longer than most
    calls do."""

    def __init__(self) -> None:
        super().__init__(name="plugins", daemon=True)
        self.todo: queue.SimpleQueue[_Call[Any]] = queue.SimpleQueue()
        self.call: _Call[Any] | None = None
        self.start()

    def run(self) -> None:
        while True:
            self.call = call = self.todo.get()
            call.go()
            if call.abandoned:
                return


_IDLE: list[_Worker] = []


def _current() -> _Call[Any] | None:
    """The call that this thread makes."""
    thread = threading.current_thread()
    return thread.call if isinstance(thread, _Worker) else None


# --- what a plugin prints


class _Said(io.TextIOBase):
    """Makes lines of the log out of what is printed. Standard output belongs to the command, which may write JSON there."""

    def __init__(self, who: str) -> None:
        self._who = who
        self._text = ""
        self._lines = 0

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._text += text
        *lines, self._text = self._text.split("\n")
        for line in lines:
            self._say(line)
        return len(text)

    def close(self) -> None:
        self._say(self._text)
        self._text = ""

    def _say(self, line: str) -> None:
        if line.strip() and self._lines < LINES:
            import logging

            self._lines += 1
            logging.getLogger("kaito_core.plugins").warning("warning: %s prints: %s", self._who, line)


class _Sorted:
    """Standard output while plugins are called: theirs is logged, everybody else's goes where it went."""

    def __init__(self, real: Any) -> None:
        self.real = real

    def __getattr__(self, name: str) -> Any:
        call = _current()
        if call is None:
            return getattr(self.real, name)
        # Nobody listens to an abandoned call, and a thread that writes while the program ends can bring it down.
        if call.abandoned:
            raise SystemExit
        return getattr(call.said, name)


_LOCK = threading.Lock()
_GOING_ON: set[_Call[Any]] = set()


@contextmanager
def _sorted(call: _Call[Any]) -> Iterator[None]:
    with _LOCK:
        _GOING_ON.add(call)
        if sys.stdout is not None and not isinstance(sys.stdout, _Sorted):
            sys.stdout = _Sorted(sys.stdout)
    try:
        yield
    finally:
        with _LOCK:
            _GOING_ON.difference_update([c for c in _GOING_ON if c.ended.is_set()])
            if not _GOING_ON and isinstance(sys.stdout, _Sorted):
                sys.stdout = sys.stdout.real
