"""The stages before a server, alone: what they bring, what they keep, what they refuse."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaito_core import progress
from kaito_core.artifacts.credentials import credentials_for
from kaito_core.artifacts.image import build_adapter_image
from kaito_core.artifacts.model_image import push_model
from kaito_core.artifacts.push import push
from kaito_core.models.safetensors_header import Tensor
from kaito_core.oci_reference import Reference
from kaito_core.plugins import Architecture, ChatFormat, ModelSource, Preset, ServedAdapter, ServingConfiguration
from kaito_core.problems import Failure, KaitoError, Problem, UserError
from kaito_core.progress import Progress
from kaito_core.stages import __main__ as command
from kaito_core.stages import check_model, fetch_model
from kaito_core.stages.adapter_fit import Adapter, misfits
from kaito_core.stages.cached_folder import cached_folder
from kaito_core.stages.process import ServingFolders
from kaito_core.testing.registry import Registry, running_registry, why_no_registry
from kaito_core.workloads.serving import ServingJob

HIDDEN, LAYERS, VOCAB = 8, 2, 32
LINEARS = {"self_attn.qkv_proj": (HIDDEN, 24), "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.down_proj": (16, HIDDEN)}
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
SIZES = {"BF16": 2, "F32": 4, "U8": 1}


def safetensors(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """A file with tensors of these types and shapes, all zero."""
    header, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(at)


def weights() -> dict[str, tuple[str, tuple[int, ...]]]:
    found: dict[str, tuple[str, tuple[int, ...]]] = {"model.embed_tokens.weight": ("BF16", (VOCAB, HIDDEN))}
    for layer in range(LAYERS):
        for name, (i, o) in LINEARS.items():
            found[f"model.layers.{layer}.{name}.weight"] = ("BF16", (o, i))
    return {**found, "lm_head.weight": ("BF16", (VOCAB, HIDDEN))}


def lora(rank: int = 4, linears: Mapping[str, tuple[int, int]] = LINEARS) -> dict[str, tuple[str, tuple[int, ...]]]:
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for layer in range(LAYERS):
        for name, (i, o) in linears.items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            found[f"{module}.lora_A.weight"] = ("F32", (rank, i))
            found[f"{module}.lora_B.weight"] = ("F32", (o, rank))
    return found


def write_adapter(folder: Path, *, rank: int = 4, tensors: Mapping[str, Any] | None = None, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    said = {"peft_type": "LORA", "r": rank, "base_model_name_or_path": "org/tiny", "revision": "c" * 40,
            "target_modules": ["qkv_proj", "o_proj", "down_proj"], **config}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(said))
    (folder / "adapter_model.safetensors").write_bytes(safetensors(lora(rank) if tensors is None else tensors))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"architectures": ["TinyForCausalLM"], "hidden_size": HIDDEN, "num_hidden_layers": LAYERS})
    )
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(safetensors(weights()))
    return folder


PRESET = Preset(
    "tiny",
    ModelSource(hub="org/tiny", revision="c" * 40),
    "mit",
    Architecture("TinyForCausalLM", 1, LAYERS, HIDDEN, 16, 1, 1, HIDDEN, VOCAB, 64, linears={}),
    ChatFormat(TEMPLATE, ("<|end|>",)),
    (),
    aliases=("tiny-alias",),
)


@pytest.fixture
def job(model: Path) -> ServingJob:
    layout = ServingConfiguration("cpu", "float32", 64, 4)
    return ServingJob("one", "default", PRESET, "vllm", {}, layout, model_folder=str(model))


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ServingFolders:
    for name in ("weights", "adapters", "results", "cache"):
        monkeypatch.setenv(f"KAITO_{name.upper()}", str(tmp_path / "run" / name))
    monkeypatch.delenv("KAITO_DATA", raising=False)
    return ServingFolders.from_env()


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    if reason := why_no_registry():
        pytest.skip(reason)
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture
def logged_in(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("DOCKER_CONFIG", str(registry.write_docker_config(tmp_path / "docker").parent))
    return f"{registry.host}/{tmp_path.name.replace('_', '-').lower()}"


def fetch(job: ServingJob, folders: ServingFolders) -> Any:
    return fetch_model.body(job, folders, Progress(folders.results / progress.FILE_NAME, "fetch"))


def check(job: ServingJob, folders: ServingFolders) -> Any:
    return check_model.body(job, folders, Progress(folders.results / progress.FILE_NAME, "check"))


def said(folders: ServingFolders) -> list[str]:
    return [e["text"] for _, e in progress.read(folders.results / progress.FILE_NAME) if e["event"] == "message"]


@pytest.fixture
def with_adapter(job: ServingJob, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ServingJob]:
    def make(folder: Path) -> ServingJob:
        monkeypatch.setenv("KAITO_ADAPTER_0", str(folder))
        return replace(job, adapters=(ServedAdapter("mine", volume={"hostPath": {"path": str(folder)}}),))

    return make


# --- fetch-model


def test_a_folder_is_linked_and_what_another_model_left_is_taken_away(
    job: ServingJob, folders: ServingFolders, model: Path
) -> None:
    folders.weights.mkdir(parents=True)
    (folders.weights / "model-00001-of-00002.safetensors").symlink_to(model / "model.safetensors")
    fetch(job, folders)
    assert {p.name: p.resolve() for p in folders.weights.iterdir()} == {p.name: p for p in model.iterdir()}
    assert all(p.is_symlink() for p in folders.weights.iterdir())


def test_a_model_from_an_image_is_fetched_once(
    job: ServingJob, folders: ServingFolders, model: Path, logged_in: str, tmp_path: Path
) -> None:
    reference = Reference.parse(f"{logged_in}/model:1")
    push_model(model, reference, credentials_for(reference))
    of_image = replace(job, model_folder="", model_image=str(reference))
    fetch(of_image, folders)
    assert (folders.weights / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    kept = (folders.weights / "model.safetensors").resolve()
    assert kept.is_relative_to(tmp_path / "run" / "cache")

    shutil.rmtree(folders.weights)
    fetch(of_image, folders)  # another pod on the same node, say
    assert (folders.weights / "model.safetensors").resolve() == kept
    assert any("is in the cache" in line for line in said(folders))
    check(of_image, folders)

    (model / "tokenizer.json").write_text('{"new": 1}')
    push_model(model, reference, credentials_for(reference))
    fetch(of_image, folders)  # the tag has moved
    assert (folders.weights / "tokenizer.json").read_text() == '{"new": 1}'

    kept = (folders.weights / "model.safetensors").resolve()
    kept.chmod(0o644)
    os.truncate(kept, 100)  # a broken volume
    fetch(of_image, folders)
    assert (folders.weights / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert any("is damaged, and is fetched again" in line for line in said(folders))


def test_a_model_from_a_private_registry_without_a_log_in(
    job: ServingJob, folders: ServingFolders, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    with pytest.raises(KaitoError, match="wants a user name and password") as e:
        fetch(replace(job, model_folder="", model_image=f"{registry.host}/m:1"), folders)
    assert "imagePullSecret" in e.value.problems[0].remedy


def test_adapters_from_images_and_from_volumes(
    job: ServingJob, folders: ServingFolders, logged_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    (adapter / "training_args.bin").write_bytes(b"a pickle that nobody needs")
    layout = tmp_path / "layout"
    build_adapter_image(adapter, layout, model_name="tiny", annotations={}, tag="1")
    reference = Reference.parse(f"{logged_in}/adapter:1")
    push(layout, reference, credentials_for(reference))
    write_adapter(tmp_path / "mounted" / "data")  # a volume that is made from an image
    write_adapter(tmp_path / "claim" / "adapter")  # where `push` puts a tuned one
    monkeypatch.setenv("KAITO_ADAPTER_1", str(tmp_path / "mounted"))
    monkeypatch.setenv("KAITO_ADAPTER_2", str(tmp_path / "claim"))
    monkeypatch.setenv("KAITO_ADAPTER_3", str(adapter))
    volume = {"hostPath": {"path": "/x"}}
    adapters = (
        ServedAdapter("image", image=str(reference)),
        ServedAdapter("mounted", volume=volume),
        ServedAdapter("claim", volume=volume),
        ServedAdapter("plain", volume=volume),
    )
    (folders.adapters / "of-before").mkdir(parents=True)
    found = fetch(replace(job, adapters=adapters), folders)
    assert found["adapters"] == ["image", "mounted", "claim", "plain"]
    assert {p.name for p in folders.adapters.iterdir()} == {"image", "mounted", "claim", "plain"}
    for name in found["adapters"]:
        files = {p.name for p in (folders.adapters / name).iterdir() if not p.name.startswith(".")}
        assert files == {"adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"}
    assert check(replace(job, adapters=adapters), folders)["adapters"] == found["adapters"]
    fetch(replace(job, adapters=adapters[:1]), folders)
    assert {p.name for p in folders.adapters.iterdir()} == {"image"}


def test_a_volume_without_an_adapter(with_adapter: Callable[..., ServingJob], folders: ServingFolders, tmp_path: Path) -> None:  # fmt: skip
    with pytest.raises(UserError, match="volume of the adapter 'mine' is not there"):
        fetch(with_adapter(tmp_path / "gone"), folders)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"volume of the adapter 'mine' holds no adapter"):
        fetch(with_adapter(tmp_path / "empty"), folders)


@pytest.mark.parametrize("gone", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_folder_that_is_no_model(job: ServingJob, folders: ServingFolders, model: Path, gone: str) -> None:
    (model / gone).unlink()
    with pytest.raises(UserError, match="is not a model that can be used") as e:
        fetch(job, folders)
    assert e.value.problems[0].field == "inference.preset"


# --- the cache


def fill_slowly(root: str, started: Any, results: Any) -> None:
    def fill(folder: Path) -> dict[str, Any]:
        started.set()
        time.sleep(0.3)
        (folder / "f").write_text("content")
        return {"by": os.getpid()}

    found = cached_folder(Path(root), "key", fill, lambda _: None)
    results.put((found.fresh, (found.path / "f").read_text()))


def test_two_processes_that_want_the_same_fetch_it_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    started, results = context.Event(), context.Queue()
    workers = [context.Process(target=fill_slowly, args=(str(tmp_path), started, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=20) for _ in workers]
    for worker in workers:
        worker.join()
    assert sorted(found) == [(False, "content"), (False, "content"), (True, "content")]


def test_what_was_begun_is_gone_on_with_and_never_taken_for_complete(tmp_path: Path) -> None:
    def breaks(folder: Path) -> dict[str, Any]:
        (folder / "first").write_text("1")
        raise Failure("the line is dead")

    with pytest.raises(Failure):
        cached_folder(tmp_path, "key", breaks, lambda _: None)

    def goes_on(folder: Path) -> dict[str, Any]:
        assert (folder / "first").read_text() == "1"
        (folder / "second").write_text("2")
        return {"k": "v"}

    found = cached_folder(tmp_path, "key", goes_on, lambda _: None)
    assert (found.fresh, found.facts) == (True, {"k": "v"})
    again = cached_folder(tmp_path, "key", breaks, lambda _: None)
    assert (again.fresh, again.facts, again.path) == (False, {"k": "v"}, found.path)


# --- check-model


def refused(job: ServingJob, folders: ServingFolders) -> Problem:
    fetch(job, folders)
    with pytest.raises(UserError) as e:
        check(job, folders)
    assert e.value.exit_code == 2
    assert e.value.problems[0].remedy
    return e.value.problems[0]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"base_model_name_or_path": "Org/Tiny"},
        {"base_model_name_or_path": "tiny"},
        {"base_model_name_or_path": "tiny-alias"},
        {"base_model_name_or_path": "/workspace/tfs/weights"},  # KAITO's own adapters
        {"base_model_name_or_path": None, "revision": None},
        {"target_modules": "all-linear"},
    ],
)
def test_an_adapter_of_this_model_fits(
    with_adapter: Callable[..., ServingJob], folders: ServingFolders, tmp_path: Path, config: dict[str, Any]
) -> None:
    job = with_adapter(write_adapter(tmp_path / "a", **config))
    fetch(job, folders)
    check(job, folders)
    assert any(line.startswith("adapter 'mine': fits") for line in said(folders))
    assert not any("warning" in line for line in said(folders))


def test_an_adapter_of_another_revision_is_a_warning(
    with_adapter: Callable[..., ServingJob], folders: ServingFolders, tmp_path: Path
) -> None:
    job = with_adapter(write_adapter(tmp_path / "a", revision="d" * 40))
    fetch(job, folders)
    check(job, folders)
    assert any("it was trained on revision dddddddddddd" in line for line in said(folders))


DIGEST = "sha256:" + "e" * 64


@pytest.mark.parametrize(
    ("base", "revision", "warned"),
    [
        ("my-model", DIGEST, False),
        ("moved-since", DIGEST, False),
        ("my-model", "sha256:" + "d" * 64, True),
        ("org/other", "d" * 40, False),  # a commit and a digest cannot be compared
        ("some-preset", "", False),
    ],
)
def test_of_a_folder_the_shapes_tell(
    with_adapter: Callable[..., ServingJob], folders: ServingFolders, model: Path, tmp_path: Path, base: str,
    revision: str, warned: bool,
) -> None:  # fmt: skip
    """A folder may hold any model under any name."""
    adapter = write_adapter(tmp_path / "a", base_model_name_or_path=base, revision=revision or None)
    preset = replace(PRESET, name="my-model", aliases=(), source=ModelSource(folder=str(model), revision=DIGEST))
    job = replace(with_adapter(adapter), preset=preset, model_folder="")
    fetch(job, folders)
    assert (folders.weights / "model.safetensors").resolve() == model / "model.safetensors"
    check(job, folders)
    assert any("trained on revision sha256:dddddddddddd of" in line for line in said(folders)) == warned


def test_an_adapter_of_a_folder_is_served_on_a_preset_that_it_fits(
    with_adapter: Callable[..., ServingJob], folders: ServingFolders, tmp_path: Path
) -> None:
    job = with_adapter(write_adapter(tmp_path / "a", base_model_name_or_path="my-model", revision=DIGEST))
    fetch(job, folders)
    check(job, folders)


WIDER = {"self_attn.qkv_proj": (2 * HIDDEN, 24)}
LLAMA = {"self_attn.q_proj": (HIDDEN, HIDDEN)}


@pytest.mark.parametrize(
    ("adapter", "cause", "remedy"),
    [
        ({"base_model_name_or_path": "org/other"}, "was trained for 'org/other'", "serve it with that model"),
        ({"base_model_name_or_path": "gpt2"}, "was trained for 'gpt2'", "serve it with that model"),
        ({"tensors": lora(linears=WIDER)}, "is for [24, 16], the model's is [24, 8]", "a model of another size"),
        ({"tensors": lora(linears=LLAMA)}, "q_proj (and 1 more), which the model does not have", "architecture"),
        ({"target_modules": ["q_proj"]}, "changes q_proj, which the model does not have", "architecture"),
        ({"tensors": {"x.weight": ("F32", (2, 2))}}, "holds no LoRA matrices", "push the adapter"),
        ({"tensors": dict(list(lora().items())[:-1])}, "has only one of its two matrices", "serve it"),
        ({"rank": 4, "r": 2}, "has rank 4, and its adapter_config.json says 2", "not of one adapter"),
        ({"peft_type": "PROMPT_TUNING"}, "is of the kind PROMPT_TUNING", "train a LoRA adapter"),
    ],
)
def test_an_adapter_that_does_not_fit(
    with_adapter: Callable[..., ServingJob],
    folders: ServingFolders,
    tmp_path: Path,
    adapter: dict[str, Any],
    cause: str,
    remedy: str,
) -> None:
    problem = refused(with_adapter(write_adapter(tmp_path / "a", **adapter)), folders)
    assert problem.message.startswith("the adapter 'mine' ")
    assert cause in problem.message
    assert remedy in problem.remedy


@pytest.mark.parametrize("config", [{"max-lora-rank": 8}, {"vllm": {"max_lora_rank": 8}}])
def test_a_rank_above_what_the_runtime_takes(
    with_adapter: Callable[..., ServingJob], folders: ServingFolders, tmp_path: Path, config: dict[str, Any]
) -> None:
    job = replace(with_adapter(write_adapter(tmp_path / "a", rank=12)), config=config)
    problem = refused(job, folders)
    assert "has rank 12, and the server takes adapters up to rank 8" in problem.message
    assert "max-lora-rank to 16" in problem.remedy
    check(replace(job, config={"max-lora-rank": 16}), folders)


def damaged(folder: Path) -> None:
    os.truncate(folder / "adapter_model.safetensors", 300)


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


@pytest.mark.parametrize(
    ("harm", "cause"),
    [
        (damaged, "has damaged weights"),
        (pickled, "is pickled (adapter_model.bin), and runs code when it is loaded"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
        (lambda f: (f / "adapter_config.json").write_text("["), "is not a JSON object"),
        (lambda f: (f / "adapter_config.json").write_text("[" * 100_000), "is not a JSON object"),
        (lambda f: (f / "chat_template.jinja").write_text("{% for %}"), "does not render: the chat template is not Jinja"),
        (lambda f: (f / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}"), "does not render"),
        (lambda f: (f / "chat_template.jinja").write_text("no words"), "leaves out what the user says"),
        (lambda f: (f / "chat_template.jinja").write_bytes(b"\xff\xfe"), "is not UTF-8"),
    ],
)  # fmt: skip
def test_an_adapter_that_is_damaged_or_hostile(
    with_adapter: Callable[..., ServingJob],
    folders: ServingFolders,
    tmp_path: Path,
    harm: Callable[[Path], Any],
    cause: str,
) -> None:
    folder = write_adapter(tmp_path / "a")
    harm(folder)
    assert cause in refused(with_adapter(folder), folders).message


def test_all_that_is_wrong_is_said_at_once(
    job: ServingJob, folders: ServingFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    monkeypatch.setenv("KAITO_ADAPTER_0", str(write_adapter(tmp_path / "a", base_model_name_or_path="org/other")))
    monkeypatch.setenv("KAITO_ADAPTER_1", str(write_adapter(tmp_path / "b", tensors=lora(linears=LLAMA))))
    (model / "rest.bin").write_bytes(b"pickle")
    volume = {"hostPath": {"path": "/x"}}
    job = replace(job, adapters=(ServedAdapter("a", volume=volume), ServedAdapter("b", volume=volume)))
    fetch(job, folders)
    with pytest.raises(UserError) as e:
        check(job, folders)
    assert [p.message.split(" ")[2].strip("'") for p in e.value.problems[1:]] == ["a", "b"]
    assert "rest.bin of the model is pickled" in e.value.problems[0].message


def test_weights_that_are_cut_off_are_found_before_they_are_loaded(
    job: ServingJob, folders: ServingFolders, model: Path
) -> None:
    os.truncate(model / "model.safetensors", 2000)
    fetch(job, folders)
    with pytest.raises(Failure, match=r"model\.safetensors of the model is damaged"):
        check(job, folders)


def test_another_model_than_the_presets(job: ServingJob, folders: ServingFolders, model: Path) -> None:
    (model / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "hidden_size": 4096}))
    problem = refused(job, folders)
    assert "is another model than tiny: its architecture is LlamaForCausalLM, not TinyForCausalLM" in problem.message


def test_the_template_that_the_user_names(job: ServingJob, folders: ServingFolders, tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text(TEMPLATE)
    named = replace(job, config={"vllm": {"chat-template": str(tmp_path / "mine.jinja")}})
    assert "leaves out what the user says" in refused(named, folders).message, "a file is never read"
    bad = replace(job, config={"chat-template": "{% if %}"})
    assert "does not render" in refused(bad, folders).message
    fetch(job, folders)
    check(replace(job, config={"vllm": {"chat-template": TEMPLATE}}), folders)


@pytest.mark.parametrize("file", ["chat_template.jinja", "adapter_config.json"])
def test_a_link_in_a_volume_reads_no_secret_of_the_pod(
    job: ServingJob, folders: ServingFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """An image that is mounted as a volume may have links to anywhere; they mean files of the pod."""
    adapter = write_adapter(tmp_path / "adapter")
    monkeypatch.setenv("KAITO_ADAPTER_0", str(adapter))
    of = ServedAdapter("mine", volume={"image": {"reference": "r.io/mine:1"}})
    fetch(replace(job, adapters=(of,)), folders)
    (secret := adapter.parent / "secret").write_bytes((adapter / file).read_bytes())
    (adapter / file).unlink()
    (adapter / file).symlink_to(secret)
    with pytest.raises(UserError) as e:
        fetch(replace(job, adapters=(of,)), folders)
    assert e.value.problems[0].field == "inference.adapters[0].source.volumeSource"
    assert f"{file} is a link to" in str(e.value)
    fetch(replace(job, adapters=(replace(of, volume={"hostPath": {"path": str(adapter)}}),)), folders)


def test_names_may_differ_before_the_layers_and_packed_weights_say_no_shape() -> None:
    adapter = Adapter("a", {"r": 4}, {n: Tensor(*t) for n, t in lora().items()})
    wrapped = {
        n.replace("model.", "model.language_model.", 1): Tensor(*t) for n, t in weights().items() if "layers" in n
    }
    assert misfits(adapter, PRESET, wrapped, None) == []
    packed = {n: Tensor("U8", (7, 1)) for n, t in weights().items()}
    assert misfits(adapter, PRESET, packed, None) == []
    tied = {n: Tensor(*t) for n, t in weights().items() if n != "lm_head.weight"}
    head = {"base_model.model.lm_head.lora_A.weight": Tensor("F32", (4, HIDDEN)),
            "base_model.model.lm_head.lora_B.weight": Tensor("F32", (VOCAB, 4))}  # fmt: skip
    assert misfits(Adapter("a", {"r": 4, "target_modules": ["lm_head"]}, head), PRESET, tied, None) == []
    embedding = {"base_model.model.model.embed_tokens.lora_embedding_A": Tensor("F32", (4, VOCAB)),
                 "base_model.model.model.embed_tokens.lora_embedding_B": Tensor("F32", (HIDDEN, 4))}  # fmt: skip
    assert misfits(Adapter("a", {"r": 4}, embedding), PRESET, tied, None) == []


parts = st.sampled_from(["base_model", "model", "layers", "0", "self_attn", "qkv_proj", "lora_A", "lora_B", "weight", "", "lm_head"])  # fmt: skip
tensor = st.builds(Tensor, st.sampled_from(["F32", "U8"]), st.lists(st.integers(0, 30), max_size=3).map(tuple))
scalars = st.one_of(st.none(), st.integers(), st.text(max_size=5), st.lists(st.one_of(st.text(max_size=5), st.integers()), max_size=3))  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.lists(parts, max_size=8).map(".".join), tensor, max_size=6),
    st.dictionaries(
        st.sampled_from(["peft_type", "r", "base_model_name_or_path", "revision", "target_modules", "rank_pattern"]),
        scalars,
    ),
    st.one_of(st.none(), st.integers(0, 64)),
)
def test_whatever_an_adapter_says_it_is_judged(
    tensors: dict[str, Tensor], config: dict[str, Any], limit: int | None
) -> None:
    model = {n: Tensor(*t) for n, t in weights().items()}
    for problem in misfits(Adapter("a", config, tensors), PRESET, model, limit):
        assert problem.message
        assert problem.remedy


# --- as processes


def test_the_stages_are_called_as_in_the_workload(
    with_adapter: Callable[..., ServingJob],
    folders: ServingFolders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = with_adapter(write_adapter(tmp_path / "a", base_model_name_or_path="org/other"))
    (tmp_path / "job.json").write_text(job.to_json())
    monkeypatch.setenv("KAITO_JOB", str(tmp_path / "job.json"))
    assert command.main(["fetch-model"]) == 0
    assert command.main(["check-model"]) == 2
    events = [e for _, e in progress.read(folders.results / progress.FILE_NAME)]
    assert {e["stage"] for e in events} == {"fetch", "check"}  # what whoever runs the workload waits for
    assert (events[-1]["event"], events[-1]["exit_code"]) == ("failed", 2)
    assert "the adapter 'mine' was trained for 'org/other'" in capsys.readouterr().err
    monkeypatch.delenv("KAITO_ADAPTERS")
    assert command.main(["fetch-model"]) == 2
    assert "KAITO_ADAPTERS unset" in capsys.readouterr().err


def test_an_adapter_of_kaito_names_its_preset_in_the_image(
    job: ServingJob, folders: ServingFolders, logged_in: str, tmp_path: Path
) -> None:
    """Its adapter_config.json only has the path of the container that trained it."""
    adapter = write_adapter(tmp_path / "a", base_model_name_or_path="/workspace/tfs/weights", revision=None)
    for preset, fits in (("tiny", True), ("phi-3-mini-4k-instruct", False)):
        layout = tmp_path / preset
        build_adapter_image(adapter, layout, model_name=preset, annotations={}, tag="1")
        reference = Reference.parse(f"{logged_in}/{preset}:1")
        push(layout, reference, credentials_for(reference))
        with_it = replace(job, adapters=(ServedAdapter("mine", image=str(reference)),))
        if fits:
            fetch(with_it, folders)
            check(with_it, folders)
        else:
            assert "was trained for 'phi-3-mini-4k-instruct'" in refused(with_it, folders).message
