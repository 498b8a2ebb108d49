"""The first process of a pod's containers, with real processes as its stages."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kaito_core.progress import log_line, parse_log_line
from kaito_core.stages.pod import TERMINATION_BYTES, termination_message
from kaito_core.workloads.pod import write_stages
from kaito_core.workloads.workload import Stage

PREAMBLE = "import os, sys, time, signal, pathlib; from kaito_core.progress import Progress; r = pathlib.Path(os.environ['KAITO_RESULTS']); "
FAILS = "p.emit('failed', message='the data is blue', remedy='paint it', exit_code=2, problems=[{'message': 'the data is blue', 'remedy': 'paint it', 'field': 'tuning.input'}]); sys.exit(CODE)"
WAITS = "(r / 'ready').touch(); time.sleep(60)"


def stage(name: str, code: str = "p.emit('finished')", key: str = "k") -> Stage:
    """A stage that leaves a mark and then runs ``code``."""
    mark = f"open(r / 'ran', 'a').write('{name} '); p = Progress(r / 'progress.jsonl', {name!r}); "
    return Stage(name, ("python", "-c", PREAMBLE + mark + code), key)


@dataclass
class Ended:
    """What Kubernetes shows of a container that has ended."""

    code: int
    log: str
    said: dict[str, Any]

    @property
    def events(self) -> list[tuple[str, str]]:
        found = (parse_log_line(line) for line in self.log.splitlines())
        return [(e["event"], e["stage"]) for e in found if e is not None]


class Pod:
    """The folders of a pod."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.results = folder / "results"
        self.env = {
            "KAITO_JOB": str(folder / "config" / "job.json"),
            "KAITO_DATA": str(folder / "data"),
            "KAITO_WEIGHTS": str(folder / "weights"),
            "KAITO_RESULTS": str(self.results),
            "KAITO_SECRETS": str(folder / "secrets"),
            "KAITO_TERMINATION": str(folder / "termination-log"),
            "DOCKER_CONFIG": str(folder / "docker"),
        }
        (folder / "config").mkdir()
        (folder / "secrets" / "hub").mkdir(parents=True)

    @property
    def ran(self) -> list[str]:
        """The stages that were started, in order."""
        return (self.results / "ran").read_text().split()

    def secret(self, name: str, content: str, key: str = ".dockerconfigjson") -> None:
        folder = self.folder / "secrets" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / key).write_text(content)

    def start(self, *stages: Stage, **env: str) -> subprocess.Popen[str]:
        (self.folder / "config" / "stages.json").write_text(write_stages(stages))
        return self.command(*(s.name for s in stages), **env)

    def command(self, *names: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "kaito_core.stages.pod", *names],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **self.env, **env},
        )

    def end(self, process: subprocess.Popen[str]) -> Ended:
        log, _ = process.communicate(timeout=60)
        path = self.folder / "termination-log"
        said = json.loads(path.read_bytes()) if path.exists() else {}
        path.unlink(missing_ok=True)
        return Ended(process.returncode, log, said)

    def run(self, *stages: Stage, **env: str) -> Ended:
        return self.end(self.start(*stages, **env))

    def ready(self, process: subprocess.Popen[str]) -> None:
        """Wait until a stage with the code `WAITS` waits."""
        while not (self.results / "ready").exists():
            assert process.poll() is None
            time.sleep(0.01)


@pytest.fixture
def pod(tmp_path: Path) -> Pod:
    return Pod(tmp_path)


def test_stages_run_in_order_and_what_they_found_out_is_said_at_the_end(pod: Pod) -> None:
    verify = stage("verify", "p.emit('finished', eval_loss_before=2.0, eval_loss_after=float('nan'))")
    push = stage("push", "p.emit('finished', image='r.io/a:1', digest='sha256:1')")
    ended = pod.run(stage("train"), verify, push)
    assert (ended.code, pod.ran) == (0, ["train", "verify", "push"])
    assert ended.said == {
        "event": "finished",
        "stage": "push",
        "results": {
            "verify": {"eval_loss_before": 2.0, "eval_loss_after": None},
            "push": {"image": "r.io/a:1", "digest": "sha256:1"},
        },
    }


def test_events_and_output_are_in_the_log_each_in_lines_of_its_own(pod: Pod) -> None:
    code = "print('loading', flush=True); p.message('two\\nlines'); p.emit('step', step=1, loss=0.5); print('no end of line', end='')"
    ended = pod.run(stage("train", code))
    lines = ended.log.splitlines()
    assert lines[0] == "loading"
    assert sorted(lines)[-2:] == sorted(["loading", "no end of line"])
    assert [line for line in lines if "] two" in line or "] lines" in line] == [
        "[kaito train] two",
        "[kaito train] lines",
    ]
    assert ended.events == [("message", "train"), ("message", "train"), ("step", "train")]


