"""Which machine is taken: the cheapest, or the fastest; and each that is not says why."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaito_core.api import Workspace, load_text
from kaito_core.planning import catalogue
from kaito_core.planning.choice import By, is_free
from kaito_core.planning.images import Images
from kaito_core.planning.plan import Catalog, Plan, plan, requirements
from kaito_core.plugins import Gpu, Offer, Price, TuningFit
from kaito_core.testing.planning import GIB, OneOfEach, Sized

HOUR = 3600.0


class Timed(Sized):
    """Knows how long a machine takes: an hour on a machine of one CPU, half of it on one of two."""

    asked: ClassVar[list[Offer]] = []

    def fit(self, preset: Any, method: str, config: Any, offer: Offer, data: Any) -> TuningFit:
        self.asked.append(offer)
        seconds = HOUR / offer.cpus if offer.cpus < 50 else None  # of the largest nobody knows
        return replace(super().fit(preset, method, config, offer, data), seconds=seconds)


class Registry(OneOfEach):
    def tuner(self, method: str) -> Sized:
        return Timed()


T4 = Gpu("T4", 14 * GIB, (7, 5))
A100 = Gpu("A100-80GB", 79 * GIB, (8, 0))


def machine(name: str, dollars: float | None = 1.0, *, cpus: int = 1, gpu: Gpu | None = A100, **fields: Any) -> Offer:
    price = Price(dollars, "a test", "2026-01-01") if dollars is not None else None
    given_fields = {"provisioner": "cloud", "gpus": 1 if gpu else 0, "memory": 64 * GIB, "region": "eastus", **fields}
    return Offer(name, cpus=cpus, gpu=gpu, price=price, **given_fields)


def workspace(resource: str = "{}") -> Workspace:
    text = f"""
apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata: {{name: one}}
resource: {resource}
tuning:
  preset: {{name: tiny}}
  method: qlora
  input: {{urls: ["https://example.com/a.jsonl"]}}
  output: {{image: r.io/a:1, imagePushSecret: push}}
