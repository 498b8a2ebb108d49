"""KAITO v0.3's ``POST /chat``: what is asked, as a request to the engine's own OpenAI endpoints, and back.

    {"prompt": …} or {"messages": [{"role", "content"}]}, "return_full_text", "generate_kwargs"  ──>  {"Result": …}

**What a bare prompt means.** KAITO's pipeline completes the raw text. A model that was tuned on conversations, such as every
preset with a chat template, answers a question badly when it gets it without the marks that it was trained with: it goes on
writing the question, or never stops. People send questions (the quick start's is ``YOUR QUESTION HERE``), so the prompt
is given to such a model as the user's turn of a conversation, and the form of the answer stays KAITO's: with ``return_full_text``,
which is the default, ``Result`` begins with the prompt; the answer follows on a line of its own. Two prompts are completed as they are:
one for a model without a chat template, and one that holds a special token of the model (``<|user|>``), since its author has
written the template out. Whoever wants raw completion of anything has ``/v1/completions``.

Fields and their defaults: KAITO v0.3.2, ``/chat`` of its transformers runtime."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from kaito_core.serving.errors import HttpError
from kaito_core.serving.sampling import INT32, NUMBER, NUMBERS, WHOLE, Bound, token_ids
from kaito_core.serving.settings import Settings

NO_PROMPT: Final = "Text generation parameter prompt required"
NO_MESSAGES: Final = "Conversational parameter messages required"
"""KAITO's words."""

NEW_TOKENS: Final = 200
"""Of an answer when nothing is said. KAITO's default of ``max_length`` is 200 with the prompt's tokens in it, which leaves nothing
for the answer to a long prompt; a ``max_length`` that is sent does count the prompt."""

TOP_LEVEL: Final = (
    "prompt", "messages", "return_full_text", "clean_up_tokenization_spaces", "prefix", "handle_long_generation", "generate_kwargs",
)  # fmt: skip

_BOOL, _TEXTS, _IDS = "true or false", "a text or a list of texts", "a whole number or a list of them"

KWARGS: Final[Mapping[str, Bound | str]] = {
    # name: what it must be
    "max_length": Bound(WHOLE, 1, INT32),
    "min_length": Bound(WHOLE, 0, INT32),
    "max_new_tokens": Bound(WHOLE, 1, INT32),
    "min_new_tokens": Bound(WHOLE, 0, INT32),
    "do_sample": _BOOL,
    "early_stopping": _BOOL,
    "num_beams": Bound(WHOLE, 1, INT32),
    "temperature": NUMBERS["temperature"],
    "top_k": replace(NUMBERS["top_k"], least=0),
    "top_p": NUMBERS["top_p"],
    "min_p": NUMBERS["min_p"],
    "typical_p": Bound(NUMBER, 0, 1),
    "repetition_penalty": NUMBERS["repetition_penalty"],
    "presence_penalty": NUMBERS["presence_penalty"],
    "frequency_penalty": NUMBERS["frequency_penalty"],
    "seed": replace(NUMBERS["seed"], least=0),
    "pad_token_id": Bound(WHOLE, -INT32, INT32),
    "eos_token_id": _IDS,
    "stop": _TEXTS,
    "stop_strings": _TEXTS,
    "use_cache": _BOOL,
}
"""``generate_kwargs`` that are understood: KAITO's, and the usual ones of transformers."""

ONLY: Final = {"num_beams": 1, "typical_p": 1}
"""What engines for many users at once do not do: no other value than the default."""

NO_EFFECT: Final = ("early_stopping", "pad_token_id", "use_cache")
"""Accepted, since they change nothing without beams and batches of one client."""

_SPACES: Final = tuple(
    (" " + mark, mark) for mark in (".", "?", "!", ",", "n't", "'m", "'s", "'ve", "'re")
)  # fmt: skip
"""``clean_up_tokenization_spaces``, as transformers describes it: spaces before punctuation and English contractions."""


@dataclass(frozen=True)
class Chat:
    """A request, checked."""

    text: str
    """The prompt; empty for a conversation."""
    messages: tuple[Mapping[str, Any], ...]
    """The conversation that goes to the engine; empty when ``completion`` is completed as it stands."""
    completion: str
    return_full_text: bool
    clean_up: bool
    kwargs: Mapping[str, Any]

    @property
    def path(self) -> str:
        """Which of the engine's endpoints answers."""
        return "/v1/chat/completions" if self.messages else "/v1/completions"

    @property
    def asked(self) -> dict[str, Any]:
        """The prompt in the form of that endpoint."""
        return {"messages": list(self.messages)} if self.messages else {"prompt": self.completion}

    @property
    def counts_prompt(self) -> bool:
        """Whether a limit is given that counts the prompt's tokens too, so that they have to be known."""
        return ("max_length" in self.kwargs and "max_new_tokens" not in self.kwargs) or bool(
            self.kwargs.get("min_length")
        )


def read(body: Mapping[str, Any], settings: Settings) -> Chat:
    """The request in ``body``. Raises `HttpError` 400 that names the field."""
    for name in body:
        if name not in TOP_LEVEL:
            _other_field(name)
    prompt, prefix = body.get("prompt"), body.get("prefix")
    _text("prompt", prompt)
    _text("prefix", prefix)
    messages = _messages(body.get("messages"))
    if body.get("handle_long_generation"):
        raise HttpError(
            400, "handle_long_generation is not supported: send a shorter prompt", param="handle_long_generation"
        )
    kwargs = body.get("generate_kwargs")
    if kwargs is not None and not isinstance(kwargs, dict):
        raise _wrong("generate_kwargs", "an object")
    kwargs = {k: v for k, v in (kwargs or {}).items() if v is not None}
    kwargs = {k: _kwarg(k, v) for k, v in kwargs.items()}
    if not prompt and not messages:
        raise HttpError(400, NO_PROMPT if body.get("messages") is None else NO_MESSAGES,
                        param="prompt" if body.get("messages") is None else "messages")  # fmt: skip
    full, completion = (prefix or "") + (prompt or ""), ""
    if prompt:  # as KAITO's default pipeline, which does not look at `messages`
        if settings.has_template and not any(mark in full for mark in settings.marks):
            messages = ({"role": "user", "content": full},)
        else:
            messages, completion = (), full
    return Chat(
        text=prompt or "",
        messages=messages,
        completion=completion,
        return_full_text=_bool(body, "return_full_text", True),
        clean_up=_bool(body, "clean_up_tokenization_spaces", False),
        kwargs=kwargs,
    )


