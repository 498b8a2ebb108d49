"""The `verify` stage: the adapter, from disk, on the base model, from disk: does it load, does it help, does it stop?

The base is loaded as it was for training, since an adapter learns to correct that very base, its quantisation included.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file

from kaito_core.artifacts.model_card import CardFacts, Sample, model_card
from kaito_core.data.chat import completed
from kaito_core.models.files import UNKNOWN_LICENCE, preset_name
from kaito_core.problems import Failure
from kaito_core.progress import Progress
from kaito_core.workloads.job import Folders, TuningJob
from kaito_tuner_qlora import artifact, batches
from kaito_tuner_qlora import config as configs
from kaito_tuner_qlora import model as models
from kaito_tuner_qlora.batches import Example
from kaito_tuner_qlora.trainer import held_out_loss

SAMPLES = 5
ANSWER_TOKENS = 160
"""Longest answer that is generated: enough to read, short enough for a model on a CPU."""
SUBSTITUTES = 50
"""Training examples that are measured when nothing was held out."""


def verify(job: TuningJob, folders: Folders, progress: Progress) -> dict[str, Any]:
    """Measures the adapter and writes ``verify.json``, the model card and the rest of ``report.html``; what was found out.

    `Failure` when the adapter does not load, does not fit the base or has learned nothing at all; an adapter that makes the
    held-out loss worse is a loud warning, for its owner to judge."""
    config = configs.read(job.config)
    models.quiet()
    device = models.device_of(job.configuration.device)
    adapter = folders.results / "adapter"
    base = models.load_base(folders.weights, config, device, job.configuration.dtype)
    model = load_adapter(base, adapter)
    progress.message(f"the adapter loads on {job.preset.name}")

    prepared = folders.results / "prepared"
    held_out: Sequence[Example] = batches.read(prepared / "eval.arrow", job.configuration.sequence)
    measured_on = "held-out examples"
    if not held_out:
        held_out = batches.read(prepared / "train.arrow", job.configuration.sequence)[:SUBSTITUTES]
        measured_on = "training examples, as nothing was held out"
    budget = job.configuration.micro_batch * job.configuration.sequence
    after = held_out_loss(model, held_out, budget, device)
    with model.disable_adapter():
        before = held_out_loss(model, held_out, budget, device)

    stops = _token_ids(folders.weights, completed(job.preset.chat, folders.weights).stop_tokens)
    samples = answers(model, held_out, folders.weights, stops, job.preset.architecture.context)
    result: dict[str, Any] = {
        "eval_loss_before": before,
        "eval_loss_after": after,
        "measured_on": measured_on,
        "examples": len(held_out),
        "samples": samples,
        "stops": {
            "before": sum(s["stops_before"] for s in samples),
            "after": sum(s["stops_after"] for s in samples),
            "of": len(samples),
        },
    }
    warnings = _warnings(result)
    result["warnings"] = warnings
    artifact.write_json(folders.results / "verify.json", result)
    _describe(job, folders, adapter, result)
    artifact.write_report(job, folders)
    for line in table(result):
        print(line, flush=True)
    for warning in warnings:
        progress.message(f"WARNING: {warning}")
    losses = {"eval_loss_before": round(before, 5), "eval_loss_after": round(after, 5)}
    return {"adapter": str(adapter), **losses, "stops": result["stops"], "warnings": warnings}


def load_adapter(base: Any, folder: Path) -> Any:
    """The adapter of a folder on ``base``. Raises `Failure` when it is not whole, not for this base, or empty."""
    remedy = "run the `train` stage again"
    try:
        saved = load_file(folder / artifact.WEIGHTS)
        model = PeftModel.from_pretrained(base, str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as e:
        raise Failure(
            f"the adapter in {folder} does not load on the base model: {str(e).strip().splitlines()[0]}", remedy
        ) from e
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    if set(saved) != set(loaded):
        different = sorted(set(saved) ^ set(loaded))
        raise Failure(
            f"the adapter in {folder} is for another model: {len(different)} tensors differ, such as {different[0]}",
            remedy,
        )
    starts = [tensor for name, tensor in saved.items() if "lora_B" in name]
    if not starts or not any(bool(tensor.any()) for tensor in starts):
        raise Failure(
            "the adapter has learned nothing: all its B matrices are zero",
            "check the learning rate and the number of steps",
        )
    if not all(bool(torch.isfinite(tensor).all()) for tensor in saved.values()):
        raise Failure(
            "the adapter holds values that are not numbers", "lower TrainingArguments.learning_rate and train again"
        )
    model.eval()
    return model


def answers(
    model: Any, examples: Sequence[Example], weights: Path, stops: list[int], context: int
) -> list[dict[str, Any]]:
    """What the model says to up to five prompts, without and with the adapter, greedily, and what the data says."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(weights / "tokenizer.json"))
    lm: Any = model.get_base_model()
    ours = lm.config._attn_implementation
    lm.set_attn_implementation("sdpa" if not ours.startswith("flash") else ours)
    found: list[dict[str, Any]] = []
    for example in examples[:SAMPLES]:
        prompt, expected = cut(example)
        room = min(ANSWER_TOKENS, context - len(prompt))
        if room < 1:
            continue
        after, stops_after = _generate(model, prompt, stops, room)
        with model.disable_adapter():
            before, stops_before = _generate(model, prompt, stops, room)
        texts = {"prompt": prompt, "before": before, "after": after, "expected": expected}
        decoded = {k: tokenizer.decode(v, skip_special_tokens=k != "prompt").strip() for k, v in texts.items()}
        # `prompt` is what the model reads, to the token; `question` is what a person reads.
        question = tokenizer.decode(prompt, skip_special_tokens=True).strip()
        found.append({"question": question, **decoded, "stops_before": stops_before, "stops_after": stops_after})
    lm.set_attn_implementation(ours)
    return found


