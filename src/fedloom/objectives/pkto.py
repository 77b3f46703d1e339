"""Personalised KTO: KTO's value function of an implicit and an explicit reward together.

**Our own step beyond the paper**: FedPDPO (https://arxiv.org/abs/2603.19741) is about pairs. Where a
client has single answers only, the reward of ``pdpo.py``, r = beta rho + gamma r2, takes the place of
beta rho in KTO (Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306, equation 8):

    desirable:    lambda_D (1 - sigma(beta (rho - z0) + gamma r2))
    undesirable:  lambda_U (1 - sigma(beta (z0 - rho) - gamma r2))

The reference point z0 stays KTO's: it estimates a divergence between two policies, and r2 is part of
neither. With gamma = 0, or r2 = 0 as at first, this is KTO.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fedloom.data.batch import Batch
from fedloom.objectives.base import Metrics, Model, Scores
from fedloom.objectives.kto import KTO, KTOSettings
from fedloom.objectives.logps import completion_rewards
from fedloom.wire.schema import fraction


class PKTOSettings(KTOSettings):
    """``[objective] name = "pkto"``."""

    name: Literal["pkto"] = "pkto"  # type: ignore[assignment]
    gamma: float = Field(default=1.0, ge=0)
    """Scale of the explicit reward; 0 is KTO."""


class PKTO(KTO):
    """PKTO on single answers, against the frozen base model with its own output layer."""

    needs_reward = True
    reported = (*KTO.reported, fraction("explicit_sided_accuracy"))

    def __init__(self, settings: PKTOSettings | None = None) -> None:
        """Keep the settings."""
        settings = settings or PKTOSettings()
        super().__init__(settings)
        self.gamma = settings.gamma

    def scores(self, model: Model, batch: Batch) -> Scores:
        """Return log-probs and explicit rewards, and the log-probs of mismatched completions."""
        if batch.joint is not None:
            logps, rewards = completion_rewards(model, batch.joint)
            (own, mismatched), explicit = logps.chunk(2), rewards.chunk(2)[0]
            return Scores(own, explicit, mismatched.detach())
        return super().scores(model, batch)

    def loss_of(self, scores: Scores, batch: Batch, statistic: Tensor) -> tuple[Tensor, Metrics]:
        """Return the mean loss over rows."""
        assert batch.labels is not None and scores.rewards is not None
        loss, metrics = super().loss_of(scores, batch, statistic)
        signs = torch.where(batch.labels, 1.0, -1.0)
        metrics["explicit_sided_accuracy"] = (scores.rewards.detach() * signs > 0).float().mean()
        return loss, metrics

    def _rewarded(self, scores: Scores) -> Tensor:
        """Return log-probs with r2 on the scale of a log-ratio: beta times it is gamma r2."""
        assert scores.rewards is not None, "the model has a reward head"
        return scores.logps + self.gamma / self.beta * scores.rewards

    def _own(self, model: Model, batch: Batch) -> Scores:
        return Scores(*completion_rewards(model, batch.sequences))
