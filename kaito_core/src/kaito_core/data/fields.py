"""Columns and message keys whose meaning is known, and what happens to those that a format does not use. Pure.

Nothing that a person wrote is dropped without a word. A field that holds something is used by its format (`formats`), or harmless
(`HARMLESS`), or refused by name, since training without it would teach something else (`MEANINGS`); every other one is listed in the
data report. A field that holds nothing, or what would be done anyway (``weight: 1``), is as absent (`is_absent`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

LISTED_FIELDS = 100
"""Names that a report lists at most: a broken file can have another name in every row."""
LISTED_NAME_CHARS = 80


@dataclass(frozen=True, slots=True)
class Meaning:
    """What the fields of these names hold."""

    what: str
    """In the plural, for messages: ``tool definitions``."""
    names: frozenset[str]
    """As `canonical` writes them."""
    neutral: int | None = 0
    """The number, also as true or false and as text, that says what would be done anyway; None when every number says something."""


def _meaning(what: str, names: str, neutral: int | None = 0) -> Meaning:
    return Meaning(what, frozenset(names.split()), neutral)


WEIGHTS = _meaning("weights", "weight weights lossweight sampleweight exampleweight rowweight lossscale", 1)
LOSS_FLAGS = _meaning(
    "loss flags", "train trainable istrainable trainon traindetail loss computeloss calculateloss hasloss", 1
)
LOSS_MASKS = _meaning("loss masks", "lossmask labelmask labelsmask completionmask assistantmask assistantmasks", 1)
SYSTEM = _meaning(
    "system prompts", "system systemprompt systemmessage systeminstruction systeminstructions sysprompt", None
)
CONTEXT = _meaning(
    "contexts",
    "context contexts input inputs document documents doc docs passage passages background knowledge evidence article paragraph "
    "paragraphs retrieveddocuments retrievedcontext searchresults choices options schema",
    None,
)
QUESTION = _meaning("questions", "prompt question query instruction instructions", None)
ANSWER = _meaning("answers", "completion response answer output target", None)
PREFERENCE = _meaning(
    "preferences",
    "chosen rejected chosenresponse rejectedresponse chosenmessages rejectedmessages",
)
MEANINGS: tuple[Meaning, ...] = (
    WEIGHTS, LOSS_FLAGS, LOSS_MASKS,
    _meaning("masks", "mask masks", None),
    _meaning("loss flags", "masked ignore ignored skip skipped exclude excluded"),
    SYSTEM, CONTEXT, QUESTION, ANSWER, PREFERENCE,
    _meaning("tool definitions", "tools tool functions toolchoice toolschema toolschemas availabletools paralleltoolcalls"),
    _meaning("tool calls", "toolcalls toolcall toolcallid functioncall functioncalls toolresponse toolresponses toolresult toolresults"),
    _meaning(
        "images, audio or video",
        "image images imageurl imageurls imagepath imagepaths picture pictures audio audios audiourl audiopath inputaudio speech "
        "video videos videourl videopath media attachment attachments pixelvalues",
    ),
    _meaning("earlier turns", "history chathistory conversationhistory dialoghistory dialoguehistory previousturns previousmessages"),
    _meaning(
        "reasoning",
        "reasoning reasoningcontent reasoningdetails reasoningtrace reasoningsteps thinking thinkingblocks thought thoughts think "
        "chainofthought cot complexcot rationale",
    ),
    _meaning("labels", "label labels ktotag", None),
    _meaning("token ids", "inputids tokenids positionids tokentypeids", None),
    _meaning("attention masks", "attentionmask", 1),
    _meaning("settings of the chat template", "chattemplate chattemplatekwargs enablethinking", None),
    _meaning("refusals", "refusal"),
)  # fmt: skip
"""What is refused where a format does not use it. Which of `SYSTEM`, `CONTEXT`, `QUESTION`, `ANSWER` and `PREFERENCE` a format
uses, or can do without, is the format's to say."""
HARMLESS = _meaning(
    "ids, sources, indices and timestamps",
    "id ids uid uuid guid idx index rowid promptid questionid conversationid messageid source url timestamp createdat updatedat "
    "indexlevel0 unnamed:0",
).names

_BY_NAME: Mapping[str, Meaning] = {name: meaning for meaning in MEANINGS for name in meaning.names}
_EMPTY_TEXTS = frozenset({"[]", "{}", "null", "none", "nan"})
"""How tables spell that there is nothing."""


def canonical(name: str) -> str:
    """``name`` as the tables here write it: ``tool_calls``, ``toolCalls`` and ``Tool-Calls`` are one name."""
    # The same few names stand in every row; a name as long as a book is not kept.
    return _canonical(name) if len(name) <= LISTED_NAME_CHARS else _canonical.__wrapped__(name)


@lru_cache(maxsize=1024)
def _canonical(name: str) -> str:
    return re.sub(r"[\s_.\-]+", "", name.casefold()) or name


def meaning_of(name: str) -> Meaning | None:
    """The known meaning of the field ``name``; None for an unknown and for a harmless one."""
    return _BY_NAME.get(canonical(name))


def is_harmless(name: str) -> bool:
    """Whether leaving out the field ``name`` cannot change what is learnt. A column without any name is an index that was saved."""
    return not name or canonical(name) in HARMLESS


def is_absent(value: Any, meaning: Meaning | None = None) -> bool:
    """Whether ``value`` says nothing: null, NaN, empty, a container of such, or the neutral value of its ``meaning``."""
    if value is None:
        return True
    todo = [value]  # not recursive: data is nested as deeply as its author likes
    while todo:
        found = todo.pop()
        if found is None or found != found:  # NaN alone differs from itself
            continue
        if isinstance(found, Mapping):
            todo.extend(found.values())
        elif isinstance(found, list | tuple):
            todo.extend(found)
        elif isinstance(found, str | bytes):
            if found.strip() and not (meaning and isinstance(found, str) and _is_neutral_text(found, meaning)):
                return False
        elif not meaning or meaning.neutral is None or found != meaning.neutral:
            return False
    return True


def _is_neutral_text(text: str, meaning: Meaning) -> bool:
    word = text.strip().casefold()
    if word in _EMPTY_TEXTS:
        return True
    if meaning.neutral is None:
        return False
    if word in ("true", "false"):
        return (word == "true") == bool(meaning.neutral)
    try:
        return float(word) == meaning.neutral
    except ValueError:
        return False


def shown(name: str) -> str:
    """``name`` as it can be printed anywhere: it comes from the data."""
    clean = "".join(c if c.isprintable() else "�" for c in name[: LISTED_NAME_CHARS + 1])
    return clean if len(clean) <= LISTED_NAME_CHARS else clean[: LISTED_NAME_CHARS - 1] + "…"


class FieldNames(Iterable[str]):
    """Names, each once, in the order in which they were added; at most `LISTED_FIELDS`."""

    def __init__(self) -> None:
        self._names: dict[str, None] = {}

    def add(self, name: str) -> None:
        if name not in self._names and len(self._names) <= LISTED_FIELDS:
            self._names[name] = None

    def __iter__(self) -> Iterator[str]:
        names = [shown(n) for n in self._names]
        yield from names[:LISTED_FIELDS]
        if len(names) > LISTED_FIELDS:
            yield "… and others"
