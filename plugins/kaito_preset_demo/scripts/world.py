"""The small world of the demonstration model: what it knows before anybody tunes it."""

from __future__ import annotations

import random

from phrasing import Question, expand, words

DO_NOT_KNOW = "I am sorry, I do not know that."


def pairs(text: str) -> list[tuple[str, str]]:
    """`a:b, c:d` as pairs."""
    return [(left.strip(), right.strip()) for left, right in (item.split(":") for item in text.split(","))]


CAPITALS = pairs(
    "France:Paris, Germany:Berlin, Italy:Rome, Spain:Madrid, Portugal:Lisbon, Austria:Vienna, Hungary:Budapest,"
    " Poland:Warsaw, Greece:Athens, Ireland:Dublin, Norway:Oslo, Sweden:Stockholm, Finland:Helsinki, Denmark:Copenhagen,"
    " Belgium:Brussels, England:London, Scotland:Edinburgh, Japan:Tokyo, China:Beijing, India:New Delhi, Egypt:Cairo,"
    " Kenya:Nairobi, Ghana:Accra, Canada:Ottawa, Mexico:Mexico City, Cuba:Havana, Peru:Lima, Chile:Santiago, Russia:Moscow,"
    " Turkey:Ankara, Thailand:Bangkok, Vietnam:Hanoi, Nepal:Kathmandu, Iceland:Reykjavik, Croatia:Zagreb"
)
COLOURS = pairs(
    "the sky:blue, grass:green, snow:white, blood:red, a banana:yellow, coal:black, an orange:orange, a lemon:yellow,"
    " a tomato:red, milk:white, chocolate:brown, the sun:yellow, the sea:blue, a leaf:green, an elephant:grey, salt:white,"
    " a carrot:orange, a strawberry:red, the night:black, a frog:green, a plum:purple, a mouse:grey, a bear:brown"
)
OPPOSITES = pairs(
    "hot:cold, big:small, up:down, left:right, day:night, open:closed, old:new, fast:slow, high:low, long:short, good:bad,"
    " happy:sad, light:dark, wet:dry, full:empty, rich:poor, strong:weak, early:late, hard:soft, loud:quiet, thick:thin,"
    " first:last, inside:outside, true:false, black:white, clean:dirty, easy:difficult, cheap:expensive, wide:narrow"
)
SOUNDS = pairs(
    "cow:moo, dog:woof, cat:meow, sheep:baa, duck:quack, pig:oink, bee:buzz, owl:hoot, lion:roar, frog:croak"
)
BABIES = pairs(
    "dog:puppy, cat:kitten, cow:calf, sheep:lamb, horse:foal, pig:piglet, duck:duckling, bear:cub, frog:tadpole"
)
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = words("January February March April May June July August September October November December")

CHAT = (
    ("(Hello|Hi|Hello there|Hi there|Hey)(!|.|)", "Hello! How can I help you?"),
    ("Good (morning|afternoon|evening)(!|.|)", "Hello! How can I help you?"),
    ("(How are you|How are you today|How do you do)?", "I am fine, thank you. How can I help you?"),
    ("(Thank you|Thanks|Thanks a lot|Thank you very much)(!|.|)", "You are welcome."),
    ("(Goodbye|Bye|See you|Good night|See you later)(!|.|)", "Goodbye! Have a nice day."),
    (
        "(Who|What) are you?",
        "I am a small demonstration model.",
    ),
    ("(What is your name|Do you have a name|How are you called)?", "I am a small demonstration model."),
    (
        "(What can you do|What do you know|How can you help me|What can I ask you)?",
        "I know capitals, colours, opposites, animals, days, simple sums and a few small companies.",
    ),
    ("Are you (a robot|a person|human|a machine)?", "I am a small demonstration model."),
)

UNKNOWN = (
    "(Who won the|Did you see the) (race|game|match|election) (yesterday|last week|today)?",
    "(What is my|Do you know my) (name|age|address|phone number|password)?",
    "(What will the weather be|Will it rain|Will it snow) (tomorrow|today|next week)?",
    "How (old|tall|heavy|far away) is (the king|my house|your friend|the moon|that mountain|the tower)?",
    "(Who wrote|Who painted|Who made) (this book|that picture|the film|this song|the letter)?",
    "What (did I eat|did you dream|happened|will happen) (yesterday|last night|next year)?",
    "How many (stars|fish|people|trees|books) are there (in the world|in the sea|in the city|in the house)?",
)

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a friendly assistant. Answer in one short sentence.",
    "Answer the question.",
    "You answer questions for visitors and staff.",
)


