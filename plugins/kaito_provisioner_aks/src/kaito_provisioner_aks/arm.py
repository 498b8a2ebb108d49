"""The thin edge to Azure: one call, one request, no waiting and no repeating. The reconciler comes back anyway.

azure is imported when the first request is made."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Protocol

from kaito_provisioner_aks.errors import Refused, Said, kind_of, read_error
from kaito_provisioner_aks.pool import Object
from kaito_provisioner_aks.settings import Settings, plain

if TYPE_CHECKING:
    from azure.core.exceptions import HttpResponseError
    from azure.mgmt.compute import ComputeManagementClient
    from azure.mgmt.containerservice import ContainerServiceClient

CONNECT_SECONDS, READ_SECONDS = 10.0, 60.0
"""AKS looks a pool over before it answers the PUT; that takes seconds."""

REMEMBERED: Final = 256
"""Operations whose address is remembered."""

log = logging.getLogger("kaito_provisioner_aks.arm")


class Edge(Protocol):
    """What is asked of Azure, about one AKS cluster. Everything raises `Refused` when the answer is no."""

    def location(self) -> str:
        """Where the cluster is: ``eastus``."""

    def pool(self, name: str) -> Object | None:
        """One agent pool; None when there is none, or none any more."""

    def pools(self) -> list[Object]:
        """All of them, also other people's."""

    def put(self, name: str, body: Object, etag: str | None = None) -> None:
        """Begin to make it. Only where none is; with an ``etag`` only that version of the one that is (empty: any version)."""

    def delete(self, name: str) -> bool:
        """Begin to delete it; False when it was gone."""

    def why_failed(self, name: str) -> Said | None:
        """What the last operation that was begun here says it failed of; None when it does not say, or is not known here."""

    def usages(self, location: str) -> list[Object]:
        """What of each quota is used there."""

    def skus(self, location: str) -> list[Object]:
        """The sizes of machines that there are, and what restricts them."""


