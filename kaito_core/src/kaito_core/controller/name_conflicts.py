"""Objects of other owners that were met where a Workspace's own belong. No cache has them, as a rule: the caches hold what has our label.

What was met is looked at again at each reconcile, until it is gone or the Workspace has changed: it may not need that name any more."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kaito_core.controller.reconcile.observed import NameConflict
from kaito_core.kube.kinds import Kind, Object

if TYPE_CHECKING:
    from kaito_core.controller.owned_objects import OwnedObjects

Key = tuple[str, str]
"""Namespace and name of a Workspace."""


class NameConflicts:
    """What is in the way, by Workspace. One key at a time, as the work queue hands them out. Methods raise `ApiError`."""

    def __init__(self, owned: OwnedObjects) -> None:
        self._owned = owned
        self._met: dict[Key, dict[tuple[Kind, str], object]] = {}
        """Kind and name of the object, and the state of the Workspace that needed it."""

    def found(self, workspace: Object, kind: Kind, name: str) -> bool:
        """Look for another owner's object there, and remember it; whether it is news."""
        there = self._owned.find(workspace, kind, name)
        if there is None or self._owned.owns(workspace, kind, there):
            return False
        met = self._met.setdefault(_key(workspace), {})
        known = met.get((kind, name)) == _state(workspace)
        met[kind, name] = _state(workspace)
        return not known

    def of(self, workspace: Object) -> tuple[NameConflict, ...]:
        """Those that are in the way now."""
        found = []
        for (kind, name), state in list(self._met.get(_key(workspace), {}).items()):
            there = self._owned.find(workspace, kind, name) if state == _state(workspace) else None
            if there is not None and not self._owned.owns(workspace, kind, there):
                found.append((kind, there))
            else:
                self._met[_key(workspace)].pop((kind, name))
        if not found:
            self.forget(_key(workspace))
        return tuple(found)

    def forget(self, key: Key) -> None:
        """The Workspace is gone."""
        self._met.pop(key, None)


def _key(workspace: Object) -> Key:
    return workspace["metadata"]["namespace"], workspace["metadata"]["name"]


def _state(workspace: Object) -> object:
    return workspace["metadata"]["uid"], workspace["metadata"].get("generation")
