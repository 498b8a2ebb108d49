"""Any order of questions, crashes, lost answers and deeds of Karpenter: no machine too many, none forgotten."""

from __future__ import annotations

from collections import Counter

from asking import TAGS, request
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from karpenter_double import AKS_CLASS, Cluster, condition

from kaito_core.kube.errors import Unreachable
from kaito_core.plugins.types import InsufficientCapacity, ProvisioningError
from kaito_provisioner_karpenter.provisioner import EVENT_COMES, KarpenterNodes

IDS = ["wsaaaaaaaaa", "wsbbbbbbbbb"]


class Crash(BaseException):
    """The controller dies here."""


class Contract(RuleBasedStateMachine):
    @initialize(count=st.integers(1, 2))
    def start(self, count: int) -> None:
        self.count = count
        self.cluster = Cluster(AKS_CLASS)
        self.given_up: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()
        self.holes: Counter[str] = Counter()
        self.released: set[str] = set()
        self.known: set[str] = set()
        """Claims that this process has seen."""
        self.silent: set[str] = set()
        """Claims that went without an event, and that this process had seen."""
        self.provisioner = self._new()

    def _new(self) -> KarpenterNodes:
        # Whoever starts anew knows no more of what went silently.
        self.holes.update(self.silent)
        self.known, self.silent = set(), set()
        return self._another()

    def _another(self) -> KarpenterNodes:
        provisioner = KarpenterNodes({}, clock=lambda: self.cluster.now)
        provisioner.attach(self.cluster)
        return provisioner

    # --- the host

    @rule(request_id=st.sampled_from(IDS))
    def ensure(self, request_id: str) -> None:
        if request_id in self.released:
            return  # an attempt that has ended never comes back: the next one has another id
        status = self.provisioner.ensure(request(request_id=request_id, count=self.count))
        names = self._claims(request_id)
        self.known |= names
        if status.phase == "ready":
            assert len(status.nodes) == self.count == len(set(status.nodes))
            for name in status.nodes:
                conditions = self.cluster.nodes[name]["status"]["conditions"]
                assert [c["status"] for c in conditions if c["type"] == "Ready"] == ["True"]
            having = [
                n for n, o in self.cluster.nodes.items() if status.selector.items() <= o["metadata"]["labels"].items()
            ]
            assert sorted(having) == sorted(status.nodes)
        else:
            assert status.message
        if any(self.given_up[n] and n not in names for n in self._names(request_id)):
            # ``releasing`` ends the request too: another of its machines was there and is lost.
            assert status.phase == "releasing" or isinstance(status.failure, InsufficientCapacity)

    @rule(
        request_id=st.sampled_from(IDS),
        after=st.booleans(),
        verb=st.sampled_from(["apply", "delete"]),
        kill=st.booleans(),
    )
    def interrupted(self, request_id: str, after: bool, verb: str, kill: bool) -> None:
        """The controller dies, or its connection does, before or after its next write has its effect."""
        error: BaseException = Crash() if kill else Unreachable("cut off")

        def fail(asked: str) -> None:
            if asked == verb:
                raise error

        setattr(self.cluster, "after" if after else "before", fail)
        try:
            if verb == "delete":
                self.released.add(request_id)
                self.provisioner.release(request_id)
            elif request_id not in self.released:
                self.provisioner.ensure(request(request_id=request_id, count=self.count))
        except ProvisioningError:
            assert not kill
        except Crash:
            self.provisioner = self._new()
        self.cluster.before = self.cluster.after = lambda verb: None

    @rule(request_id=st.sampled_from(IDS))
    def release(self, request_id: str) -> None:
        self.released.add(request_id)
        if self.provisioner.release(request_id).phase == "absent":
            assert not self._claims(request_id)
            assert not self._nodes(request_id)

    @rule()
    def restart(self) -> None:
        self.provisioner = self._new()

    @rule(seconds=st.sampled_from([1.0, EVENT_COMES, 600.0]))
    def wait(self, seconds: float) -> None:
        self.cluster.now += seconds

    # --- Karpenter

    def _any(self, data: st.DataObject, *, registered: bool) -> str | None:
        names = [n for n in sorted(self.cluster.claims) if self._registered(n) == registered]
        return data.draw(st.sampled_from(names)) if names else None

    def _registered(self, name: str) -> bool:
        return self.cluster.conditions(name).get("Registered") == "True"

    @rule(data=st.data(), step=st.sampled_from(["launch", "register"]))
    def comes(self, data: st.DataObject, step: str) -> None:
        name = self._any(data, registered=False)
        if name and "deletionTimestamp" not in self.cluster.claims[name]["metadata"]:
            getattr(self.cluster, step)(name)

    @rule(data=st.data())
    def ready(self, data: st.DataObject) -> None:
        name = self._any(data, registered=True)
        if name:
            self.cluster.initialize(name)

    @rule(data=st.data())
    def has_none(self, data: st.DataObject) -> None:
        name = self._any(data, registered=False)
        if name and "deletionTimestamp" not in self.cluster.claims[name]["metadata"]:
            self.cluster.no_capacity(name)
            self.given_up[name] += 1

    @rule(data=st.data())
    def gives_up_without_a_word(self, data: st.DataObject) -> None:
        name = self._any(data, registered=False)
        if name:
            del self.cluster.claims[name]
            if name in self.known:
                self.silent.add(name)
            else:
                self.holes[name] += 1

    @rule(data=st.data())
    def takes_away(self, data: st.DataObject) -> None:
        name = self._any(data, registered=True)
        if name:
            self.cluster.lose(name)
            self.lost[name] += 1
            self.known.discard(name)

    @rule(data=st.data())
    def falls_silent(self, data: st.DataObject) -> None:
        """The kubelet says nothing any more; Karpenter's conditions stay as they are."""
        name = self._any(data, registered=True)
        if name:
            self.cluster.nodes[self.cluster.node_name(name)]["status"]["conditions"] = [condition("Ready", "Unknown")]

    @rule(data=st.data())
    def loses_its_claim(self, data: st.DataObject) -> None:
        """Somebody takes the finalizer off the claim: the Node, and what is behind it, stays."""
        name = self._any(data, registered=True)
        if name:
            del self.cluster.claims[name]
            self.lost[name] += 1
            self.known.discard(name)

    @precondition(lambda self: any("deletionTimestamp" in c["metadata"] for c in self.cluster.claims.values()))
    @rule()
    def finishes(self) -> None:
        self.cluster.finish_deletions()

    # --- what holds

    def _names(self, request_id: str) -> list[str]:
        return [request_id, *(f"{request_id}-{n}" for n in range(1, self.count))]

    def _claims(self, request_id: str) -> set[str]:
        return {n for n, c in self.cluster.claims.items() if c["metadata"]["labels"]["kaito.sh/request"] == request_id}

    def _nodes(self, request_id: str) -> set[str]:
        return {n for n, o in self.cluster.nodes.items() if o["metadata"]["labels"]["kaito.sh/request"] == request_id}

    @invariant()
    def never_more_than_was_asked_for(self) -> None:
        for request_id in IDS:
            claims = self._claims(request_id)
            assert claims <= set(self._names(request_id))
            alone = self._nodes(request_id) - {self.cluster.node_name(n) for n in claims}
            assert len(claims) + len(alone) <= self.count

    @invariant()
    def a_claim_is_made_again_only_after_its_machine_was_lost_or_nobody_could_know(self) -> None:
        for name, times in Counter(self.cluster.made).items():
            assert times <= 1 + self.lost[name] + self.holes[name]

    @invariant()
    def nothing_is_forgotten(self) -> None:
        held = {h.request_id: h for h in self._another().held()}
        there = {i for i in IDS if self._claims(i) or self._nodes(i)}
        assert set(held) == there
        assert all(h.tags == TAGS for h in held.values())

    def teardown(self) -> None:
        """Whoever comes afterwards can give everything back."""
        if not hasattr(self, "cluster"):
            return
        provisioner = self._another()
        for request_id in IDS:
            for _ in range(3):
                status = provisioner.release(request_id)
                self.cluster.finish_deletions()
            assert status.phase == "absent"
        assert not self.cluster.claims
        assert not self.cluster.nodes


TestContract = Contract.TestCase
TestContract.settings = settings(max_examples=400, stateful_step_count=50, deadline=None)
