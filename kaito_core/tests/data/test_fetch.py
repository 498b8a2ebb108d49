"""Downloads from a real server that does what servers do."""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import os
import random
from pathlib import Path
from typing import Any

import pytest

from kaito_core.addresses import Zone, checked, guarded_transport, refusal
from kaito_core.data import download as downloading
from kaito_core.data.fetch import FetchedFile, fetch
from kaito_core.problems import Failure, KaitoError, UserError

BODY = random.Random(1).randbytes(3_000_000)


@pytest.fixture(autouse=True)
def _no_waiting_and_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(downloading.time, "sleep", lambda seconds: None)


def get(tmp_path: Path, *urls: str, **kwargs: Any) -> list[FetchedFile]:
    given = {"base": tmp_path, "allow_private": True, **kwargs}
    return fetch(urls, tmp_path / "data", tmp_path / "cache", **given)


def test_a_file_is_downloaded_and_a_second_run_only_asks_whether_it_changed(server: Any, tmp_path: Path) -> None:
    server.files["/train.parquet"] = BODY
    first = get(tmp_path, f"{server.url}/train.parquet?download=true")
    again = get(tmp_path, f"{server.url}/train.parquet?download=true")
    assert first == again
    assert first[0].path == tmp_path / "data" / "train.parquet"
    assert first[0].path.read_bytes() == BODY
    assert first[0].sha256 == hashlib.sha256(BODY).hexdigest()
    assert first[0].bytes == len(BODY)
    assert "if-none-match" in server.asked("/train.parquet")[1]

    server.files["/train.parquet"] = b"changed"
    assert get(tmp_path, f"{server.url}/train.parquet?download=true")[0].path.read_bytes() == b"changed"


def test_a_dropped_connection_goes_on_where_it_was_cut(server: Any, tmp_path: Path) -> None:
    server.files["/a.bin"] = BODY
    server.drop_after["/a.bin"] = [1_000_000, 1_000_000]
    assert get(tmp_path, f"{server.url}/a.bin")[0].path.read_bytes() == BODY
    asked = server.asked("/a.bin")
    assert [h.get("range", "") for h in asked][0] == ""
    assert all(h["range"].startswith("bytes=") and h["if-range"] for h in asked[1:])
    assert len(asked) == 3


def test_a_file_that_changed_meanwhile_is_not_patched_together(server: Any, tmp_path: Path) -> None:
    server.files["/a.bin"] = BODY
    server.drop_after["/a.bin"] = [1000] * 20
    server.ranges = False
    with pytest.raises(Failure, match=r"tried 6 times"):
        get(tmp_path, f"{server.url}/a.bin")
    server.drop_after.clear()
    server.ranges = True
    server.files["/a.bin"] = BODY[::-1]
    assert get(tmp_path, f"{server.url}/a.bin")[0].path.read_bytes() == BODY[::-1]


def test_a_busy_server_is_asked_again(server: Any, tmp_path: Path) -> None:
    server.files["/a.jsonl"] = b"{}"
    server.statuses["/a.jsonl"] = [(500, "oops"), (503, ""), (429, "slow down")]
    assert get(tmp_path, f"{server.url}/a.jsonl")[0].bytes == 2


def test_a_dead_server_is_given_up_in_its_own_words(server: Any, tmp_path: Path) -> None:
    server.statuses["/a.jsonl"] = [(503, '{"error": "closed for\x1b[31m today"}')]
    server.always = True
    with pytest.raises(Failure, match=r"503 Service Unavailable: closed for \[31m today"):
        get(tmp_path, f"{server.url}/a.jsonl")
    with pytest.raises(Failure, match="refused"):
        get(tmp_path, "http://127.0.0.1:9/a.jsonl")


