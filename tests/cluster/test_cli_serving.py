"""Endpoints in a cluster as a person meets them: ``kaito run``, ``status``, ``logs`` and ``chat`` against a real API server.

There is no node and no controller: the test writes the status that one would write, and what answers behind the API server's proxy is a
small HTTP server of this machine."""

# The fixtures of the other file are named as arguments here.
# ruff: noqa: F811

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from kaito_core.controller.configs import digest
from kaito_core.controller.reconcile.revisions import hash_of, served_by
from kaito_core.kube.kinds import CONFIG_MAPS, DEPLOYMENTS, PODS, SERVICES, WORKSPACES, Kind, owner_reference
from kaito_core.testing.cluster import why_no_cluster
from kaito_core.testing.cluster.node import host_address
from kaito_core.testing.cluster.programs import assets
from tests.cluster.test_cli import Command, Team, controller, kubeconfig, meanwhile, team  # noqa: F401 – fixtures among them
from tests.conftest import Kaito

pytestmark = pytest.mark.skipif(bool(why_no_cluster()), reason=why_no_cluster())

ENDPOINTS = Kind("v1", "Endpoints", "endpoints")

FILE = """\
apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata: {name: small, annotations: {kaito.sh/runtime: echo}}
inference:
  preset: {name: demo-phi-3}
"""
TUNED = """\
apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata: {name: small, annotations: {kaito.sh/runtime: echo}}
tuning:
  preset: {name: demo-phi-3}
  method: qlora
  input: {urls: ["https://example.com/a.jsonl"]}
  output: {image: "r.io/a:1", imagePushSecret: registry-login}
"""

READY = ("InferenceReady", "True", "WorkspaceInferenceStatusSuccess", "")
SERVED = ("WorkspaceSucceeded", "True", "workspaceSucceeded", "served on 1 machine")
ASLEEP = ("InferenceReady", "True", "OnDemand", "asleep: the first request gets a machine")
STARTS = ("InferenceReady", "False", "WorkspaceInferenceStatusPending", "the model is being loaded")
PENDING = ("WorkspaceSucceeded", "False", "workspacePending", "the model is being loaded")
NOW = "2026-01-01T00:00:00Z"


@pytest.fixture(autouse=True)
def echo(team: Team, environment: dict[str, str]) -> None:
    """The runtime `kaito_core.testing.serving.Echo` is installed beside the fake cloud."""
    site = Path(environment["PYTHONPATH"].split(os.pathsep)[0])
    info = site / "kaito_runtime_echo-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kaito-runtime-echo\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kaito]\necho = fixture_echo\n")
    (site / "fixture_echo.py").write_text(
        "from kaito_core.plugins import hookimpl\n\n\n@hookimpl\ndef kaito_runtimes():\n"
        "    from kaito_core.testing.serving import Echo\n\n    yield Echo()\n"
    )
    team.file.write_text(FILE)


def is_(team: Team, phase: str, *conditions: tuple[str, str, str, str], config: str = "", **status: Any) -> None:
    """What a controller says of an endpoint."""
    state = "Ready" if phase in ("Ready", "Asleep") else "NotReady"
    serving = {"phase": phase, "since": NOW, "annotations": served_by(yaml.safe_load(FILE)), "config": config}
    team.says(*conditions, state=state, serving=serving, **status)


def answers(team: Team, config: str = "") -> None:
    is_(team, "Ready", READY, SERVED, config=config)


def make(team: Team, text: str = FILE, **annotations: str) -> None:
    """Apply it, as another person would."""
    workspace = yaml.safe_load(text)
    metadata = workspace["metadata"]
    metadata |= {"namespace": team.namespace, "annotations": {**metadata["annotations"], **annotations}}
    team.client.create(WORKSPACES, workspace)


# --- run


