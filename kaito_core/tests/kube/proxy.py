"""A TCP proxy in front of an API server, for everything that can happen to a connection."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import yaml

from kaito_core.kube.client import Client, connect


class Proxy:
    """Lets everything through until it is told otherwise. A context manager."""

    def __init__(self, kubeconfig: Path, folder: Path) -> None:
        self._config = yaml.safe_load(kubeconfig.read_text())
        (cluster,) = self._config["clusters"]
        at = urlsplit(cluster["cluster"]["server"])
        self._server = (str(at.hostname), int(at.port or 443))
        self._listening = socket.create_server(("127.0.0.1", 0))
        cluster["cluster"]["server"] = f"https://127.0.0.1:{self._listening.getsockname()[1]}"
        self.kubeconfig = folder / "through-the-proxy.kubeconfig"
        self.kubeconfig.write_text(yaml.safe_dump(self._config))
        self._open: set[socket.socket] = set()
        self._flows = threading.Event()
        self._flows.set()
        self._refuses = False
        self.connections = 0

    def client(self) -> Client:
        """One that knows the API server by this address only."""
        return connect(kubeconfig=str(self.kubeconfig))

    def cut(self) -> None:
        """Every connection ends now; new ones are welcome."""
        for each in list(self._open):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def refuse(self, yes: bool = True) -> None:
        """The server is away."""
        self._refuses = yes
        if yes:
            self.cut()

    def hang(self) -> None:
        """Connections stay open and nothing comes through: what a firewall or a dead node looks like."""
        self._flows.clear()

    def flow(self) -> None:
        self._flows.set()

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.close()
        self._flows.set()
        self.cut()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listening.accept()
                self.connections += 1
                if self._refuses:
                    near.close()
                    continue
                far = socket.create_connection(self._server)
                self._open |= {near, far}
                for source, target in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=(source, target), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                self._flows.wait()
                target.sendall(data)
        for each in (source, target):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            self._open.discard(each)
