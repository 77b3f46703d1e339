"""Personalised DPO: the implicit reward of DPO and an explicit reward head in one preference model.

Source: FedPDPO, https://arxiv.org/abs/2603.19741: a personal "explicit reward head" is to "complement
implicit rewards". **A reconstruction**: the paper's formula was not to be had. This is the reading with
a probabilistic derivation: a client's reward is

    r(x, y) = beta log(pi(y|x) / pi_ref(y|x)) + gamma r2(x, y),

and Bradley and Terry's model of a preference under it gives

    L = -E log sigma(beta (rho(x, y_w) - rho(x, y_l)) + gamma (r2(x, y_w) - r2(x, y_l)))

with rho the log-ratio: the partition term cancels as in DPO. Pairs that the personal head explains send a
smaller gradient, sigma(-margin), into what is shared. r2 is read at the completion's last token and is
zero at first, so the loss starts at ln 2.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fedloom.data.batch import Batch
from fedloom.objectives.base import PAIRWISE, Metrics, Model, Objective, ReferenceSettings
from fedloom.objectives.logps import completion_logps, completion_rewards
from fedloom.objectives.rewards import PAIRS, completion_lengths, outcomes, pair_metrics
from fedloom.settings.schema import Of
from fedloom.wire.schema import amount, fraction

RewardMode = Literal["combined", "separate", "implicit"]


class PDPOSettings(ReferenceSettings):
    """``[objective] name = "pdpo"``."""

    name: Literal["pdpo"] = "pdpo"
    beta: float = Field(default=0.1, gt=0)
    """Scale of the implicit reward, and strength of the pull towards the reference model."""
    gamma: Annotated[float, Of("objective.reward_mode", ("combined", "separate"))] = Field(
        default=1.0, ge=0
    )
    """Scale of the explicit reward; 0 is DPO."""
    reward_mode: RewardMode = "combined"
    """combined: the sum of both rewards in one sigmoid. separate: DPO's loss and, gamma times, the
    reward head's own. implicit: no reward head (ablation)."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of pairs whose preference is flipped."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Weight of the chosen answers' own cross-entropy (mean a token), as in dpo."""


def pdpo_loss(
    log_ratios: tuple[Tensor, Tensor],
    rewards: tuple[Tensor, Tensor] | None,
    *,
    beta: float,
    gamma: float,
    separate: bool = False,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Metrics]:
    """Return the mean loss, and how each reward does by itself.

    Args:
        log_ratios: rho of the chosen and of the rejected completions, each ``(pairs,)``.
        rewards: r2 of both, each ``(pairs,)``; ``None`` without a reward head.
        beta: Scale of the implicit reward, above 0.
        gamma: Scale of the explicit one, at least 0.
        separate: Two losses instead of two rewards in one.
        label_smoothing: In [0, 0.5).

    Returns:
        The scalar loss; :func:`pair_metrics` of the sum of both rewards; ``implicit_accuracy`` and
        ``explicit_accuracy``: shares of pairs that either reward wins, ties half as on held-out pairs.
    """
    implicit = [beta * ratio for ratio in log_ratios]
    margin = beta * (log_ratios[0] - log_ratios[1])
    metrics = {"implicit_accuracy": outcomes(margin).mean()}
    if rewards is None:
        return _surprise(margin, label_smoothing), pair_metrics(*implicit) | metrics
    explicit = [gamma * reward for reward in rewards]
    margins = [margin, gamma * (rewards[0] - rewards[1])]
    if separate:
        own = _surprise(rewards[0] - rewards[1], label_smoothing)
        loss = _surprise(margin, label_smoothing) + gamma * own
    else:
        loss = _surprise(margins[0] + margins[1], label_smoothing)
    won = outcomes(rewards[0] - rewards[1]).mean()
    both = [a + b for a, b in zip(implicit, explicit, strict=True)]
    return loss, pair_metrics(*both) | metrics | {"explicit_accuracy": won}


def _surprise(margin: Tensor, label_smoothing: float) -> Tensor:
    losses = -F.logsigmoid(margin) * (1 - label_smoothing)
    if label_smoothing:
        losses = losses - F.logsigmoid(-margin) * label_smoothing
    return losses.mean()


class PDPO(Objective):
    """PDPO on preference pairs, against the frozen base model with its own output layer."""

    kind = "preference"
    accepts = ("preference",)
    separable = PAIRWISE
    needs_reference = True
    reported = (
        amount("loss"),
        *PAIRS,
        fraction("implicit_accuracy"),
        fraction("explicit_accuracy"),
        amount("chosen_cross_entropy"),
    )

    def __init__(self, settings: PDPOSettings | None = None) -> None:
        """Keep the settings."""
        self.settings = settings or PDPOSettings()
        self.beta = self.settings.beta
        self.needs_reward = self.settings.reward_mode != "implicit"
        self.gamma = self.settings.gamma if self.needs_reward else 0.0

    def loss(self, model: Model, batch: Batch, statistics: Tensor | None) -> tuple[Tensor, Metrics]:
        """Return the mean loss over pairs; chosen and rejected go through the model together."""
        assert batch.reference_logps is not None, "the loop adds the reference log-probs"
        rewards = None
        if self.needs_reward:
            logps, explicit = completion_rewards(model, batch.sequences)
            rewards = (explicit.chunk(2)[0], explicit.chunk(2)[1])
        else:
            logps = completion_logps(model, batch.sequences)
        chosen, rejected = logps.chunk(2)
        reference_chosen, reference_rejected = batch.reference_logps.chunk(2)
        loss, metrics = pdpo_loss(
            (chosen - reference_chosen, rejected - reference_rejected),
            rewards,
            beta=self.beta,
            gamma=self.gamma,
            separate=self.settings.reward_mode == "separate",
            label_smoothing=self.settings.label_smoothing,
        )
        if self.settings.sft_weight:
            lengths = completion_lengths(batch.sequences).chunk(2)[0]
            cross_entropy = -(chosen / lengths).mean()
            loss = loss + self.settings.sft_weight * cross_entropy
            metrics["chosen_cross_entropy"] = cross_entropy.detach()
        return loss, metrics
