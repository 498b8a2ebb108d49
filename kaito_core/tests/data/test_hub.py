"""Model files from a hub that speaks the hub's own protocol."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from kaito_core.data.hub import fetch_model
from kaito_core.problems import Failure, UserError

COMMIT = "0a67737cc96d2554230f90338b163bc6380a2a85"
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b'{"t": 1}',
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"pickle",
    "modeling_phi3.py": b"import os",
    "README.md": b"# model",
}
TAKEN = {"config.json", "tokenizer.json", "model.safetensors"}


def files(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir() if p.is_file()}


@pytest.fixture
def hub(server: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    serve(server, FILES)
    return server


def serve(server: Any, files: dict[str, bytes]) -> None:
    server.files.clear()
    info = {"id": "org/name", "sha": COMMIT, "siblings": [{"rfilename": n, "size": len(b)} for n, b in files.items()]}
    tree = [{"type": "file", "path": n, "size": len(b), "oid": f"{len(b):040x}"} for n, b in files.items()]
    server.files[f"/api/models/org/name/revision/{COMMIT}"] = json.dumps(info).encode()
    server.files[f"/api/models/org/name/tree/{COMMIT}"] = json.dumps(tree).encode()
    for name in (f"/api/models/org/name/revision/{COMMIT}", f"/api/models/org/name/tree/{COMMIT}"):
        server.headers[name] = {"Content-Type": "application/json"}
    for name, body in files.items():
        server.files[f"/org/name/resolve/{COMMIT}/{name}"] = body
        server.headers[f"/org/name/resolve/{COMMIT}/{name}"] = {"X-Repo-Commit": COMMIT}


def test_weights_and_tokenizer_come_and_code_and_pickles_do_not(hub: Any, tmp_path: Path) -> None:
    fetch_model("org/name", COMMIT, tmp_path / "m")
    assert files(tmp_path / "m") == TAKEN


def test_the_licence_comes_with_the_weights(hub: Any, tmp_path: Path) -> None:
    licences = {"LICENSE": b"a", "LICENSE.txt": b"b", "NOTICE": b"c", "NOTICE.md": b"d"}
    serve(hub, {**FILES, **licences, "LICENSE.py": b"import os"})
    fetch_model("org/name", COMMIT, tmp_path / "m")
    assert files(tmp_path / "m") == TAKEN | set(licences)


@pytest.mark.parametrize(
    "shards", [("model.safetensors",), ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")]
)
def test_weights_that_are_there_twice_come_once(hub: Any, tmp_path: Path, shards: tuple[str, ...]) -> None:
    """Mistral's repositories have them in the form of its own code as well, which would double the download."""
    others = {n: b for n, b in FILES.items() if not n.endswith(".safetensors")}
    twice = {"consolidated.safetensors": b"again", "consolidated-00001-of-00002.safetensors": b"again"}
    serve(hub, {**others, **dict.fromkeys(shards, b"weights"), **twice})
    fetch_model("org/name", COMMIT, tmp_path / "m")
    assert files(tmp_path / "m") == {"config.json", "tokenizer.json", *shards}
    assert not [path for path, _ in hub.requests if "consolidated" in path]


def test_weights_that_are_there_in_that_form_only_come(hub: Any, tmp_path: Path) -> None:
    others = {n: b for n, b in FILES.items() if n != "model.safetensors"}
    serve(hub, {**others, "consolidated.safetensors": b"weights"})
    fetch_model("org/name", COMMIT, tmp_path / "m")
    assert files(tmp_path / "m") == {"config.json", "tokenizer.json", "consolidated.safetensors"}


@pytest.mark.parametrize("token", ["hf_ge\nheim", "hf_ge heim", "hf_gehäim"])
def test_a_token_that_cannot_be_sent_is_refused_and_never_shown(hub: Any, tmp_path: Path, token: str) -> None:
    with pytest.raises(UserError, match="characters in it that no token has") as e:
        fetch_model("org/name", COMMIT, tmp_path / "m", token)
    assert "hf_" not in str(e.value)
    assert not hub.requests


def test_a_token_from_a_file_ends_in_a_line_break(hub: Any, tmp_path: Path) -> None:
    fetch_model("org/name", COMMIT, tmp_path / "m", "hf_right\n")
    assert {h.get("authorization") for _, h in hub.requests} == {"Bearer hf_right"}


def test_the_tokenizer_alone(hub: Any, tmp_path: Path) -> None:
    fetch_model("org/name", COMMIT, tmp_path / "m", tokenizer_only=True)
    assert files(tmp_path / "m") == {"config.json", "tokenizer.json"}


def test_a_model_of_pickles_is_refused(hub: Any, tmp_path: Path) -> None:
    serve(hub, {n: b for n, b in FILES.items() if n != "model.safetensors"})
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        fetch_model("org/name", COMMIT, tmp_path / "m")


@pytest.mark.parametrize(
    ("code", "words", "remedy"),
    [("GatedRepo", "the model is gated", "HF_TOKEN"), ("RepoNotFound", "no such model", "HF_TOKEN"),
     ("RevisionNotFound", "no such revision", "commit")],
)  # fmt: skip
def test_a_refusal_says_what_to_do(hub: Any, tmp_path: Path, code: str, words: str, remedy: str) -> None:
    for path in (f"/api/models/org/name/revision/{COMMIT}", f"/api/models/org/name/tree/{COMMIT}"):
        hub.statuses[path] = [(404 if "Not" in code else 403, "")]
        hub.headers[path] = {"X-Error-Code": code, "X-Error-Message": "No."}
    hub.always = True
    with pytest.raises(UserError, match=words) as e:
        fetch_model("org/name", COMMIT, tmp_path / "m", "hf_geheim")
    assert remedy in e.value.problems[0].remedy
    assert "hf_geheim" not in str(e.value)


def test_a_hub_that_cannot_be_reached_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the hub's client waits between its tries
    with pytest.raises(Failure, match="hub cannot be reached"):
        fetch_model("org/name", COMMIT, tmp_path / "m")
    with pytest.raises(UserError, match="check the name"):
        fetch_model("not/a/name", COMMIT, tmp_path / "m")
