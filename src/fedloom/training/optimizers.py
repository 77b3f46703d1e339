"""Local optimizers, and the learning rate over rounds."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from fedloom.models.heads import is_head
from fedloom.tensors import Tensors
from fedloom.training.settings import TrainingSettings


def round_learning_rate(settings: TrainingSettings, round: int, rounds: int) -> float:
    """Return the learning rate of ``round`` (from 1) of ``rounds``.

    Cosine: ``min + (first - min) (1 + cos(pi t / T)) / 2`` with t = round - 1, as in 2502.14187; linear:
    ``first + (min - first) t / T``. Neither reaches min in the last round, in which t is T - 1. In the W
    rounds of a warm-up the rate is ``first round / (W + 1)``, and t and T are of the rounds after them.
    """
    if round <= settings.warmup_rounds:
        return settings.learning_rate * round / (settings.warmup_rounds + 1)
    round, rounds = round - settings.warmup_rounds, rounds - settings.warmup_rounds
    first, last = settings.learning_rate, settings.min_learning_rate
    share = (round - 1) / rounds
    if settings.schedule == "cosine":
        return last + 0.5 * (first - last) * (1 + math.cos(math.pi * share))
    if settings.schedule == "linear":
        return first + (last - first) * share
    if settings.schedule == "exponential":
        return float(first * settings.decay ** (round - 1))
    return first


def make_optimizer(
    parameters: dict[str, nn.Parameter],
    settings: TrainingSettings,
    learning_rate: float,
    state: Tensors | None = None,
) -> torch.optim.Optimizer:
    """Return an optimizer over ``parameters``.

    Args:
        parameters: Trained tensors by name.
        settings: Which optimizer, and its constants.
        learning_rate: Of this round.
        state: What :func:`optimizer_state` returned at the end of an earlier round, or ``None``.
    """
    tensors = _groups(parameters, settings, learning_rate)
    decay = settings.weight_decay
    optimizer: torch.optim.Optimizer
    if settings.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            tensors, learning_rate, momentum=settings.momentum, weight_decay=decay
        )
    else:
        betas = (settings.beta1, settings.beta2)
        kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
        # The fused kernel does one pass over each tensor; small adapters gain most from it.
        optimizer = kind(
            tensors, learning_rate, betas, settings.epsilon, weight_decay=decay, fused=True
        )
    if state:
        for name, parameter in parameters.items():
            slots = [key for key in state if key.startswith(f"{name}/")]
            optimizer.state[parameter] = {
                key.rpartition("/")[2]: state[key].clone() for key in slots
            }
    return optimizer


def _groups(
    parameters: dict[str, nn.Parameter], settings: TrainingSettings, learning_rate: float
) -> Any:
    """Return the parameters for an optimizer: all alike, or heads with a learning rate of their own."""
    if settings.head_learning_rate is None:
        return list(parameters.values())
    rate = learning_rate * settings.head_learning_rate / settings.learning_rate
    heads = [p for name, p in parameters.items() if is_head(name)]
    others = [p for name, p in parameters.items() if not is_head(name)]
    groups: list[dict[str, Any]] = [{"params": others}, {"params": heads, "lr": rate}]
    return [group for group in groups if group["params"]]


def optimizer_state(
    parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> Tensors:
    """Return an optimizer's tensors under ``parameter name/slot``."""
    return {
        f"{name}/{slot}": value.detach().cpu().clone()
        for name, parameter in parameters.items()
        for slot, value in optimizer.state[parameter].items()
        if isinstance(value, torch.Tensor)
    }
