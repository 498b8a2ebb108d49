"""Stages as processes: done once, resumed after any end, never two at a time."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kaito_core.api import Secret
from kaito_core.local.run import Stopped, is_done, run
from kaito_core.local.state import RunFolder
from kaito_core.plugins import Architecture, ChatFormat, Configuration, ModelSource, Preset
from kaito_core.problems import Failure, UserError
from kaito_core.workloads.job import DataInput, TuningJob
from kaito_core.workloads.workload import Mount, Stage, Workload

JOB = TuningJob(
    name="one",
    namespace="default",
    preset=Preset(
        "tiny",
        ModelSource(hub="a/b"),
        "mit",
        Architecture("X", 1, 1, 1, 1, 1, 1, 1, 1, 1, linears={}),
        ChatFormat("", ("<|end|>",)),
        (),
    ),
    method="qlora",
    config={},
    configuration=Configuration("cpu", "float32", 1, 1, 64),
    data=DataInput(),
)

PREAMBLE = "import os, sys, time, pathlib; from kaito_core.progress import Progress; r = pathlib.Path(os.environ['KAITO_RESULTS']);"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setenv("KAITO_HOME", str(tmp_path))
    return RunFolder.of("one")


def stage(name: str, code: str, key: str = "k") -> Stage:
    body = f"{PREAMBLE} p = Progress(r / 'progress.jsonl', {name!r}); {code}"
    return Stage(name, ("python", "-c", body), key)


def workload(*stages: Stage, **fields: Any) -> Workload:
    mounts = (Mount("data", "/mnt/data", "KAITO_DATA"), Mount("results", "/mnt/results", "KAITO_RESULTS"))
    return replace(Workload("one", "", stages, mounts), **fields)


def go(folder: RunFolder, work: Workload, **secrets: Any) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    run(folder, work, JOB, secrets, events.append)
    return events


def test_stages_run_in_order_and_their_results_are_kept(folder: RunFolder) -> None:
    events = go(folder, workload(stage("a", "p.emit('finished', digest='x')"), stage("b", "p.emit('finished')")))
    assert [(e["event"], e["stage"]) for e in events] == [("finished", "a"), ("finished", "b")]
    state = folder.read()
    assert state is not None
    assert state.phase == "Succeeded"
    assert state.stages["a"].result == {"digest": "x"}


def test_what_is_done_for_its_key_is_not_done_again(folder: RunFolder) -> None:
    count = "f = r / 'count'; f.write_text((f.read_text() if f.exists() else '') + '.')"
    for key in ("k", "k", "changed"):
        work = workload(stage("a", count, key))
        assert is_done(folder, work) == (key == "k" and (folder.results / "count").exists())
        go(folder, work)
    assert (folder.results / "count").read_text() == ".."


def test_a_failed_stage_fails_the_run_in_its_own_words_and_the_next_run_goes_on_there(folder: RunFolder) -> None:
    failing = "p.emit('failed', message='the data is blue', remedy='paint it', exit_code=2); sys.exit(2)"
    with pytest.raises(UserError) as e:
        go(folder, workload(stage("a", "p.emit('finished')"), stage("b", failing)))
    assert (e.value.problems[0].message, e.value.problems[0].remedy) == ("the data is blue", "paint it")
    events = go(folder, workload(stage("a", "sys.exit(1)"), stage("b", "p.emit('finished')")))
    assert [(e["event"], e["stage"]) for e in events] == [("skipped", "a"), ("finished", "b")]


def test_of_several_processes_the_first_that_fails_has_the_cause(folder: RunFolder) -> None:
    failing = "p.emit('failed', message='out of memory'); p.emit('failed', message='the other is gone'); sys.exit(1)"
    with pytest.raises(Failure, match="out of memory"):
        go(folder, workload(stage("a", failing)))


def test_a_stage_that_dies_without_a_word_is_told_with_the_end_of_its_log(folder: RunFolder) -> None:
    with pytest.raises(Failure, match="the last words"):
        go(folder, workload(stage("a", "print('the last words', flush=True); os._exit(3)")))
    with pytest.raises(Failure, match="SIGKILL"):
        go(folder, workload(stage("a", "os.kill(os.getpid(), 9)")))
    state = folder.read()
    assert state is not None
    assert state.phase == "Failed"


def test_a_signal_reaches_the_stage_as_sigterm_and_the_run_is_stopped_not_failed(folder: RunFolder) -> None:
    code = "import signal; signal.signal(15, lambda *_: ((r / 'asked').touch(), sys.exit(143))); (r / 'ready').touch(); time.sleep(60)"
    threading.Thread(target=_interrupt_when, args=(folder.results / "ready",)).start()
    with pytest.raises(Stopped):
        go(folder, workload(stage("a", code)))
    assert (folder.results / "asked").exists()
    state = folder.read()
    assert state is not None
    assert state.phase == "Stopped"


def _interrupt_when(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)


def test_a_stage_ends_with_a_killed_parent(folder: RunFolder, tmp_path: Path) -> None:
    import subprocess

    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_run import *
folder = RunFolder.of("one")
go(folder, workload(stage("a", "(r / 'pid').write_text(str(os.getpid())); time.sleep(60)")))
"""
    parent = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "KAITO_HOME": str(tmp_path)})
    pid = folder.results / "pid"
    while not (pid.exists() and pid.read_text()):
        time.sleep(0.02)
        assert parent.poll() is None
    assert folder.is_running()
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while folder.is_running() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not folder.is_running()
    state = folder.read()
    assert state is not None
    assert state.phase == "Stopped"


