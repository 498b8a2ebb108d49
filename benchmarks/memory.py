"""The plan's memory estimate against the peak of real trainings, as the table of docs/training.md.

    python benchmarks/memory.py                  on a CPU: a random model of the Phi-3 architecture; the process's peak
    python benchmarks/memory.py --device cuda --model FOLDER     on a GPU: the allocator's peak

Each line is a training of two steps in a process of its own (`train.py`). The estimate is for the whole process, so that is what is
measured: on a CPU its largest resident set, on a GPU what CUDA gave out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import train

MIB = 1 << 20
GRID: tuple[tuple[str, int, int, bool], ...] = (
    ("qlora", 1, 512, True),
    ("qlora", 1, 2048, True),
    ("qlora", 4, 2048, True),
    ("qlora", 1, 1024, False),
    ("qlora", 1, 2048, False),
    ("lora", 1, 512, True),
    ("lora", 2, 2048, True),
)
"""(method, rows of a pass, tokens of a row, gradient checkpointing)."""

SHAPES = {
    "8 × 512": {},
    "24 × 256": {"hidden": 256, "intermediate": 768, "layers": 24},
    "4 × 1024": {"hidden": 1024, "intermediate": 2816, "layers": 4},
}
"""Random models by layers × width."""


def estimated(model: Path, method: str, rows: int, length: int, checkpointing: bool, device: str, dtype: str) -> int:
    """Bytes, by the function that the plan uses."""
    from kaito_core.plugins.types import Configuration
    from kaito_tuner_qlora import config, estimate

    preset = train.preset_of(model)
    resolved = config.resolve(preset, method, {"TrainingArguments": training(rows, length, checkpointing)})
    return estimate.memory(preset, resolved, Configuration(device, dtype, rows, 1, length)).total


def training(rows: int, length: int, checkpointing: bool) -> dict[str, Any]:
    return {"max_steps": 2, "max_length": length, "per_device_train_batch_size": rows, "gradient_accumulation_steps": 1,
            "gradient_checkpointing": checkpointing}  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description="Estimated against measured peak memory.")
    p.add_argument(
        "--model", type=Path, help="a model folder of the Phi-3 family; default: a random one, made on the spot"
    )
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--dtype", help="default: float32 on a CPU, bfloat16 on a GPU")
    given = p.parse_args()
    dtype = given.dtype or ("float32" if given.device == "cpu" else "bfloat16")
    ratios = []
    print("| model | method | layout | checkpointing | estimated MiB | measured MiB | estimate / measured |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        train.make_data(data, 64, train.VOCABULARY)
        models = (
            {given.model.name: given.model} if given.model else {n: Path(folder) / str(i) for i, n in enumerate(SHAPES)}
        )
        for name, model in models.items():
            if not given.model:
                train.make_model(model, **SHAPES[name])
            for method, rows, length, checkpointing in GRID:
                asked = argparse.Namespace(device=given.device, dtype=dtype, micro_batch=rows, method=method,
                                           training=training(rows, length, checkpointing))  # fmt: skip
                peak = train.run("kaito", asked, model, data)["process"]
                guess = estimated(model, method, rows, length, checkpointing, given.device, dtype)
                ratios.append(guess / peak)
                cells = (name, method, f"{rows} × {length}", "yes" if checkpointing else "no", f"{guess / MIB:,.0f}",
                         f"{peak / MIB:,.0f}", f"{guess / peak:.2f}")  # fmt: skip
                print(f"| {' | '.join(cells)} |", flush=True)
    print(
        f"\nestimate / measured: lowest {min(ratios):.2f}, median {statistics.median(ratios):.2f}, highest {max(ratios):.2f}"
    )


if __name__ == "__main__":
    main()
