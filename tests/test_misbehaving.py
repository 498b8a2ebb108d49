"""Plugins that do whatever a plugin can do wrong, really installed: the program goes on, says whose fault it is, and only what
depends on the plugin fails. On the command line, and in the controller for each Workspace."""

from __future__ import annotations

import json
import os
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from subprocess import CompletedProcess, run
from typing import Any, ClassVar

import pytest

from kaito_core.controller.act import ask
from kaito_core.controller.reconcile.decision import Ensure, Observe, Release
from kaito_core.plugins import calls
from kaito_core.plugins.installed import HOOKS
from kaito_core.plugins.types import (
    InsufficientCapacity,
    NodeProvisioner,
    NodeRequest,
    NodeStatus,
    Offer,
    ProvisioningError,
    Requirements,
    Transient,
    Unsupported,
)
from tests.conftest import workspace

BEGIN = """
    from __future__ import annotations
    from kaito_core.plugins import *

    def preset(name):
        shape = Architecture("X", 1000, 1, 8, 16, 1, 1, 8, 32, 64, linears={"q_proj": (8, 8)})
        return Preset(name, ModelSource(hub="a/b", revision="c"), "mit", shape, ChatFormat("", ("</s>",)), ("q_proj",))
"""

TUNER = """
    class Mine(Tuner):
        name = METHOD
        methods = (METHOD,)
        def resolve(self, preset, method, user): return {}
        def fit(self, preset, method, config, offer, data): DOES
        def smaller(self, preset, method, config): return ()
        def workload(self, job): return None
        def schema(self): return {}

    @hookimpl
    def kaito_tuners():
        yield Mine()
"""


PROVISIONER = """
    import threading, time
    from kaito_core.plugins import *

    go, asked = threading.Event(), []

    class SpotGone(InsufficientCapacity):
        pass

    class Cloud(NodeProvisioner):
        name = NAME
        holds = False

        def offers(self, requirements):
            asked.append("offers")
            OFFERS
            return [Offer(NAME, cpus=4, memory=1 << 34, provisioner=NAME, price=Price(0.1, "test", "2026-01-01"))]

        def ensure(self, request):
            asked.append("ensure")
            ENSURE
            return NodeStatus(request.id, "ready", selector={"acme": "yes"})

        def observe(self, request_id):
            return NodeStatus(request_id, "ready")

        def release(self, request_id):
            return NodeStatus(request_id, "absent")

    @hookimpl
    def kaito_node_provisioners():
        yield Cloud()
"""


def hook(name: str, does: str) -> str:
    """A module with this hook."""
    arguments = {"kaito_validate": "workspace, plan", "kaito_workload": "workspace, workload", "kaito_events": "event"}
    return textwrap.dedent(BEGIN) + f"\n@hookimpl\ndef {name}({arguments.get(name, '')}):\n    {does}\n"


def cloud(name: str, offers: str) -> str:
    """A module with a node provisioner of this name, and what its ``offers`` does."""
    code = textwrap.dedent(PROVISIONER).replace("NAME", repr(name)).replace("OFFERS", offers or "pass")
    return code.replace("ENSURE", "pass")


def tuner(method: str, does: str) -> str:
    return textwrap.dedent(BEGIN + TUNER).replace("METHOD", repr(method)).replace("DOES", does)


def install(site: Path, distribution: str, code: str) -> None:
    """What ``pip install`` leaves behind: the module, and the metadata that says where the plugin is."""
    module = distribution.replace("-", "_")
    info = site / f"{module}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[kaito]\n{distribution} = {module}\n")
    (site / f"{module}.py").write_text(textwrap.dedent(code))


