"""An adapter whose ranks are three equal parts, trained one after the other; together they are one LoRA.

W + s B A with A = [A_0; A_1; A_2] and B = [B_0, B_1, B_2] is W + s (B_0 A_0 + B_1 A_1 + B_2 A_2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from fedloom.aggregation.lora import factor_pairs, part_of_ranks, rank_of, stacked
from fedloom.methods.bases.masked_ranks import MaskedRanks
from fedloom.tensors import Tensors
from fedloom.training.results import StepHook

COUNT = 3


def rank_part(adapter: Tensors, place: int) -> Tensors:
    """Return the factors of one part, from 0."""
    rank = rank_of(adapter) // COUNT
    found = part_of_ranks(adapter, place * rank, (place + 1) * rank)
    return {name: tensor.contiguous() for name, tensor in found.items()}


def whole_of(parts: Sequence[Tensors]) -> Tensors:
    """Return the adapter whose parts these are."""
    return stacked(parts, [1.0] * len(parts))


class PartHooks:
    """Hooks around the steps of a training of one part, which is kept off the parts below.

    To the loss is added weight ||B_j^T B_own||_F^2 for each part j below, over all layers. Source:
    HiLoRA, 2026, https://arxiv.org/abs/2603.02785.
    """

    def __init__(self, start: Tensors, place: int, weight: float, device: torch.device) -> None:
        """Mask the other parts' ranks.

        Args:
            start: The whole adapter as the training begins.
            place: Of the part, from 0.
            weight: Of the overlap; with 0, or for the first part, there is no such term.
            device: The model's.
        """
        self._rank = rank_of(start) // COUNT
        self._begin, self._weight = place * self._rank, weight
        ranks = torch.zeros(len(factor_pairs(start)), rank_of(start), dtype=torch.bool)
        ranks[:, self._begin : self._begin + self._rank] = True
        masked = MaskedRanks(start, ranks, device)
        self._mask = masked.before
        self.after: StepHook = masked.after

    def before(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Add the gradient of the overlap, and mask."""
        if self._begin and self._weight:
            for _, b in factor_pairs(parameters).values():
                up, gradient = parameters[b].detach(), parameters[b].grad
                if gradient is not None:
                    below, own = up[:, : self._begin], slice(self._begin, self._begin + self._rank)
                    gradient[:, own] += 2 * self._weight * below @ (below.T @ up[:, own])
        self._mask(parameters)

    def flops(self, adapter: Tensors) -> float:
        """Return the operations of the overlap's gradient in a step."""
        if not self._begin or not self._weight:
            return 0.0
        rows = sum(len(adapter[b]) for _, b in factor_pairs(adapter).values())
        return 4.0 * self._begin * self._rank * rows
