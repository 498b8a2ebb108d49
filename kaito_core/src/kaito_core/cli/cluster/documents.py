"""The documents of the user's files, as objects of a cluster: where they belong, and how they are put there.

What a Secret holds goes to the API server and nowhere else."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kaito_core.api.labels import SERVE_AFTER_TUNING
from kaito_core.kube.errors import ApiError, Invalid, NotFound
from kaito_core.kube.kinds import CONFIG_MAPS, SECRETS, WORKSPACES, Kind, Object
from kaito_core.kube.ownership import controller_of
from kaito_core.problems import Problem, UserError

if TYPE_CHECKING:
    from kaito_core.api import Document
    from kaito_core.kube.client import Client

MANAGER = "kaito"
"""The field manager of what people apply with ``kaito run``; the controller's is another one."""

KEPT = ("name", "labels", "annotations")
"""What people say about an object; the rest (uid, resourceVersion …) is the server's, and old when it is in a file."""

_FIELD = re.compile(r"is invalid: (?P<field>[A-Za-z][^\s:]*): (?P<words>.*)", re.DOTALL)
_UNDECLARED = re.compile(r"\.(?P<field>[^\s:]+): (?P<words>field not declared in schema)")


@dataclass(frozen=True)
class Applicable:
    """One object that can be applied, and the document that it came from."""

    kind: Kind
    obj: Object
    document: Document

    def __str__(self) -> str:
        metadata = self.obj["metadata"]
        return f"{self.kind.kind} {metadata['namespace']}/{metadata['name']}"

    def __repr__(self) -> str:
        return f"Applicable({self})"  # it may be a Secret


def applicable(documents: Iterable[Document]) -> list[Applicable]:
    """What of the documents kaito knows, in the order in which it is needed: settings and secrets before Workspaces."""
    from kaito_core.api import ConfigMap, Secret, Workspace

    found = []
    for document in documents:
        resource, value = document.resource, document.source.value
        if resource is None:
            continue
        metadata = {k: value["metadata"][k] for k in KEPT if value["metadata"].get(k)}
        content = {k: v for k, v in value.items() if k not in ("metadata", "status")}
        obj = {**content, "metadata": {**metadata, "namespace": resource.namespace}}
        kind = CONFIG_MAPS
        if isinstance(resource, Workspace):
            kind = replace(WORKSPACES, api_version=resource.api_version)
        elif isinstance(resource, Secret):
            kind = SECRETS
            # The server does not keep stringData, and could not tell later what of it was ours.
            obj.pop("stringData", None)
            obj |= {"type": resource.type, "data": {k: base64.b64encode(v).decode() for k, v in resource.data.items()}}
        elif not isinstance(resource, ConfigMap):
            continue
        found.append(Applicable(kind, obj, document))
    return sorted(found, key=lambda a: a.kind.kind == "Workspace")


def served_after_tuning(one: Applicable) -> Applicable:
    """The same, served as soon as it is tuned, where it is a Workspace that tunes and does not say itself what becomes of its model."""
    obj = one.obj
    annotations = obj["metadata"].get("annotations") or {}
    of_its_own = (obj.get("inference") or {}).get("policy") or SERVE_AFTER_TUNING in annotations
    if one.kind.kind != WORKSPACES.kind or not obj.get("tuning") or of_its_own:
        return one
    metadata = {**obj["metadata"], "annotations": {**annotations, SERVE_AFTER_TUNING: "always"}}
    return replace(one, obj={**obj, "metadata": metadata})


def apply(client: Client, one: Applicable, *, dry_run: bool = False) -> Object:
    """Make it so. UserError with the place in the file for what the server does not accept."""
    try:
        # By force: the file says what shall be, whoever said something else before.
        return client.apply(one.kind, one.obj, manager=MANAGER, force=True, dry_run=dry_run)
    except Invalid as e:
        raise UserError(refused(e, one.document)) from e
    except NotFound as e:
        namespace = one.obj["metadata"]["namespace"]
        if f'namespaces "{namespace}" not found' not in str(e):
            raise
        remedy = f"make it (kubectl create namespace {namespace}), or name another one in metadata.namespace"
        raise UserError(
            one.document.locate(Problem(f"there is no namespace {namespace!r}", remedy, "metadata.namespace"))
        ) from e


def try_out(client: Client, all_of_them: Sequence[Applicable]) -> list[Object]:
    """What the server would make of them; UserError with everything that it does not accept. Nothing is changed."""
    made: list[Object] = []
    problems: list[Problem] = []
    for one in all_of_them:
        try:
            made.append(apply(client, one, dry_run=True))
        except UserError as e:
            problems.extend(e.problems)
        else:
            problems.extend(_of_another(one, made[-1]))
    if problems:
        raise UserError(problems)
    return made


def _of_another(one: Applicable, made: Object) -> Iterator[Problem]:
    """Why the object is not the user's to write: it is there already, and what controls it would write it again, or remove it."""
    controller = controller_of(made)  # files have no owner references: what is there has them
    if controller is not None:
        words = f"the {one} is there already and belongs to the {controller.get('kind')} {controller.get('name')}"
        remedy = f"give it another name, or change the {controller.get('kind')}"
        yield one.document.locate(Problem(words, remedy, "metadata.name"))


def refused(error: ApiError, document: Document) -> Problem:
    """The server's words, with the field that they are about and its place in the file, when there is one such field."""
    said = error.problems[0].message
    found = _FIELD.search(said) or _UNDECLARED.search(said)
    if found is None:
        return document.locate(Problem(f"the cluster does not accept it: {said}"))
    problem = Problem(f"the cluster does not accept it: {found['words']}", field=_as_people_write(found["field"]))
    return document.locate(problem)


def _as_people_write(field: str) -> str:
    return "" if field == "<nil>" else field.removeprefix(".")
