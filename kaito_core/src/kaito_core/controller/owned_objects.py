"""Every write of an object that belongs to a Workspace: whose the object is, is asked here before it is made, changed or deleted.

What was asked may be out of date when the write arrives. So each write carries its condition to the API server: a new object is only made
where there is none, and a change or a deletion is for one uid."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from kaito_core.controller.reconcile.decision import Deletion
from kaito_core.kube.errors import AlreadyExists, Conflict
from kaito_core.kube.kinds import PODS, STATEFUL_SETS, Kind, Object
from kaito_core.kube.ownership import NameTaken, is_controlled_by

if TYPE_CHECKING:
    from kaito_core.controller.seen import Seen
    from kaito_core.kube.client import Client

log = logging.getLogger("kaito_core.controller")


class OwnedObjects:
    """The objects of Workspaces in one cluster. All methods raise `ApiError`."""

    def __init__(self, client: Client, seen: Seen) -> None:
        self._client = client
        self._seen = seen

    def find(self, owner: Object, kind: Kind, name: str) -> Object | None:
        """The object of that name, of any owner: as the cache knows it where it is the owner's, else as the API server has it."""
        namespace = owner["metadata"]["namespace"]
        known = self._seen.get(kind, name, namespace) if self._seen.watches(kind) else None
        return known if self.owns(owner, kind, known) else self._client.get(kind, name, namespace)

    def owns(self, owner: Object, kind: Kind, obj: Object | None) -> bool:
        """Whether the object is this very Workspace's; a pod is through its StatefulSet."""
        if kind == PODS:
            metadata = owner["metadata"]
            servers = self._seen.get(STATEFUL_SETS, metadata["name"], metadata["namespace"])
            return is_controlled_by(servers, owner) and is_controlled_by(obj, servers)
        return is_controlled_by(obj, owner)

    def create(self, owner: Object, kind: Kind, obj: Object) -> None:
        """Make it; that it is there already is fine when it is the owner's. Raises `NameTaken`."""
        name = obj["metadata"]["name"]
        try:
            made = self._client.create(kind, obj)
        except AlreadyExists:
            there = self._client.get(kind, name, owner["metadata"]["namespace"])
            if there is None:
                raise  # it went away in between: the next try makes it
            if not self.owns(owner, kind, there):
                raise NameTaken(kind, there, owner) from None
            made = there
        else:
            log.info("created %s %s", kind, name)
        self._seen.wrote(kind, made)

    def apply(self, owner: Object, kind: Kind, obj: Object) -> None:
        """Make it so, whether it was there or not. Raises `NameTaken`; `Conflict` when it went away or came in between."""
        name, namespace = obj["metadata"]["name"], owner["metadata"]["namespace"]
        known = self._seen.get(kind, name, namespace)
        uid = str(known["metadata"]["uid"]) if known is not None and self.owns(owner, kind, known) else ""
        try:
            made = self._client.apply(kind, obj, uid=uid)
        except Conflict:
            there = self._client.get(kind, name, namespace)
            if there is None:
                raise
            if not self.owns(owner, kind, there):
                raise NameTaken(kind, there, owner) from None
            made = self._client.apply(kind, obj, uid=str(there["metadata"]["uid"]))
        self._seen.wrote(kind, made)
        log.info("applied %s %s", kind, name)

    def delete(self, owner: Object, deletion: Deletion) -> None:
        """Delete it where it is the owner's, and the one that was seen. What is another's stays, and is no error."""
        kind, name = deletion.kind, deletion.name
        there = self.find(owner, kind, name)
        if there is None:
            return
        if not self.owns(owner, kind, there):
            log.warning("%s %s is left: it is not of %s", kind, name, owner["metadata"]["name"])
            return
        uid = str(there["metadata"]["uid"])
        if deletion.uid in ("", uid):
            how = "Foreground" if deletion.foreground else "Background"
            self._client.delete(kind, name, owner["metadata"]["namespace"], propagation=how, uid=uid)
            log.info("deleted %s %s", kind, name)
