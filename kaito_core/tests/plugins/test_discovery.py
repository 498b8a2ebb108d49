"""Installed plugins are found as the standard library finds them."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest

from kaito_core.plugins.discovery import EntryPoint, entry_points


@pytest.mark.parametrize("group", ["kaito", "console_scripts", "pytest11", "no-such-group"])
def test_the_answer_is_that_of_importlib_metadata(group: str) -> None:
    ours = {(e.name, e.value, e.distribution, e.version) for e in entry_points(group, sys.path)}
    theirs = importlib.metadata.entry_points(group=group)
    assert ours == {(e.name, e.value.partition("[")[0].strip(), e.dist.name, e.dist.version) for e in theirs if e.dist}


def install(site: Path, info: str, text: str) -> None:
    (site / info).mkdir(parents=True)
    (site / info / "entry_points.txt").write_text(text)


def test_the_first_of_a_name_on_the_path_wins(tmp_path: Path) -> None:
    install(tmp_path / "a", "My.Plugin-2.0.dist-info", "[kaito]\nx = one\n")
    install(tmp_path / "b", "my_plugin-1.0.dist-info", "[kaito]\nx = two\n")
    path = [str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "nowhere")]
    assert entry_points("kaito", path) == [EntryPoint("x", "one", "my-plugin", "2.0")]


def test_hostile_metadata_counts_as_none(tmp_path: Path) -> None:
    install(tmp_path, "a-1.dist-info", "kaito]\n= \n[kaito\nx = y\n\x00")
    install(tmp_path, "b-1.dist-info", "[kaito]\n# a = comment\nx = mod:attr [extra]\n[other]\nz = no\n")
    (tmp_path / "c-1.dist-info").write_text("a file")
    assert [(e.name, e.module, e.value) for e in entry_points("kaito", [str(tmp_path)])] == [("x", "mod", "mod:attr")]
