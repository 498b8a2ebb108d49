"""A world in which decisions are carried out, small enough to be crashed anywhere: plain dicts, no API server.

It knows what an API server, the job controller and a cloud do with what `decide` asks for, and nothing else."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kaito_core.api import labels, read_workspace
from kaito_core.api.crd import crd
from kaito_core.controller.reconcile.case import Case, error_patch, time_of
from kaito_core.controller.reconcile.decide import decide
from kaito_core.controller.reconcile.decision import Decision, Endpoint, Ensure, Observe, Release
from kaito_core.controller.reconcile.observed import Installed, Observed, Planned, PodProgress, World
from kaito_core.controller.settings import Settings
from kaito_core.kube.errors import ApiError, Conflict, Invalid
from kaito_core.kube.kinds import ENDPOINT_SLICES, JOBS, PODS, SERVICES, STATEFUL_SETS, Kind, Object, owner_reference
from kaito_core.planning.plan import Catalog, plan
from kaito_core.planning.serving import serving_after
from kaito_core.plugins.types import InferenceRuntime, NodeStatus, Offer, Price, ProvisioningError
from kaito_core.problems import Problem
from kaito_core.testing.planning import GIB, OneOfEach
from kaito_core.testing.serving import Echo
from kaito_core.workloads.endpoint import Address

START = 1_800_000_000.0
OFFERS = tuple(
    Offer(name, cpus=4, memory=16 * GIB, provisioner="cloud", price=Price(price, "test", "2026-01-01"))
    for name, price in (("cheap", 1.0), ("dear", 2.0))
)


STATUS_SCHEMA: Object = crd()["spec"]["versions"][-1]["schema"]["openAPIV3Schema"]["properties"]["status"]


def bounds(schema: Object, path: str = "status") -> Iterator[str]:
    """The places in a schema that bound how much may be written there."""
    if {"maxItems", "maxLength"} & set(schema):
        yield path
    for name, inner in schema.get("properties", {}).items():
        yield from bounds(inner, f"{path}.{name}")
    if "items" in schema:
        yield from bounds(schema["items"], f"{path}[]")


def too_much(schema: Object, value: Any, path: str = "status") -> Iterator[str]:
    """What the API server would not take, since it is more than the schema allows."""
    for limit in {"maxItems", "maxLength"} & set(schema):
        if len(value) > schema[limit]:
            yield f"{path}: has {len(value)}, at most {schema[limit]}"
    if isinstance(value, dict):
        for name in value.keys() & schema.get("properties", {}).keys():
            yield from too_much(schema["properties"][name], value[name], f"{path}.{name}")
    elif isinstance(value, list):
        for each in value:
            yield from too_much(schema.get("items", {}), each, f"{path}[]")


class Crash(Exception):
    """The controller dies here."""


def workspace_object(**changes: Any) -> Object:
    """The quick start's Workspace as an API server has it."""
    made: Object = {
        "apiVersion": "kaito.sh/v1beta1",
        "kind": "Workspace",
        "metadata": {"name": "one", "namespace": "default", "uid": "u-1", "generation": 1, "resourceVersion": "1"},
        "resource": {"count": 1},
        "tuning": {
            "preset": {"name": "tiny"},
            "method": "qlora",
            "input": {"urls": ["https://example.com/a.jsonl"]},
            "output": {"image": "r.io/a:1", "imagePushSecret": "push"},
        },
    }
    made.update(changes)
    return made


class Registry(OneOfEach):
    """The same, and a runtime."""

    def runtimes(self) -> dict[str, InferenceRuntime]:
        return {"echo": Echo()}


def planned(obj: Object, offers: tuple[Offer, ...] = OFFERS, *, serving: bool = False) -> Planned:
    """What planning says of it."""
    workspace, problems = read_workspace(obj)
    assert workspace is not None, problems
    catalog = Catalog(Registry(), offers, {"settings": {"inference_config.yaml": "{}"}})
    made = serving_after(workspace, catalog) if serving and workspace.tuning else plan(workspace, catalog)
    return Planned(made, problems=tuple(p for p in problems if p.severity == "warning"))


WORLD = World(Settings(tuner_image="r.io/tuner:1"), lambda workspace, plan: plan.workload)


