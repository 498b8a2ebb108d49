"""A cloud for tests: sells machines, takes them back, fails as it is told to, and remembers every call.

What the cloud has follows from its log and from nothing else. In a file the log outlives the controller, `kill -9` included:
a new controller that opens it sees what the dead one has bought.

    cloud = FakeProvisioner([Offer("small", 4, 16 << 30, price=…)], ready_after=2)
    cloud.fail(InsufficientCapacity("none left in this zone"), offer="small", times=1)
    …
    assert cloud.bought == ["large"]
    assert not cloud.leaks()
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn

from kaito_core.existing.node import COUNT, INSTANCE_TYPE, MEMORY, PRODUCT
from kaito_core.kube.kinds import NODES, Object
from kaito_core.plugins import types
from kaito_core.plugins.types import (
    Held,
    NodeProvisioner,
    NodeRequest,
    NodeStatus,
    Offer,
    ProvisioningError,
    Requirements,
)

if TYPE_CHECKING:
    from kaito_core.kube.client import Client

REQUEST = "testing.kaito.sh/request"
"""The label of a machine that says which request it was bought for."""

Event = dict[str, Any]
"""One line of the log: ``event`` is called, fault, bought, broken, looked, joined, leaving or released; ``id`` whose it is."""

Call = Literal["offers", "ensure", "observe", "release", "held"]


class Crash(BaseException):
    """The controller dies here. No `Exception`: nothing that forgives a broken plugin may forgive this."""


def _die() -> NoReturn:
    raise Crash


@dataclass(frozen=True)
class Fault:
    """What goes wrong at a call of the cloud."""

    kind: Literal["refused", "broken", "answer-lost", "crash", "hang"]
    """``refused``: nothing is done, and the error is raised. ``broken``: the machine is sold, is never ready for the reason
    of the error, and is held until it is released. ``answer-lost``: it is done, and `Transient` is raised. ``crash``: it is
    done, and the controller dies before it can note so. ``hang``: it is done after ``seconds``."""
    call: Call = "ensure"
    offer: str = ""
    """The instance type that it happens for; empty: any."""
    times: int = 1
    """How often; 0: always."""
    error: str = "Transient"
    """The name of a `ProvisioningError` in `kaito_core.plugins.types`."""
    message: str = ""
    seconds: float = 0.0

    @property
    def exception(self) -> ProvisioningError:
        return _error(self.error, self.message)


@dataclass
class Machine:
    """What the cloud holds for one request; ``count`` machines of one type."""

    id: str
    offer: str
    nodes: tuple[str, ...]
    tags: Mapping[str, str] = field(default_factory=dict)
    bought: float = 0.0
    """When; seconds since the epoch."""
    looks: int = 0
    """How often it was asked for since it was sold."""
    joined: bool = False
    error: str = ""
    message: str = ""
    leaving: int | None = None
    """How often its release was asked for; None: not yet."""


class Log:
    """What happened, in order. This one is in memory and dies with the test."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._lock = threading.RLock()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else appends meanwhile."""
        with self._lock:
            yield

    def append(self, event: Event) -> None:
        self._events.append(event)

    def after(self, number: int) -> list[Event]:
        """The events after the first ``number``."""
        return self._events[number:]


