"""A machine whose GPUs the image cannot compute on is not taken, by whichever way it comes, and the reason names both numbers."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from kaito_core.api import load_text
from kaito_core.existing.node import read_node
from kaito_core.local import machine
from kaito_core.planning import catalogue
from kaito_core.planning.images import Images, capability, declared
from kaito_core.planning.plan import Catalog, Plan, plan
from kaito_core.planning.serving import ServingPlan
from kaito_core.plugins import Gpu, InferenceRuntime, Offer
from kaito_core.problems import UserError
from kaito_core.testing.planning import GIB, OneOfEach
from kaito_core.testing.serving import Echo

TUNING = """tuning:
  preset: {name: tiny}
  method: qlora
  input: {urls: ["https://example.com/a.jsonl"]}
  output: {image: "r.io/a:1", imagePushSecret: push}"""
SERVING = "inference: {preset: {name: tiny}}"
POD = """inference:
  template: {spec: {containers: [{name: a, image: r.io/mine, resources: {limits: {nvidia.com/gpu: "1"}}}]}}"""

TOO_OLD = {n: o for n, o in catalogue.instance_types().items() if ((o.gpu and capability(o.gpu)) or (9, 9)) < (7, 5)}


class Vllm(Echo):
    name: ClassVar[str] = "vllm"
    priority: ClassVar[int] = 10


class Transformers(Echo):
    name: ClassVar[str] = "transformers"


class Registry(OneOfEach):
    def runtimes(self) -> Mapping[str, InferenceRuntime]:
        return {r.name: r for r in (Vllm(), Transformers())}


def planned(*offers: Offer, task: str = TUNING, resource: str = "{}", images: Images | None = None) -> Plan:
    head = f"apiVersion: kaito.sh/v1beta1\nkind: Workspace\nmetadata: {{name: one}}\nresource: {resource}\n"
    documents = load_text(head + task)
    assert documents.problems == ()
    return plan(documents.workspaces[0], Catalog(Registry(), offers, images=images or Images()))


def bought(name: str) -> Offer:
    """As a provisioner offers it whose cloud still has it."""
    known = catalogue.instance_types()[name.lower()]
    (offer,) = [o for o in catalogue.offers(known.cloud) if o.instance_type == known.instance_type]
    return replace(offer, provisioner="cloud", retired="")


def node(**labels: str) -> Offer:
    """One of the cluster's own, as its labels tell."""
    keys = {k.replace("__", "/").replace("_", ".").replace("~", "-"): v for k, v in labels.items()}
    status = {
        "allocatable": {"nvidia.com/gpu": "1", "cpu": "8", "memory": "64Gi"},
        "conditions": [{"type": "Ready", "status": "True"}],
    }
    return read_node({"metadata": {"name": "a", "labels": keys}, "status": status}).offer


def reason(made: Plan) -> str:
    assert made.chosen is None
    assert made.refusal is not None
    (only,) = made.candidates
    assert only.rejected in made.refusal.message
    return only.rejected


def test_the_catalogue_knows_the_cards_that_todays_torch_has_no_kernels_for() -> None:
    assert {"standard_nc6s_v3", "standard_nd40rs_v2", "p3.2xlarge", "standard_nc6_promo"} <= set(TOO_OLD)
    assert not {"standard_nc4as_t4_v3", "g4dn.xlarge", "g6.xlarge", "p5.48xlarge"} & set(TOO_OLD)


@pytest.mark.parametrize("task", [TUNING, SERVING])
@pytest.mark.parametrize("name", sorted(TOO_OLD))
def test_no_machine_below_the_images_number_is_taken(name: str, task: str) -> None:
    machines = (bought(name), replace(bought(name), provisioner="existing"))
    assert all(c.rejected for c in planned(*machines, task=task).candidates)


def test_the_reason_names_both_numbers_and_the_cheapest_that_can_run_it() -> None:
    said = reason(planned(bought("Standard_ND40rs_v2"), resource="{instanceType: Standard_ND40rs_v2}"))
    assert said.startswith("its V100-32GB has compute capability 7.0, and the image that tunes needs 7.5; ")
    assert said.endswith("the cheapest that fits instead is Standard_NC4as_T4_v3 (1×T4, $0.53 an hour in eastus)")


def test_what_would_be_in_vain_is_not_asked_for() -> None:
    """More quota for a V100, or settings for a cloud that has one."""
    for name in ("Standard_ND40rs_v2", "Standard_NC6s_v3", "Standard_NG8ads_V620_v1"):
        said = reason(
            planned(
                replace(bought(name), retired="quota: 0 of 40 vCPUs are left"), resource=f"{{instanceType: {name}}}"
            )
        )
        assert "quota" not in said
        assert "the cheapest that fits instead is Standard_NC4as_T4_v3" in said


def test_a_node_that_is_there_is_held_against_the_same_number() -> None:
    v100 = {"nvidia_com__gpu_product": "Tesla-V100-PCIE-16GB", "nvidia_com__gpu_memory": "16384"}
    told = {**v100, "nvidia_com__gpu_compute_major": "7", "nvidia_com__gpu_compute_minor": "0"}
    azure = {"node_kubernetes_io__instance~type": "Standard_NC6s_v3"}
    for labels in (told, v100, {**v100, **azure}, azure):
        assert "has compute capability 7.0, and the image that tunes needs 7.5" in reason(planned(node(**labels)))
    assert "instead is Standard_NC4as_T4_v3" in reason(planned(node(**azure))), "its cloud is known"
    turing = {**told, "nvidia_com__gpu_compute_minor": "5", "nvidia_com__gpu_product": "Quadro-RTX-6000"}
    assert planned(node(**turing)).chosen is not None