def test_what_is_done_for_its_key_is_skipped_in_the_next_pod_and_still_reported(pod: Pod) -> None:
    """KAITO's defects 9 and 11: a push that fails repeats the training, a retry starts from zero."""
    push = stage("push", "p.emit('failed', message='no registry', exit_code=1); sys.exit(1)")
    verify = stage("verify", "p.emit('finished', eval_loss_after=1.0)")
    assert pod.run(stage("train"), verify, push).code == 1
    ended = pod.run(stage("train"), verify, stage("push"))
    assert (ended.code, pod.ran) == (0, ["train", "verify", "push", "push"])
    assert ended.events[:2] == [("skipped", "train"), ("skipped", "verify")]
    assert ended.said["results"]["verify"] == {"eval_loss_after": 1.0}


def test_what_the_folder_holds_of_another_workspace_or_revision_is_not_taken_for_done(pod: Pod) -> None:
    pod.run(stage("train", key="old"), stage("push"))
    (pod.results / ".stages" / "verify.json").write_text('{"key": "k", "resu')
    pod.run(stage("train", key="new"), stage("verify"), stage("push"))
    # push has the same key as before, but what it pushed has been made anew.
    assert pod.ran == ["train", "push", "train", "verify", "push"]


def test_fetch_and_check_run_in_every_pod_for_their_folders_are_its_own(pod: Pod) -> None:
    for _ in range(2):
        pod.run(stage("fetch"))
        pod.run(stage("check"))
    assert pod.ran == ["fetch", "check", "fetch", "check"]


@pytest.mark.parametrize("code", [2, 1])
def test_a_failed_stage_ends_the_pod_with_its_own_words_and_code(code: int, pod: Pod) -> None:
    """torchrun ends with 1 whatever its processes end with: what the stage itself says counts."""
    ended = pod.run(stage("check", FAILS.replace("CODE", str(code))), stage("train"))
    assert (ended.code, pod.ran) == (2, ["check"])
    assert ended.said == {
        "event": "failed",
        "stage": "check",
        "message": "the data is blue",
        "remedy": "paint it",
        "exit_code": 2,
        "problems": [
            {"message": "the data is blue", "remedy": "paint it", "field": "tuning.input", "severity": "error"}
        ],
    }


def test_a_stage_that_dies_without_a_word_is_told_with_its_last_lines(pod: Pod) -> None:
    ended = pod.run(
        stage("train", "p.message('one step'); print('the last words', flush=True); time.sleep(.5); os._exit(3)")
    )
    assert (ended.code, ended.said["exit_code"]) == (3, 3)
    assert "ended with exit code 3" in ended.said["message"]
    assert "| one step" in ended.said["message"]
    assert "| the last words" in ended.said["message"]


def test_a_killed_stage_is_137_and_memory_is_named(pod: Pod) -> None:
    ended = pod.run(stage("train", "os.kill(os.getpid(), 9)"))
    assert ended.code == 137
    assert "SIGKILL" in ended.said["message"]
    assert "memory" in ended.said["message"]


def test_sigterm_reaches_the_stage_once_and_the_pod_waits_for_its_checkpoint(pod: Pod) -> None:
    handler = "signal.signal(15, lambda *_: open(r / 'asked', 'a').write('x')); "
    saving = f"{handler}(r / 'ready').touch(); signal.pause(); time.sleep(1); (r / 'saved').touch(); sys.exit(143)"
    process = pod.start(stage("train", saving), stage("push"))
    pod.ready(process)
    process.terminate()
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    ended = pod.end(process)
    assert (ended.code, ended.said) == (143, {"event": "interrupted", "stage": "train"})
    assert (pod.results / "saved").exists()
    assert (pod.results / "asked").read_text() == "x"
    assert pod.ran == ["train"]


def test_of_several_processes_the_first_that_fails_has_the_cause(pod: Pod) -> None:
    """The others lose it, and fail because of it. Each writes its own failure; the rest is said by the first process alone."""
    second = (
        "from kaito_core.progress import Silent; s = Silent(p.path, p.stage); s.message('not heard'); "
        "s.emit('failed', message='out of memory', exit_code=1); p.emit('failed', message='the other is gone', exit_code=1); sys.exit(1)"
    )
    ended = pod.run(stage("train", second))
    assert ended.code == 1
    assert ended.said["message"] == "out of memory"
    assert "not heard" not in ended.log


def test_a_stage_that_ends_well_in_spite_of_sigterm_is_done(pod: Pod) -> None:
    handler = "signal.signal(15, lambda *_: None); (r / 'ready').touch(); signal.pause(); p.emit('finished')"
    process = pod.start(stage("train", handler), stage("push"))
    pod.ready(process)
    process.terminate()
    ended = pod.end(process)
    assert (ended.code, ended.said) == (143, {"event": "interrupted", "stage": "push"})
    ended = pod.run(stage("train"), stage("push"))
    assert (ended.code, pod.ran) == (0, ["train", "push"])


