"""The controller holds nodes against what its images are declared for, and a plan from outside against what the controller is told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytest

from kaito_core.cli.cluster.runtimes import as_the_controller
from kaito_core.controller.planner import Planner
from kaito_core.existing.provisioner import ExistingNodes
from kaito_core.planning.images import Images, declared
from kaito_core.testing.planning import OneOfEach

V100 = {
    "metadata": {"name": "a", "labels": {"app": "tune", "nvidia.com/gpu.product": "Tesla-V100-PCIE-16GB",
                 "nvidia.com/gpu.memory": "16384", "nvidia.com/gpu.compute.major": "7",
                 "nvidia.com/gpu.compute.minor": "0"}},
    "status": {"allocatable": {"nvidia.com/gpu": "1", "cpu": "8", "memory": "64Gi"},
               "conditions": [{"type": "Ready", "status": "True"}]},
}  # fmt: skip
WORKSPACE = {
    "apiVersion": "kaito.sh/v1beta1",
    "kind": "Workspace",
    "metadata": {"name": "one", "namespace": "team", "uid": "1"},
    "resource": {"labelSelector": {"matchLabels": {"app": "tune"}}},
    "tuning": {
        "preset": {"name": "tiny"},
        "method": "qlora",
        "input": {"urls": ["https://example.com/a.jsonl"]},
        "output": {"image": "r.io/a:1", "imagePushSecret": "push"},
    },
}


class Cluster:
    """Has one node, every Secret, and a controller with these arguments."""

    def __init__(self, *arguments: str, env: Mapping[str, str] | None = None) -> None:
        told = [{"name": n, "value": v} for n, v in (env or {}).items()]
        pod = {"spec": {"containers": [{"args": ["controller", *arguments], "env": told}]}}
        self.deployments = [{"spec": {"template": pod}}]

    def get(self, *_: Any) -> dict[str, Any]:
        return {}

    def list(self, kind: Any, **_: Any) -> Any:
        return [V100] if kind.plural == "nodes" else (self.deployments, "1")


class Plugins(OneOfEach):
    def runtimes(self) -> dict[str, Any]:
        return {}

    def validate(self, *_: Any) -> Iterable[Any]:
        return ()


def planner(images: Images) -> Any:
    nodes = ExistingNodes()
    cluster: Any = Cluster()
    nodes.attach(cluster)
    made: Any = Planner
    return made(Cluster(), Plugins(), {"existing": nodes}, None, Cluster(), images)


def test_a_node_below_the_images_number_is_refused_with_both_numbers() -> None:
    refused = planner(Images())(WORKSPACE)
    assert refused.refusal == "DoesNotFit"
    (problem,) = refused.problems
    assert "its Tesla-V100-PCIE-16GB has compute capability 7.0, and the image that tunes needs 7.5" in problem.message


def test_a_node_that_the_image_is_declared_for_is_taken() -> None:
    assert planner(declared({"tuner": "7.0"}))(WORKSPACE).plan.chosen.offer.gpus == 1


@pytest.mark.parametrize(
    "cluster",
    [
        Cluster("--compute-capability=tuner=7.0", "--compute-capability=vllm=8.0"),
        Cluster("--compute-capability", "tuner=7.0", "--compute-capability", "vllm=8.0"),
        Cluster(env={"KAITO_COMPUTE_CAPABILITY": "tuner=7.0 vllm=8.0"}),
    ],
)
def test_a_plan_from_outside_counts_with_what_the_controller_is_told(cluster: Any) -> None:
    _, images = as_the_controller(Plugins(), cluster)
    assert (images.tuner, images.runtimes) == ((7, 0), {"vllm": (8, 0)})


def test_without_a_word_the_projects_own_images_count() -> None:
    client: Any = Cluster()
    assert as_the_controller(Plugins(), client)[1] == Images()
