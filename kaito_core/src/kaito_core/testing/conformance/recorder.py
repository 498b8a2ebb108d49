"""pytest on the files of ``kaito plugins check``, writing down what becomes of each test: one JSON object a line."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from kaito_core.testing.conformance import base, pytest_plugin

LONGEST = 2000
"""Characters of a reason that are kept."""

BASE_TESTS = frozenset(n for n in vars(base.Kit) if n.startswith("test_"))


class Recorder:
    """Appends to ``lines``; each line is there before the next test begins."""

    def __init__(self, lines: Path) -> None:
        self._lines = lines
        self._about: dict[str, dict[str, Any]] = {}
        self._seconds = 0.0
        self._said: tuple[str, str] = ("ok", "")

    def write(self, **event: Any) -> None:
        with self._lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """What is said of the module as a whole is asked once, and not again by the class of each kind."""
        items[:] = [i for i in items if getattr(i, "originalname", "") not in BASE_TESTS or _kind(i) is None]
        self._about = {i.nodeid: _about(i) for i in items}

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            number = re.search(r"test_(\d+)\.py", report.nodeid)
            about = {"number": int(number[1]) if number else 0, "kind": "plugin", "name": "", "check": "it loads"}
            self.write(event="done", outcome="failed", reason=_short(str(report.longrepr)), seconds=0.0, **about)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._seconds, self._said = 0.0, ("ok", "")
        self.write(event="started", **self._about[nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds += report.duration
        if report.failed:
            self._said = ("failed", _short(_failure(report)))
        elif report.skipped and self._said[0] == "ok":
            self._said = ("skipped", _short(_reason(report)))

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        outcome, reason = self._said
        self.write(event="done", outcome=outcome, reason=reason, seconds=self._seconds, **self._about[nodeid])

    def pytest_sessionfinish(self) -> None:
        self.write(event="ended")


def _kind(item: pytest.Item) -> Any:
    return getattr(getattr(item, "cls", None), "kind", None)


def _about(item: pytest.Item) -> dict[str, Any]:
    """Whose test it is, and which."""
    kind, parameters = _kind(item), dict(getattr(getattr(item, "callspec", None), "params", {}))
    name = str(parameters.pop("record", ""))
    check = getattr(item, "originalname", item.name).removeprefix("test_").replace("_", " ")
    if parameters:
        check += f" [{', '.join(map(str, parameters.values()))}]"
    number = re.search(r"test_(\d+)\.py", item.nodeid)
    return {
        "number": int(number[1]) if number else 0,
        "kind": kind.noun if kind else "plugin",
        "name": name,
        "check": check,
    }


def _failure(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    words = crash.message if crash is not None else str(report.longrepr)
    return re.sub(r"^(AssertionError|Failed): ", "", words)


def _reason(report: pytest.TestReport) -> str:
    said = report.longrepr
    words = said[2] if isinstance(said, tuple) else str(getattr(report, "wasxfail", said))
    return words.removeprefix("Skipped: ")


def _short(text: str) -> str:
    text = text.strip()
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def main(lines: str, folder: str, slow: str = "") -> int:
    """Run the files of ``folder``."""
    chosen = [] if slow else ["-m", "not slow"]
    return int(
        pytest.main(
            [
                "-q",
                "-c",
                os.devnull,
                "--rootdir",
                folder,
                "-p",
                "no:cacheprovider",
                "--import-mode=importlib",
                *chosen,
                folder,
            ],
            plugins=[pytest_plugin, Recorder(Path(lines))],
        )
    )


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