@pytest.mark.usefixtures("controller")
def test_an_endpoint_is_followed_until_it_answers(kaito: Kaito, team: Team, environment: dict[str, str]) -> None:
    run = Command(environment, "run", "--yes", team.file)
    is_(team, "Starting", STARTS, PENDING)
    run.says("  InferenceReady: no – the model is being loaded")
    answers(team)
    run.ends(0)
    assert "small costs $0.50 an hour" in run.out
    assert "while it is served, which is until it is deleted" in run.out
    shown = run.out[run.out.index("small answers at") :].splitlines()
    assert shown == [
        f"small answers at http://small.{team.namespace} inside the cluster",
        f"  curl       curl http://small.{team.namespace}/chat -H 'Content-Type: application/json' -d '{{\"prompt\": \"Hello\"}}'",
        f"  from here  kubectl -n {team.namespace} port-forward service/small 5000:80",
        f"  chat       kaito chat -n {team.namespace} small",
        f"  end it     kaito delete -n {team.namespace} small; it runs until then",
    ]
    again = kaito("run", "--yes", team.file)
    assert again.returncode == 0, again.stderr
    assert f"{team.namespace}/small is served already" in again.stdout
    assert "kaito chat -n" in again.stdout


@pytest.mark.usefixtures("controller")
def test_changed_settings_in_the_file_are_a_change_though_the_workspace_is_the_same(
    kaito: Kaito, team: Team, environment: dict[str, str]
) -> None:
    def write(text: str) -> str:
        settings = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings"}}
        data = {"inference_config.yaml": text}
        team.file.write_text(f"{FILE}  config: settings\n---\n{yaml.safe_dump({**settings, 'data': data})}")
        return digest(data)

    first = write("echo: {}\n")
    run = Command(environment, "run", "--yes", team.file)
    answers(team, first)
    run.ends(0)
    assert "is served already" in kaito("run", "--yes", team.file).stdout
    second = write("echo: {}  # again\n")
    run = Command(environment, "run", "--yes", team.file)
    run.says(f"  applied Workspace {team.namespace}/small")
    time.sleep(2.0)
    assert run.goes_on(), "it answers in its old form: that is not the end"
    answers(team, second)
    run.ends(0)
    settings = team.client.get(CONFIG_MAPS, "settings", team.namespace)
    assert settings is not None
    assert digest(settings["data"]) == second


@pytest.mark.usefixtures("controller")
def test_asleep_on_demand_is_as_far_as_it_goes(kaito: Kaito, team: Team) -> None:
    team.file.write_text(FILE + "  policy: onDemand\n")
    meanwhile(lambda: is_(team, "Asleep", ASLEEP, ("WorkspaceSucceeded", "True", "r", "asleep")))
    done = kaito("run", "--yes", team.file)
    assert done.returncode == 0, done.stderr
    assert "small costs $0.50 an hour (Standard_Test, test of 2026-01-01) while it is served\n" in done.stdout
    assert "  InferenceReady: yes – asleep: the first request gets a machine" in done.stdout
    assert f"small is asleep: the first request gets a machine, at http://small.{team.namespace}" in done.stdout
    assert "(while it is awake)" in done.stdout
    logs = kaito("logs", "small")
    assert logs.returncode == 1
    assert "there is no pod of small: asleep: the first request gets a machine" in logs.stderr


@pytest.mark.usefixtures("controller")
@pytest.mark.parametrize(
    ("phase", "conditions", "words"),
    [
        ("Failed", [("InferenceReady", "False", "r", "no machine could be had (X: none left)")], "none left"),
        ("Starting", [("Accepted", "False", "PolicyRefused", "tests do not serve"), STARTS], "tests do not serve"),
        ("", [("InferenceReady", "False", "NoActivator", "nobody holds the first request")], "nobody holds"),
    ],
)
def test_a_refused_or_failed_endpoint_ends_with_its_words(
    phase: str,
    conditions: list[tuple[str, str, str, str]],
    words: str,
    kaito: Kaito,
    team: Team,
) -> None:
    serving = {"serving": {"phase": phase, "since": NOW}} if phase else {}
    meanwhile(lambda: team.says(*conditions, state="NotReady", **serving))
    done = kaito("run", "--yes", team.file)
    assert done.returncode == 1, done.stdout
    assert re.search(rf"error: {team.namespace}/small failed: .*{words}", done.stderr)
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("controller")
def test_an_endpoint_is_switched_off_by_its_policy(kaito: Kaito, team: Team) -> None:
    team.file.write_text(FILE + "  policy: never\n")
    for _ in range(2):
        done = kaito("run", team.file)  # costs nothing, so nobody is asked
        assert done.returncode == 0, done.stderr
        assert f"{team.namespace}/small is not served: its policy is never" in done.stdout
    assert team.until_there()["inference"]["policy"] == "never"


