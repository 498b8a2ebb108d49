"""A conversation as text, with the characters that the assistant says.

The chat template is rendered as ``transformers`` renders it (sandboxed Jinja, ``trim_blocks``, ``lstrip_blocks``, the helpers
``raise_exception`` and ``strftime_now``), so that training sees the text that serving will see. What is trained are the
assistant's words *and the token that ends them*: a model that was never taught to stop does not stop.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from kaito_core import foreign_json
from kaito_core.data.chat_format import chat_format, default_template, stop_ids, unnamed
from kaito_core.data.formats import Message
from kaito_core.data.tokenizer_file import added_tokens_of
from kaito_core.plugins.types import ChatFormat
from kaito_core.problems import Problem, UserError

TEMPLATE = "chat_template.jinja"
"""A template in a file of its own, as transformers writes it since version 4.50. It counts before the one in tokenizer_config.json."""

LARGEST_OBJECT = 32 << 20
"""Bytes of tokenizer_config.json and its like that are read at most, as in `kaito_core.models.files`."""
LARGEST_TEMPLATE = 4 << 20
"""Bytes of it that are read at most; published ones have some ten thousand."""

_MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class ChatError(UserError):
    """The template cannot render this conversation, or does so in a way that cannot be trained on."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """The text of a conversation."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """What the assistant says, with the stop token: [start, end) in characters, in order."""


def render(messages: Sequence[Message], chat: ChatFormat, special: Mapping[str, str] | None = None) -> Rendered:
    """The whole conversation as text, and the spans that the assistant says.

    ``special`` are the tokenizer's named special tokens (``bos_token`` …), which templates may use: see `special_tokens`.
    With ``{% generation %}`` marks in the template the spans are theirs; without, the text before each answer is rendered
    alone and must be a prefix of the whole. Raises `ChatError`, and a plain `UserError` where there is no template."""
    if _MARKS.search(chat.template):
        nonce = secrets.token_hex(16)
        text, spans = _unmarked(_run(messages, chat, special, nonce=nonce), nonce)
    else:
        text = _run(messages, chat, special)
        spans = [_span(i, text, messages, chat, special) for i, m in enumerate(messages) if m.role == "assistant"]
    for message in messages:
        if message.role != "assistant" and message.content.strip() not in text:
            raise ChatError(f"the chat template leaves out what the {message.role} says",
                            "the model has no such role: put the words into the first user message")  # fmt: skip
    return Rendered(text, tuple(_with_stop(text, start, end, chat) for start, end in spans))


def render_prompt(messages: Sequence[Message], chat: ChatFormat, special: Mapping[str, str] | None = None) -> str:
    """The conversation so far, up to where the assistant begins to speak: what a model is asked to go on with."""
    return _run(messages, chat, special, add_generation_prompt=True)


def special_tokens(model_folder: Path) -> dict[str, str]:
    """``bos_token``, ``eos_token`` … of a tokenizer, from ``tokenizer_config.json``; empty when there is no such file."""
    found = {}
    for name, value in _object(model_folder / "tokenizer_config.json").items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            found[name] = content
    return found


def model_template(model_folder: Path) -> str:
    """The chat template in a model's own files: chat_template.jinja, or else ``chat_template`` of tokenizer_config.json (of several
    the one called ``default``). Empty when there is none. Raises `UserError` for a file that cannot be read."""
    path = model_folder / TEMPLATE
    text = ""
    if path.is_file():
        with path.open("rb") as f:
            data = f.read(LARGEST_TEMPLATE + 1)
        if len(data) > LARGEST_TEMPLATE:
            raise UserError(Problem(f"larger than {LARGEST_TEMPLATE:,} bytes", "fetch the model again", file=str(path)))
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as e:
            raise UserError(Problem("not UTF-8", "fetch the model again", file=str(path))) from e
    return text or default_template(_object(model_folder / "tokenizer_config.json").get("chat_template"))


def model_stop_tokens(model_folder: Path, template: str = "") -> tuple[str, ...]:
    """The tokens that end an answer by a model's own files: ``eos_token`` of tokenizer_config.json, and those that
    generation_config.json, or else config.json, names by number. First comes the one that ``template`` writes. Empty when they
    name none. Raises `UserError` for a file that cannot be read."""
    tokenizer, generation, config = (
        _object(model_folder / name) for name in ("tokenizer_config.json", "generation_config.json", "config.json")
    )
    by_number = unnamed(tokenizer, stop_ids(generation, config))
    added = _added_tokens(model_folder / "tokenizer.json") if by_number else {}
    return chat_format(tokenizer, generation, config, template, added).stop_tokens


def completed(chat: ChatFormat, model_folder: Path) -> ChatFormat:
    """``chat``, with what it leaves empty from the model's own files. What they do not say either stays empty.

    Raises `UserError` for a file that cannot be read."""
    if not chat.template:
        chat = replace(chat, template=model_template(model_folder))
    if not chat.stop_tokens:
        chat = replace(chat, stop_tokens=model_stop_tokens(model_folder, chat.template))
    return chat


def _object(path: Path) -> Mapping[str, Any]:
    """The JSON object in a file of a model; empty when there is no such file, or something else in it."""
    if not path.is_file():
        return {}
    with path.open("rb") as f:
        data = f.read(LARGEST_OBJECT + 1)
    if len(data) > LARGEST_OBJECT:
        raise UserError(Problem(f"larger than {LARGEST_OBJECT:,} bytes", "fetch the model again", file=str(path)))
    try:
        found = foreign_json.loads(data)
    except ValueError as e:
        raise UserError(Problem(f"not JSON: {e}", "fetch the model again", file=str(path))) from e
    return found if isinstance(found, dict) else {}


def _added_tokens(path: Path) -> Mapping[int, str]:
    if not path.is_file():
        return {}
    try:
        return added_tokens_of(path)
    except ValueError as e:
        raise UserError(Problem(f"cannot be read: {e}", "fetch the model again", file=str(path))) from e


def _span(
    index: int, text: str, messages: Sequence[Message], chat: ChatFormat, special: Mapping[str, str] | None
) -> tuple[int, int]:
    """Where the answer ``messages[index]`` stands in ``text``, from the rendering of what comes before it."""
    before = render_prompt(messages[:index], chat, special)
    if not text.startswith(before):
        raise ChatError(
            "the chat template is not prefix-stable: the text before an answer changes when the conversation goes on",
            "mark what the assistant says with {% generation %}…{% endgeneration %} in the template",
        )
    start = len(before)
    said = messages[index].content
    for content in (said, said.strip()):
        if text.startswith(content, start):
            return start, start + len(content)
    raise ChatError(
        "the chat template changes what the assistant says, so that its words cannot be found in the text",
        "mark what the assistant says with {% generation %}…{% endgeneration %} in the template",
    )


def _with_stop(text: str, start: int, end: int, chat: ChatFormat) -> tuple[int, int]:
    """The span with the stop token that directly follows it, when the marks left it out."""
    if text[start:end].rstrip().endswith(chat.stop_tokens):
        return start, end
    after = len(text) - len(text[end:].lstrip())
    for token in chat.stop_tokens:
        if text.startswith(token, after):
            return start, after + len(token)
    return start, end


def _run(
    messages: Sequence[Message], chat: ChatFormat, special: Mapping[str, str] | None, *,
    add_generation_prompt: bool = False, nonce: str = "",
) -> str:  # fmt: skip
    import jinja2

    if not chat.template:  # no ChatError: it is the same for every conversation, and said once
        raise UserError(
            "the model has no chat template, so that a conversation does not become text",
            "give plain text (rows with the column `text`), or choose the model's version for conversations: -instruct, -it, -chat",
        )
    template = _compiled(chat.template)
    turns = [{"role": m.role, "content": m.content} for m in messages]
    try:
        text: str = template.render(
            {**(special or {}), "messages": turns, "add_generation_prompt": add_generation_prompt, "tools": None,
             "documents": None, _NONCE: nonce}
        )  # fmt: skip
    except jinja2.TemplateError as e:
        raise ChatError(f"the chat template refuses the conversation: {e.message or type(e).__name__}",
                        "bring the conversation into the form that the model knows") from e  # fmt: skip
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError, RecursionError) as e:
        raise ChatError(f"the chat template breaks on the conversation: {type(e).__name__}: {e}",
                        "mend the preset's template") from e  # fmt: skip
    return text


_NONCE = "kaito_generation_mark"


def _unmarked(text: str, nonce: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without the marks of `_compiled`, and the spans between them."""
    parts = text.split(nonce)  # text, answer, text, answer, …, text
    spans: list[tuple[int, int]] = []
    at = 0
    for number, part in enumerate(parts):
        if number % 2:
            spans.append((at, at + len(part)))
        at += len(part)
    return "".join(parts), spans


@lru_cache(maxsize=8)
def _compiled(source: str) -> Any:
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}``: its body is put between two copies of a word that only this rendering knows, so that no data
        can forge a mark and whatever the template does with the text afterwards, the marks move along."""

        tags = {"generation"}  # noqa: RUF012 – Jinja's own form

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            word = nodes.Name(_NONCE, "load")
            return nodes.CallBlock(self.call_method("_mark", [word]), [], [], body).set_lineno(line)

        def _mark(self, word: str, caller: Callable[[], str]) -> str:
            return f"{word}{caller()}{word}"

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as e:
        raise ChatError(
            f"the chat template is not Jinja: line {e.lineno}: {e.message}", "mend the preset's template"
        ) from e