FAILING: Mapping[str, tuple[str, str]] = {
    "acme-import-error": (
        "raise ImportError('no libacme.so')",
        "importing acme_import_error raised ImportError: no libacme.so",
    ),
    "acme-no-extra": ("import acme_engine", "it needs the Python module acme_engine, which is missing"),
    "acme-exits": ("import sys; sys.exit(7)", "importing acme_exits raised SystemExit: 7"),
    "acme-interrupts": ("raise KeyboardInterrupt", "importing acme_interrupts raised KeyboardInterrupt"),
    "acme-recurses": ("def f(): f()\nf()", "importing acme_recurses raised RecursionError: maximum recursion depth"),
    "acme-memory": ("raise MemoryError", "importing acme_memory raised MemoryError"),
    "acme-newer": ("KAITO_API_VERSION = '9.0'", "it is made for version 9.0 of the plugin contract"),
    "acme-syntax": ("def (", "importing acme_syntax raised SyntaxError"),
    "acme-wrong-presets": (hook("kaito_presets", "return [42]"), "kaito_presets gave 42 (int), not a Preset"),
    "acme-wrong-field": (
        hook("kaito_presets", "import dataclasses; yield dataclasses.replace(preset('acme-x'), licence=None)"),
        "kaito_presets gave a preset whose licence is None (NoneType), not a str",
    ),
    "acme-endless": (
        hook("kaito_presets", "x = preset('acme-y')\n    while True: yield x"),
        "kaito_presets raised OverflowError: kaito_presets gave more than 100000 of them",
    ),
    "acme-memory-hook": (hook("kaito_runtimes", "raise MemoryError"), "kaito_runtimes raised MemoryError"),
    "acme-exits-hook": (hook("kaito_commands", "raise SystemExit(5)"), "kaito_commands raised SystemExit: 5"),
    **{
        f"acme-raises-{name[6:].replace('_', '-')}": (
            hook(name, f"raise RuntimeError('not me: {name}')"),
            f"{name} raised RuntimeError: not me: {name}",
        )
        for name in HOOKS
        if name not in ("kaito_validate", "kaito_workload", "kaito_events")
    },
}
"""What `kaito plugins` can know: it loads them, and calls the hooks that provide something."""

LATER: Mapping[str, tuple[str, str]] = {
    "acme-raises-validate": (hook("kaito_validate", "raise SystemExit(4)"), "kaito_validate raised SystemExit: 4"),
    "acme-wrong-validate": (hook("kaito_validate", "return [42]"), "kaito_validate gave 42 (int), not a Problem"),
    "acme-changes-validate": (
        hook("kaito_validate", "workspace.metadata.labels['team'] = 'x'; return ()"),
        "kaito_validate changed the workspace that it was given",
    ),
    "acme-raises-workload": (
        hook("kaito_workload", "raise KeyboardInterrupt"),
        "kaito_workload raised KeyboardInterrupt",
    ),
    "acme-wrong-workload": (hook("kaito_workload", "return 42"), "kaito_workload gave 42 (int), not a Workload"),
    "acme-changes-workload": (
        hook("kaito_workload", "workload.env['PYTHONHOME'] = '/nowhere'"),
        "kaito_workload changed the workload that it was given",
    ),
    "acme-raises-events": (hook("kaito_events", "raise MemoryError"), "kaito_events raised MemoryError"),
}
"""What shows once there is something to plan or to run."""

OTHERS: Mapping[str, str] = {
    "acme-loud": hook("kaito_validate", "print('nor this'); return ()") + "\nprint('{not json')\n",
    "acme-twin-one": hook("kaito_presets", "yield preset('acme-twin')"),
    "acme-twin-two": hook("kaito_presets", "yield preset('acme-twin')"),
    "acme-heavy": "import kubernetes\n",
    "acme-tuner-raises": tuner("acme-raises", "raise ZeroDivisionError('batch')"),
    "acme-tuner-wrong": tuner("acme-wrong", "return 8"),
    "acme-cloud-raises": cloud("acme-cloud-raises", "raise SystemExit(9)"),
    "acme-cloud-says-no": cloud("acme-cloud-says-no", "raise NotAuthorized('who are you?')"),
    "acme-commands": hook(
        "kaito_commands",
        "import click\n"
        "    yield Command('acme-crash', 'Crashes.', load=lambda: click.Command('x', callback=lambda: 1 / 0))\n"
        "    yield Command('acme-unloadable', 'Cannot be loaded.', load=lambda: exit(3))\n"
        "    yield Command('acme-nothing', 'Is none.', load=lambda: None)\n",
    ),
}

SEEN = {**{d: c for d, (c, _) in {**FAILING, **LATER}.items()}, **OTHERS}


