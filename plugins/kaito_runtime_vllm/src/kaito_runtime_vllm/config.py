"""From KAITO's ``inference_config.yaml`` to a complete configuration: defaults, checks, and words for everything that is wrong.

    kv_cache_cpu_memory_utilization: 0.5
    vllm:
      max-model-len: 32768
      any-other-flag-of-vllm-serve: …

Flags are known from data (`kaito_runtime_vllm.known`), so that a mistyped one is found before a machine is paid for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from kaito_core.planning.config_files import is_template
from kaito_core.plugins.types import Preset, ServedAdapter
from kaito_core.problems import Problem, UserError
from kaito_runtime_vllm import flags, layout
from kaito_runtime_vllm.known import known

CPU_CACHE: Final = "kv_cache_cpu_memory_utilization"

SECTIONS: Final = ("vllm", CPU_CACHE, "max_probe_steps")

DEFAULTS: Final[Mapping[str, Any]] = {
    # A server that is told to go answers what it has begun. kaito's pods have 120 seconds, of which 5 go to the Service forgetting
    # them and some 10 to the end of the engine.
    "shutdown-timeout": 90,
    # Probes and scrapers come every few seconds, and say nothing about what is going on.
    "disable-access-log-for-endpoints": "/health,/healthz,/metrics",
}

_LISTENS = "Service and probes find the endpoint where kaito lets it listen"
_TLS = "the endpoint speaks plain HTTP inside the cluster: let an ingress or a gateway end TLS"
_MODEL = "the preset says which model is served"
_LAYOUT = "the plan lays the machines out; set tensor-, pipeline- or data-parallel-size where you know better"
_TEXT = "the endpoint answers text with text"
_FILES = "it names files of the container, the passwords of registries among them; a chat template can be a file of the ConfigMap"

REFUSED: Final[Mapping[str, str]] = {
    **dict.fromkeys(("host", "port", "uds", "grpc", "grpc-port"), _LISTENS),
    **dict.fromkeys(("ssl-keyfile", "ssl-certfile", "ssl-ca-certs", "ssl-cert-reqs", "ssl-ciphers", "enable-ssl-refresh"), _TLS),
    "root-path": "the endpoint's paths are what clients expect; let an ingress rewrite them",
    **dict.fromkeys(("model", "revision", "code-revision", "download-dir", "served-model-name"), _MODEL),
    "hf-token": "secrets do not belong into a ConfigMap or a command line: name a Secret in `modelAccessSecret`",
    "api-key": "secrets do not belong into a ConfigMap or a command line: name a Secret in the annotation kaito.sh/api-key-secret",
    "middleware": "it would stand between the clients and the endpoint's own face",
    "lora-modules": "adapters are listed in `inference.adapters`",
    "config": "write the flags of that file here",
    **dict.fromkeys(("nnodes", "node-rank", "master-addr", "master-port", "headless", "distributed-executor-backend",
                     "data-parallel-rank", "data-parallel-start-rank", "data-parallel-size-local", "data-parallel-address",
                     "data-parallel-rpc-port", "data-parallel-backend", "data-parallel-hybrid-lb", "data-parallel-external-lb",
                     "data-parallel-multi-port-external-lb", "data-parallel-supervisor-port"), _LAYOUT),
    **dict.fromkeys(("runner", "convert", "skip-tokenizer-init", "tokens-only"), _TEXT),
    **dict.fromkeys(("allowed-local-media-path", "hf-config-path", "tokenizer", "log-config-file", "tool-parser-plugin",
                     "reasoning-parser-plugin", "default-mm-loras", "mm-encoder-fp8-scale-path",
                     "mm-encoder-fp8-scale-save-path"), _FILES),
}  # fmt: skip
"""Flags that would break what kaito promises about an endpoint, and the reason."""

GONE: Final = frozenset(
    ("swap-space", "disable-log-requests", "num-scheduler-steps", "use-v2-block-manager", "task", "preemption-mode",
     "guided-decoding-backend", "max-seq-len-to-capture", "num-lookahead-slots", "enable-prompt-adapter", "max-prompt-adapters")
)  # fmt: skip
"""Flags of older versions, which ConfigMaps written for KAITO may still have: without effect, and said."""

POSITIVE: Final = ("max-num-seqs", "max-num-batched-tokens", "max-loras", "tensor-parallel-size", "pipeline-parallel-size",
                   "data-parallel-size", "api-server-count")  # fmt: skip

NEEDS: Final = {"enable-auto-tool-choice": "tool-call-parser", "enable-log-outputs": "enable-log-requests"}
"""Flags that vLLM takes only together with another."""


def resolve(preset: Preset, user: Mapping[str, Any] | None, adapters: tuple[ServedAdapter, ...] = ()) -> dict[str, Any]:
    """``{"vllm": {flag: value}, "kv_cache_cpu_memory_utilization": share, "notes": [words]}``: the user's over the preset's over
    `DEFAULTS`. Raises `UserError` with everything that is wrong at once."""
    user = {} if user is None else user
    if not isinstance(user, Mapping):
        raise UserError("inference_config.yaml is not a mapping", f"write sections: {', '.join(SECTIONS)}")
    problems = list(_unknown_sections(user))
    written, found = _flags(user.get("vllm"), "vllm", by_user=True)
    preset_written, more = _flags(preset.inference.get("vllm"), f"preset {preset.name}: vllm", by_user=False)
    problems += [*found, *more]
    merged = {**DEFAULTS, **preset_written, **written}
    if merged.get("tool-call-parser"):
        merged.setdefault("enable-auto-tool-choice", True)
    problems += _share(user.get(CPU_CACHE), CPU_CACHE)
    if not [p for p in problems if p.severity == "error"]:
        problems += _check(preset, merged)
        problems += _check_adapters(preset, merged, adapters)
    wrong = [p for p in problems if p.severity == "error"]
    if wrong:
        raise UserError(wrong)
    return {
        "vllm": merged,
        CPU_CACHE: float(user.get(CPU_CACHE) or 0),
        "notes": [p.message for p in problems] + list(_notes(user, merged)),
    }


def suggestion(name: str, names: Iterable[Any]) -> str:
    """``did you mean `…`?``, or nothing."""
    from difflib import get_close_matches

    close = get_close_matches(name[:100].lower(), sorted(map(str, names)), n=1, cutoff=0.6)
    return f"did you mean `{close[0]}`?" if close else ""


def _unknown_sections(user: Mapping[str, Any]) -> Iterator[Problem]:
    for name in user:
        if name in SECTIONS or name == "transformers":  # the other runtime's own
            continue
        text = str(name)[:100]
        if text.replace("_", "-") in known().flags:
            yield Problem(f"`{text}` is a flag of vLLM", "write it below `vllm:`", text)
        else:
            yield Problem(
                f"there is no section `{text}`", suggestion(text, SECTIONS) or f"sections: {', '.join(SECTIONS)}", text
            )


def _flags(given: Any, field: str, *, by_user: bool) -> tuple[dict[str, Any], list[Problem]]:
    """The flags that count, under vLLM's own names and in its types, and what is wrong with the others."""
    if given is None:
        return {}, []
    if not isinstance(given, Mapping):
        return {}, [Problem("flags are a mapping", "write `max-model-len: 8192` and the like below `vllm:`", field)]
    own: dict[str, Any] = {}
    problems = []
    for key, value in given.items():
        name = str(key).lstrip("-").replace("_", "-")
        place = f"{field}.{key}"
        name, value = _without_no(name, value)
        flag = known().flags.get(name)
        if flag is None and name in GONE:
            text = f"`{name}` has no effect: vLLM {known().version} no longer has this flag"
            problems.append(Problem(text, "remove it", place, severity="warning"))
        elif flag is None:
            remedy = suggestion(name, known().flags) or f"the flags are those of `vllm serve` {known().version}"
            problems.append(Problem(f"vLLM has no flag `{name[:100]}`", remedy, place))
        elif flag.name in REFUSED:
            if value not in (None, False, "", [], {}):
                problems.append(Problem(f"`{flag.name}` cannot be set here: {REFUSED[flag.name]}", "remove it", place))
        elif value is None or (flag.name == "trust-remote-code" and not by_user):
            continue  # as absent; and whether code is run that came with the weights, only the person says
        elif flag.name in own:
            problems.append(Problem(f"`{flag.name}` is there twice", "remove one of them", place))
        else:
            try:
                own[flag.name] = flags.read(flag, value)
            except ValueError as e:
                remedy = suggestion(str(value), flag.choices) if flag.choices else ""
                problems.append(Problem(f"`{flag.name}`: {e}", remedy, place))
    return own, problems


