"""What `test_hostile_yaml.py` measures in a process of its own: each way by which kaito reads the settings in a ConfigMap."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

WORKSPACES: dict[str, dict[str, Any]] = {
    "training_config.yaml": {
        "tuning": {
            "preset": {"name": "phi-4-mini-instruct"},
            "method": "qlora",
            "config": "settings",
            "input": {"urls": ["https://example.com/a.jsonl"]},
            "output": {"image": "r.io/a:1", "imagePushSecret": "push"},
        }
    },
    "inference_config.yaml": {"inference": {"preset": {"name": "phi-4-mini-instruct"}, "config": "settings"}},
}


def reader(key: str, text: str) -> str:
    """The readers themselves: of settings, and of a file of resources."""
    from kaito_core.api.yaml_source import parse, parse_settings

    return "; ".join(p.message for p in (*parse_settings(text)[1], *parse(text)[1]))


def controller(key: str, text: str) -> str:
    """The controller's planner, on a cluster that has nothing but the ConfigMap."""
    from kaito_core.controller.planner import Planner
    from kaito_core.kube.kinds import CONFIG_MAPS
    from kaito_core.plugins.manager import load_plugins

    class Cluster:
        def get(self, kind: Any, name: str, namespace: str = "") -> Any:
            data = {"metadata": {"resourceVersion": "1"}, "data": {key: text}}
            return data if (kind, name) == (CONFIG_MAPS, "settings") else None

    if not _plugins:
        _plugins.append(load_plugins())
    metadata = {"name": "one", "namespace": "team", "uid": "u-1", "generation": 1}
    planned = Planner(Cluster(), _plugins[0], {})(  # type: ignore[arg-type]
        {
            "apiVersion": "kaito.sh/v1beta1",
            "kind": "Workspace",
            "metadata": metadata,
            "resource": {"count": 1},
            **WORKSPACES[key],
        }
    )
    assert planned.plan is None
    return f"{planned.refusal}: " + "; ".join(p.message for p in planned.problems)


_plugins: list[Any] = []


def validate(key: str, text: str) -> str:
    return _command("validate", key, text)


def plan(key: str, text: str) -> str:
    return _command("plan", key, text)


def _command(name: str, key: str, text: str) -> str:
    from kaito_core.cli import main

    metadata = {"name": "one"}
    workspace = {
        "apiVersion": "kaito.sh/v1beta1",
        "kind": "Workspace",
        "metadata": metadata,
        "resource": {"instanceType": "Standard_NC24ads_A100_v4"},
        **WORKSPACES[key],
    }
    block = "".join(f"    {line}\n" for line in text.split("\n"))
    head = f"{json.dumps(workspace)}\n---\napiVersion: v1\nkind: ConfigMap\nmetadata: {{name: settings}}\ndata:\n"
    Path("workspace.yaml").write_text(f"{head}  {key}: |\n{block}", encoding="utf-8")
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        try:
            code = main([name, "workspace.yaml"])
        except SystemExit as e:
            code = e.code
    return f"exit code {code}: {printed.getvalue()}"


def _peak_mib() -> float:
    """The most memory that this process has had; 0 where only the time can be measured."""
    try:
        with Path("/proc/self/status").open(encoding="utf-8") as f:
            return next(int(line.split()[1]) / 1024 for line in f if line.startswith("VmHWM"))
    except OSError:
        return 0.0


if __name__ == "__main__":
    ways: dict[str, Callable[[str, str], str]] = {f.__name__: f for f in (reader, controller, validate, plan)}
    way = ways[sys.argv[1]]
    way("training_config.yaml", "training_config: {}")  # what is imported once is no part of the figures
    start = _peak_mib()
    for file_key, content in json.load(sys.stdin):
        began = time.monotonic()
        said = way(file_key, content)
        figures = {"seconds": time.monotonic() - began, "mib": _peak_mib() - start, "said": said[:2000]}
        print(json.dumps(figures), flush=True)
