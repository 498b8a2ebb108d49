"""What a row means: the known shapes of training data, found from the first rows and brought into one form. Pure.

======================== ============================================================================================
format                   columns
======================== ============================================================================================
messages                 ``messages``: a list of ``{"role": …, "content": …}`` (OpenAI)
sharegpt                 ``conversations``: a list of ``{"from": "human" | "gpt" | "system", "value": …}``
alpaca                   ``instruction``, ``output`` or ``response``
prompt and answer        ``prompt``/``completion``, ``prompt``/``response``, ``question``/``answer``, …; texts or messages
text                     ``text``: trained as it is
======================== ============================================================================================

Beside a question, ``input`` or ``context`` goes into the prompt; beside a conversation or a question, ``system`` (and its other
names) is the system turn. Every other field that holds something is refused by name or listed in the report: see `fields`.

Other names are given with ``DatasetConfig``: ``messages_column``, or ``prompt_column`` (KAITO's ``context_column``),
``response_column`` and ``system_column``.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, combinations, groupby, islice
from typing import Any

from kaito_core.data.fields import (
    ANSWER,
    CONTEXT,
    LOSS_FLAGS,
    LOSS_MASKS,
    PREFERENCE,
    QUESTION,
    SYSTEM,
    WEIGHTS,
    FieldNames,
    Meaning,
    canonical,
    is_absent,
    is_harmless,
    meaning_of,
    shown,
)
from kaito_core.data.json_rows import unique_names
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
ADDED_CONTEXTS = ("input", "context")
"""Columns that go into the prompt behind the question, unless ``context_column`` names another."""
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

    @property
    def columns(self) -> list[str]:
        """The names of all of them."""
        named = (self.messages, self.prompt, self.context, self.response, self.system, self.text)
        return [c for c in named if c]


@dataclass(frozen=True, slots=True)
class Found:
    """What was found while rows were read; filled by the iterator of `samples`."""

    forms: dict[str, Format] = field(default_factory=dict)
    """The format of each file."""
    unused: FieldNames = field(default_factory=FieldNames)
    """Columns and message keys that hold something in some row, and are neither used nor harmless nor refused."""


class WrongRow(ValueError):
    """A row is not of the format; the words say what was found and what was expected."""


class RefusedFields(WrongRow):
    """A row has fields that kaito cannot train on, and whose loss would teach something else."""

    def __init__(self, fields: Mapping[str, Meaning]) -> None:
        super().__init__("; ".join(_refusal(place, meaning) for place, meaning in fields.items()))
        self.fields = fields
        """What each holds, by its place: ``tools``, ``messages[].weight``."""


class _Leftovers:
    """The fields of one row that its format does not use."""

    def __init__(self) -> None:
        self.refused: dict[str, Meaning] = {}
        self.unused: dict[str, None] = {}

    def refuse(self, place: str, meaning: Meaning) -> None:
        self.refused[shown(place)] = meaning

    def leave_out(self, place: str) -> None:
        self.unused[place] = None

    def keys(self, values: Mapping[str, Any], used: tuple[str, ...], place: str, *, trained: bool) -> None:
        """Sort the keys of a message or of a part of its content; ``trained``: it is the assistant's, and so carries loss."""
        for name, value in values.items():
            if value is None or name in used or is_harmless(name):
                continue
            meaning = meaning_of(name)
            # A turn of the user is never trained: "no loss" is what happens anyway, and "loss" is not done. Both are listed.
            said = not trained and meaning in (LOSS_FLAGS, LOSS_MASKS, WEIGHTS) and value in (0, 1)
            if is_absent(value, None if said and meaning is not WEIGHTS else meaning):
                continue
            if said or meaning is None or meaning in (QUESTION, ANSWER, PREFERENCE):
                self.leave_out(f"{place}.{name}")
            else:
                self.refuse(f"{place}.{name}", meaning)


def detect(rows: Iterable[Row], config: Mapping[str, Any]) -> Format:
    """The format of the data from its first rows and from ``DatasetConfig``. UserError when it is none that we know."""
    first = list(islice(rows, LOOK_AT))
    if not first:
        raise UserError("there is no row in the training data", "give at least one file with data in it")
    given = named_columns(config)
    there = list(dict.fromkeys(k for row in first for k in row.values))
    columns = [c for c in there if any(row.values.get(c) is not None for row in first)]
    if given.prompt or given.messages or given.text:
        required = [c for c in (given.messages, given.prompt, given.response, given.text) if c]
        missing = [c for c in given.columns if c not in (columns if c in required else there)]
        if missing:
            raise _not_there(missing, columns, first[0].file)
        return given
    found = _known([c for c in columns if not all(is_absent(row.values.get(c)) for row in first)]) or _known(columns)
    if found is None:
        raise _unknown(columns, first[0].file)
    if not given.system:
        return found
    if given.system not in there:
        raise _not_there([given.system], columns, first[0].file)
    if found.text:
        words = "system_column names a system prompt, and the data is plain text, which has none"
        raise UserError(
            Problem(words, "remove system_column, or give conversations", "DatasetConfig.system_column", first[0].file)
        )
    return replace(found, system=given.system)


