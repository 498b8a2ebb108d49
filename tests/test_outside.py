"""From outside: packages as wheels in fresh environments, with what they declare and nothing else, as somebody else has them.

Every package of this repository, the two of ``examples/`` that are none of its own, and what ``kaito new`` writes: with the newest
versions that pip finds, and with the lowest that they claim. torch is nowhere installed. Wheels from the registry are downloaded
once for all environments.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import EXAMPLES, ROOT, Kaito, workspace

pytestmark = [pytest.mark.slow, pytest.mark.outside]

CORE = ROOT / "kaito_core"
PACKAGES = {p.name: p for p in (CORE, *sorted((ROOT / "plugins").iterdir())) if (p / "pyproject.toml").is_file()}
PRESET, PROVISIONER = EXAMPLES / "third_party_preset", EXAMPLES / "third_party_provisioner"

SETS = ("newest", "lowest")

FROM_OUTSIDE = ["kaito-preset-pocket-llama[test]", "kaito-provisioner-machine-shop[test]"]

MODULES = {
    "azure-identity": "azure",
    "azure-mgmt-compute": "azure",
    "azure-mgmt-containerservice": "azure",
    "pyyaml": "yaml",
}
"""What is imported of a distribution, where that is not its name."""

BESIDES = {"boto3": {"botocore"}, "pydantic": {"pydantic_core"}, "pytest": {"_pytest"}}
"""What comes with a distribution in a version of its own choice, and is part of what it hands out: errors of botocore and pydantic."""


# --- environments


@dataclass(frozen=True)
class Environment:
    """A virtual environment without anything that was not asked for."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def run(self, *command: str | Path, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
        """A program of the environment, far from any checkout and from the user's own settings."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("KAITO_", "HF_", "PYTHON", "VIRTUAL_ENV"))}
        own = {"KAITO_HOME": str(self.folder / "home"), "KUBECONFIG": str(self.folder / "no"), "COLUMNS": "200"}
        return subprocess.run(
            [self.folder / "bin" / str(command[0]), *command[1:]],
            cwd=cwd or self.folder,
            env={**kept, **own, **env},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    def kaito(self, *arguments: str | Path, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
        return self.run("kaito", *arguments, cwd=cwd, **env)

    def plugins(self) -> dict[str, str]:
        """State by distribution, of everything that is plugged in."""
        done = self.kaito("plugins", "--json")
        assert done.returncode == 0, done.stderr
        return {p["distribution"]: p["state"] for p in json.loads(done.stdout)["plugins"]}


@dataclass(frozen=True)
class Shop:
    """Where packages come from: the wheels of this repository, and those that were downloaded for them."""

    pip: Path
    ours: Path
    bought: Path
    folder: Path
    """For the environments."""

    def environment(self, name: str, which: str, *requirements: str | Path) -> Environment:
        """A fresh one with ``requirements`` and what they need, in the newest or the lowest versions."""
        made = Environment(self.folder / name)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", made.folder], check=True)
        self.install(made, which, *requirements)
        return made

    def install(self, there: Environment, which: str, *requirements: str | Path, editable: bool = False) -> None:
        done = subprocess.run(
            [self.pip, "--python", there.python, "install", "--quiet", "--no-compile", "--no-index",
             "--find-links", self.ours, "--find-links", self.bought / which,
             *(["--no-build-isolation", "--editable"] if editable else []), *requirements],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    folder = tmp_path_factory.mktemp("outside")
    subprocess.run([sys.executable, "-m", "venv", folder / "tools"], check=True)
    pip = folder / "tools" / "bin" / "pip"
    found = Shop(pip, folder / "ours", folder / "bought", folder)
    _pip(pip, "install", "hatchling>=1.27")
    sources = [*PACKAGES.values(), PRESET, PROVISIONER]
    _pip(pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", found.ours, *sources)
    limits = folder / "lowest.txt"
    limits.write_text("".join(f"{name}=={version}\n" for name, version in lowest().items()))
    wanted = ["kaito-core[data,test]", "kaito-provisioner-aks", "kaito-runtime-transformers", *FROM_OUTSIDE]
    more = {"newest": ["hatchling", "editables"], "lowest": ["--constraint", limits]}
    places = ("--find-links", found.ours, "--dest")
    with ThreadPoolExecutor() as both:
        list(both.map(lambda w: _pip(pip, "download", *places, found.bought / w, *wanted, *more[w]), SETS))
    return found


def _pip(pip: Path, *arguments: str | Path) -> None:
    done = subprocess.run([pip, *arguments, "--quiet"], capture_output=True, text=True, check=False)
    if done.returncode and re.search(r"Retrying|Connection|No matching distribution found for hatchling", done.stderr):
        pytest.skip(f"no package registry can be reached: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr


# --- what is declared


@cache
def project(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return found


def needs(folder: Path, *, extras: bool) -> dict[str, str]:
    """What a package declares: version specifiers by distribution."""
    about = project(folder)
    listed = [*about["dependencies"]]
    listed += [r for e in about.get("optional-dependencies", {}).values() for r in e] if extras else []
    found = {}
    for requirement in listed:
        match = re.match(r"([A-Za-z0-9._-]+)(?:\[([^]]*)\])?(.*)", requirement)
        assert match, requirement
        found[match[1].lower()] = match[3].strip()
        if match[1] == "kaito-core":
            for extra in filter(None, (match[2] or "").split(",")):
                found |= {re.split(r"[<>=\[]", r)[0]: "" for r in project(CORE)["optional-dependencies"][extra]}
    return found


def lowest() -> dict[str, str]:
    """The lowest version of each distribution that all packages of this repository accept: the highest of their lower bounds.
    Extras of engines and trainers are left out."""
    found: dict[str, str] = {}
    for folder in PACKAGES.values():
        extras = project(folder).get("optional-dependencies", {})
        light = {k: v for k, v in extras.items() if k in ("data", "test")}
        for requirement in [*project(folder)["dependencies"], *(r for e in light.values() for r in e)]:
            name, bound = re.match(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?>=([0-9.]+)", requirement).groups()  # type: ignore[union-attr]
            if not name.startswith("kaito"):
                found[name] = max(bound, found.get(name, "0"), key=lambda v: [int(n) for n in v.split(".")])
    return found


def modules_of(distributions: dict[str, str]) -> set[str]:
    """What can be imported of these distributions."""
    named = {MODULES.get(d, d.replace("-", "_")) for d in distributions}
    return named.union(*(BESIDES.get(d, set()) for d in distributions))


@pytest.mark.parametrize("package", PACKAGES)
def test_whatever_is_imported_is_declared(package: str) -> None:
    """In every file, inside functions as well: an import that only works because somebody else needs the same is found here."""
    source = PACKAGES[package] / "src" / package
    declared = modules_of(needs(PACKAGES[package], extras=True)) | {package} | set(sys.stdlib_module_names)
    stray = {}
    for path in source.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for name in names:
                if name.partition(".")[0] not in declared:
                    stray[name] = str(path.relative_to(source))
    assert not stray


IMPORT_ALL = """
import importlib, json, pkgutil, sys
package = importlib.import_module(sys.argv[1])
missing = {}
for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".", onerror=lambda name: None):
    if module.name.endswith("__main__"):
        continue
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as e:
        missing[module.name] = e.name or str(e)
