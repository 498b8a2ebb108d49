"""What can be measured from outside, under the names that controller-runtime has made usual: its dashboards and alerts work.

A registry of its own for each controller, so that two in one process (as in tests) do not meet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Buckets of all durations; a subset of controller-runtime's."""

RESULTS = ("success", "error", "requeue_after")
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Implements what the queue (`QueueMetrics`), the loop (`LoopMetrics`), the API client and the provisioner calls report to."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(name, help, labels, registry=self.registry)

        def gauge(name: str, help: str, *labels: str) -> Gauge:
            return Gauge(name, help, labels, registry=self.registry)

        def seconds(name: str, help: str, *labels: str) -> Histogram:
            return Histogram(name, help, labels, buckets=SECONDS, registry=self.registry)

        runtime = "controller_runtime"
        self._total = counter(f"{runtime}_reconcile_total", "Reconciles.", "controller", "result")
        self._errors = counter(f"{runtime}_reconcile_errors_total", "Reconciles that failed.", "controller")
        self._terminal = counter(
            f"{runtime}_terminal_reconcile_errors_total", "Failures that are not tried again.", "controller"
        )
        self._panics = counter(f"{runtime}_reconcile_panics_total", "Reconciles that broke.", "controller")
        self._time = seconds(f"{runtime}_reconcile_time_seconds", "Duration of a reconcile.", "controller")
        self._active = gauge(f"{runtime}_active_workers", "Workers that work now.", "controller")
        self._most = gauge(f"{runtime}_max_concurrent_reconciles", "Workers there are.", "controller")
        self._depth = gauge("workqueue_depth", "Keys that wait.", "name")
        self._adds = counter("workqueue_adds_total", "Keys that were added.", "name")
        self._retries = counter("workqueue_retries_total", "Keys that were added after a failure.", "name")
        self._queued = seconds("workqueue_queue_duration_seconds", "Time that a key waited.", "name")
        self._worked = seconds("workqueue_work_duration_seconds", "Time that a key was worked on.", "name")
        self._leader = gauge("leader_election_master_status", "1: this one leads.", "name")
        self._requests = counter("rest_client_requests_total", "Requests to the API server.", "code", "method", "host")
        call = ("provisioner", "method", "result")
        self._calls = counter("kaito_provisioner_calls_total", "Calls of node provisioners.", *call)
        self._call_time = seconds("kaito_provisioner_call_seconds", "Duration of a call.", *call)
        self._swept = counter("kaito_orphans_released_total", "Machines that nobody wanted.", "provisioner")
        ProcessCollector(registry=self.registry)

    # --- the queue

    def depth(self, queue: str, depth: int) -> None:
        self._depth.labels(queue).set(depth)

    def added(self, queue: str) -> None:
        self._adds.labels(queue).inc()

    def retried(self, queue: str) -> None:
        self._retries.labels(queue).inc()

    def waited(self, queue: str, seconds: float) -> None:
        self._queued.labels(queue).observe(seconds)

    def worked(self, queue: str, seconds: float) -> None:
        self._worked.labels(queue).observe(seconds)

    # --- the loop

    def started(self, controller: str, workers: int) -> None:
        """Everything of this controller begins at 0: an alert on an increase must not miss the first error."""
        self._most.labels(controller).set(workers)
        self._active.labels(controller).set(0)
        for result in RESULTS:
            self._total.labels(controller, result)
        for each in (self._errors, self._terminal, self._panics):
            each.labels(controller)

    def active(self, controller: str, workers: int) -> None:
        self._active.labels(controller).set(workers)

    def reconciled(self, controller: str, result: str, seconds: float) -> None:
        self._total.labels(controller, result).inc()
        self._time.labels(controller).observe(seconds)

    def failed(self, controller: str, *, terminal: bool, panic: bool) -> None:
        self._errors.labels(controller).inc()
        if terminal:
            self._terminal.labels(controller).inc()
        if panic:
            self._panics.labels(controller).inc()

    # --- the rest

    def leads(self, name: str, leads: bool) -> None:
        self._leader.labels(name).set(1 if leads else 0)

    def requested(self, code: int, method: str, host: str) -> None:
        """The API server answered; ``code`` 0: it did not."""
        self._requests.labels(str(code) if code else "<error>", method, host).inc()

    def called(self, provisioner: str, method: str, result: str, seconds: float) -> None:
        self._calls.labels(provisioner, method, result).inc()
        self._call_time.labels(provisioner, method, result).observe(seconds)

    def swept(self, provisioner: str) -> None:
        """A machine that nobody wanted was released."""
        self._swept.labels(provisioner).inc()

    def count_workspaces(self, by_state: Callable[[], dict[str, int]]) -> None:
        """``kaito_workspace_count{phase}``, counted when somebody asks."""
        self.registry.register(_Workspaces(by_state))

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return bytes(generate_latest(self.registry))


class _Workspaces:
    def __init__(self, by_state: Callable[[], dict[str, int]]) -> None:
        self._by_state = by_state

    def describe(self) -> Iterable[GaugeMetricFamily]:
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        family = GaugeMetricFamily("kaito_workspace_count", "Workspaces by state.", labels=["phase"])
        for state, count in sorted(self._by_state().items()):
            family.add_metric([state.lower()], count)
        yield family
