"""A real Kubernetes cluster on this machine, for tests: the projects' own programs, no container engine, no network.

    with running_cluster() as cluster:              # API server, controllers, scheduler: any user, a few seconds
        client = connect(kubeconfig=str(cluster.kubeconfig))

    with running_cluster(node=True) as cluster:     # root: the node ``node-1``, real containers
        cluster.join("gpu-1", labels={"accelerator": "nvidia"}, gpus=1)
        cluster.leave("gpu-1")

The programs come from the folder that ``$KUBEBUILDER_ASSETS`` names; `why_no_cluster` says what is missing.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from kaito_core.testing.cluster.control_plane import ControlPlane
from kaito_core.testing.cluster.node import Nodes, host_address
from kaito_core.testing.cluster.programs import assets, why_no_cluster

__all__ = ["Cluster", "running_cluster", "why_no_cluster"]


class Cluster:
    """A cluster that runs. What needs nodes raises `RuntimeError` in one that has none."""

    def __init__(self, control_plane: ControlPlane, nodes: Nodes | None) -> None:
        self._control_plane = control_plane
        self._nodes = nodes

    @property
    def kubeconfig(self) -> Path:
        """Of somebody who may do everything."""
        return self._control_plane.kubeconfig

    @property
    def programs(self) -> Path:
        """The folder of kubectl and the others."""
        found = assets()
        assert found is not None, "it runs, so somebody said where the programs are"
        return found

    def kubectl(self, *arguments: str, stdin: str = "", check: bool = True) -> str:
        """What it prints. RuntimeError with its words when it fails; nothing instead without ``check``."""
        return self._control_plane.kubectl(*arguments, stdin=stdin, check=check)

    def audit(self) -> Iterator[dict[str, Any]]:
        """The requests that the API server has answered, with verb, object and user agent, the oldest first."""
        return self._control_plane.audit()

    def kill_api_server(self) -> None:
        """It is away, without a word; `start_api_server` brings it back with the same address and the same objects."""
        self._control_plane.kill_api_server()

    def start_api_server(self) -> None:
        self._control_plane.start_api_server()

    # --- nodes

    def join(
        self, name: str, *, labels: Mapping[str, str] | None = None, taints: Sequence[str] = (), gpus: int = 0
    ) -> None:
        """A new machine joins; taints are ``key=value:Effect``. GPUs are only said to be there: scheduling is real, the
        device is not."""
        self._with_nodes.join(name, labels or {}, taints, gpus)

    def leave(self, name: str) -> None:
        """The machine is gone, without a word; its Node object stays until somebody deletes it."""
        self._with_nodes.leave(name)

    def load(self, name: str, archive: Path) -> None:
        """Give an image archive to a node."""
        self._with_nodes.load(name, archive)

    def trust(self, host: str) -> None:
        """Let nodes pull from ``machine.test:PORT``, a registry of this machine, over plain HTTP."""
        self._with_nodes.trust(host)

    @property
    def _with_nodes(self) -> Nodes:
        if self._nodes is None:
            raise RuntimeError("this cluster has no nodes: start it with running_cluster(node=True)")
        return self._nodes


@contextmanager
def running_cluster(folder: Path | None = None, *, node: bool = False, controllers: str = "") -> Iterator[Cluster]:
    """A cluster of its own until the block ends, then nothing of it is left; everything is in ``folder``, or in a temporary
    one. ``controllers`` are those of kube-controller-manager, as its flag takes them.

    Raises `RuntimeError` when it cannot run here or does not get ready."""
    if reason := why_no_cluster(node):
        raise RuntimeError(reason)
    with ExitStack() as stack:
        # Short: the path of a Unix socket in it may have 107 characters.
        where = Path(tempfile.mkdtemp(prefix="kaito-cluster-")) if folder is None else folder
        where.mkdir(parents=True, exist_ok=True)
        if folder is None:
            stack.callback(shutil.rmtree, where, ignore_errors=True)
        control_plane = ControlPlane(where, host_address() if node else "", controllers)
        stack.callback(control_plane.stop)
        control_plane.start()
        nodes = Nodes(control_plane) if node else None
        if nodes is not None:
            stack.callback(nodes.stop)
            nodes.start()
            nodes.join("node-1", {}, (), 0)
        yield Cluster(control_plane, nodes)
