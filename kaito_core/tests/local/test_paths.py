"""Relative paths belong to the file that says them."""

from __future__ import annotations

from pathlib import Path

import pytest

from kaito_core.api import load_text
from kaito_core.local.paths import anchored, local_folder
from kaito_core.problems import UserError

TEXT = """
apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata: {name: one}
tuning:
  preset: {name: tiny}
  method: qlora
  input: {urls: [data/a.jsonl, "file://b.jsonl", "file:///abs/c.jsonl", "https://example.com/d.jsonl", "hf://datasets/o/n/e.jsonl"]}
  output: {volumeSource: {hostPath: {path: out}}}
"""


def test_relative_paths_are_anchored_and_urls_left_alone(tmp_path: Path) -> None:
    tuning = anchored(load_text(TEXT).workspaces[0], tmp_path).tuning
    assert tuning is not None
    assert tuning.input.urls == (
        str(tmp_path / "data/a.jsonl"),
        str(tmp_path / "b.jsonl"),
        "file:///abs/c.jsonl",
        "https://example.com/d.jsonl",
        "hf://datasets/o/n/e.jsonl",
    )
    assert tuning.output.volume_source == {"hostPath": {"path": str(tmp_path / "out")}}


def test_volumes_that_only_a_cluster_has_are_refused(tmp_path: Path) -> None:
    assert local_folder("data", None, tmp_path) == tmp_path
    assert local_folder("data", {"emptyDir": {}}, tmp_path) == tmp_path
    with pytest.raises(UserError, match="only in a cluster"):
        local_folder("data", {"persistentVolumeClaim": {"claimName": "x"}}, tmp_path)
