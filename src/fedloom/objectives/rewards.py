"""What is reported about pairs while training, the same for every objective on pairs."""

from __future__ import annotations

from torch import Tensor

from fedloom.batch import Sequences
from fedloom.messages import fraction, score
from fedloom.objectives.base import Metrics

PAIRS = (
    score("reward_chosen"),
    score("reward_rejected"),
    score("reward_margin"),
    fraction("reward_accuracy"),
)
"""Names and ranges of :func:`pair_metrics`."""


def pair_metrics(chosen: Tensor, rejected: Tensor) -> Metrics:
    """Return means of the rewards and the share of pairs won.

    Args:
        chosen: ``(pairs,)`` rewards of the chosen completions, as the objective defines them.
        rejected: ``(pairs,)`` the same of the rejected ones.

    Returns:
        ``reward_chosen``, ``reward_rejected``, ``reward_margin`` (their mean difference) and
        ``reward_accuracy`` (share of pairs with a positive margin).
    """
    chosen, rejected = chosen.detach(), rejected.detach()
    return {
        "reward_chosen": chosen.mean(),
        "reward_rejected": rejected.mean(),
        "reward_margin": (chosen - rejected).mean(),
        "reward_accuracy": (chosen > rejected).float().mean(),
    }


def completion_lengths(sequences: Sequences) -> Tensor:
    """Return ``(sequences,)`` float32: the number of completion tokens, at least 1."""
    return sequences.completion_mask.sum(-1).clamp(min=1).float()
