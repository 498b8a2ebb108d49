"""``check-model``: everything that can be wrong with a model and its adapters, before a GPU is used.

An engine finds an adapter of another model, or of too high a rank, after it has loaded the weights, and says so in a traceback.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kaito_core.artifacts.image import NEEDED
from kaito_core.artifacts.manifest import texts
from kaito_core.artifacts.model_files import PICKLES
from kaito_core.data.chat import model_template
from kaito_core.models.safetensors_header import PREFIX, BadHeader, Header, Tensor, header_length, parse
from kaito_core.plugins.types import ChatFormat, Preset
from kaito_core.problems import Failure, KaitoError, Problem, UserError
from kaito_core.progress import Progress
from kaito_core.stages.adapter_fit import Adapter, base_of, misfits, other_revision
from kaito_core.stages.fetch_model import ANNOTATIONS
from kaito_core.stages.process import ServingFolders
from kaito_core.workloads.serving import ServingJob

TEMPLATE = "chat_template.jinja"
_TEXT_BYTES = 4 << 20


def body(job: ServingJob, folders: ServingFolders, events: Progress) -> Mapping[str, Any]:
    problems = [*_pickles(folders.weights), *_other_model(job, folders.weights)]
    model = tensors_of(folders.weights)
    problems += _own_template(job, folders.weights, events)
    limit = largest_rank(job.config)
    for served in job.adapters:
        problems += _adapter(served.name, folders.adapters / served.name, job, model, limit, folders.weights, events)
    if problems:
        raise UserError(problems)
    return {"tensors": len(model), "adapters": [a.name for a in job.adapters]}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """The tensors of all safetensors files in a folder. A `Failure` for a file that is cut off or none."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            found.update(_header(path).tensors)
        except BadHeader as e:
            raise Failure(
                f"{path.name} of the model is damaged: {e}",
                f"remove {path.resolve()} and start again, so that it is fetched anew",
            ) from None
    return found


def largest_rank(config: Mapping[str, Any]) -> int | None:
    """What the runtime's configuration allows as an adapter's rank (``max-lora-rank``, also below ``vllm``); None: it says nothing."""
    value = _setting(config, "max-lora-rank")
    return value if type(value) is int else None


def _setting(config: Mapping[str, Any], name: str) -> Any:
    """A setting of the runtime, however it is spelt: at the top, or one level down, below the runtime's name."""
    for level in (config, *(v for v in config.values() if isinstance(v, Mapping))):
        for key, value in level.items():
            if str(key).lstrip("-").replace("_", "-") == name:
                return value
    return None


def _header(path: Path) -> Header:
    size = path.stat().st_size
    with path.open("rb") as f:
        text = f.read(header_length(f.read(PREFIX), size))
    return parse(text, size)


def _pickles(folder: Path) -> list[Problem]:
    return [
        Problem(
            f"{path.name} of the model is pickled, and runs code when it is loaded",
            "take it out: the safetensors beside it are what is served",
            "inference.preset",
        )
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in PICKLES
    ]


def _other_model(job: ServingJob, folder: Path) -> list[Problem]:
    """What speaks against a folder or an image that stands for the preset's own weights."""
    if not job.model_folder and not job.model_image:
        return []
    where = job.model_image or job.model_folder
    config = _object(folder / "config.json", "the model", "fetch it again")
    text = config.get("text_config")
    inner: Mapping[str, Any] = {**config, **text} if isinstance(text, Mapping) else config
    shape = job.preset.architecture
    classes = config.get("architectures")
    is_ = {
        "architecture": classes[0] if isinstance(classes, list) and classes else None,
        "hidden size": inner.get("hidden_size"),
        "number of layers": inner.get("num_hidden_layers"),
    }
    wanted = {"architecture": shape.name, "hidden size": shape.hidden, "number of layers": shape.layers}
    return [
        Problem(
            f"{where} is another model than {job.preset.name}: its {what} is {is_[what]}, not {wanted[what]}",
            "name the preset that it belongs to, or other weights",
            "inference.preset",
        )
        for what in wanted
        if is_[what] is not None and is_[what] != wanted[what]
    ]


