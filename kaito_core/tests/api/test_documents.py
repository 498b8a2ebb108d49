"""From files to resources: places, several documents, what is not a Workspace, and hostile text."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from kaito_core.api import Workspace, load_documents, load_text
from kaito_core.api.yaml_source import parse

SERVE = """\
apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata:
  name: {name}
inference:
  preset:
    name: phi-4
"""


def problems(text: str) -> list[str]:
    return [f"{p.line}:{p.column}: {p.field}: {p.message}" for p in load_text(text, "w.yaml").problems]


# --- places


def test_every_problem_of_every_document_is_told_with_its_place_in_order() -> None:
    text = """\
apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata:
  name: One    # upper case
resource:
  instanceTyp: x
tuning:
  preset: {name: phi-4}
  method: qlora
  input:
    urls:
      - https://example.com/a
      - gopher://example.com/b
  output: {}
---
apiVersion: kaito.sh/v1
kind: Workspace
metadata: {name: two}
inference: {preset: {name: [x]}}
"""
    assert problems(text) == [
        "4:9: metadata.name: 'One' is not a Kubernetes name: only a–z, 0–9, '-', beginning and ending with a letter or digit",
        "6:3: resource.instanceTyp: unknown field 'instanceTyp'; did you mean 'instanceType'?",
        "13:9: tuning.input.urls[1]: the scheme 'gopher' is not supported",
        "14:11: tuning.output: needs one of volumeSource or image",
        "16:13: apiVersion: unknown version 'kaito.sh/v1'; did you mean 'kaito.sh/v1beta1'?",
        "19:28: inference.preset.name: must be text, and is a list",
    ]


def test_a_problem_reads_as_one_clickable_line_and_a_remedy() -> None:
    (problem,) = load_text(SERVE.format(name="x") + "resource: {count: '2'}\n", "w.yaml").problems
    assert str(problem) == (
        "w.yaml:8:19: error: resource.count: must be a whole number, and is the text '2'\n    remove the quotes"
    )


def test_a_later_problem_finds_its_place_too() -> None:
    from kaito_core.problems import Problem

    documents = load_text("# a comment\n---\n" + SERVE.format(name="x"), "w.yaml")
    document = documents.document(documents.workspaces[0])
    assert document.line == 3
    assert document.locate(Problem("unknown preset", field="inference.preset.name")).place == "w.yaml:9:11"
    assert document.locate(Problem("absent", field="inference.preset.presetOptions.image")).place == "w.yaml:8:3"


# --- YAML


@pytest.mark.parametrize(
    ("text", "place", "remedy"),
    [
        ("a:\n\t- b\n", (2, 1), "tab"),
        ("a: 'open\nb: c\n", (1, 4), "close the quote"),
        ("a: [1, 2\nb: c\n", (1, 4), "close the bracket"),
        ("a: b: c\n", (1, 5), "put a value that holds ': ' in quotes"),
        ("a: @home\n", (1, 4), "cannot begin with '@'"),
        ("a: *gone\n", (1, 4), "define the anchor"),
        ("a:\n  - b\n c: d\n", (3, 2), "fields of one object begin in one column"),
        ("a: \x07\n", (1, 4), "remove it"),
        ("a: 1\na: 2\n", (2, 1), "keep one of the two"),
        ("a: !!python/object/apply:os.system [ls]\n", (1, 4), "without a tag"),
        ("a: .inf\n", (1, 4), "in quotes"),
        ("? [a]\n: b\n", (1, 3), "in quotes"),
    ],
)
def test_mistakes_in_the_yaml(text: str, place: tuple[int, int], remedy: str) -> None:
    (problem,) = parse(text, "w.yaml")[1]
    assert (problem.line, problem.column) == place
    assert remedy in problem.remedy


def test_scalars_are_read_as_kubectl_reads_them() -> None:
    text = "[0.0.1, 1:30, 2024-01-01, 0x10, 010, 1e3, 1_000, yes, 'yes', ~, '', 08]"
    assert parse(text)[0][0].value == [
        "0.0.1", "1:30", "2024-01-01", 16, 8, 1000.0, 1000, True, "yes", None, "", 8.0,
    ]  # fmt: skip
    assert parse("{on: 1, 2: b, <<: {c: d, 2: e}}")[0][0].value == {"true": 1, "2": "b", "c": "d"}


def test_hostile_yaml_is_told_and_not_obeyed() -> None:
    levels = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10))
    assert "grows without measure" in problems("a0: &a0 [x]\n" + levels)[0]
    assert "grows without measure" in problems("a: &a [*a]")[0]
    assert "nested more than" in problems("[" * 200_000)[0]
    assert "larger than 1 MiB" in problems("a: " + "x" * (1 << 20))[0]


def test_a_mistake_costs_the_document_that_it_stands_in_and_no_other() -> None:
    text = SERVE.format(name="one") + "---\nkind: [\n---\n" + SERVE.format(name="three")
    documents = load_text(text, "w.yaml")
    assert [w.name for w in documents.workspaces] == ["one", "three"]
    assert [p.line for p in documents.problems] == [9]


LINES = [
    *SERVE.format(name="x").splitlines(),
    *("tuning:", "  input: 3", "---", "- a", "  <<: *x", "resource: {count: 0.5}", "status: 1"),
    *("metadata: []", "  1: 2", "inference: [1]", "metadata: {name: 3}", "tuning: {output: {image: '!'}}"),
]


@settings(max_examples=300, deadline=None)
@given(
    st.text(max_size=200)
    | st.text(alphabet="ab:-[]{}'\"#&*!|>%@\n \t,?<~0.", max_size=60)
    | st.lists(st.sampled_from(LINES), max_size=14).map("\n".join)
)
def test_no_text_gives_anything_but_problems(text: str) -> None:
    documents = load_text(text, "w.yaml")
    for problem in documents.problems:
        assert problem.message
        assert problem.file == "w.yaml"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(
    path=st.sampled_from(
        ["metadata", "resource", "inference", "tuning", "tuning.input", "tuning.output", "tuning.preset", "tuning.method",
         "inference.adapters", "inference.preset", "resource.labelSelector", "resource.partition", "status", "extra"]
    ),
    value=JSON,
)  # fmt: skip
def test_no_structure_gives_anything_but_problems(path: str, value: object) -> None:
    data: dict[str, object] = yaml.safe_load(SERVE.format(name="x"))
    here = data
    *way, last = path.split(".")
    for step in way:
        here = here.setdefault(step, {})  # type: ignore[assignment]
    here[last] = value
    load_text(yaml.safe_dump(data), "w.yaml")


names = st.from_regex(r"[a-z]([-a-z0-9]{0,20}[a-z0-9])?", fullmatch=True)


@settings(max_examples=60, deadline=None)
@given(
    names,
    st.sampled_from(["kaito.sh/v1alpha1", "kaito.sh/v1beta1"]),
    names,
    st.integers(1, 9),
    st.dictionaries(names, names),
)
def test_a_workspace_survives_the_way_to_yaml_and_back(
    name: str, version: str, preset: str, count: int, labels: dict[str, str]
) -> None:
    workspace = Workspace.model_validate(
        {
            "apiVersion": version,
            "kind": "Workspace",
            "metadata": {"name": name, "labels": labels},
            "resource": {"count": count, "labelSelector": {"matchLabels": labels}},
            "inference": {"preset": {"name": preset}, "config": name},
        }
    )
    documents = load_text(yaml.safe_dump(workspace.to_object()), "w.yaml")
    # PyYAML does not quote what it takes for text itself and go-yaml for a boolean (y, n).
    if not {"y", "n"} & {name, preset, *labels, *labels.values()}:
        assert documents.workspaces == (workspace,)
        assert documents.problems == ()


# --- other kinds, and files


def test_config_maps_and_secrets_come_along() -> None:
    text = (
        SERVE.format(name="w")
        + """\
