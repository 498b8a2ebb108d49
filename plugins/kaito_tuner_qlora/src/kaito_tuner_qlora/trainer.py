"""The loop: transformers' Trainer, with our batches, our loss, our memory and our checkpoints.

Trainer brings what is easy to get subtly wrong: optimizers and schedules, gradient scaling and clipping, random states,
resuming in the middle of an epoch. TRL's SFTTrainer would add rendering, masking and packing of conversations, all of which
is done before the training starts. What differs here:

* a step is handed over whole and divided inside ``training_step``, so that running out of memory makes the pieces smaller
  and the step is done again, with the same result;
* the loss is normalised over the trained tokens of the whole step, over all pieces and all GPUs;
* a step is a number of rows, and every process is handed all of them and computes its share: how many processes there are
  changes who computes what, and nothing else;
* with several GPUs gradients are summed once per step, after the last piece, so a GPU may back off on its own; saving, stopping
  and failing are decided by all processes together (`processes`).
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kaito_core.problems import Failure
from kaito_core.progress import Progress
from kaito_tuner_qlora import checkpoints, processes
from kaito_tuner_qlora import model as models
from kaito_tuner_qlora.batches import Example, batch, batches
from kaito_tuner_qlora.checkpoints import Reached

BEST, WRITING_BEST = "best", "best-being-written"
EVENT_EVERY = 1.0
"""Seconds between step events at least: a follower reads no faster."""


class PackedTrainer(Trainer):
    """Trains an adapter on rows of packed examples.

    ``rows`` are indices of ``examples``, ``args.per_device_train_batch_size`` of them are a step of all processes together;
    ``budget`` is the tokens of one forward pass at first; a pass of up to ``keep`` tokens keeps its activations, a longer one
    computes them again (None: all keep them)."""

    model: Any

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        examples: Sequence[Example],
        rows: list[list[int]],
        held_out: Sequence[Example],
        budget: int,
        keep: int | None,
        progress: Progress,
        callbacks: list[TrainerCallback],
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            train_dataset=rows,
            eval_dataset=held_out or None,
            data_collator=lambda rows: {"rows": rows},
            callbacks=callbacks,
        )
        self.examples, self.held_out, self.progress = examples, held_out, progress
        self.budget, self.keep = budget, keep
        self.step_tokens = 0
        self.rows_trained = 0
        self.step_loss = math.nan

    # --- one step ---

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The same whole steps for every process, the last one of an epoch as short as it is."""
        loader = super().get_train_dataloader()
        if isinstance(
            loader.batch_sampler, BatchSamplerShard
        ):  # accelerate's: it would give each process steps of its own
            shard = loader.batch_sampler
            shard.num_processes, shard.process_index, shard.even_batches = 1, 0, False
        return loader

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Gradients of one optimizer step, in as few pieces as memory allows; gives the mean loss of a trained token."""
        model.train()
        rows = inputs["rows"]
        step = [self.examples[i] for row in rows for i in row]
        share = [self.examples[i] for row in rows[processes.rank() :: processes.count()] for i in row]
        trained = torch.tensor(float(max(1, sum(e.loss_tokens for e in step))), device=self.args.device)
        failure = None
        try:
            while (loss := self._accumulate(share, trained)) is None:
                model.zero_grad()
                models.free(self.args.device)
                self._back_off(max(len(e.input_ids) for e in share))
        except Failure as e:
            failure, loss = (
                e,
                torch.full((), math.nan, device=self.args.device),
            )  # makes the sum one too: all processes see it
        processes.add(loss)
        if not torch.isfinite(loss):
            failure = processes.first_failure(failure, self.args.device)
            raise failure or Failure(
                f"the loss of step {self.state.global_step + 1} is {float(loss)}: the training has diverged",
                "lower TrainingArguments.learning_rate (half of it is a good start); on float16 GPUs use one with bfloat16",
                field="TrainingArguments.learning_rate",
            )
        self._sum_gradients()
        self.step_tokens = sum(len(e.input_ids) for e in step)
        self.rows_trained += len(rows)
        self.step_loss = float(loss)
        return loss

    def _accumulate(self, step: Sequence[Example], trained: torch.Tensor) -> torch.Tensor | None:
        """Forward and backward of every piece; None when memory ran out."""
        total = torch.zeros((), device=self.args.device)
        try:
            for piece in batches(step, self.budget):
                if self.keep is not None:
                    models.recompute(self.model, sum(len(e.input_ids) for e in piece) > self.keep)
                with self.accelerator.autocast():
                    loss = models.batch_loss(self.model, batch(piece)) / trained
                if loss.requires_grad:  # not when no token of the piece carries loss and nothing depends on the adapter
                    self._backward(loss)
                total += loss.detach()
                if total.device.type == "cpu":
                    models.free(total.device)
        except (RuntimeError, MemoryError) as e:
            if not models.out_of_memory(e):
                raise
            return None  # the error, and the tensors that its traceback holds, are gone once this returns
        return total

    def _backward(self, loss: torch.Tensor) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        (scaler.scale(loss) if scaler is not None else loss).backward()

    def _back_off(self, longest: int) -> None:
        if self.budget <= longest:
            raise Failure(f"out of memory with a single example of {longest} tokens per forward pass",
                          "lower TrainingArguments.max_length, or use a machine with more memory",
                          field="TrainingArguments.max_length")  # fmt: skip
        self.budget = max(longest, self.budget // 2)
        if self.keep is not None:
            self.keep //= 2
        self.progress.message(
            f"out of memory: going on with {self.budget} tokens per forward pass; the result is the same"
        )

    def _sum_gradients(self) -> None:
        if processes.count() == 1:
            return
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None:
            scaler.scale(
                torch.zeros((), device=self.args.device)
            )  # it begins here in a process whose share had no row yet
        for p in self.model.parameters():
            if p.requires_grad:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                processes.add(p.grad)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # transformers' estimate wants input_ids; ours is in the plan

    # --- held-out loss ---

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The mean loss of a trained token over the held-out examples; remembers the adapter if it is the best so far."""
        if not self.held_out:
            return {}
        loss = held_out_loss(self.model, self.held_out, self.budget, self.args.device, self.accelerator)
        metrics = {"eval_loss": loss}
        self.log(dict(metrics))
        if self.args.should_save:
            self.progress.emit("eval", step=self.state.global_step, loss=round(loss, 5))
            print(f"step {self.state.global_step}/{self.state.max_steps}  held-out loss {loss:.4f}", flush=True)
            if self.state.best_metric is None or loss < self.state.best_metric:
                self._remember_best()
        if self.state.best_metric is None or loss < self.state.best_metric:
            self.state.best_metric, self.state.best_global_step = loss, self.state.global_step
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        return self.state.best_global_step == self.state.global_step  # `evaluate` has done it

    def _remember_best(self) -> None:
        folder = Path(str(self.args.output_dir))
        try:
            self.model.save_pretrained(folder / WRITING_BEST, save_embedding_layers=False)
            checkpoints.publish(folder / WRITING_BEST, folder / BEST)
        except (OSError, SafetensorError) as e:
            shutil.rmtree(folder / BEST, ignore_errors=True)  # an older one would pass for the best
            self.progress.message(f"the best adapter so far could not be kept: {e}; the training goes on")
        finally:
            shutil.rmtree(folder / WRITING_BEST, ignore_errors=True)

    # --- checkpoints ---

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A checkpoint that is whole or not there. A full disk costs this checkpoint and not the training."""
        folder = Path(str(self.args.output_dir))
        name = f"checkpoint-{self.state.global_step}"
        written = folder / checkpoints.WRITING
        if self.args.should_save:
            shutil.rmtree(written, ignore_errors=True)
        device = self.args.device
        processes.agree([0], device)  # none writes before the folder is empty
        trouble = self._attempt(lambda: self._write_checkpoint(written / name))
        (failed,) = processes.agree([trouble is not None], device)
        if self.args.should_save:
            if not failed:
                trouble = self._attempt(lambda: checkpoints.publish(written / name, folder / name))
            if not failed and trouble is None:
                checkpoints.keep(folder, self.args.save_total_limit or 1)
                self.progress.emit("checkpoint", step=self.state.global_step, path=str(folder / name))
            else:
                why = trouble or "another process could not write its part"
                self.progress.message(f"no checkpoint at step {self.state.global_step}: {why}; the training goes on")
            shutil.rmtree(written, ignore_errors=True)
        processes.agree([0], device)  # none ends, and so has the others ended, before it is there

    def _write_checkpoint(self, folder: Path) -> None:
        """This process's part. Nothing in here waits for another process: each may fail alone."""
        self.save_model(str(folder), _internal_call=True)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))
        if self.args.should_save:
            self.state.save_to_json(str(folder / checkpoints.STATE))
            reached = Reached(self.state.max_steps, self.args.per_device_train_batch_size, self.rows_trained)
            checkpoints.write_reached(folder, reached)

    def _attempt(self, write: Callable[[], None]) -> Exception | None:
        """Why something could not be written; None when it was."""
        try:
            write()
        except (OSError, RuntimeError, SafetensorError) as e:
            if models.out_of_memory(e):
                raise
            return e
        return None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The adapter alone: no pickled arguments beside it."""
        if self.args.should_save:
            self.model.save_pretrained(output_dir, state_dict=state_dict, save_embedding_layers=False)


@torch.no_grad()
def held_out_loss(
    model: Any, examples: Sequence[Example], budget: int, device: torch.device, accelerator: Any = None
) -> float:
    """The mean loss, in nats, of a trained token of ``examples``; over all processes when there are several."""
    model.eval()
    share = examples
    distributed = accelerator is not None and accelerator.num_processes > 1
    if distributed:
        share = examples[accelerator.process_index :: accelerator.num_processes]
    while True:
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        try:
            for piece in batches(share, budget):
                context = (
                    accelerator.autocast() if accelerator is not None else torch.autocast(device.type, enabled=False)
                )
                with context:
                    sums[0] += models.batch_loss(model, batch(piece)).double()
                sums[1] += sum(e.loss_tokens for e in piece)
            break
        except (RuntimeError, MemoryError) as e:
            if not models.out_of_memory(e) or budget <= max(len(x.input_ids) for x in share):
                raise
        models.free(device)
        budget //= 2
    if distributed:
        processes.add(sums)
    return float(sums[0] / sums[1].clamp(min=1))


class Follow(TrainerCallback):
    """Tells people and files how far the training is, and asks for checkpoints by time and at a signal."""

    def __init__(
        self, progress: Progress, log_every: int, checkpoint_seconds: float | None, patience: int | None
    ) -> None:
        self.progress, self.log_every = progress, log_every
        self.checkpoint_seconds, self.patience = checkpoint_seconds, patience
        self.trainer: PackedTrainer | None = None
        self.signal: int | None = None
        """What this process was sent; the processes decide together what follows from it."""
        self.stopped: int | None = None
        """The signal at which all processes have stopped."""
        self.patience_ended = False
        self.steps = self.tokens = 0
        self.seconds = 0.0
        self._begun = self._saved = time.monotonic()
        self._told = 0.0
        self._recent: float | None = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._begun = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        assert self.trainer is not None
        now = time.monotonic()
        seconds = now - self._begun
        self.seconds += seconds
        self.steps += 1
        self.tokens += self.trainer.step_tokens
        self._recent = seconds if self._recent is None else 0.9 * self._recent + 0.1 * seconds
        due = self.checkpoint_seconds is not None and now - self._saved >= self.checkpoint_seconds
        save, number = processes.agree([due, self.signal or 0], args.device)
        if save:
            control.should_save = True
        if number:
            self.stopped = number
            control.should_save = control.should_training_stop = True
        last = state.global_step >= state.max_steps
        if args.should_save and (last or state.global_step == 1 or now - self._told >= EVENT_EVERY):
            self._told = now
            self.progress.emit("step", **self._numbers(state, args))
        return control

    def _numbers(self, state: TrainerState, args: TrainingArguments) -> dict[str, Any]:
        assert self.trainer is not None
        assert self._recent is not None
        return {
            "step": state.global_step,
            "steps": state.max_steps,
            "loss": round(self.trainer.step_loss, 5),
            "tokens_per_second": round(self.speed),
            "seconds_left": round((state.max_steps - state.global_step) * self._recent, 1),
            "learning_rate": self.trainer._get_learning_rate(),
            "memory": models.memory_peak(args.device),
            "epoch": round(state.epoch or 0, 3),
        }

    @property
    def speed(self) -> float:
        """Tokens, none of them padding, per second of training in this process."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs or self.trainer is None:
            return
        state.log_history[-1].update(tokens_per_second=round(self.speed), memory=models.memory_peak(args.device))
        if args.should_save and self._recent is not None:
            left = (state.max_steps - state.global_step) * self._recent
            print(
                f"step {state.global_step}/{state.max_steps}  loss {logs['loss']:.4f}  {self.speed:,.0f} tokens/s  "
                f"learning rate {logs['learning_rate']:.2e}  gradient {logs.get('grad_norm', 0):.2f}  "
                f"{duration(left)} left",
                flush=True,
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._saved = time.monotonic()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.patience is not None:
            losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
            if len(losses) - 1 - losses.index(min(losses)) >= self.patience:
                self.progress.message(
                    f"no better held-out loss in {self.patience} evaluations: stopping at step {state.global_step}"
                )
                control.should_training_stop = self.patience_ended = True
        return control


def duration(seconds: float) -> str:
    """``1 h 05 min``, ``3 min 20 s`` or ``12 s``."""
    minutes, s = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {s:02d} s" if minutes else f"{s} s"
