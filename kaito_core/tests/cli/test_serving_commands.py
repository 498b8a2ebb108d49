"""The life of an endpoint on this machine, as typed: run, status, chat, logs, delete. Its runtime repeats what it is told."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("kaito_preset_demo", reason="its model is what is fetched here")

Kaito = Callable[..., subprocess.CompletedProcess[str]]

WORKSPACE = """
apiVersion: v1
kind: ConfigMap
metadata: {name: settings}
data:
  inference_config.yaml: |
    echo: {gib: 1ECHO}
---
apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata: {name: one, annotations: {kaito.sh/runtime: echo}}
inference:
  preset: {name: demo-phi-3}
  config: settings
"""

TUNED = """
apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata: {name: two, annotations: {kaito.sh/runtime: echo}}
tuning:
  preset: {name: demo-phi-3}
  method: qlora
  input: {urls: [data.jsonl]}
  output: {volumeSource: {hostPath: {path: out}}}
inference: {INFERENCE}
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A user who has the runtime `kaito_core.testing.serving.Echo` installed, and no cluster."""
    site = tmp_path / "site"
    info = site / "kaito_runtime_echo-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kaito-runtime-echo\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kaito]\necho = fixture_echo\n")
    (site / "fixture_echo.py").write_text(
        "from kaito_core.plugins import hookimpl\n\n\n@hookimpl\ndef kaito_runtimes():\n"
        "    from kaito_core.testing.serving import Echo\n\n    yield Echo()\n"
    )
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("KAITO_", "HF_", "KUBE"))}
    home, nowhere = str(tmp_path / "home"), str(tmp_path / "no-kubeconfig")
    return {**kept, "PYTHONPATH": str(site), "KAITO_HOME": home, "KUBECONFIG": nowhere, "COLUMNS": "200"}


@pytest.fixture
def kaito(environment: dict[str, str], tmp_path: Path) -> Kaito:
    def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "kaito_core", *arguments]
        return subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment,
            timeout=120,
            check=False,
        )

    return run


@contextmanager
def served(environment: dict[str, str], tmp_path: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``kaito run`` until the block ends; the process, and what it had printed when the endpoint answered."""
    child = subprocess.Popen(
        [sys.executable, "-m", "kaito_core", "run", "--local", "--yes", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
        env={**environment, "PYTHONUNBUFFERED": "1"},
    )
    printed = ""
    try:
        assert child.stdout is not None
        for line in child.stdout:
            printed += line
            if "Ctrl-C ends it" in line:
                break
        yield child, printed
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGINT)
        child.wait(timeout=60)


