"""Standard output of any encoding: no command ends in a traceback, and JSON stays the same JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKSPACE = """apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata: {name: größe, annotations: {note: "日本 🚀 – …"}}
resource: {instanceTyp: "日本 🚀"}
inference: {preset: {name: "phi-…-日本-🚀"}}
"""


def kaito(*arguments: str | Path | bytes, encoding: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-c", "from kaito_core.cli import main; main()", *arguments]
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    return subprocess.run(command, env=env, capture_output=True, timeout=120, check=False)


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "ascii", "koi8-r", "shift_jis"])
def test_no_encoding_of_standard_output_breaks_a_command(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "wörkspace.yaml"
    path.write_text(WORKSPACE, encoding="utf-8")
    for arguments in (["validate", path], ["plan", path], ["plugins"], ["validate", "--json", path]):
        done = kaito(*arguments, encoding=encoding)
        assert b"Traceback" not in done.stderr
        assert b"UnicodeEncodeError" not in done.stderr
        assert done.returncode == (0 if arguments == ["plugins"] else 2)
    plain = kaito("validate", "--json", path, encoding="utf-8")
    told = done.stdout.decode("utf-8" if encoding == "ascii" else encoding)  # click takes UTF-8 in place of ASCII
    assert json.loads(told) == json.loads(plain.stdout.decode())


def test_a_file_name_that_is_no_text_is_told_as_any_other(tmp_path: Path) -> None:
    done = kaito("validate", os.fsencode(tmp_path) + b"/\xff.yaml", encoding="utf-8")
    assert done.returncode == 2
    assert "/\\udcff.yaml: error: there is no such file" in (done.stdout + done.stderr).decode()
