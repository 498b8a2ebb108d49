"""Two servers that the same tests run on: one of a few lines, which fails on command, and a real one behind a proxy."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

from kaito_core.kube.client import Client
from kaito_core.kube.errors import ApiError, Gone, Unreachable
from kaito_core.kube.kinds import CONFIG_MAPS, Kind, Object

from .proxy import Proxy


def config_map(name: str, namespace: str, labels: dict[str, str], data: str) -> Object:
    metadata = {"name": name, "namespace": namespace, "labels": labels}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"x": data}}


class ScriptedServer:
    """Lists and watches like an API server. It is its own client."""

    namespace = "here"

    def __init__(self) -> None:
        self.requests: list[str] = []
        """What was asked: ``list``, ``watch from 7``."""
        self.refuses: dict[str, ApiError] = {}
        """The answer to every ``list`` or ``watch`` until it is taken out again."""
        self.ends_watches_at_once = False
        self._version = 10
        self._objects: dict[tuple[str, str], Object] = {}
        self._events: list[tuple[int, str, Object]] = []
        self._forgotten = 0
        self._cuts: list[ApiError | None] = []
        self._changed = threading.Condition()

    @property
    def client(self) -> Any:
        return self

    @property
    def version(self) -> int:
        return self._version

    # --- what the test does

    def put(self, name: str, data: str = "", **labels: str) -> None:
        key = (self.namespace, name)
        event = "MODIFIED" if key in self._objects else "ADDED"
        obj = config_map(name, self.namespace, labels, data)
        obj["metadata"]["managedFields"] = [{"manager": "test"}]
        self._objects[key] = obj
        self._happened(event, obj)

    def delete(self, name: str) -> None:
        self._happened("DELETED", self._objects.pop((self.namespace, name)))

    def bookmark(self) -> None:
        self._happened("BOOKMARK", {"kind": "ConfigMap", "metadata": {}})

    def cut(self, error: ApiError | None = None) -> None:
        """Every watch ends now, with this error."""
        with self._changed:
            self._cuts.append(error or Unreachable("watch: the connection ended"))
            self._changed.notify_all()

    def forget(self) -> None:
        """Nobody can watch from before now."""
        self._forgotten = self._version

    def _happened(self, event: str, obj: Object) -> None:
        with self._changed:
            self._version += 1
            obj["metadata"]["resourceVersion"] = str(self._version)
            self._events.append((self._version, event, copy.deepcopy(obj)))
            self._changed.notify_all()

    # --- what the reflector calls

    def list(self, kind: Kind, namespace: str = "", *, labels: str = "", fields: str = "") -> tuple[list[Object], str]:
        self.requests.append("list")
        if "list" in self.refuses:
            raise self.refuses["list"]
        with self._changed:
            return copy.deepcopy(list(self._objects.values())), str(self._version)

    def watch(
        self,
        kind: Kind,
        namespace: str = "",
        *,
        resource_version: str,
        labels: str = "",
        fields: str = "",
        seconds: int,
    ) -> ScriptedWatch:
        self.requests.append(f"watch from {resource_version}")
        if "watch" in self.refuses:
            raise self.refuses["watch"]
        if int(resource_version) < self._forgotten:
            raise Gone("watch: too old resource version", status=410)
        return ScriptedWatch(self, int(resource_version))


class ScriptedWatch:
    def __init__(self, server: ScriptedServer, version: int) -> None:
        self._server = server
        self._version = version
        self._cuts = len(server._cuts)
        self._closed = server.ends_watches_at_once

    def __iter__(self) -> Iterator[tuple[str, Object]]:
        while (found := self._next()) is not None:
            yield found

    def _next(self) -> tuple[str, Object] | None:
        server = self._server
        with server._changed:
            while not self._closed:
                for version, event, obj in server._events:
                    if version > self._version:
                        self._version = version
                        return event, copy.deepcopy(obj)
                if len(server._cuts) > self._cuts and (error := server._cuts[-1]) is not None:
                    raise error
                server._changed.wait()
        return None

    def close(self) -> None:
        with self._server._changed:
            self._closed = True
            self._server._changed.notify_all()


class RealServer:
    """An API server, seen through a proxy; a namespace of its own."""

    def __init__(self, direct: Client, proxy: Proxy) -> None:
        self.proxy = proxy
        self.client = proxy.client()
        self.namespace = f"reflector-{uuid4().hex[:8]}"
        self._direct = direct
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": self.namespace}}
        direct.create(Kind("v1", "Namespace", "namespaces", namespaced=False), namespace)

    def put(self, name: str, data: str = "", **labels: str) -> None:
        self._direct.apply(CONFIG_MAPS, config_map(name, self.namespace, labels, data))

    def delete(self, name: str) -> None:
        self._direct.delete(CONFIG_MAPS, name, self.namespace)

    def cut(self) -> None:
        self.proxy.cut()
