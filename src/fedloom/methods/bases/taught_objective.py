"""An objective with a teacher beside it: the divergence from what the model says under other tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedloom.data.batch import Batch, Predicting, Sequences
from fedloom.models.adapters import AdapterModel
from fedloom.objectives.base import Metrics, Objective
from fedloom.objectives.contrastive import text_means
from fedloom.objectives.distillation import divergences, scored_logits
from fedloom.tensors import Tensors
from fedloom.training.results import LocalResult
from fedloom.training.steps import Training, train_locally

DIVERGENCE = "mutual_divergence"
"""Metric: KL_T, the mean over all batches."""


@dataclass
class TaughtSteps:
    """Makes the steps of one training, each with a teacher.

    Attributes:
        teacher: Returns the tensors under which the model teaches this step.
        temperature: T of the divergence.
        strength: Weight of the divergence.
    """

    teacher: Callable[[], Tensors]
    temperature: float
    strength: float

    def train(self, training: Training) -> LocalResult:
        """Carry out a training; the loss it reports is the objective's, with the divergence beside it."""
        taught = Taught(training.objective, training.model, self)
        model = RememberingModel(training.model)
        return train_locally(model, training.share, taught, training.settings, **training.options)


class Taught(Objective):
    """(F + weight KL_T) / 2: an objective, and the divergence from the teacher of the step.

    The divergence is a mean over positions where F is, else over each text's and then over texts.
    """

    def __init__(self, own: Objective, model: AdapterModel, settings: TaughtSteps) -> None:
        """Take F, the model to ask the teacher with, and the settings."""
        self.own, self.model, self.settings = own, model, settings
        self.head, self.needs_mismatched = own.head, own.needs_mismatched

    def for_client(self, labels: NDArray[np.int64]) -> Objective:
        """Return it with F for these labels."""
        found = copy.copy(self)
        found.own = self.own.for_client(labels)
        return found

    def weight(self, batch: Batch) -> float:
        """Return what F is a mean over."""
        return self.own.weight(batch)

    def metric_weights(self, batch: Batch) -> dict[str, float]:
        """Return those of F."""
        return self.own.metric_weights(batch)

    def statistics(self, model: Any, batches: Sequence[Batch]) -> Tensor | None:
        """Return that of F."""
        return self.own.statistics(model, batches)

    def loss(self, model: Any, batch: Batch, statistics: Tensor | None) -> tuple[Tensor, Metrics]:
        """Return half of F and the divergence, and F's metrics."""
        with self.model.reference(self.settings.teacher()):
            teacher = scored_logits(self.model, batch, self.head)[0]
        loss, metrics = self.own.loss(model, batch, statistics)
        apart = divergences(model.said(batch, self.head), teacher, self.settings.temperature)
        if self.head == "causal" and self.own.weight(batch) != batch.completion_tokens:
            apart = text_means(apart.unsqueeze(1), batch.sequences.completion_mask)
        apart = apart.mean()
        shown = {"loss": loss.detach(), DIVERGENCE: apart.detach()}
        return (loss + self.settings.strength * apart) / 2, {**metrics, **shown}


class RememberingModel(AdapterModel):
    """A second view of an :class:`AdapterModel` that remembers its last pass, to ask it once."""

    __slots__ = ("_last",)  # all else is the model's own

    def __init__(self, model: AdapterModel) -> None:
        """Share what the model has."""
        self.__dict__ = model.__dict__
        self._last: tuple[object, Any] = None, None

    def predicting(self, sequences: Sequences) -> Predicting | None:
        """Read sequences as far as the output layer, and remember it."""
        found = super().predicting(sequences)
        self._last = sequences, found
        return found

    def __call__(self, *, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Any:
        """Run the model, and remember its logits."""
        output = super().__call__(input_ids=input_ids, attention_mask=attention_mask, **options)
        self._last = input_ids, getattr(output, "logits", None)
        return output

    def said(self, batch: Batch, head: Literal["causal", "classification"]) -> Tensor:
        """Return the logits of ``scored_logits``, of the last pass where it was over this batch."""
        (asked, found), self._last = self._last, (None, None)
        if isinstance(found, Predicting) and asked is batch.sequences:
            self.count(1, 0, len(found.states))  # the output layer once more
            return found.logits(found.states).float()
        if head == "classification" and found is not None and asked is batch.sequences.input_ids:
            logits: Tensor = found
            return logits
        return scored_logits(self, batch, head)[0]
