"""The node provisioner ``aks``: each request is one agent pool of the AKS cluster that kaito runs in.

The pool's name is the request's id, and it is only ever made where none is: whatever gets lost, nothing is bought twice. What a
request has become is read from Azure at each call; nothing that counts is remembered here."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Final

from kaito_core.api.labels import WORKSPACE, WORKSPACE_NAMESPACE
from kaito_core.kube.kinds import NODES
from kaito_core.planning import catalogue
from kaito_core.plugins.types import (
    Cluster,
    Held,
    NodeProvisioner,
    NodeRequest,
    NodeStatus,
    Offer,
    Requirements,
    Transient,
    Unsupported,
)
from kaito_core.problems import KaitoError
from kaito_provisioner_aks import market, pool, settings
from kaito_provisioner_aks.arm import Arm, Edge
from kaito_provisioner_aks.errors import DONE, Refused, Said, failure_of, kind_of
from kaito_provisioner_aks.pool import Pool

CLOUD: Final = "azure"
REGION: Final = "topology.kubernetes.io/region"
AKS_CLUSTER: Final = "kubernetes.azure.com/cluster"

SHORT: Final = 120.0
"""Seconds that a pool which is done may have too few nodes before they are asked for again: those of a spot pool that were taken
away do not come back by themselves."""

NO_REASON: Final = Said(DONE, "", "the agent pool failed, and Azure does not say why")


log = logging.getLogger("kaito.provisioner.aks")


class AksNodes(NodeProvisioner):
    """See the module."""

    name: ClassVar[str] = "aks"

    def __init__(
        self,
        environ: Mapping[str, str] | None = None,
        *,
        edge: Edge | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``edge`` is for tests; the environment is read when it is first needed."""
        self._environ = os.environ if environ is None else environ
        self._edge = edge
        self._clock = clock
        self._cluster: Cluster | None = None
        self._location = ""
        self._watch: market.Watch | None = None
        self._lock = threading.Lock()
        self._short: dict[str, float] = {}
        """Since when a pool that is done has had too few nodes."""

    def attach(self, cluster: Cluster) -> None:
        self._cluster = cluster

    # --- what there is

    def offers(self, requirements: Requirements) -> Iterable[Offer]:
        """Sizes with GPUs in the cluster's region. A cluster that is not of AKS gets none; but who names one is told what to set."""
        named = {t.lower() for t in requirements.instance_types}
        given, missing = settings.read(self._environ)
        if given is None:
            why = f"to get one as an agent pool of AKS, {missing} for the controller (docs/aks.md)"
            return [
                replace(o, retired=o.retired or why)
                for o in _known((), requirements)
                if o.instance_type.lower() in named
            ]
        edge = self._arm(given)
        try:
            location, why = self._where(edge, given), ""
        except Refused as e:
            location, why = "", f"Azure does not say where the AKS cluster {given.cluster} is: {e}"
        if location and requirements.regions and location not in map(settings.plain, requirements.regions):
            return []
        offers = [
            replace(o, region=location, provisioner=self.name)
            for o in _known((location,) if location else (), requirements)
            if not named or o.instance_type.lower() in named
        ]
        if not why and self._watch is not None:
            offers = market.marked(offers, self._watch(location), requirements.count, location)
        return [
            replace(o, retired=o.retired or why or pool.labels_problem(requirements, o.instance_type, location))
            for o in offers
        ]

    def _where(self, edge: Edge, given: settings.Settings) -> str:
        """The cluster's region. Asked once: a cluster does not move."""
        if not self._location:
            self._location = given.location
        if not self._location:
            try:
                self._location = edge.location()
            except Refused:
                # What is being waited for must not seem gone because Azure is out of order: its nodes know it too.
                if found := self._region_of_nodes():
                    return found
                raise
        return self._location

    def _region_of_nodes(self) -> str:
        labels = [n["metadata"].get("labels") or {} for n in (self._cluster.list(NODES) if self._cluster else ())]
        regions = Counter(settings.plain(has[REGION]) for has in labels if AKS_CLUSTER in has and has.get(REGION))
        return regions.most_common(1)[0][0] if regions else ""

    # --- one request

    def ensure(self, request: NodeRequest) -> NodeStatus:
        given, edge = self._must()
        found = self._look(edge, request.id)
        if found is None:
            return self._create(edge, given, request)
        if not pool.is_workspaces(found) or not _same_tags(found, request):
            raise Unsupported(f"there is already an agent pool {request.id}, and it is not of this Workspace")
        if found.phase == "deleting":
            return _releasing(found)
        if found.vm_size.lower() != request.offer.instance_type.lower():
            raise Unsupported(f"the agent pool {request.id} is there with machines of the type {found.vm_size}")
        status = self._status(edge, found, request.requirements.count)
        passing = isinstance(status.failure, Transient)
        if passing or (status.phase == "pending" and self._is_short(found, request.requirements.count)):
            return self._again(edge, given, request, found, status)
        return status

    def observe(self, request_id: str) -> NodeStatus:
        """How far the request is. The number of machines is what the pool was asked for."""
        _, edge = self._must()
        found = self._look(edge, request_id)
        if found is None or not pool.is_workspaces(found):
            return NodeStatus(request_id, "absent")
        return _releasing(found) if found.phase == "deleting" else self._status(edge, found, found.count)

    def release(self, request_id: str) -> NodeStatus:
        _, edge = self._must()
        found = self._look(edge, request_id)
        self._short.pop(request_id, None)
        if found is None:
            self._delete_left_nodes(request_id)
        if found is None or not pool.is_workspaces(found):
            return NodeStatus(request_id, "absent")
        if found.phase != "deleting":
            try:
                gone = not edge.delete(request_id)
            except Refused as e:
                if kind_of(e.said) != "deleting":
                    raise failure_of(e.said) from e
                gone = False
            if gone:
                return NodeStatus(request_id, "absent")
        return _releasing(found)

    def held(self) -> Iterable[Held]:
        """The pools that were got for Workspaces, and the Nodes that are left of such a pool and are not ready: a kubelet that is still
        alive when its machine is deleted may register its Node once more. The pools of NodeClaims, and other people's, are not among
        them."""
        given, _ = settings.read(self._environ)
        if given is None:
            return []
        try:
            pools = [pool.read(p) for p in self._arm(given).pools()]
        except Refused as e:
            raise failure_of(e.said) from e
        now = self._clock()
        found = {p.name: Held(p.name, _whose(p.marks), p.age(now)) for p in pools if pool.is_workspaces(p)}
        there = {p.name for p in pools}
        for node in self._cluster.list(NODES, labels={pool.MANAGED_BY: pool.OWNER}) if self._cluster else ():
            name = pool.of_node(node)
            if name and name not in there and pool.is_unready(node):
                found[name] = Held(name, _whose(node["metadata"]["labels"]), pool.unready_seconds(node, now))
        return list(found.values())

    # --- how

    def _must(self) -> tuple[settings.Settings, Edge]:
        given, missing = settings.read(self._environ)
        if given is None:
            raise Unsupported(f"the controller does not know its AKS cluster: {missing} (docs/aks.md)")
        return given, self._arm(given)

    def _arm(self, given: settings.Settings) -> Edge:
        with self._lock:
            if self._edge is None:
                self._edge = Arm(given)
            if self._watch is None:
                self._watch = market.Watch(self._edge)
            return self._edge

    def _look(self, edge: Edge, name: str) -> Pool | None:
        if pool.name_problem(name):
            return None  # no pool is called so; `pool.body` says it where one is wanted
        try:
            found = edge.pool(name)
        except Refused as e:
            raise failure_of(e.said) from e
        return pool.read(found) if found is not None else None

    def _create(self, edge: Edge, given: settings.Settings, request: NodeRequest) -> NodeStatus:
        body = pool.body(request, given, request.offer.region or self._location or given.location, self._clock())
        try:
            edge.put(request.id, body)
        except Refused as e:
            # Somebody is at this very pool: it was us, and the answer, or the look just now, came late. It may as well be
            # another pool that is worked on; then this one is still not there, and asking again is right.
            if kind_of(e.said) not in ("busy", "changed", "deleting") or self._look(edge, request.id) is None:
                raise failure_of(e.said) from e
        return NodeStatus(request.id, "pending", message=f"the agent pool {request.id} ({request.offer}) was asked for")

    def _status(self, edge: Edge, found: Pool, count: int) -> NodeStatus:
        if found.phase == "pending":
            return NodeStatus(
                found.name,
                "pending",
                message=f"the agent pool {found.name} ({found.vm_size}) is {found.state or 'on its way'}",
            )
        if found.phase == "failed":
            failure = failure_of(self._why(edge, found))
            return NodeStatus(found.name, "failed", message=str(failure), failure=failure)
        nodes = self._nodes(found.name)
        ready = pool.ready_nodes(nodes)
        if self._cluster is not None and len(ready) < count:
            return NodeStatus(found.name, "pending", message=_too_few(found, ready, nodes, count))
        self._short.pop(found.name, None)
        return NodeStatus(found.name, "ready", tuple(ready), pool.selector(found.name, nodes))

    def _why(self, edge: Edge, found: Pool) -> Said:
        """Why the pool failed: it says so itself, or the operation does if it was begun here."""
        if found.error is not None:
            return found.error
        try:
            said = edge.why_failed(found.name)
        except Refused:
            said = None
        if said is None and found.state.lower() == "canceled":
            return Said(DONE, "Canceled", "another operation came in between", frozenset({"canceled"}))
        return said or NO_REASON

    def _again(
        self, edge: Edge, given: settings.Settings, request: NodeRequest, found: Pool, status: NodeStatus
    ) -> NodeStatus:
        """Ask for the pool once more: what failed in passing is made whole, and machines that were taken away come back."""
        now = self._clock()
        age = found.age(now)
        body = pool.body(request, given, request.offer.region or self._location, now - age if age < now else now)
        try:
            edge.put(request.id, body, found.etag)
        except Refused as e:
            if kind_of(e.said) not in ("busy", "changed", "deleting"):
                raise failure_of(e.said) from e
        self._short.pop(request.id, None)
        return NodeStatus(request.id, "pending", message=f"asked for again: {status.message}")

    def _is_short(self, found: Pool, count: int) -> bool:
        """Whether a pool that is done has lacked machines for so long that they will not come by themselves."""
        if found.phase != "succeeded" or found.stopped or len(self._nodes(found.name)) >= count:
            self._short.pop(found.name, None)
            return False
        now = self._clock()
        return now - self._short.setdefault(found.name, now) >= SHORT

    def _delete_left_nodes(self, name: str) -> None:
        """Delete the Nodes of a pool that is gone. The pool costs nothing any more, so a refusal keeps no Workspace waiting."""
        for node in self._nodes(name):
            if pool.of_node(node) == name and pool.is_unready(node) and self._cluster is not None:
                try:
                    self._cluster.delete(NODES, node["metadata"]["name"])
                except KaitoError as e:
                    log.warning(
                        "the Node %s of the deleted agent pool %s is left: %s", node["metadata"]["name"], name, e
                    )

    def _nodes(self, name: str) -> list[Mapping[str, Any]]:
        if self._cluster is None:
            return []
        found = list(self._cluster.list(NODES, labels={pool.AGENT_POOL: name}))
        return found or list(self._cluster.list(NODES, labels={pool.OLD_AGENT_POOL: name}))


