"""What the controller costs: many Workspaces at once against a real API server.

    python benchmarks/controller.py [--workspaces 500]
    python benchmarks/controller.py --claims FOLDER     # machines are bought: NodeClaims, and a stand-in for Karpenter

FOLDER has Karpenter's definitions. The stand-in makes each claim ready at once.

Starts a control plane (`$KUBEBUILDER_ASSETS`), makes a Node with a GPU for each Workspace by hand, starts ``kaito controller`` as a
user would, creates the Workspaces and waits until each has its Job. What was asked of the API server is read from its own
audit log, by user agent. Nothing runs in the pods: there is no kubelet.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from kaito_core.api.crd import crd
from kaito_core.kube.client import Client, connect
from kaito_core.kube.kinds import CONFIG_MAPS, CRDS, JOBS, NODES, WORKSPACES, Kind, Object
from kaito_core.kube.reflector import Reflector
from kaito_core.testing.cluster import Cluster, running_cluster, why_no_cluster

CLAIMS = Kind("karpenter.sh/v1", "NodeClaim", "nodeclaims", namespaced=False)
NODE_CLASSES = Kind("karpenter.kwok.sh/v1alpha1", "KWOKNodeClass", "kwoknodeclasses", namespaced=False)
TYPE = "Standard_NC24ads_A100_v4"
WRITES = frozenset({"create", "update", "patch", "delete", "deletecollection"})
REST_SECONDS = 20.0
"""How long it is watched at rest."""

NODE_LABELS = {
    "bench": "yes",
    "nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB",
    "nvidia.com/gpu.memory": "81920",
    "nvidia.com/gpu.count": "1",
    "nvidia.com/cuda.compute.major": "8",
    "nvidia.com/cuda.compute.minor": "0",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workspaces", type=int, default=500)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--claims", type=Path, metavar="FOLDER")
    given = parser.parse_args()
    if reason := why_no_cluster():
        print(f"cannot be measured here: {reason}", file=sys.stderr)
        return 1
    with (
        tempfile.TemporaryDirectory(prefix="kaito-bench-") as folder,
        # Nobody sends heartbeats for the hand-made node, so nobody may wait for them.
        running_cluster(Path(folder) / "cluster", controllers="*,-node-lifecycle-controller") as cluster,
    ):
        client = connect(kubeconfig=str(cluster.kubeconfig), user_agent="benchmark")
        definitions(client, crd())
        while not client.serves(WORKSPACES):
            time.sleep(0.1)
        stop = threading.Event()
        if given.claims:
            machines_by_claim(cluster, client, given.claims, stop)
        else:
            at_once(lambda number: machine(client, f"gpu-{number:04}", NODE_LABELS), given.workspaces)
        with controller(cluster, Path(folder), given.workers) as process:
            measure(cluster, client, process, given.workspaces, claims=bool(given.claims))
        stop.set()
    return 0


def definitions(client: Client, *crds: Object) -> None:
    for each in crds:
        client.apply(CRDS, each)


def machine(client: Client, name: str, labels: Mapping[str, str]) -> None:
    """A Node with a GPU, ready at once."""
    metadata = {"name": name, "labels": {**labels, "kubernetes.io/hostname": name}}
    client.create(NODES, {"apiVersion": "v1", "kind": "Node", "metadata": metadata})
    capacity = {"cpu": "8", "memory": "64Gi", "pods": "110", "nvidia.com/gpu": "1", "ephemeral-storage": "1Ti"}
    ready = {"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "by hand"}
    status = {"capacity": capacity, "allocatable": capacity, "conditions": [ready]}
    client.patch(NODES, name, "", {"status": status}, subresource="status")
    client.patch(NODES, name, "", {"spec": {"taints": None}})


def machines_by_claim(cluster: Cluster, client: Client, folder: Path, stop: threading.Event) -> None:
    """Karpenter's definitions, a node class, and somebody who fulfils claims at once."""
    definitions(client, *(yaml.safe_load(p.read_text()) for p in sorted(folder.glob("*.yaml"))))
    while not (client.serves(CLAIMS) and client.serves(NODE_CLASSES)):
        time.sleep(0.1)
    client.create(NODE_CLASSES, {"apiVersion": NODE_CLASSES.api_version, "kind": NODE_CLASSES.kind, "metadata": {"name": "default"}})  # fmt: skip
    listed = "instance_type,price_per_hour\nStandard_NC24ads_A100_v4,3.67\n"
    metadata = {"name": "machines", "namespace": "default"}
    client.create(
        CONFIG_MAPS, {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"offers.csv": listed}}
    )
    stand_in = connect(kubeconfig=str(cluster.kubeconfig), user_agent="stand-in")
    threading.Thread(target=fulfil, args=(stand_in, stop), daemon=True).start()


def fulfil(client: Client, stop: threading.Event) -> None:
    """Each claim gets a Node, and says so."""
    done: set[str] = set()
    pool = ThreadPoolExecutor(4)

    def one(claim: Object) -> None:
        name = claim["metadata"]["name"]
        machine(
            client, f"node-{name}", {**claim["metadata"].get("labels", {}), "node.kubernetes.io/instance-type": TYPE}
        )
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        said = [
            {
                "type": t,
                "status": "True",
                "reason": t,
                "message": "",
                "lastTransitionTime": now,
                "observedGeneration": 1,
            }
            for t in ("Launched", "Registered", "Initialized", "Ready")
        ]
        status = {"conditions": said, "nodeName": f"node-{name}", "providerID": f"bench://{name}"}
        client.patch(CLAIMS, name, "", {"status": status}, subresource="status")

    def changed(old: Object | None, new: Object | None) -> None:
        if new is not None and old is None and new["metadata"]["name"] not in done:
            done.add(new["metadata"]["name"])
            pool.submit(one, new)

    claims = Reflector(client, CLAIMS, on_change=changed)
    claims.start()
    stop.wait()
    claims.stop()
    pool.shutdown(cancel_futures=True)


