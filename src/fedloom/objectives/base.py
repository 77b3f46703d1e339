"""What an objective is: which examples it needs, and its loss on a batch. No federation here.

The local loop (``training/steps.py``) cuts an optimizer batch into micro-batches. For the result
not to depend on the cut, an objective says how much each micro-batch weighs (:meth:`Objective.weight`),
and computes what concerns the whole optimizer batch once beforehand (:meth:`Objective.statistics`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedloom.data.batch import Batch
from fedloom.settings.schema import NamedSettings
from fedloom.wire.schema import NumberSpec, score

Metrics = dict[str, Tensor]
"""Named scalars, detached; means over the examples (or tokens) that the loss is a mean over."""

Head = Literal["causal", "classification"]


@dataclass(frozen=True)
class Separable:
    """Whether a batch's loss is the mean of its rows' losses, each of which follows from its row alone.

    Row-level differential privacy needs it, since it clips each row's gradient
    (``training/row_privacy.py``).

    Attributes:
        holds: Whether it is, or can be made so (:meth:`Objective.for_rows`).
        why: The reason, and what changes where it is made so.
    """

    holds: bool
    why: str


UNSAID = Separable(
    False,
    "it does not say whether a row's loss follows from that row alone; where it does, its class says so: "
    "separable = Separable(True, reason)",
)
"""Of objectives that do not say it."""

PAIRWISE = Separable(True, "each pair has a loss of its own; a pair is one unit")
"""Of objectives on preference pairs."""


@dataclass(frozen=True)
class Generation:
    """How a policy generates the answers that it is trained on (``evaluation/rollouts.py``).

    Attributes:
        group: Answers to each prompt.
        max_new_tokens: Tokens of an answer at most.
        temperature: Of the draws.
        iterations: Optimizer steps on each batch of answers.
        reference: Whether the tokens' log-probs under the reference model are needed.
        rewards: Names of what answers are rewarded for.
        weights: Their factors.
        advantages: ``(prompts, group)`` rewards to advantages of the same shape, and to ``(prompts,)``
            standard deviations.
        keeps: ``(prompts, group)`` rewards to which answers are trained on, bool of the same shape;
            ``None`` for all.
    """

    group: int
    max_new_tokens: int
    temperature: float
    iterations: int
    reference: bool
    rewards: tuple[str, ...]
    weights: tuple[float, ...]
    advantages: Callable[[Tensor], tuple[Tensor, Tensor]]
    keeps: Callable[[Tensor], Tensor] | None = None


class ReferenceSettings(NamedSettings):
    """What settings of objectives with a reference model have in common."""

    reference: Literal["start", "base"] | None = None
    """The reference model: "start", the base model with the adapter that the run starts from, or "base",
    the base model alone (default: "start" where there is an adapter.start)."""


class Model(Protocol):
    """What an objective sees of a model: a Hugging Face forward pass."""

    def __call__(self, *, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Any:
        """Return an output with ``.logits``, and ``.rewards`` where there is a reward head."""
        ...


class Objective:
    """Base of all objectives; a user's own may be passed to :func:`fedloom.run` as an object.

    Attributes:
        kind: Kind of example it trains on: instruction, preference, feedback or labelled.
        accepts: Kinds of data it can be given; KTO unrolls pairs into single answers.
        head: Which output layer the backbone gets.
        outputs: Names of that layer's outputs where rows have no classes that say them.
        reads_margins: Whether it reads the column margin of pairs.
        compares: Whether a pair is read as the question which of its answers is better, in both orders
            (``data/selection.py``), by which held-out pairs are judged too.
        needs_reference: Whether batches must carry the reference model's log-probs.
        needs_mismatched: Whether batches must carry mismatched completions (KTO).
        needs_reward: Whether the model must have an explicit reward head.
        reported: Names and ranges of what training with it reports: ``loss``, and the metrics that
            :meth:`loss` returns. A metric that is not declared here may not be sent.
        beta: Scale of implicit rewards, used when held-out pairs are judged.
        gamma: Scale of explicit rewards, likewise.
        separable: Whether it goes with row-level privacy, and why.
        generation: How it has answers generated, where it trains on those of the policy itself.
    """

    kind: str = "instruction"
    accepts: tuple[str, ...] = ("instruction",)
    head: Head = "causal"
    outputs: tuple[str, ...] = ()
    reads_margins: bool = False
    compares: bool = False
    needs_reference: bool = False
    needs_mismatched: bool = False
    needs_reward: bool = False
    reported: tuple[NumberSpec, ...] = (score("loss"),)
    beta: float = 0.1
    gamma: float = 0.0
    separable: Separable = UNSAID
    generation: Generation | None = None

    def for_rows(self) -> Objective:
        """Return the objective as a mean of one row's losses each, for row-level privacy; itself here."""
        return self

    def for_client(self, labels: NDArray[np.int64]) -> Objective:
        """Return the objective for a client whose rows have these labels (-1 for none); itself here."""
        return self

    def weight(self, batch: Batch) -> float:
        """Return what the mean in :meth:`loss` is over: the number of examples by default."""
        return float(len(batch))

    def metric_weights(self, batch: Batch) -> dict[str, float]:
        """Return, for metrics that are means over something else than the loss, how many of it."""
        return {}

    def statistics(self, model: Model, batches: Sequence[Batch]) -> Tensor | None:
        """Return what one optimizer step needs from all its micro-batches, without a gradient."""
        return None

    def loss(self, model: Model, batch: Batch, statistics: Tensor | None) -> tuple[Tensor, Metrics]:
        """Return the mean loss of a micro-batch as a scalar, and metrics (:attr:`reported`).

        Args:
            model: The policy, adapters on.
            batch: One micro-batch.
            statistics: What :meth:`statistics` returned for this optimizer step.
        """
        raise TypeError(f"{type(self).__name__} must define loss(model, batch, statistics)")


@dataclass(frozen=True)
class Scores:
    """What the loss of a micro-batch is worked out of.

    Attributes:
        logps: ``(sequences,)`` log-probs of the completions.
        rewards: ``(sequences,)`` explicit rewards, where there is a reward head.
        mismatched: ``(examples,)`` log-probs of mismatched completions without a gradient (KTO).
    """

    logps: Tensor
    rewards: Tensor | None = None
    mismatched: Tensor | None = None


class StatisticObjective(Objective):
    """Base of objectives whose loss of a row needs a statistic of the whole optimizer batch.

    Where there is room for the graphs of all micro-batches, the loop scores all of them before the first
    loss, so that the statistic takes no pass of its own.
    """

    def scores(self, model: Model, batch: Batch) -> Scores:
        """Return what :meth:`statistic` and :meth:`loss_of` are worked out of, with a gradient."""
        raise TypeError(f"{type(self).__name__} must define scores(model, batch)")

    def statistic(self, scores: Sequence[Scores], batches: Sequence[Batch]) -> Tensor:
        """Return the statistic, without a gradient, from the scores of all micro-batches."""
        raise TypeError(f"{type(self).__name__} must define statistic(scores, batches)")

    def loss_of(self, scores: Scores, batch: Batch, statistic: Tensor) -> tuple[Tensor, Metrics]:
        """Return the mean loss of a micro-batch from its scores; see :meth:`loss`."""
        raise TypeError(f"{type(self).__name__} must define loss_of(scores, batch, statistic)")
