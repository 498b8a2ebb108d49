"""An API server of plain dicts, and the real `WorkspaceController` before it: what the server refuses is refused as by the real one
(`test_ownership.py` holds the two against each other)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, cast

from kaito_core.controller.settings import Settings
from kaito_core.controller.workspaces import WorkspaceController
from kaito_core.kube.client import Client
from kaito_core.kube.errors import AlreadyExists, Conflict, NotFound
from kaito_core.kube.kinds import EVENTS, SECRETS, WORKSPACES, Kind, Object
from kaito_core.plugins.manager import PluginManager
from kaito_core.problems import Failure
from kaito_core.testing.provisioner import FakeProvisioner

from .simulation import OFFERS, START, Registry
from .test_inference_sets import patched

Place = tuple[Kind, str]


class ApiServer:
    """The methods of `Client` that the controller uses, for one namespace."""

    def __init__(self) -> None:
        self.objects: dict[Place, Object] = {}
        self.before_write: Callable[[str, Kind, str], None] = lambda verb, kind, name: None
        """Called before a write, with its verb: what others do in this very moment."""
        self.writes = 0
        self.printed: dict[str, list[str]] = {}
        """The lines of pods' logs, by pod."""
        self.read: list[str] = []
        """The pods whose logs were read."""
        self._count = 1

    def get(self, kind: Kind, name: str, namespace: str = "") -> Object | None:
        return copy.deepcopy(self.objects.get((kind, name)))

    def list(self, kind: Kind, namespace: str = "", *, fields: str = "") -> tuple[list[Object], str]:
        """The Events about an object; there are none, since every pod can be made here."""
        assert kind == EVENTS
        return [], "0"

    def create(self, kind: Kind, obj: Object) -> Object:
        if kind == EVENTS:
            return obj
        self.before_write("create", kind, obj["metadata"]["name"])
        if (kind, obj["metadata"]["name"]) in self.objects:
            raise AlreadyExists("it is there", status=409, reason="AlreadyExists")
        return self.put(kind, obj)

    def apply(self, kind: Kind, obj: Object, *, uid: str | None = None) -> Object:
        name = obj["metadata"]["name"]
        self.before_write("apply", kind, name)
        there = self.objects.get((kind, name))
        if uid is not None and uid != (there["metadata"]["uid"] if there else ""):
            raise Conflict("it is another one", status=409, reason="Conflict")
        if there is None:
            return self.put(kind, obj)
        return self.put(kind, {**there, **obj, "metadata": {**there["metadata"], **obj["metadata"]}})

    def patch(self, kind: Kind, name: str, namespace: str, patch: Any, *, subresource: str = "") -> Object:
        if kind == EVENTS:
            return {}
        if (kind, name) not in self.objects:
            raise NotFound("it is gone", status=404)
        self.before_write("patch", kind, name)
        old = self.objects[kind, name]
        version = patch.get("metadata", {}).get("resourceVersion", old["metadata"]["resourceVersion"])
        if version != old["metadata"]["resourceVersion"]:
            raise Conflict("it is newer", status=409)
        new = patched(old, patch)
        if "deletionTimestamp" in new["metadata"] and not new["metadata"].get("finalizers"):
            self.remove(kind, name)
            return new
        return self.put(kind, new)

    def delete(self, kind: Kind, name: str, namespace: str = "", *, propagation: str = "", uid: str = "") -> bool:
        self.before_write("delete", kind, name)
        there = self.objects.get((kind, name))
        if there is None or (uid and there["metadata"]["uid"] != uid):
            return False
        self.remove(kind, name)
        return True

    def logs(self, pod: str, namespace: str, container: str, *, tail: int | None = None) -> list[str]:
        self.read.append(pod)
        return self.printed.get(pod, [])

    def put(self, kind: Kind, obj: Object) -> Object:
        """An object in a new state, by any writer."""
        self._count += 1
        self.writes += 1
        made: Object = {"apiVersion": kind.api_version, "kind": kind.kind, **copy.deepcopy(obj)}
        created = {"uid": f"{kind.kind}-{self._count}", "generation": 1, "creationTimestamp": "2027-01-15T08:00:00Z"}
        made["metadata"] = {"namespace": "default", **created, **made["metadata"], "resourceVersion": str(self._count)}
        self.objects[kind, made["metadata"]["name"]] = made
        return copy.deepcopy(made)

    def remove(self, kind: Kind, name: str) -> None:
        self._count += 1
        self.writes += 1
        self.objects.pop((kind, name), None)

    @property
    def resource_version(self) -> str:
        return str(self._count)

    def version(self) -> str:
        return "v1.37.2"


