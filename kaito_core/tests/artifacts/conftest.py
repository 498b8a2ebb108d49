"""What the tests of images share: a real registry, a small adapter, and a registry that speaks tokens and can misbehave."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from kaito_core.testing.registry import Registry, running_registry, why_no_registry


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    if reason := why_no_registry():
        pytest.skip(reason)
    with running_registry(tmp_path_factory.mktemp("registry"), "kaito", "s3cret") as running:
        yield running


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A folder as the trainer writes it, with things in it that do not belong into an image."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"r": 8}')
    (folder / "adapter_model.safetensors").write_bytes(hashlib.shake_128(b"weights").digest(300_000))
    (folder / "README.md").write_text("# card\n")
    (folder / "training_args.bin").write_bytes(b"a pickle")
    (folder / "checkpoint-10").mkdir()
    return folder


class Naps(list[float]):
    """A sleep that only writes down how long it was asked to be."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


@pytest.fixture
def naps() -> Naps:
    return Naps()


@dataclass
class TokenRegistry:
    """A registry behind a token server, after Docker's specification. Keeps everything in memory.

    ``faults`` are called with the handler before a request is served; one that returns True has dealt with it.
    """

    host: str = ""
    realm: str = ""
    users: dict[str, str] = field(default_factory=lambda: {"kaito": "s3cret", "reader": "r"})
    refresh_tokens: set[str] = field(default_factory=lambda: {"the-refresh-token"})
    pushers: set[str] = field(default_factory=lambda: {"kaito", "refreshed"})
    missing: set[str] = field(default_factory=set)
    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[str, bytes] = field(default_factory=dict)
    sessions: dict[str, bytearray] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, path and Authorization of all that was asked."""
    faults: list[Callable[[Handler], bool]] = field(default_factory=list)

    def asked(self, method: str, part: str = "") -> list[str]:
        return [path for m, path, _ in self.requests if m == method and part in path]


class Handler(BaseHTTPRequestHandler):
    """Serves one `TokenRegistry`."""

    protocol_version = "HTTP/1.1"
    state: TokenRegistry

    def handle_any(self) -> None:
        state = self.state
        state.requests.append((self.command, self.path, self.headers.get("Authorization", "")))
        for fault in list(state.faults):
            if fault(self):
                return
        if self.path.startswith("/token"):
            self.token()
        else:
            self.registry(urlsplit(self.path).path)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any

    def answer(self, status: int, body: bytes | dict[str, object] = b"", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def error(self, status: int, code: str, message: str, **headers: str) -> None:
        self.answer(status, {"errors": [{"code": code, "message": message}]}, **headers)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def token(self) -> None:
        if self.command == "POST":
            form = parse_qs(self.body().decode())
            if form.get("refresh_token", [""])[0] not in self.state.refresh_tokens:
                return self.answer(400, {"error": "invalid_grant", "error_description": "the token has been revoked"})
            assert form["grant_type"] == ["refresh_token"]
            return self.answer(200, {"access_token": f"refreshed/{form['scope'][0]}"})
        query = parse_qs(urlsplit(self.path).query)
        assert query["service"] == ["test-service"]
        user = "anonymous"
        if header := self.headers.get("Authorization"):
            user, _, password = base64.b64decode(header.removeprefix("Basic ")).decode().partition(":")
            if self.state.users.get(user) != password:
                return self.answer(401, {"details": "incorrect username or password"})
        return self.answer(200, {"token": f"{user}/{query['scope'][0]}"})

    def registry(self, path: str) -> None:
        state = self.state
        authorization = self.headers.get("Authorization", "")
        if not authorization.startswith("Bearer "):
            self.body()
            challenge = f'Bearer realm="{state.realm}",service="test-service",scope="repository:x:pull"'
            return self.error(401, "UNAUTHORIZED", "authentication required", WWW_Authenticate=challenge)
        user, _, scope = authorization.removeprefix("Bearer ").partition("/")
        name, _, rest = path.removeprefix("/v2/").partition("/")
        if self.command not in ("GET", "HEAD") and ("push" not in scope or user not in state.pushers):
            return self.error(403, "DENIED", f"requested access to {name} is denied")
        if name in state.missing:
            return self.error(404, "NAME_UNKNOWN", f"the repository {name} does not exist")
        if rest.startswith("blobs/uploads/"):
            return self.upload(name, rest.removeprefix("blobs/uploads/"))
        if rest.startswith("blobs/"):
            content = state.blobs.get(rest.removeprefix("blobs/"))
            return self.answer(200, content) if content is not None else self.error(404, "BLOB_UNKNOWN", "no blob")
        tag = rest.removeprefix("manifests/")
        if self.command == "PUT":
            state.manifests[tag] = self.body()
            return self.answer(201)
        if tag not in state.manifests:
            return self.error(404, "MANIFEST_UNKNOWN", "manifest unknown")
        media_type = json.loads(state.manifests[tag])["mediaType"]
        return self.answer(200, state.manifests[tag], Content_Type=media_type)

    def upload(self, name: str, session: str) -> None:
        state = self.state
        if self.command == "POST":
            session = str(len(state.requests))
            state.sessions[session] = bytearray()
            return self.answer(202, Location=f"/v2/{name}/blobs/uploads/{session}?_state=a%2Bb")
        held = state.sessions.get(session)
        if held is None:
            self.body()
            return self.error(404, "BLOB_UPLOAD_UNKNOWN", "upload unknown to registry")
        if self.command == "DELETE":
            del state.sessions[session]
            return self.answer(204)
        if self.command == "PATCH":
            start = int(self.headers["Content-Range"].partition("-")[0])
            content = self.body()
            if start != len(held):
                return self.answer(416, Range=f"0-{max(len(held) - 1, 0)}", Location=self.path)
            held += content
        elif self.command == "PUT":
            held += self.body()
            query = parse_qs(urlsplit(self.path).query)
            assert query["_state"] == ["a+b"]
            digest = "sha256:" + hashlib.sha256(held).hexdigest()
            if query["digest"] != [digest]:
                return self.error(400, "DIGEST_INVALID", "provided digest did not match uploaded content")
            state.blobs[digest] = bytes(held)
            del state.sessions[session]
            return self.answer(201, Docker_Content_Digest=digest)
        return self.answer(
            202 if self.command == "PATCH" else 204, Range=f"0-{max(len(held) - 1, 0)}", Location=self.path
        )

    def hang_up(self) -> None:
        """Break the connection without an answer."""
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def serve() -> Iterator[Callable[[type[BaseHTTPRequestHandler]], str]]:
    """Serves a handler on 127.0.0.1 until the test ends; the host with its port."""
    servers: list[ThreadingHTTPServer] = []

    def start(handler: type[BaseHTTPRequestHandler]) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return f"127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def token_registry(serve: Callable[[type[BaseHTTPRequestHandler]], str]) -> TokenRegistry:
    state = TokenRegistry()
    state.host = serve(type("Served", (Handler,), {"state": state}))
    state.realm = f"http://{state.host}/token"
    return state


@pytest.fixture
def cut_wire() -> Iterator[Callable[[str, int], str]]:
    """A wire to a host that breaks once, after so many bytes towards it; the address of its near end."""
    listeners: list[socket.socket] = []

    def lay(host: str, after: int) -> str:
        name, _, port = host.partition(":")
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)
        left = [after]

        def carry(source: socket.socket, target: socket.socket, counted: bool) -> None:
            try:
                while data := source.recv(65536):
                    if counted and left[0] >= 0:
                        left[0] -= len(data)
                        if left[0] < 0:
                            break
                    target.sendall(data)
            except OSError:
                pass
            for s in (source, target):
                with suppress(OSError):
                    s.shutdown(socket.SHUT_RDWR)

        def accept() -> None:
            while True:
                try:
                    near, _ = listener.accept()
                except OSError:
                    return
                far = socket.create_connection((name, int(port)))
                threading.Thread(target=carry, args=(near, far, True), daemon=True).start()
                threading.Thread(target=carry, args=(far, near, False), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        return f"127.0.0.1:{listener.getsockname()[1]}"

    yield lay
    for listener in listeners:
        listener.close()
