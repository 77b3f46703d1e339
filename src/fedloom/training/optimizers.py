"""Local optimizers, and the learning rate over rounds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from fedloom.aggregation.lora import B
from fedloom.errors import ModelError, SettingsError
from fedloom.models.heads import is_head
from fedloom.tensors import Tensors
from fedloom.training.settings import BITSANDBYTES, TrainingSettings


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
    optimizer = _made(_groups(parameters, settings, learning_rate), settings, learning_rate)
    if state:
        for name, parameter in parameters.items():
            slots = [key for key in state if key.startswith(f"{name}/")]
            optimizer.state[parameter] = {
                key.rpartition("/")[2]: state[key].clone() for key in slots
            }
    return optimizer


def _made(tensors: Any, settings: TrainingSettings, learning_rate: float) -> torch.optim.Optimizer:
    decay, betas = settings.weight_decay, (settings.beta1, settings.beta2)
    match settings.optimizer:
        case "sgd":
            return torch.optim.SGD(
                tensors, learning_rate, momentum=settings.momentum, weight_decay=decay
            )
        case "adafactor":
            from transformers.optimization import Adafactor  # for those who train with it alone

            # as transformers' Trainer makes it: the rate is the rate, whatever the size of a tensor
            fixed: Any = partial(Adafactor, scale_parameter=False, relative_step=False)
            made = fixed(tensors, learning_rate, weight_decay=decay)
        case "muon":
            return torch.optim.Muon(tensors, learning_rate, weight_decay=decay)
        case "adamw_8bit":
            kind = _bitsandbytes("adamw_8bit").AdamW8bit
            made = kind(tensors, learning_rate, betas, settings.epsilon, weight_decay=decay)
        case "lion":
            made = _bitsandbytes("lion").Lion(tensors, learning_rate, betas, weight_decay=decay)
        case _:
            kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
            # The fused kernel does one pass over each tensor; small adapters gain most from it.
            made = kind(
                tensors, learning_rate, betas, settings.epsilon, weight_decay=decay, fused=True
            )
    optimizer: torch.optim.Optimizer = made
    return optimizer


def require_optimizer(parameters: Mapping[str, torch.Tensor], settings: TrainingSettings) -> None:
    """Check that the optimizer is there, and takes these parameters, before anything is trained.

    Raises:
        ModelError: It is of matrices alone, and something else is trained.
        SettingsError: Its package, or a torch that has it, is not installed.
    """
    if settings.optimizer in BITSANDBYTES:
        _bitsandbytes(settings.optimizer)
    if settings.optimizer != "muon":
        return
    if not hasattr(torch.optim, "Muon"):
        raise SettingsError(
            [f'training.optimizer = "muon" needs torch 2.9, this is {torch.__version__}']
        )
    others = [name for name, own in parameters.items() if own.ndim != 2]
    if others:
        raise ModelError(
            f'training.optimizer = "muon" is of matrices, and {others[0]} is none ({len(others)} of '
            f"{len(parameters)} tensors): use another optimizer"
        )


def _bitsandbytes(optimizer: str) -> Any:
    """Return the optimizers of bitsandbytes.

    Raises:
        SettingsError: It is not installed.
    """
    try:
        from bitsandbytes import optim
    except ImportError as error:
        raise SettingsError(
            [
                f'training.optimizer = "{optimizer}" is one of bitsandbytes, which is not installed: '
                'pip install "fedloom[quantization]", or use "adamw"'
            ]
        ) from error
    return optim


def _groups(
    parameters: dict[str, nn.Parameter], settings: TrainingSettings, learning_rate: float
) -> Any:
    """Return the parameters for an optimizer: all alike, or some with learning rates of their own."""
    if not settings.several_rates:
        return list(parameters.values())
    groups: dict[float, list[nn.Parameter]] = {learning_rate: []}
    for name, parameter in parameters.items():
        rate = learning_rate
        if is_head(name) and settings.head_learning_rate is not None:
            rate *= settings.head_learning_rate / settings.learning_rate
        elif B in name or parameter.ndim == 1:  # as PEFT does: DoRA's magnitudes too
            rate *= settings.loraplus_lr_ratio
        groups.setdefault(rate, []).append(parameter)
    return [{"params": own, "lr": rate} for rate, own in groups.items() if own]


def optimizer_state(
    parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> Tensors:
    """Return an optimizer's tensors, and its numbers as tensors, under ``parameter name/slot``."""
    return {
        f"{name}/{slot}": torch.as_tensor(value).detach().cpu().clone()
        for name, parameter in parameters.items()
        for slot, value in optimizer.state[parameter].items()
        if isinstance(value, torch.Tensor | int | float)
    }
