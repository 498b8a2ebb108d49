"""The model and its adapters, loaded: safetensors only, no code from a repository, nothing filled in at random."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import is_flash_attn_2_available

from kaito_core.plugins.types import ServedAdapter
from kaito_core.problems import Failure, Problem, UserError
from kaito_core.workloads.serving import ServingJob

WEIGHTS: Final = "adapter_model.safetensors"


@dataclass(frozen=True)
class Voice:
    """One name that requests may use: the model itself, or the model with an adapter."""

    name: str
    key: str
    """peft's name of the adapter; empty: none."""
    template: str | None
    """Its chat template; None: the tokenizer's own."""
    stops: tuple[int, ...]
    """Token ids that end an answer."""


@dataclass(frozen=True)
class Loaded:
    """All that is needed to answer."""

    model: Any
    """The language model, with the adapters' layers in it."""
    peft: PeftModel | None
    tokenizer: Any
    voices: Mapping[str, Voice]
    """By every name that a request may use."""
    default: str


def load(job: ServingJob, weights: Path, adapters: Path) -> Loaded:
    """The model in ``weights`` with the job's adapters, each in ``adapters/NAME``.

    Raises `Failure` or `UserError` in words when files are damaged, do not belong together or do not fit into the memory."""
    quiet()
    model = _base(job, weights)
    tokenizer = _tokenizer(weights)
    eos = _eos(model)
    # ``generate`` would fill whatever a request leaves open from the repository's own suggestions; batches would not.
    model.generation_config = transformers.GenerationConfig(eos_token_id=list(eos) or None)
    own = _stop_ids(tokenizer, job.preset.chat.stop_tokens) + eos
    template = _template(job)
    voices = {n: Voice(job.preset.name, "", template, own) for n in (job.preset.name, *job.preset.aliases)}
    peft: PeftModel | None = None
    for number, adapter in enumerate(job.adapters):
        folder, key = adapters / adapter.name, f"adapter{number}"  # peft's names may hold no dot
        _check_rank(adapter, folder, job.config["max-lora-rank"])
        peft = _add(model, peft, adapter, folder, key)
        pinned, stops = _pinned(folder)
        ids = _stop_ids(tokenizer, stops) if stops else ()
        voices[adapter.name] = Voice(adapter.name, key, pinned or template, (ids + eos) if ids else own)
    model.eval()
    model.requires_grad_(False)
    return Loaded(model, peft, tokenizer, voices, job.chat_model)


def quiet() -> None:
    """Keeps the libraries' progress bars and notes to their own developers out of the log."""
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Found missing adapter keys")  # `_add` says it better


def _base(job: ServingJob, folder: Path) -> Any:
    layout = job.configuration
    dtype = getattr(torch, layout.dtype)
    if layout.device == "cuda" and torch.cuda.device_count() < layout.pipeline:
        raise Failure(
            f"the plan wants {layout.pipeline} GPUs and PyTorch sees {torch.cuda.device_count()}",
            "check the driver and that PyTorch was built for it: python -m torch.utils.collect_env",
        )
    attention = job.config["attn-implementation"]
    if attention == "auto":
        attention = "flash_attention_2" if layout.device == "cuda" and is_flash_attn_2_available() else None
    place: Any = {"": "cuda:0" if layout.device == "cuda" else "cpu"}
    try:
        loader: Any = AutoModelForCausalLM
        model, info = loader.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=dtype,
            device_map="auto" if layout.pipeline > 1 else place,
            attn_implementation=attention,
            quantization_config=_quantization(job.config["quantization"], dtype),
            output_loading_info=True,
        )
    except torch.OutOfMemoryError as e:
        raise Failure(f"the model does not fit into the memory of the GPU: {_first_line(e)}",
                      "use a GPU with more memory, or load_in_4bit: `kaito plan` shows what fits") from e  # fmt: skip
    except Exception as e:  # whatever a library says about files that it cannot read
        raise Failure(f"the model in {folder} cannot be loaded: {_first_line(e)}",
                      "fetch it again, and check that the preset's architecture is one that transformers "
                      f"{transformers.__version__} knows") from e  # fmt: skip
    wrong = sorted(info["missing_keys"]) + sorted(str(k) for k in info["mismatched_keys"])
    if wrong:
        raise Failure(f"the weights in {folder} do not belong to its config.json: {len(wrong)} are missing or of another shape, "
                      f"such as {wrong[0]}", "fetch the model again")  # fmt: skip
    return model


