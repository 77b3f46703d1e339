"""GRPO: policy gradients from rewards of answers that the policy itself generates.

Shao et al. 2024, "DeepSeekMath" (https://arxiv.org/abs/2402.03300), equation 3. Of each prompt a group of
G answers is drawn; an answer's advantage is its reward against those of its group (equation 4's outcome
supervision), and every token of it is made more or less likely by the clipped ratio of PPO. There is no
value model. The divergence from a reference model is estimated at each token by
exp(d) - d - 1, d = log pi_ref - log pi (Schulman 2020, "k3"; their equation 4).

How tokens are averaged, by ``averaging``, N answers of L_i tokens with losses l_it:

===========  ===========================================================================================
``grpo``     mean over answers of the mean within each: 1/N sum_i 1/L_i sum_t l_it
``dapo``     mean over all tokens of the optimizer batch: sum l_it / sum L_i (Yu et al. 2025,
             https://arxiv.org/abs/2503.14476); TRL's ``bnpo`` is the same where a batch is one pass
``dr_grpo``  sum l_it / (N max_new_tokens) (Liu et al. 2025, https://arxiv.org/abs/2503.20783)
===========  ===========================================================================================

The defaults are TRL's, but for ``averaging`` (the paper's) and ``max_new_tokens``.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedloom.data.batch import Batch
from fedloom.objectives.base import (
    Generation,
    Metrics,
    Model,
    Objective,
    ReferenceSettings,
    Separable,
)
from fedloom.objectives.logps import completion_token_logps
from fedloom.objectives.rewarded import RewardedSettings
from fedloom.objectives.sft import sft_loss
from fedloom.settings.schema import Of
from fedloom.wire.schema import amount, fraction, score

EPSILON = 1e-4
"""Added to a standard deviation that advantages are divided by, as TRL does."""

Averaging = Literal["grpo", "dapo", "dr_grpo"]


class GRPOSettings(RewardedSettings, ReferenceSettings):
    """``[objective] name = "grpo"``."""

    name: Literal["grpo"] = "grpo"
    scale: Literal["group", "batch", "none"] = "group"
    """Standard deviation that advantages are divided by: the group's, the optimizer batch's, or none."""
    averaging: Averaging = "grpo"
    """How tokens are averaged: grpo, dapo or dr_grpo."""
    clip: float = Field(default=0.2, gt=0)
    """epsilon: the ratio to the policy that generated is clipped below 1 - epsilon."""
    clip_high: float | None = Field(default=None, gt=0)
    """It is clipped above 1 + this (default: clip)."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """token: each token has its own ratio. sequence: all tokens of an answer have the geometric mean of
    theirs (GSPO, 2507.18071), which moves less, so clip is smaller (its paper: 3e-4, above 4e-4); the
    loss is the mean over answers, averaging = "grpo"."""
    beta: float = Field(default=0.0, ge=0)
    """Weight of the divergence from the reference model, per token; 0 leaves that model out."""
    iterations: int = Field(default=1, ge=1)
    """Optimizer steps on each batch of answers."""
    reference: Annotated[
        Literal["start", "base"] | None, Of("diverges", (True,), "objective.beta is 0")
    ] = None
    """The reference model: "start", the base model with the adapter that the run starts from, or "base",
    the base model alone (default: "start" where there is an adapter.start)."""

    def faults(self) -> list[str]:
        """Return what cannot be, one line each."""
        found = super().faults()
        if self.importance_sampling_level == "sequence" and self.averaging != "grpo":
            found.append(
                f'objective.averaging = "{self.averaging}" counts an answer by its tokens, each with the '
                'same ratio by objective.importance_sampling_level = "sequence": use averaging = "grpo"'
            )
        return found


def group_advantages(
    rewards: Tensor, scale: Literal["group", "batch", "none"] = "group"
) -> tuple[Tensor, Tensor]:
    """Return ``(prompts, G)`` advantages, and ``(prompts,)`` standard deviations of the groups.

    A = (r - mean) / (std + 1e-4); the standard deviation is the sample's, over G - 1.

    Args:
        rewards: ``(prompts, G)``, G at least 2.
        scale: What it is divided by: its group's, that of all rewards, or nothing.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    spread = rewards.std(1)
    if scale == "none":
        return centred, spread
    divisor = spread[:, None] if scale == "group" else rewards.std()
    return centred / (divisor + EPSILON), spread


def divergence(logps: Tensor, reference: Tensor) -> Tensor:
    """Return exp(d) - d - 1 with d = log pi_ref - log pi, of tensors of one shape.

    At least 0 but for rounding, which near d = 0 is of the order of d times the precision.
    """
    difference = reference - logps
    return difference.expm1() - difference


