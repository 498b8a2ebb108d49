"""The fake cloud as a plugin, for tests that start a real ``kaito controller`` and kill it.

    cloud = CloudFolder(tmp_path, offers=[…], ready_after=2, faults=[Fault("crash")])
    subprocess.Popen([sys.executable, "-m", "kaito_core", "controller", …], env={**os.environ, **cloud.environment})
    …
    assert not cloud.provisioner().leaks()

What the cloud does is read at each call from the file that ``$KAITO_FAKE_CLOUD`` names, so that a test can change its mind
while the controller runs; what it did is in ``log.jsonl`` beside it.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from kaito_core.plugins import NodeProvisioner, hookimpl
from kaito_core.plugins.types import Gpu, Offer, Price
from kaito_core.testing.provisioner import Call, FakeProvisioner, Fault, FileLog

ENVIRONMENT = "KAITO_FAKE_CLOUD"
LOG = "log.jsonl"


@hookimpl
def kaito_node_provisioners() -> Iterable[NodeProvisioner]:
    path = os.environ.get(ENVIRONMENT)
    if path:
        yield _FromFile(Path(path))


class CloudFolder:
    """A fake cloud in a folder: what it shall do, what it did, and how a controller finds it."""

    def __init__(self, folder: Path, offers: Iterable[Offer], **behaviour: Any) -> None:
        """``behaviour`` is as for `change`."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._file = folder / "cloud.json"
        self._behaviour: dict[str, Any] = {"offers": list(offers)}
        info = folder / "kaito_fake_cloud-1.0.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kaito-fake-cloud\nVersion: 1.0\n", "utf-8")
        (info / "entry_points.txt").write_text(f"[kaito]\nfake = {__name__}\n", "utf-8")
        self.change(**behaviour)

    @property
    def environment(self) -> dict[str, str]:
        """What the controller's environment needs besides the test's own."""
        path = os.pathsep.join(filter(None, [str(self._folder), os.environ.get("PYTHONPATH", "")]))
        return {"PYTHONPATH": path, ENVIRONMENT: str(self._file)}

    def change(self, **behaviour: Any) -> None:
        """From now on: ``offers``, ``ready_after``, ``gone_after``, ``faults`` (of `Fault`), and ``kubeconfig``, the path of
        one, where machines shall be Node objects."""
        self._behaviour |= behaviour
        written = self._file.with_suffix(".new")
        written.write_text(json.dumps(self._behaviour, default=asdict, indent=2), "utf-8")
        written.replace(self._file)

    def provisioner(self) -> FakeProvisioner:
        """The same cloud for the test to look at."""
        return FakeProvisioner((), log=FileLog(self._folder / LOG))


class _FromFile(FakeProvisioner):
    """Does what the file says now. A crash is a real one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        super().__init__((), log=FileLog(path.parent / LOG), die=_kill_this_process)
        self._read()

    def _read(self) -> None:
        told: Mapping[str, Any] = json.loads(self._path.read_text("utf-8"))
        self.catalogue = tuple(_offer(o, self.name) for o in told["offers"])
        self.ready_after, self.gone_after = told.get("ready_after", 0), told.get("gone_after", 0)
        self.faults = [Fault(**f) for f in told.get("faults", ())]
        if told.get("kubeconfig") and self._kube is None:
            from kaito_core.kube.client import connect

            self._kube = connect(kubeconfig=told["kubeconfig"], user_agent="fake-cloud")

    @contextmanager
    def _call(self, call: Call, request_id: str, offer: str = "") -> Iterator[Fault | None]:
        self._read()
        with super()._call(call, request_id, offer) as fault:
            yield fault


def _kill_this_process() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("not reached")


def _offer(told: Mapping[str, Any], provisioner: str) -> Offer:
    gpu, price = told.get("gpu"), told.get("price")
    more = {
        "gpu": Gpu(**{**gpu, "compute_capability": tuple(gpu["compute_capability"] or ()) or None}) if gpu else None,
        "price": Price(**price) if price else None,
        "provisioner": provisioner,
    }
    return Offer(**{**told, **more})