print("\\n" + json.dumps(missing))
"""


def without_extras(there: Environment, package: str) -> dict[str, str]:
    """Imports every module of a package; those that could not be, by what they lack that is of no extra."""
    done = there.run("python", "-c", IMPORT_ALL, package)
    assert done.returncode == 0, done.stderr
    missing: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    of_extras = set()
    for folder in (PACKAGES[package], CORE):  # a plugin's extras may ask for those of the core
        of_extras |= modules_of(needs(folder, extras=True)) - modules_of(needs(folder, extras=False))
    return {m: n for m, n in missing.items() if n.partition(".")[0] not in of_extras}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_works_with_what_it_declares(package: str, shop: Shop) -> None:
    """Alone with the core and its dependencies: active, and every module can be imported but those of its extras."""
    distribution = project(PACKAGES[package])["name"]
    there = shop.environment(package, "newest", distribution)
    assert there.plugins() == {"kaito-core": "active", distribution: "active"}
    assert without_extras(there, package) == {}


VERSIONS = """
import importlib.metadata, json, sys
print(json.dumps({name: importlib.metadata.version(name) for name in sys.argv[1:]}))
"""


def test_the_packages_work_with_the_lowest_versions_that_they_claim(shop: Shop) -> None:
    """All of them in one environment: what one of them accepts, another must not spoil."""
    distributions = [project(p)["name"] for p in PACKAGES.values()]
    there = shop.environment("lowest", "lowest", *distributions)
    bounds = {n: v for n, v in lowest().items() if any(n in needs(p, extras=False) for p in PACKAGES.values())}
    found = json.loads(there.run("python", "-c", VERSIONS, *bounds).stdout)
    assert {n: v for n, v in found.items() if not f"{v}.".startswith(f"{bounds[n]}.")} == {}
    assert there.plugins() == dict.fromkeys(distributions, "active")
    assert {p: w for p in PACKAGES if (w := without_extras(there, p))} == {}


# --- two packages that are none of ours


def own_tests(there: Environment, source: Path, folder: Path) -> str:
    """Run a package's own tests in the environment, without its source beside them; what pytest printed."""
    shutil.copytree(source / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(source / "pyproject.toml", folder)
    done = there.run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("which", SETS)
def test_a_preset_of_somebody_else(which: str, shop: Shop, tmp_path: Path) -> None:
    """Installed with the core's wheel only: found, checked, and its own tests pass; planned with a tuner and a runtime."""
    there = shop.environment(f"preset-{which}", which, FROM_OUTSIDE[0])
    assert there.plugins() == {"kaito-core": "active", "kaito-preset-pocket-llama": "active"}
    assert there.run("python", "-c", "import torch").returncode != 0
    assert re.search(r"\d+ passed", own_tests(there, PRESET, tmp_path))
    checked = there.kaito("plugins", "check", "kaito-preset-pocket-llama")
    assert checked.returncode == 0, checked.stdout + checked.stderr

    file = workspace(tmp_path / "job", rows=20)
    file.write_text(file.read_text().replace("demo-phi-3", "pocket-llama"))
    without = there.kaito("plan", "--local", file)
    assert without.returncode == 2
    assert "pip install kaito-tuner-qlora" in without.stderr
    shop.install(there, which, "kaito-tuner-qlora", "kaito-runtime-transformers")
    (plan,) = json.loads(there.kaito("plan", "--local", "--json", file).stdout)["plans"]
    assert plan["model"]["preset"] == "pocket-llama"
    assert plan["candidates"][0]["chosen"]
    assert plan["data"]["rows"] == 16  # four of twenty are held out
    serving = there.kaito("plan", "--local", "--json", served(tmp_path))
    assert json.loads(serving.stdout)["plans"][0]["candidates"][0]["chosen"]


def served(folder: Path) -> Path:
    """A workspace that serves the model."""
    path = folder / "serve.yaml"
    path.write_text(
        "apiVersion: kaito.sh/v1beta1\nkind: Workspace\nmetadata: {name: served}\n"
        "inference:\n  preset: {name: pocket-llama}\n"
    )
    return path


def test_it_is_tuned_for_real(shop: Shop, tmp_path: Path, kaito: Kaito) -> None:
    """Its wheel beside this development environment, which has torch."""
    beside = tmp_path / "beside"
    wheel = next(shop.ours.glob("kaito_preset_pocket_llama-*.whl"))
    _pip(shop.pip, "install", "--no-deps", "--no-index", "--target", beside, wheel)
    file = workspace(tmp_path / "job", rows=20)
    file.write_text(file.read_text().replace("demo-phi-3", "pocket-llama"))
    done = kaito("run", "--local", "--yes", file, PYTHONPATH=str(beside))
    assert done.returncode == 0, done.stdout + done.stderr
    adapter = tmp_path / "job" / "out" / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "pocket-llama"
    assert (adapter / "adapter_model.safetensors").is_file()


@contextmanager
def open_shop(there: Environment) -> Iterator[dict[str, str]]:
    """The example's shop as a process of the environment; what a customer's environment needs."""
    server = PROVISIONER / "tests" / "shop_server.py"
    process = subprocess.Popen([there.python, "-u", server, "0"], stdout=subprocess.PIPE, text=True, cwd=there.folder)
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+?(?=;)", process.stdout.readline())
        assert found
        yield {"MACHINE_SHOP_URL": found[0], "MACHINE_SHOP_TOKEN": "right"}
    finally:
        process.terminate()
        process.wait()


@pytest.mark.parametrize("which", SETS)
def test_a_provisioner_of_somebody_else(which: str, shop: Shop, tmp_path: Path) -> None:
    """Installed with the core's wheel only: found, checked, and its own tests pass; then a plan buys in its shop."""
    there = shop.environment(f"provisioner-{which}", which, FROM_OUTSIDE[1])
    assert there.plugins() == {"kaito-core": "active", "kaito-provisioner-machine-shop": "active"}
    assert re.search(r"\d+ passed", own_tests(there, PROVISIONER, tmp_path))
    checked = there.kaito("plugins", "check", "kaito-provisioner-machine-shop")
    assert checked.returncode == 0, checked.stdout + checked.stderr

    shop.install(there, which, "kaito-preset-phi3", "kaito-tuner-qlora")
    with open_shop(there) as account:
        planned = there.kaito("plan", "--json", a_bench(tmp_path), **account)
    plan = json.loads(planned.stdout)["plans"][0]
    (machine,) = [c for c in plan["candidates"] if c["chosen"]]
    assert (machine["provisioner"], machine["instanceType"], machine["pricePerHour"]) == ("machine-shop", "bench", 0.71)
    without = there.kaito("plan", "--json", a_bench(tmp_path))
    assert without.returncode == 2
    assert "Traceback" not in without.stderr


def a_bench(folder: Path) -> Path:
    """A tuning on a GPU that the shop sells."""
    path = folder / "tune.yaml"
    path.write_text(
        "apiVersion: kaito.sh/v1beta1\nkind: Workspace\nmetadata: {name: tuned}\nresource: {gpu: {model: L4}}\n"
        "tuning:\n  preset: {name: phi-3-mini-4k-instruct}\n  method: qlora\n"
        '  input: {urls: ["https://example.com/data.jsonl"]}\n'
        "  output: {image: example.com/adapter:1, imagePushSecret: push}\n"
    )
    return path


# --- what `kaito new` writes


@pytest.fixture(scope="module")
def of_an_author(shop: Shop) -> Environment:
    """What somebody has who begins to write a plugin."""
    return shop.environment("author", "newest", "kaito-core[data,test]", "hatchling", "editables")


@pytest.mark.parametrize("kind", ["preset", "provisioner", "tuner", "runtime"])
def test_a_new_package_installs_and_passes_its_tests_as_it_stands(
    kind: str, shop: Shop, of_an_author: Environment, tmp_path: Path
) -> None:
    """With the commands that it shows at its end."""
    there = of_an_author
    said = there.kaito("new", kind, f"fresh-{kind}", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    package = tmp_path / f"kaito-{kind}-fresh-{kind}"
    (requirement,) = re.findall(r"pip install -e '(\S+)'", said.stdout)
    shop.install(there, "newest", requirement.replace(".", str(package), 1), editable=True)
    assert there.plugins()[package.name] == "active"
    done = there.run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=package)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout)
    again = there.kaito("new", kind, f"fresh-{kind}", "--into", "again", cwd=tmp_path)
    assert again.returncode == 2
    assert f"{package.name} 0.1.0 is installed already" in again.stderr
