"""Bad input gives one clear message with the remedy, exit code 2 for the user's mistakes and 1 for failures, and no traceback."""

from __future__ import annotations

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.conftest import EXAMPLES, Kaito, workspace

SEED_BLANKS = ("ACR_REPO_HERE.azurecr.io/IMAGE_NAME_HERE:0.0.1", "ACR_REGISTRY_SECRET_HERE")


def seed(folder: Path) -> Path:
    """KAITO's quick start as its readers find it, blanks and all."""
    text = (EXAMPLES / "kaito-quickstart.yaml").read_text(encoding="utf-8")
    text = text.replace("myregistry.azurecr.io/phi-3-dolly:0.0.1", SEED_BLANKS[0]).replace(
        "acr-push-secret", SEED_BLANKS[1]
    )
    path = folder / "quickstart.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_unfilled_quick_start_is_refused_in_words_that_say_just_that(kaito: Kaito, tmp_path: Path) -> None:
    answer = kaito("validate", seed(tmp_path))
    assert answer.returncode == 2
    assert "IMAGE_NAME_HERE" in answer.stdout + answer.stderr
    assert "placeholder" in answer.stdout + answer.stderr


def test_the_unfilled_quick_start_still_shows_its_plan(kaito: Kaito, tmp_path: Path) -> None:
    answer = kaito("plan", seed(tmp_path))
    assert "phi-3-mini-128k-instruct" in answer.stdout
    assert "Standard_NC6s_v3" in answer.stdout
    assert "peak" in answer.stdout


def test_the_filled_quick_start_is_accepted(kaito: Kaito) -> None:
    assert kaito("validate", EXAMPLES / "kaito-quickstart.yaml").returncode == 0


INFERENCE_SET = """apiVersion: kaito.sh/v1beta1
kind: InferenceSet
metadata:
  name: llm
spec:
  replicas: 2
  template:
    inference:
      preset:
        name: demo-phi-3
"""


def test_an_inference_set_is_checked_as_a_workspace_is(kaito: Kaito, tmp_path: Path) -> None:
    path = tmp_path / "set.yaml"
    path.write_text(INFERENCE_SET, encoding="utf-8")
    answer = kaito("validate", path)
    assert (answer.returncode, answer.stdout) == (0, "valid: llm\n")
    path.write_text(INFERENCE_SET.replace("demo-phi-3", "demo-phi-33"), encoding="utf-8")
    answer = kaito("validate", path)
    assert answer.returncode == 2
    assert (
        "set.yaml:10:15: error: spec.template.inference.preset.name: there is no preset 'demo-phi-33'" in answer.stdout
    )
    path.write_text(INFERENCE_SET.replace("replicas: 2", "replicas: -2"), encoding="utf-8")
    answer = kaito("validate", path)
    assert answer.returncode == 2
    assert "set.yaml:6:13: error: spec.replicas: must be 0 or more" in answer.stdout


@pytest.mark.parametrize("kind", ["apps/v1 Deployment", "kaito.sh/v1beta1 RAGEngine"])
def test_a_file_without_anything_to_check_is_not_valid(kaito: Kaito, tmp_path: Path, kind: str) -> None:
    version, name = kind.split()
    path = tmp_path / "other.yaml"
    path.write_text(f"apiVersion: {version}\nkind: {name}\nmetadata: {{name: a}}\n", encoding="utf-8")
    answer = kaito("validate", path)
    assert answer.returncode == 2
    assert "there is no Workspace" in answer.stdout
    assert "invalid: 1 error, 1 warning" in answer.stdout


@pytest.mark.parametrize("command", [["plan"], ["run", "--local", "--yes"]])
def test_a_command_that_takes_workspaces_says_that_it_leaves_a_set_out(
    kaito: Kaito, tmp_path: Path, command: list[str]
) -> None:
    path = tmp_path / "set.yaml"
    path.write_text(INFERENCE_SET, encoding="utf-8")
    answer = kaito(*command, path)
    assert answer.returncode == 2
    assert "set.yaml:2:7: error: kind: an InferenceSet is left out here: this command takes Workspaces" in answer.stderr