def _without_no(name: str, value: Any) -> tuple[str, Any]:
    """``no-enable-prefix-caching: true`` is ``enable-prefix-caching: false``."""
    if name.startswith("no-") and name not in known().flags and isinstance(value, bool):
        flag = known().flags.get(name.removeprefix("no-"))
        if flag and flag.type == "bool":
            return flag.name, not value
    return name, value


def _share(value: Any, field: str) -> Iterator[Problem]:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        yield Problem(f"{str(value)[:40]!r} is no share of the machine's memory", "write a number from 0 to 0.9", field)


def _check(preset: Preset, vllm: Mapping[str, Any]) -> Iterator[Problem]:
    """What vLLM would refuse when it starts, or the model does not allow."""
    a = preset.architecture
    for name in POSITIVE:
        if vllm.get(name, 1) < 1:
            yield Problem(f"`{name}` must be 1 or more, not {vllm[name]}", "", f"vllm.{name}")
    if not 0 < vllm.get("gpu-memory-utilization", 0.9) <= 1:
        text = f"`gpu-memory-utilization` is a share from 0 to 1, not {vllm['gpu-memory-utilization']}"
        yield Problem(text, "leave it out: the plan knows what the GPU offers", "vllm.gpu-memory-utilization")
    batch = vllm.get("max-num-batched-tokens", 0)
    if 0 < batch < vllm.get("max-num-seqs", 1):
        text = f"max-num-batched-tokens {batch} is less than max-num-seqs {vllm['max-num-seqs']}: each request needs a token in every step"
        yield Problem(text, "raise the one or lower the other", "vllm.max-num-batched-tokens")
    for name, other in NEEDS.items():
        if vllm.get(name) and not vllm.get(other):
            yield Problem(f"`{name}` needs `{other}`", f"set `{other}` too, or remove it", f"vllm.{name}")
    if vllm.get("enable-per-request-metrics") and vllm.get("disable-log-stats"):
        text = "`enable-per-request-metrics` needs the statistics that `disable-log-stats` switches off"
        yield Problem(text, "remove one of them", "vllm.enable-per-request-metrics")
    if vllm.get("sse-keep-alive-interval", 0) < 0:
        yield Problem("`sse-keep-alive-interval` is negative", "0 means never", "vllm.sse-keep-alive-interval")
    length = vllm.get("max-model-len", -1)
    if length == 0 or (length > a.context and not vllm.get("hf-overrides")):
        yield Problem(f"{preset.name} reads at most {a.context:,} tokens, not {length:,}",
                      f"set max-model-len to {a.context} or less, or leave it out", "vllm.max-model-len")  # fmt: skip
    tensor = vllm.get("tensor-parallel-size", 1)
    if tensor > 0 and not layout.divides(a, tensor):
        possible = ", ".join(str(t) for t in layout.tensor_sizes(a, 64))
        text = (
            f"{preset.name} has {a.heads} heads and {a.kv_heads} of keys and values, which {tensor} GPUs cannot share"
        )
        yield Problem(text, f"tensor-parallel-size can be {possible}", "vllm.tensor-parallel-size")
    pipeline = vllm.get("pipeline-parallel-size", 1)
    if pipeline > 1 and a.name in known().without_pipeline:
        yield Problem(f"vLLM cannot cut a {a.name} into a pipeline", "remove it", "vllm.pipeline-parallel-size")
    if pipeline > a.layers:
        text = f"{preset.name} has {a.layers} layers, which {pipeline} stages cannot share"
        yield Problem(text, f"at most {a.layers}", "vllm.pipeline-parallel-size")
    if vllm.get("chat-template") and not is_template(vllm["chat-template"]):
        yield Problem(f"{vllm['chat-template'][:60]!r} is neither a template nor a file of the ConfigMap",
                      "write the template itself, or put it into the ConfigMap as a key of its own", "vllm.chat-template")  # fmt: skip
    for name, names in (
        ("tool-call-parser", known().tool_parsers),
        ("reasoning-parser", known().reasoning_parsers),
        ("quantization", known().quantizations),
    ):
        if vllm.get(name) and vllm[name] not in names:
            remedy = suggestion(vllm[name], names) or f"one of {', '.join(names)}"
            yield Problem(f"vLLM {known().version} has no {name} {vllm[name][:60]!r}", remedy, f"vllm.{name}")
    if vllm.get("generation-config", "auto") not in ("auto", "vllm"):
        yield Problem("the model's generation settings come with its weights",
                      "`auto` takes them, `vllm` takes vLLM's own; single ones go into override-generation-config",
                      "vllm.generation-config")  # fmt: skip


