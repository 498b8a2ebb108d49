"""This machine as an offer: what it has and can be used, no more."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kaito_core.local import machine
from kaito_core.plugins import NodeRequest, Requirements


def test_memory_is_what_is_available_within_the_containers_limit(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 1000 kB\nMemAvailable: 800 kB\n")
    assert machine.memory(meminfo, tmp_path) == 800 * 1024
    (tmp_path / "memory.max").write_text("4096\n")
    assert machine.memory(meminfo, tmp_path) == 4096
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.memory(meminfo, tmp_path) == 800 * 1024


def test_gpus_are_what_the_driver_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(
        f"#!{sys.executable}\nprint('NVIDIA A10G, 23028, 8.6\\nNVIDIA A10G, 23028, 8.6\\nTesla T4, 15360, 7.5\\n[N/A]')\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = machine.offer()
    assert found.gpu is not None
    assert (found.gpu.model, found.gpus, found.gpu.memory >> 20, found.gpu.has_bfloat16) == ("A10G", 2, 23028, True)


def test_a_broken_driver_means_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.gpus() == []


def test_this_machine_keeps_the_provisioners_contract() -> None:
    here = machine.ThisMachine()
    (offer,) = here.offers(Requirements())
    assert offer.is_local
    assert offer.price is None
    assert here.ensure(NodeRequest("id", offer, Requirements())) == here.observe("id")
    assert here.release("id").phase == "absent"
