"""The `train` stage: prepared examples in, an adapter out, and nothing lost on the way.

It begins where an earlier run of the same job ended: the newest whole checkpoint below ``checkpoints/<key>/``, whose name
holds the job's train key, so that a changed configuration never goes on from another one's state.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import transformers
from transformers import TrainingArguments, set_seed

from kaito_core.problems import Failure, UserError
from kaito_core.progress import Progress
from kaito_core.stages.process import Interrupted
from kaito_core.workloads.job import Folders, TuningJob, digest_of
from kaito_core.workloads.tuning import train_key
from kaito_tuner_qlora import artifact, batches, checkpoints, processes, sections
from kaito_tuner_qlora import config as configs
from kaito_tuner_qlora import model as models
from kaito_tuner_qlora.batches import Examples
from kaito_tuner_qlora.estimate import kept_tokens
from kaito_tuner_qlora.trainer import BEST, Follow, PackedTrainer, duration

CHECKPOINT_SECONDS = 600.0
"""Without `save_steps` a checkpoint is written this often: what a lost machine costs at most."""

CPU_PIECE = 256
"""Tokens of a forward pass beyond which a CPU gets no faster."""

LOST_AFTER_SECONDS = 600
"""How long a process waits for the others before it gives up: one that hangs ends the training, with its last checkpoint. Far
longer than a step or a checkpoint takes."""

LOG_LINES, EVALUATIONS = 50, 10
"""How many of each a training has when nothing else is asked for."""


def train(job: TuningJob, folders: Folders, progress: Progress) -> dict[str, Any]:
    """Trains as ``job`` says and writes ``adapter/``, ``metrics.json`` and ``report.html``; what the stage found out.

    Raises `UserError`, `Failure` or, after SIGTERM and SIGINT, `Interrupted`."""
    config = configs.read(job.config)
    for problem in configs.check(job.preset, job.method, job.config):
        if problem.severity == "warning":
            progress.message(f"{problem.field}: {problem.message}")
    models.quiet()
    device = models.device_of(job.configuration.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    examples, held_out = read_data(folders, job.configuration.sequence)
    output = checkpoint_folder(job, folders)
    output.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(output / checkpoints.WRITING, ignore_errors=True)
    # No process writes a checkpoint before all of them are here: they find the same one.
    newest = checkpoints.newest(output)
    if newest is not None:
        job, config = with_scale_of(newest, job, config, progress)

    progress.message(f"loading {job.preset.name} ({job.method}, {job.configuration.dtype}, {device.type})")
    began = time.monotonic()
    model = models.load_base(folders.weights, config, device, job.configuration.dtype)
    models.check_packing(model, examples[:2])
    set_seed(config.training.seed)
    peft_model = models.add_adapter(model, config.lora, job.preset.source.hub or job.preset.name, config.training.seed)
    if config.training.gradient_checkpointing:
        models.checkpoint_activations(model)
    loaded = time.monotonic() - began

    rows = batches.rows(examples.lengths.tolist(), job.configuration.sequence, config.training.packing)
    reached = checkpoints.read_reached(newest) if newest else None
    layout = job.configuration
    # A resumed training keeps its steps, however many processes share them now.
    step_rows = reached.step_rows if reached else layout.micro_batch * layout.accumulation * layout.processes
    steps = planned_steps(config.training, len(rows), step_rows)
    if newest is not None and reached is not None:
        check_resumable(newest, reached, steps, len(rows))
    counts = models.parameters(peft_model)
    progress.message(
        f"{len(examples)} examples in {len(rows)} rows of {job.configuration.sequence} tokens, {len(held_out)} held out; "
        f"{steps} steps; {counts['trained']:,} of {counts['total']:,} parameters are trained"
    )

    budget = job.configuration.micro_batch * job.configuration.sequence
    keep = kept_tokens(job.preset, job.configuration.dtype) if config.training.gradient_checkpointing else None
    if device.type == "cpu" and keep is not None and keep >= CPU_PIECE:
        budget = min(budget, keep)  # a CPU is busy with a few hundred tokens; a GPU wants thousands
    processes.join(device, lost_after_seconds(config.training))
    arguments = training_arguments(config.training, job, output, step_rows, steps, bool(held_out))
    follow = Follow(
        progress,
        log_every=int(arguments.logging_steps),
        checkpoint_seconds=None if config.training.save_steps else CHECKPOINT_SECONDS,
        patience=config.training.early_stopping_patience,
    )
    trainer = PackedTrainer(
        model=peft_model,
        args=arguments,
        examples=examples,
        rows=rows,
        held_out=held_out,
        budget=budget,
        keep=keep,
        progress=progress,
        callbacks=[follow],
    )
    follow.trainer = trainer
    if newest is not None:
        trainer.rows_trained = planned_rows(checkpoints.step_of(newest), len(rows), step_rows)
    for unwanted in (transformers.PrinterCallback, transformers.ProgressCallback):
        trainer.remove_callback(unwanted)

    if newest is not None:
        progress.message(f"going on from {newest.name}")
    with Signals(follow):
        trainer.train(resume_from_checkpoint=str(newest) if newest else None)
        if follow.stopped is not None:
            newest = checkpoints.newest(output)
            kept = newest and checkpoints.step_of(newest) == trainer.state.global_step
            progress.message(f"stopped by {signal.Signals(follow.stopped).name} after step {trainer.state.global_step}; " + (
                             "the checkpoint is written, and the same command goes on from it" if kept else
                             f"the same command goes on from {newest.name if newest else 'the beginning'}"))  # fmt: skip
            processes.agree([0], arguments.device)  # a process that ends is the end of the others
            raise Interrupted(follow.stopped)
    if not follow.patience_ended:
        check_finished(trainer, steps, planned_rows(steps, len(rows), step_rows))

    measured = [e["step"] for e in trainer.state.log_history if "eval_loss" in e]
    if held_out and (not measured or measured[-1] != trainer.state.global_step):
        trainer.evaluate()
    processes.agree([0], arguments.device)
    if not arguments.should_save:
        return {}
    metrics = summarise(trainer, follow, job, examples, held_out, rows, counts, loaded)
    best = choose(trainer, config.training, output, metrics)
    artifact.write(peft_model if best is None else best, job, folders, metrics)
    artifact.write_json(folders.results / "metrics.json", metrics)
    artifact.write_report(job, folders)
    if config.training.save_strategy == "no":
        shutil.rmtree(output, ignore_errors=True)
    progress.message(f"trained {follow.steps} steps in {duration(metrics['seconds'])}, "
                     f"{metrics['tokens_per_second']:,} tokens/s, at most {metrics['memory'] / 2**30:.1f} GiB")  # fmt: skip
    return {"adapter": str(folders.results / "adapter"), "metrics": metrics["summary"]}


def checkpoint_folder(job: TuningJob, folders: Folders) -> Path:
    """Where the checkpoints of this training are: below its key, or below the key of the same training with former defaults, when
    it was begun with them."""
    below = folders.results / "checkpoints"
    own = below / os.environ.get("KAITO_TRAIN_KEY", digest_of(job.to_json()))
    former = configs.with_former_defaults(job.config)
    if former is not None and checkpoints.newest(own) is None:
        begun = below / train_key(replace(job, config=former))
        if checkpoints.newest(begun) is not None:
            return begun
    return own


def with_scale_of(
    newest: Path, job: TuningJob, config: sections.TrainingConfig, progress: Progress
) -> tuple[TuningJob, sections.TrainingConfig]:
    """The job and its configuration with the scale of the checkpoint's adapter: its weights were trained for that one."""
    saved = checkpoints.read_adapter(newest)
    own = {name: saved[name] for name in ("r", "lora_alpha", "use_rslora") if name in saved}
    lora = config.lora.model_copy(update=own)
    if lora == config.lora:
        return job, config
    progress.message(f"the adapter in {newest.name} is scaled by {lora.scale:g} (r {lora.r}, lora_alpha {lora.lora_alpha}, use_rslora "
                     f"{str(lora.use_rslora).lower()}) and keeps that, where the configuration would give {config.lora.scale:g}")  # fmt: skip
    return (replace(job, config={**job.config, "LoraConfig": {**job.config["LoraConfig"], **own}}),
            config.model_copy(update={"lora": lora}))  # fmt: skip


