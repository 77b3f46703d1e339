"""Kahneman-Tversky optimization: alignment from single answers found desirable or not.

Source: Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization",
https://arxiv.org/abs/2402.01306, equations 7 and 8.

The reference point z0 is estimated over the whole optimizer batch, not over a micro-batch, so the
result does not depend on how the batch is cut. The mismatched completion of a row is that of
another row of the same client, drawn once, so its reference log-prob is computed once too, and a
batch of one row still has an estimate. A client with a single row trains with z0 = 0, and the metric
``without_kl`` says so; ``single_class`` is 1 for a client whose rows are all desirable or all not.
Nothing about z0 leaves the client.

With ``z0`` set it is that constant and nothing is estimated. Row-level privacy needs this, since one row
moves the estimate, and with it every other row's gradient, without bound; z0 is 0 there where it is not
set. (The loss is then ``apo_zero_unpaired`` of TRL.) What is lost is the reference point's rise with the
policy's divergence: desirable rows saturate earlier, undesirable ones later.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
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
from fedloom.wire.schema import NumberSpec, amount, fraction, score


class KTOSettings(ReferenceSettings):
    """``[objective] name = "kto"``."""

    name: Literal["kto"] = "kto"
    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull towards the reference model (paper: 0.1)."""
    weights: Literal["fixed", "balanced"] = "fixed"
    """fixed: the two weights below. balanced: each client weighs its desirable rows by n_U / n_D, so
    that both classes count alike (2502.14187); 1 and 1 where it has rows of one class only."""
    desirable_weight: float = Field(default=1.0, ge=0)
    """Weight of desirable rows, lambda_D (paper: 1)."""
    undesirable_weight: float = Field(default=1.0, ge=0)
    """Weight of undesirable rows, lambda_U (paper: 1)."""
    z0: float | None = Field(default=None, ge=0)
    """Fixed reference point in place of the estimate over the batch (default: the estimate; 0 with
    privacy.unit = "row", where it must depend on no row)."""

    @model_validator(mode="after")
    def _one_way_to_weigh(self) -> KTOSettings:
        given = self.model_fields_set & {"desirable_weight", "undesirable_weight"}
        if self.weights == "balanced" and (self.desirable_weight, self.undesirable_weight) != (
            1,
            1,
        ):
            raise ValueError(
                f'weights = "balanced" sets both weights by itself; leave out {", ".join(sorted(given))}'
            )
        return self


def balanced_weights(desirable: int, undesirable: int) -> tuple[float, float]:
    """Return lambda_D and lambda_U such that lambda_D n_D = lambda_U n_U, with lambda_U = 1.

    The published code divides by zero for a client without desirable rows and drops the desirable
    ones of a client without undesirable rows; both get weights of 1 here.

    Args:
        desirable: n_D, rows of the client that are desirable.
        undesirable: n_U, the others.
    """
    if desirable and undesirable:
        return undesirable / desirable, 1.0
    return 1.0, 1.0


def kl_estimate(policy_logps: Tensor, reference_logps: Tensor) -> Tensor:
    """Return z0, the estimate of KL(policy || reference) on mismatched completions.

    Args:
        policy_logps: ``(rows,)`` summed log-probs of mismatched completions.
        reference_logps: ``(rows,)`` the same under the reference model.

    Returns:
        Scalar, the mean difference clamped at zero and detached; zero when there are no rows.
    """
    if policy_logps.numel() == 0:
        return torch.zeros((), dtype=policy_logps.dtype, device=policy_logps.device)
    return (policy_logps - reference_logps).mean().clamp(min=0).detach()


def kto_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    desirable: Tensor,
    kl: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Tensor, Metrics]:
    """Return the mean KTO loss and its rewards.

    Args:
        policy_logps: ``(rows,)`` summed log-probs of the completions.
        reference_logps: ``(rows,)`` under the reference model.
        desirable: ``(rows,)`` bool.
        kl: Scalar reference point z0 from :func:`kl_estimate`.
        beta: Reward scale, above 0.
        desirable_weight: lambda_D.
        undesirable_weight: lambda_U.

    Returns:
        The scalar loss; ``reward_desirable`` and ``reward_undesirable`` (means of beta times the
        log-ratio over the rows of each class, zero for a class that is not there),
        ``desirable_share`` and ``kl``.
    """
    log_ratios = policy_logps - reference_logps  # r_theta(x, y), equation 7
    gain = 1 - torch.sigmoid(beta * (log_ratios - kl))
    loss = 1 - torch.sigmoid(beta * (kl - log_ratios))
    losses = torch.where(desirable, desirable_weight * gain, undesirable_weight * loss)  # eq. 8
    rewards = beta * log_ratios.detach()
    metrics = {
        "reward_desirable": _mean_where(rewards, desirable),
        "reward_undesirable": _mean_where(rewards, ~desirable),
        "desirable_share": desirable.float().mean(),
        "kl": kl.detach(),
    }
    return losses.mean(), metrics