CASES = {
    # what is changed in a good workspace: (old, new, exit code, what the message says)
    "not YAML": ("tuning:", "tuning: [", 2, "workspace.yaml:"),
    "an unknown field": ("  method: qlora", "  metod: qlora", 2, "did you mean 'method'"),
    "an unknown preset": ("demo-phi-3", "demo-phi3", 2, "demo-phi-3"),
    "an unknown method": ("method: qlora", "method: dora", 2, "qlora"),
    "data that is not there": ("data.jsonl", "nothing.jsonl", 2, "nothing.jsonl"),
    "a ConfigMap that is not there": ("config: training", "config: trainin", 2, "trainin"),
    "a setting that does not exist": ("max_length: 128", "max_lenght: 128", 2, "max_length"),
    "a volume that only a cluster has": (
        "hostPath: {path: out}",
        "persistentVolumeClaim: {claimName: a}",
        2,
        "cluster",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_workspace(case: str, kaito: Kaito, tmp_path: Path) -> None:
    old, new, code, says = CASES[case]
    path = workspace(tmp_path)
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    answer = kaito("run", "--local", "--yes", path)
    assert answer.returncode == code, answer.stdout + answer.stderr
    assert says in answer.stderr
    assert "Traceback" not in answer.stderr


BAD_DATA = {
    "empty": ("", "empty"),
    "a row that is not JSON": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n{oops\n',
        "2",
    ),
    "a row of another form": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n{"messages": 3}\n',
        "2",
    ),
    "no row that an assistant answers": ('{"messages": [{"role": "user", "content": "a"}]}\n' * 20, "assistant"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_fails_in_the_check_and_names_file_and_row(case: str, kaito: Kaito, tmp_path: Path) -> None:
    """KAITO's defect 10: unreadable data is found on the GPU node. Here no training starts."""
    content, says = BAD_DATA[case]
    path = workspace(tmp_path)
    (tmp_path / "data.jsonl").write_text(content, encoding="utf-8")
    answer = kaito("run", "--local", "--yes", path)
    assert answer.returncode == 2, answer.stdout + answer.stderr
    assert "data.jsonl" in answer.stderr
    assert says in answer.stderr
    assert "Traceback" not in answer.stderr
    assert not (tmp_path / "home" / "runs" / "small" / "logs" / "train.log").exists()


NOT_TUNED = {
    # what the message says of each: presets that are served and not tuned, and one that nobody has
    "gemma-3-4b-instruct": "gemma-3-4b-instruct can be served and not tuned",
    "gpt-oss-20b": "gpt-oss-20b can be served and not tuned",
    "falcon-7b": "there is no preset 'falcon-7b'",
}


@pytest.mark.parametrize("name", NOT_TUNED)
def test_a_model_that_cannot_be_tuned_is_refused_before_anything_else_happens(
    name: str, kaito: Kaito, tmp_path: Path
) -> None:
    """KAITO's defects 3 and 4: such presets pass its webhook, machines are bought, and its controller then panics."""
    path = workspace(tmp_path)
    path.write_text(path.read_text(encoding="utf-8").replace("demo-phi-3", name), encoding="utf-8")
    for command in (["validate"], ["plan", "--local"], ["run", "--local", "--yes"]):
        answer = kaito(*command, path)
        assert answer.returncode == 2
        assert f"tuning.preset.name: {NOT_TUNED[name]}" in answer.stdout + answer.stderr
        assert "Traceback" not in answer.stderr
    assert not (tmp_path / "home").exists()


def test_qlora_in_mixed_case_is_qlora(kaito: Kaito, tmp_path: Path) -> None:
    """KAITO's defect 6: `QLoRA` passes its webhook, and the controller then loops on an empty ConfigMap name."""
    answer = kaito("plan", "--local", workspace(tmp_path, method="QLoRA"))
    assert answer.returncode == 0, answer.stderr
    assert "with qlora" in answer.stdout


def test_all_problems_at_once(kaito: Kaito, tmp_path: Path) -> None:
    path = workspace(tmp_path)
    text = (
        path.read_text(encoding="utf-8")
        .replace("  method: qlora", "  method: qlora\n  colour: red")
        .replace("name: small", "name: Small_")
    )
    path.write_text(text, encoding="utf-8")
    answer = kaito("validate", path)
    assert answer.returncode == 2
    said = answer.stdout + answer.stderr
    assert "colour" in said
    assert "Small_" in said


def test_a_plugin_that_is_left_out_is_named(kaito: Kaito) -> None:
    answer = kaito("plan", EXAMPLES / "kaito-quickstart.yaml", KAITO_PLUGINS="tuner-qlora")
    assert answer.returncode == 2
    assert "kaito-preset-phi3" in answer.stderr
    assert "KAITO_PLUGINS" in answer.stderr


def test_no_such_run(kaito: Kaito) -> None:
    for command in ("status", "logs", "push"):
        answer = kaito(command, "nobody")
        assert answer.returncode == 2
        assert "no run named 'nobody'" in answer.stderr


def test_a_full_disk_is_one_clear_message(kaito: Kaito, tmp_path: Path) -> None:
    path = workspace(tmp_path)
    (tmp_path / "home").write_text("a file where kaito wants a folder", encoding="utf-8")
    answer = kaito("run", "--local", "--yes", path)
    assert answer.returncode == 1
    assert "Traceback" not in answer.stderr
    assert str(tmp_path / "home") in answer.stderr


def test_data_from_a_private_address_is_refused_unless_allowed(kaito: Kaito, tmp_path: Path) -> None:
    path = workspace(tmp_path)
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "rows.jsonl").write_text('{"messages": 3}\n', encoding="utf-8")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/rows.jsonl"
        path.write_text(path.read_text(encoding="utf-8").replace("data.jsonl", url), encoding="utf-8")
        refused = kaito("run", "--local", "--yes", path)
        allowed = kaito("run", "--local", "--yes", path, KAITO_ALLOW_PRIVATE_ADDRESSES="1")
        server.shutdown()
    assert refused.returncode == 2
    assert "KAITO_ALLOW_PRIVATE_ADDRESSES" in refused.stderr
    assert allowed.returncode == 2
    assert "rows.jsonl: error: row 1" in allowed.stderr
