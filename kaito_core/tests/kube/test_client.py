"""One cluster, spoken to over HTTP: what is asked, and what becomes of every kind of answer."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml

from kaito_core.api import read_workspace
from kaito_core.kube.client import Client, connect
from kaito_core.kube.errors import (
    AlreadyExists,
    ApiError,
    Conflict,
    Forbidden,
    Gone,
    Invalid,
    NotFound,
    TooManyRequests,
    Unreachable,
)
from kaito_core.kube.kinds import CONFIG_MAPS, JOBS, NAMESPACES, WORKSPACES
from kaito_core.problems import UserError

TOKEN = "the-token-of-the-test"


@dataclass
class Answers:
    """What the server says next, and what it was asked."""

    queue: list[tuple[int, Any, dict[str, str]]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)

    def add(self, status: int, body: Any = None, **headers: str) -> None:
        self.queue.append((status, body if body is not None else {}, headers))

    def refuse(self, status: int, reason: str, message: str, **headers: str) -> None:
        self.add(status, {"kind": "Status", "reason": reason, "message": message, "code": status}, **headers)


@pytest.fixture
def answers() -> Answers:
    return Answers()


@pytest.fixture
def client(answers: Answers, tmp_path: Path) -> Iterator[Client]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _do(self) -> None:
            answers.asked.append(f"{self.command} {self.path}")
            answers.headers.append({k.lower(): v for k, v in self.headers.items()})
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, body, headers = answers.queue.pop(0)
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for key, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PATCH = do_DELETE = do_PUT = _do

        def log_message(self, format: str, *arguments: Any) -> None:
            """Nobody reads it."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield connect(kubeconfig=str(kubeconfig(tmp_path, f"http://127.0.0.1:{server.server_port}")))
    server.shutdown()
    server.server_close()


def kubeconfig(folder: Path, server: str) -> Path:
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "clusters": [{"name": "c", "cluster": {"server": server}}],
        "users": [{"name": "u", "user": {"token": TOKEN}}],
        "contexts": [{"name": "test", "context": {"cluster": "c", "user": "u", "namespace": "team"}}],
    }
    path = folder / "kubeconfig"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("status", "reason", "kind"),
    [
        (409, "Conflict", Conflict),
        (409, "AlreadyExists", AlreadyExists),
        (410, "Expired", Gone),
        (403, "Forbidden", Forbidden),
        (401, "Unauthorized", Forbidden),
        (422, "Invalid", Invalid),
        (404, "NotFound", NotFound),
        (500, "InternalError", ApiError),
    ],
)
def test_a_no_is_told_apart_and_keeps_the_server_s_words(
    client: Client, answers: Answers, status: int, reason: str, kind: type[ApiError]
) -> None:
    answers.refuse(status, reason, "because of that")
    with pytest.raises(ApiError) as caught:
        client.create(JOBS, {"metadata": {"name": "one", "namespace": "team"}})
    assert type(caught.value) is kind
    assert caught.value.problems[0].message == "create jobs.batch team/one: because of that"
    assert len(answers.asked) == 1, "a write that was refused is not written again"


def test_who_is_asked_to_wait_waits(client: Client, answers: Answers) -> None:
    answers.refuse(429, "TooManyRequests", "busy", Retry_After="0")
    answers.refuse(429, "TooManyRequests", "busy", Retry_After="0")
    answers.add(200, {"metadata": {"name": "one"}})
    assert client.get(JOBS, "one", "team") == {"metadata": {"name": "one"}}
    for _ in range(9):
        answers.refuse(429, "TooManyRequests", "busy", Retry_After="0")
    with pytest.raises(TooManyRequests, match="busy"):
        client.get(JOBS, "one", "team")


def test_an_object_that_is_nested_too_deeply_does_not_hide_the_others(client: Client, answers: Answers) -> None:
    """A template is whatever its author writes: the API server takes 9,000 levels, Python reads about a thousand."""
    deep = '{"metadata": {"name": "deep"}, "inference": {"template": ' + '{"a":' * 9000 + "1" + "}" * 9002
    items = f'[{{"metadata": {{"name": "one"}}}}, {deep}, {{"metadata": {{"name": "two"}}}}]'
    answers.add(200, f'{{"items": {items}, "metadata": {{"resourceVersion": "7"}}}}'.encode())
    found, version = client.list(WORKSPACES)
    assert [o["metadata"]["name"] for o in found] == ["one", "deep", "two"]
    assert version == "7"
    _, problems = read_workspace({**found[1], "apiVersion": "kaito.sh/v1beta1", "kind": "Workspace"})
    assert [str(p.message) for p in problems] == ["is nested more than 64 deep"]
    lines = [f'{{"type": "ADDED", "object": {o}}}\n' for o in (deep, '{"metadata": {"name": "one"}}')]
    answers.add(200, "".join(lines).encode())
    assert [o["metadata"]["name"] for _, o in client.watch(WORKSPACES, resource_version="7")] == ["deep", "one"]


def test_what_is_not_there_is_none_and_deleting_it_is_no_error(client: Client, answers: Answers) -> None:
    answers.refuse(404, "NotFound", "not found")
    answers.refuse(404, "NotFound", "not found")
    assert client.get(JOBS, "one", "team") is None
    assert client.delete(JOBS, "one", "team") is False


def test_one_made_since_is_not_deleted_in_its_place(client: Client, answers: Answers) -> None:
    answers.refuse(409, "Conflict", "Precondition failed: UID in precondition: a, UID in object meta: b")
    assert client.delete(JOBS, "one", "team", uid="a") is False