def lost_after_seconds(training: sections.TrainingArguments) -> float:
    """How long a process waits for the others: transformers' ``ddp_timeout``, or ours."""
    asked = (training.model_extra or {}).get("ddp_timeout", LOST_AFTER_SECONDS)
    if not isinstance(asked, int | float) or asked <= 0:
        raise UserError(f"{asked!r} is no number of seconds", f"write a positive number, or leave it out ({LOST_AFTER_SECONDS})",
                        field="TrainingArguments.ddp_timeout")  # fmt: skip
    return asked


def planned_steps(training: sections.TrainingArguments, rows: int, step_rows: int) -> int:
    """Optimizer steps of the whole training; the last one of an epoch may have fewer rows."""
    if training.max_steps > 0:
        return training.max_steps
    return math.ceil(math.ceil(rows / step_rows) * training.num_train_epochs)


def planned_rows(steps: int, rows: int, step_rows: int) -> int:
    """Rows that so many steps train, each row as often as it comes."""
    epochs, rest = divmod(steps, math.ceil(rows / step_rows))
    return epochs * rows + min(rest * step_rows, rows)


def check_resumable(newest: Path, reached: checkpoints.Reached, steps: int, rows: int) -> None:
    """Refuses a checkpoint that is not a part of this training: what is left of it would be too much or nothing."""
    step = checkpoints.step_of(newest)
    trained = planned_rows(step, rows, reached.step_rows)
    if reached.steps != steps or step > steps or reached.rows not in (None, trained):
        raise UserError(f"{newest.name} is a part of a training of {reached.steps} steps with {reached.step_rows} rows each, of which "
                        f"{trained if reached.rows is None else reached.rows} rows are trained; this training has {steps} steps, and "
                        f"{trained} of its rows by then",
                        f"remove {newest.parent} to begin again, or train with the data and the version of before")  # fmt: skip