def test_one_run_at_a_time(folder: RunFolder) -> None:
    with folder.lock(), pytest.raises(UserError, match="running already"):
        go(folder, workload(stage("a", "")))


def test_secrets_are_there_while_the_stages_run_and_gone_afterwards(folder: RunFolder) -> None:
    config = b'{"auths": {"r.io": {"auth": "dTpw"}}}'
    secrets = {
        "push": Secret("push", "default", "kubernetes.io/dockerconfigjson", {".dockerconfigjson": config}),
        "hub": Secret("hub", "default", "Opaque", {"HF_TOKEN": b"hf_secret\n"}),
    }
    code = "(r / 'seen').write_text((pathlib.Path(os.environ['DOCKER_CONFIG']) / 'config.json').read_text() + os.environ['HF_TOKEN'])"
    go(folder, workload(stage("a", code), registry_secrets=("push", "other"), hub_secret="hub"), **secrets)
    assert "r.io" in (folder.results / "seen").read_text()
    assert (folder.results / "seen").read_text().endswith("hf_secret")
    assert not (folder.path / "secrets").exists()
    assert "hf_secret" not in repr(secrets)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"auths": 3}', b"\xff"])
def test_a_secret_that_is_no_docker_config_is_named_and_not_shown(folder: RunFolder, content: bytes) -> None:
    secrets = {"push": Secret("push", "default", "", {".dockerconfigjson": content})}
    with pytest.raises(UserError, match="'push'"):
        go(folder, workload(stage("a", ""), registry_secrets=("push",)), **secrets)


def test_files_and_folders_are_found_through_the_environment(folder: RunFolder, tmp_path: Path) -> None:
    mounts = (
        Mount("results", "/mnt/results", "KAITO_RESULTS"),
        Mount("data", "/mnt/data", "KAITO_DATA", {"hostPath": {"path": str(tmp_path / "mine")}}),
    )
    code = "(pathlib.Path(os.environ['KAITO_DATA']) / 'seen').write_text(pathlib.Path(os.environ['KAITO_JOB']).read_text())"
    work = replace(
        workload(stage("a", code)),
        mounts=mounts,
        files={"/mnt/config/job.json": "{}"},
        env={"KAITO_JOB": "/mnt/config/job.json"},
    )
    go(folder, work)
    assert (tmp_path / "mine" / "seen").read_text() == "{}"


def test_a_damaged_state_file_is_a_clear_message(folder: RunFolder) -> None:
    folder.path.mkdir(parents=True)
    (folder.path / "state.json").write_text("{")
    with pytest.raises(Failure, match=r"state\.json is damaged"):
        folder.read()
