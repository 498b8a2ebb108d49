"""Requests as the host makes them."""

from __future__ import annotations

from typing import Any

from kaito_core.api.labels import WORKSPACE, WORKSPACE_NAMESPACE
from kaito_core.plugins.types import Gpu, NodeRequest, Offer, Requirements

ID = "ws0123456ab"
A100 = Gpu("A100 80GB", 80 << 30)
V100 = Gpu("V100", 16 << 30)
NC6S = Offer("Standard_NC6s_v3", 6, 100 << 30, V100, 1, "karpenter", "azure", "eastus")
NC24ADS = Offer("Standard_NC24ads_A100_v4", 24, 200 << 30, A100, 1, "karpenter", "azure", "eastus")
TAGS = {WORKSPACE: "phi", WORKSPACE_NAMESPACE: "team"}


def request(offer: Offer = NC6S, *also: Offer, request_id: str = ID, **requirements: Any) -> NodeRequest:
    return NodeRequest(request_id, offer, Requirements(**requirements), TAGS, tuple(also))
