"""What the core sees of the runtime."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from vllm_models import A100, PHI_3_MINI, PRESETS, job_for, machine

from kaito_runtime_vllm import plugin
from kaito_runtime_vllm.plugin import VllmRuntime

RUNTIME = VllmRuntime()


def test_the_hook_gives_one_runtime() -> None:
    (runtime,) = plugin.kaito_runtimes()
    assert (runtime.name, runtime.priority) == ("vllm", 10)


def test_models_that_vllm_knows_are_served_and_others_are_refused_with_the_reason() -> None:
    assert [RUNTIME.serves(p) for p in PRESETS] == [None] * len(PRESETS)
    other = replace(PHI_3_MINI, architecture=replace(PHI_3_MINI.architecture, name="Phi3SmallForCausalLM"))
    problem = RUNTIME.serves(other)
    assert problem
    assert "does not know the model class Phi3SmallForCausalLM" in problem.message
    problem = RUNTIME.serves(replace(PHI_3_MINI, quantization="gguf"))
    assert problem
    assert "cannot read weights in 'gguf'" in problem.message


def test_the_workload_serves_with_this_package() -> None:
    workload = RUNTIME.workload(job_for(PHI_3_MINI, None, machine(A100)))
    assert workload.stages[-1].command == ("python", "-m", "kaito_runtime_vllm.serve")
    assert (workload.gpus, workload.env["KAITO_MAX_REQUESTS"]) == (1, "256")


def test_what_is_missing_is_named_with_the_command_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(plugin.INTERPRETER, raising=False)
    monkeypatch.setattr(plugin.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'kaito-runtime-vllm[serve]'" in RUNTIME.missing()
    monkeypatch.setenv(plugin.INTERPRETER, "/nowhere/python")
    assert "/nowhere/python" in RUNTIME.missing()
    monkeypatch.setenv(plugin.INTERPRETER, sys.executable)
    assert RUNTIME.missing() == ""


def test_the_planners_half_is_light() -> None:
    code = (
        "import sys, kaito_runtime_vllm.plugin as p; list(p.kaito_runtimes());"
        "heavy = {'torch', 'vllm', 'transformers', 'pydantic', 'yaml', 'httpx', 'rich', 'click'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
