"""The kit without a test file, for ``kaito plugins check``: which modules are meant, the run in a process of its own, and its report.

The process is another one because what is tested may hang, exit or crash. pytest runs there with nobody else's plugins.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from kaito_core.plugins.discovery import EntryPoint, entry_points
from kaito_core.plugins.known import canonical
from kaito_core.problems import Failure, UserError

Outcome = Literal["ok", "failed", "skipped"]

NEEDED: Final = ("pytest", "hypothesis")
EXTRA: Final = "pip install 'kaito-core[test]'"

PATIENCE: Final = 120.0
"""Seconds that one test may take before it counts as one that hangs."""
SLOW_PATIENCE: Final = 900.0
"""The same where a model is trained or served."""

_GROUP: Final = "kaito"


@dataclass(frozen=True)
class Target:
    """A plugin module that is checked."""

    module: str
    plugin: str = ""
    """The entry point's name; empty when no installed distribution has one for it."""
    distribution: str = ""
    version: str = ""


@dataclass(frozen=True)
class Check:
    """What became of one standard test."""

    module: str
    kind: str
    """``preset``, ``tuning method`` …; ``plugin`` for what is said of the module as a whole."""
    name: str
    """Of the preset, the method …; empty for the module."""
    check: str
    """The test's name without ``test_``, and its own parameter in brackets."""
    outcome: Outcome
    reason: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Report:
    """All checks of one call."""

    targets: tuple[Target, ...]
    checks: tuple[Check, ...] = field(default_factory=tuple)

    def count(self, outcome: Outcome) -> int:
        return sum(c.outcome == outcome for c in self.checks)

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not self.count("failed")

    def objects(self) -> dict[tuple[str, str, str], list[Check]]:
        """The checks by (module, kind, name), the module itself first."""
        found: dict[tuple[str, str, str], list[Check]] = {}
        for check in sorted(self.checks, key=lambda c: (c.module, c.kind != "plugin", c.kind, c.name)):
            found.setdefault((check.module, check.kind, check.name), []).append(check)
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain data, for ``--json``."""
        return {
            "plugins": [asdict(t) for t in self.targets],
            "objects": [
                {"module": module, "kind": kind, "name": name, "checks": [_check_json(c) for c in checks]}
                for (module, kind, name), checks in self.objects().items()
            ],
            "ok": self.count("ok"),
            "failed": self.count("failed"),
            "skipped": self.count("skipped"),
            "passed": self.passed,
        }


def _check_json(check: Check) -> dict[str, Any]:
    said = {"check": check.check, "outcome": check.outcome, "reason": check.reason, "seconds": round(check.seconds, 2)}
    return {k: v for k, v in said.items() if v not in ("",)}


def ready() -> None:
    """Raises `UserError` where the kit itself cannot run."""
    missing = [m for m in NEEDED if importlib.util.find_spec(m) is None]
    if missing:
        raise UserError(
            f"checking a plugin needs {' and '.join(missing)}, which is not installed", f"you need `{EXTRA}`"
        )


def targets(named: str) -> tuple[Target, ...]:
    """The plugin modules of a distribution, of an entry point's name, or one module. Raises `UserError` when there are none."""
    points = entry_points(_GROUP, sys.path)
    for same in (
        [e for e in points if canonical(e.distribution) == canonical(named)],
        [e for e in points if e.name == named],
        [e for e in points if e.module == named],
    ):
        if same:
            return tuple(_target(e) for e in same)
    if not _version(named) and _importable(named):
        return (Target(named),)
    raise UserError(_unknown(named), _remedy(named, points))


def _target(point: EntryPoint) -> Target:
    return Target(point.module, point.name, point.distribution, point.version)


def _importable(module: str) -> bool:
    """Whether there is such a module; its parents are imported to find out, the module is not."""
    if not all(part.isidentifier() for part in module.split(".")):
        return False
    try:
        return importlib.util.find_spec(module) is not None
    except Exception:  # a parent that breaks on import is not one that can be checked
        return False


def _version(distribution: str) -> str:
    """Empty when no such distribution is installed."""
    import importlib.metadata

    try:
        return importlib.metadata.version(distribution)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return ""


