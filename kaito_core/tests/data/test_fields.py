"""Nothing that a person wrote is dropped without a word: a field is used, harmless, listed in the report, or refused by name."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from kaito_core.cli.data import command
from kaito_core.data.fields import HARMLESS, LISTED_FIELDS, MEANINGS, is_absent, is_harmless, meaning_of, shown
from kaito_core.data.formats import PAIRS, Conversation, Text, samples
from kaito_core.data.prepare import REPORT, prepare
from kaito_core.data.rows import Row, read_rows
from kaito_core.plugins.types import Preset
from kaito_core.problems import UserError

ASK, SAY = {"role": "user", "content": "the question"}, {"role": "assistant", "content": "the answer"}
CHAT = [ASK, SAY]
FORMATS: Mapping[str, dict[str, Any]] = {
    "messages": {"messages": CHAT},
    "sharegpt": {"conversations": [{"from": "human", "value": "the question"}, {"from": "gpt", "value": "the answer"}]},
    "alpaca": {"instruction": "the question", "output": "the answer"},
    "prompt/completion": {"prompt": "the question", "completion": "the answer"},
    "question/answer": {"question": "the question", "answer": "the answer"},
    "lists": {"prompt": [ASK], "completion": [SAY]},
    "text": {"text": "some words"},
}
CONVERSATIONS = [name for name in FORMATS if name != "text"]
PAIR_FORMATS = ["alpaca", "prompt/completion", "question/answer"]
TOOL = [{"type": "function", "function": {"name": "f"}}]
REFUSED_ANYWHERE: Mapping[str, Any] = {
    "weight": 0, "sample_weight": 0.5, "weights": [1, 0], "train": False, "loss": False, "mask": [0, 1], "mask ": "User",
    "loss_mask": [1, 0], "ignore": True, "tools": TOOL, "Tools": json.dumps(TOOL), "functions": TOOL, "tool_choice": "auto",
    "toolCalls": TOOL, "tool_call_id": "x", "function_call": {"name": "f"}, "images": ["a.png"], "image": b"\x89PNG",
    "image_url": {"url": "x"}, "audio": {"path": "a.wav"}, "videos": ["v.mp4"], "history": [["earlier", "said"]],
    "reasoning_content": "hm", "thinking": "hm", "reasoning": "hm", "chain_of_thought": "hm", "label": 0, "labels": [-100, 5],
    "kto_tag": False, "input_ids": [1, 2], "chat_template_kwargs": {"enable_thinking": False}, "refusal": "I cannot",
    "contexts": ["more"], "documents": [{"text": "more"}], "passage": "more",
}  # fmt: skip
NEUTRAL: Mapping[str, list[Any]] = {
    "weight": [1, 1.0, True, "1", [1, 1]], "train": [True, 1, "true"], "loss": [True], "loss_mask": [[1, 1]], "ignore": [False, 0],
    "tools": ["[]", "null", False, [{}]], "tool_calls": [[]], "images": [[None]], "history": [[["", ""]]], "attention_mask": [[1]],
    "thinking": [False, " "], "system": ["None"], "label": [None], "title": [{}, {"a": None}],
}  # fmt: skip
NOTHING = (None, "", [], {}, float("nan"))


def outcome(*rows: dict[str, Any], config: Mapping[str, Any] | None = None) -> tuple[str, Any]:
    """("refused", its words), or ("read", (what was made of the rows, the columns not used))."""
    found, read = samples([Row("f.jsonl", n, r) for n, r in enumerate(rows, 1)], config or {})
    try:
        made = [s.text if isinstance(s, Text) else [(m.role, m.content) for m in s.messages] for _, s in read]
    except UserError as e:
        assert all(p.remedy and p.file == "f.jsonl" for p in e.problems)
        return "refused", str(e)
    return "read", (made, list(found.unused))


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("name", REFUSED_ANYWHERE)
def test_a_column_that_would_teach_something_else_is_refused_by_name(format_: str, name: str) -> None:
    row = FORMATS[format_]
    verdict, words = outcome(row, {**row, name: REFUSED_ANYWHERE[name]}, {**row, name: REFUSED_ANYWHERE[name]})
    assert verdict == "refused"
    assert f"`{name}` holds" in words
    assert "row 2 and 1 more" in words, "said once a file, not once a row"


@pytest.mark.parametrize("name", REFUSED_ANYWHERE)
def test_a_key_of_a_message_that_would_teach_something_else_is_refused_by_name(name: str) -> None:
    value = REFUSED_ANYWHERE[name]
    for row, place in (
        ({"messages": [ASK, {**SAY, name: value}]}, f"messages[].{name}"),
        ({"conversations": [ASK, {"from": "gpt", "value": "a", name: value}]}, f"conversations[].{name}"),
        ({"prompt": [ASK], "completion": [{**SAY, name: value}]}, f"completion[].{name}"),
        ({"messages": [ASK, {"role": "assistant", "content": [{"type": "text", "text": "a", name: value}]}]}, f"messages[].content[].{name}"),
        ({"messages": json.dumps([ASK, {**SAY, name: value if not isinstance(value, bytes) else "x"}])}, f"messages[].{name}"),
    ):  # fmt: skip
        verdict, words = outcome(row)
        assert verdict == "refused"
        assert f"`{place}` holds" in words


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("name", [*NEUTRAL, *REFUSED_ANYWHERE, "system", "chosen", "answer", "anything"])
def test_what_says_nothing_is_as_absent(format_: str, name: str) -> None:
    row = FORMATS[format_]
    if name in row:
        return
    plain = outcome(row)
    for value in (*NOTHING, *NEUTRAL.get(name, [])):
        assert outcome({**row, name: value}) == plain, value
        if "messages" in row:
            assert outcome({"messages": [ASK, {**SAY, name: value}]}) == plain, value


@pytest.mark.parametrize(
    ("key", "value", "listed"),
    [("weight", 0, True), ("weight", 1, False), ("train", False, True), ("train", True, True)],
)
def test_flags_on_a_question_which_is_never_trained_are_said(key: str, value: Any, listed: bool) -> None:
    spoken = [("user", "the question"), ("assistant", "the answer")]
    assert outcome({"messages": [{**ASK, key: value}, SAY]}) == ("read", ([spoken], [f"messages[].{key}"] * listed))


@pytest.mark.parametrize("format_", CONVERSATIONS)
@pytest.mark.parametrize("name", ["system", "system_prompt", "System", "system_message"])
def test_a_system_column_is_the_system_turn(format_: str, name: str) -> None:
    row = FORMATS[format_]
    spoken = [("user", "the question"), ("assistant", "the answer")]
    assert outcome(*[row] * 30, {**row, name: "be kind"}) == (
        "read",
        ([*[spoken] * 30, [("system", "be kind"), *spoken]], []),
    )
    if "messages" in row:
        named = {"messages_column": "messages", "system_column": "persona"}
        assert outcome({**row, "persona": "be kind"}, config=named) == (
            "read",
            ([[("system", "be kind"), *spoken]], []),
        )
        assert outcome({**row, "persona": "be kind"}, config={"system_column": "persona"})[0] == "read"


def test_two_different_system_texts_are_an_error_and_equal_ones_are_not() -> None:
    said = {"role": "system", "content": "be kind"}
    spoken = [("system", "be kind"), ("user", "the question"), ("assistant", "the answer")]
    for same in ({"messages": [said, *CHAT], "system": "be kind"}, {"messages": [said, said, *CHAT]},
                 {"messages": CHAT, "system": "be kind", "system_prompt": "be kind"},
                 {"question": "the question", "answer": "the answer", "system": "be kind", "system_prompt": "be kind"}):  # fmt: skip
        assert outcome(same) == ("read", ([spoken], []))
    for two in ({"messages": [said, *CHAT], "system": "be rude"}, {"messages": CHAT, "system": "a", "system_prompt": "b"},
                {"prompt": "q", "completion": "a", "system": "a", "system_prompt": "b"},
                {"prompt": [said, ASK], "completion": [SAY], "system": "be rude"}):  # fmt: skip
        verdict, words = outcome(two)
        assert verdict == "refused"
        assert "two different system prompts" in words
    assert "`system` holds system prompts" in outcome({"text": "words", "system": "be kind"})[1]


@pytest.mark.parametrize(("prompt", "response"), PAIRS)
def test_a_context_beside_any_question_is_in_the_prompt_or_refused(prompt: str, response: str) -> None:
    row = {prompt: "the question", response: "the answer"}
    for name in {"input", "context"} - {prompt}:
        assert outcome(row, {**row, name: "more"})[1][0][1] == [
            ("user", "the question\n\nmore"),
            ("assistant", "the answer"),
        ]
    assert "`choices` holds contexts" in outcome({**row, "choices": ["a", "b"]})[1]
    if prompt != "input":
        assert "`context` holds contexts" in outcome({**row, "input": "more", "context": "and more"})[1]
    assert "`context` holds contexts" in outcome({"prompt": [ASK], "completion": [SAY], "context": "more"})[1]
    assert "`context` holds contexts" in outcome({"messages": CHAT, "context": "more"})[1]
    assert "expected a text" in outcome({**row, "context": ["more"]})[1]


def test_a_second_question_is_refused_unless_it_says_the_same() -> None:
    assert "`instruction` holds questions" in outcome({"instruction": "be brief", "question": "q", "answer": "a"})[1]
    assert "`query` holds questions" in outcome({"prompt": "Translate", "query": "Haus", "response": "house"})[1]
    assert "`answer` holds answers" in outcome({"text": "words", "answer": "a"})[1]
    rendered = {"instruction": "Why?", "output": "So.", "prompt": "### Instruction: Why? ### Response: So."}
    assert outcome(rendered)[1][1] == ["prompt"]
    assert outcome({"text": "Why? So.", "prompt": "Why?"})[1][1] == ["prompt"]


def test_preferences_are_not_used_beside_an_answer_and_are_named_without() -> None:
    assert outcome({"messages": CHAT, "chosen": CHAT, "rejected": CHAT, "prompt": "the question"})[1][1] == [
        "chosen",
        "rejected",
        "prompt",
    ]
    for alone in ({"prompt": "q", "chosen": "a", "rejected": "b"}, {"chosen": CHAT, "rejected": CHAT}):
        assert "preference data (`chosen`, `rejected`)" in outcome(alone)[1]
    assert "`chosen` holds preferences" in outcome({"text": "t", "chosen": "a", "rejected": "b"})[1]


def test_two_words_for_one_thing_in_a_message_must_agree() -> None:
    assert outcome({"messages": [ASK, {**SAY, "value": "another"}]})[0] == "refused"
    assert outcome({"messages": [ASK, {**SAY, "from": "human"}]})[0] == "refused"
    merged = {
        "messages": [
            {**ASK, "from": None, "value": ""},
            {"role": None, "content": None, "from": "gpt", "value": "the answer"},
        ]
    }
    assert outcome(merged) == outcome({"messages": CHAT})


HELD = st.one_of(st.integers(), st.booleans(), st.text(min_size=1).filter(str.strip), st.just([0]), st.just({"a": "x"}))
UNKNOWN = st.text(min_size=1, max_size=30).filter(
    lambda n: (
        not is_harmless(n) and meaning_of(n) is None and n not in ("messages", "conversations", "conversation", "text")
    )
)


@given(st.sampled_from(sorted(FORMATS)), UNKNOWN, HELD, st.integers(0, 30), st.integers(0, 3))
def test_an_unknown_field_that_holds_something_is_always_listed(
    format_: str, name: str, value: Any, before: int, behind: int
) -> None:
    row = FORMATS[format_]
    verdict, (made, unused) = outcome(*[{**row, name: None}] * before, {**row, name: value}, *[row] * behind)
    assert (verdict, len(made), unused) == ("read", before + 1 + behind, [shown(name)])
    if "messages" in row and name not in ("role", "from", "content", "value"):
        assert outcome({"messages": [ASK, {**SAY, name: value}]})[1][1] == [shown(f"messages[].{name}")]


@given(st.sampled_from(sorted(FORMATS)), st.sampled_from(sorted(n for m in MEANINGS for n in m.names)), HELD)
def test_a_known_field_is_never_dropped_in_silence(format_: str, name: str, value: Any) -> None:
    row = FORMATS[format_]
    plain = outcome(row)
    if name not in row and outcome({**row, name: value}) == plain:
        assert is_absent(value, meaning_of(name))


def test_many_names_do_not_fill_the_memory() -> None:
    _, (_, unused) = outcome(*({"text": "t", f"column {n}": 1} for n in range(1000)))
    assert len(unused) == LISTED_FIELDS + 1
    assert unused[-1] == "… and others"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"messages_column": "messages", "prompt_column": "q"}, "messages_column and prompt_column exclude each other"),
        (
            {"messages_column": "messages", "context_column": "q"},
            "messages_column and context_column exclude each other",
        ),
        (
            {"messages_column": "messages", "response_column": "a"},
            "messages_column and response_column exclude each other",
        ),
        ({"prompt_column": "q", "response_column": "q"}, "both name 'q'"),
        ({"messages_column": "q", "system_column": "q"}, "both name 'q'"),
        ({"response_column": "a", "system_column": "s"}, "plain text, which has none"),
        ({"system_column": "absent"}, "names `absent`"),
        ({"prompt_column": "q", "response_column": "a", "context_column": "absent"}, "names `absent`"),
        ({"response_column": "a"}, "`q` holds|`question` holds"),
    ],
)
def test_columns_that_are_named_are_used_or_refused(config: dict[str, str], words: str) -> None:
    row = {"messages": CHAT, "q": "q", "a": "a", "s": "s", "question": "unlike"}
    with pytest.raises(UserError, match=words):
        list(samples([Row("f.jsonl", 1, row)], config)[1])


def test_kaitos_own_default_and_a_null_column_are_no_contradiction() -> None:
    config = {"messages_column": "messages", "response_column": "text", "system_column": "s"}
    assert outcome({"messages": CHAT, "s": None}, config=config)[0] == "read"
    assert outcome({"text": "t"}, config={"system_column": "s"})[0] == "refused"


def as_jsonl(row: dict[str, Any]) -> bytes:
    return json.dumps(row).encode() + b"\n"


def as_csv(row: dict[str, Any]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerows([row.keys(), [v if isinstance(v, str) else json.dumps(v) for v in row.values()]])
    return text.getvalue().encode()


def as_parquet(row: dict[str, Any]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([row]), sink)
    return sink.getvalue()


def as_arrow(row: dict[str, Any]) -> bytes:
    import pyarrow as pa

    table, sink = pa.Table.from_pylist([row]), io.BytesIO()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("ending", "written"),
    [("jsonl", as_jsonl), ("json", as_jsonl), ("csv", as_csv), ("parquet", as_parquet), ("arrow", as_arrow)],
)
def test_every_kind_of_file_says_the_same(
    tmp_path: Path, ending: str, written: Callable[[dict[str, Any]], bytes]
) -> None:
    def verdict(row: dict[str, Any]) -> str:
        path = tmp_path / f"data.{ending}"
        path.write_bytes(written(row))
        found, read = samples(read_rows([path]), {})
        try:
            return f"{[type(s) for _, s in read] == [Conversation]} {list(found.unused)}"
        except UserError as e:
            return str(e)

    row = {"messages": [ASK, SAY], "id": 7, "tools": None, "images": []}
    assert verdict(row) == "True []"
    assert verdict({**row, "topic": "x"}) == "True ['topic']"
    assert "`tools` holds" in verdict({**row, "tools": TOOL})
    assert "`messages[].weight` holds" in verdict({**row, "messages": [ASK, {**SAY, "weight": 0}]})


def test_what_stands_beside_the_rows_of_a_json_document_belongs_to_them(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"version": 1, "tools": TOOL, "mood": "x", "data": [FORMATS["question/answer"]]}))
    with pytest.raises(UserError, match="`tools` holds"):
        list(samples(read_rows([path]), {})[1])


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_name_that_stands_twice_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    double = '[{"role": "user", "role": "assistant", "content": "x"}]'
    path.write_text(
        "messages\n" + '"' + double.replace('"', '""') + '"' if name == "a.csv" else f'{{"messages": {double}}}'
    )
    with pytest.raises(UserError, match="'role' stands twice"):
        list(samples(read_rows([path]), {})[1])


@pytest.mark.parametrize("depth", [60, 500, 900, 980, 100_000])
@pytest.mark.parametrize(
    "message", ['{"role": %s}', '{"role": %s, "from": %s}', '{"role": "user", "content": [{"type": %s}]}']
)
def test_a_deeply_nested_role_is_an_error_and_no_traceback(message: str, depth: int) -> None:
    text = "[" + message.replace("%s", "[" * depth + "0" + "]" * depth) + "]"
    assert outcome({"messages": text})[0] == "refused"


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_deep_nesting_is_an_error_and_no_traceback(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    for depth in (60, 500, 900, 990, 100_000):
        deep = "[" * depth + "0" + "]" * depth
        path.write_text(f'messages\n"{deep}"\n' if ending == "csv" else f'{{"text": "t", "other": {deep}}}\n')
        found, read = samples(read_rows([path]), {})
        try:
            list(read)
            assert list(found.unused) == ["other"]
        except UserError as e:
            assert "nested too deeply" in str(e) or "expected an object" in str(e)


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "When?", "context": "", "response": "Then.", "category": "open_qa"},
        {"instruction": "When?", "context": "It was in May.", "response": "Then.", "category": "open_qa"},
        {"messages": [{"role": "system", "content": "s"}, *CHAT]},
        {"instruction": "q", "input": "", "output": "a", "text": "Below is q a"},
        {"id": "x", "system_prompt": "", "question": "q", "response": "a", "answer": "a"},
        {"prompt": "the question", "prompt_id": "1", "messages": CHAT},
    ],
)
def test_data_sets_that_people_know_are_read(row: dict[str, Any]) -> None:
    assert outcome(row)[0] == "read"


def test_the_report_lists_the_columns_wherever_it_is_shown(
    tmp_path: Path, model_folder: Path, preset: Preset, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q {n}", "completion": f"a {n}", "id": n, "mood": None, "\x1b[2J\ud800": 1}) + "\n"
                            for n in range(20)) + json.dumps({"prompt": "q", "completion": "a", "mood": "glad"}))  # fmt: skip
    report = prepare([path], preset, model_folder, {}, tmp_path / "out").report
    assert report.columns_not_used == ("�[2J�", "mood")
    assert json.loads((tmp_path / "out" / REPORT).read_text())["columns_not_used"] == ["�[2J�", "mood"]
    assert "columns not used: �[2J�, mood" in report.lines()

    class Plugins:
        def preset(self, name: str, field: str) -> Preset:
            return preset

    monkeypatch.setattr("kaito_core.plugins.manager.load_plugins", Plugins)
    given = ["check", str(path), "--preset", "x", "--model-folder", str(model_folder)]
    shown_to_people = CliRunner().invoke(command, given)
    assert "columns not used: �[2J�, mood" in shown_to_people.output
    assert shown_to_people.exit_code == 0
    assert json.loads(CliRunner().invoke(command, [*given, "--json"]).output)["columns_not_used"] == ["�[2J�", "mood"]
    path.write_text(json.dumps({"messages": [ASK, {**SAY, "weight": 0}]}))
    refused = CliRunner().invoke(command, [*given, "--json"])
    assert (refused.exit_code, json.loads(refused.output)["ok"]) == (2, False)


def test_the_harmless_ones_are_few_and_known() -> None:
    assert len(HARMLESS) < 25
    assert not any(meaning_of(n) for n in HARMLESS)
    for name in ("id", "_id", "__index_level_0__", "Unnamed: 0", "", "prompt_id", "source", "timestamp"):
        assert is_harmless(name)
