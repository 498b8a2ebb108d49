"""One cluster, spoken to in plain dicts.

The official client does what is hard (kubeconfig, log-in plugins, certificates, tokens that change); its typed models are
left out, because they are slow and drop every field that they do not know. Safe to share between threads.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kaito_core import __version__, foreign_json
from kaito_core.kube.errors import (
    AlreadyExists,
    ApiError,
    Conflict,
    Gone,
    Invalid,
    NotFound,
    TooManyRequests,
    Unreachable,
    error_of,
)
from kaito_core.kube.kinds import PODS, Kind, Object
from kaito_core.problems import UserError

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

MANAGER = "kaito-controller"
"""Who owns the fields that are applied, unless a caller says otherwise."""

CONNECT_SECONDS = 10.0
READ_SECONDS = 60.0
"""The API server gives up a request after 60 seconds itself (``--request-timeout``)."""

POLITE = 3
"""Times that a request is repeated when the server asks to wait (429)."""

LONGEST_WAIT = 10.0
"""Seconds that one such wait may take."""

CONNECTIONS = 32
"""Kept open at most; more threads than that are not meant to share a client."""

BEFORE_ANY = "1"
"""A resource version that no object has: etcd counts from 1 before its first write. An apply with it makes an object, and changes none."""

MERGE, APPLY = "application/merge-patch+json", "application/apply-patch+yaml"

Listed = tuple[list[Object], str]
"""Objects, and the resource version of the list as a whole."""

_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


def connect(context: str = "", kubeconfig: str = "", *, user_agent: str = "kaito") -> Client:
    """The cluster of a kubeconfig context, of the current one, or, in a pod, the pod's own.

    UserError when there is no such context, or nothing that says where a cluster is. Does not talk to the cluster."""
    import yaml
    from kubernetes import client as k8s
    from kubernetes import config as loading
    from kubernetes.config.config_exception import ConfigException

    configuration = k8s.Configuration()
    configuration.connection_pool_maxsize = CONNECTIONS
    # A retry of a write that was cut off would be a second write; who calls knows better what to do.
    configuration.retries = False
    name, namespace = "", "default"
    try:
        if context or kubeconfig or not _in_a_pod():
            contexts, current = loading.list_kube_config_contexts(kubeconfig or None)
            wanted = next((c for c in contexts if c["name"] == context), None) if context else current
            if wanted is None:
                known = ", ".join(sorted(c["name"] for c in contexts)) or "none"
                raise UserError(f"the kubeconfig has no context {context!r}", f"contexts: {known}")
            name = wanted["name"]
            namespace = (wanted.get("context") or {}).get("namespace") or "default"
            loading.load_kube_config(
                kubeconfig or None, context=name, client_configuration=configuration, persist_config=False
            )
        else:
            loading.load_incluster_config(configuration)
            name = "this pod's cluster"
            with suppress(OSError):
                namespace = (_SERVICE_ACCOUNT / "namespace").read_text().strip()
    except (ConfigException, yaml.YAMLError, OSError, TypeError, AttributeError, KeyError, ValueError) as e:
        raise UserError(
            f"there is no usable cluster configuration: {e}",
            "set KUBECONFIG or use --kubeconfig; `kubectl config view` shows what there is",
        ) from e
    api = k8s.ApiClient(configuration)
    api.user_agent = f"kaito/{__version__} ({user_agent})"
    return Client(api, name, namespace)


def _in_a_pod() -> bool:
    return bool(os.environ.get("KUBERNETES_SERVICE_HOST")) and (_SERVICE_ACCOUNT / "token").is_file()


class Client:
    """One cluster. Every method raises `ApiError`, or a child of it, when the answer is no."""

    def __init__(self, api: ApiClient, context: str, namespace: str) -> None:
        self._api = api
        self.context = context
        self.namespace = namespace
        """Of the context: where things go that say nothing else."""
        self.host = str(api.configuration.host)
        self.on_answer: Callable[[int, str, str], None] | None = None
        """Told of every answer: the HTTP status (0: there was none), the method, the host."""

    # --- reading

    def get(self, kind: Kind, name: str, namespace: str = "") -> Object | None:
        """One object; None when there is none."""
        try:
            return self._object("GET", kind.path(namespace, name), f"get {_named(kind, name, namespace)}")
        except NotFound:
            return None

    def list(self, kind: Kind, namespace: str = "", *, labels: str = "", fields: str = "", page: int = 500) -> Listed:
        """All objects, page by page, and the resource version of the list. Begins anew when a page came too late."""
        while True:
            with suppress(Gone):
                return self._pages(kind, namespace, {"labelSelector": labels, "fieldSelector": fields}, page)

    def _pages(self, kind: Kind, namespace: str, selection: Mapping[str, str], page: int) -> Listed:
        found: Any = []
        onward = ""
        while True:
            query = {**selection, "limit": str(page), "continue": onward}
            answer = self._object("GET", kind.path(namespace), f"list {_named(kind, '', namespace)}", query=query)
            items = answer.get("items") or []
            for item in items:  # a list leaves out of its items what they all have
                item.setdefault("apiVersion", kind.api_version)
                item.setdefault("kind", kind.kind)
            found += items
            onward = answer["metadata"].get("continue", "")
            if not onward:
                return found, str(answer["metadata"].get("resourceVersion", ""))

    def watch(
        self,
        kind: Kind,
        namespace: str = "",
        *,
        resource_version: str,
        labels: str = "",
        fields: str = "",
        seconds: int = 300,
    ) -> Watch:
        """Changes since that version, as (``ADDED``, ``MODIFIED``, ``DELETED`` or ``BOOKMARK``, object); for so long."""
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": resource_version,
            "timeoutSeconds": str(seconds),
            "labelSelector": labels,
            "fieldSelector": fields,
        }
        what = f"watch {_named(kind, '', namespace)}"
        # Bookmarks come every minute or so; a connection that is silent for longer than the server would wait is dead.
        response = self._request("GET", kind.path(namespace), what, query=query, read=seconds + 15.0)
        return Watch(response.response, what)

    def logs(
        self,
        pod: str,
        namespace: str,
        container: str,
        *,
        tail: int | None = None,
        follow: bool = False,
        previous: bool = False,
        since_seconds: int | None = None,
    ) -> Iterator[str]:
        """The lines of a container's log, without line ends; with ``follow`` as long as it goes on."""
        query = {
            "container": container,
            "tailLines": "" if tail is None else str(tail),
            "follow": "true" if follow else "",
            "previous": "true" if previous else "",
            "sinceSeconds": "" if since_seconds is None else str(since_seconds),
        }
        what = f"read the log of pods {namespace}/{pod} ({container})"
        # The kubelet is silent for as long as the container is.
        read = 3600.0 if follow else READ_SECONDS
        response = self._request("GET", PODS.path(namespace, pod, "log"), what, query=query, read=read)
        return (line.decode(errors="replace") for line in _lines(response.response, what))

    def version(self) -> str:
        """The API server's version: ``v1.33.1``."""
        return str(self._object("GET", "/version", "ask for the version").get("gitVersion", ""))

    def serves(self, kind: Kind) -> bool:
        """Whether the API server knows this kind of object."""
        root = "/apis" if kind.group else "/api"
        try:
            known = self._object("GET", f"{root}/{kind.api_version}", f"ask for {kind.api_version}")
        except NotFound:
            return False
        return any(r.get("name") == kind.plural for r in known.get("resources", ()))

    def allowed(self, verb: str, kind: Kind, namespace: str = "", subresource: str = "", name: str = "") -> bool:
        """Whether these credentials may do that."""
        attributes = {"verb": verb, "group": kind.group, "resource": kind.plural, "namespace": namespace,
                      "subresource": subresource, "name": name}  # fmt: skip
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": {k: v for k, v in attributes.items() if v}},
        }
        path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
        answer = self._object("POST", path, "ask what is permitted", body=review)
        return bool(answer.get("status", {}).get("allowed"))

    # --- writing

    def create(self, kind: Kind, obj: Object) -> Object:
        """A new object. `AlreadyExists` when there is one of that name."""
        name, namespace = _place(obj)
        return self._object("POST", kind.path(namespace), f"create {_named(kind, name, namespace)}", body=obj)

    def apply(
        self,
        kind: Kind,
        obj: Object,
        *,
        manager: str = MANAGER,
        force: bool = True,
        subresource: str = "",
        dry_run: bool = False,
        uid: str | None = None,
    ) -> Object:
        """Server-side apply: make these fields so, whether the object was there or not, and leave all others alone.

        With ``uid`` only that very object is changed, and with an empty one only a new object is made; else `Conflict`, and nothing
        is written."""
        name, namespace = _place(obj)
        if uid is not None:
            only = {"uid": uid} if uid else {"resourceVersion": BEFORE_ANY}
            obj = {**obj, "metadata": {**obj["metadata"], **only}}
        query = {"fieldManager": manager, "force": "true" if force else "", "dryRun": "All" if dry_run else ""}
        what = f"apply {_named(kind, name, namespace)}"
        path = kind.path(namespace, name, subresource)
        try:
            return self._object("PATCH", path, what, query=query, body=json.dumps(obj), content=APPLY)
        except Invalid as e:
            if uid and "metadata.uid" in str(e):  # so the API server says that another object has the name now
                raise Conflict(str(e), status=409, reason="Conflict") from e
            raise

    def patch(
        self, kind: Kind, name: str, namespace: str, patch: Mapping[str, Any], *, subresource: str = ""
    ) -> Object:
        """A JSON merge patch (RFC 7386). With ``metadata.resourceVersion`` in it `Conflict` when the object is newer."""
        what = f"patch {_named(kind, name, namespace)}"
        return self._object("PATCH", kind.path(namespace, name, subresource), what, body=dict(patch), content=MERGE)

    def replace(self, kind: Kind, obj: Object, *, subresource: str = "") -> Object:
        """PUT: the object as a whole; `Conflict` when the one there is newer."""
        name, namespace = _place(obj)
        return self._object(
            "PUT", kind.path(namespace, name, subresource), f"replace {_named(kind, name, namespace)}", body=obj
        )

    def delete(
        self,
        kind: Kind,
        name: str,
        namespace: str = "",
        *,
        propagation: str = "Background",
        uid: str = "",
        grace: int | None = None,
    ) -> bool:
        """Ask for its deletion; False when it was gone. With ``uid`` only that very object, never one made since."""
        options: dict[str, Any] = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": propagation}
        if uid:
            options["preconditions"] = {"uid": uid}
        if grace is not None:
            options["gracePeriodSeconds"] = grace
        what = f"delete {_named(kind, name, namespace)}"
        try:
            self._object("DELETE", kind.path(namespace, name), what, body=options)
        except NotFound:
            return False
        except ApiError as e:
            if uid and e.status == 409 and "uid" in str(e).lower():
                return False  # that one is gone; what is there is another
            raise
        return True

    # --- how a request goes

    def _object(
        self,
        method: str,
        path: str,
        what: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        content: str = "application/json",
    ) -> Object:
        response = self._request(method, path, what, query=query, body=body, content=content)
        try:
            found = foreign_json.loads_cut(self._all(response, what))
        except ValueError as e:
            raise ApiError(f"{what}: {self.host} does not answer like an API server") from e
        return found if isinstance(found, dict) else {}

    def _request(
        self,
        method: str,
        path: str,
        what: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        content: str = "application/json",
        read: float = READ_SECONDS,
    ) -> Any:
        """The response, its body not read yet; any answer but a good one is raised."""
        pairs = [(k, v) for k, v in (query or {}).items() if v]
        for attempt in range(POLITE + 1):
            headers = {"Accept": "application/json", "Content-Type": content}
            _, url, headers, _, _ = self._api.param_serialize(
                method, path, header_params=headers, query_params=pairs, auth_settings=["BearerToken"]
            )
            try:
                response = self._api.call_api(method, url, headers, body=body, _request_timeout=(CONNECT_SECONDS, read))
                self._answered(response.status, method)
                if 200 <= response.status < 300:
                    return response
                said = self._all(response, what)
            except Exception as e:
                if not _of_the_network(e):
                    raise
                self._answered(0, method)
                raise self._unreachable(what, e) from e
            error = error_of(response.status, said, what, retry_after=response.headers.get("Retry-After", ""))
            if not isinstance(error, TooManyRequests) or attempt == POLITE:
                raise error
            time.sleep(min(error.retry_after, LONGEST_WAIT))
        raise AssertionError("not reached")

    def _answered(self, status: int, method: str) -> None:
        if self.on_answer is not None:
            self.on_answer(status, method, self.host)

    def _all(self, response: Any, what: str) -> bytes:
        try:
            return bytes(response.read())
        except Exception as e:
            if not _of_the_network(e):
                raise
            raise self._unreachable(what, e) from e

    def _unreachable(self, what: str, error: Exception) -> Unreachable:
        return Unreachable(
            f"{what}: {self.host} (context {self.context}) does not answer: {_cause(error)}",
            remedy="check that the cluster runs and that this machine can reach it",
        )


