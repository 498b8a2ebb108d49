"""Reading images that somebody else made, sound ones and hostile ones."""

from __future__ import annotations

import gzip
import io
import tarfile
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaito_core.artifacts import layers
from kaito_core.artifacts.credentials import Credentials
from kaito_core.artifacts.layout import Layout
from kaito_core.artifacts.manifest import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER_GZIP,
    OCI_MANIFEST,
    Descriptor,
    canonical,
)
from kaito_core.artifacts.pull import PulledImage, pull
from kaito_core.oci_reference import Reference
from kaito_core.problems import Failure, KaitoError, UserError

from .conftest import Naps, TokenRegistry

DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"

Entry = tarfile.TarInfo | tuple[str, bytes] | str
"""A file with its content, a folder, or anything else."""


def tar(*entries: Entry) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                archive.addfile(entry)
                continue
            info = tarfile.TarInfo(entry if isinstance(entry, str) else entry[0])
            if isinstance(entry, str):
                info.type = tarfile.DIRTYPE
                archive.addfile(info)
            else:
                info.size = len(entry[1])
                archive.addfile(info, io.BytesIO(entry[1]))
    return buffer.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def add_image(
    layout: Layout, blobs: Sequence[bytes], layer_type: str = OCI_LAYER_GZIP, manifest_type: str = OCI_MANIFEST
) -> Descriptor:
    config = layout.add(OCI_CONFIG, b"{}")
    document: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": manifest_type,
        "config": config.to_json(),
        "layers": [layout.add(layer_type, blob).to_json() for blob in blobs],
    }
    return layout.add(manifest_type, canonical(document))


def pulled(folder: Path, *tars: bytes, max_bytes: int = 1 << 20) -> dict[str, bytes]:
    """What comes out of an image with these layers."""
    layout = Layout.create(folder / "layout")
    layout.tag(add_image(layout, [gzip.compress(t, mtime=0) for t in tars]), "x")
    result = pull(layout.path, folder / "out", max_bytes=max_bytes)
    return read(folder / "out", result)


def read(into: Path, result: PulledImage) -> dict[str, bytes]:
    found = {str(p.relative_to(into)): p.read_bytes() for p in into.rglob("*") if p.is_file()}
    assert tuple(sorted(found)) == result.files
    assert not any(p.is_symlink() for p in into.rglob("*"))
    return found


def test_only_what_lies_below_data_is_taken_from_any_base(tmp_path: Path) -> None:
    base = tar(
        "bin", ("bin/sh", b"elf"), special("bin/ls", tarfile.SYMTYPE, "/bin/sh"), special("dev/null", tarfile.CHRTYPE)
    )
    first = tar("data", ("data/a.json", b"old"), ("data/sub/b.jsonl", b"b"), ("database/x", b"no"))
    second = tar(("./data/a.json", b"new"), ("etc/passwd", b"no"))
    assert pulled(tmp_path, base, first, second) == {"a.json": b"new", "sub/b.jsonl": b"b"}


def test_whiteouts_remove_what_lower_layers_put_there(tmp_path: Path) -> None:
    lower = tar(
        ("data/keep", b"k"), ("data/gone", b"g"), ("data/sub/one", b"1"), ("data/tree/x", b"x"), ("data/f", b"f")
    )
    upper = tar(
        ("data/.wh.gone", b""),
        ("data/sub/two", b"2"),
        ("data/sub/.wh..wh..opq", b""),
        ("data/.wh.tree", b""),
        ("data/f/now-a-folder", b"n"),
    )
    assert pulled(tmp_path, lower, upper) == {"keep": b"k", "sub/two": b"2", "f/now-a-folder": b"n"}


def test_a_whole_data_folder_can_be_replaced(tmp_path: Path) -> None:
    assert pulled(tmp_path, tar(("data/a", b"a")), tar((".wh.data", b"")), tar(("data/b", b"b"))) == {"b": b"b"}