def test_standalone_holds_no_requests(kaito: Kaito, team: Team) -> None:
    team.file.write_text(FILE + "  policy: onDemand\n")
    refused = kaito("run", "--yes", "--standalone", "--tuner-image", "r.io/tuner:1", team.file)
    assert refused.returncode == 2
    assert "--standalone holds no requests for what is asleep" in refused.stderr
    assert team.workspace() is None


# --- tune, then serve


def tuned(team: Team, phase: str = "", **status: Any) -> None:
    """What a controller says of a tuning that has succeeded, and of what became of it."""
    serving = {"serving": {"phase": phase, "since": NOW}} if phase else {}
    conditions = [("WorkspaceSucceeded", "True", "workspaceSucceeded", "the adapter is in r.io/a:1")]
    if phase:
        conditions.append(ASLEEP if phase == "Asleep" else STARTS)
    team.says(*conditions, state="Succeeded", adapter={"image": "r.io/a:1"},
              finishedRevision=hash_of(team.until_there()), **serving, **status)  # fmt: skip


@pytest.mark.usefixtures("controller")
def test_what_is_tuned_is_served(kaito: Kaito, team: Team) -> None:
    team.file.write_text(TUNED)
    meanwhile(lambda: tuned(team, "Asleep"))
    done = kaito("run", "--yes", team.file)
    assert done.returncode == 0, done.stderr
    assert done.stdout.index("small succeeded") < done.stdout.index("small is asleep: the first request gets a machine")
    assert "serve-after-tuning" not in json.dumps(team.until_there()["metadata"]["annotations"])
    again = kaito("run", team.file)
    assert "is done already" in again.stdout
    assert f"kaito chat -n {team.namespace} small" in again.stdout

    # Asked for now: nothing is tuned again, but an endpoint costs money.
    refused = kaito("run", "--serve", team.file)
    assert refused.returncode == 2
    assert "this costs money" in refused.stderr
    assert "tune demo-phi-3" not in refused.stdout
    assert "serve demo-phi-3 with echo" in refused.stdout
    served = kaito("run", "--serve", "--yes", team.file)
    assert served.returncode == 0, served.stderr
    assert team.until_there()["metadata"]["annotations"]["kaito.sh/serve-after-tuning"] == "always"
    assert "is done already" in kaito("run", "--serve", team.file).stdout

    # A change of how it is served trains nothing, and is not waited for as if it did.
    team.file.write_text(TUNED + "inference: {policy: onDemand, idleAfter: 5m}\n")
    changed = kaito("run", "--yes", team.file)
    assert changed.returncode == 0, changed.stderr
    assert "tune demo-phi-3" not in changed.stdout
    assert "small succeeded" in changed.stdout
    assert "serve-after-tuning" not in json.dumps(team.until_there()["metadata"]["annotations"])


@pytest.mark.usefixtures("controller")
def test_a_policy_of_its_own_is_kept(kaito: Kaito, team: Team) -> None:
    team.file.write_text(TUNED + "inference: {policy: never}\n")
    meanwhile(lambda: tuned(team))
    done = kaito("run", "--serve", "--yes", team.file)
    assert done.returncode == 0, done.stderr
    assert "serve demo-phi-3" not in done.stdout
    assert "serve-after-tuning" not in json.dumps(team.until_there()["metadata"])


