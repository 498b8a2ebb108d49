"""Files of a volume that a Workspace names: what is in it is read, and nothing that its links point to outside of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kaito_core.problems import UserError


def stay_inside(files: Iterable[Path], root: Path, source: Mapping[str, Any], field: str) -> None:
    """UserError when one of the files is, by symbolic links, outside of ``root``, where the volume ``source`` is mounted: a pod holds
    the passwords of registries besides. A folder of the machine itself (``hostPath``) may have links to anywhere."""
    if "hostPath" in source:
        return
    top = root.resolve()
    for path in files:
        if not path.resolve().is_relative_to(top):
            raise UserError(
                f"{path.relative_to(root)} is a link to {path.resolve()}, which is not in the volume",
                "put the file itself into the volume",
                field=field,
            )
