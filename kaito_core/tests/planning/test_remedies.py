"""No remedy names a machine that the plan would refuse in its turn: each is followed, over the whole catalogue, and is taken."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import pytest

from kaito_core.api import load_text
from kaito_core.planning import catalogue
from kaito_core.planning.images import Images
from kaito_core.planning.plan import Catalog, Plan, plan
from kaito_core.plugins import InferenceRuntime, Offer
from kaito_core.plugins.types import CapacityType
from kaito_core.testing.planning import GIB, OneOfEach
from kaito_core.testing.serving import Echo

TUNING = """tuning:
  preset: {name: tiny}
  method: qlora
  config: settings
  input: {urls: ["https://example.com/a.jsonl"]}
  output: {image: "r.io/a:1", imagePushSecret: push}"""
SERVING = "inference: {preset: {name: tiny}, config: settings}"

NAME = r"([\w.-]+)"
REMEDIES = {
    "change": re.compile(rf"it fits {NAME} with (.+?) \(needs"),
    "dear": re.compile(rf"the cheapest that fits is {NAME} \("),
    "smallest": re.compile(rf"the smallest machine is {NAME} \("),
    "known": re.compile(rf"{NAME} \([^()]*\) would do"),
    "instead": re.compile(rf"the cheapest that fits instead is {NAME} \("),
}


class Engine(Echo):
    """Has an image that runs on old cards too."""

    name: ClassVar[str] = "engine"


class Vllm(Echo):
    name: ClassVar[str] = "vllm"
    priority: ClassVar[int] = 10


class Registry(OneOfEach):
    def runtimes(self) -> Mapping[str, InferenceRuntime]:
        return {r.name: r for r in (Vllm(), Engine())}


class Cloud:
    """A provisioner that gets every machine of the catalogue, or of some clouds; those that are named, if some are."""

    def __init__(self, *clouds: str) -> None:
        self.clouds = clouds or catalogue.CLOUDS

    def offers(self, resource: Mapping[str, Any]) -> tuple[Offer, ...]:
        kinds: tuple[CapacityType, ...] = ("on-demand",)
        if resource.get("capacityType") == "auto":
            kinds = ("spot", "on-demand")
        named = {resource["instanceType"].lower()} if "instanceType" in resource else set()
        return tuple(
            replace(o, provisioner="cloud" if cloud in self.clouds else "")
            for cloud in catalogue.CLOUDS
            for o in catalogue.offers(cloud, resource.get("regions", ()), kinds)
            if not named or o.instance_type.lower() in named
        )


def planned(resource: Mapping[str, Any], gib: int, task: str, cloud: Cloud, *more: Offer, annotation: str = "") -> Plan:
    metadata = {"name": "one", "annotations": {"kaito.sh/runtime": annotation} if annotation else {}}
    head = f"apiVersion: kaito.sh/v1beta1\nkind: Workspace\nmetadata: {json.dumps(metadata)}\nresource: {json.dumps(resource)}\n"
    (workspace,) = load_text(head + task).workspaces
    text = {
        "training_config.yaml": json.dumps({"training_config": {"gib": gib}}),
        "inference_config.yaml": json.dumps({"vllm": {"gib": gib}}),
    }
    offers = (*more, *cloud.offers(resource))
    return plan(workspace, Catalog(Registry(), offers, {"settings": text}, images=Images(runtimes={"vllm": (7, 5)})))


def follow(made: Plan, resource: dict[str, Any], gib: int, task: str, cloud: Cloud) -> int:
    """Do what each remedy says; the number of those that were followed."""
    refusal = made.refusal
    if refusal is None:
        return 0
    said = f"{refusal.message}; {refusal.remedy}"
    count = 0
    for kind, pattern in REMEDIES.items():
        for found in pattern.finditer(said):
            changed, less, body, runtime = {**resource, "instanceType": found[1]}, gib, task, ""
            if kind == "dear":
                changed.pop("maxPricePerHour", None)
                changed.pop("maxCost", None)
            elif kind == "known":
                cloud = Cloud()  # get the plugin
            elif kind == "change":
                less = int(number[1]) if (number := re.match(r"gib (\d+)", found[2])) else gib
                body = task.replace(", config: settings", "") if "defaults" in found[2] else task
                if number := re.match(r"resource.count (\d+)", found[2]):
                    changed["count"] = int(number[1])
                if number := re.match(r"the runtime (\w+)", found[2]):
                    runtime = number[1]
            if re.search(rf"the smallest machine is {re.escape(found[1])} \([^;]*\): ", said):
                cloud = Cloud()
            again = planned(changed, less, body, cloud, annotation=runtime)
            taken = again.chosen.offer.instance_type if again.chosen else again.refusal
            assert taken == found[1], f"{resource}, {gib} GiB: {found[0]!r} is refused: {taken}"
            count += 1
    return count


@pytest.mark.parametrize("task", [TUNING, SERVING])
@pytest.mark.parametrize("gib", [8, 60, 300])
def test_every_remedy_for_every_machine_can_be_followed(gib: int, task: str) -> None:
    followed = 0
    for name in [o.instance_type for o in catalogue.instance_types().values()]:
        for more in ({}, {"gpu": {"memory": "20Gi"}}):
            resource = {"instanceType": name, **more}
            followed += follow(planned(resource, gib, task, Cloud()), resource, gib, task, Cloud())
    assert followed > 40


@pytest.mark.parametrize("task", [TUNING, SERVING])
@pytest.mark.parametrize(
    "resource",
    [
        {},
        {"gpu": {"model": "V620"}},
        {"gpu": {"model": "V100"}},
        {"gpu": {"model": "T4"}, "regions": ["westeurope"]},
        {"regions": ["eastus"], "maxPricePerHour": 0.1},
        {"capacityType": "auto", "maxPricePerHour": 1},
        {"gpu": {"count": 4}, "maxPricePerHour": 2},
        {"regions": ["us-east-1"]},
    ],
)
def test_every_remedy_for_every_wish_can_be_followed(resource: dict[str, Any], task: str) -> None:
    for gib in (8, 100, 5000):
        for cloud in (Cloud(), Cloud("azure"), Cloud("nowhere")):
            follow(planned(resource, gib, task, cloud), resource, gib, task, cloud)


def test_a_machine_that_the_catalogue_calls_unusable_is_never_proposed() -> None:
    """An AMD V620 was: it has room enough once the job is smaller."""
    made = planned({"instanceType": "Standard_NG8ads_V620_v1"}, 60, TUNING, Cloud())
    assert made.refusal is not None
    assert "it fits" not in made.refusal.remedy
    assert "the cheapest that fits instead is Standard_" in made.refusal.message


def test_a_smaller_job_on_a_machine_that_is_too_dear_is_no_remedy() -> None:
    resource = {"instanceType": "Standard_NC4as_T4_v3", "maxPricePerHour": 0.1}
    made = planned(resource, 60, TUNING, Cloud())
    assert made.refusal is not None
    assert "it fits" not in made.refusal.remedy


def test_the_smallest_machine_is_one_that_is_as_the_workspace_asks() -> None:
    made = planned({"gpu": {"model": "A100"}, "instanceType": "Standard_NC24ads_A100_v4"}, 150, TUNING, Cloud())
    assert made.refusal is not None
    assert "the smallest machine is" not in made.refusal.remedy, "no A100 has 150 GiB"


def test_a_gpu_that_kaito_cannot_use_is_not_meant() -> None:
    for wanted in ("V6200", "V5200", "MI3000X"):
        made = planned({"gpu": {"model": wanted}}, 8, TUNING, Cloud())
        assert made.refusal is not None
        meant = re.findall(r"did you mean (.+?)\?", made.refusal.remedy)
        assert not any(amd in text for text in meant for amd in ("V620", "V520", "V710", "MI300X", "MI25"))


def test_this_machine_is_proposed_only_for_what_it_can_run() -> None:
    here = Offer("this machine", 4, 5 * GIB, provisioner="local")
    made = planned({}, 8, TUNING, Cloud("nowhere"), here)
    assert made.refusal is not None
    assert made.refusal.remedy.startswith("it fits this machine with gib 4 instead of 8")
