"""What every node provisioner keeps, checked by kaito's own tests against the shop of `shop_server.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import pytest
from kaito_core.testing.conformance import NodeProvisionerTests
from shop_server import Shop


class TestProvisioner(NodeProvisionerTests):
    plugin = "kaito_provisioner_machine_shop.plugin"
    # What the cloud can do, and the shop can play: each is tested. What is left out is not.
    capabilities: ClassVar[Mapping[str, bool]] = {
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
    def cloud(self) -> Iterator[Shop]:
        with Shop() as shop:
            yield shop
