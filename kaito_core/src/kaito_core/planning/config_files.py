"""Settings of a ConfigMap that name a file: the file is another key of the same ConfigMap, and its text takes the place of its name.

A path of the container is never read for a configuration: among its files are the passwords of registries, and what is read ends in an
adapter's image or in an answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from kaito_core.problems import Problem, UserError

FOLDER: Final = "/mnt/config/"
"""Where KAITO's pods see the files of the ConfigMap; a name may begin with it."""

CHAT_TEMPLATE: Final = "chat-template"


def is_template(text: str) -> bool:
    """Whether it is a Jinja template and not the name of one: without a brace it would say the same to every question."""
    return "{" in text


def with_templates(config: Mapping[str, Any], files: Mapping[str, str], where: str) -> dict[str, Any]:
    """The sections of a configuration with the texts of the chat templates that they name, out of ``files``, the ``data`` of their
    ConfigMap. ``where`` is what the fields of problems begin with. Raises `UserError` for a name that is no file of it."""
    problems: list[Problem] = []
    read: dict[str, Any] = {}
    for name, section in config.items():
        read[name] = section
        if isinstance(section, Mapping):
            read[name] = {k: _text(k, v, files, f"{where}.{name}.{k}", problems) for k, v in section.items()}
    if problems:
        raise UserError(problems)
    return read


def _text(key: object, value: object, files: Mapping[str, str], field: str, problems: list[Problem]) -> object:
    setting = str(key).lstrip("-").replace("_", "-").lower()
    if setting != CHAT_TEMPLATE or not isinstance(value, str) or not value or is_template(value):
        return value
    name = value.strip().removeprefix(FOLDER).removeprefix("./")
    if name in files and is_template(files[name]):
        return files[name]
    cause = "has no Jinja in it" if name in files else "is neither a template nor a file of the ConfigMap"
    remedy = f"write the template itself, or put it into the ConfigMap as a key of its own; it has {', '.join(sorted(files))}"
    problems.append(Problem(f"{value[:100]!r} {cause}", remedy[:400], field))
    return value
