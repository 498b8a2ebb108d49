"""What a reader brings of a model, and the preset that it makes: pure, so that a folder and a hub give the same."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kaito_core import foreign_json
from kaito_core.data.chat_format import added_tokens, chat_format
from kaito_core.data.tokenizer_file import added_tokens_of
from kaito_core.limited import working_on
from kaito_core.models.architecture import Refused, describe
from kaito_core.models.safetensors_header import BadHeader, Header, parse
from kaito_core.plugins.types import ModelSource, Preset
from kaito_core.problems import Problem, UserError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
TEXTS = (CONFIG, "tokenizer_config.json", "generation_config.json", "chat_template.jinja", INDEX)
"""What is read of a model as a whole, besides the headers of its weights."""

LARGEST_TEXT: Mapping[str, int] = {
    CONFIG: 4 << 20,
    "tokenizer_config.json": 32 << 20,
    "generation_config.json": 1 << 20,
    "chat_template.jinja": 1 << 20,
    INDEX: 64 << 20,
    TOKENIZER: 128 << 20,
}
"""Bytes that are read of each at most; published ones stay well below."""

PICKLES = (".bin", ".pt", ".pth")
"""Endings of weights that are never loaded."""

MOST_FILES = 1000
"""Weight files of one model; the largest published models have about two hundred."""

UNKNOWN_LICENCE = "unknown"


@dataclass(frozen=True)
class Raw:
    """The texts of a model's files by name, and of its weights the headers alone."""

    texts: Mapping[str, str]
    headers: Mapping[str, tuple[int, str]]
    """By file: its size in bytes, and the header without the 8 bytes before it."""
    licence: str = UNKNOWN_LICENCE
    gated: bool = False

    def to_json(self) -> str:
        """All of it as one text."""
        about = {"texts": dict(self.texts), "headers": {n: list(h) for n, h in self.headers.items()}}
        return json.dumps({**about, "licence": self.licence, "gated": self.gated})


@dataclass(frozen=True)
class Model:
    """A model that was read."""

    preset: Preset
    folder: str = ""
    """Where it lies on this machine; empty when it is on a hub."""
    not_tunable: str = field(default="", kw_only=True)
    """Why it can be served and not tuned; empty when it can be tuned."""


def model_of(raw: Raw, source: ModelSource, label: str, *, name: str, folder: str = "", field: str = "") -> Model:
    """The model whose files are ``raw``: the preset's name is made from ``name``, and ``label`` is what messages say.

    Raises `UserError` with the reason when it is none that kaito can use."""
    try:
        config = json_object(CONFIG, raw.texts.get(CONFIG, ""))
        tokenizer_config, generation_config, tokenizer = (
            json_object(name, raw.texts[name]) if raw.texts.get(name) else {}
            for name in ("tokenizer_config.json", "generation_config.json", TOKENIZER)
        )
        headers = headers_of(raw)
        described = describe(config, headers)
        chat = chat_format(
            tokenizer_config,
            generation_config,
            config,
            raw.texts.get("chat_template.jinja", ""),
            added_tokens(tokenizer),
        )
    except Refused as e:
        raise refusal(label, e, field) from None
    except BadHeader as e:
        remedy = "fetch the model again; if it is the same then, its publisher has to mend it"
        raise UserError(Problem(f"{label}: the weights cannot be read: {e}", remedy, field)) from None
    not_tunable = described.not_tunable
    if not not_tunable and not chat.stop_tokens:
        not_tunable = "its files do not say which token ends an answer (eos_token)"
    architecture = described.architecture
    exact = architecture.parameters * (4 if described.dtype == "float32" else 2)
    preset = Preset(
        name=preset_name(name),
        source=source,
        licence=raw.licence,
        architecture=architecture,
        chat=chat,
        lora_targets=tuple(architecture.linears),
        dtype=described.dtype,
        description=f"read from {label}",
        gated=raw.gated,
        quantization=described.quantization,
        weights=0 if described.weights == exact else described.weights,
    )
    return Model(preset, folder, not_tunable=not_tunable)


def headers_of(raw: Raw) -> tuple[Header, ...]:
    """The headers, checked against the sizes of their files and against the index. Raises `BadHeader` and `Refused`."""
    headers = {}
    for name, (size, text) in raw.headers.items():
        working_on(name)
        try:
            headers[name] = parse(text.encode("utf-8", "surrogatepass"), size)
        except BadHeader as e:
            raise BadHeader(f"{name}: {e}") from None
    if raw.texts.get(INDEX):
        for tensor, file in weight_map(json_object(INDEX, raw.texts[INDEX])).items():
            if file not in headers or tensor not in headers[file].tensors:
                raise Refused(f"{INDEX} says that {tensor[:80]!r} is in {file}, and it is not", "fetch the model again")
    return tuple(headers.values())


