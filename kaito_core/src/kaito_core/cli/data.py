"""``kaito data``: look at training data before anything is spent on it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kaito_core.problems import KaitoError, Problem, UserError

if TYPE_CHECKING:
    from kaito_core.data.doctor import Report
    from kaito_core.plugins.types import DataFacts, Preset


@click.group(name="data")
def command() -> None:
    """Look at training data before anything is spent on it."""


@command.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE…")
@click.option(
    "--preset", "name", required=True, metavar="NAME", help="The model that will be tuned: its tokenizer and template."
)
@click.option(
    "--max-length", type=click.IntRange(min=2), metavar="N", help="Tokens per example. Default: the model's context."
)
@click.option("--model-folder", type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="DIR",
              help="A folder with the model's tokenizer.json, in place of the preset's source.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.pass_context
def check(
    ctx: click.Context,
    files: tuple[str, ...],
    name: str,
    max_length: int | None,
    model_folder: Path | None,
    as_json: bool,
) -> None:
    """Check training data: its format, its lengths, what is trained, and what is wrong.

    FILE is a path, a folder, or a URL (https://, hf://datasets/…), which is downloaded into the cache. Exit code 0 when the
    data can be trained on, 2 when it cannot.
    """
    from kaito_core.data.doctor import BadData
    from kaito_core.data.prepare import prepare
    from kaito_core.plugins.manager import load_plugins

    try:
        preset = load_plugins().preset(name, field="--preset")
        config = {"TrainingArguments": {"max_length": max_length}}
        done = prepare(_paths(files), preset, _tokenizer(preset, model_folder), config)
    except BadData as e:
        _show(e.report, None, as_json)
        ctx.exit(e.exit_code)
    except KaitoError as e:
        if not as_json:
            raise
        click.echo(
            json.dumps({"ok": False, "problems": [p.to_json() for p in e.problems]}, ensure_ascii=False, indent=2)
        )
        ctx.exit(e.exit_code)
    _show(done.report, done.facts, as_json)


def _tokenizer(preset: Preset, model_folder: Path | None) -> Path:
    """A folder with the preset's tokenizer: the one given, the preset's package, or the tokenizer's files alone from the hub."""
    from kaito_core.cli.given import tokenizer_folder

    found = model_folder or tokenizer_folder(preset, "")
    if found:
        return found
    source = preset.source
    if not source.hub:
        raise UserError(Problem(f"{source} of the preset {preset.name} has no tokenizer.json",
                                "put the model's files there, or use --model-folder", "--preset"))  # fmt: skip
    from kaito_core.data.hub import fetch_model
    from kaito_core.local.home import cache_folder

    folder = cache_folder() / "tokenizers" / f"{source.hub.replace('/', '--')}@{source.revision or 'main'}"
    if source.revision and (folder / "tokenizer.json").is_file():
        return folder
    return fetch_model(source.hub, source.revision or "main", folder, os.environ.get("HF_TOKEN"), tokenizer_only=True)


def _paths(files: tuple[str, ...]) -> list[Path]:
    """The files to read: local ones where they are, the others downloaded into the cache."""
    from kaito_core.addresses import private_addresses_allowed
    from kaito_core.data.fetch import fetch
    from kaito_core.data.sources import parse_sources
    from kaito_core.local.home import cache_folder

    paths: list[Path] = []
    for text, source in zip(files, parse_sources(files, base=Path.cwd(), field="FILE"), strict=True):
        if source.path is None:
            import hashlib

            into = cache_folder() / "checked" / hashlib.sha256(text.encode()).hexdigest()[:16]
            fetched = fetch([text], into, cache_folder(), base=Path.cwd(), allow_private=private_addresses_allowed(),
                            token=os.environ.get("HF_TOKEN", ""), field="FILE")  # fmt: skip
            paths += [f.path for f in fetched]
        elif source.path.exists():
            paths.append(source.path)
        else:
            raise UserError(Problem(f"{source.shown}: there is no such file", "check the path", "FILE"))
    return paths


def _show(report: Report, facts: DataFacts | None, as_json: bool) -> None:
    if as_json:
        found: dict[str, Any] = report.to_json()
        if facts is not None:
            found["digest"] = facts.digest
        click.echo(json.dumps(found, ensure_ascii=False, indent=2))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for line in report.lines():
        console.print(Text(line))
    if report.sample:
        console.print(
            Text("\none example (trained: green)" if console.is_terminal else "\none example (trained: ⟦…⟧)", "bold")
        )
        if console.is_terminal:
            styled = [Text(_safe(text), style="bold green" if trained else "dim") for text, trained in report.sample]
            console.print(Text("").join(styled))
        else:
            console.print(Text(_safe(report.sample_text())))
    for problem in report.problems:
        console.print(Text(f"\n{problem}", style="red" if problem.severity == "error" else "yellow"))
    if report.ok:
        console.print(Text("\nthis data can be trained on", style="green"))


def _safe(text: str) -> str:
    """Data goes to a terminal: control characters are shown, not obeyed."""
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)
