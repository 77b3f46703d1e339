"""ORPO: supervised fine-tuning on the chosen answers with an odds ratio against the rejected ones.

Source: Hong et al. 2024, "ORPO: Monolithic Preference Optimization without Reference Model",
https://arxiv.org/abs/2403.07691, equations 4, 6 and 7.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fedloom.data.batch import Batch
from fedloom.objectives.base import PAIRWISE, Metrics, Model, Objective
from fedloom.objectives.logps import completion_logps
from fedloom.objectives.rewards import TOKEN_PAIRS, completion_lengths, token_pair_metrics
from fedloom.settings.schema import NamedSettings
from fedloom.wire.schema import amount, score


class ORPOSettings(NamedSettings):
    """``[objective] name = "orpo"``."""

    name: Literal["orpo"] = "orpo"
    beta: float = Field(default=0.1, gt=0)
    """Weight of the odds ratio, the paper's lambda (0.1)."""


def orpo_loss(
    chosen_means: Tensor, rejected_means: Tensor, *, beta: float
) -> tuple[Tensor, Metrics]:
    """Return the mean of the chosen answers' cross-entropy plus beta times the odds-ratio loss.

    Args:
        chosen_means: ``(pairs,)`` mean log-probs a token of the chosen completions, below 0.
        rejected_means: ``(pairs,)`` the same of the rejected ones.
        beta: Above 0.
    """
    log_odds = _log_odds(chosen_means) - _log_odds(rejected_means)  # equation 4
    losses = -chosen_means - beta * F.logsigmoid(log_odds)  # equations 6 and 7
    metrics = token_pair_metrics(beta * chosen_means, beta * rejected_means)
    return losses.mean(), metrics | {"log_odds_ratio": log_odds.detach().mean()}


def _log_odds(means: Tensor) -> Tensor:
    """Return log(p / (1 - p)) of p = exp(mean); a certain answer is taken as p = 1 - 1e-6."""
    means = means.clamp(max=-1e-6)
    return means - torch.log(-torch.expm1(means))


class ORPO(Objective):
    """ORPO on preference pairs."""

    kind = "preference"
    accepts = ("preference",)
    separable = PAIRWISE
    reported = (amount("loss"), *TOKEN_PAIRS, score("log_odds_ratio"))

    def __init__(self, settings: ORPOSettings | None = None) -> None:
        """Keep beta."""
        self.beta = (settings or ORPOSettings()).beta

    def loss(self, model: Model, batch: Batch, statistics: Tensor | None) -> tuple[Tensor, Metrics]:
        """Return the mean loss over pairs."""
        means = completion_logps(model, batch.sequences) / completion_lengths(batch.sequences)
        chosen, rejected = means.chunk(2)
        return orpo_loss(chosen, rejected, beta=self.beta)