def test_a_stage_that_takes_no_signal_is_interrupted_too(pod: Pod) -> None:
    process = pod.start(stage("fetch", WAITS))
    pod.ready(process)
    process.terminate()
    assert pod.end(process).code == 143


def test_a_stage_killed_for_memory_while_it_saves_has_failed(pod: Pod) -> None:
    code = "signal.signal(15, lambda *_: os.kill(os.getpid(), 9)); " + WAITS
    process = pod.start(stage("train", code))
    pod.ready(process)
    process.terminate()
    assert pod.end(process).code == 137


def test_what_a_stage_leaves_behind_neither_outlives_it_nor_holds_the_pod(pod: Pod) -> None:
    left = "import subprocess; c = subprocess.Popen(['sleep', '60']); (r / 'pid').write_text(str(c.pid)); p.emit('finished')"
    began = time.monotonic()
    assert pod.run(stage("train", left), stage("push")).code == 0
    assert time.monotonic() - began < 30
    assert not _alive(int((pod.results / "pid").read_text()))


@pytest.mark.skipif(not hasattr(os, "waitid"), reason="needs waitid")
def test_the_first_process_of_a_container_buries_orphans(pod: Pod) -> None:
    """With processes whose parent is gone: they become children of the first process, here of a subreaper (prctl(2), 36)."""
    orphans = "import subprocess\nfor _ in range(20): subprocess.run(['sh', '-c', 'sleep 0.2 & exit 0'])\n"
    counts = "time.sleep(1.5); me = os.getppid(); dead = [s for s in pathlib.Path('/proc').glob('[0-9]*/stat') for f in [s.read_text().rpartition(')')[2].split()] if f[0] == 'Z' and f[1] == str(me)]; p.emit('finished', dead=len(dead))"
    run = "import ctypes, sys; ctypes.CDLL(None).prctl(36, 1); from kaito_core.stages.pod import main; sys.exit(main(['train']))"
    code = f"exec({orphans!r}); {counts}"
    (pod.folder / "config" / "stages.json").write_text(write_stages([stage("train", code)]))
    process = subprocess.Popen(
        [sys.executable, "-c", run], stdout=subprocess.PIPE, text=True, env={**os.environ, **pod.env}
    )
    ended = pod.end(process)
    assert ended.code == 0, ended.log
    assert ended.said["results"]["train"] == {"dead": 0}


def test_secrets_are_merged_where_programs_look_and_never_printed(pod: Pod) -> None:
    pod.secret("registry/pull", '{"auths": {"a.io": {"auth": "c2VjcmV0LWE="}}}')
    pod.secret("registry/push", '{"auths": {"b.io": {"auth": "c2VjcmV0LWI="}}}')
    pod.secret("hub", "hf_secret\n", key="HF_TOKEN")
    code = "(r / 'seen').write_text(open(os.environ['DOCKER_CONFIG'] + '/config.json').read() + os.environ['HF_TOKEN']); os._exit(9)"
    ended = pod.run(stage("fetch", code), KAITO_REGISTRY_SECRETS="pull,push", KAITO_HUB_SECRET="hub")
    seen = (pod.results / "seen").read_text()
    assert json.loads(seen.removesuffix("hf_secret"))["auths"].keys() == {"a.io", "b.io"}
    assert (pod.folder / "docker" / "config.json").stat().st_mode & 0o077 == 0
    for secret in ("c2VjcmV0LWE=", "c2VjcmV0LWI=", "hf_secret"):
        assert secret not in ended.log + json.dumps(ended.said)


@pytest.mark.parametrize("content", [None, "", "[]", '{"auths": 3}'])
def test_a_secret_that_is_missing_or_wrong_is_named_at_once(content: str | None, pod: Pod) -> None:
    (pod.folder / "secrets" / "registry" / "push").mkdir(parents=True)  # what a mount of an optional Secret looks like
    if content is not None:
        pod.secret("registry/push", content)
    ended = pod.run(stage("fetch"), KAITO_REGISTRY_SECRETS="push")
    assert (ended.code, ended.said["event"], ended.said["stage"]) == (2, "failed", "fetch")
    assert "'push'" in ended.said["message"]
    assert ended.said["message"] in ended.log


def test_a_missing_token_is_named(pod: Pod) -> None:
    ended = pod.run(stage("fetch"), KAITO_HUB_SECRET="hub-token")
    assert ended.code == 2
    assert "'hub-token'" in ended.said["message"]


