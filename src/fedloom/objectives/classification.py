"""Classification of a text by a linear head on the last token's hidden state."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from fedloom.data.batch import Batch
from fedloom.objectives.base import Head, Metrics, Model, Objective, Separable
from fedloom.settings.schema import NamedSettings
from fedloom.wire.schema import amount, fraction


class ClassificationSettings(NamedSettings):
    """``[objective] name = "classification"``."""

    name: Literal["classification"] = "classification"


def classification_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Metrics]:
    """Return the mean cross-entropy and the accuracy.

    Args:
        logits: ``(examples, classes)``.
        labels: ``(examples,)`` int64 in [0, classes).
    """
    accuracy = (logits.detach().argmax(1) == labels).float().mean()
    return F.cross_entropy(logits.float(), labels), {"accuracy": accuracy}


class Classification(Objective):
    """Cross-entropy over the classes; the head is trained and shared with the adapter."""

    kind = "labelled"
    accepts = ("labelled",)
    head: Head = "classification"
    separable = Separable(True, "each text has a loss of its own")
    reported = (amount("loss"), fraction("accuracy"))

    def __init__(self, settings: ClassificationSettings | None = None) -> None:
        """Take no settings beyond the name."""

    def loss(self, model: Model, batch: Batch, statistics: Tensor | None) -> tuple[Tensor, Metrics]:
        """Return the mean cross-entropy over examples."""
        assert batch.labels is not None, "labelled examples carry labels"
        sequences = batch.sequences
        output = model(input_ids=sequences.input_ids, attention_mask=sequences.attention_mask)
        return classification_loss(output.logits, batch.labels)
