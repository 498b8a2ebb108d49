"""The controller's log: one JSON object a line on standard error, for machines that collect it.

Below warnings only what kaito and its plugins say is let through: HTTP libraries write out addresses with signatures in them
at ``info``, and whole answers, Secrets too, at ``debug``."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_ABOUT: ContextVar[Mapping[str, Any]] = ContextVar("about", default={})  # noqa: B039 – never written to


@contextmanager
def about(**fields: Any) -> Iterator[None]:
    """Every line of this thread carries these fields while the block runs: which object, which reconcile."""
    token = _ABOUT.set({**_ABOUT.get(), **fields})
    try:
        yield
    finally:
        _ABOUT.reset(token)


class JsonLines(logging.Formatter):
    """``ts``, ``level``, ``logger``, ``msg``, what the line is `about`, and whatever was given as ``extra``."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "ts": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "msg": record.getMessage(),
            **_ABOUT.get(),
        }
        line |= {k: v for k, v in vars(record).items() if k not in _OWN}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def _let_through(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or record.name.startswith("kaito")


def to_stderr(level: str) -> None:
    """Send everything from this level on there; a thread that dies says so there, too."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    handler.addFilter(_let_through)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # Its connection pool reports every retry as a warning; ours says the same with the object's name.
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    threading.excepthook = _died


def _died(died: threading.ExceptHookArgs) -> None:
    if died.exc_value is not None:
        name = died.thread.name if died.thread else "a thread"
        error = (died.exc_type, died.exc_value, died.exc_traceback)
        logging.getLogger("kaito_core.controller").error("the thread %s died", name, exc_info=error)
