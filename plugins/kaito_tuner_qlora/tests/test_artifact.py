"""What an adapter says of the model that it belongs to, and of how a conversation is written for it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kaito_core.plugins.types import ChatFormat, ModelSource
from kaito_core.problems import UserError
from kaito_core.workloads.job import Folders, TuningJob
from kaito_tuner_qlora import artifact, report

METRICS: dict[str, Any] = {"summary": {}}


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    """With a model whose own files say template and end, and with an adapter as peft leaves it on the training machine."""
    found = Folders(tmp_path / "data", tmp_path / "my-model", tmp_path / "results")
    found.weights.mkdir()
    found.results.mkdir()
    own = {"chat_template": "{{ messages }}</s>", "eos_token": "</s>"}
    (found.weights / "tokenizer_config.json").write_text(json.dumps(own))
    trained = found.results / "trained"
    trained.mkdir()
    (trained / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(found.weights), "r": 8}))
    (trained / artifact.WEIGHTS).write_bytes(b"weights")
    return found


def written(job: TuningJob, folders: Folders) -> Path:
    return artifact.write(folders.results / "trained", job, folders, METRICS)


def of_its_own(job: TuningJob) -> TuningJob:
    return replace(job, preset=replace(job.preset, chat=ChatFormat("", ())))


def test_what_the_preset_leaves_empty_is_the_models_own(make_job: Any, folders: Folders) -> None:
    adapter = written(of_its_own(make_job()), folders)
    assert (adapter / "chat_template.jinja").read_text() == "{{ messages }}</s>"
    assert json.loads((adapter / "kaito.json").read_text())["stop_tokens"] == ["</s>"]


def test_a_model_without_a_template_gives_an_adapter_without_one(make_job: Any, folders: Folders) -> None:
    """An empty file would be taken for a template that says nothing."""
    (folders.weights / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    adapter = written(of_its_own(make_job()), folders)
    assert not (adapter / "chat_template.jinja").exists()
    assert json.loads((adapter / "kaito.json").read_text())["chat_template_digest"] == ""


def test_a_template_of_the_user_counts_first(make_job: Any, folders: Folders) -> None:
    adapter = written(make_job(ModelConfig={"chat_template": "{{ m }}" * 100}), folders)
    assert (adapter / "chat_template.jinja").read_text() == "{{ m }}" * 100


def test_no_file_of_the_container_gets_into_the_adapter(make_job: Any, folders: Folders, tmp_path: Path) -> None:
    """The registry's password stood there, if the training's ConfigMap named it; also in a job that was planned before."""
    (tmp_path / "config.json").write_text('{"auths": {"r.io": {"auth": "c2VjcmV0"}}}')
    with pytest.raises(UserError, match="chat_template"):
        make_job(ModelConfig={"chat_template": str(tmp_path / "config.json")})
    planned = make_job()
    planned = replace(
        planned, config={**planned.config, "ModelConfig": {"chat_template": str(tmp_path / "config.json")}}
    )
    adapter = written(planned, folders)
    assert not any(b"c2VjcmV0" in p.read_bytes() for p in adapter.rglob("*") if p.is_file())


def test_an_adapter_of_a_model_in_a_folder_names_no_path_of_this_machine(make_job: Any, folders: Folders) -> None:
    job = make_job()
    source = ModelSource(folder=str(folders.weights), revision="sha256:" + "e" * 64)
    preset = replace(job.preset, name="my-model", source=source, description=f"read from {folders.weights}")
    adapter = written(replace(job, preset=preset, model_folder=str(folders.weights)), folders)
    config, facts = (json.loads((adapter / name).read_text()) for name in ("adapter_config.json", "kaito.json"))
    assert config["base_model_name_or_path"] == facts["base_model"] == "my-model"
    assert config["revision"] == facts["revision"] == "sha256:" + "e" * 64
    for path in adapter.iterdir():
        assert str(folders.weights.parent).encode() not in path.read_bytes()


def test_the_report_of_a_run_lists_the_columns_that_were_not_used(make_job: Any) -> None:
    page = report.render(make_job(), {}, {"rows": 3, "columns_not_used": ["mood", "messages[].name"]}, {})
    assert "<td>columns not used</td><td>mood, messages[].name</td>" in page
