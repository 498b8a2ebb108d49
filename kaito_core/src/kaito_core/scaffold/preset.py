"""The package of a preset: the model's numbers written out, and its files where the package's tests find them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from kaito_core.models.files import CONFIG, TOKENIZER, Model
from kaito_core.models.folder import read_folder
from kaito_core.models.hub import small_texts
from kaito_core.models.presets import Reader
from kaito_core.plugins.types import ModelSource
from kaito_core.problems import UserError
from kaito_core.scaffold import tiny_model
from kaito_core.scaffold.described import Described, described
from kaito_core.scaffold.package import Names, rendered

SHIPPED: Final = 64 << 20
"""Bytes of a model that goes into the package itself: PyPI takes files of 100 MB, and wheels do not pack weights much smaller."""

SMALL: Final = (CONFIG, "tokenizer_config.json", "generation_config.json", "chat_template.jinja", TOKENIZER)
"""What of a model the package's tests need; the tests of the kit say what they skip without the tokenizer."""


@dataclass(frozen=True)
class Package:
    """All that is written."""

    texts: Mapping[str, str]
    """By path in the package."""
    copies: Mapping[str, Path]
    """Files of a model by path in the package."""
    unknown: Mapping[str, str] = field(default_factory=dict)
    """What of the model a person has to say, by field."""


def package(names: Names, wanted: str, scratch: Path, token: str = "") -> Package:
    """The package of a preset for the model ``wanted``: a folder, ``org/name`` or ``org/name@revision``, or nothing: then it is a
    model of 120 thousand random numbers, so that everything can be tried.

    ``scratch`` is a folder that lasts until the package is written. Raises `UserError` when the model cannot be used, and
    `Failure` when the hub does not answer."""
    if not wanted:
        return _tiny(names, scratch)
    if Path(wanted).expanduser().is_dir():
        model = read_folder(Path(wanted).expanduser().absolute(), field="--from")
        return _of_folder(names, _without_words(model))
    model, small = _of_hub(wanted, token)
    made = described(_without_words(model), model.preset.source)
    places = {}
    for name, text in small.items():
        places[f"tests/model/{name}"] = scratch / name
        (scratch / name).write_text(text, encoding="utf-8", newline="")
    about = (
        f"The numbers are those of [{model.preset.source.hub}](https://huggingface.co/{model.preset.source.hub}) at the commit\n"
        f"`{model.preset.source.revision}`. `tests/model/` has the small files that they are held against."
    )
    return _made(names, made, about, places, folder="model")


def _tiny(names: Names, scratch: Path) -> Package:
    """No model is given: one that is made here, with the script that makes it."""
    tiny_model.make(scratch / "model")
    model = read_folder(scratch / "model")
    words = "A toy of random numbers, which knows nothing: to be replaced"
    model = replace(model, preset=replace(model.preset, licence="Apache-2.0", description=words))
    source = ModelSource(package=names.module, path="model")
    made = described(model, source)
    about = (
        "It is a toy: a model of 120 thousand random numbers that `scripts/make_model.py` makes, so that everything can be\n"
        "tried before there is a real one. For a real one begin with its name or its folder:\n\n"
        f"    kaito new preset {names.name} --from org/name"
    )
    copies = {f"src/{names.module}/model/{p.name}": p for p in sorted((scratch / "model").iterdir())}
    package = _made(names, replace(made, unknown={}), about, copies)
    script = re.sub(r"  # noqa.*", "", Path(tiny_model.__file__).read_text(encoding="utf-8"))  # those of our own rules
    return replace(package, texts={**package.texts, "scripts/make_model.py": script})


def _of_folder(names: Names, model: Model) -> Package:
    from kaito_core.artifacts.model_files import model_files

    folder = Path(model.folder)
    found = model_files(folder)
    size = sum(p.stat().st_size for p in found)
    if size <= SHIPPED:
        made = described(model, ModelSource(package=names.module, path="model"))
        about = f"The model is part of this package: {size / 1e6:.1f} MB, in `src/{names.module}/model/`."
        return _made(names, made, about, {f"src/{names.module}/model/{p.name}": p for p in found})
    made = described(model, ModelSource(folder=model.folder))
    about = (
        f"The weights ({size / 1e9:.1f} GB) are too large for a package. `tests/model/` has the small files that the numbers are\n"
        "held against."
    )
    copies = {f"tests/model/{p.name}": p for p in found if p.name in SMALL}
    return _made(names, made, about, copies, folder="model")


def _of_hub(wanted: str, token: str) -> tuple[Model, dict[str, str]]:
    """The model, and its small files as they were read. tokenizer.json is not among them: it is large, and only looked into."""
    from kaito_core.models.presets import is_folder, is_model

    if is_folder(wanted):
        raise UserError(f"there is no folder {wanted}", "give the path of a folder with a model", field="--from")
    if not is_model(wanted):
        raise UserError(
            f"there is no folder {wanted!r:.200}, and it is not org/name of the hub either",
            "name a folder with a model's files, or org/name or org/name@revision of the Hugging Face hub",
            field="--from",
        )
    model = Reader(None, None, token)(wanted, "--from")
    return model, small_texts(model.preset.source.hub, model.preset.source.revision, token=token)


def _without_words(model: Model) -> Model:
    """Where it was read from is no description."""
    return replace(model, preset=replace(model.preset, description=""))


def _made(names: Names, made: Described, about: str, copies: Mapping[str, Path], folder: str = "") -> Package:
    still = "\n".join(f"* `{name}`: {words}" for name, words in made.unknown.items())
    values = {
        "source": made.source,
        "preset": made.preset,
        "about": about,
        "still": f"\n## What only a person knows\n\nThe model's files do not say, and `plugin.py` marks it:\n\n{still}\n" if still else "",
        "folder": f'\n    model_folder = "{folder}"' if folder else "",
    }  # fmt: skip
    texts = rendered(names, values)
    texts[f"src/{names.module}/chat_template.jinja"] = made.template
    return Package(texts, copies, made.unknown)
