"""A setting names a file of its own ConfigMap, and no file of the container."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kaito_core.api import load_text
from kaito_core.controller.configs import digest
from kaito_core.planning.config_files import with_templates
from kaito_core.planning.plan import Catalog, plan
from kaito_core.plugins import Offer
from kaito_core.problems import UserError
from kaito_core.testing.planning import GIB, OneOfEach
from kaito_core.testing.serving import Echo

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
FILES = {"mine.jinja": TEMPLATE, "plain.jinja": "no words", "training_config.yaml": "training_config: …"}
SETTINGS = [
    ("ModelConfig", "chat_template"),
    ("vllm", "chat-template"),
    ("vllm", "--chat_template"),
    ("transformers", "chat_template"),
]


@pytest.mark.parametrize(("section", "key"), SETTINGS)
def test_a_template_is_text_or_a_file_of_the_config_map(section: str, key: str) -> None:
    for named in ("mine.jinja", "./mine.jinja", "/mnt/config/mine.jinja", TEMPLATE):
        assert with_templates({section: {key: named, "r": 8}, "other": 3}, FILES, "c") == {
            section: {key: TEMPLATE, "r": 8},
            "other": 3,
        }
    for none in (None, "", 3):
        assert with_templates({section: {key: none}}, FILES, "c") == {section: {key: none}}


OUTSIDE = [
    "/mnt/secrets/registry/push/.dockerconfigjson",
    "/run/kaito/docker/config.json",
    "/var/run/secrets/kubernetes.io/serviceaccount/token",
    "/proc/self/environ",
    "../secrets/hub/HF_TOKEN",
    "/mnt/config/../secrets/hub/HF_TOKEN",
    "a/../mine.jinja",
    "..data/mine.jinja",
    "~/.docker/config.json",
    "file:///etc/passwd",
    "nowhere.jinja",
    "plain.jinja",
    __file__,
]


@pytest.mark.parametrize("named", OUTSIDE)
@pytest.mark.parametrize(("section", "key"), SETTINGS)
def test_a_path_of_the_container_is_refused_by_the_setting(section: str, key: str, named: str) -> None:
    with pytest.raises(UserError) as e:
        with_templates({section: {key: named}}, FILES, "c")
    [problem] = e.value.problems
    assert problem.field == f"c.{section}.{key}"
    assert "it has mine.jinja, plain.jinja, training_config.yaml" in problem.remedy


@given(st.text(max_size=20), st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3))
def test_nothing_but_the_config_map_is_read(named: str, files: dict[str, str]) -> None:
    try:
        found = with_templates({"vllm": {"chat-template": named}}, files, "c")["vllm"]["chat-template"]
    except UserError:
        return
    assert found == named or found in files.values()


class Registry(OneOfEach):
    def runtimes(self) -> dict[str, Any]:
        return {"echo": Echo()}


def refused(part: str, key: str, config: dict[str, Any]) -> str:
    """What the plan says of a Workspace with this ConfigMap."""
    head = "{apiVersion: kaito.sh/v1beta1, kind: Workspace, metadata: {name: one}, "
    workspace = load_text(head + part + "}").workspaces[0]
    here = Offer("here", cpus=4, memory=16 * GIB, provisioner="local")
    with pytest.raises(UserError) as e:
        plan(workspace, Catalog(Registry(), (here,), {"c": {key: yaml.safe_dump(config)}}))
    return e.value.problems[0].field


def test_the_plan_refuses_it_before_a_machine_is_asked_for(tmp_path: Path) -> None:
    secret = tmp_path / "config.json"
    secret.write_text("{}")
    tuning = "tuning: {preset: {name: tiny}, method: qlora, config: c, input: {urls: [x]}, output: {image: r.io/a:1}}"
    training = {"training_config": {"ModelConfig": {"chat_template": str(secret)}}}
    assert refused(tuning, "training_config.yaml", training) == "training_config.ModelConfig.chat_template"
    serving = {"vllm": {"chat-template": str(secret)}}
    where = refused("inference: {preset: {name: tiny}, config: c}", "inference_config.yaml", serving)
    assert where == "inference_config.vllm.chat-template"


def test_a_changed_template_is_a_changed_configuration() -> None:
    config = "vllm: {chat-template: mine.jinja}"
    plain = {"inference_config.yaml": "vllm: {max-num-seqs: 8}", "mine.jinja": "a"}
    assert digest(plain) == digest({**plain, "mine.jinja": "b", "other": "c"})
    named = {"inference_config.yaml": config, "mine.jinja": "a"}
    assert digest(named) != digest({**named, "mine.jinja": "b"})
    assert digest(named) == digest({**named, "other.jinja": "b"})
