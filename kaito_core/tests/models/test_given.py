"""A workspace file that names a model: what the commands read before they plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from kaito_core.cli.given import read, registry_of
from kaito_core.plugins.manager import PluginManager
from kaito_core.problems import UserError

from .conftest import COMMIT, REPO, Hub, model_files, write

PLUGINS = PluginManager(())


def workspace(folder: Path, name: str) -> str:
    path = folder / "workspace.yaml"
    path.write_text(
        f"""\
apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata:
  name: served
resource:
  labelSelector:
    matchLabels: {{apps: served}}
inference:
  preset:
    name: {name}
    presetOptions:
      modelAccessSecret: hub
---
apiVersion: v1
kind: Secret
metadata:
  name: hub
stringData:
  HF_TOKEN: hf_right
""",
        encoding="utf-8",
    )
    return str(path)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KAITO_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return tmp_path / "home"


def test_a_model_of_the_hub_with_the_token_of_the_secret(hub: Hub, tmp_path: Path, home: Path) -> None:
    hub.gated = "manual"
    (given,) = read([workspace(tmp_path, f"{REPO}@{COMMIT}")])
    preset = registry_of(given, PLUGINS).preset(f"{REPO}@{COMMIT}")
    assert (preset.name, preset.gated) == ("me-tiny-llama", True)
    (kept,) = (home / "cache" / "models").iterdir()
    assert "hf_right" not in kept.read_text(encoding="utf-8")
    hub.requests.clear()
    assert registry_of(given, PLUGINS, cluster=True).preset(f"{REPO}@{COMMIT}") == preset
    assert not hub.requests


def test_a_folder_beside_the_file_and_not_in_a_cluster(tmp_path: Path) -> None:
    write(tmp_path / "tiny", model_files())
    (given,) = read([workspace(tmp_path, "./tiny")])
    found = registry_of(given, PLUGINS)
    assert found.preset("./tiny").architecture.layers == 2
    assert found.folders == {"tiny": str(tmp_path / "tiny")}
    with pytest.raises(UserError, match="a cluster cannot read the folder"):
        registry_of(given, PLUGINS, cluster=True)


def test_a_preset_is_nothing_to_read(tmp_path: Path) -> None:
    (given,) = read([workspace(tmp_path, "phi-4")])
    assert registry_of(given, PLUGINS).models == {}
