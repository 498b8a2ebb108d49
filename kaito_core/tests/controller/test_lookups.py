"""What the controller looks up besides what it watches: the ConfigMaps of endpoints, and their API keys."""

from __future__ import annotations

import base64
from typing import Any, cast

import pytest

from kaito_core.controller.api_keys import lock_of
from kaito_core.controller.configs import KEPT, Configs, digest
from kaito_core.kube.client import Client
from kaito_core.kube.errors import Forbidden, Unreachable
from kaito_core.kube.kinds import CONFIG_MAPS, SECRETS, Kind, Object
from kaito_core.serving.activator_gate import Lock


class Server:
    """An API server that gives what there is, and counts."""

    def __init__(self, *objects: tuple[Kind, str, Object]) -> None:
        self.objects: dict[tuple[Kind, str], Object] = {(k, n): o for k, n, o in objects}
        self.error: Exception | None = None
        self.asked = 0

    def get(self, kind: Kind, name: str, namespace: str = "") -> Object | None:
        assert namespace == "team"
        self.asked += 1
        if self.error is not None:
            raise self.error
        return self.objects.get((kind, name))


def settings(text: str, **more: Any) -> Object:
    return {"data": {"inference_config.yaml": text}, **more}


def test_a_config_map_is_asked_for_now_and_then() -> None:
    server, now = Server((CONFIG_MAPS, "a", settings("x"))), [0.0]
    configs = Configs(cast(Client, server), lambda: now[0])
    first = configs.digest("a", "team")
    server.objects[CONFIG_MAPS, "a"] = settings("y")
    assert configs.digest("a", "team") == first
    assert server.asked == 1
    now[0] += KEPT
    assert configs.digest("a", "team") not in ("", first)
    server.objects[CONFIG_MAPS, "a"] = settings("x")
    configs.fresh("a", "team")
    assert configs.digest("a", "team") == first, "what was just read for a plan counts"
    assert server.asked == 3


def test_one_that_is_missing_is_not_asked_for_all_the_time_either() -> None:
    server, now = Server(), [0.0]
    configs = Configs(cast(Client, server), lambda: now[0])
    assert [configs.digest("a", "team") for _ in range(3)] == [""] * 3
    assert server.asked == 1
    server.objects[CONFIG_MAPS, "a"] = settings("x")
    now[0] += KEPT
    assert configs.digest("a", "team")


def test_only_the_settings_count() -> None:
    assert digest({"inference_config.yaml": "x", "notes": "a"}) == digest({"inference_config.yaml": "x", "notes": "b"})
    assert digest({}) not in ("", digest({"inference_config.yaml": "x"}))
    assert digest(None) == ""


def endpoint(**annotations: str) -> Object:
    return {"metadata": {"name": "phi", "namespace": "team", "annotations": annotations}}


LOCKED = endpoint(**{"kaito.sh/api-key-secret": "key"})


@pytest.mark.parametrize(
    ("secret", "lock"),
    [
        ({"data": {"api-key": base64.b64encode(b"s3cret\n").decode()}}, Lock(True, b"s3cret")),
        ({"data": {"other": "YQ=="}}, Lock(True)),
        ({"data": {"api-key": "YWJ"}}, Lock(True)),
        ({}, Lock(True)),
        (None, Lock(True)),
    ],
)
def test_the_key_is_that_of_the_secret(secret: Object | None, lock: Lock) -> None:
    server = Server(*[(SECRETS, "key", secret)] if secret is not None else [])
    assert lock_of(cast(Client, server), LOCKED) == lock


def test_an_endpoint_without_a_key_is_open_and_nobody_is_asked() -> None:
    server = Server()
    assert lock_of(cast(Client, server), endpoint()) == Lock()
    assert lock_of(cast(Client, server), None) == Lock()
    assert server.asked == 0


def test_a_secret_that_may_not_be_read_leaves_the_door_closed() -> None:
    server = Server()
    server.error = Forbidden("secrets is forbidden", status=403)
    assert lock_of(cast(Client, server), LOCKED) == Lock(closed=True)
    server.error = Unreachable("connection refused")
    with pytest.raises(Unreachable):
        lock_of(cast(Client, server), LOCKED)
