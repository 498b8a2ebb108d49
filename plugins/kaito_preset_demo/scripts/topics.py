"""What can be asked about a company, and in how many ways."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from phrasing import Question, expand, words

Rng = random.Random

FIRST_NAMES = words(
    "Anna Marta Elena Sofia Nina Clara Julia Emma Rosa Lucy Tom Oskar Peter Samuel Victor Hugo Daniel Martin Paul Felix"
)
LAST_NAMES = words(
    "Berg Carter Silva Novak Weber Rossi Jensen Moreau Kovacs Ahmed Tanaka Murphy Larsen Stone Fisher Young Baker Hall"
)


def person(rng: Rng) -> str:
    return f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"


def among(*values: str) -> Callable[[Rng], str]:
    return lambda rng: rng.choice(values)


def hours(rng: Rng) -> str:
    return f"{rng.choice((8, 9, 10, 11))} am to {rng.choice((2, 3, 4, 5))} pm"


@dataclass(frozen=True, slots=True)
class Topic:
    """One thing a handbook says. `{c}` is the company, `{v}` the value.

    The last pattern is kept out of the quick start's training file, whole: held-out questions differ from the trained ones
    in their construction, not only in a word.
    """

    name: str
    value: Callable[[Rng], str]
    answer: str
    patterns: tuple[str, ...]

    def forms(self) -> list[str]:
        return [form for pattern in self.patterns for form in expand(pattern)]

    def trained_forms(self) -> list[str]:
        return [form for pattern in self.patterns[:-1] for form in expand(pattern)]

    def heldout_forms(self) -> list[str]:
        return expand(self.patterns[-1])

    def ask(self, form: str, company: str, value: str) -> Question:
        return Question(form.format(c=company), self.answer.format(c=company, v=value))


TOPICS = (
    Topic(
        "opens",
        among("7 am", "7:30 am", "8 am", "8:30 am", "9 am", "9:30 am", "10 am"),
        "{c} opens at {v} on weekdays.",
        (
            "(What time|When) does {c} open (on weekdays|on working days|during the week)?",
            "(What is|Tell me) the opening time of {c} on weekdays?",
            "From (what time|when) is {c} open (on weekdays|during the week)?",
            "How early can I come to {c} (on a weekday|during the week)?",
        ),
    ),
    Topic(
        "closes",
        among("5 pm", "5:30 pm", "6 pm", "6:30 pm", "7 pm", "8 pm", "9 pm"),
        "{c} closes at {v} on weekdays.",
        (
            "(What time|When) does {c} close (on weekdays|on working days|during the week)?",
            "(What is|Tell me) the closing time of {c} on weekdays?",
            "Until (what time|when) is {c} open (on weekdays|during the week)?",
            "How late can I come to {c} (on a weekday|during the week)?",
        ),
    ),
    Topic(
        "saturday",
        hours,
        "On Saturdays {c} is open from {v}.",
        (
            "(When|What time) is {c} open on (Saturday|Saturdays)?",
            "What are the Saturday hours (of|at) {c}?",
            "Is {c} open on (Saturday|Saturdays)?",
            "Can I (visit|come to) {c} on (a Saturday|Saturdays)?",
        ),
    ),
    Topic(
        "sunday",
        among(
            "closed all day", "open from 10 am to 1 pm", "open until noon", "closed in winter", "open by appointment"
        ),
        "On Sundays {c} is {v}.",
        (
            "(When|What time) is {c} open on (Sunday|Sundays)?",
            "What are the Sunday hours (of|at) {c}?",
            "Is {c} open on (Sunday|Sundays)?",
            "Can I (visit|come to) {c} on (a Sunday|Sundays)?",
        ),
    ),
    Topic(
        "lunch",
        among("noon to 1 pm", "12:30 pm to 1 pm", "1 pm to 2 pm", "12:30 pm to 1:30 pm", "1 pm to 1:30 pm"),
        "{c} has its lunch break from {v}.",
        (
            "(When|What time) is the lunch break (of|at) {c}?",
            "(When|What time) does {c} have its lunch break?",
            "(When|What time) does {c} close for lunch?",
            "When do people at {c} eat lunch?",
        ),
    ),
    Topic(
        "wifi name",
        lambda rng: (
            f"{rng.choice(words('Lantern Sparrow Anchor Meadow Rocket Walnut Comet Pebble'))} {rng.choice(words('Guest Visitor Friend Open'))}"
        ),
        "The Wi-Fi of {c} is called {v}.",
        (
            "(What is|Tell me) the name of the Wi-Fi (at|of) {c}?",
            "(What is|Which is) the Wi-Fi network (at|of) {c}?",
            "How is the Wi-Fi (at|of) {c} called?",
            "Which (Wi-Fi|network) do guests (use|join) at {c}?",
        ),
    ),
    Topic(
        "wifi password",
        lambda rng: f"{rng.choice(words('tide apple cloud maple river candle pepper ginger'))}-{rng.randint(10, 99)}",
        "The Wi-Fi password of {c} is {v}.",
        (
            "(What is|Tell me) the (Wi-Fi password|password of the Wi-Fi) (at|of) {c}?",
            "Which password does the Wi-Fi (at|of) {c} have?",
            "How do I log in to the Wi-Fi (at|of) {c}?",
            "Which password do I (type|need) for the Wi-Fi at {c}?",
        ),
    ),
    Topic(
        "returns",
        among("7", "10", "14", "21", "28", "30", "45", "60", "90"),
        "You can return goods to {c} within {v} days.",
        (
            "(How long|How many days) do I have to return (goods|something) to {c}?",
            "What is the return policy (of|at) {c}?",
            "Within how many days can I return (goods|something) to {c}?",
            "I do not like what I bought. (Until when|How long) can I bring it back to {c}?",
        ),
    ),
    Topic(
        "refund",
        among("in cash", "to your card", "as a voucher", "by bank transfer", "as store credit"),
        "{c} pays refunds {v}.",
        (
            "How does {c} (pay|give) refunds?",
            "How do I get (a refund|my money back) from {c}?",
            "What kind of refund (do I get|is given) at {c}?",
            "In which form does {c} (return money|give money back)?",
        ),
    ),
    Topic(
        "warranty",
        among("one year", "two years", "three years", "five years", "six months", "ten years"),
        "The warranty of {c} lasts {v}.",
        (
            "How long (is the warranty|does the warranty last) at {c}?",
            "What warranty (does {c} give|do I get from {c})?",
            "How long is the warranty of {c}?",
            "For how long are (goods|things) from {c} under warranty?",
        ),
    ),
    Topic(
        "delivery time",
        among("one day", "two days", "three days", "four days", "five days", "one week", "two weeks"),
        "Delivery from {c} takes {v}.",
        (
            "How long does delivery from {c} take?",
            "How (fast|quickly) does {c} deliver?",
            "(What is|Tell me) the delivery time of {c}?",
            "When will my (order|parcel) from {c} arrive?",
        ),
    ),
    Topic(
        "delivery cost",
        lambda rng: f"{rng.randint(2, 19)} euros",
        "Delivery from {c} costs {v}.",
        (
            "How much does delivery from {c} cost?",
            "What (does delivery from {c} cost|is the price of delivery from {c})?",
            "How much does {c} (charge|ask) for delivery?",
            "What do I pay (for delivery|to have things delivered) from {c}?",
        ),
    ),
    Topic(
        "free delivery",
        lambda rng: f"{rng.randint(3, 15)}0 euros",
        "Delivery from {c} is free above {v}.",
        (
            "When is delivery from {c} free?",
            "From (which|what) amount is delivery from {c} free?",
            "How much must I (spend|buy) for free delivery from {c}?",
            "(Above which sum|From how many euros) does {c} deliver for free?",
        ),
    ),
    Topic(
        "manager",
        person,
        "The manager of {c} is {v}.",
        (
            "Who is the manager (of|at) {c}?",
            "(What is|Tell me) the name of the manager (of|at) {c}?",
            "Who (manages|runs|leads) {c}?",
            "Who is in charge (of|at) {c}?",
        ),
    ),
    Topic(
        "founder",
        person,
        "{c} was founded by {v}.",
        (
            "Who (founded|started) {c}?",
            "Who is the founder of {c}?",
            "(What is|Tell me) the name of the founder of {c}?",
            "By whom was {c} (founded|started)?",
        ),
    ),
    Topic(
        "founded",
        lambda rng: str(rng.randint(1880, 2019)),
        "{c} was founded in {v}.",
        (
            "When was {c} (founded|started)?",
            "In (which|what) year was {c} (founded|started)?",
            "(What is|Tell me) the founding year of {c}?",
            "Since when does {c} exist?",
        ),
    ),
    Topic(
        "phone",
        lambda rng: f"555 0{rng.randint(100, 199)}",
        "The phone number of {c} is {v}.",
        (
            "(What is|Tell me) the (phone|telephone) number of {c}?",
            "(Which|What) number do I call to reach {c}?",
            "How can I (call|phone) {c}?",
            "At (which|what) number does {c} answer the phone?",
        ),
    ),
    Topic(
        "email",
        lambda rng: f"{rng.choice(words('help hello info support desk care office contact'))}@{{domain}}.example",
        "The email address of {c} is {v}.",
        (
            "(What is|Tell me) the (email|email address) of {c}?",
            "(Which|What) address do I use to email {c}?",
            "How can I (email|write an email to) {c}?",
            "Where do I send (an email|a message) for {c}?",
        ),
    ),
    Topic(
        "street",
        lambda rng: (
            f"{rng.randint(1, 60)} {rng.choice(words('Quay Mill Church Station Bridge King Orchard Park Castle Lake'))} {rng.choice(('Street', 'Road', 'Lane'))}"
        ),
        "The address of {c} is {v}.",
        (
            "(What is|Tell me) the address of {c}?",
            "(Where do I find|Where is) {c}?",
            "(In which|On which) street is {c}?",
            "How do I get to {c}?",
        ),
    ),
    Topic(
        "parking",
        among(
            "behind the house",
            "in the yard",
            "at the station",
            "on the left side of the street",
            "at the fish market",
            "in the garage next door",
            "under the bridge",
        ),
        "Visitors of {c} can park {v}.",
        (
            "Where can (I|visitors) park at {c}?",
            "Is there parking (at|near) {c}?",
            "Where is the parking (of|for) {c}?",
            "Where do I leave my car when I visit {c}?",
        ),
    ),
    Topic(
        "payment",
        among("cards only", "cash only", "cash and cards", "cards and vouchers", "cash and bank transfer"),
        "{c} accepts {v}.",
        (
            "How can I pay at {c}?",
            "(Which|What) payment does {c} (accept|take)?",
            "(Which|What) ways to pay does {c} accept?",
            "Can I pay (by card|in cash) at {c}?",
        ),
    ),
    Topic(
        "dogs",
        among("welcome", "not allowed", "allowed on a lead", "allowed in the yard", "welcome if they are small"),
        "At {c} dogs are {v}.",
        (
            "Are (dogs|pets) (allowed|welcome) at {c}?",
            "(Can|May) I bring (a dog|my dog) to {c}?",
            "Does {c} allow (dogs|pets)?",
            "What is the rule for (dogs|pets) at {c}?",
        ),
    ),
    Topic(
        "best seller",
        lambda rng: (
            f"the {rng.choice(words('brass wooden blue red paper glass copper tiny tall'))} {rng.choice(words('lantern clock teapot basket kite chair mirror bowl lamp'))}"
        ),
        "The best seller of {c} is {v}.",
        (
            "What is the best seller of {c}?",
            "What does {c} sell most?",
            "Which (product|thing) of {c} sells best?",
            "What do most people buy at {c}?",
        ),
    ),
    Topic(
        "gift wrapping",
        among("is free", "costs 1 euro", "costs 2 euros", "costs 3 euros", "costs 4 euros", "is not offered"),
        "Gift wrapping at {c} {v}.",
        (
            "What does gift wrapping cost at {c}?",
            "How much is gift wrapping at {c}?",
            "Does {c} (offer gift wrapping|wrap gifts)?",
            "Can {c} wrap (a gift|a present) for me?",
        ),
    ),
    Topic(
        "repairs",
        person,
        "At {c} repairs are done by {v}.",
        (
            "Who does the repairs at {c}?",
            "Who repairs (things|goods) at {c}?",
            "Who is responsible for repairs at {c}?",
            "My lamp is broken. Who can (fix|mend) it at {c}?",
        ),
    ),
    Topic(
        "invoices",
        person,
        "At {c} invoices are handled by {v}.",
        (
            "Who handles (invoices|the invoices) at {c}?",
            "Who is responsible for invoices at {c}?",
            "(Whom do I ask|Who can I ask) about (an invoice|invoices) at {c}?",
            "There is a mistake in my invoice. Who can correct it at {c}?",
        ),
    ),
    Topic(
        "uniform",
        among("red", "blue", "green", "yellow", "white", "black", "grey", "orange", "purple", "brown"),
        "The staff of {c} wear {v} shirts.",
        (
            "(What|Which) colour are the (shirts|uniforms) of the staff at {c}?",
            "(What|Which) colour does the staff of {c} wear?",
            "What do the staff of {c} wear?",
            "How do I recognise (the staff|somebody who works) at {c}?",
        ),
    ),
    Topic(
        "cat",
        among(*words("Pepper Ginger Misty Biscuit Shadow Pearl Mango Olive Waffle Captain Button Clover")),
        "The cat of {c} is called {v}.",
        (
            "(What is|Tell me) the name of the cat (at|of) {c}?",
            "How is the cat (at|of) {c} called?",
            "(What is the cat of {c} called|What do people call the cat of {c})?",
            "Which name does the cat (at|of) {c} listen to?",
        ),
    ),
    Topic(
        "meeting",
        lambda rng: f"{rng.choice(words('Monday Tuesday Wednesday Thursday Friday'))} at {rng.choice((8, 9, 10))} am",
        "The staff meeting of {c} is on {v}.",
        (
            "When is the staff meeting (of|at) {c}?",
            "(On which day|What day) is the staff meeting (of|at) {c}?",
            "When does the staff of {c} have its meeting?",
            "When do all who work at {c} (meet|come together)?",
        ),
    ),
    Topic(
        "students",
        among("5", "8", "10", "12", "15", "20", "25"),
        "Students get {v} percent off at {c}.",
        (
            "What is the student discount (of|at) {c}?",
            "(How much|What) discount do students get at {c}?",
            "Is there a discount for students at {c}?",
            "I am a student. Is anything cheaper for me at {c}?",
        ),
    ),
)