class Plugins(Registry):
    """What the controller asks of its plugins."""

    def __init__(self, cloud: FakeProvisioner) -> None:
        self._cloud = cloud

    def provisioners(self) -> Mapping[str, FakeProvisioner]:
        return {"fake": self._cloud}

    def validate(self, workspace: Any, made: Any) -> list[Any]:
        return []

    def workload(self, workspace: Any, workload: Any) -> Any:
        return workload


class World:
    """One Workspace, its controller, a cloud, and what others put there."""

    def __init__(self, workspace: Object, **settings: Any) -> None:
        self.server = ApiServer()
        self.cloud = FakeProvisioner(OFFERS)
        self.now = START
        known = Settings(tuner_image="r.io/tuner:1", runtime_images={"echo": "r.io/echo:1"}, **settings)
        self.controller = WorkspaceController(
            cast(Client, self.server),
            cast(PluginManager, Plugins(self.cloud)),
            known,
            clock=lambda: self.now,
        )
        self.server.put(SECRETS, {"metadata": {"name": "push"}})
        self.server.put(WORKSPACES, workspace)

    def see(self, *, late: bool = False) -> None:
        """The caches catch up; ``late``: only that of Workspaces does. A watch with a label selector tells of nothing else."""
        for reflector in self.controller.reflectors:
            if late and reflector.kind != WORKSPACES:
                continue
            found = [o for (k, _), o in self.server.objects.items() if k == reflector.kind and _selected(reflector, o)]
            known = {o["metadata"]["name"] for o in found}
            for gone in [o for o in reflector.list() if o["metadata"]["name"] not in known]:
                reflector._take("DELETED", gone)
            for obj in found:
                reflector._take("MODIFIED", copy.deepcopy(obj))
            reflector._heard(self.server.resource_version)
            reflector.has_synced = True

    def settle(self, *, late: bool = False) -> None:
        """Reconcile until nothing is written any more; ``late``: the caches hear of the Workspace alone meanwhile, and it may not come to
        rest before they hear the rest."""
        for _ in range(40):
            before = self.server.writes
            self.see(late=late)
            try:
                self.controller.reconcile("default", "one")
            except Failure:
                continue
            self.now += 1
            if self.server.writes == before and not any(m.leaving for m in self.cloud.machines.values()):
                return
        assert late, "it never comes to rest"

    @property
    def workspace(self) -> Object | None:
        return self.server.objects.get((WORKSPACES, "one"))

    def change(self, **changes: Any) -> None:
        """The user changes or deletes it."""
        assert self.workspace is not None
        metadata = self.workspace["metadata"] | changes.pop("metadata", {})
        self.server.put(WORKSPACES, {**self.workspace, **changes, "metadata": metadata})

    def delete(self) -> None:
        if self.workspace is not None and self.workspace["metadata"].get("finalizers"):
            self.change(metadata={"deletionTimestamp": "2027-01-15T09:00:00Z"})
        else:
            self.server.remove(WORKSPACES, "one")

    def condition(self, kind: str) -> Object:
        found = {c["type"]: c for c in (self.workspace or {}).get("status", {}).get("conditions", ())}
        return cast(Object, found.get(kind, {}))


def _selected(reflector: Any, obj: Object) -> bool:
    return not reflector._labels or reflector._labels in (obj["metadata"].get("labels") or {})
