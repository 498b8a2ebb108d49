"""Conversations to pre-train on, made from templates: nothing is downloaded, and the same seed gives the same text."""

from __future__ import annotations

import random
from collections.abc import Iterator

import world
from handbook import QUICKSTART_COMPANY, all_company_names, make_companies
from phrasing import Question, as_people_type
from topics import TOPICS

Message = dict[str, str]

#: Enough companies to learn what is asked, few enough to be remembered by four million parameters.
COMPANIES = 24
COMPANY_SEED = 7


class Corpus:
    """An endless source of conversations: half about companies, half about the small world."""

    def __init__(self) -> None:
        self.companies = make_companies(random.Random(COMPANY_SEED), COMPANIES)
        self.known = sorted(self.companies)
        self.strangers = [name for name in all_company_names() if name not in self.companies]

    def question(self, rng: random.Random) -> Question:
        roll = rng.random()
        if roll < 0.4:
            return world.ask(rng)
        topic = rng.choice(TOPICS)
        form = rng.choice(topic.forms())
        if roll < 0.9:
            company = rng.choice(self.known)
            return topic.ask(form, company, self.companies[company][topic.name])
        return Question(form.format(c=rng.choice(self.strangers)), world.DO_NOT_KNOW)

    def conversation(self, rng: random.Random) -> list[Message]:
        """One to eight turns, mostly one; sometimes with a system prompt."""
        messages: list[Message] = []
        if rng.random() < 0.15:
            messages.append({"role": "system", "content": rng.choice(world.SYSTEM_PROMPTS)})
        for _ in range(rng.choice((1, 1, 1, 1, 1, 2, 3, 8))):
            question = self.question(rng)
            messages.append({"role": "user", "content": as_people_type(rng, question.text)})
            messages.append({"role": "assistant", "content": question.answer})
        return messages

    def conversations(self, seed: int, count: int) -> Iterator[list[Message]]:
        rng = random.Random(seed)
        for _ in range(count):
            yield self.conversation(rng)

    def tokenizer_text(self, seed: int, count: int) -> Iterator[str]:
        """Text for the tokenizer: the conversations, and every word a handbook can hold, also the quick start's."""
        for messages in self.conversations(seed, count):
            yield "\n".join(message["content"] for message in messages)
        rng = random.Random(seed)
        names = [QUICKSTART_COMPANY, *all_company_names()]
        for topic in TOPICS:
            for _ in range(count // 40):
                name = rng.choice(names)
                value = topic.value(rng).format(domain=name.replace(" ", "").lower())
                yield topic.answer.format(c=name, v=value)
