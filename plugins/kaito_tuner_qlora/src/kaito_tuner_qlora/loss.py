"""Cross entropy that never holds all logits.

The logits of T tokens over V words take ``T × V × 4`` bytes, several times over (values, fp32 copy, log-softmax, gradient):
3 GB for 4 × 2048 tokens over Phi-3's 32k words and ten times that for Phi-4-mini's 200k. Here the hidden states that carry
loss go through the output head chunk by chunk. The head is frozen, so the gradient of a chunk is known as soon as its loss
is, and is computed at once: nothing is kept but one gradient the size of the hidden states, and the head is multiplied with
twice and not three times as recomputation would. (As Liger and Cut-Cross-Entropy do: arXiv 2410.10989, 2411.09009.)
"""

from __future__ import annotations

from typing import Any

import torch

CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 64 << 20}
"""Memory of one chunk's fp32 logits. Larger is no faster on the CPU; a GPU is busy with a few hundred rows."""

IGNORED = -100


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor
    ) -> torch.Tensor:
        rows = max(16, CHUNK_BYTES[hidden.device.type] // (4 * weight.shape[0]))
        want_grad = ctx.needs_input_grad[0]
        grad = torch.empty_like(hidden) if want_grad else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), rows):
                part, target = hidden[start : start + rows].to(weight.dtype), labels[start : start + rows, None]
                logits = torch.nn.functional.linear(part, weight, bias).float()
                normaliser = torch.logsumexp(logits, dim=-1, keepdim=True)
                total += (normaliser - logits.gather(1, target)).sum()
                if grad is not None:
                    # d(-log softmax)/d logits = softmax - one-hot
                    logits.sub_(normaliser).exp_().scatter_add_(
                        1, target, torch.full_like(target, -1, dtype=logits.dtype)
                    )
                    grad[start : start + rows] = logits.to(weight.dtype) @ weight
        if grad is not None:
            ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # type: ignore[override]
        (grad,) = ctx.saved_tensors
        return grad * scale, None, None, None


def summed_cross_entropy(hidden: torch.Tensor, head: torch.nn.Linear, labels: torch.Tensor) -> torch.Tensor:
    """The sum of -log p(label) in nats over the positions whose label is not -100.

    ``hidden`` is [..., T, h], ``labels`` [..., T] and already shifted: the label of a position is the token that follows it.
    ``head`` must be frozen. Differentiable with respect to ``hidden``; a scalar in float32."""
    labels = labels.reshape(-1)
    where = (labels != IGNORED).nonzero(as_tuple=True)[0]
    chosen = hidden.reshape(-1, hidden.shape[-1]).index_select(0, where)
    loss: torch.Tensor = _SummedCrossEntropy.apply(chosen, head.weight, head.bias, labels[where])
    return loss
