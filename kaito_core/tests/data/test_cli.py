"""`kaito data check`, as a person and as a program uses it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kaito_core import cli
from kaito_core.plugins.types import Preset
from kaito_core.problems import UserError

ROWS = [{"prompt": f"What is {i}?", "completion": f"The answer {i}."} for i in range(12)]


@pytest.fixture
def kaito(
    preset_with: Callable[..., Preset],
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> Callable[..., tuple[int, str, str]]:
    class Plugins:
        def preset(self, name: str, *, field: str = "") -> Preset:
            if name != "tiny-phi3":
                raise UserError(f"no preset {name}", field=field)
            return preset_with()

        def commands(self) -> dict[str, Any]:
            return {}

    monkeypatch.setattr("kaito_core.plugins.manager.load_plugins", Plugins)
    monkeypatch.setenv("KAITO_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KAITO_ALLOW_PRIVATE_ADDRESSES", "1")

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as e:
            cli.main(["data", "check", *arguments, "--preset", "tiny-phi3", "--model-folder", str(model_folder)])
        out, err = capsys.readouterr()
        return int(e.value.code or 0), out, err

    return run


@pytest.fixture
def good(tmp_path: Path) -> str:
    (tmp_path / "good.json").write_text(json.dumps(ROWS))
    return str(tmp_path / "good.json")


def test_good_data_is_shown_and_exits_0(kaito: Any, good: str) -> None:
    code, out, _ = kaito(good)
    assert code == 0
    assert "rows             12: all for training" in out
    assert "⟦The answer 0.<|end|>⟧" in out
    assert "this data can be trained on" in out
    assert "\x1b" not in out


def test_json_is_one_object(kaito: Any, good: str) -> None:
    code, out, _ = kaito(good, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["ok"] is True
    assert found["rows"] == 12
    assert found["digest"].startswith("sha256:")


def test_a_url_is_checked_too(kaito: Any, server: Any) -> None:
    server.files["/a.json"] = json.dumps(ROWS).encode()
    code, out, _ = kaito(f"{server.url}/a.json?x=1", "--json")
    assert (code, json.loads(out)["rows"]) == (0, 12)


def test_data_that_would_be_wasted_exits_2_with_the_report(kaito: Any, good: str) -> None:
    code, out, _ = kaito(good, "--max-length", "4")
    assert code == 2
    assert "nothing would be trained" in out
    code, out, _ = kaito(good, "--max-length", "4", "--json")
    assert (code, json.loads(out)["ok"]) == (2, False)


def test_unreadable_data_exits_2_without_a_traceback(kaito: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{}\nnope\n")
    code, out, err = kaito(str(tmp_path / "bad.jsonl"))
    assert code == 2
    assert "bad.jsonl: error: row 2: not JSON" in out + err
    code, out, _ = kaito(str(tmp_path / "none.jsonl"), "--json")
    assert code == 2
    assert "no such file" in json.loads(out)["problems"][0]["message"]


def test_control_characters_of_the_data_are_not_obeyed(kaito: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "\x1b[31mred", "completion": "\x07bell [bold]x[/bold]"}] * 12
    (tmp_path / "a.json").write_text(json.dumps(rows))
    _, out, _ = kaito(str(tmp_path / "a.json"))
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "[bold]x[/bold]" in out