def test_what_a_list_of_machines_calls_a_gpu_is_enough() -> None:
    for model, number in {
        "V100": "7.0",
        "Tesla P100-PCIE-16GB": "6.0",
        "P40": "6.1",
        "Tesla-K80": "3.7",
        "M60": "5.2",
    }.items():
        listed = Offer("big", 8, 64 * GIB, Gpu(model, 16 * GIB), 1, "karpenter")
        assert f"has compute capability {number}" in reason(planned(listed))
    for model in ("T4", "A100-SXM4-40GB", "NVIDIA-A10", "NVIDIA RTX PRO 6000 Blackwell Server Edition", "H100"):
        assert planned(Offer("big", 8, 64 * GIB, Gpu(model, 16 * GIB), 1, "karpenter")).chosen is not None


@pytest.mark.parametrize("task", [TUNING, SERVING])
def test_an_unknown_number_is_taken_and_said(task: str) -> None:
    odd = Offer("odd", 8, 64 * GIB, Gpu("Quadro RTX 9999", 40 * GIB), 1, "cloud")
    made = planned(odd, task=task)
    assert made.chosen is not None
    assert any("the compute capability of the Quadro RTX 9999 is not known" in n for n in made.chosen.fit.notes)
    amd = replace(odd, gpu=Gpu("MI999", 40 * GIB, vendor="amd"))
    taken = planned(amd, task=task).chosen
    assert taken is not None
    assert not any("capability" in n for n in taken.fit.notes)


def test_what_is_declared_for_an_image_counts() -> None:
    v100 = bought("Standard_NC6s_v3")
    assert planned(v100, images=declared({"tuner": "7.0"})).chosen is not None
    assert "needs 8.0" in reason(planned(bought("Standard_NC4as_T4_v3"), images=declared({"tuner": "8.0"})))


@pytest.mark.parametrize("name", [o.instance_type for o in TOO_OLD.values() if o.retired and not catalogue.obstacle(o)])
def test_a_machine_that_the_catalogue_calls_retired_is_taken_where_its_cloud_has_it(name: str) -> None:
    """What is said of a replacement belongs to a reason, and is none by itself."""
    made = planned(bought(name), resource=f"{{instanceType: {name}}}", images=declared({"tuner": "3.0"}))
    assert made.refusal is None, made.refusal
    assert made.chosen is not None
    assert made.chosen.offer.instance_type == name


def test_each_runtime_is_held_against_its_own_image() -> None:
    """transformers is in the image that tunes."""
    made = planned(bought("Standard_NC6s_v3"), task=SERVING, images=declared({"tuner": "7.0"}))
    assert isinstance(made, ServingPlan)
    assert made.runtime.name == "transformers"
    assert made.chosen is not None
    assert any("vllm cannot run there: its V100-16GB has" in n for n in made.chosen.fit.notes)
    other = planned(bought("Standard_NC6s_v3"), task=SERVING, images=declared({"vllm": "7.0"}))
    assert isinstance(other, ServingPlan)
    assert other.runtime.name == "vllm"


def test_the_image_of_a_pod_template_is_the_users_own() -> None:
    assert planned(bought("Standard_NC6s_v3"), task=POD).chosen is not None


@pytest.mark.parametrize("given", [{"tuner": "7"}, {"tuner": "sm_70"}, {"vllm": ""}, {"transformers": "7.0"}])
def test_what_is_no_declaration_is_refused(given: dict[str, str]) -> None:
    with pytest.raises(UserError) as e:
        declared(given)
    assert e.value.problems[0].remedy


# --- this machine


def _here(folder: Path, monkeypatch: pytest.MonkeyPatch, torch: str) -> tuple[Offer, Images]:
    """This machine with a V100, and with such a PyTorch."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!{sys.executable}\nprint('Tesla V100-SXM2-16GB, 16384, 7.0')\n")
    program.chmod(0o755)
    (folder / "torch.py").write_text(f"class cuda:\n    get_arch_list = staticmethod(lambda: {torch!r}.split())\n")
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    offer = machine.offer()
    return offer, machine.images([offer])


@pytest.mark.parametrize(
    ("torch", "taken"),
    [("sm_75 sm_80 sm_90a compute_90", False), ("sm_50 sm_70 sm_100 compute_100", True), ("", True)],
)
def test_this_machine_asks_its_own_pytorch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch: str, taken: bool
) -> None:
    offer, images = _here(tmp_path, monkeypatch, torch)
    made = planned(offer, images=images)
    assert (made.chosen is not None) is taken
    if not taken:
        assert "has compute capability 7.0, and the PyTorch of this machine needs 7.5" in reason(made)


def test_a_newer_gpu_starts_no_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("torch takes seconds to load")

    monkeypatch.setattr(machine, "_lowest_of_torch", never)
    here = Offer("this machine", 4, 16 * GIB, Gpu("T4", 14 * GIB, (7, 5)), 1, "local")
    assert machine.images([here, bought("Standard_NC6s_v3")]) == Images()
