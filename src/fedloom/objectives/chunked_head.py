"""Log-probs of tokens from what the output layer reads, some positions at a time.

The logits of all positions are never held together. Where the output layer is frozen, each chunk's
gradient is worked out with its log-probs: that of a position's log-prob with respect to its own hidden
state, which the gradient from above is multiplied with, so nothing is computed twice. Where it is
trained, a chunk's logits are computed again in the backward pass. Logits are summed up in float32
whatever they are in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fedloom.data.batch import Predicting

CHUNK = 1 << 24
"""Logits that are held at a time: 64 MB in float32, of which there are up to four."""

Logits = Callable[[Tensor], Tensor]


def token_logps(predicting: Predicting, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-prob of each token, and whether it was the most likely one.

    Args:
        predicting: What the output layer reads where it predicts them.
        targets: ``(tokens,)`` int64.

    Returns:
        ``(tokens,)`` float32 and ``(tokens,)`` bool, without a gradient.
    """
    states, logits = predicting.states, predicting.logits
    size = max(1, CHUNK // predicting.width)
    if not torch.is_grad_enabled() or not (states.requires_grad or predicting.trained):
        scored = [_score(logits, *own) for own in _chunks(states, targets, size)]
    elif not predicting.trained:
        logps, correct = _Scored.apply(states, targets, logits, size)  # type: ignore[no-untyped-call]
        return logps, correct
    elif len(targets) <= size:
        return _score(logits, states, targets)
    else:
        scored = [
            checkpoint(_score, logits, *own, use_reentrant=False)
            for own in _chunks(states, targets, size)
        ]
    if not scored:
        return states.new_zeros(0, dtype=torch.float32), targets.new_zeros(0, dtype=torch.bool)
    return torch.cat([own[0] for own in scored]), torch.cat([own[1] for own in scored])


def _chunks(states: Tensor, targets: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    starts = range(0, len(targets), size)
    return [(states[start : start + size], targets[start : start + size]) for start in starts]


def _score(logits: Logits, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    found = logits(states).float()
    own = found.detach()
    correct = own.gather(1, targets.unsqueeze(1)).squeeze(1) >= own.amax(1)  # argmax is slow
    return -F.cross_entropy(found, targets, reduction="none"), correct


class _Scored(torch.autograd.Function):
    """Log-probs under a frozen output layer, with the gradients of their states beside them."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, targets: Tensor, logits: Logits, size: int
    ) -> tuple[Tensor, Tensor]:
        logps = torch.empty(len(targets), device=states.device)
        correct = torch.empty(len(targets), dtype=torch.bool, device=states.device)
        slopes = torch.empty_like(states)
        for start in range(0, len(targets), size):
            own = slice(start, start + size)
            with torch.enable_grad():
                read = states[own].detach().requires_grad_()
                scores, correct[own] = _score(logits, read, targets[own])
                (slopes[own],) = torch.autograd.grad(scores.sum(), read)
            logps[own] = scores.detach()
        ctx.save_for_backward(slopes)
        ctx.mark_non_differentiable(correct)
        return logps, correct

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:
        (slopes,) = ctx.saved_tensors
        return (grad.unsqueeze(1) * slopes).to(slopes.dtype), None, None, None
