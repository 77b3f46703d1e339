"""Supervised fine-tuning: cross-entropy on the completion's tokens.

The mean is over all completion tokens of the optimizer batch, so the loss does not depend on how
it is cut into micro-batches. Under row-level privacy it is the mean over rows of the mean within each: a
mean over the batch's tokens would have every row's share depend on the others' lengths.
"""

from __future__ import annotations

import copy
from typing import Literal

from torch import Tensor

from fedloom.data.batch import Batch
from fedloom.objectives.base import Metrics, Model, Objective, Separable
from fedloom.objectives.logps import completion_token_logps
from fedloom.settings.schema import NamedSettings
from fedloom.wire.schema import amount, fraction


class SFTSettings(NamedSettings):
    """``[objective] name = "sft"``."""

    name: Literal["sft"] = "sft"


def sft_loss(token_logps: Tensor, mask: Tensor) -> Tensor:
    """Return the mean negative log-prob of the tokens under ``mask``, both ``(sequences, length)``."""
    return -(token_logps * mask).sum() / mask.sum()


def row_sft_loss(token_logps: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over sequences of each one's mean negative log-prob of the tokens under ``mask``.

    Both ``(sequences, length)``.
    """
    return -((token_logps * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


class SFT(Objective):
    """Supervised fine-tuning on instruction examples."""

    kind = "instruction"
    accepts = ("instruction",)
    reported = (amount("loss"), fraction("token_accuracy"))
    separable = Separable(
        True, "the mean over the batch's tokens becomes one over rows of the mean within each row"
    )
    by_row = False

    def __init__(self, settings: SFTSettings | None = None) -> None:
        """Take no settings beyond the name."""

    def for_rows(self) -> SFT:
        """Return the objective with every row counted alike, however long it is."""
        own = copy.copy(self)
        own.by_row = True
        return own

    def weight(self, batch: Batch) -> float:
        """Return the number of completion tokens, or of rows."""
        return float(len(batch) if self.by_row else batch.completion_tokens)

    def loss(self, model: Model, batch: Batch, statistics: Tensor | None) -> tuple[Tensor, Metrics]:
        """Return the mean loss over completion tokens (or rows), and the share predicted exactly."""
        logps, mask, correct = completion_token_logps(model, batch.sequences)
        accuracy = correct.sum() / mask.sum()
        loss = row_sft_loss if self.by_row else sft_loss
        return loss(logps, mask), {"token_accuracy": accuracy}
