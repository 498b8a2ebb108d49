"""What a rendered pod (`kaito_core.workloads.kubernetes`) and the supervisor in it (`kaito_core.stages.pod`) agree on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Final

from kaito_core.workloads.workload import Stage

INIT_STAGES: Final = ("fetch", "check")
"""A container each. What they leave is the pod's own and gone with it: they run in every pod, while what is done of the
others is not done again."""

STAGES_FILE: Final = "stages.json"
"""Beside the job: the stages of the workload."""

SECRETS: Final = "/mnt/secrets"
"""Below it ``registry/NAME`` for each registry secret, and ``hub``."""

REGISTRY_SECRETS: Final = "KAITO_REGISTRY_SECRETS"
"""The variable with the names of the registry secrets, separated by commas."""

HUB_SECRET: Final = "KAITO_HUB_SECRET"  # noqa: S105 – the name of a variable
"""The variable with the name of the hub's secret."""

DOCKER_CONFIG: Final = "/run/kaito/docker"
"""In memory: the registry secrets in the one file that programs look for."""

USER: Final = 65532
"""Nobody in particular: the images' user, and the group that owns the volumes."""


def write_stages(stages: Iterable[Stage]) -> str:
    """The content of `STAGES_FILE`."""
    return json.dumps([{"name": s.name, "command": list(s.command), "key": s.key} for s in stages], indent=2)


def read_stages(text: str | bytes) -> dict[str, Stage]:
    """The stages by name. ValueError when the text is something else."""
    try:
        return {s["name"]: Stage(s["name"], tuple(s["command"]), s["key"]) for s in json.loads(text)}
    except (KeyError, TypeError, RecursionError) as e:
        raise ValueError(f"not a list of stages: {e}") from e
