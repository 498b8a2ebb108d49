"""The Workspace controller: what it watches, and one reconcile from look to deed.

caches ──> observe ──> decide ──> act ──┐
              ^    (pure)               │   again, while the decision says so
              └────────────────────────-┘
"""

from __future__ import annotations

import logging
import math
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kaito_core.api import labels
from kaito_core.api.inference_set import TEMPLATE, config_of
from kaito_core.controller.act import Actor, ask
from kaito_core.controller.api_keys import lock_of
from kaito_core.controller.configs import Configs
from kaito_core.controller.failed_create import failed_create
from kaito_core.controller.following import Following
from kaito_core.controller.forsaken import Forsaken
from kaito_core.controller.loop import Controller, Result
from kaito_core.controller.name_conflicts import NameConflicts
from kaito_core.controller.owned_objects import OwnedObjects
from kaito_core.controller.planner import Planner, cluster_provisioners
from kaito_core.controller.reconcile.case import Case, error_patch, seconds_or_never
from kaito_core.controller.reconcile.decide import decide, needs_plan
from kaito_core.controller.reconcile.decision import Endpoint, Ensure
from kaito_core.controller.reconcile.diagnosis import latest
from kaito_core.controller.reconcile.nodes import POLL
from kaito_core.controller.reconcile.observed import Installed, Observed, World
from kaito_core.controller.reconcile.revisions import hash_of
from kaito_core.controller.reconcile.starting import lacks_pods
from kaito_core.controller.seen import Seen
from kaito_core.controller.settings import Settings
from kaito_core.controller.sweep import Sweep
from kaito_core.controller.view import ClusterView, watching
from kaito_core.kube.errors import ApiError, Conflict
from kaito_core.kube.events import Recorder
from kaito_core.kube.kinds import (
    ENDPOINT_SLICES,
    JOBS,
    NODES,
    PODS,
    REVISIONS,
    SERVICES,
    STATEFUL_SETS,
    WORKSPACES,
    Object,
)
from kaito_core.kube.ownership import NameTaken, controlled_by, is_controlled_by
from kaito_core.kube.reflector import Reflector
from kaito_core.kube.workqueue import WorkQueue
from kaito_core.plugins.types import Held
from kaito_core.serving.activator import Activator
from kaito_core.serving.activator_gate import Lock
from kaito_core.workloads.endpoint import headless_name, mounts_images, routed, slice_name

if TYPE_CHECKING:
    from kaito_core.controller.metrics import Metrics
    from kaito_core.kube.client import Client
    from kaito_core.plugins.manager import PluginManager

ROUNDS = 20
"""Decisions in one reconcile: each follows from what the one before it did. More would be a loop, and a bug."""

ACTIVATOR_PORTS = range(20000, 30000)
"""One for each endpoint; the chart's network policy lets them in."""

WAKEFUL = 60.0
"""Seconds for which a request counts that came to an endpoint while it was asleep."""

SOON = 0.1
"""Seconds until a reconcile is tried again that met a newer version of the object; its watch event is on the way."""

log = logging.getLogger("kaito_core.controller")


