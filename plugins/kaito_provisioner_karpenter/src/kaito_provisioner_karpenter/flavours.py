"""Which Karpenter a cluster has, and with which node class: read from the cluster, or named. `pick` is pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from kaito_core.kube.kinds import Kind
from kaito_core.plugins.types import Unsupported

NODE_CLAIMS: Final = Kind("karpenter.sh/v1", "NodeClaim", "nodeclaims", namespaced=False)


@dataclass(frozen=True)
class Flavour:
    """One kind of Karpenter: what its claims look like, as far as they differ."""

    name: str
    node_class: Kind
    cloud: str = ""
    """As in the catalogue; empty when it knows no machines of it."""
    pool: str = ""
    """The label ``karpenter.sh/nodepool`` of a claim; none where it would change how errors are told."""
    storage: str = ""
    """The request for storage, where the controller insists on one."""
    one_type: bool = False
    """The controller reads the first instance type only, and knows no zones and no spot."""
    in_turn: bool = False
    """Machines of one request are asked for one after the other."""
    agent_pool: bool = False
    """The claim's name becomes the name of an AKS agent pool: ``^[a-z][a-z0-9]{0,11}$``."""


def _class(api_version: str, kind: str) -> Kind:
    return Kind(api_version, kind, f"{kind.lower()}es", namespaced=False)


AZURE: Final = Flavour("azure", _class("karpenter.azure.com/v1beta1", "AKSNodeClass"), cloud="azure")
AWS: Final = Flavour("aws", _class("karpenter.k8s.aws/v1", "EC2NodeClass"), cloud="aws")
KWOK: Final = Flavour("kwok", _class("karpenter.kwok.sh/v1alpha1", "KWOKNodeClass"))
GPU_PROVISIONER: Final = Flavour(
    "gpu-provisioner",
    _class("kaito.sh/v1alpha1", "KaitoNodeClass"),
    cloud="azure",
    # It owns, and cleans up, only pools that have this label and a kaito.sh/workspace one.
    pool="kaito",
    # KAITO's default: it becomes the size of the disk.
    storage="1024Gi",
    one_type=True,
    in_turn=True,
    agent_pool=True,
)
WITH_OBJECTS: Final = (AZURE, AWS, KWOK)
"""Those whose node classes are objects that can be listed. gpu-provisioner's is a name and nothing else."""

_CLOUDS: Final = {"eks.amazonaws.com": "aws"}
"""Groups of other node classes whose cloud the catalogue knows: EKS Auto Mode."""


@dataclass(frozen=True)
class NodeClass:
    """A node class that claims can name."""

    flavour: Flavour
    name: str
    trouble: str = ""
    """Why Karpenter would throw a claim away that names it now; empty when it would not."""

    def __str__(self) -> str:
        return f"{self.flavour.node_class.kind}/{self.name}"


def read_node_class(flavour: Flavour, obj: Mapping[str, Any]) -> NodeClass:
    """A node class object, and whether it is ready. Only a ``False`` counts: one without conditions is not judged."""
    conditions = (obj.get("status") or {}).get("conditions") or ()
    ready = next((c for c in conditions if c.get("type") == "Ready"), None)
    if ready is None or ready.get("status") == "True":
        return NodeClass(flavour, obj["metadata"]["name"])
    failed = [c for c in conditions if c.get("status") == "False" and c.get("type") != "Ready"] or [ready]
    words = "; ".join(f"{c.get('reason') or c.get('type')}: {c.get('message') or c.get('status')}" for c in failed)
    return NodeClass(flavour, obj["metadata"]["name"], words)


def other_flavours(crds: Iterable[Mapping[str, Any]]) -> list[Flavour]:
    """Node classes of Karpenters that nobody here has heard of, from the cluster's definitions."""
    known = {f.node_class.group for f in (*WITH_OBJECTS, GPU_PROVISIONER)}
    found = []
    for crd in crds:
        spec = crd["spec"]
        kind, group = spec["names"]["kind"], spec["group"]
        version = next((v["name"] for v in spec["versions"] if v.get("storage") and v.get("served")), "")
        if kind.endswith("NodeClass") and spec.get("scope") == "Cluster" and version and group not in known:
            node_class = Kind(f"{group}/{version}", kind, spec["names"]["plural"], namespaced=False)
            found.append(Flavour(group, node_class, cloud=_CLOUDS.get(group, "")))
    return found


def pick(classes: Sequence[NodeClass], wanted: str = "", *, azure_nodes: bool = False) -> NodeClass:
    """The node class for new claims. ``wanted`` is ``NAME``, ``KIND/NAME`` or ``KIND``; empty: the only one there is.

    Raises `Unsupported`, with what there is, when that leaves none or several."""
    kind, slash, name = wanted.rpartition("/")
    if not slash and wanted.endswith("NodeClass"):
        kind, name = wanted, ""
    if kind == GPU_PROVISIONER.node_class.kind:
        return NodeClass(GPU_PROVISIONER, name or "default")
    fitting = [
        c for c in classes if (not kind or c.flavour.node_class.kind == kind) and (not name or c.name == name)
    ]  # fmt: skip
    there = ", ".join(sorted(map(str, classes)))
    if len(fitting) == 1:
        return fitting[0]
    if wanted and not fitting:
        raise Unsupported(
            f"there is no node class {wanted} in the cluster (there {'are ' + there if there else 'is none'})"
        )
    if fitting:
        raise Unsupported(
            f"the cluster has several node classes and none is named: {', '.join(sorted(map(str, fitting)))}; "
            "name one in KAITO_NODE_CLASS of the controller"
        )
    if azure_nodes:
        # Karpenter's claims and no node class on AKS: KAITO's gpu-provisioner, the one without a definition of its own.
        return NodeClass(GPU_PROVISIONER, "default")
    raise Unsupported(
        "the cluster knows NodeClaims and has no node class: make one as Karpenter's documentation for your cloud says"
    )
