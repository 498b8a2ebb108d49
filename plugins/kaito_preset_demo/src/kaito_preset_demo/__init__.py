"""A small demonstration model of the Phi-3 architecture, so that everything in kaito can be tried without a download."""

from __future__ import annotations

from pathlib import Path

#: The model folder inside the package, in the layout of a Hugging Face repository.
MODEL_DIR = Path(__file__).parent / "model"
