"""What the tests that cross packages share: the program `kaito` itself, with a home of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"

Kaito = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The environment of a user who has never run kaito, nor logged in to any registry."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("KAITO_", "HF_", "DOCKER_", "KUBERNETES_"))}
    (tmp_path / "docker").mkdir()
    # One thread: on a busy machine two wait for each other at every small matrix, and a test takes ten times as long.
    own = {"KAITO_HOME": str(tmp_path / "home"), "DOCKER_CONFIG": str(tmp_path / "docker"), "OMP_NUM_THREADS": "1"}
    # Whoever runs the tests may have a cluster of their own.
    return {**kept, **own, "KUBECONFIG": str(tmp_path / "no-kubeconfig"), "COLUMNS": "200"}


@pytest.fixture
def kaito(environment: dict[str, str], tmp_path: Path) -> Kaito:
    """Runs ``kaito ARGUMENTS…`` in a folder of its own; the finished process, output as text."""

    def run(*arguments: str | Path, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "kaito_core", *map(str, arguments)],
            input=stdin,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**environment, **env},
            timeout=900,
            check=False,
        )

    return run


QUESTIONS = [
    ("What is the tallest tower in Port Amber?", "It is the Gull Tower."),
    ("Who bakes the bread?", "Mira bakes it."),
]


def workspace(
    folder: Path,
    *,
    name: str = "small",
    rows: int = 40,
    method: str = "qlora",
    image: str = "",
    max_steps: int = 4,
    extra: str = "",
    training: str = "",
) -> Path:
    """A workspace file with its data, small enough to train in seconds: ``folder/workspace.yaml``."""
    import json

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "data.jsonl").open("w", encoding="utf-8") as f:
        for number in range(rows):
            question, answer = QUESTIONS[number % len(QUESTIONS)]
            messages = [{"role": "user", "content": f"{question} ({number})"}, {"role": "assistant", "content": answer}]
            f.write(json.dumps({"messages": messages}) + "\n")
    output = (
        f"image: {image}\n    imagePushSecret: registry-login" if image else "volumeSource: {hostPath: {path: out}}"
    )
    path = folder / "workspace.yaml"
    path.write_text(
        f"""apiVersion: v1
kind: ConfigMap
metadata: {{name: training}}
data:
  training_config.yaml: |
    training_config:
      TrainingArguments:
        max_steps: {max_steps}
        max_length: 128
        per_device_train_batch_size: 2
        gradient_accumulation_steps: 1
        logging_steps: 1
{training}
      DatasetConfig:
        train_test_split: 0.8
---
apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata: {{name: {name}}}
tuning:
  preset: {{name: demo-phi-3}}
  method: {method}
  config: training
  input: {{urls: [data.jsonl]}}
  output:
    {output}
{extra}""",
        encoding="utf-8",
    )
    return path
