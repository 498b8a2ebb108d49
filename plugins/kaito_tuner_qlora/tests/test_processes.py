"""Several processes of one training, for real (two of them, gloo, on the CPU): none decides alone, and none waits for ever.

What a process knows alone: its clock, the signals that it is sent, whether its memory or its disk is enough, and that it dies.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from kaito_core.problems import Failure, UserError
from kaito_core.progress import Progress
from kaito_core.stages.process import Interrupted
from kaito_tuner_qlora import checkpoints, trainer
from kaito_tuner_qlora import config as configs
from kaito_tuner_qlora import train as stage

ENDED_WITHIN_SECONDS = 120
"""Of starting two processes on a busy machine, a few steps, and the end."""

PROCESS = """
import os, signal, sys, time, types
from kaito_tuner_qlora import checkpoints, model as models, train, trainer
from kaito_tuner_qlora.__main__ import main
rank = int(os.environ["RANK"])
step = 0  # that is being computed
begin = trainer.Follow.on_step_begin
def on_step_begin(self, args, state, control, **more):
    global step
    step = state.global_step + 1
    begin(self, args, state, control, **more)
trainer.Follow.on_step_begin = on_step_begin
{}
sys.exit(main(["train"]))
"""

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAITO_TRAIN_KEY", "key")
    torch.set_num_threads(1)


def two(run: Any, tmp_path: Path, change: str) -> tuple[int, str]:
    """Two processes of the `train` stage, each changed by ``change``; the exit code and what they print."""
    return both(tmp_path, PROCESS.format(change), run.environment())


def both(tmp_path: Path, text: str, environment: dict[str, str]) -> tuple[int, str]:
    """Two processes of this text, as the stage starts them. They must end."""
    script = tmp_path / "process.py"
    script.write_text(text)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    process = subprocess.Popen(
        [sys.executable, *command], env={**environment, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        out, _ = process.communicate(timeout=ENDED_WITHIN_SECONDS)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its processes
        out, _ = process.communicate()
        pytest.fail(f"the processes wait for each other:\n{out}")
    return process.returncode, out


def alone(run: Any, monkeypatch: pytest.MonkeyPatch, stop_in: int = 0) -> None:
    """One process of the stage, this one; sent SIGTERM in the step ``stop_in``."""
    begin = trainer.Follow.on_step_begin

    def on_step_begin(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        begin(self, args, state, control, **more)
        if state.global_step + 1 == stop_in:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(trainer.Follow, "on_step_begin", on_step_begin)
        stage.train(run.job, run.folders, Progress(run.folders.results / "progress.jsonl", "train"))


def folder(run: Any) -> Path:
    found: Path = run.folders.results / "checkpoints/key"
    return found


def newest(run: Any) -> str:
    found = checkpoints.newest(folder(run))
    return found.name if found else ""


def assert_same_adapter(run: Any, other: Any) -> None:
    a, b = (load_file(r.folders.results / "adapter/adapter_model.safetensors") for r in (run, other))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


EPOCHS = {"num_train_epochs": 2, "max_steps": -1, "eval_strategy": "no"}
"""Of 32 rows, or of 8 when they are packed; the tests choose steps that do not divide them."""

SKEWED = """
train.CHECKPOINT_SECONDS = 0.2
ahead = time.monotonic
trainer.time = types.SimpleNamespace(monotonic=lambda: ahead() * (1 + 2 * rank))  # one clock is three times as fast
publish, write, loss = checkpoints.publish, trainer.PackedTrainer._save_rng_state, models.batch_loss
def published(*paths):
    if step == 3:
        raise OSError(28, "No space left on device")  # in the process that writes
    publish(*paths)
def written(self, output_dir):
    if rank == 1 and step == 5:
        raise OSError(28, "No space left on device")  # in the one that does not
    write(self, output_dir)
def small(model, batch):
    if rank == 1 and step == 4 and batch.tokens > 64:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
    return loss(model, batch)
