"""Any order of calls, crashes, lost answers, late looks and failures: one request buys at most one pool at a time, and in the end
none is left.

Azure is the server's own logic, without the network: what the packages do is in test_provisioner.py."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kaito_core.api.labels import WORKSPACE, WORKSPACE_NAMESPACE
from kaito_core.plugins.types import CapacityType, Gpu, NodeRequest, NodeStatus, Offer, ProvisioningError, Requirements
from kaito_provisioner_aks.errors import Refused, Said, kind_of, read_error
from kaito_provisioner_aks.provisioner import AksNodes
from kaito_provisioner_aks.testing import arm_server
from kaito_provisioner_aks.testing.arm_server import REFUSALS, TOKEN, Answer, Cloud, Fault

from .world import Nodes

IDS = ("ws000000001", "ws000000002")
PATH = (
    f"/subscriptions/{arm_server.SUBSCRIPTION}/resourceGroups/{arm_server.GROUP}/providers/Microsoft.ContainerService/"
    f"managedClusters/{arm_server.CLUSTER}"
)


class Direct:
    """The edge without the packages: the same requests, answered by the same logic."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud

    def _ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        sent = {"authorization": f"Bearer {TOKEN}", **{k.replace("_", "-"): v for k, v in headers.items()}}
        answer = self._cloud.handle(method, f"{PATH}{path}?api-version=2026-08-01", sent, body)
        if answer.cut:
            raise Refused(Said(0, "", "cut"))
        if answer.status >= 400:
            raise Refused(read_error(answer.body, answer.status))
        return answer

    def location(self) -> str:
        return self._cloud.location

    def pool(self, name: str) -> dict[str, Any] | None:
        try:
            return self._ask("GET", f"/agentPools/{name}").body
        except Refused as e:
            if e.said.status == 404 and kind_of(e.said) == "absent":
                return None
            raise

    def pools(self) -> list[dict[str, Any]]:
        return list((self._ask("GET", "/agentPools").body or {})["value"])

    def put(self, name: str, body: dict[str, Any], etag: str | None = None) -> None:
        condition = {"if_none_match": "*"} if etag is None else {"if_match": etag or "*"}
        self._ask("PUT", f"/agentPools/{name}", json.loads(json.dumps(body)), **condition)

    def delete(self, name: str) -> bool:
        return self._ask("DELETE", f"/agentPools/{name}").status != 204

    def why_failed(self, name: str) -> Said | None:
        return None

    def usages(self, location: str) -> list[dict[str, Any]]:
        return []

    def skus(self, location: str) -> list[dict[str, Any]]:
        return []


FAULTS = st.builds(
    Fault,
    call=st.sampled_from(["put", "get", "delete", "list"]),
    kind=st.sampled_from([*REFUSALS, "lost", "cut", "stale", "stuck", "broken", "silent"]).filter(
        # The server says that only of a pool that it does not have.
        lambda kind: kind != "absent"
    ),
    times=st.integers(1, 3),
    code=st.sampled_from(["AllocationFailed", "AKSOperationPreempted", "QuotaExceeded", "SomethingNew"]),
)


class Life(RuleBasedStateMachine):
    """Two requests, as a host may make them: an id is asked for until it is released, and never again after that."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.nodes = Nodes()
        self.cloud = Cloud(
            create_seconds=60,
            delete_seconds=60,
            on_created=self.nodes.join,
            on_deleted=self.nodes.leave,
            clock=lambda: self.now,
        )
        self.released: set[str] = set()
        self.absent: set[str] = set()
        self.crash()

    @rule()
    def crash(self) -> None:
        """The controller is another one from now on: it remembers nothing."""
        environ = {"KAITO_AKS_SUBSCRIPTION": "s", "KAITO_AKS_RESOURCE_GROUP": "g", "KAITO_AKS_CLUSTER": "c"}
        self.aks = AksNodes(environ, edge=Direct(self.cloud), clock=lambda: self.now + 1_780_000_000)
        self.aks.attach(self.nodes)

    @rule(seconds=st.sampled_from([1, 30, 60, 200]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.cloud.tick()

    @rule(fault=FAULTS)
    def something_will_go_wrong(self, fault: Fault) -> None:
        self.cloud.faults.append(fault)

    @rule(name=st.sampled_from(IDS))
    def machines_are_taken_away(self, name: str) -> None:
        self.nodes.leave(name)

    @rule(name=st.sampled_from(IDS))
    @precondition(lambda self: len(self.released) < len(IDS))
    def ensure(self, name: str) -> None:
        if name in self.released:
            return
        status = self._call(lambda: self.aks.ensure(_request(name, name == IDS[0])))
        if status is not None and status.phase == "ready":
            assert len(status.nodes) == 2
            assert all(self.nodes.objects[n]["metadata"]["labels"]["agentpool"] == name for n in status.nodes)
            assert status.selector == {"kubernetes.azure.com/agentpool": name}

    @rule(name=st.sampled_from(IDS))
    def observe(self, name: str) -> None:
        self._call(lambda: self.aks.observe(name))

    @rule(name=st.sampled_from(IDS))
    def release(self, name: str) -> None:
        """Given back for good."""
        self.released.add(name)
        stale = any(f.call == "get" and f.kind == "stale" for f in self.cloud.faults)
        status = self._call(lambda: self.aks.release(name))
        # A look that is late may say that a pool is not there yet; all else is to be relied upon.
        if status is not None and status.phase == "absent" and not stale:
            self.absent.add(name)

    def _call(self, call: Any) -> NodeStatus | None:
        try:
            status: NodeStatus = call()
        except ProvisioningError:
            return None
        if status.phase == "failed":
            assert status.failure is not None
        return status

    @invariant()
    def a_request_buys_once(self) -> None:
        assert all(self.cloud.created.count(name) <= 1 for name in self.cloud.created)

    @invariant()
    def what_is_said_to_be_gone_is_gone(self) -> None:
        assert not self.absent & set(self.cloud.pools)

    def teardown(self) -> None:
        self.cloud.heal()
        for _ in range(10):
            for name in IDS:
                self.aks.release(name)
            self.now += 100
            self.cloud.tick()
        assert not self.cloud.pools
        assert all(self.aks.release(name).phase == "absent" for name in IDS)
        assert not list(self.aks.held())
        assert not self.nodes.objects


def _request(name: str, spot: bool) -> NodeRequest:
    kind: CapacityType = "spot" if spot else "on-demand"
    offer = Offer(
        "Standard_NC24ads_A100_v4", 24, 198 << 30, Gpu("A100-80GB", 80 << 30), 1, "aks", "azure", "eastus", "", kind
    )
    return NodeRequest(name, offer, Requirements(count=2), {WORKSPACE: "phi", WORKSPACE_NAMESPACE: "team"})


TestLife = Life.TestCase
TestLife.settings = hypothesis_settings(max_examples=150, stateful_step_count=40, deadline=None)
