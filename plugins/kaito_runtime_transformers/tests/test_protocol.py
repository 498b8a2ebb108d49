"""OpenAI's requests."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaito_core.serving.errors import HttpError
from kaito_runtime_transformers import protocol

MESSAGES = [{"role": "user", "content": "Who?"}]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, 'messages must be a list like [{"role": "user", "content": "…"}]'),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
         "messages[0].content may hold text only: this runtime reads text"),
        ({"messages": MESSAGES, "temperature": 3}, "temperature must be from 0 to 2"),
        ({"messages": MESSAGES, "temperature": "hot"}, "temperature must be a number"),
        ({"messages": MESSAGES, "max_tokens": 0}, "max_tokens must be at least 1"),
        ({"messages": MESSAGES, "max_tokens": 2**31}, "max_tokens must be from 1 to 2147483647"),
        ({"messages": MESSAGES, "top_k": 2**31}, "top_k must be from -1 to 2147483647"),
        ({"messages": MESSAGES, "seed": 2**63}, "seed must be from -9223372036854775808 to 9223372036854775807"),
        ({"messages": MESSAGES, "top_p": float("nan")}, "top_p must be from 0 to 1"),
        ({"messages": MESSAGES, "stop": 0}, "stop must be a text or up to 16 texts"),
        ({"messages": MESSAGES, "stop_token_ids": [-1]}, "stop_token_ids must be a list of token ids from 0 to 2147483647"),
        ({"messages": MESSAGES, "n": 99}, "n must be from 1 to 16"),
        ({"messages": MESSAGES, "stream": 1}, "stream must be true or false"),
        ({"messages": MESSAGES, "stop": [1]}, "stop must be a text or up to 16 texts"),
        ({"messages": MESSAGES, "logit_bias": {"x": 1}}, "logit_bias must be an object of token ids and numbers from -100 to 100"),
        ({"messages": MESSAGES, "temprature": 1}, "there is no field 'temprature': did you mean 'temperature'?"),
        ({"messages": MESSAGES, "logprobs": True}, "logprobs is not supported: this runtime does not give probabilities"),
        ({"messages": MESSAGES, "tools": [{}]},
         "tools is not supported: this runtime does not parse tool calls: serve the model with the runtime vllm"),
        ({"messages": MESSAGES, "stream_options": {"include_usage": True}},
         "stream_options must be left out when stream is not true"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused_by_name(body: dict[str, Any], words: str) -> None:
    with pytest.raises(HttpError) as e:
        protocol.read(body, chat=True)
    assert (e.value.status, e.value.message) == (400, words)


def test_what_changes_no_answer_is_taken() -> None:
    body = {"messages": MESSAGES, "user": "me", "response_format": {"type": "text"}, "logprobs": False, "anything": 1}
    assert protocol.read(body, chat=True).messages == tuple(MESSAGES)


def test_prompts_in_all_their_forms() -> None:
    def prompts(value: Any) -> Any:
        return protocol.read({"prompt": value}, chat=False).prompts

    assert prompts("a") == ("a",)
    assert prompts(["a", "b"]) == ("a", "b")
    assert prompts([1, 2]) == ((1, 2),)
    assert prompts([[1], [2, 3]]) == ((1,), (2, 3))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from([*protocol._KNOWN, *protocol._UNSUPPORTED]), json_values), st.booleans())
def test_any_object_is_a_request_or_a_400(body: dict[str, Any], chat: bool) -> None:
    try:
        request = protocol.read(body, chat)
    except HttpError as e:
        assert e.status == 400
        json.dumps(e.body())
    else:
        assert request.messages or request.prompts
