"""The stages around the training, alone: what they bring, what they refuse, how they end."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kaito_core import progress
from kaito_core.artifacts.layout import Layout
from kaito_core.artifacts.push import push
from kaito_core.oci_reference import Reference
from kaito_core.plugins import Architecture, ChatFormat, Configuration, ModelSource, Preset
from kaito_core.problems import UserError
from kaito_core.progress import Progress
from kaito_core.stages import fetch
from kaito_core.stages.process import Interrupted, run_stage
from kaito_core.stages.push import provenance
from kaito_core.testing.registry import running_registry, why_no_registry
from kaito_core.workloads.job import DataInput, Folders, TuningJob


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folders:
    found = Folders(tmp_path / "data", tmp_path / "weights", tmp_path / "results")
    for name in ("data", "weights", "results"):
        getattr(found, name).mkdir()
        monkeypatch.setenv(f"KAITO_{name.upper()}", str(tmp_path / name))
    monkeypatch.setenv("KAITO_CACHE", str(tmp_path / "cache"))
    return found


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def job(model: Path, tmp_path: Path) -> TuningJob:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    architecture = Architecture("X", 1, 1, 1, 1, 1, 1, 1, 1, 1, linears={})
    preset = Preset(
        "tiny", ModelSource(hub="a/b", revision="c" * 40), "mit", architecture, ChatFormat("", ("</s>",)), ()
    )
    layout = Configuration("cpu", "float32", 1, 1, 64)
    data = DataInput(urls=(str(tmp_path / "rows.jsonl"),))
    return TuningJob("one", "default", preset, "qlora", {}, layout, data, model_folder=str(model))


def body(job: TuningJob, folders: Folders) -> Any:
    return fetch.body(job, folders, Progress(folders.results / progress.FILE_NAME, "fetch"))


def test_local_data_and_a_folder_of_weights(job: TuningJob, folders: Folders) -> None:
    assert body(job, folders)["files"] == 1
    assert (folders.data / "rows.jsonl").read_text() == "{}\n"
    assert (folders.weights / "model.safetensors").is_symlink()  # tens of gigabytes are not copied
    assert body(job, folders)["files"] == 1  # again, over what is there


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_folder_that_is_no_model_is_refused(name: str, job: TuningJob, folders: Folders, model: Path) -> None:
    (model / name).unlink()
    with pytest.raises(UserError, match="safetensors" if name.endswith("tensors") else name):
        body(job, folders)


def test_what_is_not_there_is_named(job: TuningJob, folders: Folders, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gone"):
        body(replace(job, model_folder=str(tmp_path / "gone")), folders)
    (folders.data / "rows.jsonl").unlink()
    with pytest.raises(UserError, match="volume is empty"):
        body(replace(job, data=DataInput(volume={"emptyDir": {}})), folders)


def test_a_link_in_a_data_volume_reads_no_secret_of_the_pod(job: TuningJob, folders: Folders, tmp_path: Path) -> None:
    (tmp_path / "password.json").write_text('{"auths": {}}')
    folders.data.mkdir(parents=True, exist_ok=True)
    for inside in folders.data.iterdir():
        inside.unlink()
    (folders.data / "..data").mkdir()
    (folders.data / "..data" / "rows.jsonl").write_text("{}\n")
    (folders.data / "rows.jsonl").symlink_to("..data/rows.jsonl")  # as the kubelet makes a ConfigMap
    image = replace(job, data=DataInput(volume={"image": {"reference": "r.io/data:1"}}))
    body(image, folders)
    (folders.data / "more.json").symlink_to(tmp_path / "password.json")
    with pytest.raises(UserError, match=r"more\.json is a link to .*, which is not in the volume") as e:
        body(image, folders)
    assert e.value.problems[0].field == "tuning.input.volumeSource"
    body(replace(job, data=DataInput(volume={"hostPath": {"path": str(folders.data)}})), folders)


@pytest.mark.skipif(bool(why_no_registry()), reason=why_no_registry())
def test_data_from_an_image_in_a_registry(
    job: TuningJob, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_registry(tmp_path / "registry") as registry:
        reference = Reference.parse(f"{registry.host}/team/data:1")
        registry.write_docker_config(tmp_path / "docker")
        monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
        from kaito_core.artifacts.credentials import credentials_for

        push(
            data_image(tmp_path / "layout", {"data/rows.jsonl": b"{}\n", "bin/sh": b"no"}),
            reference,
            credentials_for(reference),
        )
        (folders.data / "old.jsonl").write_text("of an earlier version of the workspace")
        assert body(replace(job, data=DataInput(image=str(reference))), folders)["files"] == 1
    assert [p.name for p in folders.data.iterdir()] == ["rows.jsonl"]


def data_image(folder: Path, files: dict[str, bytes]) -> Path:
    """An OCI layout with one image that holds these files, as KAITO's users build them."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    layout = Layout.create(folder)
    layer = layout.add("application/vnd.oci.image.layer.v1.tar+gzip", gzip.compress(tar.getvalue()))
    diff = "sha256:" + hashlib.sha256(tar.getvalue()).hexdigest()
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [diff]}}
    made = layout.add("application/vnd.oci.image.config.v1+json", json.dumps(config).encode())
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": made.to_json(),
        "layers": [layer.to_json()],
    }
    layout.tag(layout.add("application/vnd.oci.image.manifest.v1+json", json.dumps(manifest).encode()), "1")
    return folder


def test_what_is_pushed_names_no_folder_of_this_machine(job: TuningJob, model: Path, tmp_path: Path) -> None:
    source = ModelSource(folder=str(model), revision="sha256:" + "e" * 64)
    found = provenance(replace(job, preset=replace(job.preset, source=source)), tmp_path)
    assert found["sh.kaito.base.name"] == "tiny"
    assert found["sh.kaito.base.revision"] == "sha256:" + "e" * 64
    assert str(tmp_path) not in str(found)


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (UserError("blue", "paint it"), 2, "blue"),
        (OSError(28, "No space left on device", "/x"), 1, "no space left on the disk (/x)"),
        (ZeroDivisionError("oops"), 1, "the stage 'a' broke: ZeroDivisionError: oops"),
    ],
)
def test_a_stage_fails_with_one_event_and_its_exit_code(
    raised: Exception,
    code: int,
    said: str,
    job: TuningJob,
    folders: Folders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "job.json").write_text(job.to_json())
    monkeypatch.setenv("KAITO_JOB", str(tmp_path / "job.json"))

    def fails(*_: Any) -> dict[str, Any]:
        raise raised

    assert run_stage("a", fails) == code
    events = [e for _, e in progress.read(folders.results / progress.FILE_NAME)]
    assert [e["event"] for e in events] == ["started", "failed"]
    assert events[-1]["message"] == said


def test_an_interrupted_stage_has_not_failed(
    job: TuningJob, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "job.json").write_text(job.to_json())
    monkeypatch.setenv("KAITO_JOB", str(tmp_path / "job.json"))

    def stops(*_: Any) -> dict[str, Any]:
        raise Interrupted(15)

    assert run_stage("a", stops) == 143
    assert [e["event"] for _, e in progress.read(folders.results / progress.FILE_NAME)] == ["started"]


def test_a_stage_without_its_environment_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("KAITO_DATA", "KAITO_WEIGHTS", "KAITO_RESULTS"):
        monkeypatch.delenv(name, raising=False)
    assert run_stage("a", lambda *_: {}) == 2
    assert "KAITO_DATA" in capsys.readouterr().err