def _own_template(job: ServingJob, folder: Path, events: Progress) -> list[Problem]:
    """The template that the user names has to work; with the model's own, completions without a conversation work anyway."""
    named = _setting(job.config, "chat-template")
    if isinstance(named, str) and named:
        return _rendered(named, job.preset, folder, "the chat template of the inference configuration")
    own = job.preset.chat.template or model_template(folder)
    if not own:
        events.message("the model has no chat template: it completes text, and does not hold a conversation")
    for problem in _rendered(own, job.preset, folder, "the model's chat template") if own else ():
        events.message(f"warning: {problem.message}")
    return []


def _adapter(
    name: str,
    folder: Path,
    job: ServingJob,
    model: Mapping[str, Tensor],
    limit: int | None,
    weights: Path,
    events: Progress,
) -> Iterable[Problem]:
    def wrong(what: str, remedy: str) -> list[Problem]:
        return [Problem(f"the adapter {name!r} {what}", remedy, "inference.adapters")]

    pickles = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in PICKLES) if folder.is_dir() else []
    missing = [n for n in NEEDED if not (folder / n).is_file()]
    if pickles and missing:
        return wrong(
            f"is pickled ({pickles[0]}), and runs code when it is loaded",
            "save it again with peft where you trust it: model.save_pretrained(FOLDER) writes safetensors",
        )
    if missing:
        return wrong(
            f"has no {' and no '.join(missing)}", "an adapter's image holds both below /data: `kaito push` makes it"
        )
    try:
        config = _object(folder / NEEDED[0], f"the adapter {name!r}", "push the adapter again")
        tensors = _header(folder / NEEDED[1]).tensors
        annotations = texts(_json(folder / ANNOTATIONS)) if (folder / ANNOTATIONS).is_file() else {}
        template = _text(folder / TEMPLATE) if (folder / TEMPLATE).is_file() else ""
    except BadHeader as e:
        return wrong(f"has damaged weights: {e}", "push the adapter again")
    except KaitoError as e:
        return e.problems
    adapter = Adapter(name, config, tensors, annotations)
    found = misfits(adapter, job.preset, model, limit)
    if template:
        found += _rendered(template, job.preset, weights, f"the chat template of the adapter {name!r}")
    if not found:
        base = base_of(adapter) or "a model that it does not name; its shapes are this model's"
        events.message(f"adapter {name!r}: fits, for {base}")
        if note := other_revision(adapter, job.preset):
            events.message(f"warning: the adapter {name!r}: {note}")
    return found


def _rendered(template: str, preset: Preset, folder: Path, what: str) -> list[Problem]:
    """Nothing when the template can render a question, else why not."""
    from kaito_core.data.chat import render_prompt, special_tokens
    from kaito_core.data.formats import Message

    question = "Does this template render?"
    try:
        text = render_prompt(
            [Message("user", question)], ChatFormat(template, preset.chat.stop_tokens), special_tokens(folder)
        )
    except KaitoError as e:
        remedy = e.problems[0].remedy
        return [Problem(f"{what} does not render: {e.problems[0].message}", remedy, "inference")]
    if question not in text:
        return [Problem(f"{what} leaves out what the user says", "mend the template", "inference")]
    return []


def _text(path: Path) -> str:
    with path.open("rb") as f:
        data = f.read(_TEXT_BYTES + 1)
    if len(data) > _TEXT_BYTES:
        raise UserError(f"{path.name} has more than {_TEXT_BYTES:,} bytes", "it is not what its name says")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8", "push it again") from None


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except (ValueError, RecursionError):
        return None


def _object(path: Path, whose: str, remedy: str) -> Mapping[str, Any]:
    found = _json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path.name} of {whose} is not a JSON object", remedy, field="inference")
    return found
