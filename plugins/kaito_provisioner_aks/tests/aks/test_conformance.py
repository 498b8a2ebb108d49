"""kaito's own conformance kit, against Azure as `arm_server` knows it, without the network."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, ClassVar

import pytest

from kaito_core.plugins.types import (
    InsufficientCapacity,
    NodeProvisioner,
    NotAuthorized,
    ProvisioningError,
    QuotaExceeded,
    Requirements,
    Transient,
    Unsupported,
)
from kaito_core.testing.conformance import NodeProvisionerTests
from kaito_provisioner_aks.errors import Refused, Said, read_error
from kaito_provisioner_aks.provisioner import AksNodes
from kaito_provisioner_aks.testing import arm_server
from kaito_provisioner_aks.testing.arm_server import TOKEN, Answer, Cloud

from .test_life import PATH, Direct
from .world import SIZE, Nodes

SAYS = {
    InsufficientCapacity: "sku",
    QuotaExceeded: "quota",
    NotAuthorized: "authorization",
    Unsupported: "size",
    Transient: "throttled",
}
ENVIRON = {"KAITO_AKS_SUBSCRIPTION": "s", "KAITO_AKS_RESOURCE_GROUP": "g", "KAITO_AKS_CLUSTER": "c"}


class Azure(Direct):
    """The edge, and what the kit asks of a cloud."""

    def __init__(self) -> None:
        self.now, self.lost, self.nodes = 0.0, 0, Nodes()
        self.cloud = Cloud(
            create_seconds=60,
            delete_seconds=60,
            on_created=self.nodes.join,
            on_deleted=self.nodes.leave,
            clock=lambda: self.now,
        )
        super().__init__(self.cloud)

    def make(self) -> NodeProvisioner:
        made = AksNodes(ENVIRON, edge=self, clock=lambda: self.now + 1_780_000_000)
        made.attach(self.nodes)
        return made

    def fail_next(self, failure: ProvisioningError) -> None:
        self.cloud.fail("put", SAYS[type(failure)])

    def lose_answer_next(self) -> None:
        self.lost += 1

    def machines(self) -> Collection[str]:
        return [n for pool in self.cloud.pools.values() for n in arm_server.node_names(pool)]

    def advance(self) -> None:
        self.now += 30
        self.cloud.tick()

    def _ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        sent = {"authorization": f"Bearer {TOKEN}", **{k.replace("_", "-"): v for k, v in headers.items()}}
        answer = self.cloud.handle(method, f"{PATH}{path}?api-version=2026-08-01", sent, json.loads(json.dumps(body)))
        if method in ("PUT", "DELETE") and self.lost and answer.status < 400:
            self.lost -= 1
            raise Refused(Said(0, "", "the connection was cut"))
        if answer.status >= 400:
            wait = answer.headers.get("retry-after")
            raise Refused(read_error(answer.body, answer.status, float(wait) if wait else None))
        return answer


class TestAks(NodeProvisionerTests):
    plugin = "kaito_provisioner_aks.plugin"
    requirements = Requirements(instance_types=(SIZE,))
    capabilities: ClassVar = {
        "spot": True,
        "several": True,
        "lost_answers": True,
        "retry_after": True,
        "insufficient_capacity": True,
        "quota_exceeded": True,
        "not_authorized": True,
        "unsupported": True,
        "transient": True,
    }

    @pytest.fixture
    def cloud(self) -> Azure:
        return Azure()
