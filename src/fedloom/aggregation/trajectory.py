"""The next move of a trajectory, from a few synthetic examples whose training makes its last move: pure.

Idea: FedPTR (https://arxiv.org/abs/2312.14380), by its abstract; the formulas are our reconstruction.
With U some steps of gradient descent on a loss of parameters and synthetic examples S, which is

    argmin_S |U(w_before; S) - w_now|^2 / |w_now - w_before|^2,   then   U(w_now; S).

Tensors come in and go out by name; nothing that comes in is written to. Nothing is random.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedloom.tensors import Tensors

SyntheticLoss = Callable[[Tensors, Tensors], Tensor]
"""A scalar of parameters and synthetic examples, twice differentiable."""


def descended(
    start: Tensors, synthetic: Tensors, loss: SyntheticLoss, steps: int, rate: float
) -> Tensors:
    """Return U(w; S): steps of gradient descent, of which gradients by S can be taken.

    Args:
        start: w, with or without a gradient.
        synthetic: S.
        loss: What is descended.
        steps: J, from 0.
        rate: Of a step.
    """
    held = {n: t if t.requires_grad else t.detach().requires_grad_() for n, t in start.items()}
    for _ in range(steps):
        slopes = torch.autograd.grad(
            loss(held, synthetic), list(held.values()), create_graph=True, allow_unused=True
        )
        pairs = zip(held.items(), slopes, strict=True)
        held = {n: t if slope is None else t - rate * slope for (n, t), slope in pairs}
    return held


def mismatch(found: Tensors, before: Tensors, now: Tensors) -> Tensor:
    """Return |found - now|^2 / |now - before|^2, a scalar: 0 for the whole move, 1 for none."""
    missed = torch.stack([(found[name] - now[name]).square().sum() for name in now]).sum()
    moved = torch.stack([(now[name] - before[name]).square().sum() for name in now]).sum()
    return missed / moved


def fitted(
    synthetic: Tensors,
    loss: SyntheticLoss,
    before: Tensors,
    now: Tensors,
    how: tuple[int, float],
    fit: tuple[int, float],
) -> tuple[Tensors, float]:
    """Return synthetic examples whose training moves ``before`` to ``now``, and their :func:`mismatch`.

    They are the best that were met on the way.

    Args:
        synthetic: S at first.
        loss: See :func:`descended`.
        before: w of a round before; not equal to ``now`` everywhere.
        now: w.
        how: J and the rate of its steps, as of :func:`descended`.
        fit: Steps of Adam that S makes, from 1, and their learning rate.
    """
    own = {name: tensor.detach().clone().requires_grad_() for name, tensor in synthetic.items()}
    optimizer = torch.optim.Adam(list(own.values()), fit[1])
    best, least = own, float("inf")
    for _ in range(fit[0]):
        found = mismatch(descended(before, own, loss, *how), before, now)
        if found.item() < least:
            least = found.item()
            best = {name: tensor.detach().clone() for name, tensor in own.items()}
        optimizer.zero_grad()
        found.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return best, least


def extrapolated(before: Tensors, now: Tensors, beta: float) -> Tensors:
    """Return w + beta (w - w_before), name by name."""
    return {name: tensor + beta * (tensor - before[name]) for name, tensor in now.items()}
