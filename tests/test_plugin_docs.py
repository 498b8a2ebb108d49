"""The pages for plugin authors: every hook has one with its true signature, and every example on them is run, as an installed plugin in
a process of its own.

A block with a file name behind its language (```` ```python acme.py ````) is that file; a ``console`` block is run, and what it shows must
be in the output, in that order (``…`` stands for anything). ``exit=2`` is the exit code that it ends with, ``exit=0,2`` where that depends on the machine."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kaito_core.plugins import hookspecs
from kaito_core.plugins.installed import HOOKS
from tests.conftest import ROOT

FOLDER = ROOT / "docs" / "plugins"
TUTORIAL = FOLDER / "tutorial.md"
PAGES = [TUTORIAL, *sorted((FOLDER / "hooks").glob("*.md"))]
SECTIONS = ["When it is called", "What it may do", "When it fails", "Example"]


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    info: str
    text: str


def blocks(page: Path) -> list[Block]:
    found = re.findall(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [Block(*f) for f in found]


def files(page: Path) -> dict[str, str]:
    return {b.info: b.text for b in blocks(page) if b.info and b.language != "console"}


def consoles(page: Path) -> list[Block]:
    return [b for b in blocks(page) if b.language == "console"]


def module(page: Path) -> str:
    """The name of the plugin's module."""
    return next(n for n, text in files(page).items() if n.endswith(".py") and "@hookimpl" in text).removesuffix(".py")


def signature(hook: str) -> str:
    """A hook as `hookspecs` declares it, on one line."""
    declared = str(inspect.signature(getattr(hookspecs, hook)))
    return f"def {hook}{declared}".replace("'", "")


# --- the pages


def test_every_hook_has_a_page_and_every_page_a_hook() -> None:
    assert {p.stem for p in PAGES if p != TUTORIAL} == set(HOOKS)
    index = (FOLDER / "index.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\(hooks/(\w+)\.md\)", index)) == set(HOOKS)


@pytest.mark.parametrize("hook", HOOKS)
def test_the_signature_on_the_page_is_that_of_the_hook(hook: str) -> None:
    first = blocks(FOLDER / "hooks" / f"{hook}.md")[0]
    assert (first.language, first.text.strip()) == ("python", signature(hook))


@pytest.mark.parametrize("hook", HOOKS)
def test_a_page_says_when_and_what_and_what_if_and_has_an_example(hook: str) -> None:
    page = FOLDER / "hooks" / f"{hook}.md"
    assert re.findall(r"^## (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE) == SECTIONS
    assert f"def {hook}(" in files(page)[f"{module(page)}.py"]
    assert consoles(page), "the example is not run"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_no_code_on_a_page_is_left_out(page: Path) -> None:
    loose = [b for b in blocks(page) if b.language in ("python", "yaml", "json", "toml") and not b.info]
    assert [b.text.strip() for b in loose] == ([] if page == TUTORIAL else [signature(page.stem)])


def test_the_first_plugin_is_as_short_as_it_says() -> None:
    lines = [line for line in files(TUTORIAL)["acme_coder.py"].splitlines() if line.strip()]
    assert len(lines) == 10


# --- the examples


class Example:
    """The files of a page in a folder, installed as ``pip install -e`` does it."""

    def __init__(self, page: Path, folder: Path) -> None:
        self.folder, self.site = folder / "work", folder / "site"
        self.folder.mkdir()
        for name, text in files(page).items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        self.module = module(page)
        self.distribution = self.module.replace("_", "-")
        project: dict[str, Any] = {"name": self.distribution, "version": "1.0", "dependencies": ["kaito-core"]}
        project["entry-points"] = {"kaito": {self.distribution: self.module}}
        if (self.folder / "pyproject.toml").exists():
            project = tomllib.loads((self.folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            self.distribution = project["name"]
        self._metadata(project)

    def _metadata(self, project: dict[str, Any]) -> None:
        info = self.site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        info.mkdir(parents=True)
        needs = "".join(f"Requires-Dist: {d}\n" for d in project["dependencies"])
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n{needs}"
        )
        lines = [f"{name} = {value}" for name, value in project["entry-points"]["kaito"].items()]
        (info / "entry_points.txt").write_text("\n".join(["[kaito]", *lines, ""]))

    def run(self, line: str) -> subprocess.CompletedProcess[str]:
        program, *arguments = shlex.split(line)
        modules = {"kaito": "kaito_core", "pytest": "pytest"}  # no other program is on a page's console
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("KAITO_", "HF_", "KUBERNETES_", "PYTEST_"))}
        path = os.pathsep.join(map(str, filter(None, [self.site, self.folder, os.environ.get("PYTHONPATH", "")])))
        home = {"KAITO_HOME": str(self.site / "home"), "KUBECONFIG": str(self.site / "none")}
        return subprocess.run(
            [sys.executable, "-m", modules[program], *arguments],
            capture_output=True,
            text=True,
            cwd=self.folder,
            env={**kept, **home, "PYTHONPATH": path, "COLUMNS": "200", "OMP_NUM_THREADS": "1"},
            timeout=300,
            check=False,
        )


def expected(text: str) -> list[tuple[str, list[str]]]:
    """The commands of a console, and the lines that each shows."""
    found: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        elif line.strip():
            found[-1][1].append(line)
    return found


def in_order(lines: list[str], output: str) -> bool:
    pattern = ".*".join(".*".join(re.escape(p.strip()) for p in line.split("…")) for line in lines)
    return re.search(pattern, output, re.DOTALL) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_the_example_of_a_page_does_what_it_shows(page: Path, tmp_path: Path) -> None:
    example = Example(page, tmp_path)
    ran = []
    for console in consoles(page):
        codes = [int(c) for c in (console.info.removeprefix("exit=") or "0").split(",")]
        for command, shows in expected(console.text):
            done = example.run(command)
            output = done.stdout + done.stderr
            assert done.returncode in codes, output
            assert in_order(shows, output), output
            assert "Traceback" not in output
            ran.append(command)
    tested = [n for n in files(page) if n.startswith("test_")]
    assert all(any(name in command for command in ran) for name in tested), "a test file is not run"
    used = {n for n in files(page) if n.endswith((".yaml", ".jsonl"))}
    assert all(any(n in text for text in [*ran, *files(page).values()]) for n in used), "a file is not used"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_the_example_of_a_page_is_a_sound_plugin(page: Path, tmp_path: Path) -> None:
    example = Example(page, tmp_path)
    answer = json.loads(example.run("kaito plugins --json").stdout)
    (found,) = [p for p in answer["plugins"] if p["distribution"] == example.distribution]
    assert (found["state"], found["heavy"], found["error"]) == ("active", [], "")
    provides = found["provides"]
    assert provides
    assert page == TUTORIAL or page.stem in provides.get("hooks", ()) or len(provides) == 1
