"""The contract between a reconcile and the loop that calls it: what each result leads to."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from kaito_core.controller.json_log import JsonLines
from kaito_core.controller.loop import Controller, Result, TerminalError
from kaito_core.controller.metrics import Metrics
from kaito_core.kube.workqueue import WorkQueue
from kaito_core.problems import Failure

KEY = ("default", "one")


class Loop:
    """A loop over one reconcile function, and the keys that it was called with."""

    def __init__(self, reconcile: Callable[[int], Result], workers: int = 1) -> None:
        self.calls: list[tuple[str, str]] = []
        self.metrics = Metrics()
        self.queue = WorkQueue("workspace", metrics=self.metrics)
        self._reconcile = reconcile
        self.controller = Controller("workspace", self.queue, self._count, workers, metrics=self.metrics)

    def _count(self, namespace: str, name: str) -> Result:
        self.calls.append((namespace, name))
        return self._reconcile(len(self.calls))

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, {"controller": "workspace", **labels})

    def reconciled(self, result: str) -> float | None:
        return self.value("controller_runtime_reconcile_total", result=result)

    def until(self, calls: int) -> None:
        """So many reconciles are over."""
        done = 0.0
        deadline = time.monotonic() + 20
        while done < calls:
            assert time.monotonic() < deadline, f"{done} of {calls}"
            time.sleep(0.005)
            done = sum(self.reconciled(r) or 0 for r in ("success", "error", "requeue_after"))


@contextmanager
def running(reconcile: Callable[[int], Result], workers: int = 1) -> Iterator[Loop]:
    loop = Loop(reconcile, workers)
    loop.controller.start()
    try:
        yield loop
    finally:
        assert loop.controller.stop(20)


def raising(*errors: BaseException) -> Callable[[int], Result]:
    """Raises these one after the other, then succeeds."""

    def reconcile(call: int) -> Result:
        if call <= len(errors):
            raise errors[call - 1]
        return Result()

    return reconcile


def test_success_waits_for_the_next_change() -> None:
    with running(lambda call: Result()) as loop:
        loop.queue.add(KEY)
        loop.until(1)
        loop.queue.add(KEY)
        loop.until(2)
    assert loop.calls == [KEY, KEY]
    assert loop.reconciled("success") == 2
    assert loop.value("controller_runtime_reconcile_errors_total") == 0


def test_an_error_is_tried_again_later_each_time(caplog: pytest.LogCaptureFixture) -> None:
    with running(raising(*[Failure("the registry is away")] * 5)) as loop:
        loop.queue.add(KEY)
        loop.until(5)
        assert loop.queue.failures(KEY) > 0
        loop.until(6)
        assert loop.queue.failures(KEY) == 0
    assert (loop.reconciled("error"), loop.reconciled("success")) == (5, 1)
    assert loop.value("controller_runtime_reconcile_errors_total") == 5
    assert loop.metrics.registry.get_sample_value("workqueue_retries_total", {"name": "workspace"}) == 5
    assert "the registry is away" in caplog.text
    assert "Traceback" not in caplog.text  # an expected failure is not a bug


def test_a_terminal_error_is_counted_and_not_tried_again() -> None:
    with running(raising(TerminalError("no"))) as loop:
        loop.queue.add(KEY)
        loop.until(1)
        time.sleep(0.05)  # the first back-off is 5 ms
    assert loop.calls == [KEY]
    assert loop.value("controller_runtime_terminal_reconcile_errors_total") == 1
    assert loop.value("controller_runtime_reconcile_errors_total") == 1


def test_a_wish_to_be_called_later_starts_the_back_off_anew() -> None:
    def reconcile(call: int) -> Result:
        if call <= 3:
            raise Failure("no")
        return Result(0.01) if call == 4 else Result()

    with running(reconcile) as loop:
        loop.queue.add(KEY)
        loop.until(5)
        assert loop.queue.failures(KEY) == 0
    assert (loop.reconciled("requeue_after"), loop.reconciled("success")) == (1, 1)


@pytest.mark.parametrize("bug", [ZeroDivisionError("a bug"), SystemExit(3)])
def test_what_breaks_on_one_key_stops_no_worker(bug: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    """A plugin that calls sys.exit() would end the thread, and nobody would know why nothing happens any more."""
    with running(raising(bug)) as loop:
        loop.queue.add(KEY)
        loop.until(2)
        loop.queue.add(("default", "two"))
        loop.until(3)
    assert loop.value("controller_runtime_reconcile_panics_total") == 1
    assert "Traceback" in caplog.text


def test_who_returns_nonsense_is_tried_again_like_any_other_bug() -> None:
    with running(lambda call: None if call == 1 else Result()) as loop:  # type: ignore[arg-type, return-value]
        loop.queue.add(KEY)
        loop.until(2)
    assert loop.value("controller_runtime_reconcile_panics_total") == 1


def test_stop_waits_for_what_is_going_on_and_takes_nothing_more() -> None:
    began, may_end = threading.Event(), threading.Event()

    def reconcile(call: int) -> Result:
        began.set()
        may_end.wait(20)
        return Result()

    loop = Loop(reconcile)
    loop.controller.start()
    loop.queue.add(KEY)
    loop.queue.add(("default", "waits"))
    assert began.wait(20)
    assert not loop.controller.stop(timeout=0.05)
    assert loop.value("controller_runtime_active_workers") == 1
    may_end.set()
    assert loop.controller.stop(timeout=20)
    assert loop.calls == [KEY]


def test_every_line_of_a_reconcile_says_of_which(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("kaito_core.test_loop")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logger.addHandler(handler)
    try:
        with running(lambda call: logger.warning("from deep inside", extra={"node": "gpu-1"}) or Result()) as loop:
            loop.queue.add(KEY)
            loop.queue.add(("default", "two"))
            loop.until(2)
        logger.warning("from nowhere")
    finally:
        logger.removeHandler(handler)
    first, second, outside = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert (first["namespace"], first["workspace"], first["node"]) == ("default", "one", "gpu-1")
    assert (first["level"], first["logger"], first["msg"]) == ("warning", "kaito_core.test_loop", "from deep inside")
    assert second["workspace"] == "two"
    assert first["reconcileID"] != second["reconcileID"]
    assert "reconcileID" not in outside
