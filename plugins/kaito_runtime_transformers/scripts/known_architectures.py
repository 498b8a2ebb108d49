"""Writes data/architectures.json: the causal language models that the installed transformers knows, by the class in config.json.

python scripts/known_architectures.py"""

from __future__ import annotations

import json
from pathlib import Path

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

names = {n for v in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for n in ((v,) if isinstance(v, str) else v)}
known = {"transformers": transformers.__version__, "causal": sorted(names)}
path = Path(__file__).parents[1] / "src/kaito_runtime_transformers/data/architectures.json"
path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
