"""What the controller costs: many Workspaces at once against a real API server.

    python benchmarks/controller.py [--workspaces 500]

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
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from kaito_core.api.crd import crd
from kaito_core.kube.client import Client, connect
from kaito_core.kube.kinds import CRDS, JOBS, NODES, WORKSPACES, Object
from kaito_core.testing.cluster import Cluster, running_cluster, why_no_cluster

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
        prepare(client, given.workspaces)
        with controller(cluster, Path(folder), given.workers) as process:
            measure(cluster, client, process, given.workspaces)
    return 0


def prepare(client: Client, count: int) -> None:
    """The CRD, and machines, ready at once."""
    client.apply(CRDS, crd())
    while not client.serves(WORKSPACES):
        time.sleep(0.1)
    at_once(lambda number: machine(client, number), count)


def machine(client: Client, number: int) -> None:
    metadata = {"name": f"gpu-{number:04}", "labels": {**NODE_LABELS, "kubernetes.io/hostname": f"gpu-{number:04}"}}
    client.create(NODES, {"apiVersion": "v1", "kind": "Node", "metadata": metadata})
    capacity = {"cpu": "8", "memory": "64Gi", "pods": "110", "nvidia.com/gpu": "1", "ephemeral-storage": "1Ti"}
    ready = {"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "by hand"}
    status = {"capacity": capacity, "allocatable": capacity, "conditions": [ready]}
    client.patch(NODES, metadata["name"], "", {"status": status}, subresource="status")
    client.patch(NODES, metadata["name"], "", {"spec": {"taints": None}})


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
        env = {**os.environ, "KUBECONFIG": str(cluster.kubeconfig)}
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


def workspace(number: int) -> Object:
    return {
        "apiVersion": "kaito.sh/v1beta1",
        "kind": "Workspace",
        "metadata": {"name": f"bench-{number:04}", "namespace": "default"},
        "resource": {"labelSelector": {"matchLabels": {"bench": "yes"}}},
        "tuning": {
            "preset": {"name": "demo-phi-3"},
            "method": "qlora",
            "input": {"urls": ["https://example.com/data.jsonl"]},
            "output": {"volumeSource": {"hostPath": {"path": f"/out/{number}"}}},
        },
    }


def measure(cluster: Cluster, client: Client, process: subprocess.Popen[bytes], count: int) -> None:
    cpu_before = cpu_seconds(process.pid)
    audited = sum(1 for _ in cluster.audit())
    began = time.monotonic()
    at_once(lambda number: client.create(WORKSPACES, workspace(number)), count)
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
