"""Identity preference optimization: a squared loss that stops pulling at a fixed margin.

Source: Azar et al. 2023, "A General Theoretical Paradigm to Understand Learning from Human
Preferences", https://arxiv.org/abs/2310.12036, equation 17. The log-ratios are means a token, not sums:
the paper does not say so, its authors told TRL's that its results were obtained this way.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from fedloom.data.batch import Batch
from fedloom.objectives.base import PAIRWISE, Metrics, Model, Objective, ReferenceSettings
from fedloom.objectives.logps import completion_logps
from fedloom.objectives.rewards import TOKEN_PAIRS, completion_lengths, token_pair_metrics
from fedloom.wire.schema import amount


class IPOSettings(ReferenceSettings):
    """``[objective] name = "ipo"``."""

    name: Literal["ipo"] = "ipo"
    beta: float = Field(default=0.1, gt=0)
    """The paper's tau: the margin aimed at is 1 / (2 beta)."""


def ipo_loss(
    chosen_ratios: Tensor, rejected_ratios: Tensor, *, beta: float
) -> tuple[Tensor, Metrics]:
    """Return the mean of (h - 1 / (2 beta))^2 with h the difference of the log-ratios.

    Args:
        chosen_ratios: ``(pairs,)`` log-ratios to the reference, means a token.
        rejected_ratios: ``(pairs,)`` the same of the rejected completions.
        beta: Above 0.
    """
    losses = (chosen_ratios - rejected_ratios - 1 / (2 * beta)).square()  # equation 17
    return losses.mean(), token_pair_metrics(beta * chosen_ratios, beta * rejected_ratios)


class IPO(Objective):
    """IPO on preference pairs, against the frozen base model."""

    kind = "preference"
    accepts = ("preference",)
    separable = PAIRWISE
    needs_reference = True
    reported = (amount("loss", 1e18), *TOKEN_PAIRS)  # a square

    def __init__(self, settings: IPOSettings | None = None) -> None:
        """Keep beta."""
        self.beta = (settings or IPOSettings()).beta

    def loss(self, model: Model, batch: Batch, statistics: Tensor | None) -> tuple[Tensor, Metrics]:
        """Return the mean loss over pairs."""
        assert batch.reference_logps is not None, "the loop adds the reference log-probs"
        ratios = completion_logps(model, batch.sequences) - batch.reference_logps
        chosen, rejected = (ratios / completion_lengths(batch.sequences)).chunk(2)
        return ipo_loss(chosen, rejected, beta=self.beta)
