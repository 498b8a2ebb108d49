"""What the layers of a manifest are: parts of an image's file system, archives, or one file each.

Images have archives that are laid over each other. Artifacts, which no container runtime unpacks, hold files as they are:

* ORAS names a file in ``org.opencontainers.image.title``, and marks a folder, which it packs, with
  ``io.deis.oras.content.unpack`` (https://oras.land/docs/commands/oras_push). KAITO's presets were pushed with it, with the media
  type ``application/vnd.kaito.llm.v1``.
* ModelPack (https://github.com/modelpack/model-spec) names it in ``org.cncf.model.filepath``, and says in the media type whether it
  is packed: ``application/vnd.cncf.model.weight.v1.raw``, ``….tar``. KAITO's newer presets are made this way.
* Docker Model Runner has ``application/vnd.docker.ai.safetensors`` for each file of weights, in the order of the shards, and, in its
  first form, one archive with everything beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kaito_core.artifacts.layers import file_name
from kaito_core.artifacts.manifest import DOCKER_CONFIG, OCI_CONFIG, READABLE_LAYERS, Descriptor, Manifest
from kaito_core.problems import UserError

TITLE = "org.opencontainers.image.title"
MODELPACK_PATH = "org.cncf.model.filepath"
ORAS_UNPACK = "io.deis.oras.content.unpack"
MODEL_FILE = "sh.kaito.model.file"
"""Which file of the model an image's layer holds, in images that kaito pushed."""

_MODELPACK, _DOCKER = "application/vnd.cncf.model.", "application/vnd.docker.ai."
_DOCKER_NAMES = {f"{_DOCKER}license": "LICENSE", f"{_DOCKER}chat.template.jinja": "chat_template.jinja"}
_EMPTY_BYTES = 2
"""The size of ``{}``, which tools put where a config must be and they have none."""


@dataclass(frozen=True, slots=True)
class Content:
    """One layer, and how it is read."""

    layer: Descriptor
    kind: Literal["image", "archive", "file"]
    """``image``: an archive whose paths begin at the image's root; ``archive``: one whose paths are the files' own."""
    name: str = ""
    """The file that it holds, as far as that is said: always with ``file``."""


def contents(manifest: Manifest, where: str) -> tuple[Content, ...]:
    """How each layer is read. `UserError`, in which ``where`` names the image, for one that cannot be; `Failure` for a file name
    that leads out of its folder."""
    config = manifest.config
    image = config.media_type in (OCI_CONFIG, DOCKER_CONFIG) and config.size > _EMPTY_BYTES
    weights = [d for d in manifest.layers if d.media_type == f"{_DOCKER}safetensors"]
    found = []
    for layer in manifest.layers:
        here = f"{where}: the layer {layer.digest}"
        name = "" if image else layer.annotations.get(MODELPACK_PATH) or layer.annotations.get(TITLE, "")
        if image:
            name = layer.annotations.get(MODEL_FILE, "")
        elif layer in weights and not name:
            shard = weights.index(layer) + 1
            name = f"model-{shard:05d}-of-{len(weights):05d}.safetensors" if len(weights) > 1 else "model.safetensors"
        name = name or _DOCKER_NAMES.get(layer.media_type, "")
        if "zstd" in layer.media_type:
            raise UserError(
                f"{here} is compressed with zstd, which cannot be read", "push it uncompressed, or with gzip"
            )
        packed = layer.media_type.startswith((_MODELPACK, _DOCKER)) and layer.media_type.endswith((".tar", ".tar+gzip"))
        if packed or (not image and layer.annotations.get(ORAS_UNPACK) == "true"):
            found.append(Content(layer, "archive"))
        elif name and not image:
            found.append(Content(layer, "file", file_name(name, here)))
        elif layer.media_type in READABLE_LAYERS:
            found.append(Content(layer, "image", name))
        else:
            raise UserError(
                f"{here} has the type {layer.media_type!r} and no file name, so that it cannot be read",
                "push an image whose layers are tar or gzip-compressed tar, or an artifact with a file in each layer",
            )
    return tuple(found)
