"""No field of a training configuration names a file that is read: what is read there ends in the adapter, or in the log."""

from __future__ import annotations

import re
from typing import Any

import pytest

from kaito_core.problems import UserError
from kaito_tuner_qlora.config import IGNORED, REFUSED, known_fields
from kaito_tuner_qlora.plugin import QloraTuner
from kaito_tuner_qlora.sections import SECTIONS

from .test_plugin import PRESET

SECRET = "/mnt/secrets/registry/push/.dockerconfigjson"
LIKE_FILES = re.compile(
    r"path|file|dir|folder|template|config|resume|core|deepspeed|model_init|fsdp|report_to|proxies|project"
)
"""Words in the names of fields of transformers, peft and TRL that take files, folders, modules or whole configurations of others."""

REVIEWED = {
    "chat_template": "only a template passes",
    "local_files_only": "a switch",
    "output_dir": "must be below /mnt, and the run decides where it is",
    "report_to": "names services, and no file",
    "project": "a name for those services",
    "arrow_config": "numbers and names of adapters",
    "eva_config": "numbers",
    "kasa_config": "numbers",
    "lora_ga_config": "numbers",
    "monteclora_config": "numbers",
    "runtime_config": "a switch",
    "velora_config": "numbers",
}
"""Fields with such a name that reach the libraries, and why that is no harm. A new version of them may add some: look at them."""


def reaching() -> set[str]:
    """The fields with such names that are neither refused nor ignored."""
    found = set()
    for name, section in SECTIONS.items():
        passed = {*known_fields().get(name, ()), *(known_fields()["SFTConfig"] if name == "TrainingArguments" else ())}
        stopped = {*REFUSED.get(name, ()), *IGNORED.get(name, ())}
        found |= {f for f in {*passed, *section.model_fields} - stopped if LIKE_FILES.search(f)}
    return found


def test_every_field_that_may_name_a_file_was_looked_at() -> None:
    assert reaching() == set(REVIEWED)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("ModelConfig", "chat_template", SECRET),
        ("ModelConfig", "chat_template", "../../run/kaito/docker/config.json"),
        ("ModelConfig", "chat_template", "mine.jinja"),
        ("TrainingArguments", "output_dir", "/run/kaito/docker"),
        ("TrainingArguments", "output_dir", "/mnt/../run"),
        ("TrainingArguments", "deepspeed", SECRET),
        ("TrainingArguments", "fsdp_config", SECRET),
        ("TrainingArguments", "accelerator_config", SECRET),
        ("LoraConfig", "corda_config", {"cache_file": SECRET}),
        ("LoraConfig", "megatron_core", "antigravity"),
        ("LoraConfig", "init_lora_weights", "corda"),
    ],
)
def test_a_path_of_the_container_is_refused_by_its_field(section: str, field: str, value: Any) -> None:
    with pytest.raises(UserError) as e:
        QloraTuner().resolve(PRESET, "qlora", {section: {field: value}})
    assert {p.field for p in e.value.problems} == {f"{section}.{field}"}


def test_a_template_passes() -> None:
    text = "{% for m in messages %}{{ m.content }}{% endfor %}"
    config = QloraTuner().resolve(PRESET, "qlora", {"ModelConfig": {"chat_template": text}})
    assert config["ModelConfig"]["chat_template"] == text