def _not_there(missing: list[str], columns: list[str], file: str) -> UserError:
    words = f"DatasetConfig names {_listed(missing)}, and the data has the columns {_listed(columns)}"
    remedy = "name columns that are there, or none: the known formats are found without"
    return UserError(Problem(words, remedy, "DatasetConfig", file))


def _unknown(columns: list[str], file: str) -> UserError:
    preference = [c for c in columns if meaning_of(c) is PREFERENCE]
    if preference:
        words = f"this is preference data ({_listed(preference)}), and kaito trains on one answer a row"
        remedy = "give the answer to be learnt as `completion` beside its `prompt`, or as `messages`, and leave the other out"
        return UserError(Problem(words, remedy, file=file))
    words = f"the data has the columns {_listed(columns)}; expected {EXPECTED}"
    remedy = "rename the columns, or name them in DatasetConfig: messages_column, or prompt_column and response_column"
    return UserError(Problem(words, remedy, file=file))


def named_columns(config: Mapping[str, Any]) -> Format:
    """What the configuration names. Empty, or with ``system`` alone, when it leaves the format to be found; so does KAITO's
    default, response_column "text" alone. UserError for settings that exclude each other."""

    def column(name: str) -> str:
        value = config.get(name)
        if value is not None and not isinstance(value, str):
            raise UserError(Problem(f"{name} is {value!r}; it is the name of a column", field=f"DatasetConfig.{name}"))
        return value or ""

    names = ("messages_column", "prompt_column", "context_column", "response_column", "system_column")
    messages, prompt, context, response, system = (column(n) for n in names)
    if response == "text" and not (prompt or context):
        response = ""
    given = [(n, c) for n, c in zip(names, (messages, prompt, context, response, system), strict=True) if c]
    for (name, one), (other, another) in combinations(given, 2):
        if one == another:
            raise _excluded(f"{name} and {other} both name {one!r}", "name two columns", other)
        if name == "messages_column" and other != "system_column":
            raise _excluded(f"messages_column and {other} exclude each other: a conversation has its questions and answers in itself",
                            f"remove {other}, or messages_column", other)  # fmt: skip
    if messages:
        return Format("messages", messages=messages, system=system)
    if not prompt:
        prompt, context = context, ""
    if prompt:
        return Format("prompt and answer", prompt=prompt, context=context, response=response or "text", system=system)
    if response and system:
        raise _excluded("system_column names a system prompt, and response_column alone means plain text, which has none",
                        "name the questions with prompt_column, or remove system_column", "system_column")  # fmt: skip
    return Format("text", text=response) if response else Format("", system=system)


def _excluded(words: str, remedy: str, name: str) -> UserError:
    return UserError(Problem(words, remedy, f"DatasetConfig.{name}"))


def _known(columns: list[str]) -> Format | None:
    for name, column in (("messages", "messages"), ("sharegpt", "conversations"), ("sharegpt", "conversation")):
        if column in columns:
            return Format(name, messages=column)
    for prompt, response in PAIRS:
        if prompt in columns and response in columns:
            name = "alpaca" if prompt == "instruction" else "prompt and answer"
            return Format(name, prompt=prompt, response=response)
    return Format("text", text="text") if "text" in columns else None


def normalise(values: Mapping[str, Any], form: Format, unused: FieldNames | None = None) -> Conversation | Text:
    """One row in the one form. `WrongRow` says what was found and what was expected, `RefusedFields` which fields kaito cannot
    train on; the names of fields that are left out otherwise are added to ``unused``."""
    left = _Leftovers()
    try:
        sample, used = _sample(values, form, left)
        _columns(values, form, used, sample, left)
    except RecursionError:  # comparing two values that are nested as deeply as JSON may be
        raise WrongRow("found values that are nested too deeply, expected texts and messages") from None
    except WrongRow:
        if left.refused:  # most likely the reason why the row is not of the format
            raise RefusedFields(left.refused) from None
        raise
    if left.refused:
        raise RefusedFields(left.refused)
    if unused is not None:
        for place in left.unused:
            unused.add(place)
    return sample


