"""Whether an adapter fits a model, told from its configuration and from the headers of both: pure, and no weight is read.

Names and shapes are those of peft (github.com/huggingface/peft, "LoRA checkpoint format"): for a linear module with the weight
[out, in] there are ``base_model.model.MODULE.lora_A.weight`` [r, in] and ``….lora_B.weight`` [out, r]; for an embedding
[tokens, width] ``lora_embedding_A`` [r, tokens] and ``lora_embedding_B`` [width, r].
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kaito_core.artifacts.manifest import MODEL_NAME
from kaito_core.models.safetensors_header import Tensor
from kaito_core.plugins.types import Preset
from kaito_core.problems import Problem

BASE_NAME, BASE_REVISION = "sh.kaito.base.name", "sh.kaito.base.revision"
"""The annotations in which kaito's adapter images name the model that they belong to."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LORA = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.(?P<part>lora_(?:embedding_)?[AB])(?:\.default)?(?:\.weight)?"
)
_OTHER = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+?)(?:\.(?:modules_to_save|base_layer))*(?:\.default)?\.weight"
)
_PACKED = frozenset({"U8", "I32", "U32", "F4"})
"""Types in which several weights share a number: the shape says nothing of the module's."""


@dataclass(frozen=True)
class Adapter:
    """What is known of an adapter before it is loaded."""

    name: str
    config: Mapping[str, Any]
    """adapter_config.json."""
    tensors: Mapping[str, Tensor]
    annotations: Mapping[str, str] = field(default_factory=dict)
    """Of the image that it came from."""


def misfits(adapter: Adapter, preset: Preset, model: Mapping[str, Tensor], largest_rank: int | None) -> list[Problem]:
    """Everything that keeps this adapter from being served on the model whose tensors are ``model``."""
    kind = str(adapter.config.get("peft_type", "LORA")).upper()
    if kind != "LORA":
        return [_problem(adapter, f"is of the kind {kind[:40]}, and only LoRA is served", "train a LoRA adapter")]
    found = [_wrong_base(adapter, preset), *_wrong_shapes(adapter, model), _wrong_rank(adapter, largest_rank)]
    return [p for p in found if p is not None]


def other_revision(adapter: Adapter, preset: Preset) -> str:
    """A sentence when the adapter was made for another revision of this very model; empty otherwise."""
    made, served = _made_for(adapter), preset.source.revision
    if not made or not served or preset.source.package or _is_digest(made) != _is_digest(served):
        return ""
    if made.startswith(served) or served.startswith(made):
        return ""
    shown = 19 if _is_digest(made) else 12
    return f"it was trained on revision {made[:shown]} of the model, and {served[:shown]} is served: its answers may differ"


def _made_for(adapter: Adapter) -> str:
    """The revision of the model that an adapter says it belongs to: a commit, or the digest of a folder."""
    return str(adapter.config.get("revision") or adapter.annotations.get(BASE_REVISION) or "")


def _is_digest(revision: str) -> bool:
    return revision.startswith("sha256:")


def base_of(adapter: Adapter) -> str:
    """The model that an adapter says it belongs to; empty when it only says a path of the machine that trained it."""
    named = adapter.config.get("base_model_name_or_path")
    if isinstance(named, str) and named and (_HUB_NAME.fullmatch(named) or not re.search(r"[/\\]", named)):
        return named
    return adapter.annotations.get(BASE_NAME) or adapter.annotations.get(MODEL_NAME) or ""


def _wrong_base(adapter: Adapter, preset: Preset) -> Problem | None:
    base = base_of(adapter)
    hub = preset.source.hub if _HUB_NAME.fullmatch(preset.source.hub) else ""
    known = {n.lower() for n in (hub, preset.name, *preset.aliases, preset.source.package) if n}
    if preset.source.folder or _is_digest(_made_for(adapter)) or ("/" in base and not hub):
        known.add(base.lower())  # the one or the other is a folder of whatever origin: its shapes have to tell
    if not base or base.lower() in known:
        return None
    return _problem(
        adapter,
        f"was trained for {base[:200]!r}, and the model that is served is {hub or preset.name!r}",
        f"serve it with that model, or train one for {preset.name}",
    )


