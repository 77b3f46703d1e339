"""What models say about shared positions, and how the answers of several are put together. Pure.

A position is a text to be classified, or a token to be predicted. An answer is a distribution over
``width`` classes or tokens, as log-probabilities. Of a large vocabulary only the likeliest entries are
kept; what is missing shares the rest of the probability evenly. A missing entry is unknown, not zero: a
logit of zero there would claim that it is likely (the zero-padding bias of arXiv 2509.01750).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Rule = Literal["mean", "mean_prob", "entropy", "confidence", "lowest_loss"]

LEAST_REST = 1e-9
"""Probability left for all missing entries together at least, so that none is impossible."""

CHUNK = 1 << 24
"""Elements of a dense table that are worked on at a time."""


@dataclass(frozen=True)
class SoftLabels:
    """Answers about N positions, whole or their likeliest entries.

    Attributes:
        width: Classes or vocabulary.
        values: ``(N, k)`` float32 log-probabilities of the entries that are kept.
        indices: ``(N, k)`` int64, ascending in each row; ``None`` where all entries are there.
        present: ``(N, k)`` bool, which of them count, where rows keep different numbers; else ``None``.
    """

    width: int
    values: Tensor
    indices: Tensor | None = None
    present: Tensor | None = None

    def __len__(self) -> int:
        """Return N."""
        return len(self.values)

    def at(self, positions: Tensor) -> Tensor:
        """Return ``(n, width)`` log-probabilities of some positions, missing entries filled."""
        return self.take(positions).dense()

    def take(self, positions: Tensor) -> SoftLabels:
        """Return the answers about some positions, in that order."""
        indices = None if self.indices is None else self.indices[positions]
        present = None if self.present is None else self.present[positions]
        return SoftLabels(self.width, self.values[positions], indices, present)

    def dense(self) -> Tensor:
        """Return ``(N, width)`` log-probabilities, missing entries filled."""
        if self.indices is None:
            return self.values
        return self._scatter(self._fill().unsqueeze(1).expand(-1, self.width).clone())

    def sent(self) -> tuple[Tensor, Tensor]:
        """Return ``(N, width)``: the entries that are kept (zero elsewhere), and whether each is."""
        if self.indices is None:
            return self.values, torch.ones_like(self.values, dtype=torch.bool)
        values = self._scatter(torch.zeros(len(self), self.width))
        mask = torch.zeros(len(self), self.width, dtype=torch.bool)
        rows, columns, _ = self._entries()
        mask[rows, columns] = True
        return values, mask

    def rest(self) -> Tensor:
        """Return ``(N,)``: the probability of all missing entries together."""
        kept = self.values.exp()
        if self.present is not None:
            kept = kept * self.present
        return (1 - kept.sum(1)).clamp(min=LEAST_REST)

    def _fill(self) -> Tensor:
        counts = torch.full((len(self),), self.values.shape[1])
        if self.present is not None:
            counts = self.present.sum(1)
        return (self.rest() / (self.width - counts).clamp(min=1)).log()

    def _entries(self) -> tuple[Tensor, Tensor, Tensor]:
        assert self.indices is not None, "dense knowledge has no entries"
        present = self.present
        if present is None:
            present = torch.ones_like(self.indices, dtype=torch.bool)
        rows = torch.nonzero(present)[:, 0]
        return rows, self.indices[present], self.values[present]

    def _scatter(self, table: Tensor) -> Tensor:
        rows, columns, values = self._entries()
        table[rows, columns] = values
        return table


def likeliest(logps: Tensor, k: int | None = None, mass: float | None = None) -> SoftLabels:
    """Keep the likeliest entries of each position.

    Args:
        logps: ``(N, width)`` log-probabilities.
        k: Entries kept at most; ``None`` keeps all.
        mass: Keep only as many as it takes to reach this share of the probability, at least one.
    """
    width = logps.shape[1]
    if (k is None or k >= width) and mass is None:
        return SoftLabels(width, logps.float())
    values, indices = logps.float().topk(min(k or width, width), dim=1)
    present = None
    if mass is not None:
        before = values.exp().cumsum(1) - values.exp()
        present = before < mass
        present[:, 0] = True
    order = indices.argsort(dim=1)
    values, indices = values.gather(1, order), indices.gather(1, order)
    if present is not None:
        present = present.gather(1, order)
        first = (~present).long().argsort(dim=1, stable=True)  # those that count, still ascending
        values, indices, present = (t.gather(1, first) for t in (values, indices, present))
    return SoftLabels(width, values, indices, present)


def combine(
    answers: Sequence[SoftLabels],
    weights: Sequence[float],
    rule: Rule,
    *,
    labels: Tensor | None = None,
    groups: Tensor | None = None,
) -> SoftLabels:
    """Put several models' answers about the same positions together.

    ``mean``: of log-probabilities, weighted by ``weights``, each entry over the models that sent it; what
    nobody sent shares their mean rest. ``mean_prob``: of probabilities, weighted. ``entropy``,
    ``confidence``: of probabilities, a model counting at a position by exp(-entropy) or by its highest
    probability. ``lowest_loss``: the answer of the model with the lowest mean loss over a group of
    positions (a text), as FedMKT's "greater" (arXiv 2406.02224).

    Args:
        answers: One a model, all about the same positions.
        weights: One a model, all above 0 (their rows).
        rule: See above.
        labels: ``(N,)`` true entries, for ``lowest_loss``.
        groups: ``(N,)`` number of the text each position lies in, for ``lowest_loss``.
    """
    size, width = len(answers[0]), answers[0].width
    kept = min(width, sum(width if a.indices is None else a.values.shape[1] for a in answers))
    best = _lowest_loss(answers, labels, groups) if rule == "lowest_loss" else None
    rows = max(1, CHUNK // (width * len(answers)))
    parts = []
    for start in range(0, size, rows):
        where = torch.arange(start, min(size, start + rows))
        if best is not None:
            dense = torch.stack([answer.at(where) for answer in answers])
            table = dense[best[where], torch.arange(len(where))]
        elif rule == "mean":
            table = _mean([answer.take(where) for answer in answers], weights)
        else:
            table = _mean_prob([answer.at(where) for answer in answers], weights, rule)
        parts.append(likeliest(table.log_softmax(1), kept))
    return joined(parts)


def shortened(soft_labels: SoftLabels, k: int | None, mass: float | None) -> SoftLabels:
    """Keep the likeliest entries of what is known; see :func:`likeliest`."""
    rows = max(1, CHUNK // soft_labels.width)
    parts = []
    for start in range(0, len(soft_labels), rows):
        where = torch.arange(start, min(len(soft_labels), start + rows))
        parts.append(likeliest(soft_labels.at(where), k, mass))
    return joined(parts)


def joined(parts: Sequence[SoftLabels]) -> SoftLabels:
    """Put knowledge about some positions and about the next ones together."""
    indices = [part.indices for part in parts if part.indices is not None]
    present = [part.present for part in parts if part.present is not None]
    return SoftLabels(
        parts[0].width,
        torch.cat([part.values for part in parts]),
        torch.cat(indices) if indices else None,
        torch.cat(present) if present else None,
    )


def _mean(answers: Sequence[SoftLabels], weights: Sequence[float]) -> Tensor:
    total = torch.zeros(len(answers[0]), answers[0].width)
    heard = torch.zeros_like(total)
    rest = torch.zeros(len(total))
    for answer, weight in zip(answers, weights, strict=True):
        values, mask = answer.sent()
        total += weight * values
        heard += weight * mask
        rest += weight * (answer.rest() if answer.indices is not None else 0.0)
    silent = heard == 0
    share = rest / sum(weights) / silent.sum(1).clamp(min=1)
    fill = share.clamp(min=LEAST_REST / total.shape[1]).log().unsqueeze(1)
    return torch.where(silent, fill, total / torch.where(silent, 1.0, heard))


def _mean_prob(tables: Sequence[Tensor], weights: Sequence[float], rule: Rule) -> Tensor:
    stacked = torch.stack(list(tables))
    probabilities = stacked.exp()
    if rule == "mean_prob":
        shares = torch.tensor(weights).view(-1, 1).expand(-1, stacked.shape[1])
    elif rule == "entropy":
        shares = (probabilities * stacked).sum(-1).exp()
    else:
        shares = probabilities.amax(-1)
    shares = shares / shares.sum(0)
    return (shares.unsqueeze(-1) * probabilities).sum(0).clamp(min=1e-30).log()


def _lowest_loss(
    answers: Sequence[SoftLabels], labels: Tensor | None, groups: Tensor | None
) -> Tensor:
    """Return ``(N,)``: the model to believe at each position, the first of those that are equal."""
    assert labels is not None and groups is not None, "lowest_loss needs labels"
    sums = torch.zeros(len(answers), int(groups.max()) + 1)
    rows = max(1, CHUNK // answers[0].width)
    for number, answer in enumerate(answers):
        for start in range(0, len(answer), rows):
            where = torch.arange(start, min(len(answer), start + rows))
            losses = -answer.at(where).gather(1, labels[where].unsqueeze(1)).squeeze(1)
            sums[number].index_add_(0, groups[where], losses)
    return sums.argmin(0)[groups]
