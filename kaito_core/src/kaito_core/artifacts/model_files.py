"""Which files are a model: weights as safetensors, configuration and tokenizer. Never code and never pickles."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from kaito_core.problems import Problem, UserError

NEEDED = ("config.json", "tokenizer.json")
"""Without these, and weights, a folder is no model that kaito can tune or serve."""

INDEX = "model.safetensors.index.json"
"""Says in which file each tensor of weights in several files is, as the hub's own tools write it."""

SUFFIXES = frozenset({".json", ".safetensors", ".jinja", ".model", ".txt", ".tiktoken", ".md"})
"""Weights, configuration, tokenizer, chat template and model card."""

PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
"""What PyTorch writes with pickle, which runs code when it is read."""

_LICENCE = re.compile(r"(licen[cs]e|notice|copying|use_policy)([._-].*)?", re.IGNORECASE)


def is_model_file(name: str) -> bool:
    """Whether a file of this path belongs to a model: those in subfolders are other copies of it (``original/``, ``onnx/``)."""
    if "/" in name or name.startswith("."):
        return False
    suffix = Path(name).suffix.lower()
    return suffix in SUFFIXES or (_LICENCE.fullmatch(name) is not None and suffix not in PICKLES)


def lacking(folder: Path) -> list[str]:
    """What a folder lacks to be a model; empty when nothing. Raises `UserError` for an index that cannot be read."""
    found = [name for name in NEEDED if not (folder / name).is_file()]
    index = folder / INDEX
    shards = sorted(set(_shards(index))) if index.is_file() else []
    if shards:
        found += [name for name in shards if not (folder / name).is_file()]
    elif not any(folder.glob("*.safetensors")):
        found.append("*.safetensors")
    return found


def model_files(folder: Path) -> list[Path]:
    """What of a folder goes into a model's image, sorted by name. `UserError` with everything that speaks against it."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}", "name a folder with a model's files, or org/name of the hub")
    home, wrong, files = folder.resolve(), [], []
    for path in sorted(folder.iterdir(), key=lambda p: p.name):
        if path.suffix.lower() in PICKLES and not path.is_dir():
            wrong.append(_pickled(path, folder))
        elif is_model_file(path.name):
            if problem := _not_a_file_of(home, path):
                wrong.append(problem)
            elif path.is_file():
                files.append(path)
    if missing := lacking(folder):
        wrong.append(
            Problem(
                f"{folder} is not a model: {', '.join(missing[:5])} {'is' if len(missing) == 1 else 'are'} missing",
                "it needs config.json, tokenizer.json and all weights as safetensors, as on the hub",
            )
        )
    if wrong:
        raise UserError(wrong)
    return files


def _not_a_file_of(home: Path, path: Path) -> Problem | None:
    if path.is_symlink():
        target = path.resolve()
        if not target.is_relative_to(home):
            return Problem(
                f"{path} is a link out of the folder, to {target}",
                "copy the files in place of the links (`cp -rL FOLDER COPY`), or name org/name@revision of the hub",
            )
        if not target.exists():
            return Problem(f"{path} is a link to {target}, which is not there", "put the file there")
    if not path.is_file() and not path.is_dir():
        return Problem(f"{path} is neither a file nor a folder", "take it out of the folder")
    return None


def _pickled(path: Path, folder: Path) -> Problem:
    if any(folder.glob("*.safetensors")):
        remedy = "take it out of the folder: the safetensors beside it are what is loaded"
    else:
        remedy = (
            "convert it: load the model with transformers where you trust it, then `model.save_pretrained(FOLDER)`; "
            "many models have a revision with safetensors on the hub"
        )
    return Problem(f"{path} is pickled weights or the like, which run code when they are loaded", remedy)


def _shards(index: Path) -> list[str]:
    try:
        document: Any = json.loads(index.read_bytes())
        shards = list(document["weight_map"].values())
        if not all(isinstance(s, str) and Path(s).name == s for s in shards):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"{index} does not say in which file each tensor is", "fetch the model again, or write it anew"
        ) from None
    return shards
