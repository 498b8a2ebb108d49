"""Sets up a development environment in .venv: the packages of this repository, and what they need.

    python3 scripts/setup.py

Needs Python 3.11+ and nothing else. Shows what it downloads. Takes the CPU build of torch where there is no NVIDIA GPU:
the default build for Linux brings several gigabytes of CUDA. A second run notices that nothing has changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "kaito-setup.sha256"

TORCH = "torch>=2.6,<3"
TORCH_PINNED = "torch==2.13.0"
"""The release that this repository is tested with; some registries offer a CPU build of exactly this one."""
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

PACKAGES = (
    "kaito_core[data,test]",
    "plugins/kaito_preset_phi3",
    "plugins/kaito_preset_demo",
    "plugins/kaito_preset_community",
    "plugins/kaito_tuner_qlora[train]",
    "plugins/kaito_runtime_transformers[serve,test]",
    "plugins/kaito_runtime_vllm",
    "plugins/kaito_provisioner_karpenter[aws,test]",
    "plugins/kaito_provisioner_aks[test]",
)
TOOLS = ("ruff>=0.9", "mypy>=1.14", "import-linter>=2.1", "types-PyYAML", "types-jsonschema", "jsonschema")


def main() -> int:
    if sys.version_info < (3, 11):  # noqa: UP036 – whoever runs this has not been checked by pip yet
        print(
            f"kaito needs Python 3.11 or newer; this is {platform.python_version()}. Try: make PYTHON=python3.12",
            file=sys.stderr,
        )
        return 1
    fingerprint = _fingerprint()
    if STAMP.is_file() and STAMP.read_text() == fingerprint:
        return 0
    if not PYTHON.exists() and not _run([sys.executable, "-m", "venv", str(VENV)]):
        print(
            "\nThe virtual environment could not be made. On Debian and Ubuntu: apt-get install python3-venv",
            file=sys.stderr,
        )
        return 1
    editable = [part for package in PACKAGES for part in ("-e", f"./{package}")]
    steps = [_torch, lambda: _pip("install", *editable, *TOOLS)]
    if not all(step() for step in steps):
        print(
            "\nSome packages could not be installed. If the registry cannot be reached, check the network or the proxy, or\n"
            "point pip at a mirror (PIP_INDEX_URL=https://…/simple) and run the same command again; it goes on from here.",
            file=sys.stderr,
        )
        return 1
    STAMP.write_text(fingerprint)
    return 0


def _fingerprint() -> str:
    """Changes when a dependency may have: the metadata of every package, this script and the interpreter."""
    digest = hashlib.sha256(f"{sys.version}{ROOT}".encode())
    for path in [
        Path(__file__),
        *sorted(ROOT.glob("*/pyproject.toml")),
        *sorted(ROOT.glob("plugins/*/pyproject.toml")),
    ]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _torch() -> bool:
    probe = (
        "import torch, sys; sys.exit(not (2, 6) <= tuple(int(p) for p in torch.__version__.split('.')[:2]) < (3, 0))"
    )
    if subprocess.run([PYTHON, "-c", probe], stderr=subprocess.DEVNULL, check=False).returncode == 0:
        return True
    if sys.platform != "linux" or _has_gpu():
        return _pip("install", TORCH)
    print("No NVIDIA GPU here: taking the CPU build of torch.", flush=True)
    if _registry_offers_cpu_build():
        return _pip("install", TORCH_PINNED)
    return _pip("install", TORCH, "--index-url", TORCH_CPU_INDEX)


def _has_gpu() -> bool:
    program = shutil.which("nvidia-smi")
    return program is not None and subprocess.run([program, "-L"], capture_output=True, check=False).returncode == 0


def _registry_offers_cpu_build() -> bool:
    """Whether pip, as configured here, would take a CPU build without being told where from. Downloads nothing."""
    question = [PYTHON, "-m", "pip", "install", "--dry-run", "--quiet", "--no-deps", "--report", "-", TORCH_PINNED]
    answer = subprocess.run(question, capture_output=True, text=True, check=False)
    try:
        url = json.loads(answer.stdout)["install"][0]["download_info"]["url"]
    except (ValueError, LookupError):
        return False
    return "cpu" in url.rsplit("/", 1)[-1] or platform.machine() == "aarch64"


def _pip(*arguments: str) -> bool:
    return _run([str(PYTHON), "-m", "pip", *arguments])


def _run(command: list[str]) -> bool:
    print("+", " ".join(c.replace(str(ROOT) + "/", "") for c in command), flush=True)
    return (
        subprocess.run(
            command, cwd=ROOT, env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}, check=False
        ).returncode
        == 0
    )


if __name__ == "__main__":
    sys.exit(main())
