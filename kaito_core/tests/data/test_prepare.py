"""The data doctor and what the trainer gets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaito_core.data.doctor import BadData
from kaito_core.data.prepare import EVAL, REPORT, TRAIN, digest_files, prepare
from kaito_core.data.prepared import PreparedFile, write_examples
from kaito_core.data.tokens import ChatTokenizer, Example
from kaito_core.plugins.types import Preset
from kaito_core.problems import Failure, UserError


def data(tmp_path: Path, answers: list[str], name: str = "train.jsonl", ask: str = "What is {}?") -> Path:
    rows = [
        {"messages": [{"role": "user", "content": ask.format(i)}, {"role": "assistant", "content": a}]}
        for i, a in enumerate(answers)
    ]
    path = tmp_path / name
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


TWENTY = [f"The answer number {i} depends on the data." for i in range(20)]


def test_data_becomes_examples_and_facts(tmp_path: Path, model_folder: Path, preset: Preset) -> None:
    file = data(tmp_path, TWENTY)
    done = prepare([file], preset, model_folder, {}, tmp_path / "out")
    train = PreparedFile(tmp_path / "out" / TRAIN)
    assert done.train == tmp_path / "out" / TRAIN
    assert done.eval is None
    assert not (tmp_path / "out" / EVAL).exists()
    assert done.facts.rows == done.facts.sequences == len(train) == 20
    assert done.facts.tokens == sum(train.lengths) == sum(len(e.input_ids) for e in train)
    assert done.facts.trained_tokens == sum(e.trained_tokens for e in train)
    assert done.facts.longest == max(train.lengths)
    assert done.facts.format == "messages"
    assert done.facts.digest == digest_files([file]) == train.metadata["digest"]
    assert done.report.ok
    assert json.loads((tmp_path / "out" / REPORT).read_text())["rows"] == 20


def test_the_data_is_rendered_with_the_template_that_the_configuration_asks_for(
    tmp_path: Path, model_folder: Path, preset: Preset
) -> None:
    """The same template is pinned in the adapter: trained with one and served with another, a model answers nonsense."""
    file = data(tmp_path, TWENTY)
    plain = prepare([file], preset, model_folder, {}).facts.tokens
    longer = "Somebody is asking a question now. " + preset.chat.template
    assert prepare([file], preset, model_folder, {"ModelConfig": {"chat_template": longer}}).facts.tokens > plain
    (tmp_path / "mine.jinja").write_text(longer, encoding="utf-8")
    with pytest.raises(UserError, match="the chat template"):  # a file is never read
        prepare([file], preset, model_folder, {"ModelConfig": {"chat_template": str(tmp_path / "mine.jinja")}})


def test_a_look_without_a_folder_gives_the_same_facts(tmp_path: Path, model_folder: Path, preset: Preset) -> None:
    file = data(tmp_path, TWENTY)
    assert (
        prepare([file], preset, model_folder, {}).facts
        == prepare([file], preset, model_folder, {}, tmp_path / "o").facts
    )


def test_packing_is_counted(tmp_path: Path, model_folder: Path, preset: Preset) -> None:
    config = {"TrainingArguments": {"packing": True, "max_length": 256}}
    facts = prepare([data(tmp_path, TWENTY)], preset, model_folder, config).facts
    assert facts.tokens / 256 <= facts.sequences < 20


def test_all_files_are_used(tmp_path: Path, model_folder: Path, preset: Preset) -> None:
    """KAITO uses one of several files (defect 14)."""
    files = [data(tmp_path, TWENTY[:12], "a.jsonl"), data(tmp_path, TWENTY[12:], "b.jsonl", "Why {}?")]
    assert prepare(files, preset, model_folder, {}).facts.rows == 20
    assert prepare([tmp_path], preset, model_folder, {}).facts == prepare(files, preset, model_folder, {}).facts


def test_the_split_is_a_share_is_stable_and_keeps_equal_rows_together(
    tmp_path: Path, model_folder: Path, preset: Preset
) -> None:
    rows = [{"prompt": f"q{i % 10}", "completion": f"a{i % 10}"} for i in range(40)]
    file = tmp_path / "a.json"
    file.write_text(json.dumps(rows))
    config = {"DatasetConfig": {"train_test_split": 0.8}}
    done = prepare([file], preset, model_folder, config, tmp_path / "out")
    train, held_out = (PreparedFile(tmp_path / "out" / n) for n in (TRAIN, EVAL))
    assert (len(train), len(held_out)) == (32, 8)
    assert not {tuple(e.input_ids) for e in train} & {tuple(e.input_ids) for e in held_out}
    assert done.facts.rows == 32
    again = prepare([file], preset, model_folder, config, tmp_path / "again")
    assert (tmp_path / "again" / TRAIN).read_bytes() == (tmp_path / "out" / TRAIN).read_bytes()
    assert again.facts == done.facts
    prepare([file], preset, model_folder, {}, tmp_path / "out")
    assert not (tmp_path / "out" / EVAL).exists(), "an evaluation part of an earlier preparation must not stay"


def test_nothing_trained_is_an_error(tmp_path: Path, model_folder: Path, preset_with: Callable[..., Preset]) -> None:
    """The silent failure of other trainers: all labels masked, loss 0.0 (peers, A.3 no. 2)."""
    nothing = preset_with(
        "{% for m in messages %}{{ m.content }}{% if false %}{% generation %}{% endgeneration %}{% endif %}{% endfor %}"
    )
    with pytest.raises(BadData, match="nothing would be trained: no row has a token that the assistant says"):
        prepare([data(tmp_path, TWENTY)], nothing, model_folder, {}, tmp_path / "out")
    assert not (tmp_path / "out" / TRAIN).exists()
    assert (tmp_path / "out" / REPORT).exists()


def test_a_stop_token_that_is_never_trained_is_an_error(
    tmp_path: Path, model_folder: Path, preset_with: Callable[..., Preset]
) -> None:
    """The model would never stop answering (peers, A.3 no. 3)."""
    endless = preset_with(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    with pytest.raises(
        BadData, match=r"stop token <\|end\|> or <\|endoftext\|> is never trained: the chat template does not"
    ):
        prepare([data(tmp_path, TWENTY)], endless, model_folder, {})


def test_answers_that_are_all_cut_are_told_apart(tmp_path: Path, model_folder: Path, preset: Preset) -> None:
    file = data(tmp_path, [t * 20 for t in TWENTY])
    with pytest.raises(BadData, match=r"never trained: every row is cut at max_length \(64 tokens\)"):
        prepare([file], preset, model_folder, {"TrainingArguments": {"max_length": 64}})
    with pytest.raises(BadData, match="nothing would be trained: every answer begins behind max_length"):
        prepare([file], preset, model_folder, {"TrainingArguments": {"max_length": 4}})


def test_warnings_name_what_is_odd(tmp_path: Path, model_folder: Path, preset: Preset) -> None:
    answers = ["same"] * 3 + ["", "long " * 200, "with <|end|> inside"]
    report = prepare(
        [data(tmp_path, answers, ask="Why?")], preset, model_folder, {"TrainingArguments": {"max_length": 100}}
    ).report
    assert (report.rows, report.duplicates, report.empty_answers, report.truncated, report.control_tokens) == (
        6,
        2,
        1,
        1,
        1,
    )
    assert report.differing_answers == 1
    words = " ".join(p.message for p in report.problems)
    for part in (
        "only 6 rows",
        "1 of 6 rows are cut",
        "2 of 6 rows repeat",
        "1 rows have an empty answer",
        "special token",
    ):
        assert part in words
    assert {p.severity for p in report.problems} == {"warning"}


def test_rows_with_nothing_to_train_are_left_out_and_counted(
    tmp_path: Path, model_folder: Path, preset: Preset
) -> None:
    file = data(tmp_path, TWENTY)
    long = {"messages": [{"role": "user", "content": "long " * 300}, {"role": "assistant", "content": "a"}]}
    file.write_text(file.read_text() + json.dumps(long) + "\n")
    done = prepare([file], preset, model_folder, {"TrainingArguments": {"max_length": 200}})
    assert (done.report.rows, done.report.dropped, done.facts.rows) == (21, 1, 20)
    assert done.facts.longest > 300


def test_the_sample_shows_what_is_trained(tmp_path: Path, model_folder: Path, preset: Preset) -> None:
    report = prepare([data(tmp_path, TWENTY)], preset, model_folder, {}).report
    assert report.sample_text() == (
        "<|user|>\nWhat is 0?<|end|>\n<|assistant|>\n⟦The answer number 0 depends on the data.<|end|>⟧\n"
    )
    assert json.loads(json.dumps(report.to_json()))["sample_text"] == report.sample_text()


def test_rows_that_the_template_refuses_are_named_all_at_once(
    tmp_path: Path, model_folder: Path, preset_with: Callable[..., Preset]
) -> None:
    refusing = preset_with(
        "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('not that') }}{% endif %}{% endfor %}"
    )
    with pytest.raises(UserError) as e:
        prepare([data(tmp_path, ["no", "yes", "no"], ask="x")], refusing, model_folder, {})
    assert [p.message.partition(":")[0] for p in e.value.problems][:1] == ["row 1"]
    assert "not that" in str(e.value)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"DatasetConfig": {"train_test_split": 0}}, "DatasetConfig.train_test_split"),
        ({"DatasetConfig": {"train_test_split": "half"}}, "DatasetConfig.train_test_split"),
        ({"TrainingArguments": {"max_length": "long"}}, "TrainingArguments.max_length"),
    ],
)
def test_a_wrong_setting_names_its_field(
    tmp_path: Path, model_folder: Path, preset: Preset, config: Any, field: str
) -> None:
    with pytest.raises(UserError) as e:
        prepare([data(tmp_path, TWENTY)], preset, model_folder, config)
    assert e.value.problems[0].field == field


def test_max_length_is_at_most_the_models_context(
    tmp_path: Path, model_folder: Path, preset_with: Callable[..., Preset]
) -> None:
    done = prepare(
        [data(tmp_path, TWENTY)], preset_with(context=128), model_folder, {"TrainingArguments": {"max_length": 4096}}
    )
    assert done.report.max_length == 128
    assert "reads at most 128 tokens" in done.report.problems[0].message
    assert prepare([data(tmp_path, TWENTY)], preset_with(), model_folder, {}, sequence=90).report.max_length == 90


@given(st.lists(st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), max_size=20), max_size=30))
def test_examples_come_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, given_rows: list[Any]
) -> None:
    examples = [Example([i for i, _ in row], [t for _, t in row]) for row in given_rows]
    path = tmp_path_factory.getbasetemp() / "examples.arrow"
    write_examples(path, examples, {"digest": "é"})
    read = PreparedFile(path)
    assert read.metadata == {"digest": "é"}
    assert list(read) == read[:] == examples
    assert read.lengths == [len(e) for e in examples]
    assert [read[i] for i in range(len(read))] == examples


def test_a_torn_file_is_a_clear_failure(tmp_path: Path) -> None:
    write_examples(tmp_path / "a.arrow", [Example([1], [True])], {})
    (tmp_path / "a.arrow").write_bytes((tmp_path / "a.arrow").read_bytes()[:40])
    for name in ("a.arrow", "none.arrow"):
        with pytest.raises(Failure, match="run the stage `check` again"):
            PreparedFile(tmp_path / name)


def test_a_prompt_is_tokenised_as_in_training(tmp_path: Path, model_folder: Path, preset: Preset) -> None:
    from kaito_core.data.chat import render_prompt
    from kaito_core.data.formats import Conversation, Message

    tokenizer = ChatTokenizer(model_folder, preset.chat)
    talk = (Message("user", "What is a plan?"), Message("assistant", "The plan says."))
    (whole,) = tokenizer.encode([tokenizer.render(Conversation(talk))])
    prompt = tokenizer.ids(render_prompt(talk[:1], preset.chat))
    assert list(whole.input_ids[: len(prompt)]) == prompt
    assert not any(whole.trained[: len(prompt)])
