"""A binary selector: a language model that says which of two answers is better, by a letter.

Source: Wu et al. 2024, "Towards Federated RLHF with Aggregated Client Preference for LLMs" (FedBis,
FedBiscuit), https://arxiv.org/abs/2407.03038: cross-entropy over the two letters' logits alone. Ours:
each pair is asked in both orders, so that no position is right more often than the other.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from fedloom.data.batch import Batch, Sequences
from fedloom.objectives.base import PAIRWISE, Metrics, Model, Objective
from fedloom.objectives.logps import completion_logits
from fedloom.objectives.rewards import outcomes
from fedloom.settings.schema import NamedSettings
from fedloom.wire.schema import amount, fraction


class SelectorSettings(NamedSettings):
    """``[objective] name = "selector"``."""

    name: Literal["selector"] = "selector"


def selector_loss(margins: Tensor) -> tuple[Tensor, Metrics]:
    """Return the mean cross-entropy over two letters, and how often the right one has the larger logit.

    Args:
        margins: ``(questions,)`` logit of the right letter minus that of the other, float32.
    """
    right = outcomes(margins).mean().to(margins.dtype)
    return -F.logsigmoid(margins).mean(), {"selection_accuracy": right}


def letter_margins(model: Model, sequences: Sequences) -> Tensor:
    """Return ``(2, pairs)`` float32: the right letter's logit minus the other's, in both orders.

    Args:
        model: A causal LM.
        sequences: ``(2 pairs, length)``, of which one token counts each, the right letter: of the first
            half A, as the chosen answer comes first, of the second half B.
    """
    logits, letters, _ = completion_logits(model, sequences)
    others = letters.roll(len(letters) // 2)
    found = logits.gather(1, letters[:, None]) - logits.gather(1, others[:, None])
    return found[:, 0].view(2, -1)


class Selector(Objective):
    """Says which answer of a pair is better, asked in both orders."""

    kind = "preference"
    accepts = ("preference",)
    compares = True
    separable = PAIRWISE
    reported = (amount("loss"), fraction("selection_accuracy"))

    def __init__(self, settings: SelectorSettings | None = None) -> None:
        """Take no settings beyond the name."""

    def loss(self, model: Model, batch: Batch, statistics: Tensor | None) -> tuple[Tensor, Metrics]:
        """Return the mean loss over pairs, of the two orders of each."""
        return selector_loss(letter_margins(model, batch.sequences).view(-1))