def token_losses(
    logps: Tensor,
    old: Tensor,
    advantages: Tensor,
    low: float,
    high: float,
    answers: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return -min(r A, clip(r, 1 - low, 1 + high) A) of each token, and whether it was clipped.

    The ratio r is that of a token, or of its answer: the exponential of the mean log-ratio of the
    answer's tokens (Zheng et al. 2025, GSPO, https://arxiv.org/abs/2507.18071, equation 7).

    Args:
        logps: ``(answers, length)`` log-probs under the policy.
        old: Of the same shape, under the policy that generated; without a gradient.
        advantages: ``(answers,)``.
        low: epsilon, above 0.
        high: Likewise.
        answers: ``(answers, length)``, true on an answer's tokens, for ratios of whole answers.
    """
    log_ratio, own = logps - old, advantages[:, None]
    if answers is not None:
        means = (log_ratio * answers).sum(1) / answers.sum(1).clamp(min=1)
        log_ratio = means[:, None].expand_as(logps)
    ratio = log_ratio.exp()
    clipped = ((ratio < 1 - low) & (own < 0)) | ((ratio > 1 + high) & (own > 0))
    return -torch.minimum(ratio * own, ratio.clamp(1 - low, 1 + high) * own), clipped


def averaged(losses: Tensor, mask: Tensor, loss_type: Averaging, longest: int) -> Tensor:
    """Return the mean of ``(answers, length)`` losses under a mask; see the module.

    Args:
        losses: Of each token.
        mask: Which of them count; each answer has one at least.
        loss_type: How.
        longest: Tokens that an answer may have, of dr_grpo.
    """
    kept = losses * mask
    if loss_type == "dapo":
        return kept.sum() / mask.sum()
    if loss_type == "dr_grpo":
        return kept.sum() / (len(kept) * longest)
    return (kept.sum(1) / mask.sum(1).clamp(min=1)).mean()


class GRPO(Objective):
    """GRPO on prompts, whose answers are generated and rewarded (``evaluation/rollouts.py``).

    The loss of rows with their own answers, which some methods ask for beside training, is the mean
    negative log-prob of a completion token.
    """

    kind = "instruction"
    accepts = ("instruction",)
    reported = (
        score("loss"),
        score("reward"),
        amount("reward_spread"),
        fraction("clipped"),
        amount("kl"),
        amount("answer_tokens"),
    )
    separable = Separable(
        False,
        "an answer's advantage follows from the other answers, and what is generated from all rows",
    )

    def __init__(self, settings: GRPOSettings | None = None) -> None:
        """Take settings; the defaults are those of :class:`GRPOSettings`."""
        self.settings = own = settings or GRPOSettings()
        self.generation = Generation(
            own.group,
            own.max_new_tokens,
            own.temperature,
            own.iterations,
            own.beta > 0,
            tuple(own.rewards),
            own.weights,
            lambda rewards: group_advantages(rewards, own.scale),
        )

    def weight(self, batch: Batch) -> float:
        """Return the number of answers, or of their tokens."""
        by_token = batch.rollouts is None or self.settings.averaging == "dapo"
        return float(batch.completion_tokens if by_token else len(batch))

    def metric_weights(self, batch: Batch) -> dict[str, float]:
        """Return what the metrics are means over: answers, or their tokens."""
        tokens, answers = float(batch.completion_tokens), float(len(batch))
        by_answer = dict.fromkeys(("reward", "reward_spread", "answer_tokens"), answers)
        return {**by_answer, "clipped": tokens, "kl": tokens}

    def loss(self, model: Model, batch: Batch, statistics: Tensor | None) -> tuple[Tensor, Metrics]:
        """Return the mean loss of a micro-batch, and means over answers and tokens."""
        drawn, own = batch.rollouts, self.settings
        temperature = 1.0 if drawn is None else own.temperature
        logps, mask, _ = completion_token_logps(model, batch.sequences, temperature)
        if drawn is None:
            return sft_loss(logps, mask), {}
        old = logps.detach() if drawn.old_logps is None else drawn.old_logps
        high = own.clip if own.clip_high is None else own.clip_high
        whole = mask if own.importance_sampling_level == "sequence" else None
        losses, clipped = token_losses(logps, old, drawn.advantages, own.clip, high, whole)
        tokens = mask.sum()
        metrics = {
            "reward": drawn.rewards.mean(),
            "reward_spread": drawn.spreads.mean(),
            "clipped": (clipped & mask).sum() / tokens,
            "answer_tokens": tokens / len(mask),
        }
        if own.beta > 0 and drawn.reference_logps is not None:
            divergences = divergence(logps, drawn.reference_logps)
            losses = losses + own.beta * divergences
            metrics["kl"] = (divergences.detach().clamp(min=0) * mask).sum() / tokens
        return averaged(losses, mask, own.averaging, own.max_new_tokens), metrics
