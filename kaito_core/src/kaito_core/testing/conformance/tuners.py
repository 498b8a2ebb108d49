"""The standard tests of tuners: the laws of planning, and a real tuning on the CPU.

class TestMyTuner(TunerTests):
    plugin = "my_tuner.plugin"
    quick = {"TrainingArguments": {"max_steps": 40, "save_steps": 5}}     # training_config with which a run takes seconds
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from kaito_core.plugins.installed import TUNERS, Kind
from kaito_core.plugins.types import Change, DataFacts, Gpu, Offer, Preset, Tuner, TuningFit
from kaito_core.problems import UserError
from kaito_core.testing.conformance import plain
from kaito_core.testing.conformance.base import Kit, proper_name
from kaito_core.testing.conformance.machines import GIB, LAPTOP, SAMPLES, USUAL
from kaito_core.workloads.job import DataInput, TuningJob

STAGES = ("fetch", "check", "train", "verify", "push")

FACTS = DataFacts(rows=1000, tokens=400_000, trained_tokens=200_000, longest=900, sequences=1000)

ALL = {**USUAL, "CPU": LAPTOP}


class TunerTests(Kit):
    """See the module."""

    kind: ClassVar[Kind[Any]] = TUNERS

    samples: ClassVar[tuple[Preset, ...]] = SAMPLES
    """Models that it is asked about; one at least it must be able to tune."""
    quick: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """``training_config`` sections with which the real run of the tests takes seconds and writes checkpoints early. It needs 20 steps
    at least: it is interrupted twice."""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        super().pytest_generate_tests(metafunc)
        if "sample" in metafunc.fixturenames:
            metafunc.parametrize("sample", self.samples, ids=[p.name for p in self.samples])

    @pytest.fixture
    def tuner(self, record: Tuner) -> Tuner:
        """The tuner that is tested."""
        return record

    @pytest.fixture
    def method(self, request: pytest.FixtureRequest, record: Tuner) -> str:
        """The method of it that is tested."""
        return str(request.node.callspec.params["record"])

    @pytest.fixture
    def config(self, tuner: Tuner, method: str, sample: Preset) -> Mapping[str, Any]:
        """The defaults for this model; skipped where it cannot tune it."""
        try:
            return tuner.resolve(sample, method, None)
        except UserError as e:
            pytest.skip(f"it does not tune {sample.architecture.name}: {e.problems[0].message}")

    # --- names

    def test_its_names_are_proper(self, tuner: Tuner) -> None:
        """Of itself and of its methods."""
        assert proper_name(tuner.name), f"{tuner.name!r}: lower-case letters, digits, '.', '_' and '-'"
        assert tuner.methods, "methods is empty"
        assert all(map(proper_name, tuner.methods)), tuner.methods
        assert len(set(tuner.methods)) == len(tuner.methods), tuner.methods

    def test_what_is_missing_is_a_command(self, tuner: Tuner) -> None:
        """Empty, or what to type before it can run here."""
        assert isinstance(tuner.missing(), str)

    # --- configurations

    def test_it_tunes_something(self, tuner: Tuner, method: str) -> None:
        """One of the usual architectures at least."""
        said = []
        for sample in self.samples:
            try:
                tuner.resolve(sample, method, None)
            except UserError as e:
                said.append(str(e))
        assert len(said) < len(self.samples), "it tunes none of the models that it was asked about: " + "; ".join(said)

    def test_a_configuration_is_plain_data(
        self, tuner: Tuner, method: str, sample: Preset, config: Mapping[str, Any]
    ) -> None:
        """What goes through JSON comes back the same; asked again, the answer is the same."""
        plain.same_after_json(config)
        assert tuner.resolve(sample, method, None) == config
        assert tuner.resolve(sample, method, {}) == config

    def test_a_resolved_configuration_resolves_to_itself(
        self, tuner: Tuner, method: str, sample: Preset, config: Mapping[str, Any]
    ) -> None:
        """It is complete, and everything in it may be written by a person."""
        again = tuner.resolve(sample, method, plain.copy(config))
        assert again == config, plain.difference(config, again)

    def test_the_presets_wishes_come_before_the_defaults(
        self, tuner: Tuner, method: str, sample: Preset, config: Mapping[str, Any]
    ) -> None:
        """And the user's before those."""
        place = plain.a_number(config)
        if place is None:
            pytest.skip("no whole number in its configuration to try this with")
        section, name, value = place
        wishful = replace(sample, tuning={method: {section: {name: value + 1}}})
        assert tuner.resolve(wishful, method, None)[section][name] == value + 1
        assert tuner.resolve(wishful, method, {section: {name: value + 2}})[section][name] == value + 2

    def test_what_it_is_given_stays_as_it_is(self, tuner: Tuner, method: str, sample: Preset, config: Any) -> None:
        """`resolve` and `smaller` work on copies."""
        given = plain.copy(config)
        tuner.resolve(sample, method, given)
        list(tuner.smaller(sample, method, given))
        assert given == config, plain.difference(config, given)

    def test_unknown_settings_are_refused_by_name(
        self, tuner: Tuner, method: str, sample: Preset, config: Mapping[str, Any]
    ) -> None:
        """Every one of them at once, so that a person sees all of it."""
        problems = plain.refused(lambda: tuner.resolve(sample, method, {"NoSuchSection": {}, "Nonsense": {"a": 1}}))
        plain.all_named(problems, "NoSuchSection", "Nonsense")

    def test_unknown_fields_are_refused_by_name(
        self, tuner: Tuner, method: str, sample: Preset, config: Mapping[str, Any]
    ) -> None:
        """Of each section whose schema knows all of its fields."""
        closed = plain.closed_sections(tuner.schema())
        if not closed:
            pytest.skip("no section of its schema says additionalProperties: false")
        for section in closed:
            problems = plain.refused(lambda s=section: tuner.resolve(sample, method, {s: {"no_such_field": 1}}))  # type: ignore[misc]
            plain.all_named(problems, "no_such_field")

    def test_whatever_is_written_is_a_configuration_or_problems(
        self, tuner: Tuner, method: str, sample: Preset, config: Mapping[str, Any]
    ) -> None:
        """Bad input never gives anything but a `UserError` with words."""
        for user in plain.nonsense(config):
            try:
                tuner.resolve(sample, method, user)
            except UserError as e:
                plain.worded(e, user)

    def test_its_schema_is_complete(self, tuner: Tuner) -> None:
        """A JSON schema of the configuration: every field has a description and a default."""
        schema = tuner.schema()
        plain.same_after_json(schema)
        lacking = list(plain.lacking(schema))
        assert not lacking, f"no description or no default: {', '.join(lacking[:10])}"

    # --- layouts

    @pytest.mark.parametrize("machine", ALL)
    def test_a_layout_is_sound(
        self, tuner: Tuner, method: str, sample: Preset, config: Mapping[str, Any], machine: str
    ) -> None:
        """On the usual machines: whether it fits or not, its numbers are possible, and asked again they are the same."""
        offer = ALL[machine]
        fit = tuner.fit(sample, method, config, offer, None)
        assert isinstance(fit, TuningFit)
        wrong = list(_unsound(fit, offer, sample))
        assert not wrong, f"{machine}: {'; '.join(wrong)}"
        assert tuner.fit(sample, method, config, offer, None) == fit, "the same question has another answer"

    def test_with_data_there_are_steps(
        self, tuner: Tuner, method: str, sample: Preset, config: Mapping[str, Any]
    ) -> None:
        """And tokens; without, nobody can know."""
        fit = tuner.fit(sample, method, config, USUAL["A100"], FACTS)
        assert fit.steps is None or fit.steps >= 1
        assert fit.tokens is None or fit.tokens >= 1
        assert fit.seconds is None or fit.seconds > 0
        unknown = tuner.fit(sample, method, config, USUAL["A100"], None)
        assert unknown.tokens is None
        assert unknown.memory == fit.memory, "how much memory it needs depends on how much data there is"

    def test_more_memory_never_fits_less(
        self, tuner: Tuner, method: str, sample: Preset, config: Mapping[str, Any]
    ) -> None:
        """A larger GPU of the same kind runs what a smaller one runs."""
        before: tuple[float, TuningFit] | None = None
        for gib in (0.25, 1, 2, 4, 6, 8, 11, 14, 16, 20, 24, 32, 40, 48, 64, 80, 141, 180):
            fit = tuner.fit(sample, method, config, _with_memory(gib), None)
            if before is not None:
                smaller, known = before
                assert fit.capacity >= known.capacity, f"{gib} GiB have less room than {smaller}"
                assert fit.fits or not known.fits, f"it fits {smaller} GiB, and not {gib}"
            before = gib, fit
        assert before is not None
        assert not tuner.fit(sample, method, config, _with_memory(0.001), None).fits, "it fits into a megabyte"

    def test_smaller_is_smaller(self, tuner: Tuner, method: str, sample: Preset, config: Mapping[str, Any]) -> None:
        """Each change needs less, says so in words of its own, and is itself a whole configuration."""
        nowhere = _with_memory(0.001)
        whole = tuner.fit(sample, method, config, nowhere, None).memory.total
        changes = list(tuner.smaller(sample, method, config))
        for change in changes:
            assert isinstance(change, Change)
            assert change.description.strip()
            assert change.method in tuner.methods, f"{change.description}: it is no tuner of {change.method}"
            needs = tuner.fit(sample, change.method, change.config, nowhere, None).memory.total
            assert needs < whole, f"{change.description}: {needs:,} bytes are not less than {whole:,}"
            again = tuner.resolve(sample, change.method, plain.copy(change.config))
            assert again == change.config, f"{change.description}: {plain.difference(change.config, again)}"
        words = [c.description for c in changes]
        assert len(set(words)) == len(words), "two changes have the same words"

    # --- what is run

    @pytest.mark.parametrize("machine", ["A100", "CPU"])
    def test_its_workload_is_sound(
        self, tuner: Tuner, method: str, sample: Preset, config: Mapping[str, Any], machine: str
    ) -> None:
        """The stages of a tuning in order, each with a command and a key; the job that they read is the one that was planned."""
        job = self.job(tuner, method, sample, config, ALL[machine])
        workload = tuner.workload(job)
        plain.sound_workload(workload, gpus=job.configuration.processes if machine != "CPU" else 0)
        names = [s.name for s in workload.stages]
        assert [n for n in names if n in STAGES] == list(STAGES), f"the stages are {names}, not {', '.join(STAGES)}"
        texts = list(workload.files.values())
        assert any(_is_job(t, job) for t in texts), "none of its files is the job: KAITO_JOB names one"
        assert tuner.workload(job) == workload, "the same job has another workload"

    def test_keys_follow_what_a_stage_depends_on(
        self, tuner: Tuner, method: str, sample: Preset, config: Mapping[str, Any]
    ) -> None:
        """Another configuration trains anew and never goes on from old checkpoints; another output only pushes anew."""
        job = self.job(tuner, method, sample, config, LAPTOP)
        before = {s.name: s.key for s in tuner.workload(job).stages}
        place = plain.a_number(config)
        if place is not None:
            section, name, value = place
            changed = plain.copy(config)
            changed[section][name] = value + 1
            after = {s.name: s.key for s in tuner.workload(replace(job, config=changed)).stages}
            assert after["train"] != before["train"], f"{section}.{name} has changed, and the key of train has not"
            assert after["fetch"] == before["fetch"], "another configuration fetches the model again"
        after = {s.name: s.key for s in tuner.workload(replace(job, output_image="example.com/other:1")).stages}
        assert after["push"] != before["push"]
        assert after["train"] == before["train"], "another output trains again"

    def job(self, tuner: Tuner, method: str, preset: Preset, config: Mapping[str, Any], offer: Offer) -> TuningJob:
        """As a plan makes it."""
        return TuningJob(
            name="conformance",
            namespace="default",
            preset=preset,
            method=method,
            config=config,
            configuration=tuner.fit(preset, method, config, offer, None).configuration,
            data=DataInput(urls=("https://example.com/data.jsonl",)),
            output_image="example.com/conformance:1",
        )

    # --- for real

    @pytest.mark.slow
    def test_it_tunes(self, tuner: Tuner, method: str, tmp_path: Path) -> None:
        """On the CPU, all stages: what is left in the end is a verified adapter. With its first method also through interruptions:
        SIGTERM writes a checkpoint, SIGKILL loses little, and the same command goes on."""
        from kaito_core.testing.conformance import tuning

        tuning.tunes(tuner, method, self.quick, tmp_path, interrupted=method == tuner.methods[0])


