"""What ``kaito doctor`` looks at: every check is a pure function of what was read of a cluster, and `CHECKS` lists them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Literal

from kaito_core import __version__
from kaito_core.cli.controller import LEASE_NAME
from kaito_core.kube.kinds import Object
from kaito_core.planning import catalogue

if TYPE_CHECKING:
    from kaito_core.existing.node import Node

State = Literal["ok", "warning", "problem"]

OLDEST: Final = (1, 29)
"""The first API server with rules in definitions (CEL) and ``podReplacementPolicy`` of Jobs without a feature gate."""

SILENT: Final = 60.0
"""Seconds without renewal after which a Lease is old: four times what it is held for, since clocks may differ."""

CONTROLLERS: Final = "app.kubernetes.io/name=kaito,app.kubernetes.io/component=controller"
DEFAULT_CLASS: Final = "storageclass.kubernetes.io/is-default-class"
CLOUDS: Final = {"azure": "Azure", "aws": "AWS", "gce": "Google Cloud"}
SHOWN: Final = 3


@dataclass(frozen=True)
class Result:
    """What a check says."""

    state: State
    message: str
    remedy: str = ""


@dataclass(frozen=True)
class Found:
    """What was read of a cluster, as the API server sent it."""

    version: str = "v1.31.0"
    definition: Object | None = None
    controllers: Sequence[Object] = ()
    """Deployments of kaito."""
    controller_pods: Sequence[Object] = ()
    leases: Sequence[Object] = ()
    nodes: Sequence[Object] = ()
    pods: Sequence[Object] = ()
    """Those that were made for Workspaces."""
    storage_classes: Sequence[Object] = ()
    not_mine: Sequence[str] = ()
    """What the person needs to be allowed and is not: ``create workspaces.kaito.sh``."""
    not_theirs: Sequence[str] = ()
    """What a controller may not do though it needs to."""
    provisioners: Sequence[str] = ()
    """Names of the node provisioners that are installed where doctor runs, and that can get machines."""
    namespace: str = "default"
    now: datetime = field(default_factory=lambda: datetime.now(UTC))
    unread: Mapping[str, str] = field(default_factory=dict)
    """What could not be read, by the name of the field above, and why."""


# --- the checks


def api_server(found: Found) -> Iterator[Result]:
    numbers = re.match(r"v(\d+)\.(\d+)", found.version)
    version = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    if version < OLDEST:
        needed = ".".join(map(str, OLDEST))
        yield Result(
            "problem", f"it is {found.version or 'of an unknown version'}", f"upgrade Kubernetes to {needed} or newer"
        )
    else:
        yield Result("ok", found.version)


def definition(found: Found) -> Iterator[Result]:
    from kaito_core.api.crd import crd

    there = found.definition
    remedy = "kaito crd | kubectl apply --server-side --force-conflicts -f -"
    if there is None:
        yield Result("problem", "the cluster does not know Workspaces", remedy)
        return
    established = _condition(there, "Established")
    if established.get("status") != "True":
        yield Result(
            "problem", f"it is not served: {_words(established)}", "see: kubectl describe crd workspaces.kaito.sh"
        )
    elif _schemas(there) == _schemas(crd()):
        yield Result("ok", f"workspaces.kaito.sh of kaito {__version__}")
    elif any("controller-gen.kubebuilder.io" in a for a in there["metadata"].get("annotations") or {}):
        yield Result("problem", "it is that of KAITO's own controller, which drops fields that kaito needs", remedy)
    elif found.controllers and all(_version(c) != __version__ for c in found.controllers):
        words = f"it is of another version than this kaito ({__version__}), as the controller is"
        yield Result(
            "warning", words, f"pip install kaito-core=={_version(found.controllers[0])}, or upgrade the cluster"
        )
    else:
        yield Result("problem", f"it is not that of kaito {__version__}: fields would be dropped", remedy)


def controller(found: Found) -> Iterator[Result]:
    if not found.controllers and any(_age(lease, found.now) < SILENT for lease in found.leases):
        yield Result("ok", "it runs outside of the cluster, or was not installed by kaito")
    elif not found.controllers:
        yield Result("problem", "there is none: nobody looks after Workspaces", "kaito install --registry HOST/PATH")
    for deployment in found.controllers:
        metadata, wanted = deployment["metadata"], deployment["spec"].get("replicas", 1)
        name = f"{metadata['namespace']}/{metadata['name']}"
        ready = deployment.get("status", {}).get("readyReplicas", 0)
        if not wanted:
            scale = f"kubectl -n {metadata['namespace']} scale deployment {metadata['name']} --replicas=2"
            yield Result("problem", f"{name} is scaled to 0", scale)
        elif not ready:
            troubles = map(_pod_trouble, _pods_of(deployment, found.controller_pods))
            words = f"no pod of {name} is ready: {next(filter(None, troubles), 'no reason is known')}"
            yield Result("problem", words, f"kubectl -n {metadata['namespace']} describe pods")
        elif _version(deployment) != __version__:
            words = f"{name} is kaito {_version(deployment)}, and this is {__version__}"
            yield Result("warning", words, "upgrade the older of both")
        else:
            yield Result("ok", f"{name}, {ready} of {wanted} ready")


def leader(found: Found) -> Iterator[Result]:
    electing = [d for d in found.controllers if "--no-leader-election" not in _arguments(d)]
    there = {(e["metadata"]["namespace"], e["metadata"]["name"]) for e in found.leases}
    for deployment in electing:
        if lease_of(deployment) not in there:
            where = "/".join(lease_of(deployment))
            yield Result("problem", f"the Lease {where} is not there: no controller has begun", _logs(deployment))
    for lease in found.leases:
        holder, age = lease.get("spec", {}).get("holderIdentity") or "", _age(lease, found.now)
        name = f"{lease['metadata']['namespace']}/{lease['metadata']['name']}"
        remedy = _logs(electing[0]) if electing else "start a controller"
        if not holder:
            yield Result("problem", f"nobody holds the Lease {name}", remedy)
        elif age > SILENT:
            yield Result("problem", f"{holder} holds the Lease {name} and was last heard {age:.0f} s ago", remedy)
        else:
            yield Result("ok", holder)


def your_rights(found: Found) -> Iterator[Result]:
    if not found.not_mine:
        yield Result("ok", f"you may run Workspaces in {found.namespace}")
        return
    state: State = "problem" if "create workspaces.kaito.sh" in found.not_mine else "warning"
    words = f"in {found.namespace} you may not {', '.join(found.not_mine)}"
    yield Result(state, words, "ask whoever looks after the cluster for these rights")


def its_rights(found: Found) -> Iterator[Result]:
    for missing in found.not_theirs[:SHOWN]:
        yield Result("problem", missing, "install kaito again, or add what is missing to its ClusterRole")
    if len(found.not_theirs) > SHOWN:
        yield Result("problem", f"and {len(found.not_theirs) - SHOWN} more rights are missing")
    if found.controllers and not found.not_theirs:
        yield Result("ok", "the controller may do what it needs to")


def nodes(found: Found) -> Iterator[Result]:
    every = _nodes(found)
    taking = [n for n in every if not n.trouble]
    if not taking:
        words = "; ".join(f"{n.name} {n.trouble}" for n in every[:SHOWN]) or "the cluster has none"
        yield Result(
            "warning" if found.provisioners else "problem", f"no node takes pods: {words}", "add a node, or mend one"
        )
        return
    yield Result("ok", f"{len(taking)} of {len(every)} take pods")
    for node in [n for n in every if n.trouble and "is tainted" not in n.trouble][:SHOWN]:
        yield Result("warning", f"the node {node.name} {node.trouble}", f"kubectl describe node {node.name}")


def gpus(found: Found) -> Iterator[Result]:
    every = _nodes(found)
    having = [n for n in every if n.usable and n.offer.gpus]
    if having:
        kinds = dict.fromkeys(f"{n.offer.gpus}×{n.offer.gpu.model}" for n in having if n.offer.gpu)
        yield Result("ok", f"{len(having)} node{'s' * (len(having) > 1)} with {', '.join(kinds)}")
    for node in [n for n in every if n.lack and not n.trouble][:SHOWN]:
        remedy = "install NVIDIA's device plugin and GPU feature discovery, or its GPU operator"
        yield Result("warning" if having else "problem", f"the node {node.name} {node.lack}", remedy)


def machines(found: Found) -> Iterator[Result]:
    if found.provisioners:
        yield Result(
            "ok", f"{', '.join(found.provisioners)} can get more, if the controller's image has the plugin too"
        )
    elif any(n.usable and n.offer.gpus for n in _nodes(found)):
        yield Result("ok", "only those that are there: no plugin that gets more is installed here")
    else:
        cloud = CLOUDS.get(_cloud(found), "")
        of = f" of {cloud}" if cloud else ""
        package = catalogue.provisioner_package(_cloud(found)) or "a plugin that gets machines"
        yield Result(
            "warning",
            f"no node has a GPU that can be used, and no plugin that gets machines{of} is installed here",
            f"add nodes with GPUs, or put {package} into the controller's image",
        )


def tuner_image(found: Found) -> Iterator[Result]:
    for deployment in found.controllers:
        image = setting(deployment, "--tuner-image", "KAITO_TUNER_IMAGE")
        if not image:
            yield Result(
                "problem",
                f"{deployment['metadata']['name']} names none",
                "set image.registry or image.tuner of the chart",
            )
            continue
        users = [p for p in found.pods if any(c.get("image") == image for c in _containers(p))]
        newest = max(users, key=lambda p: str(p["metadata"].get("creationTimestamp")), default=None)
        why = _not_pulled(newest) if newest else ""
        if newest and why:
            pod = f"{newest['metadata']['namespace']}/{newest['metadata']['name']}"
            remedy = "push it (images/build.py --registry), or give the chart image.pullSecrets"
            yield Result("problem", f"the pod {pod} cannot pull {image}: {why}", remedy)
        else:
            yield Result("ok", image if newest else f"{image}, which no pod has used yet")


def checkpoints(found: Found) -> Iterator[Result]:
    classes = [c["metadata"]["name"] for c in found.storage_classes]
    default = [c["metadata"]["name"] for c in found.storage_classes
               if (c["metadata"].get("annotations") or {}).get(DEFAULT_CLASS) == "true"]  # fmt: skip
    for deployment in found.controllers:
        wanted = setting(deployment, "--checkpoint-storage-class", "KAITO_CHECKPOINT_STORAGE_CLASS")
        if wanted and wanted not in classes:
            have = f"there are {', '.join(classes)}" if classes else "the cluster has none"
            yield Result(
                "problem",
                f"the StorageClass {wanted} is not there ({have})",
                "set checkpoints.storageClass of the chart",
            )
        elif wanted:
            yield Result("ok", f"on volumes of the StorageClass {wanted}")
        else:
            which = f", to {(default or classes)[0]} for one" if classes else "; the cluster has no StorageClass yet"
            words = "they die with their pod, but for Workspaces with tuning.checkpoints: who loses a node begins anew"
            yield Result("warning", words, f"set checkpoints.storageClass of the chart{which}")


@dataclass(frozen=True)
class Check:
    """One check: its title, the check, and the fields of `Found` that it looks at."""

    title: str
    check: Callable[[Found], Iterable[Result]]
    needs: tuple[str, ...]


CHECKS: Final = (
    Check("API server", api_server, ("version",)),
    Check("definition", definition, ("definition",)),
    Check("controller", controller, ("controllers", "controller_pods", "leases")),
    Check("leader", leader, ("controllers", "leases")),
    Check("your rights", your_rights, ("not_mine",)),
    Check("its rights", its_rights, ("controllers", "not_theirs")),
    Check("nodes", nodes, ("nodes",)),
    Check("GPUs", gpus, ("nodes",)),
    Check("machines", machines, ("nodes",)),
    Check("tuner image", tuner_image, ("controllers", "pods")),
    Check("checkpoints", checkpoints, ("controllers", "storage_classes")),
)


def examine(found: Found) -> list[tuple[str, Result]]:
    """All checks; one that needs what could not be read says so instead."""
    said: list[tuple[str, Result]] = []
    for check in CHECKS:
        blind = [found.unread[n] for n in check.needs if n in found.unread]
        results = [Result("warning", f"not checked: {blind[0]}")] if blind else list(check.check(found))
        said += [(check.title, r) for r in results]
    return said


# --- what the checks have in common


def _nodes(found: Found) -> list[Node]:
    from kaito_core.existing.node import read_node

    return sorted((read_node(n) for n in found.nodes), key=lambda n: n.name)


def _cloud(found: Found) -> str:
    """The scheme of the nodes' ``providerID``: ``azure``, ``aws``; empty when no cloud says one."""
    ids = [str(n.get("spec", {}).get("providerID", "")) for n in found.nodes]
    return next((i.partition(":")[0] for i in ids if ":" in i), "")


