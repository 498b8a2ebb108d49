"""What several tests share: a control plane, and one that knows what a Workspace is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from kaito_core.testing.cluster import Cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """An API server and its controllers; no node."""
    from kaito_core.testing.cluster import running_cluster, why_no_cluster

    if reason := why_no_cluster():
        pytest.skip(reason)
    with running_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def workspaces(cluster: Cluster) -> Cluster:
    """The same, and it serves Workspaces."""
    from kaito_core.api.crd import crd
    from kaito_core.kube.client import connect
    from kaito_core.kube.kinds import CRDS, WORKSPACES

    client = connect(kubeconfig=str(cluster.kubeconfig))
    client.apply(CRDS, crd())
    while not client.serves(WORKSPACES):
        time.sleep(0.1)
    return cluster
