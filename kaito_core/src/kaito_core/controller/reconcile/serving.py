"""The endpoint: asleep, starting, ready; and asleep again when nobody has asked for a while.

                 a request                 a pod answers
      Asleep ────────────────> Starting ────────────────> Ready
        ^   (policy ``always``:    │                        │
        │    at once)              │ no machine             │ no request for ``idleAfter``
        │                          v                        │ (policy ``onDemand``)
        └────────────────────── Failed                      │
        └───────────────────────────────────────────────────┘

While no pod is ready the activator stands in the Service and holds what comes. Machines are got and given back as for a job."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

from kaito_core.api import conditions, labels
from kaito_core.controller.reconcile.case import Case, find, seconds, seconds_or_never, time_of, words
from kaito_core.controller.reconcile.decision import Deletion, Endpoint
from kaito_core.controller.reconcile.diagnosis import Trouble, latest, trouble
from kaito_core.controller.reconcile.machines import GONE, holds, machines_are_there
from kaito_core.controller.reconcile.nodes import give_up, next_candidate, nodes, wait_in_vain
from kaito_core.controller.reconcile.observed import Planned
from kaito_core.controller.reconcile.outcome import PATIENCE, pays_for_nothing, release
from kaito_core.controller.reconcile.revisions import served_by
from kaito_core.controller.reconcile.starting import (
    FAILED_CREATE,
    Wait,
    in_vain,
    not_ready,
    retry_in,
    retry_words,
    waiting_for,
)
from kaito_core.controller.reconcile.tenants import not_allowed
from kaito_core.kube.kinds import CONFIG_MAPS, ENDPOINT_SLICES, PODS, REVISIONS, SERVICES, STATEFUL_SETS, Kind, Object
from kaito_core.planning.plan import Plan
from kaito_core.planning.serving import ServingPlan, TemplatePlan
from kaito_core.plugins.types import NodeStatus
from kaito_core.workloads.endpoint import (
    activator_slice,
    applied,
    as_image_volumes,
    from_template,
    headless_service,
    is_applied,
    service,
    stateful_set,
)
from kaito_core.workloads.kubernetes import Revision, config_map
from kaito_core.workloads.serving import PORT

RETRY = 300.0
"""Seconds until an endpoint that could not be had is tried again where it shall be there always."""

RETRY_ON_DEMAND = 25.0
"""The same where somebody asks again: the activator does every 30 seconds while requests come."""

CONFIG_CHECK = 30.0
"""Seconds between looks whether the ConfigMap of an endpoint has changed, which nobody watches."""

REFUSED = 60.0
"""Seconds until it is looked again whether an endpoint that cannot be planned can be."""

SPOT_CHECK = 10.0
"""Seconds between looks at pods that start; a change of theirs is noticed at once."""

ASLEEP = "asleep: the first request gets a machine"


def serve(case: Case) -> None:
    """What shall be done about the endpoint now."""
    case.serving = True
    phase = _phase(case)
    if phase in ("", "Asleep", "Failed") and _is_wanted(case, phase):
        phase = _enter(case, "Starting")
    if phase in ("Starting", "Ready"):
        _run(case)
    elif phase == "Failed":
        _stop(case)
        last = in_vain(case)
        if last is not None and case.attempt is None and not case.status["serving"].get("final") and retry_in(case) > 0:
            case.waiting(retry_words(case), str(last["reason"]))
        said = find(case.status.get("conditions"), conditions.INFERENCE_READY) or {}
        case.endpoint = Endpoint(words=str(said.get("message", "")), refused=True)
        if case.policy == "always" and not case.status["serving"].get("final"):
            case.look_again(max(RETRY, retry_in(case)))
    else:
        _sleep(case)
    _show(case)
    _say_what_it_is_served_by(case)


def needs_serving_plan(case: Case) -> bool:
    """Whether `serve` will look at the plan: before anything runs, and once before it falls asleep for the first time."""
    phase = _phase(case)
    if phase in ("Starting", "Ready"):
        return not _is_current(case)
    return not phase or _is_wanted(case, phase)


def retire(case: Case) -> None:
    """Nothing is served (any more): what there is goes."""
    for kind, obj in _parts(case):
        case.end(kind, obj)
    if case.status.pop("serving", None) is not None:
        case.unset(conditions.INFERENCE_READY)
    if not case.tunes and case.policy == "onDemand":
        message = (
            "nobody here holds the first request: the controller does not run in the cluster; use `policy: always`"
        )
        case.set(conditions.INFERENCE_READY, "False", "NoActivator", message)


def _say_what_it_is_served_by(case: Case) -> None:
    """What the conditions are about: no generation tells that the settings or the annotations have changed."""
    serving = case.status.get("serving") or {}
    for name, said in (("config", case.observed.config), ("annotations", served_by(case.workspace))):
        serving.pop(name, None)
        if serving and said:
            serving[name] = said


def _phase(case: Case) -> str:
    return str((case.status.get("serving") or {}).get("phase") or "")


def _enter(case: Case, phase: str) -> str:
    known = {k: v for k, v in (case.status.get("serving") or {}).items() if k not in ("revision", "final")}
    if known.get("phase") != phase:
        case.status["serving"] = {**known, "phase": phase, "since": case.time}
    return phase


def _is_wanted(case: Case, phase: str) -> bool:
    """Whether it shall be there now, though it is not."""
    failed = case.status["serving"] if phase == "Failed" else {}
    if failed.get("revision") == serving_hash(case):
        soon = _for(case) < (RETRY if case.policy == "always" else RETRY_ON_DEMAND)
        if soon or failed.get("final") or retry_in(case) > 0:
            return False
    return case.policy == "always" or case.observed.demand


def _for(case: Case) -> float:
    """Seconds that it has been as it is."""
    since = (case.status.get("serving") or {}).get("since")
    return case.observed.now - seconds(since) if since else 0.0


# --- asleep


def _sleep(case: Case) -> None:
    """No machine is held. Before it says so for the first time, it is certain that there is something that can serve."""
    if not _phase(case) and not _accepted(case):
        return
    _enter(case, "Asleep")
    _stop(case)
    if case.name_conflicts:  # the endpoint cannot be woken
        _accepted(case)
        return
    accepted = find(case.status.get("conditions"), conditions.ACCEPTED) or {}
    if accepted.get("reason") == "NameTaken":
        case.stays_accepted()  # what was in the way is gone
    case.set(
        conditions.RESOURCE_READY, "True", "workspaceResourceStatusSuccess", "no machine is held while nobody asks"
    )
    case.set(conditions.INFERENCE_READY, "True", "OnDemand", ASLEEP)
    _succeeded(case, ASLEEP)


def _stop(case: Case) -> None:
    """End the pods, and give the machines back when nothing runs there any more. The StatefulSet goes after its pods, since a pod is its
    endpoint's by the StatefulSet's uid alone."""
    there = case.observed.stateful_set
    if there is not None and "deletionTimestamp" not in there["metadata"]:
        case.end(STATEFUL_SETS, there, foreground=True)
    if there is not None and _for(case) < GONE:  # else its kubelet is dead, and its machine is paid for
        case.look_again(SPOT_CHECK)
        return
    release(case, "Idle")
    if case.attempt is None:
        case.unset(conditions.NODES_READY)
        case.status.pop("workerNodes", None)


# --- running


def _run(case: Case) -> None:
    """Get machines and pods, and see whether they answer."""
    if (case.workspace.get("inference") or {}).get("config"):
        case.look_again(CONFIG_CHECK)
    there = case.observed.stateful_set
    if there is None or not _is_current(case) or case.name_conflicts:
        _start(case)
        return
    case.stays_accepted()
    if not machines_are_there(case, STATEFUL_SETS, there, latest(case.observed.servers)):
        return
    replicas = _replicas(there)
    if replicas > 1:
        _take_old_ones_away(case)
    answering = _answering(case)
    if answering:
        _enter(case, "Ready")
        case.endpoint = Endpoint(address=answering)
        case.status["workerNodes"] = sorted(
            {p["spec"]["nodeName"] for p in case.observed.servers if p["spec"]["nodeName"]}
        )
        missing = waits.message if (waits := _waits(case, there, replicas)) else ""
        case.set(conditions.INFERENCE_READY, "True", "WorkspaceInferenceStatusSuccess", missing)
        _succeeded(case, f"served on {replicas} machine{'s' if replicas > 1 else ''}")
    if _falls_asleep(case) or answering:
        return
    pod = latest(p for p in case.observed.servers if "deletionTimestamp" not in p["metadata"])
    now = trouble(pod) if pod is not None else None
    if now is not None and (now.final or _waited_too_long(case, pod, now)):
        # The machine would wait, and be paid, for what cannot become well by itself.
        case.note("Warning", now.reason, now.message)
        case.failed(f"{now.message}; not tried again before the Workspace is changed")
        case.status["serving"] |= {"revision": serving_hash(case), "final": True}
        case.again = True
        return
    waits = _waits(case, there, replicas)
    if _gives_up(case, waits, there):
        return
    refused = waits if waits is not None and waits.reason == FAILED_CREATE else None
    said = now or refused
    if case.waiting(said.message if said else "the pod starts", said.reason if said else "") and said:
        case.note("Warning", said.reason, said.message)
    case.look_again(SPOT_CHECK)


def _replicas(there: Object) -> int:
    return int(there.get("spec", {}).get("replicas") or 1)


def _gives_up(case: Case, waits: Wait | None, there: Object) -> bool:
    """Whether its machines have waited too long for its pods, or for what runs there to be ready, and are being given back."""
    waits = waits or not_ready(case, there, conditions.INFERENCE_READY)
    if case.attempt is None or not holds(case, case.attempt) or not waits.is_over(case.observed.now):
        return False
    wait_in_vain(case, waits.reason, waits.last_words)
    case.status["serving"]["revision"] = serving_hash(case)
    return True


def _waits(case: Case, there: Object, replicas: int) -> Wait | None:
    """What is still missing of its pods in their present form."""
    wanted = serving_hash(case)
    current = [p for p in case.observed.servers if (p["metadata"].get("annotations") or {}).get(labels.REVISION_HASH) == wanted]  # fmt: skip
    return waiting_for(case, there, current, replicas, conditions.INFERENCE_READY)


def _waited_too_long(case: Case, pod: Object | None, now: Trouble) -> bool:
    """Whether a machine waits for a pod that cannot go there, or cannot start there, by itself."""
    if pod is None or not (now.stuck or pays_for_nothing(case, now)):
        return False
    return case.observed.now - seconds(pod["metadata"]["creationTimestamp"]) > PATIENCE


def _take_old_ones_away(case: Case) -> None:
    """The pods of an earlier form, all at once: a new one finds no place among them."""
    wanted = serving_hash(case)
    for pod in case.observed.servers:
        metadata = pod["metadata"]
        old = (metadata.get("annotations") or {}).get(labels.REVISION_HASH) != wanted
        if old and "deletionTimestamp" not in metadata:
            case.delete.append(Deletion(PODS, metadata["name"], metadata["uid"]))


def _start(case: Case) -> None:
    if not _accepted(case):
        there = case.observed.stateful_set
        if there is not None and not _falls_asleep(case) and not _answering(case, as_it_was=True):
            # What it was before is waited for, and no longer than that would be.
            _gives_up(
                case,
                waiting_for(case, there, case.observed.servers, _replicas(there), conditions.INFERENCE_READY),
                there,
            )
        return
    plan = case.observed.planned.plan
    assert plan is not None
    ready = nodes(case, plan)
    if ready is None:
        if _phase(case) == "Failed":
            case.status["serving"]["revision"] = serving_hash(case)
            case.again = True
        return
    chosen = next_candidate(case, plan)
    _make(case, plan.on(chosen) if chosen else plan, ready)
    case.waiting("the pod has not started yet")


def _accepted(case: Case) -> bool:
    """Whether there is a plan. What is served goes on being served while a changed Workspace cannot be."""
    planned = case.observed.planned
    if forbidden := not_allowed(case):
        planned = Planned(None, "PolicyRefused", tuple(forbidden))
    if planned.refusal is None and planned.plan is not None:
        case.set(conditions.ACCEPTED, "True", "Planned", words(planned.problems))
        if case.history.missing is not None:
            case.create.append((REVISIONS, case.history.missing))
        return True
    message = words(planned.problems) or "it cannot be planned"
    if case.set(conditions.ACCEPTED, "False", planned.refusal or "PlanRefused", message):
        case.note("Warning", planned.refusal or "PlanRefused", message)
    case.waiting(message)
    still = _answering(case, as_it_was=True)
    case.endpoint = Endpoint(address=still) if still else Endpoint(words=message, refused=True)
    if case.attempt is not None and case.observed.stateful_set is None:
        give_up(case, "Refused", message)
    case.look_again(REFUSED)
    case.look_for_names()
    return False


def _make(case: Case, plan: Plan, machines: NodeStatus) -> None:
    """The objects that serve. Applied: a changed Workspace rolls over to its new form."""
    settings = case.world.settings
    revision = Revision(case.history.current.number, serving_hash(case))
    where: dict[str, Any] = {"owner": case.workspace, "revision": revision, "selector": machines.selector}
    inference = plan.workspace.inference
    if isinstance(plan, TemplatePlan) and inference is not None and inference.template is not None:
        count = plan.workspace.resource.count
        _apply(
            case, STATEFUL_SETS, from_template(inference.template, machines=count, **where), case.observed.stateful_set
        )
        return
    assert isinstance(plan, ServingPlan)
    secrets = plan.job.secrets.registry
    if case.observed.mounts_images:
        plan = replace(plan, adapters=as_image_volumes(plan.adapters))
    rendered = case.world.workload(plan.workspace, plan)
    case.create.append(
        (CONFIG_MAPS, config_map(rendered, namespace=case.namespace, owner=case.workspace, revision=revision))
    )
    made = stateful_set(
        rendered,
        namespace=case.namespace,
        machines=plan.job.machines,
        image=settings.runtime_images.get(plan.runtime.name) or settings.tuner_image,
        image_pull_secrets=tuple(dict.fromkeys((*settings.image_pull_secrets, *secrets))),
        env=settings.pod_env,
        cache=settings.model_cache or None,
        api_key_secret=(case.workspace["metadata"].get("annotations") or {}).get(labels.API_KEY_SECRET, ""),
        **where,
    )
    before = case.observed.stateful_set
    if before is not None:  # what it was told goes when it has been told something else
        old = (before["metadata"].get("annotations") or {}).get(labels.CONFIG)
        if old and old != made["metadata"]["annotations"][labels.CONFIG]:
            case.delete.append(Deletion(CONFIG_MAPS, old))
    if plan.job.machines > 1:
        _apply(case, SERVICES, headless_service(case.workspace), case.observed.headless)
    _apply(case, STATEFUL_SETS, made, case.observed.stateful_set)


def serving_hash(case: Case) -> str:
    """SHA-256 of what the endpoint is made from; how long it stays does not count."""
    spec = {k: v for k, v in (case.workspace.get("inference") or {}).items() if k not in ("policy", "idleAfter")}
    annotations = case.workspace["metadata"].get("annotations") or {}
    parts = {
        "resource": case.workspace.get("resource"),
        "inference": spec,
        "preset": (case.workspace.get("tuning") or {}).get("preset"),
        "adapter": {k: (case.status.get("adapter") or {}).get(k) for k in ("image", "digest")} if case.tunes else None,
        "runtime": annotations.get(labels.RUNTIME),
        "key": annotations.get(labels.API_KEY_SECRET),
    }
    if case.observed.config:
        parts["config"] = case.observed.config
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _is_current(case: Case) -> bool:
    there = case.observed.stateful_set
    if there is None or "deletionTimestamp" in there["metadata"]:
        return False
    return bool((there["metadata"].get("annotations") or {}).get(labels.REVISION_HASH) == serving_hash(case))


def _answering(case: Case, *, as_it_was: bool = False) -> str:
    """Where the endpoint answers: its first pod, in its present form, or in any; empty when it does not."""
    wanted = serving_hash(case)
    for pod in sorted(case.observed.servers, key=lambda p: str(p["metadata"]["name"])):
        metadata, status = pod["metadata"], pod.get("status", {})
        ready = any(c.get("type") == "Ready" and c.get("status") == "True" for c in status.get("conditions", ()))
        current = (metadata.get("annotations") or {}).get(labels.REVISION_HASH) == wanted
        first = metadata["name"].endswith("-0")
        if first and ready and (current or as_it_was) and "deletionTimestamp" not in metadata and status.get("podIP"):
            ip = status["podIP"]
            return f"http://[{ip}]:{PORT}" if ":" in ip else f"http://{ip}:{PORT}"
    return ""


def _falls_asleep(case: Case) -> bool:
    """Whether nobody has asked for long enough, or who asked has gone before it answered: its machine is given back."""
    serving = case.status["serving"]
    said = [a for p in case.observed.servers if (a := case.observed.activity.get(p["metadata"]["uid"])) is not None]
    if last := max((float(a.fields.get("lastRequest") or 0.0) for a in said), default=0.0):
        serving["lastRequest"] = time_of(last)
    if case.policy != "onDemand":
        return False
    if case.observed.demand or any(a.fields.get("inFlight") for a in said):
        case.look_again(SPOT_CHECK)
        return False
    # What was said before counts too: a pod that has just started again knows of no request.
    since = max(seconds(serving["since"]), seconds_or_never(serving.get("lastRequest")))
    left = since + case.idle_after - case.observed.now
    if left > 0:
        case.look_again(left)
        return False
    case.note("Normal", "Idle", f"no request for {case.idle_after:.0f} s: the machine is given back")
    _enter(case, "Asleep")
    case.again = True
    return True


def _succeeded(case: Case, message: str) -> None:
    if not case.tunes:
        case.set(conditions.WORKSPACE_SUCCEEDED, "True", "workspaceSucceeded", message)
        case.state("Ready")


# --- the Service, and the activator's place in it


def _show(case: Case) -> None:
    """The Service is there from the start. While nothing answers behind it, the activator does."""
    if (case.workspace.get("inference") or {}).get("template") is not None:
        return
    _apply(case, SERVICES, service(case.workspace, port=PORT), case.observed.service)
    address, held = case.observed.activator, case.observed.slice
    if case.endpoint is None:
        case.endpoint = Endpoint(words=ASLEEP)
    theirs = any(kind == SERVICES and obj["metadata"]["name"] == case.name for kind, obj in case.name_conflicts)
    # An EndpointSlice joins the Service of its label: with another owner's Service, their requests would come here.
    if theirs or address is None or (case.endpoint.address and case.observed.routed):
        if held is not None:
            case.delete.append(Deletion(ENDPOINT_SLICES, held["metadata"]["name"], held["metadata"]["uid"]))
    else:
        _apply(case, ENDPOINT_SLICES, activator_slice(case.workspace, address), held)


def _apply(case: Case, kind: Kind, obj: Object, there: Object | None) -> None:
    wanted = applied(obj)
    if not is_applied(there, wanted):
        case.apply.append((kind, wanted))


def _parts(case: Case) -> list[tuple[Kind, Object]]:
    seen = case.observed
    found = (
        (STATEFUL_SETS, seen.stateful_set),
        (SERVICES, seen.service),
        (SERVICES, seen.headless),
        (ENDPOINT_SLICES, seen.slice),
    )
    return [(kind, obj) for kind, obj in found if obj is not None and "deletionTimestamp" not in obj["metadata"]]
