"""What is reported about pairs while training, the same for every objective on pairs."""

from __future__ import annotations

from torch import Tensor

from fedloom.data.batch import Sequences
from fedloom.objectives.base import Metrics
from fedloom.wire.schema import fraction, prefixed, score

PAIRS = (
    score("reward_chosen"),
    score("reward_rejected"),
    score("reward_margin"),
    fraction("reward_accuracy"),
)
"""Names and ranges of :func:`pair_metrics`."""

TOKEN = "token_"
"""Prefix where the objective's reward is a mean a token, which is on another scale than a sum."""

TOKEN_PAIRS = prefixed(TOKEN, PAIRS)
"""Names and ranges of :func:`token_pair_metrics`."""


def token_pair_metrics(chosen: Tensor, rejected: Tensor) -> Metrics:
    """Return :func:`pair_metrics` of rewards that are means a token, under names of their own."""
    return {TOKEN + name: value for name, value in pair_metrics(chosen, rejected).items()}


def pair_metrics(chosen: Tensor, rejected: Tensor) -> Metrics:
    """Return means of the rewards and the share of pairs won.

    Args:
        chosen: ``(pairs,)`` rewards of the chosen completions: beta times the log-ratio, plus gamma times
            the explicit reward where there is one.
        rejected: ``(pairs,)`` the same of the rejected ones.

    Returns:
        ``reward_chosen``, ``reward_rejected``, ``reward_margin`` (their mean difference) and
        ``reward_accuracy`` (share of pairs with a positive margin; a tie is lost, as in TRL).
    """
    chosen, rejected = chosen.detach(), rejected.detach()
    return {
        "reward_chosen": chosen.mean(),
        "reward_rejected": rejected.mean(),
        "reward_margin": (chosen - rejected).mean(),
        "reward_accuracy": (chosen > rejected).float().mean(),
    }


def outcomes(margins: Tensor) -> Tensor:
    """Return 1 for a margin above 0, 0.5 for none, 0 for one below, float64: ties count half."""
    margins = margins.detach()
    return (margins > 0).double() + 0.5 * (margins == 0).double()


def completion_lengths(sequences: Sequences) -> Tensor:
    """Return ``(sequences,)`` float32: the number of completion tokens, at least 1."""
    return sequences.completion_mask.sum(1).clamp(min=1).float()
