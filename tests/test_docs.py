"""What the documentation shows is run: every YAML is validated, every generated page is up to date, every link leads somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, Kaito

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "plugins").glob("*/README.md"))]
YAML_FILES = sorted((ROOT / "examples").rglob("*.yaml"))


def blocks() -> list[tuple[str, str]]:
    """(where, text) of every YAML block that is a whole resource."""
    found = []
    for page in PAGES:
        for number, text in enumerate(re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)):
            if "apiVersion: kaito.sh" in text:
                found.append((f"{page.relative_to(ROOT)}#{number}", text))
    return found


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda p: p.name)
def test_every_example_is_valid(path: Path, kaito: Kaito) -> None:
    answer = kaito("validate", path)
    assert answer.returncode == 0, answer.stdout + answer.stderr


@pytest.mark.parametrize(("where", "text"), blocks(), ids=[w for w, _ in blocks()])
def test_every_workspace_in_the_docs_is_valid(where: str, text: str, kaito: Kaito) -> None:
    answer = kaito("validate", "-", stdin=text)
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_the_generated_pages_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "reference_docs.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_within_the_repository_leads_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing


def test_every_command_of_the_readme_exists(kaito: Kaito) -> None:
    named = set(re.findall(r"^kaito (\w+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE))
    shown = kaito("--help").stdout
    assert named
    assert all(re.search(rf"^  {name} ", shown, re.MULTILINE) for name in named)
