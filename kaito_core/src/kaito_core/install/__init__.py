"""The objects that `kaito install` makes: those of the Helm chart at its defaults, rendered when the package was built.

There is one description of them, ``charts/kaito``; ``manifests.yaml`` is written from it by ``scripts/manifests.py``, with
three words left to fill in.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any, Final, cast

from kaito_core.kube.kinds import CRDS, DEPLOYMENTS, NAMESPACES, Kind, Object

NAMESPACE: Final = "KAITO-NAMESPACE"
REGISTRY: Final = "KAITO-REGISTRY"
TAG: Final = "KAITO-TAG"

MANAGED_BY: Final = "app.kubernetes.io/managed-by"
OURS: Final = f"{MANAGED_BY}=kaito,app.kubernetes.io/instance=kaito"
"""The label selector of everything that `kaito install` ever made, but for the definition and the namespace."""

_RBAC = "rbac.authorization.k8s.io/v1"
KINDS: Final = (
    Kind("v1", "ServiceAccount", "serviceaccounts"),
    Kind(_RBAC, "ClusterRole", "clusterroles", namespaced=False),
    Kind(_RBAC, "ClusterRoleBinding", "clusterrolebindings", namespaced=False),
    Kind(_RBAC, "Role", "roles"),
    Kind(_RBAC, "RoleBinding", "rolebindings"),
    Kind("v1", "Service", "services"),
    Kind("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies"),
    Kind("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets"),
    DEPLOYMENTS,
)
"""What the controller is made of, in the order in which it is made; it is removed the other way round."""


def kind_of(obj: Object) -> Kind:
    """The kind of one of our objects."""
    known = {(k.api_version, k.kind): k for k in (*KINDS, CRDS, NAMESPACES)}
    return known[obj["apiVersion"], obj["kind"]]


def definition() -> Object:
    """The CustomResourceDefinition of Workspace."""
    return definitions()[0]


def definitions() -> tuple[Object, ...]:
    """The CustomResourceDefinitions: of Workspace, and of InferenceSet."""
    import yaml

    from kaito_core.api.crd import crd, crd_yaml, inference_set_crd

    return tuple(cast(Object, yaml.safe_load(crd_yaml(d))) for d in (crd(), inference_set_crd()))


def namespace(name: str) -> Object:
    """The namespace of the controller; it fits the strictest Pod Security Standard, and is held to it."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def objects(namespace: str, registry: str, tag: str) -> list[Object]:
    """The controller, ready to be applied in this order."""
    import yaml

    text = files(__name__).joinpath("manifests.yaml").read_text(encoding="utf-8")
    for word, value in ((NAMESPACE, namespace), (REGISTRY, registry), (TAG, tag)):
        text = text.replace(word, value)
    found: list[dict[str, Any]] = [obj for obj in yaml.safe_load_all(text) if obj]
    return sorted(found, key=lambda obj: KINDS.index(kind_of(obj)))
