"""Direct preference optimization, optionally with the chosen answers' cross-entropy beside it.

Source: Rafailov et al. 2023, "Direct Preference Optimization: Your Language Model is Secretly a
Reward Model", https://arxiv.org/abs/2305.18290, equation 7; label smoothing as in the authors'
code (conservative DPO). The cross-entropy term: Pang et al. 2024, "Iterative Reasoning Preference
Optimization", https://arxiv.org/abs/2404.19733, equation 1. Length normalisation: Lambert et al. 2024,
"Tulu 3", https://arxiv.org/abs/2411.15124, section 5.1.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fedloom.data.batch import Batch
from fedloom.objectives.base import PAIRWISE, Metrics, Model, Objective, ReferenceSettings
from fedloom.objectives.logps import completion_logps
from fedloom.objectives.rewards import (
    PAIRS,
    TOKEN,
    TOKEN_PAIRS,
    completion_lengths,
    pair_metrics,
)
from fedloom.wire.schema import NumberSpec, amount


class DPOSettings(ReferenceSettings):
    """``[objective] name = "dpo"``."""

    name: Literal["dpo"] = "dpo"
    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull towards the reference model (paper: 0.1)."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of pairs whose preference is flipped; 0 is plain DPO."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Weight of the chosen answers' own cross-entropy (mean a token), which keeps DPO from lowering
    the likelihood of both answers (RPO, 2404.19733); 0 is plain DPO."""
    length_normalised: bool = False
    """Whether log-ratios are means a token, so that long answers have no larger rewards; beta is larger
    then (Tulu 3: 5). TRL's ``loss_type = "sigmoid_norm"``."""


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Metrics]:
    """Return the mean DPO loss and its rewards.

    Args:
        policy_chosen_logps: ``(pairs,)`` summed log-probs of the chosen completions.
        policy_rejected_logps: ``(pairs,)`` the same of the rejected ones.
        reference_chosen_logps: ``(pairs,)`` under the reference model.
        reference_rejected_logps: ``(pairs,)`` under the reference model.
        beta: Reward scale, above 0.
        label_smoothing: In [0, 0.5).

    Returns:
        The scalar loss, and :func:`pair_metrics` of beta times the log-ratios.
    """
    chosen = policy_chosen_logps - reference_chosen_logps  # rho(x, y_w)
    rejected = policy_rejected_logps - reference_rejected_logps  # rho(x, y_l)
    margin = beta * (chosen - rejected)
    losses = -F.logsigmoid(margin) * (1 - label_smoothing)  # equation 7
    if label_smoothing:
        losses = losses - F.logsigmoid(-margin) * label_smoothing
    return losses.mean(), pair_metrics(beta * chosen, beta * rejected)


class DPO(Objective):
    """DPO on preference pairs, against the frozen base model."""

    kind = "preference"
    accepts = ("preference",)
    separable = PAIRWISE
    needs_reference = True
    reported: tuple[NumberSpec, ...] = (
        amount("loss"),
        *PAIRS,
        amount("chosen_cross_entropy"),
    )

    def __init__(self, settings: DPOSettings | None = None) -> None:
        """Keep beta, label smoothing and what else the settings say."""
        settings = settings or DPOSettings()
        self.length_normalised = settings.length_normalised
        if self.length_normalised:
            self.reported = (amount("loss"), *TOKEN_PAIRS, amount("chosen_cross_entropy"))
        self.beta, self.label_smoothing = settings.beta, settings.label_smoothing
        self.sft_weight = settings.sft_weight

    def loss(self, model: Model, batch: Batch, statistics: Tensor | None) -> tuple[Tensor, Metrics]:
        """Return the mean loss over pairs; chosen and rejected go through the model together."""
        assert batch.reference_logps is not None, "the loop adds the reference log-probs"
        logps, reference_logps = completion_logps(model, batch.sequences), batch.reference_logps
        lengths = completion_lengths(batch.sequences)
        if self.length_normalised:
            logps, reference_logps = logps / lengths, reference_logps / lengths
        chosen, rejected = logps.chunk(2)
        reference_chosen, reference_rejected = reference_logps.chunk(2)
        loss, metrics = dpo_loss(
            chosen,
            rejected,
            reference_chosen,
            reference_rejected,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
        )
        if self.length_normalised:
            metrics = {TOKEN + name: value for name, value in metrics.items()}
        if self.sft_weight:
            means = chosen if self.length_normalised else chosen / lengths.chunk(2)[0]
            cross_entropy = -means.mean()
            loss = loss + self.sft_weight * cross_entropy
            metrics["chosen_cross_entropy"] = cross_entropy.detach()
        return loss, metrics
