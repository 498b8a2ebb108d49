"""Looks for machines that nobody wants, at the start and every few minutes: what the provisioners hold, against what the Workspaces
ask for. Nothing in the reconciler should ever leave one behind; this is for what nobody has thought of, since it costs money."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

from kaito_core.api import labels
from kaito_core.controller.reconcile.case import attempts_of, request_id
from kaito_core.kube.kinds import Object
from kaito_core.plugins.types import Held, NodeProvisioner, ProvisioningError
from kaito_core.problems import KaitoError

EVERY = 300.0
"""Seconds between two sweeps."""

SETTLED = 120.0
"""Seconds that a machine must have been held for: what is quite new may be wanted by what we have not seen yet."""

log = logging.getLogger("kaito_core.controller.sweep")


def wanted(held: Held, workspace: Object | None) -> bool:
    """Whether this Workspace, the one that it was got for, still wants it: its present attempt is for just this request."""
    if workspace is None:
        return False
    attempts = attempts_of(workspace, workspace.get("status") or {})
    return request_id(workspace["metadata"]["uid"], attempts) == held.request_id and bool(attempts)


class Sweep:
    """A thread that releases what is held for nobody.

    ``find`` reads a Workspace by namespace and name, from the API server itself: a cache that is behind would make a machine
    look unwanted. ``namespace`` is the only one that is looked after; all when empty."""

    def __init__(
        self,
        provisioners: Mapping[str, NodeProvisioner],
        find: Callable[[str, str], Object | None],
        released: Callable[[str, Held], None],
        namespace: str = "",
    ) -> None:
        self._provisioners = provisioners
        self._find = find
        self._released = released
        self._namespace = namespace
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sweep", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()

    def once(self) -> None:
        """One sweep. What fails with one provisioner keeps nobody from looking at the others."""
        for name, provisioner in self._provisioners.items():
            try:
                for held in provisioner.held():
                    if not self._stop.is_set():
                        self._look(name, provisioner, held)
            except (
                ProvisioningError,
                KaitoError,
            ) as e:  # whoever did not install Karpenter's rules needs no traceback every few minutes
                log.warning("the machines of the node provisioner %s are not looked through, later again: %s", name, e)
            except Exception:
                log.exception("the machines of the node provisioner %s could not be looked through; later again", name)

    def _look(self, name: str, provisioner: NodeProvisioner, held: Held) -> None:
        namespace = held.tags.get(labels.WORKSPACE_NAMESPACE, "")
        whose = held.tags.get(labels.WORKSPACE, "")
        if not whose or (self._namespace and namespace != self._namespace) or held.age < SETTLED:
            return
        if wanted(held, self._find(namespace, whose)):
            return
        log.warning("%s holds %s for %s/%s, which does not want it: released", name, held.request_id, namespace, whose)
        provisioner.release(held.request_id)
        self._released(name, held)

    def _run(self) -> None:
        while True:
            self.once()
            if self._stop.wait(EVERY):
                return
