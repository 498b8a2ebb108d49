"""What the clouds' public price lists say of the machines that kaito knows. Pure functions from their answers to prices.

Answers come from outside: whatever does not have the documented form is an error that says so, and never a price.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final
from urllib.parse import urlsplit

from kaito_core.planning import catalogue
from kaito_core.planning.prices import HIGHEST, Row

AZURE_FILTER: Final = (
    "serviceName eq 'Virtual Machines' and priceType eq 'Consumption' and contains(armSkuName, 'Standard_N')"
)

_REGION = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*\Z")


class BadAnswer(ValueError):
    """An answer that is not what the price list's documentation says."""


def azure_page(answer: Any, base: str) -> tuple[list[Row], str]:
    """The prices of one page of the Azure Retail Prices API, and the address of the next; empty after the last.

    https://learn.microsoft.com/rest/api/cost-management/retail-prices/azure-retail-prices"""
    if not isinstance(answer, Mapping) or not isinstance(answer.get("Items"), list):
        raise BadAnswer("the answer has no list of Items")
    link = answer.get("NextPageLink") or ""
    if not isinstance(link, str):
        raise BadAnswer("NextPageLink is not text")
    if link and _origin(link) != _origin(base):
        raise BadAnswer(f"NextPageLink goes to another server ({link[:80]})")
    rows = []
    for item in answer["Items"]:
        if not isinstance(item, Mapping):
            raise BadAnswer("an item is not an object")
        row = _azure_row(item)
        if row is not None:
            rows.append(row)
    return rows, link


def _azure_row(item: Mapping[str, Any]) -> Row | None:
    """None for what is not an hour of a Linux machine that is known."""
    known = catalogue.instance_types().get(str(item.get("armSkuName", "")).lower())
    kind, product = str(item.get("skuName", "")), str(item.get("productName", ""))
    other = "Low Priority" in kind or "Windows" in product or "Cloud Services" in product
    if known is None or known.cloud != "azure" or other or item.get("type", "Consumption") != "Consumption":
        return None
    if item.get("currencyCode") != "USD" or item.get("unitOfMeasure") != "1 Hour":
        return None
    usd, region = item.get("retailPrice"), item.get("armRegionName")
    if isinstance(usd, bool) or not isinstance(usd, int | float):
        raise BadAnswer(f"the price of {known.instance_type} is not a number")
    # Zero and no region stand for what cannot be bought.
    if not usd or not region:
        return None
    return _row(known.instance_type, str(region), "Spot" in kind, float(min(usd, 2 * HIGHEST)))


def _row(instance_type: str, region: str, spot: bool, usd: float) -> Row:
    if not 0 < usd <= HIGHEST:
        raise BadAnswer(f"{usd:g} US dollars for an hour of {instance_type} cannot be")
    if not _REGION.match(region):
        raise BadAnswer(f"{region[:40]!r} is not the name of a region")
    return Row(instance_type, region, "spot" if spot else "on-demand", usd)


def _origin(address: str) -> tuple[str, str]:
    try:
        parts = urlsplit(address)
        port = parts.port or {"https": 443, "http": 80}.get(parts.scheme)
    except ValueError as e:
        raise BadAnswer(f"{address[:80]!r} is not an address") from e
    return parts.scheme, f"{parts.hostname}:{port}"


_AWS_NEEDED: Final = (
    "TermType", "Unit", "PricePerUnit", "Currency", "Instance Type", "Tenancy", "Operating System", "CapacityStatus",
    "Pre Installed S/W",
)  # fmt: skip

_AWS_WANTED: Final = {
    "TermType": "OnDemand", "Unit": "Hrs", "Currency": "USD", "Operating System": "Linux", "CapacityStatus": "Used",
    "Pre Installed S/W": "NA", "Tenancy": "Shared",
}  # fmt: skip


def aws_rows(lines: Iterable[str], region: str) -> Iterator[Row]:
    """The prices in the AWS price list of one region, as CSV: some lines about the list, the names of the columns, the prices.

    https://docs.aws.amazon.com/awsaccountbilling/latest/aboutv2/using-the-aws-price-list-bulk-api.html"""
    reader = csv.reader(lines)
    columns: dict[str, int] = {}
    try:
        for number, cells in enumerate(reader):
            if columns:
                row = _aws_row(cells, columns, region)
                if row is not None:
                    yield row
            elif "TermType" in cells:
                columns = {name: i for i, name in enumerate(cells)}
                lacking = [name for name in _AWS_NEEDED if name not in columns]
                if lacking:
                    raise BadAnswer(f"the list lacks the columns {', '.join(lacking)}")
            elif number > 20:
                break
    except csv.Error as e:
        raise BadAnswer(f"the list is not CSV: {e}") from e
    if not columns:
        raise BadAnswer("the list does not name its columns")


def _aws_row(cells: list[str], columns: Mapping[str, int], region: str) -> Row | None:
    if len(cells) < len(columns):
        raise BadAnswer(f"a line has {len(cells)} of {len(columns)} columns: the list was cut off")
    known = catalogue.instance_types().get(cells[columns["Instance Type"]].lower())
    if known is None or known.cloud != "aws":
        return None
    # A machine that is sold as metal only has no shared tenancy of its own; it is listed as shared all the same.
    if any(cells[columns[name]] != value for name, value in _AWS_WANTED.items()):
        return None
    text = cells[columns["PricePerUnit"]]
    try:
        usd = float(text)
    except ValueError as e:
        raise BadAnswer(f"the price of {known.instance_type} is {text[:40]!r}") from e
    return _row(known.instance_type, region, False, usd) if usd else None
