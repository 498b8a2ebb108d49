"""Registry log-ins from Secrets of type ``kubernetes.io/dockerconfigjson``, merged into the one file that tools read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kaito_core.problems import UserError

KEY = ".dockerconfigjson"


def auths(name: str, content: bytes | None) -> dict[str, Any]:
    """The log-ins of one Secret by registry. UserError, which never shows the content, when it is not of that form."""
    if content is None:
        raise UserError(
            f"the Secret {name!r} has no key {KEY}",
            "make it with `kubectl create secret docker-registry`, type kubernetes.io/dockerconfigjson",
        )
    try:
        found = json.loads(content)["auths"]
        if not isinstance(found, dict):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f'{KEY} of the Secret {name!r} is not JSON of the form {{"auths": …}}') from None
    return found


def write_docker_config(folder: Path, merged: Mapping[str, Any]) -> None:
    """``config.json`` in ``folder``, readable by nobody else."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / "config.json"
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as f:
        json.dump({"auths": dict(merged)}, f)
