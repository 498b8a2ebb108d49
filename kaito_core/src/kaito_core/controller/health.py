"""/healthz, /readyz and /metrics, over plain HTTP for the kubelet and Prometheus."""

from __future__ import annotations

import logging
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from kaito_core.controller.metrics import CONTENT_TYPE, Metrics
from kaito_core.kube.reflector import Reflector
from kaito_core.problems import UserError

SILENT = 900.0
"""Seconds without a word from the API server after which a watch is not alive: bookmarks come every minute, and a watch ends
after ten minutes at the latest."""

TEXT = "text/plain; charset=utf-8"

Page = Callable[[], tuple[int, str, bytes]]
"""Status, content type and body."""

log = logging.getLogger("kaito_core.controller.health")


def address(text: str, option: str) -> tuple[str, int]:
    """``:8081`` or ``127.0.0.1:0`` as host and port. UserError with the option's name."""
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise UserError(f"{option}: {text!r} is not an address", "write HOST:PORT or :PORT")
    return host.strip("[]"), int(port)


def healthz(reflectors: Sequence[Reflector]) -> Page:
    """Whether the watches are alive; what is wrong with which, if not."""

    def page() -> tuple[int, str, bytes]:
        now = time.monotonic()
        wrong = []
        for reflector in reflectors:
            if reflector.ended:
                wrong.append(f"the watch of {reflector.kind} has ended")
            elif now - reflector.last_heard > SILENT:
                wrong.append(f"nothing heard of {reflector.kind} for {now - reflector.last_heard:.0f} s")
        return _page(wrong)

    return page


def readyz(reflectors: Sequence[Reflector]) -> Page:
    """Whether the caches are complete. A stand-by is ready too: leading is not asked."""
    return lambda: _page([f"the cache of {r.kind} is not complete yet" for r in reflectors if not r.has_synced])


def metrics_page(metrics: Metrics) -> Page:
    return lambda: (200, CONTENT_TYPE, metrics.text())


def _page(wrong: list[str]) -> tuple[int, str, bytes]:
    return (503 if wrong else 200), TEXT, ("\n".join(wrong) or "ok").encode() + b"\n"


def serve(at: tuple[str, int], pages: Mapping[str, Page]) -> ThreadingHTTPServer:
    """Serve these pages in a thread until ``shutdown`` is called. UserError when the address cannot be had."""
    try:
        server = _Server(at, pages)
    except OSError as e:
        raise UserError(f"{at[0] or '*'}:{at[1]} cannot be listened on: {e.strerror}", "choose another address") from e
    threading.Thread(target=server.serve_forever, name=f"http-{server.server_port}", daemon=True).start()
    return server


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = 10.0
    """Seconds that a client may take to ask."""

    def do_GET(self) -> None:
        page = self.server.pages.get(self.path.partition("?")[0])
        try:
            status, content_type, body = page() if page else (404, TEXT, b"not found\n")
        except Exception:
            log.exception("%s failed", self.path)
            status, content_type, body = 500, TEXT, b"failed; the log says more\n"
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """The kubelet asks every few seconds; nobody wants to read that."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, at: tuple[str, int], pages: Mapping[str, Page]) -> None:
        self.pages = pages
        # No host means every address; in a cluster of IPv6 the kubelet asks over that.
        everywhere = not at[0] and socket.has_dualstack_ipv6()
        self.address_family = socket.AF_INET6 if everywhere or ":" in at[0] else socket.AF_INET
        super().__init__(at, _Handler)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6 and not self.server_address[0]:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # Not HTTPServer's: it looks the host's name up, which takes its time where the DNS does not answer.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever asked has gone before the answer was there: no reason for a traceback."""
        log.debug("an answer to %s could not be sent", client_address, exc_info=True)
