"""``kaito validate``, ``kaito crd`` and the reference."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from click.testing import CliRunner

from kaito_core.api.reference import markdown
from kaito_core.cli.crd import command as crd
from kaito_core.cli.validate import command as validate

QUICKSTART = Path(__file__).parent / "data" / "quickstart.yaml"


def test_validate_prints_clickable_lines_and_fails_with_2() -> None:
    result = CliRunner().invoke(validate, [str(QUICKSTART)])
    assert result.exit_code == 2
    assert f"{QUICKSTART}:18:12: error: tuning.output.image: still holds the placeholders" in result.output
    assert result.output.splitlines()[-1] == "invalid: 2 errors"


def test_validate_reads_standard_input_and_speaks_json() -> None:
    text = QUICKSTART.read_text().replace("ACR_REPO_HERE.azurecr.io/IMAGE_NAME_HERE", "r.example.com/a")
    text = text.replace("ACR_REGISTRY_SECRET_HERE", "acr-secret")
    result = CliRunner().invoke(validate, ["-", "--json"], input=text)
    assert result.exit_code == 0
    report = json.loads(result.output)
    assert report["valid"] is True
    assert report["workspaces"][0]["name"] == "workspace-tuning-phi-3"
    assert report["workspaces"][0]["tasks"] == ["tuning"]


def test_a_file_without_a_workspace_is_not_valid(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: c}\n")
    result = CliRunner().invoke(validate, [str(tmp_path / "c.yaml")])
    assert result.exit_code == 2
    assert "there is no Workspace" in result.output


def test_crd_prints_yaml() -> None:
    result = CliRunner().invoke(crd)
    assert result.exit_code == 0
    names = [d["metadata"]["name"] for d in yaml.safe_load_all(result.output)]
    assert names == ["workspaces.kaito.sh", "inferencesets.kaito.sh"]


def test_the_reference_names_every_field_with_its_meaning() -> None:
    text = markdown()
    for field in (
        "resource.instanceType",
        "tuning.input.urls",
        "inference.adapters[].strength",
        "status.progress.loss",
    ):
        assert f"| `{field}` |" in text
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert all(row.split(" | ")[3].strip() for row in rows), "each has a meaning"
