"""The work queue against a model of a few lines, then what only threads show."""

from __future__ import annotations

import threading
import time
from collections import Counter

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kaito_core.kube.workqueue import FIRST_DELAY, LONGEST_DELAY, Key, WorkQueue

KEYS = st.sampled_from([("default", "a"), ("default", "b"), ("other", "a"), ("other", "c")])
SECONDS = st.sampled_from([0.0, 0.5, 1.0, 3.0, 60.0])


class Queue(RuleBasedStateMachine):
    """What the queue promises: who wants work gets it, once, at its time, and never twice at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.queue = WorkQueue("test", clock=lambda: self.now)
        self.wants: set[Key] = set()
        self.due: dict[Key, float] = {}
        self.processing: set[Key] = set()
        self.failures: Counter[Key] = Counter()

    def plan(self, key: Key, seconds: float) -> None:
        if seconds <= 0:
            self.wants.add(key)
        else:
            self.due[key] = min(self.due.get(key, float("inf")), self.now + seconds)

    def take(self) -> Key | None:
        got = self.queue.get(timeout=0)
        for key, due in list(self.due.items()):
            if due <= self.now:
                del self.due[key]
                self.wants.add(key)
        free = self.wants - self.processing
        assert (got in free) if free else (got is None)
        if got is not None:
            self.wants.remove(got)
            self.processing.add(got)
        return got

    @rule(key=KEYS)
    def add(self, key: Key) -> None:
        self.queue.add(key)
        self.wants.add(key)

    @rule(key=KEYS, seconds=SECONDS)
    def add_after(self, key: Key, seconds: float) -> None:
        self.queue.add_after(key, seconds)
        self.plan(key, seconds)

    @rule(key=KEYS)
    def add_rate_limited(self, key: Key) -> None:
        self.queue.add_rate_limited(key)
        self.plan(key, min(FIRST_DELAY * 2.0 ** self.failures[key], LONGEST_DELAY))
        self.failures[key] += 1

    @rule(key=KEYS)
    def forget(self, key: Key) -> None:
        self.queue.forget(key)
        self.failures[key] = 0

    @rule()
    def get(self) -> None:
        self.take()

    @precondition(lambda self: self.processing)
    @rule(data=st.data())
    def done(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.processing)))
        self.queue.done(key)
        self.processing.remove(key)

    @rule(seconds=SECONDS)
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def failures_are_counted(self) -> None:
        assert all(self.queue.failures(k) == n for k, n in self.failures.items())

    def teardown(self) -> None:
        """Whatever was added is worked on in the end."""
        self.now += LONGEST_DELAY + 1
        for key in sorted(self.processing):
            self.queue.done(key)
        self.processing.clear()
        while (key := self.take()) is not None:
            self.queue.done(key)
            self.processing.remove(key)
        assert not self.wants
        assert not self.due
        self.queue.add(("default", "a"))
        self.queue.close()
        self.queue.add(("default", "b"))
        self.queue.add_after(("default", "c"), 1.0)
        self.now += 2.0
        assert self.queue.get() is None  # at once: nobody waits for a queue that is closed


TestQueue = Queue.TestCase


def test_keys_come_in_the_order_in_which_they_were_added() -> None:
    queue = WorkQueue("test")
    for name in "cabca":
        queue.add(("n", name))
    assert [queue.get(timeout=0) for _ in range(4)] == [("n", "c"), ("n", "a"), ("n", "b"), None]


def test_the_back_off_doubles_up_to_a_minute() -> None:
    now, key = 0.0, ("n", "a")
    queue = WorkQueue("test", clock=lambda: now)
    for delay in [0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 60.0, 60.0]:
        queue.add_rate_limited(key)
        now += 0.99 * delay
        assert queue.get(timeout=0) is None
        now += 0.02 * delay
        assert queue.get(timeout=0) == key
        queue.done(key)


def test_many_workers_never_meet_at_one_key_and_miss_nothing() -> None:
    queue = WorkQueue("test")
    keys = [("n", str(n)) for n in range(5)]
    working: Counter[Key] = Counter()
    added: Counter[Key] = Counter()
    seen: dict[Key, int] = {}
    met = []

    def work() -> None:
        while (key := queue.get()) is not None:
            working[key] += 1
            if working[key] > 1:
                met.append(key)
            seen[key] = added[key]  # a reconcile looks at the world as it is
            time.sleep(0.0005)
            working[key] -= 1
            queue.done(key)

    workers = [threading.Thread(target=work) for _ in range(6)]
    for worker in workers:
        worker.start()
    for number in range(400):
        key = keys[number % 5]
        added[key] += 1
        if number % 3:
            queue.add(key)
        else:
            queue.add_after(key, 0.002)
            time.sleep(0.001)
    deadline = time.monotonic() + 30
    while seen != added and time.monotonic() < deadline:
        time.sleep(0.01)
    queue.close()
    for worker in workers:
        worker.join(10)
    assert seen == added
    assert met == []
    assert not any(w.is_alive() for w in workers)


def test_who_waits_is_woken_by_a_delay_and_by_the_end() -> None:
    queue = WorkQueue("test")
    got: list[Key | None] = []
    workers = [threading.Thread(target=lambda: got.append(queue.get())) for _ in range(3)]
    for worker in workers:
        worker.start()
    queue.add_after(("n", "late"), 0.2)
    queue.add_after(("n", "early"), 0.05)
    deadline = time.monotonic() + 10
    while len(got) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    queue.close()
    for worker in workers:
        worker.join(10)
    assert got == [("n", "early"), ("n", "late"), None]


def test_what_is_being_worked_on_ends_in_peace() -> None:
    queue = WorkQueue("test")
    queue.add(("n", "a"))
    queue.add(("n", "b"))
    key = queue.get()
    assert key is not None
    queue.close()
    assert queue.get() is None
    assert not queue.drained(0.01)
    queue.add(key)
    queue.done(key)
    assert queue.drained(0.01)
    assert queue.get() is None


class Recorded:
    """What a queue tells its metrics."""

    def __init__(self) -> None:
        self.said: list[tuple[str, float]] = []

    def depth(self, queue: str, depth: int) -> None:
        self.said.append(("depth", depth))

    def added(self, queue: str) -> None:
        self.said.append(("added", 1))

    def retried(self, queue: str) -> None:
        self.said.append(("retried", 1))

    def waited(self, queue: str, seconds: float) -> None:
        self.said.append(("waited", seconds))

    def worked(self, queue: str, seconds: float) -> None:
        self.said.append(("worked", seconds))

    def take(self) -> list[tuple[str, float]]:
        said, self.said = self.said, []
        return said


def test_it_says_how_long_everything_took() -> None:
    now, metrics = 0.0, Recorded()
    queue, key = WorkQueue("test", metrics=metrics, clock=lambda: now), ("n", "a")
    queue.add(key)
    queue.add(key)
    assert metrics.take() == [("added", 1), ("depth", 1)]
    now = 2.0
    queue.get()
    assert metrics.take() == [("waited", 2.0), ("depth", 0)]
    now = 5.0
    queue.add(key)
    queue.done(key)
    assert metrics.take() == [("added", 1), ("depth", 0), ("worked", 3.0), ("depth", 1)]
    queue.add_rate_limited(key)
    assert metrics.take() == [("retried", 1)]