def _wrong_shapes(adapter: Adapter, model: Mapping[str, Tensor]) -> list[Problem]:
    modules: dict[str, dict[str, Tensor]] = {}
    wrong: list[str] = []
    absent: list[str] = []
    names = _Names(model)
    for name, tensor in adapter.tensors.items():
        if match := _LORA.fullmatch(name):
            modules.setdefault(match["module"], {})[match["part"]] = tensor
        elif (match := _OTHER.fullmatch(name)) and "lora_" not in name:
            whole = names.of(match["module"])
            if whole is None:
                absent.append(match["module"])
            elif whole and tensor.shape not in [t.shape for t in whole]:
                wrong.append(f"{match['module']} is {list(tensor.shape)}, the model's is {list(whole[0].shape)}")
    if not modules:
        return [_problem(adapter, "holds no LoRA matrices", "push the adapter that training has written")]
    for module, parts in modules.items():
        weights = names.of(module)
        if weights is None:
            absent.append(module)
        elif text := _misshapen(module, parts, weights):
            wrong.append(text)
    found = []
    targets = adapter.config.get("target_modules")
    if isinstance(targets, list):
        absent += [t for t in targets if isinstance(t, str) and not names.has_module(t)]
    if absent:
        found.append(
            _problem(
                adapter,
                f"changes {_several(absent)}, which the model does not have",
                "it was trained for another architecture: serve it with the model that it was trained for",
            )
        )
    if wrong:
        found.append(
            _problem(
                adapter,
                f"does not have the model's shapes: {_several(wrong)}",
                "it was trained for a model of another size: serve it with that one",
            )
        )
    return found


def _misshapen(module: str, parts: Mapping[str, Tensor], weights: list[Tensor]) -> str:
    embedding = "lora_embedding_A" in parts
    down, up = (parts.get(f"lora_{'embedding_' if embedding else ''}{m}") for m in "AB")
    if down is None or up is None:
        return f"{module} has only one of its two matrices"
    if len(down.shape) != 2 or len(up.shape) != 2:
        return "" if len(down.shape) == len(up.shape) else f"{module} has matrices of different kinds"
    if down.shape[0] != up.shape[1]:
        return f"{module} has matrices of the ranks {down.shape[0]} and {up.shape[1]}"
    shape = (down.shape[1], up.shape[0]) if embedding else (up.shape[0], down.shape[1])
    if not weights or shape in [t.shape for t in weights]:
        return ""
    return f"{module} is for {list(shape)}, the model's is {list(weights[0].shape)}"


def _wrong_rank(adapter: Adapter, largest: int | None) -> Problem | None:
    downs = [t for name, t in adapter.tensors.items() if (m := _LORA.fullmatch(name)) and m["part"].endswith("A")]
    rank = max((t.shape[0] for t in downs if len(t.shape) == 2), default=0)
    said, pattern = adapter.config.get("r"), adapter.config.get("rank_pattern")
    if type(said) is int and rank > said and not pattern:
        return _problem(
            adapter,
            f"has rank {rank}, and its adapter_config.json says {said}",
            "the two files are not of one adapter: push it again",
        )
    if largest is not None and rank > largest:
        return _problem(
            adapter,
            f"has rank {rank}, and the server takes adapters up to rank {largest}",
            f"set max-lora-rank to {_next_rank(rank)} in inference_config.yaml, or train one of a lower rank",
        )
    return None


def _next_rank(rank: int) -> int:
    """The smallest of vLLM's ranks that is enough (vllm/config/lora.py: 1, 8, 16, 32, 64, 128, 256, 320, 512)."""
    return next((r for r in (1, 8, 16, 32, 64, 128, 256, 320, 512) if r >= rank), rank)


class _Names:
    """The model's modules. What stands before ``layers.`` may differ: a model with other senses wraps its language model."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._weights = {n.removesuffix(".weight"): t for n, t in tensors.items() if n.endswith(".weight")}
        self._modules = {part for n in tensors for part in _prefixes(n)}
        self._by_layer: dict[str, list[str]] = {}
        for module in self._modules:
            if key := _from_layer(module):
                self._by_layer.setdefault(key, []).append(module)
        self._last = {m.rpartition(".")[2] for m in self._modules}

    def has_module(self, name: str) -> bool:
        """Whether any module has this name, or ends in it."""
        if name in self._last or name in self._modules or name.rpartition(".")[2] == "lm_head":
            return True
        return any(m.endswith(f".{name}") for m in self._modules)

    def of(self, module: str) -> list[Tensor] | None:
        """The weights that a module of this name may have; none when its shape cannot be told, None when there is no module."""
        found = [module] if module in self._modules else self._by_layer.get(_from_layer(module), [])
        if not found and module.rpartition(".")[2] == "lm_head":  # where it is tied to the embeddings, it is not stored
            found = [m for m in self._modules if m.endswith("embed_tokens")]
        if not found:
            return None
        weights = [self._weights[m] for m in found if m in self._weights]
        return [] if any(t.dtype in _PACKED or len(t.shape) != 2 for t in weights) else weights


def _prefixes(name: str) -> list[str]:
    """Every module that a tensor is in: ``a.b.c`` is in ``a`` and ``a.b``."""
    return [name[:i] for i, c in enumerate(name) if c == "."]


def _from_layer(module: str) -> str:
    at = module.find("layers.")
    return module[at:] if at >= 0 else ""


def _several(items: list[str]) -> str:
    first = items[0] if len(items[0]) <= 160 else items[0][:157] + "…"
    return first if len(items) == 1 else f"{first} (and {len(items) - 1} more)"


def _problem(adapter: Adapter, what: str, remedy: str) -> Problem:
    return Problem(f"the adapter {adapter.name!r} {what}", remedy, "inference.adapters")