def _known(regions: tuple[str, ...], requirements: Requirements) -> list[Offer]:
    return list(catalogue.offers(CLOUD, regions, requirements.capacity_types))


def _whose(marks: Mapping[str, str]) -> dict[str, str]:
    return {k: marks.get(k, "") for k in (WORKSPACE, WORKSPACE_NAMESPACE)}


def _same_tags(found: Pool, request: NodeRequest) -> bool:
    whose = (WORKSPACE, WORKSPACE_NAMESPACE)  # what else is said there may change, and buys nothing anew
    return all(found.marks.get(k) == v for k, v in request.tags.items() if k in whose)


def _releasing(found: Pool) -> NodeStatus:
    return NodeStatus(found.name, "releasing", message=f"the agent pool {found.name} is being deleted")


def _too_few(found: Pool, ready: list[str], nodes: list[Mapping[str, Any]], count: int) -> str:
    if found.stopped:
        return f"the agent pool {found.name} is stopped: start it, or delete it"
    there = f"{len(ready)} of {count} nodes of the agent pool {found.name} are ready"
    late = sorted(n["metadata"]["name"] for n in nodes if n["metadata"]["name"] not in ready)
    return f"{there}; {', '.join(late)} {'is' if len(late) == 1 else 'are'} not" if late else there
