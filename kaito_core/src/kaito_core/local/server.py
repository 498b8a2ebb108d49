"""The last stage of a workload that serves: where it listens on this machine, and whether it answers yet."""

from __future__ import annotations

import errno
import http.client
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field

from kaito_core.local.state import Served
from kaito_core.problems import Failure, UserError
from kaito_core.workloads.serving import ServingJob
from kaito_core.workloads.workload import Endpoint

HOST = "127.0.0.1"
"""An endpoint on this machine is for this machine: nobody else can reach it."""

LOOK = 0.2
"""Seconds between two looks whether it answers."""


@dataclass
class Server:
    """A process that serves, seen from outside."""

    port: int
    endpoint: Endpoint
    served: Served
    ready: bool = False
    _started: float = field(default_factory=time.monotonic)
    _looked: float = 0.0

    @classmethod
    def of(cls, job: ServingJob, endpoint: Endpoint, port: int | None) -> Server:
        """The server of this job on ``port`` (None: the workload's own; 0: any that is free). UserError when it is in use."""
        port = free_port(endpoint.port if port is None else port)
        served = Served(f"http://{HOST}:{port}", job.preset.name, job.chat_model, [a.name for a in job.adapters])
        return cls(port, endpoint, served)

    @property
    def env(self) -> dict[str, str]:
        """What tells the process where to listen."""
        return {"KAITO_HOST": HOST, "KAITO_PORT": str(self.port)}

    def started(self) -> None:
        """The process has been started now."""
        self._started = time.monotonic()

    def has_become_ready(self) -> bool:
        """Look whether it answers; True once, when it does for the first time. `Failure` when it takes far too long."""
        now = time.monotonic()
        if self.ready or now - self._looked < LOOK:
            return False
        self._looked = now
        self.ready = answers(HOST, self.port, self.endpoint.health)
        if not self.ready and now - self._started > self.endpoint.start_seconds:
            raise Failure(
                f"the server has not answered {self.endpoint.health} for {self.endpoint.start_seconds // 60} minutes",
                "look at its log: kaito logs NAME --stage serve",
            )
        return self.ready


def answers(host: str, port: int, path: str) -> bool:
    """Whether a GET of ``path`` is answered with 200."""
    connection = http.client.HTTPConnection(host, port, timeout=2)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        with suppress(OSError):
            connection.close()


def free_port(port: int) -> int:
    """``port`` itself, or for 0 one that nobody uses now. UserError when it cannot be used."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do: a connection of the one before that has not quite ended is in nobody's way.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as e:
            why = "is in use by another program" if e.errno == errno.EADDRINUSE else f"cannot be used: {e.strerror}"
            raise UserError(
                f"the port {port} of this machine {why}",
                "name another with --port, or --port 0 for any that is free; `kaito status` shows the endpoints of kaito",
                field="--port",
            ) from e
        return int(probe.getsockname()[1])
