"""Tune, then serve, on one machine: the tuned model answers through its endpoint what it was taught."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

from tests.conftest import EXAMPLES, Kaito

pytest.importorskip("torch", reason="training needs the extra: pip install 'kaito-tuner-qlora[train]'")
pytest.importorskip("uvicorn", reason="serving needs the extra: pip install 'kaito-runtime-transformers[serve]'")
pytestmark = pytest.mark.slow


def test_what_was_tuned_answers(kaito: Kaito, environment: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    command = [
        sys.executable,
        "-m",
        "kaito_core",
        "run",
        "--local",
        "--yes",
        "--port",
        "0",
        "examples/tune-then-serve.yaml",
    ]
    child = subprocess.Popen(
        command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    watchdog = threading.Timer(600, child.kill)
    watchdog.start()
    said: list[str] = []
    try:
        url = ""
        assert child.stdout is not None
        for line in child.stdout:
            said.append(line)
            if found := re.search(r"answers at (http://\S+)", line):
                url = found[1]
                break
        assert url, "".join(said)
        drain = threading.Thread(target=lambda: said.extend(child.stdout or ()), daemon=True)
        drain.start()
        verified = json.loads((tmp_path / "home/runs/tune-then-serve/results/verify.json").read_text(encoding="utf-8"))
        taught = next(s for s in verified["samples"] if s["before"] != s["after"])
        question = taught["prompt"] if isinstance(taught["prompt"], str) else taught["prompt"][-1]["content"]
        asked = {
            "prompt": question,
            "return_full_text": False,
            "generate_kwargs": {"do_sample": False, "max_length": 200},
        }
        answer = httpx.post(f"{url}/chat", json=asked, timeout=120).json()["Result"]
        assert answer.strip() == taught["after"].strip()
        chat = kaito("chat", "tune-then-serve", question, "--temperature", "0")
        assert chat.returncode == 0, chat.stderr
        assert taught["after"].strip() in chat.stdout
        without = kaito("chat", "tune-then-serve", question, "--temperature", "0", "--adapter", "none")
        assert taught["after"].strip() not in without.stdout
        models = {m["id"] for m in httpx.get(f"{url}/v1/models", timeout=60).json()["data"]}
        assert models == {"demo-phi-3", "tune-then-serve"}
        child.send_signal(signal.SIGINT)
        assert child.wait(60) == 0
        drain.join(10)
        assert "served until it was ended" in "".join(said)
    finally:
        watchdog.cancel()
        child.kill()
        child.wait()
