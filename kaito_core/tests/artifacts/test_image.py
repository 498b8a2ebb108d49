"""The adapter image: what is in it, and that the same adapter is the same image."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaito_core.artifacts.image import build_adapter_image
from kaito_core.artifacts.layout import Layout
from kaito_core.artifacts.manifest import REF_NAME, read_document, read_manifest
from kaito_core.problems import UserError


def build(adapter: Path, layout: Path, tag: str = "1") -> str:
    return build_adapter_image(adapter, layout, model_name="phi-3-mini", annotations={"a.b": "c"}, tag=tag)


def test_the_image_is_what_kaito_expects(adapter: Path, tmp_path: Path) -> None:
    digest = build(adapter, tmp_path / "image")
    layout = Layout.open(tmp_path / "image")
    entry = layout.find("1")
    assert (entry.digest, entry.annotations) == (digest, {REF_NAME: "1"})
    manifest = read_manifest(read_document(layout.read(entry), ""), "")
    assert manifest.annotations == {"sh.kaito.model.name": "phi-3-mini", "a.b": "c"}
    (layer,) = manifest.layers
    assert layer.media_type == "application/vnd.oci.image.layer.v1.tar+gzip"
    plain = gzip.decompress(layout.blob_path(layer).read_bytes())
    config = json.loads(layout.read(manifest.config))
    assert config == {
        "architecture": "amd64",
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(plain).hexdigest()]},
    }
    with tarfile.open(fileobj=io.BytesIO(plain)) as tar:
        members = tar.getmembers()
    assert [m.name for m in members] == [
        "data/README.md",
        "data/adapter_config.json",
        "data/adapter_model.safetensors",
    ]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.mode, m.type) for m in members} == {
        (0, 0, 0, "", 0o644, tarfile.REGTYPE)
    }


@settings(max_examples=25, deadline=None)
@given(
    weights=st.binary(max_size=2000),
    names=st.lists(st.from_regex(r"[a-zäß]{1,80}\.(json|md)", fullmatch=True), unique=True, max_size=3),
    when=st.integers(0, 2**31),
)
def test_the_same_adapter_has_the_same_digest(weights: bytes, names: list[str], when: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        digests = set()
        for number, order in enumerate((names, names[::-1])):
            adapter = Path(folder) / str(number)
            adapter.mkdir()
            for name in (*order, "adapter_model.safetensors", "adapter_config.json"):
                (adapter / name).write_bytes(weights)
                (adapter / name).chmod(0o600 + 0o44 * number)
                os.utime(adapter / name, (when * number, when * number))
            digests.add(build(adapter, Path(folder) / f"image-{number}"))
    assert len(digests) == 1


def test_building_into_the_same_layout_again_changes_nothing(adapter: Path, tmp_path: Path) -> None:
    def state() -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in (tmp_path / "image").rglob("*") if p.is_file()}

    build(adapter, tmp_path / "image")
    before = state()
    build(adapter, tmp_path / "image")
    assert state() == before
    build(adapter, tmp_path / "image", tag="2")
    assert {d.annotations[REF_NAME] for d in Layout.open(tmp_path / "image").images()} == {"1", "2"}


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_without_an_adapter_is_refused(adapter: Path, tmp_path: Path, name: str) -> None:
    (adapter / name).unlink()
    with pytest.raises(UserError, match=f"it has no {name}"):
        build(adapter, tmp_path / "image")


def test_a_link_does_not_smuggle_a_file_in(adapter: Path, tmp_path: Path) -> None:
    (adapter / "secret.json").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match=r"secret\.json is not a regular file"):
        build(adapter, tmp_path / "image")


@pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo not found: apt-get install skopeo")
def test_other_tools_read_the_layout(adapter: Path, tmp_path: Path) -> None:
    digest = build(adapter, tmp_path / "image")
    image = f"oci:{tmp_path}/image:1"
    shown = subprocess.run(["skopeo", "inspect", image], capture_output=True, check=True)
    assert json.loads(shown.stdout)["Digest"] == digest
    copy = tmp_path / "copy.tar"
    subprocess.run(["skopeo", "--insecure-policy", "copy", image, f"docker-archive:{copy}:x:1"], check=True)
    assert copy.stat().st_size > 0
