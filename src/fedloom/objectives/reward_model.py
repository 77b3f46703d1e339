"""Reward models: one number a text, by which chosen answers are told from rejected ones.

Source: Ouyang et al. 2022, "Training language models to follow instructions with human feedback",
https://arxiv.org/abs/2203.02155, equation 1 (Bradley and Terry's model); margins: Touvron et al. 2023,
"Llama 2", https://arxiv.org/abs/2307.09288, equation 2; rewards near zero: Eisenstein et al. 2023,
"Helping or Herding?", https://arxiv.org/abs/2312.09244, equation 2. The loss is that of TRL's
``RewardTrainer``.

The model is one for sequence classification with a single output, read at each text's last token. Its
output layer is new: it is trained and travels with the adapter (PEFT's ``modules_to_save``).
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fedloom.data.batch import Batch
from fedloom.objectives.base import PAIRWISE, Head, Metrics, Model, Objective
from fedloom.objectives.rewards import PAIRS, pair_metrics
from fedloom.settings.schema import NamedSettings
from fedloom.wire.schema import amount


class RewardModelSettings(NamedSettings):
    """``[objective] name = "reward_model"``."""

    name: Literal["reward_model"] = "reward_model"
    center_rewards_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the mean of (r(chosen) + r(rejected))^2, which keeps rewards near zero (paper: 0.01); 0
    is none. TRL's setting of this name."""
    margins: bool = True
    """Whether a row's column "margin", a number from -1e6 to 1e6, is what the chosen answer's reward has
    to lead by; rows without the column have 0."""


def reward_model_loss(
    chosen: Tensor, rejected: Tensor, margins: Tensor | None = None, *, center: float = 0.0
) -> tuple[Tensor, Metrics]:
    """Return the mean of -log sigmoid(r_w - r_l - m) + center (r_w + r_l)^2, and :func:`pair_metrics`.

    Args:
        chosen: ``(pairs,)`` rewards r_w of the chosen completions.
        rejected: ``(pairs,)`` r_l, those of the rejected ones.
        margins: ``(pairs,)`` m; ``None`` for 0.
        center: At least 0.
    """
    lead = chosen - rejected if margins is None else chosen - rejected - margins
    loss = -F.logsigmoid(lead).mean()
    if center:
        loss = loss + center * (chosen + rejected).square().mean()
    return loss, pair_metrics(chosen, rejected)


class RewardModel(Objective):
    """Bradley and Terry's model on preference pairs; needs no reference model."""

    kind = "preference"
    accepts = ("preference",)
    head: Head = "classification"
    outputs = ("reward",)
    separable = PAIRWISE
    reported = (amount("loss"), *PAIRS)

    def __init__(self, settings: RewardModelSettings | None = None) -> None:
        """Keep the settings."""
        self.settings = settings or RewardModelSettings()
        self.reads_margins = self.settings.margins

    def loss(self, model: Model, batch: Batch, statistics: Tensor | None) -> tuple[Tensor, Metrics]:
        """Return the mean loss over pairs; chosen and rejected go through the model together."""
        sequences = batch.sequences
        output = model(input_ids=sequences.input_ids, attention_mask=sequences.attention_mask)
        margins = batch.margins if self.reads_margins else None
        chosen, rejected = output.logits[:, 0].float().chunk(2)
        center = self.settings.center_rewards_coefficient
        return reward_model_loss(chosen, rejected, margins, center=center)
