"""Paths in a workspace that runs on this machine: relative ones belong to the file that says them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kaito_core.problems import UserError

if TYPE_CHECKING:
    from kaito_core.api import Workspace


def anchored(workspace: Workspace, base: Path) -> Workspace:
    """The same workspace with every relative path (data, host paths) below ``base``, the folder of its YAML file."""
    if workspace.inference is not None:
        workspace = _with_adapters(workspace, base)
    tuning = workspace.tuning
    if tuning is None:
        return workspace
    source, destination = tuning.input, tuning.output
    changes = {
        "input": source.model_copy(
            update={
                "urls": tuple(_url(u, base) for u in source.urls),
                "volume_source": _volume(source.volume_source, base),
            }
        ),
        "output": destination.model_copy(update={"volume_source": _volume(destination.volume_source, base)}),
    }
    return workspace.model_copy(update={"tuning": tuning.model_copy(update=changes)})


def _with_adapters(workspace: Workspace, base: Path) -> Workspace:
    inference = workspace.inference
    assert inference is not None
    adapters = tuple(
        a.model_copy(
            update={"source": a.source.model_copy(update={"volume_source": _volume(a.source.volume_source, base)})}
        )
        for a in inference.adapters
    )
    return workspace.model_copy(update={"inference": inference.model_copy(update={"adapters": adapters})})


def _url(url: str, base: Path) -> str:
    scheme, separator, rest = url.partition("://")
    if separator and scheme.lower() != "file":
        return url
    if separator and rest.startswith("/"):
        return url
    return _under(base, rest if separator else url)


def _volume(source: Mapping[str, Any] | None, base: Path) -> dict[str, Any] | None:
    if source is None:
        return None
    host = source.get("hostPath")
    if not isinstance(host, Mapping) or not isinstance(host.get("path"), str):
        return dict(source)
    return {**source, "hostPath": {**host, "path": _under(base, host["path"])}}


def _under(base: Path, path: str) -> str:
    return os.path.normpath(base / os.path.expanduser(path))  # noqa: PTH111 – Path.expanduser raises for "~nobody"


def local_folder(name: str, source: Mapping[str, Any] | None, scratch: Path) -> Path:
    """The folder on this machine that stands for a volume source. UserError when only a cluster has such a volume."""
    if source is None or "emptyDir" in source:
        return scratch
    host = source.get("hostPath")
    if isinstance(host, Mapping) and isinstance(host.get("path"), str):
        return Path(host["path"])
    kind = next(iter(source), "volume")
    raise UserError(
        f"the {name} volume is a {kind}, which exists only in a cluster",
        "on this machine use `hostPath: {path: FOLDER}`; a relative folder belongs to the YAML file",
    )
