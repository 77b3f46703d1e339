"""Pairs to single-answer feedback: kept on their client (KTOO) or dealt over the clients (KTOR).

Source: Spadea and Seneviratne 2025, "Federated Fine-Tuning of Large Language Models: Kahneman-Tversky
vs. Direct Preference Optimization", https://arxiv.org/abs/2502.14187. KTOR is the setting in which DPO
cannot be run: the two answers of a pair generally lie with two clients. The study's published code
discards its own redistribution; here all rows are pooled, shuffled and dealt back by every client's
number of rows, and how many pairs are still whole is counted, not assumed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedloom.data.examples import Example, Feedback, Preference, unpair
from fedloom.data.stored_rows import StoredRows

Rows = dict[int, list[Feedback]]
"""Feedback rows of each client."""


@dataclass(frozen=True)
class FeedbackPartition:
    """Who holds single answers, and what has become of the pairs.

    Attributes:
        rows: Feedback rows of each client; with data.streaming they stay in their files.
        pairs: Pairs that were unrolled.
        intact_share: Share of them whose two answers lie with one client; 0 without pairs.
        expected_intact_share: What dealing at random gives on average, for the same client sizes.
    """

    rows: Mapping[int, Sequence[Feedback] | StoredRows]
    pairs: int
    intact_share: float
    expected_intact_share: float


def partition_feedback(
    held: Mapping[int, Sequence[Example]], rng: np.random.Generator | None
) -> FeedbackPartition:
    """Unroll every client's pairs, and spread the answers over the clients if ``rng`` is given.

    Args:
        held: Training rows of each client: pairs, single answers, or both.
        rng: Draws who gets which answer (KTOR); ``None`` leaves them where they are (KTOO).
    """
    together = {client: _unrolled(rows) for client, rows in held.items()}
    rows = together if rng is None else spread(together, rng)
    pairs = {row.row for own in held.values() for row in own if isinstance(row, Preference)}
    whole = sum(
        number in pairs and count == 2
        for own in rows.values()
        for number, count in Counter(row.row for row in own).items()
    )
    share = whole / len(pairs) if pairs else 0.0
    return FeedbackPartition(rows, len(pairs), share, _expected(len(own) for own in rows.values()))


def undivided(held: Mapping[int, StoredRows]) -> FeedbackPartition:
    """Return what has become of single answers that were single answers in the data: nothing."""
    return FeedbackPartition(held, 0, 0.0, _expected(map(len, held.values())))


def spread(rows: Mapping[int, Sequence[Feedback]], rng: np.random.Generator) -> Rows:
    """Deal all rows anew; every client gets as many as it had, and every row is dealt once."""
    pool = [row for own in rows.values() for row in own]
    order = rng.permutation(len(pool))
    dealt: Rows = {}
    start = 0
    for client, own in rows.items():
        dealt[client] = [pool[i] for i in np.sort(order[start : start + len(own)])]
        start += len(own)
    return dealt


def _unrolled(rows: Sequence[Example]) -> list[Feedback]:
    single: list[Feedback] = []
    for row in rows:
        if isinstance(row, Preference):
            single += unpair([row])
        elif isinstance(row, Feedback):
            single.append(row)
    return single


def _expected(sizes: Iterable[int]) -> float:
    """Chance that two rows drawn without replacement lie with one client."""
    counts = list(sizes)
    total = sum(counts)
    return sum(n * (n - 1) for n in counts) / (total * (total - 1)) if total > 1 else 0.0