FIXED = Separable(
    True, "the reference point z0 is objective.z0, or 0, in place of the estimate over the batch"
)
BALANCED = Separable(
    False,
    'objective.weights = "balanced" weighs each row by the client\'s counts of both classes: give '
    "objective.desirable_weight and objective.undesirable_weight",
)


class KTO(StatisticObjective):
    """KTO on single answers, against the frozen base model."""

    kind = "feedback"
    accepts = ("feedback", "preference")
    needs_reference = True
    needs_mismatched = True
    reported: tuple[NumberSpec, ...] = (
        amount("loss"),
        score("reward_desirable"),
        score("reward_undesirable"),
        fraction("desirable_share"),
        amount("kl"),
        fraction("single_class"),
        fraction("without_kl"),
    )

    def __init__(self, settings: KTOSettings | None = None) -> None:
        """Keep beta, how rows are weighed and a fixed reference point."""
        settings = settings or KTOSettings()
        self.beta = settings.beta
        self.desirable_weight = settings.desirable_weight
        self.undesirable_weight = settings.undesirable_weight
        self.balanced = settings.weights == "balanced"
        self.separable = BALANCED if self.balanced else FIXED
        self.z0, self.needs_mismatched = settings.z0, settings.z0 is None
        self.single_class = False

    def for_rows(self) -> KTO:
        """Return the objective with a reference point that depends on no row."""
        own = copy.copy(self)
        own.z0, own.needs_mismatched = self.z0 or 0.0, False
        return own

    def for_client(self, labels: NDArray[np.int64]) -> KTO:
        """Return the objective with a client's own weights; a client of one class is flagged."""
        desirable, own = int((labels == 1).sum()), copy.copy(self)
        own.single_class = desirable in (0, len(labels))
        if self.balanced:
            own.desirable_weight, own.undesirable_weight = balanced_weights(
                desirable, len(labels) - desirable
            )
        return own

    def metric_weights(self, batch: Batch) -> dict[str, float]:
        """Return the rows of each class, which the rewards are means over."""
        assert batch.labels is not None
        desirable = float(batch.labels.sum())
        return {"reward_desirable": desirable, "reward_undesirable": len(batch) - desirable}

    def scores(self, model: Model, batch: Batch) -> Scores:
        """Return the log-probs of completions, and without a gradient those of mismatched ones."""
        if batch.joint is not None:
            own, mismatched = completion_logps(model, batch.joint).chunk(2)
            return Scores(own, mismatched=mismatched.detach())
        return replace(self._own(model, batch), mismatched=self._mismatched(model, batch))

    @torch.no_grad()
    def statistic(self, scores: Sequence[Scores], batches: Sequence[Batch]) -> Tensor:
        """Return z0 over the mismatched completions of the whole optimizer batch, or as it is fixed."""
        if self.z0 is not None:
            return torch.tensor(self.z0, device=batches[0].sequences.input_ids.device)
        policy = [own.mismatched for own in scores if own.mismatched is not None]
        reference = [
            batch.mismatched_reference_logps
            for batch in batches
            if batch.mismatched_reference_logps is not None
        ]
        if not policy:  # a client with one row: KTO with z0 = 0
            return torch.zeros((), device=batches[0].sequences.input_ids.device)
        return kl_estimate(torch.cat(policy), torch.cat(reference))

    @torch.no_grad()
    def statistics(self, model: Model, batches: Sequence[Batch]) -> Tensor | None:
        """Return z0, by passes of its own."""
        nothing = torch.zeros(0)
        scores = [Scores(nothing, mismatched=self._mismatched(model, batch)) for batch in batches]
        return self.statistic(scores, batches)

    def loss(self, model: Model, batch: Batch, statistics: Tensor | None) -> tuple[Tensor, Metrics]:
        """Return the mean loss over rows."""
        assert statistics is not None, "the loop passes the reference point"
        return self.loss_of(self._own(model, batch), batch, statistics)

    def loss_of(self, scores: Scores, batch: Batch, statistic: Tensor) -> tuple[Tensor, Metrics]:
        """Return the mean loss over rows."""
        assert batch.labels is not None and batch.reference_logps is not None
        loss, metrics = kto_loss(
            self._rewarded(scores),
            batch.reference_logps,
            batch.labels,
            statistic,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )
        metrics["single_class"] = statistic.new_tensor(self.single_class)
        metrics["without_kl"] = statistic.new_tensor(batch.mismatched is None)
        return loss, metrics

    def _rewarded(self, scores: Scores) -> Tensor:
        """Return what stands for the policy's log-probs in the loss: these themselves."""
        return scores.logps

    def _own(self, model: Model, batch: Batch) -> Scores:
        return Scores(completion_logps(model, batch.sequences))

    @torch.no_grad()
    def _mismatched(self, model: Model, batch: Batch) -> Tensor | None:
        if not batch.mismatched:
            return None
        return torch.cat([completion_logps(model, own) for own in batch.mismatched])


def _mean_where(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum().clamp(min=1)