---
apiVersion: v1
kind: ConfigMap
metadata: {name: training, namespace: ml}
data:
  training_config.yaml: |
    training_config:
      LoraConfig:
        r: 8
---
apiVersion: v1
kind: Secret
metadata: {name: push}
type: kubernetes.io/dockerconfigjson
data:
  a: aGVsbG8=
stringData: {b: there}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: d}
"""
    )
    documents = load_text(text, "w.yaml")
    config_map = documents.config_map("training", "ml")
    assert config_map is not None
    assert documents.config_map("training", "default") is None
    (inner,), found = documents.document(config_map).embedded("training_config.yaml")
    assert found == []
    assert inner.value == {"training_config": {"LoraConfig": {"r": 8}}}
    assert inner.place("training_config.LoraConfig.r") == (16, 12), "its place in the file"
    secret = documents.secret("push", "default")
    assert secret is not None
    assert secret.data == {"a": b"hello", "b": b"there"}
    assert "hello" not in repr(documents)
    assert "there" not in repr(documents)
    assert [(p.severity, p.message) for p in documents.problems] == [("warning", "Deployment (apps/v1) is ignored")]


def test_a_list_from_kubectl_get_is_read() -> None:
    item = "\n".join("  " + line for line in SERVE.format(name="Bad").splitlines())
    text = "apiVersion: v1\nkind: List\nitems:\n- " + item.lstrip() + "\n"
    assert problems(text)[0].startswith("7:11: metadata.name: 'Bad' is not a Kubernetes name")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("# only a comment\n---\n", "is empty"),
        ("- a\n", "is not a resource"),
        ("just words\n", "is not a resource"),
        ("kind: Workspace\n", "apiVersion is required"),
        ("apiVersion: kaito.sh/v1beta1\n", "kind is required"),
        ("apiVersion: kaito.sh/v1beta1\nkind: workspace\n", "unknown kind 'workspace'; did you mean 'Workspace'?"),
        ("apiVersion: kaito.sh/v1beta1\nkind: RAGEngine\n", "RAGEngine (kaito.sh/v1beta1) is ignored"),
        ("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: c}\ndata: {k: {a: 1}}\n", "must be text"),
        ("apiVersion: v1\nkind: Secret\nmetadata: {name: s}\ndata: {k: '%%'}\n", "is not base64"),
        ("apiVersion: v1\nkind: Secret\nmetadata: {}\n", "name is required"),
    ],
)
def test_what_is_not_a_workspace(text: str, words: str) -> None:
    (problem,) = load_text(text, "w.yaml").problems
    assert words in problem.message
    assert problem.remedy


def test_two_workspaces_of_one_name_are_told() -> None:
    text = SERVE.format(name="x") + "---\n" + SERVE.format(name="x")
    (problem,) = load_documents(["-"], io.BytesIO(text.encode())).problems
    assert problem.message == "the Workspace x is there already, at <stdin>:1"
    assert problem.line == 12


def test_a_bad_file_does_not_stop_the_others(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\x7fELF\xff\xfe")
    (tmp_path / "empty").touch()
    (tmp_path / "good.yaml").write_text("\ufeff" + SERVE.format(name="good"), encoding="utf-8")
    paths = [tmp_path / "gone", tmp_path, tmp_path / "binary", tmp_path / "empty", tmp_path / "good.yaml"]
    documents = load_documents([*paths, "-"], io.BytesIO(SERVE.format(name="Piped").encode()))
    assert [w.name for w in documents.workspaces] == ["good", "Piped"]
    words = ["there is no such file", "is a folder", "is not UTF-8 text", "is empty", "'Piped' is not"]
    assert len(documents.problems) == len(words)
    for problem, start in zip(documents.problems, words, strict=True):
        assert problem.message.startswith(start)
        assert problem.remedy
    assert documents.problems[-1].place == "<stdin>:4:9"
