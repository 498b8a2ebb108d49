"""What pytest loads in every run where kaito-core is installed: a marker, and a rule for the kit's own classes.

Imports nothing but pytest itself. A run without a class of the kit pays one attribute look-up for each test.
"""

from __future__ import annotations

import pytest

_HERE = __name__.rpartition(".")[0]

# So that a failed assertion shows its values, as in the author's own files.
pytest.register_assert_rewrite(
    *(
        f"{_HERE}.{m}"
        for m in ("base", "contract", "presets", "provisioners", "runtimes", "serving", "tuners", "tuning")
    )
)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: trains or serves a model for real, or takes long in another way")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Nobody switches a class of the kit off as a whole without a reason."""
    for item in items:
        if getattr(getattr(item, "cls", None), "kaito_kit", False):
            _check(item)


def _check(item: pytest.Item) -> None:
    for name in ("xfail", "skip", "skipif"):
        for mark in item.iter_markers(name):
            words = mark.kwargs.get("reason") or (mark.args[0] if name == "skip" and mark.args else "")
            if not str(words).strip():
                raise pytest.UsageError(
                    f'{item.nodeid}: a test of kaito\'s conformance kit is marked {name} without a reason; write reason="…"'
                )
