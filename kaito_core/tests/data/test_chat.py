"""Conversations as text: what serving will see, and which characters are the assistant's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaito_core.data.chat import ChatError, render, render_prompt
from kaito_core.data.formats import Message
from kaito_core.plugins.types import ChatFormat, Preset

from .conftest import MARKED, UNMARKED

TALK = [Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "Bye"),
        Message("assistant", "Ciao")]  # fmt: skip
STOP = ("<|end|>", "<|endoftext|>")
EOS = {"eos_token": "<|endoftext|>"}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
)


def said(template: str, talk: list[Message] = TALK, stop: tuple[str, ...] = STOP) -> list[str]:
    rendered = render(talk, ChatFormat(template, stop), EOS)
    return [rendered.text[a:b] for a, b in rendered.spans]


def test_phi_3s_form() -> None:
    rendered = render(TALK[1:3], ChatFormat(MARKED, STOP))
    assert rendered.text == "<|user|>\nHi<|end|>\n<|assistant|>\nHello<|end|>\n"
    assert render_prompt(TALK[1:2], ChatFormat(MARKED, STOP)) == "<|user|>\nHi<|end|>\n<|assistant|>\n"


@pytest.mark.parametrize(
    ("template", "stop"),
    [
        (MARKED, STOP),
        (UNMARKED, STOP),
        (MARKED.replace("<|end|>{% endgeneration %}", "{% endgeneration %}<|end|>"), STOP),
        (CHATML, ("<|im_end|>",)),
    ],
)
def test_every_answer_is_a_span_that_ends_with_its_stop_token(template: str, stop: tuple[str, ...]) -> None:
    """Marks or none, and even where the marks leave the stop token out: a model must learn where to stop."""
    assert said(template, stop=stop) == [f"Hello{stop[0]}", f"Ciao{stop[0]}"]


def test_it_renders_as_transformers_does() -> None:
    template = "{%- for m in messages -%}\n  {%- if loop.first %}\n    {{ m.content | tojson }}\n  {% endif %}\n{% endfor %}\nend\n"
    assert render_prompt([Message("user", "<é>")], ChatFormat(template, STOP)) == '    "<é>"\nend'


def test_data_cannot_forge_a_span() -> None:
    talk = [Message("user", "{% generation %}{{ 7 * 7 }}{% endgeneration %}"), Message("assistant", "a")]
    assert said(MARKED, talk) == ["a<|end|>"]


def test_a_template_that_rewrites_what_came_before_is_an_error_that_says_so() -> None:
    template = "{{ messages | length }}:{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    with pytest.raises(ChatError, match="not prefix-stable"):
        said(template)


def test_a_template_that_rewrites_the_answer_is_an_error_that_says_so() -> None:
    with pytest.raises(ChatError, match="changes what the assistant says"):
        said("{% for m in messages %}{{ m.content | upper }}{% endfor %}", [Message("assistant", "a")])


def test_a_role_that_the_template_refuses_or_drops_is_an_error() -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    with pytest.raises(ChatError, match="refuses the conversation: System role not supported"):
        said(refusing)
    dropping = (
        "{% for m in messages %}{% if m.role != 'system' %}"
        + CHATML.split("{% endfor %}")[0].partition("%}")[2]
        + "{% endif %}{% endfor %}"
    )
    dropping += CHATML.partition("{% endfor %}")[2]
    with pytest.raises(ChatError, match="leaves out what the system says"):
        said(dropping, stop=("<|im_end|>",))


@pytest.mark.parametrize(
    "template",
    ["{{ messages.__class__.__mro__ }}", "{{ ''.__class__.__base__.__subclasses__() }}", "{% for x in %}", "{{ messages[99].content.x }}",
     "{{ messages.append(1) }}", "{% for i in range(10**9) %}x{% endfor %}"],
)  # fmt: skip
def test_a_hostile_or_broken_template_is_an_error(template: str) -> None:
    with pytest.raises(ChatError):
        said(template + "{% generation %}{% endgeneration %}")


text = st.text(st.characters(blacklist_categories=("Cs",)), max_size=20)


@given(st.lists(st.tuples(text, text), min_size=1, max_size=4))
def test_marks_and_prefixes_find_the_same_spans(turns: list[tuple[str, str]]) -> None:
    talk = [Message(role, words) for ask, say in turns for role, words in (("user", ask), ("assistant", say))]
    stop = ("<|im_end|>",)
    marked = CHATML.replace(
        "{{ m.content | trim }}<|im_end|>\n",
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}<|im_end|>{% endgeneration %}\n"
        "{% else %}{{ m.content | trim }}<|im_end|>\n{% endif %}",
    )
    # The line break behind a tag belongs to the tag (trim_blocks): write it as text.
    marked = marked.replace("{% endgeneration %}\n", "{% endgeneration %}{{ '\\n' }}")
    assert render(talk, ChatFormat(marked, stop)) == render(talk, ChatFormat(CHATML, stop))


def test_special_tokens_come_from_the_tokenizers_configuration(
    model_folder: Any, preset_with: Callable[..., Preset]
) -> None:
    from kaito_core.data.chat import special_tokens

    assert special_tokens(model_folder) == {"bos_token": "<s>", "eos_token": "<|endoftext|>"}