def test_a_pod_without_its_parts_says_which(pod: Pod) -> None:
    ended = pod.end(pod.command("fetch"))
    assert ended.code == 2
    assert "stages.json: No such file" in ended.said["message"]
    (pod.folder / "config" / "stages.json").write_text('{"a": 1}')
    assert "not the list of stages" in pod.end(pod.command("fetch")).said["message"]
    assert "no such stage: gone" in _unknown(pod).said["message"]
    for name in ("KAITO_JOB", "KAITO_RESULTS"):
        ended = pod.run(stage("fetch"), **{name: ""})
        assert ended.code == 2
        assert name in ended.said["message"]
    ended = pod.run(Stage("fetch", ("no-such-program",), "k"))
    assert (ended.code, ended.said["exit_code"]) == (1, 1)
    assert "no-such-program" in ended.said["message"]
    assert "Traceback" not in ended.log


def _unknown(pod: Pod) -> Ended:
    pod.run(stage("fetch"))
    return pod.end(pod.command("gone"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_clear_message(pod: Pod) -> None:
    (pod.results / ".stages").mkdir(parents=True)
    (pod.results / ".stages" / "train.new").symlink_to("/dev/full")
    ended = pod.run(stage("train"))
    assert ended.code == 1
    assert "no space left on the disk" in ended.said["message"]
    assert "Traceback" not in ended.log


def test_a_volume_that_cannot_be_written_is_the_persons_to_mend(pod: Pod) -> None:
    pod.results.parent.joinpath("file").touch()
    ended = pod.run(stage("fetch"), KAITO_RESULTS=str(pod.folder / "file"))
    assert ended.code == 1
    assert "file" in ended.said["message"]
    if os.geteuid():
        pod.results.mkdir(mode=0o500)
        ended = pod.run(stage("fetch"))
        assert ended.code == 2
        assert "cannot be written" in ended.said["message"]


# --- last words

texts = st.text(max_size=3000)
problems = st.lists(
    st.fixed_dictionaries({"message": texts, "remedy": texts, "field": st.text(max_size=50)}), max_size=9
)


@given(message=texts, remedy=texts, found=problems)
def test_a_failure_always_fits_into_a_termination_message(
    message: str, remedy: str, found: list[dict[str, str]]
) -> None:
    said = {
        "event": "failed",
        "stage": "check",
        "message": message,
        "remedy": remedy,
        "exit_code": 2,
        "problems": found,
    }
    text = termination_message(said)
    assert len(text) <= TERMINATION_BYTES
    read = json.loads(text)
    assert (read["event"], read["stage"], read["exit_code"]) == ("failed", "check", 2)
    assert (
        read["message"].removesuffix("…")[:300] == _encodable(message)[: len(read["message"].removesuffix("…"))][:300]
    )
    assert read["problems"] == json.loads(_encodable(json.dumps(found)))[: len(read["problems"])]
    if len(json.dumps(said)) <= TERMINATION_BYTES:
        assert len(read["problems"]) == len(found)


@given(st.dictionaries(st.text(max_size=20), texts | st.floats() | st.lists(st.integers(), max_size=2000), max_size=9))
def test_a_success_always_fits_and_keeps_what_the_workspace_shows(metrics: dict[str, Any]) -> None:
    precious = {"image": "r.io/team/adapter:1", "digest": "sha256:" + "0" * 64}
    said = {"event": "finished", "stage": "push", "results": {"train": metrics, "push": {**metrics, **precious}}}
    text = termination_message(said)
    assert len(text) <= TERMINATION_BYTES
    assert precious.items() <= json.loads(text)["results"]["push"].items()


def _encodable(text: str) -> str:
    return text.encode(errors="replace").decode()


# --- the log

names = st.from_regex(r"[a-z][a-z0-9-]{0,20}", fullmatch=True)
values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()


@given(
    stage=names,
    event=st.sampled_from(["started", "step", "finished", "failed"]),
    fields=st.dictionaries(st.text(), values),
)
def test_an_event_is_one_line_and_reads_back(stage: str, event: str, fields: dict[str, Any]) -> None:
    said = {**fields, "event": event, "stage": stage, "time": 1.5}
    line = log_line(said)
    assert line.splitlines() == [line]
    assert parse_log_line(line) == said


@given(stage=names, text=st.text())
@example(stage="a", text="\r")
def test_a_message_reads_back_in_its_lines(stage: str, text: str) -> None:
    lines = log_line({"event": "message", "stage": stage, "text": text}).split("\n")
    read = [parse_log_line(line) for line in lines]
    assert all(e is not None and (e["event"], e["stage"]) == ("message", stage) for e in read)
    # A line without a text is a line: a message of nothing says nothing, and says it once.
    assert [said for e in read if e for said in e["text"].splitlines() or [""]] == (text.splitlines() or [""])


@given(st.text())
def test_what_programs_print_is_never_an_error(line: str) -> None:
    assert parse_log_line(line) is None or line.startswith("[kaito ")
    parse_log_line("[kaito train] {" + line)


def _alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
