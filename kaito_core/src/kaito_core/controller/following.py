"""How far the trainings are and how busy the endpoints, from their pods' logs: the one thing of a job that the API server does not tell by itself.

Only pods whose main container runs are looked at, every few seconds, a few lines each; at rest nothing is asked."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from kaito_core.controller.reconcile.diagnosis import stage
from kaito_core.controller.reconcile.observed import PodProgress
from kaito_core.kube.errors import ApiError
from kaito_core.kube.kinds import Object
from kaito_core.progress import parse_log_line

if TYPE_CHECKING:
    from kaito_core.kube.client import Client

EVERY = 10.0
"""Seconds between two looks at one pod."""

TAIL = 40
"""Lines of a log that are read: several steps and whatever stands between them."""

FIELDS = {
    "stage": "stage",
    "step": "step",
    "steps": "steps",
    "loss": "loss",
    "tokens_per_second": "tokensPerSecond",
    "seconds_left": "secondsLeft",
}

log = logging.getLogger("kaito_core.controller.following")


class Following:
    """A thread that reads the logs of running trainings and says when one has moved."""

    def __init__(self, client: Client, pods: Callable[[], list[Object]], moved: Callable[[Object], None]) -> None:
        self._client = client
        self._pods = pods
        self._moved = moved
        self._known: dict[str, PodProgress] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="following", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()

    def progress(self, pod: Object) -> PodProgress | None:
        """The last that this pod said; None when it has said nothing yet."""
        return self._known.get(pod["metadata"]["uid"])

    def _run(self) -> None:
        while not self._stop.wait(EVERY):
            try:
                self._round()
            except Exception:
                log.exception("reading the progress of the trainings failed; it goes on")

    def _round(self) -> None:
        running = [p for p in self._pods() if stage(p) and not _in_init(p)]
        self._known = {uid: p for uid, p in self._known.items() if uid in {x["metadata"]["uid"] for x in running}}
        for pod in running:
            if self._stop.is_set():
                return
            new = self._read(pod)
            uid = pod["metadata"]["uid"]
            if new is not None and new != self._known.get(uid):
                self._known[uid] = new
                self._moved(pod)

    def _read(self, pod: Object) -> PodProgress | None:
        metadata = pod["metadata"]
        container = pod["status"]["containerStatuses"][0]["name"]
        try:
            lines = list(self._client.logs(metadata["name"], metadata["namespace"], container, tail=TAIL))
        except ApiError as e:
            log.debug("no log of %s: %s", metadata["name"], e)  # it has just ended, or its node is away
            return None
        return last(lines, self._known.get(metadata["uid"]))


def last(lines: list[str], before: PodProgress | None) -> PodProgress | None:
    """What the last events among these lines say, on top of what was known before."""
    fields: dict[str, Any] = dict(before.fields) if before else {}
    time = before.time if before else 0.0
    for line in lines:
        event = parse_log_line(line)
        if event is None or event.get("time", 0.0) < time:
            continue
        if event["event"] == "started":
            fields = {k: v for k, v in fields.items() if k != "secondsLeft"}
        if event["event"] == "step":
            fields.update({ours: event[theirs] for theirs, ours in FIELDS.items() if event.get(theirs) is not None})
        elif event["event"] == "serving":
            fields.update(inFlight=event.get("in_flight"), lastRequest=event.get("last_request"))
        elif event["event"] == "eval" and event.get("loss") is not None:
            fields["evalLoss"] = event["loss"]
        fields["stage"] = event["stage"]
        time = max(time, float(event.get("time", 0.0)))
    return PodProgress(time, fields) if fields else before


def _in_init(pod: Object) -> bool:
    states: list[Mapping[str, Any]] = pod.get("status", {}).get("initContainerStatuses", [])
    return any("running" in s.get("state", {}) for s in states)
