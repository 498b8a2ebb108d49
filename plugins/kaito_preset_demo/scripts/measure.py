"""The two figures that the README reports: loss on the assistant's tokens, and greedy answers that are right to the letter."""

from __future__ import annotations

from typing import Any

import torch

Message = dict[str, str]
IGNORED = -100
#: Conversations measured at a time; only a matter of speed.
BATCH = 32


def encode(tokenizer: Any, conversations: list[list[Message]]) -> list[tuple[list[int], list[int]]]:
    """Token ids of each conversation, and a mask that is 1 on what the assistant says, its `<|end|>` included."""
    encoded = tokenizer.apply_chat_template(conversations, return_dict=True, return_assistant_tokens_mask=True)
    return list(zip(encoded["input_ids"], encoded["assistant_masks"], strict=True))


def pad(rows: list[tuple[list[int], list[int]]], pad_id: int) -> dict[str, torch.Tensor]:
    """A batch [rows, longest] of ids, attention mask, and labels that keep the assistant's tokens only."""
    longest = max(len(ids) for ids, _ in rows)

    def table(values: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([row + [fill] * (longest - len(row)) for row in values])

    return {
        "input_ids": table([ids for ids, _ in rows], pad_id),
        "attention_mask": table([[1] * len(ids) for ids, _ in rows], 0),
        "labels": table([[t if m else IGNORED for t, m in zip(*row, strict=True)] for row in rows], IGNORED),
    }


@torch.inference_mode()
def assistant_loss(model: Any, tokenizer: Any, conversations: list[list[Message]]) -> float:
    """Mean cross-entropy, in nats per assistant token."""
    model.eval()
    total, tokens = 0.0, 0
    rows = encode(tokenizer, conversations)
    for start in range(0, len(rows), BATCH):
        batch = pad(rows[start : start + BATCH], tokenizer.pad_token_id)
        counted = int((batch["labels"][:, 1:] != IGNORED).sum())
        total += float(model(**batch).loss) * counted
        tokens += counted
    return total / tokens


@torch.inference_mode()
def answers(model: Any, tokenizer: Any, conversations: list[list[Message]]) -> list[str]:
    """Greedy answers to the last question of each conversation; one that does not stop by itself ends in `…`."""
    model.eval()
    tokenizer.padding_side = "left"
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    texts = []
    for start in range(0, len(conversations), BATCH):
        batch = tokenizer.apply_chat_template(
            conversations[start : start + BATCH],
            add_generation_prompt=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
        )
        output = model.generate(**batch, max_new_tokens=48, do_sample=False)
        for row in output[:, batch["input_ids"].shape[1] :].tolist():
            stopped = end in row
            ids = row[: row.index(end)] if stopped else row
            texts.append(tokenizer.decode(ids, skip_special_tokens=True) + ("" if stopped else "…"))
    return texts


def wrong_answers(model: Any, tokenizer: Any, conversations: list[list[Message]]) -> list[tuple[str, str, str]]:
    """(question, expected, given) for each conversation whose last answer is not given to the letter."""
    given = answers(model, tokenizer, [messages[:-1] for messages in conversations])
    return [
        (messages[-2]["content"], messages[-1]["content"], text)
        for messages, text in zip(conversations, given, strict=True)
        if text != messages[-1]["content"]
    ]
