"""What the caches say, corrected by what was just written.

A cache is always a little behind. Who decides on it right after a write would do the same thing again; so an object that
was written is remembered until the cache has caught up with it."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from kaito_core.kube.kinds import Kind, Object
from kaito_core.kube.reflector import Reflector

Key = tuple[Kind, str, str]


class Seen:
    """The newest that is known of each object. Resource versions of one kind are numbers that grow (Kubernetes
    documents them as comparable since 1.35, and they always were)."""

    def __init__(self, reflectors: Mapping[Kind, Reflector]) -> None:
        self._reflectors = reflectors
        self._written: dict[Key, Object] = {}
        self._lock = threading.Lock()

    def wrote(self, kind: Kind, obj: Object) -> None:
        """This is what the API server answered to a write."""
        if kind in self._reflectors:
            metadata = obj["metadata"]
            small = self._reflectors[kind].transform(obj)
            with self._lock:
                self._written[kind, metadata.get("namespace", ""), metadata["name"]] = small

    def get(self, kind: Kind, name: str, namespace: str = "") -> Object | None:
        """The object as it is known now; None when there is none."""
        reflector = self._reflectors[kind]
        cached = reflector.get(name, namespace)
        key = (kind, namespace, name)
        written = self._written.get(key)
        if written is None:
            return cached
        if _version(cached or {}) >= _version(written) or reflector.resource_version >= _version(written):
            with self._lock:
                if self._written.get(key) is written:
                    del self._written[key]
            return cached
        return written

    def list(self, kind: Kind, namespace: str = "", labels: Mapping[str, str] | None = None) -> Sequence[Object]:
        """The objects of a namespace (of all when empty) with these labels, as they are known now."""
        found = {_place(o): o for o in self._reflectors[kind].list(namespace, labels)}
        with self._lock:
            written = [k[1:] for k in self._written if k[0] == kind and namespace in ("", k[1])]
        for place in written:
            found.pop(place, None)
            obj = self.get(kind, place[1], place[0])
            has = (obj or {}).get("metadata", {}).get("labels") or {}
            if obj is not None and all(has.get(k) == v for k, v in (labels or {}).items()):
                found[place] = obj
        return list(found.values())


def _place(obj: Object) -> tuple[str, str]:
    return obj["metadata"].get("namespace", ""), obj["metadata"]["name"]


def _version(obj: Object) -> int:
    try:
        return int(obj.get("metadata", {}).get("resourceVersion", 0))
    except ValueError:
        return 0
