"""The numbers of a request, and between what each must lie, whatever engine answers.

An engine puts these numbers into tensors of 32 bits. One that does not fit is found in the middle of a step that many requests
share, and ends the engine for all of them; so each is looked at before any engine sees it. Ranges are OpenAI's where OpenAI has the
field (https://platform.openai.com/docs/api-reference), else what the engines compute with; what OpenAI does not bound is a whole number of 32
bits. Standard library only, as all of the face."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from kaito_core.serving.errors import HttpError

INT32: Final = 2**31 - 1
"""The largest number of an int32 tensor."""

MOST_TOKEN_IDS: Final = 1024
"""Tokens that a request may name to stop at, to allow or to bias: OpenAI's API took 300 biases, vLLM takes 128 tokens to stop at."""

WHOLE: Final = "a whole number"
NUMBER: Final = "a number"


@dataclass(frozen=True)
class Bound:
    """What a number must be; both ends belong to it."""

    what: str
    """`WHOLE` or `NUMBER`."""
    least: float
    most: float

    def read(self, name: str, value: Any) -> Any:
        """``value`` as int or float. Raises `HttpError` 400 that names the field and its range."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise HttpError(400, f"{name} must be {self.what}", param=name)
        # As JSON Schema has it: 16.0 is a whole number. Infinity is none, and NaN is not between anything.
        if self.what == WHOLE and not (isinstance(value, int) or value.is_integer()):
            raise HttpError(400, f"{name} must be {self.what}", param=name)
        if not self.least <= value <= self.most:
            lower = value < self.least and self.most == INT32
            range_ = f"at least {self.least}" if lower else f"from {self.least} to {self.most}"
            raise HttpError(400, f"{name} must be {range_}", param=name)
        return int(value) if self.what == WHOLE else float(value)


_COUNT: Final = Bound(WHOLE, 1, INT32)
_FROM_ZERO: Final = Bound(WHOLE, 0, INT32)
_OR_ALL: Final = Bound(WHOLE, -1, INT32)
"""-1 stands for all, or for no limit."""
_PENALTY: Final = Bound(NUMBER, -2, 2)

NUMBERS: Final[Mapping[str, Bound]] = {
    "max_tokens": _FROM_ZERO,
    "max_completion_tokens": _COUNT,
    "max_output_tokens": _COUNT,
    "min_tokens": _FROM_ZERO,
    "n": Bound(WHOLE, 1, 128),
    "best_of": Bound(WHOLE, 1, 20),
    "temperature": Bound(
        NUMBER, 0, 100
    ),  # OpenAI's end is 2; engines compute with more, and KAITO's clients may ask for it
    "top_p": Bound(NUMBER, 0, 1),
    "top_k": _OR_ALL,
    "min_p": Bound(NUMBER, 0, 1),
    "repetition_penalty": Bound(NUMBER, 0.01, 100),
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "length_penalty": Bound(NUMBER, -100, 100),
    "seed": Bound(WHOLE, -(2**63), 2**63 - 1),
    "top_logprobs": _OR_ALL,
    "prompt_logprobs": _OR_ALL,
    "truncate_prompt_tokens": _OR_ALL,
    "thinking_token_budget": _OR_ALL,
    "max_tool_calls": _FROM_ZERO,
    "priority": Bound(WHOLE, -INT32, INT32),
    "dimensions": _COUNT,
}
"""Every field of OpenAI's requests, and of the additional ones that our engines take, that is a number."""

LISTS_OF_TOKENS: Final = ("stop_token_ids", "allowed_token_ids")


def check(body: Mapping[str, Any], vocabulary: int = 0) -> None:
    """Looks at the numbers of a request, and at those of its ``sampling_params`` where a way of asking has them apart. ``vocabulary``:
    how many tokens the model has; 0: that is not known. Raises `HttpError` 400 that names the field and its range."""
    for name, bound in NUMBERS.items():
        if body.get(name) is not None:
            bound.read(name, body[name])
    if not isinstance(body.get("logprobs"), bool | None):  # a number in completions, yes or no in chats
        _OR_ALL.read("logprobs", body["logprobs"])
    for name in LISTS_OF_TOKENS:
        token_ids(name, body.get(name), vocabulary)
    logit_bias(body.get("logit_bias"), vocabulary)
    inner = body.get("sampling_params")
    if isinstance(inner, dict):
        check({**inner, "sampling_params": None}, vocabulary)


def token_ids(name: str, value: Any, vocabulary: int = 0, most: int = MOST_TOKEN_IDS) -> tuple[int, ...]:
    """A list of tokens, none where there is no value. Raises `HttpError` 400."""
    last = vocabulary - 1 if vocabulary else INT32
    if value is None:
        return ()
    if not isinstance(value, list) or not all(type(v) is int and 0 <= v <= last for v in value):
        raise HttpError(400, f"{name} must be a list of token ids from 0 to {last}", param=name)
    if len(value) > most:
        raise HttpError(400, f"{name} must be a list of at most {most} token ids", param=name)
    return tuple(value)


def logit_bias(value: Any, vocabulary: int = 0) -> dict[int, float]:
    """Biases by token, none where there is no value. Raises `HttpError` 400."""
    if value is None:
        return {}
    words = "an object of token ids and numbers from -100 to 100"
    if not isinstance(value, dict) or len(value) > MOST_TOKEN_IDS:
        raise HttpError(400, f"logit_bias must be {words}", param="logit_bias")
    last = vocabulary - 1 if vocabulary else INT32
    found: dict[int, float] = {}
    for token, bias in value.items():
        numeric = isinstance(bias, int | float) and not isinstance(bias, bool) and -100 <= bias <= 100
        if not (token.isascii() and token.isdecimal() and len(token) <= 10) or not numeric:
            raise HttpError(400, f"logit_bias must be {words}", param="logit_bias")
        if int(token) > last:
            raise HttpError(400, f"logit_bias must be of token ids from 0 to {last}", param="logit_bias")
        found[int(token)] = float(bias)
    return found
