"""The shop's API, version 1: the only file that knows its paths and its errors.

* ``GET /v1/types``: what is sold, at which price, and how many are in stock
* ``POST /v1/orders`` with the header ``Idempotency-Key``: 201, or 200 when there is an order with this key already
* ``GET /v1/orders`` and ``GET /v1/orders?key=KEY``: orders that are not closed
* ``DELETE /v1/orders/NUMBER``: 202; the machines go, and then the order
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from kaito_core.plugins import (
    InsufficientCapacity,
    NotAuthorized,
    ProvisioningError,
    QuotaExceeded,
    Transient,
    Unsupported,
)

TIMEOUT = 20.0
"""Seconds for one request."""

MOST = 8 << 20
"""Bytes of an answer that are read."""

REASONS: Mapping[str, type[ProvisioningError]] = {
    "sold-out": InsufficientCapacity,
    "credit-limit": QuotaExceeded,
    "bad-token": NotAuthorized,
    "not-sold": Unsupported,
    "busy": Transient,
}
"""The shop's own names of what can go wrong, and what kaito does about it."""


@dataclass(frozen=True)
class Type:
    """A machine that the shop sells."""

    name: str
    cpus: int
    memory: int
    gpu: str
    gpu_memory: int
    gpus: int
    capability: tuple[int, int]
    cents: int
    """For an hour."""
    stock: int


@dataclass(frozen=True)
class Order:
    """Machines that were bought together."""

    number: str
    key: str
    state: str
    """``preparing``, ``delivered``, ``cancelled`` (by the shop) or ``returning``."""
    machines: tuple[str, ...]
    labels: Mapping[str, str]
    seconds: float
    """Since it was ordered."""
    reason: str = ""
    """Why the shop has cancelled it."""


class Shop:
    """The requests to the API. Each raises a `ProvisioningError` whose type says what kaito shall do."""

    def __init__(self, url: str, token: str) -> None:
        self._url, self._token = url.rstrip("/"), token

    def types(self) -> list[Type]:
        return _read(lambda: [_type(t) for t in self._ask("GET", "/v1/types")])

    def order(self, key: str, name: str, count: int, labels: Mapping[str, str]) -> Order:
        """Buys once for a key, however often it is asked."""
        body = {"type": name, "count": count, "labels": dict(labels)}
        told = self._ask("POST", "/v1/orders", body, {"Idempotency-Key": key})
        return _read(lambda: _order(told))

    def find(self, key: str) -> Order | None:
        found = _read(lambda: [_order(o) for o in self._ask("GET", f"/v1/orders?key={quote(key, safe='')}")])
        return found[0] if found else None

    def orders(self) -> list[Order]:
        return _read(lambda: [_order(o) for o in self._ask("GET", "/v1/orders")])

    def give_back(self, order: Order) -> None:
        """One that is gone already is as good."""
        self._ask("DELETE", f"/v1/orders/{quote(order.number, safe='')}", gone=True)

    def _ask(
        self, method: str, path: str, body: Any = None, more: Mapping[str, str] | None = None, *, gone: bool = False
    ) -> Any:
        """The answer's JSON; None when it is empty, and with ``gone`` also when there is no such thing."""
        import http.client
        import urllib.error
        import urllib.request

        data = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json", **(more or {})}
        request = urllib.request.Request(self._url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                text = answer.read(MOST)
            return json.loads(text) if text else None
        except urllib.error.HTTPError as e:
            with e:
                if e.code == 404 and gone:
                    return None
                raise _failure(e.code, e.read(MOST), e.headers.get("Retry-After")) from None
        except (OSError, http.client.HTTPException) as e:  # no connection, a time-out: nobody knows what became of it
            raise Transient(f"the shop does not answer: {getattr(e, 'reason', None) or e}") from e
        except ValueError as e:
            raise Transient(f"the shop answered with something that is not JSON: {e}") from e


def _failure(code: int, body: bytes, retry_after: str | None) -> ProvisioningError:
    """The shop's own words, as the failure that its reason stands for."""
    try:
        told = json.loads(body)
        reason, words = str(told["reason"]), str(told["message"])
    except (ValueError, KeyError, TypeError):
        reason, words = "", body.decode("utf-8", "replace")[:200] or f"HTTP {code}"
    kind = REASONS.get(reason) or (NotAuthorized if code in (401, 403) else Transient)
    if kind is Transient:
        seconds = retry_after if retry_after and retry_after.isascii() and retry_after.isdecimal() else None
        return Transient(words, float(seconds) if seconds else None)
    return kind(words)


def _read(make: Any) -> Any:
    try:
        return make()
    except (TypeError, KeyError, AttributeError, ValueError) as e:
        raise Transient(f"the shop answered in a form that is not that of its version 1: {e!r:.200}") from e


def _type(told: Any) -> Type:
    gpu = told["gpu"]
    major, _, minor = str(gpu["capability"]).partition(".")
    return Type(
        name=str(told["name"]),
        cpus=int(told["cpus"]),
        memory=int(told["memory_mib"]) << 20,
        gpu=str(gpu["model"]),
        gpu_memory=int(gpu["memory_mib"]) << 20,
        gpus=int(gpu["count"]),
        capability=(int(major), int(minor)),
        cents=int(told["cents_per_hour"]),
        stock=int(told["stock"]),
    )


def _order(told: Any) -> Order:
    return Order(
        number=str(told["number"]),
        key=str(told["key"]),
        state=str(told["state"]),
        machines=tuple(map(str, told["machines"])),
        labels={str(k): str(v) for k, v in told["labels"].items()},
        seconds=float(told["seconds"]),
        reason=str(told.get("reason", "")),
    )
