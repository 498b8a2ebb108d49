"""Settings that were made to take the time, the memory or the stack of their reader: each is read or refused by name, within
bounds, by every way by which kaito reads a ConfigMap."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Kaito
from tests.hostile_entry_points import WORKSPACES

ROOT = Path(__file__).resolve().parent.parent

SECONDS = 6.0
"""For one text, on a machine that is busy with other tests; alone each takes less than two."""
MIB = 300.0

BYTES = 900_000
"""As large as a ConfigMap may be, with a Workspace beside it in a file of 1 MiB."""


def filled(unit: str, size: int = BYTES) -> str:
    return unit * (size // len(unit))


def numbered(line: str, size: int = BYTES) -> str:
    """Many lines, each with its number for ``#``."""
    return "".join(line.replace("#", str(i)) for i in range(size // (len(line) + 4)))


SETTINGS: dict[str, str] = {
    "sexagesimal": f"a: {filled('1:')}1\n",
    "sexagesimal fraction": f"a: {filled('1:')}1.5\n",
    "deep brackets": f"a: {'[' * 3000}{']' * 3000}\n",
    "deep mappings": "".join(f"{' ' * i}a:\n" for i in range(1000)),
    "deep questions": filled("? "),
    "deep dashes": filled("- "),
    "long number": f"a: {'9' * 5000}\n",
    "long fraction": f"a: {filled('9')}.5\n",
    "long binary number": f"a: 0b{filled('1')}\n",
    "long underscores": f"a: 1{filled('_')}\n",
    "infinity": "a: .inf\n",
    "not a number": "a: .nan\n",
    "date that is none": "a: 2024-99-99\n",
    "alias bomb": "a: &a [" + "x," * 9 + "]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(20)),
    "alias of itself": "a: &a [*a]\n",
    "anchors": numbered("a#: &a# x\n"),
    "long key": f"? {filled('k', 500_000)}\n:\n" + numbered("  a#: 1\n", 50_000),
    "long keys, deep": "".join(f"{' ' * i}{'k' * 900}{i}:\n" for i in range(60)) + numbered(f"{' ' * 61}- #\n", 400_000),
    "chain of merges": "a0: &a0 {k0: 1}\n" + "".join(f"a{i}: &a{i} {{<<: *a{i - 1}, k{i}: 1}}\n" for i in range(1, 20_000)),
    "list of merges": "".join(f"a{i}: &a{i} {{k{i}: 1}}\n" for i in range(800))
        + f"b: {{<<: [{','.join(f'*a{i}' for i in range(800))}]}}\n",
    "merge of many keys": f"a: &a {{{numbered('k#: 1,', 15_000)}}}\n" + "".join(f"b{i}: {{<<: *a}}\n" for i in range(300)),
    "tags": numbered("a#: !!int '1'\n"),
    "tag of Python": "a: !!python/object/apply:os.system [id]\n",
    "long tag": f"a: !{filled('t')} x\n",
    "tabs": filled("\t"),
    "tabs before keys": "a:\n" + filled("\t b: 1\n"),
    "flow mapping": f"{{{numbered('k#: 1,')}}}\n",
    "empty lists": f"[{filled('[],')}]\n",
    "documents": filled("---\n"),
    "documents with content": filled("a: 1\n---\n"),
    "blocks of text": numbered("a#: |\n x\n"),
    "one key many times": filled("a: 1\n"),
    "escapes": f'a: "{filled(chr(92) + "x41")}"\n',
    "quote that is not closed": f'a: "{filled("x")}',
    "directives": filled("%a\n"),
    "comments": filled("#\n"),
    "astral text": f"a: {filled('😀', 200_000)}\n",
    "unknown sections": "training_config:\n" + numbered("  LoraConfg#: 1\n", 30_000),
    "unknown fields": "training_config:\n  TrainingArguments:\n" + numbered("    learning_rat#: 1\n", 40_000),
    "unknown modules": f"training_config:\n  LoraConfig:\n    target_modules: [{numbered('q_pro#,', 40_000)}]\n",
}  # fmt: skip

FLAGS: dict[str, str] = {
    "sexagesimal": f"vllm: {filled('1:')}1\n",
    "deep brackets": f"vllm: {'[' * 3000}{']' * 3000}\n",
    "unknown flags": "vllm:\n" + numbered("  max-model-le#: 1\n", 30_000),
    "unknown sections": numbered("vlm#: 1\n", 30_000),
}

ALL = [("training_config.yaml", t) for t in SETTINGS.values()] + [("inference_config.yaml", t) for t in FLAGS.values()]
NAMES = [*SETTINGS, *FLAGS]

COMMANDS = ("sexagesimal", "deep brackets", "long number", "long key", "unknown fields", "unknown flags")
"""Those that the commands read too: what is behind them is the same reader."""


@pytest.mark.parametrize("way", ["reader", "controller", "validate", "plan"])
def test_settings_are_read_or_refused_by_name_within_bounds(
    way: str, environment: dict[str, str], tmp_path: Path
) -> None:
    texts = [(n, t) for n, t in zip(NAMES, ALL, strict=True) if way in ("reader", "controller") or n in COMMANDS]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("hostile_entry_points.py")), way],
        input=json.dumps([t for _, t in texts]),
        text=True,
        capture_output=True,
        env=environment,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for (name, _), line in zip(texts, done.stdout.splitlines(), strict=True):
        found = json.loads(line)
        assert found["seconds"] < SECONDS, (name, found)
        assert found["mib"] < MIB, (name, found)
        assert "broke" not in found["said"], name  # no plugin is blamed for what a person wrote
        assert "Traceback" not in found["said"], name
        if way == "controller":
            assert found["said"].startswith("PlanRefused: "), (name, found)
        if way in ("validate", "plan"):
            assert found["said"].startswith("exit code 2: "), (name, found)


