"""The command line starts in tenths of a second because it imports nothing heavy: this is what keeps it so."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = (
    "torch",
    "transformers",
    "peft",
    "kubernetes",
    "boto3",
    "azure",
    "httpx",
    "rich",
    "pyarrow",
    "pydantic",
    "tokenizers",
)


def imported_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sorted(m.partition('.')[0] for m in sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import kaito_core.cli",
        "import kaito_core.plugins.manager",
        "from kaito_core.plugins.manager import load_plugins; p = load_plugins(); p.presets(); p.commands()",
    ],
)
def test_light_imports(statement: str) -> None:
    assert not imported_after(statement) & set(HEAVY)


def test_planning_needs_no_torch() -> None:
    assert not imported_after("import kaito_core.cli.plan, kaito_core.cli.run, kaito_core.api") & {
        "torch",
        "transformers",
        "httpx",
        "pyarrow",
    }
