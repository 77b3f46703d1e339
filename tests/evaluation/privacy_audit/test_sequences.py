"""The sequence test on a causal layer whose inputs are worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fedloom.evaluation.privacy_audit.sequences import (
    MOST_TOKENS,
    Row,
    compare_rows,
    recover_rows,
    rouge,
)
from fedloom.evaluation.privacy_audit.span import row_space

WIDTH = 48
EMBEDDINGS = torch.randn(30, WIDTH, generator=torch.Generator().manual_seed(0)).double()


def read(beginnings: Sequence[Row]) -> Tensor:
    """Return what a causal layer reads: embeddings, each turned and halved by how far back it is."""
    embedded = EMBEDDINGS[torch.tensor(beginnings)]
    count = embedded.shape[1]
    turned = [torch.roll(embedded[:, -1 - n], 5 * n, dims=1) / 2**n for n in range(count)]
    return torch.tanh(sum(turned[1:], turned[0]))


def update_of(rows: Sequence[Row]) -> Tensor:
    """Return ``(40, width)`` the gradient of a layer that read these rows up to their last tokens."""
    places = [own[:n] for own in rows for n in range(1, len(own))]
    inputs = torch.cat([read([own]) for own in places])
    outward = torch.randn(40, len(inputs), generator=torch.Generator().manual_seed(1)).double()
    return outward @ inputs


ROWS = [(3, 7, 7, 1, 9, 4), (3, 8, 2, 5), (11, 3, 7, 2, 6, 8, 10)]


def test_rows_are_put_together_from_their_tokens() -> None:
    """Three rows of shared tokens in one update, among six tokens of none: exactly these."""
    tokens = sorted({token for own in ROWS for token in own} | {20, 21, 22, 23, 24, 25})
    found = recover_rows(tokens, row_space(update_of(ROWS)), read, longest=16)
    assert found == sorted((own[:-1] for own in ROWS), key=lambda own: -len(own))
    compared = compare_rows(found, [own[:-1] for own in ROWS])
    assert (compared.rows, compared.candidates, compared.exact, compared.share) == (3, 3, 3, 1.0)
    assert compared.rouge == {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0}
    short = recover_rows(tokens, row_space(update_of(ROWS)), read, longest=4)
    assert {len(own) for own in short} <= {2, 3, 4} and (11, 3, 7, 2) in short


def test_rows_whose_last_tokens_are_told_are_compared_whole() -> None:
    """Of a classifier: the row is recovered with its last token, and without it it is not."""
    assert compare_rows([(1, 2, 3, 4)], [(1, 2, 3, 4)]).exact == 1
    assert compare_rows([(1, 2, 3)], [(1, 2, 3, 4)]).exact == 0


def test_noise_hides_rows() -> None:
    """With noise as large as the update nothing is near, and the rank is at its limit or wrong."""
    update = update_of(ROWS)
    noise = torch.randn(update.shape, generator=torch.Generator().manual_seed(2)).double()
    space = row_space(update + noise * update.std(), rounding=float(update.std()))
    tokens = sorted({token for own in ROWS for token in own})
    found = recover_rows(tokens, space, read, longest=7)
    assert compare_rows(found, [own[:-1] for own in ROWS]).exact == 0


def test_bounds_are_refused() -> None:
    """Too many tokens, or a rank at its limit."""
    space = row_space(update_of(ROWS))
    with pytest.raises(ValueError, match="129 tokens"):
        recover_rows(range(MOST_TOKENS + 1), space, read, longest=3)
    full = row_space(torch.eye(WIDTH).double())
    with pytest.raises(ValueError, match="rank 48 of 48"):
        recover_rows([1, 2], full, read, longest=3)


def test_overlaps_by_hand() -> None:
    """Found (1, 2, 3) for (1, 2, 4, 3): three of three and four tokens, F = 2 * 1 * .75 / 1.75 = 6/7.

    Pairs: 12 is shared, of 2 and 3, F = 2 * (1/2 * 1/3) / (5/6) = 2/5. In order: 1, 2, 3, so 6/7. A row
    of which nothing is found has 0, and the mean is half.
    """
    found = rouge([(1, 2, 3)], [(1, 2, 4, 3), (7, 8)])
    assert found is not None
    assert found["rouge1"] == found["rougeL"] == pytest.approx(3 / 7)
    assert found["rouge2"] == pytest.approx(1 / 5)
    assert rouge([], []) == {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}
    assert compare_rows([], []).share == 0.0
