"""Models of a hub over real HTTP: small files and first bytes, its refusals in its own words, and what is remembered."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from kaito_core.models import hub as reader
from kaito_core.models.folder import read_folder
from kaito_core.models.hub import read_hub
from kaito_core.problems import Failure, UserError

from .conftest import COMMIT, REPO, Hub, llama, model_files, weights, write
from .test_folder import sharded


def test_the_same_preset_as_from_a_folder(hub: Hub, tmp_path: Path) -> None:
    here = read_folder(write(tmp_path / "m", hub.models[REPO])).preset
    found = read_hub(REPO).preset
    assert found.architecture == here.architecture
    assert found.chat == here.chat
    assert (found.name, found.licence, found.gated) == ("me-tiny-llama", "apache-2.0", False)
    assert (found.source.hub, found.source.revision) == (REPO, COMMIT)


def test_of_the_weights_only_the_first_bytes_are_asked_for(hub: Hub) -> None:
    read_hub(REPO)
    (asked,) = hub.asked("model.safetensors")
    assert asked["range"] == f"bytes=0-{reader.FIRST - 1}"
    assert not hub.asked("tokenizer.json")  # large, and tokenizer_config.json says all that is needed


def test_a_long_header_takes_a_second_request(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "FIRST", 100)
    assert read_hub(REPO).preset.architecture.layers == 2
    first, second = hub.asked("model.safetensors")
    length = int.from_bytes(hub.models[REPO]["model.safetensors"][:8], "little")
    assert (first["range"], second["range"]) == ("bytes=0-99", f"bytes=100-{8 + length - 1}")


@pytest.mark.parametrize("first", [100, 1 << 20])
def test_a_server_that_knows_no_ranges_is_stopped_in_time(
    hub: Hub, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.ranges = False
    monkeypatch.setattr(reader, "FIRST", first)
    assert read_hub(REPO).preset.architecture.layers == 2


def test_several_files(hub: Hub) -> None:
    whole = read_hub(REPO).preset.architecture
    hub.models[REPO] = sharded()
    assert read_hub(REPO).preset.architecture == whole


def test_what_was_read_is_remembered_by_commit(hub: Hub, tmp_path: Path) -> None:
    first = read_hub(REPO, cache=tmp_path)
    hub.requests.clear()
    assert read_hub(REPO, COMMIT, cache=tmp_path) == first
    assert not hub.requests  # a commit never changes: nobody has to be asked
    assert read_hub(REPO, "main", cache=tmp_path) == first
    assert [path for path, _ in hub.requests] == [f"/api/models/{REPO}/revision/main"]


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b'{"texts": {"config.json": 3}}', b"\xff", b'{"headers": {"a": 1}}']
)
def test_a_damaged_memory_is_read_again(hub: Hub, tmp_path: Path, damage: bytes) -> None:
    first = read_hub(REPO, cache=tmp_path)
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(damage)
    assert read_hub(REPO, COMMIT, cache=tmp_path) == first
    assert json.loads(kept.read_text())["model"]["preset"]["licence"] == "apache-2.0"


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert read_hub(REPO, cache=tmp_path / "file" / "models").preset.name == "me-tiny-llama"


def test_a_gated_model_is_read_with_a_token_and_says_so(hub: Hub) -> None:
    hub.gated = "manual"
    assert read_hub(REPO, token=hub.token).preset.gated
    assert all(h["authorization"] == f"Bearer {hub.token}" for _, h in hub.requests)


@pytest.mark.parametrize("token", ["", "hf_geheim"])
def test_a_gated_model_without_the_right_token(hub: Hub, token: str) -> None:
    hub.gated = "auto"
    with pytest.raises(UserError, match=r"me/Tiny-Llama@0a67737cc96d: the model is gated \(Access to model") as e:
        read_hub(REPO, token=token, field="tuning.preset.name")
    (problem,) = e.value.problems
    assert "HF_TOKEN" in problem.remedy
    assert f"/{REPO}" in problem.remedy
    assert "geheim" not in str(e.value)
    assert problem.field == "tuning.preset.name"


@pytest.mark.parametrize(
    ("repo", "revision", "token", "says", "remedy"),
    [
        (
            "me/nothing",
            "",
            "",
            "no such model, or it is private",
            "for a private model set HF_TOKEN; a folder .* ./me/nothing",
        ),
        ("me/nothing", "", "hf_x", "no such model, or it is private", "check the name"),
        (REPO, "v9", "", "no such revision", "a branch or a commit"),
        (REPO, "f" * 40, "", "no such revision", "a branch or a commit"),
    ],
)
def test_what_is_not_there(hub: Hub, repo: str, revision: str, token: str, says: str, remedy: str) -> None:
    with pytest.raises(UserError, match=says) as e:
        read_hub(repo, revision, token=token)
    assert re.search(remedy, e.value.problems[0].remedy)


@pytest.mark.parametrize("token", ["hf_geheim\nX: y", "hf_ geheim", "hf_geheimä"])
def test_a_token_that_cannot_be_sent_is_not_shown(hub: Hub, token: str) -> None:
    with pytest.raises(UserError, match="characters in it that no token has") as e:
        read_hub(REPO, token=token)
    assert "geheim" not in str(e.value)
    assert not hub.requests


def test_a_token_from_a_file_ends_in_a_line_break(hub: Hub) -> None:
    hub.gated = "auto"
    read_hub(REPO, token=f"{hub.token}\n")
    assert {h["authorization"] for h in hub.asked("/resolve/")} == {f"Bearer {hub.token}"}


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(reader, "LONGEST_WAIT", 0.0)
    with pytest.raises(Failure, match="the hub cannot be reached") as e:
        read_hub(REPO)
    assert "a preset, or a folder" in e.value.problems[0].remedy


def test_a_busy_hub_is_asked_again_and_not_for_ever(hub: Hub) -> None:
    hub.busy = 2
    assert read_hub(REPO).preset.name == "me-tiny-llama"
    hub.busy = 100
    with pytest.raises(Failure, match="503: Service Unavailable"):
        read_hub(REPO)


def test_weights_elsewhere_get_no_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub redirects large files to a server of its own; the token is the hub's alone."""
    hub.cdn = hub.url.replace("127.0.0.1", "localhost")
    monkeypatch.setenv("KAITO_ALLOW_PRIVATE_ADDRESSES", "1")
    read_hub(REPO, token=hub.token)
    (there,) = hub.asked("/cdn/")
    assert "authorization" not in there
    assert there["range"].startswith("bytes=0-")


