"""Talking to a registry: tokens, refusals, patience, and to whom the password never goes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaito_core.artifacts.auth import parse_challenges
from kaito_core.artifacts.credentials import Credentials
from kaito_core.artifacts.errors import RegistryError, error_text
from kaito_core.artifacts.http import plain_http_allowed
from kaito_core.artifacts.manifest import Descriptor
from kaito_core.artifacts.registry import RegistryClient, check_push
from kaito_core.oci_reference import Reference

from .conftest import Handler, Naps, TokenRegistry

KAITO = Credentials("kaito", "s3cret")


def reference(state: TokenRegistry, name: str = "adapter") -> Reference:
    return Reference.parse(f"{state.host}/{name}:1")


def blob(content: bytes, folder: Path) -> tuple[Path, Descriptor]:
    path = folder / "blob"
    path.write_bytes(content)
    return path, Descriptor.of("application/octet-stream", content)


@pytest.mark.parametrize("credentials", [KAITO, Credentials(identity_token="the-refresh-token")])
def test_a_token_is_fetched_with_a_password_or_an_identity_token(
    token_registry: TokenRegistry, naps: Naps, credentials: Credentials
) -> None:
    check_push(reference(token_registry), credentials, sleep=naps)
    assert token_registry.sessions == {}
    assert len(token_registry.asked("DELETE", "uploads")) == 1
    for _, path, authorization in token_registry.requests:
        assert path.startswith("/token") or not authorization.startswith("Basic")


@pytest.mark.parametrize(
    ("credentials", "name", "reason", "words"),
    [
        (Credentials("kaito", "no"), "adapter", "credentials", "refused the user name or password (user 'kaito')"),
        (Credentials("kaito", "no"), "adapter", "credentials", "it says: 401 incorrect username or password"),
        (Credentials(identity_token="old"), "adapter", "credentials", "invalid_grant; the token has been revoked"),
        (None, "adapter", "credentials", "wants a user name and password, and there are none for it"),
        (
            Credentials("reader", "r"),
            "adapter",
            "denied",
            "the log-in is not allowed to push to it; it says: 403 DENIED",
        ),
        (KAITO, "gone", "not-found", "404 NAME_UNKNOWN: the repository gone does not exist"),
    ],
)
def test_each_refusal_has_its_own_words(
    token_registry: TokenRegistry,
    naps: Naps,
    credentials: Credentials | None,
    name: str,
    reason: str,
    words: str,
) -> None:
    """KAITO's defect 11: the cause of a refused push has to be told, before the training."""
    token_registry.missing.add("gone")
    with pytest.raises(RegistryError) as e:
        check_push(reference(token_registry, name), credentials, sleep=naps)
    assert e.value.reason == reason
    assert words in str(e.value)
    assert str(reference(token_registry, name)) in str(e.value)
    assert e.value.problems[0].remedy
    assert naps == []


def test_a_token_that_ran_out_is_renewed(token_registry: TokenRegistry, naps: Naps) -> None:
    seen: list[int] = []

    def expire_once(handler: Handler) -> bool:
        if handler.headers.get("Authorization", "").startswith("Bearer") and not seen:
            seen.append(1)
            handler.error(
                401,
                "UNAUTHORIZED",
                "expired",
                WWW_Authenticate=f'Bearer realm="{token_registry.realm}",service="test-service"',
            )
            return True
        return False

    with RegistryClient(reference(token_registry), KAITO, sleep=naps) as client:
        assert not client.has_blob("sha256:" + "0" * 64)
        token_registry.faults.append(expire_once)
        assert not client.has_blob("sha256:" + "0" * 64)
    assert len(token_registry.asked("GET", "/token")) == 2


def test_a_busy_registry_is_given_the_time_it_asks_for(token_registry: TokenRegistry, naps: Naps) -> None:
    answers: list[tuple[int, dict[str, str]]] = [
        (429, {"Retry-After": "7"}),
        (503, {"Retry-After": "9999999"}),
        (502, {}),
        (500, {}),
    ]

    def busy(handler: Handler) -> bool:
        if not answers:
            return False
        status, headers = answers.pop(0)
        handler.answer(status, b"", **headers)
        return True

    token_registry.faults.append(busy)
    with RegistryClient(reference(token_registry), KAITO, sleep=naps) as client:
        assert not client.has_blob("sha256:" + "0" * 64)
    assert naps == [7, 120, 4, 8]


