"""OpenAI's requests and answers: the part of ``/v1/completions`` and ``/v1/chat/completions`` that this runtime has.

Reference: https://platform.openai.com/docs/api-reference, and vLLM's additional sampling parameters (docs/serving/
openai_compatible_server), so that a client can go from one runtime to the other. What would change an answer and is not supported is
refused by name, never ignored; fields that do not change it are."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, cast

from kaito_core.serving.errors import HttpError
from kaito_core.serving.sampling import NUMBERS, logit_bias, token_ids

COMPLETION_TOKENS: Final = 16
"""OpenAI's default length of a completion. A chat answer may use the whole context."""

MOST_CHOICES: Final = 16

HOTTEST_CHAT: Final = 2
"""OpenAI's highest temperature."""


class EngineDied(Exception):
    """What generates has ended, for this reason; only a new start helps."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when it is enough."""

    max_tokens: int | None = None
    """None: as many as the context has room for."""
    temperature: float = 1.0
    """0: always the likeliest token."""
    top_k: int = 0
    """0: all."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    min_tokens: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def alone(self) -> bool:
        """Whether it asks for what transformers' continuous batching does not do for each request."""
        return bool(
            self.min_p
            or self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.min_tokens
            or self.logit_bias
            or (self.seed is not None and not self.greedy)
        )


@dataclass(frozen=True)
class Request:
    """A request, checked."""

    model: str
    """Empty: the endpoint's own."""
    chat: bool
    messages: tuple[Mapping[str, Any], ...] = ()
    prompts: tuple[str | tuple[int, ...], ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    add_special_tokens: bool | None = None


_MATTERLESS: Final = frozenset({
    "user", "metadata", "store", "service_tier", "parallel_tool_calls", "reasoning_effort", "safety_identifier",
    "prompt_cache_key", "verbosity", "prediction", "web_search_options", "function_call", "tool_choice",
})  # fmt: skip

_UNSUPPORTED: Final = {
    "tools": "this runtime does not parse tool calls: serve the model with the runtime vllm",
    "functions": "this runtime does not parse tool calls: serve the model with the runtime vllm",
    "response_format": "this runtime does not constrain answers: serve the model with the runtime vllm",
    "logprobs": "this runtime does not give probabilities",
    "top_logprobs": "this runtime does not give probabilities",
    "prompt_logprobs": "this runtime does not give probabilities",
    "best_of": "ask for n answers",
    "use_beam_search": "this runtime has no beam search",
    "suffix": "this runtime does not fill text in",
    "echo": "put the prompt in front of the answer",
    "audio": "this runtime reads and writes text",
    "modalities": "this runtime reads and writes text",
}

_KNOWN: Final = (
    "model", "messages", "prompt", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p",
    "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "min_tokens", "logit_bias", "stop", "stop_token_ids",
    "ignore_eos", "n", "stream", "stream_options", "chat_template_kwargs", "add_special_tokens",
)  # fmt: skip


def read(body: Mapping[str, Any], chat: bool) -> Request:
    """The request in ``body``. Raises `HttpError` 400 that names the field."""
    for name, value in body.items():
        _look_at(name, value)
    model = _take(body, "model", "a text", "")
    options = _take(body, "stream_options", "an object", {})
    stream = _take(body, "stream", "true or false", False)
    if options and not stream:
        raise _wrong("stream_options", "left out when stream is not true")
    n = _number(body, "n", 1, most=MOST_CHOICES)
    messages: tuple[Mapping[str, Any], ...] = ()
    prompts: tuple[str | tuple[int, ...], ...] = ()
    if chat:
        messages = _messages(body.get("messages"))
    else:
        prompts = _prompts(body.get("prompt"))
        if len(prompts) * n > MOST_CHOICES:
            raise HttpError(
                400, f"a request may ask for {MOST_CHOICES} answers, not {len(prompts) * n}", param="prompt"
            )
    add = body.get("add_special_tokens")
    return Request(
        model=model,
        chat=chat,
        messages=messages,
        prompts=prompts,
        sampling=_sampling(body, chat),
        n=n,
        stream=stream,
        include_usage=_take(options, "include_usage", "true or false", False),
        template_kwargs=_take(body, "chat_template_kwargs", "an object", {}),
        add_special_tokens=None if add is None else _take(body, "add_special_tokens", "true or false", True),
    )


def _look_at(name: str, value: Any) -> None:
    if name in _KNOWN or name in _MATTERLESS:
        return
    if name in _UNSUPPORTED:
        text = name == "response_format" and isinstance(value, dict) and value.get("type") == "text"
        if (
            value
            and not text
            and not (name == "modalities" and value == ["text"])
            and not (name == "best_of" and value == 1)
        ):
            raise HttpError(
                400, f"{name} is not supported: {_UNSUPPORTED[name]}", param=name, code="unsupported_parameter"
            )
        return
    near = difflib.get_close_matches(name[:100], (*_KNOWN, *_UNSUPPORTED), n=1, cutoff=0.85)
    if near:
        raise HttpError(400, f"there is no field {name[:100]!r}: did you mean {near[0]!r}?", param=name[:100])


def _sampling(body: Mapping[str, Any], chat: bool) -> Sampling:
    most = _number(body, "max_tokens", None if chat else COMPLETION_TOKENS, least=1)
    if chat:
        most = _number(body, "max_completion_tokens", most)
    least = _number(body, "min_tokens", 0)
    if most is not None and least > most:
        raise HttpError(400, f"min_tokens is {least}, and max_tokens {most}", param="min_tokens")
    return Sampling(
        max_tokens=most,
        temperature=_number(body, "temperature", 1.0, **({"most": HOTTEST_CHAT} if chat else {})),
        top_k=max(_number(body, "top_k", 0), 0),
        top_p=_number(body, "top_p", 1.0),
        min_p=_number(body, "min_p", 0.0),
        repetition_penalty=_number(body, "repetition_penalty", 1.0),
        presence_penalty=_number(body, "presence_penalty", 0.0),
        frequency_penalty=_number(body, "frequency_penalty", 0.0),
        seed=_number(body, "seed", None),
        min_tokens=least,
        logit_bias=logit_bias(body.get("logit_bias")),
        stop=_stops(body.get("stop")),
        stop_token_ids=token_ids("stop_token_ids", body.get("stop_token_ids")),
        ignore_eos=_take(body, "ignore_eos", "true or false", False),
    )


def _number(body: Mapping[str, Any], name: str, default: Any, **own: float) -> Any:
    """A number within its bounds; ``own`` are ends that this runtime has of its own."""
    value = body.get(name)
    return default if value is None else replace(NUMBERS[name], **cast(Any, own)).read(name, value)


_TYPES: Final[Mapping[str, type]] = {"a text": str, "an object": dict, "true or false": bool}


def _take(body: Mapping[str, Any], name: str, what: str, default: Any) -> Any:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, _TYPES[what]):
        raise _wrong(name, what)
    return value


