"""The gradient of Adam's first step, read back from the step.

Adam (Kingma and Ba 2015, https://arxiv.org/abs/1412.6980) divides the mean of gradients by the root of
the mean of their squares. In the first step of a new optimizer both are of one gradient g, and what is
subtracted is

    lr u,    u = g / (|g| + eps)

the sign of g but for eps: its size is eps |u| / (1 - |u|). In float32 1 - |u| is known to some 1e-7 where
weights are 0 (B of LoRA in the first round) and to the rounding of the weight over lr elsewhere. That
is enough for the span test, where the sign alone has full rank and is no mixture of a layer's inputs.
From the second step on, each entry is divided by a root over several gradients, and there is no inverse.

This inversion is derived here; no paper is followed.
"""

from __future__ import annotations

import torch
from torch import Tensor

SLACK = 2.0**-22
"""Rounding of u in itself: a few operations in float32."""

MOST = 1 + 1e-3
"""|u| beyond which this was no first step with this rate."""


def first_gradient(
    change: Tensor,
    received: Tensor,
    rate: float,
    epsilon: float,
    *,
    decay: float = 0.0,
    decoupled: bool = True,
) -> Tensor | None:
    """Return the rows of the gradient, each divided by the error that it is known with.

    So the error of a number is about 1, and a row of which little is known weighs little; the space that
    rows span does not change.

    Args:
        change: ``(rows, columns)`` what the step added to the weight, from float32 weights.
        received: The same shape: the weight before.
        rate: Learning rate, above 0.
        epsilon: Adam's, above 0.
        decay: Weight decay, at least 0.
        decoupled: Whether it is AdamW's, which leaves the gradient alone.

    Returns:
        ``(rows, columns)`` float64, ``None`` where the change is no first step with this rate.
    """
    before = received.double()
    step = change.double() / -rate
    if decoupled:
        step = step - decay * before
    size = step.abs()
    if not torch.isfinite(step).all() or float(size.max()) > MOST or not size.any():
        return None
    rounding = spacing(before + change.double()) / 12**0.5 / rate
    if decay:
        rounding = rounding * 2**0.5  # the decayed weight is rounded as well
    uncertain = (rounding.square() + SLACK**2).sqrt()
    gap = torch.maximum(1 - size, uncertain)
    gradient = step.sign() * epsilon * size / gap
    error = epsilon * uncertain / gap.square()
    if not decoupled:
        gradient = gradient - decay * before
    scale = error.square().mean(1, keepdim=True).sqrt()
    return gradient / scale


def spacing(values: Tensor) -> Tensor:
    """Return the distance of float32 numbers as large as these, 0 of 0."""
    size = values.double().abs()
    steps = torch.exp2(torch.floor(torch.log2(size.clamp_min(2.0**-126))) - 23)
    return torch.where(size > 0, steps, torch.zeros_like(steps))