@dataclass
class Simulation:
    """One Workspace and everything around it."""

    workspace: Object | None = field(default_factory=workspace_object)
    offers: tuple[Offer, ...] = OFFERS
    now: float = START
    objects: dict[tuple[Kind, str], Object] = field(default_factory=dict)
    pods: list[Object] = field(default_factory=list)
    servers: list[Object] = field(default_factory=list)
    """The pods of the endpoint."""
    machines: dict[str, str] = field(default_factory=dict)
    """What the cloud has, by request id: the instance type."""
    bought: list[str] = field(default_factory=list)
    """Every machine that was ever paid for."""
    most: int = 0
    """The most machines that there were at one time."""
    failures: dict[str, ProvisioningError] = field(default_factory=dict)
    """What the cloud says instead, by instance type."""
    broken: dict[str, ProvisioningError] = field(default_factory=dict)
    """Machines that are sold and come to nothing, by instance type."""
    gone_after: int = 0
    """How many times the cloud says that a machine is being given back before it is gone."""
    leaving: dict[str, int] = field(default_factory=dict)
    """How often it has said so, by request id."""
    node: Object | None = field(default_factory=lambda: {"metadata": {"name": "node-1"}})
    """The Node object of the machine; None when it is gone."""
    tagged: list[tuple[str, ...]] = field(default_factory=list)
    """The instance types of every question: the first and those that would do as well."""
    tags: dict[str, str] = field(default_factory=dict)
    """What the last question said of whom it is for."""
    pending: int = 0
    """How many more times the cloud says that a machine is on its way."""
    writes: int = 0
    notes: list[str] = field(default_factory=list)
    holds: bool = True
    """Whether what the cloud gives has to be given back."""
    activator: Address | None = None
    """Where requests are held; None: nobody holds them."""
    demand: bool = False
    config: str = ""
    """What the settings are in the ConfigMap of the endpoint."""
    refuses: str = ""
    """Why it cannot be planned."""
    told: Endpoint | None = None
    """What the activator was told last."""
    routes: bool = True
    """Whether Kubernetes has seen that a pod is ready."""
    in_flight: int = 0
    last_request: float = 0.0
    """What the server's pod says of itself."""
    crash_after: int = -1
    """Die after so many steps; -1: never."""
    unanswered: bool = False
    """The cloud says neither what it sells nor how far it is."""
    refused: str = ""
    """What the API server says to a client that makes a pod."""
    admitted: int = 0
    """So many pods of an endpoint it takes all the same."""
    denied: dict[Kind, ApiError] = field(default_factory=dict)
    """What it says to the controller that makes such an object."""
    error: ApiError | None = None
    """What one write is answered with, …"""
    error_at: int = -1
    """… after so many others; …"""
    answer_lost: bool = False
    """… whether it has been done all the same."""
    failed: bool = False
    """Whether the last reconcile failed."""
    requests: list[str] = field(default_factory=list)
    """Of every machine that was ever paid for."""

    # --- the controller

    def reconcile(self) -> Decision | None:
        """One reconcile, as `kaito_core.controller.workspaces` does it."""
        if self.workspace is None:
            return None
        try:
            self.failed = False
            return self._rounds()
        except Conflict:
            self.failed = True
        except ApiError as e:
            self.failed = True
            if self.workspace is not None:
                patch = error_patch(self.workspace, e, self.now)
                self._write(lambda: self._status({**self.workspace.get("status", {}), **patch["status"]}))
        return None

    def _rounds(self) -> Decision:
        assert self.workspace is not None
        observed = self.observe()
        for _ in range(30):
            decision = decide(self.workspace, observed, WORLD)
            if decision.ask is not None:
                answer = self.answer(decision.ask)
                self._step()
                observed = replace(observed, asked={**observed.asked, decision.ask.key: answer})
                continue
            self.act(decision)
            if not decision.again or self.workspace is None:
                return decision
            observed = replace(self.observe(), asked=observed.asked)
        raise AssertionError("no end of decisions")

    def observe(self) -> Observed:
        assert self.workspace is not None
        revisions = tuple(o for (k, _), o in self.objects.items() if k.kind == "ControllerRevision")
        observed = Observed(
            now=self.now,
            stateful_set=self.objects.get((STATEFUL_SETS, "one")),
            service=self.objects.get((SERVICES, "one")),
            slice=self.objects.get((ENDPOINT_SLICES, "one-activator")),
            routed=self.routes
            and any(p["status"].get("conditions", [{}])[0].get("status") == "True" for p in self.servers),
            servers=tuple(self.servers),
            activity={p["metadata"]["uid"]: self._busy() for p in self.servers if self.last_request},
            activator=self.activator,
            demand=self.demand,
            config=self.config,
            job=self.objects.get((JOBS, "one")),
            failed_create=self.refused,
            pods=tuple(self.pods),
            nodes=dict.fromkeys(self.workspace.get("status", {}).get("workerNodes", ()), self.node),
            revisions=revisions,
            provisioners={"cloud": Installed(self.holds)},
        )
        serving = Case(self.workspace, observed, WORLD).serves
        if self.refuses:
            return replace(observed, planned=Planned(None, "PlanRefused", (Problem(self.refuses),)))
        offers = () if self.unanswered else self.offers
        found = planned(self.workspace, offers, serving=serving)
        return replace(observed, planned=replace(found, failed=frozenset({"cloud"} if self.unanswered else ())))

    def _busy(self) -> PodProgress:
        return PodProgress(self.last_request, {"inFlight": self.in_flight, "lastRequest": self.last_request})

    def act(self, decision: Decision) -> None:
        assert self.workspace is not None
        if decision.finalizer is True:
            self._write(lambda: self._hold(decision))
        for kind, obj in decision.create:
            if (kind, obj["metadata"]["name"]) not in self.objects:
                self._write(lambda k=kind, o=obj: self._create(k, o))
        for kind, obj in decision.apply:
            self._write(lambda k=kind, o=obj: self._apply(k, o))
        for deletion in decision.delete:
            self._write(lambda d=deletion: self._delete(d.kind, d.name))
        if decision.status is not None and decision.status != self.workspace.get("status", {}):
            self._write(lambda: self._status(decision.status or {}))
        self.told = decision.endpoint
        self.notes += [n.reason for n in decision.notes]
        if decision.finalizer is False:
            self._write(self._let_go)

    def _write(self, what: Callable[[], object]) -> None:
        error, fails = self.error, self.error_at == 0
        self.error_at -= self.error_at >= 0
        if fails and error is not None and not self.answer_lost:
            raise error
        what()
        self.writes += 1
        if fails and error is not None:
            raise error
        self._step()

    def _step(self) -> None:
        if self.crash_after == 0:
            self.crash_after = -1
            raise Crash
        self.crash_after -= self.crash_after > 0

    # --- the API server and the job controller

    def _status(self, status: Mapping[str, Any]) -> None:
        """Written, unless the CRD does not allow it."""
        assert self.workspace is not None
        written = json.loads(json.dumps(status))
        if wrong := list(too_much(STATUS_SCHEMA, written)):
            raise Invalid(f"patch workspaces.kaito.sh default/one: {', '.join(wrong)}", status=422)
        self.workspace["status"] = written

    def _hold(self, decision: Decision) -> None:
        assert self.workspace is not None
        metadata = self.workspace["metadata"]
        metadata.setdefault("finalizers", []).append(labels.FINALIZER)
        metadata.setdefault("annotations", {}).update(decision.annotations)

    def _apply(self, kind: Kind, obj: Object) -> None:
        there = self.objects.get((kind, obj["metadata"]["name"]))
        if there is None:
            self._create(kind, obj)
        else:
            there["metadata"] |= copy.deepcopy(obj["metadata"])
            there.update({k: copy.deepcopy(v) for k, v in obj.items() if k != "metadata"})
        if kind == STATEFUL_SETS and (obj["spec"]["replicas"] == 1 or not self.servers):
            self._start_servers(obj)

    def _start_servers(self, obj: Object) -> None:
        """In the present form, and not ready yet."""
        made = copy.deepcopy(obj["spec"]["template"]["metadata"])
        count = obj["spec"]["replicas"]
        self.servers = [
            {
                "metadata": {
                    **made,
                    "name": f"one-{n}",
                    "uid": f"s-{n}-{self.writes}",
                    "creationTimestamp": time_of(self.now),
                    "ownerReferences": [owner_reference(self.objects[STATEFUL_SETS, "one"])],
                },
                "spec": {"nodeName": "node-1"},
                "status": {"podIP": "10.0.0.9"},
            }
            for n in range(min(count, self.admitted) if self.refused else count)
        ]

    def answers(self, *, ready: bool = True) -> None:
        """The kubelet says that the server's pod is ready."""
        for pod in self.servers:
            pod["status"]["conditions"] = [{"type": "Ready", "status": str(ready)}]

    def _let_go(self) -> None:
        """Its last finalizer is removed: a Workspace that is being deleted is gone, and what it owned goes with it."""
        self.workspace = None
        self.objects.clear()
        self.pods.clear()
        self.servers.clear()

    def _create(self, kind: Kind, obj: Object) -> None:
        if kind in self.denied:
            raise self.denied[kind]
        made = copy.deepcopy(obj)
        made["metadata"] |= {"uid": f"u-{len(self.objects)}-{self.writes}", "creationTimestamp": time_of(self.now)}
        self.objects[kind, obj["metadata"]["name"]] = made

    def _delete(self, kind: Kind, name: str) -> None:
        self.objects.pop((kind, name), None)
        if kind == JOBS:
            self.pods.clear()
        if kind == STATEFUL_SETS:
            self.servers.clear()
        if kind == PODS:
            self.servers = [p for p in self.servers if p["metadata"]["name"] != name]
            if not self.servers:
                self._start_servers(self.objects[STATEFUL_SETS, "one"])

    @property
    def job(self) -> Object | None:
        return self.objects.get((JOBS, "one"))

    def pod(self, *, running: bool = True, container: dict[str, Any] | None = None, **status: Any) -> Object:
        """A pod of the job, as the kubelet reports it."""
        name = f"one-{len(self.pods)}"
        state = container if container is not None else {"running": {}} if running else {"waiting": {}}
        made: Object = {
            "metadata": {
                "name": name,
                "uid": name,
                "creationTimestamp": f"2027-01-15T08:00:{len(self.pods):02}Z",
                "ownerReferences": [owner_reference(self.job)] if self.job else [],
            },
            "spec": {"nodeName": "node-1"},
            "status": {"containerStatuses": [{"name": "one", "image": "r.io/tuner:1", "state": state}], **status},
        }
        self.pods.append(made)
        return made

    def end_job(self, kind: str, **condition: Any) -> None:
        """The job controller says that the job is Complete or Failed."""
        assert self.job is not None
        self.job.setdefault("status", {})["conditions"] = [{"type": kind, "status": "True", **condition}]

    def change(self, **tuning: Any) -> None:
        """The user changes what is tuned."""
        assert self.workspace is not None
        self.workspace["tuning"] |= tuning
        self.workspace["metadata"]["generation"] += 1

    def remove(self) -> None:
        """The user deletes the Workspace."""
        assert self.workspace is not None
        if self.workspace["metadata"].get("finalizers"):
            self.workspace["metadata"]["deletionTimestamp"] = "2027-01-15T09:00:00Z"
        else:
            self.workspace = None

    # --- the cloud

    def answer(self, question: Ensure | Observe | Release) -> NodeStatus:
        if isinstance(question, Release):
            if question.request_id in self.machines and self.leaving.get(question.request_id, 0) < self.gone_after:
                self.leaving[question.request_id] = self.leaving.get(question.request_id, 0) + 1
                return NodeStatus(question.request_id, "releasing", message="shutting down")
            self.machines.pop(question.request_id, None)
            self.leaving.pop(question.request_id, None)
            return NodeStatus(question.request_id, "absent")
        if isinstance(question, Observe):
            there = question.request_id in self.machines
            return NodeStatus(question.request_id, "ready" if there else "absent", ("node-1",) if there else ())
        request = question.request
        self.tagged.append(tuple(o.instance_type for o in (request.offer, *request.also)))
        self.tags = dict(request.tags)
        failure = self.failures.get(request.offer.instance_type)
        if failure is not None:
            return NodeStatus(request.id, "failed", message=str(failure), failure=failure)
        if request.id in self.leaving and request.id in self.machines:
            return NodeStatus(request.id, "releasing", message="shutting down")
        if request.id not in self.machines:
            self.machines[request.id] = request.offer.instance_type
            self.bought.append(request.offer.instance_type)
            self.requests.append(request.id)
            self.most = max(self.most, len(self.machines))
            self.node = {"metadata": {"name": "node-1"}}
        failure = self.broken.get(request.offer.instance_type)
        if failure is not None:
            return NodeStatus(request.id, "failed", message=str(failure), failure=failure)
        if self.pending > 0:
            self.pending -= 1
            return NodeStatus(request.id, "pending", message="on its way")
        return NodeStatus(request.id, "ready", ("node-1",), {"kaito.sh/workspace": "one"})

    def take_away(self) -> None:
        """The cloud takes the machine: no node, and nothing to give back."""
        self.machines.clear()
        self.node = None
        self.now += 60

    # --- what a test asks

    def settle(self, rounds: int = 20) -> None:
        """Reconcile until nothing is written any more."""
        for _ in range(rounds):
            before, waiting = self.writes, self.pending
            self.reconcile()
            if self.workspace is None:
                return
            asks = waiting > 0 and self.state not in ("Succeeded", "Failed")
            if self.writes == before and not self.failed and not asks and not self._is_leaving():
                return
        raise AssertionError("it never comes to rest")

    def _is_leaving(self) -> bool:
        return any(request in self.machines for request in self.leaving)

    def condition(self, kind: str) -> dict[str, Any]:
        assert self.workspace is not None
        found = {c["type"]: c for c in self.workspace.get("status", {}).get("conditions", ())}
        return found.get(kind, {})

    @property
    def state(self) -> str:
        assert self.workspace is not None
        return str(self.workspace.get("status", {}).get("state", ""))

    def kinds(self) -> Iterator[str]:
        for kind, _ in self.objects:
            yield kind.kind
