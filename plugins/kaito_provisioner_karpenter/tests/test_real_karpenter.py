"""The real Karpenter core, with its simulated cloud, fulfils our claims on a real API server.

There is no kubelet: Karpenter makes the Node object, and the test says in its place that the Node is ready. The provisioner sees
the cluster as the controller does: Nodes from a cache, everything else live."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml
from asking import NC6S, NC24ADS, TAGS, request

from kaito_core.controller.view import ClusterView, watching
from kaito_core.kube.client import Client, connect
from kaito_core.kube.kinds import CONFIG_MAPS, EVENTS, NODES, Kind, Object
from kaito_core.kube.reflector import Reflector
from kaito_core.plugins.types import InsufficientCapacity, NodeStatus, NotAuthorized, Offer, Requirements, Unsupported
from kaito_core.testing.cluster import Cluster, running_cluster, why_no_cluster
from kaito_core.testing.registry import free_port
from kaito_provisioner_karpenter.flavours import KWOK, NODE_CLAIMS
from kaito_provisioner_karpenter.provisioner import KarpenterNodes

KARPENTER = shutil.which("karpenter-kwok", path=os.environ.get("KUBEBUILDER_ASSETS", os.defpath))
REASON = why_no_cluster() or ("" if KARPENTER else "the folder of KUBEBUILDER_ASSETS has no karpenter-kwok")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(REASON), reason=REASON)]

SECONDS = 40.0
ENV = {"KAITO_KARPENTER_OFFERS": "default/machines", "KAITO_NODE_CLASS": "KWOKNodeClass/default"}


@pytest.fixture(scope="module")
def cluster(crds: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A control plane with Karpenter's definitions, a node class and the simulator."""
    types = crds / "instance-types.json"
    if not types.exists():
        pytest.skip(f"the folder {crds} has no instance-types.json, the machines that the simulator sells")
    folder = tmp_path_factory.mktemp("karpenter")
    with running_cluster() as cluster:
        for file in sorted(crds.glob("*.yaml")):
            cluster.kubectl("apply", "--server-side", "-f", str(file))
        client = connect(kubeconfig=str(cluster.kubeconfig))
        until(lambda: client.serves(NODE_CLAIMS) and client.serves(KWOK.node_class))
        client.create(KWOK.node_class, {"apiVersion": KWOK.node_class.api_version, "kind": KWOK.node_class.kind, "metadata": {"name": "default"}})  # fmt: skip
        client.create(CONFIG_MAPS, listed(json.loads(types.read_text())))
        env = {
            **os.environ,
            "INSTANCE_TYPES_FILE_PATH": str(types),
            "KUBERNETES_MIN_VERSION": "1.19.0-0",
            "SYSTEM_NAMESPACE": "kube-system",
            "DISABLE_LEADER_ELECTION": "true",
            "METRICS_PORT": str(free_port()),
            "HEALTH_PROBE_PORT": str(free_port()),
            "KUBECONFIG": str(cluster.kubeconfig),
        }
        with (folder / "log").open("wb") as log:
            karpenter = subprocess.Popen([str(KARPENTER)], env=env, stdout=log, stderr=log, cwd=folder)
        try:
            yield cluster
        finally:
            karpenter.kill()
            karpenter.wait()


def listed(types: list[dict[str, Any]]) -> Object:
    """The simulator's machines as a ConfigMap: a person writes this for a cloud that no catalogue knows."""
    rows = ["instance_type,capacity_type,price_per_hour"]
    for kind in types:
        for capacity in ("on-demand", "spot"):
            prices = [o["Price"] for o in kind["offerings"] if capacity in o["Requirements"][0]["values"]]
            rows += [f"{kind['name']},{capacity},{min(prices)}"] if prices else []
    metadata = {"name": "machines", "namespace": "default"}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"offers.csv": "\n".join(rows)}}


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> Client:
    return connect(kubeconfig=str(cluster.kubeconfig))


@pytest.fixture(scope="module")
def view(client: Client) -> Iterator[ClusterView]:
    """As the controller has it: see `kaito_core.controller.view`."""
    caches = {NODES: Reflector(client, NODES), **watching(client, KarpenterNodes.watches, lambda old, new: None)}
    for cache in caches.values():
        cache.start()
    until(lambda: all(c.has_synced for c in caches.values()))
    yield ClusterView(client, caches)
    for cache in caches.values():
        cache.stop()


@pytest.fixture
def karpenter(view: ClusterView) -> KarpenterNodes:
    return attached(view)


def attached(view: Any, **environ: str) -> KarpenterNodes:
    provisioner = KarpenterNodes({**ENV, **environ})
    provisioner.attach(view)
    return provisioner


def new_id() -> str:
    """As the controller makes them: eleven characters."""
    return f"ws{uuid4().hex[:9]}"


def until(ready: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + SECONDS
    while not (found := ready()):
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.2)
    return found


