"""What the platform does not allow is refused before a machine is asked for; what runs goes on, and says that its next revision is not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kaito_core.api.pod_security import PodSecurity
from kaito_core.kube.kinds import STATEFUL_SETS, Object

from . import simulation as world
from .simulation import Simulation, workspace_object
from .test_decide import FINISHED, ended
from .test_serving import ACTIVATOR, awake, phase, serving, tuned

HOST = {"hostPath": {"path": "/var/lib/kubelet"}}
TUNING = workspace_object()["tuning"]
ADAPTER: dict[str, Any] = {"source": {"name": "mine", "volumeSource": HOST}}


def platform(monkeypatch: pytest.MonkeyPatch, **opened: Any) -> None:
    """A controller that was started with these settings."""
    settings = replace(world.WORLD.settings, pod_security=PodSecurity(**opened))
    monkeypatch.setattr(world, "WORLD", replace(world.WORLD, settings=settings))


def template(**spec: Any) -> Object:
    made = workspace_object(inference={"template": {"spec": {"containers": [{"name": "c"}], **spec}}})
    del made["tuning"]
    return made


def adapter() -> Object:
    made = workspace_object(inference={"preset": {"name": "tiny"}, "adapters": [ADAPTER]})
    del made["tuning"]
    return made


def test_an_open_platform_runs_what_a_closed_one_refuses_by_its_field(monkeypatch: pytest.MonkeyPatch) -> None:
    cases: list[tuple[Object, str]] = [
        (workspace_object(tuning={**TUNING, "input": {"volumeSource": HOST}}), "tuning.input.volumeSource.hostPath: "),
        (
            workspace_object(tuning={**TUNING, "output": {"volumeSource": HOST}}),
            "tuning.output.volumeSource.hostPath: ",
        ),
        (
            workspace_object(tuning={**TUNING, "checkpoints": {"volumeSource": HOST}}),
            "tuning.checkpoints.volumeSource.hostPath: ",
        ),
        (workspace_object(inference={"adapters": [ADAPTER]}), "inference.adapters[0].source.volumeSource.hostPath: "),
        (adapter(), "inference.adapters[0].source.volumeSource.hostPath: "),
        (template(hostNetwork=True), "inference.template.spec.hostNetwork: "),
        (template(serviceAccountName="admin"), "inference.template.spec.serviceAccountName: "),
        (template(volumes=3), "inference.template.spec.volumes: "),
    ]
    for obj, field in cases:
        simulation = Simulation(workspace=obj, activator=ACTIVATOR)
        simulation.settle()
        accepted = simulation.condition("Accepted")
        assert (accepted["status"], accepted["reason"]) == ("False", "PolicyRefused")
        assert accepted["message"].startswith(field)
        assert not simulation.bought
        assert not set(simulation.kinds()) & {"Job", "StatefulSet", "ControllerRevision"}
    platform(monkeypatch, volume_kinds=frozenset({"hostPath"}), any_template=True)
    for obj, _ in cases[:-1]:
        simulation = Simulation(workspace=obj, activator=ACTIVATOR)
        simulation.settle()
        assert simulation.condition("Accepted")["status"] == "True"
        assert simulation.bought or simulation.workspace is None


def test_a_tuning_that_runs_goes_on_also_on_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as before:
        platform(before, volume_kinds=frozenset({"hostPath"}))
        simulation = Simulation(workspace=workspace_object(tuning={**TUNING, "output": {"volumeSource": HOST}}))
        simulation.settle()
        simulation.pod()
        simulation.settle()
        assert simulation.condition("Accepted")["message"] == ""
        job = simulation.job
    simulation.settle()
    assert simulation.job is job
    accepted = simulation.condition("Accepted")
    assert accepted["status"] == "True"
    assert accepted["message"].startswith(
        "goes on as it is; its next revision is refused: tuning.output.volumeSource.hostPath"
    )
    simulation.take_away()
    simulation.settle()
    assert simulation.job is not None
    assert simulation.bought == ["cheap", "cheap"]
    simulation.change(input={"urls": ["https://example.com/b.jsonl"]})
    simulation.settle()
    accepted = simulation.condition("Accepted")
    assert (accepted["status"], accepted["reason"]) == ("False", "PolicyRefused")
    simulation.change(output={"image": "r.io/a:1", "imagePushSecret": "push"})
    simulation.settle()
    assert (simulation.condition("Accepted")["status"], simulation.condition("Accepted")["message"]) == ("True", "")


def test_an_endpoint_that_runs_is_neither_stopped_nor_rolled_and_wakes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as before:
        platform(before, volume_kinds=frozenset({"hostPath"}))
        simulation = serving()
        assert simulation.workspace is not None
        simulation.workspace["inference"]["adapters"] = [ADAPTER]
        awake(simulation)
    made, pod = simulation.objects[STATEFUL_SETS, "one"], simulation.servers[0]["metadata"]["uid"]
    simulation.settle()
    assert simulation.objects[STATEFUL_SETS, "one"] is made
    assert "its next revision is refused" in simulation.condition("Accepted")["message"]
    simulation.demand = False
    simulation.now += 2000
    simulation.settle()
    assert phase(simulation) == "Asleep"
    awake(simulation)
    assert phase(simulation) == "Ready"
    pod = simulation.servers[0]["metadata"]["uid"]
    simulation.workspace["inference"]["adapters"] = [{"source": {**ADAPTER["source"], "name": "other"}}]
    simulation.settle()
    assert simulation.condition("Accepted")["reason"] == "PolicyRefused"
    assert simulation.servers[0]["metadata"]["uid"] == pod, "what is served goes on being served"
    assert simulation.told is not None
    assert simulation.told.address


def test_how_a_tuned_model_is_served_is_looked_at_though_its_revision_is_old() -> None:
    simulation = awake(tuned())
    assert simulation.workspace is not None
    pod = simulation.servers[0]["metadata"]["uid"]
    simulation.workspace["inference"] = {"adapters": [ADAPTER]}
    simulation.settle()
    assert simulation.condition("Accepted")["reason"] == "PolicyRefused"
    assert simulation.servers[0]["metadata"]["uid"] == pod


def test_a_revision_of_an_earlier_workspace_of_the_name_opens_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    obj = workspace_object(tuning={**TUNING, "input": {"volumeSource": HOST}})
    with monkeypatch.context() as before:
        platform(before, volume_kinds=frozenset({"hostPath"}))
        simulation = Simulation(workspace=obj)
        simulation.settle()
    history = {k: o for k, o in simulation.objects.items() if k[0].kind == "ControllerRevision"}
    assert history
    successor = workspace_object(tuning=obj["tuning"])
    successor["metadata"]["uid"] = "u-2"
    simulation = Simulation(workspace=successor, objects=history)
    simulation.settle()
    assert simulation.condition("Accepted")["reason"] == "PolicyRefused"
    assert not simulation.bought


def test_a_finished_tuning_stays_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as before:
        platform(before, volume_kinds=frozenset({"hostPath"}))
        simulation = Simulation(workspace=workspace_object(tuning={**TUNING, "input": {"volumeSource": HOST}}))
        simulation.settle()
        simulation.pod(container=ended(0, FINISHED))
        simulation.end_job("Complete")
        simulation.settle()
    simulation.settle()
    assert simulation.state == "Succeeded"
    assert len(simulation.bought) == 1