"""
    documents = load_text(text)
    assert documents.problems == ()
    return documents.workspaces[0]


def planned(*offers: Offer, resource: str = "{}", by: By = "cost", images: Images | None = None) -> Plan:
    return plan(workspace(resource), Catalog(Registry(), offers, images=images or Images()), by)


def names(made: Plan) -> list[str]:
    return [c.offer.instance_type for c in made.candidates if not c.rejected]


def rejected(made: Plan) -> dict[str, str]:
    return {c.offer.instance_type: c.rejected for c in made.candidates if c.rejected}


# --- the order


def test_the_cheapest_job_wins_and_not_the_cheapest_hour() -> None:
    slow, fast = machine("slow", 1.0, cpus=1), machine("fast", 3.0, cpus=8)
    made = planned(slow, fast)
    assert names(made) == ["fast", "slow"]
    assert [c.cost for c in made.candidates] == [3.0 * 1050 / HOUR, 1.0 * 4200 / HOUR]


def test_a_short_job_does_not_take_the_dearest_machine() -> None:
    """The fastest machine is paid for ten minutes of starting up, too."""
    assert names(planned(machine("fastest", 100.0, cpus=49), machine("slow", 1.0, cpus=1)))[0] == "slow"


def test_by_time_the_fastest_wins_whatever_it_costs() -> None:
    slow, fast = machine("slow", 1.0, cpus=1), machine("fast", 90.0, cpus=8)
    assert names(planned(slow, fast)) == ["slow", "fast"]
    made = planned(slow, fast, by="time")
    assert names(made) == ["fast", "slow"]
    assert made.to_json()["by"] == "time"


def test_an_unknown_price_comes_last_and_an_unknown_time_after_known_ones() -> None:
    offers = machine("unpriced", None), machine("untimed", 0.01, cpus=99), machine("known", 50.0)
    made = planned(*offers)
    assert names(made) == ["known", "untimed", "unpriced"]
    assert [c.cost for c in made.candidates] == [50.0 * 4200 / HOUR, None, None]


def test_without_any_time_the_price_of_an_hour_decides() -> None:
    assert names(planned(machine("dear", 2.0, cpus=99), machine("cheap", 1.0, cpus=99))) == ["cheap", "dear"]


def test_what_is_there_costs_nothing_more_and_no_gpu_is_the_last_choice() -> None:
    bought = machine("bought", 0.01)
    there = machine("there", None, provisioner="existing", region="")
    no_gpu = machine("no-gpu", None, gpu=None, provisioner="existing", region="")
    assert names(planned(no_gpu, bought, there)) == ["there", "bought", "no-gpu"]


def test_what_runs_here_runs_nowhere_else() -> None:
    here = machine("this machine", None, gpu=None, provisioner="local", region="")
    assert names(planned(machine("bought", 0.01), here)) == ["this machine", "bought"]
    assert names(planned(machine("bought", 0.01), here, by="time")) == ["this machine", "bought"]


def test_the_users_own_order_is_kept() -> None:
    offers = machine("a", 1.0), machine("b", 2.0), machine("c", 0.5)
    made = planned(*offers, resource="{instanceTypes: [B, a]}")
    assert names(made) == ["b", "a"]
    assert rejected(made) == {"c": "another machine is named in resource.instanceType"}


# --- what is not taken


@pytest.mark.parametrize(
    ("resource", "reason"),
    [
        ("{gpu: {model: A100}}", "has T4, and resource.gpu.model asks for A100"),
        ("{gpu: {count: 2}}", "has 1 GPU, and resource.gpu.count asks for 2"),
        ("{gpu: {memory: 40Gi}}", "has 14.0 GiB per GPU, and resource.gpu.memory asks for 40.0 GiB"),
        ("{regions: [westus]}", "is in eastus, and resource.regions asks for westus"),
        ("{zones: [eastus-2]}", "is in eastus-1, and resource.zones asks for eastus-2"),
        ("{capacityType: spot}", "is on-demand, and resource.capacityType asks for spot"),
        ("{maxPricePerHour: 0.5}", "costs $1.00 an hour, above resource.maxPricePerHour of $0.50"),
        ("{maxCost: 0.25}", "the job would cost about $1.17 (estimate), above resource.maxCost of $0.25"),
    ],
)
def test_a_machine_that_is_not_as_asked_for_says_what_it_lacks(resource: str, reason: str) -> None:
    made = planned(machine("m", gpu=T4, zone="eastus-1"), resource=resource)
    assert rejected(made) == {"m": reason}
    assert made.refusal is not None
    assert reason in made.refusal.message
    assert made.refusal.remedy


def test_an_unknown_price_is_not_below_a_limit() -> None:
    for field in ("maxPricePerHour", "maxCost"):
        made = planned(machine("m", None), resource=f"{{{field}: 100}}")
        assert rejected(made) == {"m": f"its price is unknown, and resource.{field} is set"}


def test_limits_of_money_do_not_concern_what_is_there() -> None:
    there = machine("there", None, provisioner="existing", region="")
    made = planned(there, resource="{maxPricePerHour: 0.01, maxCost: 0.01, capacityType: spot, regions: [westus]}")
    assert names(made) == ["there"]


def test_while_the_time_is_unknown_nobody_can_say_that_a_job_is_too_dear() -> None:
    assert names(planned(machine("m", 5.0, cpus=99), resource="{maxCost: 0.01}")) == ["m"]


@pytest.mark.parametrize(
    ("wanted", "model", "fine"),
    [
        ("A100", "A100-40GB", True),
        ("a100", "A100-SXM4-80GB", True),
        ("A100-80", "A100-80GB", True),
        ("A100-80GB", "A100-40GB", False),
        ("A10", "A100-80GB", False),
        ("A10", "A10G", False),
        ("L4", "L40S", False),
        ("V100-16GB", "Tesla-V100-PCIE-16GB", True),
        ("RTX-PRO-6000", "RTX-PRO-6000-Blackwell-Server-Edition", True),
    ],
)
def test_a_gpu_is_asked_for_by_words_of_its_name(wanted: str, model: str, fine: bool) -> None:
    made = planned(machine("m", gpu=Gpu(model, 79 * GIB, (8, 0))), resource=f"{{gpu: {{model: {wanted}}}}}")
    assert bool(names(made)) is fine


def test_what_nobody_can_get_is_shown_with_its_figures_and_never_chosen() -> None:
    (known,) = [o for o in catalogue.offers("azure") if o.instance_type == "Standard_NC24ads_A100_v4"]
    made = planned(known)
    assert made.chosen is None
    (candidate,) = made.candidates
    assert candidate.rejected == "no installed plugin can get it (pip install kaito-provisioner-aks)"
    assert candidate.cost is not None
    assert candidate.fit.fits
    assert made.refusal is not None
    assert "pip install kaito-provisioner-aks" in made.refusal.remedy


def test_what_an_installed_plugin_gets_from_a_cluster_says_so() -> None:
    (known,) = [o for o in catalogue.offers("azure") if o.instance_type == "Standard_NC24ads_A100_v4"]
    made = plan(workspace(), Catalog(Registry(), (known,), installed=frozenset({"aks"})))
    assert made.candidates[0].rejected == "it can only be got from a cluster, by the provisioner aks (--context NAME)"
    assert made.refusal is not None
    assert "would do: it can only be got from a cluster" in made.refusal.remedy


def test_what_kaito_cannot_use_is_not_taken_from_anybody() -> None:
    arm = replace(catalogue.instance_types()["g5g.xlarge"], provisioner="cloud")
    assert "ARM" in rejected(planned(arm))["g5g.xlarge"]


def test_auto_takes_the_cheapest_of_spot_and_on_demand() -> None:
    offers = machine("m", 3.0), machine("m", 1.0, capacity_type="spot")
    made = planned(*offers, resource="{capacityType: auto}")
    assert [c.offer.capacity_type for c in made.candidates] == ["spot", "on-demand"]
    assert planned(*offers).chosen == made.candidates[1]


def test_a_slip_of_the_pen_in_a_gpu_is_seen() -> None:
    for offers in ((), (machine("m", region="westus"),)):
        made = planned(*offers, resource="{gpu: {model: A1000}}")
        assert made.refusal is not None
        assert "no known GPU is called A1000; did you mean A10" in made.refusal.remedy


# --- a machine that is given up by its cloud


def test_a_retired_machine_that_is_there_is_used() -> None:
    v100 = catalogue.instance_types()["standard_nc6s_v3"]
    there = replace(v100, retired="", provisioner="existing")
    made = planned(there, resource="{instanceType: Standard_NC6s_v3}", images=Images(tuner=(7, 0)))
    assert names(made) == ["Standard_NC6s_v3"]


def test_a_retired_machine_that_is_nowhere_names_the_cheapest_that_fits_instead() -> None:
    v100 = catalogue.instance_types()["standard_nc6s_v3"]
    made = planned(v100, resource="{instanceType: Standard_NC6s_v3}")
    reason = rejected(made)["Standard_NC6s_v3"]
    assert "retire on 2025-09-30; the cheapest that fits instead is Standard_N" in reason
    assert "an hour in eastus)" in reason
    assert made.refusal is not None
    assert reason in made.refusal.message


def test_the_replacement_is_as_the_workspace_asks() -> None:
    v100 = catalogue.instance_types()["standard_nc6s_v3"]
    made = planned(v100, resource="{instanceType: Standard_NC6s_v3, gpu: {model: A100}, regions: [westeurope]}")
    assert "(1×A100-80GB" in rejected(made)["Standard_NC6s_v3"]
    assert "in westeurope)" in rejected(made)["Standard_NC6s_v3"]


# --- whatever is offered


def test_a_fit_does_not_depend_on_place_and_price() -> None:
    Timed.asked.clear()
    offers = [machine("m", 1.0 + i, region=f"r{i}") for i in range(50)]
    assert len(planned(*offers).candidates) == 50
    assert len(Timed.asked) == 1


MACHINES = st.builds(
    machine,
    st.sampled_from(["a", "b", "c", "Standard_NC6s_v3", "g5g.xlarge"]),
    st.one_of(st.none(), st.floats(0.01, 100)),
    cpus=st.sampled_from([1, 2, 8, 99]),
    gpu=st.sampled_from([None, T4, A100]),
    provisioner=st.sampled_from(["", "existing", "local", "cloud", "other"]),
    capacity_type=st.sampled_from(["spot", "on-demand"]),
    region=st.sampled_from(["", "eastus", "westus"]),
    memory=st.sampled_from([4 * GIB, 64 * GIB]),
    cloud=st.sampled_from(["", "azure", "aws"]),
)
RESOURCES = st.fixed_dictionaries(
    {},
    optional={
        "instanceTypes": st.lists(st.sampled_from(["a", "b", "Standard_NC6s_v3"]), max_size=2),
        "gpu": st.sampled_from([{"model": "T4"}, {"memory": "20Gi"}, {"count": 2}]),
        "capacityType": st.sampled_from(["spot", "on-demand", "auto"]),
        "regions": st.sampled_from([["eastus"], ["westus", "eastus"]]),
        "maxPricePerHour": st.sampled_from([0.5, 20]),
        "maxCost": st.sampled_from([0.5, 20]),
    },
)


@settings(deadline=None)
@given(st.lists(MACHINES, max_size=8), RESOURCES, st.sampled_from(["cost", "time"]))
def test_the_order_holds_whatever_is_offered(offers: list[Offer], resource: dict[str, Any], by: By) -> None:
    made = planned(*offers, resource=str(resource).replace("'", '"'), by=by)
    usable = [c for c in made.candidates if not c.rejected]
    wanted = requirements(made.workspace)
    # Everything is there once, the usable ones first; those that are not taken say why.
    assert sorted(map(repr, offers)) == sorted(repr(c.offer) for c in made.candidates)
    assert list(made.candidates[: len(usable)]) == usable
    assert (made.chosen is None) == (made.refusal is not None)
    for candidate in made.candidates:
        assert candidate.cost is None or candidate.cost > 0
        assert (candidate.cost is None) == (candidate.offer.price is None or candidate.fit.seconds is None)
    for candidate in usable:
        offer = candidate.offer
        assert offer.provisioner
        assert candidate.fit.fits
        if not is_free(offer):
            price = offer.price
            assert offer.capacity_type in wanted.capacity_types
            if wanted.max_price_per_hour is not None:
                assert price is not None
                assert price.per_hour <= wanted.max_price_per_hour
    bought = [c for c in usable if not is_free(c.offer)]
    for before, after in itertools.pairwise(bought):
        alike = bool(before.offer.gpus) == bool(after.offer.gpus) and (
            before.offer.instance_type == after.offer.instance_type or not wanted.instance_types
        )
        if not alike:
            continue
        if by == "cost":
            assert before.offer.price is not None or after.offer.price is None
            if after.cost is not None:
                assert before.cost is not None
                assert before.cost <= after.cost
        elif after.fit.seconds is not None:
            assert before.fit.seconds is not None
            assert before.fit.seconds <= after.fit.seconds


@settings(deadline=None)
@given(st.lists(MACHINES, max_size=6), st.randoms())
def test_the_order_of_the_offers_makes_no_machine_dearer(offers: list[Offer], random: Any) -> None:
    shuffled = list(offers)
    random.shuffle(shuffled)
    one, two = planned(*offers), planned(*shuffled)
    assert (one.chosen is None) == (two.chosen is None)
    if one.chosen and two.chosen and not is_free(one.chosen.offer):
        assert one.chosen.cost == two.chosen.cost