def _sample(values: Mapping[str, Any], form: Format, left: _Leftovers) -> tuple[Conversation | Text, set[str]]:
    """The row's sample, and the columns that are in it."""
    used = set(form.columns)
    if form.text:
        return Text(_text(values, form.text)), used
    system, names = _system(values, form, used)
    used.update(names)
    if form.messages:
        return _checked(_with_system(system, _messages(values.get(form.messages), form.messages, left))), used
    prompt, response = values.get(form.prompt), values.get(form.response)
    contexts = (
        [form.context] if form.context else [n for n in values if n not in used and canonical(n) in ADDED_CONTEXTS]
    )
    contexts = [n for n in contexts if not is_absent(values.get(n))][:1]
    if isinstance(prompt, list):
        if form.context and contexts:
            raise WrongRow(f"found messages in {form.prompt!r} and a context in {form.context!r}, expected one of them")
        asked = _messages(prompt, form.prompt, left)
    else:
        asked = [Message("user", "\n\n".join(_text(values, n) for n in (form.prompt, *contexts)))]
        used.update(contexts)
    said = (
        _messages(response, form.response, left)
        if isinstance(response, list)
        else [Message("assistant", _text(values, form.response))]
    )
    return _checked([*_with_system(system, asked), *said]), used


def _system(values: Mapping[str, Any], form: Format, used: set[str]) -> tuple[str, list[str]]:
    """The system prompt that stands in columns of its own, and their names. `WrongRow` when they differ."""
    names = [n for n in values if n == form.system or (n not in used and meaning_of(n) is SYSTEM)]
    names = [n for n in names if not is_absent(values[n], SYSTEM)]
    if not names:
        return "", names
    texts = {_text(values, n).strip(): n for n in names}
    if len(texts) > 1:
        raise WrongRow(f"found two different system prompts, in the columns {_listed(texts.values())}, expected one")
    return _text(values, names[0]), names


def _with_system(system: str, messages: list[Message]) -> list[Message]:
    """``messages`` with the system prompt that stands in a column beside them. `WrongRow` when they have another."""
    if not system:
        return messages
    if messages and messages[0].role == "system":
        if messages[0].content.strip() not in ("", system.strip()):
            raise WrongRow("found two different system prompts, one in a column beside the conversation, expected one")
        messages = messages[1:]
    return [Message("system", system), *messages]


def _columns(
    values: Mapping[str, Any], form: Format, used: set[str], sample: Conversation | Text, left: _Leftovers
) -> None:
    """Sort the columns that are not in the sample."""
    for name, value in values.items():
        if value is None or name in used or is_harmless(name):
            continue
        meaning = meaning_of(name)
        if is_absent(value, meaning):
            continue
        if meaning is None or _can_do_without(meaning, value, form, sample):
            left.leave_out(name)
        else:
            left.refuse(name, meaning)


def _can_do_without(meaning: Meaning, value: Any, form: Format, sample: Conversation | Text) -> bool:
    """Whether the sample is whole without this column: a conversation has its questions in itself, and other data often has a
    second writing of them (``prompt`` beside ``instruction``, with the same words)."""
    if meaning is PREFERENCE:
        return not form.text
    if meaning not in (QUESTION, ANSWER):
        return False
    if form.messages or (meaning is ANSWER and not form.text):
        return True
    if not isinstance(value, str):
        return False
    words = value.strip()
    if isinstance(sample, Text):
        return words in sample.text
    questions = [m.content.strip() for m in sample.messages if m.role == "user"]
    return any(q and (words in q or q in words) for q in questions)


def _text(values: Mapping[str, Any], column: str) -> str:
    value = values.get(column)
    if isinstance(value, str):
        return _whole(value, column)
    if isinstance(value, bool | int | float) and value == value:  # NaN: nothing
        return str(value)
    raise WrongRow(f"found {_kind(value)} in {column!r}, expected a text")


def _messages(value: Any, column: str, left: _Leftovers) -> list[Message]:
    if isinstance(value, str) and value.lstrip().startswith("["):  # CSV can hold a list only as text
        try:
            value = json.loads(value, object_pairs_hook=unique_names)
        except (ValueError, RecursionError) as e:
            why = "nested too deeply" if isinstance(e, RecursionError) else e
            raise WrongRow(
                f"found a text in {column!r} that is not JSON ({why}), expected a list of messages"
            ) from None
    if not isinstance(value, list):
        raise WrongRow(f"found {_kind(value)} in {column!r}, expected a list of messages")
    wrong: WrongRow | None = None
    messages = []
    for number, message in enumerate(value):
        try:
            messages.append(_message(message, column, number, left))
        except WrongRow as e:  # the fields of all messages are looked at first
            wrong = wrong or e
    if wrong:
        raise wrong
    return messages


