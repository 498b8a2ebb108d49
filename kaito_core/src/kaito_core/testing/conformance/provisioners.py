"""The standard tests of node provisioners, against the author's fake cloud or a live account.

class TestMyCloud(NodeProvisionerTests):
    plugin = "my_cloud.plugin"
    capabilities = {"spot": False, "lost_answers": True, "insufficient_capacity": True, "transient": True}

    @pytest.fixture
    def cloud(self) -> Iterator[Cloud]:
        with FakeCloud() as cloud:
            yield cloud
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Final

import pytest

from kaito_core.plugins.installed import PROVISIONERS, Kind
from kaito_core.plugins.types import (
    InsufficientCapacity,
    NodeProvisioner,
    NodeRequest,
    NodeStatus,
    NotAuthorized,
    Offer,
    ProvisioningError,
    QuotaExceeded,
    Requirements,
    Transient,
    Unsupported,
    Watched,
)
from kaito_core.testing.conformance.asking import TAGS, best_offer, give_back, new_id, request, until, worded
from kaito_core.testing.conformance.base import Kit, declared, proper_name
from kaito_core.testing.conformance.cloud import Cloud

FAILURES: Final[Mapping[str, ProvisioningError]] = {
    "insufficient_capacity": InsufficientCapacity("there is none of it now"),
    "quota_exceeded": QuotaExceeded("the account may have no more of it"),
    "not_authorized": NotAuthorized("these credentials do not allow it"),
    "unsupported": Unsupported("that cannot be had here"),
    "transient": Transient("try again"),
}

CAPABILITIES: Final[Mapping[str, str]] = {
    "spot": "spot machines are offered where they are asked for",
    "several": "one request may be for several machines",
    "lost_answers": "Cloud.lose_answer_next works",
    "retry_after": "the cloud says how long to wait, and Transient.retry_after hands it on",
    **{name: f"Cloud.fail_next works for {type(failure).__name__}" for name, failure in FAILURES.items()},
}
"""What may be declared. What is declared as True is tested; all else is not."""

RETRY_AFTER: Final = 17.0


class NodeProvisionerTests(Kit):
    """See the module."""

    kind: ClassVar[Kind[Any]] = PROVISIONERS

    capabilities: ClassVar[Mapping[str, bool]] = {}
    """See `CAPABILITIES`."""
    requirements: ClassVar[Requirements] = Requirements()
    """What the machines of the tests are asked for with: name an instance type here to choose what a live account buys."""
    steps: ClassVar[int] = 60
    """How often time passes (`Cloud.advance`) before a machine that is not ready, or not gone, is an error."""
    examples: ClassVar[int] = 40
    """Orders of calls that are tried. A live account will want few: below 10, one that fails is not made shorter either."""

    # --- what the tests stand on

    @pytest.fixture
    def cloud(self) -> Iterator[Cloud]:
        """Override it: an empty cloud of your own; see `kaito_core.testing.conformance.Cloud`."""
        pytest.skip("no fixture `cloud`: nothing to buy machines from")

    @pytest.fixture
    def provisioner(self, cloud: Cloud) -> NodeProvisioner:
        """A provisioner of that cloud."""
        return cloud.make()

    @pytest.fixture
    def offer(self, provisioner: NodeProvisioner) -> Offer:
        """What is bought."""
        found = best_offer(provisioner.offers(self.requirements))
        if found is None:
            found = next(iter(provisioner.offers(self.requirements)), None)
            why = f"{found}: {found.retired}" if found else "no offers at all"
            pytest.fail(
                f"it offers nothing that can be had ({why}): set `requirements` to what it offers", pytrace=False
            )
        return found

    @pytest.fixture
    def wish(self, offer: Offer) -> NodeRequest:
        """A request for one machine."""
        return request(offer, self.requirements)

    @pytest.fixture(autouse=True)
    def leave_nothing(self, request: pytest.FixtureRequest) -> Iterator[None]:
        """Whatever a test finds: what it bought is given back, of a live account above all."""
        yield
        if "cloud" in request.fixturenames and "cloud" in getattr(request.node, "funcargs", {}):
            cloud = request.node.funcargs["cloud"]
            if cloud.machines():
                provisioner = cloud.make()
                held = [h.request_id for h in provisioner.held() if TAGS.items() <= h.tags.items()]
                give_back(cloud, provisioner, held, self.steps)

    def can(self, capability: str) -> None:
        """Skips what is not declared."""
        if not self.capabilities.get(capability, False):
            pytest.skip(f"capabilities does not declare {capability}: {CAPABILITIES[capability]}")

    def until(self, cloud: Cloud, provisioner: NodeProvisioner, wish: NodeRequest, *phases: str) -> NodeStatus:
        """Asks until the request is in one of these phases. Fails when it never is."""
        status = until(cloud, lambda: provisioner.ensure(wish), phases, self.steps)
        assert status.phase in phases, (
            f"after {self.steps} steps it is {status.phase}, not {phases[0]}: {status.message}"
        )
        return status

    def until_gone(self, cloud: Cloud, provisioner: NodeProvisioner, request_id: str) -> None:
        """Releases until it is gone. Fails when it never is."""
        status = until(cloud, lambda: provisioner.release(request_id), ("absent",), self.steps)
        assert status.phase == "absent", f"after {self.steps} steps it is {status.phase}, not absent: {status.message}"
        assert not cloud.machines(), f"release says absent, and the cloud has {sorted(cloud.machines())}"

    # --- what can be said without a cloud

    def test_its_name_is_proper(self, record: NodeProvisioner) -> None:
        """In the form in which names are stored, and the class says what it must."""
        assert proper_name(record.name), f"{record.name!r}: lower-case letters, digits, '.', '_' and '-'"
        assert isinstance(record.holds, bool)
        assert record.patience > 0, "patience is the number of seconds that a request may be pending"
        assert all(isinstance(w, Watched) for w in record.watches)

    def test_capabilities_are_known(self) -> None:
        """A misspelt one would quietly test nothing."""
        declared(self.capabilities, CAPABILITIES)

    def test_without_a_cluster_it_only_says_no(self, record: NodeProvisioner) -> None:
        """`kaito plan` asks on a laptop: offers, none, or a typed failure; never anything else."""
        try:
            offers = list(type(record)().offers(Requirements()))
        except ProvisioningError as e:
            worded(e)
            return
        except TypeError as e:
            pytest.skip(f"{type(record).__name__} is made with arguments: {e}")
        assert all(isinstance(o, Offer) for o in offers)

    # --- offers

    def test_offers_are_well_formed(self, provisioner: NodeProvisioner) -> None:
        """An unknown price is None, a GPU has a number, and everything says whose it is."""
        wrong = [f"{o}: {w}" for o in provisioner.offers(self.requirements) for w in _faults(o, provisioner.name)]
        assert not wrong, "; ".join(wrong[:5])

    def test_offers_are_stable(self, cloud: Cloud, provisioner: NodeProvisioner) -> None:
        """Asked twice, and asked anew: the same. Nothing is there twice, and looking buys nothing."""
        first, again, anew = (list(p.offers(self.requirements)) for p in (provisioner, provisioner, cloud.make()))
        assert set(map(_key, first)) == set(map(_key, again)) == set(map(_key, anew))
        assert len(set(map(_key, first))) == len(first), "an offer is there twice"
        assert not cloud.machines(), "looking at offers has bought something"

    def test_offers_are_of_the_types_that_are_named(self, provisioner: NodeProvisioner, offer: Offer) -> None:
        """Whatever the case of the letters; of a type that there is not, nothing can be had."""
        for name in (offer.instance_type, offer.instance_type.upper()):
            found = list(provisioner.offers(replace(self.requirements, instance_types=(name,))))
            assert found, f"it offers {offer.instance_type}, and nothing when {name} is asked for"
            assert {o.instance_type.lower() for o in found} == {offer.instance_type.lower()}
        nowhere = provisioner.offers(replace(self.requirements, instance_types=("there-is-no-such-type",)))
        assert not [o for o in nowhere if not o.retired]

    def test_spot_machines_are_offered_when_they_are_asked_for(self, provisioner: NodeProvisioner) -> None:
        """And only then."""
        self.can("spot")
        on_demand = provisioner.offers(replace(self.requirements, capacity_types=("on-demand",)))
        assert {o.capacity_type for o in on_demand if not o.retired} == {"on-demand"}
        spot = provisioner.offers(replace(self.requirements, capacity_types=("spot",)))
        assert {o.capacity_type for o in spot if not o.retired} == {"spot"}

    # --- one request

    def test_nothing_is_known_of_what_was_never_asked_for(self, cloud: Cloud, provisioner: NodeProvisioner) -> None:
        """Absent, and releasing it is no error."""
        nobody = new_id()
        assert provisioner.observe(nobody).phase == "absent"
        assert provisioner.release(nobody).phase == "absent"
        assert nobody not in {h.request_id for h in provisioner.held()}
        assert not cloud.machines()

    def test_a_machine_is_got_and_given_back(
        self, cloud: Cloud, provisioner: NodeProvisioner, wish: NodeRequest
    ) -> None:
        """From nothing to ready, to absent, and nothing is left."""
        ready = self.until(cloud, provisioner, wish, "ready")
        assert ready.id == wish.id
        assert len(ready.nodes) == 1, f"one machine was asked for, and there is {ready.nodes}"
        assert ready.selector, "ready machines need labels that a pod's node affinity can ask for"
        assert len(cloud.machines()) == 1
        seen = provisioner.observe(wish.id)
        assert (seen.phase, seen.nodes, dict(seen.selector)) == ("ready", ready.nodes, dict(ready.selector))
        self.until_gone(cloud, provisioner, wish.id)
        assert provisioner.observe(wish.id).phase == "absent"

    def test_asking_twice_buys_once(self, cloud: Cloud, provisioner: NodeProvisioner, wish: NodeRequest) -> None:
        """At once, while it comes, and when it is there."""
        provisioner.ensure(wish)
        provisioner.ensure(wish)
        assert len(cloud.machines()) <= 1
        self.until(cloud, provisioner, wish, "ready")
        assert provisioner.ensure(wish).phase == "ready"
        assert len(cloud.machines()) == 1
        self.until_gone(cloud, provisioner, wish.id)

    def test_after_a_crash_a_new_object_goes_on(self, cloud: Cloud, wish: NodeRequest) -> None:
        """The host dies after it has asked and before it could note so: the next one asks the same, and buys nothing."""
        cloud.make().ensure(wish)
        after = cloud.make()
        self.until(cloud, after, wish, "ready")
        assert len(cloud.machines()) == 1
        self.until_gone(cloud, cloud.make(), wish.id)

    def test_what_is_held_can_be_found_again(
        self, cloud: Cloud, provisioner: NodeProvisioner, wish: NodeRequest
    ) -> None:
        """By a host that knows of nothing: with the tags of the request, so that it knows whose it is."""
        if not provisioner.holds:
            pytest.skip("it holds nothing that would have to be given back")
        self.until(cloud, provisioner, wish, "ready")
        (held,) = [h for h in cloud.make().held() if h.request_id == wish.id]
        assert TAGS.items() <= held.tags.items(), f"the request has the tags {TAGS}, and is held with {dict(held.tags)}"
        assert held.age >= 0
        self.until_gone(cloud, provisioner, wish.id)
        assert wish.id not in {h.request_id for h in provisioner.held()}

    def test_what_is_still_coming_can_be_given_back(
        self, cloud: Cloud, provisioner: NodeProvisioner, wish: NodeRequest
    ) -> None:
        """Nobody has to wait for a machine to be rid of it."""
        provisioner.ensure(wish)
        self.until_gone(cloud, cloud.make(), wish.id)
        cloud.advance()
        assert not cloud.machines(), "it came after it had been given back"

    def test_giving_back_twice_is_giving_back_once(
        self, cloud: Cloud, provisioner: NodeProvisioner, wish: NodeRequest
    ) -> None:
        self.until(cloud, provisioner, wish, "ready")
        assert provisioner.release(wish.id).phase in ("releasing", "absent")
        self.until_gone(cloud, provisioner, wish.id)
        assert provisioner.release(wish.id).phase == "absent"

    def test_two_requests_are_two(self, cloud: Cloud, provisioner: NodeProvisioner, offer: Offer) -> None:
        """One is given back, and the other stays."""
        one, other = (request(offer, self.requirements) for _ in range(2))
        first, second = (self.until(cloud, provisioner, w, "ready") for w in (one, other))
        assert not set(first.nodes) & set(second.nodes)
        assert dict(first.selector) != dict(second.selector), "their selectors would mix their machines up"
        status = until(cloud, lambda: provisioner.release(one.id), ("absent",), self.steps)
        assert status.phase == "absent"
        assert provisioner.observe(other.id).phase == "ready"
        assert len(cloud.machines()) == 1
        self.until_gone(cloud, provisioner, other.id)

    def test_several_machines_of_one_request(self, cloud: Cloud, provisioner: NodeProvisioner, offer: Offer) -> None:
        """Ready when all are, and given back together."""
        self.can("several")
        wish = request(offer, self.requirements, count=2)
        ready = self.until(cloud, provisioner, wish, "ready")
        assert len(set(ready.nodes)) == 2
        assert len(cloud.machines()) == 2
        self.until_gone(cloud, provisioner, wish.id)

    # --- what goes wrong

    @pytest.mark.parametrize("failure", FAILURES)
    def test_failures_are_typed(
        self, cloud: Cloud, provisioner: NodeProvisioner, wish: NodeRequest, failure: str
    ) -> None:
        """The core acts on the type: the next offer, the end, or again. The words are the cloud's own."""
        self.can(failure)
        expected = type(FAILURES[failure])
        cloud.fail_next(FAILURES[failure])
        got = self._failure(cloud, provisioner, wish)
        assert type(got) is expected, f"{type(got).__name__} ({got}), not {expected.__name__}"
        assert str(got), "a failure without a word"
        self.until_gone(cloud, provisioner, wish.id)
        after = replace(wish, id=new_id())
        self.until(cloud, provisioner, after, "ready")
        self.until_gone(cloud, provisioner, after.id)

    def test_it_hands_on_how_long_to_wait(self, cloud: Cloud, provisioner: NodeProvisioner, wish: NodeRequest) -> None:
        """What the cloud asks for, in seconds."""
        self.can("retry_after")
        cloud.fail_next(Transient("too many requests", RETRY_AFTER))
        got = self._failure(cloud, provisioner, wish)
        assert isinstance(got, Transient), f"{type(got).__name__}, not Transient"
        assert got.retry_after == RETRY_AFTER, (
            f"retry_after is {got.retry_after}, and the cloud said {RETRY_AFTER:.0f} s"
        )
        self.until_gone(cloud, provisioner, wish.id)

    def test_an_answer_that_is_lost_buys_nothing_twice(self, cloud: Cloud, wish: NodeRequest) -> None:
        """The cloud has acted, and nobody heard of it; the one who asks again may be another host."""
        self.can("lost_answers")
        cloud.lose_answer_next()
        _quietly(lambda: cloud.make().ensure(wish))
        after = cloud.make()
        self.until(cloud, after, wish, "ready")
        assert len(cloud.machines()) == 1
        cloud.lose_answer_next()
        _quietly(lambda: after.release(wish.id))
        self.until_gone(cloud, cloud.make(), wish.id)

    def test_any_order_of_calls(self, cloud: Cloud, offer: Offer) -> None:
        """Hypothesis looks for an order of calls, crashes, failures and lost answers that buys too much or leaves something."""
        pytest.importorskip("hypothesis", reason="pip install 'kaito-core[test]'")
        from kaito_core.testing.conformance import contract

        failures = tuple(f for n, f in FAILURES.items() if self.capabilities.get(n, False))

        waiting: list[str] = []

        def make() -> contract.Contract:
            return contract.Contract(
                cloud,
                offer,
                self.requirements,
                failures,
                lost_answers=self.capabilities.get("lost_answers", False),
                count=2 if self.capabilities.get("several", False) else 1,
                steps=self.steps,
                waiting=waiting,
            )

        contract.run(make, self.examples, 20)

    def _failure(self, cloud: Cloud, provisioner: NodeProvisioner, wish: NodeRequest) -> ProvisioningError:
        """How the request fails: raised, or said by a status."""
        try:
            status = self.until(cloud, provisioner, wish, "failed", "ready")
        except ProvisioningError as e:
            return e
        assert status.phase == "failed", "the cloud has refused, and the request is ready"
        assert status.failure is not None, "a failed request says of what: NodeStatus.failure"
        return status.failure