@pytest.mark.usefixtures("controller")
def test_what_cannot_be_served_afterwards_is_said_before_anything_is_tuned(kaito: Kaito, team: Team) -> None:
    """Its settings are in a ConfigMap of the cluster."""
    team.file.write_text(TUNED + "inference: {policy: always, config: settings}\n")
    missing = kaito("run", "--yes", team.file)
    assert missing.returncode == 2
    assert "the ConfigMap 'settings' is not there" in missing.stderr
    data = {"inference_config.yaml": "echo: {gib: 999}\n"}
    metadata = {"name": "settings", "namespace": team.namespace}
    team.client.create(CONFIG_MAPS, {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})
    refused = kaito("run", "--yes", team.file)
    assert refused.returncode == 2
    assert "tune demo-phi-3 with qlora" in refused.stdout
    assert "needs 999.0 GiB" in refused.stderr
    assert team.workspace() is None
    team.file.write_text(FILE + "  config: settings\n")
    alone = kaito("plan", team.file)
    assert alone.returncode == 2
    assert "needs 999.0 GiB" in alone.stdout


def test_only_runtimes_that_the_controller_has_an_image_for_are_planned(kaito: Kaito, team: Team) -> None:
    known = {"app.kubernetes.io/name": "kaito", "app.kubernetes.io/component": "controller"}
    container = {"name": "controller", "image": "r.io/c:1", "args": ["controller"]}
    pod = {"metadata": {"labels": known}, "spec": {"containers": [container]}}
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "kaito-controller", "namespace": team.namespace, "labels": known},
        "spec": {"replicas": 0, "selector": {"matchLabels": known}, "template": pod},
    }
    team.client.apply(DEPLOYMENTS, deployment)
    try:
        refused = kaito("plan", team.file)
        assert refused.returncode == 2
        assert "there is no runtime 'echo'" in refused.stderr
        container["args"] = ["controller", "--runtime-image=echo=r.io/echo:1"]
        team.client.apply(DEPLOYMENTS, deployment)
        assert "serve demo-phi-3 with echo" in kaito("plan", team.file).stdout
    finally:
        team.client.delete(DEPLOYMENTS, "kaito-controller", team.namespace)


# --- looking at it


def test_status_shows_the_endpoint(kaito: Kaito, team: Team) -> None:
    make(team, **{"kaito.sh/enablelb": "True"})
    is_(team, "Ready", READY, SERVED)
    patch = {"status": {"serving": {"lastRequest": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")}}}
    team.client.patch(WORKSPACES, "small", team.namespace, patch, subresource="status")
    table = kaito("status").stdout
    assert re.search(rf"small +Ready +- +demo-phi-3 +Ready http://small.{team.namespace}\n", table)
    full = kaito("status", "small", "--context", team.context).stdout
    assert re.search(r"endpoint +Ready for \d+ h .*, last asked \d+ s ago", full)
    assert "outside   the cloud has not given an address yet" in full
    assert f"kaito chat --context {team.context} -n {team.namespace} small" in full
    (row,) = json.loads(kaito("status", "--json").stdout)
    assert row["endpoint"]["phase"] == "Ready"
    assert row["endpoint"]["url"] == f"http://small.{team.namespace}"
    assert (row["endpoint"]["since"], row["endpoint"]["lastRequest"] > NOW) == (NOW, True)

    service(team, [])
    ingress = {"status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.7"}]}}}
    team.client.patch(SERVICES, "small", team.namespace, {"spec": {"type": "LoadBalancer"}})
    team.client.patch(SERVICES, "small", team.namespace, ingress, subresource="status")
    assert "203.0.113.7" not in kaito("status", "small").stdout, "a Service of that name that is another's"
    owned = {"metadata": {"ownerReferences": [owner_reference(team.until_there())]}}
    team.client.patch(SERVICES, "small", team.namespace, owned)
    assert "outside   http://203.0.113.7" in kaito("status", "small").stdout


# --- chat