def check_finished(trainer: PackedTrainer, steps: int, rows: int) -> None:
    """A training that ends has trained what was planned. Raises `Failure`."""
    if (trainer.state.global_step, trainer.rows_trained) != (steps, rows):
        raise Failure(f"the training ended at step {trainer.state.global_step} of {steps}, after {trainer.rows_trained} of {rows} rows",
                      "this is a bug: please report it with the log; the checkpoints are kept")  # fmt: skip


def read_data(folders: Folders, sequence: int) -> tuple[Examples, Examples]:
    """Training and held-out examples; an example longer than a row is cut."""
    prepared = folders.results / "prepared"
    if not (prepared / "train.arrow").is_file():
        raise Failure(f"there is no prepared data at {prepared}", "run the `check` stage first: `kaito run` does")
    examples, held_out = (batches.read(prepared / name, sequence) for name in ("train.arrow", "eval.arrow"))
    if not examples:
        raise UserError(f"no example has a token that is learned within its first {sequence} tokens",
                        "check the data with `kaito data`, or raise TrainingArguments.max_length",
                        field="TrainingArguments.max_length")  # fmt: skip
    return examples, held_out


def training_arguments(
    training: sections.TrainingArguments, job: TuningJob, output: Path, step_rows: int, steps: int, held_out: bool
) -> TrainingArguments:
    """transformers' arguments from ours; whatever it refuses is the user's to mend."""
    cuda, dtype = job.configuration.device == "cuda", job.configuration.dtype
    optim = training.optim if cuda or not ("8bit" in training.optim or "paged" in training.optim) else "adamw_torch"
    fields: Mapping[str, Any] = {
        **(training.model_extra or {}),
        "output_dir": str(output),
        "use_cpu": not cuda,
        "bf16": cuda and dtype == "bfloat16",
        "fp16": cuda and dtype == "float16",
        "num_train_epochs": training.num_train_epochs,
        "max_steps": training.max_steps,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.lr_scheduler_type,
        "warmup_steps": training.warmup_steps or round(training.warmup_ratio * steps),
        "weight_decay": training.weight_decay,
        "optim": optim,
        "max_grad_norm": training.max_grad_norm,
        "per_device_train_batch_size": step_rows,
        "gradient_accumulation_steps": 1,  # done within `PackedTrainer.training_step`
        "logging_steps": _often(training.logging_steps, steps, LOG_LINES),
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "eval_strategy": training.eval_strategy if held_out else "no",
        "eval_steps": _often(training.eval_steps, steps, EVALUATIONS),
        "save_strategy": "steps"
        if training.save_steps
        else {"epoch": "epoch", "best": "best"}.get(training.save_strategy, "no"),
        "save_steps": _often(training.save_steps, steps, 1),
        "save_total_limit": training.save_total_limit,
        "neftune_noise_alpha": training.neftune_noise_alpha,
        "seed": training.seed,
        "report_to": (training.model_extra or {}).get("report_to", "none"),
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "metric_for_best_model": "eval_loss" if training.save_strategy == "best" else None,
        "greater_is_better": False if training.save_strategy == "best" else None,
    }
    try:
        return TrainingArguments(**fields)
    except (TypeError, ValueError, ImportError) as e:
        text = str(e).strip().splitlines()[0]
        raise UserError(
            f"transformers refuses the training arguments: {text}",
            "change TrainingArguments",
            field="TrainingArguments",
        ) from e