def test_a_redirect_into_a_private_network_is_not_followed(hub: Hub) -> None:
    hub.cdn = hub.url.replace("127.0.0.1", "localhost")
    with pytest.raises(UserError, match="kaito does not download from there"):
        read_hub(REPO, token=hub.token)
    assert not hub.asked("/cdn/")


@pytest.mark.parametrize("where", ["file:///etc/passwd", "http://169.254.169.254"])
def test_a_redirect_to_no_web_server_or_to_a_metadata_service(
    hub: Hub, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.cdn = where
    monkeypatch.setenv("KAITO_ALLOW_PRIVATE_ADDRESSES", "1")
    with pytest.raises(UserError, match=r"not safe|metadata"):
        read_hub(REPO)


def test_endless_redirects(hub: Hub) -> None:
    hub.cdn = f"{hub.url}/{REPO}/resolve/{COMMIT}/model.safetensors?"
    with pytest.raises(Failure, match="redirects more than"):
        read_hub(REPO)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "pickles": ({"model.safetensors": None, "pytorch_model.bin": b"x"}, "kaito never loads them"),
    "no tokenizer": ({"tokenizer.json": None}, "fast tokenizers only"),
    "remote code": (
        {"config.json": b'{"architectures": ["Own"], "auto_map": {"AutoModel": "m.M"}}'},
        "never runs such code",
    ),
    "hostile length": ({"model.safetensors": b"\xff" * 8 + b"{}"}, "model.safetensors: the header would be"),
    "cut off": ({"model.safetensors": weights(llama())[:-2]}, "cut off"),
    "not UTF-8": ({"model.safetensors": b"\x02" + bytes(7) + b"\xff\xff"}, "not UTF-8"),
    "template not UTF-8": ({"chat_template.jinja": b"\xff"}, "chat_template.jinja is not UTF-8"),
}


@pytest.mark.parametrize(("changes", "says"), BAD.values(), ids=BAD)
def test_a_model_that_cannot_be_used(hub: Hub, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    hub.models[REPO] = {n: b for n, b in {**model_files(), **changes}.items() if b is not None}
    with pytest.raises(UserError, match=says) as e:
        read_hub(REPO, cache=tmp_path)
    assert "me/Tiny-Llama@0a67737cc96d" in e.value.problems[0].message


def test_nothing_more_is_asked_for_of_an_architecture_that_is_refused(hub: Hub) -> None:
    hub.models[REPO] = model_files(architectures=["Unheard"])
    with pytest.raises(UserError, match="does not know the architecture Unheard"):
        read_hub(REPO)
    assert [path.rpartition("/")[2] for path, _ in hub.requests] == ["main", "config.json"]


def test_a_file_that_never_ends_is_not_read_to_its_end(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "LARGEST_TEXT", {**reader.LARGEST_TEXT, "config.json": 50})
    with pytest.raises(UserError, match="config.json is larger than 50 bytes"):
        read_hub(REPO)


@pytest.mark.parametrize("answer", [b"<html>", b"[]", b"{}", b'{"sha": "main"}', b'{"sha": "../../x"}'])
def test_something_that_is_no_hub(hub: Hub, answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader._Hub, "_get", lambda _hub, _path, into, *_: into.write_bytes(answer))
    with pytest.raises(UserError, match=r"hub's answer|at which commit"):
        read_hub(REPO)