class Installed:
    """`kaito` in an environment in which misbehaving plugins are installed besides everything else."""

    def __init__(self, folder: Path, plugins: Mapping[str, str]) -> None:
        self.folder = folder
        site = folder / "site"
        for distribution, code in plugins.items():
            install(site, distribution, code)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("KAITO_", "HF_", "DOCKER_", "KUBERNETES_"))}
        path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))
        own = {"KAITO_HOME": str(folder / "home"), "DOCKER_CONFIG": str(folder / "docker"), "OMP_NUM_THREADS": "1"}
        self.environment = {**kept, **own, "PYTHONPATH": path, "KUBECONFIG": str(folder / "none"), "COLUMNS": "200"}

    def kaito(self, *arguments: str | Path, **env: str) -> CompletedProcess[str]:
        command = [sys.executable, "-m", "kaito_core", *map(str, arguments)]
        env = {**self.environment, **env}
        return run(command, capture_output=True, text=True, cwd=self.folder, env=env, timeout=900, check=False)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("misbehaving"), SEEN)


@pytest.fixture(scope="module")
def listed(installed: Installed) -> Any:
    """What ``kaito plugins --json`` says."""
    done = installed.kaito("plugins", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# --- kaito plugins


@pytest.mark.parametrize("distribution", FAILING)
def test_kaito_plugins_says_whose_fault_it_is_and_which_hook_failed(listed: Any, distribution: str) -> None:
    (found,) = [p for p in listed["plugins"] if p["distribution"] == distribution]
    assert found["state"] in ("failed", "incompatible")
    assert found["provides"] == {} or distribution.startswith("acme-raises")
    (said,) = [p for p in listed["problems"] if f"({distribution} 1.0)" in p["message"]]
    assert FAILING[distribution][1] in said["message"]
    assert said["remedy"]


def test_everybody_else_works(listed: Any) -> None:
    states = {p["distribution"]: p["state"] for p in listed["plugins"] if p["distribution"] not in FAILING}
    assert set(states.values()) == {"active"}
    assert {"kaito-core", "kaito-tuner-qlora", *OTHERS, *LATER} <= set(states)


def test_a_heavy_plugin_and_two_of_one_name_are_warned_of(listed: Any) -> None:
    messages = [p["message"] for p in listed["problems"]]
    assert "the plugin acme-heavy (acme-heavy 1.0) imports kubernetes when it is loaded" in messages
    assert "the preset 'acme-twin' is provided by acme-twin-one 1.0 and acme-twin-two 1.0" in messages


# --- kaito plan, and commands of plugins


@pytest.fixture(scope="module")
def planned(installed: Installed) -> CompletedProcess[str]:
    return installed.kaito("plan", "--local", "--json", workspace(installed.folder / "good", name="good"))


def test_a_plan_that_needs_none_of_them_is_made_and_is_json(planned: CompletedProcess[str]) -> None:
    assert planned.returncode == 0, planned.stderr
    (plan,) = json.loads(planned.stdout)["plans"]
    assert plan["candidates"][0]["chosen"]


@pytest.mark.parametrize("distribution", [d for d in LATER if d.endswith("validate")])
def test_a_rule_that_could_not_be_checked_is_said(planned: CompletedProcess[str], distribution: str) -> None:
    assert LATER[distribution][1] in planned.stderr
    assert f"({distribution} 1.0)" in planned.stderr


def test_what_a_plugin_prints_is_said_to_be_its(planned: CompletedProcess[str]) -> None:
    assert "acme-loud 1.0 prints: {not json" in planned.stderr
    assert "acme-loud 1.0 prints: nor this" in planned.stderr


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("acme-raises", "of acme-tuner-raises 1.0 broke: fit raised ZeroDivisionError: batch (acme_tuner_raises.py:"),
        ("acme-wrong", "of acme-tuner-wrong 1.0 broke: fit gave 8 (int), not a TuningFit"),
    ],
)
def test_who_asks_for_what_is_broken_is_told_whose_it_is(installed: Installed, method: str, said: str) -> None:
    done = installed.kaito("plan", "--local", workspace(installed.folder / method, method=method))
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert said in done.stderr


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("acme-crash", "the command 'acme-crash' of acme-commands 1.0 broke: ZeroDivisionError: division by zero"),
        ("acme-unloadable", "the command 'acme-unloadable' of acme-commands 1.0 cannot be loaded: SystemExit: 3"),
        ("acme-nothing", "load() gave None (NoneType), not a click command"),
    ],
)
def test_a_command_that_breaks_is_its_plugins_fault(installed: Installed, command: str, said: str) -> None:
    done = installed.kaito(command)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert said in done.stderr