def _unknown(named: str) -> str:
    version = _version(named)
    if version:
        return f"{named} {version} is installed, and has no plugin: no entry point in the group {_GROUP!r}"
    return f"there is no installed distribution, plugin or module {named!r:.100}"


def _remedy(named: str, points: Sequence[EntryPoint]) -> str:
    import difflib

    there = sorted({n for e in points for n in (e.distribution, e.name)})
    close = difflib.get_close_matches(named, there, n=1)
    return f"did you mean {close[0]}?" if close else f"there is {', '.join(there)}; or give a module: my_plugin.plugin"


def run(wanted: Sequence[Target], *, slow: bool = False) -> Report:
    """Run the kit on these modules. Raises `Failure` when not even pytest could be started."""
    with tempfile.TemporaryDirectory(prefix="kaito-check-") as place:
        folder = Path(place)
        for number, target in enumerate(wanted):
            (folder / f"test_{number}.py").write_text(
                "from kaito_core.testing.conformance.classes import classes_of\n\n"
                f"globals().update(classes_of({target.module!r}))\n",
                encoding="utf-8",
            )
        lines = folder / "report.jsonl"
        with (folder / "output").open("wb") as output:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "kaito_core.testing.conformance.recorder",
                    str(lines),
                    str(folder),
                    "slow" if slow else "",
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_environment(),
                cwd=folder,
            )
            hangs = _wait(process, lines, SLOW_PATIENCE if slow else PATIENCE)
        said = (folder / "output").read_text("utf-8", "replace").strip().splitlines()
        return Report(tuple(wanted), tuple(_checks(wanted, list(_read(lines)), process.returncode, hangs, said)))


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_ADDOPTS": "",
        "PYTHONPATH": os.pathsep.join(str(Path(p or ".").resolve()) for p in sys.path),
    }


def _wait(process: subprocess.Popen[bytes], lines: Path, patience: float) -> bool:
    """Until the process has ended, or was ended because nothing happened for so many seconds; then True."""
    size, since = -1, time.monotonic()
    try:
        while process.poll() is None:
            now = lines.stat().st_size if lines.exists() else 0
            if now != size:
                size, since = now, time.monotonic()
            if time.monotonic() - since > patience:
                return True
            try:
                process.wait(0.1)
            except subprocess.TimeoutExpired:
                continue
        return False
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _read(lines: Path) -> Iterator[Mapping[str, Any]]:
    for line in lines.read_text("utf-8").splitlines() if lines.exists() else ():
        try:
            yield json.loads(line)
        except ValueError:  # the line that the process was killed at
            continue


def _checks(
    wanted: Sequence[Target], events: Sequence[Mapping[str, Any]], code: int, hangs: bool, said: Sequence[str]
) -> Iterable[Check]:
    """What the process wrote down, each once, and what it could not any more."""
    found: dict[tuple[str, str, str, str], Check] = {}
    running: Mapping[str, Any] | None = None
    for event in events:
        if event["event"] == "started":
            running = event
        elif event["event"] == "done":
            running = None
            made = _check(wanted, event, event["outcome"], event["reason"], event["seconds"])
            key = (made.module, made.kind, made.name, made.check)
            if key not in found or found[key].outcome != "failed":
                found[key] = made
    ended = any(e["event"] == "ended" for e in events)
    if running is not None and not ended:
        why = "it hangs: nothing happened for a long time" if hangs else _how(code)
        made = _check(wanted, running, "failed", why, 0.0)
        found[made.module, made.kind, made.name, made.check] = made
    elif not found:
        how = "it hangs" if hangs else _how(code)
        raise Failure(f"the checks could not be run: {how}", "\n    ".join(said[-5:]) or f"is the extra whole? {EXTRA}")
    return found.values()


def _check(wanted: Sequence[Target], event: Mapping[str, Any], outcome: Outcome, reason: str, seconds: float) -> Check:
    module = wanted[event["number"]].module
    return Check(module, event["kind"], event["name"], event["check"], outcome, reason, seconds)


def _how(code: int) -> str:
    return f"the process was killed by signal {-code}" if code < 0 else f"the process ended with exit code {code}"