def test_a_registry_that_stays_broken_is_quoted(token_registry: TokenRegistry, naps: Naps) -> None:
    def broken(handler: Handler) -> bool:
        handler.body()
        handler.error(500, "UNKNOWN", "disk\x1b[31m full\n")
        return True

    token_registry.faults.append(broken)
    with pytest.raises(RegistryError, match=r"500 UNKNOWN: disk \[31m full") as e:
        check_push(reference(token_registry), KAITO, sleep=naps)
    assert naps == [1, 2]
    assert "\x1b" not in str(e.value)


def test_an_upload_in_chunks_goes_on_where_the_registry_says(
    token_registry: TokenRegistry, tmp_path: Path, naps: Naps
) -> None:
    content = hashlib.shake_128(b"big").digest(100_000)
    path, descriptor = blob(content, tmp_path)
    patches: list[int] = []

    def break_the_second_chunk(handler: Handler) -> bool:
        if handler.command != "PATCH" or not handler.headers.get("Authorization"):
            return False
        patches.append(int(handler.headers["Content-Range"].partition("-")[0]))
        if len(patches) == 2:
            session = handler.path.rpartition("/")[2].partition("?")[0]
            token_registry.sessions[session] += handler.rfile.read(10_000)
            handler.hang_up()
            return True
        return False

    token_registry.faults.append(break_the_second_chunk)
    sent: list[int] = []
    with RegistryClient(reference(token_registry), KAITO, chunk_bytes=30_000, sleep=naps) as client:
        assert client.upload(path, descriptor, sent.append)
    assert patches == [0, 30_000, 40_000, 70_000]
    assert naps == [1]
    assert token_registry.blobs == {descriptor.digest: content}
    assert sent[-1] == len(content)


def test_an_upload_that_the_registry_forgot_begins_again(
    token_registry: TokenRegistry, tmp_path: Path, naps: Naps
) -> None:
    path, descriptor = blob(b"x" * 90_000, tmp_path)
    done: list[int] = []

    def forget_once(handler: Handler) -> bool:
        if handler.command == "PATCH" and not done and handler.headers["Content-Range"].startswith("30000"):
            done.append(1)
            token_registry.sessions.clear()
            handler.hang_up()
            return True
        return False

    token_registry.faults.append(forget_once)
    with RegistryClient(reference(token_registry), KAITO, chunk_bytes=30_000, sleep=naps) as client:
        client.upload(path, descriptor)
    assert set(token_registry.blobs) == {descriptor.digest}


def test_a_file_that_changed_under_way_is_not_stored(token_registry: TokenRegistry, tmp_path: Path, naps: Naps) -> None:
    path, descriptor = blob(b"before", tmp_path)
    path.write_bytes(b"after!")
    with (
        RegistryClient(reference(token_registry), KAITO, sleep=naps) as client,
        pytest.raises(RegistryError, match="DIGEST_INVALID: provided digest did not match"),
    ):
        client.upload(path, descriptor)
    assert token_registry.blobs == {}


