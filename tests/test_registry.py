"""From a workspace to an image in a real registry with a password, and back."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from kaito_core.testing.registry import Registry, running_registry, why_no_registry
from tests.conftest import Kaito, workspace

pytest.importorskip("torch", reason="training needs the extra: pip install 'kaito-tuner-qlora[train]'")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_no_registry()), reason=why_no_registry())]


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with running_registry(tmp_path / "registry", "tuner", "s3cret") as running:
        yield running


def secret(host: str, password: str) -> str:
    auths = {"auths": {host: {"auth": base64.b64encode(f"tuner:{password}".encode()).decode()}}}
    content = base64.b64encode(json.dumps(auths).encode()).decode()
    return f"""---
apiVersion: v1
kind: Secret
metadata: {{name: registry-login}}
type: kubernetes.io/dockerconfigjson
data:
  .dockerconfigjson: {content}
"""


def test_pushed_with_the_secret_of_the_file_and_pulled_back_the_same(
    kaito: Kaito, registry: Registry, tmp_path: Path
) -> None:
    from kaito_core.artifacts.credentials import Credentials
    from kaito_core.artifacts.pull import pull
    from kaito_core.oci_reference import Reference

    image = f"{registry.host}/team/adapter:1"
    path = workspace(tmp_path / "w", name="pushed", image=image, extra=secret(registry.host, "s3cret"))
    answer = kaito("run", "--local", "--yes", path)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "s3cret" not in answer.stdout + answer.stderr

    run = tmp_path / "home" / "runs" / "pushed"
    pulled = pull(Reference.parse(image), tmp_path / "pulled", Credentials("tuner", "s3cret"))
    adapter = run / "results" / "adapter"
    assert {p.name: p.read_bytes() for p in (tmp_path / "pulled").iterdir()} == {
        p.name: p.read_bytes() for p in adapter.iterdir()
    }
    assert pulled.annotations["sh.kaito.model.name"] == "demo-phi-3"
    assert pulled.annotations["sh.kaito.data.digest"].startswith("sha256:")
    assert "s3cret" not in "".join(
        p.read_text(errors="replace") for p in run.rglob("*") if p.is_file() and p.suffix in (".json", ".log", ".jsonl")
    )
    assert not (run / "secrets").exists()


def test_a_wrong_password_is_found_before_any_training(kaito: Kaito, registry: Registry, tmp_path: Path) -> None:
    """KAITO's defect 11: a wrong imagePushSecret is discovered after hours of training, which is then repeated."""
    image = f"{registry.host}/team/adapter:1"
    path = workspace(tmp_path / "w", name="wrong", image=image, extra=secret(registry.host, "guessed"))
    answer = kaito("run", "--local", "--yes", path)
    assert answer.returncode == 2
    assert registry.host in answer.stderr
    assert not (tmp_path / "home" / "runs" / "wrong" / "logs" / "train.log").exists()


def test_a_registry_that_dies_never_costs_the_training(kaito: Kaito, tmp_path: Path) -> None:
    alive = ExitStack()
    running = alive.enter_context(running_registry(tmp_path / "registry", "tuner", "s3cret"))
    path = workspace(
        tmp_path / "w", name="late", image=f"{running.host}/team/adapter:1", extra=secret(running.host, "s3cret")
    )
    folder = tmp_path / "home" / "runs" / "late"
    # The registry dies between the check of the push rights and the push itself.
    end = threading.Thread(target=_close_when, args=(folder / "logs" / "train.log", alive))
    end.start()
    answer = kaito("run", "--local", "--yes", path)
    end.join()
    assert answer.returncode == 1
    assert (folder / "results" / "adapter" / "adapter_model.safetensors").is_file()
    trained = (folder / "results" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns

    with running_registry(
        tmp_path / "registry", "tuner", "s3cret", port=int(running.host.rpartition(":")[2])
    ) as running:
        (tmp_path / "docker" / "config.json").write_text(
            json.dumps({"auths": {running.host: {"auth": base64.b64encode(b"tuner:s3cret").decode()}}}),
            encoding="utf-8",
        )
        pushed = kaito("push", "late")
        assert pushed.returncode == 0, pushed.stderr
        assert "sha256:" in pushed.stdout
    assert (folder / "results" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == trained
    assert "Succeeded" in kaito("status", "late").stdout


def _close_when(path: Path, alive: ExitStack) -> None:
    deadline = time.monotonic() + 300
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    alive.close()
