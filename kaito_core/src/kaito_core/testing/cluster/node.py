"""Real nodes on one machine, each with a containerd and a kubelet of its own. Needs root, and Debian's packages."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import socket
import tarfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kaito_core.testing.cluster.control_plane import SERVICES, ControlPlane
from kaito_core.testing.cluster.programs import PLUGINS, Daemons, path, run, until
from kaito_core.testing.registry import free_port

PODS = "10.244.0.0/24"
DNS = f"{SERVICES}.0.10"
BRIDGE = "kaito-test0"
MACHINE = "machine.test"
"""The name by which pods reach servers of this machine."""
SANDBOX, BUSYBOX = "localhost/pause:1", "localhost/busybox:1"
"""Images that every node has."""
GPU = "nvidia.com/gpu"


def host_address() -> str:
    """The address of this machine's default interface. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect(("192.0.2.1", 9))
        return str(s.getsockname()[0])


class Nodes:
    """The nodes of a control plane, and the network that they share: one at a time on a machine."""

    def __init__(self, control_plane: ControlPlane) -> None:
        self._cluster = control_plane
        self._folder = control_plane.folder
        self._shared = Daemons(self._folder)
        self._nodes: dict[str, tuple[Path, Daemons]] = {}
        self._joined = 0
        self._others = _network_namespaces(self._folder)
        """Network namespaces that were there before, and are somebody else's."""

    def start(self) -> None:
        """The network between pods, Service addresses, names. RuntimeError when something does not get ready."""
        bridge = {
            "type": "bridge", "bridge": BRIDGE, "isGateway": True, "hairpinMode": True,
            "ipam": {"type": "host-local", "dataDir": str(self._folder / "cni-state"),
                     "routes": [{"dst": "0.0.0.0/0"}], "ranges": [[{"subnet": PODS}]]},
        }  # fmt: skip
        ports = {"type": "portmap", "capabilities": {"portMappings": True}}
        self._write("cni/10-pods.conflist", {"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge, ports]})
        self._write("resolv.conf", "nameserver 127.0.0.1\n")
        (self._folder / "certs.d").mkdir()
        _busybox_image(self._folder / "busybox.tar")
        self._services()
        self._names()

    def join(self, name: str, labels: Mapping[str, str], taints: Sequence[str], gpus: int) -> None:
        """A new machine. It says that it has ``gpus`` GPUs, which nobody can use: the device is not there."""
        # By number: a cloud's names are long, and the path of a Unix socket may have 107 characters.
        self._joined += 1
        place = f"nodes/{self._joined}"
        folder = self._folder / place
        folder.mkdir(parents=True)
        daemons = Daemons(folder)
        self._nodes[name] = folder, daemons
        self._write(f"{place}/containerd.toml", _CONTAINERD.format(
            folder=folder, socket=_socket(folder), registries=self._folder / "certs.d", cni=self._folder / "cni",
            plugins=PLUGINS, sandbox=SANDBOX))  # fmt: skip
        daemons.start("containerd", ["-c", "containerd.toml"])
        until("containerd", lambda: self._ctr(folder, "version") is not None, daemons.log("containerd"))
        self.load(name, self._folder / "busybox.tar")
        self._cluster.write_kubeconfig_of_node(folder / "kubelet.kubeconfig", name)
        self._write(f"{place}/kubelet.json", self._kubelet(folder, taints))
        daemons.start("kubelet", [
            "--config=kubelet.json", "--kubeconfig=kubelet.kubeconfig", f"--hostname-override={name}",
            f"--node-ip={self._cluster.host}", f"--root-dir={folder / 'kubelet'}", f"--cert-dir={folder / 'pki'}",
        ])  # fmt: skip
        ready = ("get", "node", name, "-o", 'jsonpath={.status.conditions[?(@.type=="Ready")].status}')
        until(f"the node {name}", lambda: self._cluster.kubectl(*ready, check=False) == "True", daemons.log("kubelet"))
        if gpus:
            # Kubernetes documents this as the way to advertise a resource without a device plugin.
            has = {"status": {kind: {GPU: str(gpus)} for kind in ("capacity", "allocatable")}}
            self._cluster.kubectl("patch", "node", name, "--subresource=status", "--type=merge", "-p", json.dumps(has))
        told = [f"{k}={v}" for k, v in labels.items()]
        if told:
            self._cluster.kubectl("label", "node", name, "--overwrite", *told)

    def leave(self, name: str) -> None:
        """The machine is gone, with everything on it, and says nothing. Its Node object stays until somebody deletes it."""
        folder, daemons = self._nodes.pop(name)
        daemons.kill("kubelet")
        for _ in range(50):
            tasks = (self._ctr(folder, "tasks", "ls", "-q") or "").split()
            if not tasks:
                break
            for task in tasks:
                self._ctr(folder, "tasks", "kill", "--all", "--signal", "SIGKILL", task)
                self._ctr(folder, "tasks", "delete", task)
            time.sleep(0.1)
        daemons.stop()
        _unmount(folder)
        shutil.rmtree(folder, ignore_errors=True)

    def load(self, name: str, archive: Path) -> None:
        """Give an image archive (OCI or docker) to a node. RuntimeError when it does not take it."""
        if self._ctr(self._nodes[name][0], "images", "import", str(archive.resolve())) is None:
            raise RuntimeError(f"the node {name} does not take {archive}")

    def trust(self, host: str) -> None:
        """Pull from ``machine.test:PORT`` over plain HTTP."""
        url = f"http://127.0.0.1:{host.rpartition(':')[2]}"
        self._write(f"certs.d/{host}/hosts.toml", f'server = "{url}"\n[host."{url}"]\n')

    def stop(self) -> None:
        for name in list(self._nodes):
            self.leave(name)
        self._shared.stop()
        run("kube-proxy", "--config=kube-proxy.json", "--cleanup", folder=self._folder, check=False)
        for namespace in _network_namespaces(self._folder) - self._others:
            run("ip", "netns", "delete", namespace, folder=self._folder, check=False)
        run("ip", "link", "delete", BRIDGE, folder=self._folder, check=False)

    # --- parts

    def _kubelet(self, folder: Path, taints: Sequence[str]) -> dict[str, Any]:
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": str(self._folder / "ca.crt")},
            },
            "authorization": {"mode": "Webhook"},
            "containerRuntimeEndpoint": f"unix://{_socket(folder)}",
            "port": free_port(),
            "healthzPort": 0,
            # There may be no systemd, and only the first version of control groups: containers have their limits all the
            # same, only the kubelet's own tree of groups is left out.
            "cgroupDriver": "cgroupfs",
            "cgroupsPerQOS": False,
            "enforceNodeAllocatable": [],
            "failCgroupV1": False,
            "failSwapOn": False,
            "localStorageCapacityIsolation": False,
            "oomScoreAdj": 0,
            "makeIPTablesUtilChains": False,
            "clusterDNS": [DNS],
            "clusterDomain": "cluster.local",
            "resolvConf": str(self._folder / "resolv.conf"),
            "podLogsDir": str(folder / "pod-logs"),
            "imageGCHighThresholdPercent": 100,
            "evictionHard": {"memory.available": "100Mi"},
            "serializeImagePulls": False,
            "registerWithTaints": [_taint(t) for t in taints],
        }

    def _services(self) -> None:
        """kube-proxy, as a program of the machine."""
        self._cluster.kubectl(
            "create",
            "clusterrolebinding",
            "kube-proxy",
            "--clusterrole=system:node-proxier",
            "--user=system:kube-proxy",
        )
        config = {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": "nftables",
            "clientConnection": {"kubeconfig": str(self._folder / "kube-proxy.kubeconfig")},
            "clusterCIDR": PODS,
            "conntrack": {"maxPerCore": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
        }
        self._write("kube-proxy.json", config)
        self._shared.start("kube-proxy", ["--config=kube-proxy.json"])

    def _names(self) -> None:
        """CoreDNS, as a program of the machine behind the usual Service."""
        host, port = self._cluster.host, free_port()
        corefile = f""".:{port} {{
    bind {host}
    errors
    hosts {{
        {host} {MACHINE}
        fallthrough
    }}
    kubernetes cluster.local {{
        kubeconfig {self._cluster.kubeconfig} test
    }}
}}
"""
        self._write("Corefile", corefile)
        self._shared.start("coredns", ["-conf", "Corefile"])
        ports = [{"name": p.lower(), "port": 53, "protocol": p} for p in ("UDP", "TCP")]
        service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "kube-dns", "namespace": "kube-system"},
                   "spec": {"clusterIP": DNS, "ports": [{**p, "targetPort": port} for p in ports]}}  # fmt: skip
        endpoints = {
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": "kube-dns-1", "namespace": "kube-system",
                         "labels": {"kubernetes.io/service-name": "kube-dns"}},
            "endpoints": [{"addresses": [host], "conditions": {"ready": True}}],
            "ports": [{**p, "port": port} for p in ports],
        }  # fmt: skip
        both = {"apiVersion": "v1", "kind": "List", "items": [service, endpoints]}
        self._cluster.kubectl("apply", "-f", "-", stdin=json.dumps(both))
        until("the cluster's DNS", lambda: _answers(DNS, 53), self._shared.log("coredns"))

    def _ctr(self, folder: Path, *arguments: str) -> str | None:
        done = run("ctr", "-a", _socket(folder), "-n", "k8s.io", *arguments, folder=self._folder, check=False)
        return None if done.returncode else done.stdout

    def _write(self, name: str, content: str | Mapping[str, Any]) -> None:
        file = self._folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content if isinstance(content, str) else json.dumps(content, indent=1), "utf-8")


