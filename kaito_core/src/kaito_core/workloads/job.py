"""The job: everything that the stages of a tuning workload need to know, as one JSON file (``$KAITO_JOB``).

It is made from a plan, so that nothing is decided twice: a stage reads it and does what it says. It holds no secrets.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kaito_core.plugins.types import Configuration, Preset
from kaito_core.problems import UserError

if TYPE_CHECKING:
    from pydantic import TypeAdapter


@dataclass(frozen=True, slots=True)
class DataInput:
    """Where the training data comes from: exactly one of the three."""

    urls: tuple[str, ...] = ()
    """``https://``, ``http://``, ``hf://``, ``file://`` or, on this machine, a path."""
    volume: Mapping[str, Any] | None = None
    """A Kubernetes volume source that holds the files."""
    image: str = ""
    """An OCI image whose ``/data`` holds the files."""


@dataclass(frozen=True, slots=True)
class Secrets:
    """The names of the Secrets that the stages need; never their content."""

    registry: tuple[str, ...] = ()
    """Of type ``kubernetes.io/dockerconfigjson``: pull and push credentials, merged into one ``config.json``."""
    hub: str = ""
    """With the key ``HF_TOKEN``."""


@dataclass(frozen=True, slots=True)
class TuningJob:
    """One tuning, completely decided."""

    name: str
    namespace: str
    preset: Preset
    method: str
    config: Mapping[str, Any]
    """The tuner's resolved ``training_config`` sections."""
    configuration: Configuration
    data: DataInput
    output_image: str = ""
    """Where the adapter is pushed; empty when it only goes to a volume."""
    output_volume: Mapping[str, Any] | None = None
    """A Kubernetes volume source that the adapter is copied to."""
    model_image: str = ""
    """An OCI image with the weights, in place of the preset's own source."""
    model_folder: str = ""
    """A local folder with the weights, in place of the preset's own source."""
    data_digest: str = ""
    """The digest of the training data where planning could read it: changed data means a new training."""
    secrets: Secrets = field(default_factory=lambda: Secrets())

    def to_json(self) -> str:
        return written(_schema(), self)

    @staticmethod
    def from_json(text: str | bytes) -> TuningJob:
        return read_job(_schema(), text)

    @staticmethod
    def load() -> TuningJob:
        """The job of this process, from ``$KAITO_JOB``."""
        return TuningJob.from_json(job_file("no job to work on", "stages"))


T = TypeVar("T")


def written(schema: TypeAdapter[T], job: T) -> str:
    """A job as the JSON that `read_job` takes."""
    return schema.dump_json(job, indent=2).decode()


def read_job(schema: TypeAdapter[T], text: str | bytes) -> T:
    """The job of this kind that a file holds. Raises `UserError`."""
    from pydantic import ValidationError

    try:
        return schema.validate_json(text)
    except ValidationError as e:
        raise UserError(f"the job file is not what this version of kaito writes: {e.errors()[0]['msg']}",
                        "plan the workspace again with the version that runs it") from e  # fmt: skip


def job_file(lack: str, started: str) -> bytes:
    """What ``$KAITO_JOB`` names. Raises `UserError` with these words for the lack, and for what kaito starts."""
    path = os.environ.get("KAITO_JOB")
    if not path or not Path(path).is_file():
        raise UserError(f"{lack}: the environment variable KAITO_JOB does not name a file",
                        f"{started} are started by `kaito run` or by the controller")  # fmt: skip
    return Path(path).read_bytes()


@cache
def _schema() -> TypeAdapter[TuningJob]:
    """Made once: that takes milliseconds, and a controller writes a job for every Workspace."""
    from pydantic import TypeAdapter

    return TypeAdapter(TuningJob)


def digest_of(*parts: Any) -> str:
    """A short stable digest of JSON-able values; what stage keys are made of."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Folders:
    """Where this process finds its mounts, from the environment that `Mount.env` promises."""

    data: Path
    weights: Path
    results: Path

    @staticmethod
    def from_env() -> Folders:
        missing = [v for v in ("KAITO_DATA", "KAITO_WEIGHTS", "KAITO_RESULTS") if not os.environ.get(v)]
        if missing:
            raise UserError(f"the environment does not say where the job's folders are: {', '.join(missing)} unset",
                            "stages are started by `kaito run` or by the controller")  # fmt: skip
        return Folders(*(Path(os.environ[v]) for v in ("KAITO_DATA", "KAITO_WEIGHTS", "KAITO_RESULTS")))
