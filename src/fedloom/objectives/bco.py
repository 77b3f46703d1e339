"""Binary classifier optimization: alignment from single answers as a classifier of their rewards.

Source: Jung et al. 2024, "Binary Classifier Optimization for Large Language Model Alignment",
https://arxiv.org/abs/2404.04656, equation 12. The reward shift delta is a running mean in the paper;
here it is that of the optimizer batch (a reconstruction: clients keep no running state, and the
result does not depend on how the batch is cut). Under row-level privacy it is 0: one row would move it,
and with it every other row's gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fedloom.data.batch import Batch
from fedloom.objectives.base import (
    Metrics,
    Model,
    ReferenceSettings,
    Scores,
    Separable,
    StatisticObjective,
)
from fedloom.objectives.logps import completion_logps
from fedloom.wire.schema import amount, fraction, score


class BCOSettings(ReferenceSettings):
    """``[objective] name = "bco"``."""

    name: Literal["bco"] = "bco"
    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull towards the reference model."""


def reward_shift(rewards: Tensor, desirable: Tensor) -> Tensor:
    """Return delta, half the sum of the two classes' mean rewards; a class not there counts 0.

    Args:
        rewards: ``(rows,)``.
        desirable: ``(rows,)`` bool.
    """
    means = [rewards[mask].sum() / mask.sum().clamp(min=1) for mask in (desirable, ~desirable)]
    return ((means[0] + means[1]) / 2).detach()


def bco_loss(rewards: Tensor, desirable: Tensor, shift: Tensor) -> tuple[Tensor, Metrics]:
    """Return the mean cross-entropy of sigmoid(reward - shift) against desirable.

    Args:
        rewards: ``(rows,)`` beta times the log-ratio.
        desirable: ``(rows,)`` bool.
        shift: Scalar delta.
    """
    margins = torch.where(desirable, rewards - shift, shift - rewards)
    metrics = {"sided_accuracy": (margins.detach() > 0).float().mean(), "reward_shift": shift}
    return -F.logsigmoid(margins).mean(), metrics  # equation 12


class BCO(StatisticObjective):
    """BCO on single answers, against the frozen base model."""

    kind = "feedback"
    accepts = ("feedback", "preference")
    needs_reference = True
    reported = (amount("loss"), fraction("sided_accuracy"), score("reward_shift"))
    separable = Separable(True, "the reward shift delta is 0 in place of the batch's")
    shifted = True

    def __init__(self, settings: BCOSettings | None = None) -> None:
        """Keep beta."""
        self.beta = (settings or BCOSettings()).beta

    def for_rows(self) -> BCO:
        """Return the objective with delta frozen at 0."""
        own = copy.copy(self)
        own.shifted = False
        return own

    def scores(self, model: Model, batch: Batch) -> Scores:
        """Return the log-probs."""
        return Scores(completion_logps(model, batch.sequences))

    @torch.no_grad()
    def statistic(self, scores: Sequence[Scores], batches: Sequence[Batch]) -> Tensor:
        """Return delta over the whole optimizer batch."""
        if not self.shifted:
            return torch.zeros((), device=batches[0].sequences.input_ids.device)
        rewards = [self._rewards(*own) for own in zip(scores, batches, strict=True)]
        labels = [batch.labels for batch in batches if batch.labels is not None]
        return reward_shift(torch.cat(rewards), torch.cat(labels))

    @torch.no_grad()
    def statistics(self, model: Model, batches: Sequence[Batch]) -> Tensor | None:
        """Return delta, by passes of its own where it needs any."""
        if not self.shifted:
            return self.statistic([], batches)
        return self.statistic([self.scores(model, batch) for batch in batches], batches)

    def loss_of(self, scores: Scores, batch: Batch, statistic: Tensor) -> tuple[Tensor, Metrics]:
        """Return the mean loss over rows."""
        assert batch.labels is not None
        return bco_loss(self._rewards(scores, batch), batch.labels, statistic)

    def loss(self, model: Model, batch: Batch, statistics: Tensor | None) -> tuple[Tensor, Metrics]:
        """Return the mean loss over rows."""
        assert statistics is not None, "the loop passes the reward shift"
        return self.loss_of(self.scores(model, batch), batch, statistics)

    def _rewards(self, scores: Scores, batch: Batch) -> Tensor:
        assert batch.reference_logps is not None, "the loop adds the reference log-probs"
        return self.beta * (scores.logps - batch.reference_logps)
