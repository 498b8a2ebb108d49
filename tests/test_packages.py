"""Each package installs from its own folder, and the three that a planner needs give a working `kaito` without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import EXAMPLES, ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def kaito(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `kaito` of an environment into which the README's command was typed, with nothing else in it."""
    venv = tmp_path_factory.mktemp("clean") / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    packages = [ROOT / "kaito_core", ROOT / "plugins" / "kaito_preset_phi3", ROOT / "plugins" / "kaito_tuner_qlora"]
    done = subprocess.run(
        [venv / "bin" / "pip", "install", "--quiet", *packages], capture_output=True, text=True, check=False
    )
    if done.returncode and "No matching distribution" in done.stderr:
        pytest.skip(f"no package registry can be reached: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return venv / "bin" / "kaito"


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_plugins_are_found_and_torch_is_not_needed(kaito: Path) -> None:
    plugins = json.loads(run(kaito, "plugins", "--json").stdout)["plugins"]
    active = {p["distribution"] for p in plugins if p["state"] == "active"}
    assert active == {"kaito-core", "kaito-preset-phi3", "kaito-tuner-qlora"}
    assert run(kaito.parent / "python", "-c", "import torch").returncode != 0


def test_the_quick_start_of_kaito_is_valid_and_planned(kaito: Path) -> None:
    example = EXAMPLES / "kaito-quickstart.yaml"
    assert run(kaito, "validate", example).returncode == 0
    planned = run(kaito, "plan", "--json", example)
    plan = json.loads(planned.stdout)["plans"][0]
    assert plan["model"]["source"].startswith("microsoft/Phi-3-mini-128k-instruct@")
    assert {c["instanceType"] for c in plan["candidates"]} == {"Standard_NC6s_v3", "this machine"}


def test_training_without_its_packages_says_what_to_install(kaito: Path, tmp_path: Path) -> None:
    answer = run(kaito, "run", "--local", "--yes", EXAMPLES / "kaito-quickstart.yaml")
    assert answer.returncode == 2
    assert "pip install 'kaito-tuner-qlora[train]'" in answer.stderr


def test_a_known_but_missing_plugin_is_named(kaito: Path) -> None:
    answer = run(kaito, "plan", EXAMPLES / "quickstart.yaml")
    assert answer.returncode == 2
    assert "pip install kaito-preset-demo" in answer.stderr
