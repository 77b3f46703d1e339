"""Which rows a client trained on, read from its update: the sequence test of DAGER.

What the second block's attention reads at a place depends, in a causal model, on the tokens up to there
alone. So once the tokens of a step are known, a beginning of a row can be tested as a token is: it is one
if what is read at its last place lies in the span of the update's rows. Beginnings are made longer, token
by token, until none is left (Petrov et al. 2024, https://arxiv.org/abs/2405.15586, algorithm 1, the
greedy variant for decoders).

What ROUGE compares here are token ids, so that no text of a row is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from fedloom.evaluation.privacy_audit.span import RowSpace, distances

Row = tuple[int, ...]

Read = Callable[[Sequence[Row]], Tensor]
"""From beginnings of one length, ``(n, columns)`` what the layer reads at the last place of each."""

NEAR, NEAR_READ_BACK = 5e-3, 2e-2
"""Distances up to which a beginning is taken for one of a row: of a step's gradient in float32, of which
rows are at most 1e-3 away, and of one that was read back from Adam's step, 2e-2. Others are mostly from
3e-2 on."""

MOST_KEPT = 32
"""Beginnings that are made longer at a time, the nearest; where more are near at two places in a row, the
space tells rows from nothing."""

MOST_READ = 20_000
"""Beginnings that are read for an update."""

MOST_TOKENS = 128
"""Distinct tokens of which rows are made: every beginning is tried with each of them."""

ROUGE = ("rouge1", "rouge2", "rougeL")
"""Lin 2004's overlaps, as the library rouge-score computes them: of tokens, of pairs, in order."""


def recover_rows(
    tokens: Sequence[int], space: RowSpace, read: Read, longest: int, near: float = NEAR
) -> list[Row]:
    """Return the rows that an update allows, longest first.

    At its first place a token attends to itself alone, so that queries and keys tell nothing of it:
    every token is taken for a first one, and the test begins with the second. What is read of a token
    that is repeated from the first place on is the same at each place: such beginnings, which no update
    tells apart, are left out.

    Args:
        tokens: Distinct ids that rows are made of, at most :data:`MOST_TOKENS`.
        space: Of the rows of an update of a layer of the second block, exact.
        read: What that layer reads.
        longest: Tokens of a row at most. Where tokens are predicted a row's last one is none of an
            update, as nothing is predicted from it; where a class is, it is one.
        near: Largest distance of what is read to the space, as a share of its length.

    Raises:
        ValueError: There are more tokens, or the space is not exact.
    """
    if len(tokens) > MOST_TOKENS or not space.is_exact:
        raise ValueError(f"{len(tokens)} tokens, rank {space.rank} of {space.limit}")
    directions = space.directions[: space.rank]
    beginnings: list[Row] = [(token,) for token in sorted(set(tokens))]
    found: list[Row] = []
    read_so_far, full = 0, 0
    for _ in range(1, longest):
        longer = [(*own, token) for own in beginnings for token in sorted(set(tokens))]
        longer = [own for own in longer if len(set(own)) > 1]
        read_so_far += len(longer)
        if not longer or read_so_far > MOST_READ:
            break
        apart = distances(read(longer), directions)
        order = torch.sort(apart, stable=True).indices[:MOST_KEPT].tolist()
        kept = [longer[i] for i in order if float(apart[i]) <= near]
        full = full + 1 if len(kept) == MOST_KEPT else 0
        if full == 2:
            return []
        going_on = {own[:-1] for own in kept}
        found += [own for own in beginnings if len(own) > 1 and own not in going_on]
        beginnings = kept
        if not kept:
            break
    return sorted([*found, *(own for own in beginnings if len(own) > 1)], key=lambda own: -len(own))


@dataclass(frozen=True)
class RowRecovery:
    """What an update tells of whole rows.

    Attributes:
        rows: Distinct rows that were trained on.
        candidates: Rows that were made of what the update tells.
        exact: Rows that are one of these, token by token.
        rouge: By name, the mean over the rows of the best F-measure, 0 to 1; ``None`` where the library
            is not installed.
    """

    rows: int
    candidates: int
    exact: int
    rouge: dict[str, float] | None

    @property
    def share(self) -> float:
        """Share of the rows that were recovered."""
        return self.exact / self.rows if self.rows else 0.0


def compare_rows(found: Sequence[Row], trained: Sequence[Row]) -> RowRecovery:
    """Compare recovered rows with those that were trained on.

    Args:
        found: As :func:`recover_rows` returns them.
        trained: Rows, up to the last token from which one is predicted, whole where a class is; those of
            one token are left out, as :func:`recover_rows` looks for none.
    """
    wanted = sorted({own for own in trained if len(own) > 1})
    known = set(found)
    return RowRecovery(
        len(wanted), len(found), sum(own in known for own in wanted), rouge(found, wanted)
    )


def rouge(found: Sequence[Row], wanted: Sequence[Row]) -> dict[str, float] | None:
    """Return by name the mean over ``wanted`` of the best F-measure that one of ``found`` has."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from rouge_score.tokenizers import Tokenizer
    except ImportError:
        return None

    class Ids(Tokenizer):  # type: ignore[misc]
        """Takes ids, separated by spaces, for words."""

        def tokenize(self, text: str) -> list[str]:
            return text.split()

    scorer = RougeScorer(list(ROUGE), tokenizer=Ids())
    texts = [" ".join(map(str, own)) for own in found]
    best = [
        {
            name: max((float(scorer.score(row, own)[name].fmeasure) for own in texts), default=0.0)
            for name in ROUGE
        }
        for row in (" ".join(map(str, own)) for own in wanted)
    ]
    return {name: fmean(own[name] for own in best) if best else 0.0 for name in ROUGE}
