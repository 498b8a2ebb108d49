"""``python -m kaito_runtime_vllm.serve``: looks at what is on this machine and becomes ``vllm serve``.

The environment says what a workload's does (`kaito_core.workloads.serving`): ``KAITO_JOB``, ``KAITO_WEIGHTS``, ``KAITO_ADAPTERS``,
``KAITO_HOST``, ``KAITO_PORT``. An endpoint of several machines has besides ``KAITO_NODES`` (how many), ``KAITO_NODE_RANK`` (which of
them this is, from 0) and ``KAITO_LEADER`` (the host name of number 0). ``KAITO_VLLM_PYTHON`` names the Python that has vllm, where
it is not this one.

On one machine this process becomes vLLM; on several it stays, and ends vLLM when another machine is gone (`kaito_runtime_vllm.group`)."""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from kaito_core.problems import Failure, KaitoError, Problem, UserError
from kaito_core.workloads.job import digest_of
from kaito_core.workloads.serving import PORT, ServingJob
from kaito_runtime_vllm import adapters, group
from kaito_runtime_vllm.arguments import Here, arguments
from kaito_runtime_vllm.estimate import rank_allowed
from kaito_runtime_vllm.plugin import INTERPRETER


def main() -> int:
    try:
        job = ServingJob.load()
        here = look(job, os.environ)
        command = [
            os.environ.get(INTERPRETER) or sys.executable,
            "-m",
            "kaito_runtime_vllm.engine",
            *arguments(job, here),
        ]
        environment = environment_for(os.environ)
        print("+", shlex.join(command), flush=True)
        if here.machines == 1:
            os.execve(command[0], command, environment)  # noqa: S606 – a list of words, no shell
        greeting = digest_of(job.to_json())
        if here.rank == 0:
            return group.lead(command, environment, greeting)
        return group.follow(command, environment, greeting, here.leader)
    except KaitoError as e:
        return _failed(e)
    except OSError as e:
        return _failed(
            Failure(f"vLLM could not be started: {e}", f"look at {INTERPRETER} and at the folders of the job")
        )


def look(job: ServingJob, environ: Mapping[str, str]) -> Here:
    """What is on this machine; writes the endpoint's template and generation settings beside the results."""
    weights = Path(_named(environ, "KAITO_WEIGHTS")).absolute()
    if not (weights / "config.json").is_file():
        raise UserError(f"there is no model in {weights}: config.json is missing", "the stage `fetch` brings it")
    here = _place(job, environ, Here(weights=str(weights)))
    vllm = job.config["vllm"]
    if here.rank:
        # Ranks and whether there are adapters must be the same everywhere.
        return replace(here, adapters=tuple(p.adapter for p in _adapters(job, environ, _scratch(environ))))
    _free(here.host, here.port)
    scratch = _scratch(environ)
    pinned = _adapters(job, environ, scratch)
    template = vllm.get("chat-template") or adapters.template_of(pinned, job.preset)
    if template:
        (scratch / "chat_template.jinja").write_text(template, encoding="utf-8")
    neutral = vllm.get("generation-config") == "vllm"
    settings = adapters.generation_config(weights, pinned, job.preset, neutral=neutral)
    (scratch / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return replace(
        here,
        adapters=tuple(p.adapter for p in pinned),
        chat_template=str(scratch / "chat_template.jinja") if template else "",
        generation_config=str(scratch),
        memory=memory_limit(),
    )


def environment_for(environ: Mapping[str, str]) -> dict[str, str]:
    """vLLM's own environment: nothing is looked up and nothing is reported, and what it compiles is kept where downloads are."""
    ours = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1"}
    if environ.get("KAITO_CACHE"):
        ours["VLLM_CACHE_ROOT"] = str(Path(environ["KAITO_CACHE"]) / "vllm")
    # The other frontend has no middleware, and so no face.
    return {**ours, **environ, "VLLM_USE_RUST_FRONTEND": "0"}


def memory_limit() -> int:
    """Bytes of RAM that this container may use; the machine's, where nothing limits it."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):
            return min(machine, int(Path(path).read_text()))
    return machine


def _place(job: ServingJob, environ: Mapping[str, str], here: Here) -> Here:
    machines = _number(environ, "KAITO_NODES", job.machines)
    rank = _number(environ, "KAITO_NODE_RANK", 0)
    leader = environ.get("KAITO_LEADER", "")
    if machines != job.machines:
        raise UserError(
            f"the plan is for {job.machines} machines, and KAITO_NODES says {machines}", "plan the workspace again"
        )
    if rank >= machines:
        raise UserError(f"KAITO_NODE_RANK is {rank}, and there are {machines} machines, counted from 0", "")
    if machines > 1 and not leader:
        raise UserError("KAITO_LEADER does not say where the first of the machines is found", "")
    return replace(here, host=environ.get("KAITO_HOST") or here.host, port=_number(environ, "KAITO_PORT", PORT), rank=rank,
                   machines=machines, leader=leader)  # fmt: skip


def _adapters(job: ServingJob, environ: Mapping[str, str], scratch: Path) -> tuple[adapters.Pinned, ...]:
    """Every adapter of the job; with one that is wrong, everything that is wrong with all of them."""
    found: list[adapters.Pinned] = []
    problems: list[Problem] = []
    allowed = rank_allowed(job.config["vllm"])
    for number, adapter in enumerate(job.adapters):
        folder = Path(_named(environ, "KAITO_ADAPTERS")).absolute() / adapter.name
        try:
            one = adapters.look(adapter.name, folder, job.preset, allowed)
            if adapter.strength != 1:
                one = adapters.weaker(one, adapter.strength, scratch / f"adapter-{number}")
            found.append(one)
        except UserError as e:
            problems += e.problems
    if problems:
        raise UserError(problems)
    return tuple(found)


def _scratch(environ: Mapping[str, str]) -> Path:
    """A folder for the few small files of this start."""
    results = environ.get("KAITO_RESULTS")
    if results:
        Path(results).mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix="serving-", dir=results or None))


def _free(host: str, port: int) -> None:
    """Better said in words now than by a traceback after the weights are loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, port))
        except OSError as e:
            raise UserError(f"the endpoint cannot listen on {host}:{port}: {e.strerror or e}",
                            "end what listens there, or choose another port") from e  # fmt: skip


def _named(environ: Mapping[str, str], variable: str) -> str:
    if not environ.get(variable):
        raise UserError(f"the environment does not say where things are: {variable} is not set",
                        "servers are started by `kaito run` or by the controller")  # fmt: skip
    return environ[variable]


def _number(environ: Mapping[str, str], variable: str, default: int) -> int:
    text = environ.get(variable) or str(default)
    if not text.isascii() or not text.isdecimal():
        raise UserError(f"{variable} is {text[:40]!r}, which is no number", "")
    return int(text)


def _failed(error: KaitoError) -> int:
    """Says it, also in the progress file for whoever follows the workload; the exit code."""
    print(error, file=sys.stderr, flush=True)
    results = os.environ.get("KAITO_RESULTS")
    if results:
        from kaito_core.progress import FILE_NAME, Progress

        first = error.problems[0]
        fields = {"message": first.message, "remedy": first.remedy, "exit_code": error.exit_code}
        with suppress(OSError):
            progress = Progress(Path(results) / FILE_NAME, "serve")
            progress.emit("failed", **fields, problems=[p.to_json() for p in error.problems])
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
