"""A model's files from an image or an artifact: only what belongs to a model is fetched, and what broke off goes on.

Where an image is a file system, its model is the folder with ``config.json``: below ``/data`` in kaito's own, ``/models`` in others,
``/workspace/weights`` in KAITO's older presets.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kaito_core.artifacts.contents import Content, contents
from kaito_core.artifacts.credentials import Credentials
from kaito_core.artifacts.layers import DATA, DataFiles
from kaito_core.artifacts.model_files import is_model_file
from kaito_core.artifacts.pull import PulledImage, choose, lay, open_images
from kaito_core.oci_reference import Reference
from kaito_core.problems import Failure, UserError

ROOTS = (DATA, "models", "model", "weights", "workspace/weights", "workspace/tfs/weights", "mnt/models")
"""Where images have a model's files: ours, KServe's (``/models``), KAITO's of several ages."""

LARGEST_RATIO = 4
"""An image whose layers unpack to more than so many times their size holds no weights, which hardly shrink."""

WORK = ".pull"
"""Below the target while it is not complete: what has come so far."""

OnProgress = Callable[[int, int], None]
"""Called with the bytes that are here, and with all that are needed."""


def pull_model(
    source: Reference | Path,
    into: Path,
    credentials: Credentials | None = None,
    on_progress: OnProgress = lambda _done, _total: None,
    *,
    wanted: Callable[[str], bool] = is_model_file,
    sleep: Callable[[float], None] = time.sleep,
) -> PulledImage:
    """Put the model's files that the image ``source`` holds into the folder ``into``, each checked by its layer's digest.

    Call it again with the same folder after it broke: layers that are here are not fetched again, and one that is half here goes on
    from there. ``wanted`` says of a file's name whether it is needed. Raises `UserError` for what is no model's image, `Failure` for
    one that is not sound, for a registry that cannot be reached and for a full disk.
    """
    work = into / WORK
    try:
        work.mkdir(parents=True, exist_ok=True)
        with open_images(source, credentials, sleep=sleep) as images:
            digest, manifest = choose(images)
            needed = [c for c in contents(manifest, images.name) if not c.name or wanted(c.name)]
            _room(images.name, into, needed, _held(work))
            found = _lay_all(_Pull(images, needed, work, digest, on_progress))
        files = _model(found.files, str(source), wanted)
        for name, content in files.items():
            content.chmod(0o444)
            content.replace(into / name)
        shutil.rmtree(work)
    except OSError as e:
        raise Failure(
            f"{source} cannot be put into {into}: {e.strerror or e}", "make room there, or mend its permissions"
        ) from e
    return PulledImage(digest, manifest.annotations, tuple(sorted(files)))


@dataclass(frozen=True)
class _Pull:
    images: Any
    needed: list[Content]
    work: Path
    digest: str
    on_progress: OnProgress


def _lay_all(pull: _Pull) -> DataFiles:
    """Fetch and lay what an earlier call has not. After each layer, how far it is is written down."""
    needed = [content.layer.digest for content in pull.needed]
    total = sum(content.layer.size for content in pull.needed)
    found = DataFiles(pull.work, LARGEST_RATIO * total + (1 << 30), ROOTS)
    note = pull.work / "state.json"
    state = _read(note)
    laid = state.get("layers", []) if state.get("image") == pull.digest else []
    if not (isinstance(laid, list) and laid and laid == needed[: len(laid)] and found.resume(state)):
        laid = []
        _sweep(pull.work, keep=needed)
    done = sum(content.layer.size for content in pull.needed[: len(laid)])
    pull.on_progress(done, total)
    for content in pull.needed[len(laid) :]:

        def on_bytes(size: int, start: int = done) -> None:
            pull.on_progress(start + size, total)

        lay(pull.images, content, found, pull.work / _partial(content.layer.digest), on_bytes)
        laid = [*laid, content.layer.digest]
        _write(note, {"image": pull.digest, "layers": laid, **found.state()})
        done += content.layer.size
        pull.on_progress(done, total)
    return found


def _model(files: Mapping[str, Path], source: str, wanted: Callable[[str], bool]) -> dict[str, Path]:
    """The files of the folder that holds the model, by name."""
    homes = sorted((name.rpartition("/")[0] for name in files if name.rpartition("/")[2] == "config.json"), key=_depth)
    if not homes:
        raise UserError(
            f"{source} holds no model: there is no config.json in it",
            f"its files belong below one of {', '.join('/' + root for root in ROOTS)}; `kaito model push` puts them there",
        )
    nearest = [home for home in homes if _depth(home) == _depth(homes[0])]
    if len(nearest) > 1:
        raise UserError(
            f"{source} holds {len(nearest)} models: {', '.join('/' + home for home in nearest[:5])}",
            "use an image with one of them",
        )
    below = f"{nearest[0]}/"
    return {
        name.removeprefix(below): path
        for name, path in files.items()
        if name.startswith(below) and wanted(name.removeprefix(below))
    }


def _depth(folder: str) -> int:
    """How deep a folder is below that of the roots that it is in."""
    return min(folder.count("/") - root.count("/") for root in ROOTS if f"{folder}/".startswith(f"{root}/"))


def _room(name: str, into: Path, needed: list[Content], held: int) -> None:
    # Beside the files, the largest layer that is an archive is there as one for a moment.
    archives = max((c.layer.size for c in needed if c.kind != "file"), default=0)
    wants = sum(content.layer.size for content in needed) + archives - held
    free = shutil.disk_usage(into).free
    if wants > free:
        raise Failure(
            f"{name} needs {wants:,} bytes in {into}, and {free:,} are free", "free some space and run it again"
        )


def _held(work: Path) -> int:
    return sum(path.stat().st_size for path in work.iterdir())


def _partial(digest: str) -> str:
    return f"layer-{digest.removeprefix('sha256:')}"


def _sweep(work: Path, keep: list[str]) -> None:
    """Remove what is of no use any more; downloads that are still wanted stay."""
    names = {_partial(digest) for digest in keep}
    for path in work.iterdir():
        if path.name not in names:
            path.unlink()


def _read(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        value = json.loads(path.read_bytes())
        if isinstance(value, dict):
            return value
    return {}


def _write(path: Path, value: Mapping[str, Any]) -> None:
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(json.dumps(value), encoding="utf-8")
    beside.replace(path)
