"""The kinds of objects that kaito reads and writes, and where the API server has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

Object = dict[str, Any]
"""A Kubernetes object as the API server sends it."""


@dataclass(frozen=True)
class Kind:
    """A kind of object. ``str(kind)`` is how people write it: ``jobs.batch``."""

    api_version: str
    """``v1``, ``batch/v1``."""
    kind: str
    plural: str
    namespaced: bool = True

    @property
    def group(self) -> str:
        """``batch``; empty for the core group."""
        return self.api_version.rpartition("/")[0]

    def path(self, namespace: str = "", name: str = "", subresource: str = "") -> str:
        """The URL path of one object, or of the collection: of one namespace, or of all when ``namespace`` is empty."""
        root = f"/apis/{self.api_version}" if self.group else f"/api/{self.api_version}"
        where = f"/namespaces/{namespace}" if self.namespaced and namespace else ""
        parts = [root + where, self.plural, name, subresource]
        return "/".join(p for p in parts if p)

    def __str__(self) -> str:
        return f"{self.plural}.{self.group}" if self.group else self.plural


def owner_reference(owner: Object) -> Object:
    """What a child of ``owner`` says in its ``ownerReferences``: it goes when its owner goes."""
    return {
        "apiVersion": owner["apiVersion"],
        "kind": owner["kind"],
        "name": owner["metadata"]["name"],
        "uid": owner["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }


WORKSPACES: Final = Kind("kaito.sh/v1beta1", "Workspace", "workspaces")
INFERENCE_SETS: Final = Kind("kaito.sh/v1beta1", "InferenceSet", "inferencesets")
JOBS: Final = Kind("batch/v1", "Job", "jobs")
PODS: Final = Kind("v1", "Pod", "pods")
CONFIG_MAPS: Final = Kind("v1", "ConfigMap", "configmaps")
SECRETS: Final = Kind("v1", "Secret", "secrets")
VOLUME_CLAIMS: Final = Kind("v1", "PersistentVolumeClaim", "persistentvolumeclaims")
EVENTS: Final = Kind("v1", "Event", "events")
REVISIONS: Final = Kind("apps/v1", "ControllerRevision", "controllerrevisions")
LEASES: Final = Kind("coordination.k8s.io/v1", "Lease", "leases")
STATEFUL_SETS: Final = Kind("apps/v1", "StatefulSet", "statefulsets")
SERVICES: Final = Kind("v1", "Service", "services")
ENDPOINT_SLICES: Final = Kind("discovery.k8s.io/v1", "EndpointSlice", "endpointslices")
DEPLOYMENTS: Final = Kind("apps/v1", "Deployment", "deployments")
DAEMON_SETS: Final = Kind("apps/v1", "DaemonSet", "daemonsets")
NAMESPACES: Final = Kind("v1", "Namespace", "namespaces", namespaced=False)
NODES: Final = Kind("v1", "Node", "nodes", namespaced=False)
STORAGE_CLASSES: Final = Kind("storage.k8s.io/v1", "StorageClass", "storageclasses", namespaced=False)
CRDS: Final = Kind("apiextensions.k8s.io/v1", "CustomResourceDefinition", "customresourcedefinitions", namespaced=False)