@pytest.mark.parametrize("answer", [b"more than was promised", b"othr"])
def test_a_blob_that_is_not_what_was_promised_is_not_kept(
    token_registry: TokenRegistry, tmp_path: Path, naps: Naps, answer: bytes
) -> None:
    descriptor = Descriptor.of("", b"good")
    token_registry.blobs[descriptor.digest] = answer
    with (
        RegistryClient(reference(token_registry), KAITO, sleep=naps) as client,
        pytest.raises(RegistryError, match="the registry sent"),
    ):
        client.download(descriptor, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_credentials_do_not_follow_a_redirect(
    token_registry: TokenRegistry, serve: Callable[[type[BaseHTTPRequestHandler]], str], tmp_path: Path, naps: Naps
) -> None:
    storage = TokenRegistry()
    descriptor = Descriptor.of("", b"content")

    def store(handler: Handler) -> bool:
        handler.body()
        if handler.command == "GET":
            handler.answer(200, b"content")
        else:
            handler.answer(201)
        return True

    storage.faults.append(store)
    elsewhere = serve(type("Storage", (Handler,), {"state": storage}))

    def send_on(handler: Handler) -> bool:
        if not handler.headers.get("Authorization") or handler.path.startswith("/token"):
            return False
        if handler.command == "GET":
            handler.answer(307, Location=f"http://{elsewhere}/signed?x=1")
            return True
        if handler.command == "POST":
            handler.answer(202, Location=f"http://{elsewhere}/upload?x=1")
            return True
        return False

    token_registry.faults.append(send_on)
    path, to_send = blob(b"to send", tmp_path)
    with RegistryClient(reference(token_registry), KAITO, sleep=naps) as client:
        client.download(descriptor, tmp_path / "out")
        client.upload(path, to_send)
    assert (tmp_path / "out").read_bytes() == b"content"
    assert [(m, p) for m, p, _ in storage.requests] == [
        ("GET", "/signed?x=1"),
        ("PUT", f"/upload?x=1&digest={to_send.digest}"),
    ]
    assert {authorization for _, _, authorization in storage.requests} == {""}


def test_nothing_is_sent_to_a_host_without_encryption(token_registry: TokenRegistry, naps: Naps) -> None:
    def send_away(handler: Handler) -> bool:
        if handler.headers.get("Authorization") and handler.command == "POST":
            handler.answer(202, Location="http://storage.example/upload")
            return True
        return False

    token_registry.faults.append(send_away)
    with pytest.raises(RegistryError, match=r"http://storage\.example, which is not encrypted"):
        check_push(reference(token_registry), KAITO, sleep=naps)


@pytest.mark.parametrize("realm", ["ftp://127.0.0.1/token", "/token", "http://host:port/token"])
def test_a_realm_that_makes_no_sense_is_refused(token_registry: TokenRegistry, naps: Naps, realm: str) -> None:
    token_registry.realm = realm
    with pytest.raises(RegistryError) as e:
        check_push(reference(token_registry), KAITO, sleep=naps)
    assert e.value.reason == "other"
    assert token_registry.asked("GET", "/token") == []


def test_a_token_server_that_is_not_there_is_named(token_registry: TokenRegistry, naps: Naps) -> None:
    token_registry.realm = "http://127.0.0.1:1/token"
    with pytest.raises(RegistryError, match=r"the token server 127\.0\.0\.1:1 cannot be reached"):
        check_push(reference(token_registry), KAITO, sleep=naps)


def test_plain_http_is_for_this_machine_and_for_listed_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAITO_INSECURE_REGISTRIES", "old.example, lab.example:5000")
    allowed = [
        "localhost",
        "localhost:5000",
        "127.0.0.2:80",
        "[::1]:5000",
        "old.example",
        "old.example:81",
        "lab.example:5000",
    ]
    refused = ["host.io", "lab.example", "lab.example:443", "127.0.0.1.evil.io", "10.0.0.1:5000", "localhost.evil.io"]
    assert [h for h in allowed + refused if plain_http_allowed(h)] == allowed


def test_challenges_are_read_as_rfc_9110_writes_them() -> None:
    header = 'Basic realm="a \\"b\\", c", Bearer realm="https://x/t",service=plain,scope="repository:a:pull,push"'
    basic, bearer = parse_challenges(header)
    assert (basic.scheme, basic.parameters) == ("basic", {"realm": 'a "b", c'})
    assert bearer.parameters == {"realm": "https://x/t", "service": "plain", "scope": "repository:a:pull,push"}


@given(st.text(max_size=200) | st.text('Basic ,="\\r', max_size=200))
def test_any_header_is_read_without_an_error(header: str) -> None:
    parse_challenges(header)


@given(st.binary(max_size=500))
def test_any_error_body_is_shown_on_one_line(body: bytes) -> None:
    assert len(error_text(body).splitlines()) <= 1
