"""What of the observed world is the Workspace's own. Names and labels are anybody's to write; the owner's uid decides.

Workspace ──> Job ──────────> pods
          ├─> StatefulSet ──> servers
          └─> Service, EndpointSlice, ControllerRevision, …"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Final

from kaito_core.controller.reconcile.observed import NameConflict, Observed, Planned
from kaito_core.kube.kinds import (
    CONFIG_MAPS,
    ENDPOINT_SLICES,
    JOBS,
    REVISIONS,
    SERVICES,
    STATEFUL_SETS,
    VOLUME_CLAIMS,
    Kind,
    Object,
)
from kaito_core.kube.ownership import NameTaken, controlled_by, is_controlled_by, was_left_behind
from kaito_core.workloads.endpoint import headless_name, slice_name
from kaito_core.workloads.kubernetes import job_name, results_claim_name

BY_CONTENT: Final = (CONFIG_MAPS, REVISIONS)
"""Kinds of objects whose names come from their content: one of these is in conflict only because its very name was needed."""

Place = tuple[Kind, str]
"""Which object: its kind and its name."""

REMOVED_SECONDS: Final = 1.0
"""Until it is looked again whether the garbage collector has removed what an earlier Workspace of this name left behind."""


def own(workspace: Object, observed: Observed) -> Observed:
    """The same world: what is not the Workspace's is in `Observed.name_conflicts`, and nowhere else."""
    name_conflicts = {(kind, obj["metadata"]["name"]): obj for kind, obj in observed.name_conflicts}

    def ours(kind: Kind, obj: Object | None) -> Object | None:
        if obj is None or is_controlled_by(obj, workspace):
            return obj
        name_conflicts[kind, obj["metadata"]["name"]] = obj
        return None

    job, stateful_set = ours(JOBS, observed.job), ours(STATEFUL_SETS, observed.stateful_set)
    return replace(
        observed,
        job=job,
        pods=controlled_by(observed.pods, job),
        stateful_set=stateful_set,
        servers=controlled_by(observed.servers, stateful_set),
        service=ours(SERVICES, observed.service),
        headless=ours(SERVICES, observed.headless),
        slice=ours(ENDPOINT_SLICES, observed.slice),
        revisions=controlled_by(observed.revisions, workspace),
        name_conflicts=tuple((kind, obj) for (kind, _), obj in name_conflicts.items()),
    )


def in_the_way(name_conflicts: Iterable[NameConflict], needed: Iterable[Place]) -> tuple[NameConflict, ...]:
    """Those that have a name which an object of the Workspace needs."""
    names = set(needed)
    return tuple((k, o) for k, o in name_conflicts if k in BY_CONTENT or (k, o["metadata"]["name"]) in names)


def refused(workspace: Object, name_conflicts: Sequence[NameConflict]) -> Planned:
    """Why the Workspace cannot be run among these: nothing that belongs to others is touched."""
    problems = [p for kind, obj in name_conflicts for p in NameTaken(kind, obj, workspace).problems]
    return Planned(None, "NameTaken", tuple(problems))


def are_removed(workspace: Object, name_conflicts: Sequence[NameConflict]) -> bool:
    """Whether all of them go by themselves."""
    return bool(name_conflicts) and all(was_left_behind(obj, workspace) for _, obj in name_conflicts)


def needed(workspace: Object, *, serving: bool, claim: bool) -> Iterator[Place]:
    """The objects that run an endpoint or a tuning, apart from those of `BY_CONTENT`; ``claim``: the results get a volume."""
    name = workspace["metadata"]["name"]
    if not serving:
        yield JOBS, job_name(name)
        if claim:
            yield VOLUME_CLAIMS, results_claim_name(name)
        return
    yield STATEFUL_SETS, name
    if (workspace.get("inference") or {}).get("template") is None:
        yield SERVICES, name
        yield ENDPOINT_SLICES, slice_name(name)
        if (workspace.get("resource") or {}).get("count", 1) != 1:
            yield SERVICES, headless_name(name)