checkpoints.publish, trainer.PackedTrainer._save_rng_state, models.batch_loss = published, written, small
def on_step_begin(self, args, state, control, **more):
    global step
    step = state.global_step + 1
    begin(self, args, state, control, **more)
    if step in (3, 5):
        self._saved = -1e9  # a checkpoint is due in both
    if rank == 1 and step == 7:
        os.kill(os.getpid(), signal.SIGTERM)
trainer.Follow.on_step_begin = on_step_begin
"""


def test_two_stop_together_and_one_goes_on(
    make_job: Any, make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes whose clocks differ, of which one runs out of memory, each has a full disk once, and one is sent SIGTERM in
    the seventh step. One process then finishes: the adapter is that of a calm training by one."""
    unpacked = {**EPOCHS, "packing": False}
    several = make_run(make_job(micro_batch=1, accumulation=3, processes=2, TrainingArguments=unpacked), "several")
    code, out = two(several, tmp_path, SKEWED)
    assert code == 1, out  # torchrun's word for a process that ends with 143
    assert newest(several) == "checkpoint-7", out
    assert several.events("message")[-1]["text"].startswith(
        "stopped by SIGTERM after step 7; the checkpoint is written"
    )
    lost = [e["text"] for e in several.events("message") if e["text"].startswith("no checkpoint at step")]
    assert [text.split(":")[0] for text in lost] == ["no checkpoint at step 3", "no checkpoint at step 5"]
    assert len(checkpoints.all_of(folder(several))) <= 2
    assert not several.events("failed", "finished")

    several.job = make_job(micro_batch=3, TrainingArguments=unpacked)
    alone(several, monkeypatch)
    calm = make_run(make_job(micro_batch=6, TrainingArguments=unpacked), "calm")
    alone(calm, monkeypatch)
    for run in (calm, several):
        assert (run.events("step")[-1]["step"], run.events("step")[-1]["steps"]) == (12, 12)
    assert_same_adapter(several, calm)


