"""Training as kaito does it against training as KAITO configures it: same model, same data, same machine, one after the other.

    python benchmarks/train.py                        a random model of the Phi-3 architecture, made on the spot
    python benchmarks/train.py --model FOLDER         a model folder of the Phi-3 family
    python benchmarks/train.py --device cuda          on a GPU

*plain* is what KAITO's default ConfigMap `qlora-params-template` makes transformers do: nf4 with double quantisation, one
example per step without packing, loss on every token, peft's `prepare_model_for_kbit_training`, r = alpha = 8 on the modules
that KAITO names for phi-3 (two of the four that the model has), AdamW at transformers' own learning rate of 5e-5, falling linearly.
*kaito* is this repository's `train` stage with its defaults, through the same files as in production.

Each is a process of its own, run alternately `--rounds` times; the medians are printed. What is counted are tokens of the
examples (padding would not count), and the time of the steps alone; processor seconds tell more than seconds do on a machine
that others use too. The held-out loss is that of the answers' tokens, measured
by the same code for both, after the same number of tokens; the two differ in learning rate, rank and steps, which is the point.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
VOCABULARY, HIDDEN, LAYERS, HEADS = 32064, 512, 8, 8
INTERMEDIATE = 1408
"""Phi-3-mini's proportions (8/3 of the hidden size, its vocabulary), a hundredth of its size."""
HELD_OUT = 16
TARGETS = ["k_proj", "q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"]
"""KAITO's DEFAULT_TARGET_MODULES for phi-3; of these, the model with its fused modules has o_proj and down_proj."""


