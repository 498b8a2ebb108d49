"""What it takes an endpoint in a cluster to answer the request that wakes it: on a node that has no image yet, and again on the same.

    python benchmarks/start.py [--vllm]        (Linux, root, the programs of a real node, as `make test-node`)

Builds the images, starts a cluster with a real kubelet, installs kaito with Helm, and serves the demonstration model on demand. A pod
asks, and streams; what happened when is read from its own clock, the kubelet's events and the containers' logs. The registry is on the
same machine: over a network the image takes longer. About ten minutes. ``--vllm`` serves with vLLM's build for CPUs in place of
transformers.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.cluster.system import A10_LABELS, REASON, System, gpu_node, running_system, values

ASK = """
import json, sys, time, urllib.request as r
body = json.dumps({"model": "demo-phi-3", "max_tokens": 4, "stream": True,
                   "messages": [{"role": "user", "content": "Hello"}]}).encode()
asked = time.time()
with r.urlopen(r.Request(sys.argv[1], body, {"Content-Type": "application/json"}), timeout=600) as answer:
    for line in answer:
        if line.startswith(b"data: {"):
            print(json.dumps({"asked": asked, "token": time.time()}))
            break
"""


def main() -> int:
    if REASON:
        print(f"cannot be measured here: {REASON}", file=sys.stderr)
        return 1
    vllm = "--vllm" in sys.argv[1:]
    with (
        tempfile.TemporaryDirectory(prefix="kaito-bench-") as folder,
        running_system(Path(folder), vllm=vllm) as system,
    ):
        install(system)
        gpu_node(system, "a10", A10_LABELS)
        serve(system)
        first = started(system, "first")
        system.until("the endpoint asleep", lambda: phase(system) == "Asleep", 400)
        system.until("its pod gone", lambda: not system.pods("served"), 400)
        again = started(system, "again")
        print("| part of a start | node without the image, s | with it, s |\n|---|---|---|")
        for part in first:
            print(f"| {part} | {first[part]:.1f} | {again[part]:.1f} |")
    return 0


def install(system: System) -> None:
    """As docs/installation.md says."""
    (system.folder / "kaito-values.yaml").write_text(yaml.safe_dump(values(system)), encoding="utf-8")
    for step in ("pull-secrets", "helm", "verify"):
        system.run(step)


def serve(system: System) -> None:
    inference: dict[str, object] = {"preset": {"name": "demo-phi-3"}, "policy": "onDemand", "idleAfter": "20s"}
    resource = {"labelSelector": {"matchLabels": {"app": A10_LABELS["app"]}}}
    head = {"apiVersion": "kaito.sh/v1beta1", "kind": "Workspace", "metadata": {"name": "served"}}
    if system.runtime_images:
        inference["config"] = "settings"
        data = {"inference_config.yaml": "vllm: {kv-cache-memory-bytes: 64M, max-num-seqs: 8}"}
        settings = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings"}, "data": data}
        system.kubectl("apply", "-f", "-", stdin=json.dumps(settings))
    system.kubectl("apply", "-f", "-", stdin=json.dumps({**head, "resource": resource, "inference": inference}))
    system.until("the endpoint asleep", lambda: phase(system) == "Asleep")
    time.sleep(10)  # until then kube-proxy may refuse what comes for a Service that is new


def phase(system: System) -> str:
    return str(system.workspace("served").get("status", {}).get("serving", {}).get("phase", ""))


def started(system: System, name: str) -> dict[str, float]:
    """Seconds of each part of the start that a request causes, in order; nothing of it overlaps."""
    address = system.kubectl("get", "svc", "served", "-o", "jsonpath={.spec.clusterIPs[0]}")
    image = f"{system.registry.host}/kaito/my-controller:1"
    spec = {"imagePullSecrets": [{"name": "kaito-pull"}]}
    system.kubectl("run", name, "--restart=Never", f"--image={image}", f"--overrides={json.dumps({'spec': spec})}",
                   "--command", "--", "python", "-c", ASK, f"http://{address}/v1/chat/completions")  # fmt: skip
    system.until("the answer", lambda: system.get("pod", name)["status"].get("phase") in ("Succeeded", "Failed"), 600)
    log = system.kubectl("logs", name)
    if system.get("pod", name)["status"]["phase"] == "Failed":
        raise RuntimeError(f"no answer: {log}\n{system.report()}")
    said = json.loads(log.splitlines()[-1])
    (pod,) = system.pods("served")
    main = pod["spec"]["containers"][0]["name"]
    stages = [c["name"] for c in pod["spec"]["initContainers"]]
    begin, end = (at(pod["status"]["initContainerStatuses"][i]["state"]["terminated"][k])
                  for i, k in ((0, "startedAt"), (-1, "finishedAt")))  # fmt: skip
    # Kubernetes rounds its times down to seconds; the logs' are exact.
    served = logged(system, main, r"serving .* on port|Application startup complete")
    begin = max(begin, logged(system, stages[0], r'"event": "started"'))
    end = max(end, logged(system, stages[-1], r'"event": "finished"'))
    pulled = pull_seconds(system, pod["metadata"]["name"])
    return {
        "from the request to the first container, without the image": begin - said["asked"] - pulled,
        "image": pulled,
        f"files and their check ({', '.join(stages)})": end - begin,
        "server: imports, weights, first computation": served - end,
        "readiness, activator, first token": said["token"] - served,
        "altogether": said["token"] - said["asked"],
    }


def pull_seconds(system: System, pod: str) -> float:
    """What the kubelet says of the pulls of this start."""
    events = system.get("events", "", f"--field-selector=involvedObject.name={pod},reason=Pulled")["items"]
    uid = system.get("pod", pod)["metadata"]["uid"]
    texts = [e["message"] for e in events if e["involvedObject"]["uid"] == uid]
    found = [re.search(r"Successfully pulled .* in (?:(\d+)m)?([\d.]+)(m?s)\b", t) for t in texts]
    return sum(60 * int(m[1] or 0) + float(m[2]) * (0.001 if m[3] == "ms" else 1) for m in found if m)


def logged(system: System, container: str, words: str) -> float:
    """When the container first said this."""
    lines = system.kubectl("logs", "served-0", "-c", container, "--timestamps").splitlines()
    return next(at(line.split(" ", 1)[0]) for line in lines if re.search(words, line))


def at(text: str) -> float:
    """Seconds since 1970 of a time as Kubernetes writes it."""
    return datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", text)).timestamp()


if __name__ == "__main__":
    sys.exit(main())
