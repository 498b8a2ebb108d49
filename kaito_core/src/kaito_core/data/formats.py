"""What a row means: the known shapes of training data, found from the first rows and brought into one form. Pure.

======================== ============================================================================================
format                   columns
======================== ============================================================================================
messages                 ``messages``: a list of ``{"role": …, "content": …}`` (OpenAI)
sharegpt                 ``conversations``: a list of ``{"from": "human" | "gpt" | "system", "value": …}``
alpaca                   ``instruction``, ``output`` or ``response``, and ``input`` or ``context`` if there is more to say
prompt and answer        ``prompt``/``completion``, ``prompt``/``response``, ``question``/``answer``, …; texts or messages
text                     ``text``: trained as it is
======================== ============================================================================================

Other names are given with ``DatasetConfig``: ``messages_column``, or ``prompt_column`` (KAITO's ``context_column``),
``response_column`` and ``system_column``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, groupby, islice
from typing import Any

from kaito_core import foreign_json
from kaito_core.data.rows import Row
from kaito_core.problems import Problem, UserError

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
}  # fmt: skip
"""What the formats call a speaker, and what a chat template calls it."""
PAIRS = (
    ("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("query", "response"),
    ("instruction", "output"), ("instruction", "response"), ("input", "output"),
)  # fmt: skip
EXPECTED = "one of: `messages`; `conversations`; `instruction` and `output`; `prompt` and `completion`; `question` and `answer`; `text`"
LOOK_AT = 20
"""Rows whose columns decide the format."""
MOST_PROBLEMS = 20
"""Wrong rows that are shown before we stop reading."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn."""

    role: str
    """``system``, ``user`` or ``assistant``."""
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns, to be rendered with a chat template; what the assistant says is trained."""

    messages: tuple[Message, ...]

    @property
    def prompt(self) -> tuple[Message, ...]:
        """Everything before the last answer."""
        return self.messages[:-1]

    @property
    def answers(self) -> list[str]:
        return [m.content for m in self.messages if m.role == "assistant"]


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text, trained from its first token to its last."""

    text: str


@dataclass(frozen=True, slots=True)
class Format:
    """Which columns hold what."""

    name: str
    messages: str = ""
    prompt: str = ""
    context: str = ""
    response: str = ""
    system: str = ""
    text: str = ""


class WrongRow(ValueError):
    """A row is not of the format; the words say what was found and what was expected."""


def detect(rows: Iterable[Row], config: Mapping[str, Any]) -> Format:
    """The format of the data from its first rows and from ``DatasetConfig``. UserError when it is none that we know."""
    first = list(islice(rows, LOOK_AT))
    if not first:
        raise UserError("there is no row in the training data", "give at least one file with data in it")
    columns = list(dict.fromkeys(k for row in first for k, v in row.values.items() if v is not None))
    mapped = _configured(config)
    if mapped:
        named = [
            c
            for c in (mapped.messages, mapped.prompt, mapped.context, mapped.response, mapped.system, mapped.text)
            if c
        ]
        missing = [c for c in named if c not in columns]
        if missing:
            raise UserError(
                Problem(f"DatasetConfig names {_listed(missing)}, and the data has the columns {_listed(columns)}",
                        "name columns that are there, or none: the known formats are found without", "DatasetConfig", first[0].file)
            )  # fmt: skip
        return mapped
    found = _known(columns)
    if found:
        return found
    raise UserError(
        Problem(f"the data has the columns {_listed(columns)}; expected {EXPECTED}",
                "rename the columns, or name them in DatasetConfig: messages_column, or prompt_column and response_column",
                file=first[0].file)
    )  # fmt: skip


def _configured(config: Mapping[str, Any]) -> Format | None:
    """The format that the configuration names. KAITO's default, response_column "text" alone, names none."""

    def column(name: str) -> str:
        value = config.get(name)
        if value is not None and not isinstance(value, str):
            raise UserError(Problem(f"{name} is {value!r}; it is the name of a column", field=f"DatasetConfig.{name}"))
        return value or ""

    messages, response, system = column("messages_column"), column("response_column"), column("system_column")
    prompt, context = column("prompt_column"), column("context_column")
    if messages:
        return Format("messages", messages=messages)
    if not prompt:
        prompt, context = context, ""
    if prompt:
        return Format("prompt and answer", prompt=prompt, context=context, response=response or "text", system=system)
    return Format("text", text=response) if response not in ("", "text") else None


def _known(columns: list[str]) -> Format | None:
    for name, column in (("messages", "messages"), ("sharegpt", "conversations"), ("sharegpt", "conversation")):
        if column in columns:
            return Format(name, messages=column)
    system = next((c for c in ("system", "system_prompt") if c in columns), "")
    for prompt, response in PAIRS:
        if prompt in columns and response in columns:
            if prompt != "instruction":
                return Format("prompt and answer", prompt=prompt, response=response, system=system)
            context = next((c for c in ("input", "context") if c in columns), "")
            return Format("alpaca", prompt=prompt, context=context, response=response, system=system)
    return Format("text", text="text") if "text" in columns else None


