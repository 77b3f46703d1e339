"""Contrastive preference optimization: DPO with a uniform reference, beside cross-entropy.

Source: Xu et al. 2024, "Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance
in Machine Translation", https://arxiv.org/abs/2401.08417, section 3.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fedloom.data.batch import Batch
from fedloom.objectives.base import PAIRWISE, Metrics, Model, Objective
from fedloom.objectives.logps import completion_logps
from fedloom.objectives.rewards import PAIRS, completion_lengths, pair_metrics
from fedloom.settings.schema import NamedSettings
from fedloom.wire.schema import amount


class CPOSettings(NamedSettings):
    """``[objective] name = "cpo"``."""

    name: Literal["cpo"] = "cpo"
    beta: float = Field(default=0.1, gt=0)
    """Scale of the rewards, which are log-probs (paper: 0.1)."""
    sft_weight: float = Field(default=1.0, ge=0)
    """Weight of the chosen answers' cross-entropy, a mean a token as in the authors' code (paper: 1);
    TRL's ``cpo_alpha``."""


def cpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    *,
    beta: float,
    sft_weight: float,
) -> tuple[Tensor, Metrics]:
    """Return the mean of -log sigmoid(beta (chosen - rejected)) - sft_weight chosen / length.

    The cross-entropy is a mean over the tokens of each answer and then over pairs, so that a pair's loss
    follows from the pair alone; TRL's is a mean over all tokens of a batch, the same for answers of one
    length.

    Args:
        chosen_logps: ``(pairs,)`` summed log-probs of the chosen completions.
        rejected_logps: ``(pairs,)`` the same of the rejected ones.
        chosen_lengths: ``(pairs,)`` completion tokens of the chosen ones, at least 1.
        beta: Above 0.
        sft_weight: At least 0.
    """
    losses = -F.logsigmoid(beta * (chosen_logps - rejected_logps))
    cross_entropy = -(chosen_logps / chosen_lengths).mean()
    metrics = pair_metrics(beta * chosen_logps, beta * rejected_logps)
    metrics["chosen_cross_entropy"] = cross_entropy.detach()
    return losses.mean() + sft_weight * cross_entropy, metrics


class CPO(Objective):
    """CPO on preference pairs; it needs no reference model."""

    kind = "preference"
    accepts = ("preference",)
    separable = PAIRWISE
    reported = (amount("loss"), *PAIRS, amount("chosen_cross_entropy"))

    def __init__(self, settings: CPOSettings | None = None) -> None:
        """Keep beta and the weight of the cross-entropy."""
        settings = settings or CPOSettings()
        self.beta, self.sft_weight = settings.beta, settings.sft_weight

    def loss(self, model: Model, batch: Batch, statistics: Tensor | None) -> tuple[Tensor, Metrics]:
        """Return the mean loss over pairs."""
        chosen, rejected = completion_logps(model, batch.sequences).chunk(2)
        lengths = completion_lengths(batch.sequences).chunk(2)[0]
        return cpo_loss(chosen, rejected, lengths, beta=self.beta, sft_weight=self.sft_weight)
