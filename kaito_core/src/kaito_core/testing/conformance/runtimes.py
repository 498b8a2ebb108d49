"""The standard tests of inference runtimes: the laws of planning, and the HTTP of a real server on the CPU.

class TestMyRuntime(RuntimeTests):
    plugin = "my_runtime.plugin"
    quick = {"my-runtime": {"max-num-seqs": 2}}      # inference_config with which a server starts in seconds
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from kaito_core.plugins.installed import RUNTIMES, Kind
from kaito_core.plugins.types import Gpu, InferenceRuntime, Offer, Preset, ServedAdapter, ServingFit
from kaito_core.problems import Problem, UserError
from kaito_core.testing.conformance import plain
from kaito_core.testing.conformance.base import Kit, proper_name
from kaito_core.testing.conformance.machines import GIB, LAPTOP, SAMPLES, USUAL
from kaito_core.workloads.serving import PORT, ServingJob

ALL = {**USUAL, "CPU": LAPTOP}

MINE = ServedAdapter("mine", image="example.com/mine:1")


class RuntimeTests(Kit):
    """See the module."""

    kind: ClassVar[Kind[Any]] = RUNTIMES

    samples: ClassVar[tuple[Preset, ...]] = SAMPLES
    """Models that it is asked about; one at least it must be able to serve."""
    quick: ClassVar[Mapping[str, Any]] = {}
    """The ``inference_config`` with which the server of the tests starts."""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        super().pytest_generate_tests(metafunc)
        if "sample" in metafunc.fixturenames:
            metafunc.parametrize("sample", self.samples, ids=[p.name for p in self.samples])

    @pytest.fixture
    def runtime(self, record: InferenceRuntime) -> InferenceRuntime:
        """The runtime that is tested."""
        return record

    @pytest.fixture
    def config(self, runtime: InferenceRuntime, sample: Preset) -> Mapping[str, Any]:
        """The defaults for this model; skipped where it cannot serve it."""
        why = runtime.serves(sample)
        if why is not None:
            pytest.skip(f"it does not serve {sample.architecture.name}: {why.message}")
        return runtime.resolve(sample, None, ())

    # --- names, and what it serves

    def test_its_name_is_proper(self, runtime: InferenceRuntime) -> None:
        """In the form in which names are stored, and the class says what it must."""
        assert proper_name(runtime.name), f"{runtime.name!r}: lower-case letters, digits, '.', '_' and '-'"
        assert type(runtime.priority) is int
        assert isinstance(runtime.missing(), str)

    def test_it_serves_something(self, runtime: InferenceRuntime) -> None:
        """One of the usual architectures at least."""
        said = [runtime.serves(s) for s in self.samples]
        assert all(p is None or isinstance(p, Problem) for p in said)
        assert None in said, "it serves none of the models that it was asked about: " + "; ".join(map(str, said))

    def test_what_it_does_not_know_it_does_not_serve(self, runtime: InferenceRuntime) -> None:
        """An architecture that nobody has heard of is refused with words, before a machine is bought."""
        strange = replace(
            self.samples[0], architecture=replace(self.samples[0].architecture, name="NoSuchModelForCausalLM")
        )
        why = runtime.serves(strange)
        assert isinstance(why, Problem), "it says that it can serve NoSuchModelForCausalLM"
        assert why.message.strip()

    # --- configurations

    def test_a_configuration_is_plain_data(
        self, runtime: InferenceRuntime, sample: Preset, config: Mapping[str, Any]
    ) -> None:
        """What goes through JSON comes back the same; asked again, the answer is the same."""
        plain.same_after_json(config)
        assert runtime.resolve(sample, None, ()) == config
        assert runtime.resolve(sample, {}, ()) == config

    def test_unknown_settings_are_refused_by_name(
        self, runtime: InferenceRuntime, sample: Preset, config: Mapping[str, Any]
    ) -> None:
        """Every one of them at once, so that a person sees all of it."""
        user = {"no-such-section": {"a": 1}, runtime.name: {"no-such-setting": 1}}
        plain.all_named(plain.refused(lambda: runtime.resolve(sample, user, ())), "no-such-section", "no-such-setting")

    def test_whatever_is_written_is_a_configuration_or_problems(
        self, runtime: InferenceRuntime, sample: Preset, config: Mapping[str, Any]
    ) -> None:
        """Bad input never gives anything but a `UserError` with words, and is not changed."""
        fields = config.get(runtime.name)
        shape = {runtime.name: fields if isinstance(fields, Mapping) else dict(config)}
        for user in plain.nonsense(shape):
            given = plain.copy(user)
            try:
                runtime.resolve(sample, given, ())
            except UserError as e:
                plain.worded(e, user)
            assert repr(given) == repr(user), f"it changed what it was given: {user!r:.200}"

    def test_names_of_adapters_are_their_own(
        self, runtime: InferenceRuntime, sample: Preset, config: Mapping[str, Any]
    ) -> None:
        """A request names one of them, or the model: two of a name are refused."""
        for wrong in ((MINE, MINE), (replace(MINE, name=sample.name),)):
            problems = plain.refused(lambda w=wrong: runtime.resolve(sample, None, w))  # type: ignore[misc]
            assert all(p.message for p in problems)

    # --- layouts

    @pytest.mark.parametrize("machine", ALL)
    def test_a_layout_is_sound(
        self, runtime: InferenceRuntime, sample: Preset, config: Mapping[str, Any], machine: str
    ) -> None:
        """On the usual machines: whether it fits or not, its numbers are possible, and asked again they are the same."""
        offer = ALL[machine]
        fit = runtime.fit(sample, config, offer, 1, ())
        assert isinstance(fit, ServingFit)
        wrong = list(_unsound(fit, offer, 1, sample))
        assert not wrong, f"{machine}: {'; '.join(wrong)}"
        assert runtime.fit(sample, config, offer, 1, ()) == fit, "the same question has another answer"

    def test_several_gpus_are_laid_out_soundly(
        self, runtime: InferenceRuntime, sample: Preset, config: Mapping[str, Any]
    ) -> None:
        """On one machine with eight, and on two machines."""
        for offer, machines in ((replace(USUAL["A100"], gpus=8), 1), (USUAL["A10G"], 2)):
            fit = runtime.fit(sample, config, offer, machines, ())
            wrong = list(_unsound(fit, offer, machines, sample))
            assert not wrong, f"{machines} × {offer}: {'; '.join(wrong)}"

    def test_more_memory_never_fits_less(
        self, runtime: InferenceRuntime, sample: Preset, config: Mapping[str, Any]
    ) -> None:
        """A larger GPU of the same kind serves what a smaller one serves, and as long a context."""
        before: tuple[float, ServingFit] | None = None
        for gib in (0.25, 1, 2, 4, 6, 8, 11, 14, 16, 20, 24, 32, 40, 48, 64, 80, 141, 180):
            fit = runtime.fit(sample, config, _with_memory(gib), 1, ())
            if before is not None:
                smaller, known = before
                assert fit.capacity >= known.capacity, f"{gib} GiB have less room than {smaller}"
                assert fit.fits or not known.fits, f"it fits {smaller} GiB, and not {gib}"
                if fit.fits and known.fits:
                    assert fit.configuration.context >= known.configuration.context, f"{gib} GiB have a shorter context"
            before = gib, fit
        assert not runtime.fit(sample, config, _with_memory(0.001), 1, ()).fits, "it fits into a megabyte"

    # --- what is run

    @pytest.mark.parametrize("machine", ["A100", "CPU"])
    def test_its_workload_is_sound(
        self, runtime: InferenceRuntime, sample: Preset, config: Mapping[str, Any], machine: str
    ) -> None:
        """Stages, the last of which serves on KAITO's port; the job that it reads is the one that was planned."""
        job = self.job(runtime, sample, config, ALL[machine])
        workload = runtime.workload(job)
        plain.sound_workload(workload, gpus=job.configuration.gpus)
        assert workload.endpoint is not None, "a workload that serves has an endpoint"
        assert workload.endpoint.port == PORT
        assert workload.endpoint.health.startswith("/")
        assert workload.endpoint.start_seconds > 0
        missing = [v for v in ("KAITO_HOST", "KAITO_PORT", "KAITO_CHAT_MODEL") if v not in workload.env]
        assert not missing, f"the environment lacks {', '.join(missing)}: kaito_core.workloads.serving makes it"
        assert any(_is_job(t, job) for t in workload.files.values()), (
            "none of its files is the job: KAITO_JOB names one"
        )
        assert runtime.workload(job) == workload, "the same job has another workload"

    def job(self, runtime: InferenceRuntime, preset: Preset, config: Mapping[str, Any], offer: Offer) -> ServingJob:
        """As a plan makes it."""
        fit = runtime.fit(preset, config, offer, 1, ())
        return ServingJob("conformance", "default", preset, runtime.name, config, fit.configuration)

    # --- for real

    @pytest.mark.slow
    def test_it_serves(self, runtime: InferenceRuntime, tmp_path: Path) -> None:
        """A tiny model on the CPU: health, models, chat, completions, streams, ``/chat``, errors, metrics, and SIGTERM."""
        from kaito_core.testing.conformance import serving, tuning

        preset = tuning.tiny_model(tmp_path / "model")
        serving.serves(runtime, preset, tmp_path / "model", self.quick, tmp_path)