def cut(example: Example) -> tuple[list[int], list[int]]:
    """The prompt and the first answer of an example: what stands before the first learned token, and what is learned there.

    Plain text, which is learned from its beginning, is cut in the middle of its first part."""
    trained = example.trained.tolist()
    start = trained.index(True)
    if start < 2:
        start = max(1, min(32, len(trained) // 2))
    end = next((i for i in range(start, len(trained)) if not trained[i]), len(trained))
    ids = example.input_ids.tolist()
    return ids[:start], ids[start:end]


@torch.no_grad()
def _generate(model: Any, prompt: list[int], stops: list[int], room: int) -> tuple[list[int], bool]:
    """The answer, and whether a stop token ended it."""
    ids = torch.tensor([prompt], device=model.get_base_model().get_input_embeddings().weight.device)
    generation = transformers.GenerationConfig(
        max_new_tokens=room,
        do_sample=False,
        eos_token_id=stops or None,
        pad_token_id=stops[0] if stops else 0,
        use_cache=True,
    )
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=generation)[
        0, len(prompt) :
    ].tolist()
    return out, bool(out) and out[-1] in stops


def _token_ids(weights: Path, tokens: Sequence[str]) -> list[int]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(weights / "tokenizer.json"))
    return [i for i in (tokenizer.token_to_id(token) for token in tokens) if i is not None]


def _warnings(result: dict[str, Any]) -> list[str]:
    found = []
    before, after = result["eval_loss_before"], result["eval_loss_after"]
    if not after < before:
        found.append(
            f"the adapter does not help: the loss on {result['measured_on']} was {before:.4f} and is {after:.4f}"
        )
    if result["samples"] and not result["stops"]["after"] and result["stops"]["before"]:
        found.append(
            "none of the sample answers ends any more: check that the data ends its answers with the stop token"
        )
    return found


def _describe(job: TuningJob, folders: Folders, adapter: Path, result: dict[str, Any]) -> None:
    """Completes ``kaito.json`` and writes the model card, ``README.md``."""
    facts = artifact.read_json(adapter / "kaito.json")
    facts["verified"] = {k: v for k, v in result.items() if k != "samples"}
    artifact.write_json(adapter / "kaito.json", facts)
    metrics = artifact.read_json(folders.results / "metrics.json")
    data, config = metrics.get("data", {}), configs.read(job.config)
    lora = artifact.read_json(
        adapter / "adapter_config.json"
    )  # one that was resumed keeps the scale that it was begun with
    source = job.preset.source
    card = CardFacts(
        name=job.name,
        base_model=source.hub,
        base_revision=source.revision,
        base_folder=Path(source.folder).name,
        # Of a model that was read, no plugin knows the name that was made for it.
        preset="" if source.folder or job.preset.name == preset_name(source.hub) else job.preset.name,
        license="" if job.preset.licence == UNKNOWN_LICENCE else job.preset.licence.lower(),
        data_digest=facts.get("data_digest", ""),
        data_rows=data.get("examples"),
        method=job.method,
        hyper_parameters={
            "rank": lora["r"],
            "alpha": lora["lora_alpha"],
            "rsLoRA": lora["use_rslora"],
            "modules": ", ".join(config.lora.target_modules),
            "learning rate": config.training.learning_rate,
            "epochs": metrics.get("epochs", 0),
            "steps": metrics.get("summary", {}).get("steps", 0),
            "tokens per row": job.configuration.sequence,
        },
        held_out_rows=len(result["samples"]) and result["examples"],
        loss_before=result["eval_loss_before"],
        loss_after=result["eval_loss_after"],
        samples=tuple(Sample(s["prompt"], s["before"], s["after"]) for s in result["samples"]),
        image=job.output_image,
        made_with=f"kaito-tuner-qlora {artifact.versions().get('kaito-tuner-qlora', '')}".strip(),
    )
    artifact.write_text(adapter / "README.md", model_card(card))


def table(result: dict[str, Any]) -> list[str]:
    """The result for a log: one line per fact, prompts and answers cut to a line."""
    lines = [
        f"loss on {result['examples']} {result['measured_on']}: {result['eval_loss_before']:.4f} before, "
        f"{result['eval_loss_after']:.4f} after",
        f"answers that end by themselves: {result['stops']['before']} of {result['stops']['of']} before, "
        f"{result['stops']['after']} after",
    ]
    for sample in result["samples"]:
        lines += [""] + [f"  {name:<9} {_line(sample[name])}" for name in ("prompt", "expected", "before", "after")]
    return lines


def _line(text: str, width: int = 100) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"
