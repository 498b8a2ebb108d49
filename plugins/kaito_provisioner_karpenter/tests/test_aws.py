"""What AWS says beforehand: pure rules, boto3 against moto's server, and what moto lacks against botocore's Stubber."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from karpenter_double import EC2_CLASS, Cluster

from kaito_core.plugins.types import Gpu, Offer, Price, Requirements
from kaito_provisioner_karpenter import aws
from kaito_provisioner_karpenter.aws import AGAIN, FRESH, Facts, Market, checked, quota_of
from kaito_provisioner_karpenter.provisioner import KarpenterNodes

REGION = "us-east-1"
G5 = Offer("g5.xlarge", 4, 14 << 30, Gpu("A10G", 22 << 30), 1, "karpenter", "aws", REGION, price=Price(1.0, "table", "2026-01-01"))  # fmt: skip
P5 = Offer("p5.48xlarge", 192, 1800 << 30, Gpu("H100", 80 << 30), 8, "karpenter", "aws", REGION)
SPOT = replace(G5, capacity_type="spot", price=None)
G_QUOTA = "L-DB2E81BA"

ON_DEMAND = {"g5.xlarge": "L-DB2E81BA", "gr6.4xlarge": "L-DB2E81BA", "vt1.3xlarge": "L-DB2E81BA", "p4d.24xlarge": "L-417A185B",
             "p5.48xlarge": "L-417A185B", "m7i.large": "L-1216C47A", "hpc7a.large": "", "inf2.xlarge": "", "trn1.2xlarge": ""}  # fmt: skip
SPOTS = {"g6e.xlarge": "L-3819A6DF", "p3.2xlarge": "L-7212CCBC", "p4de.24xlarge": "L-7212CCBC", "p5en.48xlarge": "L-C4BD4855",
         "p6-b200.48xlarge": "", "c7g.large": "L-34B43A08"}  # fmt: skip


def test_each_family_has_its_quota() -> None:
    assert {t: quota_of(t, "on-demand")[0] for t in ON_DEMAND} == ON_DEMAND
    assert {t: quota_of(t, "spot")[0] for t in SPOTS} == SPOTS


@pytest.mark.parametrize(
    ("offer", "facts", "words"),
    [
        (G5, Facts(), ""),
        (G5, Facts(zones={}), "does not sell it in us-east-1"),
        (G5, Facts(zones={"g5.xlarge": frozenset({"us-east-1a"})}), ""),
        (replace(G5, zone="us-east-1e"), Facts(zones={"g5.xlarge": frozenset({"us-east-1a"})}), "in us-east-1e, but in us-east-1a"),
        (G5, Facts(quotas={G_QUOTA: 0.0}), "(L-DB2E81BA) in us-east-1 is 0 vCPUs, and it needs 4"),
        (G5, Facts(quotas={G_QUOTA: 64.0}, used={G_QUOTA: 62}), "is 64 vCPUs, 62 in use, and it needs 4"),
        (G5, Facts(quotas={G_QUOTA: 64.0}, used={G_QUOTA: 60}), ""),
        # On demand and spot are counted apart.
        (SPOT, Facts(quotas={G_QUOTA: 0.0}), ""),
        (replace(G5, retired="older"), Facts(zones={}), "older"),
    ],
)  # fmt: skip
def test_an_offer_that_cannot_be_had_says_why(offer: Offer, facts: Facts, words: str) -> None:
    (found,) = checked([offer], facts)
    assert words in found.retired
    assert bool(found.retired) == bool(words)


def test_spot_has_todays_price_and_on_demand_keeps_its_own() -> None:
    facts = Facts(spot={"g5.xlarge": (0.5012, "us-east-1b", "2026-11-24")})
    on_demand, spot = checked([G5, SPOT], facts)
    assert on_demand == G5
    assert spot.price == Price(0.5012, "AWS spot price history, us-east-1b", "2026-11-24")


@given(st.lists(st.sampled_from([G5, P5, SPOT])), st.floats(0, 1000), st.integers(0, 1000))
def test_nothing_but_price_and_reason_changes(offers: list[Offer], limit: float, used: int) -> None:
    found = checked(offers, Facts(quotas={G_QUOTA: limit}, used={G_QUOTA: used}))
    assert [replace(o, retired="") for o in found] == offers


# --- boto3


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = pytest.importorskip("moto.server", reason="moto[server] is not installed").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)  # fmt: skip
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def ec2(endpoint: str) -> Any:
    return client("ec2", endpoint)


def client(service: str, endpoint: str = "http://127.0.0.1:1", region: str = REGION) -> Any:
    boto3 = pytest.importorskip("boto3", reason="boto3 is not installed")
    return boto3.client(service, region_name=region, endpoint_url=endpoint, aws_access_key_id="x", aws_secret_access_key="x")  # fmt: skip


def test_zones_of_each_type(ec2: Any) -> None:
    found = aws.zones_of(ec2, ["g5.xlarge", "p5.48xlarge", "never-heard-of"])
    assert set(found) == {"g5.xlarge", "p5.48xlarge"}
    assert "us-east-1a" in found["g5.xlarge"]


def test_spot_prices(ec2: Any) -> None:
    found = aws.spot_prices_of(ec2, ["g5.xlarge"])
    # moto's one price, from its one date.
    assert found == {"g5.xlarge": (0.00001, found["g5.xlarge"][1], "2006-01-02")}


def test_what_runs_counts_against_its_quota(ec2: Any) -> None:
    (image,) = ec2.describe_images(Owners=["amazon"], MaxResults=1)["Images"][:1]
    before = aws.used_of(ec2)
    ec2.run_instances(ImageId=image["ImageId"], InstanceType="g5.xlarge", MinCount=2, MaxCount=2)
    after = aws.used_of(ec2)
    assert set(after) - set(before) <= {G_QUOTA}
    assert after[G_QUOTA] - before.get(G_QUOTA, 0) == 2 * 4


def test_machines_with_fewer_cores_count_as_they_run() -> None:
    assert aws._cpus({"InstanceType": "g5.xlarge", "CpuOptions": {"CoreCount": 1, "ThreadsPerCore": 1}}) == 1
    assert aws._cpus({"InstanceType": "never-heard-of"}) == 0


def test_quotas_are_read_and_one_that_is_not_there_is_left_out() -> None:
    quotas = client("service-quotas")
    stubber = importlib.import_module("botocore.stub").Stubber(quotas)
    stubber.add_client_error("get_service_quota", "NoSuchResourceException")
    stubber.add_response("get_service_quota", {"Quota": {"Value": 64.0}}, {"ServiceCode": "ec2", "QuotaCode": G_QUOTA})
    with stubber:
        assert aws.quotas_of(quotas, [G_QUOTA, "L-417A185B"]) == {G_QUOTA: 64.0}
    stubber.assert_no_pending_responses()


def test_a_market_asks_once_in_ten_minutes(endpoint: str) -> None:
    now, asked = [0.0], []

    def make(service: str, region: str) -> Any:
        asked.append(service)
        return client(service, endpoint, region)

    market = Market(make, clock=lambda: now[0], environ={})
    first = market.checked(REGION, [G5, SPOT])
    times = len(asked)
    assert market.checked(REGION, [G5, SPOT]) == first
    assert len(asked) == times
    assert first[1].price is not None
    # moto knows no quota of ec2: nothing is known, and nothing is in the way.
    assert not any(o.retired for o in first)
    now[0] = FRESH + 1
    market.checked(REGION, [G5, SPOT])
    assert len(asked) > times


def test_a_question_that_fails_is_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    now, asked = [0.0], []

    def make(service: str, region: str) -> Any:
        asked.append(service)
        raise RuntimeError("no credentials")

    market = Market(make, clock=lambda: now[0], environ={})
    assert market.checked(REGION, [G5, SPOT]) == [G5, SPOT]
    assert "AWS was not asked about quotas in us-east-1: no credentials" in caplog.text
    times = len(asked)
    market.checked(REGION, [G5, SPOT])
    assert len(asked) == times
    now[0] = AGAIN + 1
    market.checked(REGION, [G5, SPOT])
    assert len(asked) == 2 * times
    assert Market(make, environ={"KAITO_AWS_CHECKS": "off"}).checked(REGION, [G5]) == [G5]


def test_without_boto3_offers_are_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    karpenter = KarpenterNodes({"KAITO_REGION": REGION})
    karpenter.attach(Cluster(EC2_CLASS))
    found = list(karpenter.offers(Requirements(instance_types=("g5.xlarge",))))
    assert [o.instance_type for o in found] == ["g5.xlarge"]
    assert not found[0].retired


def test_offers_of_a_cluster_on_aws_are_checked(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aws, "_client", lambda service, region: client(service, endpoint, region))
    karpenter = KarpenterNodes({"KAITO_REGION": REGION})
    karpenter.attach(Cluster(EC2_CLASS))
    wanted = Requirements(instance_types=("g5.xlarge", "p3.2xlarge"), capacity_types=("spot",))
    found = {o.instance_type: o for o in karpenter.offers(wanted)}
    price = found["g5.xlarge"].price
    assert price is not None
    assert price.source.startswith("AWS spot price history")
    if "p3.2xlarge" in found:  # moto's data has none of it
        assert found["p3.2xlarge"].retired == "AWS does not sell it in us-east-1"


def test_the_plugin_and_the_provisioner_load_without_boto3_and_without_kubernetes() -> None:
    code = (
        "import sys, kaito_provisioner_karpenter.plugin as p; heavy = {'boto3', 'kubernetes', 'kaito_core.planning.catalogue'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules); list(p.kaito_node_provisioners()); "
        "assert not {'boto3', 'kubernetes'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONWARNINGS": "error"})
