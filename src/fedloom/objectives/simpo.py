"""SimPO: preference optimization without a reference model, on mean log-probs a token.

Source: Meng et al. 2024, "SimPO: Simple Preference Optimization with a Reference-Free Reward",
https://arxiv.org/abs/2405.14734, equation 6.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fedloom.data.batch import Batch
from fedloom.objectives.base import PAIRWISE, Metrics, Model, Objective
from fedloom.objectives.logps import completion_logps
from fedloom.objectives.rewards import TOKEN_PAIRS, completion_lengths, token_pair_metrics
from fedloom.settings.schema import NamedSettings
from fedloom.wire.schema import amount


class SimPOSettings(NamedSettings):
    """``[objective] name = "simpo"``."""

    name: Literal["simpo"] = "simpo"
    beta: float = Field(default=2.0, gt=0)
    """Scale of the rewards (paper: 2.0 to 10)."""
    gamma: float = Field(default=1.0, ge=0)
    """Margin that the chosen answer should win by (paper: half of beta)."""


def simpo_loss(
    chosen_means: Tensor, rejected_means: Tensor, *, beta: float, gamma: float
) -> tuple[Tensor, Metrics]:
    """Return the mean of -log sigmoid(beta (chosen - rejected) - gamma).

    Args:
        chosen_means: ``(pairs,)`` mean log-probs a token of the chosen completions.
        rejected_means: ``(pairs,)`` the same of the rejected ones.
        beta: Above 0.
        gamma: Margin, at least 0.
    """
    losses = -F.logsigmoid(beta * (chosen_means - rejected_means) - gamma)  # equation 6
    return losses.mean(), token_pair_metrics(beta * chosen_means, beta * rejected_means)


class SimPO(Objective):
    """SimPO on preference pairs."""

    kind = "preference"
    accepts = ("preference",)
    separable = PAIRWISE
    reported = (amount("loss"), *TOKEN_PAIRS)

    def __init__(self, settings: SimPOSettings | None = None) -> None:
        """Keep beta and gamma."""
        settings = settings or SimPOSettings()
        self.beta, self.gamma = settings.beta, settings.gamma

    def loss(self, model: Model, batch: Batch, statistics: Tensor | None) -> tuple[Tensor, Metrics]:
        """Return the mean loss over pairs."""
        means = completion_logps(model, batch.sequences) / completion_lengths(batch.sequences)
        chosen, rejected = means.chunk(2)
        return simpo_loss(chosen, rejected, beta=self.beta, gamma=self.gamma)
