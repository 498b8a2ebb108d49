"""An Azure Resource Manager for tests: the agent pools of one AKS cluster, its quotas and its sizes, over real HTTP.

It answers as Azure does: status codes, lower-case headers, signed addresses of operations, AKS's flat errors beside the front
door's wrapped ones, pages, eTags. Time passes as it is told to, and everything that goes wrong in Azure goes wrong on demand.

    with ArmServer(create_seconds=2, on_created=join_nodes, on_deleted=remove_nodes) as azure:
        azure.cloud.fail("put", "quota", times=1)
        subprocess.Popen([…, "controller"], env={**os.environ, **azure.environment})

`Cloud` is the same without HTTP and without threads, for tests of thousands of steps. As a program:

    python -m kaito_provisioner_aks.testing.arm_server --port 8900 --create-seconds 5 --on-created ./join.sh

There ``POST /_test/faults`` takes faults as JSON, and ``GET /_test/calls`` and ``GET /_test/pools`` say what was."""

from __future__ import annotations

import argparse
import base64
import json
import re
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, quote, urlsplit

Object = dict[str, Any]

SUBSCRIPTION = "00000000-0000-0000-0000-000000000000"
GROUP, CLUSTER, LOCATION = "kaito-test", "kaito-test", "eastus"
TOKEN = "kaito-test"  # noqa: S105 – the only one that is let in

SIZES: Mapping[str, tuple[str, int, int]] = {
    "Standard_NC4as_T4_v3": ("Standard NCASv3_T4 Family", 4, 1),
    "Standard_NC16as_T4_v3": ("Standard NCASv3_T4 Family", 16, 1),
    "Standard_NC64as_T4_v3": ("Standard NCASv3_T4 Family", 64, 4),
    "Standard_NC6s_v3": ("standardNCSv3Family", 6, 1),
    "Standard_NC24s_v3": ("standardNCSv3Family", 24, 4),
    "Standard_NC24ads_A100_v4": ("StandardNCADSA100v4Family", 24, 1),
    "Standard_NC48ads_A100_v4": ("StandardNCADSA100v4Family", 48, 2),
    "Standard_NC96ads_A100_v4": ("StandardNCADSA100v4Family", 96, 4),
    "Standard_NC40ads_H100_v5": ("standardNCadsH100v5Family", 40, 1),
    "Standard_NC80adis_H100_v5": ("standardNCadsH100v5Family", 80, 2),
    "Standard_NV36ads_A10_v5": ("StandardNVADSA10v5Family", 36, 1),
    "Standard_D4s_v3": ("standardDSv3Family", 4, 0),
}
"""(family, vCPUs, GPUs) of the sizes that there are."""

CALLS = ("put", "get", "list", "delete", "cluster", "usages", "skus", "operation")

ALLOCATION = (
    "Allocation failed. We do not have sufficient capacity for the requested VM size in this region. Read more about improving "
    "likelihood of allocation success at http://aka.ms/allocation-guidance"
)

_NAME = re.compile(r"[a-z][a-z0-9]{0,11}\Z")
_TAG = re.compile(r"[^<>%&\\?/]+\Z")


@dataclass(frozen=True)
class Answer:
    """An answer: what is sent, or ``cut``: nothing, the connection ends."""

    status: int
    body: Object | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: bool = False


@dataclass(frozen=True)
class Fault:
    """What goes wrong at a call.

    ``kind`` is a key of `REFUSALS` (nothing is done), or
    ``lost``: it is done, and the connection is cut;  ``cut``: nothing is done, and the connection is cut;
    ``hang``: it takes ``seconds`` longer;  ``stale``: a look is answered as it was before the last change;
    ``stuck``: the pool that this PUT makes never leaves Creating;
    ``broken``: the pool that this PUT makes ends as Failed, for ``code`` and ``message``; ``silent`` as well, and does not say why."""

    call: str
    kind: str
    times: int = 1
    """0: always."""
    name: str = ""
    """Of the pool that it happens to; empty: any."""
    seconds: float = 0.0
    code: str = "AllocationFailed"
    message: str = ALLOCATION

    def __post_init__(self) -> None:
        known = {*REFUSALS, "lost", "cut", "hang", "stale", "stuck", "broken", "silent"}
        if self.kind not in known or self.call not in CALLS:
            raise ValueError(f"{self.call}: {self.kind} is none of {sorted(known)} at one of {CALLS}")


