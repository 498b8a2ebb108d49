"""The model card: valid front matter, nothing invented, and text from data stays text."""

from __future__ import annotations

import re

import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from kaito_core.artifacts.model_card import CardFacts, Sample, model_card

FULL = CardFacts(
    name="support-bot",
    base_model="microsoft/Phi-3-mini-128k-instruct",
    base_revision="abc123",
    preset="phi-3-mini-128k-instruct",
    license="mit",
    datasets=("org/tickets",),
    data_digest="sha256:00ff",
    data_rows=1234,
    method="qlora",
    hyper_parameters={"r": 8, "lora_alpha": 8.0, "packing": False},
    held_out_rows=100,
    loss_before=2.5,
    loss_after=1.25,
    samples=(Sample("Hello?", "…", "Hi!"),),
    image="registry.io/team/support-bot:1",
    made_with="kaito 0.1",
)


def front_matter(card: str) -> dict[str, object]:
    _, head, _ = re.split(r"^---\n", card, maxsplit=2, flags=re.MULTILINE)  # as the hub does: a line of its own
    document = yaml.safe_load(head)
    assert isinstance(document, dict)
    return document


def test_a_full_card_says_what_the_hub_and_people_need() -> None:
    card = model_card(FULL)
    assert front_matter(card) == {
        "base_model": "microsoft/Phi-3-mini-128k-instruct",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "mit",
        "datasets": ["org/tickets"],
        "tags": ["kaito", "qlora"],
    }
    for line in (
        "| rows | 1,234 |",
        "| digest | `sha256:00ff` |",
        "| `lora_alpha` | `8.0` |",
        "| `packing` | `false` |",
        "| held-out loss before | 2.5000 |",
        "| held-out loss after | 1.2500 |",
        'base = AutoModelForCausalLM.from_pretrained("microsoft/Phi-3-mini-128k-instruct", revision="abc123")',
        "    image: registry.io/team/support-bot:1",
    ):
        assert line in card
    assert "vllm serve microsoft/Phi-3-mini-128k-instruct --revision abc123 --enable-lora" in card


def test_what_is_unknown_is_left_out() -> None:
    card = model_card(CardFacts(name="x"))
    assert front_matter(card) == {"library_name": "peft", "tags": ["kaito"]}
    assert "##" not in card
    assert "None" not in card


def test_a_base_that_is_in_a_folder_is_named_without_its_path() -> None:
    card = model_card(CardFacts(name="x", base_folder="my model", base_revision="sha256:00ff", image="r.io/x:1"))
    assert "A LoRA adapter for the model in a folder `my model`, with the digest `sha256:00ff`." in card
    assert "base_model" not in front_matter(card)
    assert "name: ./my model" in card
    assert "vllm serve" not in card  # there is no name that it could be given


def test_a_base_that_no_preset_has_is_named_as_the_hub_does() -> None:
    card = model_card(CardFacts(name="x", base_model="org/name", base_revision="abc", image="r.io/x:1"))
    assert "name: org/name@abc" in card
    assert "kaito preset" not in card


def headings(card: str) -> list[str]:
    """Headings outside code blocks, as a Markdown reader sees them."""
    found, fence = [], ""
    for line in card.split("---\n", 2)[2].split("\n"):
        ticks = re.match("`{3,}", line)
        if not fence and ticks:
            fence = ticks[0]
        elif fence and re.fullmatch(f"{fence}`*", line.rstrip()):
            fence = ""
        elif not fence and line.startswith("#"):
            found.append(line)
    assert fence == ""
    return found


nasty = st.text(max_size=60) | st.text("`#-|<>\n\r\\*'\" a\x85\u2028\x1b", max_size=60)


@given(nasty, nasty, nasty, nasty)
@example("", "", "", "---\n")
def test_text_from_data_cannot_break_the_card(prompt: str, after: str, name: str, base: str) -> None:
    sample = Sample(prompt or "p", "before", after)
    card = model_card(CardFacts(name=name, base_model=base, license=base, preset=name, image=base, samples=(sample,)))
    front_matter(card)
    assert len([h for h in headings(card) if h.startswith("# ")]) == 1
    assert headings(card)[1:] == [h for h in ("## Samples", "### Sample 1", "## How to use it") if h in headings(card)]
    assert "\x1b" not in card
