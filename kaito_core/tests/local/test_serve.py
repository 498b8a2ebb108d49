"""An endpoint on this machine: a real server process, told from its first answer to its end."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from kaito_core.api import load_text
from kaito_core.local.paths import anchored
from kaito_core.local.run import Stopped, run
from kaito_core.local.server import free_port
from kaito_core.local.state import RunFolder
from kaito_core.plugins.types import ServedAdapter, ServingConfiguration
from kaito_core.problems import Failure, UserError
from kaito_core.testing.planning import PRESET
from kaito_core.testing.serving import Echo
from kaito_core.workloads.serving import ServingJob
from kaito_core.workloads.workload import Stage, Workload


class Server(Echo):
    stages = False


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setenv("KAITO_HOME", str(tmp_path))
    return RunFolder.of("one")


def job(adapters: tuple[ServedAdapter, ...] = (), **config: Any) -> ServingJob:
    settings = {"gib": 1, "die": "", "slow": 0, **config}
    return ServingJob(
        "one", "default", PRESET, "echo", settings, ServingConfiguration("cpu", "float32", 64, 1), adapters=adapters
    )


def workload(of: ServingJob, **endpoint: Any) -> Workload:
    made = Server().workload(of)
    assert made.endpoint is not None
    return replace(made, endpoint=replace(made.endpoint, **endpoint))


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def at_answer(act: Callable[[], None]) -> Callable[[dict[str, Any]], None]:
    return lambda event: act() if event["event"] == "answers" else None


def test_it_says_where_it_answers_and_ends_when_it_is_asked_to(folder: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    mine = ServedAdapter("mine", volume={"hostPath": {"path": str(tmp_path / "mine")}})
    seen: dict[str, Any] = {}

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "answers":
            state = folder.read()
            seen.update(event, alive=folder.is_running(), state=state)
            body = {"model": "mine", "messages": [{"role": "user", "content": "hello"}]}
            seen["answer"] = httpx.post(event["url"] + "/v1/chat/completions", json=body).json()
            interrupt()

    one = job((mine,))
    with pytest.raises(Stopped):
        run(folder, workload(one), one, {}, on_event, port=0)
    assert seen["url"].startswith("http://127.0.0.1:")
    assert (seen["base"], seen["model"], seen["adapters"]) == ("tiny", "mine", ["mine"])
    assert seen["alive"]
    assert seen["state"].served.url == seen["url"]
    assert "mine hears 'hello'" in seen["answer"]["choices"][0]["message"]["content"]
    assert "ended well" in folder.log("serve").read_text()
    after = folder.read()
    assert after is not None
    assert (after.phase, after.task, after.method, after.stages["serve"].message) == (
        "Stopped",
        "inference",
        "echo",
        "",
    )
    assert not folder.is_running()


def test_an_endpoint_starts_again_after_it_was_ended(folder: RunFolder) -> None:
    one, events = job(), []

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] in ("answers", "stopping"):
            events.append(event["event"])
        if event["event"] == "answers":
            interrupt()

    for _ in range(2):
        with pytest.raises(Stopped):
            run(folder, workload(one), one, {}, on_event, port=0)
    assert events == ["answers", "stopping"] * 2


@pytest.mark.parametrize("mine", [False, True])
def test_what_comes_from_a_folder_is_fetched_anew_at_every_start(folder: RunFolder, tmp_path: Path, mine: bool) -> None:
    (tmp_path / "mine").mkdir()
    one = job((ServedAdapter("mine", volume={"hostPath": {"path": str(tmp_path / "mine")}}),) if mine else ())
    work = workload(one)
    fetch = Stage("fetch", ("python", "-c", "print('fetched')"), "key")
    for _ in range(2):
        with pytest.raises(Stopped):
            run(folder, replace(work, stages=(fetch, *work.stages)), one, {}, at_answer(interrupt), port=0)
    assert folder.log("fetch").read_text().count("fetched\n") == (2 if mine else 1)


@pytest.mark.parametrize(("die", "words"), [("start", "the last words of the server"), ("later", "POST /v1/chat")])
def test_a_server_that_dies_is_told_with_the_end_of_its_log(folder: RunFolder, die: str, words: str) -> None:
    one = job(die=die)

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "answers":
            body = {"model": "tiny", "stream": True, "messages": [{"role": "user", "content": "hello"}]}
            httpx.post(event["url"] + "/v1/chat/completions", json=body)

    with pytest.raises(Failure, match="ended with exit code 3") as e:
        run(folder, workload(one), one, {}, on_event, port=0)
    assert words in str(e.value)
    state = folder.read()
    assert state is not None
    assert state.phase == "Failed"


def test_a_server_that_never_answers_is_given_up(folder: RunFolder) -> None:
    one = job(slow=60)
    with pytest.raises(Failure, match="has not answered /health"):
        run(folder, workload(one, start_seconds=0), one, {}, lambda e: None, port=0)
    assert not folder.is_running()


def test_a_second_signal_ends_it_at_once_with_everything_it_started(folder: RunFolder) -> None:
    """An engine's own processes would keep the GPU."""
    one = job()
    pid = folder.path / "pid"
    code = (
        "import os, signal, subprocess, time, http.server, pathlib;"
        "signal.signal(15, signal.SIG_IGN);"
        f"p = subprocess.Popen(['sleep', '300']); pathlib.Path({str(pid)!r}).write_text(str(p.pid));"
        "time.sleep(300)"
    )
    stubborn = workload(one)
    stubborn = replace(stubborn, stages=(replace(stubborn.stages[0], command=("python", "-c", code)),))

    def twice() -> None:
        while not (pid.exists() and pid.read_text()):
            time.sleep(0.01)
        interrupt()
        time.sleep(0.3)
        interrupt()

    threading.Thread(target=twice).start()
    with pytest.raises(Stopped):
        run(folder, stubborn, one, {}, lambda e: None, port=0)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid.read_text()}/exe").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(f"/proc/{pid.read_text()}/exe").exists()


def test_a_port_in_use_is_said_before_anything_is_fetched(folder: RunFolder) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        one = job()
        with pytest.raises(UserError, match=f"the port {port} of this machine is in use") as e:
            run(folder, workload(one), one, {}, lambda e: None, port=port)
        assert "--port 0" in e.value.problems[0].remedy
    assert folder.read() is None
    assert free_port(port) == port


def test_what_serves_a_tuned_model_has_a_folder_of_its_own_and_the_same_name(folder: RunFolder) -> None:
    assert folder.both == [folder]
    one = job()
    with pytest.raises(Stopped):
        run(folder.serving, workload(one), one, {}, at_answer(interrupt), port=0)
    assert [f.name for f in folder.both] == ["one", "one"]
    assert folder.read() is None


def test_a_relative_folder_of_an_adapter_belongs_to_the_file(tmp_path: Path) -> None:
    text = """
apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata: {name: one}
inference:
  preset: {name: tiny}
  adapters:
    - source: {name: a, volumeSource: {hostPath: {path: out/adapter}}}
    - source: {name: b, image: r.io/b:1}
"""
    inference = anchored(load_text(text).workspaces[0], tmp_path).inference
    assert inference is not None
    assert inference.adapters[0].source.volume_source == {"hostPath": {"path": str(tmp_path / "out" / "adapter")}}
    assert inference.adapters[1].source.volume_source is None
