"""Models as images: what is pushed, what comes back, and what other tools push."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import tracemalloc
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaito_core.artifacts.credentials import Credentials, credentials_for
from kaito_core.artifacts.layout import Layout
from kaito_core.artifacts.manifest import OCI_CONFIG, OCI_LAYER, OCI_MANIFEST, canonical, read_document, read_manifest
from kaito_core.artifacts.model_image import FileLayer, look_into, push_model
from kaito_core.artifacts.model_pull import WORK, pull_model
from kaito_core.artifacts.registry import RegistryClient
from kaito_core.oci_reference import Reference
from kaito_core.problems import Failure, KaitoError, UserError
from kaito_core.testing.registry import Registry

from .conftest import Handler, Naps, TokenRegistry
from .test_pull import DOCKER_LAYER, special, tar

LOG_IN = Credentials("kaito", "s3cret")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a model in two files, and with things that do not belong into an image."""
    folder = tmp_path / "model"
    folder.mkdir()
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    (folder / "config.json").write_text('{"architectures": ["Phi3ForCausalLM"], "hidden_size": 8}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shards[0], "b": shards[1]}}))
    for name in shards:
        (folder / name).write_bytes(hashlib.shake_128(name.encode()).digest(300_000))
    (folder / "LICENSE").write_text("MIT")
    (folder / "modeling_phi3.py").write_text("import os")
    (folder / ".gitattributes").write_text("x")
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.safetensors").write_bytes(b"the same again")
    return folder


FILES = ("LICENSE", "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
         "model.safetensors.index.json", "tokenizer.json")  # fmt: skip


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def expected(model: Path) -> dict[str, bytes]:
    return {name: (model / name).read_bytes() for name in FILES}


@pytest.fixture
def reference(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reference:
    monkeypatch.setenv("DOCKER_CONFIG", str(registry.write_docker_config(tmp_path / "docker").parent))
    return Reference.parse(f"{registry.host}/models/{tmp_path.name.replace('_', '-').lower()}:1")


# --- what is pushed


def test_a_model_comes_back_as_it_was_pushed(model: Path, reference: Reference, tmp_path: Path) -> None:
    seen: list[tuple[str, str, int, int]] = []
    notes = {"org.opencontainers.image.licenses": "MIT"}
    done = push_model(model, reference, credentials_for(reference), notes, lambda *step: seen.append(step))
    assert done.files == FILES
    assert done.sent == done.bytes
    assert {s[0] for s in seen} == {"read", "push"}
    assert seen[-1][2] == seen[-1][3] == done.bytes

    pulled = pull_model(reference, tmp_path / "out", credentials_for(reference))
    assert (pulled.digest, pulled.files) == (done.digest, FILES)
    assert pulled.annotations["org.opencontainers.image.licenses"] == "MIT"
    assert "sh.kaito.version" in pulled.annotations
    assert content(tmp_path / "out") == expected(model)

    shown = look_into(reference, credentials_for(reference))
    assert dict(shown.files).keys() == set(FILES)
    assert sum(size for _, size in shown.files) == done.bytes
    assert shown.config["architectures"] == ["Phi3ForCausalLM"]


def test_every_file_is_a_plain_layer_that_container_runtimes_unpack(model: Path, reference: Reference) -> None:
    push_model(model, reference, credentials_for(reference))
    with RegistryClient(reference, credentials_for(reference)) as client:
        _, raw = client.manifest(reference.tag)
        manifest = read_manifest(read_document(raw, ""), "")
        config_path = model.parent / "config"
        client.download(manifest.config, config_path)
        layers = []
        for descriptor in manifest.layers:
            client.download(descriptor, model.parent / "layer")
            layers.append((descriptor, (model.parent / "layer").read_bytes()))
    config = json.loads(config_path.read_bytes())
    assert manifest.config.media_type == OCI_CONFIG
    assert (config["os"], config["architecture"]) == ("linux", "amd64")
    # Not compressed, so that the digest before compression, which runtimes check, is the layer's own.
    assert config["rootfs"]["diff_ids"] == [d.digest for d, _ in layers]
    for (descriptor, blob), name in zip(layers, FILES, strict=True):
        assert descriptor.media_type == OCI_LAYER
        # With a title, tools for artifacts would take the layer for the file itself.
        assert descriptor.annotations == {"sh.kaito.model.file": name}
        with tarfile.open(fileobj=io.BytesIO(blob)) as archive:
            (member,) = archive.getmembers()
            assert archive.extractfile(member).read() == (model / name).read_bytes()  # type: ignore[union-attr]
        assert (member.name, member.mtime, member.uid, member.mode) == (f"data/{name}", 0, 0, 0o644)


def test_the_same_files_are_the_same_image_and_are_sent_once(
    model: Path, tmp_path: Path, token_registry: TokenRegistry, naps: Naps
) -> None:
    copy = tmp_path / "copied-elsewhere"
    shutil.copytree(model, copy)
    for path in copy.rglob("*"):
        os.utime(path, (1, 1))
        path.chmod(0o700)
    reference = Reference.parse(f"{token_registry.host}/m:1")
    first = push_model(model, reference, LOG_IN, sleep=naps)
    token_registry.requests.clear()
    second = push_model(copy, reference, LOG_IN, sleep=naps)
    assert (second.digest, second.sent) == (first.digest, 0)
    assert token_registry.asked("PUT") == ["/v2/m/manifests/1"]
    (copy / "tokenizer.json").write_text('{"new": 1}')
    third = push_model(copy, reference, LOG_IN, sleep=naps)
    assert third.digest != first.digest
    assert third.sent == FileLayer.of(copy / "tokenizer.json").size


def test_a_large_file_goes_in_chunks_over_a_line_that_breaks(
    model: Path, registry: Registry, cut_wire: Callable[[str, int], str], naps: Naps, tmp_path: Path
) -> None:
    near = cut_wire(registry.host, 230_000)
    credentials = Credentials(registry.username, registry.password)
    done = push_model(model, Reference.parse(f"{near}/broken/model:1"), credentials, chunk_bytes=100_000, sleep=naps)
    assert naps
    direct = Reference.parse(f"{registry.host}/broken/model:1")
    assert pull_model(direct, tmp_path / "out", credentials).digest == done.digest
    assert content(tmp_path / "out") == expected(model)


def test_weights_are_never_held_in_memory(tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors").open("wb") as f:
        f.truncate(200 << 20)
    layer = FileLayer.of(tmp_path / "model.safetensors")
    tracemalloc.start()
    assert sum(map(len, layer.pieces(0, layer.size))) == layer.size
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20


@settings(max_examples=60, deadline=None)
@given(
    st.binary(max_size=1500),
    st.from_regex(r"[a-zäß]{1,120}\.json", fullmatch=True),
    st.lists(st.integers(0, 1 << 12), max_size=5),
)
def test_a_layer_is_the_same_in_whatever_parts_it_is_read(body: bytes, name: str, cuts: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(body)
        layer = FileLayer.of(path)
        whole = b"".join(layer.pieces(0, layer.size))
        edges = sorted({0, layer.size, *(c for c in cuts if c < layer.size)})
        parts = [b"".join(layer.pieces(a, b)) for a, b in itertools.pairwise(edges)]
    assert b"".join(parts) == whole
    assert len(whole) == layer.size
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        (member,) = archive.getmembers()
        assert member.name == f"data/{name}"
        assert archive.extractfile(member).read() == body  # type: ignore[union-attr]


def test_a_file_that_changes_meanwhile_is_noticed(model: Path, token_registry: TokenRegistry, naps: Naps) -> None:
    def change(step: str, name: str, _done: int, _total: int) -> None:
        if step == "push" and name == "LICENSE":
            (model / "tokenizer.json").write_text("{ }")

    with pytest.raises(Failure, match=r"tokenizer\.json changed while it was pushed"):
        push_model(model, Reference.parse(f"{token_registry.host}/m:1"), LOG_IN, None, change, sleep=naps)
    assert token_registry.manifests == {}


def test_no_right_to_push_is_said_before_anything_is_read(
    model: Path, token_registry: TokenRegistry, naps: Naps
) -> None:
    read: list[Any] = []
    with pytest.raises(KaitoError, match="not allowed to push"):
        push_model(
            model, Reference.parse(f"{token_registry.host}/m:1"), Credentials("reader", "r"), None,
            lambda *step: read.append(step), sleep=naps,
        )  # fmt: skip
    assert read == []
    with pytest.raises(UserError, match="a push needs a tag"):
        push_model(model, Reference.parse("host.io/a@sha256:" + "0" * 64))


@pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo not found: apt-get install skopeo")
def test_other_tools_read_the_image(model: Path, reference: Reference, registry: Registry, tmp_path: Path) -> None:
    digest = push_model(model, reference, credentials_for(reference)).digest
    log_in = ["--tls-verify=false", "--creds", f"{registry.username}:{registry.password}"]
    shown = subprocess.run(["skopeo", "inspect", *log_in, f"docker://{reference}"], capture_output=True, check=True)
    assert json.loads(shown.stdout)["Digest"] == digest
    copied = ["--src-tls-verify=false", "--src-creds", f"{registry.username}:{registry.password}"]
    target = f"docker-archive:{tmp_path}/copy.tar:x:1"
    subprocess.run(["skopeo", "--insecure-policy", "copy", *copied, f"docker://{reference}", target], check=True)


# --- what is refused


def damage(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str = "") -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def only_pickles(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")


def link(name: str, target: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return make


@pytest.mark.parametrize(
    ("harm", "cause", "remedy"),
    [
        (damage("config.json"), "is not a model: config.json is missing", "as on the hub"),
        (damage("tokenizer.json"), "tokenizer.json is missing", "as on the hub"),
        (damage("model-00002-of-00002.safetensors"), "model-00002-of-00002.safetensors is missing", "as on the hub"),
        (write("model.safetensors.index.json", "[]"), "does not say in which file", "fetch the model again"),
        (write("model.safetensors.index.json", '{"weight_map": {"a": "../x"}}'), "does not say", "fetch"),
        (write("pytorch_model.bin", "x"), "run code when they are loaded", "the safetensors beside it"),
        (write("consolidated.00.pt", "x"), "run code when they are loaded", "the safetensors beside it"),
        (only_pickles, "pytorch_model.bin is pickled weights", "save_pretrained"),
        (link("tokenizer.json", "/etc/passwd"), "a link out of the folder", "cp -rL"),
        (link("generation_config.json", "../elsewhere.json"), "a link out of the folder", "cp -rL"),
        (link("generation_config.json", "nowhere.json"), "which is not there", "put the file there"),
    ],
)
def test_what_is_no_model_is_refused(
    model: Path, harm: Callable[[Path], None], cause: str, remedy: str, token_registry: TokenRegistry
) -> None:
    harm(model)
    with pytest.raises(UserError) as e:
        push_model(model, Reference.parse(f"{token_registry.host}/m:1"), LOG_IN)
    assert cause in str(e.value)
    assert remedy in str(e.value)
    assert token_registry.requests == []


def test_a_link_within_the_folder_is_followed(model: Path, reference: Reference, tmp_path: Path) -> None:
    (model / "original" / "t.json").write_text('{"t": 1}')
    link("tokenizer.json", "original/t.json")(model)
    push_model(model, reference, credentials_for(reference))
    pull_model(reference, tmp_path / "out", credentials_for(reference))
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"t": 1}'
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()


# --- what others push


Layer = tuple[bytes, str, dict[str, str]]
"""Content, media type, annotations."""


def artifact(folder: Path, layers: Iterable[Layer], config: bytes = b"{}", config_type: str = "x/empty") -> Path:
    layout = Layout.create(folder)
    described = []
    for blob, media_type, notes in layers:
        descriptor = layout.add(media_type, blob).to_json()
        described.append({**descriptor, "annotations": notes})
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": layout.add(config_type, config).to_json(),
        "layers": described,
    }
    layout.tag(layout.add(OCI_MANIFEST, canonical(manifest)), "1")
    return folder


MODEL = {"config.json": b"{}", "tokenizer.json": b"{ }", "model.safetensors": b"weights"}
BESIDE = {"README.md": b"# model", "modeling.py": b"import os", "pytorch_model.bin": b"pickle", ".gitattributes": b"x"}
KEPT = {**MODEL, "README.md": b"# model"}
TITLE, FILEPATH = "org.opencontainers.image.title", "org.cncf.model.filepath"
CNCF, DOCKER = "application/vnd.cncf.model.", "application/vnd.docker.ai."
PLAIN = b'{"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}}'


def titled(files: dict[str, bytes], media_type: str, key: str = TITLE) -> list[Layer]:
    return [(blob, media_type, {key: name}) for name, blob in files.items()]


def packed(files: dict[str, bytes], below: str = "") -> bytes:
    return tar(*((below + name, blob) for name, blob in files.items()))


@pytest.mark.parametrize(
    ("layers", "config", "expected"),
    [
        pytest.param(titled({**MODEL, **BESIDE}, "application/vnd.kaito.llm.v1"), (b"{}", "x/y"), KEPT, id="KAITO"),
        pytest.param(titled({**MODEL, **BESIDE}, OCI_LAYER), (b"{}", OCI_CONFIG), KEPT, id="ORAS, its default type"),
        pytest.param(
            [
                *((b, f"{CNCF}weight.v1.raw", {TITLE: n, FILEPATH: n}) for n, b in MODEL.items()),
                (b"x", f"{CNCF}weight.v1.raw", {TITLE: "original/c.safetensors", FILEPATH: "original/c.safetensors"}),
                (b"# model", f"{CNCF}doc.v1.raw", {FILEPATH: "README.md"}),
            ],
            (b'{"modelfs": {}}', f"{CNCF}config.v1+json"),
            KEPT,
            id="ModelPack, a file each",
        ),
        pytest.param(
            [
                (packed({"model.safetensors": b"weights"}), f"{CNCF}weight.v1.tar", {FILEPATH: "model.safetensors"}),
                (packed({n: MODEL[n] for n in ("config.json", "tokenizer.json")}), f"{CNCF}weight.config.v1.tar", {}),
            ],
            (b"{}", f"{CNCF}config.v1+json"),
            MODEL,
            id="ModelPack, packed",
        ),
        pytest.param(
            [
                (b"one", f"{DOCKER}safetensors", {}),
                (b"two", f"{DOCKER}safetensors", {}),
                (packed({"config.json": b"{}", "tokenizer.json": b"{ }"}), f"{DOCKER}vllm.config.tar", {}),
                (b"MIT", f"{DOCKER}license", {}),
            ],
            (b"{}", f"{DOCKER}model.config.v0.1+json"),
            {
                "model-00001-of-00002.safetensors": b"one",
                "model-00002-of-00002.safetensors": b"two",
                "config.json": b"{}",
                "tokenizer.json": b"{ }",
                "LICENSE": b"MIT",
            },
            id="Docker Model Runner, its first form",
        ),
        pytest.param(
            [(b, f"{DOCKER}{'safetensors' if 's' in n[-3:] else 'model.file'}", {FILEPATH: n}) for n, b in MODEL.items()],
            (b"{}", f"{DOCKER}model.config.v0.2+json"),
            MODEL,
            id="Docker Model Runner, a file each",
        ),
        pytest.param(
            [
                (
                    packed(MODEL, "weights/"),
                    "application/vnd.oci.image.layer.v1.tar+gzip",
                    {TITLE: "weights", "io.deis.oras.content.unpack": "true"},
                )
            ],
            (b"{}", "x/y"),
            MODEL,
            id="ORAS, a folder",
        ),
        pytest.param(
            [
                (tar("bin", ("bin/sh", b"elf"), special("workspace/tfs/weights", tarfile.SYMTYPE, "/workspace/weights")), OCI_LAYER, {}),
                (packed({**MODEL, **BESIDE}, "workspace/weights/"), OCI_LAYER, {}),
            ],
            (PLAIN, OCI_CONFIG),
            KEPT,
            id="KAITO's image with files in a folder",
        ),
        pytest.param(
            [(packed(MODEL, "models/org/name/"), DOCKER_LAYER, {})],
            (PLAIN, "application/vnd.docker.container.image.v1+json"),
            MODEL,
            id="an image with the model in a folder of its own",
        ),
        pytest.param(
            [
                (packed({**MODEL, "added_tokens.json": b"old"}, "models/"), OCI_LAYER, {}),
                (tar(("models/.wh.added_tokens.json", b""), ("models/config.json", b"{}")), OCI_LAYER, {}),
            ],
            (PLAIN, OCI_CONFIG),
            MODEL,
            id="an image whose upper layer takes something away",
        ),
    ],
)  # fmt: skip
def test_what_other_tools_push_is_understood(
    tmp_path: Path, layers: list[Layer], config: tuple[bytes, str], expected: dict[str, bytes]
) -> None:
    source = artifact(tmp_path / "layout", layers, *config)
    pull_model(source, tmp_path / "out")
    assert content(tmp_path / "out") == expected
    assert look_into(source).files


@pytest.mark.parametrize(
    ("layers", "cause"),
    [
        (titled({"config.json": b"{}"}, f"{CNCF}weight.v1.tar+zstd"), "is compressed with zstd"),
        ([(b"x", f"{DOCKER}gguf.v3", {})], "and no file name"),
        ([(packed({"x": b""}, "etc/"), OCI_LAYER, {})], "there is no config.json in it"),
        ([(packed(MODEL, "models/a/") , OCI_LAYER, {}), (packed(MODEL, "models/b/"), OCI_LAYER, {})], "holds 2 models: /models/a, /models/b"),
        (titled(MODEL, "x/y") + titled({"config.json": b"other"}, "x/y"), "two layers are called 'config.json'"),
        ([(tar(special("data/config.json", tarfile.SYMTYPE, "/etc/passwd")), OCI_LAYER, {})], "is a link"),
        ([(tar(special("models/config.json", tarfile.LNKTYPE, "etc/shadow")), OCI_LAYER, {})], "is a link"),
        ([(tar(("models/../../evil", b"x")), OCI_LAYER, {})], "climbs out of its folder"),
        ([(tar(("../evil", b"x")), f"{CNCF}weight.v1.tar", {})], "climbs out of its folder"),
        ([(tar(("/evil", b"x")), f"{CNCF}weight.v1.tar", {})], "is an absolute path"),
        ([(packed(MODEL)[:700], f"{CNCF}weight.v1.tar", {})], "not a sound tar archive"),
    ],
)  # fmt: skip
def test_what_is_no_sound_model_is_refused(tmp_path: Path, layers: list[Layer], cause: str) -> None:
    with pytest.raises(KaitoError, match=cause):
        pull_model(artifact(tmp_path / "layout", layers, PLAIN if "image.layer" in layers[0][1] else b"{}",
                            OCI_CONFIG if "image.layer" in layers[0][1] else "x/y"), tmp_path / "out")  # fmt: skip
    assert [p.name for p in (tmp_path / "out").iterdir()] in ([], [WORK])
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize(
    "title", ["../config.json", "/etc/cron.d/x", "a/../../x.json", "..", ".", "a\nb.json", "x" * 300 + ".json", "a/\0.json"]
)  # fmt: skip
@pytest.mark.parametrize("key", [TITLE, FILEPATH])
def test_a_file_name_that_leads_elsewhere_is_refused(tmp_path: Path, title: str, key: str) -> None:
    source = artifact(tmp_path / "layout", [*titled(MODEL, "x/y"), (b"evil", "x/y", {key: title})])
    with pytest.raises(Failure, match=r"its file name|no file may be called"):
        pull_model(source, tmp_path / "out")
    assert b"evil" not in content(tmp_path / "out").values()


paths = st.lists(st.sampled_from(["..", ".", "", "a", "config.json", "m.safetensors", ".wh.a"]), max_size=4).map(
    "/".join
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(paths, st.sampled_from(["x/y", OCI_LAYER, f"{CNCF}weight.v1.tar"]), st.binary(max_size=40)),
        max_size=4,
    )
)
def test_no_artifact_writes_outside_its_folder(content: list[tuple[str, str, bytes]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        layers: list[Layer] = [(blob, kind, {TITLE: name}) for name, kind, blob in content]
        with suppress(KaitoError):
            pull_model(artifact(Path(folder) / "layout", layers), Path(folder) / "out")
        assert {p.name for p in Path(folder).iterdir()} <= {"layout", "out"}
        assert all(not p.is_symlink() for p in Path(folder).rglob("*"))


# --- lines that break, registries that lie


def half(state: TokenRegistry, digest: str, *, times: int) -> None:
    """The next answers with this blob are cut in the middle; ranges are served."""
    left = [times]

    def fault(handler: Handler) -> bool:
        if handler.command != "GET" or digest not in handler.path or not handler.headers.get("Authorization"):
            return False
        blob = state.blobs[digest]
        start = int(handler.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(blob) - 1}/{len(blob)}")
        handler.send_header("Content-Length", str(len(blob) - start))
        handler.end_headers()
        if left[0] > 0:
            left[0] -= 1
            handler.wfile.write(blob[start : start + (len(blob) - start) // 2])
            handler.wfile.flush()
            handler.hang_up()
        else:
            handler.wfile.write(blob[start:])
        return True

    state.faults.append(fault)


@pytest.fixture
def pushed(model: Path, token_registry: TokenRegistry, naps: Naps) -> tuple[Reference, list[str]]:
    """A model in the registry, and the digests of its layers."""
    reference = Reference.parse(f"{token_registry.host}/m:1")
    push_model(model, reference, LOG_IN, sleep=naps)
    layers = json.loads(token_registry.manifests["1"])["layers"]
    token_registry.requests.clear()
    naps.clear()
    return reference, [layer["digest"] for layer in layers]


def test_a_broken_download_asks_for_the_rest(
    pushed: tuple[Reference, list[str]], model: Path, token_registry: TokenRegistry, naps: Naps, tmp_path: Path
) -> None:
    reference, digests = pushed
    half(token_registry, digests[2], times=2)
    pull_model(reference, tmp_path / "out", LOG_IN, sleep=naps)
    assert content(tmp_path / "out") == expected(model)
    assert naps == [1, 2]


def test_a_pull_that_was_killed_goes_on_where_it_was(
    pushed: tuple[Reference, list[str]], model: Path, token_registry: TokenRegistry, naps: Naps, tmp_path: Path
) -> None:
    reference, digests = pushed
    half(token_registry, digests[3], times=5)
    with pytest.raises(KaitoError, match="cannot be reached"):
        pull_model(reference, tmp_path / "out", LOG_IN, sleep=naps)
    assert [p.name for p in (tmp_path / "out").iterdir()] == [WORK]  # nobody takes it for a model
    token_registry.faults.clear()
    token_registry.requests.clear()
    half(token_registry, digests[3], times=0)
    seen: list[tuple[int, int]] = []
    pull_model(reference, tmp_path / "out", LOG_IN, lambda *p: seen.append(p), sleep=naps)
    assert content(tmp_path / "out") == expected(model)
    fetched = [d for d in digests if token_registry.asked("GET", d)]
    assert fetched == digests[3:]
    assert seen[0][0] > 300_000  # what is here counts


def test_what_came_for_another_image_is_not_mixed_in(
    pushed: tuple[Reference, list[str]], model: Path, token_registry: TokenRegistry, naps: Naps, tmp_path: Path
) -> None:
    reference, digests = pushed
    half(token_registry, digests[3], times=5)
    with pytest.raises(KaitoError):
        pull_model(reference, tmp_path / "out", LOG_IN, sleep=naps)
    token_registry.faults.clear()
    (model / "config.json").write_text('{"another": "model"}')
    push_model(model, reference, LOG_IN, sleep=naps)
    pull_model(reference, tmp_path / "out", LOG_IN, sleep=naps)
    assert content(tmp_path / "out") == expected(model)


@pytest.mark.parametrize("lie", [lambda b: b[:-1], lambda b: b + b"x", lambda b: bytes(len(b))])
def test_a_layer_that_is_not_what_its_digest_says_is_refused_and_gone(
    pushed: tuple[Reference, list[str]],
    token_registry: TokenRegistry,
    naps: Naps,
    tmp_path: Path,
    lie: Callable[[bytes], bytes],
) -> None:
    reference, digests = pushed
    token_registry.blobs[digests[2]] = lie(token_registry.blobs[digests[2]])
    with pytest.raises(KaitoError, match=r"sent (other content than|more than the)"):
        pull_model(reference, tmp_path / "out", LOG_IN, sleep=naps)
    assert not list((tmp_path / "out" / WORK).glob(f"*{digests[2].removeprefix('sha256:')}*"))


def test_a_model_that_does_not_fit_on_the_disk_is_not_begun(
    pushed: tuple[Reference, list[str]], token_registry: TokenRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=500_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(Failure, match=r"needs [\d,]+ bytes in .*, and 500,000 are free"):
        pull_model(pushed[0], tmp_path / "out", LOG_IN)
    assert token_registry.asked("GET", "blobs") == []
