"""An adapter as an OCI image that KAITO, containerd and Kubernetes image volumes can read.

KAITO looks for ``/data/adapter_config.json`` and ``/data/adapter_model.safetensors`` in any layer of any image; ours has
just one layer and no base. It is reproducible: no clock, no owner and no name of this machine goes in, so that the same
adapter has the same digest and a second push sends nothing.
"""

from __future__ import annotations

import gzip
import hashlib
import stat
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, cast

from kaito_core.artifacts.layout import Layout
from kaito_core.artifacts.manifest import MODEL_NAME, OCI_CONFIG, OCI_LAYER_GZIP, OCI_MANIFEST, Descriptor, canonical
from kaito_core.problems import UserError

NEEDED = ("adapter_config.json", "adapter_model.safetensors")
BESIDE = frozenset({".json", ".jinja", ".md", ".model", ".tiktoken", ".txt"})
"""Suffixes of what may go in beside the adapter: tokenizer, chat template, model card, checks. Never pickles (``.bin``)."""

GZIP_LEVEL = 1
"""Fixed, because the digest depends on it. Weights hardly shrink, so a higher level would only cost time."""


def build_adapter_image(
    adapter_dir: Path, layout: Path, *, model_name: str, annotations: Mapping[str, str], tag: str
) -> str:
    """Write the adapter in ``adapter_dir`` into the OCI layout ``layout`` (made if need be) as ``tag``.

    ``model_name`` is the preset it belongs to; ``annotations`` are added to the manifest. Returns the manifest's digest.
    Raises `UserError` if the folder holds no adapter, or links where files should be.
    """
    files = adapter_files(adapter_dir)
    target = Layout.create(layout)
    layer, diff_id = _add_layer(target, files)
    config = target.add(
        OCI_CONFIG,
        canonical(
            {"architecture": "amd64", "os": "linux", "config": {}, "rootfs": {"type": "layers", "diff_ids": [diff_id]}}
        ),
    )
    manifest = target.add(
        OCI_MANIFEST,
        canonical(
            {
                "schemaVersion": 2,
                "mediaType": OCI_MANIFEST,
                "config": config.to_json(),
                "layers": [layer.to_json()],
                "annotations": {**annotations, MODEL_NAME: model_name},
            }
        ),
    )
    target.tag(manifest, tag)
    return manifest.digest


def adapter_files(folder: Path) -> list[Path]:
    """What of an adapter's folder goes into its image, sorted by name."""
    if not folder.is_dir():
        raise UserError(f"there is no adapter folder {folder}")
    files = [p for p in folder.iterdir() if p.name in NEEDED or (p.suffix in BESIDE and not p.name.startswith("."))]
    for name in NEEDED:
        if folder / name not in files:
            raise UserError(f"{folder} is not an adapter: it has no {name}", "name the folder that training wrote")
    for path in files:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise UserError(f"{path} is not a regular file", "an image holds files only: copy it in place of the link")
    return sorted(files, key=lambda p: p.name)


def _add_layer(layout: Layout, files: list[Path]) -> tuple[Descriptor, str]:
    """The layer, and its diff_id: the digest of the tar before compression."""
    with layout.writer(OCI_LAYER_GZIP) as (blob, finish):
        with gzip.GzipFile(filename="", mode="wb", compresslevel=GZIP_LEVEL, fileobj=blob, mtime=0) as compressed:
            plain = _Hashing(compressed)
            with tarfile.open(fileobj=cast(IO[bytes], plain), mode="w|", format=tarfile.PAX_FORMAT) as tar:
                for path in files:
                    member = tarfile.TarInfo(f"data/{path.name}")  # mtime 0, uid and gid 0, mode 0644, regular file
                    with path.open("rb") as f:
                        member.size = path.stat().st_size
                        tar.addfile(member, f)
        return finish(), f"sha256:{plain.sha256.hexdigest()}"


class _Hashing:
    """Passes on what is written to it, and knows its digest."""

    def __init__(self, target: gzip.GzipFile) -> None:
        self.target = target
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self.target.write(data)
