"""The names by which a person chooses what is paid for – instance types, GPUs, regions – held against what is known. Pure functions.

A name that no machine of the plan has and that is nearly one of the catalogue's is a slip of the pen: taken as it stands it would
leave the choice to whatever else there is."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from kaito_core.planning import catalogue
from kaito_core.planning.choice import is_model
from kaito_core.plugins.types import Offer, Requirements
from kaito_core.problems import Problem

SLIPS: Final = 2
"""Letters that are wrong, missing, too many or swapped in a name that is still taken for another."""

SHORT_CHARS: Final = 12
"""In a shorter name two letters make another one: only one may be wrong."""

SHORTEST_CHARS: Final = 6
"""A shorter name is near nothing."""

SHOWN: Final = 3
"""Names that are proposed."""

_WITHOUT_GPU: Final = re.compile(
    r"standard_(a|b|d|dc|e|ec|f|fx|g|gs|h|hb|hc|hx|l|m)\d+[a-z0-9-]*(_v\d)?"  # Azure
    r"|([acdhimrtuxz]\d|hpc\d|mac\d|inf\d|trn\d|dl\d|vt\d|f\d)[a-z0-9-]*\.[a-z0-9-]+"  # AWS
    r"|(c\d[ad]?|e2|h\d|m\d|n\d[d]?|t2[ad]|x4|z3)-[a-z0-9-]+"  # Google Cloud
)
"""Families without GPUs, as their clouds call them. The catalogue has none of them, and a letter tells them from those with GPUs:
``m5.xlarge`` is no slip for ``g5.xlarge``."""

_AWS: Final = (
    "us-east-1 us-east-2 us-west-1 us-west-2 us-gov-east-1 us-gov-west-1 ca-central-1 ca-west-1 mx-central-1 sa-east-1 af-south-1 "
    "eu-central-1 eu-central-2 eu-north-1 eu-south-1 eu-south-2 eu-west-1 eu-west-2 eu-west-3 eusc-de-east-1 il-central-1 "
    "me-central-1 me-south-1 ap-east-1 ap-east-2 ap-northeast-1 ap-northeast-2 ap-northeast-3 ap-south-1 ap-south-2 ap-southeast-1 "
    "ap-southeast-2 ap-southeast-3 ap-southeast-4 ap-southeast-5 ap-southeast-6 ap-southeast-7 cn-north-1 cn-northwest-1"
)
_GOOGLE: Final = (
    "africa-south1 asia-east1 asia-east2 asia-northeast1 asia-northeast2 asia-northeast3 asia-south1 asia-south2 asia-southeast1 "
    "asia-southeast2 australia-southeast1 australia-southeast2 europe-central2 europe-north1 europe-north2 europe-southwest1 "
    "europe-west1 europe-west2 europe-west3 europe-west4 europe-west6 europe-west8 europe-west9 europe-west10 europe-west12 "
    "me-central1 me-central2 me-west1 northamerica-northeast1 northamerica-northeast2 northamerica-south1 southamerica-east1 "
    "southamerica-west1 us-central1 us-east1 us-east4 us-east5 us-south1 us-west1 us-west2 us-west3 us-west4"
)
_IBM: Final = "au-syd br-sao ca-mon ca-tor eu-de eu-es eu-gb jp-osa jp-tok us-east us-south"
"""Another cloud's, which are a letter away from regions above."""


Against = Callable[[Offer], str]
"""Why a machine of the catalogue cannot be used; empty when it can."""


def _known_against(offer: Offer) -> str:
    return offer.retired or catalogue.obstacle(offer)


def unknown(
    wanted: Requirements, offers: Iterable[Offer], against: Against = _known_against, *, complete: bool = True
) -> list[Problem]:
    """Instance types and regions that none of the offers has and, as far as is known, no cloud: errors where a known name is near, else
    warnings.

    ``against`` keeps a machine from being proposed. ``complete``: whether every provisioner has said what it has; until then there
    are no errors."""
    there = list(offers)
    types = {o.instance_type.lower() for o in there}
    # The catalogue alone takes a region of AWS or Google for one by the form of its name.
    places = {o.region for o in there if o.provisioner}
    found = []
    for number, name in enumerate(wanted.instance_types):
        if name.lower() not in types and name.lower() not in catalogue.instance_types():
            several = len(wanted.instance_types) > 1
            found.append(
                _type(name, f"resource.instanceTypes[{number}]" if several else "resource.instanceType", against)
            )
    for number, region in enumerate(wanted.regions):
        if region not in places and region not in _regions():
            near = near_regions(region)
            problem = Problem(f"no known region is called {region}", meant(near), f"resource.regions[{number}]")
            found.append(problem if near else replace(problem, severity="warning"))
    return found if complete else [replace(p, severity="warning") for p in found]