def _message(value: Any, column: str, number: int, left: _Leftovers) -> Message:
    place = f"{column}[{number}]"
    if not isinstance(value, dict):
        raise WrongRow(f"found {_kind(value)} at {place}, expected an object with `role` and `content`")
    said = _one_of(value, "role", "from", place)
    role = ROLES.get(said.lower()) if isinstance(said, str) else None
    left.keys(value, ("role", "from", "content", "value"), f"{column}[]", trained=role == "assistant")
    if role is None:
        raise WrongRow(f"found the role {reprlib.repr(said)} at {place}, expected system, user or assistant")
    content = _one_of(value, "content", "value", place)
    if isinstance(content, list):
        return Message(role, _whole("".join(_part(p, place, f"{column}[].content[]", left) for p in content), place))
    if not isinstance(content, str):
        raise WrongRow(f"found {_kind(content)} as the content of {place}, expected a text")
    return Message(role, _whole(content, place))


def _one_of(message: Mapping[str, Any], name: str, other: str, place: str) -> Any:
    """What stands under ``name`` (OpenAI) or ``other`` (ShareGPT). `WrongRow` when both are there and differ."""
    if message.get(other) is None:
        return message.get(name)
    found = [message[n] for n in (name, other) if message.get(n) is not None]
    filled = [f for f in found if not is_absent(f)]
    if len(filled) == 2 and filled[0] != filled[1]:
        raise WrongRow(f"found `{name}` and `{other}` at {place}, and they differ: expected one of them")
    return next(iter(filled or found), None)


def _whole(text: str, place: str) -> str:
    """JSON can spell half of a surrogate pair, which is no character and which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise WrongRow(
            f"found half a character (a lone surrogate) in the text at {place!r}, expected Unicode text"
        ) from None
    return text


def _part(part: Any, place: str, kind_of_place: str, left: _Leftovers) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict):
        left.keys(part, ("type", "text"), kind_of_place, trained=True)
        if isinstance(part.get("text"), str) and part.get("type") in (None, "text"):
            return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else _kind(part)
    raise WrongRow(f"found a content part of type {reprlib.repr(kind)} at {place}, expected text only")


def _checked(messages: list[Message]) -> Conversation:
    if [m.role for m in messages[:2]] == ["system"] * 2 and messages[0] == messages[1]:
        messages = messages[1:]  # said twice, and the same
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


def samples(rows: Iterable[Row], config: Mapping[str, Any]) -> tuple[Found, Iterator[tuple[Row, Conversation | Text]]]:
    """What is found of the data, and every row in the one form. The first is filled while the second is read.

    Each file may have a format of its own. The iterator reads on past wrong rows and raises one `UserError` with all of
    them at its end, or after 20; a field that is refused counts once for all rows of its file. UserError at once for settings
    of ``config`` that exclude each other."""
    named_columns(config)
    found = Found()
    return found, _normalised(rows, config, found)


def _normalised(
    rows: Iterable[Row], config: Mapping[str, Any], found: Found
) -> Iterator[tuple[Row, Conversation | Text]]:
    problems: list[Problem] = []
    for file, its_rows in groupby(rows, key=lambda row: row.file):
        first = list(islice(its_rows, LOOK_AT))
        try:
            form = found.forms[file] = detect(first, config)
        except UserError as e:
            problems += e.problems
            continue
        refused: dict[str, _RefusedField] = {}
        for row in chain(first, its_rows):
            try:
                yield row, normalise(row.values, form, found.unused)
            except RefusedFields as e:
                for place, meaning in e.fields.items():
                    if len(refused) < MOST_PROBLEMS:
                        refused.setdefault(place, _RefusedField(meaning, row.number)).rows += 1
            except WrongRow as e:
                remedy = "mend the row or leave it out"
                problems.append(Problem(f"row {row.number}: {e} (the format is {form.name})", remedy, file=row.file))
                if len(problems) >= MOST_PROBLEMS:
                    problems.append(
                        Problem(f"stopped reading after {MOST_PROBLEMS} wrong rows; there may be more", file=row.file)
                    )
                    raise UserError([*_refusals(refused, form, file), *problems]) from None
        problems += _refusals(refused, form, file)
    if problems:
        raise UserError(problems)


@dataclass(slots=True)
class _RefusedField:
    meaning: Meaning
    first: int
    """Number of the row."""
    rows: int = 0


def _refusals(refused: Mapping[str, _RefusedField], form: Format, file: str) -> list[Problem]:
    problems = []
    for place, found in refused.items():
        where = f"row {found.first}" + (f" and {found.rows - 1} more" if found.rows > 1 else "")
        remedy = f"leave `{place}` out of the data if that is meant"
        if found.meaning is CONTEXT and form.prompt:
            remedy = f"name it with DatasetConfig.context_column if it belongs to the question, or {remedy}"
        problems.append(
            Problem(f"{where}: {_refusal(place, found.meaning)} (the format is {form.name})", remedy, file=file)
        )
    return problems


def _refusal(place: str, meaning: Meaning) -> str:
    return f"`{place}` holds {meaning.what}, which kaito trains without: the model would learn something else"


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
    return ", ".join(f"`{shown(n)}`" for n in names) or "(none)"
