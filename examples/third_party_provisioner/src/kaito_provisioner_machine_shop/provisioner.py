"""The node provisioner ``machine-shop``.

What a request has become is asked of the shop each time; nothing that counts is kept here. The request's id is the key of
the order, and the shop sells once for a key."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from typing import ClassVar

from kaito_core.plugins import (
    Gpu,
    Held,
    InsufficientCapacity,
    NodeProvisioner,
    NodeRequest,
    NodeStatus,
    NotAuthorized,
    Offer,
    Price,
    Requirements,
)

from kaito_provisioner_machine_shop.shop import Order, Shop, Type

URL, TOKEN = "MACHINE_SHOP_URL", "MACHINE_SHOP_TOKEN"

ORDER = "machine-shop.example/order"
"""The label that the shop puts on the nodes of an order, and on no others: its key."""


class MachineShop(NodeProvisioner):
    """See the module."""

    name: ClassVar[str] = "machine-shop"

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        """Connects to nothing: the environment is read when it is first needed."""
        self._environ = os.environ if environ is None else environ

    def offers(self, requirements: Requirements) -> Iterable[Offer]:
        """What the shop sells; without an account, nothing."""
        if not self._environ.get(URL) or "on-demand" not in requirements.capacity_types:
            return []
        named = {t.lower() for t in requirements.instance_types}
        # The shop has one place and calls it nothing.
        if requirements.regions or requirements.zones:
            return []
        sold = self._shop().types()
        return [_offer(t, self.name, requirements.count) for t in sold if not named or t.name.lower() in named]

    def ensure(self, request: NodeRequest) -> NodeStatus:
        shop = self._shop()
        order = shop.find(request.id)
        if order is None:
            labels = {**request.requirements.labels, **request.tags, ORDER: request.id}
            order = shop.order(request.id, request.offer.instance_type, request.requirements.count, labels)
        return _status(order)

    def observe(self, request_id: str) -> NodeStatus:
        order = self._shop().find(request_id)
        return _status(order) if order else NodeStatus(request_id, "absent")

    def release(self, request_id: str) -> NodeStatus:
        """Asks for its end, and says ``absent`` only when the shop knows nothing of it any more."""
        shop = self._shop()
        order = shop.find(request_id)
        if order is None:
            return NodeStatus(request_id, "absent")
        if order.state != "returning":
            shop.give_back(order)
        return NodeStatus(request_id, "releasing", message=f"order {order.number} is being given back")

    def held(self) -> Iterable[Held]:
        """All that was bought and is not gone: kaito gives back what nobody wants."""
        if not self._environ.get(URL):
            return []
        return [Held(o.key, o.labels, o.seconds) for o in self._shop().orders()]

    def _shop(self) -> Shop:
        url, token = self._environ.get(URL, ""), self._environ.get(TOKEN, "")
        if not url or not token:
            raise NotAuthorized(f"there is no account at the shop: set {URL} and {TOKEN}")
        return Shop(url, token)


def _offer(sold: Type, provisioner: str, count: int) -> Offer:
    today = time.strftime("%Y-%m-%d", time.gmtime())
    return Offer(
        sold.name,
        sold.cpus,
        sold.memory,
        Gpu(sold.gpu, sold.gpu_memory, sold.capability),
        sold.gpus,
        provisioner=provisioner,
        cloud="machine-shop",
        price=Price(sold.cents / 100, "machine shop, its own list", today),
        retired="" if sold.stock >= count else f"the shop has {sold.stock} in stock",
    )


def _status(order: Order) -> NodeStatus:
    """In kaito's words. Nodes are named when all of them are there."""
    match order.state:
        case "delivered":
            return NodeStatus(order.key, "ready", nodes=order.machines, selector={ORDER: order.key})
        case "returning":
            return NodeStatus(order.key, "releasing", message=f"order {order.number} is being given back")
        case "cancelled":
            failure = InsufficientCapacity(f"the shop has cancelled order {order.number}: {order.reason}")
            return NodeStatus(order.key, "failed", message=str(failure), failure=failure)
        case _:
            return NodeStatus(order.key, "pending", message=f"order {order.number} is being prepared")
