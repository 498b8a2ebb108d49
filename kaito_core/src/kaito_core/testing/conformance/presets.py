"""The standard tests of presets: that what they say is true, and that something can be done with it.

class TestMyModel(PresetTests):
    plugin = "my_preset.plugin"
    model_folder = "model"          # beside the test file: config.json and the tokenizer's files; no weights are needed
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import pytest

from kaito_core.data.chat_format import stop_ids, unnamed
from kaito_core.models.architecture import Refused, class_of
from kaito_core.models.files import (
    CONFIG,
    LARGEST_TEXT,
    TEXTS,
    TOKENIZER,
    UNKNOWN_LICENCE,
    Model,
    Raw,
    json_object,
    model_of,
    reduced_tokenizer,
)
from kaito_core.models.folder import read_folder
from kaito_core.plugins.installed import PRESETS, Kind
from kaito_core.plugins.types import Architecture, ChatFormat, ModelSource, Preset
from kaito_core.problems import KaitoError, UserError
from kaito_core.testing.conformance.base import Kit, proper_name
from kaito_core.testing.conformance.machines import PROVISIONER, USUAL

NO_FOLDER = "model_folder is not given, and the preset's files are in no package: nothing to hold it against"

TALK = [("system", "Be brief."), ("user", "What is 2+2?"), ("assistant", "It is 4."), ("user", "And 3+3?"), ("assistant", "It is 6.")]  # fmt: skip


@dataclass(frozen=True)
class Files:
    """What is at hand of a model."""

    folder: Path
    model: Model | None
    """What kaito itself reads from it; None where it does not know the architecture."""
    refused: str
    """Why it does not."""
    weights: bool
    """Whether the weights are there too."""


class PresetTests(Kit):
    """See the module."""

    kind: ClassVar[Kind[Any]] = PRESETS

    model_folder: ClassVar[Any] = None
    """A folder with config.json and the tokenizer's files, relative to the test file; of several presets a mapping by name. Or
    override it with a fixture of this name. A preset whose source is a package needs none."""

    @pytest.fixture
    def preset(self, record: Preset) -> Preset:
        """The preset that is tested."""
        return record

    @pytest.fixture
    def files(self, request: pytest.FixtureRequest, preset: Preset) -> Files:
        """What is at hand of its model; the test is skipped when that is nothing."""
        given = type(self).model_folder
        if given is not None and not isinstance(given, str | Path | Mapping):
            given = request.getfixturevalue("model_folder")
        if isinstance(given, Mapping):
            given = given.get(preset.name)
        if given:
            return read_files(request.path.parent / given, preset)
        if preset.source.package:
            return read_files(packaged(preset), preset)
        pytest.skip(NO_FOLDER)

    @pytest.fixture
    def chat(self, request: pytest.FixtureRequest, preset: Preset) -> ChatFormat:
        """The preset's template and stop tokens, completed from the model's own files where it leaves them to those."""
        _needs("jinja2")
        if preset.chat.template and preset.chat.stop_tokens:
            return preset.chat
        from kaito_core.data.chat import completed

        found = completed(preset.chat, request.getfixturevalue("files").folder)
        if not found.template:
            pytest.skip("neither the preset nor the model's files have a chat template: it is tuned on plain text")
        return found

    @pytest.fixture
    def special(self, request: pytest.FixtureRequest, preset: Preset) -> Mapping[str, str]:
        """The tokenizer's named tokens, which templates may use; empty where there are no files."""
        from kaito_core.data.chat import special_tokens

        try:
            return special_tokens(request.getfixturevalue("files").folder)
        except pytest.skip.Exception:
            return {}

    # --- names and sources

    def test_its_names_are_proper(self, preset: Preset) -> None:
        """Lower case, and no alias twice or the same as the name."""
        names = [preset.name, *preset.aliases]
        assert all(map(proper_name, names)), f"{names}: lower-case letters, digits, '.', '_' and '-'"
        assert len(names) == len(set(names)), f"{names}: a name is there twice"

    def test_its_licence_is_named(self, preset: Preset) -> None:
        """Whoever tunes a model has to know what they may do with the result."""
        assert preset.licence.strip(), "licence is empty: an SPDX identifier, or the licence's own name"
        assert preset.licence.lower() not in (UNKNOWN_LICENCE, "other", "todo"), f"licence is {preset.licence!r}"

    def test_its_revision_is_pinned(self, preset: Preset) -> None:
        """The numbers were read from one commit; a branch changes below them."""
        source = preset.source
        assert not source.folder, f"the source is the folder {source.folder}, which means nothing on another machine"
        if source.hub:
            assert re.fullmatch(r"[\w.-]+/[\w.-]+", source.hub), f"source.hub is {source.hub!r}, not org/name"
            assert re.fullmatch(r"[0-9a-f]{40}", source.revision), (
                f"source.revision is {source.revision!r}: give the 40 hexadecimal digits of a commit, not a branch or a tag"
            )
        else:
            assert (packaged(preset) / CONFIG).is_file(), f"{source} has no {CONFIG} in {source.path or '.'}"

    # --- numbers

    def test_its_numbers_agree_with_each_other(self, preset: Preset) -> None:
        """What must hold for any model, whatever its files say."""
        a = preset.architecture
        wrong = [f"{n} is {v}" for n, v in _positive(a).items() if not isinstance(v, int) or v <= 0]
        if a.parameters <= 0 and (a.linears or preset.weights <= 0):
            # Of a model that is only served, the bytes of its weights are enough.
            wrong.append(f"parameters is {a.parameters}, and weights is {preset.weights}")
        if a.heads and a.kv_heads and a.heads % a.kv_heads:
            wrong.append(f"{a.heads} heads cannot share {a.kv_heads} key-value heads")
        if a.linears:
            wrong += [f"linears.{n} is {s}" for n, s in a.linears.items() if len(s) != 2 or min(s) <= 0]
            least = a.vocab * a.hidden * (1 if a.tied_embeddings else 2)
            if a.linear_parameters + least > a.parameters:
                wrong.append(
                    f"parameters are {a.parameters:,}, and the linear modules of all layers and the embeddings alone are "
                    f"{a.linear_parameters + least:,}"
                )
        if a.sliding_window is not None and a.sliding_window <= 0:
            wrong.append(f"sliding_window is {a.sliding_window}")
        assert not wrong, "; ".join(wrong)

    def test_its_numbers_agree_with_config_json(self, preset: Preset, files: Files) -> None:
        """And, where the weights are there, with their shapes."""
        read = _read(files).preset
        differing = _differences(preset.architecture, read.architecture)
        if preset.dtype != read.dtype:
            differing.append(f"dtype is {preset.dtype}, and the files say {read.dtype}")
        if preset.quantization != read.quantization:
            differing.append(f"quantization is {preset.quantization!r}, and the files say {read.quantization!r}")
        if files.weights and preset.weights_bytes != read.weights_bytes:
            differing.append(
                f"the weights are {read.weights_bytes:,} bytes, and by the preset {preset.weights_bytes:,}"
            )
        assert not differing, "; ".join(differing)

    def test_lora_targets_are_linear_modules(self, preset: Preset) -> None:
        """A preset that can be tuned says what LoRA changes; one that cannot says neither."""
        a = preset.architecture
        if not a.linears:
            assert not preset.lora_targets
            pytest.skip("its linear modules are not known: it is served and not tuned")
        assert preset.lora_targets, f"lora_targets is empty; there is {', '.join(a.linears)}"
        assert len(set(preset.lora_targets)) == len(preset.lora_targets), "a target is named twice"

    def test_lora_targets_are_in_the_model(self, preset: Preset, files: Files) -> None:
        """Under these names, and with these shapes."""
        read = _read(files)
        if not preset.lora_targets:
            pytest.skip("it is served and not tuned")
        shapes = read.preset.architecture.linears
        assert shapes, f"the preset can be tuned, and its model cannot: {read.not_tunable}"
        wrong = [t for t in preset.lora_targets if tuple(preset.architecture.linears[t]) != tuple(shapes.get(t, ()))]
        assert not wrong, "; ".join(
            f"{t} is {tuple(preset.architecture.linears[t])} by the preset, and "
            + (
                f"{tuple(shapes[t])} in the model"
                if t in shapes
                else f"not in the model, which has {', '.join(shapes)}"
            )
            for t in wrong
        )

    # --- conversations

    def test_the_template_renders_a_system_turn(self, chat: ChatFormat, special: Mapping[str, str]) -> None:
        """Or refuses it, as models do that have no such role; words of it that are left out are an error."""
        rendered = _rendered(TALK[:3], chat, special)
        assert TALK[0][1] in rendered.text

    def test_the_template_renders_several_turns(self, chat: ChatFormat, special: Mapping[str, str]) -> None:
        """In order, each once, and the same text before an answer whatever comes after it."""
        rendered = _rendered(TALK[1:], chat, special)
        at = [rendered.text.find(words) for _, words in TALK[1:]]
        assert at == sorted(at), f"the turns are not in order: {rendered.text!r}"
        assert -1 not in at, f"a turn is missing: {rendered.text!r}"

    def test_the_template_has_a_generation_prompt(self, chat: ChatFormat, special: Mapping[str, str]) -> None:
        """With which a server asks, and on which training goes on: the same text."""
        from kaito_core.data.chat import render_prompt

        asked = render_prompt(_messages(TALK[1:2]), chat, special)
        whole = _rendered(TALK[1:3], chat, special)
        assert whole.text.startswith(asked), (
            f"what a server asks with is not how a trained conversation begins:\n{asked!r}\n{whole.text!r}"
        )
        assert whole.text[len(asked) :].lstrip().startswith(TALK[2][1]), (
            f"after the generation prompt the answer does not begin: {whole.text[len(asked) :]!r}"
        )

    def test_what_the_assistant_says_is_found(self, chat: ChatFormat, special: Mapping[str, str]) -> None:
        """Each answer is a span of its own that training learns; nobody else's words are."""
        rendered = _rendered(TALK[1:], chat, special)
        said = [rendered.text[start:end] for start, end in rendered.spans]
        assert len(said) == 2, f"two answers are {len(said)} spans: {said}"
        for words, (_, answer) in zip(said, (TALK[2], TALK[4]), strict=True):
            assert answer in words, f"{words!r} lacks {answer!r}"
            assert not any(other in words for role, other in TALK if role != "assistant"), words

    def test_a_stop_token_is_trained(self, chat: ChatFormat, special: Mapping[str, str]) -> None:
        """A model that was never taught to stop does not stop."""
        assert chat.stop_tokens, "chat.stop_tokens is empty: the token that ends an answer, the usual one first"
        rendered = _rendered(TALK[1:], chat, special)
        for start, end in rendered.spans:
            assert rendered.text[start:end].rstrip().endswith(chat.stop_tokens), (
                f"{rendered.text[start:end]!r} ends with none of {chat.stop_tokens}"
            )

    def test_the_tokenizer_knows_the_stop_tokens(self, preset: Preset, files: Files, chat: ChatFormat) -> None:
        """Each as one token of its own, and the mask of what is trained has one of them."""
        _needs("tokenizers")
        if not (files.folder / TOKENIZER).is_file():
            pytest.skip(f"the folder has no {TOKENIZER}")
        from kaito_core.data.tokens import ChatTokenizer

        tokenizer = ChatTokenizer(files.folder, chat)
        strange = [t for t in chat.stop_tokens if t not in tokenizer.stop_ids]
        assert not strange, f"the tokenizer has no token {', '.join(map(repr, strange))}"
        (example,) = tokenizer.encode([_rendered(TALK[1:], chat, tokenizer.special)])
        assert example.trained_tokens, "the mask of what is trained is empty"
        learned = {t for t, m in zip(example.input_ids, example.trained, strict=True) if m}
        assert learned & set(tokenizer.stop_ids.values()), "no stop token is among what is trained"

    # --- plans

    @pytest.mark.parametrize("gpu", USUAL)
    def test_tuning_is_planned_on_the_usual_gpus(self, preset: Preset, gpu: str) -> None:
        """With the installed tuners: an answer, or a refusal with a remedy."""
        methods = _host().methods()
        if not methods:
            pytest.skip("no tuner is installed: pip install kaito-tuner-qlora")
        for method in methods:
            tuning = (
                f"tuning:\n  preset: {{name: {preset.name}}}\n  method: {method}\n"
                '  input: {urls: ["https://example.com/data.jsonl"]}\n  output: {image: example.com/a:1, imagePushSecret: push}\n'
            )
            _answers(tuning, gpu, preset)

    @pytest.mark.parametrize("gpu", USUAL)
    def test_serving_is_planned_on_the_usual_gpus(self, preset: Preset, gpu: str) -> None:
        """With the installed runtimes: an answer, or a refusal with a remedy."""
        if not _host().runtimes():
            pytest.skip("no inference runtime is installed: pip install kaito-runtime-vllm")
        _answers(f"inference:\n  preset: {{name: {preset.name}}}\n", gpu, preset)

    # --- for real, on a small copy of the architecture

    @pytest.fixture
    def small(
        self, request: pytest.FixtureRequest, preset: Preset, chat: ChatFormat, tmp_path: Path
    ) -> tuple[Preset, Path]:
        """A small copy, and its folder. Of several presets of one class the first stands for all."""
        first = next(p for _, p in sorted(self.found().items()) if _same_kind(p, preset))
        if first.name != preset.name:
            pytest.skip(f"the same architecture as {first.name}: one small copy is enough")
        if not preset.architecture.linears:
            pytest.skip("its linear modules are not known: no small copy can be made")
        from kaito_core.testing.conformance.shrunken import shrink

        try:
            folder = request.getfixturevalue("files").folder
        except pytest.skip.Exception:
            folder = None
        return shrink(preset, chat, folder, tmp_path / "model"), tmp_path / "model"

    @pytest.mark.slow
    def test_a_small_copy_is_tuned(self, preset: Preset, small: tuple[Preset, Path], tmp_path: Path) -> None:
        """With the installed tuners' first method that can run here; and it takes about as much memory as was estimated."""
        if not preset.lora_targets:
            pytest.skip("it is served and not tuned")
        methods = {m: t for m, t in _host().methods().items() if not t.missing()}
        if not methods:
            pytest.skip("no tuner that could run here is installed: pip install 'kaito-tuner-qlora[train]'")
        from kaito_core.testing.conformance import tuning

        method, tuner = next(iter(methods.items()))
        estimated, measured = tuning.measured(tuner, method, *small, tmp_path)
        assert tuning.LOWEST <= estimated / measured <= tuning.HIGHEST, (
            f"{method} of a small copy was estimated to need {estimated >> 20} MiB, and took {measured >> 20} MiB"
        )

    @pytest.mark.slow
    def test_a_small_copy_is_served(self, small: tuple[Preset, Path], tmp_path: Path) -> None:
        """With the installed runtimes' first that can run here."""
        preset, folder = small
        found = sorted(_host().runtimes().values(), key=lambda r: -r.priority)
        able = [r for r in found if not r.missing() and r.serves(preset) is None]
        if not able:
            pytest.skip(
                "no inference runtime that could run here is installed: pip install 'kaito-runtime-transformers[serve]'"
            )
        from kaito_core.testing.conformance import serving

        serving.serves(able[0], preset, folder, {}, tmp_path)


