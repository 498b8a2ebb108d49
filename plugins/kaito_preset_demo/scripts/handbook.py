"""The support handbooks of made-up companies.

Pre-training shows a few dozen such companies, so that the model knows *what* is asked whichever words are used. Harbour
Lights, the company of the quick start, is not among them: tuning has only the facts to teach, and a question form that
was not in the tuning data can still be understood.
"""

from __future__ import annotations

from phrasing import words
from topics import TOPICS, Rng

FIRST_WORDS = words(
    "Silver Golden Northern Harbour Old Green Blue Morning Winter Summer Red River Mountain Little Bright Quiet Copper Stone"
    " Forest Market Western Maple Cedar Royal"
)
SECOND_WORDS = words(
    "Lights Bakery Books Bridge Garden Bicycles Coffee Tools Kitchen Flowers Toys Music Clocks Shoes Paper Tea Glass Boats"
    " Lamps Wool Gallery Pottery Games Candles"
)
QUICKSTART_COMPANY = "Harbour Lights"

#: The handbook of the quick start: Topic.name -> value.
HARBOUR_LIGHTS = {
    "opens": "8:30 am",
    "closes": "6:30 pm",
    "saturday": "10 am to 4 pm",
    "sunday": "closed all day",
    "lunch": "12:30 pm to 1 pm",
    "wifi name": "Lantern Guest",
    "wifi password": "tide-47",
    "returns": "45",
    "refund": "to your card",
    "warranty": "five years",
    "delivery time": "three days",
    "delivery cost": "6 euros",
    "free delivery": "80 euros",
    "manager": "Marta Larsen",
    "founder": "Oskar Fisher",
    "founded": "1987",
    "phone": "555 0142",
    "email": "help@harbourlights.example",
    "street": "12 Quay Street",
    "parking": "at the fish market",
    "payment": "cash and cards",
    "dogs": "welcome",
    "best seller": "the brass lantern",
    "gift wrapping": "costs 2 euros",
    "repairs": "Samuel Novak",
    "invoices": "Nina Carter",
    "uniform": "orange",
    "cat": "Biscuit",
    "meeting": "Tuesday at 9 am",
    "students": "15",
}


def all_company_names() -> list[str]:
    """Every name that the two word lists give, without the quick start's own."""
    return [name for a in FIRST_WORDS for b in SECOND_WORDS if (name := f"{a} {b}") != QUICKSTART_COMPANY]


def make_companies(rng: Rng, count: int) -> dict[str, dict[str, str]]:
    """`count` companies with a random value for every topic."""
    companies = {}
    for name in rng.sample(all_company_names(), count):
        domain = name.replace(" ", "").lower()
        companies[name] = {topic.name: topic.value(rng).format(domain=domain) for topic in TOPICS}
    return companies
