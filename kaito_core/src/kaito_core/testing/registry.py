"""A real registry for tests: the ``docker-registry`` of Debian, on this machine, with basic authentication."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_PROGRAMS = ("docker-registry", "htpasswd")
_START_SECONDS = 20.0

_CONFIG = """\
version: 0.1
log: {{level: warn}}
storage:
  filesystem: {{rootdirectory: {storage}}}
  delete: {{enabled: true}}
http: {{addr: "{listen}:{port}"}}
auth:
  htpasswd: {{realm: kaito-test, path: {passwords}}}
"""


@dataclass(frozen=True, slots=True)
class Registry:
    """A running registry. ``host`` goes before the slash of a reference, ``folder`` holds what it stores."""

    host: str
    username: str
    password: str
    folder: Path

    def write_docker_config(self, folder: Path) -> Path:
        """A ``config.json`` that logs in here; give its folder to ``DOCKER_CONFIG``."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "config.json"
        auth = base64.b64encode(f"{self.username}:{self.password}".encode()).decode()
        path.write_text(json.dumps({"auths": {self.host: {"auth": auth}}}), encoding="utf-8")
        return path


def why_no_registry() -> str:
    """Empty if a registry can be run here, else what would make it possible."""
    missing = [p for p in _PROGRAMS if shutil.which(p) is None]
    return f"{' and '.join(missing)} not found: apt-get install docker-registry apache2-utils" if missing else ""


def free_port() -> int:
    """A TCP port on 127.0.0.1 that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


@contextmanager
def running_registry(
    folder: Path,
    username: str = "kaito",
    password: str = "secret",  # noqa: S107
    port: int = 0,
    listen: str = "127.0.0.1",
) -> Iterator[Registry]:
    """Run a registry that keeps everything in ``folder`` until the block ends.

    It listens on the address ``listen``; with ``0.0.0.0`` the nodes and pods of a cluster reach it too, under a name of
    this machine, while ``host`` stays the one on this machine. With a ``port`` and a ``folder`` of before it is the same registry again. Raises `RuntimeError` if it does not start.
    """
    if reason := why_no_registry():
        raise RuntimeError(reason)
    folder.mkdir(parents=True, exist_ok=True)
    port = port or free_port()
    hashed = subprocess.run(["htpasswd", "-niB", username], input=password.encode(), capture_output=True, check=True)
    (folder / "htpasswd").write_bytes(hashed.stdout)
    config = folder / "config.yml"
    config.write_text(
        _CONFIG.format(
            storage=json.dumps(str(folder / "storage")),
            passwords=json.dumps(str(folder / "htpasswd")),
            listen=listen,
            port=port,
        ),
        encoding="utf-8",
    )
    log = folder / "registry.log"
    with log.open("ab") as output:
        process = subprocess.Popen(["docker-registry", "serve", str(config)], stdout=output, stderr=output)
    try:
        _wait(process, port, log)
        yield Registry(f"127.0.0.1:{port}", username, password, folder)
    finally:
        process.terminate()
        process.wait()


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            opener.open(f"http://127.0.0.1:{port}/v2/", timeout=5)
        except urllib.error.HTTPError:  # 401: it is there and wants a password
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"docker-registry did not start:\n{log.read_text(errors='replace')[-2000:]}")
