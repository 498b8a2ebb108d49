"""Where a command works, and what is said when it cannot work there."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest
import yaml

from kaito_core.cli.target import Current, Readiness, Target, choose, current, obstacle
from kaito_core.plugins.manager import load_plugins
from kaito_core.problems import UserError

if TYPE_CHECKING:
    from kaito_core.kube.client import Client

AKS = Current("aks")
NONE = Current(lack="there is no kubeconfig")
THERE = Target("--context", "aks")


@pytest.mark.parametrize(
    ("now", "said", "target"),
    [
        (AKS, {"local": True}, "this machine (--local)"),
        (AKS, {}, "the cluster of the context 'aks' (the current one of your kubeconfig)"),
        (AKS, {"context": "eks"}, "the cluster of the context 'eks' (--context)"),
        (NONE, {"context": "eks"}, "the cluster of the context 'eks' (--context)"),
        (AKS, {"kubeconfig": "k"}, "the cluster of the context 'aks' (the current one of k)"),
        (NONE, {}, "this machine (there is no kubeconfig)"),
    ],
)
def test_the_target_and_why(now: Current, said: dict[str, object], target: str) -> None:
    assert str(choose(now, **said)) == target


@pytest.mark.parametrize("said", [{"context": "aks"}, {"kubeconfig": "k"}])
def test_this_machine_and_a_cluster_contradict_each_other(said: dict[str, str]) -> None:
    with pytest.raises(UserError, match="give one of them"):
        choose(AKS, local=True, **said)


def test_other_commands_are_told_what_was_said_here() -> None:
    assert choose(AKS).options == ""
    assert choose(AKS, context="eks").options == "--context eks "
    assert choose(AKS, kubeconfig="k").options == "--kubeconfig k "


@pytest.mark.parametrize(
    ("found", "standalone", "said"),
    [
        (Readiness(True, True), False, ""),
        (Readiness(True, None), False, ""),
        (Readiness(False, False), False, "does not know Workspaces"),
        (Readiness(True, False), False, "nobody looks after Workspaces"),
        (Readiness(False, False), True, ""),
        (Readiness(True, False), True, ""),
        (Readiness(True, True), True, "has a controller, and two would undo each other's work"),
        (Readiness(True, None), True, "may not find out whether"),
    ],
)
def test_what_is_in_the_way(found: Readiness, standalone: bool, said: str) -> None:
    problem = obstacle(THERE, found, standalone=standalone)
    assert bool(problem) == bool(said)
    if problem:
        assert said in problem.message
        if not standalone:
            assert "kaito install" in problem.remedy
            assert "--standalone" in problem.remedy
            assert "--local" in problem.remedy


def test_the_current_context_is_that_of_the_first_file_that_names_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As kubectl reads $KUBECONFIG."""
    for name, context in (("a", ""), ("b", "two"), ("c", "three")):
        (tmp_path / name).write_text(yaml.safe_dump({"current-context": context}))
    files = [str(tmp_path / n) for n in ("missing", "a", "b", "c")]
    monkeypatch.setenv("KUBECONFIG", os.pathsep.join(files))
    assert current() == Current("two")
    assert current(str(tmp_path / "c")) == Current("three")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "a"))
    assert "has no current context" in current().lack
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "missing"))
    assert current() == NONE
    (tmp_path / "a").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        current(str(tmp_path / "a"))
    with pytest.raises(UserError, match="there is no file"):
        current(str(tmp_path / "missing"))


def test_this_machine_needs_no_kubernetes(tmp_path: Path) -> None:
    """Neither when it is asked for, nor when there is no kubeconfig."""
    code = """if True:
        import json, sys
        from kaito_core.cli import cli
        for arguments in json.loads(sys.argv[1]):
            try:
                cli.main(arguments, standalone_mode=False)
            except Exception as e:
                print(e)
        assert "kubernetes" not in sys.modules
    """
    commands = [
        ["run", "--local", "missing.yaml"],
        ["run", "missing.yaml"],
        ["status"],
        ["logs", "nobody"],
        ["plan", "x"],
    ]
    env = {**os.environ, "KUBECONFIG": str(tmp_path / "none"), "KAITO_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("there is no such file") >= 2


def test_before_a_cluster_is_asked_it_is_said_what_it_may_refuse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The platform may have opened it, which only its controller knows: a warning, with the place in the file."""
    from kaito_core.cli import given
    from kaito_core.cli.cluster import runtimes
    from kaito_core.controller import planner
    from kaito_core.planning.images import Images
    from kaito_core.testing.planning import OneOfEach

    monkeypatch.setattr(planner, "cluster_provisioners", lambda plugins: {})
    monkeypatch.setattr(runtimes, "as_the_controller", lambda registry, client: (OneOfEach(), Images()))
    file = tmp_path / "w.yaml"
    file.write_text("""apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata: {name: one}
tuning:
  preset: {name: tiny}
  method: qlora
  input:
    volumeSource: {hostPath: {path: /data}}
  output: {volumeSource: {persistentVolumeClaim: {claimName: out}}}
""")
    [workspace] = given.read([str(file)])
    with contextlib.suppress(UserError):
        given._for_cluster(workspace, load_plugins([]), cast("Client", object()), "cost")
    said = capsys.readouterr().err
    assert (
        f"{file}:8:30: warning: tuning.input.volumeSource.hostPath: a volume of the kind 'hostPath' is not allowed"
        in said
    )
    assert "claimName" not in said
