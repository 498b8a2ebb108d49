"""Busy and idle, as whoever follows the log is told."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from kaito_core import progress
from kaito_core.serving.activity import Activity
from kaito_core.serving.metrics import Metrics


def lines(text: str) -> list[dict[str, Any]]:
    return [e for e in map(progress.parse_log_line, text.splitlines()) if e]


def test_one_line_when_it_becomes_busy_and_one_for_what_followed(capsys: pytest.CaptureFixture[str]) -> None:
    before = time.time()

    async def day() -> None:
        activity = Activity(Metrics(), every=0.2)
        for _ in range(500):
            activity.began()
            activity.ended()
        await asyncio.sleep(0.5)

    asyncio.run(day())
    first, second = lines(capsys.readouterr().out)
    assert (first["event"], first["stage"], first["requests"], first["in_flight"]) == ("serving", "serve", 1, 1)
    assert (second["requests"], second["in_flight"]) == (500, 0)
    assert before - 1 < first["last_request"] <= second["last_request"] <= time.time()


def test_what_runs_on_says_nothing_more(capsys: pytest.CaptureFixture[str]) -> None:
    async def day() -> None:
        activity = Activity(Metrics(), every=0.01)
        activity.began()
        for _ in range(10):
            activity.began()
            activity.ended()
            await asyncio.sleep(0.02)

    asyncio.run(day())
    assert len(lines(capsys.readouterr().out)) == 1


def test_the_progress_file_where_there_is_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(progress.RELAYED, "1")

    async def day() -> None:
        Activity(Metrics(), str(tmp_path)).began()

    asyncio.run(day())
    ((_, event),) = progress.read(tmp_path / progress.FILE_NAME)
    assert (event["event"], event["in_flight"]) == ("serving", 1)
    assert capsys.readouterr().out == ""  # its supervisor puts it there


def test_a_full_disk_fails_no_request(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    async def day() -> None:
        Activity(Metrics(), str(tmp_path / "file")).began()

    asyncio.run(day())