def test_what_is_wrong_with_settings_is_told_with_its_place_in_the_file(kaito: Kaito, tmp_path: Path) -> None:
    (tmp_path / "workspace.yaml").write_text(
        json.dumps({
            "apiVersion": "kaito.sh/v1beta1", "kind": "Workspace", "metadata": {"name": "one"},
            "resource": {"instanceType": "Standard_NC24ads_A100_v4"}, **WORKSPACES["training_config.yaml"],
        })
        + "\n---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: settings}\ndata:\n"
        "  training_config.yaml: |\n    training_config:\n      LoraConfig: {r: .inf}\n"
    )  # fmt: skip
    done = kaito("validate", "workspace.yaml")
    assert done.returncode == 2
    assert (
        "workspace.yaml:9:23: error: tuning.config: training_config.yaml of the ConfigMap 'settings' (line 2, column 19"
        in done.stdout
    )
    assert ".inf has no place in JSON" in done.stdout


READERS = {
    "kaito_core/src/kaito_core/api/yaml_source.py": "the reader",
    "kaito_core/src/kaito_core/cli/target.py": "the user's kubeconfig, of which the kubernetes client reads the rest in the same way",
    "kaito_core/src/kaito_core/install/__init__.py": "the chart and the definitions that are part of this package",
}
"""Who may load YAML, and what."""


def test_nobody_but_the_reader_loads_what_a_person_wrote() -> None:
    sources = [p for top in ("kaito_core/src", *ROOT.glob("plugins/*/src")) for p in (ROOT / top).rglob("*.py")]
    assert len(sources) > 200
    loading = {
        "load",
        "load_all",
        "safe_load",
        "safe_load_all",
        "full_load",
        "unsafe_load",
        "compose",
        "compose_all",
        "parse",
        "scan",
    }
    found = set()
    for path in sources:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            of_yaml = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "yaml"
            imported = isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ("yaml", "ruamel")
            if imported or (of_yaml and isinstance(node, ast.Attribute) and node.attr in loading):
                found.add(path.relative_to(ROOT).as_posix())
    assert found == set(READERS)