class FileLog(Log):
    """The log as JSON lines, shared by every process that opens the file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._at = 0
        path.touch()

    @contextmanager
    def locked(self) -> Iterator[None]:
        with self._lock, self._path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def append(self, event: Event) -> None:
        # One write of one line: whoever is killed has written all of it or nothing.
        with self._path.open("ab", buffering=0) as file:
            file.write(json.dumps(event).encode() + b"\n")

    def after(self, number: int) -> list[Event]:
        with self._path.open("rb") as file:
            file.seek(self._at)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._at += len(whole)
        self._events += [json.loads(line) for line in whole.splitlines()]
        return super().after(number)


class FakeProvisioner(NodeProvisioner):
    """See the module. Safe to share between threads; two with one `FileLog` path are two controllers of one cloud."""

    name: ClassVar[str] = "fake"

    def __init__(
        self,
        offers: Iterable[Offer],
        *,
        ready_after: int = 0,
        gone_after: int = 0,
        faults: Iterable[Fault] = (),
        log: Log | None = None,
        kube: Client | None = None,
        die: Callable[[], NoReturn] = _die,
    ) -> None:
        """``ready_after`` calls of `ensure` say ``pending`` first, ``gone_after`` calls of `release` say ``releasing``.
        With ``kube`` every machine that is ready is a Node object there, until it is gone."""
        self.catalogue = tuple(replace(o, provisioner=self.name) for o in offers)
        self.ready_after = ready_after
        self.gone_after = gone_after
        self.faults = list(faults)
        self._log = log or Log()
        self._kube = kube
        self._die = die
        self._seen = 0
        self._state = _State()

    # --- what a test tells it to do wrong

    def fail(self, error: ProvisioningError, *, offer: str = "", call: Call = "ensure", times: int = 1) -> None:
        """The next calls raise this error, and nothing is done."""
        self.faults.append(Fault("refused", call, offer, times, type(error).__name__, str(error)))

    def break_machine(self, error: ProvisioningError, *, offer: str = "", times: int = 1) -> None:
        """The next machines are sold and come to nothing: ``failed`` with this error, held until they are released."""
        self.faults.append(Fault("broken", "ensure", offer, times, type(error).__name__, str(error)))

    def lose_answer(self, *, offer: str = "", call: Call = "ensure", times: int = 1) -> None:
        """The next calls are carried out, and raise `Transient`."""
        self.faults.append(Fault("answer-lost", call, offer, times, message="the connection was cut"))

    def crash(self, *, offer: str = "", call: Call = "ensure") -> None:
        """The next call is carried out, and its caller dies before it hears of it."""
        self.faults.append(Fault("crash", call, offer))

    def hang(self, seconds: float, *, offer: str = "", call: Call = "ensure", times: int = 1) -> None:
        """The next calls take so long."""
        self.faults.append(Fault("hang", call, offer, times, seconds=seconds))

    # --- what a test asks

    @property
    def events(self) -> list[Event]:
        """The whole log."""
        with self._log.locked():
            return self._log.after(0)

    @property
    def bought(self) -> list[str]:
        """The instance type of every machine that was ever sold, in order; of a request for two, twice."""
        return [e["offer"] for e in self.events if e["event"] == "bought" for _ in e["nodes"]]

    @property
    def machines(self) -> dict[str, Machine]:
        """What is sold and not gone, by request id."""
        with self._log.locked():
            return dict(self._now().machines)

    @property
    def most(self) -> int:
        """The most requests that machines were held for at one time."""
        with self._log.locked():
            return self._now().most

    def calls(self, call: Call = "ensure") -> int:
        """How often it was called."""
        return sum(e["event"] == "called" and e["call"] == call for e in self.events)

    def leaks(self) -> list[str]:
        """What was bought and whose release nobody has asked for, in words; empty is good at the end of a test."""
        return [f"{m.id}: {len(m.nodes)}×{m.offer}" for m in self.machines.values() if m.leaving is None]

    # --- the contract

    def offers(self, requirements: Requirements) -> Iterable[Offer]:
        with self._call("offers", "", ""):
            named = {t.lower() for t in requirements.instance_types}
            return [o for o in self.catalogue if not named or o.instance_type.lower() in named]

    def ensure(self, request: NodeRequest) -> NodeStatus:
        with self._call("ensure", request.id, request.offer.instance_type) as fault:
            machine = self._now().machines.get(request.id)
            if machine is not None and machine.leaving is not None:
                return _status(machine, "releasing", "it is being given back")
            if machine is None:
                self._note(
                    "bought",
                    request.id,
                    offer=request.offer.instance_type,
                    nodes=_names(request),
                    tags=dict(request.tags),
                )
                if fault is not None and fault.kind == "broken":
                    self._note("broken", request.id, error=fault.error, message=fault.message)
            self._note("looked", request.id)
            machine = self._now().machines[request.id]
            if self._kube is not None and self._phase(machine) == "ready" and not machine.joined:
                for node in machine.nodes:
                    _join(self._kube, node, request)
                self._note("joined", request.id)
            return self._answer(machine)

    def observe(self, request_id: str) -> NodeStatus:
        with self._call("observe", request_id):
            machine = self._now().machines.get(request_id)
            return self._answer(machine) if machine else NodeStatus(request_id, "absent")

    def release(self, request_id: str) -> NodeStatus:
        with self._call("release", request_id):
            if request_id not in self._now().machines:
                return NodeStatus(request_id, "absent")
            self._note("leaving", request_id)
            machine = self._now().machines[request_id]
            if (machine.leaving or 0) <= self.gone_after:
                return _status(machine, "releasing", "it is being given back")
            # All of them, noted or not: whoever joined one may have died before it could say so.
            for node in machine.nodes if self._kube is not None else ():
                assert self._kube is not None
                self._kube.delete(NODES, node)
            self._note("released", request_id)
            return NodeStatus(request_id, "absent")

    def held(self) -> Iterable[Held]:
        with self._call("held", ""):
            now = time.time()
            return [Held(m.id, m.tags, now - m.bought) for m in self._now().machines.values()]

    # --- how a call goes

    @contextmanager
    def _call(self, call: Call, request_id: str, offer: str = "") -> Iterator[Fault | None]:
        with self._log.locked():
            machine = self._now().machines.get(request_id)
            offer = offer or (machine.offer if machine else "")
            self._note("called", request_id, call=call, offer=offer)
            fault = self._next_fault(call, offer)
        if fault is not None and fault.kind == "hang":
            time.sleep(fault.seconds)
        if fault is not None and fault.kind == "refused":
            raise fault.exception
        with self._log.locked():
            yield fault
        if fault is not None and fault.kind == "answer-lost":
            raise fault.exception
        if fault is not None and fault.kind == "crash":
            self._die()

    def _next_fault(self, call: Call, offer: str) -> Fault | None:
        used = self._now().faults
        for number, fault in enumerate(self.faults):
            key = f"{number}: {fault}"
            if (
                fault.call == call
                and fault.offer in ("", offer)
                and (not fault.times or used.get(key, 0) < fault.times)
            ):
                self._note("fault", fault=key)
                return fault
        return None

    def _note(self, event: str, request_id: str = "", **about: Any) -> None:
        self._log.append({"event": event, "id": request_id, **about, "time": time.time()})

    def _now(self) -> _State:
        for event in self._log.after(self._seen):
            self._state.take(event)
            self._seen += 1
        return self._state

    def _phase(self, machine: Machine) -> Literal["pending", "ready", "failed", "releasing"]:
        if machine.leaving is not None:
            return "releasing"
        if machine.error:
            return "failed"
        return "ready" if machine.looks > self.ready_after else "pending"

    def _answer(self, machine: Machine) -> NodeStatus:
        phase = self._phase(machine)
        words = {"pending": f"{machine.offer} is on its way", "failed": machine.message}
        return _status(machine, phase, words.get(phase, ""))


@dataclass
class _State:
    """What the log says that the cloud has."""

    machines: dict[str, Machine] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)
    most: int = 0

    def take(self, event: Event) -> None:
        machine = self.machines.get(event["id"])
        match event["event"]:
            case "bought":
                self.machines[event["id"]] = Machine(
                    event["id"], event["offer"], tuple(event["nodes"]), event["tags"], event["time"]
                )
                self.most = max(self.most, len(self.machines))
            case "released":
                self.machines.pop(event["id"], None)
            case "fault":
                self.faults[event["fault"]] = self.faults.get(event["fault"], 0) + 1
            case "looked" if machine:
                machine.looks += 1
            case "joined" if machine:
                machine.joined = True
            case "broken" if machine:
                machine.error, machine.message = event["error"], event["message"]
            case "leaving" if machine:
                machine.leaving = (machine.leaving or 0) + 1


def _error(name: str, message: str) -> ProvisioningError:
    kind = getattr(types, name, None)
    if not (isinstance(kind, type) and issubclass(kind, ProvisioningError)):
        raise ValueError(f"{name!r} is no ProvisioningError")
    return kind(message)


def _status(machine: Machine, phase: Literal["pending", "ready", "failed", "releasing"], message: str) -> NodeStatus:
    ready = phase == "ready"
    return NodeStatus(
        machine.id,
        phase,
        nodes=machine.nodes if ready else (),
        selector={REQUEST: _short(machine.id)} if ready else {},
        message=message,
        failure=_error(machine.error, machine.message) if phase == "failed" else None,
    )


def _short(request_id: str) -> str:
    """The request as a label's value and as part of a node's name, whatever is in its id."""
    return hashlib.sha256(request_id.encode()).hexdigest()[:10]


def _names(request: NodeRequest) -> list[str]:
    return [f"fake-{_short(request.id)}-{number}" for number in range(request.requirements.count)]


# --- a machine as a Node object, where there is an API server and nobody plays a kubelet


def _join(kube: Client, name: str, request: NodeRequest) -> None:
    from kaito_core.kube.errors import AlreadyExists

    offer = request.offer
    labels = {**request.requirements.labels, **request.tags, REQUEST: _short(request.id)}
    labels |= {"kubernetes.io/hostname": name, INSTANCE_TYPE: offer.instance_type, **_gpu_labels(offer)}
    node: Object = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}}
    with suppress(AlreadyExists):
        kube.create(NODES, node)
    # The API server taints what has just been made; a cloud takes that off once the machine is up.
    kube.patch(NODES, name, "", {"spec": {"taints": None}})
    has = {"cpu": str(offer.cpus), "memory": str(offer.memory), "pods": "110"}
    if offer.gpus:
        has["amd.com/gpu" if offer.gpu and offer.gpu.vendor == "amd" else "nvidia.com/gpu"] = str(offer.gpus)
    ready = {"type": "Ready", "status": "True", "reason": "Fake", "message": "a machine of a test"}
    status = {"capacity": has, "allocatable": has, "conditions": [ready]}
    kube.patch(NODES, name, "", {"status": status}, subresource="status")


def _gpu_labels(offer: Offer) -> Mapping[str, str]:
    """What GPU feature discovery would put there."""
    if offer.gpu is None or not offer.gpus or offer.gpu.vendor != "nvidia":
        return {}
    model = offer.gpu.model.replace(" ", "-")
    return {PRODUCT: model, COUNT: str(offer.gpus), MEMORY: str(offer.gpu.memory >> 20)}
