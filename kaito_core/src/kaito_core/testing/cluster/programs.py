"""The executables of a cluster: where they are, and how they are run and ended."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ASSETS = "KUBEBUILDER_ASSETS"
"""The environment variable of the Kubebuilder world that names the folder of the executables."""

CONTROL_PLANE = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl")
NODE = ("containerd", "containerd-shim-runc-v2", "ctr", "kubelet", "kube-proxy", "coredns")
SYSTEM = ("runc", "nft", "conntrack", "busybox", "ip", "umount")
"""What a node needs of the machine itself."""
PLUGINS = Path("/usr/lib/cni")
"""Where Debian's containernetworking-plugins are."""
PACKAGES = "runc containernetworking-plugins nftables iptables conntrack busybox-static iproute2"

PATIENCE = 60.0
"""Seconds that a program may take until it is ready."""


def assets() -> Path | None:
    """The folder of the executables; None when nobody said where it is."""
    named = os.environ.get(ASSETS)
    return Path(named) if named else None


def path() -> str:
    """Where programs are looked for: the assets come first, and what only root usually sees is seen."""
    return os.pathsep.join([str(assets() or ""), os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def why_no_cluster(node: bool = False) -> str:
    """Empty if a control plane (with ``node`` also real nodes) can be run here, else what would make it possible."""
    folder = assets()
    wanted = (*CONTROL_PLANE, *(NODE if node else ()))
    if folder is None:
        return f"{ASSETS} is not set: it names the folder with {', '.join(wanted)}, from the releases of these projects"
    missing = [p for p in wanted if shutil.which(p, path=str(folder)) is None]
    if missing:
        return f"the folder of {ASSETS} has no {', '.join(missing)}"
    if shutil.which("openssl") is None:
        return "openssl not found: it makes the certificates of the cluster"
    if not node:
        return ""
    if os.geteuid() != 0:
        return "a real node needs root"
    missing = [p for p in SYSTEM if shutil.which(p, path=path()) is None]
    if missing or not (PLUGINS / "bridge").exists():
        return f"a real node needs {', '.join(missing or ['the CNI plugins'])}: apt-get install {PACKAGES}"
    return ""


def run(*command: str | Path, folder: Path, check: bool = True, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run a program to its end in ``folder``. RuntimeError with its last words when it fails and ``check`` is set."""
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PATH": path()},
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )
    if check and done.returncode:
        raise RuntimeError(f"{command[0]} {command[1] if len(command) > 1 else ''}: {done.stderr.strip()[-2000:]}")
    return done


def until(what: str, ready: Callable[[], bool], log: Path) -> None:
    """Wait. RuntimeError with the end of ``log`` when it takes too long."""
    deadline = time.monotonic() + PATIENCE
    while not ready():
        if time.monotonic() > deadline:
            said = log.read_text(errors="replace")[-2000:] if log.exists() else ""
            raise RuntimeError(f"{what} is not ready after {PATIENCE:.0f} s:\n{said}")
        time.sleep(0.05)


class Daemons:
    """Programs that run on, each with a log beside it. They end with `stop`, the last one first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, arguments: Sequence[str | Path], env: Mapping[str, str] | None = None) -> None:
        with self.log(name).open("ab") as log:
            self._running[name] = subprocess.Popen(
                [name, *arguments],
                cwd=self._folder,
                env={**os.environ, "PATH": path(), **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C in the terminal is for the tests, which end these in order.
                start_new_session=True,
            )

    def log(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def kill(self, name: str) -> None:
        """End it without a word. Nothing of a test's cluster is worth a graceful end, and an API server takes its time."""
        process = self._running.pop(name, None)
        if process is not None:
            process.send_signal(signal.SIGKILL)
            process.wait()

    def stop(self) -> None:
        for name in reversed(list(self._running)):
            self.kill(name)