class WorkspaceController:
    """Reconciles the Workspaces of a namespace, or of all; with ``names`` only those."""

    def __init__(
        self,
        client: Client,
        plugins: PluginManager,
        settings: Settings,
        *,
        namespace: str = "",
        names: Iterable[str] = (),
        metrics: Metrics | None = None,
        clock: Callable[[], float] = time.time,
        pod_ip: str = "",
    ) -> None:
        self._client = client
        self._names = frozenset(names)
        self._clock = clock
        self._provisioners = cluster_provisioners(plugins)
        self._installed = {n: Installed(p.holds, p.patience) for n, p in self._provisioners.items()}
        self._world = World(settings, lambda workspace, plan: plugins.workload(workspace, plan.workload))
        self.queue = WorkQueue("workspace", metrics=metrics)
        ours: dict[str, Any] = {"namespace": namespace, "labels": labels.WORKSPACE}
        self._workspaces = Reflector(client, WORKSPACES, namespace, on_change=self._workspace_changed)
        self._jobs = Reflector(client, JOBS, **ours, transform=_small_job, on_change=self._child_changed)
        self._pods = Reflector(client, PODS, **ours, transform=_small_pod, on_change=self._child_changed)
        name = labels.REVISION_NAME
        self._revisions = Reflector(client, REVISIONS, namespace, name, transform=_small_revision, index=name)
        self._nodes = Reflector(
            client, NODES, transform=_small_node, on_change=self._node_changed, index=labels.REQUEST
        )
        endpoints = [
            Reflector(client, k, **ours, transform=_small_part, on_change=self._child_changed)
            for k in (STATEFUL_SETS, SERVICES, ENDPOINT_SLICES)
        ]
        self.reflectors = [self._nodes, self._revisions, self._jobs, *endpoints, self._pods, self._workspaces]
        by_kind = {r.kind: r for r in self.reflectors}
        self._slices = by_kind[ENDPOINT_SLICES]
        self._seen = Seen({k: r for k, r in by_kind.items() if k not in (NODES, PODS)})
        self._pod_ip = pod_ip
        self._image_volumes = settings.image_volumes
        self._version: tuple[int, int] | None = None
        self._activator = Activator("", self._woken, lock=self._lock_of, ports=ACTIVATOR_PORTS) if pod_ip else None
        self._wakes: dict[tuple[str, str], float] = {}
        self._optional: list[Reflector] = []
        for provisioner in self._provisioners.values():
            caches = watching(client, provisioner.watches, self._bought_changed)
            self._optional += caches.values()
            provisioner.attach(ClusterView(client, {NODES: self._nodes, **caches}))
        self._configs = Configs(client)
        runtimes = {"transformers", *settings.runtime_images}
        self._planner = Planner(client, plugins, self._provisioners, runtimes, self._configs, settings.images)
        self._recorder = Recorder(client, "kaito-controller")
        self._owned = OwnedObjects(client, self._seen)
        self._name_conflicts = NameConflicts(self._owned)
        self._actor = Actor(client, self._seen, self._owned, self._recorder, self._tell)
        self._following = Following(client, self._own_pods, self._pod_moved)
        self._forsaken = Forsaken(lambda release: ask(self._provisioners, release, metrics))
        self._sweep = Sweep(
            {n: p for n, p in self._provisioners.items() if p.holds},
            lambda namespace, name: client.get(WORKSPACES, name, namespace),
            self._swept,
            namespace,
        )
        self._loop: Controller | None = None
        self._metrics = metrics
        if metrics:
            client.on_answer = metrics.requested

    # --- running

    def start_watching(self) -> None:
        """Fill the caches. A stand-by does this too, so that it can take over at once."""
        for reflector in (*self.reflectors, *self._optional):
            reflector.start()

    def start_workers(self, workers: int) -> None:
        """Begin to reconcile, once every cache is complete: a decision on half a picture would buy things twice."""
        self._loop = Controller("workspace", self.queue, self.reconcile, workers, metrics=self._metrics)
        threading.Thread(target=self._begin, args=(self._loop,), name="begin", daemon=True).start()

    def _begin(self, loop: Controller) -> None:
        while not all(r.has_synced for r in self.reflectors):
            time.sleep(0.05)
        for workspace in self._workspaces.list():
            self._enqueue(workspace)
        self._following.start()
        if self._activator:
            self._activator.start()
        loop.start()
        if not self._names:  # who looks after single Workspaces knows nothing of the others
            self._sweep.start()

    def stop(self, timeout: float = 30.0) -> None:
        """End what is being done, and do nothing more."""
        self._following.stop()
        self._sweep.stop()
        if self._loop is not None:
            self._loop.stop(timeout)
        if self._activator:
            self._activator.stop(timeout)
        for reflector in (*self.reflectors, *self._optional):
            reflector.stop()

    def count_by_state(self) -> dict[str, int]:
        """How many Workspaces there are by state."""
        states = Counter(str(w.get("status", {}).get("state", "Pending")) for w in self._workspaces.list())
        return dict(states)

    def _swept(self, provisioner: str, held: Held) -> None:
        if self._metrics:
            self._metrics.swept(provisioner)

    # --- what changed

    def _enqueue(self, workspace: Object) -> None:
        metadata = workspace["metadata"]
        if not self._names or metadata["name"] in self._names:
            self.queue.add((metadata["namespace"], metadata["name"]))

    def _workspace_changed(self, old: Object | None, new: Object | None) -> None:
        changed = new or old
        if changed is not None:
            self._enqueue(changed)

    def _child_changed(self, old: Object | None, new: Object | None) -> None:
        child = new or old
        if child is not None:
            self._pod_moved(child)

    def _pod_moved(self, child: Object) -> None:
        name = child["metadata"].get("labels", {}).get(labels.WORKSPACE, "")
        self._enqueue({"metadata": {"namespace": child["metadata"]["namespace"], "name": name}})

    def _node_changed(self, old: Object | None, new: Object | None) -> None:
        if old is not None and new is not None and _without_heartbeat(old) == _without_heartbeat(new):
            return
        if self._bought_changed(old, new):
            return
        for workspace in self._workspaces.list():
            if workspace.get("status", {}).get("finishedRevision") != hash_of(workspace):
                self._enqueue(workspace)

    def _bought_changed(self, old: Object | None, new: Object | None) -> bool:
        """Something that was got for one Workspace concerns that one and no other; whether it was."""
        has = ((new or old or {}).get("metadata") or {}).get("labels") or {}
        namespace, name = has.get(labels.WORKSPACE_NAMESPACE), has.get(labels.WORKSPACE)
        if not namespace or not name:
            return False
        if self._workspaces.get(name, namespace) is not None:  # else it is the sweep's
            self._enqueue({"metadata": {"namespace": namespace, "name": name}})
        return True

    def _server_version(self) -> tuple[int, int]:
        """Of Kubernetes, asked once; an upgrade restarts nothing of ours, and takes nothing away."""
        if self._version is None:
            numbers = re.match(r"v(\d+)\.(\d+)", self._client.version())
            self._version = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
        return self._version

    # --- requests for endpoints that are asleep

    def _woken(self, key: tuple[str, str]) -> None:
        """Somebody asks for this endpoint."""
        self._wakes[key] = self._clock()
        self.queue.add(key)

    def _lock_of(self, key: tuple[str, str]) -> Lock:
        """What API key a request has to bring that wakes this endpoint."""
        namespace, name = key
        return lock_of(self._client, self._workspaces.get(name, namespace))

    def _demand(self, workspace: Object) -> bool:
        """Whether somebody asks for its endpoint now: a request that waits, or the annotation of whoever is about to send one. What
        has been answered meanwhile counts a little longer: the pod that did so has not said yet that it is busy."""
        metadata = workspace["metadata"]
        key = (metadata["namespace"], metadata["name"])
        if self._activator is not None and self._activator.waiting(key) > 0:
            return True
        asked = seconds_or_never((metadata.get("annotations") or {}).get(labels.WAKE, ""))
        return self._clock() - max(self._wakes.get(key, -math.inf), asked) < WAKEFUL

    def _tell(self, key: tuple[str, str], endpoint: Endpoint | None) -> None:
        """Tell the activator how the endpoint is."""
        if self._activator is None:
            return
        if endpoint is None:
            self._wakes.pop(key, None)
            self._activator.forget(key)
        elif endpoint.address:
            self._activator.ready(key, endpoint.address)
        elif endpoint.refused:
            self._activator.refuse(key, endpoint.words)
        else:
            self._activator.asleep(key, endpoint.words)

    # --- one Workspace

    def reconcile(self, namespace: str, name: str) -> Result:
        """Bring one Workspace a step further; see the module."""
        key, workspace = (namespace, name), self._seen.get(WORKSPACES, name, namespace)
        if not self._forsaken.given_back(key, workspace["metadata"]["uid"] if workspace else ""):
            self.queue.add_after(key, POLL)
        if workspace is None:
            self._name_conflicts.forget(key)
            self._tell(key, None)
            return Result()
        try:
            return self._rounds(workspace)
        except Conflict:
            return Result(SOON)
        except Exception as e:
            self._write_error(namespace, name, e)
            raise

    def _rounds(self, workspace: Object) -> Result:
        metadata = workspace["metadata"]
        key, uid = (metadata["namespace"], metadata["name"]), metadata["uid"]
        observed = self._observe(workspace)
        for _ in range(ROUNDS):
            decision = decide(workspace, observed, self._world)
            if decision.ask is not None:
                if (
                    isinstance(decision.ask, Ensure)
                    and self._installed.get(decision.ask.provisioner, Installed()).holds
                ):
                    if not self._forsaken.knows(key, uid, decision.ask) and self._is_in_the_way(workspace, observed):
                        # No machine is paid for where the objects that run on it could not be made.
                        observed = replace(self._observe(workspace), asked=observed.asked)
                        continue
                    self._forsaken.asked(key, uid, decision.ask)
                answer = ask(self._provisioners, decision.ask, self._metrics)
                observed = replace(observed, asked={**observed.asked, decision.ask.key: answer})
                continue
            try:
                workspace = self._actor.act(workspace, decision)
            except NameTaken as e:
                if not self._name_conflicts.found(workspace, e.kind, e.name):
                    raise
                workspace = self._seen.get(WORKSPACES, metadata["name"], metadata["namespace"]) or workspace
                observed = replace(self._observe(workspace), asked=observed.asked)
                continue
            if decision.finalizer is False:
                self._forsaken.let_go(key, uid)
            if not decision.again:
                return Result(decision.look_again_after)
            observed = replace(self._observe(workspace), asked=observed.asked)
        raise RuntimeError(f"no end of decisions about {workspace['metadata']['name']}")

    def _observe(self, workspace: Object) -> Observed:
        metadata = workspace["metadata"]
        name, namespace = metadata["name"], metadata["namespace"]
        pods, servers = self._pods_of(workspace)
        service = self._seen.get(SERVICES, name, namespace)
        slices = controlled_by(self._slices.indexed(namespace, name), service)
        bound = {p["spec"]["nodeName"] for p in (*pods, *servers) if p.get("spec", {}).get("nodeName")}
        bound.update((workspace.get("status") or {}).get("workerNodes", ()))
        newest = latest(pods)
        observed = Observed(
            now=self._clock(),
            job=self._seen.get(JOBS, name, namespace),
            pods=pods,
            stateful_set=self._seen.get(STATEFUL_SETS, name, namespace),
            service=service,
            headless=self._seen.get(SERVICES, headless_name(name), namespace),
            slice=self._seen.get(ENDPOINT_SLICES, slice_name(name), namespace),
            routed=routed(slices, name, {p["metadata"]["uid"] for p in servers}),
            servers=servers,
            activity={p["metadata"]["uid"]: said for p in servers if (said := self._following.progress(p))},
            activator=(self._pod_ip, 0) if self._activator else None,  # its port is known when one is needed
            demand=self._demand(workspace),
            nodes={n: self._nodes.get(n) for n in bound},
            revisions=tuple(self._seen.list(REVISIONS, namespace, {labels.REVISION_NAME: name})),
            progress=self._following.progress(newest) if newest else None,
            provisioners=self._installed,
            name_conflicts=self._name_conflicts.of(workspace),
        )
        case = Case(workspace, observed, self._world)
        if (lacking := lacks_pods(case)) is not None:
            observed = replace(observed, failed_create=failed_create(self._client, lacking))
        if case.serves and self._activator is not None:
            observed = replace(observed, activator=(self._pod_ip, self._activator.listen((namespace, name))))
        if case.serves:
            observed = replace(observed, config=self._config(workspace))
            case = Case(workspace, observed, self._world)
        if needs_plan(case):
            mounts = case.serves and self._image_volumes and mounts_images(self._server_version(), self._nodes.list())
            planned = self._planner(workspace, serving=case.serves)
            observed = replace(observed, planned=planned, mounts_images=mounts)
            if case.serves:  # planning has looked at it anew
                observed = replace(observed, config=self._config(workspace))
        return observed

    def _pods_of(self, workspace: Object) -> tuple[tuple[Object, ...], tuple[Object, ...]]:
        """The pods of its job, and those of its endpoint: others may have its label."""
        name, namespace = workspace["metadata"]["name"], workspace["metadata"]["namespace"]
        labelled = self._pods.indexed(namespace, name)
        runs = (self._seen.get(kind, name, namespace) for kind in (JOBS, STATEFUL_SETS))
        pods, servers = (controlled_by(labelled, r if is_controlled_by(r, workspace) else None) for r in runs)
        return pods, servers

    def _own_pods(self) -> list[Object]:
        """Those of all Workspaces."""
        return [pod for workspace in self._workspaces.list() for pods in self._pods_of(workspace) for pod in pods]

    def _is_in_the_way(self, workspace: Object, observed: Observed) -> bool:
        """Whether the API server has an object of another owner where one of the Workspace's is needed."""
        needs = Case(workspace, observed, self._world).needs
        return any(self._name_conflicts.found(workspace, kind, name) for kind, name in needs)

    def _config(self, workspace: Object) -> str:
        """What its settings are. To a replica of an InferenceSet its set says when it shall have others."""
        metadata, named = workspace["metadata"], (workspace.get("inference") or {}).get("config")
        template = (metadata.get("annotations") or {}).get(TEMPLATE)
        if template is not None:
            return config_of(template)
        return self._configs.digest(named, metadata["namespace"]) if named else ""

    def _write_error(self, namespace: str, name: str, error: Exception) -> None:
        """Say in a condition of its own what failed: the user looks there, and not into our log. Nothing else is written, and only
        to the state that is known: what has been reached stays as it is."""
        workspace = self._seen.get(WORKSPACES, name, namespace)
        if workspace is None:
            return
        patch = error_patch(workspace, error, self._clock())
        try:
            self._seen.wrote(WORKSPACES, self._client.patch(WORKSPACES, name, namespace, patch, subresource="status"))
        except ApiError as e:
            log.warning("the status of %s cannot be written either: %s", name, e)