# --- the model's files


def packaged(preset: Preset) -> Path:
    """The folder of a model that is shipped in a package. Fails when there is none."""
    try:
        spec = find_spec(preset.source.package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        pytest.fail(f"the package {preset.source.package} cannot be imported", pytrace=False)
    return Path(next(iter(spec.submodule_search_locations)), preset.source.path)


def read_files(folder: Path, preset: Preset) -> Files:
    """What kaito's own reader makes of a folder, with or without weights. Fails when there is no config.json in it."""
    if not (folder / CONFIG).is_file():
        pytest.fail(f"model_folder: there is no {folder / CONFIG}", pytrace=False)
    texts = {n: (folder / n).read_bytes()[: LARGEST_TEXT[n]].decode() for n in TEXTS if (folder / n).is_file()}
    weights = any(folder.glob("*.safetensors"))
    try:
        config = json_object(CONFIG, texts[CONFIG])
        class_of(config)
    except Refused as e:
        return Files(folder, None, e.message, weights)
    try:
        if weights:
            return Files(folder, read_folder(folder), "", weights)
        tokenizer, generation = (
            json_object(n, texts.get(n, "{}")) for n in ("tokenizer_config.json", "generation_config.json")
        )
        if (folder / TOKENIZER).is_file() and unnamed(tokenizer, stop_ids(generation, config)):
            texts[TOKENIZER] = reduced_tokenizer(folder / TOKENIZER)
        texts = {n: t for n, t in texts.items() if n != "model.safetensors.index.json"}
        source = ModelSource(folder=str(folder))
        return Files(folder, model_of(Raw(texts, {}), source, str(folder), name=preset.name), "", weights)
    except (UserError, Refused) as e:
        return Files(folder, None, str(e), weights)


def _read(files: Files) -> Model:
    if files.model is None:
        pytest.skip(f"kaito cannot read the files itself: {files.refused}")
    return files.model


def _differences(preset: Architecture, files: Architecture) -> list[str]:
    found = []
    for name in ("name", "parameters", "layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocab", "context",
                 "tied_embeddings", "sliding_window", "cache_width"):  # fmt: skip
        ours, theirs = getattr(preset, name), getattr(files, name)
        if ours != theirs:
            found.append(f"{name} is {ours}, and the files say {theirs}")
    linears = {n: tuple(s) for n, s in preset.linears.items()}
    if linears and linears != {n: tuple(s) for n, s in files.linears.items()}:
        found.append(f"linears are {linears}, and the files say {dict(files.linears)}")
    return found


def _same_kind(one: Preset, other: Preset) -> bool:
    """Whether one small copy stands for both."""
    a, b = one.architecture, other.architecture
    return (a.name, tuple(a.linears), a.tied_embeddings) == (b.name, tuple(b.linears), b.tied_embeddings)


def _positive(a: Architecture) -> dict[str, Any]:
    return {n: getattr(a, n) for n in ("layers", "hidden", "heads", "kv_heads", "head_dim", "vocab", "context")}


# --- conversations


def _messages(talk: list[tuple[str, str]]) -> list[Any]:
    from kaito_core.data.formats import Message

    return [Message(role, content) for role, content in talk]


def _rendered(talk: list[tuple[str, str]], chat: ChatFormat, special: Mapping[str, str]) -> Any:
    from kaito_core.data.chat import ChatError, render

    try:
        return render(_messages(talk), chat, special)
    except ChatError as e:
        message = e.problems[0].message
        if talk[0][0] == "system" and "refuses the conversation" in message:
            pytest.skip(f"the model has no system role: {message}")
        pytest.fail(f"{message}\n{e.problems[0].remedy}", pytrace=False)


def _needs(module: str) -> None:
    if find_spec(module) is None:
        pytest.skip(f"{module} is not installed: pip install 'kaito-core[test]'")


# --- plans


def _host() -> Any:
    from kaito_core.plugins.manager import load_plugins

    return load_plugins()


class _Registry:
    """The installed plugins, and this very preset even where its plugin is not installed."""

    def __init__(self, preset: Preset) -> None:
        self._preset = preset

    def preset(self, name: str) -> Preset:
        return self._preset

    def tuner(self, method: str) -> Any:
        return _host().tuner(method)

    def runtimes(self) -> Any:
        return _host().runtimes()


def _answers(task: str, gpu: str, preset: Preset) -> None:
    from kaito_core.api import load_text
    from kaito_core.planning.plan import Catalog, plan

    text = f"apiVersion: kaito.sh/v1beta1\nkind: Workspace\nmetadata: {{name: conformance}}\nresource: {{}}\n{task}"
    catalog = Catalog(_Registry(preset), (USUAL[gpu],), installed=frozenset({PROVISIONER}))
    try:
        made = plan(load_text(text).workspaces[0], catalog)
    except UserError as e:
        without = [p.message for p in e.problems if not p.remedy]
        assert not without, f"refused without a word on what to do: {'; '.join(without)}"
        return
    except KaitoError as e:
        pytest.fail(str(e), pytrace=False)
    if made.chosen is None:
        assert made.refusal is not None
        assert made.refusal.remedy, f"refused without a word on what to do: {made.refusal.message}"
        return
    fit = made.chosen.fit
    assert fit.memory.total > 0
    assert fit.memory.total <= fit.capacity
    assert math.isfinite(fit.memory.total)
