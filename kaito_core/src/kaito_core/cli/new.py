"""``kaito new KIND NAME``: a complete package of a plugin, to be changed and published."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import click

from kaito_core.problems import UserError

if TYPE_CHECKING:
    from kaito_core.scaffold.package import Names

PROVIDES = {"preset": "presets", "provisioner": "provisioners", "tuner": "methods", "runtime": "runtimes"}
"""Under which key of `PluginStatus.provides` the names of a kind are."""


@click.command("new", help="Write a package of a plugin that installs and passes its tests as it stands.")
@click.argument("kind", type=click.Choice(list(PROVIDES)), metavar="preset|provisioner|tuner|runtime")
@click.argument("name")
@click.option("--from", "model", metavar="ORG/NAME|FOLDER", default="",
              help="Of a preset: the model whose files say its sizes, template, licence and the rest.")  # fmt: skip
@click.option("--into", metavar="FOLDER", default="", help="Where it is written; default ./kaito-KIND-NAME.")
def command(kind: str, name: str, model: str, into: str) -> None:
    from kaito_core.scaffold.package import Names, check_place, rendered, write

    if model and kind != "preset":
        raise UserError(f"--from describes a model, and a {kind} is none", "leave it out", field="--from")
    names = Names.of(kind, name)  # type: ignore[arg-type]  # click has checked it
    _check_free(names)
    folder = Path(into).expanduser() if into else Path(names.distribution)
    check_place(folder)
    unknown: Mapping[str, str] = {}
    with TemporaryDirectory(prefix="kaito-new-") as scratch:
        if kind == "preset":
            from kaito_core.scaffold.preset import package

            made = package(names, model, Path(scratch), os.environ.get("HF_TOKEN", "").strip())
            texts, copies, unknown = made.texts, made.copies, made.unknown
        else:
            texts, copies = rendered(names), {}
        write(folder, texts, copies)
    click.echo(f"wrote {folder}: {len(texts) + len(copies)} files")
    if unknown:
        click.echo(f"\nwhat the model's files do not say, and src/{names.module}/plugin.py marks:")
        width = max(map(len, unknown))
        for field, words in unknown.items():
            click.echo(f"  {field:{width}}  {words}")
    _show_next(names, folder, kind == "runtime")


def _show_next(names: Names, folder: Path, serves: bool) -> None:
    """The commands to type next."""
    import shlex

    extras = "serve,test" if serves else "test"
    inside = sys.prefix != sys.base_prefix
    click.echo("\nnext:")
    click.echo(f"  cd {shlex.quote(str(folder))}")
    if not inside:
        click.echo("  python3 -m venv .venv && . .venv/bin/activate")
    click.echo(f"  pip install -e '.[{extras}]'")
    click.echo("  kaito plugins")
    click.echo("  pytest")


def _check_free(names: Names) -> None:
    """No installed or public plugin has the name, or would be taken for the new one. Raises `UserError`."""
    import importlib.util

    from kaito_core.plugins.known import KNOWN, canonical
    from kaito_core.plugins.manager import load_plugins

    found = load_plugins()
    another = f"choose another name; `kaito new {names.kind} NAME`"
    for status in found.statuses():
        who = f"{status.distribution} {status.version}"
        if canonical(status.distribution) == names.distribution:
            raise UserError(f"{who} is installed already", another, field="NAME")
        if names.name in status.provides.get(PROVIDES[names.kind], ()):
            raise UserError(f"the {names.kind} {names.name!r} is provided by {who} already", another, field="NAME")
        if status.name == names.name:
            words = f"{who} is the plugin {names.name!r} already, and KAITO_PLUGINS={names.name} would mean both"
            raise UserError(words, another, field="NAME")
    if names.kind == "preset":
        for preset in found.presets().values():
            if names.name in preset.aliases:
                words = f"{names.name!r} is another name of the preset {preset.name!r}, which is installed"
                raise UserError(words, another, field="NAME")
    if names.distribution in KNOWN:
        words = f"{names.distribution} is a package that is published already"
        raise UserError(
            words, f"install it with `pip install {names.distribution}`, or choose another name", field="NAME"
        )
    if importlib.util.find_spec(names.module) is not None:
        words = f"there is a Python module {names.module} already, from something else that is installed"
        raise UserError(words, another, field="NAME")