@pytest.mark.parametrize("list_type", [OCI_INDEX, DOCKER_LIST])
def test_from_a_list_of_platforms_linux_amd64_is_taken(tmp_path: Path, list_type: str) -> None:
    layout = Layout.create(tmp_path / "layout")
    manifests = []
    for architecture in ("arm64", "amd64"):
        image = add_image(layout, [tar(("data/a", architecture.encode()))], DOCKER_LAYER, DOCKER_MANIFEST)
        manifests.append({**image.to_json(), "platform": {"os": "linux", "architecture": architecture}})
    index = canonical({"schemaVersion": 2, "mediaType": list_type, "manifests": manifests})
    layout.tag(layout.add(list_type, index), "x")
    assert read(tmp_path / "out", pull(layout.path, tmp_path / "out")) == {"a": b"amd64"}


def test_files_in_the_folder_stay_and_a_link_in_it_is_replaced_not_followed(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "outside").write_bytes(b"mine")
    (tmp_path / "out" / "a").symlink_to(tmp_path / "outside")
    (tmp_path / "out" / "other").write_bytes(b"other")
    layout = Layout.create(tmp_path / "layout")
    layout.tag(add_image(layout, [tar(("data/a", b"a"))]), "x")
    assert pull(layout.path, tmp_path / "out").files == ("a",)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == {"a": b"a", "other": b"other"}
    assert (tmp_path / "outside").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("archive", "cause"),
    [
        (tar(("data/../../evil", b"x")), "climbs out of its folder"),
        (tar(("../evil", b"x")), "climbs out of its folder"),
        (tar(("/data/evil", b"x")), "is an absolute path"),
        (tar(special("data/l", tarfile.SYMTYPE, "/etc/passwd")), "/data/l is a link"),
        (tar(special("data/l", tarfile.LNKTYPE, "etc/shadow")), "/data/l is a link"),
        (tar(special("data", tarfile.SYMTYPE, "/etc")), "/data is a link"),
        (tar(special("data/d", tarfile.CHRTYPE)), "neither a file nor a folder"),
        (tar(special("data/f", tarfile.FIFOTYPE)), "neither a file nor a folder"),
        (tar(("data/a\nb", b"x")), "no file may be called"),
        (tar(("data/" + "d/" * 2000, b"x")), "no file may be called"),
        (tar(("data/big", b"\0" * (2 << 20))), "more than 1,048,576 bytes"),
        (tar(("elsewhere/bomb", b"\0" * (2 << 20))), "more than 1,048,576 bytes"),
        (tar(("data/a", b"x" * 3000))[:2000], "not a sound tar archive"),
        (tar(("data/a", b"x"))[:1024] + b"damaged " * 64 + b"\0" * 1024, "not a sound tar archive"),
        (b"not a tar archive" * 100, "not a sound tar archive"),
    ],
)
def test_hostile_layers_are_refused_and_nothing_is_left(tmp_path: Path, archive: bytes, cause: str) -> None:
    with pytest.raises(Failure) as e:
        pulled(tmp_path, tar(("data/good", b"g")), archive)
    assert cause in str(e.value)
    assert list((tmp_path / "out").iterdir()) == []
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize("kind", [b"x", b"L"])
def test_a_header_cannot_ask_for_all_memory(tmp_path: Path, kind: bytes) -> None:
    header = tarfile.TarInfo("data/x")
    header.type, header.size = kind, 7 << 30
    with pytest.raises(Failure, match="not a sound tar archive: a header of"):
        pulled(tmp_path, header.tobuf() + b"\0" * 10_000, max_bytes=8 << 30)


def test_a_sparse_file_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("data/x")
        info.pax_headers = {"GNU.sparse.size": "99999999999", "GNU.sparse.map": "0,1", "GNU.sparse.numblocks": "1"}
        archive.addfile(info)
    with pytest.raises(Failure, match="/data/x is neither a file nor a folder"):
        pulled(tmp_path, buffer.getvalue())


def test_the_number_of_files_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "MAX_CHANGES", 3)
    with pytest.raises(Failure, match="files under /data"):
        pulled(tmp_path, tar(*((f"data/{n}", b"") for n in range(4))))