@pytest.mark.slow
def test_plugins_that_hang_are_given_up_and_named(tmp_path: Path) -> None:
    # Ten seconds each, as for everybody.
    hanging = {
        "acme-hangs-import": "import threading\nthreading.Event().wait()",
        "acme-hangs-hook": hook(
            "kaito_presets", "import time\n    while True: time.sleep(1); yield preset('acme-slow')"
        ),
    }
    done = Installed(tmp_path, hanging).kaito("plugins", "--json", KAITO_PLUGINS=",".join(hanging))
    assert done.returncode == 0
    said = [p["message"] for p in json.loads(done.stdout)["problems"]]
    assert any(
        "(acme-hangs-import 1.0)" in s and "acme_hangs_import did not return within 10 seconds" in s for s in said
    )
    assert any("(acme-hangs-hook 1.0)" in s and "kaito_presets did not return within 10 seconds" in s for s in said)


def test_a_provisioner_that_fails_keeps_nobody_from_the_machines_of_the_others(installed: Installed) -> None:
    done = installed.kaito("plan", workspace(installed.folder / "anywhere", name="anywhere"))
    assert done.returncode == 0, done.stderr
    assert "this machine" in done.stdout
    assert "'acme-cloud-raises' of acme-cloud-raises 1.0 broke: offers raised SystemExit: 9" in done.stderr
    assert "the node provisioner 'acme-cloud-says-no' does not know what it has: who are you?" in done.stderr


# --- kaito run


@pytest.mark.slow
def test_a_run_that_needs_none_of_them_succeeds(installed: Installed) -> None:
    done = installed.kaito("run", "--local", "--yes", workspace(installed.folder / "run", name="run", max_steps=2))
    assert done.returncode == 0, done.stdout + done.stderr
    for distribution in ("acme-raises-workload", "acme-wrong-workload", "acme-changes-workload", "acme-raises-events"):
        assert done.stderr.count(f"({distribution} 1.0)") == 1
        assert LATER[distribution][1] in done.stderr


# --- the controller


class Cloud(NodeProvisioner):
    """Answers as it is told."""

    name: ClassVar[str] = "cloud"

    def __init__(self, answer: NodeStatus | BaseException) -> None:
        self.answer = answer

    def offers(self, requirements: Requirements) -> tuple[Offer, ...]:
        return ()

    def ensure(self, request: NodeRequest) -> NodeStatus:
        return self.observe(request.id)

    def observe(self, request_id: str) -> NodeStatus:
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer

    release = observe


class SpotGone(InsufficientCapacity):
    """A kind of its own, as a plugin may have."""


QUESTIONS = (
    Ensure("cloud", NodeRequest("r", Offer("m", 1, 1), Requirements())),
    Observe("cloud", "r"),
    Release("cloud", "r"),
)


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt(), MemoryError(), ValueError("no")])
@pytest.mark.parametrize("question", QUESTIONS, ids=lambda q: type(q).__name__)
def test_whatever_a_provisioner_raises_is_an_answer_that_is_asked_for_again(
    question: Any, error: BaseException
) -> None:
    status = ask({"cloud": Cloud(error)}, question)
    assert status.id == "r"
    assert isinstance(status.failure, Transient)
    assert f"the node provisioner 'cloud' broke: {type(error).__name__}" in status.message


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (SpotGone("none"), InsufficientCapacity("none")),
        (ProvisioningError("no"), Unsupported("no")),
        (Transient("busy", retry_after="soon"), Transient("busy")),  # type: ignore[arg-type]
        (Transient("busy", retry_after=float("nan")), Transient("busy")),
        (Transient("busy", retry_after=3), Transient("busy", 3.0)),
    ],
)
@pytest.mark.parametrize("given", [False, True])
def test_a_failure_of_a_plugins_own_kind_counts_as_what_it_is_a_kind_of(
    theirs: ProvisioningError, ours: ProvisioningError, given: bool
) -> None:
    cloud = Cloud(NodeStatus("r", "failed", failure=theirs) if given else theirs)
    failure = ask({"cloud": cloud}, QUESTIONS[0]).failure
    assert (type(failure), str(failure)) == (type(ours), str(ours))
    assert getattr(failure, "retry_after", None) == getattr(ours, "retry_after", None)