def boot(client: Client, request_id: str) -> list[str]:
    """What a kubelet and a device plugin would do, once Karpenter's cloud has made the Node."""
    nodes = until(lambda: client.list(NODES, labels=f"kaito.sh/request={request_id}")[0])
    names = [n["metadata"]["name"] for n in nodes]
    for name in names:
        ready = {"type": "Ready", "status": "True", "reason": "Test", "message": "", "lastHeartbeatTime": None}
        client.patch(NODES, name, "", {"status": {"conditions": [ready]}}, subresource="status")
    return names


def ends(karpenter: KarpenterNodes, request_id: str) -> None:
    until(lambda: karpenter.release(request_id).phase == "absent")


def test_what_the_config_map_lists_is_offered(karpenter: KarpenterNodes) -> None:
    found = list(karpenter.offers(Requirements(capacity_types=("on-demand", "spot"))))
    assert {o.instance_type for o in found} == {"Standard_NC6s_v3", "Standard_NC24ads_A100_v4"}
    assert all(o.price and o.gpu and o.gpus == 1 and not o.retired for o in found)


def test_a_claim_becomes_a_node_and_goes_again(karpenter: KarpenterNodes, client: Client) -> None:
    asked = request(NC6S, NC24ADS, request_id=new_id(), labels={"apps": "phi-3"})
    assert karpenter.ensure(asked).phase == "pending"
    (name,) = boot(client, asked.id)
    status = until(lambda: (s := karpenter.ensure(asked)).phase == "ready" and s)
    assert status == NodeStatus(
        asked.id, "ready", (name,), {"kaito.sh/request": asked.id}, offer=NC6S
    )  # the cheaper one
    node = client.get(NODES, name)
    assert node is not None
    assert node["metadata"]["labels"].items() >= {**TAGS, "apps": "phi-3", "kaito.sh/request": asked.id}.items()
    assert {"key": "sku", "value": "gpu", "effect": "NoSchedule"} in node["spec"]["taints"]
    claim = client.get(NODE_CLAIMS, asked.id)
    assert claim is not None
    assert claim["spec"]["expireAfter"] == "Never"
    assert "karpenter.sh/nodepool" not in claim["metadata"]["labels"]
    assert karpenter.observe(asked.id).phase == "ready"
    assert asked.id in {h.request_id for h in karpenter.held()}
    assert karpenter.release(asked.id).phase == "releasing"
    ends(karpenter, asked.id)
    assert client.get(NODE_CLAIMS, asked.id) is None
    assert client.get(NODES, name) is None


def test_a_claim_that_another_controller_has_made_is_found_and_not_made_again(
    view: ClusterView, client: Client
) -> None:
    asked = request(request_id=new_id())
    attached(view).ensure(asked)
    before = client.get(NODE_CLAIMS, asked.id)
    after_a_crash = attached(view)
    assert after_a_crash.ensure(asked).phase == "pending"
    after = client.get(NODE_CLAIMS, asked.id)
    assert before is not None
    assert after is not None
    assert before["metadata"]["uid"] == after["metadata"]["uid"]
    ends(after_a_crash, asked.id)


def test_two_machines_for_one_request(karpenter: KarpenterNodes, client: Client) -> None:
    asked = request(request_id=new_id(), count=2)
    karpenter.ensure(asked)
    until(lambda: len(client.list(NODES, labels=f"kaito.sh/request={asked.id}")[0]) == 2)
    names = boot(client, asked.id)
    status = until(lambda: (s := karpenter.ensure(asked)).phase == "ready" and s)
    assert sorted(status.nodes) == sorted(names)
    ends(karpenter, asked.id)


def test_an_orphan_is_found_by_whoever_comes_later(view: ClusterView) -> None:
    asked = request(request_id=new_id())
    attached(view).ensure(asked)
    later = attached(view)
    (held,) = [h for h in later.held() if h.request_id == asked.id]
    assert held.tags == TAGS
    assert 0 <= held.age < SECONDS
    ends(later, asked.id)
    assert asked.id not in {h.request_id for h in later.held()}