def test_zstd_and_artifacts_are_named_for_what_they_are(tmp_path: Path) -> None:
    layout = Layout.create(tmp_path / "layout")
    layout.tag(add_image(layout, [b"x"], "application/vnd.oci.image.layer.v1.tar+zstd"), "zstd")
    layout.tag(add_image(layout, [b"x"], "application/vnd.cncf.model.weight.v1.raw"), "artifact")
    layout.tag(add_image(layout, [b"\x28\xb5\x2f\xfdxxxx"]), "mislabelled")
    layout.tag(add_image(layout, [tar(("etc/x", b""))]), "empty")
    for tag, cause in {
        "zstd": "is compressed with zstd",
        "artifact": "has the type 'application/vnd.cncf.model.weight.v1.raw'",
        "mislabelled": "is compressed with zstd",
        "empty": "has no files under /data",
    }.items():
        with pytest.raises(KaitoError, match=cause):
            pull(layout.path, tmp_path / "out", tag=tag)
    with pytest.raises(UserError, match="has no image 'other'; it holds: zstd, artifact, mislabelled, empty"):
        pull(layout.path, tmp_path / "out", tag="other")


@pytest.mark.parametrize(
    "document",
    [
        b"[]",
        b"{",
        b'{"schemaVersion": 1, "mediaType": "x"}',
        b'{"schemaVersion": 2, "mediaType": "x"}',
        b'{"schemaVersion": 2, "mediaType": "x", "layers": [{"digest": "sha256:../../x", "size": 1, "mediaType": ""}]}',
        b'{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": []}',
        b"[" * 100_000,
    ],
)
def test_a_manifest_that_makes_no_sense_is_a_plain_error(
    token_registry: TokenRegistry, tmp_path: Path, naps: Naps, document: bytes
) -> None:
    layout = Layout.create(tmp_path / "layout")
    layout.tag(layout.add(OCI_MANIFEST, document), "x")
    with pytest.raises(Failure):
        pull(layout.path, tmp_path / "out")


def test_an_image_larger_than_allowed_is_not_even_downloaded(
    token_registry: TokenRegistry, tmp_path: Path, naps: Naps
) -> None:
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": Descriptor.of(OCI_CONFIG, b"{}").to_json(),
        "layers": [{"mediaType": OCI_LAYER_GZIP, "digest": "sha256:" + "0" * 64, "size": 10**15}],
    }
    token_registry.manifests["1"] = canonical(document)
    reference = Reference.parse(f"{token_registry.host}/a:1")
    with pytest.raises(Failure, match="1,000,000,000,000,000 bytes"):
        pull(reference, tmp_path / "out", Credentials("kaito", "s3cret"), sleep=naps)
    assert token_registry.asked("GET", "blobs") == []
    with pytest.raises(Failure, match="the registry does not find it"):
        pull(
            Reference.parse(f"{token_registry.host}/a:2"), tmp_path / "out", Credentials("kaito", "s3cret"), sleep=naps
        )


names = st.lists(st.sampled_from(["data", "a", "b", "..", ".", "", ".wh.a", ".wh..wh..opq"]), max_size=4).map("/".join)
kinds = st.sampled_from([tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.GNUTYPE_SPARSE])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.tuples(names, kinds), max_size=4), min_size=1, max_size=3), st.data())
def test_no_archive_writes_outside_its_folder(content: list[list[tuple[str, bytes]]], data: st.DataObject) -> None:
    archives = []
    for entries in content:
        archive = bytearray(
            tar(*(special("data/" + n if data.draw(st.booleans()) else n, k, "/etc") for n, k in entries))
        )
        for position in data.draw(st.lists(st.integers(0, min(len(archive), 2048) - 1), max_size=3)):
            archive[position] = data.draw(st.integers(0, 255))
        archives.append(bytes(archive))
    with tempfile.TemporaryDirectory() as folder:
        with suppress(KaitoError):
            pulled(Path(folder), *archives)
        assert {p.name for p in Path(folder).iterdir()} == {"layout", "out"}
