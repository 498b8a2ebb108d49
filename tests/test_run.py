"""The main job on one machine: real QLoRA of the demonstration model, from a file to a verified adapter."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import EXAMPLES, Kaito, workspace

pytest.importorskip("torch", reason="training needs the extra: pip install 'kaito-tuner-qlora[train]'")
pytestmark = pytest.mark.slow


def metrics(home: Path, name: str) -> dict[str, float]:
    return json.loads((home / "runs" / name / "results" / "verify.json").read_text(encoding="utf-8"))


def test_the_quick_start_teaches_what_its_data_says(kaito: Kaito, tmp_path: Path) -> None:
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    answer = kaito("run", "--local", "--yes", tmp_path / "examples" / "quickstart.yaml")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    verified = metrics(tmp_path / "home", "quickstart")
    assert verified["eval_loss_after"] < 0.5 * verified["eval_loss_before"]
    changed = [s for s in verified["samples"] if s["before"] != s["after"]]
    assert changed
    assert any(s["after"].strip() == s["expected"].strip() for s in changed)
    output = tmp_path / "quickstart-output"
    assert (output / "adapter" / "adapter_model.safetensors").is_file()
    assert json.loads((output / "image" / "index.json").read_text())["manifests"]
    assert "<svg" in (output / "report.html").read_text(encoding="utf-8")

    again = kaito("run", "--local", "--yes", tmp_path / "examples" / "quickstart.yaml")
    assert again.returncode == 0
    assert "done already" in again.stdout
    assert "Succeeded" in kaito("status").stdout
    assert "step" in kaito("logs", "quickstart", "--stage", "train").stdout


def test_kill_9_in_mid_training_then_the_same_command_ends_the_same(
    kaito: Kaito, environment: dict[str, str], tmp_path: Path
) -> None:
    """KAITO's defect 9: retries start from zero. Here the run resumes, and ends as if nothing had happened."""
    options = {"max_steps": 12, "training": "        save_steps: 2\n        eval_steps: 6"}
    straight = workspace(tmp_path / "a", name="straight", **options)
    assert kaito("run", "--local", "--yes", straight).returncode == 0
    cut = workspace(tmp_path / "b", name="cut", **options)
    child = subprocess.Popen(
        [sys.executable, "-m", "kaito_core", "run", "--local", "--yes", str(cut)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    results = tmp_path / "home" / "runs" / "cut" / "results"
    deadline = time.monotonic() + 300
    while not list(results.glob("checkpoints/*/checkpoint-*")) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert child.poll() is None, "the run ended before it could be killed"
    for process in _descendants(child.pid):
        os.kill(process, signal.SIGKILL)
    child.wait()
    assert not (results / "adapter" / "adapter_model.safetensors").exists()
    assert kaito("status", "cut").stdout.startswith("cut: Stopped")

    again = kaito("run", "--local", "--yes", cut)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "going on from checkpoint-" in again.stdout
    before, after = metrics(tmp_path / "home", "straight"), metrics(tmp_path / "home", "cut")
    assert after["eval_loss_after"] == pytest.approx(before["eval_loss_after"], abs=1e-4)


def test_sigterm_writes_a_checkpoint_and_the_run_goes_on_later(
    kaito: Kaito, environment: dict[str, str], tmp_path: Path
) -> None:
    path = workspace(tmp_path, name="asked", max_steps=400, training="        save_steps: 1000")
    child = subprocess.Popen(
        [sys.executable, "-m", "kaito_core", "run", "--local", "--yes", str(path)],
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    results = tmp_path / "home" / "runs" / "asked" / "results"
    deadline = time.monotonic() + 300
    while (
        '"event": "step"' not in _text(results / "progress.jsonl")
        and child.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    child.terminate()
    assert child.wait(timeout=120) == 130
    assert list(results.glob("checkpoints/*/checkpoint-*"))
    assert kaito("status", "asked").stdout.startswith("asked: Stopped")


def test_two_runs_of_one_workspace_do_not_meet(kaito: Kaito, environment: dict[str, str], tmp_path: Path) -> None:
    path = workspace(tmp_path, name="once", max_steps=200)
    first = subprocess.Popen(
        [sys.executable, "-m", "kaito_core", "run", "--local", "--yes", str(path)],
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    lock = tmp_path / "home" / "runs" / "once" / "lock"
    while not lock.exists():
        time.sleep(0.05)
    second = kaito("run", "--local", "--yes", path)
    assert second.returncode == 2
    assert "running already" in second.stderr
    first.terminate()
    first.wait(timeout=120)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _descendants(pid: int) -> list[int]:
    """The process and everything it started, the parent first: killed in that order nothing can react."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(d for c in children for d in _descendants(int(c)))]
