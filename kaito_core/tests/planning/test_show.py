"""The plan as people read it: what is an estimate is marked, long lists are cut, and what is not known is said to be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kaito_core.api import load_text
from kaito_core.cli import main
from kaito_core.cli.show import has, show, show_sum, sum_of
from kaito_core.planning import catalogue
from kaito_core.planning.choice import money, only_known
from kaito_core.planning.plan import Catalog, Plan, plan
from kaito_core.plugins import Gpu, Offer, Price, TuningFit
from kaito_core.testing.planning import GIB, OneOfEach, Sized


class Hour(Sized):
    def fit(self, *arguments: Any) -> TuningFit:
        return replace(super().fit(*arguments), seconds=3000.0)


class Registry(OneOfEach):
    def tuner(self, method: str) -> Sized:
        return Hour()


def offer(name: str = "this machine", gib: float = 16, **fields: Any) -> Offer:
    return Offer(name, cpus=4, memory=int(gib * GIB), **{"provisioner": "local", **fields})


WORKSPACE = """
apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata: {name: one}
tuning:
  preset: {name: tiny}
  method: qlora
  input: {urls: ["https://example.com/a.jsonl"]}
  output: {image: r.io/a:1, imagePushSecret: push}
"""

A100 = Gpu("A100-80GB", 79 * GIB, (8, 0))


def cloud(name: str, dollars: float | None, **fields: Any) -> Offer:
    price = Price(dollars, "a price list", "2026-01-01") if dollars is not None else None
    usual = {"gpu": A100, "provisioner": "cloud", "cloud": "azure", "region": "eastus", "price": price}
    return Offer(name, 8, 64 * GIB, gpus=2, **{**usual, **fields})


def planned(*offers: Offer) -> Plan:
    return plan(load_text(WORKSPACE).workspaces[0], Catalog(Registry(), offers))


def lines(made: Plan, capsys: pytest.CaptureFixture[str]) -> list[str]:
    show(made)
    return capsys.readouterr().out.splitlines()


def test_the_table_has_what_where_how_and_for_how_much(capsys: pytest.CaptureFixture[str]) -> None:
    told = lines(
        planned(cloud("cheap", 1.0, capacity_type="on-demand"), cloud("dear", 2.0), cloud("unpriced", None)), capsys
    )
    head = next(i for i, line in enumerate(told) if "MACHINE" in line)
    assert told[head].split("  ") != []
    assert told[head].split() == ["MACHINE", "HAS", "WHERE", "FIT", "CONFIGURATION", "TIME", "$/H", "$", "JOB"]
    first, second, third = (told[head + i].split() for i in (1, 2, 3))
    assert first[:4] == ["✔", "cheap", "2×A100-80GB", "azure/eastus"]
    assert first[-4:] == ["~50", "min", "$1.00", "~$1.00"]
    assert "~8.0 of 79.0 GiB" in told[head + 1]
    assert "1×1, 64 tokens, float32" in told[head + 1]
    assert second[-2:] == ["$2.00", "~$2.00"]
    assert third[-2:] == ["unknown", "unknown"]
    assert any("prices: a price list, 2026-01-01" in line for line in told)
    assert any("~ is an estimate" in line for line in told)


def test_what_is_here_costs_nothing_more_and_spot_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    there = offer("node", provisioner="existing")
    told = "\n".join(lines(planned(offer(), there, cloud("s", 1.0, capacity_type="spot")), capsys))
    row = next(line for line in told.splitlines() if "this machine" in line)
    assert row.split()[-2:] == ["none", "none"]
    assert "  here  " in row
    assert "  cluster  " in next(line for line in told.splitlines() if " node " in line)
    assert "is spot, and resource.capacityType asks for on-demand" in told


def test_long_lists_are_cut(capsys: pytest.CaptureFixture[str]) -> None:
    many = [cloud(f"good{i}", 1.0 + i) for i in range(13)]
    bad = [cloud(f"bad{i}", 1.0 + i, gpu=Gpu("T4", 1 * GIB, (7, 5))) for i in range(7)]
    told = lines(planned(*many, *bad), capsys)
    assert sum("good" in line for line in told) == 10
    assert sum(" bad" in line for line in told) == 5
    assert any(line.strip() == "… 3 more (--json has all)" for line in told)
    assert any(line.strip() == "✘ … 2 more (--json has all)" for line in told)
    told = lines(planned(*many[:10], *bad[:5]), capsys)
    assert not any("more (--json" in line for line in told)
    told = lines(planned(*many), capsys)
    assert sum("… 3 more" in line for line in told) == 1
    told = lines(planned(*many[:2], *bad), capsys)
    assert sum("… 2 more" in line for line in told) == 1


def test_a_number_of_parameters_that_nobody_knows_is_said_to_be_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    made = planned(offer())
    assert "1 parameters" not in "\n".join(lines(made, capsys))
    unknown = replace(made.preset, architecture=replace(made.preset.architecture, parameters=0))
    told = lines(replace(made, preset=unknown), capsys)
    assert any("unknown number of parameters" in line for line in told)
    assert not any("0.0" in line for line in told if line.strip().startswith("model"))


def test_a_slice_is_shown_as_one() -> None:
    known = catalogue.instance_types()
    assert has(known["standard_nv6ads_a10_v5"]) == "1/6 A10"
    assert has(known["standard_nc24ads_a100_v4"]) == "1×A100-80GB"
    assert has(offer()) == "4 CPUs"


@pytest.mark.parametrize(
    ("dollars", "text"),
    [(3.673, "$3.67"), (113.9328, "$113.93"), (0.0456, "$0.046"), (1e-6, "<$0.001"), (0.0, "$0.00")],
)
def test_money_never_looks_like_nothing(dollars: float, text: str) -> None:
    assert money(dollars) == text


def test_several_workspaces_have_a_sum(capsys: pytest.CaptureFixture[str]) -> None:
    plans = [planned(cloud("a", 1.0)), planned(cloud("b", 3.0)), planned(offer())]
    total = sum_of(plans)
    assert (total.cost, total.seconds, total.unknown_costs) == (4.0, 9000.0, 0)
    show_sum(plans)
    assert "3 workspaces: costs ~$4.00; training one after the other: ~2 h 30 min (estimate)" in capsys.readouterr().out


def test_a_sum_with_unknown_parts_is_no_sum(capsys: pytest.CaptureFixture[str]) -> None:
    plans = [planned(cloud("a", 1.0)), planned(cloud("b", None)), planned(offer(gib=1))]
    told = sum_of(plans).to_json()
    assert told["cost"] is None
    assert told["atLeast"]["cost"] == 1.0
    assert (told["unknownCosts"], told["withoutMachine"]) == (1, 1)
    show_sum(plans)
    assert "costs ~$1.00 and 1 of unknown cost" in capsys.readouterr().out
    show_sum(plans[1:2])
    assert "costs unknown" in capsys.readouterr().out


# --- the command

FILE = """
apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata: {name: NAME}
resource: RESOURCE
tuning:
  preset: {name: phi-3-mini-128k-instruct}
  method: qlora
  input: {urls: ["https://example.com/a.jsonl"]}
  output: {image: r.io/a:1, imagePushSecret: push}
