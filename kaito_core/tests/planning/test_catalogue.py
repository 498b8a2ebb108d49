"""The catalogue: what is in a machine and what it costs, with source and date; what is not known is said to be."""

from __future__ import annotations

from pathlib import Path

import pytest

from kaito_core.local.home import home
from kaito_core.planning import catalogue, prices
from kaito_core.planning.prices import Row, Source
from kaito_core.problems import UserError


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KAITO_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_it_has_every_gpu_machine_of_three_clouds_and_is_sound() -> None:
    known = catalogue.machines()
    clouds = [m.offer.cloud for m in known.values()]
    assert {c: clouds.count(c) >= n for c, n in {"azure": 90, "aws": 70, "gcp": 29}.items()} == dict.fromkeys(
        catalogue.CLOUDS, True
    )
    for name, machine in known.items():
        offer = machine.offer
        assert offer.gpu is not None, name
        assert offer.gpus >= 1, name
        assert offer.cpus >= 1, name
        assert offer.gpu.memory > 1 << 30, name
        assert offer.memory > 1 << 30, name
        assert offer.gpu.vendor == "amd" or offer.gpu.compute_capability, name
        assert offer.price is None, name
        assert (offer.provisioner, offer.region) == ("", ""), name
        assert 0 < catalogue.share(offer.gpu) <= 1, name


@pytest.mark.parametrize(
    ("name", "region", "dollars"),
    [
        ("Standard_NC4as_T4_v3", "eastus", 0.526),
        ("Standard_NC24ads_A100_v4", "eastus", 3.673),
        ("Standard_NC40ads_H100_v5", "eastus", 6.98),
        ("Standard_ND96isr_H200_v5", "eastus2", 84.80),
        ("Standard_NC6s_v3", "eastus", 3.06),
        ("g4dn.xlarge", "us-east-1", 0.526),
        ("p5.48xlarge", "us-east-1", 55.04),
        ("p3.2xlarge", "us-east-1", 3.06),
        ("g2-standard-4", "us-central1", 0.707),
        ("a3-highgpu-8g", "us-central1", 88.49),
    ],
)
def test_prices_are_those_of_the_sources_with_source_and_date(name: str, region: str, dollars: float) -> None:
    cloud = catalogue.instance_types()[name.lower()].cloud
    (offer,) = [o for o in catalogue.offers(cloud, [region]) if o.instance_type == name]
    assert offer.price is not None
    assert offer.price.per_hour == dollars
    assert offer.price.source.startswith(f"karpenter-provider-{cloud}")
    assert offer.price.date.startswith("2026-")


def test_without_regions_there_is_one_offer_per_type_where_it_is_sold() -> None:
    for cloud in catalogue.CLOUDS:
        found = catalogue.offers(cloud)
        assert len(found) == len({o.instance_type for o in found})
        assert len(found) == sum(o.cloud == cloud for o in catalogue.instance_types().values())
    azure = {o.instance_type: o.region for o in catalogue.offers("azure")}
    assert azure["Standard_NC24ads_A100_v4"] == "eastus"
    assert azure["Standard_NC8ads_A10_v4"] == "westus3"


def test_an_unknown_price_is_none_and_never_0() -> None:
    table = prices.table()
    for cloud in catalogue.CLOUDS:
        for offer in catalogue.offers(cloud, capacity_types=("on-demand", "spot")):
            assert offer.price is None or offer.price.per_hour > 0
    (p5e,) = [o for o in catalogue.offers("aws") if o.instance_type == "p5e.48xlarge"]
    assert (p5e.price, p5e.region) == (None, "")
    assert table.price("azure", "Standard_NC24ads_A100_v4", "eastus", "spot") is None


