"""``kaito catalog``: what is known, and newer prices from servers that speak the clouds' formats – or anything else."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from kaito_core.cli import main
from kaito_core.planning import catalogue, prices

Answer = tuple[int, bytes]


class Server:
    """An HTTP server that answers as it is told, and remembers what it was asked."""

    def __init__(self) -> None:
        self.answers: Callable[[str], Answer] = lambda path: (404, b"")
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                status, body = outer.answers(self.path)
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                if status == 302:
                    self.send_header("Location", body.decode())
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    running = Server()
    monkeypatch.setenv("KAITO_HOME", str(tmp_path))
    monkeypatch.setenv("KAITO_AZURE_PRICES", running.address)
    monkeypatch.setenv("KAITO_AWS_PRICES", running.address + "/")
    yield running
    running.stop()


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAITO_HOME", str(tmp_path))


def kaito(*arguments: str) -> int:
    with pytest.raises(SystemExit) as e:
        main(["catalog", *arguments])
    return int(e.value.code or 0)


# --- list


def test_it_lists_what_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert kaito() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["MACHINE", "CLOUD", "REGION", "HAS", "EACH", "CPUS", "RAM", "$/H"]
    assert any(line.startswith("Standard_NC24ads_A100_v4") and "$3.67" in line for line in lines)
    assert any("p5e.48xlarge" in line and "unknown" in line for line in lines)
    assert any("karpenter-provider-azure" in line and "2026-06-18" in line for line in lines)


def test_it_can_be_narrowed(capsys: pytest.CaptureFixture[str]) -> None:
    assert kaito("list", "--cloud", "gcp", "--gpu", "a100", "--spot", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert {m["gpu"]["model"] for m in told["machines"]} == {"A100-40GB", "A100-80GB"}
    assert {m["capacityType"] for m in told["machines"]} == {"spot", "on-demand"}
    assert {m["cloud"] for m in told["machines"]} == {"gcp"}
    assert all(m["pricePerHour"] is None or (m["source"] and m["date"]) for m in told["machines"])
    assert [s["cloud"] for s in told["sources"]] == ["gcp"]


def test_what_is_not_there_names_what_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert kaito("list", "--gpu", "GTX-1080") == 2
    assert "A100-80GB" in capsys.readouterr().err


# --- Azure


def item(name: str = "Standard_NC24ads_A100_v4", usd: Any = 3.5, **fields: Any) -> dict[str, Any]:
    return {
        "currencyCode": "USD", "retailPrice": usd, "unitPrice": usd, "armRegionName": "eastus", "unitOfMeasure": "1 Hour",
        "productName": "Virtual Machines NCads A100 v4 Series", "skuName": name, "serviceName": "Virtual Machines",
        "type": "Consumption", "armSkuName": name, **fields,
    }  # fmt: skip


def page(*items: Any, link: Any = None) -> Answer:
    return 200, json.dumps(
        {"BillingCurrency": "USD", "Items": items, "NextPageLink": link, "Count": len(items)}
    ).encode()


def priced(cloud: str, region: str, kinds: tuple[Any, ...] = ("on-demand",)) -> dict[tuple[str, str], float]:
    return {
        (o.instance_type, o.capacity_type): o.price.per_hour
        for o in catalogue.offers(cloud, [region], kinds)
        if o.price
    }


def test_azure_prices_are_read_page_by_page_and_win(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    name = "Standard_NC24ads_A100_v4"
    other = "Standard_NC4as_T4_v3"

    def answers(path: str) -> Answer:
        query = parse_qs(urlsplit(path).query)
        assert urlsplit(path).path == "/api/retail/prices"
        if "$skip" in query:
            return page(item(other, 0.6), item(name, 1.25, skuName=f"{name} Spot", meterName="NC24ads A100 v4 Spot"))
        assert "serviceName eq 'Virtual Machines'" in query["$filter"][0]
        return page(
            item(name, 3.5),
            item(name, 9.9, productName="Virtual Machines NCads A100 v4 Series Windows"),
            item(name, 0.1, skuName=f"{name} Low Priority"),
            item(name, 0.2, type="Reservation"),
            item(name, 0.3, unitOfMeasure="1 GB"),
            item("Standard_NP10s", 1.0),
            item(other, 0.0, armRegionName="westus2"),
            link=f"{server.address}/api/retail/prices?$filter=x&$skip=1000",
        )

    server.answers = answers
    assert kaito("update", "--cloud", "azure") == 0
    assert "azure: 3 prices" in capsys.readouterr().out
    assert len(server.asked) == 2
    assert priced("azure", "eastus", ("on-demand", "spot")) == {
        (name, "on-demand"): 3.5,
        (name, "spot"): 1.25,
        (other, "on-demand"): 0.6,
    }
    (offer,) = [o for o in catalogue.offers("azure") if o.instance_type == name]
    assert offer.price is not None
    assert offer.price.source == "the Azure Retail Prices API"
    # What the new list says nothing of is as it was.
    assert priced("azure", "westus3")


BAD_PAGES: list[tuple[str, Callable[[str], Answer], str]] = [
    ("no JSON", lambda _: (200, b"<html>proxy</html>"), "not JSON"),
    ("not UTF-8", lambda _: (200, b"\xff\xfe\x00"), "not JSON"),
    ("deep", lambda _: (200, b"[" * 100_000), "not JSON"),
    ("a list", lambda _: (200, b"[1]"), "no list of Items"),
    ("items are text", lambda _: (200, b'{"Items": "x"}'), "no list of Items"),
    ("an item is text", lambda _: page("x"), "not an object"),
    ("nothing known", lambda _: page(item("Standard_D2")), "no price of a machine"),
    ("empty", lambda _: page(), "no price of a machine"),
    ("text for a price", lambda _: page(item(usd="3.5")), "is not a number"),
    ("true for a price", lambda _: page(item(usd=True)), "is not a number"),
    ("negative", lambda _: page(item(usd=-1)), "cannot be"),
    ("absurd", lambda _: page(item(usd=10**400)), "cannot be"),
    ("NaN", lambda _: page(item(usd=float("nan"))), "cannot be"),
    ("a region with a line end", lambda _: page(item(armRegionName="east\nus")), "not the name of a region"),
    ("a region with a comma", lambda _: page(item(armRegionName="east,us")), "not the name of a region"),
    ("elsewhere", lambda _: page(item(), link="http://169.254.169.254/latest"), "another server"),
    ("a link that is a file", lambda _: page(item(), link="file:///etc/passwd"), "another server"),
    ("a link that is no address", lambda _: page(item(), link="http://[x"), "not an address"),
    ("a link that is a number", lambda _: page(item(), link=3), "is not text"),
    ("refused", lambda _: (403, b"no"), "it answers 403"),
    ("broken", lambda _: (500, b""), "it answers 500"),
    ("moved", lambda _: (302, b"http://169.254.169.254/"), "it answers 302"),
]


@pytest.mark.parametrize(("answers", "words"), [r[1:] for r in BAD_PAGES], ids=[r[0] for r in BAD_PAGES])
def test_a_bad_answer_is_one_clear_error_and_changes_nothing(
    server: Server, capsys: pytest.CaptureFixture[str], answers: Callable[[str], Answer], words: str
) -> None:
    server.answers = lambda _: page(item(usd=2.0))
    assert kaito("update", "--cloud", "azure") == 0
    kept = (prices.folder() / "azure.csv").read_bytes()
    capsys.readouterr()
    server.answers = answers
    assert kaito("update", "--cloud", "azure") == 1
    told = capsys.readouterr().err
    assert words in told
    assert told.count("error:") == 1
    assert "the prices known so far stay" in told
    assert "Traceback" not in told
    assert (prices.folder() / "azure.csv").read_bytes() == kept
    assert [p.name for p in prices.folder().iterdir()] == ["azure.csv"]


def test_pages_that_go_in_a_circle_end(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.answers = lambda _: page(item(), link=f"{server.address}/api/retail/prices?again")
    assert kaito("update", "--cloud", "azure") == 1
    assert "circle" in capsys.readouterr().err
    assert len(server.asked) < 5


def test_a_page_without_end_is_not_read_to_it(
    server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kaito_core.cli.catalog.PAGE_BYTES", 1000)
    server.answers = lambda _: (200, b" " * 100_000)
    assert kaito("update", "--cloud", "azure") == 1
    assert "MiB" in capsys.readouterr().err


# --- AWS

COLUMNS = [
    "SKU", "OfferTermCode", "RateCode", "TermType", "PriceDescription", "EffectiveDate", "StartingRange", "EndingRange", "Unit",
    "PricePerUnit", "Currency", "Instance Type", "Tenancy", "Operating System", "License Model", "CapacityStatus",
    "Pre Installed S/W", "Region Code",
]  # fmt: skip


def line(**fields: str) -> str:
    usual = {
        "TermType": "OnDemand", "Unit": "Hrs", "PricePerUnit": "0.5000000000", "Currency": "USD", "Instance Type": "g4dn.xlarge",
        "Tenancy": "Shared", "Operating System": "Linux", "CapacityStatus": "Used", "Pre Installed S/W": "NA",
        "PriceDescription": "$0.5 per On Demand, Linux",
    }  # fmt: skip
    cells = {**usual, **{k.replace("_", " "): v for k, v in fields.items()}}
    return ",".join(f'"{cells.get(c, "")}"' for c in COLUMNS)


def price_list(*lines: str) -> Answer:
    head = ['"FormatVersion","v1.0"', '"Disclaimer","This pricing list is, for…"', '"Publication Date","2026-11-01T00:00:00Z"',
            '"Version","20261101"', '"OfferCode","AmazonEC2"', ",".join(f'"{c}"' for c in COLUMNS)]  # fmt: skip
    return 200, ("\n".join([*head, *lines]) + "\n").encode()


def test_aws_prices_are_those_of_linux_on_demand_with_shared_tenancy(server: Server) -> None:
    server.answers = lambda path: (
        price_list(
            line(),
            line(TermType="Reserved", PricePerUnit="0.1"),
            line(Operating_System="Windows", PricePerUnit="0.9"),
            line(Tenancy="Dedicated", PricePerUnit="0.8"),
            line(CapacityStatus="UnusedCapacityReservation", PricePerUnit="0.7"),
            line(Instance_Type="m5.large"),
            line(Instance_Type="g6.xlarge", PricePerUnit="0.75"),
            line(Instance_Type="g5.xlarge", PricePerUnit="0.0000000000"),
        )
        if path == "/offers/v1.0/aws/AmazonEC2/current/us-east-1/index.csv"
        else price_list(line(PricePerUnit="0.55"))
    )
    assert kaito("update", "--cloud", "aws", "--region", "eu-west-1") == 0
    assert priced("aws", "us-east-1") == {("g4dn.xlarge", "on-demand"): 0.5, ("g6.xlarge", "on-demand"): 0.75}
    assert priced("aws", "eu-west-1") == {("g4dn.xlarge", "on-demand"): 0.55}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((200, b"<html></html>"), "does not name its columns"),
        ((200, b""), "does not name its columns"),
        ((200, b"\xff\xff\n" * 3), "utf-8"),
        ((200, b'"TermType","Unit"\n'), "lacks the columns"),
        (price_list(), "no price of a machine"),
        (price_list(line(PricePerUnit="many")), "is 'many'"),
        (price_list(line(PricePerUnit="-3")), "cannot be"),
        (price_list(line(PricePerUnit="inf")), "cannot be"),
        (price_list(line(), '"x","y"'), "cut off"),
        ((503, b""), "it answers 503"),
    ],
)
def test_a_bad_list_is_one_clear_error(
    server: Server, capsys: pytest.CaptureFixture[str], answer: Answer, words: str
) -> None:
    server.answers = lambda _: answer
    assert kaito("update", "--cloud", "aws") == 1
    told = capsys.readouterr().err
    assert words in told
    assert told.count("error:") == 1
    assert not prices.folder().exists()
    assert priced("aws", "us-east-1")[("g4dn.xlarge", "on-demand")] == 0.526


def test_a_list_without_line_ends_is_not_read_to_its_end(
    server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kaito_core.cli.catalog.LINE_BYTES", 1000)
    server.answers = lambda _: (200, b"x" * 100_000)
    assert kaito("update", "--cloud", "aws") == 1
    assert "longer than" in capsys.readouterr().err


def test_a_region_that_is_none_is_not_asked_for(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.answers = lambda _: price_list(line())
    assert kaito("update", "--cloud", "aws", "--region", "../../etc") == 1
    assert "is not a region of AWS" in capsys.readouterr().err
    assert not prices.folder().exists()


# --- both


def test_one_cloud_that_fails_does_not_keep_the_other_from_being_read(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers = lambda path: page(item(usd=2.0)) if path.startswith("/api/") else (404, b"")
    assert kaito("update") == 1
    told = capsys.readouterr()
    assert "azure: 1 prices" in told.out
    assert "API key" in told.out
    assert "the price list of aws" in told.err
    assert priced("azure", "eastus") == {("Standard_NC24ads_A100_v4", "on-demand"): 2.0}


def test_googles_prices_need_a_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert kaito("update", "--cloud", "gcp") == 1
    assert "API key" in capsys.readouterr().err


def test_no_server_is_one_clear_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for address in ("http://127.0.0.1:9", "nonsense", "http://[x"):
        monkeypatch.setenv("KAITO_AZURE_PRICES", address)
        assert kaito("update", "--cloud", "azure") == 1
        told = capsys.readouterr().err
        assert "the price list of azure" in told
        assert told.count("error:") == 1