def _stops(value: Any) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) and value else [] if value in (None, "") else value
    if (
        not isinstance(values, list)
        or len(values) > 16
        or not all(isinstance(v, str) and v and len(v) < 1000 for v in values)
    ):
        raise _wrong("stop", "a text or up to 16 texts")
    return tuple(encodable("stop", v) for v in values)


def _messages(value: Any) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, list) or not value:
        raise _wrong("messages", 'a list like [{"role": "user", "content": "…"}]')
    return tuple(_message(f"messages[{n}]", m) for n, m in enumerate(value))


def _message(where: str, message: Any) -> Mapping[str, Any]:
    if not isinstance(message, dict):
        raise _wrong(where, 'an object like {"role": "user", "content": "…"}')
    if not isinstance(message.get("role"), str):
        raise _wrong(f"{where}.role", "a text")
    content = message.get("content")
    if isinstance(content, list):
        parts = []
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise HttpError(
                    400, f"{where}.content may hold text only: this runtime reads text", param=f"{where}.content"
                )
            parts.append(part["text"])
        content = "\n".join(parts)
    if not isinstance(content, str):
        raise _wrong(f"{where}.content", "a text")
    return {**message, "content": encodable(f"{where}.content", content)}


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    words = "a text, a list of texts, a list of token ids or a list of such lists"
    if isinstance(value, str):
        return (encodable("prompt", value),)
    if not isinstance(value, list) or not value:
        raise _wrong("prompt", words)
    if all(isinstance(v, str) for v in value):
        return tuple(encodable("prompt", v) for v in value)
    lists = value if all(isinstance(v, list) for v in value) else [value]
    return tuple(token_ids("prompt", v, most=len(v)) for v in lists)


def encodable(name: str, text: str) -> str:
    """The text. Raises `HttpError` 400 where it cannot be written in UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise HttpError(400, f"{name} holds half of a character (a lone surrogate)", param=name) from e
    return text


def _wrong(name: str, what: str) -> HttpError:
    return HttpError(400, f"{name} must be {what}", param=name)


# --- answers


@dataclass
class Usage:
    """Tokens that a request has used."""

    prompt: int = 0
    completion: int = 0

    def to_json(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }


def whole(
    request: Request, ident: str, created: int, model: str, texts: list[str], reasons: list[str], usage: Usage
) -> dict[str, Any]:
    """The answer in one piece."""
    choices: list[dict[str, Any]] = []
    for index, (text, reason) in enumerate(zip(texts, reasons, strict=True)):
        said: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if request.chat else {"text": text}
        choices.append({"index": index, **said, "logprobs": None, "finish_reason": reason})
    kind = "chat.completion" if request.chat else "text_completion"
    return {
        "id": ident,
        "object": kind,
        "created": created,
        "model": model,
        "choices": choices,
        "usage": usage.to_json(),
    }


def piece(
    request: Request, ident: str, created: int, model: str, index: int, text: str | None, reason: str | None = None
) -> dict[str, Any]:
    """A part of a streamed answer; without text and reason, the beginning of a chat answer."""
    said: dict[str, Any]
    if request.chat:
        begins = {"role": "assistant", "content": ""} if text is None and reason is None else {}
        said = {"delta": {"content": text} if text else begins}
    else:
        said = {"text": text or ""}
    kind = "chat.completion.chunk" if request.chat else "text_completion"
    choice = {"index": index, **said, "logprobs": None, "finish_reason": reason}
    return {"id": ident, "object": kind, "created": created, "model": model, "choices": [choice]}


def usage_piece(request: Request, ident: str, created: int, model: str, usage: Usage) -> dict[str, Any]:
    """The last part of a stream whose client has asked for it."""
    kind = "chat.completion.chunk" if request.chat else "text_completion"
    return {"id": ident, "object": kind, "created": created, "model": model, "choices": [], "usage": usage.to_json()}