def _quantization(name: str, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if name == "bnb-4bit":
        # As kaito-tuner-qlora trains: an adapter corrects the base that it was trained on, its quantisation included.
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if name == "bnb-8bit" else None


def _tokenizer(folder: Path) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, use_fast=True)
    except Exception as e:
        raise Failure(f"the tokenizer in {folder} cannot be loaded: {_first_line(e)}", "fetch the model again") from e
    if not tokenizer.is_fast:
        raise Failure(f"the model in {folder} has no tokenizer.json", "choose a revision that has one")
    return tokenizer


def _eos(model: Any) -> tuple[int, ...]:
    ids = model.generation_config.eos_token_id
    return tuple(ids) if isinstance(ids, list) else () if ids is None else (ids,)


def _stop_ids(tokenizer: Any, tokens: Sequence[str]) -> tuple[int, ...]:
    ids = (tokenizer._tokenizer.token_to_id(token) for token in tokens)
    return tuple(i for i in ids if i is not None)


def _template(job: ServingJob) -> str | None:
    """The user's chat template, or the preset's; None: the model's own."""
    return job.config["chat-template"] or job.preset.chat.template or None


def device_memory(device: str) -> int:
    """Bytes of one device: the smallest GPU that there is, or what this process may have of the RAM (a container may have less than
    its machine: cgroup v2's ``memory.max``)."""
    if device == "cuda":
        return min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    except (OSError, ValueError):  # no cgroup, or "max"
        return memory


# --- adapters


def _add(model: Any, peft: PeftModel | None, adapter: ServedAdapter, folder: Path, key: str) -> PeftModel:
    try:
        if peft is None:
            peft = PeftModel.from_pretrained(model, str(folder), adapter_name=key, local_files_only=True)
        else:
            peft.load_adapter(str(folder), adapter_name=key, local_files_only=True)
        with safe_open(folder / WEIGHTS, framework="pt") as f:
            saved = set(f.keys())
    except Exception as e:  # OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError …
        raise _not_loaded(adapter, _first_line(e)) from e
    loaded = set(get_peft_model_state_dict(peft, adapter_name=key, save_embedding_layers=False))
    if saved != loaded:
        other = sorted(saved ^ loaded)
        raise _not_loaded(adapter, f"{len(other)} tensors are not the model's, such as {other[0]}")
    for module in peft.modules():
        if isinstance(module, LoraLayer) and key in module.scaling:
            module.scaling[key] *= adapter.strength
    return peft


def _not_loaded(adapter: ServedAdapter, words: str) -> UserError:
    return UserError(
        f"the adapter {adapter.name!r} does not load on this model: {words}",
        "serve it with the model that it was trained for",
        field="inference.adapters",
    )


def _check_rank(adapter: ServedAdapter, folder: Path, largest: int) -> None:
    """The plan counted memory for adapters up to ``largest``. Read from the matrices: what a file says of them may be wrong."""
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as f:
            rank = max((f.get_slice(k).get_shape()[0] for k in f.keys() if "lora_A" in k), default=0)  # noqa: SIM118
    except Exception as e:
        raise _not_loaded(adapter, _first_line(e)) from e
    if rank > largest:
        raise UserError(
            Problem(
                f"the adapter {adapter.name!r} has rank {rank}, and the server takes adapters up to rank {largest}",
                f"set max-lora-rank to {rank} below `transformers:` in inference_config.yaml, or train one of a lower rank",
                "inference.adapters",
            )
        )


def _pinned(folder: Path) -> tuple[str, tuple[str, ...]]:
    """The chat template and the stop tokens that the adapter was trained with, as kaito's tuner leaves them in its folder; empty
    where somebody else made it."""
    template = folder / "chat_template.jinja"
    try:
        text = template.read_text(encoding="utf-8") if template.is_file() else ""
        facts = json.loads((folder / "kaito.json").read_bytes()) if (folder / "kaito.json").is_file() else {}
    except (OSError, ValueError, RecursionError):
        return "", ()
    stops = facts.get("stop_tokens") if isinstance(facts, dict) else None
    return text, tuple(s for s in stops if isinstance(s, str)) if isinstance(stops, list) else ()


def _first_line(e: BaseException) -> str:
    return next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)