def test_one_stops_and_two_go_on(make_job: Any, make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are as many, of the same rows, for two processes as for one; once there were half as many, and the training ended as
    done without training. In the last step of an epoch one of them has no row. Only the first one writes (KAITO defect 12)."""
    run, calm = (make_run(make_job(micro_batch=7, TrainingArguments=EPOCHS), name) for name in ("run", "calm"))
    alone(calm, monkeypatch)
    with pytest.raises(Interrupted):
        alone(run, monkeypatch, stop_in=1)
    run.job = make_job(micro_batch=4, processes=2, TrainingArguments=EPOCHS)
    process = run.start()
    out, _ = process.communicate(timeout=ENDED_WITHIN_SECONDS)
    assert process.returncode == 0, out
    assert [(e["step"], e["steps"]) for e in run.events("step")][-1] == (4, 4)
    assert len(run.events("finished")) == len(run.events("started")) == 1
    assert_same_adapter(run, calm)


NO_MEMORY = """
loss = models.batch_loss
def no_memory(model, batch):
    if rank == 1 and step == 4:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
    return loss(model, batch)
models.batch_loss = no_memory
"""


def test_what_ends_one_ends_all_in_its_words(make_job: Any, make_run: Any, tmp_path: Path) -> None:
    run = make_run(make_job(processes=2, TrainingArguments={"save_steps": 2, "eval_strategy": "no"}))
    code, out = two(run, tmp_path, NO_MEMORY)
    assert code == 1, out
    said = {e["message"].split(" of")[0] for e in run.events("failed")}
    assert said == {"out"}, out
    assert "with a single example" in run.events("failed")[0]["message"]
    assert newest(run) == "checkpoint-2"
    assert not run.events("finished")


TOGETHER = """
import os, sys, time
import torch
from kaito_core.problems import Failure
from kaito_tuner_qlora import processes
cpu, rank = torch.device("cpu"), int(os.environ["RANK"])
processes.join(cpu, 10)
assert processes.agree([rank, 5 - rank, 0], cpu) == [1, 5, 0]
assert processes.first_failure(None, cpu) is None
failure = processes.first_failure(Failure("wörds", "do it", field="a.b") if rank == 1 else None, cpu)
assert [(p.message, p.remedy, p.field) for p in failure.problems] == [("wörds", "do it", "a.b")]
processes.agree([0], cpu)
if rank == 1:
    time.sleep(600)
try:
    processes.agree([0], cpu)
except Failure as e:
    sys.exit(str(e))
"""


def test_one_that_does_not_come_is_waited_for_with_a_limit(tmp_path: Path) -> None:
    code, out = both(tmp_path, TOGETHER, dict(os.environ))
    assert code == 1
    assert "process 0 of 2 has lost another one of this training" in out
    assert "AssertionError" not in out


# --- what a step and a training are, whatever the number of processes ------------------------------------------------


@given(rows=st.integers(1, 500), step_rows=st.integers(1, 40), epochs=st.integers(1, 5), data=st.data())
def test_planned_rows_are_those_of_the_steps(rows: int, step_rows: int, epochs: int, data: st.DataObject) -> None:
    sizes = [len(range(rows)[i : i + step_rows]) for i in range(0, rows, step_rows)] * epochs
    step = data.draw(st.integers(0, len(sizes)))
    assert stage.planned_rows(step, rows, step_rows) == sum(sizes[:step])


def tamper(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def do(checkpoint: Path) -> None:
        path = checkpoint / checkpoints.REACHED
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))

    return do


@pytest.mark.parametrize(
    "other",
    [tamper(lambda v: v.update(steps=52)), tamper(lambda v: v.update(rows=1)), tamper(lambda v: v.update(step_rows=7))],
    ids=["steps", "rows", "rows of a step"],
)
def test_a_checkpoint_of_another_training_is_refused_by_name(
    make_job: Any, make_run: Any, monkeypatch: pytest.MonkeyPatch, other: Callable[[Path], None]
) -> None:
    run = make_run(make_job(TrainingArguments={**EPOCHS, "num_train_epochs": 1}))
    with pytest.raises(Interrupted):
        alone(run, monkeypatch, stop_in=2)
    other(folder(run) / "checkpoint-2")
    with pytest.raises(UserError, match=r"checkpoint-2 is a part of a training of .*(?s:.*)remove .*checkpoints/key"):
        alone(run, monkeypatch)
    assert newest(run) == "checkpoint-2"


@pytest.mark.parametrize("processes", [1, 2])
def test_a_checkpoint_of_an_earlier_version_says_its_step_by_its_files(tmp_path: Path, processes: int) -> None:
    (tmp_path / "trainer_state.json").write_text(json.dumps({"max_steps": 104, "train_batch_size": 4}))
    for number in range(processes):
        (tmp_path / (f"rng_state_{number}.pth" if processes > 1 else "rng_state.pth")).touch()
    assert checkpoints.read_reached(tmp_path) == checkpoints.Reached(104, 4 * processes, None)


@pytest.mark.parametrize(("asked", "seconds"), [({}, 600), ({"ddp_timeout": 30}, 30)])
def test_how_long_the_others_are_waited_for(make_job: Any, asked: dict[str, Any], seconds: float) -> None:
    assert stage.lost_after_seconds(configs.read(make_job(TrainingArguments=asked).config).training) == seconds


@pytest.mark.parametrize("asked", ["soon", 0, -1])
def test_no_number_of_seconds_is_refused(make_job: Any, asked: Any) -> None:
    training = configs.read(make_job(TrainingArguments={"ddp_timeout": asked}).config).training
    with pytest.raises(UserError, match="ddp_timeout"):
        stage.lost_after_seconds(training)


def test_a_training_that_ends_early_has_failed(make_job: Any, make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(make_job(TrainingArguments={"max_steps": 6, "eval_strategy": "no"}))
    end = trainer.Follow.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **more: Any) -> Any:
        end(self, args, state, control, **more)
        control.should_training_stop = True
        return control

    monkeypatch.setattr(trainer.Follow, "on_step_end", on_step_end)
    with pytest.raises(Failure, match="the training ended at step 1 of 6"):
        alone(run, monkeypatch)
    assert not (run.folders.results / "adapter").exists()
