"""Grades of generated answers by several clients, put together as rewards, pure.

Source: FedGRPO (https://arxiv.org/abs/2602.12014), equations 5 to 9. As printed, a reward is standardised
over the experts that grade an answer, R_k = (r_k - mean_k r_k) / std_k r_k: over them they add up to 0,
and their sum teaches nothing. Here each client's grades are standardised over the answers of the
question (a reconstruction), and an answer's reward is the mean over its experts:

    z_k(y) = (r_k(y) - mean_y r_k) / std_y r_k,        R(y) = sum_k w_k z_k(y) / sum_k w_k

A client's unit and zero have no say then, and no client more than sqrt(G - 1) for one of G answers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def standardised(grades: Tensor) -> Tensor:
    """Return grades less their question's mean, over its population's standard deviation, float64.

    Args:
        grades: ``(questions, G)``, finite; a question whose grades are all alike has zeros.
    """
    own = grades.double()
    alike = own.amax(1, keepdim=True) == own.amin(1, keepdim=True)
    spread = own.std(1, correction=0, keepdim=True)
    return (own - own.mean(1, keepdim=True)).div(spread).masked_fill(alike, 0.0)


def expert_rewards(
    graded: Mapping[int, Tensor],
    asked: Mapping[int, Sequence[int]],
    competence: Sequence[Mapping[int, float]],
) -> Tensor:
    """Return ``(questions, G)`` float64: R of each answer, zeros where nobody competent has graded.

    Args:
        graded: By client, at least one: ``(asked, G)`` grades of the answers to its questions.
        asked: By client: these questions.
        competence: Of each question, by client: w_k, at least 0.
    """
    answers = next(iter(graded.values())).shape[1]
    whole = torch.zeros(len(competence), answers, dtype=torch.float64)
    total = torch.zeros(len(competence), 1, dtype=torch.float64)
    for client, grades in graded.items():
        places = list(asked[client])
        by = [competence[place][client] for place in places]
        weight = torch.tensor(by, dtype=torch.float64)[:, None]
        whole[places] += weight * standardised(grades)
        total[places] += weight
    return torch.where(total > 0, whole / total, 0.0)


def assigned(
    competence: Sequence[Mapping[int, float]], draws: Mapping[int, Sequence[float]], count: int
) -> dict[int, list[int]]:
    """Return the questions that each client grades, ascending, of clients that grade some.

    Args:
        competence: Of each question, by client; see :func:`experts_of`.
        draws: By client, one for each question.
        count: M.
    """
    found: dict[int, list[int]] = {}
    for place, known in enumerate(competence):
        drawn = {client: float(own[place]) for client, own in draws.items()}
        for client in experts_of(known, drawn, count):
            found.setdefault(client, []).append(place)
    return dict(sorted(found.items()))


def experts_of(
    competence: Mapping[int, float], draws: Mapping[int, float], count: int
) -> list[int]:
    """Return the clients with the largest competence, ascending; of equals those with the lowest draw.

    Args:
        competence: By client.
        draws: By client, from 0 to 1.
        count: M, how many at most.
    """
    ordered = sorted(competence, key=lambda client: (-competence[client], draws[client], client))
    return sorted(ordered[:count])


def nearest(text: Sequence[int], others: Sequence[Sequence[int]], count: int) -> list[int]:
    """Return the places of the others that are most like a text, the likest first, earlier ones first.

    Likeness is the cosine of how often each token occurs.
    """
    own = Counter(text)

    def likeness(other: Sequence[int]) -> float:
        counts = Counter(other)
        common = math.fsum(own[token] * n for token, n in counts.items())
        return common / math.sqrt(max(1, math.fsum(n * n for n in counts.values())))

    found = [likeness(other) for other in others]
    return sorted(range(len(others)), key=lambda place: (-found[place], place))[:count]
