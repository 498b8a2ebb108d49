"""Builds the container images with docker, podman or buildah, whichever is there.

    python3 images/build.py all --registry registry.example.com/kaito --tag 0.1.0 --push
    python3 images/build.py tuner --registry R --build-arg TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
    python3 images/build.py controller --registry R -- --network host      # what follows -- goes to the build tool

Needs Python 3.11+ with pip. The wheels of this repository are built first; they and the pins are all that the build tool
gets to see, so nothing that lies about in a checkout can end in an image.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

IMAGES = Path(__file__).resolve().parent
ROOT = IMAGES.parent
BOTH = (
    "kaito_core",
    "plugins/kaito_preset_phi3",
    "plugins/kaito_preset_demo",
    "plugins/kaito_preset_community",
    "plugins/kaito_tuner_qlora",
    "plugins/kaito_runtime_transformers",
)
PACKAGES = {
    "controller": (
        *BOTH,
        "plugins/kaito_runtime_vllm",
        "plugins/kaito_provisioner_karpenter",
        "plugins/kaito_provisioner_aks",
    ),
    "tuner": BOTH,
    "vllm": (*BOTH[:-2], "plugins/kaito_runtime_vllm"),
}
"""What of this repository is in which image."""
TOOLS = {"docker": ("docker", "build"), "podman": ("podman", "build"), "buildah": ("buildah", "bud", "--layers")}


def main() -> int:
    arguments, extra = _arguments()
    tool = arguments.tool or next((t for t in TOOLS if _works(t)), "")
    if not tool:
        print("error: none of docker, podman and buildah works here\n    install one of them", file=sys.stderr)
        return 1
    names = ("controller", "tuner") if arguments.image == "all" else (arguments.image,)
    references = [f"{arguments.registry}/kaito-{name}:{arguments.tag}" for name in names]
    epoch = os.environ.get("SOURCE_DATE_EPOCH") or _git("log", "-1", "--format=%ct") or "0"
    with tempfile.TemporaryDirectory(prefix="kaito-images-") as folder:
        wheels = Path(folder) / "wheels"
        for name, reference in zip(names, references, strict=True):
            shutil.rmtree(wheels, ignore_errors=True)
            if not _wheels(name, wheels, epoch):
                return 1
            if name != "vllm":  # vLLM's own image has its packages already
                shutil.copy(IMAGES / f"constraints-{name}.txt", Path(folder) / "constraints.txt")
            command = [*TOOLS[tool], "--file", str(IMAGES / name / "Dockerfile"), "--tag", reference]
            command += ["--label", f"org.opencontainers.image.version={version()}"]
            command += ["--label", f"org.opencontainers.image.revision={_git('rev-parse', 'HEAD') or 'unknown'}"]
            if tool != "docker":  # which rewrites times only for some of its outputs
                command += ["--timestamp", epoch]
            command += [part for given in arguments.build_arg for part in ("--build-arg", given)]
            if not _run([*command, *extra, folder]):
                return 1
    if arguments.push and not all(_run([tool, "push", reference]) for reference in references):
        print(f"    log in first: {tool} login {arguments.registry.partition('/')[0]}", file=sys.stderr)
        return 1
    print("\n".join(references))
    return 0


def _arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "image",
        nargs="?",
        choices=["controller", "tuner", "vllm", "all"],
        default="all",
        help="all: controller and tuner",
    )
    parser.add_argument("--registry", required=True, help="what goes before /kaito-controller: HOST or HOST/PATH")
    parser.add_argument("--tag", default=version(), help="default: the version, %(default)s")
    parser.add_argument("--push", action="store_true", help="push them as well; log in before")
    parser.add_argument("--tool", choices=TOOLS, help="default: the first of these that works")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE", help="see the Dockerfiles")
    given = sys.argv[1:]
    split = given.index("--") if "--" in given else len(given)
    return parser.parse_args(given[:split]), given[split + 1 :]


def version() -> str:
    """The version of kaito-core, which is that of the images and of the chart."""
    text = (ROOT / "kaito_core/src/kaito_core/__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    if found is None:
        raise SystemExit("error: kaito_core/__init__.py has no __version__")
    return found[1]


def _works(tool: str) -> bool:
    """A client alone does not build: docker needs its server."""
    return shutil.which(tool) is not None and subprocess.run([tool, "info"], capture_output=True).returncode == 0


def _wheels(image: str, folder: Path, epoch: str) -> bool:
    packages = [str(ROOT / p) for p in PACKAGES[image]]
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), *packages]
    return _run(build, SOURCE_DATE_EPOCH=epoch)


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(
            ["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _run(command: list[str], **environment: str) -> bool:
    print("+", " ".join(command), file=sys.stderr, flush=True)
    return subprocess.run(command, env={**os.environ, **environment}, stdout=sys.stderr, check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