def _check_adapters(preset: Preset, vllm: Mapping[str, Any], adapters: tuple[ServedAdapter, ...]) -> Iterator[Problem]:
    if not adapters:
        return
    if preset.architecture.name in known().without_lora:
        yield Problem(f"vLLM cannot serve a {preset.architecture.name} with adapters",
                      "serve it with the runtime transformers (annotation kaito.sh/runtime)", "adapters")  # fmt: skip
    if vllm.get("enable-lora") is False:
        yield Problem(
            "there are adapters, and `enable-lora: false` forbids them", "remove one of the two", "vllm.enable-lora"
        )
    for name, count in Counter(a.name for a in adapters).items():
        if count > 1 or name == preset.name:
            what = "is the model's own name" if name == preset.name else f"is the name of {count} adapters"
            yield Problem(f"{name!r} {what}: clients ask for an adapter by its name", "give it another one", "adapters")
    for adapter in adapters:
        if not 0 <= adapter.strength <= 1:
            text = f"the strength of the adapter {adapter.name!r} is {adapter.strength:g}"
            yield Problem(text, 'write a number from "0" to "1"', "adapters")


def _notes(user: Mapping[str, Any], vllm: Mapping[str, Any]) -> Iterator[str]:
    """What is worth a word and stops nothing."""
    if user.get("max_probe_steps") is not None:
        yield "max_probe_steps has no effect: the longest context that fits is computed, not probed for"
    if vllm.get("trust-remote-code"):
        yield "trust-remote-code: Python code that came with the weights will be run"
    if vllm.get("trust-request-chat-template"):
        yield "trust-request-chat-template: every client can have its own template run"
    if vllm.get("speculative-config") or vllm.get("spec-model"):
        yield "the memory of the model that speculates is not in the estimate"
    if vllm.get("max-model-len", -1) > 0 and vllm.get("hf-overrides"):
        yield "hf-overrides: that the model reads max-model-len tokens is taken on trust"
