"""The plugin is light, and what it plugs in is found by its name."""

from __future__ import annotations

import subprocess
import sys

HEAVY = {"azure", "kubernetes", "httpx", "torch"}


def imported_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sorted(m.partition('.')[0] for m in sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_azure_is_imported_when_it_is_needed() -> None:
    load = "from kaito_core.plugins.manager import load_plugins; p = load_plugins(['aks'])"
    ask = (
        "from kaito_core.plugins.types import Requirements; a = p.provisioners()['aks']; list(a.offers(Requirements()))"
    )
    assert not imported_after(f"{load}; {ask}; assert 'aks-provisioner' in p.commands()") & HEAVY


def test_the_server_needs_the_standard_library_alone() -> None:
    imported = imported_after("import kaito_provisioner_aks.testing.arm_server")
    assert not imported & {*HEAVY, "kaito_core", "click"}
