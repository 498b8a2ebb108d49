"""The workload of a tuning: the five stages, what they share, and the key that says when one is done for good.

    fetch ──> check ──> train ──> verify ──> push
    data,     doctor,   check-    adapter    image or
    weights   push      points,   on the     volume
              rights    resume    base again

A stage's key is a digest of what it depends on and of nothing else, so a changed output image pushes again without training
again, and a changed configuration never resumes from checkpoints of another one.
"""

from __future__ import annotations

from dataclasses import asdict

from kaito_core.workloads.job import TuningJob, digest_of
from kaito_core.workloads.workload import Mount, Stage, Workload, local_model

JOB_PATH = "/mnt/config/job.json"


def _fetch_key(job: TuningJob) -> str:
    model = [asdict(job.preset.source), job.model_image, job.model_folder]
    return digest_of("fetch", model, asdict(job.data), job.data_digest)


def train_key(job: TuningJob) -> str:
    """The key of the training: jobs with the same one make the same adapter, and go on from each other's checkpoints.

    Where the same work runs, and in how many pieces, changes nothing about its result: not part of the key."""
    return digest_of("train", _fetch_key(job), asdict(job.preset), job.method, job.config, job.configuration.sequence)


def tuning_workload(
    job: TuningJob,
    *,
    train: tuple[str, ...],
    verify: tuple[str, ...],
    image: str = "",
    env: dict[str, str] | None = None,
) -> Workload:
    """The workload that tunes as ``job`` says; ``train`` and ``verify`` are the tuner's own commands."""
    output = [job.output_image, job.output_volume]
    key = train_key(job)
    check_key = digest_of("check", key, output)
    push_key = digest_of("push", key, output)
    gpu = job.configuration.device == "cuda"
    core = ("python", "-m", "kaito_core.stages")
    mounts = [
        Mount("data", "/mnt/data", "KAITO_DATA", job.data.volume, read_only=job.data.volume is not None),
        Mount("weights", "/workspace/weights", "KAITO_WEIGHTS"),
        Mount("results", "/mnt/results", "KAITO_RESULTS"),
        *local_model(job.model_folder),
    ]
    if job.output_volume is not None:
        mounts.append(Mount("destination", "/mnt/output", "KAITO_DESTINATION", job.output_volume))
    return Workload(
        name=job.name,
        image=image,
        stages=(
            Stage("fetch", (*core, "fetch"), _fetch_key(job)),
            Stage("check", (*core, "check"), check_key),
            Stage("train", train, key, gpu),
            Stage("verify", verify, digest_of("verify", key), gpu),
            Stage("push", (*core, "push"), push_key),
        ),
        mounts=tuple(mounts),
        files={JOB_PATH: job.to_json()},
        env={"KAITO_JOB": JOB_PATH, "KAITO_TRAIN_KEY": key, **(env or {})},
        registry_secrets=job.secrets.registry,
        hub_secret=job.secrets.hub,
        gpus=job.configuration.processes if gpu else 0,
        labels={"kaito.sh/workspace": job.name},
    )
