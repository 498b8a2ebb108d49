"""``kaito catalog``: the machines with GPUs that are known, and their prices; and how to get newer prices."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from kaito_core.planning import catalogue, prices
from kaito_core.planning.choice import gib, is_model, money
from kaito_core.planning.prices import Row, Source
from kaito_core.plugins.types import CapacityType, Offer
from kaito_core.problems import Failure, KaitoError, Problem, UserError

if TYPE_CHECKING:
    import httpx

AZURE = "https://prices.azure.com"
AWS = "https://pricing.us-east-1.amazonaws.com"
ADDRESSES = {"azure": ("KAITO_AZURE_PRICES", AZURE), "aws": ("KAITO_AWS_PRICES", AWS)}
"""Where the price lists are, and the environment variable that says otherwise (a mirror inside a network)."""

PAGES = 2_000
"""Of the Azure list, at most: it has some dozens."""

PAGE_BYTES = 32 << 20
LIST_BYTES = 4 << 30
"""Most bytes of one page, and of one list that is read line by line (AWS's are some hundred MiB)."""

LINE_BYTES = 1 << 20

TIMEOUT = 60.0


@click.group("catalog", invoke_without_command=True)
@click.pass_context
def command(context: click.Context) -> None:
    """List the machines with GPUs that kaito knows, with what an hour costs; fetch newer prices.

    Without a subcommand: list.
    """
    if context.invoked_subcommand is None:
        context.invoke(list_machines)


@command.command("list")
@click.option("--cloud", type=click.Choice(catalogue.CLOUDS), help="Only of this cloud.")
@click.option("--gpu", default="", metavar="MODEL", help="Only with this GPU: A100-80GB, or A100 for every A100.")
@click.option(
    "--region", "regions", multiple=True, metavar="REGION", help="In this region; may be given several times."
)
@click.option("--spot", is_flag=True, help="Spot machines too.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_machines(
    cloud: str | None = None, gpu: str = "", regions: tuple[str, ...] = (), spot: bool = False, as_json: bool = False
) -> None:
    """List the machines: what is in them, and what an hour costs. Without --region: at each cloud's reference region."""
    kinds: tuple[CapacityType, ...] = ("on-demand", "spot") if spot else ("on-demand",)
    found = [
        offer
        for each in ([cloud] if cloud else catalogue.CLOUDS)
        for offer in catalogue.offers(each, regions, kinds)
        if not gpu or (offer.gpu and is_model(offer.gpu, gpu))
    ]
    found.sort(key=lambda o: (o.price is None, o.price.per_hour if o.price else 0.0, o.instance_type))
    if as_json:
        sources = [_source_json(s) for s in prices.table().sources.values() if cloud in (None, s.cloud)]
        click.echo(json.dumps({"machines": [_json(o) for o in found], "sources": sources}, indent=2))
        return
    if not found:
        known = f"regions: {', '.join(catalogue.known_regions())}" if regions else f"GPUs: {', '.join(_models())}"
        raise UserError("no machine of the catalogue is like that", f"these are known, {known}")
    _show(found)


def _models() -> list[str]:
    return sorted({o.gpu.model for o in catalogue.instance_types().values() if o.gpu})


def _json(offer: Offer) -> dict[str, Any]:
    machine = catalogue.machines()[offer.instance_type.lower()]
    gpu = offer.gpu
    capability = gpu.compute_capability if gpu else None
    return {
        "cloud": offer.cloud,
        "instanceType": offer.instance_type,
        "gpu": {
            "model": gpu.model,
            "vendor": gpu.vendor,
            "count": offer.gpus,
            "memory": gpu.memory,
            "share": round(catalogue.share(gpu), 4),
            "computeCapability": f"{capability[0]}.{capability[1]}" if capability else None,
        }
        if gpu
        else None,
        "cpus": offer.cpus,
        "memory": offer.memory,
        "nvme": machine.nvme,
        "region": offer.region or None,
        "capacityType": offer.capacity_type,
        "pricePerHour": offer.price.per_hour if offer.price else None,
        "source": offer.price.source if offer.price else None,
        "date": offer.price.date if offer.price else None,
        "retired": offer.retired or None,
        "obstacle": machine.obstacle or None,
    }


def _source_json(source: Source) -> dict[str, str]:
    return {"cloud": source.cloud, "source": source.name, "date": source.date, "licence": source.licence}


def _show(found: list[Offer]) -> None:
    from kaito_core.cli.show import has

    head = ("MACHINE", "CLOUD", "REGION", "HAS", "EACH", "CPUS", "RAM", "$/H", "")
    rows = [head]
    for offer in found:
        spot = "spot" if offer.capacity_type == "spot" else ""
        against = offer.retired or catalogue.obstacle(offer)
        rows.append(
            (
                offer.instance_type, offer.cloud, offer.region or "unknown", has(offer),
                gib(offer.gpu.memory) if offer.gpu else "", str(offer.cpus), gib(offer.memory),
                money(offer.price.per_hour) if offer.price else "unknown", "; ".join(w for w in (spot, against) if w),
            )
        )  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for row in rows:
        cells = [f"{cell:{'>' if 4 <= i <= 7 else '<'}{widths[i]}}" for i, cell in enumerate(row)]
        click.echo("  ".join(cells).rstrip())
    click.echo(f"\n{len(found)} machines; memory is what can be used; prices in US dollars:")
    for source in prices.table().sources.values():
        if any(o.cloud == source.cloud for o in found):
            click.echo(f"  {source.cloud}: {source.name}, {source.date}")


# --- newer prices


@command.command("update")
@click.option("--cloud", "clouds", multiple=True, type=click.Choice(catalogue.CLOUDS), help="Only of this cloud.")
@click.option("--region", "regions", multiple=True, metavar="REGION",
              help="AWS: also this region; may be given several times. Each one's list is some hundred MB.")  # fmt: skip
def update(clouds: tuple[str, ...], regions: tuple[str, ...]) -> None:
    """Fetch today's prices from the clouds' public price lists. They are kept for all later plans, in place of those that came
    with kaito."""
    problems: list[Problem] = []
    for cloud in clouds or ("azure", "aws"):
        try:
            source, rows = FETCH[cloud](regions)
            path = prices.write(source, rows)
        except KaitoError as e:
            problems += e.problems
            continue
        click.echo(f"{cloud}: {len(rows)} prices of {source.date} from {source.name}, kept in {path}")
    if not clouds:
        click.echo("gcp: the prices that came with kaito stay: Google's price list can only be read with an API key")
    if problems:
        raise Failure(problems)


def _base(cloud: str) -> str:
    variable, usual = ADDRESSES[cloud]
    return os.environ.get(variable, usual).rstrip("/")


def _azure(_: tuple[str, ...]) -> tuple[Source, list[Row]]:
    from kaito_core.planning.retail import AZURE_FILTER, BadAnswer, azure_page

    base = _base("azure")
    address, parameters = f"{base}/api/retail/prices", {"$filter": AZURE_FILTER, "currencyCode": "'USD'"}
    rows: dict[tuple[str, str, str], Row] = {}
    seen: set[str] = set()
    with _asking("azure", base) as client:
        link = ""
        for _page in range(PAGES):
            body = _page_of(client, link or address, None if link else parameters)
            try:
                found, link = azure_page(json.loads(body), base)
            except (ValueError, RecursionError) as e:
                raise BadAnswer(str(e) if isinstance(e, BadAnswer) else "the answer is not JSON") from e
            for row in found:
                # Several meters may stand for one machine: the least is what one pays.
                key = (row.instance_type, row.region, row.capacity_type)
                if key not in rows or row.usd < rows[key].usd:
                    rows[key] = row
            if not link:
                break
            if link in seen:
                raise BadAnswer("its pages go in a circle")
            seen.add(link)
        else:
            raise BadAnswer(f"it has more than {PAGES} pages")
        if not any(r.capacity_type == "on-demand" for r in rows.values()):
            raise BadAnswer("it has no price of a machine that kaito knows")
    return Source("azure", "the Azure Retail Prices API", _today()), list(rows.values())


def _aws(regions: tuple[str, ...]) -> tuple[Source, list[Row]]:
    from kaito_core.planning.retail import BadAnswer, aws_rows

    base = _base("aws")
    rows: list[Row] = []
    with _asking("aws", base) as client:
        for region in dict.fromkeys((prices.reference_region("aws"), *regions)):
            if not catalogue.is_region("aws", region):
                raise UserError(
                    f"{region!r} is not a region of AWS", "write it as AWS does: eu-west-1", field="--region"
                )
            address = f"{base}/offers/v1.0/aws/AmazonEC2/current/{region}/index.csv"
            with client.stream("GET", address) as answer:
                answer.raise_for_status()
                found = {r.instance_type: r for r in aws_rows(_lines(answer), region)}
            if not found:
                raise BadAnswer(f"the list of {region} has no price of a machine that kaito knows")
            rows += found.values()
    return Source("aws", "the AWS price list", _today()), rows


def _gcp(_: tuple[str, ...]) -> tuple[Source, list[Row]]:
    raise UserError(
        "Google's price list can only be read with an API key, and kaito does not ask for one",
        "the prices that came with kaito stay; a newer kaito has newer ones",
        field="--cloud",
    )


FETCH: dict[str, Callable[[tuple[str, ...]], tuple[Source, list[Row]]]] = {"azure": _azure, "aws": _aws, "gcp": _gcp}


def _today() -> str:
    from datetime import UTC, datetime

    return datetime.now(UTC).date().isoformat()


@contextmanager
def _asking(cloud: str, base: str) -> Iterator[httpx.Client]:
    """A client whose every failure is one clear error."""
    import httpx

    from kaito_core.planning.retail import BadAnswer

    def failed(why: str) -> Failure:
        return Failure(
            f"the price list of {cloud} ({base}) cannot be used: {why}",
            "the prices known so far stay; try again later, or name a mirror with " + ADDRESSES[cloud][0],
        )

    try:
        with httpx.Client(timeout=TIMEOUT, follow_redirects=False) as client:
            yield client
    except httpx.HTTPStatusError as e:
        raise failed(f"it answers {e.response.status_code}") from e
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as e:
        raise failed(f"{type(e).__name__}: {e}" if str(e) else type(e).__name__) from e
    except BadAnswer as e:
        raise failed(str(e)) from e


def _page_of(client: httpx.Client, address: str, parameters: dict[str, str] | None) -> bytes:
    from kaito_core.planning.retail import BadAnswer

    body = bytearray()
    with client.stream("GET", address, params=parameters) as answer:
        answer.raise_for_status()
        for part in answer.iter_bytes():
            body += part
            if len(body) > PAGE_BYTES:
                raise BadAnswer(f"a page has more than {PAGE_BYTES >> 20} MiB")
    return bytes(body)


def _lines(answer: httpx.Response) -> Iterator[str]:
    """The answer line by line, never more than a line in memory; a server that sends no line ends is not waited for."""
    from kaito_core.planning.retail import BadAnswer

    rest, total = b"", 0
    for part in answer.iter_bytes():
        total += len(part)
        *whole, rest = (rest + part).split(b"\n")
        if len(rest) > LINE_BYTES or total > LIST_BYTES:
            raise BadAnswer("it is longer than a price list can be")
        for line in whole:
            yield line.decode()
    if rest:
        yield rest.decode()
