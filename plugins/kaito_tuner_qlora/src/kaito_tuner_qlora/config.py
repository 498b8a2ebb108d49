"""From what a person wrote to a complete configuration: defaults, checks and words for everything that is wrong.

Unknown fields are refused with a suggestion, fields of transformers, peft and bitsandbytes that we do not model are passed
through to them, and fields that KAITO reads but that mean nothing here are accepted with a warning that says why.
This module imports pydantic and no torch: the plan and the admission check use it too.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from typing import Any

from pydantic import ValidationError

from kaito_core.data.formats import named_columns
from kaito_core.plugins.types import Preset
from kaito_core.problems import Problem, UserError, errors
from kaito_tuner_qlora.sections import RANK_STABILISED_ALPHA, SECTIONS, LoraConfig, Section, TrainingConfig

METHOD_DEFAULTS: dict[str, dict[str, Any]] = {"qlora": {"QuantizationConfig": {"load_in_4bit": True}}, "lora": {}}
METHODS = tuple(METHOD_DEFAULTS)

ALIASES = {
    "ModelConfig": {"dtype": "torch_dtype"},
    "TrainingArguments": {"max_seq_length": "max_length", "completion_only_loss": "assistant_only_loss",
                          "evaluation_strategy": "eval_strategy"},
}  # fmt: skip
"""Other names of the same thing, in TRL and in other versions of transformers."""

_WHICH_MODEL = "the preset says which model is loaded, and its files are fetched beforehand"
_DECIDED = "the plan decides it from the machine"
_CHECKPOINTS = "an interrupted training goes on by itself from its newest complete checkpoint"
_DATA = "the data is found and rendered by the `check` stage"

IGNORED: dict[str, dict[str, str]] = {
    "ModelConfig": dict.fromkeys(
        ["pretrained_model_name_or_path", "state_dict", "cache_dir", "from_tf", "force_download", "resume_download", "proxies",
         "output_loading_info", "allow_remote_files", "revision", "m_revision"], _WHICH_MODEL)
        | dict.fromkeys(["load_in_4bit", "load_in_8bit"], "it belongs into QuantizationConfig"),
    "LoraConfig": dict.fromkeys(["task_type", "peft_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping",
                                 "peft_version"], "it is always that of a causal language model"),
    "TrainingArguments": dict.fromkeys(["bf16", "fp16", "tf32", "bf16_full_eval", "fp16_full_eval", "use_cpu", "ddp_backend",
                                        "auto_find_batch_size", "local_rank"], _DECIDED)
        | dict.fromkeys(["resume_from_checkpoint", "ignore_data_skip", "save_only_model", "save_on_each_node",
                         "restore_callback_states_from_checkpoint", "enable_jit_checkpoint"], _CHECKPOINTS)
        | dict.fromkeys(["do_train", "do_eval", "do_predict"], "training and evaluation are always done")
        | dict.fromkeys(["dataset_kwargs", "dataset_num_proc", "dataset_text_field", "eos_token", "pad_token",
                         "pad_to_multiple_of", "truncation_mode", "shuffle_dataset", "chat_template_path", "model_init_kwargs",
                         "remove_unused_columns", "label_names", "length_column_name", "train_sampling_strategy",
                         "dataloader_drop_last"], _DATA)
        | dict.fromkeys(["padding_free", "packing_strategy", "eval_packing", "loss_type", "use_liger_kernel",
                         "liger_kernel_config"], "rows are always free of padding and the loss is always computed in chunks")
        | dict.fromkeys(["ddp_find_unused_parameters", "disable_tqdm", "remove_unused_columns"], "")
        | dict.fromkeys(["metric_for_best_model", "greater_is_better"], "the best adapter is the one with the least held-out loss")
        | dict.fromkeys(["use_cache", "average_tokens_across_devices", "prediction_loss_only"], ""),
    "DatasetConfig": dict.fromkeys(["dataset_path", "dataset_extension"], _DATA),
    "DataCollator": dict.fromkeys(["mlm_probability", "pad_to_multiple_of", "return_tensors", "tokenizer"],
                                  "a causal model has nothing to collate"),
}  # fmt: skip
"""Accepted, and without effect, with the reason; no reason: it is what happens anyway, and not worth a word."""

_HUB = "the adapter is pushed to where `tuning.output` says; credentials belong into a Secret"
_PARALLEL = "this tuner trains on one machine, each GPU with a copy of the model"

REFUSED: dict[str, dict[str, str]] = {
    "TrainingArguments": dict.fromkeys(["push_to_hub", "hub_token", "hub_model_id", "hub_strategy", "hub_always_push",
                                        "hub_private_repo", "hub_revision"], _HUB)
        | dict.fromkeys(["deepspeed", "fsdp", "fsdp_config", "parallelism_config", "accelerator_config"], _PARALLEL)
        | dict.fromkeys(["activation_offloading", "label_smoothing_factor", "torch_compile", "torch_compile_backend",
                         "torch_compile_mode"], "this tuner does not have it"),
    "LoraConfig": {"modules_to_save": "whole modules in an adapter are not loaded by serving engines",
                   "trainable_token_indices": "the embeddings stay frozen",
                   "loftq_config": "it quantises again, which the base model of the preset already is",
                   "corda_config": "it names files of the container, and no setting names one",
                   "megatron_config": "this tuner does not have it", "megatron_core": "this tuner does not have it"},
}  # fmt: skip

FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
"""Modules of most models, and what they are part of in the Phi-3 family."""


@cache
def known_fields() -> dict[str, list[str]]:
    """Field names of the libraries that we pass through to, made by scripts/known_fields.py."""
    text = files("kaito_tuner_qlora").joinpath("data/known_fields.json").read_text(encoding="utf-8")
    known: dict[str, list[str]] = json.loads(text)
    return known


def _passed_through(section: str) -> set[str]:
    return set(known_fields().get(section, ())) | set(
        known_fields()["SFTConfig"] if section == "TrainingArguments" else ()
    )


def _suggestion(name: str, names: Iterable[str]) -> str:
    close = get_close_matches(name, sorted(set(names)), n=1, cutoff=0.6)
    return f"did you mean `{close[0]}`?" if close else ""


def defaults(method: str) -> dict[str, Any]:
    """The tuner's own configuration for ``qlora`` or ``lora``, before the preset's and the user's."""
    return read(METHOD_DEFAULTS[method]).model_dump(by_alias=True)


