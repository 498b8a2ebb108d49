"""Attention over examples that lie one after another in one row, without a mask.

A row is cut at the examples' boundaries and PyTorch's attention kernel is called once per example: what an example sees is
itself, and the work is the sum of the squared lengths instead of the square of the sum. A 4-D mask for the same row would
cost T² memory and T² work, most of it for pairs that are masked away. Where flash-attention is installed its own
variable-length kernel does the same in one call; both read the boundaries from ``cu_seq_lens_q``, which transformers hands
through every model of its library (``FlashAttentionKwargs``).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "kaito_packed"


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each example.

    ``query`` is [1, heads, T, head_dim], ``key`` and ``value`` [1, kv_heads, T, head_dim]; ``cu_seq_lens_q`` holds the
    examples' first positions and T, on the CPU or elsewhere. Gives [1, T, heads, head_dim]."""
    if kwargs.get("softcap") is not None or kwargs.get("position_bias") is not None:
        raise ValueError("this model's attention caps or biases its scores, which packed attention does not do")
    if cu_seq_lens_q is None:
        raise ValueError("packed attention needs the examples' boundaries (cu_seq_lens_q)")
    lengths = cu_seq_lens_q.diff().tolist()
    parts = []
    # Split and not sliced: the gradient of a slice is a tensor of the whole row, once per example.
    for q, k, v in zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True):
        mask = None
        if sliding_window is not None and q.shape[2] > sliding_window:
            positions = torch.arange(q.shape[2], device=query.device)
            age = positions[:, None] - positions[None, :]
            mask = ((age >= 0) & (age < sliding_window))[None, None]
        part = sdpa_attention_forward(module, q, k, v, mask, dropout=dropout, scaling=scaling, is_causal=mask is None)
        parts.append(part[0])
    return torch.cat(parts, dim=1), None


AttentionInterface.register(NAME, packed_attention)