def weight_files(names: Collection[str], index: Mapping[str, Any] | None) -> list[str]:
    """The safetensors files that hold the model, of all its files. Raises `Refused` when there are none.

    Some repositories hold the weights twice; those that the index names, or else ``model*.safetensors``, are the ones that are
    loaded."""
    if index is not None:
        found = sorted(set(weight_map(index).values()))
        absent = [n for n in found if n not in names]
        if absent:
            raise Refused(f"{INDEX} names {absent[0]}, which is not there", "the model is not complete: fetch it again")
    else:
        loadable = [n for n in names if _is_weights(n) and not n.startswith(("adapter_", "consolidated"))]
        whole = [n for n in loadable if n == "model.safetensors"]
        found = whole or sorted(loadable) or sorted(n for n in names if _is_weights(n) and n.startswith("consolidated"))
    if len(found) > MOST_FILES:
        raise Refused(f"it has {len(found)} weight files, and kaito reads {MOST_FILES} at most")
    if found:
        return found
    if "adapter_config.json" in names:
        raise Refused(
            "that is an adapter and not a model", "name the model that it belongs to, and the adapter under adapters"
        )
    if any(n.endswith(PICKLES) for n in names):
        raise Refused(
            "its weights are pickles (*.bin), which can run code when they are loaded: kaito never loads them",
            "choose a revision with safetensors, or convert them with safetensors' own tool",
        )
    if any(n.endswith(".gguf") for n in names):
        raise Refused("its weights are GGUF, which kaito does not serve", "choose the model that they were made from")
    raise Refused("it has no *.safetensors file", "choose a model that has them")


def needed(names: Collection[str]) -> None:
    """The files without which nothing can be made of a model. Raises `Refused`."""
    if CONFIG not in names:
        if "adapter_config.json" in names:
            weight_files(names, None)
        raise Refused(f"there is no {CONFIG}", "it needs the files that transformers writes with save_pretrained")
    if TOKENIZER not in names:
        raise Refused(
            f"there is no {TOKENIZER}",
            "kaito loads fast tokenizers only: choose a revision that has one, or convert it",
        )


def weight_map(index: Mapping[str, Any]) -> dict[str, str]:
    """File by tensor, from model.safetensors.index.json. Raises `Refused`."""
    found = index.get("weight_map")
    if not isinstance(found, Mapping) or not found:
        raise Refused(f"{INDEX} has no weight_map", "fetch the model again")
    for file in found.values():
        if not isinstance(file, str) or not _is_weights(file):
            raise Refused(
                f"{INDEX} names a file that is no weight file beside it: {file!r:.80}", "fetch the model again"
            )
    return dict(found)


def json_object(name: str, text: str) -> dict[str, Any]:
    """The JSON object in a file. Raises `Refused`."""
    working_on(name)
    try:
        parsed = foreign_json.loads(text)
    except ValueError as e:
        raise Refused(f"{name} is not JSON: {e!s:.200}", "fetch the model again") from None
    if not isinstance(parsed, dict):
        raise Refused(f"{name} is not a JSON object", "fetch the model again")
    return parsed


def reduced_tokenizer(path: Path) -> str:
    """tokenizer.json with nothing but the tokens that it adds: the rest is large, and not needed. Raises `Refused`."""
    working_on(TOKENIZER)
    try:
        listed = added_tokens_of(path)
    except ValueError as e:
        raise Refused(f"{TOKENIZER} cannot be read: {e!s:.200}", "fetch the model again") from None
    return json.dumps({"added_tokens": [{"id": i, "content": t} for i, t in listed.items()]})


def preset_name(text: str) -> str:
    """A preset's name for ``org/name`` or a folder: lower case, and ``-`` for ``/``, as KAITO names the folders of such models."""
    name = re.sub(r"[^a-z0-9._]+", "-", text.lower())
    name = re.sub(r"[._-]*[-][._-]*|[._]{2,}", "-", name)
    return name.strip("._-") or "model"


def licence_of(card: Mapping[str, Any], tags: Iterable[Any] = ()) -> str:
    """The licence that a model card names: its ``license``, or ``license_name`` where that says ``other``."""
    listed = [card.get("license_name") if card.get("license") == "other" else None, card.get("license")]
    listed += [t.removeprefix("license:") for t in tags if isinstance(t, str) and t.startswith("license:")]
    for said in listed:
        said = said[0] if isinstance(said, list) and said else said
        if isinstance(said, str) and re.fullmatch(r"[\w.+() /-]{1,80}", said):
            return said
    return UNKNOWN_LICENCE


def refusal(label: str, why: Refused, field: str) -> UserError:
    """The same as an error that names the model."""
    return UserError(Problem(f"{label}: {why.message}", why.remedy, field))


def _is_weights(name: str) -> bool:
    """Whether it is the name of a safetensors file, and of nothing outside its folder."""
    return bool(re.fullmatch(r"[A-Za-z0-9_][\w.+-]{0,199}\.safetensors", name))