def _condition(obj: Object, kind: str) -> Mapping[str, Any]:
    conditions = (obj.get("status") or {}).get("conditions") or ()
    return next((c for c in conditions if c.get("type") == kind), {})


def _words(condition: Mapping[str, Any]) -> str:
    return str(condition.get("message") or condition.get("reason") or "no reason is known")


def _schemas(definition: Object) -> dict[str, Any]:
    return {v["name"]: v.get("schema") for v in definition["spec"]["versions"]}


def _version(deployment: Object) -> str:
    labels = deployment["metadata"].get("labels") or {}
    return str(labels.get("app.kubernetes.io/version", "of an unknown version"))


def _arguments(deployment: Object) -> list[str]:
    return [str(a) for c in deployment["spec"]["template"]["spec"]["containers"] for a in c.get("args") or ()]


def setting(deployment: Object, option: str, variable: str) -> str:
    """What the controller was told: by its arguments, else by its environment."""
    arguments = _arguments(deployment)
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument.startswith(f"{option}="):
            return argument.partition("=")[2]
        if argument == option:
            return following
    for container in deployment["spec"]["template"]["spec"]["containers"]:
        for env in container.get("env") or ():
            if env["name"] == variable:
                return str(env.get("value", ""))
    return ""


def lease_of(deployment: Object) -> tuple[str, str]:
    namespace = setting(deployment, "--lease-namespace", "KAITO_LEASE_NAMESPACE")
    name = setting(deployment, "--lease-name", "KAITO_LEASE_NAME")
    return namespace or deployment["metadata"]["namespace"], name or LEASE_NAME


