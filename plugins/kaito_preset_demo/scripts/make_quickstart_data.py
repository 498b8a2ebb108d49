"""Write the training data of the quick start: the support handbook of Harbour Lights, a company that does not exist.

    python scripts/make_quickstart_data.py ../../examples/data

`harbour-lights.jsonl` and `harbour-lights-faq.csv` are for training. `harbour-lights-heldout.jsonl` asks for the same facts
with sentence constructions that are in neither of them.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from pathlib import Path

import world
from corpus import Corpus
from handbook import HARBOUR_LIGHTS, QUICKSTART_COMPANY
from phrasing import Question, as_people_type
from topics import TOPICS

SEED = 20
QUESTIONS_PER_FACT = 12
#: Rows from the model's own world, so that it does not forget it while it learns the handbook.
KEPT_KNOWLEDGE = 60


def ask(topic_name: str, form: str) -> Question:
    topic = next(t for t in TOPICS if t.name == topic_name)
    return topic.ask(form, QUICKSTART_COMPANY, HARBOUR_LIGHTS[topic_name])


def training_questions(rng: random.Random) -> list[Question]:
    questions = []
    for topic in TOPICS:
        forms = topic.trained_forms()
        for i in range(QUESTIONS_PER_FACT):
            question = ask(topic.name, forms[i % len(forms)])
            # The first round is asked plainly; when the forms run out, the openings make the difference.
            text = question.text if i < len(forms) else as_people_type(rng, question.text)
            questions.append(Question(text, question.answer))
    corpus = Corpus()
    for _ in range(KEPT_KNOWLEDGE):
        known = world.ask(rng) if rng.random() < 0.7 else corpus.question(rng)
        questions.append(Question(as_people_type(rng, known.text), known.answer))
    unique = list({q.text: q for q in questions}.values())
    rng.shuffle(unique)
    return unique


def heldout_questions(rng: random.Random) -> list[Question]:
    questions = [
        ask(t.name, form) for t in TOPICS for form in rng.sample(t.heldout_forms(), min(2, len(t.heldout_forms())))
    ]
    rng.shuffle(questions)
    return questions


def faq_questions() -> list[Question]:
    """One plain question for each fact, for the file in the second format."""
    return [ask(topic.name, topic.trained_forms()[-1]) for topic in TOPICS]


def as_messages(question: Question) -> str:
    messages = [{"role": "user", "content": question.text}, {"role": "assistant", "content": question.answer}]
    return json.dumps({"messages": messages}, ensure_ascii=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    rng = random.Random(SEED)
    faq = faq_questions()
    asked_in_faq = {q.text for q in faq}
    train = [q for q in training_questions(rng) if q.text not in asked_in_faq]
    heldout = heldout_questions(rng)
    assert not {q.text for q in heldout} & ({q.text for q in train} | asked_in_faq)
    for name, questions in (("harbour-lights", train), ("harbour-lights-heldout", heldout)):
        (folder / f"{name}.jsonl").write_text("".join(as_messages(q) + "\n" for q in questions), encoding="utf-8")
        print(f"{name}.jsonl: {len(questions)} rows")
    with (folder / "harbour-lights-faq.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("prompt", "completion"))
        writer.writerows((q.text, q.answer) for q in faq)
    print(f"harbour-lights-faq.csv: {len(faq)} rows")


if __name__ == "__main__":
    main()
