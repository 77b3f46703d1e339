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
from fedloom.objectives.base import Metrics, Model
from fedloom.objectives.kto import KTO, KTOSettings, kto_loss
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

    def loss(self, model: Model, batch: Batch, statistics: Tensor | None) -> tuple[Tensor, Metrics]:
        """Return the mean loss over rows."""
        assert batch.labels is not None and batch.reference_logps is not None
        assert statistics is not None, "the loop passes the reference point"
        logps, explicit = completion_rewards(model, batch.sequences)
        # r2 on the scale of a log-ratio: beta times it is gamma r2.
        loss, metrics = kto_loss(
            logps + self.gamma / self.beta * explicit,
            batch.reference_logps,
            batch.labels,
            statistics,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )
        signs = torch.where(batch.labels, 1.0, -1.0)
        metrics["explicit_sided_accuracy"] = (explicit.detach() * signs > 0).float().mean()
        metrics["single_class"] = statistics.new_tensor(self.single_class)
        metrics["without_kl"] = statistics.new_tensor(batch.mismatched is None)
        return loss, metrics
