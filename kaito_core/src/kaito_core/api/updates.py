"""What may be changed on an existing Workspace, and what may not.

KAITO's rules, with one relaxation: beside ``tuning``, the serving settings (``inference``) may come, change and go.
The API server enforces the same rules through the CRD (`kaito_core.api.crd`), except the one about an annotation, which
such rules cannot see.
"""

from __future__ import annotations

from collections.abc import Iterator

from kaito_core.api import labels
from kaito_core.api.inference import InferenceSpec
from kaito_core.api.tuning import TuningSpec
from kaito_core.api.workspace import Workspace
from kaito_core.problems import Problem

_REMEDY = "delete the Workspace and create it anew, or give the new one another name"


def check_update(old: Workspace, new: Workspace) -> list[Problem]:
    """What forbids that ``old`` becomes ``new``; empty when nothing does."""
    problems = [*_resource(old, new)]
    if (old.tuning is None) != (new.tuning is None):
        problems.append(_fixed("tuning", "cannot be set or removed later"))
    elif (old.inference is None) != (new.inference is None) and new.tuning is None:
        problems.append(_fixed("inference", "cannot be set or removed later"))
    if old.tuning is not None and new.tuning is not None:
        problems += _tuning(old.tuning, new.tuning)
    if old.inference is not None and new.inference is not None and new.tuning is None:
        problems += _inference(old.inference, new.inference)
    key = labels.MODEL_STREAMING
    if old.metadata.annotations.get(key) != new.metadata.annotations.get(key):
        problems.append(_fixed(f"metadata.annotations.{key}"))
    return problems


def _fixed(field: str, words: str = "cannot be changed") -> Problem:
    return Problem(words, _REMEDY, field)


def _resource(old: Workspace, new: Workspace) -> Iterator[Problem]:
    a, b = old.resource, new.resource
    if a.count != b.count:
        yield _fixed("resource.count")
    # Emptying it hands the choice of nodes back (bring your own).
    if b.instance_type and a.instance_type != b.instance_type:
        yield _fixed("resource.instanceType")
    if a.label_selector != b.label_selector:
        yield _fixed("resource.labelSelector")
    if a.partition != b.partition:
        yield _fixed("resource.partition")


def _tuning(old: TuningSpec, new: TuningSpec) -> Iterator[Problem]:
    if old.preset != new.preset:
        yield _fixed("tuning.preset")
    if old.method != new.method:
        yield _fixed("tuning.method")
    if old.input.name and old.input.name != new.input.name:
        yield _fixed("tuning.input.name", "cannot be changed once set")


def _inference(old: InferenceSpec, new: InferenceSpec) -> Iterator[Problem]:
    if old.preset != new.preset:
        yield _fixed("inference.preset")
    if (old.template is None) != (new.template is None):
        yield _fixed("inference.template", "cannot be set or removed later")
