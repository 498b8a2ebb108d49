"""What the face counts, in Prometheus' text format 0.0.4.

Written by hand: the face runs inside an engine's process, where the registry of ``prometheus_client`` (if there is one) is the
engine's, and may be spread over several processes."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from typing import Final

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

BUCKETS: Final = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Seconds. An answer takes from a fraction of a second to minutes."""

PATHS: Final = frozenset({
    "/", "/chat", "/health", "/healthz", "/metrics", "/tokenize", "/detokenize", "/v1/chat/completions", "/v1/completions",
    "/v1/embeddings", "/v1/messages", "/v1/models", "/v1/responses",
})  # fmt: skip
"""Paths that are told apart; every other is ``other``, so that whoever tries paths does not fill the memory."""


class Metrics:
    """Counters of one process. Not thread-safe: everything happens on the event loop."""

    def __init__(self) -> None:
        self.in_flight = 0
        self.rejected = 0
        self.work = 0
        """Requests to the model since the start, those in flight included."""
        self.last_request: float | None = None
        """When the last one began or ended, in seconds since the epoch."""
        self.usual_seconds = 0.0
        """How long a request takes now: an average in which the last ones count most."""
        self._requests: defaultdict[tuple[str, int], int] = defaultdict(int)
        self._seconds: defaultdict[str, _Histogram] = defaultdict(_Histogram)

    def counted(self, path: str, code: int) -> None:
        """A request was answered; ``code`` 499: the client went away before the end."""
        self._requests[path if path in PATHS else "other", code] += 1

    def worked(self, path: str, seconds: float) -> None:
        """A request to the model took so long."""
        self._seconds[path if path in PATHS else "other"].add(seconds)
        self.usual_seconds += 0.2 * (seconds - self.usual_seconds) if self.usual_seconds else seconds

    def text(self) -> str:
        """All of it in Prometheus' text format."""
        lines = [
            "# HELP kaito_requests_total Requests by path and status code; 499: the client went away.",
            "# TYPE kaito_requests_total counter",
            *(f'kaito_requests_total{{path="{p}",code="{c}"}} {n}' for (p, c), n in sorted(self._requests.items())),
            "# HELP kaito_requests_in_flight Requests to the model that are worked on or wait.",
            "# TYPE kaito_requests_in_flight gauge",
            f"kaito_requests_in_flight {self.in_flight}",
            "# HELP kaito_ratelimit_rejected_total Requests that were refused because too many were waiting.",
            "# TYPE kaito_ratelimit_rejected_total counter",
            f"kaito_ratelimit_rejected_total {self.rejected}",
            "# HELP kaito_last_request_timestamp_seconds When the last request to the model began or ended; 0: none yet.",
            "# TYPE kaito_last_request_timestamp_seconds gauge",
            f"kaito_last_request_timestamp_seconds {self.last_request or 0:.3f}",
            "# HELP kaito_request_seconds Duration of requests to the model, the whole answer included.",
            "# TYPE kaito_request_seconds histogram",
        ]
        for path, histogram in sorted(self._seconds.items()):
            lines += histogram.lines("kaito_request_seconds", f'path="{path}"')
        return "\n".join(lines) + "\n"


class _Histogram:
    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(BUCKETS, value)] += 1
        self.sum += value

    def lines(self, name: str, labels: str) -> list[str]:
        found, total = [], 0
        for bound, count in zip((*map(str, BUCKETS), "+Inf"), self.counts, strict=True):
            total += count
            found.append(f'{name}_bucket{{{labels},le="{bound}"}} {total}')
        return [*found, f"{name}_sum{{{labels}}} {self.sum:.6f}", f"{name}_count{{{labels}}} {total}"]