class Handler(BaseHTTPRequestHandler):
    """A model that repeats what it is told, a word at a time."""

    protocol_version = "HTTP/1.1"
    seen: ClassVar[list[dict[str, Any]]] = []
    between: ClassVar[Callable[[Handler], object]] = lambda handler: None
    """What happens between the first word and the rest."""
    broken: ClassVar[threading.Event] = threading.Event()
    """Set when a client has gone away before the end."""

    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        self._whole(200, {"data": [{"id": "tiny"}, {"id": "mine", "parent": "tiny"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.seen.append({**body, "headers": {k.lower(): v for k, v in self.headers.items()}})
        told = body["messages"][-1]["content"]
        if told.startswith("status "):
            self._whole(int(told.removeprefix("status ")), {"error": {"message": "the words of the endpoint"}})
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        self._say("first ")
        self.between()
        self._say(f"{body['model']} hears {told}")
        self.wfile.write(b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n')

    def flood(self, when: threading.Event) -> None:
        """Wait, and then say so much that a client that has gone is noticed."""
        when.wait(30)
        try:
            for _ in range(100_000):
                self._say("more " * 100)
        except OSError:
            self.broken.set()
            raise

    def _say(self, text: str) -> None:
        self.wfile.write(b"data: " + json.dumps({"choices": [{"delta": {"content": text}}]}).encode() + b"\n\n")
        self.wfile.flush()

    def _whole(self, status: int, body: Any) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    with listening() as found:
        yield found


@contextmanager
def listening() -> Iterator[ThreadingHTTPServer]:
    Handler.seen, Handler.between = [], lambda handler: None
    # The API server does not send anybody to a loopback address.
    server = ThreadingHTTPServer((host_address(), 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients go away here
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def service(team: Team, servers: list[ThreadingHTTPServer]) -> None:
    """The Service of the endpoint, with these behind it."""
    metadata = {"name": "small", "namespace": team.namespace}
    spec = {"ports": [{"name": "http", "port": 80, "targetPort": 5000}]}
    team.client.apply(SERVICES, {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec})
    subsets = []
    for server in servers:
        # The API server sends nobody to an address that is not a pod's.
        ip, pod = str(server.server_address[0]), {"name": "small-0", "namespace": team.namespace}
        containers = [{"name": "small", "image": "r.io/a:1"}]
        spec = {"automountServiceAccountToken": False, "containers": containers}
        team.client.create(PODS, {"apiVersion": "v1", "kind": "Pod", "metadata": pod, "spec": spec})
        said = {"status": {"podIP": ip, "podIPs": [{"ip": ip}]}}
        team.client.patch(PODS, "small-0", team.namespace, said, subresource="status")
        addresses = [{"ip": ip, "targetRef": {"kind": "Pod", **pod}}]
        subsets.append({"addresses": addresses, "ports": [{"name": "http", "port": server.server_port}]})
    made = {"apiVersion": "v1", "kind": "Endpoints", "metadata": metadata}
    team.client.apply(ENDPOINTS, {**made, "subsets": subsets} if subsets else made)


def until(what: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 60
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def woken(team: Team) -> str:
    return str(team.until_there()["metadata"]["annotations"].get("kaito.sh/wake", ""))


def test_a_chat_goes_through_the_api_server_as_it_comes(
    kaito: Kaito, team: Team, server: ThreadingHTTPServer, environment: dict[str, str]
) -> None:  # fmt: skip
    make(team)
    answers(team)
    service(team, [server])
    gate = threading.Event()
    Handler.between = lambda handler: gate.wait(30)
    chat = subprocess.Popen(
        [sys.executable, "-u", "-m", "kaito_core", "chat", "small", "how", "are you?"],
        env={**environment, "KAITO_API_KEY": "not-for-the-api-server"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert chat.stdout is not None
    assert chat.stdout.read(6) == "first "  # while the rest has not been said yet
    gate.set()
    out, err = chat.communicate(timeout=60)
    assert (chat.returncode, out) == (0, "mine hears how are you?\n"), err
    assert err == f"({team.namespace}/small in the cluster of the context '{team.context}', through its API server)\n"
    assert "authorization" not in Handler.seen[0]["headers"]
    assert woken(team) == ""

    other = kaito("chat", "--context", team.context, "-n", team.namespace, "small", "hi", "--adapter", "none")
    assert other.stdout == "first tiny hears hi\n"
    assert "there is no adapter 'x'; there is mine" in kaito("chat", "small", "hi", "--adapter", "x").stderr
    for status, words in (
        (400, "refuses the request"),
        (429, "is busy"),
        (500, "failed with 500"),
        (503, "is not ready"),
    ):
        failed = kaito("chat", "small", f"status {status}")
        assert failed.returncode in (1, 2)
        assert f"{team.namespace}/small {words}: the words of the endpoint" in failed.stderr
        assert "Traceback" not in failed.stderr
    key = kaito("chat", "small", "status 401")
    assert (key.returncode, "wants an API key" in key.stderr) == (2, True)

    # Who goes away in the middle is noticed at the other end.
    gone = threading.Event()
    Handler.between = lambda handler: handler.flood(gone)
    chat = subprocess.Popen([sys.executable, "-u", "-m", "kaito_core", "chat", "small", "flood"], env=environment,
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert chat.stdout is not None
    assert chat.stdout.read(6) == "first ", chat.communicate(timeout=60)
    chat.send_signal(signal.SIGINT)
    chat.communicate(timeout=60)
    assert chat.returncode == 130
    gone.set()
    assert Handler.broken.wait(30)


def test_an_endpoint_that_is_asleep_is_woken(
    kaito: Kaito, team: Team, server: ThreadingHTTPServer, environment: dict[str, str]
) -> None:  # fmt: skip
    make(team, FILE + "  policy: onDemand\n")
    is_(team, "Asleep", ASLEEP)
    service(team, [])

    def controls() -> None:
        wanted = until(lambda: woken(team))
        asked.append(datetime.fromisoformat(wanted))
        is_(team, "Starting", STARTS, ("ResourceReady", "False", "r", "waiting for Standard_Test"))
        time.sleep(1.5)
        answers(team)
        time.sleep(1)  # the API server learns of the pod a little later
        service(team, [server])

    asked: list[datetime] = []
    meanwhile(controls)
    done = kaito("chat", "small", "hi")
    assert (done.returncode, done.stdout) == (0, "first mine hears hi\n"), done.stderr
    for line in (
        f"({team.namespace}/small is asleep: waking it)",
        "(ResourceReady: no – waiting for Standard_Test)",
        "(InferenceReady: no – the model is being loaded)",
        "(InferenceReady: yes)",
    ):
        assert line in done.stderr.splitlines()
    assert abs((datetime.now(UTC) - asked[0]).total_seconds()) < 60

    # Nobody answers any more, and Ctrl-C stops waiting for it.
    is_(team, "Asleep", ASLEEP)
    before = woken(team)
    chat = Command({**environment}, "chat", "small", "hi")
    until(lambda: woken(team) != before)
    chat.interrupt()
    err = chat.ends(130)
    assert "(no longer waited for; it starts nevertheless)" in err


def test_what_will_not_come_is_not_waited_for(kaito: Kaito, team: Team) -> None:
    make(team)
    is_(team, "Failed", ("InferenceReady", "False", "r", "no machine could be had"))
    failed = kaito("chat", "small", "hi")
    assert failed.returncode == 1
    assert f"{team.namespace}/small cannot answer: no machine could be had" in failed.stderr
    assert "tried again every five minutes" in failed.stderr

    # On demand it is tried again, because somebody asks.
    team.client.patch(WORKSPACES, "small", team.namespace, {"inference": {"policy": "onDemand"}})

    def controls() -> None:
        until(lambda: woken(team))
        is_(team, "Starting", STARTS)
        time.sleep(1.5)
        again = ("InferenceReady", "False", "r", "none left")
        team.says(again, state="NotReady", serving={"phase": "Failed", "since": "2026-01-01T00:01:00Z"})

    is_(team, "Failed", ("InferenceReady", "False", "r", "no machine could be had"))
    meanwhile(controls)
    failed = kaito("chat", "small", "hi")
    assert failed.returncode == 1
    assert "failed: no machine could be had; trying again" in failed.stderr
    assert f"{team.namespace}/small cannot answer: none left" in failed.stderr
    is_(team, "Asleep", ASLEEP)
    meanwhile(lambda: is_(team, "Starting", ("Accepted", "False", "PlanRefused", "the adapter is for another model")))
    refused = kaito("chat", "small", "hi")
    assert refused.returncode == 1
    assert "cannot answer: the adapter is for another model" in refused.stderr


@pytest.mark.parametrize(
    ("text", "annotations", "words", "remedy"),
    [
        (FILE, {"kaito.sh/api-key-secret": "key"}, "wants an API key", "KAITO_API_KEY=… kaito chat http://localhost:5000"),
        (FILE + "  policy: never\n", {}, "is not served: its policy is never", "set inference.policy to onDemand"),
        (FILE.replace("preset: {name: demo-phi-3}", "template: {spec: {containers: []}}"), {}, "a pod template", "port-forward"),
        (TUNED, {}, "is not tuned yet", "kaito logs -f"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_said_with_what_helps(
    text: str,
    annotations: dict[str, str],
    words: str,
    remedy: str,
    kaito: Kaito,
    team: Team,
) -> None:
    make(team, text, **annotations)
    refused = kaito("chat", "small", "hi")
    assert refused.returncode == 2, refused.stderr
    assert words in refused.stderr
    assert remedy in refused.stderr


def test_a_name_is_looked_for_here_and_then_in_the_cluster(
    kaito: Kaito, team: Team, server: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    from kaito_core.local.state import RunFolder, RunState, Served

    nobody = kaito("chat", "small", "hi")
    assert nobody.returncode == 2
    assert "'small' is not served on this machine, and there is no Workspace 'small' in the namespace" in nobody.stderr
    make(team)
    is_(team, "Ready", READY, SERVED)
    monkeypatch.setenv("KAITO_HOME", str(tmp_path / "home"))
    folder = RunFolder.of("small")
    url = f"http://{server.server_address[0]}:{server.server_port}"
    folder.write(
        RunState(
            "small", "default", "demo-phi-3", "echo", ["serve"], task="inference", served=Served(url, "tiny", "tiny")
        )
    )
    with folder.lock():
        here = kaito("chat", "small", "hi")
        assert (here.returncode, here.stdout) == (0, "first tiny hears hi\n"), here.stderr
        assert here.stderr == "(small on this machine)\n"
        assert kaito("chat", "--local", "small", "hi").stderr == ""
        service(team, [server])
        assert kaito("chat", "-n", team.namespace, "small", "hi").stdout == "first mine hears hi\n"
    # It has been ended here.
    assert kaito("chat", "small", "hi").stdout == "first mine hears hi\n"
    assert "'small' is not served now" in kaito("chat", "--local", "small", "hi").stderr
    url_and_place = kaito("chat", "--local", "http://x", "hi")
    assert (url_and_place.returncode, "a URL says by itself" in url_and_place.stderr) == (2, True)


def test_what_one_may_not_do_is_said(kaito: Kaito, team: Team, server: ThreadingHTTPServer, tmp_path: Path) -> None:
    make(team, FILE + "  policy: onDemand\n")
    service(team, [server])
    guest = as_guest(team, tmp_path)
    is_(team, "Asleep", ASLEEP)
    asleep = kaito("chat", "small", "hi", KUBECONFIG=guest)
    assert asleep.returncode == 1
    assert f"{team.namespace}/small is asleep, and these credentials may not wake it" in asleep.stderr
    assert "ask for the right to patch workspaces" in asleep.stderr
    answers(team)
    ready = kaito("chat", "small", "hi", KUBECONFIG=guest)
    assert ready.returncode == 1
    assert f"{team.namespace}/small cannot be asked through the API server: services" in ready.stderr
    assert "ask for the right to get and create services/proxy" in ready.stderr


def as_guest(team: Team, folder: Path) -> str:
    """The kubeconfig of somebody who may look at Workspaces and nothing else."""
    kubectl = [str((assets() or Path()) / "kubectl"), "--kubeconfig", str(team.kubeconfig)]

    def run(*arguments: str) -> str:
        return subprocess.run([*kubectl, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    run("create", "serviceaccount", "guest")
    run("create", "role", "guest", "--verb=get,list", "--resource=workspaces.kaito.sh")
    run("create", "rolebinding", "guest", "--role=guest", f"--serviceaccount={team.namespace}:guest")
    config = yaml.safe_load(team.kubeconfig.read_text())
    config["users"][0]["user"] = {"token": run("create", "token", "guest")}
    path = folder / "guest"
    path.write_text(yaml.safe_dump(config))
    return str(path)