def flat(status: int, code: str, message: str, subcode: str = "", **headers: str) -> Answer:
    """An error of AKS's own."""
    return Answer(status, {"code": code, "details": None, "message": message, "subcode": subcode}, _headers(headers))


def wrapped(status: int, code: str, message: str, **headers: str) -> Answer:
    """An error of ARM's front door, or of Compute."""
    return Answer(status, {"error": {"code": code, "message": message}}, _headers(headers))


def _headers(given: Mapping[str, str]) -> dict[str, str]:
    return {k.replace("_", "-"): v for k, v in given.items()}


_AUTHORIZATION = (
    "The client 'c' with object id 'o' does not have authorization to perform action "
    "'Microsoft.ContainerService/managedClusters/agentPools/write' over scope '/subscriptions/s' or the scope is invalid. If "
    "access was recently granted, please refresh your credentials."
)
_PENDING = "please wait for it to finish before starting a new operation. See https://aka.ms/aks-pending-operation for more details"

REFUSALS: Mapping[str, Answer] = {
    "quota": flat(400, "ErrCode_InsufficientVCPUQuota", "Insufficient vcpu quota requested 24, remaining 6 for family "
                  "StandardNCADSA100v4Family for region eastus. If you want to increase the quota, please follow this instruction."),
    "regional-quota": flat(400, "ErrCode_InsufficientVCPUQuota", "Insufficient regional vcpu quota left for location eastus. left "
                           "regional vcpu quota 4, requested quota 24. If you want to increase the quota, please follow this instruction."),
    "spot-quota": wrapped(409, "OperationNotAllowed", "Operation could not be completed as it results in exceeding approved "
                          "LowPriorityCores quota. Additional details - Deployment Model: Resource Manager, Location: eastus, Current "
                          "Limit: 0, Current Usage: 0, Additional Required: 24, (Minimum) New Limit Required: 24."),
    "size": flat(400, "BadRequest", "The VM size of Standard_NC24ads_A100_v4 is not allowed in your subscription in location "
                 "'eastus'. The available VM sizes are 'standard_b16pls_v2,standard_b2ats_v2'"),
    "zone": flat(400, "AvailabilityZoneNotSupported", "Preflight validation check for resource(s) failed. Message: The zone(s) '1' "
                 "for resource 'pool' is not supported.The supported zones for location 'eastus' are '2', '3'"),
    "sku": wrapped(409, "SkuNotAvailable", "The requested VM size for resource 'Following SKUs have failed for Capacity "
                   "Restrictions: Standard_NC24ads_A100_v4' is currently not available in location 'eastus'. Please try another size "
                   "or deploy to a different location or different zone. See https://aka.ms/azureskunotavailable for details."),
    "preflight": flat(400, "InvalidTemplateDeployment", "Provisioning of resource(s) for Agent Pool p failed. Error: "
                      '{"code":"InvalidTemplateDeployment","message":"The template deployment failed","details":[{"code":'
                      '"QuotaExceeded","message":"Operation could not be completed as it results in exceeding approved Cores quota"}]}'),
    "parameter": flat(400, "InvalidParameter", "The value of parameter agentPoolProfile.name is invalid. Please see "
                      "https://aka.ms/aks-naming-rules for more details."),
    "policy": wrapped(403, "RequestDisallowedByPolicy", "Resource 'p' was disallowed by policy."),
    "busy": flat(409, "OperationNotAllowed", f"Operation is not allowed: Another operation (Updating) is in progress, {_PENDING}"),
    "throttled": flat(429, "Throttled", "The PutManagedClusterHandler.PUT request limit has been exceeded for SubID='s', please "
                      "retry again in 17 seconds. For more information, please visit aka.ms/aks/throttling", retry_after="17"),
    "arm-throttled": wrapped(429, "SubscriptionRequestsThrottled", "Number of requests exceeded the limit.", retry_after="3"),
    "authorization": wrapped(403, "AuthorizationFailed", _AUTHORIZATION),
    "expired": wrapped(401, "ExpiredAuthenticationToken", "The access token expiry UTC time is earlier than current UTC time."),
    "no-cluster": wrapped(404, "ResourceNotFound", "The Resource 'Microsoft.ContainerService/managedClusters/kaito-test' under "
                          "resource group 'kaito-test' was not found. For more details please go to https://aka.ms/ARMResourceNotFoundFix"),
    "error": flat(500, "InternalOperationError", "An internal server error occurred"),
    "unavailable": Answer(503, None, {"retry-after": "5"}),
    "absent": flat(404, "NotFound", "Could not find the agentpool", "GetAgentPool_NotFound"),
}  # fmt: skip
"""What Azure refuses with, in its words."""


