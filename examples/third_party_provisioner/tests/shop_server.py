"""The shop as a little server: it sells machines that nobody has, over real HTTP, and fails as it is told.

    python tests/shop_server.py 8088        # then: MACHINE_SHOP_URL=http://127.0.0.1:8088 MACHINE_SHOP_TOKEN=right kaito plan …

A test makes time pass with `advance`; the server that is started by hand lets it pass by itself, a step for each request.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Collection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

from kaito_core.plugins import (
    InsufficientCapacity,
    NodeProvisioner,
    NotAuthorized,
    ProvisioningError,
    QuotaExceeded,
    Transient,
    Unsupported,
)

from kaito_provisioner_machine_shop.provisioner import TOKEN, URL, MachineShop

SECRET = "right"

REFUSALS: dict[type[ProvisioningError], tuple[int, str]] = {
    InsufficientCapacity: (409, "sold-out"),
    QuotaExceeded: (402, "credit-limit"),
    NotAuthorized: (403, "bad-token"),
    Unsupported: (400, "not-sold"),
    Transient: (503, "busy"),
}

L4 = {"model": "L4", "memory_mib": 23034, "count": 1, "capability": "8.9"}
A100 = {"model": "A100-80GB", "memory_mib": 81079, "count": 2, "capability": "8.0"}

TYPES = [
    {"name": "bench", "cpus": 8, "memory_mib": 30_000, "gpu": L4, "cents_per_hour": 71, "stock": 40},
    {"name": "forge", "cpus": 48, "memory_mib": 400_000, "gpu": A100, "cents_per_hour": 655, "stock": 40},
    {"name": "anvil", "cpus": 16, "memory_mib": 60_000, "gpu": L4, "cents_per_hour": 60, "stock": 0},
]

Answer = tuple[int, Any, dict[str, str]]


class Shop:
    """The shop, and for kaito's tests what they ask of a cloud (`kaito_core.testing.conformance.Cloud`)."""

    def __init__(self, port: int = 0, *, by_itself: bool = False) -> None:
        self.orders: dict[str, dict[str, Any]] = {}
        """By number."""
        self._by_itself = by_itself
        self._count = 0
        self._refusal: ProvisioningError | None = None
        self._lose = False
        self._lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", port), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def serve(self) -> None:
        self._server.serve_forever(0.02)

    # --- what kaito's tests ask

    def make(self) -> NodeProvisioner:
        return MachineShop({URL: self.url, TOKEN: SECRET})

    def fail_next(self, failure: ProvisioningError) -> None:
        self._refusal = failure

    def lose_answer_next(self) -> None:
        self._lose = True

    def machines(self) -> Collection[str]:
        with self._lock:
            return [m for o in self.orders.values() for m in o["machines"]]

    def advance(self) -> None:
        with self._lock:
            for number, order in list(self.orders.items()):
                if order["state"] == "preparing":
                    order["state"] = "delivered"
                elif order["state"] == "returning":
                    del self.orders[number]

    # --- what the shop answers

    def answer(self, method: str, address: str, body: Any, headers: Any) -> Answer:
        if headers.get("Authorization") != f"Bearer {SECRET}":
            return 403, {"reason": "bad-token", "message": "this token is not known"}, {}
        if self._by_itself:
            self.advance()
        path, query = urlsplit(address).path, parse_qs(urlsplit(address).query)
        with self._lock:
            if (method, path) == ("GET", "/v1/types"):
                return 200, TYPES, {}
            if (method, path) == ("GET", "/v1/orders"):
                wanted = query.get("key")
                now = time.time()
                told = [{**o, "seconds": now - o["at"]} for o in self.orders.values()]
                return 200, [o for o in told if wanted is None or o["key"] in wanted], {}
            if (method, path) == ("POST", "/v1/orders"):
                return self._sell(headers["Idempotency-Key"], body)
            number = unquote(path.removeprefix("/v1/orders/"))
            if method == "DELETE" and number in self.orders:
                self.orders[number]["state"] = "returning"
                return 202, None, {}
            return 404, {"reason": "not-found", "message": "there is no such thing"}, {}

    def _sell(self, key: str, body: Any) -> Answer:
        for order in self.orders.values():
            if order["key"] == key:
                return 200, {**order, "seconds": time.time() - order["at"]}, {}
        if self._refusal is not None:
            refusal, self._refusal = self._refusal, None
            status, reason = REFUSALS[type(refusal)]
            wait = getattr(refusal, "retry_after", None)
            return status, {"reason": reason, "message": str(refusal)}, {"Retry-After": f"{wait:.0f}"} if wait else {}
        self._count += 1
        number = str(1000 + self._count)
        machines = [f"shop-{number}-{n}" for n in range(body["count"])]
        order = {"number": number, "key": key, "state": "preparing", "machines": machines, "labels": body["labels"]}
        self.orders[number] = {**order, "at": time.time()}
        return 201, {**order, "seconds": 0}, {}

    def loses(self, method: str) -> bool:
        """Whether this answer never arrives."""
        lost = self._lose and method != "GET"
        self._lose = self._lose and not lost
        return lost


def _handler(shop: Shop) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            status, value, headers = shop.answer(self.command, self.path, body, self.headers)
            if shop.loses(self.command):
                self.close_connection = True
                return
            content = b"" if value is None else json.dumps(value).encode()
            self.send_response(status)
            for name, text in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, text)
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_DELETE = do_GET

        def log_message(self, *_: object) -> None:
            pass

    return Handler


if __name__ == "__main__":
    shop = Shop(int(sys.argv[1]) if len(sys.argv) > 1 else 8088, by_itself=True)
    print(f"the shop is at {shop.url}; Ctrl-C closes it", flush=True)
    shop.serve()