def _type(name: str, field: str, against: Against) -> Problem:
    near = [catalogue.instance_types()[n] for n in near_types(name)]
    if not near:
        words = f"the instance type {name!r} is not in the catalogue, so nothing can be said of its fit"
        return Problem(words, field=field, severity="warning")
    words = f"unknown instance type {name!r}"
    if usable := [o.instance_type for o in near if not against(o)]:
        return Problem(words, meant(usable), field)
    words += f"; the nearest known one, {near[0].instance_type}, cannot be used: {against(near[0])}"
    return Problem(words, f"leave {field} out, and kaito chooses", field)


def unknown_gpu(wanted: Requirements) -> str:
    """That no cloud has the GPU that is asked for, and which one may be meant; empty when one has it or none is asked for."""
    known = {m.offer.gpu.model: m for m in catalogue.machines().values() if m.offer.gpu}
    if not wanted.gpu_model or any(is_model(m.offer.gpu, wanted.gpu_model) for m in known.values() if m.offer.gpu):
        return ""
    usable = [model for model, machine in known.items() if not machine.obstacle]
    close = difflib.get_close_matches(wanted.gpu_model.upper(), usable, n=2, cutoff=0.4)
    hint = f"; {meant(close)}" if close else ""
    return f"no known GPU is called {wanted.gpu_model}{hint} (kaito catalog lists them)"


def meant(names: Sequence[str]) -> str:
    """``did you mean A or B?``; empty without names."""
    return f"did you mean {' or '.join(names[:SHOWN])}?" if names else ""


def near_types(name: str) -> list[str]:
    """The instance types of the catalogue, in lower case, that a slip of the pen makes this name of; the nearest first."""
    if _WITHOUT_GPU.fullmatch(name.lower()):
        return []
    plain = _plain(name)
    known = {each: _plain(each) for each in catalogue.instance_types()}
    return _near((plain, f"standard{plain}"), known, SLIPS)  # Azure's prefix is often left out


def near_regions(name: str) -> list[str]:
    """The regions that one slip of the pen makes this name of. A number that is not known yet is no slip: clouds count on."""
    numbers = "0123456789"
    if name.rstrip(numbers) in {known.rstrip(numbers) for known in _regions()}:
        return []
    return _near((name,), {known: known for known in _regions()}, 1)


def _near(forms: Sequence[str], known: Mapping[str, str], slips: int) -> list[str]:
    if len(forms[0]) < SHORTEST_CHARS:
        return []
    allowed = slips if len(forms[0]) >= SHORT_CHARS else 1
    far = {k: min(slips_between(form, plain, allowed) for form in forms) for k, plain in known.items()}
    return sorted((k for k, count in far.items() if count <= allowed), key=lambda k: (far[k], k))


def _plain(instance_type: str) -> str:
    """Without the signs between the parts, which people leave out or take for one another."""
    return re.sub(r"[_.\s-]", "", instance_type.lower())


@functools.cache
def _regions() -> frozenset[str]:
    return frozenset((*catalogue.known_regions(), *_AWS.split(), *_GOOGLE.split(), *_IBM.split()))


def slips_between(one: str, other: str, most: int) -> int:
    """Letters to change, insert, remove or swap with their neighbour to get from one to the other (optimal string alignment);
    ``most`` + 1 when there are more."""
    if abs(len(one) - len(other)) > most:
        return most + 1
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, a in enumerate(one):
        last, before, row = before, row, [i + 1]
        for j, b in enumerate(other):
            cost = min(before[j] + (a != b), before[j + 1] + 1, row[j] + 1)
            if i and j and a == other[j - 1] and one[i - 1] == b:
                cost = min(cost, last[j - 1] + 1)
            row.append(cost)
        if min(row) > most and (not before or min(before) > most):
            return most + 1
    return min(row[-1], most + 1)
