"""The ConfigMaps that endpoints are configured with.

Nobody watches them: that would want the right to list all ConfigMaps, and a connection for them. Each is looked at now and then."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from kaito_core.kube.kinds import CONFIG_MAPS, Object
from kaito_core.planning.serving import CONFIG_KEY

if TYPE_CHECKING:
    from kaito_core.kube.client import Client

KEPT: Final = 15.0
"""Seconds for which a ConfigMap is not asked for again."""


def digest(data: Mapping[str, str] | None) -> str:
    """Twelve hexadecimal characters that say what settings a ConfigMap with this ``data`` has, and the templates (``*.jinja``) that they
    name; empty for None. What else is in it does not count."""
    if data is None:
        return ""
    text = str(data.get(CONFIG_KEY, ""))
    templates = [str(data[k]) for k in sorted(data) if k.endswith(".jinja") and k in text]
    return hashlib.sha256("\0".join([text, *templates]).encode()).hexdigest()[:12]


class Configs:
    """ConfigMaps as they were seen last. May be called from any thread."""

    def __init__(self, client: Client, clock: Callable[[], float] = time.monotonic) -> None:
        self._client, self._clock = client, clock
        self._known: dict[tuple[str, str], tuple[float, Object | None]] = {}
        self._lock = threading.Lock()

    def get(self, name: str, namespace: str) -> Object | None:
        """As it was at most `KEPT` seconds ago. Raises `ApiError`."""
        with self._lock:
            known = self._known.get((namespace, name))
        return known[1] if known and self._clock() - known[0] < KEPT else self.fresh(name, namespace)

    def fresh(self, name: str, namespace: str) -> Object | None:
        """As it is now. Raises `ApiError`."""
        now, found = self._clock(), self._client.get(CONFIG_MAPS, name, namespace)
        with self._lock:
            self._known[namespace, name] = now, found
            for key in [k for k, (at, _) in self._known.items() if now - at > KEPT]:
                del self._known[key]
        return found

    def digest(self, name: str, namespace: str) -> str:
        """`digest` of the ConfigMap; empty when it is not there. Raises `ApiError`."""
        found = self.get(name, namespace)
        return digest(None if found is None else found.get("data") or {})
