"""Revisions of a Workspace: which one a job belongs to, and the history that KAITO's users know as ControllerRevisions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from kaito_core.api import labels
from kaito_core.api.inference_set import TEMPLATE, config_of
from kaito_core.kube.kinds import REVISIONS, Object, owner_reference
from kaito_core.workloads.kubernetes import Revision

HISTORY = 10
"""Revisions that are kept, as KAITO does."""

PARTS = ("resource", "inference", "tuning")


def hash_of(workspace: Object) -> str:
    """SHA-256 of what the Workspace asks for, in hexadecimal; its status and labels do not count. How a tuned model is served
    is no part of it: a change of that trains nothing anew."""
    parts = PARTS if "tuning" not in workspace else ("resource", "tuning")
    asked = {part: workspace[part] for part in parts if part in workspace}
    return hashlib.sha256(json.dumps(asked, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True)
class History:
    """The current revision, and what must be done so that the history shows it."""

    current: Revision
    missing: Object | None
    """The ControllerRevision to create; None when it is there."""
    surplus: tuple[Object, ...]
    """The oldest ones, beyond what is kept."""
    recorded: bool = False
    """Whether the current revision is there, made for this very Workspace: it was accepted once."""


def history(workspace: Object, known: Sequence[Object]) -> History:
    """The Workspace's place in its history. A return to an earlier state is a new revision with a number of its own."""
    wanted = hash_of(workspace)
    ordered = sorted(known, key=lambda r: int(r.get("revision", 0)))
    latest = ordered[-1] if ordered else None
    if latest is not None and _hash(latest) == wanted:
        ours = any(o.get("uid") == workspace["metadata"]["uid"] for o in latest["metadata"].get("ownerReferences", ()))
        return History(Revision(int(latest["revision"]), wanted), None, tuple(ordered[:-HISTORY]), recorded=ours)
    current = Revision((int(latest["revision"]) if latest else 0) + 1, wanted)
    # One state has one object, because its name comes from the hash: that of an earlier time goes first.
    stale = tuple(r for r in ordered if _hash(r) == wanted)
    if stale:
        return History(current, None, stale)
    return History(current, _object(workspace, current), tuple(ordered[: max(0, len(ordered) + 1 - HISTORY)]))


def _hash(revision: Object) -> str:
    return str(revision["metadata"].get("annotations", {}).get(labels.REVISION_HASH, ""))


def _object(workspace: Object, revision: Revision) -> Object:
    metadata = workspace["metadata"]
    return {
        "apiVersion": REVISIONS.api_version,
        "kind": REVISIONS.kind,
        "metadata": {
            "name": f"{metadata['name']}-{revision.hash[:5]}",
            "namespace": metadata["namespace"],
            "labels": {labels.REVISION_NAME: metadata["name"]},
            "annotations": {labels.REVISION_HASH: revision.hash, labels.REVISION: str(revision.number)},
            "ownerReferences": [owner_reference(workspace)],
        },
        "revision": revision.number,
        "data": {part: workspace[part] for part in PARTS if part in workspace},
    }


SERVED_BY: Final = (labels.RUNTIME, labels.API_KEY_SECRET)
"""The annotations that an endpoint is made from."""


def served_by(workspace: Object) -> str:
    """Twelve hexadecimal characters that say what a Workspace has of these annotations, and which settings its InferenceSet gives it;
    empty when there is nothing of that."""
    given = workspace["metadata"].get("annotations") or {}
    found = {name: given[name] for name in SERVED_BY if name in given}
    if config := config_of(given.get(TEMPLATE, "")):
        found[TEMPLATE] = config
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:12] if found else ""
