"""Votes of several judges on pairs, each asked in both orders; pure."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Votes:
    """What judges say of pairs.

    Attributes:
        winners: ``(pairs,)`` int64: 1 where most are for the first answer, -1 for the second, 0: tie.
        first: ``(pairs,)`` int64: judges for the first answer.
        second: ``(pairs,)`` int64: judges for the second.
        by_position: Share of pairs, over all judges, of which a judge says the same letter in both
            orders: the position decides and not the answer.
    """

    winners: Tensor
    first: Tensor
    second: Tensor
    by_position: float


def votes(margins: Tensor) -> Votes:
    """Return the votes of judges: each is for the answer that its margins of both orders add up to.

    A judge whose margins add up to 0 has no vote. Source: Wu et al. 2024, FedBiscuit,
    https://arxiv.org/abs/2407.03038, where ties go to the first answer; here they are ties.

    Args:
        margins: ``(judges, 2, pairs)``: by how much a judge prefers the first answer, asked with it in
            the first position, and in the second.
    """
    whole = margins.double().sum(1)
    first, second = (whole > 0).sum(0), (whole < 0).sum(0)
    apart = margins[:, 0].sign() * margins[:, 1].sign() < 0
    share = float(apart.double().mean()) if apart.numel() else 0.0
    return Votes(torch.sign(first - second), first, second, share)