def test_the_rights_in_the_readme_are_enough_and_less_is_said(
    view: ClusterView, client: Client, cluster: Cluster
) -> None:
    readme = Path(__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```yaml\n(rbac:.*?)```", readme, re.DOTALL)
    rules = yaml.safe_load(text)["rbac"]["extraRules"]
    rules += [
        {"apiGroups": [KWOK.node_class.group], "resources": [KWOK.node_class.plural], "verbs": ["get", "list"]},
        {"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "list", "watch"]},  # the chart's own
    ]
    rbac = "rbac.authorization.k8s.io"
    role = {"apiVersion": f"{rbac}/v1", "kind": "ClusterRole", "metadata": {"name": "kaito"}, "rules": rules}
    subject = {"kind": "User", "name": "kaito", "apiGroup": rbac}
    binding = {
        "apiVersion": f"{rbac}/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": "kaito"},
        "roleRef": {"apiGroup": rbac, "kind": "ClusterRole", "name": "kaito"},
        "subjects": [subject],
    }
    limited = connect(kubeconfig=str(cluster.kubeconfig))
    limited._api.default_headers["Impersonate-User"] = "kaito"
    seen = ClusterView(limited, view._reflectors)
    asked = request(request_id=new_id())
    refused = attached(seen).ensure(asked)
    assert isinstance(refused.failure, NotAuthorized)
    assert "README" in refused.message
    client.create(Kind(f"{rbac}/v1", "ClusterRole", "clusterroles", namespaced=False), role)
    client.create(Kind(f"{rbac}/v1", "ClusterRoleBinding", "clusterrolebindings", namespaced=False), binding)
    karpenter = attached(seen)
    until(lambda: karpenter.ensure(asked).phase == "pending")
    boot(client, asked.id)
    until(lambda: karpenter.ensure(asked).phase == "ready")
    assert list(karpenter.offers(Requirements()))
    assert asked.id in {h.request_id for h in karpenter.held()}
    ends(karpenter, asked.id)


class NoSuchClass:
    """The cluster, but for a node class that somebody has deleted since it was looked at: Karpenter's core then says that there is
    no capacity, writes the event and deletes the claim. Its simulator has no other way to run out of machines: it sells also
    what its file says is not available."""

    def __init__(self, view: ClusterView) -> None:
        self._view = view

    def get(self, kind: Kind, name: str, namespace: str = "") -> Mapping[str, Any] | None:
        return self._view.get(kind, name, namespace)

    def list(
        self, kind: Kind, namespace: str = "", labels: Mapping[str, str] | None = None, *, fresh: bool = False
    ) -> Iterable[Mapping[str, Any]]:
        return (
            [{"metadata": {"name": "deleted"}}]
            if kind == KWOK.node_class
            else self._view.list(kind, namespace, labels, fresh=fresh)
        )

    def apply(self, kind: Kind, obj: Mapping[str, Any]) -> Mapping[str, Any]:
        return self._view.apply(kind, obj)

    def delete(self, kind: Kind, name: str, namespace: str = "") -> None:
        self._view.delete(kind, name, namespace)


def test_a_claim_that_karpenter_gives_up_is_not_made_again(view: ClusterView, client: Client) -> None:
    stale = NoSuchClass(view)
    karpenter = attached(stale, KAITO_NODE_CLASS="deleted")
    asked = request(NC6S, NC24ADS, request_id=new_id())
    status = karpenter.ensure(asked)
    status = until(lambda: (s := karpenter.ensure(asked)).phase == "failed" and s)
    assert isinstance(status.failure, InsufficientCapacity)
    assert status.message == 'insufficient capacity, resolving node class from nodeclaim, KWOKNodeClass.karpenter.kwok.sh "deleted" not found'  # fmt: skip
    assert status.asked == (NC24ADS,)
    until(lambda: client.get(NODE_CLAIMS, asked.id) is None)
    # Whoever comes after a crash has the event only.
    for provisioner in (karpenter, attached(stale, KAITO_NODE_CLASS="deleted"), attached(view)):
        again = provisioner.ensure(asked)
        assert isinstance(again.failure, InsufficientCapacity), again
        assert client.get(NODE_CLAIMS, asked.id) is None
    events = [e for e in client.list(EVENTS, "default")[0] if e["involvedObject"].get("name") == asked.id]
    assert len({e["involvedObject"]["uid"] for e in events}) == 1, "there was one claim of this name, ever"
    assert karpenter.release(asked.id).phase == "absent"


def test_what_karpenter_cannot_launch_is_said_in_its_words(karpenter: KarpenterNodes) -> None:
    asked = request(Offer("no-such-type", 6, 1 << 37, NC6S.gpu, 1, "karpenter"), request_id=new_id())
    karpenter.ensure(asked)
    status = until(lambda: (s := karpenter.ensure(asked)).phase == "failed" and s)
    assert isinstance(status.failure, Unsupported)
    assert "instance type not found" in status.message
    ends(karpenter, asked.id)


def test_a_machine_that_is_taken_away_is_lost(karpenter: KarpenterNodes, client: Client) -> None:
    asked = request(request_id=new_id())
    karpenter.ensure(asked)
    (name,) = boot(client, asked.id)
    until(lambda: karpenter.ensure(asked).phase == "ready")
    # As a person or an interruption does it; a finalizer of the test keeps it in sight.
    client.patch(NODE_CLAIMS, asked.id, "", {"metadata": {"finalizers": ["karpenter.sh/termination", "kaito.sh/test"]}})
    client.delete(NODES, name)
    until(lambda: karpenter.ensure(asked).phase == "releasing")
    client.patch(NODE_CLAIMS, asked.id, "", {"metadata": {"finalizers": ["karpenter.sh/termination"]}})
    ends(karpenter, asked.id)