class Watch:
    """An open watch: iterate over it, and close it from any thread."""

    def __init__(self, response: Any, what: str) -> None:
        self._response = response
        self._what = what
        self._closed = threading.Event()

    def __iter__(self) -> Iterator[tuple[str, Object]]:
        try:
            for line in _lines(self._response, self._what):
                event = foreign_json.loads_cut(line)
                if event["type"] == "ERROR":
                    status = event["object"]
                    raise error_of(int(status.get("code", 0)), json.dumps(status).encode(), self._what)
                yield event["type"], event["object"]
        except (ApiError, ValueError):
            if not self._closed.is_set():
                raise
        finally:
            self._response.close()

    def close(self) -> None:
        """End it now, also while another thread waits for the next event."""
        self._closed.set()
        with suppress(Exception):  # it may have ended by itself
            self._response.shutdown()


def _lines(response: Any, what: str) -> Iterator[bytes]:
    """Whole lines of a body that comes bit by bit; a last one without an end counts."""
    rest = b""
    try:
        for chunk in response.stream(65536, decode_content=True):
            *whole, rest = (rest + chunk).split(b"\n")
            yield from (line for line in whole if line)
        if rest:
            yield rest
    except Exception as e:
        if not _of_the_network(e):
            raise
        raise Unreachable(f"{what}: the connection ended: {_cause(e)}") from e
    finally:
        response.release_conn()


def _of_the_network(error: Exception) -> bool:
    from kubernetes.client.exceptions import ApiException
    from urllib3.exceptions import HTTPError

    return isinstance(error, HTTPError | OSError | ApiException)


def _cause(error: Exception) -> str:
    reason = getattr(error, "reason", None) or error
    return str(getattr(reason, "reason", None) or reason).split("\n")[-1]


def _place(obj: Object) -> tuple[str, str]:
    metadata = obj["metadata"]
    return metadata["name"], metadata.get("namespace", "")


def _named(kind: Kind, name: str, namespace: str) -> str:
    """``jobs.batch default/one``."""
    where = f"{namespace}/{name}" if namespace and name else namespace or name
    return f"{kind} {where}".rstrip()


__all__ = ["AlreadyExists", "Client", "Watch", "connect"]