def normalise(values: Mapping[str, Any], form: Format) -> Conversation | Text:
    """One row in the one form. `WrongRow` says what was found and what was expected."""
    if form.text:
        return Text(_text(values, form.text))
    if form.messages:
        return _checked(_messages(values.get(form.messages), form.messages))
    system = [Message("system", _text(values, form.system))] if form.system and values.get(form.system) else []
    prompt, response = values.get(form.prompt), values.get(form.response)
    if isinstance(prompt, list) or isinstance(response, list):
        asked = (
            _messages(prompt, form.prompt)
            if isinstance(prompt, list)
            else [Message("user", _text(values, form.prompt))]
        )
        said = (
            _messages(response, form.response)
            if isinstance(response, list)
            else [Message("assistant", _text(values, form.response))]
        )
        return _checked([*system, *asked, *said])
    question = _text(values, form.prompt)
    if form.context and values.get(form.context):
        question = f"{question}\n\n{_text(values, form.context)}"
    return _checked([*system, Message("user", question), Message("assistant", _text(values, form.response))])


def _text(values: Mapping[str, Any], column: str) -> str:
    value = values.get(column)
    if isinstance(value, str):
        return _whole(value, column)
    if isinstance(value, bool | int | float):
        return str(value)
    raise WrongRow(f"found {_kind(value)} in {column!r}, expected a text")


def _messages(value: Any, column: str) -> list[Message]:
    if isinstance(value, str) and value.lstrip().startswith("["):  # CSV can hold a list only as text
        try:
            value = foreign_json.loads(value)
        except ValueError as e:
            raise WrongRow(f"found a text in {column!r} that is not JSON ({e}), expected a list of messages") from None
    if not isinstance(value, list):
        raise WrongRow(f"found {_kind(value)} in {column!r}, expected a list of messages")
    return [_message(m, f"{column}[{i}]") for i, m in enumerate(value)]


def _message(value: Any, place: str) -> Message:
    if not isinstance(value, dict):
        raise WrongRow(f"found {_kind(value)} at {place}, expected an object with `role` and `content`")
    said = value.get("role", value.get("from"))
    if value.get("tool_calls") or value.get("function_call"):
        raise WrongRow(f"found a tool call at {place}; kaito trains on conversations of system, user and assistant")
    role = ROLES.get(said.lower()) if isinstance(said, str) else None
    if role is None:
        raise WrongRow(f"found the role {said!r} at {place}, expected system, user or assistant")
    content = value["content"] if value.get("content") is not None else value.get("value")
    if isinstance(content, list):
        return Message(role, _whole("".join(_part(p, place) for p in content), place))
    if not isinstance(content, str):
        raise WrongRow(f"found {_kind(content)} as the content of {place}, expected a text")
    return Message(role, _whole(content, place))


def _whole(text: str, place: str) -> str:
    """JSON can spell half of a surrogate pair, which is no character and which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise WrongRow(
            f"found half a character (a lone surrogate) in the text at {place!r}, expected Unicode text"
        ) from None
    return text


def _part(part: Any, place: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and isinstance(part.get("text"), str) and part.get("type", "text") == "text":
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else _kind(part)
    raise WrongRow(f"found a content part of type {kind!r} at {place}, expected text only")


def _checked(messages: list[Message]) -> Conversation:
    roles = [m.role for m in messages]
    if not messages:
        raise WrongRow("found no message, expected at least a question and an answer")
    if "system" in roles[1:]:
        raise WrongRow(f"found the system message at place {roles.index('system', 1) + 1}, expected it first and once")
    if "assistant" not in roles:
        raise WrongRow("found no message of the assistant, expected one: only what the assistant says is trained")
    if roles[-1] != "assistant":
        raise WrongRow(
            f"the last message is the {roles[-1]}'s, expected the assistant's: only what the assistant says is trained"
        )
    return Conversation(tuple(messages))


def samples(
    rows: Iterable[Row], config: Mapping[str, Any]
) -> tuple[Mapping[str, Format], Iterator[tuple[Row, Conversation | Text]]]:
    """The format of each file, and every row in the one form. The first is filled while the second is read.

    Each file may have a format of its own. The iterator reads on past wrong rows and raises one `UserError` with all of
    them at its end, or after 20."""
    forms: dict[str, Format] = {}
    return forms, _normalised(rows, config, forms)


def _normalised(
    rows: Iterable[Row], config: Mapping[str, Any], forms: dict[str, Format]
) -> Iterator[tuple[Row, Conversation | Text]]:
    problems: list[Problem] = []
    for file, its_rows in groupby(rows, key=lambda row: row.file):
        first = list(islice(its_rows, LOOK_AT))
        try:
            form = forms[file] = detect(first, config)
        except UserError as e:
            problems += e.problems
            continue
        for row in chain(first, its_rows):
            try:
                yield row, normalise(row.values, form)
            except WrongRow as e:
                remedy = "mend the row or leave it out"
                problems.append(Problem(f"row {row.number}: {e} (the format is {form.name})", remedy, file=row.file))
                if len(problems) >= MOST_PROBLEMS:
                    problems.append(
                        Problem(f"stopped reading after {MOST_PROBLEMS} wrong rows; there may be more", file=row.file)
                    )
                    raise UserError(problems) from None
    if problems:
        raise UserError(problems)


def _kind(value: Any) -> str:
    names = {
        type(None): "nothing",
        dict: "an object",
        list: "a list",
        str: "a text",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), f"a {type(value).__name__}")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{n}`" for n in names) or "(none)"
