"""Pushing to a real registry, and pulling the same bytes back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from kaito_core.artifacts.credentials import Credentials, credentials_for
from kaito_core.artifacts.errors import RegistryError
from kaito_core.artifacts.image import build_adapter_image
from kaito_core.artifacts.layout import Layout
from kaito_core.artifacts.pull import pull
from kaito_core.artifacts.push import push
from kaito_core.artifacts.registry import check_push
from kaito_core.oci_reference import Reference
from kaito_core.problems import Failure, UserError
from kaito_core.testing.registry import Registry, free_port, running_registry, why_no_registry

from .conftest import Naps, TokenRegistry


@pytest.fixture
def layout(adapter: Path, tmp_path: Path) -> Path:
    build_adapter_image(adapter, tmp_path / "image", model_name="phi-3-mini", annotations={"k": "v"}, tag="1")
    return tmp_path / "image"


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_what_is_pushed_comes_back_byte_for_byte(
    registry: Registry, adapter: Path, layout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(registry.write_docker_config(tmp_path / "docker").parent))
    reference = Reference.parse(f"{registry.host}/team/adapter:1")
    credentials = credentials_for(reference)
    seen: list[tuple[int, int]] = []
    digest = push(layout, reference, credentials, lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == max(done for done, _ in seen)

    by_tag = pull(reference, tmp_path / "out", credentials)
    assert by_tag.digest == digest
    assert by_tag.annotations == {"sh.kaito.model.name": "phi-3-mini", "k": "v"}
    assert by_tag.files == ("README.md", "adapter_config.json", "adapter_model.safetensors")
    expected = {name: (adapter / name).read_bytes() for name in by_tag.files}
    assert content(tmp_path / "out") == expected

    by_digest = pull(Reference.parse(f"{reference.name}@{digest}"), tmp_path / "again", credentials)
    assert by_digest == by_tag
    assert pull(layout, tmp_path / "local", tag="1") == by_tag


def test_a_second_push_sends_no_blob(token_registry: TokenRegistry, layout: Path, naps: Naps) -> None:
    reference = Reference.parse(f"{token_registry.host}/adapter:1")
    first = push(layout, reference, Credentials("kaito", "s3cret"), sleep=naps)
    assert len(token_registry.asked("POST", "uploads")) == 2
    token_registry.requests.clear()
    assert push(layout, reference, Credentials("kaito", "s3cret"), sleep=naps) == first
    assert token_registry.asked("POST") == []
    assert token_registry.asked("PUT") == ["/v2/adapter/manifests/1"]


def test_the_right_to_push_is_proven_before_any_work_and_leaves_nothing(registry: Registry, naps: Naps) -> None:
    """KAITO's defect 11: a wrong imagePushSecret is found after hours of training."""
    reference = Reference.parse(f"{registry.host}/checked/only:1")
    check_push(reference, Credentials(registry.username, registry.password), sleep=naps)
    catalogue = httpx.get(
        f"http://{registry.host}/v2/_catalog", auth=(registry.username, registry.password), trust_env=False
    )
    assert "checked/only" not in catalogue.json()["repositories"]
    # The session is gone; an empty hash that distribution 2.8 writes as it closes one is purged by itself.
    assert list(registry.folder.glob("storage/**/checked/**/startedat")) == []
    assert list(registry.folder.glob("storage/**/checked/**/data")) == []

    with pytest.raises(RegistryError) as e:
        check_push(reference, Credentials(registry.username, "wrong"), sleep=naps)
    assert e.value.reason == "credentials"
    assert f"{reference}: the registry refused the user name or password (user 'kaito')" in str(e.value)
    assert "UNAUTHORIZED: authentication required" in str(e.value)
    assert f"docker login {registry.host}" in str(e.value)
    assert "imagePushSecret" in str(e.value)
    assert "wrong" not in str(e.value)

    with pytest.raises(RegistryError, match="there are none for it") as e:
        check_push(reference, None, sleep=naps)
    assert e.value.reason == "credentials"
    assert naps == []  # none of these gets better by waiting


def test_a_dead_registry_is_tried_again_and_then_named(layout: Path, naps: Naps) -> None:
    reference = Reference.parse(f"127.0.0.1:{free_port()}/adapter:1")
    before = content(layout)
    with pytest.raises(RegistryError, match=r"cannot be reached: .*refused") as e:
        push(layout, reference, sleep=naps)
    assert e.value.reason == "unreachable"
    assert naps == [1, 2, 4, 8]
    assert content(layout) == before


def test_a_host_that_does_not_exist_is_named(naps: Naps) -> None:
    with pytest.raises(RegistryError, match=r"registry\.invalid cannot be reached") as e:
        check_push(Reference.parse("registry.invalid/a:1"), sleep=naps)
    assert e.value.reason == "unreachable"


def test_a_push_that_failed_is_finished_when_the_registry_is_back(layout: Path, tmp_path: Path, naps: Naps) -> None:
    """KAITO's defect 11: there a failed push repeats the training; here it costs nothing but itself."""
    if reason := why_no_registry():
        pytest.skip(reason)
    port = free_port()
    reference = Reference.parse(f"127.0.0.1:{port}/adapter:1")
    credentials = Credentials("kaito", "secret")
    with pytest.raises(RegistryError):
        push(layout, reference, credentials, sleep=naps)
    with running_registry(tmp_path / "registry", port=port):
        digest = push(layout, reference, credentials, sleep=naps)
        assert pull(reference, tmp_path / "out", credentials).digest == digest


@pytest.mark.parametrize("chunk_bytes", [64 << 20, 100_000])
def test_a_broken_connection_does_not_break_a_push(
    registry: Registry,
    layout: Path,
    tmp_path: Path,
    naps: Naps,
    cut_wire: Callable[[str, int], str],
    chunk_bytes: int,
) -> None:
    near = cut_wire(registry.host, 230_000)
    credentials = Credentials(registry.username, registry.password)
    reference = Reference.parse(f"{near}/broken/in-{chunk_bytes}:1")
    digest = push(layout, reference, credentials, chunk_bytes=chunk_bytes, sleep=naps)
    assert naps
    direct = Reference.parse(f"{registry.host}/broken/in-{chunk_bytes}:1")
    assert pull(direct, tmp_path / "out", credentials).digest == digest


def test_a_digest_cannot_be_pushed_to(layout: Path) -> None:
    with pytest.raises(UserError, match="a push needs a tag"):
        push(layout, Reference.parse("host.io/a@sha256:" + "0" * 64))


def test_a_folder_that_is_no_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not an OCI image layout"):
        push(tmp_path, Reference.parse("host.io/a:1"))


def test_a_damaged_layout_is_found_before_anything_is_sent(layout: Path) -> None:
    entry = Layout.open(layout).find("1")
    Layout.open(layout).blob_path(entry).write_bytes(b"x" * entry.size)
    with pytest.raises(Failure, match="is damaged"):
        push(layout, Reference.parse("127.0.0.1:1/a:1"))
