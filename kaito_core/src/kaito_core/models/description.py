"""Models' files, read into plain data: in this process where they are small, else in one with limits (`kaito_core.limited`).

A folder and a hub are read in the same steps: `wanted` says which weight files there are to look into, and whether tokenizer.json is
needed; when those are there, `described` says what the model is. What a hub sends lies in a folder as well: of the weight files
only their beginnings."""

from __future__ import annotations

import hashlib
import re
import stat
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kaito_core.data.chat_format import stop_ids, unnamed
from kaito_core.limited import MODEL_FILES, Exceeded, run, working_on
from kaito_core.models.architecture import Refused, class_of
from kaito_core.models.files import (
    CONFIG,
    INDEX,
    LARGEST_TEXT,
    PICKLES,
    TEXTS,
    TOKENIZER,
    UNKNOWN_LICENCE,
    Model,
    Raw,
    json_object,
    licence_of,
    model_of,
    reduced_tokenizer,
    weight_files,
)
from kaito_core.models.safetensors_header import PREFIX, BadHeader, header_length
from kaito_core.plugins.types import ModelSource, Preset
from kaito_core.problems import Problem, UserError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

SMALL_BYTES: Final = 256 << 10
"""Of files that are read in this process: as Python objects they are a few MiB. Most published models are below it."""

LARGEST_HEADERS: Final = 64 << 20
"""Bytes of all headers of one model together; the largest published models (140,000 tensors) have about 20 MiB."""

LARGEST_TEMPLATE: Final = 256 << 10
"""Bytes of a chat template, which goes into every job's file; the longest published ones have 20 KiB."""


class TooMuch(Refused):
    """Reading the model takes more than a model may take. It does so each time, so that this answer is worth keeping."""


@dataclass(frozen=True)
class Wanted:
    """What has to be looked into besides the small files."""

    weights: tuple[str, ...]
    """The weight files whose headers are read."""
    tokenizer: bool
    """Whether the small files leave a token without its text, so that tokenizer.json is asked."""


def about(file: Path) -> Mapping[str, Any]:
    """What a hub's description of a repository says: ``sha``, ``names`` of files, ``licence`` and ``gated``. Raises `Refused`."""
    said: dict[str, Any] = _asked("_about", {"file": str(file)}, file.stat().st_size)
    return said


def check_class(folder: Path) -> None:
    """Nothing else is asked for of a model whose architecture is refused anyway. Raises `Refused`."""
    size = _size(folder, (CONFIG,))
    if size <= SMALL_BYTES:  # else it is read once, with everything else
        _asked("_class", {"folder": str(folder)}, size)


def wanted(folder: Path, names: Collection[str]) -> Wanted:
    """What is needed of a model whose small files are in ``folder``, of all its files ``names``. Raises `Refused`."""
    said = _asked("_wanted", {"folder": str(folder), "names": sorted(names)}, _size(folder, TEXTS))
    return Wanted(tuple(said["weights"]), bool(said["tokenizer"]))


def described(
    folder: Path,
    found: Wanted,
    label: str,
    *,
    name: str,
    hub: tuple[str, str] | None = None,
    sizes: Mapping[str, int] | None = None,
    licence: str = UNKNOWN_LICENCE,
    gated: bool = False,
    field: str = "",
) -> Model:
    """The model whose files are in ``folder``: one of a ``hub`` (its name and commit), whose weight files have these ``sizes`` in
    truth, or else one of this machine. Raises `UserError` and `TooMuch`."""
    files = [*TEXTS, *([TOKENIZER] if found.tokenizer else [])]
    size = _size(folder, files) + sum(_header_length(folder / n, (sizes or {}).get(n)) for n in found.weights)
    argument = {
        "folder": str(folder), "weights": found.weights, "tokenizer": found.tokenizer, "label": label, "name": name, "hub": hub,
        "sizes": sizes, "licence": licence, "gated": gated,
    }  # fmt: skip
    said = _asked("_described", argument, size)
    if "problems" in said:
        raise UserError([Problem(**{**p, "field": field}) for p in said["problems"]])
    return model_from(said)


def model_json(model: Model) -> dict[str, Any]:
    """A model as plain data, for `model_from`."""
    return {"preset": asdict(model.preset), "folder": model.folder, "not_tunable": model.not_tunable}


def model_from(said: Mapping[str, Any]) -> Model:
    """What `model_json` wrote down. Raises `ValueError` and `KeyError` for anything else."""
    preset = _preset_schema().validate_python(said["preset"])
    return Model(preset, str(said["folder"]), not_tunable=str(said["not_tunable"]))


@cache
def _preset_schema() -> TypeAdapter[Preset]:
    from pydantic import TypeAdapter

    return TypeAdapter(Preset)


def _asked(step: str, argument: dict[str, Any], size: int) -> Any:
    try:
        said = run(f"{__name__}:answer", {**argument, "step": step}, large=size > SMALL_BYTES, limits=MODEL_FILES)
    except Exceeded as e:
        raise TooMuch(str(e), "choose another model, or another revision of it") from None
    if "refused" in said:
        raise Refused(*said["refused"])
    if "bad_header" in said:
        raise BadHeader(said["bad_header"])
    return said


def _size(folder: Path, names: Collection[str]) -> int:
    """Bytes of those of the files that are there. Raises `Refused` for one that is larger than such files are."""
    total = 0
    for name in names:
        path = folder / name
        if path.is_symlink() or path.exists():
            size = regular(path)
            if size > LARGEST_TEXT[name]:
                raise Refused(f"{name} is larger than {LARGEST_TEXT[name]} bytes")
            total += size
    return total


