"""Planning an endpoint: which runtime, on which machine, and what would help when none fits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaito_core.api import Workspace, load_text
from kaito_core.cli.show import show, sum_of
from kaito_core.planning.plan import Catalog, Plan, TuningPlan, plan
from kaito_core.planning.serving import ServingPlan, TemplatePlan, serving_after
from kaito_core.plugins import Gpu, InferenceRuntime, Offer, Preset, Price, ServedAdapter, ServingFit
from kaito_core.problems import Failure, Problem, UserError
from kaito_core.testing.planning import GIB, OneOfEach
from kaito_core.testing.planning import PRESET as TINY
from kaito_core.testing.serving import Echo
from kaito_core.workloads.serving import ServingJob


class Patient(Echo):
    """Can do everything, and is not preferred."""

    name: ClassVar[str] = "patient"
    priority: ClassVar[int] = 0

    def resolve(
        self, preset: Preset, user: Mapping[str, Any] | None, adapters: tuple[ServedAdapter, ...]
    ) -> Mapping[str, Any]:
        return {"gib": 2, "die": "", "slow": 0}

    def serves(self, preset: Preset) -> Problem | None:
        return None


class OnGpus(Echo):
    name: ClassVar[str] = "on-gpus"
    priority: ClassVar[int] = 10

    def fit(
        self, preset: Preset, config: Any, offer: Offer, machines: int, adapters: tuple[ServedAdapter, ...]
    ) -> ServingFit:
        found = super().fit(preset, config, offer, machines, adapters)
        return found if offer.gpus else replace(found, capacity=0, notes=("it needs a GPU",))


class Incomplete(Echo):
    name: ClassVar[str] = "incomplete"
    priority: ClassVar[int] = 20

    def missing(self) -> str:
        return "pip install engine"


class Registry(OneOfEach):
    def __init__(self, *runtimes: InferenceRuntime, preset: Preset = TINY) -> None:
        self._runtimes, self._preset = runtimes, preset

    def preset(self, name: str) -> Preset:
        return self._preset if name == self._preset.name else super().preset(name)

    def runtimes(self) -> dict[str, InferenceRuntime]:
        return {r.name: r for r in self._runtimes}


T4 = Gpu("T4", 14 * GIB, (7, 5))
HERE = Offer("this machine", 4, 16 * GIB, provisioner="local")
RENTED = Offer(
    "rented", 8, 64 * GIB, gpu=T4, gpus=1, provisioner="cloud", cloud="azure", price=Price(2.0, "x", "2026-01-01")
)


def workspace(
    inference: str = "preset: {name: tiny}", resource: str = "{}", annotations: str = "{}", tuning: str = ""
) -> Workspace:
    text = f"""
apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata: {{name: one, annotations: {annotations}}}
resource: {resource}
{tuning}
{f"inference: {{{inference}}}" if inference else ""}
"""
    documents = load_text(text)
    assert not [p for p in documents.problems if p.severity == "error"], documents.problems
    return documents.workspaces[0]


TUNING = """
tuning:
  preset: {name: tiny}
  method: qlora
  input: {urls: ["https://example.com/a.jsonl"]}
  output: {image: "r.io/a:1", imagePushSecret: push}
