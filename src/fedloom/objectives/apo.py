"""Anchored preference optimization: each answer of a pair is anchored to the reference by itself.

Source: D'Oosterlinck et al. 2024, "Anchored Preference Optimization and Contrastive Revisions:
Addressing Underspecification in Alignment", https://arxiv.org/abs/2408.06266, equations 7 and 8.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from fedloom.data.batch import Batch
from fedloom.objectives.base import PAIRWISE, Metrics, Model, Objective, ReferenceSettings
from fedloom.objectives.logps import completion_logps
from fedloom.objectives.rewards import PAIRS, pair_metrics
from fedloom.wire.schema import amount


class APOZeroSettings(ReferenceSettings):
    """``[objective] name = "apo_zero"``: where chosen answers are better than the model's own."""

    name: Literal["apo_zero"] = "apo_zero"
    beta: float = Field(default=0.1, gt=0)
    """Scale of the rewards (paper: 0.1)."""


class APODownSettings(ReferenceSettings):
    """``[objective] name = "apo_down"``: where the model's own answers are better than chosen ones."""

    name: Literal["apo_down"] = "apo_down"
    beta: float = Field(default=0.1, gt=0)
    """Scale of the rewards (paper: 0.1)."""


def apo_zero_loss(
    chosen_ratios: Tensor, rejected_ratios: Tensor, *, beta: float
) -> tuple[Tensor, Metrics]:
    """Return the mean of 1 - sigmoid(beta chosen) + sigmoid(beta rejected), in (0, 2).

    The likelihood of chosen answers is raised, that of rejected ones lowered.

    Args:
        chosen_ratios: ``(pairs,)`` log-ratios to the reference, sums over the completion.
        rejected_ratios: ``(pairs,)`` the same of the rejected completions.
        beta: Above 0.
    """
    chosen, rejected = beta * chosen_ratios, beta * rejected_ratios
    losses = (-chosen).sigmoid() + rejected.sigmoid()  # equation 7; 1 - s(x) = s(-x)
    return losses.mean(), pair_metrics(chosen, rejected)


def apo_down_loss(
    chosen_ratios: Tensor, rejected_ratios: Tensor, *, beta: float
) -> tuple[Tensor, Metrics]:
    """Return the mean of sigmoid(beta chosen) + 1 - sigmoid(beta (chosen - rejected)), in (0, 2).

    The likelihood of chosen answers is lowered, that of rejected ones lowered more.

    Args:
        chosen_ratios: ``(pairs,)`` log-ratios to the reference, sums over the completion.
        rejected_ratios: ``(pairs,)`` the same of the rejected completions.
        beta: Above 0.
    """
    chosen, rejected = beta * chosen_ratios, beta * rejected_ratios
    losses = chosen.sigmoid() + (rejected - chosen).sigmoid()  # equation 8
    return losses.mean(), pair_metrics(chosen, rejected)


class APOZero(Objective):
    """APO-zero on preference pairs, against the frozen base model."""

    kind = "preference"
    accepts = ("preference",)
    separable = PAIRWISE
    needs_reference = True
    reported = (amount("loss"), *PAIRS)
    pair_loss = staticmethod(apo_zero_loss)

    def __init__(self, settings: APOZeroSettings | APODownSettings | None = None) -> None:
        """Keep beta."""
        self.beta = (settings or APOZeroSettings()).beta

    def loss(self, model: Model, batch: Batch, statistics: Tensor | None) -> tuple[Tensor, Metrics]:
        """Return the mean loss over pairs."""
        assert batch.reference_logps is not None, "the loop adds the reference log-probs"
        ratios = completion_logps(model, batch.sequences) - batch.reference_logps
        return self.pair_loss(*ratios.chunk(2), beta=self.beta)


class APODown(APOZero):
    """APO-down on preference pairs, against the frozen base model."""

    pair_loss = staticmethod(apo_down_loss)
