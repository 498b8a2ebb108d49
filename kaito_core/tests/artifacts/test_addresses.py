"""Where a registry may send us on to. Real servers on several addresses of this machine, of which the tests call one public."""

from __future__ import annotations

import ipaddress
import shutil
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from kaito_core import addresses
from kaito_core.addresses import Address, Zone
from kaito_core.artifacts.credentials import Credentials
from kaito_core.artifacts.errors import RegistryError
from kaito_core.artifacts.manifest import Descriptor
from kaito_core.artifacts.registry import RegistryClient
from kaito_core.oci_reference import Reference

from .conftest import Handler, Naps, TokenRegistry

KAITO = Credentials("kaito", "s3cret")
LOOPBACK, PUBLIC, PRIVATE = "127.0.0.1", "127.0.0.2", "127.0.0.3"
NAMES = {
    "registry.example": PUBLIC,
    "storage.example": PUBLIC,
    "rebound.example": LOOPBACK,
    "internal.example": PRIVATE,
}
CONTENT = b"content of a layer"
DESCRIPTOR = Descriptor.of("", CONTENT)


@pytest.fixture(autouse=True)
def internet(monkeypatch: pytest.MonkeyPatch) -> None:
    """127.0.0.2 counts as an address of the internet, and 127.0.0.3 as one of a private network."""
    real = addresses.zone
    said = {PUBLIC: Zone.PUBLIC, PRIVATE: Zone.PRIVATE}

    def zone(address: Address) -> Zone:
        return said.get(str(address)) or real(address)

    monkeypatch.setattr(addresses, "zone", zone)
    monkeypatch.delenv("KAITO_ALLOW_PRIVATE_ADDRESSES", raising=False)
    monkeypatch.setenv("KAITO_INSECURE_REGISTRIES", "storage.example,rebound.example,internal.example")


def resolver(host: str, port: int) -> list[str]:
    if host in NAMES:
        return [NAMES[host]]
    return addresses.resolve(host, port)


Start = Callable[..., TokenRegistry]


@pytest.fixture
def start() -> Iterator[Start]:
    """A registry, or whatever should not be reached, on one of the addresses; over TLS with a certificate."""
    servers: list[ThreadingHTTPServer] = []

    def begin(address: str, name: str = "", certificate: Path | None = None) -> TokenRegistry:
        state = TokenRegistry()
        server = ThreadingHTTPServer((address, 0), type("Served", (Handler,), {"state": state}))
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        state.host = f"{name or address}:{server.server_address[1]}"
        state.realm = f"http{'s' if certificate else ''}://{state.host}/token"
        return state

    yield begin
    for server in servers:
        server.shutdown()
        server.server_close()


def client(registry: TokenRegistry, naps: Naps, resolve: addresses.Resolve = resolver) -> RegistryClient:
    reference = Reference.parse(f"{registry.host}/image:1")
    return RegistryClient(reference, KAITO, sleep=naps, chunk_bytes=8, resolver=resolve)


def _sent_on(method: str, part: str, status: int) -> Callable[[str], Callable[[Handler], bool]]:
    """A registry that answers these requests with another place to go to."""

    def to(target: str) -> Callable[[Handler], bool]:
        def fault(handler: Handler) -> bool:
            if handler.command != method or part not in handler.path or not handler.headers.get("Authorization"):
                return False
            handler.body()
            handler.answer(status, Location=target, Range="0-7")
            return True

        return fault

    return to


def _challenged(target: str) -> Callable[[Handler], bool]:
    def fault(handler: Handler) -> bool:
        handler.body()
        handler.error(401, "UNAUTHORIZED", "log in", WWW_Authenticate=f'Bearer realm="{target}",service="test-service"')
        return True

    return fault


def _upload(client: RegistryClient, folder: Path) -> object:
    (folder / "blob").write_bytes(CONTENT)
    return client.upload(folder / "blob", DESCRIPTOR)