_CONTAINERD = """version = 3
root = "{folder}/containerd/root"
state = "{folder}/containerd/state"
[grpc]
address = "{socket}"
[plugins.'io.containerd.cri.v1.images']
snapshotter = "overlayfs"
pinned_images = {{ sandbox = "{sandbox}" }}
registry = {{ config_path = "{registries}" }}
[plugins.'io.containerd.cri.v1.runtime']
restrict_oom_score_adj = true
cni = {{ bin_dirs = ["{plugins}"], conf_dir = "{cni}" }}
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
"""


def _socket(folder: Path) -> str:
    return str(folder / "containerd.sock")


def _taint(text: str) -> dict[str, str]:
    """``key=value:Effect``."""
    key, value, effect = re.split("[=:]", text)
    return {"key": key, "value": value, "effect": effect}


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


def _network_namespaces(folder: Path) -> set[str]:
    """Those that CNI made for pods."""
    return {n for n in run("ip", "netns", "list", folder=folder, check=False).stdout.split() if n.startswith("cni-")}


def _unmount(folder: Path) -> None:
    """Whatever is mounted below, the deepest first."""
    for line in reversed(Path("/proc/self/mounts").read_text("utf-8").splitlines()):
        at = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), line.split()[1])
        if at.startswith(f"{folder}/"):
            run("umount", "-l", at, folder=folder, check=False)


