"""What can be extended. Each hook is a function in a plugin module, marked with `kaito_core.plugins.hookimpl`.

A plugin is an entry point in the group ``kaito`` whose value is a *light* module: it imports the standard library and
``kaito_core.plugins``, and names heavy code only inside functions. Every implementation is called on its own, with copies of the
arguments, for `kaito_core.plugins.calls.HOOK_SECONDS` at most; one that raises or hangs is reported and skipped, and costs nobody
else anything. ``docs/plugins/hooks`` has a page for each, with an example that a test runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import pluggy

from kaito_core.plugins.types import Command, InferenceRuntime, NodeProvisioner, Preset, Tuner
from kaito_core.problems import Problem

if TYPE_CHECKING:
    from kaito_core.api import Workspace
    from kaito_core.planning.plan import Plan
    from kaito_core.workloads.workload import Workload

hookspec = pluggy.HookspecMarker("kaito")


@hookspec
def kaito_presets() -> Iterable[Preset]:  # type: ignore[empty-body]
    """Models that a workspace can name.

    Called once, when presets are first needed. Yields `Preset` records. Example::

        @hookimpl
        def kaito_presets():
            yield Preset(name="my-model", source=ModelSource(hub="me/my-model", revision="…"), licence="mit",
                         architecture=…, chat=…, lora_targets=("q_proj", "v_proj"))
    """


@hookspec
def kaito_node_provisioners() -> Iterable[NodeProvisioner]:  # type: ignore[empty-body]
    """Sources of machines. Called once; yields `NodeProvisioner` objects, whose constructors do no I/O. Example::

    @hookimpl
    def kaito_node_provisioners():
        yield MyCloud()
    """


@hookspec
def kaito_tuners() -> Iterable[Tuner]:  # type: ignore[empty-body]
    """Tuning methods. Called once; yields `Tuner` objects. Two tuners of one method are a conflict. Example::

    @hookimpl
    def kaito_tuners():
        yield MyTuner()
    """


@hookspec
def kaito_runtimes() -> Iterable[InferenceRuntime]:  # type: ignore[empty-body]
    """Inference runtimes. Called once; yields `InferenceRuntime` objects. Example::

    @hookimpl
    def kaito_runtimes():
        yield MyRuntime()
    """


@hookspec
def kaito_validate(workspace: Workspace, plan: Plan | None) -> Iterable[Problem]:  # type: ignore[empty-body]
    """A platform team's own rules. Called after planning, with the plan or None when there is none. A rule that fails is a warning
    that it could not be checked. Example::

    @hookimpl
    def kaito_validate(workspace, plan):
        if "team" not in workspace.metadata.labels:
            yield Problem("every workspace needs the label 'team'", field="metadata.labels")
    """


@hookspec
def kaito_workload(workspace: Workspace, workload: Workload) -> Workload | None:
    """The last word on what is run: return a changed `Workload`, or None to leave it. Called in plugin order. What is done to the one
    that it is given, without returning it, is done to a copy. Example::

    @hookimpl
    def kaito_workload(workspace, workload):
        return dataclasses.replace(workload, env={**workload.env, "HTTPS_PROXY": "http://proxy:3128"})
    """


@hookspec
def kaito_commands() -> Iterable[Command]:  # type: ignore[empty-body]
    """More ``kaito …`` commands. Called once, at start: yield light `Command` records. Example::

    @hookimpl
    def kaito_commands():
        yield Command("hello", "Says hello.", load=lambda: importlib.import_module("my_plugin.hello").command)
    """


@hookspec
def kaito_events(event: Mapping[str, Any]) -> None:
    """Notifications: every progress event of a run that kaito follows (see `kaito_core.progress`). Must not block. Example::

    @hookimpl
    def kaito_events(event):
        if event["event"] == "finished":
            notify(event)
    """