CLOUDS: Mapping[str, tuple[str, str, str]] = {
    "acme-good": ("", "", ""),
    "acme-hangs": ("", "go.wait()", "of acme-hangs 1.0: offers is not asked while ensure has not returned"),
    "acme-exits": ("", "raise SystemExit(3)", "of acme-exits 1.0 broke: ensure raised SystemExit: 3"),
    "acme-interrupts": ("", "raise KeyboardInterrupt", "of acme-interrupts 1.0 broke: ensure raised KeyboardInterrupt"),
    "acme-wrong": ("", "return 'ready'", "of acme-wrong 1.0 broke: ensure gave 'ready' (str), not a NodeStatus"),
    "acme-own-kind": ("", "raise SpotGone('none left')", "acme-own-kind: none left"),
    "acme-mute": ("go.wait()", "", ""),
    "acme-endless": ("while True: time.sleep(0.01)", "", ""),
    "acme-no-offers": ("return 7", "", ""),
}
"""What each does when it is asked what it has, and for a machine; and what its Workspace says then."""


@pytest.fixture
def clouds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of provisioners that are installed in this very process."""
    for name, (offers, ensure, _) in CLOUDS.items():
        code = textwrap.dedent(PROVISIONER).replace("NAME", repr(name)).replace("OFFERS", offers or "pass")
        install(tmp_path / "site", name, code.replace("ENSURE", ensure or "pass"))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(calls, "PROVISIONER_SECONDS", 1.0)
    yield list(CLOUDS)
    for name in CLOUDS:
        module = sys.modules.pop(name.replace("-", "_"), None)
        if module:
            module.go.set()


@pytest.mark.slow
def test_one_provisioner_that_misbehaves_stops_no_other_workspace(
    tmp_path_factory: pytest.TempPathFactory, clouds: list[str]
) -> None:
    from kaito_core.api.crd import crd
    from kaito_core.controller.settings import Settings
    from kaito_core.controller.workspaces import WorkspaceController
    from kaito_core.kube.client import connect
    from kaito_core.kube.kinds import CRDS, JOBS, SECRETS, WORKSPACES
    from kaito_core.plugins.manager import load_plugins
    from kaito_core.testing.cluster import running_cluster, why_no_cluster

    if reason := why_no_cluster():
        pytest.skip(reason)
    ours = ["kaito-preset-demo", "kaito-tuner-qlora"]
    with running_cluster() as cluster:
        client = connect(kubeconfig=str(cluster.kubeconfig))
        client.apply(CRDS, crd())
        while not client.serves(WORKSPACES):
            time.sleep(0.1)
        client.create(
            SECRETS, {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "push", "namespace": "default"}}
        )
        controller = WorkspaceController(client, load_plugins([*ours, *clouds]), Settings(tuner_image="r.io/tuner:1"))
        controller.start_watching()
        controller.start_workers(2)  # fewer than there are provisioners that hang
        try:
            misbehaving = [n for n, (_, _, said) in CLOUDS.items() if said]
            for name in (*misbehaving, "acme-good"):
                client.create(WORKSPACES, workspace_object(name))
            until(lambda: client.get(JOBS, "acme-good", "default"))
            for name in misbehaving:

                def said(name: str = name) -> str:
                    return said_of(client.get(WORKSPACES, name, "default"))

                until(lambda name=name, said=said: CLOUDS[name][2] in said(), said)
                assert client.get(JOBS, name, "default") is None
            # Whoever hangs is asked again once it answers, and not before.
            hangs = sys.modules["acme_hangs"]
            assert hangs.asked.count("ensure") == 1
            assert len(sys.modules["acme_mute"].asked) <= 2  # once by each worker
            hangs.go.set()
            until(lambda: client.get(JOBS, "acme-hangs", "default"))
        finally:
            controller.stop(5)


def workspace_object(name: str) -> dict[str, Any]:
    """A Workspace that wants the machine of this provisioner and no other."""
    return {
        "apiVersion": "kaito.sh/v1beta1",
        "kind": "Workspace",
        "metadata": {"name": name, "namespace": "default"},
        "resource": {"instanceType": name},
        "tuning": {
            "preset": {"name": "demo-phi-3"},
            "method": "qlora",
            "input": {"urls": ["https://example.com/a.jsonl"]},
            "output": {"image": "r.io/a:1", "imagePushSecret": "push"},
        },
    }


def said_of(obj: Any) -> str:
    """Everything that the status says."""
    return json.dumps(obj.get("status", {}), ensure_ascii=False).replace('\\"', '"')


def until(true: Any, what: Any = lambda: "") -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline, what()
        time.sleep(0.1)
