"""Distillation: a student comes to say what its teacher says, in part or wholly.

Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network",
https://arxiv.org/abs/1503.02531. With temperature T the loss is T^2 KL(teacher_T || student_T); the T^2
keeps the gradient's size as T grows. Used by KD-FedLLM (``methods/distillation.py``).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fedloom.data.batch import Batch
from fedloom.objectives.base import Head, Metrics, Model, Objective
from fedloom.objectives.logps import completion_logits, completion_logits_in_parts
from fedloom.wire.schema import fraction, score


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over positions.

    Args:
        student: ``(positions, width)`` logits.
        teacher: ``(positions, width)`` logits or log-probabilities.
        temperature: T, above 0.
    """
    wanted = (teacher.float() / temperature).log_softmax(1)
    given = (student.float() / temperature).log_softmax(1)
    divergence = F.kl_div(given, wanted, reduction="batchmean", log_target=True)
    return temperature**2 * divergence


def divergences(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return ``(positions,)``: T^2 KL(softmax(teacher / T) || softmax(student / T)) at each position.

    Args are those of :func:`distillation_loss`; where widths differ, as a vocabulary may be padded, the
    entries that both have are compared.
    """
    width = min(student.shape[1], teacher.shape[1])
    wanted = (teacher[:, :width].float() / temperature).log_softmax(1)
    given = (student[:, :width].float() / temperature).log_softmax(1)
    divergence = F.kl_div(given, wanted, reduction="none", log_target=True)
    return temperature**2 * divergence.sum(1)


def scored_logits(model: Model, batch: Batch, head: Head) -> tuple[Tensor, Tensor | None]:
    """Return the logits that knowledge is about, and what is true there.

    Args:
        model: With a classification or an LM head.
        batch: Any examples.
        head: Which of the two.

    Returns:
        ``(positions, width)``: a position is an example, or a completion token (row by row); and
        ``(positions,)`` classes or tokens, ``None`` for texts without a class.
    """
    sequences = batch.sequences
    if head == "classification":
        output = model(input_ids=sequences.input_ids, attention_mask=sequences.attention_mask)
        return output.logits, batch.labels
    logits, targets, _ = completion_logits(model, sequences)
    return logits, targets


def logits_in_parts(model: Model, batch: Batch, head: Head) -> Iterator[Tensor]:
    """Yield the logits of :func:`scored_logits` some positions at a time, without a gradient.

    So that those of long passes and a large vocabulary are never held together.
    """
    with torch.no_grad():
        if head == "causal":
            yield from completion_logits_in_parts(model, batch.sequences)
        else:
            yield scored_logits(model, batch, head)[0]


class Distillation(Objective):
    """``share T^2 KL + (1 - share) CE``; without labels the first term alone.

    Its examples carry a teacher's answers (``batch.teacher``).
    """

    # of equal answers the divergence is 0 but for rounding, which may take it below
    reported = (score("loss"), score("divergence"), fraction("agreement"))

    def __init__(self, head: Head, temperature: float, share: float, *, labelled: bool) -> None:
        """Take the head of the models, T, the share of the teacher and whether labels may be used."""
        self.head = head
        self.temperature = temperature
        self.share = share if labelled else 1.0

    def weight(self, batch: Batch) -> float:
        """Return the number of positions."""
        return float(len(batch) if self.head == "classification" else batch.completion_tokens)

    def loss(self, model: Model, batch: Batch, statistics: Tensor | None) -> tuple[Tensor, Metrics]:
        """Return the mean over positions, and how often student and teacher agree."""
        assert batch.teacher is not None, "examples to distil from carry a teacher's answers"
        logits, targets = scored_logits(model, batch, self.head)
        logits = logits[:, : batch.teacher.shape[1]]  # a vocabulary may be padded to another length
        agreed = (logits.detach().argmax(1) == batch.teacher.argmax(1)).float().mean()
        loss = distillation_loss(logits, batch.teacher, self.temperature)
        metrics = {"divergence": loss.detach(), "agreement": agreed}
        if self.share < 1 and targets is not None:
            loss = self.share * loss + (1 - self.share) * F.cross_entropy(logits.float(), targets)
        return loss, metrics


class EnsembleDistillation(Objective):
    """``CE(student, label) + weight KL(those who disagree || student)``, the mean over positions.

    Source: Fed-ET (``aggregation/ensemble.py``). The divergence is 0 where nobody disagrees. Its examples
    carry what ``EnsembleLabels.at`` returns (``batch.teacher``).
    """

    reported = (score("loss"), score("divergence"), fraction("agreement"))

    def __init__(self, head: Head, diversity: float) -> None:
        """Take the head of the models and the weight of the divergence, at least 0."""
        self.head, self.diversity = head, diversity

    def weight(self, batch: Batch) -> float:
        """Return the number of positions."""
        return float(len(batch) if self.head == "classification" else batch.completion_tokens)

    def loss(self, model: Model, batch: Batch, statistics: Tensor | None) -> tuple[Tensor, Metrics]:
        """Return the mean over positions, and how often the student says the label."""
        assert batch.teacher is not None, "examples to distil from carry a teacher's answers"
        labels, disagreed = batch.teacher[:, 0].long(), batch.teacher[:, 1]
        diverse = batch.teacher[:, 2:]
        logits = scored_logits(model, batch, self.head)[0][:, : diverse.shape[1]].float()
        apart = (disagreed * divergences(logits, diverse, 1.0)).mean()
        agreed = (logits.detach().argmax(1) == labels).float().mean()
        loss = F.cross_entropy(logits, labels) + self.diversity * apart
        return loss, {"divergence": apart.detach(), "agreement": agreed}