def _quietly(call: Any) -> None:
    try:
        call()
    except ProvisioningError as e:
        worded(e)


def _key(offer: Offer) -> tuple[str, ...]:
    return (offer.instance_type, offer.cloud, offer.region, offer.zone, offer.capacity_type)


def _faults(offer: Offer, name: str) -> Iterator[str]:
    if not isinstance(offer, Offer):
        yield "not an Offer"
        return
    if not offer.instance_type.strip():
        yield "no instance_type"
    if offer.cpus <= 0 or offer.memory <= 0:
        yield f"{offer.cpus} CPUs and {offer.memory} bytes of RAM"
    if offer.gpus and (offer.gpu is None or offer.gpu.memory <= 0):
        yield f"{offer.gpus} GPUs of no known kind or memory"
    if offer.gpu is not None and offer.gpus <= 0:
        yield f"a {offer.gpu.model}, and none of them"
    if offer.provisioner not in (name, "") or (not offer.provisioner and not offer.retired):
        yield f"provisioner is {offer.provisioner!r}, not {name!r}"
    price = offer.price
    if price is not None and not price.per_hour > 0:
        yield f"the price is {price.per_hour}: one that is not known is None"
    if price is not None and (not price.source or not re.match(r"\d{4}-\d\d-\d\d", price.date)):
        yield "a price says who said so, and when (2026-01-31)"