STEERED: dict[str, tuple[Callable[[str], Callable[[Handler], bool]], Callable[[RegistryClient, Path], object]]] = {
    "a manifest": (_sent_on("GET", "/manifests/", 302), lambda c, _: c.manifest("1")),
    "a layer": (_sent_on("GET", "/blobs/", 307), lambda c, folder: c.download(DESCRIPTOR, folder / "out")),
    "whether a layer is there": (_sent_on("HEAD", "/blobs/", 308), lambda c, _: c.has_blob(DESCRIPTOR.digest)),
    "an upload": (_sent_on("POST", "/uploads/", 202), _upload),
    "the next chunk": (_sent_on("PATCH", "/uploads/", 202), _upload),
    "the right to push": (_sent_on("POST", "/uploads/", 202), lambda c, _: c.check_push()),
    "the token server": (_challenged, lambda c, _: c.manifest("1")),
}
"""Every answer that says where the next request goes, and a request that gets it."""

TARGETS = {
    "this machine": ("http://127.0.0.1:{port}/x", "loopback: this machine itself"),
    "this machine by name": ("http://localhost:{port}/x", "loopback: this machine itself"),
    "a name that means this machine": ("http://rebound.example:{port}/x", "loopback: this machine itself"),
    "this machine as IPv6": ("https://[::ffff:127.0.0.1]:{port}/x", "loopback: this machine itself"),
    "a private network": ("http://internal.example:{port}/x", "private"),
    "a metadata service": ("https://169.254.169.254/latest/meta-data", "metadata services"),
    "a metadata service as IPv6": ("https://[::ffff:a9fe:a9fe]/latest/meta-data", "metadata services"),
    "plain HTTP": ("http://files.example/x", "is not encrypted"),
    "another protocol": ("ftp://storage.example/x", "is not encrypted"),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("what", STEERED)
def test_a_public_registry_sends_us_nowhere_inside(
    what: str, target: str, start: Start, tmp_path: Path, naps: Naps
) -> None:
    registry, victim = start(PUBLIC), start(LOOPBACK)
    fault, ask = STEERED[what]
    url, words = TARGETS[target]
    registry.faults.append(fault(url.format(port=victim.host.rpartition(":")[2])))
    with client(registry, naps) as c, pytest.raises(RegistryError, match=words) as e:
        ask(c, tmp_path)
    assert "nothing was sent there" in str(e.value)
    assert e.value.reason == "other"
    assert victim.requests == []
    assert naps == [], "it is not tried again"


@pytest.fixture
def certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of registry.example, trusted."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl not found: it makes the certificate")
    made = tmp_path / "registry.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=registry.example", "-addext", "subjectAltName=DNS:registry.example,DNS:storage.example",
         "-keyout", tmp_path / "key.pem", "-out", tmp_path / "cert.pem"], check=True, capture_output=True,
    )  # fmt: skip
    made.write_bytes((tmp_path / "key.pem").read_bytes() + (tmp_path / "cert.pem").read_bytes())
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
    return made


@pytest.mark.parametrize("what", STEERED)
def test_no_request_goes_from_https_to_http(
    what: str, start: Start, certificate: Path, tmp_path: Path, naps: Naps
) -> None:
    """Not even to a host that may be spoken to in the clear when the user names it."""
    registry, storage = start(PUBLIC, "registry.example", certificate), start(PUBLIC, "storage.example")
    fault, ask = STEERED[what]
    registry.faults.append(fault(f"http://{storage.host}/x"))
    with (
        client(registry, naps) as c,
        pytest.raises(RegistryError, match="which is not encrypted; nothing was sent there"),
    ):
        ask(c, tmp_path)
    assert storage.requests == []
    assert registry.requests, "it was spoken to over TLS"


