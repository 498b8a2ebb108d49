"""Asks an endpoint in a cluster through the API server, with the user's own credentials: nothing else has to be reachable.

    httpx ──> ThroughApiServer ──> API server ──> the endpoint's pod
                     /api/v1/namespaces/NS/services/http:NAME:http/proxy/v1/…

What the API server itself says no with, and what it says when there is no pod, is told apart from what the endpoint answers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

import httpx

from kaito_core.cli.cluster.endpoint import needs_key, title
from kaito_core.cli.completions import PATIENCE, brief
from kaito_core.kube.client import _of_the_network
from kaito_core.kube.errors import Forbidden, error_of
from kaito_core.kube.kinds import SERVICES, Object
from kaito_core.problems import Failure

if TYPE_CHECKING:
    from kaito_core.kube.client import Client

CONNECT: Final = 10.0
"""Seconds. The API server sets no limit of its own to what goes through its proxy."""

SETTLE: Final = 30.0
"""Seconds that the API server may take to learn of a pod that is ready."""
PAUSE: Final = 0.5

MOST: Final = 1 << 20
"""Bytes that are read of an error."""

NO_POD: Final = "no endpoints available"
NO_WAY: Final = b"error trying to reach service: dial"
"""How the API server says that there is no pod, or that it does not get a connection to it: nothing was asked of anybody then."""


def proxy_path(workspace: Object) -> str:
    """Where the API server has the endpoint, without ``/v1``."""
    metadata = workspace["metadata"]
    return SERVICES.path(metadata["namespace"], f"http:{metadata['name']}:http", "proxy")


class ThroughApiServer(httpx.BaseTransport):
    """Sends requests for a `proxy_path` to the API server. The headers of the request stay behind: an API key of the endpoint's is none
    of the API server's business, and would be taken for a log-in."""

    def __init__(self, client: Client, until_ready: Callable[[], Object], options: str = "") -> None:
        """``until_ready`` waits until the endpoint answers and returns its Workspace; it is asked whenever there is no pod."""
        self._client = client
        self._until_ready = until_ready
        self._options = options

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """The endpoint's answer. Raises `KaitoError` for what the API server says itself, `httpx.ReadError` in mid-stream."""
        body = json.loads(request.read() or "null")
        workspace = self._until_ready()
        deadline = time.monotonic() + SETTLE
        while True:
            answer = self._send(request.method, request.url.path, body)
            headers = {k: v for k, v in answer.headers.items() if k.lower() in ("content-type", "retry-after")}
            if answer.status < 400:
                return httpx.Response(answer.status, headers=headers, stream=_Stream(answer.response))
            content = self._content(answer)
            said = _status_of(content)
            if said is None and not (answer.status == 503 and content.startswith(NO_WAY)):
                if answer.status == 401:
                    raise needs_key(workspace, self._options)
                return httpx.Response(answer.status, headers=headers, content=content)
            words = brief(said or content.decode("utf-8", "replace"))
            if answer.status != 503 or not (said is None or NO_POD in said) or time.monotonic() > deadline:
                raise self._refused(workspace, answer.status, content, words)
            time.sleep(PAUSE)
            began = time.monotonic()
            workspace = self._until_ready()
            deadline += time.monotonic() - began

    def _send(self, method: str, path: str, body: Any) -> Any:
        api = self._client._api
        wanted = {"Accept": "*/*", "Content-Type": "application/json"}
        _, url, headers, _, _ = api.param_serialize(method, path, header_params=wanted, auth_settings=["BearerToken"])
        try:
            return api.call_api(method, url, headers, body=body, _request_timeout=(CONNECT, PATIENCE))
        except Exception as e:
            if not _of_the_network(e):
                raise
            raise self._client._unreachable("ask the endpoint", e) from e

    def _content(self, answer: Any) -> bytes:
        content = b""
        for chunk in _Stream(answer.response):
            content += chunk
            if len(content) > MOST:
                break
        answer.response.close()
        return content

    def _refused(self, workspace: Object, status: int, content: bytes, words: str) -> Failure:
        named = title(workspace)
        metadata = workspace["metadata"]
        name, namespace, there = metadata["name"], metadata["namespace"], f"{self._options}-n {metadata['namespace']}"
        if isinstance(error_of(status, content, ""), Forbidden):
            return Failure(
                f"{named} cannot be asked through the API server: {words}",
                f"ask for the right to get and create services/proxy in the namespace {namespace}, or use kubectl {there} "
                f"port-forward service/{name} 5000:80 and kaito chat http://localhost:5000",
            )
        if status == 503:
            return Failure(
                f"{named} is ready, and the API server does not reach it: {words}",
                f"try again in a moment; kaito status {there} {name} shows how it is",
            )
        return Failure(
            f"{named} cannot be asked through the API server: {words}", f"kaito status {there} {name} shows how it is"
        )


class _Stream(httpx.SyncByteStream):
    """The body of a urllib3 response, as it comes."""

    def __init__(self, response: Any) -> None:
        self._response = response

    def __iter__(self) -> Iterator[bytes]:
        try:
            yield from self._response.stream(65536, decode_content=False)
        except Exception as e:
            if not _of_the_network(e):
                raise
            raise httpx.ReadError(str(e)) from e

    def close(self) -> None:
        # Not back to the pool: there may be more to come.
        self._response.close()


def _status_of(content: bytes) -> str | None:
    """The words of the API server's own error; None when somebody else says something."""
    try:
        said = json.loads(content)
    except (ValueError, RecursionError):
        return None
    ours = isinstance(said, dict) and (said.get("kind"), said.get("apiVersion")) == ("Status", "v1")
    return str(said.get("message") or said.get("reason") or "") if ours else None
