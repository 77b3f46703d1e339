"""RPO: DPO with the likelihood of the chosen answers beside it, over the tokens of a batch.

Source: Pang et al. 2024, "Iterative Reasoning Preference Optimization", https://arxiv.org/abs/2404.19733,
equation 1; Liu et al. 2024, "Provably Mitigating Overoptimization in RLHF", https://arxiv.org/abs/2405.16436.
As in TRL (``rpo_alpha``, and ``loss_type = ["sigmoid", "sft"]``) the likelihood is a mean over all chosen
tokens of the optimizer batch, so that a long answer counts by its length; in ``dpo`` the term of
``sft_weight`` is a mean over answers of means a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fedloom.data.batch import Batch, Sequences
from fedloom.objectives.base import Metrics, Model, Objective, ReferenceSettings, Separable
from fedloom.objectives.dpo import dpo_loss
from fedloom.objectives.logps import completion_logps
from fedloom.objectives.rewards import PAIRS
from fedloom.wire.schema import amount


class RPOSettings(ReferenceSettings):
    """``[objective] name = "rpo"``; TRL's ``rpo_alpha``."""

    name: Literal["rpo"] = "rpo"
    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull towards the reference model (paper: 0.1)."""
    sft_weight: float = Field(default=1.0, gt=0)
    """Weight of the chosen answers' cross-entropy, a mean over tokens (paper: 1)."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of pairs whose preference is flipped, as in dpo."""


def chosen_cross_entropy(chosen_logps: Tensor, tokens: Tensor) -> Tensor:
    """Return the mean of -log pi over all tokens of the chosen answers, in nats.

    Args:
        chosen_logps: ``(pairs,)`` summed log-probs of the chosen completions.
        tokens: Their tokens together, at least 1: ``()``.
    """
    return -chosen_logps.sum() / tokens


class RPO(Objective):
    """DPO on preference pairs plus the chosen answers' cross-entropy a token."""

    kind = "preference"
    accepts = ("preference",)
    needs_reference = True
    separable = Separable(
        True,
        "each pair has a loss of its own; its chosen answer counts then as a mean over its own tokens",
    )
    reported = (amount("loss"), *PAIRS, amount("chosen_cross_entropy"))

    def __init__(self, settings: RPOSettings | None = None, *, by_pair: bool = False) -> None:
        """Keep the settings; ``by_pair`` for means over each chosen answer's own tokens."""
        self.settings, self.by_pair = settings or RPOSettings(), by_pair
        self.beta = self.settings.beta

    def for_rows(self) -> RPO:
        """Return it with a mean over each answer's own tokens: a pair's loss follows from it alone."""
        return RPO(self.settings, by_pair=True)

    def statistics(self, model: Model, batches: Sequence[Batch]) -> Tensor | None:
        """Return tokens of a chosen answer, on average over the optimizer batch."""
        tokens = sum(float(_chosen_lengths(own.sequences).sum()) for own in batches)
        return torch.tensor(tokens / sum(map(len, batches)))

    def loss(self, model: Model, batch: Batch, statistics: Tensor | None) -> tuple[Tensor, Metrics]:
        """Return the mean loss over pairs; chosen and rejected go through the model together."""
        assert batch.reference_logps is not None, "the loop adds the reference log-probs"
        chosen, rejected = completion_logps(model, batch.sequences).chunk(2)
        loss, metrics = dpo_loss(
            chosen,
            rejected,
            *batch.reference_logps.chunk(2),
            beta=self.beta,
            label_smoothing=self.settings.label_smoothing,
        )
        if self.by_pair or statistics is None:
            own = -(chosen / _chosen_lengths(batch.sequences)).mean()
        else:
            own = chosen_cross_entropy(chosen, statistics.to(chosen.device) * len(chosen))
        return loss + self.settings.sft_weight * own, metrics | {
            "chosen_cross_entropy": own.detach()
        }


def _chosen_lengths(sequences: Sequences) -> Tensor:
    return sequences.completion_mask.chunk(2)[0].sum(1).clamp(min=1).float()
