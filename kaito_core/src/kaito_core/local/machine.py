"""This machine, as an offer: its CPUs, its memory and its GPUs as they are, found without importing torch."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from kaito_core.planning.images import TORCH, Capability, Images
from kaito_core.plugins.types import Gpu, NodeProvisioner, NodeRequest, NodeStatus, Offer, Requirements

MIB = 1 << 20
NAME = "this machine"


def cpus() -> int:
    """CPUs that this process may use: affinity and cgroup quota, whichever is less."""
    count = float(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else float(os.cpu_count() or 1)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        if quota != "max":
            count = min(count, int(quota) / int(period))
    except (OSError, ValueError):
        pass
    return max(1, int(count))


def memory(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of RAM that a job can have now: what is available, and within the container's limit."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux: all physical memory
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = (cgroup / name).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():
            available = min(available, int(text))
    return available


def gpus() -> list[Gpu]:
    """The NVIDIA GPUs that the driver reports, by total memory; empty when there are none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    found = []
    for line in answer.splitlines():
        try:
            name, mib, capability = (part.strip() for part in line.split(","))
            major, _, minor = capability.partition(".")
            found.append(Gpu(name.removeprefix("NVIDIA "), int(mib) * MIB, (int(major), int(minor or 0))))
        except ValueError:
            continue
    return found


def images(offers: Iterable[Offer]) -> Images:
    """What computes where this machine is among the offers: the PyTorch that is installed here. It is only asked where a GPU is so old
    that it matters, since that takes seconds."""
    usual = Images()
    here = next((o for o in offers if o.is_local and usual.tuning(o).obstacle(o)), None)
    return replace(usual, local=_lowest_of_torch()) if here else usual


def _lowest_of_torch() -> Capability | None:
    """The lowest compute capability that the installed PyTorch has kernels for; as the newest has it where none is installed, None
    where it does not say."""
    if importlib.util.find_spec("torch") is None:
        return TORCH
    program = "import torch; print(*torch.cuda.get_arch_list())"
    try:
        answer = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    # sm_75, sm_90a: kernels of an architecture. compute_90 is code that is compiled for newer ones.
    found = [int(n) for n in re.findall(r"\bsm_(\d+)", answer)]
    return divmod(min(found), 10) if found else None


def offer() -> Offer:
    """This machine. GPUs of different kinds: the kind with most memory counts, since a job wants them alike."""
    found = sorted(gpus(), key=lambda g: (-g.memory, g.model))
    best = found[0] if found else None
    return Offer(
        instance_type=NAME,
        cpus=cpus(),
        memory=memory(),
        gpu=best,
        gpus=sum(g == best for g in found),
        provisioner="local",
    )


class ThisMachine(NodeProvisioner):
    """Offers the machine that kaito runs on. There is nothing to get and nothing to give back."""

    name: ClassVar[str] = "local"

    def offers(self, requirements: Requirements) -> Iterable[Offer]:
        yield offer()

    def ensure(self, request: NodeRequest) -> NodeStatus:
        return NodeStatus(request.id, "ready", nodes=(NAME,))

    def observe(self, request_id: str) -> NodeStatus:
        return NodeStatus(request_id, "ready", nodes=(NAME,))

    def release(self, request_id: str) -> NodeStatus:
        return NodeStatus(request_id, "absent")
