"""Make the demonstration model from nothing: corpus, tokenizer, pre-training, files.

    python scripts/make_model.py

Needs torch, transformers and tokenizers, no network and no GPU. The seeds are fixed; another machine or torch version may
still round differently, so the weights are alike but not equal to the bit.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from corpus import Corpus
from measure import IGNORED, assistant_loss, encode, pad, wrong_answers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
MODEL_DIR = HERE.parent / "src" / "kaito_preset_demo" / "model"

VOCAB_SIZE = 2048
CONTEXT = 1024
SPECIAL_TOKENS = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
SEED = 1

CONVERSATIONS = 36_000
TOKENS_PER_STEP = 2048  # padding included
PEAK_LEARNING_RATE = 2e-3
WARMUP_STEPS = 60
#: What the user says teaches the words; what the assistant says is what counts.
USER_TOKEN_WEIGHT = 0.1


def train_tokenizer(corpus: Corpus, folder: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE, digits one by one as in Phi-3, and the Phi-3 chat tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        corpus.tokenizer_text(SEED, 20_000),
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise SystemExit(f"the corpus gave {tokenizer.get_vocab_size()} tokens, not {VOCAB_SIZE}")
    tokenizer.save(str(folder / "tokenizer.json"))
    # Written by hand: what save_pretrained() writes differs between transformers 4 and 5, and this is read by both.
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT,
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "clean_up_tokenization_spaces": False,
        "chat_template": (HERE / "chat_template.jinja").read_text(encoding="utf-8"),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return PreTrainedTokenizerFast.from_pretrained(folder)


def new_model(tokenizer: PreTrainedTokenizerFast) -> Phi3ForCausalLM:
    end_of_text, end_of_turn = (tokenizer.convert_tokens_to_ids(t) for t in ("<|endoftext|>", "<|end|>"))
    torch.manual_seed(SEED)
    model = Phi3ForCausalLM(
        Phi3Config(
            vocab_size=VOCAB_SIZE,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=CONTEXT,
            original_max_position_embeddings=CONTEXT,
            tie_word_embeddings=False,
            bos_token_id=end_of_text,
            eos_token_id=end_of_text,
            pad_token_id=end_of_text,
        )
    )
    model.generation_config = GenerationConfig(
        bos_token_id=end_of_text, eos_token_id=[end_of_text, end_of_turn], pad_token_id=end_of_text
    )
    return model


def batches(rows: list[tuple[list[int], list[int]]]) -> list[list[tuple[list[int], list[int]]]]:
    """Rows of like length together, at most TOKENS_PER_STEP with padding, the batches in random order."""
    result: list[list[tuple[list[int], list[int]]]] = []
    batch: list[tuple[list[int], list[int]]] = []
    for row in sorted(rows, key=lambda row: len(row[0])):
        if batch and (len(batch) + 1) * len(row[0]) > TOKENS_PER_STEP:
            result.append(batch)
            batch = []
        batch.append(row)
    result.append(batch)
    order = torch.randperm(len(result), generator=torch.Generator().manual_seed(SEED))
    return [result[i] for i in order.tolist()]


def pretrain(model: Phi3ForCausalLM, tokenizer: PreTrainedTokenizerFast, corpus: Corpus) -> None:
    steps = batches(encode(tokenizer, list(corpus.conversations(SEED, CONVERSATIONS))))
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)

    def rate(step: int) -> float:
        if step < WARMUP_STEPS:
            return (step + 1) / WARMUP_STEPS
        return 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / (len(steps) - WARMUP_STEPS)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    heldout = list(corpus.conversations(SEED + 1, 200))
    tokens, began = 0, time.monotonic()
    model.train()
    for step, rows in enumerate(steps):
        batch = pad(rows, tokenizer.pad_token_id)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        targets = batch["input_ids"][:, 1:]
        weights = (
            torch.where(batch["labels"][:, 1:] != IGNORED, 1.0, USER_TOKEN_WEIGHT) * batch["attention_mask"][:, 1:]
        )
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        loss = (losses * weights.flatten()).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += int(batch["attention_mask"].sum())
        if step % 100 == 0 or step == len(steps) - 1:
            seconds = time.monotonic() - began
            shown = f"step {step + 1}/{len(steps)}  {tokens / 1e6:.2f} M tokens  {seconds / 60:.1f} min"
            print(f"{shown}  held-out loss {assistant_loss(model, tokenizer, heldout):.3f}", flush=True)
            model.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=MODEL_DIR, help="model folder (default: the one in the package)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)

    corpus = Corpus()
    tokenizer = train_tokenizer(corpus, options.output)
    model = new_model(tokenizer)
    print(f"{model.num_parameters():,} parameters", flush=True)
    pretrain(model, tokenizer, corpus)

    model = model.to(torch.bfloat16)
    model.save_pretrained(options.output)
    (options.output / "model.safetensors").chmod(0o644)  # safetensors makes it readable for its owner only
    # Measured on what was saved, rounded to bfloat16, and computed in float32, which any CPU does well.
    model = Phi3ForCausalLM.from_pretrained(options.output, dtype=torch.float32)
    heldout = list(corpus.conversations(SEED + 2, 400))
    wrong = wrong_answers(model, tokenizer, heldout)
    print(f"held-out loss {assistant_loss(model, tokenizer, heldout):.4f}")
    print(f"held-out questions answered to the letter: {len(heldout) - len(wrong)} of {len(heldout)}")
    for question, expected, given in wrong[:12]:
        print(f"  {question!r}: {given!r}, not {expected!r}")


if __name__ == "__main__":
    main()