@dataclass
class Pool:
    """An agent pool as Azure has it."""

    name: str
    properties: Object
    due: float | None
    """When what goes on with it ends; None: never."""
    operation: str = ""
    outcome: tuple[str, str, bool] | None = None
    """(code, message, whether it says so) of what it will fail of."""
    before: Object | None = None
    """As it was answered before the last change; None: not at all."""
    number: int = 0
    """The eight digits in the names of its nodes."""


Created = Callable[[Object], None]
Deleted = Callable[[str], None]


class Cloud:
    """Azure, without a network. Time passes in `tick`. Safe between threads; callbacks are called without a lock."""

    def __init__(
        self,
        *,
        subscription: str = SUBSCRIPTION,
        group: str = GROUP,
        cluster: str = CLUSTER,
        location: str = LOCATION,
        create_seconds: float = 0.0,
        delete_seconds: float = 0.0,
        limits: Mapping[str, int] | None = None,
        page: int = 100,
        on_created: Created | None = None,
        on_deleted: Deleted | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``limits``: vCPUs by family, or by ``cores`` and ``lowPriorityCores``; those that are not named are 1000."""
        self.location = location
        self.create_seconds, self.delete_seconds = create_seconds, delete_seconds
        self.limits = dict(limits or {})
        self.page = page
        self.restrictions: dict[str, list[Object]] = {}
        """By size, as `restrictions` of the SKU."""
        self.url = "https://management.azure.com"
        self.faults: list[Fault] = []
        self.calls: list[tuple[str, str, int]] = []
        """(call, pool, status of the answer), in order; 0: the connection was cut."""
        self.created: list[str] = []
        """The name of every pool that was ever made, in order."""
        self.on_created, self.on_deleted = on_created, on_deleted
        self._clock = clock
        self._root = f"/subscriptions/{subscription}"
        self._cluster_path = (
            f"{self._root}/resourceGroups/{group}/providers/Microsoft.ContainerService/managedClusters/{cluster}"
        )
        self._pools: dict[str, Pool] = {}
        self._gone: dict[str, Object] = {}
        """The last answer about pools that are no more, for stale looks."""
        self._operations: dict[str, Object] = {}
        self._lock = threading.RLock()

    # --- what a test tells it and asks it

    def fail(self, call: str, kind: str, times: int = 1, **more: Any) -> None:
        """The next calls go wrong; see `Fault`."""
        with self._lock:
            self.faults.append(Fault(call, kind, times, **more))

    def heal(self) -> None:
        """Nothing goes wrong any more, and what is stuck goes on."""
        with self._lock:
            self.faults.clear()
            for pool in self._pools.values():
                pool.due = self._clock() if pool.due is None else pool.due

    @property
    def pools(self) -> dict[str, Object]:
        """What there is, as a look at it is answered."""
        with self._lock:
            return {n: self._shown(p) for n, p in self._pools.items()}

    def evict(self, name: str) -> None:
        """A pool's machines are taken away: it stays, and looks as before."""
        if self.on_deleted is not None:
            self.on_deleted(name)

    def break_pool(self, name: str, code: str, message: str = "") -> None:
        """What is there fails now, by itself."""
        with self._lock:
            self._settle(self._pools[name], "Failed", (code, message, True))

    def tick(self) -> None:
        """Whatever is due happens now."""
        with self._lock:
            now = self._clock()
            due = [p for p in self._pools.values() if p.due is not None and p.due <= now]
            done = [(p, p.properties["provisioningState"], self._shown(p)) for p in due]
            for pool in due:
                pool.due = None
        for pool, state, shown in done:
            if state == "Deleting":
                if self.on_deleted is not None:
                    self.on_deleted(pool.name)
                with self._lock:
                    self._gone[pool.name] = shown
                    self._operations[pool.operation]["status"] = "Succeeded"
                    self._pools.pop(pool.name, None)
                continue
            # Machines join before the pool is done.
            if pool.outcome is None and self.on_created is not None:
                self.on_created(shown)
            with self._lock:
                if pool.properties["provisioningState"] == state:  # nobody deletes it meanwhile
                    self._settle(pool, "Failed" if pool.outcome else "Succeeded", pool.outcome)

    def _settle(self, pool: Pool, state: str, outcome: tuple[str, str, bool] | None) -> None:
        self._changed(pool, state)
        operation = self._operations.setdefault(pool.operation, {"name": pool.operation})
        operation["status"] = state
        pool.properties.pop("status", None)
        if outcome is not None:
            code, message, says = outcome
            error = {"code": code, "message": message}
            if says:
                pool.properties["status"] = {"provisioningError": error}
            operation["error"] = {
                "code": "ResourceOperationFailure",
                "message": "The resource operation completed with terminal provisioning state 'Failed'.",
                "details": [error],
            }

    def _changed(self, pool: Pool, state: str) -> None:
        pool.before = self._shown(pool)
        pool.properties |= {"provisioningState": state, "eTag": str(uuid.uuid4())}

    # --- requests

    def handle(self, method: str, url: str, headers: Mapping[str, str], body: Object | None = None) -> Answer:
        """One request. ``headers`` in lower case; what may take long takes so here."""
        parts = urlsplit(url)
        query = {k: v[0] for k, v in parse_qs(parts.query).items()}
        call, name = self._call_of(method, parts.path)
        with self._lock:
            fault = self._next_fault(call, name)
        if fault is not None and fault.kind == "hang":
            time.sleep(fault.seconds)
        with self._lock:
            answer = self._answer(call, name, parts.path, query, headers, body, fault)
            if fault is not None and fault.kind in ("lost", "cut"):
                answer = Answer(0, cut=True)
            self.calls.append((call or f"{method} {parts.path}", name, answer.status))
            return answer

    def _call_of(self, method: str, path: str) -> tuple[str, str]:
        low, cluster, root = path.lower(), self._cluster_path.lower(), self._root.lower()
        if low == cluster and method == "GET":
            return "cluster", ""
        if low == f"{cluster}/agentpools" and method == "GET":
            return "list", ""
        if low.startswith(f"{cluster}/agentpools/"):
            name = path[len(cluster) + len("/agentpools/") :]
            return {"GET": "get", "PUT": "put", "DELETE": "delete"}.get(method, ""), name
        if method == "GET" and low.startswith(f"{root}/providers/microsoft.compute/"):
            return ("skus" if low.endswith("/skus") else "usages" if low.endswith("/usages") else ""), ""
        if method == "GET" and "/operations/" in low:
            return "operation", ""
        return "", ""

    def _next_fault(self, call: str, name: str) -> Fault | None:
        for number, fault in enumerate(self.faults):
            if fault.call == call and fault.name in ("", name):
                if fault.times == 1:
                    del self.faults[number]
                elif fault.times:
                    self.faults[number] = Fault(**{**vars(fault), "times": fault.times - 1})
                return fault
        return None

    def _answer(
        self,
        call: str,
        name: str,
        path: str,
        query: Mapping[str, str],
        headers: Mapping[str, str],
        body: Object | None,
        fault: Fault | None,
    ) -> Answer:
        if headers.get("authorization") != f"Bearer {TOKEN}":
            return wrapped(401, "InvalidAuthenticationToken", "The access token is invalid.")
        if "api-version" not in query:
            return wrapped(
                400, "MissingApiVersionParameter", "The api-version query parameter (?api-version=) is required."
            )
        if fault is not None and fault.kind in REFUSALS:
            return REFUSALS[fault.kind]
        if fault is not None and fault.kind == "cut":
            return Answer(0, cut=True)
        match call:
            case "get":
                return self._get(name, stale=fault is not None and fault.kind == "stale")
            case "put":
                return self._put(name, body or {}, headers, fault)
            case "delete":
                return self._delete(name)
            case "list":
                return self._paged(path, [self._shown(p) for p in self._pools.values()], query)
            case "cluster":
                return Answer(200, {"id": self._cluster_path, "name": self._cluster_path.rpartition("/")[2],
                                    "location": self.location, "properties": {
                                        "provisioningState": "Succeeded", "powerState": {"code": "Running"}}})  # fmt: skip
            case "usages":
                return self._paged(path, self._usages(), query)
            case "skus":
                return self._paged(path, self._skus(), query)
            case "operation":
                return self._operation(path, query)
        return wrapped(404, "InvalidResourceType", f"The resource type could not be found: {path}")

    # --- agent pools

    def _get(self, name: str, *, stale: bool) -> Answer:
        pool = self._pools.get(name)
        shown = self._shown(pool) if pool else None
        if stale:
            shown = pool.before if pool else self._gone.get(name)
        return Answer(200, shown) if shown else REFUSALS["absent"]

    def _put(self, name: str, body: Object, headers: Mapping[str, str], fault: Fault | None) -> Answer:
        pool = self._pools.get(name)
        if refusal := _condition(pool, headers):
            return refusal
        if pool is not None and (state := pool.properties["provisioningState"]) not in (
            "Succeeded",
            "Failed",
            "Canceled",
        ):
            if state == "Deleting":
                return flat(409, "OperationNotAllowed", f"Unable to perform 'Updating' operation on '{name}' since deletion was issued "
                            f"on '{name}'. The only allowed operation is deletion once deletion has started.")  # fmt: skip
            words = f"Another agentpool operation ({name} - {state}) is in progress, {_PENDING}"
            return flat(409, "OperationNotAllowed", f"Operation is not allowed: {words}")
        wanted: Object = body.get("properties") or {}
        if refusal := _invalid(name, wanted) or self._beyond_quota(wanted, pool):
            return refusal
        status, state = 200, "Updating"
        if pool is None:
            status, state = 201, "Creating"
            pool = self._pools[name] = Pool(name, {}, None, number=10_000_000 + len(self.created))
            self.created.append(name)
        else:
            pool.before = self._shown(pool)
        pool.properties = _filled(wanted) | {"provisioningState": state, "eTag": str(uuid.uuid4())}
        pool.operation, pool.outcome = str(uuid.uuid4()), None
        pool.due = self._clock() + self.create_seconds
        if fault is not None and fault.kind == "stuck":
            pool.due = None
        if fault is not None and fault.kind in ("broken", "silent"):
            pool.outcome = (fault.code, fault.message, fault.kind == "broken")
        return Answer(status, self._shown(pool), self._begun(pool.operation))

    def _delete(self, name: str) -> Answer:
        pool = self._pools.get(name)
        if pool is None:
            return Answer(204)
        if pool.properties["provisioningState"] != "Deleting":
            self._changed(pool, "Deleting")
            if pool.operation in self._operations:
                self._operations[pool.operation] |= {"status": "Canceled", "error": {
                    "code": "AKSOperationPreemptedByDelete",
                    "message": "This operation has been preempted by Deleting operation."}}  # fmt: skip
            pool.operation = str(uuid.uuid4())
            pool.due = self._clock() + self.delete_seconds
        headers = self._begun(pool.operation)
        return Answer(
            202,
            None,
            {**headers, "location": headers["azure-asyncoperation"].replace("/operations/", "/operationresults/")},
        )

    def _shown(self, pool: Pool) -> Object:
        # Azure spells the group of its answers in lower case.
        where = self._cluster_path.replace("/resourceGroups/", "/resourcegroups/")
        return {
            "id": f"{where}/agentPools/{pool.name}",
            "name": pool.name,
            "type": "Microsoft.ContainerService/managedClusters/agentPools",
            "properties": json.loads(json.dumps(pool.properties)),
            "x-number": pool.number,
        }

    def _beyond_quota(self, wanted: Object, pool: Pool | None) -> Answer | None:
        family, cpus, _ = SIZES.get(wanted.get("vmSize", ""), ("", 0, 0))
        spot = wanted.get("scaleSetPriority") == "Spot"
        needed = cpus * int(wanted.get("count") or 1)
        if pool is not None or not family:
            return None
        for quota in ("lowPriorityCores",) if spot else (family, "cores"):
            left = self.limits.get(quota, 1000) - self._used(quota)
            if needed > left:
                words = f"Insufficient vcpu quota requested {needed}, remaining {left} for family {quota} for region {self.location}."
                return flat(400, "ErrCode_InsufficientVCPUQuota", f"{words} If you want to increase the quota, please follow this "
                            "instruction. Surge nodes would also consume vcpu quota.")  # fmt: skip
        return None

    def _used(self, quota: str) -> int:
        used = 0
        for pool in self._pools.values():
            family, cpus, _ = SIZES.get(pool.properties["vmSize"], ("", 0, 0))
            spot = pool.properties.get("scaleSetPriority") == "Spot"
            if quota == "lowPriorityCores" if spot else quota in (family, "cores"):
                used += cpus * pool.properties["count"]
        return used

    # --- the rest

    def _begun(self, operation: str) -> dict[str, str]:
        signature = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._operations[operation] = {
            "name": operation,
            "status": "InProgress",
            "startTime": started,
            "signature": signature,
        }
        where = f"{self.url}{self._root}/providers/Microsoft.ContainerService/locations/{self.location}/operations/{operation}"
        return {
            "azure-asyncoperation": f"{where}?api-version=2016-03-30&t=638000000000000000&c={quote('MIIH+/==')}&s={signature}&h=x",
            "x-ms-ratelimit-remaining-subscription-writes": "1199",
        }

    def _operation(self, path: str, query: Mapping[str, str]) -> Answer:
        found = self._operations.get(path.rpartition("/")[2])
        if found is None or query.get("s") != found.get("signature"):
            return wrapped(404, "OperationNotFound", "The operation was not found.")
        return Answer(200, {k: v for k, v in found.items() if k != "signature"})

    def _usages(self) -> list[Object]:
        families = dict.fromkeys(["cores", "lowPriorityCores", *(family for family, _, _ in SIZES.values())])
        return [
            {
                "unit": "Count",
                "currentValue": self._used(name),
                "limit": self.limits.get(name, 1000),
                "name": {"value": name, "localizedValue": f"{name} vCPUs"},
            }
            for name in families
        ]

    def _skus(self) -> list[Object]:
        return [
            {
                "resourceType": "virtualMachines",
                "name": size,
                "family": family,
                "locations": [self.location],
                "locationInfo": [{"location": self.location, "zones": ["1", "2", "3"]}],
                "capabilities": [
                    {"name": "vCPUs", "value": str(cpus)},
                    {"name": "GPUs", "value": str(gpus)},
                    {"name": "LowPriorityCapable", "value": "True"},
                ],
                "restrictions": self.restrictions.get(size, []),
            }
            for size, (family, cpus, gpus) in SIZES.items()
        ]

    def _paged(self, path: str, items: Sequence[Object], query: Mapping[str, str]) -> Answer:
        at = int(query.get("$skiptoken", "0"))
        body: Object = {"value": list(items[at : at + self.page])}
        if at + self.page < len(items):
            rest = "".join(
                f"&{quote(k)}={quote(v)}" for k, v in query.items() if k not in ("api-version", "$skiptoken")
            )
            body["nextLink"] = (
                f"{self.url}{path}?api-version={query['api-version']}{rest}&%24skiptoken={at + self.page}"
            )
        return Answer(200, body)


def _condition(pool: Pool | None, headers: Mapping[str, str]) -> Answer | None:
    """What if-match and if-none-match say; None: go on."""
    wanted = headers.get("if-match", "").strip('"')
    if headers.get("if-none-match") == "*" and pool is not None:
        return flat(412, "PreconditionFailed", "The resource exists, and the request is to create it.")
    if wanted and pool is None:
        return flat(412, "PreconditionFailed", "Resource not found but ETag header is provided. If this is a request to create, "
                    "please do not provide ETag.")  # fmt: skip
    if wanted not in ("", "*") and pool is not None and wanted != pool.properties["eTag"]:
        return flat(412, "PreconditionFailed", "The ETag does not match the one of the resource.")
    return None


def _invalid(name: str, wanted: Object) -> Answer | None:
    if not _NAME.match(name):
        return REFUSALS["parameter"]
    if any(
        k.split("/")[0].endswith(("kubernetes.azure.com", "kubernetes.io"))
        for k in wanted.get("nodeLabels") or {}
        if "/" in k
    ):
        return flat(
            400, "InvalidParameter", "The value of parameter agentPoolProfile.nodeLabels is invalid: a reserved prefix."
        )
    if not all(_TAG.match(t) for t in wanted.get("tags") or {}):
        return wrapped(
            400,
            "InvalidTagNameCharacters",
            "The tag names have reserved characters '<,>,%,&,\\,?,/' or control characters.",
        )
    if not 0 <= int(wanted.get("count") or 0) <= 1000 or not wanted.get("vmSize"):
        return flat(400, "InvalidParameter", "The value of parameter agentPoolProfile.count or vmSize is invalid.")
    return None


def _filled(wanted: Object) -> Object:
    """What was asked for, with what AKS adds."""
    filled = {
        "osDiskSizeGB": 128, "kubeletDiskType": "OS", "maxPods": 110, "powerState": {"code": "Running"}, "orchestratorVersion": "1.33.1",
        "currentOrchestratorVersion": "1.33.1", "enableNodePublicIP": False, "upgradeSettings": {},
        "nodeImageVersion": "AKSUbuntu-2204gen2containerd-202608.10.0", **wanted,
    }  # fmt: skip
    if filled.get("scaleSetPriority") == "Spot":
        filled["nodeLabels"] = {**(filled.get("nodeLabels") or {}), "kubernetes.azure.com/scalesetpriority": "spot"}
        filled["nodeTaints"] = [
            *(filled.get("nodeTaints") or ()),
            "kubernetes.azure.com/scalesetpriority=spot:NoSchedule",
        ]
    else:
        filled.pop("scaleSetPriority", None)
    return filled


# --- the machines of a pool, for who lets them join


def node_names(pool: Object) -> list[str]:
    """As AKS calls them: ``aks-POOL-12345678-vmss000000``."""
    return [f"aks-{pool['name']}-{pool['x-number']}-vmss{i:06}" for i in range(pool["properties"]["count"])]


def node_labels(pool: Object, location: str = LOCATION) -> dict[str, str]:
    """The pool's own, and those that AKS gives every node."""
    properties = pool["properties"]
    size, name = properties["vmSize"], pool["name"]
    labels = {
        **(properties.get("nodeLabels") or {}),
        "agentpool": name,
        "kubernetes.azure.com/agentpool": name,
        "kubernetes.azure.com/cluster": f"MC_{GROUP}_{CLUSTER}_{location}",
        "kubernetes.azure.com/mode": "user",
        "kubernetes.azure.com/role": "agent",
        "kubernetes.azure.com/instance-sku": size,
        "node.kubernetes.io/instance-type": size,
        "topology.kubernetes.io/region": location,
        "topology.kubernetes.io/zone": "0",
    }
    if SIZES.get(size, ("", 0, 0))[2] or size.startswith("Standard_N"):
        labels |= {"accelerator": "nvidia", "kubernetes.azure.com/accelerator": "nvidia"}
    return labels


def node_taints(pool: Object) -> list[str]:
    """``key=value:Effect``."""
    return list(pool["properties"].get("nodeTaints") or ())


def node_gpus(pool: Object) -> int:
    """GPUs of one machine."""
    return SIZES.get(pool["properties"]["vmSize"], ("", 0, 0))[2]


def provider_id(pool: Object, number: int) -> str:
    """What the cloud calls the machine, and the Node object with it."""
    scale_set = f"aks-{pool['name']}-{pool['x-number']}-vmss"
    return (
        f"azure:///subscriptions/{SUBSCRIPTION}/resourceGroups/MC_{GROUP}/providers/Microsoft.Compute/"
        f"virtualMachineScaleSets/{scale_set}/virtualMachines/{number}"
    )


# --- over HTTP


class ArmServer:
    """A `Cloud` that is served, and in which time passes by itself, until the block ends."""

    def __init__(self, *, host: str = "127.0.0.1", port: int = 0, public: str = "", **cloud: Any) -> None:
        """``public`` is how clients call this machine, when it is not ``host``; the rest is as for `Cloud`."""
        self.cloud = Cloud(**cloud)
        self._server = _Server((host, port), self.cloud)
        self.port = self._server.server_port
        self.url = self.cloud.url = f"http://{public or host}:{self.port}"
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(
                target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, name="arm-server", daemon=True
            ),
            threading.Thread(target=self._pass_time, name="arm-time", daemon=True),
        ]

    @property
    def environment(self) -> dict[str, str]:
        """What a controller needs to take this for Azure."""
        return {
            "KAITO_AKS_SUBSCRIPTION": SUBSCRIPTION,
            "KAITO_AKS_RESOURCE_GROUP": GROUP,
            "KAITO_AKS_CLUSTER": CLUSTER,
            "KAITO_ARM_ENDPOINT": self.url,
            "KAITO_ARM_TOKEN": TOKEN,
        }

    def start(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def stop(self) -> None:
        self._stop.set()
        self._server.shutdown()
        self._server.server_close()
        self._threads[1].join(30.0)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _pass_time(self) -> None:
        while not self._stop.wait(0.02):
            try:
                self.cloud.tick()
            except Exception as e:  # a test's callback; time goes on
                print(f"a callback failed: {type(e).__name__}: {e}", file=sys.stderr, flush=True)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, at: tuple[str, int], cloud: Cloud) -> None:
        self.cloud = cloud
        super().__init__(at, _Handler)

    def server_bind(self) -> None:
        # Not HTTPServer's: it looks the host's name up, which takes its time where the DNS does not answer.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever asked has gone before the answer was there."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    timeout = 120.0

    def do_GET(self) -> None:
        self._serve()

    do_PUT = do_DELETE = do_POST = do_GET  # noqa: N815 – http.server's names

    def _serve(self) -> None:
        length = int(self.headers.get("content-length") or 0)
        text = self.rfile.read(length) if length else b""
        try:
            body = json.loads(text) if text else None
        except ValueError:
            self._send(
                wrapped(400, "InvalidRequestContent", "The request content was invalid and could not be deserialized.")
            )
            return
        if self.path.startswith("/_test/"):
            self._send(self._test(body))
            return
        self._send(self.server.cloud.handle(self.command, self.path, _lower(self.headers), body))

    def _test(self, body: Any) -> Answer:
        cloud = self.server.cloud
        match self.command, self.path:
            case "POST", "/_test/faults":
                for fault in body if isinstance(body, list) else [body]:
                    cloud.fail(**fault)
                return Answer(200, {"faults": len(cloud.faults)})
            case "POST", "/_test/heal":
                cloud.heal()
                return Answer(200, {})
            case "GET", "/_test/calls":
                return Answer(200, {"calls": cloud.calls, "created": cloud.created})
            case "GET", "/_test/pools":
                return Answer(200, cloud.pools)
        return Answer(404, {})

    def _send(self, answer: Answer) -> None:
        if answer.cut:
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
            return
        content = b"" if answer.body is None else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        for name, value in {**answer.headers, "x-ms-request-id": str(uuid.uuid4())}.items():
            self.send_header(name, value)
        if content:
            self.send_header("content-type", "application/json; charset=utf-8")
        if answer.status != 204:
            self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """`Cloud.calls` has it."""


