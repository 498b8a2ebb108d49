"""Where kaito keeps things on this machine: one folder per run, and one cache for all."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """``$KAITO_HOME``, else the user's data folder (``$XDG_DATA_HOME/kaito``, ``~/.local/share/kaito``)."""
    named = os.environ.get("KAITO_HOME")
    if named:
        return Path(named).expanduser().absolute()
    data = os.environ.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local" / "share") / "kaito"


def runs_folder() -> Path:
    """The folder with one subfolder per run."""
    return home() / "runs"


def cache_folder() -> Path:
    """Downloads by content, shared by all runs."""
    return home() / "cache"


def model_folders() -> dict[str, str]:
    """Weights that the user keeps: the subfolders of ``$KAITO_MODELS`` by preset name."""
    root = os.environ.get("KAITO_MODELS")
    if not root or not Path(root).is_dir():
        return {}
    return {p.name.lower(): str(p.absolute()) for p in sorted(Path(root).iterdir()) if (p / "config.json").is_file()}