def test_pages_that_came_too_late_are_read_anew(client: Client, answers: Answers) -> None:
    def page(name: str, onward: str) -> dict[str, Any]:
        return {"metadata": {"resourceVersion": "7", "continue": onward}, "items": [{"metadata": {"name": name}}]}

    answers.add(200, page("a", "more"))
    answers.refuse(410, "Expired", "the continue token is too old")
    answers.add(200, page("a", "more"))
    answers.add(200, page("b", ""))
    found, version = client.list(JOBS, "team", page=1)
    assert [o["metadata"]["name"] for o in found] == ["a", "b"]
    assert found[0]["kind"] == "Job", "a list leaves that out of its items"
    assert version == "7"


def test_something_that_is_no_api_server(client: Client, answers: Answers) -> None:
    answers.add(200, b"<html>log in first</html>")
    with pytest.raises(ApiError, match="does not answer like an API server"):
        client.get(JOBS, "one", "team")
    answers.add(502, b"<html>bad gateway</html>")
    with pytest.raises(ApiError, match="bad gateway"):
        client.get(JOBS, "one", "team")


def test_a_server_that_is_away(tmp_path: Path) -> None:
    away = connect(kubeconfig=str(kubeconfig(tmp_path, "http://127.0.0.1:9")))
    with pytest.raises(Unreachable) as caught:
        away.get(JOBS, "one", "team")
    assert "http://127.0.0.1:9 (context test) does not answer" in caught.value.problems[0].message
    assert TOKEN not in str(caught.value)


def test_who_asks_says_who(client: Client, answers: Answers) -> None:
    answers.add(200, {})
    client.get(JOBS, "one", "team")
    assert answers.headers[0]["authorization"] == f"Bearer {TOKEN}"
    assert answers.headers[0]["user-agent"].startswith("kaito/")
    assert client.namespace == "team"


@pytest.mark.parametrize("content", ["", "{", "[]", "contexts: 3", "apiVersion: v1\nkind: Config\n"])
def test_a_kubeconfig_that_is_none_is_a_problem_with_a_remedy(tmp_path: Path, content: str) -> None:
    path = tmp_path / "kubeconfig"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="no usable cluster configuration") as caught:
        connect(kubeconfig=str(path))
    assert "KUBECONFIG" in caught.value.problems[0].remedy


def test_a_context_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no context 'prod'") as caught:
        connect("prod", str(kubeconfig(tmp_path, "http://127.0.0.1:9")))
    assert "test" in caught.value.problems[0].remedy


# --- a real API server


@pytest.fixture
def real(workspaces: Any) -> Client:
    return connect(kubeconfig=str(workspaces.kubeconfig))


@pytest.fixture
def namespace(real: Client) -> Iterator[str]:
    name = f"client-{uuid4().hex[:8]}"
    real.create(NAMESPACES, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    yield name
    real.delete(NAMESPACES, name)


def test_the_api_server_takes_deep_objects_and_they_are_listed(workspaces: Any, real: Client, namespace: str) -> None:
    for depth in (2, 500, 1500):
        head = f'{{"apiVersion": "kaito.sh/v1beta1", "kind": "Workspace", "metadata": {{"name": "deep-{depth}"}}'
        template = '{"a":' * depth + '"x"' + "}" * depth
        body = f'{head}, "resource": {{"count": 1}}, "inference": {{"template": {{"spec": {template}}}}}}}'
        workspaces.kubectl("create", "--raw", WORKSPACES.path(namespace), "-f", "-", stdin=body)
    found = {o["metadata"]["name"]: o for o in real.list(WORKSPACES, namespace)[0]}
    assert set(found) == {"deep-2", "deep-500", "deep-1500"}
    said = {n: [p.message for p in read_workspace(o)[1] if "nested" in p.message] for n, o in found.items()}
    deep = ["is nested more than 64 deep"]
    assert said == {"deep-2": [], "deep-500": deep, "deep-1500": deep}


def test_a_write_on_an_old_version_is_a_conflict(real: Client, namespace: str) -> None:
    metadata = {"name": "one", "namespace": namespace}
    first = real.create(
        CONFIG_MAPS, {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"a": "1"}}
    )
    with pytest.raises(AlreadyExists):
        real.create(CONFIG_MAPS, {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata})
    real.patch(CONFIG_MAPS, "one", namespace, {"data": {"a": "2"}})
    with pytest.raises(Conflict):
        real.replace(CONFIG_MAPS, {**first, "data": {"a": "3"}})
    old = {"metadata": {"resourceVersion": first["metadata"]["resourceVersion"]}, "data": {"a": "3"}}
    with pytest.raises(Conflict):
        real.patch(CONFIG_MAPS, "one", namespace, old)


def test_apply_is_idempotent_and_leaves_other_s_fields_alone(real: Client, namespace: str) -> None:
    obj = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "one", "namespace": namespace},
        "data": {"a": "1"},
    }
    first = real.apply(CONFIG_MAPS, obj)
    assert real.apply(CONFIG_MAPS, obj)["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]
    real.patch(CONFIG_MAPS, "one", namespace, {"data": {"b": "2"}})
    assert real.apply(CONFIG_MAPS, {**obj, "data": {"a": "3"}})["data"] == {"a": "3", "b": "2"}


def test_many_pages_are_one_list(real: Client, namespace: str) -> None:
    for number in range(5):
        metadata = {"name": f"m{number}", "namespace": namespace, "labels": {"of": "test"}}
        real.create(CONFIG_MAPS, {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata})
    found, version = real.list(CONFIG_MAPS, namespace, labels="of=test", page=2)
    assert [o["metadata"]["name"] for o in found] == [f"m{n}" for n in range(5)]
    assert int(version) > 0


def test_what_is_served_and_permitted(real: Client) -> None:
    assert real.serves(WORKSPACES)
    assert real.allowed("create", JOBS, "default")
    assert real.version().startswith("v1.")