def _with_memory(gib: float) -> Offer:
    return Offer("a machine", 24, 220 * GIB, Gpu("A100-80GB", int(gib * GIB), (8, 0)), 1, provisioner="conformance")


def _unsound(fit: ServingFit, offer: Offer, machines: int, preset: Preset) -> Iterator[str]:
    where = fit.configuration
    device = "cuda" if offer.gpus else "cpu"
    if where.device != device:
        yield f"the device is {where.device}, and the machine is {offer}"
    if where.dtype not in ("bfloat16", "float16", "float32"):
        yield f"dtype is {where.dtype!r}"
    if where.dtype == "bfloat16" and offer.gpu is not None and offer.gpus and not offer.gpu.has_bfloat16:
        yield f"a {offer.gpu.model} has no bfloat16"
    if not 1 <= where.context <= preset.architecture.context:
        yield f"a context of {where.context} tokens, and the model reads {preset.architecture.context}"
    if where.requests < 1 or not 0 < where.memory_share <= 1:
        yield f"{where.requests} requests at once, {where.memory_share} of the memory"
    if min(where.tensor, where.pipeline, where.data) < 1 or where.gpus > offer.gpus * machines:
        yield f"{where.gpus} GPUs (tensor {where.tensor}, pipeline {where.pipeline}, data {where.data}), and {machines} × {offer}"
    if not 0 <= fit.capacity <= offer.device_memory:
        yield f"a capacity of {fit.capacity:,} bytes, and the device has {offer.device_memory:,}"
    if fit.memory.total <= 0 or any(i.bytes < 0 or not i.name for i in fit.memory.items):
        yield f"memory: {fit.memory}"
    if fit.fits and fit.cache_tokens is not None and fit.cache_tokens < where.context:
        yield f"the cache has room for {fit.cache_tokens} tokens, and a request may have {where.context}"


def _is_job(text: str, job: ServingJob) -> bool:
    try:
        return bool(json.loads(text) == json.loads(job.to_json()))
    except ValueError:
        return False