@pytest.mark.parametrize(
    ("status", "words", "remedy"),
    [
        (404, "404 Not Found: no such thing", "check the URL"),
        (403, "403 Forbidden: not you", "credentials"),
        (410, "410", "URL"),
    ],
)
def test_a_refusal_is_said_in_the_servers_words_and_names_the_field(
    server: Any, tmp_path: Path, status: int, words: str, remedy: str
) -> None:
    """KAITO finds a 404 or 401 only on the paid GPU node (defect 10)."""
    server.statuses["/a.jsonl"] = [(status, "no such thing" if status == 404 else "not you")]
    with pytest.raises(UserError) as e:
        get(tmp_path, f"{server.url}/a.jsonl?sig=geheim")
    problem = e.value.problems[0]
    assert words in problem.message
    assert remedy in problem.remedy
    assert problem.field == "tuning.input.urls[0]"
    assert "geheim" not in str(e.value)


def test_gated_data_of_the_hub_asks_for_a_token(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    server.statuses["/datasets/org/name/resolve/main/a.jsonl"] = [(401, "")]
    server.headers["/datasets/org/name/resolve/main/a.jsonl"] = {
        "X-Error-Message": "Access to dataset org/name is restricted."
    }
    with pytest.raises(UserError) as e:
        get(tmp_path, "hf://datasets/org/name/a.jsonl")
    assert "restricted" in e.value.problems[0].message
    assert "HF_TOKEN" in e.value.problems[0].remedy


def test_the_hubs_token_goes_to_the_hub_and_not_across_a_redirect(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    port = server.url.rpartition(":")[2]
    server.redirects["/datasets/org/name/resolve/main/a.jsonl"] = f"http://localhost:{port}/cdn/a.jsonl?Signature=x"
    server.files["/cdn/a.jsonl"] = server.files["/other.jsonl"] = b"{}"
    get(tmp_path, "hf://datasets/org/name/a.jsonl", f"http://localhost:{port}/other.jsonl", token="hf_geheim")
    assert server.asked("/datasets/org/name/resolve/main/a.jsonl")[0]["authorization"] == "Bearer hf_geheim"
    assert "authorization" not in server.asked("/cdn/a.jsonl")[0]
    assert "authorization" not in server.asked("/other.jsonl")[0]


def test_a_token_from_a_file_ends_in_a_line_break(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    where = "/datasets/org/name/resolve/main/a.jsonl"
    server.files[where] = b"{}"
    get(tmp_path, "hf://datasets/org/name/a.jsonl", token="hf_right\n")
    assert server.asked(where)[0]["authorization"] == "Bearer hf_right"


@pytest.mark.parametrize("token", ["hf_ge\nheim", "hf_ge\r\nX-Other: heim", "hf_ge heim", "hf_ge\0heim", "hf_gehäim"])
def test_a_token_that_cannot_be_sent_is_refused_and_never_shown(server: Any, tmp_path: Path, token: str) -> None:
    """The HTTP client would name the header that it cannot send, token and all."""
    with pytest.raises(UserError, match="characters in it that no token has") as e:
        get(tmp_path, f"{server.url}/a.jsonl", token=token)
    assert "hf_" not in str(e.value)
    assert e.value.__cause__ is None
    assert not server.requests
    assert "hf_right" not in repr(downloading.Policy(True, 1, "hf_right"))


def test_the_digest_that_the_hub_names_is_checked_and_saves_a_download(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    where = "/datasets/org/name/resolve/main/a.bin"
    server.redirects[where] = f"{server.url}/cdn/a.bin"
    server.headers[where] = {"X-Linked-ETag": '"' + hashlib.sha256(BODY).hexdigest() + '"'}
    server.files["/cdn/a.bin"] = BODY[:-1] + b"x"
    with pytest.raises(Failure, match="arrived damaged"):
        get(tmp_path, "hf://org/name/a.bin")
    server.files["/cdn/a.bin"] = BODY
    get(tmp_path, "hf://org/name/a.bin")
    before = len(server.asked("/cdn/a.bin"))
    get(tmp_path, "hf://org/name/a.bin")
    assert len(server.asked("/cdn/a.bin")) == before


@pytest.mark.parametrize("header", ["Repr-Digest", "Digest", "Content-MD5"])
def test_a_damaged_file_is_not_accepted(server: Any, tmp_path: Path, header: str) -> None:
    server.files["/a.bin"] = BODY
    wrong = hashlib.sha256(b"other").digest() if header != "Content-MD5" else hashlib.md5(b"other").digest()
    encoded = base64.b64encode(wrong).decode()
    values = {"Repr-Digest": f"sha-256=:{encoded}:", "Digest": f"SHA-256={encoded}", "Content-MD5": encoded}
    server.headers["/a.bin"] = {header: values[header]}
    with pytest.raises(Failure, match="arrived damaged"):
        get(tmp_path, f"{server.url}/a.bin")
    assert not (tmp_path / "data" / "a.bin").exists()


def test_a_wrong_length_is_noticed(server: Any, tmp_path: Path) -> None:
    server.files["/a.bin"] = b"short"
    server.headers["/a.bin"] = {"Content-Length": "500", "Connection": "close"}
    with pytest.raises(Failure, match="tried 6 times"):
        get(tmp_path, f"{server.url}/a.bin")


def test_a_web_page_is_not_data(server: Any, tmp_path: Path) -> None:
    server.files["/org/x/blob/main/a.jsonl"] = b"<!DOCTYPE html><html><head><title>Sign in</title>"
    with pytest.raises(UserError) as e:
        get(tmp_path, f"{server.url}/org/x/blob/main/a.jsonl")
    assert "the server sent a web page, not data: “Sign in”" in e.value.problems[0].message
    assert "/resolve/" in e.value.problems[0].remedy


def test_an_empty_file_is_said_to_be_empty(server: Any, tmp_path: Path) -> None:
    server.files["/a.jsonl"] = b""
    with pytest.raises(UserError, match="empty file"):
        get(tmp_path, f"{server.url}/a.jsonl")


def test_a_download_is_bounded_in_all_and_the_error_says_how_to_allow_more(server: Any, tmp_path: Path) -> None:
    server.files["/a.bin"] = server.files["/b.bin"] = BODY
    with pytest.raises(UserError, match="KAITO_MAX_DOWNLOAD_BYTES") as e:
        get(tmp_path, f"{server.url}/a.bin", f"{server.url}/b.bin", max_bytes=len(BODY) + 1)
    assert e.value.problems[0].field == "tuning.input.urls[1]"


def test_a_full_disk_is_one_clear_message_and_keeps_what_is_there(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["/a.bin"] = BODY
    server.drop_after["/a.bin"] = [1_000_000] + [0] * 5
    with pytest.raises(Failure):
        get(tmp_path, f"{server.url}/a.bin")
    usage = type("Usage", (), {"free": 100})
    with monkeypatch.context() as m:
        m.setattr(downloading.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(Failure, match="no disk space") as e:
            get(tmp_path, f"{server.url}/a.bin")
    assert len(e.value.problems) == 1
    get(tmp_path, f"{server.url}/a.bin")
    assert server.asked("/a.bin")[-1]["range"].startswith("bytes=")


@pytest.mark.parametrize(
    "target",
    [
        "http://169.254.169.254/latest/meta-data",
        "http://[fe80::1]/x",
        "http://[::ffff:169.254.169.254]/x",
        "http://168.63.129.16/x",
    ],
)
def test_a_redirect_to_a_metadata_service_is_refused_even_where_private_addresses_are_allowed(
    server: Any, tmp_path: Path, target: str
) -> None:
    server.redirects["/a.jsonl"] = target
    with pytest.raises(UserError, match="metadata services") as e:
        get(tmp_path, f"{server.url}/a.jsonl")
    assert e.value.problems[0].field == "tuning.input.urls[0]"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "[::1]"])
def test_private_addresses_are_refused_unless_they_are_allowed(server: Any, tmp_path: Path, host: str) -> None:
    port = server.url.rpartition(":")[2]
    server.files["/a.jsonl"] = b"{}"
    with pytest.raises(UserError, match="KAITO_ALLOW_PRIVATE_ADDRESSES"):
        get(tmp_path, f"http://{host}:{port}/a.jsonl", allow_private=False)
    assert not server.requests


def test_a_name_that_resolves_differently_the_second_time_gains_nothing(server: Any, tmp_path: Path) -> None:
    """DNS rebinding: the connection goes to the address that was checked, and the name is not looked up again."""
    import httpx

    answers = [["127.0.0.1"], ["169.254.169.254"]]
    port = server.url.rpartition(":")[2]
    server.files["/a.jsonl"] = b"{}"
    transport = guarded_transport(Zone.LOOPBACK, resolver=lambda host, port: answers.pop(0))
    with httpx.Client(transport=transport) as client:
        assert client.get(f"http://data.example:{port}/a.jsonl").content == b"{}"
        assert server.asked("/a.jsonl")[0]["host"] == f"data.example:{port}"
        with pytest.raises(UserError):
            client.get(f"http://data.example:{port}/a.jsonl")


@pytest.mark.parametrize(
    ("address", "allowed"),
    [
        ("1.1.1.1", True), ("2606:4700::1111", True), ("64:ff9b::101:101", True),
        ("10.0.0.1", False), ("172.16.3.4", False), ("192.168.1.1", False), ("100.64.0.1", False), ("100.100.100.200", False),
        ("0.0.0.0", False), ("224.0.0.1", False), ("::", False), ("fd00:ec2::254", False), ("::ffff:10.0.0.1", False),
        ("64:ff9b::a9fe:a9fe", False), ("::127.0.0.1", False), ("64:ff9b:1::a00:1", False), ("2002:0a00:0001::", False),
    ],
)  # fmt: skip
def test_which_addresses_are_public(address: str, allowed: bool) -> None:
    assert (refusal(ipaddress.ip_address(address), Zone.PUBLIC) == "") == allowed


def test_one_bad_address_of_several_is_enough() -> None:
    with pytest.raises(UserError):
        checked("x", 443, Zone.PUBLIC, resolver=lambda host, port: ["1.1.1.1", "10.0.0.1"])


def test_a_downgrade_to_http_and_other_schemes_are_not_followed(server: Any, tmp_path: Path) -> None:
    server.redirects["/a.jsonl"] = "file:///etc/passwd"
    with pytest.raises(UserError, match="not safe"):
        get(tmp_path, f"{server.url}/a.jsonl")
    server.redirects["/a.jsonl"] = "/a.jsonl"
    with pytest.raises(UserError, match="redirected more than"):
        get(tmp_path, f"{server.url}/a.jsonl")


def test_local_files_and_folders_are_copied_and_old_ones_taken_away(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for name in ("mine/b.jsonl", "mine/a.csv", "mine/.hidden", "mine/README.md", "one.jsonl"):
        (tmp_path / name).write_text(name)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "not-ours.jsonl").write_text("{}")
    got = get(tmp_path, "mine", "one.jsonl")
    assert [f.path.name for f in got] == ["a.csv", "b.jsonl", "one.jsonl"]
    get(tmp_path, "one.jsonl")
    assert sorted(p.name for p in (tmp_path / "data").iterdir() if p.name[0] != ".") == ["not-ours.jsonl", "one.jsonl"]
    with pytest.raises(UserError, match="no such file") as e:
        get(tmp_path, "one.jsonl", "two.jsonl")
    assert e.value.problems[0].field == "tuning.input.urls[1]"


def test_a_damaged_cache_heals_itself(server: Any, tmp_path: Path) -> None:
    server.files["/a.bin"] = BODY
    digest = get(tmp_path, f"{server.url}/a.bin")[0].sha256
    blob = tmp_path / "cache" / "blobs" / "sha256" / digest
    os.chmod(blob, 0o644)
    blob.write_bytes(b"broken")
    assert get(tmp_path, f"{server.url}/a.bin")[0].path.read_bytes() == BODY


def test_progress_is_told(server: Any, tmp_path: Path) -> None:
    server.files["/a.bin"] = BODY
    told: list[tuple[str, int, int | None]] = []
    get(tmp_path, f"{server.url}/a.bin", on_progress=lambda *args: told.append(args))
    assert told[-1] == ("a.bin", len(BODY), len(BODY))


def test_a_wrong_bound_in_the_environment_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAITO_MAX_DOWNLOAD_BYTES", "a lot")
    with pytest.raises(KaitoError, match="number of bytes"):
        downloading.max_download_bytes()
