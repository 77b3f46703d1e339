"""Robust DPO: an unbiased estimate of DPO's loss from pairs of which a known share is flipped.

Source: Chowdhury et al. 2024, "Provably Robust DPO: Aligning Language Models with Noisy Feedback",
https://arxiv.org/abs/2403.00409, section 3.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fedloom.data.batch import Batch
from fedloom.objectives.base import PAIRWISE, Metrics, Model, Objective, ReferenceSettings
from fedloom.objectives.logps import completion_logps
from fedloom.objectives.rewards import PAIRS, pair_metrics
from fedloom.wire.schema import score


class RobustDPOSettings(ReferenceSettings):
    """``[objective] name = "robust_dpo"``; TRL's ``loss_type = "robust"``."""

    name: Literal["robust_dpo"] = "robust_dpo"
    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull towards the reference model (paper: 0.1)."""
    flip_rate: float = Field(default=0.1, ge=0, lt=0.5)
    """Share of pairs whose preference is assumed to be flipped (paper: 0.1; TRL's ``label_smoothing``); 0
    is plain DPO."""


def robust_dpo_loss(
    chosen_ratios: Tensor, rejected_ratios: Tensor, *, beta: float, flip_rate: float
) -> tuple[Tensor, Metrics]:
    """Return the mean of ((1 - e) l(m) - e l(-m)) / (1 - 2 e), with l(m) = -log sigmoid(m).

    Its expectation over flips of probability e is DPO's loss on the true pairs; a single value may be
    negative.

    Args:
        chosen_ratios: ``(pairs,)`` log-ratios to the reference, sums over the completion.
        rejected_ratios: ``(pairs,)`` the same of the rejected completions.
        beta: Above 0; m is beta times the difference of the two.
        flip_rate: e, in [0, 0.5).
    """
    margin = beta * (chosen_ratios - rejected_ratios)
    as_said, as_flipped = -F.logsigmoid(margin), -F.logsigmoid(-margin)
    losses = ((1 - flip_rate) * as_said - flip_rate * as_flipped) / (1 - 2 * flip_rate)
    return losses.mean(), pair_metrics(beta * chosen_ratios, beta * rejected_ratios)


class RobustDPO(Objective):
    """Robust DPO on preference pairs, against the frozen base model."""

    kind = "preference"
    accepts = ("preference",)
    separable = PAIRWISE
    needs_reference = True
    reported = (score("loss"), *PAIRS)

    def __init__(self, settings: RobustDPOSettings | None = None) -> None:
        """Keep beta and the share of flipped pairs."""
        settings = settings or RobustDPOSettings()
        self.beta, self.flip_rate = settings.beta, settings.flip_rate

    def loss(self, model: Model, batch: Batch, statistics: Tensor | None) -> tuple[Tensor, Metrics]:
        """Return the mean loss over pairs."""
        assert batch.reference_logps is not None, "the loop adds the reference log-probs"
        ratios = completion_logps(model, batch.sequences) - batch.reference_logps
        return robust_dpo_loss(*ratios.chunk(2), beta=self.beta, flip_rate=self.flip_rate)
