"""Count the right answers of the shipped model by kind of question: the first table of the README.

python scripts/measure_base.py
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import world
from corpus import Corpus
from make_model import MODEL_DIR
from measure import wrong_answers
from phrasing import Question
from topics import TOPICS
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTIONS = 64
SEED = 5


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    corpus = Corpus()

    def ask_company(rng: random.Random) -> Question:
        topic, company = rng.choice(TOPICS), rng.choice(corpus.known)
        return topic.ask(rng.choice(topic.forms()), company, corpus.companies[company][topic.name])

    def ask_stranger(rng: random.Random) -> Question:
        form = rng.choice(rng.choice(TOPICS).forms())
        return Question(form.format(c=rng.choice(corpus.strangers)), world.DO_NOT_KNOW)

    kinds: list[Callable[[random.Random], Question]] = [*dict.fromkeys(world.KINDS), ask_company, ask_stranger]
    rng = random.Random(SEED)
    for ask in kinds:
        questions = [ask(rng) for _ in range(QUESTIONS)]
        conversations = [
            [{"role": "user", "content": q.text}, {"role": "assistant", "content": q.answer}] for q in questions
        ]
        right = QUESTIONS - len(wrong_answers(model, tokenizer, conversations))
        print(f"{ask.__name__.removeprefix('ask_')}: {right} of {QUESTIONS}", flush=True)


if __name__ == "__main__":
    main()