def with_former_defaults(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a resolved configuration was when adapters were rank-stabilised by default; None where the default has no part in it.

    A training that was begun then is known by it."""
    lora = config["LoraConfig"]
    if lora["use_rslora"] or lora["lora_alpha"] != LoraConfig(r=lora["r"]).lora_alpha:
        return None
    return {**config, "LoraConfig": {**lora, "lora_alpha": RANK_STABILISED_ALPHA, "use_rslora": True}}


def schema() -> dict[str, Any]:
    """JSON schema of ``training_config``, with a description and the default of every field."""
    return TrainingConfig.model_json_schema(by_alias=True)


def read(config: Mapping[str, Any]) -> TrainingConfig:
    """A resolved configuration (`TuningJob.config`), typed."""
    try:
        return TrainingConfig.model_validate(config)
    except ValidationError as e:
        raise UserError([_problem(error, ".".join(map(str, error["loc"]))) for error in e.errors()]) from e


def check(preset: Preset, method: str, user: Mapping[str, Any] | None) -> list[Problem]:
    """Everything that is wrong or worth a word about the user's sections: errors and warnings."""
    return _resolve(preset, method, user)[1]


def resolve(preset: Preset, method: str, user: Mapping[str, Any] | None) -> dict[str, Any]:
    """The complete configuration: the user's sections over the preset's over `defaults`; plain JSON-able data.

    Raises `UserError` with every error at once; warnings are what `check` gives."""
    config, problems = _resolve(preset, method, user)
    if errors(problems):
        raise UserError(errors(problems))
    return config


def _resolve(preset: Preset, method: str, user: Mapping[str, Any] | None) -> tuple[dict[str, Any], list[Problem]]:
    method = method.lower()
    if method not in METHODS:
        return {}, [
            Problem(
                f"the method {method!r} is not one of {', '.join(METHODS)}",
                _suggestion(method, METHODS),
                "tuning.method",
            )
        ]
    if not preset.architecture.linears:
        hub = preset.source.hub
        return {}, [
            Problem(
                f"{preset.name} can be served and not tuned: its preset does not say what its layers are made of",
                f"write {hub} as the name, and kaito looks whether its files say it" if hub else "choose another model",
                "tuning.preset.name",
            )
        ]
    user = {} if user is None else user
    if set(user) == {"training_config"}:
        user = user["training_config"] or {}
    if not isinstance(user, Mapping):
        return {}, [Problem("training_config is not a mapping of sections", f"write sections: {', '.join(SECTIONS)}")]
    problems = [
        Problem(
            f"there is no section `{name}`",
            _suggestion(str(name), SECTIONS) or f"sections: {', '.join(SECTIONS)}",
            str(name),
        )
        for name in user
        if name not in SECTIONS
    ]
    config = defaults(method)
    written: dict[str, dict[str, Any]] = {}
    for name, section in SECTIONS.items():
        own, found = _read_section(name, section, user.get(name))
        problems += found
        written[name] = own
        preset_fields = preset.tuning.get(method, {}).get(name, {})
        config[name] = {**METHOD_DEFAULTS[method].get(name, {}), **preset_fields, **own}
        try:
            config[name] = section.model_validate(config[name]).model_dump()
        except ValidationError as e:
            problems += [_problem(error, ".".join([name, *map(str, error["loc"][:1])])) for error in e.errors()]
    if not errors(problems):
        problems += _targets(preset, config["LoraConfig"], "target_modules" in written["LoraConfig"])
        problems += _cross_checks(preset, method, config, written)
    return config, problems


def _read_section(name: str, section: type[Section], given: Any) -> tuple[dict[str, Any], list[Problem]]:
    """The user's fields that count, under our names, and what is wrong with the others."""
    if given is None:
        return {}, []
    if not isinstance(given, Mapping):
        return {}, [Problem("a section is a mapping of fields", f"write `{name}:` and the fields below it", name)]
    ignored, refused, passed = IGNORED.get(name, {}), REFUSED.get(name, {}), _passed_through(name)
    own, problems = {}, []
    for key, value in given.items():
        field = f"{name}.{key}"
        key = ALIASES.get(name, {}).get(key, key)
        if name == "ModelConfig" and key == "trust_remote_code":
            if value not in (False, None, "false", "False"):
                problems.append(Problem("code from a model repository is never run", "remove the field", field))
        elif key in refused and value not in (None, False, "", [], {}, 0, 0.0):
            problems.append(Problem(f"`{key}` cannot be used here: {refused[key]}", "remove the field", field))
        elif key in section.model_fields:
            if value is not None:  # as absent: the default
                own[key] = value
        elif key in ignored or key in refused:
            if ignored.get(key):
                problems.append(Problem(f"`{key}` has no effect here: {ignored[key]}", "", field, severity="warning"))
        elif key in passed:
            own[key] = value
        else:
            remedy = _suggestion(str(key), [*section.model_fields, *passed, *ALIASES.get(name, {})])
            problems.append(Problem(f"there is no field `{key}` in {name}", remedy or "remove the field", field))
    return own, problems


def _problem(error: Any, field: str) -> Problem:
    """A pydantic error in our words."""
    given = error.get("input")
    return Problem(f"{error['msg'][:1].lower()}{error['msg'][1:]} (given: {given!r})", "", field)


def _targets(preset: Preset, lora: dict[str, Any], given: bool) -> list[Problem]:
    """Fills ``target_modules`` in and checks the names against the preset's modules."""
    linears = preset.architecture.linears
    if not lora["target_modules"] or lora["target_modules"] == ["all-linear"]:
        lora["target_modules"] = list(preset.lora_targets)
    field, problems, names = "LoraConfig.target_modules", [], []
    for name in lora["target_modules"]:
        if name in linears:
            names.append(name)
        elif FUSED.get(name) in linears:
            names.append(FUSED[name])
            if given:
                text = f"{preset.name} has `{name}` as a part of `{FUSED[name]}`, which is targeted instead"
                problems.append(Problem(text, f"write `{FUSED[name]}`", field, severity="warning"))
        else:
            text = f"{preset.name} has no linear module `{name}`"
            problems.append(Problem(text, _suggestion(name, linears) or f"modules: {', '.join(linears)}", field))
    lora["target_modules"] = list(dict.fromkeys(names))
    return problems


def _cross_checks(preset: Preset, method: str, config: Mapping[str, Any], written: Mapping[str, Any]) -> list[Problem]:
    problems = []
    quantization, training = config["QuantizationConfig"], config["TrainingArguments"]
    widths = [w for w in ("load_in_4bit", "load_in_8bit") if quantization[w]]
    if method == "qlora" and len(widths) == 2 and "load_in_4bit" not in written["QuantizationConfig"]:
        quantization["load_in_4bit"] = False  # the default gives way to what was asked for
        widths = ["load_in_8bit"]
    if method == "lora" and widths:
        problems.append(Problem("lora trains over the uncompressed model", "set the method to qlora, or remove the field",
                                f"QuantizationConfig.{widths[0]}"))  # fmt: skip
    if method == "qlora" and len(widths) != 1:
        problems.append(Problem(f"qlora needs exactly one of load_in_4bit and load_in_8bit, here {'both' if widths else 'none'} is true",
                                "set load_in_4bit: true, or the method to lora", "QuantizationConfig"))  # fmt: skip
    output_dir = posixpath.normpath(posixpath.join("/mnt", training["output_dir"]))
    if not output_dir.startswith("/mnt/"):
        problems.append(
            Problem(f"{training['output_dir']!r} is not below /mnt", "use /mnt/results", "TrainingArguments.output_dir")
        )
    training["output_dir"] = output_dir
    context = preset.architecture.context
    if training["max_length"] > context:
        if "max_length" in written["TrainingArguments"]:
            problems.append(Problem(f"{preset.name} reads at most {context} tokens, not {training['max_length']}",
                                    f"set max_length to {context} or less", "TrainingArguments.max_length"))  # fmt: skip
        training["max_length"] = context
    for name in ("optim", "lr_scheduler_type"):
        if training[name] not in known_fields()[name]:
            remedy = _suggestion(training[name], known_fields()[name]) or f"one of {', '.join(known_fields()[name])}"
            problems.append(
                Problem(f"transformers has no {name} {training[name]!r}", remedy, f"TrainingArguments.{name}")
            )
    if config["DataCollator"]["mlm"]:
        text = "`mlm: true` means nothing for a causal language model and is treated as false"
        problems.append(Problem(text, "remove the field", "DataCollator.mlm", severity="warning"))
    try:
        named_columns(config["DatasetConfig"])
    except UserError as e:
        problems.extend(e.problems)
    if training["early_stopping_patience"] and config["DatasetConfig"]["train_test_split"] >= 1:
        problems.append(Problem("early stopping needs held-out data, and train_test_split is 1", "set it to 0.95",
                                "TrainingArguments.early_stopping_patience"))  # fmt: skip
    return problems
