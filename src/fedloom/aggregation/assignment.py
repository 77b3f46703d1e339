"""Experts choose clients: which client holds which expert, by relevance under limits on both sides.

Source: Zhang et al. 2024, FedAMoLE, https://arxiv.org/abs/2411.19128, "reverse selection-based expert
assignment", as in the authors' code: every expert goes to the same number of clients, every client
holds between a least and a largest number of experts, and the sum of relevances is the largest there is.

The best assignment is found by linear programming. Its constraints are those of a bipartite
b-matching with bounds on the sums of rows and columns: each variable is in one row and in one column, so
the matrix is that of a bipartite graph, which is totally unimodular (Hoffman and Kruskal 1956), and with
whole numbers on the right every vertex of the polytope has whole coordinates. The simplex method ends
in a vertex, so no integer programming is needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def infeasible(
    experts: int,
    clients: int,
    clients_per_expert: int,
    max_experts_per_client: int,
    min_experts_per_client: int = 2,
) -> list[str]:
    """Return the inequalities that an assignment would have to violate; empty where there is one.

    All of these together are sufficient: with equal rows, an assignment exists if and only if the number
    of placements lies between the least and the largest number that the clients can take.
    """
    least, most = min_experts_per_client, min(max_experts_per_client, experts)
    placed = experts * clients_per_expert
    found = []
    if clients_per_expert > clients:
        found.append(f"clients_per_expert <= clients: {clients_per_expert} > {clients}")
    if least > max_experts_per_client:
        found.append(
            f"min_experts_per_client <= max_experts_per_client: {least} > {max_experts_per_client}"
        )
    if least > experts:
        found.append(f"min_experts_per_client <= experts: {least} > {experts}")
    if least * clients > placed:
        found.append(
            "min_experts_per_client * clients <= experts * clients_per_expert: "
            f"{least} * {clients} > {experts} * {clients_per_expert}"
        )
    if placed > most * clients:
        found.append(
            "experts * clients_per_expert <= max_experts_per_client * clients: "
            f"{experts} * {clients_per_expert} > {most} * {clients}"
        )
    return found


def nearest_limits(
    experts: int,
    clients: int,
    clients_per_expert: int,
    max_experts_per_client: int,
    min_experts_per_client: int = 2,
) -> tuple[int, int, int]:
    """Return limits that so few clients can keep, each as near as can be to what is asked for.

    For clients that leave: they are the same wherever those asked for can be kept.

    Returns:
        Clients per expert, most and least experts per client.
    """
    holders = min(clients_per_expert, clients)
    placed = experts * holders
    most = max(max_experts_per_client, math.ceil(placed / clients))
    return holders, most, min(min_experts_per_client, placed // clients)


def most_by_rows(
    rows: Sequence[int],
    experts: int,
    clients_per_expert: int,
    max_experts_per_client: int,
    min_experts_per_client: int = 2,
) -> list[int]:
    """Return how many experts each client may hold at most, in proportion to its rows.

    A client's share of all placements, rounded up, within the limits; where that leaves too few places,
    those get one more whose share is furthest above what they may hold, of equal ones the first.

    Args:
        rows: Of each client, at least 0.
        experts: E.
        clients_per_expert: k_c.
        max_experts_per_client: b_max; with it all limits can be kept (:func:`infeasible`).
        min_experts_per_client: Of each client.
    """
    placed, most = experts * clients_per_expert, min(max_experts_per_client, experts)
    total = max(1, sum(rows))
    shares = [placed * own / total for own in rows]
    found = [min(most, max(min_experts_per_client, math.ceil(own))) for own in shares]
    while sum(found) < placed:
        room = [client for client, own in enumerate(found) if own < most]
        found[max(room, key=lambda client: (shares[client] - found[client], -client))] += 1
    return found


def assign_experts(
    relevance: NDArray[np.float64],
    clients_per_expert: int,
    max_experts_per_client: int | Sequence[int],
    min_experts_per_client: int = 2,
) -> NDArray[np.bool_]:
    """Return who holds which expert, with the largest sum of relevances.

    Args:
        relevance: ``(experts, clients)``, finite.
        clients_per_expert: k_c, holders of each expert.
        max_experts_per_client: b_max, or one for each client (:func:`most_by_rows`).
        min_experts_per_client: Of each client.

    Returns:
        ``(experts, clients)``, true where the client holds the expert. The same relevances give the same
        assignment; among several best ones, which is left to the solver.

    Raises:
        ValueError: Relevances that are not finite, or limits that cannot be kept; each violated
            inequality is named.
    """
    from scipy.optimize import linprog  # which no other method waits for
    from scipy.sparse import eye_array, kron, vstack

    experts, clients = relevance.shape
    most = np.broadcast_to(np.asarray(max_experts_per_client, np.float64), clients)
    limits = (clients_per_expert, int(most.max()), min_experts_per_client)
    if not np.isfinite(relevance).all():
        raise ValueError(f"{(~np.isfinite(relevance)).sum()} relevances are not finite")
    violated = infeasible(experts, clients, *limits)
    if violated:
        raise ValueError("no assignment keeps " + " and ".join(violated))
    held = kron(np.ones((1, experts)), eye_array(clients))  # sums over experts, for each client
    placed = kron(eye_array(experts), np.ones((1, clients)))  # sums over clients, for each expert
    found = linprog(
        -relevance.ravel(),
        A_ub=vstack([held, -held], format="csr"),
        b_ub=np.concatenate([most, np.full(clients, -float(min_experts_per_client))]),
        A_eq=placed.tocsr(),
        b_eq=np.full(experts, float(clients_per_expert)),
        bounds=(0, 1),
        method="highs-ds",
    )
    if not found.success:
        raise ValueError(f"the solver gave up: {found.message}")
    return np.asarray(found.x > 0.5).reshape(experts, clients)


def relevance_of(experts: Tensor, tokens: Tensor) -> NDArray[np.float64]:
    """Return ``(experts, clients)`` <u_e, t_c> / sqrt(r)."""
    scores = experts.double() @ tokens.double().T / math.sqrt(experts.shape[1])
    return scores.numpy()


def softmax(relevance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the softmax over clients of each expert's relevances."""
    shifted = np.exp(relevance - relevance.max(axis=1, keepdims=True))
    whole: NDArray[np.float64] = shifted / shifted.sum(axis=1, keepdims=True)
    return whole


def similarity(tokens: Tensor, known: Tensor) -> Tensor:
    """Return how alike clients' tokens are: the mean over layers of the cosine of their embeddings.

    Args:
        tokens: ``(layers, clients, r)`` mean token embeddings; in each layer their mean over known
            clients is taken off first, as it is most of what they are.
        known: ``(clients,)``, not 0 where a client's are known.

    Returns:
        ``(clients, clients)`` from -1 to 1; 0 where either is not known.
    """
    there = known.bool()[None, :, None]
    middle = (tokens * there).sum(1, keepdim=True) / there.sum().clamp(min=1)
    apart = torch.nn.functional.normalize((tokens - middle) * there, dim=-1)
    return (apart @ apart.transpose(1, 2)).mean(0)