def at_once(act: Callable[[int], None], count: int) -> None:
    """Do it for every number, four at a time."""
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(act, range(count)))


class controller:  # noqa: N801 – reads as what it is in a with statement
    """``kaito controller`` as a process of its own, ready."""

    def __init__(self, cluster: Cluster, folder: Path, workers: int) -> None:
        self.log = folder / "controller.log"
        command = [sys.executable, "-m", "kaito_core", "controller", "--no-leader-election", "--tuner-image", "bench/tuner:1",
                   "--workers", str(workers), "--metrics-address", "127.0.0.1:0", "--health-address", "127.0.0.1:0",
                   "--log-level", "warning"]  # fmt: skip
        claims = {"KAITO_KARPENTER_OFFERS": "default/machines", "KAITO_NODE_CLASS": "KWOKNodeClass/default"}
        env = {**os.environ, "KUBECONFIG": str(cluster.kubeconfig), **claims}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=env)

    def __enter__(self) -> subprocess.Popen[bytes]:
        time.sleep(3.0)
        if self.process.poll() is not None:
            raise SystemExit(f"the controller did not start:\n{self.log.read_text()}")
        return self.process

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(60)
        said = self.log.read_text().splitlines()
        if said:
            print(f"\nthe controller said ({len(said)} lines):\n  " + "\n  ".join(said[:5]))


def workspace(number: int, *, claims: bool = False) -> Object:
    resource = {"instanceType": TYPE} if claims else {"labelSelector": {"matchLabels": {"bench": "yes"}}}
    return {
        "apiVersion": "kaito.sh/v1beta1",
        "kind": "Workspace",
        "metadata": {"name": f"bench-{number:04}", "namespace": "default"},
        "resource": resource,
        "tuning": {
            "preset": {"name": "demo-phi-3"},
            "method": "qlora",
            "input": {"urls": ["https://example.com/data.jsonl"]},
            "output": {"volumeSource": {"persistentVolumeClaim": {"claimName": f"out-{number}"}}},
        },
    }


def measure(cluster: Cluster, client: Client, process: subprocess.Popen[bytes], count: int, *, claims: bool) -> None:
    cpu_before = cpu_seconds(process.pid)
    audited = sum(1 for _ in cluster.audit())
    began = time.monotonic()
    at_once(lambda number: client.create(WORKSPACES, workspace(number, claims=claims)), count)
    created = time.monotonic() - began
    while (jobs := len(client.list(JOBS, "default", page=5000)[0])) < count:
        if process.poll() is not None:
            raise SystemExit("the controller died")
        if time.monotonic() - began > 600:
            raise SystemExit(f"only {jobs} of {count} jobs after ten minutes")
        time.sleep(0.5)
    until_jobs = time.monotonic() - began
    settle(cluster, count)
    cpu = cpu_seconds(process.pid) - cpu_before
    events = list(cluster.audit())[audited:]
    before_rest = len(events)
    time.sleep(REST_SECONDS)
    resting = [e for e in list(cluster.audit())[audited + before_rest :] if ours(e)]
    mine = [e for e in events if ours(e)]
    written = Counter(f"{e['verb']} {resource(e)}" for e in mine if e["verb"] in WRITES)
    figures = {
        "workspaces": count,
        "seconds_until_every_workspace_is_created": round(created, 1),
        "seconds_until_every_job_exists": round(until_jobs, 1),
        "writes_per_workspace": round(sum(written.values()) / count, 2),
        "requests_per_workspace": round(len(mine) / count, 2),
        "writes": dict(written.most_common()),
        "cpu_seconds": round(cpu, 1),
        "peak_memory_mib": round(peak_memory(process.pid) / 2**20),
        "requests_at_rest_in_20_s": len([e for e in resting if e["verb"] != "watch"]),
        "seconds_until_an_unknown_preset_is_refused": round(refused(client), 2),
    }
    print(json.dumps(figures, indent=2))


def refused(client: Client) -> float:
    """Seconds from the creation of a Workspace that only the controller can refuse to the condition that says why."""
    wrong = workspace(9999)
    wrong["tuning"]["preset"]["name"] = "no-such-preset"
    began = time.monotonic()
    client.create(WORKSPACES, wrong)
    while True:
        status = (client.get(WORKSPACES, wrong["metadata"]["name"], "default") or {}).get("status") or {}
        if any(c["type"] == "Accepted" and c["status"] == "False" for c in status.get("conditions", ())):
            return time.monotonic() - began
        if time.monotonic() - began > 60:
            raise SystemExit("an unknown preset is not refused within a minute")
        time.sleep(0.01)


def settle(cluster: Cluster, count: int) -> None:
    """Wait until nothing is asked for three seconds."""
    before, quiet = -1, 0
    while quiet < 3:
        now = sum(1 for e in cluster.audit() if ours(e))
        quiet = quiet + 1 if now == before else 0
        before = now
        time.sleep(1.0)


def ours(event: dict[str, Any]) -> bool:
    return "(controller)" in event.get("userAgent", "")


def resource(event: dict[str, Any]) -> str:
    about = event.get("objectRef", {})
    return "/".join(p for p in (about.get("resource", "?"), about.get("subresource", "")) if p)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_memory(pid: int) -> int:
    """Bytes: VmHWM."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    sys.exit(main())
