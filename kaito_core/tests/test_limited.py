"""Work in a process with limits: each limit is kept and said, and one process works at a time."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from kaito_core import limited
from kaito_core.limited import Exceeded, Limits, run

WORK = """
import os, signal, sys, time
from kaito_core.limited import working_on

def answer(argument):
    return {"got": argument, "process": os.getpid()}

def memory(argument):
    working_on("a.json")
    working_on("b.json")
    return len([[] for _ in range(10**8)])

def spin(argument):
    working_on("b.json")
    while True:
        pass

def sleep(argument):
    time.sleep(60)

def long(argument):
    return "x" * (5 << 20)

def crash(argument):
    working_on("b.json")
    os.kill(os.getpid(), signal.SIGSEGV)

def broken(argument):
    raise KeyError("no such thing")

def counted(argument):
    began = time.monotonic()
    time.sleep(0.1)
    return [began, time.monotonic()]
"""


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "limited_work.py").write_text(WORK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("limited_work", None)


def test_small_work_is_done_here_and_large_work_in_a_process_of_its_own() -> None:
    here = run("limited_work:answer", {"a": ["ä"]}, large=False)
    assert here == {"got": {"a": ["ä"]}, "process": os.getpid()}
    there = run("limited_work:answer", {"a": ["ä"]}, large=True)
    assert there["got"] == {"a": ["ä"]}
    assert there["process"] != os.getpid()


LINUX = pytest.mark.skipif(sys.platform != "linux", reason="other kernels keep no such limit")


@pytest.mark.parametrize(
    ("function", "says"),
    [
        pytest.param("memory", "^reading b.json takes more than 64 MiB of memory$", marks=LINUX),
        pytest.param("spin", "^reading b.json takes more than 1 s of computing$", marks=LINUX),
        ("sleep", "^reading it takes more than 2 s$"),
        ("long", "^reading it gives a description of more than 1 MiB$"),
        ("crash", r"^reading b.json ended its process \(SIGSEGV\)$"),
    ],
)
def test_each_limit_is_kept_and_said_with_the_file(function: str, says: str) -> None:
    limits = Limits(
        memory_bytes=64 << 20, cpu_seconds=1, wall_seconds=2 if function == "sleep" else 60, answer_bytes=1 << 20
    )
    with pytest.raises(Exceeded, match=says):
        run(f"limited_work:{function}", {}, large=True, limits=limits)


def test_a_fault_of_ours_is_no_fault_of_the_file() -> None:
    with pytest.raises(RuntimeError, match="KeyError: 'no such thing'"):
        run("limited_work:broken", {}, large=True)


def test_one_at_a_time() -> None:
    times: list[list[float]] = []
    threads = [
        threading.Thread(target=lambda: times.append(run("limited_work:counted", {}, large=True))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    times.sort()
    assert len(times) == 3
    assert all(before[1] <= after[0] for before, after in pairwise(times))


def test_a_file_of_the_users_folder_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "downloads"
    folder.mkdir()
    (folder / "json.py").write_text("raise SystemExit('run')")
    monkeypatch.chdir(folder)
    assert run("limited_work:answer", {}, large=True)["got"] == {}


def test_child_and_controller_fit_the_charts_limit() -> None:
    """What the controller begins with, what its activator may hold and what a child takes, in MiB."""
    values = (Path(__file__).parents[2] / "charts/kaito/values.yaml").read_text()
    limit = int(values.split("limits: {memory: ")[1].split("Mi")[0])
    assert 80 + 128 + limited.MODEL_FILES.memory_bytes / (1 << 20) + 30 < limit
