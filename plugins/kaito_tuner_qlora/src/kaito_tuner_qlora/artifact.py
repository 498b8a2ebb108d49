"""What a training leaves behind: the adapter folder, and JSON and HTML beside it. Files appear whole or not at all."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kaito_core.data.chat import TEMPLATE, completed
from kaito_core.workloads.job import Folders, TuningJob

if TYPE_CHECKING:
    from peft import PeftModel

LIBRARIES = ("kaito-core", "kaito-tuner-qlora", "torch", "transformers", "peft", "bitsandbytes")
WEIGHTS = "adapter_model.safetensors"


def chat_template(job: TuningJob, weights: Path) -> str:
    """The template that the data was rendered with: the user's, the preset's, or the one in the model's own files; empty when there
    is none."""
    asked: str = job.config.get("ModelConfig", {}).get("chat_template") or ""
    return asked or completed(job.preset.chat, weights).template


def write(adapter: PeftModel | Path, job: TuningJob, folders: Folders, metrics: dict[str, Any]) -> Path:
    """Makes ``adapter/`` anew from a model, or from a folder that already holds one."""
    final = folders.results / "adapter"
    written = folders.results / "adapter-being-written"
    shutil.rmtree(written, ignore_errors=True)
    written.mkdir(parents=True)
    if isinstance(adapter, Path):
        for name in ("adapter_config.json", WEIGHTS):
            shutil.copyfile(adapter / name, written / name)
    else:
        adapter.save_pretrained(written, save_embedding_layers=False)
        (written / "README.md").unlink(missing_ok=True)  # peft's empty form; `verify` writes the model card
    _pin_base(written / "adapter_config.json", job)
    template = chat_template(job, folders.weights)
    if template:
        (written / TEMPLATE).write_text(template, encoding="utf-8")
    write_json(written / "kaito.json", facts(job, folders, template, metrics))
    shutil.rmtree(final, ignore_errors=True)
    written.rename(final)
    return final


def base_name(job: TuningJob) -> str:
    """What the adapter says that it belongs to: the model's name on the hub, or the preset's, which is that of a folder for a model
    in one. `ModelSource.revision` says at which commit, or with which digest."""
    return job.preset.source.hub or job.preset.name


def _pin_base(path: Path, job: TuningJob) -> None:
    """A serving engine must find the base model by a name that holds elsewhere, never by a path of the training machine."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base_name(job)
    config["revision"] = job.preset.source.revision or None
    config["inference_mode"] = True
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def facts(job: TuningJob, folders: Folders, template: str, metrics: dict[str, Any]) -> dict[str, Any]:
    """Everything that says where this adapter comes from; what `verify` finds is added to it."""
    doctor = read_json(folders.results / "prepared" / "doctor.json")
    return {
        "base_model": base_name(job),
        "revision": job.preset.source.revision,
        "preset": job.preset.name,
        "method": job.method,
        "licence": job.preset.licence,
        "stop_tokens": list(completed(job.preset.chat, folders.weights).stop_tokens),
        "chat_template_digest": "sha256:" + hashlib.sha256(template.encode()).hexdigest() if template else "",
        "data_digest": job.data_digest or doctor.get("digest", ""),
        "config": job.config,
        "configuration": {"device": job.configuration.device, "dtype": job.configuration.dtype,
                          "sequence": job.configuration.sequence},
        "metrics": metrics["summary"],
        "versions": versions(),
    }  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of the libraries that made the adapter."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty when there is no such file."""
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return loaded


def write_json(path: Path, value: Any) -> None:
    """Writes the file whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes the file whole or not at all."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_report(job: TuningJob, folders: Folders) -> None:
    """``report.html`` from what is known by now."""
    from kaito_tuner_qlora import report

    metrics = read_json(folders.results / "metrics.json")
    verified = read_json(folders.results / "verify.json")
    doctor = read_json(folders.results / "prepared" / "doctor.json")
    write_text(folders.results / "report.html", report.render(job, metrics, doctor, verified))
