"""Whose an object is: its controller's, by uid. Neither a name nor a label says that, since anybody may write those."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kaito_core.kube.kinds import Kind, Object
from kaito_core.problems import Failure


def controller_of(obj: Object) -> Mapping[str, Any] | None:
    """The owner reference that says who controls the object; an object has one at most."""
    owners = obj["metadata"].get("ownerReferences") or ()
    return next((o for o in owners if o.get("controller") is True), None)


def is_controlled_by(obj: Object | None, owner: Object | None) -> bool:
    """Whether ``obj`` is this very owner's, and not one's of the same name before it."""
    if obj is None or owner is None:
        return False
    uid, controller = owner["metadata"].get("uid"), controller_of(obj)
    return bool(uid and controller is not None and controller.get("uid") == uid)


def controlled_by(objects: Iterable[Object], owner: Object | None) -> tuple[Object, ...]:
    """Those of the objects that are this very owner's."""
    return tuple(o for o in objects if is_controlled_by(o, owner))


def was_left_behind(obj: Object, owner: Object) -> bool:
    """Whether the object is of an earlier owner of the same kind and name. That one is gone, since a name is given once at a time, so
    Kubernetes' garbage collector removes the object."""
    controller = controller_of(obj) or {}
    same = (controller.get("kind"), controller.get("name")) == (owner["kind"], owner["metadata"]["name"])
    return same and not is_controlled_by(obj, owner)


class NameTaken(Failure):
    """An object of another owner has the name that an object of ``owner`` needs."""

    def __init__(self, kind: Kind, there: Object, owner: Object) -> None:
        metadata, own = there["metadata"], owner["kind"]
        controller = controller_of(there)
        if was_left_behind(there, owner):
            whose = f"it belongs to an earlier {own} of this name, which is gone"
            remedy = f"Kubernetes removes the {kind.kind}; it is waited for"
        else:
            whose = "it has no owner"
            if controller is not None:
                whose = f"it belongs to the {controller.get('kind')} {controller.get('name')}"
            remedy = f"give the {own} another name, or delete the {kind.kind}"
        super().__init__(
            f"there is already a {kind.kind} {metadata.get('namespace', '')}/{metadata['name']}, and it is not of this {own}: "
            f"{whose}",
            remedy,
        )
        self.kind = kind
        self.name = str(metadata["name"])
