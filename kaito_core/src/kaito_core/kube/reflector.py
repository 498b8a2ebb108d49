"""A cache of one kind of object, kept up to date: list once, then watch.

The official client's informer cannot watch custom resources and hammers a server that says no; this one does what client-go's
reflector does: pages, bookmarks, a new list when the server has forgotten where the watch was, and a jittered back-off.
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from kaito_core.kube.errors import ApiError, Forbidden, Gone, NotFound, Unreachable
from kaito_core.kube.kinds import Kind, Object

if TYPE_CHECKING:
    from kaito_core.kube.client import Client, Watch

Objects = list[Object]

OnChange = Callable[["Object | None", "Object | None"], object]
"""Told the object as it was and as it is; None: there was none, there is none."""

WATCH_SECONDS = (300, 600)
"""How long one watch lasts: drawn anew each time, so that all watches of a cluster do not end together (client-go)."""

FIRST_DELAY, LONGEST_DELAY = 0.8, 30.0
"""Seconds between two tries that failed, doubled each time (client-go's reflector)."""

HEALTHY = 10.0
"""Seconds that a watch must have lasted for the back-off to begin anew."""

AT_ONCE = 1.0
"""A watch that ends within so many seconds and says nothing has failed, even if the server calls it an end (client-go)."""

NOT_DEFINED = 300.0
"""Seconds between two looks for a kind that the cluster need not have."""

AWAY_OR_BUSY = frozenset({0, 429})
"""Answers (none, and "too many requests") after which the cache still holds, and a watch may go on where it was."""

log = logging.getLogger("kaito_core.kube.reflector")


def without_managed_fields(obj: Object) -> Object:
    """Half of many objects is the record of who set which field; nobody here reads it."""
    obj["metadata"].pop("managedFields", None)
    return obj


class Reflector:
    """See the module. What is in the cache is never changed by anybody: read it, do not write it.

    ``on_change`` is called in the reflector's own thread, after the cache has changed; it should be quick. ``index`` is the label
    that objects are found by without looking at all of them. ``optional``: the cluster may have no such kind, or not let us see
    it; then this never has synced, and says so only once."""

    def __init__(
        self,
        client: Client,
        kind: Kind,
        namespace: str = "",
        labels: str = "",
        transform: Callable[[Object], Object] = without_managed_fields,
        on_change: OnChange | None = None,
        index: str = "kaito.sh/workspace",
        *,
        fields: str = "",
        optional: bool = False,
    ) -> None:
        self.kind = kind
        self.has_synced = False
        """Whether the first list is complete."""
        self.last_heard = math.inf
        """When the server last said something, a bookmark at least; seconds of the monotonic clock. Before the start: never late."""
        self.resource_version = 0
        """Everything up to here is in the cache."""
        self._client = client
        self._namespace = namespace
        self._labels = labels
        self._fields = fields
        self._optional = optional
        self.transform = transform
        """What is kept of an object."""
        self._on_change = on_change
        self._at = ""
        """The resource version to watch from; empty when a list has to come first."""
        self._index = index
        self._store = _Store(index)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._watch: Watch | None = None
        self._told = False
        self._thread = threading.Thread(target=self._run, name=f"reflector-{kind.plural}", daemon=True)

    # --- reading

    def get(self, name: str, namespace: str = "") -> Object | None:
        """One object as the cache has it."""
        with self._lock:
            return self._store.by_name.get(namespace, {}).get(name)

    def list(self, namespace: str = "", labels: Mapping[str, str] | None = None) -> Objects:
        """The objects of a namespace (of all when empty) with these labels."""
        with self._lock:
            if labels and self._index in labels and (namespace or not self.kind.namespaced):
                found = list(self._store.by_label.get((namespace, labels[self._index]), {}).values())
            elif namespace:
                found = list(self._store.by_name.get(namespace, {}).values())
            else:
                found = [o for objects in self._store.by_name.values() for o in objects.values()]
        return [o for o in found if _has(o, labels)] if labels else found

    def indexed(self, namespace: str, value: str) -> Objects:
        """The objects whose ``index`` label has this value, by name."""
        with self._lock:
            found = self._store.by_label.get((namespace, value), {})
            return [found[n] for n in sorted(found)]

    # --- running

    @property
    def ended(self) -> bool:
        """Whether the thread ran and runs no more."""
        return self._thread.ident is not None and not self._thread.is_alive()

    def start(self) -> None:
        self.last_heard = time.monotonic()
        self._thread.start()

    def stop(self) -> None:
        """End it now; a watch that waits for events is cut."""
        self._stop.set()
        watch = self._watch
        if watch is not None:
            watch.close()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(5.0)

    def _run(self) -> None:
        delay = FIRST_DELAY
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                if not self._at:
                    self._list()
                self._follow()
                delay = FIRST_DELAY
                continue
            except Gone:
                log.info("%s: the server has forgotten where the watch was; listing anew", self.kind)
                self._at = ""
            except (NotFound, Forbidden) as e:
                self._at = ""
                if self._optional:
                    if not self._told:
                        log.info("%s is not watched: %s", self.kind, e.problems[0].message)
                    self._told, self.has_synced = True, False
                    self._stop.wait(NOT_DEFINED)
                    continue
                log.warning("%s; trying again", e.problems[0].message)
            except ApiError as e:
                if self._stop.is_set():
                    return
                log.warning("%s; trying again", e.problems[0].message)
                if e.status not in AWAY_OR_BUSY:
                    self._at = ""
            except Exception:
                # A watch that breaks for ever would be worse than one that begins anew.
                log.exception("%s: the watch broke; listing anew", self.kind)
                self._at = ""
            if time.monotonic() - began > HEALTHY:
                delay = FIRST_DELAY
            self._stop.wait(delay * random.uniform(0.5, 1.5))  # noqa: S311 – jitter
            delay = min(delay * 2, LONGEST_DELAY)

    def _list(self) -> None:
        items, version = self._client.list(self.kind, self._namespace, labels=self._labels, fields=self._fields)
        new = _Store(self._index)
        for item in items:
            new.put(self.transform(item))
        with self._lock:
            old, self._store = self._store, new
        self._heard(version)
        self.has_synced = True
        for before in old.all():
            if new.get(before) is None:
                self._tell(before, None)
        for obj in new.all():
            known = old.get(obj)
            if known is None or _version(known) != _version(obj):
                self._tell(known, obj)

    def _follow(self) -> None:
        """Watch from where we are until the server ends it."""
        watch = self._client.watch(
            self.kind,
            self._namespace,
            resource_version=self._at,
            labels=self._labels,
            fields=self._fields,
            seconds=random.randint(*WATCH_SECONDS),  # noqa: S311 – jitter
        )
        self._watch = watch
        opened = self.last_heard = time.monotonic()
        silent = True
        with contextlib.closing(watch):
            if self._stop.is_set():
                return
            for event, obj in watch:
                if self._stop.is_set():
                    return
                silent = False
                version = _version(obj)
                if event != "BOOKMARK":
                    self._take(event, obj)
                self._heard(version)
        if silent and time.monotonic() - opened < AT_ONCE and not self._stop.is_set():
            raise Unreachable(f"watch {self.kind}: the server ended it at once")

    def _take(self, event: str, obj: Object) -> None:
        new = None if event == "DELETED" else self.transform(obj)
        with self._lock:
            old = self._store.pop(obj)
            if new is not None:
                self._store.put(new)
        self._tell(old or (obj if new is None else None), new)

    def _heard(self, version: str) -> None:
        """The cache is as the server was at that version. Only now: who reads the number may rely on the cache."""
        self._at = version
        self.last_heard = time.monotonic()
        with contextlib.suppress(ValueError):
            self.resource_version = int(version)

    def _tell(self, old: Object | None, new: Object | None) -> None:
        if self._on_change is None:
            return
        try:
            self._on_change(old, new)
        except Exception:
            log.exception("%s: what follows from a change failed; the watch goes on", self.kind)


class _Store:
    """Objects by namespace and name, and by the value of one label. Not locked."""

    def __init__(self, index: str) -> None:
        self._index = index
        self.by_name: dict[str, dict[str, Object]] = {}
        self.by_label: dict[tuple[str, str], dict[str, Object]] = {}

    def all(self) -> list[Object]:
        return [o for objects in self.by_name.values() for o in objects.values()]

    def get(self, like: Object) -> Object | None:
        """The one with the name of this one."""
        namespace, name = _place(like)
        return self.by_name.get(namespace, {}).get(name)

    def put(self, obj: Object) -> None:
        namespace, name = _place(obj)
        self.by_name.setdefault(namespace, {})[name] = obj
        value = _labels(obj).get(self._index)
        if value:
            self.by_label.setdefault((namespace, value), {})[name] = obj

    def pop(self, like: Object) -> Object | None:
        """Take the one with the name of this one out."""
        namespace, name = _place(like)
        old = self.by_name.get(namespace, {}).pop(name, None)
        if old is not None:
            key = (namespace, _labels(old).get(self._index, ""))
            found = self.by_label.get(key, {})
            found.pop(name, None)
            if not found:
                self.by_label.pop(key, None)
        return old


def _place(obj: Object) -> tuple[str, str]:
    return obj["metadata"].get("namespace", ""), obj["metadata"]["name"]


def _version(obj: Object) -> str:
    return str(obj["metadata"].get("resourceVersion", ""))


def _labels(obj: Object) -> Mapping[str, str]:
    found: Mapping[str, str] = obj["metadata"].get("labels") or {}
    return found


def _has(obj: Object, labels: Mapping[str, str]) -> bool:
    has = _labels(obj)
    return all(has.get(k) == v for k, v in labels.items())
