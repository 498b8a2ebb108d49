"""kaito's own conformance kit, against the cluster in memory with a Karpenter in it."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

import pytest
from asking import NC24ADS
from karpenter_double import AKS_CLASS, Cluster

from kaito_core.kube.errors import Forbidden, TooManyRequests, Unreachable
from kaito_core.plugins.types import (
    InsufficientCapacity,
    NodeProvisioner,
    NotAuthorized,
    ProvisioningError,
    QuotaExceeded,
    Requirements,
    Transient,
    Unsupported,
)
from kaito_core.testing.conformance import NodeProvisionerTests
from kaito_provisioner_karpenter.provisioner import KarpenterNodes

WORDS = {
    QuotaExceeded: "VcpuLimitExceeded: You have requested more vCPU capacity than your current vCPU limit of 32 allows",
    Unsupported: "VMSizeNotSupported: the requested VM size is not supported",
}
"""With which a launch fails for good; the others are said by the API server, or by an event."""


class Karpenter:
    """The cluster, and what the kit asks of a cloud."""

    def __init__(self) -> None:
        self.cluster = Cluster(AKS_CLASS)
        self.cluster.before, self.cluster.after = self._before, self._after
        self.coming: list[ProvisioningError] = []
        self.refused: dict[str, ProvisioningError] = {}
        """By claim."""
        self.lost = 0

    def make(self) -> NodeProvisioner:
        environ = {"KAITO_AWS_CHECKS": "off", "KAITO_REGION": "eastus"}
        made = KarpenterNodes(environ, clock=lambda: self.cluster.now)
        made.attach(self.cluster)
        return made

    def fail_next(self, failure: ProvisioningError) -> None:
        self.coming.append(failure)

    def lose_answer_next(self) -> None:
        self.lost += 1

    def machines(self) -> Collection[str]:
        claims = [n for n in self.cluster.claims if n not in self.refused]
        with_claim = {self.cluster.node_name(n) for n in self.cluster.claims}
        return [*claims, *(n for n in self.cluster.nodes if n not in with_claim)]

    def advance(self) -> None:
        self.cluster.now += 30
        self.cluster.finish_deletions()
        for name in list(self.cluster.claims):
            failure = self.refused.get(name)
            registered = self.cluster.conditions(name).get("Registered") == "True"
            if isinstance(failure, InsufficientCapacity):
                self.cluster.no_capacity(name)
            elif failure is not None:
                self.cluster.launch_failed(name, WORDS[type(failure)])
            elif registered:
                self.cluster.initialize(name)
            else:
                self.cluster.register(name)

    def _before(self, verb: str) -> None:
        if verb != "apply" or not self.coming:
            return
        failure = self.coming[0]
        if isinstance(failure, NotAuthorized):
            raise self._said(Forbidden("nodeclaims.karpenter.sh is forbidden", status=403))
        if isinstance(failure, Transient):
            raise self._said(TooManyRequests("too many requests", status=429, retry_after=failure.retry_after or 1.0))

    def _said(self, error: Exception) -> Exception:
        del self.coming[0]
        return error

    def _after(self, verb: str) -> None:
        if verb == "apply" and self.coming:
            self.refused[self.cluster.made[-1]] = self.coming.pop(0)
        if self.lost:
            self.lost -= 1
            raise Unreachable("cut off")


class TestKarpenter(NodeProvisionerTests):
    plugin = "kaito_provisioner_karpenter.plugin"
    requirements = Requirements(instance_types=(NC24ADS.instance_type,))
    capabilities: ClassVar = {
        "spot": True,
        "several": True,
        "lost_answers": True,
        "retry_after": True,
        "insufficient_capacity": True,
        "quota_exceeded": True,
        "not_authorized": True,
        "unsupported": True,
        "transient": True,
    }

    @pytest.fixture
    def cloud(self) -> Karpenter:
        return Karpenter()