# --- what the caches keep: a cluster has many pods, and their specs are large


def _small(obj: Object, **parts: Any) -> Object:
    kept = ("name", "namespace", "uid", "resourceVersion", "labels", "annotations", "ownerReferences",
            "creationTimestamp", "deletionTimestamp")  # fmt: skip
    metadata = {k: v for k, v in obj["metadata"].items() if k in kept}
    return {"metadata": metadata, **{k: v for k, v in parts.items() if v is not None}}


def _small_job(job: Object) -> Object:
    suspended = (job.get("spec") or {}).get("suspend")
    return _small(job, spec={"suspend": True} if suspended else None, status=job.get("status"))


def _small_part(part: Object) -> Object:
    """Of an endpoint: what it was made from is in an annotation."""
    endpoints = [{k: e.get(k) for k in ("conditions", "targetRef")} for e in part.get("endpoints") or ()]
    return _small(part, spec={"replicas": part.get("spec", {}).get("replicas")}, endpoints=endpoints or None)


def _small_pod(pod: Object) -> Object:
    return _small(pod, spec={"nodeName": pod.get("spec", {}).get("nodeName", "")}, status=pod.get("status"))


def _small_revision(revision: Object) -> Object:
    return _small(revision, revision=revision.get("revision"))


def _small_node(node: Object) -> Object:
    status = node.get("status", {})
    kept = {k: status[k] for k in ("capacity", "allocatable", "conditions") if k in status}
    kept["nodeInfo"] = {"containerRuntimeVersion": status.get("nodeInfo", {}).get("containerRuntimeVersion", "")}
    spec = {k: v for k, v in node.get("spec", {}).items() if k in ("taints", "unschedulable", "providerID")}
    return _small(node, spec=spec, status=kept)


def _without_heartbeat(node: Object) -> Object:
    """What a node is, apart from when it last said so."""
    told = [
        {k: v for k, v in c.items() if k in ("type", "status", "reason")}
        for c in node.get("status", {}).get("conditions", ())
    ]
    metadata = {k: v for k, v in node["metadata"].items() if k in ("labels", "deletionTimestamp")}
    return {**node, "metadata": metadata, "status": {**node.get("status", {}), "conditions": told}}
