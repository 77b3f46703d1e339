"""Weights of groups of clients by how well each is served, pure.

Sources: APPA, https://arxiv.org/abs/2604.04261 (its abstract and digests of it), for the reverse softmax
and the fairness index; Sagawa et al. 2020, "Distributionally Robust Neural Networks for Group Shifts",
https://arxiv.org/abs/1911.08731, algorithm 1, for :func:`group_dro`; Mohri et al. 2019, "Agnostic
Federated Learning", https://arxiv.org/abs/1902.00146, for the worst group.

A score is a mean reward, the higher the better; where there are no rewards, a loss with its sign turned.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

DECAY = 0.8
"""Of the running mean of a score."""


def running_mean(before: float | None, now: float, decay: float = DECAY) -> float:
    """Return decay before + (1 - decay) now; ``now`` where there is nothing before."""
    return now if before is None else decay * before + (1 - decay) * now


def mean_score(scores: Iterable[float | None]) -> float | None:
    """Return the mean of the scores that there are, ``None`` where there is none."""
    found = [score for score in scores if score is not None]
    return math.fsum(found) / len(found) if found else None


def reverse_softmax(scores: Sequence[float], temperature: float) -> list[float]:
    """Return w_g prop. to exp((1 - h_g) / T), adding up to 1: the group with the lowest score gets most.

    Args:
        scores: h of each group, finite, at least one.
        temperature: T, above 0: towards 0 all weight is the worst group's, towards infinity all are
            alike.
    """
    lowest = min(scores)
    found = [math.exp((lowest - own) / temperature) for own in scores]
    whole = math.fsum(found)
    return [own / whole for own in found]


def worst_group(scores: Sequence[float]) -> list[float]:
    """Return all weight for the lowest score, in equal parts where several are lowest."""
    lowest = [float(own == min(scores)) for own in scores]
    return [own / sum(lowest) for own in lowest]


def group_dro(
    logits: Sequence[float | None],
    scores: Sequence[float | None],
    rate: float,
    others: Sequence[float] = (),
) -> list[float]:
    """Return log q_g - eta (s_g - mean s): the exponentiated gradient of the worst group's weight.

    Scores are centred, which no softmax over groups that are all there sees, so that a logit follows from
    how a group fares beside the others and not from how often it is there.

    Args:
        logits: log q of each group that is there; a softmax of them gives the weights. ``None`` for a
            newcomer, which starts at the mean of those that are known, 0 where none is.
        scores: s of each in this round; without one (``None``) its logit stays.
        rate: eta, at least 0.
        others: log q of groups that are away.
    """
    known = [*others, *(own for own in logits if own is not None)]
    start = math.fsum(known) / max(1, len(known))
    scored = [own for own in scores if own is not None]
    mean = math.fsum(scored) / max(1, len(scored))
    return [
        (start if logit is None else logit) - (0.0 if own is None else rate * (own - mean))
        for logit, own in zip(logits, scores, strict=True)
    ]


def fairness(scores: Sequence[float]) -> float | None:
    """Return 1 / (1 + CoV), with the population's standard deviation over the mean; in (0, 1].

    ``None`` where a score is negative or all are 0, of which it says nothing.
    """
    mean = math.fsum(scores) / len(scores)
    if min(scores) < 0 or mean <= 0:
        return None
    variance = math.fsum((own - mean) ** 2 for own in scores) / len(scores)
    return 1 / (1 + math.sqrt(variance) / mean)


def softmax(logits: Sequence[float]) -> list[float]:
    """Return weights prop. to exp(logit) that add up to 1."""
    return reverse_softmax([-own for own in logits], 1.0)
