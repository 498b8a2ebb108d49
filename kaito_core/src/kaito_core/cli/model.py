"""``kaito model``: models as container images."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kaito_core.problems import UserError

if TYPE_CHECKING:
    from kaito_core.models.files import Model
    from kaito_core.oci_reference import Reference

QUIET = 10.0
"""Seconds between two lines about a push in a log."""


@click.group(name="model")
def command() -> None:
    """Push a model's files as a container image; show what is in one."""


@command.command()
@click.argument("model", metavar="FOLDER|ORG/NAME")
@click.argument("image")
def push(model: str, image: str) -> None:
    """Make a container image of a model's files and push it. Uses your docker log-ins.

    The model is a folder with config.json, tokenizer.json and weights as safetensors, or org/name or org/name@revision of the
    Hugging Face hub. Every file is a layer below /data; what the registry has is not sent again.
    """
    from kaito_core.artifacts.credentials import credentials_for
    from kaito_core.artifacts.model_image import push_model
    from kaito_core.artifacts.registry import check_push
    from kaito_core.local.home import cache_folder
    from kaito_core.stages.model_files import from_hub

    reference = _reference(image)
    if reference.digest:
        raise UserError(f"{image} names a digest; a push needs a tag", f"write {reference.name}:TAG", field="IMAGE")
    credentials = credentials_for(reference)
    found = _read(model)
    if found.folder:
        folder = Path(found.folder)
    else:
        check_push(reference, credentials)  # before gigabytes are downloaded
        folder = from_hub(found.preset.source, cache_folder(), click.echo).path
    with _Shown() as shown:
        pushed = push_model(folder, reference, credentials, _annotations(found), shown.on_progress)
    _left_out(folder, pushed.files)
    click.echo(f"pushed {reference}@{pushed.digest}")
    click.echo(f"  {len(pushed.files)} files, {_size(pushed.bytes)}, of which {_size(pushed.sent)} had to be sent")


@command.command()
@click.argument("image")
def show(image: str) -> None:
    """Show what a model's image says of itself: its files, their sizes, its annotations. Fetches no weights."""
    from kaito_core.artifacts.credentials import credentials_for
    from kaito_core.artifacts.model_image import look_into

    reference = _reference(image)
    found = look_into(reference, credentials_for(reference))
    click.echo(f"{reference.name}@{found.digest}")
    for key, value in sorted(found.annotations.items()):
        click.echo(f"  {_plain(key)}: {_plain(value)}")
    facts = [(k, found.config[k]) for k in _FACTS if isinstance(found.config.get(k), str | int | list)]
    if facts:
        click.echo("config.json")
        for key, value in facts:
            click.echo(f"  {key}: {_plain(', '.join(map(str, value)) if isinstance(value, list) else str(value))}")
    click.echo(f"files ({_size(sum(size for _, size in found.files))})")
    for name, size in found.files:
        click.echo(f"  {_size(size):>10}  {_plain(name)}")


_FACTS = (
    "architectures", "model_type", "dtype", "torch_dtype", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "max_position_embeddings",
)  # fmt: skip
"""What of ``config.json`` people ask for."""


def _reference(image: str) -> Reference:
    from kaito_core.oci_reference import Reference

    try:
        return Reference.parse(image)
    except ValueError as e:
        raise UserError(f"{image!r} is not an image reference: {e}", field="IMAGE") from None


def _read(name: str) -> Model:
    """What is to be pushed: a folder that is there, else what the hub has under the name."""
    from kaito_core.local.home import cache_folder
    from kaito_core.models.folder import read_folder
    from kaito_core.models.presets import Reader, is_model

    if Path(name).expanduser().is_dir():
        return read_folder(Path(name).expanduser().absolute(), field="FOLDER")
    if not is_model(name):
        raise UserError(
            f"there is no folder {name!r}, and it is not org/name of the hub either",
            "name a folder with a model's files, or org/name or org/name@revision of the Hugging Face hub",
            field="FOLDER|ORG/NAME",
        )
    reader = Reader(Path.cwd(), cache_folder() / "models", os.environ.get("HF_TOKEN", ""))
    return reader(name, "FOLDER|ORG/NAME")


def _annotations(model: Model) -> dict[str, str]:
    from kaito_core.artifacts.model_image import LICENCES, REVISION, SOURCE
    from kaito_core.data.sources import HUB
    from kaito_core.models.files import UNKNOWN_LICENCE

    preset = model.preset
    found = {LICENCES: preset.licence if preset.licence != UNKNOWN_LICENCE else ""}
    if not model.folder:
        found |= {SOURCE: f"{HUB}/{preset.source.hub}", REVISION: preset.source.revision}
    return {k: v for k, v in found.items() if v}


def _left_out(folder: Path, files: tuple[str, ...]) -> None:
    others = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir() if p.name not in files and p.name[0] != ".")
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        click.echo(f"left out, as no part of a model: {', '.join(map(_plain, others[:5]))}{more}")


class _Shown:
    """How far a push is: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._said = time.monotonic()

    def __enter__(self) -> _Shown:
        if sys.stdout.isatty():
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, transient=True)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def on_progress(self, step: str, name: str, done: int, total: int) -> None:
        """Called by `push_model`."""
        text = f"{'reading' if step == 'read' else 'pushing'} {name}"
        if self._bar is not None:
            if self._task is None or done < self._bar.tasks[self._task].completed:
                if self._task is not None:
                    self._bar.remove_task(self._task)
                self._task = self._bar.add_task(text, total=total)
            self._bar.update(self._task, description=text, completed=done)
        elif time.monotonic() - self._said > QUIET:
            self._said = time.monotonic()
            click.echo(f"{text}: {_size(done)} of {_size(total)}")


def _size(count: int) -> str:
    """Bytes for people, in powers of 1000 as registries and disks count."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def _plain(text: str) -> str:
    """Foreign text goes to a terminal: one line, no control characters."""
    return "".join(c if c.isprintable() else "�" for c in text)[:500]