def test_a_registry_that_the_user_named_may_be_anywhere_and_names_what_is_beside_it(
    start: Start, tmp_path: Path, naps: Naps
) -> None:
    for at in (LOOPBACK, PRIVATE, PUBLIC):
        registry, storage = (
            start(at, "internal.example" if at == PRIVATE else ""),
            start(at, "internal.example" if at == PRIVATE else ""),
        )
        storage.faults.append(lambda handler: handler.answer(200, CONTENT) is None)
        registry.faults.append(_sent_on("GET", "/blobs/", 307)(f"http://{storage.host}/signed"))
        with client(registry, naps) as c:
            c.download(DESCRIPTOR, tmp_path / "out")
            assert c.upload(tmp_path / "out", DESCRIPTOR)
        assert [(path, authorization) for _, path, authorization in storage.requests] == [("/signed", "")]


@pytest.mark.parametrize(("at", "name"), [(PUBLIC, ""), (PRIVATE, "internal.example"), (LOOPBACK, "")])
def test_what_is_further_out_may_be_named_and_names_nothing_nearer(
    at: str, name: str, start: Start, tmp_path: Path, naps: Naps
) -> None:
    """A registry in the company's network keeps its layers in a cloud, whose redirect leads back inside."""
    registry, storage, victim = start(at, name), start(PUBLIC, "storage.example"), start(LOOPBACK)
    registry.faults.append(_sent_on("GET", "/blobs/", 307)(f"http://{storage.host}/signed"))
    with client(registry, naps) as c:
        storage.faults.append(lambda handler: handler.answer(200, CONTENT) is None)
        c.download(DESCRIPTOR, tmp_path / "out")
        storage.faults[:] = [lambda handler: handler.answer(307, Location=f"http://{victim.host}/x") is None]
        with pytest.raises(RegistryError, match="loopback: this machine itself"):
            c.download(DESCRIPTOR, tmp_path / "out")
    assert victim.requests == []


def test_a_private_registry_does_not_name_this_machine(start: Start, tmp_path: Path, naps: Naps) -> None:
    registry, victim = start(PRIVATE, "internal.example"), start(LOOPBACK)
    registry.faults.append(_sent_on("POST", "/uploads/", 202)(f"http://{victim.host}/x"))
    with client(registry, naps) as c, pytest.raises(RegistryError, match="loopback: this machine itself"):
        _upload(c, tmp_path)
    assert victim.requests == []


def test_the_registrys_own_name_does_not_move_inside(start: Start, tmp_path: Path, naps: Naps) -> None:
    """DNS rebinding: public at the first look, this machine at the second."""
    registry = start(PUBLIC, "storage.example")
    found = [PUBLIC, PUBLIC, LOOPBACK]
    with (
        client(registry, naps, lambda host, port: [found.pop(0) if len(found) > 1 else found[0]]) as c,
        pytest.raises(RegistryError, match="loopback: this machine itself"),
    ):
        c.has_blob(DESCRIPTOR.digest)


def test_who_allows_private_addresses_allows_them_here_and_no_metadata_service(
    start: Start, tmp_path: Path, naps: Naps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KAITO_ALLOW_PRIVATE_ADDRESSES", "1")
    registry, storage = start(PUBLIC), start(LOOPBACK)
    storage.faults.append(lambda handler: handler.answer(200, CONTENT) is None)
    registry.faults.append(_sent_on("GET", "/blobs/", 307)(f"http://{storage.host}/signed"))
    with client(registry, naps) as c:
        c.download(DESCRIPTOR, tmp_path / "out")
        registry.faults[:] = [_challenged("https://169.254.169.254/token")]
        with pytest.raises(RegistryError, match="metadata services"):
            c.manifest("1")


def test_no_registry_is_at_a_metadata_service(naps: Naps) -> None:
    reference = Reference.parse("169.254.169.254/team/image:1")
    with (
        RegistryClient(reference, KAITO, sleep=naps) as c,
        pytest.raises(RegistryError, match="metadata services"),
    ):
        c.manifest("1")


def test_zones() -> None:
    at = {
        text: addresses.zone(ipaddress.ip_address(text))
        for text in ("::1", "10.0.0.1", "fd00::1", "1.1.1.1", "::ffff:127.0.0.1")
    }
    assert list(at.values()) == [Zone.LOOPBACK, Zone.PRIVATE, Zone.PRIVATE, Zone.PUBLIC, Zone.LOOPBACK]