def engine_request(chat: Chat, model: str, prompt_tokens: int | None) -> dict[str, Any]:
    """The body for the engine's endpoint. ``prompt_tokens``: how long the prompt is; None when the engine did not say, and then
    limits count the answer alone. Raises `HttpError` 400 when the prompt leaves no room below ``max_length``."""
    k = chat.kwargs
    counted = prompt_tokens or 0
    new = k.get("max_new_tokens", NEW_TOKENS)
    if "max_length" in k and "max_new_tokens" not in k:
        new = k["max_length"] - counted
        if new < 1:
            raise HttpError(
                400,
                f"the prompt has {counted} tokens and max_length is {k['max_length']}: send a larger one, or max_new_tokens",
                param="generate_kwargs.max_length",
            )
    request: dict[str, Any] = {"model": model, **chat.asked, "max_tokens": new}
    least = max(k.get("min_new_tokens", 0), k.get("min_length", 0) - counted)
    if least > 0:
        request["min_tokens"] = min(least, new)
    if not k.get("do_sample", True) or k.get("temperature") == 0:
        request["temperature"] = 0
    else:  # KAITO's defaults
        request |= {"temperature": k.get("temperature", 1.0), "top_k": k.get("top_k", 10), "top_p": k.get("top_p", 1.0)}
    for name in ("min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "stop"):
        if name in k:
            request[name] = k[name]
    if "stop_strings" in k:
        request["stop"] = k["stop_strings"]
    if "eos_token_id" in k:
        ids = k["eos_token_id"]
        request["stop_token_ids"] = ids if isinstance(ids, list) else [ids]
    return request


def result(chat: Chat, answer: Any) -> dict[str, str]:
    """KAITO's form of the engine's answer. ValueError when the answer has no choice with text."""
    try:
        choice = answer["choices"][0]
        text = (choice["message"].get("content") if chat.messages else choice["text"]) or ""
    except (LookupError, TypeError, AttributeError) as e:
        raise ValueError("the engine's answer has no text") from e
    if chat.clean_up:
        for spaced, plain in _SPACES:
            text = text.replace(spaced, plain)
    if chat.text and chat.return_full_text:
        text = f"{chat.text}\n{text}" if chat.messages else chat.text + text
    return {"Result": text}


# --- checks


def _other_field(name: str) -> None:
    """KAITO ignores fields that it does not know. One that is meant for somewhere else, or misspelt, is named."""
    if name in KWARGS or name == "max_tokens":
        known = "max_new_tokens" if name == "max_tokens" else name
        raise HttpError(400, f"{name} is not a field of /chat: write it as generate_kwargs.{known}", param=name)
    if near := _closest(name, TOP_LEVEL):
        raise HttpError(400, f"there is no field {name[:100]!r}: did you mean {near!r}?", param=name[:100])


def _kwarg(name: str, value: Any) -> Any:
    param = f"generate_kwargs.{name[:100]}"
    if name not in KWARGS:
        near = _closest(name, KWARGS)
        more = f": did you mean {near!r}?" if near else ""
        raise HttpError(400, f"generate_kwargs has no setting {name[:100]!r} here{more}", param=param)
    what = KWARGS[name]
    if isinstance(what, Bound):
        value = what.read(param, value)
    elif what == _BOOL:
        if not isinstance(value, bool):
            raise _wrong(param, what)
    elif what == _IDS:
        token_ids(param, value if isinstance(value, list) else [value])
    else:
        for v in value if isinstance(value, list) else [value]:
            if not isinstance(v, str) or not v:
                raise _wrong(param, what)
            _text(param, v)
    if name in ONLY and value != ONLY[name]:
        raise HttpError(400, f"{param} cannot be other than {ONLY[name]} here", param=param)
    return value


def _messages(value: Any) -> tuple[Mapping[str, Any], ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise _wrong("messages", "a list")
    for number, message in enumerate(value):
        where = f"messages[{number}]"
        if not isinstance(message, dict):
            raise _wrong(where, 'an object like {"role": "user", "content": "…"}')
        if not isinstance(message.get("role"), str):
            raise _wrong(f"{where}.role", "a text")
        if not isinstance(message.get("content"), str | list):
            raise _wrong(f"{where}.content", "a text")
        if isinstance(message["content"], str):
            _text(f"{where}.content", message["content"])
    return tuple(value)


def _text(param: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, str):
        raise _wrong(param, "a text")
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise HttpError(400, f"{param} holds half of a character (a lone surrogate)", param=param) from e


def _bool(body: Mapping[str, Any], name: str, default: bool) -> bool:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise _wrong(name, _BOOL)
    return value


def _wrong(param: str, what: str) -> HttpError:
    return HttpError(400, f"{param} must be {what}", param=param)


def _closest(word: str, known: Any) -> str:
    return next(iter(difflib.get_close_matches(word[:100].lower(), list(known), n=1, cutoff=0.8)), "")
