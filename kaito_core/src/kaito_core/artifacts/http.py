"""One registry over HTTP: logging in, trying again, following redirects, and to whom the credentials may go.

Rules that everything here keeps:

* HTTPS, except to this machine itself and to hosts that ``KAITO_INSECURE_REGISTRIES`` lists (comma separated); a
  server that was asked over HTTPS cannot send us on to plain HTTP.
* The registry that the user named may be in any network. What it names – redirects, upload locations, the token server – may be
  where it is itself or further out (`kaito_core.addresses.Zone`), and never nearer to us.
* ``Authorization`` goes to the registry's own scheme, host and port only, however it redirects us, and to the token server
  that it names; that one must be HTTPS unless the registry itself is plain HTTP.
* What the other side sends is read up to a bound.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import Any, Self, TypeVar

import httpx

from kaito_core.addresses import (
    LEAST,
    ZONES,
    ForbiddenAddress,
    Resolve,
    Zone,
    guarded_transport,
    is_loopback,
    private_addresses_allowed,
    resolve,
)
from kaito_core.artifacts import errors
from kaito_core.artifacts.auth import basic, choose, read_token, token_request
from kaito_core.artifacts.credentials import Credentials
from kaito_core.artifacts.manifest import MAX_MANIFEST_BYTES
from kaito_core.oci_reference import DOCKER_HUB, Reference

T = TypeVar("T")
Body = Callable[[], Iterator[bytes]]

INSECURE_VARIABLE = "KAITO_INSECURE_REGISTRIES"
TIMEOUT = httpx.Timeout(60, connect=15, read=300)
"""Seconds. Reading is patient, because a registry may take minutes to store a blob of many GB before it answers."""

MAX_WAIT = 120.0
"""Seconds; a registry that asks for a longer pause (``Retry-After``) is asked again after this one."""

_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MAX_REDIRECTS = 5


class Again(Exception):
    """Worth another try: the connection broke, or the registry is busy. ``error`` is raised when no try is left."""

    def __init__(self, error: errors.RegistryError, after: float = 0.0) -> None:
        super().__init__(str(error))
        self.error = error
        self.after = after


class RegistryHttp:
    """Requests to the registry of ``reference``. ``attempts`` is how often each is tried, ``sleep`` takes seconds."""

    def __init__(
        self,
        reference: Reference,
        credentials: Credentials | None,
        *,
        attempts: int,
        sleep: Callable[[float], None] = time.sleep,
        resolver: Resolve = resolve,
    ) -> None:
        host = "registry-1.docker.io" if reference.registry == DOCKER_HUB else reference.registry
        self.reference = reference
        self.credentials = credentials
        self.base = httpx.URL(f"{'http' if plain_http_allowed(host) else 'https'}://{host}/v2/{reference.repository}/")
        self.attempts = attempts
        self.sleep = sleep
        self._authorization: dict[str, str] = {}
        self._least = {_origin(self.base): Zone.LOOPBACK}
        """The nearest zone that a host may be in, by origin: that of the one who named it."""
        self._client = httpx.Client(
            transport=guarded_transport(Zone.PUBLIC, resolver), timeout=TIMEOUT, headers={"User-Agent": "kaito"}
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def follow(self, response: httpx.Response, address: str) -> httpx.URL:
        """Where an answer sends us on to: a redirect, an upload location, a token server. `RegistryError` when nothing may be sent there."""
        sender = response.url
        try:
            url = sender.join(address)
        except (httpx.InvalidURL, ValueError) as e:
            raise self.error(f"the registry sent an address that is none: {e}") from None
        downgrade = url.scheme == "http" and sender.scheme == "https"
        if (
            url.scheme not in ("http", "https")
            or downgrade
            or not (url.scheme == "https" or plain_http_allowed(_host_and_port(url)))
        ):
            raise self.error(
                f"the registry points to {url.scheme}://{url.host}, which is not encrypted; nothing was sent there",
                "ask those who run the registry"
                if downgrade
                else f"if that host may be trusted, list it in {INSECURE_VARIABLE}",
            )
        if _origin(url) != _origin(self.base) and not private_addresses_allowed():
            named_by = max(response.extensions[ZONES])
            self._least[_origin(url)] = max(named_by, self._least.get(_origin(url), named_by))
        return url

    def error(self, message: str, remedy: str = "ask those who run the registry") -> errors.RegistryError:
        """A `RegistryError` about the reference that is not about a status."""
        return errors.RegistryError(f"{self.reference}: {message}", remedy, "other")

    def retry(self, operation: Callable[[], T]) -> T:
        """Call ``operation`` until it does not raise `Again`, with growing pauses: 1, 2, 4 … seconds."""
        for attempt in range(1, self.attempts + 1):
            try:
                return operation()
            except Again as e:
                if attempt == self.attempts:
                    raise e.error from None
                self.sleep(min(e.after or 2.0 ** (attempt - 1), MAX_WAIT))
        raise AssertionError("attempts must be positive")

    def once(
        self,
        method: str,
        target: str,
        *,
        doing: str,
        ok: Collection[int],
        receive: Callable[[httpx.Response], T],
        headers: Mapping[str, str] | None = None,
        body: Body | None = None,
    ) -> T:
        """One request, after logging in if need be; ``receive`` gets the answer while it is still open.

        ``doing`` says in an infinitive what it is for, and asks for the right to push if it begins with "push". Raises
        `Again` or `RegistryError`.
        """
        url = self.base.join(target)
        scope = f"repository:{self.reference.repository}:{'pull,push' if doing.startswith('push') else 'pull'}"
        for logged_in in (False, True):
            with self._exchange(method, url, scope, headers or {}, body) as response:
                if response.status_code in ok:
                    return receive(response)
                ours = _origin(response.url) == _origin(self.base)
                if response.status_code != 401 or logged_in or not ours:
                    raise self._refusal(
                        response, doing, ours and self._authorization.get(scope, "").startswith("Basic")
                    )
                self._authorization[scope] = self._log_in(response, scope)
        raise AssertionError("the second round returns or raises")

    def _refusal(self, response: httpx.Response, doing: str, by_password: bool) -> Exception:
        status, content = response.status_code, read_bounded(response, errors.MAX_ERROR_BYTES)
        if status in _TRANSIENT:
            return Again(errors.refused(self.reference, doing, status, content), _retry_after(response))
        if status in (401, 403) and not self._user:
            return errors.wrong_credentials(self.reference, "", status, content)
        if status == 401 and by_password:
            return errors.wrong_credentials(self.reference, self._user, status, content)
        return errors.refused(self.reference, doing, status, content)

    @contextmanager
    def _exchange(
        self, method: str, url: httpx.URL, scope: str, headers: Mapping[str, str], body: Body | None
    ) -> Iterator[httpx.Response]:
        """Send one request and follow where a GET is sent on to; network trouble is `Again`."""
        for _ in range(_MAX_REDIRECTS + 1):
            sent = {"Accept-Encoding": "identity", **headers}
            if _origin(url) == _origin(self.base) and scope in self._authorization:
                sent["Authorization"] = self._authorization[scope]
            who = f"the {'registry' if _origin(url) == _origin(self.base) else 'storage'} {_host_and_port(url)}"
            with self._network(who):
                response = self._send(method, url, headers=sent, content=body() if body else None)
            try:
                if method in ("GET", "HEAD") and response.status_code in _REDIRECTS and "Location" in response.headers:
                    url = self.follow(response, response.headers["Location"])
                    continue
                with self._network(who):
                    yield response
                return
            finally:
                response.close()
        raise self.error("the registry redirects without end")

    def _send(self, method: str, url: httpx.URL, **parts: Any) -> httpx.Response:
        """One request to where it may go; the answer is still open. The registry's own name keeps to the zone that it was found in first."""
        least = self._least.get(_origin(url), Zone.LOOPBACK if private_addresses_allowed() else Zone.PUBLIC)
        request = self._client.build_request(method, url, extensions={LEAST: least}, **parts)
        response = self._client.send(request, stream=True)
        if _origin(url) == _origin(self.base):
            self._least[_origin(url)] = min(response.extensions[ZONES])
        return response

    @contextmanager
    def _network(self, who: str) -> Iterator[None]:
        try:
            yield
        except ForbiddenAddress as e:
            raise self.error(
                f"{who}: {e.fact}; nothing was sent there",
                "ask those who run the registry; to allow private networks set KAITO_ALLOW_PRIVATE_ADDRESSES=1",
            ) from None
        except httpx.TransportError as e:
            cause = (
                f"no answer in time ({type(e).__name__})"
                if isinstance(e, httpx.TimeoutException)
                else str(e) or type(e).__name__
            )
            remedy = ""
            if "CERTIFICATE_VERIFY_FAILED" in cause:
                remedy = "if its certificate is your own, name the file of your authority in SSL_CERT_FILE"
            elif "SSL" in cause:
                remedy = f"if it speaks plain HTTP, list it in {INSECURE_VARIABLE}"
            raise Again(errors.unreachable(self.reference, who, cause, remedy)) from e
        except httpx.InvalidURL as e:
            raise self.error(f"the registry sent an address that is none: {e}") from None

    def _log_in(self, refusal: httpx.Response, scope: str) -> str:
        """Answer the challenge of a 401; the value for ``Authorization``."""
        said = read_bounded(refusal, errors.MAX_ERROR_BYTES)
        challenge = choose(refusal.headers.get("WWW-Authenticate", ""))
        if challenge is None:
            raise errors.wrong_credentials(self.reference, self._user, 401, said)
        if challenge.scheme == "basic":
            if not self.credentials or not self.credentials.username:
                raise errors.wrong_credentials(self.reference, "", 401, said)
            return basic(self.credentials)
        wanted = token_request(challenge, scope, self.credentials)
        if "://" not in wanted.url:
            raise self.error(f"the registry names a token server that is no address: {wanted.url[:80]!r}")
        url = self.follow(refusal, wanted.url).copy_merge_params(wanted.query)
        with self._network(f"the token server {_host_and_port(url)}"):
            method = "POST" if wanted.form else "GET"
            response = self._send(method, url, headers=wanted.headers, data=wanted.form or None)
            try:
                content = read_bounded(response, errors.MAX_ERROR_BYTES)
            finally:
                response.close()
        status = response.status_code
        if status in _TRANSIENT:
            raise Again(errors.refused(self.reference, "log in", status, content), _retry_after(response))
        if status in (400, 401, 403):
            raise errors.wrong_credentials(self.reference, self._user, status, content)
        token = read_token(content) if status == 200 else ""
        if not token:
            raise self.error(f"the token server {url.host} gave no token (HTTP {status})")
        return f"Bearer {token}"

    @property
    def _user(self) -> str:
        if self.credentials is None:
            return ""
        return self.credentials.username or ("identity token" if self.credentials.identity_token else "")


def plain_http_allowed(host: str) -> bool:
    """Whether ``host``, with its port if it has one, may be spoken to without encryption."""
    name = host if host.endswith("]") else host.rpartition(":")[0] or host
    listed = {h.strip().lower() for h in os.environ.get(INSECURE_VARIABLE, "").split(",")} - {""}
    return is_loopback(name.strip("[]")) or host.lower() in listed or name.lower() in listed


def read_bounded(response: httpx.Response, limit: int = MAX_MANIFEST_BYTES) -> bytes:
    """The first ``limit`` bytes of an open answer."""
    content = bytearray()
    for piece in response.iter_raw():
        content += piece
        if len(content) >= limit:
            break
    return bytes(content[:limit])


def _origin(url: httpx.URL) -> tuple[str, str, int]:
    return url.scheme, url.host, url.port or {"http": 80, "https": 443}.get(url.scheme, 0)


def _host_and_port(url: httpx.URL) -> str:
    return url.netloc.decode("ascii", "replace").rpartition("@")[2]


def _retry_after(response: httpx.Response) -> float:
    """Seconds to wait as the answer asks (a number or a date), 0 if it does not."""
    value = response.headers.get("Retry-After", "")
    try:
        if value.isascii() and value.isdigit():
            return float(value)
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0
