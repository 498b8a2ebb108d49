"""The cluster as a node provisioner sees it: what is watched comes from a cache, corrected by what was just written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from kaito_core.controller.seen import Seen
from kaito_core.kube.kinds import Kind
from kaito_core.kube.reflector import OnChange, Reflector
from kaito_core.plugins.types import Watched

if TYPE_CHECKING:
    from kaito_core.kube.client import Client


class ClusterView:
    """A `kaito_core.plugins.types.Cluster`. A cache that is not complete (the kind was not there at the start, or may not be
    watched) is passed by."""

    def __init__(self, client: Client, reflectors: Mapping[Kind, Reflector]) -> None:
        self._client = client
        self._reflectors = reflectors
        self._seen = Seen(reflectors)

    def get(self, kind: Kind, name: str, namespace: str = "") -> Mapping[str, Any] | None:
        return self._seen.get(kind, name, namespace) if self._cached(kind) else self._client.get(kind, name, namespace)

    def list(
        self, kind: Kind, namespace: str = "", labels: Mapping[str, str] | None = None, *, fresh: bool = False
    ) -> Iterable[Mapping[str, Any]]:
        if self._cached(kind) and not fresh:
            return self._seen.list(kind, namespace, labels)
        selector = ",".join(f"{k}={v}" for k, v in (labels or {}).items())
        return self._client.list(kind, namespace, labels=selector)[0]

    def apply(self, kind: Kind, obj: Mapping[str, Any]) -> Mapping[str, Any]:
        made = self._client.apply(kind, dict(obj))
        self._seen.wrote(kind, made)
        return made

    def delete(self, kind: Kind, name: str, namespace: str = "") -> None:
        self._client.delete(kind, name, namespace)

    def _cached(self, kind: Kind) -> bool:
        reflector = self._reflectors.get(kind)
        return reflector is not None and reflector.has_synced


def watching(client: Client, watched: Iterable[Watched], on_change: OnChange) -> dict[Kind, Reflector]:
    """The caches that a provisioner asks for, not started yet."""
    return {
        w.kind: Reflector(
            client, w.kind, w.namespace, on_change=on_change, index=w.index, fields=w.fields, optional=True
        )
        for w in watched
    }
