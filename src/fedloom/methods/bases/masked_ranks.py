"""Trainings that move some ranks of LoRA's factors alone: the others are the same bits afterwards."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedloom.aggregation.lora import A, factor_pairs
from fedloom.tensors import Tensors


class MaskedRanks:
    """Hooks around the steps of a training (``before_step``, ``after_step``).

    A gradient that is masked counts in no norm that ``training.max_grad_norm`` bounds; with row-level
    privacy it does in its row's norm: rows' gradients are clipped, and noise is added, before the mask.
    What momentum and weight decay would move is put back.
    """

    def __init__(self, start: Tensors, ranks: Tensor, device: torch.device) -> None:
        """Keep what is put back.

        Args:
            start: Factors as the training begins.
            ranks: ``(layers, r)`` bool: which are trained, layers in the order of ``start``.
            device: The model's.
        """
        self._masks: Tensors = {}
        self._start: Tensors = {}
        for own, pair in zip(ranks, factor_pairs(start).values(), strict=True):
            for name in pair:
                mask = own[:, None] if A in name else own[None]
                self._masks[name] = mask.to(device)
                self._start[name] = start[name].to(device)

    def before(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Mask the gradients."""
        for name, mask in self._masks.items():
            if name in parameters and (gradient := parameters[name].grad) is not None:
                gradient.mul_(mask)

    def after(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Put back what is not trained."""
        with torch.no_grad():
            for name, mask in self._masks.items():
                if name in parameters:
                    own = parameters[name]
                    own.copy_(torch.where(mask, own, self._start[name]))