def _busybox_image(target: Path) -> None:
    """The machine's static busybox as an image archive, under both names: one sleeps, the other is a shell."""
    program = shutil.which("busybox", path=path())
    assert program is not None, "why_no_cluster looked for it"
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        for name, mode in (("bin", 0o755), ("etc", 0o755), ("tmp", 0o1777)):
            made = tarfile.TarInfo(name)
            made.type, made.mode = tarfile.DIRTYPE, mode
            tar.addfile(made)
        tar.add(program, "bin/busybox")
        for applet in run(program, "--list", folder=target.parent).stdout.split():
            if applet != "busybox":
                made = tarfile.TarInfo(f"bin/{applet}")
                made.type, made.linkname = tarfile.SYMTYPE, "busybox"
                tar.addfile(made)
    blob = layer.getvalue()
    files, manifest = {"layer.tar": blob}, []
    for reference, command in ((SANDBOX, ["/bin/sleep", "infinity"]), (BUSYBOX, ["/bin/sh"])):
        config = {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Cmd": command, "Env": ["PATH=/bin"]},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(blob).hexdigest()}"]},
        }
        content = json.dumps(config).encode()
        name = f"{hashlib.sha256(content).hexdigest()}.json"
        files[name] = content
        manifest.append({"Config": name, "RepoTags": [reference], "Layers": ["layer.tar"]})
    files["manifest.json"] = json.dumps(manifest).encode()
    with tarfile.open(target, "w") as tar:
        for name, content in files.items():
            made = tarfile.TarInfo(name)
            made.size = len(content)
            tar.addfile(made, io.BytesIO(content))
