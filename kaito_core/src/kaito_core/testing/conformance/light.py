"""Whether a plugin is light: what its module and its hooks import, and whether they go to the network, found out in a fresh process.

`kaito` imports every installed plugin for nearly every command. One that imports torch there makes each of them wait for seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from kaito_core.plugins.installed import HEAVY

PATIENCE: Final = 60.0
"""Seconds after which a plugin that is being imported counts as one that hangs."""

_PROGRAM: Final = """
import importlib, json, socket, sys

asked = []

def refuse(what):
    def refused(*arguments, **named):
        asked.append(what)
        raise OSError("a plugin takes no network while it is loaded")
    return refused

socket.socket.connect = refuse("connect")
socket.socket.connect_ex = refuse("connect_ex")
socket.getaddrinfo = refuse("getaddrinfo")

module, error = sys.argv[1], ""
try:
    loaded = importlib.import_module(module)
    for name in ("kaito_presets", "kaito_node_provisioners", "kaito_tuners", "kaito_runtimes", "kaito_commands"):
        hook = getattr(loaded, name, None)
        if callable(hook):
            list(hook())
except BaseException as e:
    error = f"{type(e).__name__}: {e}"
heavy = [name for name in sys.argv[2:] if name in sys.modules]
sys.stdout.write("\\n" + json.dumps({"heavy": heavy, "network": sorted(set(asked)), "error": error}) + "\\n")
sys.stdout.flush()
"""


@dataclass(frozen=True)
class Loaded:
    """What loading a plugin did."""

    heavy: tuple[str, ...] = ()
    """Of `HEAVY`, what was imported after it."""
    network: bool = False
    """Whether it tried to reach the network."""
    error: str = ""
    """Why it could not be loaded; empty when it could."""


def load(module: str, heavy: Iterable[str] = HEAVY) -> Loaded:
    """Import ``module`` and call those hooks of it that take no arguments, in a process of its own."""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", _PROGRAM, module, *heavy]
    try:
        ended = subprocess.run(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Loaded(error=f"it was not loaded after {PATIENCE:.0f} seconds")
    last = ended.stdout.rstrip().rpartition("\n")[2]
    try:
        said = json.loads(last)
    except ValueError:
        words = (ended.stderr or ended.stdout).strip().splitlines()
        return Loaded(error=f"the process that imported it ended with {ended.returncode}: {' '.join(words[-1:])[:300]}")
    return Loaded(tuple(said["heavy"]), bool(said["network"]), said["error"])