def make_model(folder: Path, *, hidden: int = HIDDEN, intermediate: int = INTERMEDIATE, layers: int = LAYERS) -> None:
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    config = Phi3Config(vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=intermediate,
                        num_hidden_layers=layers,
                        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=4096,
                        pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    Phi3ForCausalLM(config).save_pretrained(folder)


def make_data(folder: Path, count: int, vocabulary: int) -> None:
    """Examples with log-normal lengths: mean about 200 tokens, a tail to 1500 and more, a bit more than half of it answer.

    The answers repeat words of a small vocabulary in a fixed order, so that there is something to learn."""
    import numpy as np

    from kaito_core.data.prepared import write_examples
    from kaito_core.data.tokens import Example

    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(130), 0.95, count + HELD_OUT), 16, 1900).astype(int)
    lengths[count // 2] = 1600
    following = rng.permutation(200)
    examples = []
    for n in lengths:
        n = int(n)
        prompt = int(n * rng.uniform(0.3, 0.6))
        ids = (rng.zipf(1.3, n) % (vocabulary - 300) + 300).tolist()
        word = int(rng.integers(200))
        for i in range(prompt, n):
            word = int(following[word]) if rng.random() < 0.9 else int(rng.integers(200))
            ids[i] = 10 + word
        examples.append(Example(ids, [False] * prompt + [True] * (n - prompt)))
    write_examples(folder / "prepared/train.arrow", examples[:count], {})
    write_examples(folder / "prepared/eval.arrow", examples[count:], {})


def memory_now() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS"))


class Memory:
    """Bytes that loading and training take: of the GPU, or of this process's RAM beyond what its libraries take."""

    def __init__(self, device: Any) -> None:
        self.device = device
        self.before = 0
        if device.type == "cpu":
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
            self.before = memory_now()

    def peak(self) -> tuple[int, int]:
        from kaito_tuner_qlora.model import memory_peak

        peak = memory_peak(self.device)
        return peak - self.before, peak


def preset_of(folder: Path) -> Any:
    from kaito_core.plugins.types import Architecture, ChatFormat, ModelSource, Preset

    c = json.loads((folder / "config.json").read_text())
    h, i, heads, kv = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"], c["num_key_value_heads"]
    linears = {
        "qkv_proj": (h, h + 2 * h // heads * kv),
        "o_proj": (h, h),
        "gate_up_proj": (h, 2 * i),
        "down_proj": (i, h),
    }
    parameters = c["num_hidden_layers"] * sum(a * b for a, b in linears.values()) + 2 * c["vocab_size"] * h
    architecture = Architecture("Phi3ForCausalLM", parameters, c["num_hidden_layers"], h, i, heads, kv, h // heads, c["vocab_size"],
                                c["max_position_embeddings"], linears)  # fmt: skip
    return Preset(
        "benchmark", ModelSource(hub="none/benchmark"), "none", architecture, ChatFormat("", ("</s>",)), tuple(linears)
    )


def clocked(callback: type) -> dict[str, float]:
    """Seconds and processor seconds that are spent within steps, counted around a callback's own methods."""
    total = {"seconds": 0.0, "processor": 0.0}
    begun: dict[str, float] = {}
    begin, end = callback.on_step_begin, callback.on_step_end  # type: ignore[attr-defined]

    def on_step_begin(self: Any, *args: Any, **kwargs: Any) -> Any:
        begun.update(seconds=time.monotonic(), processor=time.process_time())
        return begin(self, *args, **kwargs)

    def on_step_end(self: Any, *args: Any, **kwargs: Any) -> Any:
        total["seconds"] += time.monotonic() - begun["seconds"]
        total["processor"] += time.process_time() - begun["processor"]
        return end(self, *args, **kwargs)

    callback.on_step_begin, callback.on_step_end = on_step_begin, on_step_end  # type: ignore[attr-defined]
    return total


def kaito(a: argparse.Namespace) -> dict[str, Any]:
    import torch

    from kaito_core.plugins.types import Configuration
    from kaito_core.progress import Progress
    from kaito_core.workloads.job import DataInput, Folders, TuningJob
    from kaito_tuner_qlora import config, train

    preset = preset_of(a.model)
    training = {"num_train_epochs": 1, "eval_strategy": "no", "logging_steps": 1, **a.training}
    resolved = config.resolve(preset, a.method, {"TrainingArguments": training})
    fields = resolved["TrainingArguments"]
    rows = fields["per_device_train_batch_size"] * fields["gradient_accumulation_steps"]
    job = TuningJob("benchmark", "default", preset, a.method, resolved,
                    Configuration(a.device, a.dtype, a.micro_batch, max(1, rows // a.micro_batch), fields["max_length"]),
                    DataInput(urls=("file:///",)))  # fmt: skip
    with tempfile.TemporaryDirectory() as results:
        (Path(results) / "prepared").symlink_to(a.data / "prepared")
        memory = Memory(torch.device(a.device))
        clock = clocked(train.Follow)
        train.train(
            job, Folders(Path(results), a.model, Path(results)), Progress(Path(results) / "progress.jsonl", "train")
        )
        own, whole = memory.peak()
        metrics = json.loads((Path(results) / "metrics.json").read_text())
    return {"tokens": metrics["tokens"], **clock, "memory": own, "process": whole,
            "loss": metrics["summary"]["eval_loss"], "steps": metrics["summary"]["steps"]}  # fmt: skip


def plain(a: argparse.Namespace) -> dict[str, Any]:
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    from kaito_tuner_qlora import attention, batches, trainer

    transformers.utils.logging.set_verbosity_error()
    examples = batches.read(a.data / "prepared/train.arrow", 2048)
    held_out = batches.read(a.data / "prepared/eval.arrow", 2048)
    device, dtype = torch.device(a.device), getattr(torch, a.dtype)
    memory = Memory(device)
    quantization = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
                                                   bnb_4bit_use_double_quant=True)  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(
        a.model, dtype=dtype, device_map={"": device}, quantization_config=quantization, local_files_only=True
    )
    model = prepare_model_for_kbit_training(model)
    model.config.use_cache = False
    lora = LoraConfig(r=8, lora_alpha=8, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)

    def collate(rows: list[Any]) -> dict[str, Any]:
        ids = torch.tensor(rows[0].input_ids.astype("int64"))[None]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    class Clock(transformers.TrainerCallback):
        pass

    clock = clocked(Clock)
    with tempfile.TemporaryDirectory() as out:
        arguments = transformers.TrainingArguments(
            output_dir=out, num_train_epochs=1, per_device_train_batch_size=1, save_strategy="no", report_to="none", disable_tqdm=True,
            use_cpu=a.device == "cpu", bf16=a.dtype == "bfloat16", remove_unused_columns=False, dataloader_pin_memory=False,
        )  # fmt: skip
        t = transformers.Trainer(
            model=model, args=arguments, train_dataset=examples, data_collator=collate, callbacks=[Clock()]
        )
        t.remove_callback(transformers.PrinterCallback)
        t.train()
    own, whole = memory.peak()
    model.get_base_model().set_attn_implementation(attention.NAME)
    with torch.autocast(a.device, dtype=dtype, enabled=a.dtype != "float32"):
        loss = trainer.held_out_loss(model, held_out, 2048, device)
    return {"tokens": int(examples.lengths.sum()), **clock, "memory": own, "process": whole, "loss": loss,
            "steps": t.state.global_step}  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description="Training speed and memory: kaito against KAITO's default configuration.")
    p.add_argument(
        "--model", type=Path, help="a model folder of the Phi-3 family; default: a random one, made on the spot"
    )
    p.add_argument("--examples", type=int, default=128)
    p.add_argument("--rounds", type=int, default=1, help="how often each is run; medians are printed")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--dtype", help="default: float32 on a CPU, bfloat16 on a GPU")
    p.add_argument("--micro-batch", type=int, default=1, help="rows of 2048 tokens per forward pass")
    p.add_argument("--method", choices=("qlora", "lora"), default="qlora", help="of kaito's side")
    p.add_argument("--training", type=json.loads, default={}, help="TrainingArguments of kaito's side, as JSON")
    p.add_argument("--only", choices=("kaito", "plain"), help=argparse.SUPPRESS)
    p.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    a = p.parse_args()
    a.dtype = a.dtype or ("float32" if a.device == "cpu" else "bfloat16")
    if a.only and a.data:
        result = {"kaito": kaito, "plain": plain}[a.only](a)
        print("RESULT " + json.dumps(result), flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        model, data = a.model or Path(folder) / "model", Path(folder) / "data"
        if not a.model:
            make_model(model)
        make_data(data, a.examples, json.loads((model / "config.json").read_text())["vocab_size"])
        found: dict[str, list[dict[str, Any]]] = {"plain": [], "kaito": []}
        for _ in range(a.rounds):
            for side in found if not a.only else (a.only,):
                found[side].append(run(side, a, model, data))
    if not a.only:
        show(found)


def run(side: str, a: argparse.Namespace, model: Path, data: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--only", side, "--model", str(model), "--data", str(data), "--device", a.device,
               "--dtype", a.dtype, "--micro-batch", str(a.micro_batch), "--method", a.method, "--training", json.dumps(a.training)]  # fmt: skip
    paths = [str(ROOT / "kaito_core/src"), str(ROOT / "plugins/kaito_tuner_qlora/src")]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    )
    line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
    if done.returncode or line is None:
        sys.exit(f"{side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    print(f"{side}: {result}", file=sys.stderr, flush=True)
    return result


def show(found: dict[str, list[dict[str, Any]]]) -> None:
    def median(side: str, key: str) -> float:
        return statistics.median(r[key] for r in found[side])

    speed = {side: statistics.median(r["tokens"] / r["seconds"] for r in runs) for side, runs in found.items()}
    own = {side: statistics.median(r["tokens"] / r["processor"] for r in runs) for side, runs in found.items()}
    rows = [
        ("tokens per second", f"{speed['plain']:.0f}", f"{speed['kaito']:.0f}", f"{speed['kaito'] / speed['plain']:.2f}x"),
        ("tokens per processor second", f"{own['plain']:.0f}", f"{own['kaito']:.0f}", f"{own['kaito'] / own['plain']:.2f}x"),
        *((name, f"{median('plain', key) / 2**20:.0f} MiB", f"{median('kaito', key) / 2**20:.0f} MiB",
           f"{median('kaito', key) / median('plain', key):.2f}x")
          for name, key in (("peak memory, model and training", "memory"), ("peak memory, whole process", "process"))),
        ("held-out loss of the answers", f"{median('plain', 'loss'):.3f}", f"{median('kaito', 'loss'):.3f}", ""),
        ("optimizer steps", f"{median('plain', 'steps'):.0f}", f"{median('kaito', 'steps'):.0f}", ""),
    ]  # fmt: skip
    print("| | plain (KAITO's defaults) | kaito | ratio |\n|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