def test_an_endpoint_is_served_seen_asked_and_ended(kaito: Kaito, environment: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "inference.yaml"
    path.write_text(WORKSPACE.replace("ECHO", ""))
    assert kaito("validate", str(path)).returncode == 0
    shown = kaito("plan", "--local", str(path)).stdout
    assert "serve demo-phi-3 with echo" in shown
    assert "named by the annotation kaito.sh/runtime" in shown
    assert json.loads(kaito("plan", "--local", "--json", str(path)).stdout)["plans"][0]["runtime"]["name"] == "echo"

    with served(environment, tmp_path, "--port", "0", str(path)) as (child, printed):
        (url,) = re.findall(r"one answers at (http://127\.0\.0\.1:\d+)", printed)
        assert f"curl {url}/v1/chat/completions" in printed
        assert "kaito chat one" in printed
        curl = next(line.split("curl    ")[1] for line in printed.splitlines() if "curl    " in line)
        answered = subprocess.run(["bash", "-c", f"{curl} -s"], capture_output=True, text=True, check=True).stdout
        assert "demo-phi-3 hears 'Hello'" in answered

        assert kaito("chat", "one", "good", "day").stdout == "demo-phi-3 hears 'good day' as 1. message\n"
        assert "hears 'piped'" in kaito("chat", url, stdin="piped").stdout
        table = kaito("status").stdout
        assert re.search(rf"one +Serving +serve +demo-phi-3 \(echo\) +{url}", table)
        assert f"one answers at {url}" in kaito("status", "one").stdout
        (state,) = json.loads(kaito("status", "--json").stdout)
        assert (state["phase"], state["task"], state["served"]["url"]) == ("Serving", "inference", url)
        assert "POST /v1/chat/completions" in kaito("logs", "one", "--stage", "serve").stdout
        assert "running already" in kaito("delete", "one", "--yes").stderr
        port = url.rpartition(":")[2]
        path.write_text(path.read_text().replace("name: one", "name: other"))
        taken = kaito("run", "--local", "--yes", "--port", port, str(path))
        assert taken.returncode == 2
        assert f"the port {port} of this machine is in use by another program" in taken.stderr
        assert "--port 0" in taken.stderr

        child.send_signal(signal.SIGINT)
        rest = child.communicate(timeout=60)[0]
        assert child.returncode == 0
        assert "served until it was ended" in rest
    assert kaito("status", "one").stdout.startswith("one: Stopped")
    gone = kaito("chat", "one", "hi")
    assert gone.returncode == 2
    assert "'one' is not served now" in gone.stderr
    assert kaito("delete", "one", "--yes").returncode == 0


def test_a_server_that_dies_is_told_with_its_last_lines(kaito: Kaito, tmp_path: Path) -> None:
    (tmp_path / "w.yaml").write_text(WORKSPACE.replace("1ECHO", "1, die: start"))
    done = kaito("run", "--local", "--yes", "--port", "0", "w.yaml")
    assert done.returncode == 1
    assert "the stage 'serve' ended with exit code 3" in done.stderr
    assert "| the last words of the server" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_a_tuned_model_is_served_by_the_policy(kaito: Kaito, environment: dict[str, str], tmp_path: Path) -> None:
    """The tuning itself is not of interest here: its stages are taken as done."""
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 40)
    path = tmp_path / "w.yaml"
    path.write_text(TUNED.replace("INFERENCE", "policy: always"))
    both = json.loads(kaito("plan", "--local", "--json", str(path)).stdout)["plans"][0]
    assert (both["task"], both["serving"]["task"]) == ("tuning", "inference")
    assert both["serving"]["adapters"][0]["name"] == "two"
    assert "and then" in kaito("plan", "--local", str(path)).stdout
    path.write_text(TUNED.replace("INFERENCE", "policy: never"))
    assert "serving" not in json.loads(kaito("plan", "--local", "--json", str(path)).stdout)["plans"][0]
    path.write_text(TUNED.replace("INFERENCE", "preset: {name: phi-4}"))
    refused = kaito("validate", str(path))
    if "phi-4' is not installed" not in refused.stdout:
        assert "the model to serve is the tuned one, demo-phi-3, and not phi-4" in refused.stdout
        assert refused.stdout.startswith(f"{path}:10:")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (WORKSPACE.replace("1ECHO", "1, bad: 1"), "there is no setting bad"),
        (WORKSPACE.replace("runtime: echo", "runtime: ecko"), "did you mean echo?"),
        (WORKSPACE.replace("1ECHO", "999999"), "needs 999999.0 GiB"),
        (WORKSPACE.replace("  config: settings\n", "  config: gone\n"), "the ConfigMap 'gone' is not there"),
        (WORKSPACE.replace("preset: {name: demo-phi-3}", "template: {spec: {}}"), "a pod template"),
        (WORKSPACE.replace("preset: {name: demo-phi-3}", "preset: {name: demo-phi}"), "there is no preset 'demo-phi'"),
        (WORKSPACE.replace("  config: settings\n", "  idleAfter: soon\n"), "'soon' is not a duration"),
        (WORKSPACE.replace("  config: settings\n", "  policy: sometimes\n"), "inference.policy"),
        (WORKSPACE.replace("  config: settings\n", "  policy: never\n"), "the policy is to serve it never"),
        (WORKSPACE.replace("ECHO", "") + "---" + WORKSPACE.replace("ECHO", "").split("---")[1].replace("one", "b"), "one command serves one"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_in_words_before_anything_runs(
    text: str, words: str, kaito: Kaito, tmp_path: Path
) -> None:
    (tmp_path / "w.yaml").write_text(text.replace("ECHO", ""))
    done = kaito("run", "--local", "--yes", "w.yaml")
    assert done.returncode == 2, done.stdout + done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "home" / "runs").exists()


def test_a_template_is_planned_for_its_machine_only(kaito: Kaito, tmp_path: Path) -> None:
    (tmp_path / "w.yaml").write_text(
        WORKSPACE.split("---")[1].replace("preset: {name: demo-phi-3}", "template: {spec: {}}")
    )
    planned = kaito("plan", "--local", "w.yaml")
    assert planned.returncode == 0, planned.stderr
    assert "a pod template of your own" in planned.stdout


def test_the_port_is_for_this_machine(kaito: Kaito, tmp_path: Path) -> None:
    (tmp_path / "w.yaml").write_text(WORKSPACE.replace("ECHO", ""))
    refused = kaito("run", "--context", "mine", "--port", "80", "w.yaml")
    assert (refused.returncode, "--port is for this machine" in refused.stderr) == (2, True)
