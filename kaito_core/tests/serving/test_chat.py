"""KAITO's request form, without a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaito_core.serving import chat
from kaito_core.serving.errors import HttpError
from kaito_core.serving.settings import Settings

INSTRUCT = Settings(marks=frozenset({"<|user|>", "<|end|>"}))
BASE = Settings(has_template=False)


def request(settings: Settings = INSTRUCT, tokens: int | None = None, **body: Any) -> dict[str, Any]:
    return chat.engine_request(chat.read(body, settings), "demo", tokens)


def refused(**body: Any) -> str:
    with pytest.raises(HttpError) as e:
        chat.read(body, INSTRUCT)
    assert e.value.status == 400
    return e.value.message


def test_a_bare_prompt_is_the_users_turn_for_a_model_with_a_template() -> None:
    asked = chat.read({"prompt": "Who?"}, INSTRUCT)
    assert asked.path == "/v1/chat/completions"
    assert asked.asked == {"messages": [{"role": "user", "content": "Who?"}]}
    answer = {"choices": [{"message": {"content": "Me."}}]}
    assert chat.result(asked, answer) == {"Result": "Who?\nMe."}


@pytest.mark.parametrize(
    ("settings", "prompt"), [(BASE, "Once upon a time"), (INSTRUCT, "<|user|>\nWho?<|end|>\n<|assistant|>\n")]
)
def test_a_base_model_and_a_prompt_in_the_models_own_form_are_completed(settings: Settings, prompt: str) -> None:
    asked = chat.read({"prompt": prompt}, settings)
    assert asked.path == "/v1/completions"
    assert asked.asked == {"prompt": prompt}
    assert chat.result(asked, {"choices": [{"text": " there was"}]}) == {"Result": prompt + " there was"}


def test_the_answer_alone() -> None:
    asked = chat.read({"prompt": "Who?", "return_full_text": False}, INSTRUCT)
    assert chat.result(asked, {"choices": [{"message": {"content": "Me."}}]}) == {"Result": "Me."}


def test_a_conversation() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    asked = chat.read({"messages": messages}, INSTRUCT)
    assert asked.asked == {"messages": messages}
    assert chat.result(asked, {"choices": [{"message": {"content": "Me."}}]}) == {"Result": "Me."}


def test_a_prefix_is_read_and_not_repeated() -> None:
    asked = chat.read({"prompt": "b", "prefix": "a "}, BASE)
    assert asked.asked == {"prompt": "a b"}
    assert chat.result(asked, {"choices": [{"text": " c"}]}) == {"Result": "b c"}


def test_clean_up_of_spaces() -> None:
    asked = chat.read({"prompt": "a", "clean_up_tokenization_spaces": True, "return_full_text": False}, BASE)
    assert chat.result(asked, {"choices": [{"text": "It 's here , is n't it ?"}]}) == {"Result": "It's here, isn't it?"}


def test_generation_settings_become_the_engines() -> None:
    said = request(
        prompt="Who?",
        generate_kwargs={"max_new_tokens": 5, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "repetition_penalty": 1.2,
                         "eos_token_id": 7, "seed": 1, "stop_strings": ["."], "num_beams": 1, "early_stopping": True,
                         "pad_token_id": None},
    )  # fmt: skip
    del said["messages"], said["model"]
    assert said == {"max_tokens": 5, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "repetition_penalty": 1.2,
                    "stop_token_ids": [7], "seed": 1, "stop": ["."]}  # fmt: skip


def test_greedy() -> None:
    said = request(prompt="Who?", generate_kwargs={"do_sample": False, "temperature": 0.7})
    assert said["temperature"] == 0
    assert "top_k" not in said


def test_least_and_most_count_the_prompt() -> None:
    said = request(prompt="Who?", tokens=10, generate_kwargs={"max_length": 50, "min_length": 30})
    assert (said["max_tokens"], said["min_tokens"]) == (40, 20)
    assert request(prompt="Who?", tokens=300)["max_tokens"] == 200  # KAITO's default would leave no room for an answer


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, chat.NO_PROMPT),
        ({"prompt": ""}, chat.NO_PROMPT),
        ({"messages": []}, chat.NO_MESSAGES),
        ({"prompt": 5}, "prompt must be a text"),
        ({"prompt": "\ud800"}, "prompt holds half of a character (a lone surrogate)"),
        ({"messages": "hello"}, "messages must be a list"),
        ({"messages": ["hello"]}, 'messages[0] must be an object like {"role": "user", "content": "…"}'),
        ({"messages": [{"role": "user"}]}, "messages[0].content must be a text"),
        ({"prompt": "a", "return_full_text": "yes"}, "return_full_text must be true or false"),
        ({"prompt": "a", "generate_kwargs": []}, "generate_kwargs must be an object"),
        ({"prompt": "a", "generate_kwargs": {"max_length": True}}, "generate_kwargs.max_length must be a whole number"),
        ({"prompt": "a", "generate_kwargs": {"max_length": 0}}, "generate_kwargs.max_length must be at least 1"),
        ({"prompt": "a", "generate_kwargs": {"top_p": 2}}, "generate_kwargs.top_p must be from 0 to 1"),
        ({"prompt": "a", "generate_kwargs": {"num_beams": 4}}, "generate_kwargs.num_beams cannot be other than 1 here"),
        ({"prompt": "a", "generate_kwargs": {"max_lenght": 4}},
         "generate_kwargs has no setting 'max_lenght' here: did you mean 'max_length'?"),
        ({"prompt": "a", "max_tokens": 4}, "max_tokens is not a field of /chat: write it as generate_kwargs.max_new_tokens"),
        ({"promt": "a"}, "there is no field 'promt': did you mean 'prompt'?"),
    ],
)  # fmt: skip
def test_bad_requests(body: dict[str, Any], words: str) -> None:
    assert refused(**body) == words


def test_fields_that_kaito_ignores_are_ignored() -> None:
    assert chat.read({"prompt": "a", "user": "me", "stream": False}, INSTRUCT).text == "a"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
fields = st.dictionaries(
    st.sampled_from([*chat.TOP_LEVEL, "model"]),
    json_values | st.dictionaries(st.sampled_from(list(chat.KWARGS)), json_values, max_size=4),
    max_size=5,
)


@given(fields, st.none() | st.integers(0, 10_000))
def test_any_object_is_a_request_or_a_400(body: dict[str, Any], tokens: int | None) -> None:
    try:
        said = request(tokens=tokens, **body)
    except HttpError as e:
        assert e.status == 400
        json.dumps(e.body())
    else:
        assert said["max_tokens"] >= 1
        assert ("prompt" in said) != ("messages" in said)
        json.dumps(said)


def test_the_models_files_say_whether_there_is_a_template_and_its_marks(tmp_path: Path) -> None:
    environ = {"KAITO_WEIGHTS": str(tmp_path), "KAITO_ADAPTERS": str(tmp_path / "adapters"), "KAITO_CHAT_MODEL": "mine"}
    assert not Settings.from_env(environ).has_template
    tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "additional_special_tokens": ["<|user|>"],
              "added_tokens_decoder": {"3": {"content": "[INST]", "special": True}, "4": {"content": "plain"}}}  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokens))
    settings = Settings.from_env(environ)
    assert settings.marks == {"<s>", "</s>", "<|user|>", "[INST]"}
    assert not settings.has_template
    template = tmp_path / "adapters/mine/chat_template.jinja"
    template.parent.mkdir(parents=True)
    template.write_text("{{ messages }}")
    assert Settings.from_env(environ).has_template
    (tmp_path / "tokenizer_config.json").write_text("[")
    assert Settings.from_env(environ).marks == frozenset()