def test_regions_are_those_of_the_cloud() -> None:
    west = catalogue.offers("azure", ["westus3", "eastus"])
    assert {o.region for o in west} == {"westus3", "eastus"}
    assert all(o.price for o in west)
    # No table of prices of this region: everything may be there, at an unknown price.
    ireland = catalogue.offers("aws", ["eu-west-1"])
    assert ireland
    assert all(o.price is None and o.region == "eu-west-1" for o in ireland)
    assert catalogue.offers("azure", ["us-east-1", "westus9"]) == []
    assert catalogue.offers("aws", ["eastus"]) == []
    assert catalogue.offers("gcp", ["us-east-1"]) == []


def test_spot_is_an_offer_of_its_own() -> None:
    found = [o for o in catalogue.offers("gcp", (), ("spot", "on-demand")) if o.instance_type == "a2-highgpu-1g"]
    assert [(o.capacity_type, o.price.per_hour if o.price else None) for o in found] == [
        ("spot", 1.928),
        ("on-demand", 3.673),
    ]


def test_a_slice_of_a_gpu_is_known_as_one() -> None:
    known = catalogue.instance_types()
    shares = {
        name: catalogue.share(offer.gpu)
        for name in ("standard_nv6ads_a10_v5", "g6f.xlarge", "g6.xlarge", "standard_nc32ds_xl_rtxpro6000bse_v6")
        if (offer := known[name]).gpu
    }
    assert [round(1 / s) for s in shares.values()] == [6, 8, 1, 4]


def test_what_kaito_cannot_use_is_said() -> None:
    for name, words in {
        "g5g.xlarge": "ARM",
        "standard_nc6_promo": "compute capability 3.7",
        "g4ad.xlarge": "AMD",
    }.items():
        assert words in catalogue.obstacle(catalogue.instance_types()[name])
    assert catalogue.obstacle(catalogue.instance_types()["g4dn.xlarge"]) == ""


# --- newer prices


def test_newer_prices_win_in_the_regions_that_they_know() -> None:
    before = {(o.instance_type, o.region) for o in catalogue.offers("azure", ["eastus", "westus3"])}
    prices.write(
        Source("azure", "a test", "2027-01-01"),
        [
            Row("Standard_NC24ads_A100_v4", "eastus", "on-demand", 1.25),
            Row("Standard_NC24ads_A100_v4", "eastus", "spot", 0.5),
        ],
    )
    found = catalogue.offers("azure", ["eastus", "westus3"], ("on-demand", "spot"))
    east = [
        (o.instance_type, o.capacity_type, o.price.per_hour, o.price.date)
        for o in found
        if o.region == "eastus" and o.price
    ]
    assert east == [
        ("Standard_NC24ads_A100_v4", "on-demand", 1.25, "2027-01-01"),
        ("Standard_NC24ads_A100_v4", "spot", 0.5, "2027-01-01"),
    ]
    west = {(o.instance_type, o.region) for o in found if o.region == "westus3"}
    assert west == {(name, region) for name, region in before if region == "westus3"}


def test_prices_live_in_kaitos_data_folder(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert prices.folder() == home() / "catalogue" == own_home / "catalogue"
    monkeypatch.delenv("KAITO_HOME")
    assert prices.folder() == home() / "catalogue"
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert prices.folder() == home() / "catalogue"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "# source: x\n# date: y\nother header\n",
        f"# source: x\n# date: y\n{prices.HEADER}\na,b,on-demand\n",
        f"# source: x\n# date: y\n{prices.HEADER}\na,b,on-demand,0\n",
        f"# source: x\n# date: y\n{prices.HEADER}\na,b,on-demand,nan\n",
        f"# source: x\n# date: y\n{prices.HEADER}\na,b,reserved,1\n",
        f"# source: x\n# date: y\n{prices.HEADER}\na,b,spot,1e9\n",
    ],
)
def test_a_broken_price_file_is_a_clear_error(own_home: Path, text: str) -> None:
    path = own_home / "catalogue" / "azure.csv"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(UserError, match=r"azure\.csv cannot be read") as e:
        catalogue.offers("azure")
    assert "kaito catalog update" in e.value.problems[0].remedy
