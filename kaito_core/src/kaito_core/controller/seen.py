"""What the caches say, corrected by what was just written.

A cache is always a little behind. Who decides on it right after a write would do the same thing again; so an object that
was written is remembered until the cache has caught up with it."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from kaito_core.kube.kinds import Kind, Object
from kaito_core.kube.reflector import Reflector

Place = tuple[str, str]
"""Namespace and name."""


class Seen:
    """The newest that is known of each object. Resource versions of one kind are numbers that grow (Kubernetes
    documents them as comparable since 1.35, and they always were)."""

    def __init__(self, reflectors: Mapping[Kind, Reflector]) -> None:
        self._reflectors = reflectors
        self._written: dict[Kind, dict[Place, Object]] = {kind: {} for kind in reflectors}
        self._lock = threading.Lock()

    def wrote(self, kind: Kind, obj: Object) -> None:
        """This is what the API server answered to a write."""
        if kind in self._reflectors:
            small = self._reflectors[kind].transform(obj)
            with self._lock:
                self._written[kind][_place(obj)] = small

    def watches(self, kind: Kind) -> bool:
        """Whether objects of this kind are known here at all."""
        return kind in self._reflectors

    def get(self, kind: Kind, name: str, namespace: str = "") -> Object | None:
        """The object as it is known now; None when there is none."""
        reflector, place = self._reflectors[kind], (namespace, name)
        written = self._written[kind].get(place)
        cached = reflector.get(name, namespace)
        if written is None:
            return cached
        if self._is_newer(reflector, cached, written):
            return written
        self._forget(kind, place, written)
        return cached

    def list(self, kind: Kind, namespace: str = "", labels: Mapping[str, str] | None = None) -> Sequence[Object]:
        """The objects of a namespace (of all when empty) with these labels, as they are known now."""
        reflector = self._reflectors[kind]
        with self._lock:
            recent = [(p, o) for p, o in self._written[kind].items() if namespace in ("", p[0])]
        found = {_place(o): o for o in reflector.list(namespace, labels)}
        for place, written in recent:
            if not self._is_newer(reflector, found.get(place) or reflector.get(place[1], place[0]), written):
                # Forgotten here too: what only ever is listed would otherwise be gone through for ever.
                self._forget(kind, place, written)
                continue
            found.pop(place, None)
            has = written["metadata"].get("labels") or {}
            if all(has.get(k) == v for k, v in (labels or {}).items()):
                found[place] = written
        return list(found.values())

    @staticmethod
    def _is_newer(reflector: Reflector, cached: Object | None, written: Object) -> bool:
        """Whether what was written is news to the cache."""
        return _version(cached or {}) < _version(written) and reflector.resource_version < _version(written)

    def _forget(self, kind: Kind, place: Place, written: Object) -> None:
        """The cache has caught up with this; something newer may have been written meanwhile."""
        with self._lock:
            if self._written[kind].get(place) is written:
                del self._written[kind][place]


def _place(obj: Object) -> tuple[str, str]:
    return obj["metadata"].get("namespace", ""), obj["metadata"]["name"]


def _version(obj: Object) -> int:
    try:
        return int(obj.get("metadata", {}).get("resourceVersion", 0))
    except ValueError:
        return 0