def regular(path: Path) -> int:
    """The size of a file; anything else (a pipe would wait for ever) is refused."""
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise Refused(f"{path.name} is not a file")
    return about.st_size


def _header_length(path: Path, size: int | None) -> int:
    """Bytes of a weight file's header. ``size`` is the whole file's, where only its beginning is here. Raises `BadHeader`."""
    here = regular(path)
    with path.open("rb") as f:
        try:
            return header_length(f.read(PREFIX), here if size is None else size)
        except BadHeader as e:
            raise BadHeader(f"{path.name}: {e}") from None


# --- the steps, in whichever process they are done; argument and answer are JSON


def answer(argument: dict[str, Any]) -> dict[str, Any]:
    """One step's answer, a refusal among them."""
    steps = {"_about": _about, "_class": _class, "_wanted": _wanted, "_described": _described}
    try:
        return steps[argument["step"]](argument)
    except Refused as e:
        return {"refused": [e.message, e.remedy]}
    except BadHeader as e:
        return {"bad_header": str(e)}
    except UserError as e:
        return {"problems": [p.to_json() for p in e.problems]}


def _about(argument: Mapping[str, Any]) -> dict[str, Any]:
    working_on("the hub's answer")
    said = json_object("the hub's answer", Path(argument["file"]).read_text("utf-8", "replace"))
    listed, card, tags = said.get("siblings"), said.get("cardData"), said.get("tags")
    names = [s.get("rfilename") for s in (listed if isinstance(listed, list) else ()) if isinstance(s, Mapping)]
    sha = said.get("sha")
    return {
        "sha": sha if isinstance(sha, str) and len(sha) < 100 else "",
        # Of what is in folders below only the pickles are of interest: they are the reason why there are no other weights.
        "names": [n for n in names if isinstance(n, str) and len(n) < 256 and ("/" not in n or n.endswith(PICKLES))],
        "licence": licence_of(card if isinstance(card, Mapping) else {}, tags if isinstance(tags, list) else ()),
        "gated": said.get("gated") not in (None, False),
    }


def _class(argument: Mapping[str, Any]) -> dict[str, Any]:
    class_of(_object(Path(argument["folder"]), CONFIG))
    return {}


def _wanted(argument: Mapping[str, Any]) -> dict[str, Any]:
    folder = Path(argument["folder"])
    config = _object(folder, CONFIG)
    class_of(config)
    index = _object(folder, INDEX) if _there(folder, INDEX) else None
    weights = weight_files(argument["names"], index)
    del index
    generation, tokenizer = (
        _object(folder, n) if _there(folder, n) else {} for n in ("generation_config.json", "tokenizer_config.json")
    )
    return {"weights": weights, "tokenizer": unnamed(tokenizer, stop_ids(generation, config))}


def _described(argument: Mapping[str, Any]) -> dict[str, Any]:
    folder, hub, sizes = Path(argument["folder"]), argument["hub"], argument["sizes"] or {}
    texts = {n: _text(folder, n) for n in TEXTS if _there(folder, n)}
    headers = {}
    for name in argument["weights"]:
        working_on(name)
        length = _header_length(folder / name, sizes.get(name))
        with (folder / name).open("rb") as f:
            f.seek(PREFIX)
            try:
                text = f.read(length).decode("utf-8")
            except UnicodeDecodeError:
                raise BadHeader(f"{name}: the header is not UTF-8") from None
        headers[name] = sizes.get(name, (folder / name).stat().st_size), text
    if argument["tokenizer"]:
        working_on(TOKENIZER)
        texts[TOKENIZER] = reduced_tokenizer(folder / TOKENIZER)
    raw = Raw(texts, headers, argument["licence"], argument["gated"])
    # What a folder holds now has to be told from what it holds after a change, so that the revision is a digest.
    source = ModelSource(hub=hub[0], revision=hub[1]) if hub else ModelSource(folder=str(folder), revision=_digest(raw))
    working_on("the headers of the weights")
    model = model_of(raw, source, argument["label"], name=argument["name"], folder="" if hub else str(folder))
    if len(model.preset.chat.template) > LARGEST_TEMPLATE:
        raise Refused(f"its chat template is longer than {LARGEST_TEMPLATE} characters")
    return model_json(model)


def _there(folder: Path, name: str) -> bool:
    path = folder / name
    return path.is_symlink() or path.exists()


def _object(folder: Path, name: str) -> dict[str, Any]:
    return json_object(name, _text(folder, name))


def _text(folder: Path, name: str) -> str:
    working_on(name)
    try:
        return (folder / name).read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        raise Refused(f"{name} is not UTF-8") from None


def _digest(raw: Raw) -> str:
    """Of the small files and of the headers of the weights, which changes with nearly everything but the weights' numbers."""
    return "sha256:" + hashlib.sha256(raw.to_json().encode("utf-8", "surrogatepass")).hexdigest()


def folder_licence(folder: Path, names: Collection[str]) -> str:
    """From the head of README.md, where model cards say it."""
    if "README.md" not in names or not (folder / "README.md").is_file():
        return licence_of({})
    with (folder / "README.md").open("rb") as f:
        head = f.read(1 << 16).decode("utf-8", "replace")
    card = head.split("\n---", 1)[0] if head.startswith("---") else ""
    found = dict(
        re.findall(r"^(license|license_name):[ \t]*[\"']?([\w.+() /-]{1,80}?)[\"']?[ \t]*$", card, re.MULTILINE)
    )
    return licence_of(found)
