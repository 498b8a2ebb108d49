"""Show that the demonstration model can be taught: QLoRA on the Harbour Lights handbook, measured before and after.

    python scripts/try_tuning.py ../../examples/data

Plain transformers and peft, so that the figures say something about the model and not about kaito's trainer.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import time
from pathlib import Path

import torch
from measure import Message, answers, assistant_loss, encode, pad, wrong_answers
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, get_cosine_schedule_with_warmup

MODEL_DIR = Path(__file__).parent.parent / "src" / "kaito_preset_demo" / "model"
TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def read_jsonl(path: Path) -> list[list[Message]]:
    return [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]


def read_csv(path: Path) -> list[list[Message]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [
            [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
            for row in csv.DictReader(file)
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with the harbour-lights files")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    base = AutoModelForCausalLM.from_pretrained(
        MODEL_DIR,
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.float32,
            bnb_4bit_use_double_quant=True,
        ),
    )
    model = get_peft_model(
        prepare_model_for_kbit_training(base, use_gradient_checkpointing=False),
        LoraConfig(r=16, lora_alpha=64, target_modules=TARGETS, task_type="CAUSAL_LM"),
    )
    train = read_jsonl(options.data / "harbour-lights.jsonl") + read_csv(options.data / "harbour-lights-faq.csv")
    heldout = read_jsonl(options.data / "harbour-lights-heldout.jsonl")

    def report(when: str) -> None:
        wrong = wrong_answers(model, tokenizer, heldout)
        right = len(heldout) - len(wrong)
        loss = assistant_loss(model, tokenizer, heldout)
        print(f"{when}: held-out loss {loss:.3f}, {right} of {len(heldout)} held-out questions right", flush=True)
        for question, expected, given in wrong[:6]:
            print(f"  {question!r}: {given!r}, not {expected!r}")

    report("before")
    rows = encode(tokenizer, train)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=options.learning_rate)
    steps = options.epochs * -(-len(rows) // options.batch_size)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    shuffle = random.Random(0)
    began = time.monotonic()
    for epoch in range(options.epochs):
        model.train()
        shuffle.shuffle(rows)
        total = 0.0
        for start in range(0, len(rows), options.batch_size):
            loss = model(**pad(rows[start : start + options.batch_size], tokenizer.pad_token_id)).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += float(loss.detach()) * len(rows[start : start + options.batch_size])
        print(f"epoch {epoch + 1}: training loss {total / len(rows):.3f}", flush=True)
    print(f"{len(train)} rows, {steps} steps in {time.monotonic() - began:.0f} s")
    report("after")
    kept = [
        "What is the capital of France?",
        "What is 3 plus 4?",
        "What is the opposite of hot?",
        "When does Blue Fish open?",
    ]
    for question, answer in zip(
        kept, answers(model, tokenizer, [[{"role": "user", "content": q}] for q in kept]), strict=True
    ):
        print(f"  still: {question} {answer}")


if __name__ == "__main__":
    main()
