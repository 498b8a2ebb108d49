"""What a line of `tuning.input.urls` means."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaito_core.data.sources import file_name, parse_source, parse_sources, unused_name
from kaito_core.problems import UserError

BASE = Path("/base")


def test_the_quick_start_url_gets_the_files_name_without_the_query() -> None:
    url = (
        "https://huggingface.co/datasets/philschmid/dolly-15k-oai-style/resolve/main/data/"
        "train-00000-of-00001-54e3756291ca09c6.parquet?download=true"
    )
    source = parse_source(url, base=BASE)
    assert source.url == url
    assert source.name == "train-00000-of-00001-54e3756291ca09c6.parquet"


@pytest.mark.parametrize(
    ("text", "url"),
    [
        (
            "hf://datasets/org/name/data/a b.jsonl",
            "https://huggingface.co/datasets/org/name/resolve/main/data/a%20b.jsonl",
        ),
        ("hf://org/name@v1/x.csv", "https://huggingface.co/datasets/org/name/resolve/v1/x.csv"),
        (
            "hf://datasets/org/name@refs%2Fconvert%2Fparquet/x.parquet",
            "https://huggingface.co/datasets/org/name/resolve/refs%2Fconvert%2Fparquet/x.parquet",
        ),
    ],
)
def test_the_hubs_own_urls(text: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert parse_source(text, base=BASE).url == url


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("data/a.jsonl", "/base/data/a.jsonl"),
        ("/abs/a.jsonl", "/abs/a.jsonl"),
        ("file:///abs/a%20b.jsonl", "/abs/a b.jsonl"),
        ("file://localhost/abs/a.jsonl", "/abs/a.jsonl"),
    ],
)
def test_paths_belong_to_the_base_folder(text: str, path: str) -> None:
    assert parse_source(text, base=BASE).path == Path(path)


def test_all_wrong_ones_are_named_at_once_with_their_field() -> None:
    wrong = ["s3://bucket/x", "https://", "hf://datasets/org/name", "http://host:port/x", " ", "https://a b/c"]
    with pytest.raises(UserError) as e:
        parse_sources(["https://ok/x.json", *wrong], base=BASE)
    assert [p.field for p in e.value.problems] == [f"tuning.input.urls[{i}]" for i in range(1, 7)]
    assert "s3://bucket/x" in str(e.value)


def test_secrets_in_a_url_are_not_shown() -> None:
    source = parse_source("https://user:pass@host/x.jsonl?sig=geheim", base=BASE)
    assert source.shown == "https://host/x.jsonl"
    assert "geheim" not in repr(source)
    assert "pass" not in repr(source)


def test_files_of_one_name_get_a_number() -> None:
    used: set[str] = set()
    assert [unused_name(n, used) for n in ("a.jsonl.gz", "a.jsonl.gz", "A.jsonl.gz")] == [
        "a.jsonl.gz",
        "a-2.jsonl.gz",
        "A-3.jsonl.gz",
    ]


@given(st.text())
def test_a_file_name_never_leaves_its_folder(text: str) -> None:
    name = file_name(text)
    assert name
    assert "/" not in name
    assert "\\" not in name
    assert not name.startswith(".")
    assert len(name) <= 200


@given(st.text())
def test_any_text_is_a_source_or_a_user_error(text: str) -> None:
    for prefix in ("", "https://", "hf://", "file://"):
        try:
            source = parse_source(prefix + text, base=BASE)
        except UserError:
            continue
        assert bool(source.url) != bool(source.path)
