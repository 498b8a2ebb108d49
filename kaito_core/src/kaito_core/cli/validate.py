"""``kaito validate``: everything that is wrong with some files, each line clickable, and nothing else done."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from kaito_core.problems import Failure, Problem, UserError, errors

if TYPE_CHECKING:
    from kaito_core.api import Documents, InferenceSet, Workspace
    from kaito_core.cli.given import Given


def extra_checks(documents: Documents) -> Iterable[Problem]:
    """What stands above the resources themselves: the preset, the method or the runtime, its configuration.

    Each asks the planner, without any machine: what it cannot plan is a problem, with its place in the file."""
    from kaito_core.api import InferenceSet, Workspace
    from kaito_core.cli.given import Given, registry_of
    from kaito_core.planning.plan import Catalog, plan
    from kaito_core.planning.serving import serving_after
    from kaito_core.plugins.manager import load_plugins

    plugins = load_plugins()
    for document in documents.documents:
        resource = document.resource
        inference_set = resource if isinstance(resource, InferenceSet) else None
        workspace = inference_set.replica(f"{inference_set.name}-0") if inference_set else resource
        if isinstance(workspace, Workspace) and (workspace.tuning or workspace.inference):
            given = Given(workspace, document, documents)
            try:
                known = registry_of(given, plugins)
                catalog = Catalog(known, (), given.config_maps, model_folders=known.folders)
                plan(given.workspace, catalog)
                if given.workspace.tuning and given.workspace.inference:
                    serving_after(given.workspace, catalog)
            except UserError as e:
                yield from (_locate(p, given, inference_set) for p in e.problems)
            except Failure as e:  # a hub does not answer: that says nothing of the file
                yield from (replace(_locate(p, given, inference_set), severity="warning") for p in e.problems)


def _locate(problem: Problem, given: Given, inference_set: InferenceSet | None) -> Problem:
    """The problem with its place; one of a replica is in its set, unless it is in the ConfigMap beside it."""
    if inference_set is not None and not problem.field.startswith("inference_config"):
        problem = inference_set.placed(problem)
    return given.locate(problem)


@click.command("validate")
@click.argument("files", metavar="FILE…", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, for programs.")
@click.pass_context
def command(context: click.Context, files: tuple[str, ...], as_json: bool) -> None:
    """Check Workspaces and InferenceSets without running anything.

    FILE may be given several times; '-' reads standard input. The exit code is 0 when there is no error, else 2.
    """
    from kaito_core.addresses import private_addresses_allowed
    from kaito_core.api import load_documents

    documents = load_documents(files, allow_private=private_addresses_allowed())
    problems = [*documents.problems, *extra_checks(documents)]
    found = (*documents.workspaces, *documents.inference_sets)
    if not found and not errors(problems):
        problems.append(Problem("there is no Workspace", "add one, or name the file that has it", file=files[0]))
    failed = bool(errors(problems))
    if as_json:
        click.echo(json.dumps(_report(documents, problems, valid=not failed), indent=2, ensure_ascii=False))
    else:
        for problem in problems:
            click.echo(problem)
        click.echo(_summary(documents, problems))
    context.exit(2 if failed else 0)


def _report(documents: Documents, problems: Iterable[Problem], *, valid: bool) -> dict[str, Any]:
    workspaces = [
        {
            "name": workspace.name,
            "namespace": workspace.namespace,
            "apiVersion": workspace.api_version,
            "tasks": _tasks(workspace),
            "file": documents.document(workspace).file,
            "line": documents.document(workspace).line,
        }
        for workspace in documents.workspaces
    ]
    inference_sets = [
        {
            "name": one.name,
            "namespace": one.namespace,
            "apiVersion": one.api_version,
            "replicas": one.spec.replicas,
            "file": documents.document(one).file,
            "line": documents.document(one).line,
        }
        for one in documents.inference_sets
    ]
    return {
        "valid": valid,
        "problems": [p.to_json() for p in problems],
        "workspaces": workspaces,
        "inferenceSets": inference_sets,
    }


def _tasks(workspace: Workspace) -> list[str]:
    return [task for task in ("tuning", "inference") if getattr(workspace, task) is not None]


def _summary(documents: Documents, problems: Iterable[Problem]) -> str:
    problems = list(problems)
    wrong = len(errors(problems))
    warnings = len(problems) - wrong
    found = [f"{n} {word}{'s' if n > 1 else ''}" for n, word in ((wrong, "error"), (warnings, "warning")) if n]
    names = ", ".join([*(w.name for w in documents.workspaces), *(s.name for s in documents.inference_sets)])
    if wrong:
        return f"invalid: {', '.join(found)}"
    return f"valid: {names}" + (f" ({', '.join(found)})" if found else "")
