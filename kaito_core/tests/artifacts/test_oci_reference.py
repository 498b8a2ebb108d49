"""Names of images: what Docker accepts, and errors that say precisely what is wrong."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaito_core.oci_reference import Reference

DIGEST = "sha256:" + "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("busybox", Reference("docker.io", "library/busybox", "latest")),
        ("org/name:1.0", Reference("docker.io", "org/name", "1.0")),
        ("index.docker.io/name", Reference("docker.io", "library/name", "latest")),
        ("ghcr.io/org/a__b/c.d-e:v1", Reference("ghcr.io", "org/a__b/c.d-e", "v1")),
        ("localhost/x:y", Reference("localhost", "x", "y")),
        ("Host.Example:5000/ns/name:Tag_1", Reference("host.example:5000", "ns/name", "Tag_1")),
        ("[::1]:5000/x", Reference("[::1]:5000", "x", "latest")),
        (f"host:5000/x@{DIGEST}", Reference("host:5000", "x", "", DIGEST)),
        (f"host:5000/x:t@{DIGEST}", Reference("host:5000", "x", "t", DIGEST)),
    ],
)
def test_references_are_read_with_dockers_defaults(text: str, expected: Reference) -> None:
    assert Reference.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "it is empty"),
        ("host.io/a b:1", "space"),
        ("https://host.io/a:1", "leave out the scheme https://"),
        ("host.io/IMAGE_NAME_HERE:0.0.1", "the repository 'IMAGE_NAME_HERE' must be lower case"),
        ("ACR_REPO_HERE.azurecr.io/name:0.0.1", "the registry 'ACR_REPO_HERE.azurecr.io' is not a host name"),
        ("MyOrg/adapter:1", "the repository 'MyOrg/adapter' must be lower case"),
        ("host.io/a//b", "empty part between slashes"),
        ("host.io/", "the repository is missing"),
        ("host.io/a..b", "'a..b' in the repository"),
        ("host.io/a:", "the tag after the colon is empty"),
        ("host.io/a:-x", "the tag '-x'"),
        ("host.io/a:" + "t" * 129, "129 characters long"),
        ("host:99999/a", "the registry 'host:99999'"),
        ("[::::]:1/a", "the registry '[::::]:1'"),
        ("host.io/a@sha256:12", "the digest 'sha256:12'"),
        ("host.io/" + "a" * 256, "256 characters long"),
        ("x" * 100_000, "100000 characters long"),
    ],
)
def test_a_wrong_reference_is_refused_with_the_cause(text: str, cause: str) -> None:
    with pytest.raises(ValueError, match=re.escape(cause)):
        Reference.parse(text)


def test_the_placeholder_of_the_quick_start_names_both_faults() -> None:
    with pytest.raises(ValueError, match=r"ACR_REPO_HERE.*; the repository 'IMAGE_NAME_HERE' must be lower case"):
        Reference.parse("ACR_REPO_HERE.azurecr.io/IMAGE_NAME_HERE:0.0.1")


component = st.from_regex(r"[a-z0-9]{1,5}((\.|_|__|-{1,3})[a-z0-9]{1,5}){0,2}", fullmatch=True)


@given(
    host=st.from_regex(r"[a-z0-9]{1,8}\.[a-z]{2,3}(:[1-9][0-9]{0,3})?", fullmatch=True),
    path=st.lists(component, min_size=2, max_size=4).map("/".join),
    tag=st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,20}", fullmatch=True),
)
def test_what_the_grammar_allows_comes_back_unchanged(host: str, path: str, tag: str) -> None:
    text = f"{host}/{path}:{tag}"
    assert Reference.parse(text) == Reference(host, path, tag)
    assert str(Reference.parse(text)) == text


@given(st.text(max_size=80) | st.text("aA0._-/:@[]", max_size=80))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        reference = Reference.parse(text)
    except ValueError:
        return
    assert Reference.parse(str(reference)) == reference