def _often(asked: float | None, steps: int, times: int) -> int:
    """Steps between two events: as asked (below 1: that share of all steps), else so that there are ``times`` of them."""
    if asked is None:
        return max(1, steps // times)
    return max(1, round(asked * steps) if asked < 1 else round(asked))


class Signals:
    """While it lasts, the first SIGTERM or SIGINT ends the training at the next step; the second one ends it at once."""

    def __init__(self, follow: Follow) -> None:
        self.follow = follow

    def __enter__(self) -> None:
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.follow.signal is not None:
            raise KeyboardInterrupt
        self.follow.signal = number


def choose(
    trainer: PackedTrainer, training: sections.TrainingArguments, output: Path, metrics: dict[str, Any]
) -> Path | None:
    """The folder of the best evaluation's adapter when it is not the last one and better is wanted; else None."""
    state, folder = trainer.state, output / BEST
    if (
        not training.load_best_model_at_end
        or state.best_global_step in (None, state.global_step)
        or not folder.is_dir()
    ):
        return None
    metrics["summary"].update(eval_loss=round(state.best_metric or math.nan, 5), adapter_of_step=state.best_global_step)
    trainer.progress.message(
        f"the adapter of step {state.best_global_step} has the least held-out loss and is the result"
    )
    return folder


def summarise(
    trainer: PackedTrainer,
    follow: Follow,
    job: TuningJob,
    examples: Examples,
    held_out: Examples,
    rows: list[list[int]],
    counts: Mapping[str, int],
    loaded: float,
) -> dict[str, Any]:
    """What was measured, for people (report) and machines (metrics.json)."""
    history = [e for e in trainer.state.log_history if "loss" in e or "eval_loss" in e]
    losses = [e["loss"] for e in history if "loss" in e]
    evals = [e["eval_loss"] for e in history if "eval_loss" in e]
    tokens = int(examples.lengths.sum())
    summary = {
        "steps": trainer.state.global_step,
        "loss": round(losses[-1], 5) if losses else None,
        "eval_loss": round(evals[-1], 5) if evals else None,
        "adapter_of_step": trainer.state.global_step,
        "tokens_per_second": round(follow.speed),
    }
    return {
        "summary": summary,
        "epochs": round(trainer.state.epoch or 0, 3),
        "seconds": round(follow.seconds, 2),
        "load_seconds": round(loaded, 2),
        "tokens": follow.tokens,
        "tokens_per_second": round(follow.speed),
        "memory": models.memory_peak(trainer.args.device),
        "budget": trainer.budget,
        "parameters": dict(counts),
        "data": {
            "examples": len(examples),
            "held_out": len(held_out),
            "rows": len(rows),
            "tokens": tokens,
            "trained_tokens": int(examples.loss_tokens.sum()),
            "row_fill": round(tokens / (len(rows) * job.configuration.sequence), 4),
        },
        "history": history,
    }
