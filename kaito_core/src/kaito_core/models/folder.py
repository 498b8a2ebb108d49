"""A model in a folder on this machine, as ``save_pretrained`` and the hub's own client leave it."""

from __future__ import annotations

import hashlib
import re
import stat
from pathlib import Path

from kaito_core.data.chat_format import stop_ids, unnamed
from kaito_core.models.architecture import Refused, class_of
from kaito_core.models.files import (
    CONFIG,
    INDEX,
    LARGEST_TEXT,
    TEXTS,
    TOKENIZER,
    Model,
    Raw,
    json_object,
    licence_of,
    model_of,
    needed,
    reduced_tokenizer,
    refusal,
    weight_files,
)
from kaito_core.models.safetensors_header import PREFIX, BadHeader, header_length
from kaito_core.plugins.types import ModelSource
from kaito_core.problems import Problem, UserError


def read_folder(folder: Path, *, field: str = "") -> Model:
    """The model in ``folder``; of its weights only the headers are read. Raises `UserError` with the reason."""
    label = str(folder)
    try:
        names = {p.name for p in folder.iterdir()}
        needed(names)
        raw = _raw(folder, names)
    except Refused as e:
        raise refusal(label, e, field) from None
    except BadHeader as e:
        raise UserError(
            Problem(f"{label}: the weights cannot be read: {e}", "copy or fetch the model again", field)
        ) from None
    except FileNotFoundError as e:
        missing = Path(e.filename or folder)
        what = "there is no such folder" if missing == folder else f"{missing.name} is a link that leads nowhere"
        raise UserError(Problem(f"{label}: {what}", "give the path of a folder with a model", field)) from None
    except NotADirectoryError:
        raise UserError(Problem(f"{label}: this is a file", "give the folder that it is in", field)) from None
    except (OSError, ValueError) as e:
        words = getattr(e, "strerror", None) or str(e)
        raise UserError(Problem(f"{label}: it cannot be read: {words}", "see to its permissions", field)) from None
    # What the folder holds now has to be told from what it holds after a change, so that the revision is a digest.
    source = ModelSource(folder=label, revision=_digest(raw))
    return model_of(raw, source, label, name=folder.name, folder=label, field=field)


def _raw(folder: Path, names: set[str]) -> Raw:
    texts = {name: _text(folder / name) for name in TEXTS if name in names}
    config = json_object(CONFIG, texts[CONFIG])
    class_of(config)
    index = json_object(INDEX, texts[INDEX]) if INDEX in texts else None
    headers = {name: _header(folder / name) for name in weight_files(names, index)}
    optional = ("generation_config.json", "tokenizer_config.json")
    generation, tokenizer = (json_object(n, texts[n]) if n in texts else {} for n in optional)
    if unnamed(tokenizer, stop_ids(generation, config)):
        texts[TOKENIZER] = reduced_tokenizer(_text(folder / TOKENIZER))
    return Raw(texts, headers, _licence(folder, names))


def _text(path: Path) -> str:
    limit = LARGEST_TEXT[path.name]
    _regular(path)
    with path.open("rb") as f:
        data = f.read(limit + 1)
    if len(data) > limit:
        raise Refused(f"{path.name} is larger than {limit} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise Refused(f"{path.name} is not UTF-8") from None


def _header(path: Path) -> tuple[int, str]:
    size = _regular(path)
    with path.open("rb") as f:
        try:
            length = header_length(f.read(PREFIX), size)
            return size, f.read(length).decode("utf-8")
        except BadHeader as e:
            raise BadHeader(f"{path.name}: {e}") from None
        except UnicodeDecodeError:
            raise BadHeader(f"{path.name}: the header is not UTF-8") from None


def _regular(path: Path) -> int:
    """The size of a file; anything else (a pipe would wait for ever) is refused."""
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise Refused(f"{path.name} is not a file")
    return about.st_size


def _licence(folder: Path, names: set[str]) -> str:
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


def _digest(raw: Raw) -> str:
    """Of the small files and of the headers of the weights, which changes with nearly everything but the weights' numbers."""
    return "sha256:" + hashlib.sha256(raw.to_json().encode("utf-8", "surrogatepass")).hexdigest()