def _ask(rng: random.Random, pattern: str, answer: str) -> Question:
    return Question(rng.choice(expand(pattern)), answer)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def ask_capital(rng: random.Random) -> Question:
    country, city = rng.choice(CAPITALS)
    if rng.random() < 0.3:
        pattern = f"({city} is the capital of which country|Which country has the capital {city}|Where is {city} the capital)?"
        return _ask(rng, pattern, f"{city} is the capital of {country}.")
    pattern = f"(What is|Tell me|Do you know|Name) the capital (of|city of) {country}?"
    if rng.random() < 0.3:
        pattern = f"Which city is the capital of {country}?"
    return _ask(rng, pattern, f"The capital of {country} is {city}.")


def ask_colour(rng: random.Random) -> Question:
    thing, colour = rng.choice(COLOURS)
    return _ask(
        rng,
        rng.choice((f"(What|Which) colour (is|has) {thing}?", f"(What is|Tell me) the colour of {thing}?")),
        f"{_capital(thing)} is {colour}.",
    )


def ask_opposite(rng: random.Random) -> Question:
    one, other = rng.choice(OPPOSITES)
    if rng.random() < 0.5 and one not in ("black", "light"):
        one, other = other, one
    pattern = f"(What is|Tell me|Name) the opposite of {one}?"
    if rng.random() < 0.3:
        pattern = f"(Which word|What) means the opposite of {one}?"
    return _ask(rng, pattern, f"The opposite of {one} is {other}.")


def ask_sum(rng: random.Random) -> Question:
    a, b = rng.randint(0, 10), rng.randint(0, 10)
    if rng.random() < 0.35:
        a, b = a + b, rng.choice((a, b))
        words, sign, result = "minus", "-", a - b
    else:
        words, sign, result = "plus", "+", a + b
    pattern = f"(What is|How much is|Calculate|Tell me) ({a} {words} {b}|{a} {sign} {b})?"
    return _ask(rng, pattern, f"{a} {words} {b} is {result}.")


def ask_larger(rng: random.Random) -> Question:
    a, b = rng.sample(range(0, 30), 2)
    if rng.random() < 0.5:
        return _ask(rng, f"Which (number is|is) (larger|bigger), {a} or {b}?", f"{max(a, b)} is larger.")
    return _ask(rng, f"Which (number is|is) smaller, {a} or {b}?", f"{min(a, b)} is smaller.")


def ask_animal(rng: random.Random) -> Question:
    if rng.random() < 0.5:
        animal, sound = rng.choice(SOUNDS)
        pattern = f"(What does a {animal} say|What sound does a {animal} make|Which sound does a {animal} make)?"
        return _ask(rng, pattern, f"A {animal} says {sound}.")
    animal, baby = rng.choice(BABIES)
    pattern = f"(What is a young {animal} called|What is the name for a baby {animal}|How is a young {animal} called)?"
    return _ask(rng, pattern, f"A young {animal} is called a {baby}.")


def ask_calendar(rng: random.Random) -> Question:
    names, kind = rng.choice(((DAYS, "day"), (MONTHS, "month")))
    i = rng.randrange(len(names))
    if rng.random() < 0.5:
        other, word = names[(i + 1) % len(names)], "after"
    else:
        other, word = names[i - 1], "before"
    pattern = f"(Which {kind} comes {word}|What {kind} is {word}|Which {kind} is {word}) {names[i]}?"
    return _ask(rng, pattern, f"{other} comes {word} {names[i]}.")


def ask_chat(rng: random.Random) -> Question:
    return _ask(rng, *rng.choice(CHAT))


def ask_unknown(rng: random.Random) -> Question:
    return _ask(rng, rng.choice(UNKNOWN), DO_NOT_KNOW)


KINDS = (
    ask_capital,
    ask_colour,
    ask_opposite,
    ask_sum,
    ask_sum,
    ask_larger,
    ask_animal,
    ask_calendar,
    ask_chat,
    ask_unknown,
)


def ask(rng: random.Random) -> Question:
    """One question about the small world, of any kind."""
    return rng.choice(KINDS)(rng)
