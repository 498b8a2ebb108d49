"""The log of a Workspace's pods, whatever happens to the pods, to the API server and to the connection.

A stream of a log ends for many reasons, and only one of them is that the container has ended. So each end is followed by a
look at the pod, and reading goes on where it was; a pod that is replaced is left for the new one."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import dropwhile
from typing import Any, Final, Protocol

from kaito_core.api import labels
from kaito_core.controller.reconcile.revisions import hash_of
from kaito_core.kube.errors import ApiError, Forbidden, TooManyRequests, Unreachable
from kaito_core.kube.kinds import JOBS, PODS, STATEFUL_SETS, Kind, Object
from kaito_core.kube.ownership import controlled_by, is_controlled_by

PAUSE: Final = 1.0
"""Seconds between two looks at a pod whose log does not go on."""

OVERLAP: Final = 3.0
"""Seconds that are read twice after a broken stream, so that nothing is lost; what was seen before is left out."""

REMEMBERED: Final = 1000
"""Lines by which the overlap is recognised."""


TRIES: Final = 5
"""Times that the log of a container is asked for which has ended: it may be gone with its node, and others come after it."""


class Logs(Protocol):
    """What is needed of a cluster here."""

    def get(self, kind: Kind, name: str, namespace: str = "") -> Object | None: ...

    def list(self, kind: Kind, namespace: str = "", *, labels: str = "") -> tuple[list[Object], str]: ...

    def logs(
        self, pod: str, namespace: str, container: str, *, follow: bool = False, since_seconds: int | None = None
    ) -> Iterator[str]: ...


def passing(error: ApiError) -> bool:
    """Whether it may work in a moment: nobody answered, or the server is busy or broken."""
    return isinstance(error, Unreachable | TooManyRequests) or error.status >= 500


def pods_of(cluster: Logs, workspace: Object) -> list[Object]:
    """The pods of the job that the Workspace asks for now, the oldest first. Those of an earlier revision are another run."""
    wanted = hash_of(workspace)
    return [
        p
        for p in _pods(cluster, workspace, JOBS)
        if (p["metadata"].get("annotations") or {}).get(labels.REVISION_HASH) == wanted
    ]


def servers_of(cluster: Logs, workspace: Object) -> list[Object]:
    """The pods of its endpoint, the oldest first, in whatever form: the one before serves on until the new one does."""
    return _pods(cluster, workspace, STATEFUL_SETS)


def answering(cluster: Logs, workspace: Object) -> list[Object]:
    """Those of its endpoint that requests go to: of several machines the first one answers."""
    return [p for p in servers_of(cluster, workspace) if p["metadata"]["name"].endswith("-0")]


def _pods(cluster: Logs, workspace: Object, kind: Kind) -> list[Object]:
    """Those of its job, or of its StatefulSet: others may have its label."""
    name, namespace = workspace["metadata"]["name"], workspace["metadata"]["namespace"]
    found = cluster.list(PODS, namespace, labels=f"{labels.WORKSPACE}={name}")[0]
    runs = cluster.get(kind, name, namespace) if found else None
    own = controlled_by(found, runs) if is_controlled_by(runs, workspace) else ()
    return sorted(own, key=lambda p: (str(p["metadata"].get("creationTimestamp", "")), p["metadata"]["name"]))


def container_lines(
    cluster: Logs, pod: Object, *, follow: bool, stop: Callable[[], bool] = lambda: False, pause: float = PAUSE
) -> Iterator[tuple[str, str]]:
    """(container, line) of a pod, container after container. With ``follow`` until the pod has ended; else what there is.

    Raises `Forbidden`; any other trouble is waited out with ``follow``, and raised without."""
    for container in [*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"]]:
        name = container["name"]
        reading = _followed(cluster, pod, name, stop, pause) if follow else _as_it_is(cluster, pod, name)
        for line in reading:
            yield name, line
        if stop():
            return


def _as_it_is(cluster: Logs, pod: Object, container: str) -> Iterator[str]:
    if _has_log(pod, container):
        yield from cluster.logs(pod["metadata"]["name"], pod["metadata"]["namespace"], container)


def _followed(cluster: Logs, pod: Object, container: str, stop: Callable[[], bool], pause: float) -> Iterator[str]:
    name, namespace, uid = (pod["metadata"].get(k, "") for k in ("name", "namespace", "uid"))
    seen: deque[str] = deque(maxlen=REMEMBERED)
    heard: float | None = None
    restarts, complete = -1, False
    left = TRIES
    while left and not stop():
        over = False
        try:
            now = cluster.get(PODS, name, namespace)
            if now is None or now["metadata"].get("uid", "") != uid:
                return
            if restarts != (count := int(_status(now, container).get("restartCount", 0))):
                # Another log, which may well begin like the one before.
                restarts, complete, heard = count, False, None
                seen.clear()
            state = _state(now, container)
            if complete or not _has_log(now, container):
                if now.get("status", {}).get("phase") in ("Succeeded", "Failed"):
                    return
                time.sleep(pause)
                continue
            over = state == "terminated" and not _starts_again(now, container)
            since = None if heard is None else int(time.monotonic() - heard + OVERLAP) + 1
            lines = cluster.logs(name, namespace, container, follow=state == "running", since_seconds=since)
            # A line that says word for word what an earlier one said may be left out here; events have their time in them.
            known = frozenset(seen)
            for line in dropwhile(lambda each: each in known, lines):  # noqa: B023 – used up in this round
                seen.append(line)
                heard = time.monotonic()
                yield line
            if over:
                return
            complete = state != "running"
        except Forbidden:
            raise
        except ApiError:
            # Nobody answers, the node is away, the container is between two states: the pod itself says when it is over.
            left -= over
            time.sleep(pause)


def _state(pod: Object, container: str) -> str:
    """``waiting``, ``running`` or ``terminated``."""
    state: Mapping[str, Any] = _status(pod, container).get("state", {})
    return next(iter(state), "waiting")


def _has_log(pod: Object, container: str) -> bool:
    """Whether it runs or has run. One that waits to be started again has the log of its last time."""
    status = _status(pod, container)
    return _state(pod, container) != "waiting" or "terminated" in status.get("lastState", {})


def _starts_again(pod: Object, container: str) -> bool:
    """Whether the kubelet starts it again when it has ended, as it does with the servers of an endpoint."""
    if pod.get("spec", {}).get("restartPolicy") != "Always" or "deletionTimestamp" in pod["metadata"]:
        return False
    first = {c["name"] for c in pod["spec"].get("initContainers", ())}
    ended = _status(pod, container).get("state", {}).get("terminated", {})
    return container not in first or ended.get("exitCode") != 0


def _status(pod: Object, container: str) -> Mapping[str, Any]:
    status = pod.get("status", {})
    each: Mapping[str, Any]
    for each in (*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())):
        if each["name"] == container:
            return each
    return {}


class NewestPod:
    """Reads the log of a Workspace's newest pod on a thread, and moves on when there is a newer one."""

    def __init__(
        self, cluster: Logs, *, pods: Callable[[Logs, Object], list[Object]] = pods_of, pause: float = PAUSE
    ) -> None:
        """``pods`` finds those that are looked at, the newest last."""
        self._cluster = cluster
        self._pods = pods
        self._pause = pause
        self._reading: _Reading | None = None
        self.seen: list[str] = []
        """Names of the pods that were read, the present one last."""

    def look(self, workspace: Object) -> Object | None:
        """Find the newest pod; that pod, when it is another one than before."""
        pods = self._pods(self._cluster, workspace)
        if not pods or (self._reading and self._reading.uid == pods[-1]["metadata"].get("uid", "")):
            return None
        self.close()
        self._reading = _Reading(self._cluster, pods[-1], self._pause)
        self.seen.append(pods[-1]["metadata"]["name"])
        return pods[-1]

    def lines(self, seconds: float) -> Iterator[tuple[str, str]]:
        """(container, line) of what comes within that time; at once when nothing more can come. Raises `Forbidden`."""
        deadline = time.monotonic() + seconds
        while self._reading and (left := deadline - time.monotonic()) > 0:
            try:
                found = self._reading.lines.get(timeout=left)
            except queue.Empty:
                return
            if isinstance(found, ApiError):
                raise found
            if found is None:
                self._reading.over = True
                self._reading.lines.put(None)  # for whoever asks again
                return
            yield found

    @property
    def at_end(self) -> bool:
        """Whether everything that the present pod said has been handed out."""
        return self._reading is None or self._reading.over

    def close(self) -> None:
        if self._reading is not None:
            self._reading.stop.set()


class _Reading:
    """One pod's log on its way from a thread. The last item is None, or why it could not be read."""

    def __init__(self, cluster: Logs, pod: Object, pause: float) -> None:
        self.uid: str = pod["metadata"].get("uid", "")
        self.lines: queue.SimpleQueue[tuple[str, str] | ApiError | None] = queue.SimpleQueue()
        self.stop = threading.Event()
        self.over = False
        # A daemon: a stream from a dead node may be silent for an hour, and nobody shall wait for it.
        threading.Thread(target=self._read, args=(cluster, pod, pause), name="pod-log", daemon=True).start()

    def _read(self, cluster: Logs, pod: Object, pause: float) -> None:
        try:
            for found in container_lines(cluster, pod, follow=True, stop=self.stop.is_set, pause=pause):
                self.lines.put(found)
        except ApiError as e:
            self.lines.put(e)
        self.lines.put(None)