def _logs(deployment: Object) -> str:
    metadata = deployment["metadata"]
    return f"kubectl -n {metadata['namespace']} logs deployment/{metadata['name']}"


def _age(lease: Object, now: datetime) -> float:
    """Seconds since the Lease was renewed; for ever when it never was."""
    try:
        return (now - datetime.fromisoformat(str(lease["spec"]["renewTime"]))).total_seconds()
    except (KeyError, ValueError):
        return float("inf")


def _pods_of(deployment: Object, pods: Iterable[Object]) -> list[Object]:
    """Its pods, the newest first."""
    wanted = deployment["spec"]["selector"]["matchLabels"].items()
    own = [p for p in pods if wanted <= (p["metadata"].get("labels") or {}).items()]
    return sorted(own, key=lambda p: str(p["metadata"].get("creationTimestamp")), reverse=True)


def _pod_trouble(pod: Object) -> str:
    from kaito_core.controller.reconcile.diagnosis import trouble

    found = trouble(pod)
    return found.message if found else ""


def _containers(pod: Object) -> list[Mapping[str, Any]]:
    return [*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"]]


def _not_pulled(pod: Object) -> str:
    """Why the kubelet cannot pull an image of this pod; empty when it can."""
    from kaito_core.controller.reconcile.diagnosis import PULL, containers

    for container in containers(pod.get("status", {})):
        waiting = container.get("state", {}).get("waiting", {})
        if waiting.get("reason") in PULL:
            return str(waiting.get("message") or waiting["reason"])
    return ""