class Arm:
    """The Azure Resource Manager through Microsoft's own packages. Safe to share between threads."""

    def __init__(self, settings: Settings, *, read_seconds: float = READ_SECONDS) -> None:
        self._settings = settings
        self._place = (settings.resource_group, settings.cluster)
        self._read_seconds = read_seconds
        self._lock = threading.Lock()
        self._containers: ContainerServiceClient | None = None
        self._compute: ComputeManagementClient | None = None
        self._operations: dict[str, str] = {}
        self._let_in = False
        """Whether Azure has answered anything with these credentials."""

    def location(self) -> str:
        with self._answers():
            return plain(str(self._aks.managed_clusters.get(*self._place).location or ""))

    def pool(self, name: str) -> Object | None:
        try:
            with self._answers():
                return _object(self._aks.agent_pools.get(*self._place, name))
        except Refused as e:
            if e.said.status == 404 and kind_of(e.said) == "absent":
                return None
            raise

    def pools(self) -> list[Object]:
        with self._answers():
            return _objects(self._aks.agent_pools.list(*self._place))

    def put(self, name: str, body: Object, etag: str | None = None) -> None:
        from azure.core import MatchConditions

        match = MatchConditions.IfMissing
        if etag is not None:
            match = MatchConditions.IfNotModified if etag else MatchConditions.IfPresent
        with self._answers():
            self._aks.agent_pools.begin_create_or_update(  # type: ignore[call-overload]  # a plain dict goes out as it is
                *self._place,
                name,
                body,
                etag=etag or None,
                match_condition=match,
                polling=False,
                raw_response_hook=self._remember(name),
            )

    def delete(self, name: str) -> bool:
        gone: list[bool] = []
        try:
            with self._answers():
                self._aks.agent_pools.begin_delete(
                    *self._place, name, polling=False,
                    raw_response_hook=lambda r: gone.append(r.http_response.status_code == 204),
                )  # fmt: skip
        except Refused as e:
            if e.said.status == 404 and kind_of(e.said) == "absent":
                return False
            raise
        return not any(gone)

    def why_failed(self, name: str) -> Said | None:
        address = self._operations.get(name)
        if address is None:
            return None
        from azure.core.rest import HttpRequest

        with self._answers():
            # The address is signed: it is asked as it was given.
            answer = self._aks.send_request(HttpRequest("GET", address))
            said = answer.json() if answer.status_code == 200 else {}
        if str(said.get("status", "")).lower() not in ("failed", "canceled"):
            return None
        return read_error(said.get("error") or {"code": said.get("status")})

    def usages(self, location: str) -> list[Object]:
        with self._answers():
            return _objects(self._machines.usage.list(location))

    def skus(self, location: str) -> list[Object]:
        with self._answers():
            return _objects(self._machines.resource_skus.list(filter=f"location eq '{location}'"))

    @contextmanager
    def _answers(self) -> Iterator[None]:
        """Whatever goes wrong in the block is `Refused`."""
        from azure.core.exceptions import AzureError, ClientAuthenticationError, HttpResponseError

        try:
            yield
        except HttpResponseError as e:
            if not isinstance(e, ClientAuthenticationError) or e.response is not None:
                self._let_in |= e.status_code != 401
                raise Refused(_said(e)) from e
            words = " ".join(str(e).split())
            if self._let_in:
                # The credentials are good; whoever makes tokens of them is out of order.
                raise Refused(Said(0, "", words)) from e
            raise Refused(Said(401, "AuthenticationFailed", words, frozenset({"authenticationfailed"}))) from e
        except AzureError as e:
            raise Refused(Said(0, "", f"Azure does not answer: {_first_line(e)}")) from e
        self._let_in = True

    # --- the clients

    @property
    def _aks(self) -> ContainerServiceClient:
        with self._lock:
            if self._containers is None:
                from azure.mgmt.containerservice import ContainerServiceClient

                self._containers = ContainerServiceClient(**self._given())
            return self._containers

    @property
    def _machines(self) -> ComputeManagementClient:
        with self._lock:
            if self._compute is None:
                from azure.mgmt.compute import ComputeManagementClient

                self._compute = ComputeManagementClient(**self._given())
            return self._compute

    def _given(self) -> dict[str, Any]:
        given: dict[str, Any] = {
            "subscription_id": self._settings.subscription,
            # The package would sit out what Azure asks to wait, and a worker of the controller with it.
            "retry_total": 0,
            "connection_timeout": CONNECT_SECONDS,
            "read_timeout": self._read_seconds,
            "user_agent": "kaito",
        }
        if self._settings.endpoint:
            return {**given, **_static(self._settings)}
        from azure.identity import DefaultAzureCredential

        return {**given, "credential": DefaultAzureCredential(exclude_interactive_browser_credential=True)}

    def _remember(self, name: str) -> Any:
        def hook(response: Any) -> None:
            address = response.http_response.headers.get("azure-asyncoperation")
            if address:
                with self._lock:
                    self._operations.pop(name, None)
                    self._operations[name] = address
                    while len(self._operations) > REMEMBERED:
                        del self._operations[next(iter(self._operations))]

        return hook


def _static(settings: Settings) -> dict[str, Any]:
    """Another endpoint gets the test's token, and may be plain HTTP; a real credential never goes there."""
    from azure.core.credentials import AccessToken
    from azure.core.pipeline.policies import SansIOHTTPPolicy

    class Token(SansIOHTTPPolicy[Any, Any]):
        def on_request(self, request: Any) -> None:
            request.http_request.headers["Authorization"] = f"Bearer {settings.token}"

    class Credential:
        def get_token(self, *_: str, **__: Any) -> AccessToken:
            return AccessToken(settings.token, 1 << 40)

    return {
        "credential": Credential(),
        "authentication_policy": Token(),
        "base_url": settings.endpoint,
        "credential_scopes": [f"{settings.endpoint}/.default"],
    }


def _said(error: HttpResponseError) -> Said:
    response: Any = error.response
    if response is None:
        return Said(error.status_code or 0, "", _first_line(error))
    try:
        body: Any = response.json()
    except Exception:  # whatever the body is, it is none of Azure's errors
        body = {"message": _first_line(error)}
    return read_error(body, int(response.status_code), _seconds(response.headers.get("retry-after", "")))


def _seconds(text: str) -> float | None:
    """Of a Retry-After; a date, which ARM does not send, counts as nothing said."""
    try:
        return max(0.0, float(text))
    except ValueError:
        return None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _object(model: Any) -> Object:
    found: Object = model.as_dict()
    return found


def _objects(models: Iterable[Any]) -> list[Object]:
    return [_object(m) for m in models]
