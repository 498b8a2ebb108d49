"""A hub's model in the cache that all starts share: fetched once, and checked by digest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kaito_core.cli.model import command
from kaito_core.plugins import ModelSource
from kaito_core.problems import Failure
from kaito_core.stages.model_files import from_hub
from kaito_core.testing.registry import running_registry, why_no_registry

from .test_hub import COMMIT, FILES, serve

SOURCE = ModelSource(hub="org/name", revision=COMMIT)
WEIGHTS = f"/org/name/resolve/{COMMIT}/model.safetensors"


@pytest.fixture
def hub(server: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    serve(server, FILES)
    return server


def test_a_second_start_asks_the_hub_for_nothing(hub: Any, tmp_path: Path) -> None:
    said: list[str] = []
    first = from_hub(SOURCE, tmp_path, said.append)
    assert {p.name for p in first.path.iterdir() if not p.name.startswith(".")} == {
        "config.json",
        "tokenizer.json",
        "model.safetensors",
    }
    hub.requests.clear()
    assert from_hub(SOURCE, tmp_path, said.append).path == first.path
    assert hub.requests == []
    assert said == [
        f"model: downloading org/name at {COMMIT[:12]}",
        f"model: org/name at {COMMIT[:12]} is in the cache",
    ]


def test_a_download_that_broke_is_gone_on_with(hub: Any, tmp_path: Path) -> None:
    hub.statuses[WEIGHTS] = [(403, "not now")]  # what the hub's client does not try again by itself
    hub.always = True
    with pytest.raises(Failure, match="has failed"):
        from_hub(SOURCE, tmp_path, lambda _: None)
    assert not [p for p in (tmp_path / "folders").iterdir() if p.suffix not in (".lock", ".part")]
    hub.statuses.clear()
    assert (from_hub(SOURCE, tmp_path, lambda _: None).path / "model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize(
    "digest", [hashlib.sha256(b"weights").hexdigest(), hashlib.sha1(b"blob 7\0weights").hexdigest()]
)
def test_what_came_is_compared_with_the_hubs_digest(hub: Any, tmp_path: Path, digest: str) -> None:
    hub.headers[WEIGHTS]["X-Linked-Etag"] = f'"{digest}"'
    from_hub(SOURCE, tmp_path / "right", lambda _: None)
    hub.files[WEIGHTS] = b"weightz"
    with pytest.raises(Failure, match=r"model\.safetensors is not what the hub says that it is"):
        from_hub(SOURCE, tmp_path / "wrong", lambda _: None)
    hub.files[WEIGHTS] = b"weights"
    found = from_hub(SOURCE, tmp_path / "wrong", lambda _: None)
    assert (found.path / "model.safetensors").read_bytes() == b"weights"


def test_a_hubs_model_is_pushed_with_its_revision_and_its_licence(
    hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo = pytest.importorskip("kaito_preset_demo")
    if reason := why_no_registry():
        pytest.skip(reason)
    serve(hub, {p.name: p.read_bytes() for p in demo.MODEL_DIR.iterdir()} | {"README.md": b"# model"})
    info = f"/api/models/org/name/revision/{COMMIT}"
    hub.ranges = False  # its own are only those of a resumed download
    about = {**json.loads(hub.files[info]), "cardData": {"license": "mit"}}
    hub.files[info] = hub.files["/api/models/org/name/revision/main"] = json.dumps(about).encode()
    hub.headers["/api/models/org/name/revision/main"] = {"Content-Type": "application/json"}
    monkeypatch.setenv("KAITO_HOME", str(tmp_path / "home"))
    with running_registry(tmp_path / "registry") as registry:
        monkeypatch.setenv("DOCKER_CONFIG", str(registry.write_docker_config(tmp_path / "docker").parent))
        image = f"{registry.host}/models/from-hub:1"
        digests = set()
        for name in ("org/name", f"org/name@{COMMIT}"):
            answer = CliRunner().invoke(command, ["push", name, image])
            assert answer.exit_code == 0, answer.output
            digests.add(next(line for line in answer.stdout.splitlines() if line.startswith("pushed ")))
        shown = CliRunner().invoke(command, ["show", image]).output
    assert len(digests) == 1  # `main` is this commit today
    assert f"org.opencontainers.image.revision: {COMMIT}" in shown
    assert "org.opencontainers.image.source: https://huggingface.co/org/name" in shown
    assert "org.opencontainers.image.licenses: mit" in shown.lower()
