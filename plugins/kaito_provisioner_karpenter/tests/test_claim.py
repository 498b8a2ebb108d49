"""The claims that are asked for, for each kind of Karpenter."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from asking import ID, NC6S, NC24ADS, TAGS, request
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft7Validator

from kaito_core.plugins.types import Gpu, NodeRequest, Offer, Requirements, Unsupported
from kaito_provisioner_karpenter.claim import MOST_TYPES, choice, claim_names, claims
from kaito_provisioner_karpenter.flavours import AWS, AZURE, GPU_PROVISIONER, KWOK, NodeClass

CLASSES = [NodeClass(f, "default") for f in (AZURE, AWS, KWOK, GPU_PROVISIONER)]
AKS, GP = CLASSES[0], CLASSES[3]


def wishes(claim: dict[str, Any]) -> dict[str, list[str]]:
    found = claim["spec"]["requirements"]
    assert all(w["operator"] == "In" for w in found)
    assert len({w["key"] for w in found}) == len(found)
    return {w["key"]: w["values"] for w in found}


def test_a_claim_for_azure() -> None:
    (claim,) = claims(request(labels={"apps": "phi-3"}), AKS)
    assert claim == {
        "apiVersion": "karpenter.sh/v1",
        "kind": "NodeClaim",
        "metadata": {
            "name": ID,
            "labels": {"apps": "phi-3", **TAGS, "kaito.sh/request": ID},
            "annotations": {"karpenter.sh/do-not-disrupt": "true", "kaito.sh/gpus": "1", "kaito.sh/nodes": "1"},
        },
        "spec": {
            "nodeClassRef": {"group": "karpenter.azure.com", "kind": "AKSNodeClass", "name": "default"},
            "requirements": [
                {"key": "node.kubernetes.io/instance-type", "operator": "In", "values": ["Standard_NC6s_v3"]},
                {"key": "kubernetes.io/os", "operator": "In", "values": ["linux"]},
                {"key": "karpenter.sh/capacity-type", "operator": "In", "values": ["on-demand"]},
            ],
            "expireAfter": "Never",
            "taints": [{"key": "sku", "value": "gpu", "effect": "NoSchedule"}],
            "resources": {"requests": {"nvidia.com/gpu": "1"}},
        },
    }


def test_a_claim_for_gpu_provisioner_has_kaitos_own_form() -> None:
    (claim,) = claims(request(NC6S, NC24ADS), GP)
    assert claim["metadata"]["labels"]["karpenter.sh/nodepool"] == "kaito"
    assert claim["spec"]["nodeClassRef"] == {"group": "kaito.sh", "kind": "KaitoNodeClass", "name": "default"}
    assert claim["spec"]["resources"] == {"requests": {"storage": "1024Gi"}}
    assert wishes(claim) == {
        "node.kubernetes.io/instance-type": ["Standard_NC6s_v3"],
        "kubernetes.io/os": ["linux"],
        "karpenter.sh/nodepool": ["kaito"],
    }


def spot(offer: Offer) -> Offer:
    return replace(offer, capacity_type="spot")


@pytest.mark.parametrize(
    ("offers", "types", "capacity"),
    [
        ([NC6S, NC24ADS], [NC6S, NC24ADS], ["on-demand"]),
        ([NC6S, spot(NC6S)], [NC6S], ["on-demand", "spot"]),
        ([spot(NC6S), NC6S, NC24ADS, spot(NC24ADS)], [NC6S, NC24ADS], ["on-demand", "spot"]),
        # NC24ads is not offered as spot: both together would also allow that.
        ([spot(NC6S), NC6S, NC24ADS], [NC6S], ["spot"]),
        ([NC6S, spot(NC6S), NC24ADS], [NC6S, NC24ADS], ["on-demand"]),
        ([NC6S, replace(NC24ADS, region="westus")], [NC6S], ["on-demand"]),
        ([NC6S, replace(NC24ADS, retired="quota")], [NC6S], ["on-demand"]),
        ([replace(NC24ADS, gpus=2), NC6S], [NC24ADS], ["on-demand"]),
        ([NC6S, replace(NC24ADS, gpu=Gpu("MI300X", 1 << 37, vendor="amd"))], [NC6S], ["on-demand"]),
    ],
)
def test_the_controller_may_choose_among_what_was_offered(
    offers: list[Offer], types: list[Offer], capacity: list[str]
) -> None:
    found = choice(request(*offers), AKS)
    assert found.instance_types == tuple(t.instance_type for t in types)
    assert list(found.capacity_types) == capacity


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (request(spot(NC6S)), "on demand only"),
        (request(zones=("eastus-1",)), "cannot choose a zone"),
        (request(request_id="much-too-long-a-name"), "agent pools"),
        (request(request_id="ws0123456abc", count=2), "agent pools"),
        (request(count=40), "agent pools"),
    ],
)
def test_what_gpu_provisioner_would_pass_over_is_refused(asked: NodeRequest, words: str) -> None:
    with pytest.raises(Unsupported, match=words):
        claims(asked, GP)


def test_zones_are_written_as_nodes_have_them() -> None:
    assert wishes(claims(request(zones=("1", "eastus-2")), AKS)[0])["topology.kubernetes.io/zone"] == ["eastus-1", "eastus-2"]  # fmt: skip
    ec2 = replace(NC6S, cloud="aws", region="us-east-1", zone="us-east-1a")
    assert wishes(claims(request(ec2), CLASSES[1])[0])["topology.kubernetes.io/zone"] == ["us-east-1a"]


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ({"kubernetes.io/hostname": "gpu-1"}, "chosen beforehand"),
        ({"team": "a b"}, "cannot be the value"),
        ({"node.kubernetes.io/instance-type": "Standard_Other"}, "contradicts"),
    ],
)
def test_labels_that_no_new_node_can_have_are_refused(labels: dict[str, str], words: str) -> None:
    with pytest.raises(Unsupported, match=words):
        claims(request(labels=labels), AKS)


def test_labels_that_the_cloud_gives_become_requirements() -> None:
    (claim,) = claims(request(NC6S, NC24ADS, labels={
        "topology.kubernetes.io/zone": "eastus-3", "node.kubernetes.io/instance-type": NC24ADS.instance_type,
    }), AKS)  # fmt: skip
    assert wishes(claim)["topology.kubernetes.io/zone"] == ["eastus-3"]
    assert wishes(claim)["node.kubernetes.io/instance-type"] == [NC24ADS.instance_type]
    assert "topology.kubernetes.io/zone" not in claim["metadata"]["labels"]


# --- whatever is asked

offers = st.builds(
    Offer,
    instance_type=st.sampled_from([f"type{n}" for n in range(80)]),
    cpus=st.just(4),
    memory=st.just(1 << 34),
    gpu=st.sampled_from([Gpu("A100", 1 << 36), Gpu("MI300X", 1 << 37, vendor="amd"), None]),
    gpus=st.integers(0, 8),
    region=st.sampled_from(["eastus", "westus"]),
    zone=st.sampled_from(["", "1", "eastus-2"]),
    capacity_type=st.sampled_from(["on-demand", "spot"]),
    retired=st.sampled_from(["", "", "gone"]),
)
requests = st.builds(
    NodeRequest,
    id=st.from_regex(r"\Aws[0-9a-f]{9}\Z"),
    offer=offers,
    requirements=st.builds(
        Requirements,
        labels=st.dictionaries(st.sampled_from(["apps", "team.io/x", "kubernetes.io/arch"]), st.sampled_from(["amd64", "x"])),
        count=st.integers(1, 4),
        zones=st.sampled_from([(), ("1",), ("eastus-1", "eastus-2")]),
    ),
    tags=st.just(TAGS),
    also=st.lists(offers, max_size=100).map(tuple),
)  # fmt: skip


@given(requests, st.sampled_from(CLASSES))
def test_every_claim_keeps_to_what_was_offered(asked: NodeRequest, node_class: NodeClass) -> None:
    try:
        made = claims(asked, node_class)
    except Unsupported:
        assert node_class is GP
        return
    assert len({c["metadata"]["name"] for c in made}) == len(made) == asked.requirements.count
    assert made == claims(asked, node_class)
    wished = wishes(made[0])
    types = wished["node.kubernetes.io/instance-type"]
    assert types[0] == asked.offer.instance_type
    assert len(types) <= MOST_TYPES
    offered = {(o.instance_type, o.capacity_type) for o in (asked.offer, *asked.also)}
    for kind in wished.get("karpenter.sh/capacity-type", ["on-demand"]):
        assert {(t, kind) for t in types} <= offered
    for claim in made:
        assert claim["spec"]["expireAfter"] == "Never"
        assert claim["metadata"]["labels"]["kaito.sh/request"] == asked.id
        assert claim["spec"] == made[0]["spec"]


@given(st.from_regex(r"\Aws[0-9a-f]{9}\Z"), st.integers(1, 36))
def test_names_of_agent_pools_are_short(request_id: str, count: int) -> None:
    names = claim_names(request_id, count, GP)
    assert len(set(names)) == count
    assert all(re.fullmatch("[a-z][a-z0-9]{0,11}", n) for n in names)


# --- as the API server would check it

DEFINITIONS = {
    AZURE.name: "karpenter.azure.com_aksnodeclasses.yaml",
    AWS.name: "karpenter.k8s.aws_ec2nodeclasses.yaml",
    KWOK.name: "karpenter.kwok.sh_kwoknodeclasses.yaml",
}


@pytest.mark.parametrize("node_class", CLASSES, ids=str)
def test_claims_are_valid_by_karpenters_definition(node_class: NodeClass, crds: Path) -> None:
    (definition,) = (d for d in yaml.safe_load_all((crds / "karpenter.sh_nodeclaims.yaml").read_text()) if d)
    version = next(v for v in definition["spec"]["versions"] if v["name"] == "v1")
    validator = Draft7Validator(_strict(version["schema"]["openAPIV3Schema"]))

    @given(requests)
    def check(asked: NodeRequest) -> None:
        try:
            made = claims(asked, node_class)
        except Unsupported:
            return
        for claim in made:
            validator.validate(claim)

    check()


@pytest.mark.parametrize("node_class", CLASSES[:3], ids=str)
def test_node_classes_are_where_their_definitions_say(node_class: NodeClass, crds: Path) -> None:
    file = crds / DEFINITIONS[node_class.flavour.name]
    if not file.exists():
        pytest.skip(f"{file.name} is not in the folder")
    (spec,) = (d["spec"] for d in yaml.safe_load_all(file.read_text()) if d)
    kind = node_class.flavour.node_class
    assert (spec["group"], spec["names"]["kind"], spec["names"]["plural"]) == (kind.group, kind.kind, kind.plural)
    assert spec["scope"] == "Cluster"
    assert kind.api_version.partition("/")[2] in [v["name"] for v in spec["versions"] if v["served"]]


def _strict(schema: Any) -> Any:
    """The same schema, closed: the API server drops unknown fields, here they are errors."""
    if isinstance(schema, dict):
        schema = {k: _strict(v) for k, v in schema.items()}
        if "properties" in schema and "additionalProperties" not in schema:
            schema["additionalProperties"] = False
        # Go's regular expressions and quantities that may be numbers are fine as they are.
        return schema
    return [_strict(s) for s in schema] if isinstance(schema, list) else schema