def _with_memory(gib: float) -> Offer:
    memory = int(gib * GIB)
    return Offer("a machine", 24, 220 * GIB, Gpu("A100-80GB", memory, (8, 0)), 1, provisioner="conformance")


def _unsound(fit: TuningFit, offer: Offer, preset: Preset) -> Iterator[str]:
    where = fit.configuration
    device = "cuda" if offer.gpus else "cpu"
    if where.device != device:
        yield f"the device is {where.device}, and the machine has {offer}"
    if where.dtype not in ("bfloat16", "float16", "float32"):
        yield f"dtype is {where.dtype!r}"
    if where.dtype == "bfloat16" and offer.gpu is not None and offer.gpus and not offer.gpu.has_bfloat16:
        yield f"a {offer.gpu.model} has no bfloat16"
    if where.micro_batch < 1 or where.accumulation < 1:
        yield f"micro_batch {where.micro_batch}, accumulation {where.accumulation}"
    if not 1 <= where.sequence <= preset.architecture.context:
        yield f"{where.sequence} tokens a sequence, and the model reads {preset.architecture.context}"
    if not 1 <= where.processes <= max(1, offer.gpus):
        yield f"{where.processes} processes on {offer}"
    if not 0 <= fit.capacity <= offer.device_memory:
        yield f"a capacity of {fit.capacity:,} bytes, and the device has {offer.device_memory:,}"
    if fit.memory.total <= 0 or any(i.bytes < 0 or not i.name for i in fit.memory.items):
        yield f"memory: {fit.memory}"
    if fit.seconds is not None and not fit.seconds > 0:
        yield f"{fit.seconds} seconds"


def _is_job(text: str, job: TuningJob) -> bool:
    try:
        return bool(json.loads(text) == json.loads(job.to_json()))
    except ValueError:
        return False
