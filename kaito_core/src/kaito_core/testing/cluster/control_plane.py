"""etcd, API server, controller manager and scheduler: all that Kubernetes is without nodes. Any user can run it."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kaito_core.testing.cluster.programs import Daemons, run, until
from kaito_core.testing.registry import free_port

SERVICES = "10.96"
"""The first half of every Service's address."""

ADMIN = "admin"


class ControlPlane:
    """One API server of its own, with everything that it keeps in ``folder``.

    ``host`` is the address by which nodes reach it; without one it listens on the loopback only."""

    def __init__(self, folder: Path, host: str = "", controllers: str = "") -> None:
        self.folder = folder
        self.host = host
        self.port = free_port()
        self.kubeconfig = folder / f"{ADMIN}.kubeconfig"
        self._controllers = controllers
        self._etcd = free_port()
        self._daemons = Daemons(folder)
        self._admin = secrets.token_hex(16)

    def start(self) -> None:
        """RuntimeError when it does not get ready."""
        self._identities()
        peer = free_port()
        self._daemons.start(
            "etcd",
            ["--data-dir=etcd", "--unsafe-no-fsync", f"--listen-client-urls=http://127.0.0.1:{self._etcd}",
             f"--advertise-client-urls=http://127.0.0.1:{self._etcd}", f"--listen-peer-urls=http://127.0.0.1:{peer}",
             f"--initial-advertise-peer-urls=http://127.0.0.1:{peer}", f"--initial-cluster=default=http://127.0.0.1:{peer}"],
        )  # fmt: skip
        self.start_api_server()
        manager = ["--service-account-private-key-file=accounts.key", "--root-ca-file=ca.crt",
                   "--use-service-account-credentials"]  # fmt: skip
        self._controller("kube-controller-manager", *manager, *([f"--controllers={self._controllers}"] * bool(self._controllers)))  # fmt: skip
        self._controller("kube-scheduler")
        log = self._daemons.log("kube-controller-manager")
        until("the default service account", lambda: bool(self.kubectl("get", "sa", "default", check=False)), log)

    def start_api_server(self) -> None:
        """Begin, or begin again after `kill_api_server`: same address, same objects."""
        self._daemons.start(
            "kube-apiserver",
            [f"--etcd-servers=http://127.0.0.1:{self._etcd}", f"--secure-port={self.port}",
             f"--bind-address={'0.0.0.0' if self.host else '127.0.0.1'}",  # noqa: S104 – nodes come over the network
             f"--advertise-address={self.host}" if self.host else "--endpoint-reconciler-type=none",
             "--tls-cert-file=apiserver.crt", "--tls-private-key-file=apiserver.key", "--client-ca-file=ca.crt",
             "--token-auth-file=tokens.csv", "--authorization-mode=Node,RBAC", "--allow-privileged=true",
             "--service-account-issuer=https://kubernetes.default.svc", "--service-account-key-file=accounts.key",
             "--service-account-signing-key-file=accounts.key", f"--service-cluster-ip-range={SERVICES}.0.0/16",
             "--kubelet-preferred-address-types=InternalIP", "--kubelet-client-certificate=kubelet-client.crt",
             "--kubelet-client-key=kubelet-client.key", "--audit-log-path=audit.log", "--audit-policy-file=audit.json"],
        )  # fmt: skip
        ready = ("get", "--raw", "/readyz")
        until("the API server", lambda: bool(self.kubectl(*ready, check=False)), self._daemons.log("kube-apiserver"))

    def kill_api_server(self) -> None:
        self._daemons.kill("kube-apiserver")

    def stop(self) -> None:
        self._daemons.stop()

    def kubectl(self, *arguments: str, stdin: str = "", check: bool = True) -> str:
        """What it prints; without ``check`` nothing when it fails."""
        done = run("kubectl", "--kubeconfig", self.kubeconfig, *arguments, folder=self.folder, check=check, stdin=stdin)
        return done.stdout if done.returncode == 0 else ""

    def audit(self) -> Iterator[dict[str, Any]]:
        """The requests that the API server has answered, with verb, object and user agent, the oldest first."""
        with (self.folder / "audit.log").open(encoding="utf-8") as lines:
            for line in lines:
                if line.endswith("\n"):  # the last one may be half written
                    yield json.loads(line)

    def certificate(self, name: str, subject: str, names: str = "") -> None:
        """``name.crt`` and ``name.key``, signed by the cluster; ``names`` are those of a server."""
        extensions = self.folder / f"{name}.ext"
        extensions.parent.mkdir(parents=True, exist_ok=True)
        extensions.write_text(f"subjectAltName={names}\n" if names else "keyUsage=digitalSignature\n", "utf-8")
        run("openssl", "req", *_NEW_KEY, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", subject, folder=self.folder)  # fmt: skip
        run("openssl", "x509", "-req", "-in", f"{name}.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial",
            "-days", "365", "-extfile", extensions, "-out", f"{name}.crt", folder=self.folder)  # fmt: skip

    def write_kubeconfig(self, path: Path, user: Mapping[str, Any]) -> None:
        """A kubeconfig for this cluster as that user."""
        server = {"server": f"https://127.0.0.1:{self.port}", "certificate-authority": str(self.folder / "ca.crt")}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": server}],
            "users": [{"name": "test", "user": dict(user)}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        }
        path.write_text(json.dumps(config, indent=1), "utf-8")

    def write_kubeconfig_of_node(self, path: Path, node: str) -> None:
        """A kubeconfig as that node's kubelet. By impersonation: a certificate's name may have 64 characters, a node's more."""
        self.write_kubeconfig(path, {"token": self._admin, "as": f"system:node:{node}", "as-groups": ["system:nodes"]})

    # --- parts

    def _identities(self) -> None:
        """Who is who: certificates, tokens, kubeconfigs, and what is written down about requests."""
        run("openssl", "req", "-x509", *_NEW_KEY, "-keyout", "ca.key", "-out", "ca.crt", "-days", "365", "-subj", "/CN=test",
            folder=self.folder)  # fmt: skip
        run("openssl", "genrsa", "-out", "accounts.key", "2048", folder=self.folder)
        known = ["DNS:localhost", "DNS:kubernetes", "DNS:kubernetes.default", "DNS:kubernetes.default.svc",
                 "IP:127.0.0.1", f"IP:{SERVICES}.0.1", *([f"IP:{self.host}"] * bool(self.host))]  # fmt: skip
        self.certificate("apiserver", "/CN=kube-apiserver", ",".join(known))
        self.certificate("kubelet-client", "/O=system:masters/CN=kubelet-client")
        tokens = []
        for who in (ADMIN, "kube-controller-manager", "kube-scheduler", "kube-proxy"):
            token, user = (self._admin, who) if who == ADMIN else (secrets.token_hex(16), f"system:{who}")
            tokens.append(f'{token},{user},{who},"{"system:masters" if who == ADMIN else ""}"\n')
            self.write_kubeconfig(self.folder / f"{who}.kubeconfig", {"token": token})
        (self.folder / "tokens.csv").write_text("".join(tokens), "utf-8")
        policy = {"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": ["RequestReceived"],
                  "rules": [{"level": "Metadata"}]}  # fmt: skip
        (self.folder / "audit.json").write_text(json.dumps(policy), "utf-8")

    def _controller(self, name: str, *flags: str) -> None:
        kinds = ("kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig")
        config = [f"--{kind}={name}.kubeconfig" for kind in kinds]
        self._daemons.start(name, [*config, "--leader-elect=false", f"--secure-port={free_port()}", *flags])


_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
