"""Writes the generated pages of docs/reference from the models that they describe; a test checks that they are up to date."""

from __future__ import annotations

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs" / "reference"


def pages() -> dict[str, str]:
    """The generated pages by file name."""
    from kaito_core.api.crd import crd_yaml
    from kaito_core.api.reference import markdown as workspace
    from kaito_tuner_qlora.reference import markdown as training_config

    return {"workspace.md": workspace(), "training-config.md": training_config(), "workspace-crd.yaml": crd_yaml()}


if __name__ == "__main__":
    stale = [
        n for n, text in pages().items() if not (DOCS / n).is_file() or (DOCS / n).read_text(encoding="utf-8") != text
    ]
    if "--check" in sys.argv:
        sys.exit(f"out of date: {', '.join(stale)}; run `make docs`" if stale else 0)
    DOCS.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (DOCS / name).write_text(text, encoding="utf-8")
