"""Machines of Workspaces that went without being let go.

A finalizer holds a Workspace until everything that was got for it is given back. But whoever deletes it in the very moment in which it
gets its finalizer is faster: the API server has seen none and takes the object away, while the write of the finalizer succeeds. What was
asked for after that write would be nobody's until the sweep comes by, and is paid for until then. So what was asked for is remembered
until its Workspace has been let go; a process that dies in between leaves it to the sweep, which begins with a look at everything."""

from __future__ import annotations

import logging
from collections.abc import Callable

from kaito_core.controller.reconcile.decision import Ensure, Release
from kaito_core.plugins.types import NodeStatus

Key = tuple[str, str]
"""Namespace and name of a Workspace."""


log = logging.getLogger("kaito_core.controller")


class Forsaken:
    """What was asked for, by Workspace. One key at a time, as the work queue hands them out."""

    def __init__(self, release: Callable[[Release], NodeStatus]) -> None:
        self._release = release
        self._asked: dict[Key, dict[str, Release]] = {}
        """By the UID: another Workspace may have the name of one that went."""

    def asked(self, key: Key, uid: str, question: Ensure) -> None:
        """This is about to be asked for; what the same Workspace had before has been given back."""
        self._asked.setdefault(key, {})[uid] = Release(question.provisioner, question.request.id)

    def knows(self, key: Key, uid: str, question: Ensure) -> bool:
        """Whether just this has been asked for before."""
        return self._asked.get(key, {}).get(uid) == Release(question.provisioner, question.request.id)

    def let_go(self, key: Key, uid: str) -> None:
        """Everything of this Workspace has been given back, and its finalizer is gone."""
        self._asked.get(key, {}).pop(uid, None)

    def given_back(self, key: Key, uid: str = "") -> bool:
        """Give back what Workspaces of this name had, but the one that is there now (``uid``); whether nothing is left of it."""
        left = self._asked.get(key, {})
        for gone in [u for u in left if u != uid]:
            release = left[gone]
            if self._release(release).phase == "absent":
                log.warning(
                    "%s/%s went before it was let go: %s of %s is given back",
                    *key,
                    release.request_id,
                    release.provisioner,
                )
                del left[gone]
        if not left:
            self._asked.pop(key, None)
        return not left or set(left) == {uid}
