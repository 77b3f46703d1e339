"""Supervised fine-tuning: cross-entropy on the completion's tokens.

The mean is over all completion tokens of the optimizer batch, so the loss does not depend on how
it is cut into micro-batches.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from fedloom.data.batch import Batch
from fedloom.objectives.base import Metrics, Model, Objective
from fedloom.objectives.logps import completion_token_logps
from fedloom.settings.schema import NamedSettings
from fedloom.wire.schema import amount, fraction


class SFTSettings(NamedSettings):
    """``[objective] name = "sft"``."""

    name: Literal["sft"] = "sft"


def sft_loss(token_logps: Tensor, mask: Tensor) -> Tensor:
    """Return the mean negative log-prob of the tokens under ``mask``, both ``(sequences, length)``."""
    return -(token_logps * mask).sum() / mask.sum()


class SFT(Objective):
    """Supervised fine-tuning on instruction examples."""

    kind = "instruction"
    accepts = ("instruction",)
    reported = (amount("loss"), fraction("token_accuracy"))

    def __init__(self, settings: SFTSettings | None = None) -> None:
        """Take no settings beyond the name."""

    def weight(self, batch: Batch) -> float:
        """Return the number of completion tokens."""
        return float(batch.completion_tokens)

    def loss(self, model: Model, batch: Batch, statistics: Tensor | None) -> tuple[Tensor, Metrics]:
        """Return the mean loss over completion tokens, and the share predicted exactly."""
        logps, mask, correct = completion_token_logps(model, batch.sequences)
        accuracy = correct.sum() / mask.sum()
        return sft_loss(logps, mask), {"token_accuracy": accuracy}
