"""A model's files, from wherever the job says, into one folder: what the stages of a tuning and of an endpoint both begin with.

What is downloaded is kept in the cache, by digest or revision, and linked from there: a second start downloads nothing.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from kaito_core.artifacts.model_files import is_model_file, lacking
from kaito_core.plugins.types import ModelSource
from kaito_core.problems import Failure, UserError
from kaito_core.progress import Progress
from kaito_core.stages.cached_folder import Cached, cached_folder, link_files
from kaito_core.stages.process import cache
from kaito_core.workloads.job import TuningJob
from kaito_core.workloads.serving import ServingJob

_COMMIT = re.compile(r"[0-9a-f]{40}")

SAY_EVERY = 10.0
"""Seconds between lines about how far a download is."""


def bring(job: TuningJob | ServingJob, into: Path, events: Progress) -> int:
    """Put the model's files into ``into``; their size in bytes. `UserError` when what is there is no model that can be used."""
    field = "tuning.preset" if isinstance(job, TuningJob) else "inference.preset"
    source = job.preset.source
    if job.model_folder:
        _link(Path(job.model_folder), into, field)
        where = job.model_folder
    elif job.model_image:
        image = _image(job.model_image, events)
        link_files(_files(image), into)
        where = job.model_image
    elif source.folder:
        _link(Path(source.folder), into, field)
        where = str(source)
    elif source.package:
        _copy(source, into)
        where = f"the package {source.package}"
    else:
        where = f"{source.hub} at {source.revision[:12] or 'main'}"
        if _COMMIT.fullmatch(source.revision):
            link_files(_files(from_hub(source, cache(), events.message)), into)
        else:  # a branch is not the same tomorrow: nothing to keep under its name
            from kaito_core.data.hub import fetch_model

            fetch_model(source.hub, source.revision or "main", into, token=os.environ.get("HF_TOKEN"))
    if missing := lacking(into):
        verb = "is" if len(missing) == 1 else "are"
        raise UserError(
            f"{where} is not a model that can be used: {', '.join(missing[:5])} {verb} missing",
            "it needs config.json, tokenizer.json and the weights as safetensors, as on the hub",
            field=field,
        )
    size = sum(p.stat().st_size for p in into.iterdir() if p.is_file())
    events.message(f"model: {job.preset.name} from {where}, {size:,} bytes")
    return size


def _link(folder: Path, into: Path, field: str) -> None:
    if not folder.is_dir():
        raise UserError(
            f"the folder {folder} with the weights of the model is not there",
            "put the model's files there, or point KAITO_MODELS at the folder above it",
            field=field,
        )
    link_files({p.name: p for p in sorted(folder.iterdir()) if p.is_file()}, into)


def _copy(source: ModelSource, into: Path) -> None:
    shipped = importlib.resources.files(source.package)
    with importlib.resources.as_file(shipped.joinpath(source.path) if source.path else shipped) as folder:
        into.mkdir(parents=True, exist_ok=True)
        for file in sorted(folder.iterdir()):
            if file.is_file():
                # Never through a link that an earlier version of the job has left, into somebody's cache.
                (into / file.name).unlink(missing_ok=True)
                shutil.copyfile(file, into / file.name)


def _files(found: Cached) -> dict[str, Path]:
    return {p.name: p for p in sorted(found.path.iterdir()) if p.is_file() and not p.name.startswith(".")}


def _image(image: str, events: Progress) -> Cached:
    from kaito_core.artifacts.model_pull import pull_model

    return pulled(image, "model", pull_model, events)


def pulled(image: str, what: str, pull: Callable[..., Any], events: Progress) -> Cached:
    """The files of an image in the cache, by the image's digest; ``facts`` has its ``annotations``.

    ``pull`` is called with the reference, a folder and the log-in, and ``on_progress``."""
    from kaito_core.artifacts.credentials import credentials_for
    from kaito_core.artifacts.pull import digest_of
    from kaito_core.oci_reference import Reference

    reference = Reference.parse(image)
    credentials = credentials_for(reference)
    digest = reference.digest or digest_of(reference, credentials)
    pinned = Reference(reference.registry, reference.repository, reference.tag, digest)

    def fill(folder: Path) -> Mapping[str, Any]:
        found = pull(pinned, folder, credentials, telling(f"{what}: {image}", events))
        return {"annotations": dict(found.annotations)}

    result = cached_folder(cache(), f"{what}-{digest.replace(':', '-')}", fill, events.message)
    if not result.fresh:
        events.message(f"{what}: {image} is in the cache ({digest[:19]}…)")
    return result


def from_hub(source: ModelSource, root: Path, say: Callable[[str], None]) -> Cached:
    """The files of a hub's model at its commit, in the cache ``root``; with ``HF_TOKEN`` where it is set."""
    from kaito_core.data.hub import fetch_model

    def fill(folder: Path) -> Mapping[str, Any]:
        say(f"model: downloading {source.hub} at {source.revision[:12]}")
        fetch_model(source.hub, source.revision, folder, token=os.environ.get("HF_TOKEN"))
        _verify(folder)
        shutil.rmtree(folder / HUB_NOTES, ignore_errors=True)
        return {}

    result = cached_folder(root, f"model-{source.hub.replace('/', '--')}-{source.revision}", fill, say)
    if not result.fresh:
        say(f"model: {source.hub} at {source.revision[:12]} is in the cache")
    return result


HUB_NOTES = ".cache"
"""Below a download: what the hub's client notes of each file (commit, ETag, time), a line each."""


def _verify(folder: Path) -> None:
    """Compare what came with the digests that the hub gave: the hub's client itself looks at sizes only.

    An ETag of the hub is the SHA-256 of a file in large storage, or git's own digest of one that is not
    (https://huggingface.co/docs/hub/storage-backends)."""
    for path in sorted(p for p in folder.iterdir() if p.is_file() and is_model_file(p.name)):
        note = folder / HUB_NOTES / "huggingface" / "download" / f"{path.name}.metadata"
        etag = ""
        with suppress(OSError, IndexError):
            etag = note.read_text(encoding="utf-8").splitlines()[1].strip()
        if len(etag) == 64:
            expected = hashlib.sha256()
        elif len(etag) == 40:
            expected = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
        else:
            continue
        with path.open("rb") as f:
            while piece := f.read(1 << 20):
                expected.update(piece)
        if expected.hexdigest() != etag:
            path.unlink()
            raise Failure(
                f"{path.name} is not what the hub says that it is: its digest is {expected.hexdigest()[:12]}…, not {etag[:12]}…",
                "run it again: the file is fetched anew; if it stays so, something on the way changes it",
            )


def telling(what: str, events: Progress) -> Callable[[int, int], None]:
    """Says how far a download is, every few seconds."""
    last = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > SAY_EVERY:
            last = time.monotonic()
            events.message(f"{what}: {done / 1e9:.1f} of {total / 1e9:.1f} GB")

    return tell
