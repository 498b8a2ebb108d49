"""Any order of calls, new hosts, failures and lost answers, over one cloud: no machine too many, none forgotten, none left.

The cloud is the same in all examples, so that a live account will do as well: ids are never used twice, and what an example that
failed has left behind is counted as somebody else's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from kaito_core.plugins.types import NodeStatus, Offer, ProvisioningError, Requirements
from kaito_core.testing.conformance.asking import TAGS, give_back, new_id, request, worded
from kaito_core.testing.conformance.cloud import Cloud

WHICH = st.sampled_from([0, 1])


class Contract(RuleBasedStateMachine):
    """Two requests, as a host may make them: an id is asked for until it is released, and never again after that."""

    waiting: list[str]
    """What was told to go wrong and may not have yet; shared by all examples."""

    def __init__(
        self,
        cloud: Cloud,
        offer: Offer,
        wanted: Requirements,
        failures: tuple[ProvisioningError, ...],
        *,
        lost_answers: bool,
        count: int,
        steps: int,
        waiting: list[str] | None = None,
    ) -> None:
        super().__init__()
        self.waiting = [] if waiting is None else waiting
        self.cloud, self.offer, self.wanted, self.failures = cloud, offer, wanted, failures
        self.lost_answers, self.count, self.steps = lost_answers, count, steps
        self.ids = [new_id(), new_id()]
        self.asked: set[str] = set()
        self.released: set[str] = set()
        self.gone: set[str] = set()
        self._spend_faults()
        self.others = frozenset(cloud.machines())
        self.provisioner = cloud.make()

    # --- the host

    @rule(which=WHICH)
    def ensure(self, which: int) -> None:
        request_id = self.ids[which]
        if request_id in self.released:
            return
        self.asked.add(request_id)
        wish = request(self.offer, self.wanted, count=self.count, request_id=request_id)
        status = self._call(lambda: self.provisioner.ensure(wish))
        if status is not None and status.phase == "ready":
            assert len(set(status.nodes)) == len(status.nodes) == self.count, (
                f"{status.nodes}: {self.count} were asked for"
            )
            assert status.selector, "ready machines need labels that a pod can ask for"

    @rule(which=WHICH)
    def observe(self, which: int) -> None:
        self._call(lambda: self.provisioner.observe(self.ids[which]))

    @rule(which=WHICH)
    def release(self, which: int) -> None:
        request_id = self.ids[which]
        self.released.add(request_id)
        status = self._call(lambda: self.provisioner.release(request_id))
        if status is not None and status.phase == "absent":
            self.gone.add(request_id)

    @rule()
    def starts_anew(self) -> None:
        """The host dies and another one comes: it knows what the cloud and the cluster know."""
        self.provisioner = self.cloud.make()

    # --- the cloud

    @rule()
    def time_passes(self) -> None:
        self.cloud.advance()

    @precondition(lambda self: self.failures)
    @rule(data=st.data())
    def will_refuse(self, data: st.DataObject) -> None:
        failure = data.draw(st.sampled_from(self.failures))
        self.cloud.fail_next(failure)
        self.waiting.append(type(failure).__name__)

    @precondition(lambda self: self.lost_answers)
    @rule()
    def will_lose_an_answer(self) -> None:
        self.cloud.lose_answer_next()
        self.waiting.append("a lost answer")

    # --- what holds

    @invariant()
    def never_more_than_was_asked_for(self) -> None:
        there = self._own_machines()
        wanted = self.count * len(self.asked - self.gone)
        assert len(there) <= wanted, f"{there}: {wanted} machines were asked for"

    def _call(self, call: Callable[[], NodeStatus]) -> NodeStatus | None:
        try:
            status = call()
        except ProvisioningError as e:
            worded(e)
            return None
        assert isinstance(status, NodeStatus), f"{status!r} is no NodeStatus"
        if status.phase == "failed":
            assert isinstance(status.failure, ProvisioningError), "a failed request says of what: NodeStatus.failure"
        return status

    def teardown(self) -> None:
        """Whoever comes afterwards finds all of it, can give it back, and nothing is left."""
        self._spend_faults()
        provisioner = self.cloud.make()
        own = self._own_machines()
        if provisioner.holds and own:
            held = {h.request_id: dict(h.tags) for h in provisioner.held() if h.request_id in self.ids}
            assert held, f"{own} are there, and held() says nothing of them"
            assert all(TAGS.items() <= tags.items() for tags in held.values()), (
                f"the tags of the requests are lost: {held}"
            )
        left = give_back(self.cloud, provisioner, self.ids, self.steps)
        assert not left, f"{left} are not gone, however often they are released"
        own = self._own_machines()
        assert not own, f"{own} are left after everything was released"
        assert not [h for h in provisioner.held() if h.request_id in self.ids], "held() still has what is gone"

    def _own_machines(self) -> list[str]:
        return sorted(set(self.cloud.machines()) - self.others)

    def _spend_faults(self) -> None:
        """What is still to go wrong shall not hit what comes after: a request that nobody needs takes it."""
        if not self.waiting:
            return
        provisioner, spent = self.cloud.make(), request(self.offer, self.wanted, count=self.count)
        for _ in range(2 * len(self.waiting)):
            with suppress(ProvisioningError):
                provisioner.ensure(spent)
            self.cloud.advance()
        give_back(self.cloud, provisioner, [spent.id], self.steps)
        self.waiting.clear()


FEW = 10
"""Below so many examples each of them is dear: one that fails is shown as it was found, and not made shorter by trying others."""


def run(make: Callable[[], Contract], examples: int, steps: int) -> None:
    """Try that many orders of so many calls; a short one that breaks the contract is shown."""
    run_state_machine_as_test(
        make,  # type: ignore[arg-type]  # a factory will do, as its documentation says
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            report_multiple_bugs=False,
            phases=[Phase.generate] if examples < FEW else [Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        ),
    )
