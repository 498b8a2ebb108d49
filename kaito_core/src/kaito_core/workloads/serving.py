"""The workload of an endpoint: what a runtime needs to know as one JSON file (``$KAITO_JOB``), and the stages around its server.

    fetch ──> check ──> serve
    weights,  adapters  until it
    adapters  fit the   is ended
              model

Made from a plan, like the job of a tuning (`kaito_core.workloads.job`); it holds no secrets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from kaito_core.plugins.types import Preset, ServedAdapter, ServingConfiguration
from kaito_core.workloads.job import Secrets, digest_of, job_file, read_job, written
from kaito_core.workloads.workload import Endpoint, Mount, Stage, Workload, local_model

if TYPE_CHECKING:
    from pydantic import TypeAdapter

JOB_PATH: Final = "/mnt/config/serving.json"

PORT: Final = 5000
"""KAITO's port of the container; its Service has it as port 80."""

ADAPTERS: Final = "/mnt/adapter"
"""Below it a folder for each adapter, by its name, as in KAITO."""

BASE_SECONDS: Final = 15 * 60
PER_GIB_SECONDS: Final = 18
SHORTEST_START, LONGEST_START = 30 * 60, 180 * 60
"""How long a start may take: KAITO's formula, 15 minutes and 18 seconds per GiB of weights, between 30 minutes and 3 hours."""


@dataclass(frozen=True, slots=True)
class ServingJob:
    """One endpoint, completely decided."""

    name: str
    namespace: str
    preset: Preset
    runtime: str
    config: Mapping[str, Any]
    """The runtime's resolved configuration."""
    configuration: ServingConfiguration
    machines: int = 1
    adapters: tuple[ServedAdapter, ...] = ()
    model_image: str = ""
    """An OCI image with the weights, in place of the preset's own source."""
    model_folder: str = ""
    """A local folder with the weights, in place of the preset's own source."""
    secrets: Secrets = field(default_factory=lambda: Secrets())

    @property
    def chat_model(self) -> str:
        """The name that ``/chat`` answers as: the first adapter where there is one, as KAITO mixes its adapters in."""
        return self.adapters[0].name if self.adapters else self.preset.name

    def to_json(self) -> str:
        return written(_schema(), self)

    @staticmethod
    def from_json(text: str | bytes) -> ServingJob:
        return read_job(_schema(), text)

    @staticmethod
    def load() -> ServingJob:
        """The job of this process, from ``$KAITO_JOB``."""
        return ServingJob.from_json(job_file("no endpoint to serve", "servers"))


@cache
def _schema() -> TypeAdapter[ServingJob]:
    from pydantic import TypeAdapter

    return TypeAdapter(ServingJob)


def serving_workload(
    job: ServingJob, *, serve: tuple[str, ...], image: str = "", env: Mapping[str, str] | None = None
) -> Workload:
    """The workload that serves as ``job`` says; ``serve`` is the runtime's own command. It listens on ``$KAITO_PORT`` of
    ``$KAITO_HOST`` and finds the weights in ``$KAITO_WEIGHTS`` and each adapter in ``$KAITO_ADAPTERS/NAME``."""
    gpu = job.configuration.device == "cuda"
    core = ("python", "-m", "kaito_core.stages")
    key = digest_of(
        "serve", asdict(job.preset.source), job.model_image, job.model_folder, [asdict(a) for a in job.adapters]
    )
    return Workload(
        name=job.name,
        image=image,
        stages=(
            Stage("fetch", (*core, "fetch-model"), key),
            Stage("check", (*core, "check-model"), digest_of("check", key, asdict(job.preset), job.config)),
            Stage("serve", serve, "", gpu),
        ),
        mounts=(
            Mount("weights", "/workspace/weights", "KAITO_WEIGHTS"),
            Mount("adapters", ADAPTERS, "KAITO_ADAPTERS"),
            Mount("results", "/mnt/results", "KAITO_RESULTS"),
            *local_model(job.model_folder),
            *(
                Mount(
                    f"adapter-{number}",
                    f"{ADAPTERS}-{number}",
                    f"KAITO_ADAPTER_{number}",
                    adapter.volume,
                    read_only=True,
                )
                for number, adapter in enumerate(job.adapters)
                if adapter.volume is not None
            ),
        ),
        files={JOB_PATH: job.to_json()},
        env={
            "KAITO_JOB": JOB_PATH,
            "KAITO_HOST": "0.0.0.0",  # noqa: S104 – a container's own network
            "KAITO_PORT": str(PORT),
            "KAITO_CHAT_MODEL": job.chat_model,
            "KAITO_MAX_REQUESTS": str(job.configuration.requests),
            **(env or {}),
        },
        registry_secrets=job.secrets.registry,
        hub_secret=job.secrets.hub,
        gpus=max(1, job.configuration.gpus // job.machines) if gpu else 0,
        labels={"kaito.sh/workspace": job.name},
        endpoint=Endpoint(PORT, start_seconds=start_seconds(job.preset.weights_bytes)),
    )


def start_seconds(weights: int) -> int:
    """How long the start with so many bytes of weights may take; see `BASE_SECONDS`."""
    seconds = BASE_SECONDS + PER_GIB_SECONDS * weights / 2**30
    return int(min(max(seconds, SHORTEST_START), LONGEST_START))
