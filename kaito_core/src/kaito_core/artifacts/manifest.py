"""OCI descriptors and manifests: what they hold, and reading those that somebody else wrote.

Field names and media types are those of the OCI image specification v1.1 and of Docker's image manifest v2, schema 2.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kaito_core.oci_reference import is_digest
from kaito_core.problems import Failure

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
OCI_LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"

READABLE_LAYERS = (
    OCI_LAYER,
    OCI_LAYER_GZIP,
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
)
MAX_MANIFEST_BYTES = 4 << 20
"""What the distribution specification asks registries to accept; nothing larger is read."""

MODEL_NAME = "sh.kaito.model.name"
"""The annotation in which KAITO names the preset that an adapter belongs to."""
REF_NAME = "org.opencontainers.image.ref.name"


@dataclass(frozen=True, slots=True)
class Descriptor:
    """Points at content by its digest. ``size`` in bytes."""

    media_type: str
    digest: str
    size: int
    annotations: Mapping[str, str] = field(default_factory=dict)
    platform: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, media_type: str, content: bytes) -> Descriptor:
        """The descriptor of ``content``."""
        return cls(media_type, digest_of(content), len(content))

    @classmethod
    def read(cls, value: Any, where: str) -> Descriptor:
        """Read one from JSON; a `Failure` that names ``where`` if it is none."""
        match value:
            case {"mediaType": str(media_type), "digest": str(digest), "size": int(size)} if (
                is_digest(digest) and size >= 0
            ):
                return cls(media_type, digest, size, texts(value.get("annotations")), texts(value.get("platform")))
        raise Failure(f"{where}: a descriptor in it has no mediaType, sha256 digest and size")

    def to_json(self) -> dict[str, Any]:
        """As the specification writes it."""
        result: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        if self.annotations:
            result["annotations"] = dict(self.annotations)
        if self.platform:
            result["platform"] = dict(self.platform)
        return result


@dataclass(frozen=True, slots=True)
class Manifest:
    """An image: its config and its layers, the base first."""

    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: Mapping[str, str]

    @property
    def blobs(self) -> tuple[Descriptor, ...]:
        """Everything that the image needs beside the manifest itself, each digest once, in the order of a push."""
        return tuple({d.digest: d for d in (*self.layers, self.config)}.values())


def digest_of(content: bytes) -> str:
    """``sha256:…``"""
    return "sha256:" + hashlib.sha256(content).hexdigest()


def canonical(value: Any) -> bytes:
    """JSON that is the same bytes for the same value, so that the same image has the same digest."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def read_document(content: bytes, where: str) -> dict[str, Any]:
    """A manifest or an index as JSON; ``where`` names it in a `Failure`."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        raise Failure(f"{where} is not JSON") from None
    if not isinstance(document, dict) or document.get("schemaVersion") != 2:
        raise Failure(
            f"{where} is not an image manifest of schema version 2", "build and push the image anew with a current tool"
        )
    return document


def is_index(document: Mapping[str, Any]) -> bool:
    """Whether it lists images (for several platforms) instead of being one."""
    return document.get("mediaType") in (OCI_INDEX, DOCKER_LIST) or (
        "manifests" in document and "layers" not in document
    )


def read_index(document: Mapping[str, Any], where: str) -> tuple[Descriptor, ...]:
    """The entries of an index."""
    entries = document.get("manifests")
    if not isinstance(entries, list):
        raise Failure(f"{where} is an index without a list of manifests")
    return tuple(Descriptor.read(entry, where) for entry in entries)


def read_manifest(document: Mapping[str, Any], where: str) -> Manifest:
    """An image manifest, OCI or Docker."""
    layers = document.get("layers")
    if not isinstance(layers, list):
        raise Failure(f"{where} is an image manifest without a list of layers")
    return Manifest(
        Descriptor.read(document.get("config"), where),
        tuple(Descriptor.read(layer, where) for layer in layers),
        texts(document.get("annotations")),
    )


def texts(value: Any) -> dict[str, str]:
    """The entries of a JSON object that are text; what else somebody put there is of no use to us."""
    return {k: v for k, v in value.items() if isinstance(v, str)} if isinstance(value, dict) else {}
