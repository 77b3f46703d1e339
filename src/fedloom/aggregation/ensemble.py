"""What an ensemble says of which some models are surer than others, and what dissenters say. Pure.

Source: Cho et al. 2022, "Heterogeneous Ensemble Knowledge Transfer for Training Large Models in Federated
Learning" (Fed-ET), https://arxiv.org/abs/2204.12703, as a public re-implementation has it: a model counts
at a position by the variance of its logits over the classes, which adding a number to all of them does
not change, so that log-probabilities have the same.

Ours, against clients that claim more than they know: entries are :data:`LOWEST` below the largest of
their position at least, and a model whose variance is above :data:`LARGEST` times the median of those at
the position has its logits shrunk to that variance. Of K models that are otherwise alike one then has at
most 4 / (K + 3) of the weight, with logits twice as wide: it still decides a position alone where K is
below 9, or where the others disagree. Whoever controls half of the models moves the median itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fedloom.aggregation.soft_labels import CHUNK, SoftLabels, joined, likeliest

LOWEST = -30.0
"""Least logit beside the largest: a probability of 1e-13, below which nothing can be learnt."""

LARGEST = 4.0
"""A model's variance at most, in medians: twice the others' spread is beyond what sure clients say."""


class Consensus(NamedTuple):
    """Of K models about N positions.

    Attributes:
        shares: ``(K, N)`` alpha, which add up to 1 at each position.
        logits: ``(N, width)`` sum_k alpha_k z_k, of z that are bounded.
        diverse: ``(N, width)`` the same over the models alone whose likeliest entry is another than that
            of ``logits``, their shares scaled to add up to 1; zeros where there is none.
        disagreed: ``(N,)`` bool, where there is one.
    """

    shares: Tensor
    logits: Tensor
    diverse: Tensor
    disagreed: Tensor


@dataclass(frozen=True)
class EnsembleLabels:
    """What a student of an ensemble learns from, at N positions.

    Attributes:
        labels: ``(N,)`` int64, the likeliest entry of the consensus.
        disagreed: ``(N,)`` bool, where some model has another one.
        diverse: What those models say; without meaning where nobody disagrees.
    """

    labels: Tensor
    disagreed: Tensor
    diverse: SoftLabels

    def at(self, positions: Tensor) -> Tensor:
        """Return ``(n, 2 + width)`` float32 of some positions: label, disagreed, log-probabilities."""
        said = self.diverse.at(positions)
        columns = [self.labels[positions], self.disagreed[positions]]
        return torch.cat([torch.stack(columns, 1).to(said.dtype), said], 1)


def confident_consensus(logits: Tensor) -> Consensus:
    """Return what models say together, each by the variance of its logits.

    Args:
        logits: ``(K, N, width)``, finite; of models whose logits are all alike the shares are equal.
    """
    logits, sure = _bounded(logits)
    shares = _scaled(sure)
    total = (shares.unsqueeze(-1) * logits).sum(0)
    others = logits.argmax(-1) != total.argmax(1)
    disagreed = others.any(0)
    apart = torch.where(others, sure, 0.0)
    equal = others / others.sum(0).clamp(min=1)  # where those who disagree are sure of nothing
    apart = torch.where(apart.sum(0) > 0, apart / apart.sum(0).clamp(min=1e-300), equal)
    diverse = (apart.unsqueeze(-1) * logits).sum(0)
    return Consensus(shares, total, diverse, disagreed)


def ensemble_labels(
    answers: Sequence[SoftLabels],
) -> tuple[SoftLabels, EnsembleLabels, list[float]]:
    """Return the consensus of models, what a student learns from, and each model's mean share.

    Args:
        answers: One a model, all about the same positions; entries that are missing are filled evenly
            before variances are taken.
    """
    size, width = len(answers[0]), answers[0].width
    kept = min(width, sum(width if a.indices is None else a.values.shape[1] for a in answers))
    rows = max(1, CHUNK // (width * len(answers)))
    said, diverse, labels, disagreed, shares = [], [], [], [], []
    for start in range(0, size, rows):
        where = torch.arange(start, min(size, start + rows))
        found = confident_consensus(torch.stack([answer.at(where) for answer in answers]))
        said.append(likeliest(found.logits.log_softmax(1), kept))
        diverse.append(likeliest(found.diverse.log_softmax(1), kept))
        labels.append(found.logits.argmax(1))
        disagreed.append(found.disagreed)
        shares.append(found.shares)
    taught = EnsembleLabels(torch.cat(labels), torch.cat(disagreed), joined(diverse))
    return joined(said), taught, torch.cat(shares, 1).mean(1).tolist()


def _bounded(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits of which none counts too much, and ``(K, N)`` their variances.

    Medians are over the models whose variance is above 0, the lower of two.
    """
    found = logits.clamp(min=logits.amax(-1, keepdim=True) + LOWEST)
    sure = found.double().var(-1, correction=0)
    most = LARGEST * torch.where(sure > 0, sure, torch.nan).nanmedian(0).values
    shrunk = (most / sure).clamp(max=1.0).nan_to_num(1.0)
    middle = found.mean(-1, keepdim=True)
    scaled = middle + (found - middle) * shrunk.sqrt().unsqueeze(-1).to(found.dtype)
    return torch.where(shrunk.unsqueeze(-1) < 1, scaled, found), sure * shrunk


def _scaled(sure: Tensor) -> Tensor:
    """Return ``(K, N)`` shares that add up to 1, equal where all are 0."""
    total = sure.sum(0)
    return torch.where(total > 0, sure / total.clamp(min=1e-300), 1 / len(sure))