def _lower(headers: Message) -> dict[str, str]:
    return {k.lower(): v for k, v in headers.items()}


# --- as a program


def _hook(command: str) -> Callable[[Any], None] | None:
    """Runs the command with what it is told as JSON on standard input: the pool, or the name of one."""
    if not command:
        return None

    def run(told: Any) -> None:
        about: Object = told if isinstance(told, dict) else {"name": told}
        if "properties" in about:
            about = {**about, "nodes": node_names(about), "labels": node_labels(about), "taints": node_taints(about)}
        subprocess.run(["sh", "-c", command], input=json.dumps(about), text=True, check=False)

    return run


@contextmanager
def _served(options: argparse.Namespace) -> Iterator[ArmServer]:
    limits = {name: int(limit) for name, _, limit in (given.partition("=") for given in options.limit)}
    with ArmServer(
        host=options.host,
        port=options.port,
        public=options.public,
        location=options.location,
        create_seconds=options.create_seconds,
        delete_seconds=options.delete_seconds,
        limits=limits,
        on_created=_hook(options.on_created),
        on_deleted=_hook(options.on_deleted),
    ) as server:
        for fault in options.fault:
            server.cloud.fail(**json.loads(fault))
        yield server


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until standard input ends or the program is told to stop; prints the environment of a controller first."""
    parser = argparse.ArgumentParser("arm_server", description="An Azure Resource Manager for tests.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--public", default="", help="how clients call this machine, if not by HOST")
    parser.add_argument("--location", default=LOCATION)
    parser.add_argument("--create-seconds", type=float, default=1.0)
    parser.add_argument("--delete-seconds", type=float, default=1.0)
    parser.add_argument("--limit", action="append", default=[], metavar="FAMILY=VCPUS")
    parser.add_argument("--fault", action="append", default=[], metavar="JSON", help='{"call": "put", "kind": "quota"}')
    parser.add_argument("--on-created", default="", metavar="COMMAND", help="gets the pool as JSON on standard input")
    parser.add_argument("--on-deleted", default="", metavar="COMMAND", help='gets {"name": …} on standard input')
    with _served(parser.parse_args(arguments)) as server:
        for name, value in server.environment.items():
            print(f"{name}={value}", flush=True)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