"""


def served(
    *offers: Offer,
    runtimes: tuple[InferenceRuntime, ...] = (Echo(),),
    maps: Any = None,
    preset: Preset = TINY,
    **fields: str,
) -> ServingPlan:
    catalog = Catalog(Registry(*runtimes, preset=preset), offers or (HERE,), config_maps=maps or {})
    made = plan(workspace(**fields), catalog)
    assert isinstance(made, ServingPlan)
    return made


def refused(**fields: Any) -> list[Problem]:
    with pytest.raises(UserError) as e:
        served(**fields)
    return list(e.value.problems)


# --- which runtime


def test_the_preferred_runtime_that_fits_serves_it() -> None:
    made = served(HERE, runtimes=(Patient(), Echo()))
    assert made.runtime.name == "echo"
    assert made.why_runtime == "preferred to patient"
    job = made.job
    assert (job.runtime, job.chat_model, job.machines) == ("echo", "tiny", 1)
    assert ServingJob.from_json(job.to_json()) == job
    assert made.workload.stages[-1].name == "serve"


def test_each_machine_has_the_runtime_that_fits_there() -> None:
    made = served(HERE, RENTED, runtimes=(OnGpus(), Patient()))
    assert {c.offer.instance_type: c.runtime for c in made.candidates} == {
        "this machine": "patient",
        "rented": "on-gpus",
    }
    assert made.runtime.name == "patient"
    assert made.why_runtime == "on-gpus is preferred where it fits"
    assert "on-gpus does not fit there: it needs a GPU" in made.candidates[0].fit.notes
    rented = next(c for c in made.candidates if c.offer is RENTED)
    assert made.on(rented).runtime.name == "on-gpus"
    assert made.on(rented).job.runtime == "on-gpus"


def test_here_what_is_installed_completely_goes_first() -> None:
    made = served(HERE, RENTED, runtimes=(Incomplete(), Echo()))
    assert {c.offer.instance_type: c.runtime for c in made.candidates} == {
        "this machine": "echo",
        "rented": "incomplete",
    }
    assert any("pip install engine" in n for n in made.candidates[0].fit.notes)
    assert served(HERE, runtimes=(Incomplete(),)).runtime.name == "incomplete"


def test_the_annotation_names_the_runtime() -> None:
    made = served(HERE, runtimes=(Echo(), Patient()), annotations="{kaito.sh/runtime: Patient}")
    assert (made.runtime.name, made.why_runtime) == ("patient", "named by the annotation kaito.sh/runtime")


def test_an_unknown_runtime_is_refused_with_what_there_is() -> None:
    (problem,) = refused(annotations="{kaito.sh/runtime: ecko}")
    assert problem.field == "metadata.annotations.kaito.sh/runtime"
    assert "there is echo" in problem.message
    assert problem.remedy == "did you mean echo?"
    (problem,) = refused(annotations="{kaito.sh/runtime: vllm}")
    assert problem.remedy == "you need `pip install kaito-runtime-vllm`"
    (problem,) = refused(runtimes=())
    assert "no installed plugin serves models" in problem.message
    assert "kaito-runtime-transformers" in problem.remedy


def test_a_model_that_no_runtime_serves_is_refused_with_every_reason() -> None:
    silent = replace(TINY, architecture=replace(TINY.architecture, name="Silent"))
    (problem,) = refused(preset=silent)
    assert (problem.message, problem.field) == ("echo: it only repeats", "inference.preset.name")
    made = served(HERE, runtimes=(Echo(), Patient()), preset=silent)
    assert made.why_runtime == "the only one that can; echo cannot: it only repeats"


def test_an_adapter_that_one_runtime_cannot_mix_goes_to_another() -> None:
    half = 'preset: {name: tiny}, adapters: [{source: {name: a, image: "r.io/a:1"}, strength: "0.5"}]'
    (problem,) = refused(inference=half)
    assert problem.field == "inference.adapters[0].strength"
    made = served(HERE, inference=half, runtimes=(Echo(), Patient()))
    assert made.runtime.name == "patient"
    assert made.adapters == (ServedAdapter("a", "r.io/a:1", None, 0.5),)
    named = {"inference": half, "runtimes": (Echo(), Patient()), "annotations": "{kaito.sh/runtime: echo}"}
    assert refused(**named)[0].field == "inference.adapters[0].strength"


# --- its configuration


def config(text: str) -> dict[str, Any]:
    return {"mine": {"inference_config.yaml": text}}


def test_the_users_settings_reach_the_runtime() -> None:
    with_config = "preset: {name: tiny}, config: mine"
    assert served(HERE, inference=with_config, maps=config("echo: {gib: 3}")).config["gib"] == 3
    assert served(HERE, inference="preset: {name: tiny}, config: inference-params-template").config["gib"] == 8
    assert served(HERE, inference=with_config, maps=config("")).config["gib"] == 8


@pytest.mark.parametrize(
    ("maps", "words"),
    [
        ({}, "'mine' is not there"),
        ({"mine": {}}, "has no key 'inference_config.yaml'"),
        (config("- 1"), "must be a mapping"),
        (config("a: [") , "is not YAML"),
    ],
)  # fmt: skip
def test_a_configuration_that_cannot_be_read_is_refused(maps: Any, words: str) -> None:
    (problem,) = refused(inference="preset: {name: tiny}, config: mine", maps=maps)
    assert words in problem.message
    assert problem.field == "inference.config"


def test_a_setting_with_an_error_is_never_passed_over_for_another_runtime() -> None:
    (problem,) = refused(
        inference="preset: {name: tiny}, config: mine", maps=config("echo: {bad: 1}"), runtimes=(Echo(), Patient())
    )
    assert problem.field == "inference_config.echo.bad"


def test_everything_that_is_wrong_is_said_at_once() -> None:
    problems = refused(inference="preset: {name: nobody}, config: gone", annotations="{kaito.sh/runtime: nothing}")
    assert {p.field for p in problems} == {
        "inference.preset.name",
        "inference.config",
        "metadata.annotations.kaito.sh/runtime",
    }


def test_a_broken_runtime_is_blamed_by_name() -> None:
    class Broken(Echo):
        def fit(self, *_: Any) -> ServingFit:
            raise ZeroDivisionError("oh")

    with pytest.raises(Failure, match="the runtime 'echo' broke: ZeroDivisionError: oh"):
        served(HERE, runtimes=(Broken(),))


# --- which machine


def test_the_cheapest_hour_wins_and_there_is_no_time() -> None:
    dear = replace(RENTED, instance_type="dear", price=Price(9.0, "x", "2026-01-01"))
    made = served(dear, RENTED)
    assert [c.offer.instance_type for c in made.candidates] == ["rented", "dear"]
    assert [(c.cost, c.seconds) for c in made.candidates] == [(None, None), (None, None)]
    assert sum_of([made]).per_hour == 2.0


def test_a_refusal_says_the_smallest_change() -> None:
    big = {"inference": "preset: {name: tiny}, config: mine", "maps": config("echo: {gib: 20}")}
    made = served(RENTED, **big)
    assert made.refusal is not None
    assert "needs 20.0 GiB, has 14.0 GiB" in made.refusal.message
    assert "it fits rented with the defaults in place of inference.config (needs 8.0 GiB" in made.refusal.remedy
    other = served(RENTED, **big, annotations="{kaito.sh/runtime: echo}", runtimes=(Echo(), Patient()))
    assert other.refusal is not None
    assert "it fits rented with the runtime patient (needs 2.0 GiB of 14.0 GiB)" in other.refusal.remedy

    class Big(Echo):
        def resolve(self, *_: Any) -> Mapping[str, Any]:
            return {"gib": 20, "die": "", "slow": 0}

    more = served(RENTED, runtimes=(Big(),))
    assert more.refusal is not None
    assert "it fits rented with resource.count 2 (needs 10.0 GiB of 14.0 GiB)" in more.refusal.remedy
    alone = served(HERE, runtimes=(Big(),))
    assert alone.refusal is not None
    assert "resource.count" not in alone.refusal.remedy, "there is one of this machine"
    with pytest.raises(UserError, match="needs 20"):
        _ = more.job


def test_several_machines_serve_together_and_this_one_alone() -> None:
    made = served(RENTED, resource="{count: 2}")
    assert made.job.machines == 2
    assert made.job.configuration.pipeline == 2
    assert served(HERE, resource="{count: 2}").job.machines == 1


@given(
    st.lists(st.tuples(st.integers(1, 40), st.one_of(st.none(), st.integers(1, 50))), min_size=1, max_size=6),
    st.integers(1, 40),
)
def test_what_is_chosen_fits_and_nothing_that_fits_has_a_cheaper_hour(machines: list[Any], gib: int) -> None:
    offers = tuple(
        replace(RENTED, instance_type=f"m{i}", gpu=replace(T4, memory=m * GIB), price=Price(p, "x", "y") if p else None)
        for i, (m, p) in enumerate(machines)
    )
    made = served(*offers, inference="preset: {name: tiny}, config: mine", maps=config(f"echo: {{gib: {gib}}}"))
    fitting = [c for c in made.candidates if c.fit.fits]
    assert (made.chosen is None) == (not fitting) == (made.refusal is not None)
    if made.chosen:
        assert made.chosen.fit.fits
        prices = [c.offer.price.per_hour for c in fitting if c.offer.price]
        if prices:
            assert made.chosen.offer.price is not None
            assert made.chosen.offer.price.per_hour == min(prices)
    json.dumps(made.to_json())


# --- after a tuning


def test_a_tuning_is_planned_as_a_tuning_and_served_afterwards() -> None:
    one = workspace(inference="config: mine, policy: always", tuning=TUNING)
    catalog = Catalog(Registry(Echo()), (HERE,), config_maps=config("echo: {gib: 3}"))
    assert isinstance(plan(one, catalog), TuningPlan)
    then = serving_after(one, catalog)
    assert then.preset is TINY
    assert then.config["gib"] == 3
    assert then.adapters == (ServedAdapter("one", "r.io/a:1"),)
    assert then.job.chat_model == "one"
    assert then.job.secrets.registry == ("push",)
    assert one.serving_policy() == "always"


def test_further_adapters_come_after_the_tuned_one() -> None:
    more = 'adapters: [{source: {name: b, image: "r.io/b:1"}, strength: "0.5"}]'
    catalog = Catalog(Registry(Patient()), (HERE,))
    then = serving_after(workspace(inference=more, tuning=TUNING), catalog, ServedAdapter("one", volume={"x": {}}))
    assert [a.name for a in then.adapters] == ["one", "b"]
    with pytest.raises(UserError) as e:
        serving_after(workspace(inference=more, tuning=TUNING), Catalog(Registry(Echo()), (HERE,)))
    assert e.value.problems[0].field == "inference.adapters[0].strength"
    same = more.replace("name: b", "name: one")
    with pytest.raises(UserError, match="is that of the adapter which is tuned here"):
        serving_after(workspace(inference=same, tuning=TUNING), catalog)


def test_another_model_than_the_tuned_one_is_refused() -> None:
    class Two(Registry):
        def preset(self, name: str) -> Preset:
            return replace(TINY, name=name)

    with pytest.raises(UserError, match="is the tuned one, tiny, and not other"):
        serving_after(workspace("preset: {name: other}", tuning=TUNING), Catalog(Two(Echo()), (HERE,)))


@pytest.mark.parametrize(
    ("inference", "annotations", "tuning", "policy"),
    [
        ("preset: {name: tiny}", "{}", "", "always"),
        ("preset: {name: tiny}, policy: onDemand", "{}", "", "onDemand"),
        ("", "{}", TUNING, "onDemand"),
        ("", "{kaito.sh/serve-after-tuning: never}", TUNING, "never"),
        ("", "{kaito.sh/serve-after-tuning: sometimes}", TUNING, "onDemand"),
        ("policy: always", "{kaito.sh/serve-after-tuning: never}", TUNING, "always"),
        ("preset: {name: tiny}", "{kaito.sh/serve-after-tuning: never}", "", "always"),
    ],
)
def test_when_a_model_is_served(inference: str, annotations: str, tuning: str, policy: str) -> None:
    one = workspace(inference, annotations=annotations, tuning=tuning)
    assert one.serving_policy() == policy
    assert workspace("", tuning=TUNING).serving_policy("never") == "never"


# --- a template


def test_a_template_gets_a_machine_with_the_gpus_that_it_asks_for() -> None:
    pods = "template: {spec: {containers: [{name: c, resources: {limits: {nvidia.com/gpu: %s}}}]}}"
    catalog = Catalog(Registry(), (HERE, RENTED))
    made = plan(workspace(pods % 1), catalog)
    assert isinstance(made, TemplatePlan)
    assert made.chosen is not None
    assert made.chosen.offer is RENTED
    assert {c.rejected for c in made.candidates} == {"", "has 0 GPUs, and the template asks for 1"}
    assert plan(workspace(pods % 64), catalog).refusal is not None
    with pytest.raises(UserError, match="a pod template"):
        _ = made.job
    json.dumps(made.to_json())


@pytest.mark.parametrize(
    "template", ["{}", "{spec: 3}", "{spec: {containers: [3, {resources: {limits: {nvidia.com/gpu: x}}}]}}"]
)
def test_a_strange_template_asks_for_no_gpu(template: str) -> None:
    assert plan(workspace(f"template: {template}"), Catalog(Registry(), (HERE,))).chosen is not None


# --- for people


def told(made: Plan, capsys: pytest.CaptureFixture[str]) -> str:
    show(made)
    return capsys.readouterr().out


def test_people_see_what_how_where_and_for_how_much(capsys: pytest.CaptureFixture[str]) -> None:
    adapters = 'preset: {name: tiny}, adapters: [{source: {name: a, image: "r.io/a:1"}}]'
    text = told(served(RENTED, inference=adapters, resource="{count: 2}", preset=replace(TINY, gated=True)), capsys)
    assert "serve tiny with echo" in text
    assert "runtime  echo, the only one installed" in text
    assert "adapters a from r.io/a:1" in text
    assert "8 requests at once of up to 4,096 tokens, bfloat16 on GPU, 2 stages of layers follow one another" in text
    assert "licence mit" in text
    assert "gated    its hub" in text
    row = next(line for line in text.splitlines() if "rented" in line)
    assert "8 at once, 4096 tokens, bfloat16, PP 2, 2 machines" in row
    assert row.split()[-2:] == ["echo", "$4.00"]
    head = next(line for line in text.splitlines() if "MACHINE" in line)
    assert head.split() == ["MACHINE", "HAS", "WHERE", "FIT", "CONFIGURATION", "RUNTIME", "$/H"]
    assert "the cheapest hour first" in text


def test_a_template_and_a_refusal_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    text = told(plan(workspace("template: {spec: {}}"), Catalog(Registry(), (RENTED,))), capsys)
    assert "a pod template of your own" in text
    assert "$2.00" in text
    big = told(served(RENTED, inference="preset: {name: tiny}, config: mine", maps=config("echo: {gib: 20}")), capsys)
    assert "nothing fits: " in big


def test_the_json_says_the_runtime_of_every_machine() -> None:
    made = served(
        HERE, RENTED, runtimes=(OnGpus(), Patient()), inference="preset: {name: tiny}, policy: onDemand, idleAfter: 5m"
    )
    data = json.loads(json.dumps(made.to_json()))
    assert data["task"] == "inference"
    assert data["runtime"]["name"] == "patient"
    assert [c["runtime"] for c in data["candidates"]] == ["patient", "on-gpus"]
    assert (data["policy"], data["idleAfter"]) == ("onDemand", 300.0)
    assert data["candidates"][0]["cacheTokens"] == 32_768
