"""Server optimizers: what the server does with the clients' mean change, pure.

Sources: FedAvgM, Hsu et al. 2019, "Measuring the Effects of Non-Identical Data Distribution",
https://arxiv.org/abs/1909.06335; FedAdagrad, FedAdam and FedYogi, Reddi et al. 2021, "Adaptive
Federated Optimization", https://arxiv.org/abs/2003.00295, algorithm 2; all four as they were run in
2502.14187 (``specs/methods.md`` 2.3): the momentum is damped by 1 - beta1, starts at the first
change, and there is no bias correction.

Tensors come in and go out by name; nothing that comes in is written to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedloom.tensors import Tensors


def difference(left: Tensors, right: Tensors) -> Tensors:
    """Return left - right, name by name."""
    return {name: tensor - right[name] for name, tensor in left.items()}


def momentum(previous: Tensors, change: Tensors, beta1: float) -> Tensors:
    """Return m = beta1 m + (1 - beta1) d, and d where there is no m yet.

    Args:
        previous: m of the round before; empty in the first.
        change: d, the clients' mean change.
        beta1: In [0, 1).
    """
    if not previous:
        return dict(change)
    return {n: beta1 * previous[n] + (1 - beta1) * d for n, d in change.items()}


def nesterov_momentum(previous: Tensors, change: Tensors, beta: float) -> tuple[Tensors, Tensors]:
    """Return m = beta m + d (d where there is no m yet), and the step d + beta m.

    Nesterov's momentum in the form of ``torch.optim.SGD``; d is a change, the negative of a gradient.

    Args:
        previous: m of the round before; empty in the first.
        change: d, the clients' mean change.
        beta: At least 0.
    """
    moved = {n: beta * previous[n] + d for n, d in change.items()} if previous else dict(change)
    return moved, {n: d + beta * moved[n] for n, d in change.items()}


def adagrad_moment(previous: Tensors, signal: Tensors) -> Tensors:
    """Return v = v + s^2."""
    return {name: previous[name] + s.square() for name, s in signal.items()}


def adam_moment(previous: Tensors, signal: Tensors, beta2: float) -> Tensors:
    """Return v = beta2 v + (1 - beta2) s^2."""
    return {n: beta2 * previous[n] + (1 - beta2) * s.square() for n, s in signal.items()}


def yogi_moment(previous: Tensors, signal: Tensors, beta2: float) -> Tensors:
    """Return v = v - (1 - beta2) s^2 sign(v - s^2)."""

    def moved(v: Tensor, square: Tensor) -> Tensor:
        return v - (1 - beta2) * square * torch.sign(v - square)

    return {name: moved(previous[name], s.square()) for name, s in signal.items()}


def adaptive_step(
    start: Tensors, first: Tensors, second: Tensors, eta: float, tau: float
) -> Tensors:
    """Return x = x + eta m / (sqrt(v) + tau).

    Args:
        start: x, the shared tensors.
        first: m, the direction.
        second: v, at least 0.
        eta: Server learning rate, above 0.
        tau: Degree of adaptivity, above 0.
    """
    return {n: x + eta * first[n] / (second[n].sqrt() + tau) for n, x in start.items()}
