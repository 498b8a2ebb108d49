"""``push``: the adapter as a reproducible OCI image, to the registry and to the volume.

The image is first made as an OCI layout among the results; only then is anything sent. A push that fails costs nothing but
itself: ``kaito push`` sends the same layout later.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kaito_core.models.files import UNKNOWN_LICENCE
from kaito_core.problems import Failure
from kaito_core.progress import Progress
from kaito_core.workloads.job import Folders, TuningJob


def body(job: TuningJob, folders: Folders, events: Progress) -> Mapping[str, Any]:
    layout, tag, digest = build(job, folders.results)
    events.message(f"image: {layout} ({digest})")
    result: dict[str, Any] = {"layout": str(layout), "digest": digest, "adapter": str(folders.results / "adapter")}
    if job.output_volume is not None:
        destination = Path(os.environ["KAITO_DESTINATION"])
        for name in ("adapter", "image"):
            shutil.copytree(folders.results / name, destination / name, dirs_exist_ok=True)
        for name in ("report.html", "verify.json", "metrics.json"):
            if (folders.results / name).is_file():
                shutil.copyfile(folders.results / name, destination / name)
        events.message(f"volume: written to {destination}")
        result["volume"] = str(destination)
    if job.output_image:
        result["image"] = job.output_image
        send(layout, tag, job.output_image)
        events.message(f"pushed: {job.output_image}@{digest}")
    return result


def build(job: TuningJob, results: Path) -> tuple[Path, str, str]:
    """Make the OCI layout of the adapter below ``results``: its folder, the tag in it, and the manifest's digest."""
    from kaito_core.artifacts.image import build_adapter_image
    from kaito_core.oci_reference import Reference

    adapter = results / "adapter"
    if not (adapter / "adapter_model.safetensors").is_file():
        raise Failure(f"there is no adapter in {adapter}", "run the workspace again: training makes it")
    tag = (Reference.parse(job.output_image).tag if job.output_image else "") or "latest"
    layout = results / "image"
    temporary = results / "image.new"
    shutil.rmtree(temporary, ignore_errors=True)
    digest = build_adapter_image(
        adapter, temporary, model_name=job.preset.name, annotations=provenance(job, results), tag=tag
    )
    shutil.rmtree(layout, ignore_errors=True)
    temporary.rename(layout)
    return layout, tag, digest


def provenance(job: TuningJob, results: Path) -> dict[str, str]:
    """What the image says of itself beside KAITO's ``sh.kaito.model.name``: where it comes from, and how good it is.

    No clock and no machine in it: the same adapter gives the same image.
    """
    source = job.preset.source
    found = {
        "org.opencontainers.image.title": job.name,
        "org.opencontainers.image.licenses": "" if job.preset.licence == UNKNOWN_LICENCE else job.preset.licence,
        "sh.kaito.base.name": source.hub or source.package or job.preset.name,
        "sh.kaito.base.revision": source.revision,
        "sh.kaito.tuning.method": job.method,
        "sh.kaito.data.digest": _read(results / "prepared" / "doctor.json").get("digest", ""),
    }
    verified = _read(results / "verify.json")
    for key, name in (("eval_loss_before", "loss-before"), ("eval_loss_after", "loss-after")):
        if isinstance(verified.get(key), int | float):
            found[f"sh.kaito.eval.{name}"] = f"{verified[key]:.4f}"
    return {k: str(v) for k, v in found.items() if v}


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def send(layout: Path, tag: str, image: str) -> str:
    """Push the layout's image; the digest that the registry now has under ``image``."""
    from kaito_core.artifacts.credentials import credentials_for
    from kaito_core.artifacts.push import push
    from kaito_core.oci_reference import Reference

    reference = Reference.parse(image)
    return push(layout, reference, credentials_for(reference))
