"""A real tuning on the CPU: all stages as processes, interrupted and killed on the way, and what they leave behind."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest

from kaito_core.models.folder import read_folder
from kaito_core.plugins.types import Preset, Tuner, TuningFit
from kaito_core.testing.conformance.machines import LAPTOP
from kaito_core.testing.conformance.stages import Ended, Running, Stages
from kaito_core.workloads.job import DataInput, TuningJob

_TERMINATED: Final = (128 + signal.SIGTERM, -signal.SIGTERM)

_THINGS = ("fox yips", "owl hoots", "cat meows", "dog barks", "cow moos", "hen clucks", "pig oinks", "bee buzzes")


def conversations(path: Path, rows: int = 64) -> Path:
    """Small training data: questions about animals, each row another one."""
    lines = []
    for number in range(rows):
        animal, sound = _THINGS[number % len(_THINGS)].split()
        asked = f"What does the {animal} number {number} say?"
        told = " ".join([f"The {animal} {sound}."] * (1 + number % 3))
        lines.append(
            json.dumps({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]})
        )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def tiny_model(folder: Path) -> Preset:
    """A model as small as can be, in ``folder``, and its preset."""
    from kaito_core.scaffold import tiny_model as maker

    maker.make(folder)
    return replace(read_folder(folder).preset, name="conformance")


def prepared(
    tuner: Tuner, method: str, preset: Preset, model: Path, user: Mapping[str, Any], folder: Path
) -> tuple[Stages, TuningFit]:
    """The stages of a tuning of the model in the folder ``model``, the first two of them done; and its layout on the CPU."""
    missing = tuner.missing()
    if missing:
        pytest.skip(f"the tuner {tuner.name} cannot run here: {missing}")
    for module in ("tokenizers", "jinja2", "pyarrow"):
        pytest.importorskip(module, reason=f"{module} is not installed: pip install 'kaito-core[data]'")
    config = tuner.resolve(preset, method, user or None)
    fit = tuner.fit(preset, method, config, LAPTOP, None)
    job = TuningJob(
        name="conformance",
        namespace="default",
        preset=preset,
        method=method,
        config=config,
        configuration=fit.configuration,
        data=DataInput(urls=(str(conversations(folder / "data.jsonl")),)),
        output_volume={"hostPath": {"path": str(folder / "output")}},
        model_folder=str(model),
    )
    (folder / "output").mkdir()
    stages = Stages(folder / "run", tuner.workload(job))
    stages.run("fetch")
    stages.run("check")
    return stages, fit


def tunes(tuner: Tuner, method: str, quick: Mapping[str, Any], folder: Path, *, interrupted: bool) -> None:
    """See `kaito_core.testing.conformance.tuners.TunerTests.test_it_tunes`."""
    preset = tiny_model(folder / "model")
    stages, _ = prepared(tuner, method, preset, folder / "model", quick, folder)
    too_quick = interrupted and not _interrupted(stages)
    ended = stages.start("train").ended()
    assert ended.code == 0, f"the stage train ended with {ended.code}:\n{ended.tail}"
    assert stages.events("train", ["finished"]), "it ended well, and has no event `finished`"
    _adapter(stages.results / "adapter", preset)
    stages.run("verify")
    stages.run("push")
    _adapter(folder / "output", preset)
    if too_quick:
        pytest.skip(
            "it trains and leaves an adapter, but was done before it could be interrupted: set `quick` to more steps"
        )


LOWEST, HIGHEST = 0.8, 2.5
"""Of the memory that a small copy really takes: what an estimate may be. Far less, and a job dies on a machine that the plan has
chosen; far more, and machines are ruled out that would do. A small model is mostly what the libraries take."""


def measured(tuner: Tuner, method: str, preset: Preset, model: Path, folder: Path) -> tuple[int, int]:
    """Tune the model in the folder ``model`` with the method's own defaults; bytes of memory as estimated, and as they were."""
    stages, fit = prepared(tuner, method, preset, model, {}, folder)
    ended = stages.run("train")
    _adapter(stages.results / "adapter", preset)
    stages.run("verify")
    return fit.memory.total, ended.peak


def _interrupted(stages: Stages) -> bool:
    """Ends a training with SIGTERM, lets it go on, and kills it. False when it was done before."""
    running = stages.start("train")
    running.until(lambda: bool(stages.events("train", ["step"])))
    running.send(signal.SIGTERM)
    ended = running.ended()
    at = _step(stages)
    if ended.code == 0:
        return False
    assert ended.code in _TERMINATED, f"after SIGTERM it ended with {ended.code}, not {_TERMINATED[0]}:\n{ended.tail}"
    assert stages.events("train", ["checkpoint"]), f"SIGTERM at step {at}, and no checkpoint was written:\n{ended.tail}"
    assert not stages.events("train", ["finished", "failed"]), "it was interrupted, and says that it has ended"
    _killed(stages, at)
    return True


def _killed(stages: Stages, at: int) -> None:
    """Goes on from the checkpoint, and is killed after the next one."""
    saved = len(stages.events("train", ["checkpoint"]))
    said = len(stages.events("train", ["step"]))
    running: Running = stages.start("train")
    running.until(lambda: len(stages.events("train", ["checkpoint"])) > saved)
    steps = stages.events("train", ["step"])[said:]
    running.kill()
    ended: Ended = running.ended()
    if steps:
        assert steps[0]["step"] > 1, (
            f"it had reached step {at} before SIGTERM, and began again at the first:\n{ended.tail}"
        )


def _step(stages: Stages) -> int:
    return max((e["step"] for e in stages.events("train", ["step"])), default=0)


def _adapter(folder: Path, preset: Preset) -> None:
    """In peft's form, with tensors, and without a path of this machine."""
    found = next(iter(sorted(folder.rglob("adapter_config.json"))), None)
    assert found is not None, f"there is no adapter_config.json in {folder.name}: {_names(folder)}"
    config = json.loads(found.read_text("utf-8"))
    base = str(config.get("base_model_name_or_path") or "")
    assert not base.startswith("/"), f"base_model_name_or_path is {base}: a path of this machine"
    weights = found.with_name("adapter_model.safetensors")
    assert weights.is_file(), f"no adapter_model.safetensors beside {found.name}: {_names(found.parent)}"
    from kaito_core.models.safetensors_header import header_length, parse

    with weights.open("rb") as file:
        size = weights.stat().st_size
        header = parse(file.read(header_length(file.read(8), size)), size)
    named = [t for t in preset.lora_targets if any(t in name for name in header.tensors)]
    assert named, f"the adapter's tensors are for none of {preset.lora_targets}: {sorted(header.tensors)[:4]}"


def _names(folder: Path) -> str:
    return ", ".join(sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))[:20]) or "nothing"