"""


def kaito(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *resources: str,
    options: str = "",
) -> tuple[int, Any]:
    monkeypatch.setenv("KUBECONFIG", str(folder / "none"))
    monkeypatch.setenv("KAITO_HOME", str(folder))
    text = "---".join(FILE.replace("NAME", f"w{i}").replace("RESOURCE", r) for i, r in enumerate(resources))
    (folder / "w.yaml").write_text(text)
    with pytest.raises(SystemExit) as e:
        main(["plan", "--json", *options.split(), str(folder / "w.yaml")])
    out = capsys.readouterr().out
    return int(e.value.code or 0), json.loads(out) if out else None


def test_without_a_cluster_the_catalogue_is_shown_and_nothing_of_it_is_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, told = kaito(tmp_path, monkeypatch, capsys, "{}", "{gpu: {model: A100}}")
    first, second = told["plans"]
    assert len(first["candidates"]) > 190
    assert all(c["provisioner"] == "local" for c in first["candidates"] if c["chosen"])
    known = [c for c in first["candidates"] if not c["provisioner"]]
    assert all(c["rejected"] for c in known)
    assert second["refusal"]
    near = [c for c in second["candidates"] if only_known(c["rejected"] or "")]
    assert near
    assert all(c["gpu"]["model"].startswith("A100") for c in near)
    assert told["sum"]["withoutMachine"] >= 1


def test_only_this_machine_with_local(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, told = kaito(tmp_path, monkeypatch, capsys, "{}", options="--local --by time")
    (only,) = told["plans"]
    assert [c["provisioner"] for c in only["candidates"]] == ["local"]
    assert only["by"] == "time"


def test_a_named_machine_is_looked_at_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, told = kaito(tmp_path, monkeypatch, capsys, "{instanceTypes: [g6.xlarge, Standard_NC6s_v3]}")
    (only,) = told["plans"]
    assert {c["instanceType"] for c in only["candidates"]} == {"this machine", "g6.xlarge", "Standard_NC6s_v3"}
