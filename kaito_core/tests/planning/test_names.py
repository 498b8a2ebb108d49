"""A slip of the pen in a name that chooses what is paid for never leaves the choice to something else without a word."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaito_core.api import load_text
from kaito_core.cli import main
from kaito_core.planning import catalogue, names
from kaito_core.planning.plan import Catalog, Plan, plan
from kaito_core.plugins import Offer, Requirements
from kaito_core.problems import UserError
from kaito_core.testing.planning import GIB, OneOfEach

HERE = Offer("this machine", 4, 16 * GIB, provisioner="local")

FILE = """
apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata: {name: one}
resource: RESOURCE
tuning:
  preset: {name: tiny}
  method: qlora
  input: {urls: ["https://example.com/a.jsonl"]}
  output: {image: "r.io/a:1", imagePushSecret: push}
"""


def planned(resource: str, *offers: Offer, complete: bool = True) -> Plan:
    (workspace,) = load_text(FILE.replace("RESOURCE", resource)).workspaces
    return plan(workspace, Catalog(OneOfEach(), offers or (HERE,), complete=complete))


def problems(resource: str, *offers: Offer) -> list[str]:
    with pytest.raises(UserError) as e:
        planned(resource, *offers)
    return [f"{p.field}: {p.message}; {p.remedy}" for p in e.value.problems]


def edits(name: str) -> Iterator[str]:
    """What a finger does: a letter left out, doubled, swapped with the next, in the other case."""
    for i in range(len(name)):
        yield name[:i] + name[i + 1 :]
        yield name[: i + 1] + name[i:]
        yield name[:i] + name[i + 1 : i + 2] + name[i] + name[i + 2 :]
        yield name[:i] + name[i].swapcase() + name[i + 1 :]


@pytest.mark.parametrize("cloud", catalogue.CLOUDS)
def test_no_slip_in_the_name_of_a_machine_passes_without_a_word(cloud: str) -> None:
    silent, warned = set(), set()
    known = [o.instance_type for o in catalogue.instance_types().values() if o.cloud == cloud]
    slips = {edit for name in known for edit in edits(name)}
    for edit in sorted(slips)[:: max(1, len(slips) // 150)]:  # enough of each cloud's thousands
        said = names.unknown(Requirements(instance_types=(edit,)), (HERE,))
        if edit.lower() in catalogue.instance_types():
            assert not said, edit
        elif not said:
            silent.add(edit)
        elif said[0].severity == "warning":
            warned.add(edit)
    assert not silent
    # A name of a family without GPUs, as some slips are.
    assert len(warned) < 5, warned


def test_case_is_no_slip() -> None:
    for name in ("STANDARD_NC24ADS_A100_V4", "standard_nc24ads_a100_v4"):
        assert planned(f"{{instanceType: {name}}}").chosen is not None


def test_an_unknown_machine_that_is_nearly_a_known_one_is_an_error() -> None:
    assert problems("{instanceType: Standard_NC24ads_A100_v5}") == [
        "resource.instanceType: unknown instance type 'Standard_NC24ads_A100_v5'; did you mean Standard_NC24ads_A100_v4?"
    ]
    for name in ("NC24ads_A100_v4", "Standard-NC24ads-A100-v4", "Standard_NC24ads_A100v4", "Standard_NC24ad_A100_v5"):
        assert "did you mean Standard_NC24ads_A100_v4" in problems(f"{{instanceType: {name}}}")[0]
    assert "did you mean g6.xlarge" in problems("{instanceType: g6xlarge}")[0]
    (one,) = problems("{instanceTypes: [Standard_NC4as_T4_v3, p5.48xlarg]}")
    assert one == "resource.instanceTypes[1]: unknown instance type 'p5.48xlarg'; did you mean p5.48xlarge?"


def test_what_cannot_be_used_is_not_proposed() -> None:
    """An AMD card, a V100 that the cloud gives up, and one that it does not."""
    for name, why in {
        "Standard_NG8ads_V620_v2": "AMD",
        "Standard_NC6s_v33": "2025-09-30",
        "Standard_ND40rs_v22": "compute capability 7.0",
    }.items():
        (said,) = problems(f"{{instanceType: {name}}}")
        assert "cannot be used: " in said
        assert why in said
        assert "did you mean" not in said


@pytest.mark.parametrize(
    "name", ["Standard_D8s_v5", "m5.xlarge", "e2-standard-4", "Standard_DC24s_v3", "my-own-gpu-box", "x"]
)
def test_an_unknown_machine_that_is_near_none_is_a_warning(name: str) -> None:
    assert planned(f"{{instanceType: {name}}}").chosen is not None
    (said,) = names.unknown(Requirements(instance_types=(name,)), (HERE,))
    assert (said.severity, said.field) == ("warning", "resource.instanceType")
    assert name in said.message


def test_what_somebody_offers_is_known() -> None:
    """A node of the cluster, or a machine of a cloud that the catalogue does not know."""
    own = Offer("Standard_NC24ads_A100_v5", 24, 64 * GIB, provisioner="existing")
    made = planned("{instanceType: standard_nc24ads_a100_v5}", own)
    assert made.chosen is not None
    shop = Offer("box", 24, 64 * GIB, provisioner="shop", region="eastus-one")
    assert names.unknown(Requirements(instance_types=("box",), regions=("eastus-one",)), (shop,)) == []


def test_while_a_provisioner_cannot_say_what_it_has_nothing_is_an_error() -> None:
    assert planned("{instanceType: Standard_NC24ads_A100_v5, regions: [eastsu]}", complete=False).chosen is not None


@pytest.mark.parametrize(
    ("region", "meant"),
    [("eastsu", "eastus"), ("westeurop", "westeurope"), ("us-esat-1", "us-east-1"), ("us-cental1", "us-central1")],
)
def test_a_region_that_is_nearly_a_known_one_is_an_error(region: str, meant: str) -> None:
    elsewhere = Offer("m", 4, 64 * GIB, provisioner="cloud", region="westus")
    for offers in ((), (HERE,), (elsewhere,), tuple(catalogue.offers("aws", [region]))):
        (said,) = problems(f"{{regions: [{region}]}}", *offers)
        assert said.startswith(f"resource.regions[0]: no known region is called {region}; did you mean {meant}")


def test_every_slip_in_a_region_is_said() -> None:
    known = names._regions()
    for region in sorted(known)[::9]:
        for edit in {e for e in edits(region) if e == e.lower()} - known:
            assert names.unknown(Requirements(regions=(edit,)), (HERE,)), edit
        assert names.unknown(Requirements(regions=(region,)), (HERE,)) == []


@pytest.mark.parametrize("region", ["eastus9", "eu-west-9", "fr-par-1", "northpole"])
def test_a_region_that_may_be_one_is_a_warning(region: str) -> None:
    assert planned(f"{{regions: [{region}]}}").chosen is not None
    assert [p.severity for p in names.unknown(Requirements(regions=(region,)), (HERE,))] == ["warning"]


def test_a_slip_in_a_capacity_type_is_an_error() -> None:
    for word in ("spott", "Spot", "ondemand"):
        (found,) = load_text(FILE.replace("RESOURCE", f"{{capacityType: {word}}}")).problems
        assert found.severity == "error"


@given(st.text("abAB_.-1", max_size=9), st.text("abAB_.-1", max_size=9))
def test_slips_are_counted_alike_from_both_sides(one: str, other: str) -> None:
    count = names.slips_between(one, other, 3)
    assert count == names.slips_between(other, one, 3)
    assert (count == 0) == (one == other)
    assert all(names.slips_between(one, e, 2) <= 1 for e in edits(one))


# --- the command


def kaito(folder: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], resource: str) -> int:
    monkeypatch.setenv("KUBECONFIG", str(folder / "none"))
    monkeypatch.setenv("KAITO_HOME", str(folder))
    (folder / "w.yaml").write_text(FILE.replace("RESOURCE", resource).replace("name: tiny", "name: demo-phi-3"))
    with pytest.raises(SystemExit) as e:
        main([*command, str(folder / "w.yaml")])
    return int(e.value.code or 0)


@pytest.mark.parametrize("command", [["validate"], ["plan"], ["plan", "--local"], ["run", "--yes"]])
def test_the_command_says_it_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    assert kaito(tmp_path, monkeypatch, command, "{instanceType: Standard_NC24ads_A100_v5}") == 2
    out = "".join(capsys.readouterr())
    assert "w.yaml:5:" in out
    assert "did you mean Standard_NC24ads_A100_v4?" in out
    assert kaito(tmp_path, monkeypatch, command, "{regions: [eastsu]}") == 2
    assert "did you mean eastus?" in "".join(capsys.readouterr())


def test_the_command_warns_of_a_machine_that_nobody_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kaito(tmp_path, monkeypatch, ["plan"], "{instanceType: my-own-gpu-box, regions: [northpole]}") == 0
    said = capsys.readouterr().err
    assert "warning: resource.instanceType: the instance type 'my-own-gpu-box' is not in the catalogue" in said
    assert "no known region is called northpole" in said
