"""Where log-ins come from."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from kaito_core.artifacts.credentials import Credentials, credentials_for
from kaito_core.oci_reference import Reference
from kaito_core.problems import UserError

IMAGE = Reference.parse("host.io:5000/team/adapter:1")


def config(folder: Path, **content: object) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(content))
    return path


def auth(user: str, password: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


@pytest.mark.parametrize(
    ("key", "entry", "expected"),
    [
        ("host.io:5000", auth("u", "p:with:colons"), Credentials("u", "p:with:colons")),
        ("https://host.io:5000/v2/", auth("u", "p"), Credentials("u", "p")),
        ("host.io:5000/team", {"username": "u", "password": "p"}, Credentials("u", "p")),
        ("host.io:5000", {**auth("00", ""), "identitytoken": "t"}, Credentials("00", identity_token="t")),
        ("host.io", auth("u", "p"), None),
        ("host.io:5000/tea", auth("u", "p"), None),
        ("host.io:5000", {}, None),
    ],
)
def test_an_entry_is_found_by_its_host_or_path(
    tmp_path: Path, key: str, entry: dict[str, str], expected: Credentials | None
) -> None:
    assert credentials_for(IMAGE, config(tmp_path, auths={key: entry})) == expected


def test_the_longest_path_wins(tmp_path: Path) -> None:
    file = config(tmp_path, auths={"host.io:5000": auth("all", "1"), "https://host.io:5000/team": auth("team", "2")})
    assert credentials_for(IMAGE, file) == Credentials("team", "2")


def test_docker_hub_is_known_under_its_old_key(tmp_path: Path) -> None:
    file = config(tmp_path, auths={"https://index.docker.io/v1/": auth("u", "p")})
    assert credentials_for(Reference.parse("me/adapter"), file) == Credentials("u", "p")


def test_the_file_is_found_as_docker_and_kubernetes_place_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = config(tmp_path, auths={"host.io:5000": auth("u", "p")})
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    assert credentials_for(IMAGE) == Credentials("u", "p")
    path.rename(tmp_path / ".dockerconfigjson")
    assert credentials_for(IMAGE) == Credentials("u", "p")
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "none"))
    assert credentials_for(IMAGE) is None
    with pytest.raises(UserError, match="no docker config"):
        credentials_for(IMAGE, tmp_path / "none")


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"auths": []}',
        '{"auths": {"host.io:5000": "x"}}',
        '{"auths": {"host.io:5000": {"auth": "c2VjcmV0"}}}',
    ],
)
def test_a_malformed_file_is_named_without_its_secrets(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(UserError) as e:
        credentials_for(IMAGE, path)
    assert str(path) in str(e.value)
    assert "c2VjcmV0" not in str(e.value)


def test_secrets_do_not_show() -> None:
    assert "hush" not in repr(Credentials("u", "hush", "hush"))


def helper(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / f"docker-credential-{name}"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_helpers_are_asked_with_the_host_on_stdin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = '[ "$1" = get ] && read host; echo "{\\"Username\\": \\"$host\\", \\"Secret\\": \\"s\\"}"'
    helper(tmp_path, "one", answer, monkeypatch)
    helper(tmp_path, "two", """echo '{"Username": "<token>", "Secret": "t"}'""", monkeypatch)
    helper(tmp_path, "none", "echo credentials not found in native keychain; exit 1", monkeypatch)
    store = config(tmp_path, auths={"host.io:5000": {}}, credsStore="one")
    assert credentials_for(IMAGE, store) == Credentials("host.io:5000", "s")
    assert credentials_for(Reference.parse("me/x"), store) == Credentials("https://index.docker.io/v1/", "s")
    both = config(tmp_path, credHelpers={"host.io:5000": "two"}, credsStore="one")
    assert credentials_for(IMAGE, both) == Credentials(identity_token="t")
    assert credentials_for(IMAGE, config(tmp_path, credsStore="none")) is None


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("missing", "docker-credential-missing, which is not installed"),
        ("../../bin/sh", "not a program's name"),
        ("locked", "docker-credential-locked failed: the key ring is locked"),
        ("odd", "did not answer with Username and Secret"),
    ],
)
def test_a_helper_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, cause: str) -> None:
    helper(tmp_path, "locked", "echo the key ring is locked; exit 1", monkeypatch)
    helper(tmp_path, "odd", "echo hello", monkeypatch)
    with pytest.raises(UserError) as e:
        credentials_for(IMAGE, config(tmp_path, credsStore=name))
    assert cause in str(e.value)
