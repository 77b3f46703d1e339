"""Which ranks matter, by hand."""

import pytest
import torch

from fedloom.aggregation import lora
from fedloom.aggregation.rank_choice import best_ranks, pruned_rank, rank_scores, tail_norm

A, B = "x.lora_A.weight", "x.lora_B.weight"


def tensor(*rows):
    return torch.tensor(rows)


BEFORE = {
    "m1.lora_A.weight": tensor([1.0, 1.0], [3.0, 4.0]),
    "m1.lora_B.weight": torch.ones(2, 2),
    "m2.lora_A.weight": tensor([2.0, 0.0], [0.0, 1.0]),
    "m2.lora_B.weight": torch.ones(2, 2),
}
CHANGES = {
    "m1.lora_B.weight": tensor([1.0, 0.0], [0.0, 0.1]),  # columns (1, 0) and (0, 0.1)
    "m2.lora_B.weight": tensor([0.0, 0.5], [0.2, 0.0]),  # columns (0, 0.2) and (0.5, 0)
}


def test_what_ranks_added_and_the_best_of_the_whole_model():
    """|dB| |A|: 1 sqrt(2) and 0.1 5; 0.2 2 and 0.5 1. After the first there is a tie of 0.5: the lower layer."""
    after = {name: t + CHANGES.get(name, 0.0) for name, t in BEFORE.items()}
    scores = rank_scores(BEFORE, after, lora.B)
    assert torch.allclose(scores, tensor([1.41421356, 0.5], [0.4, 0.5]).double(), atol=1e-6)
    exact = tensor([1.41421356, 0.5], [0.4, 0.5])
    assert best_ranks(exact, 2).tolist() == [[True, True], [False, False]]
    assert best_ranks(exact, 0).any() == False and best_ranks(exact, 4).all()  # noqa: E712
    by_change_alone = tensor([1.0, 0.1], [0.2, 0.5])
    assert best_ranks(by_change_alone, 2).tolist() == [[True, False], [False, True]]


def test_with_b_fixed_it_is_the_rows_of_a_that_count():
    before = {A: torch.ones(2, 2), B: tensor([3.0, 0.0], [4.0, 1.0])}
    after = {**before, A: tensor([1.0, 3.0], [2.0, 1.0])}
    assert rank_scores(before, after, lora.A).tolist() == [[10.0, 1.0]]


def test_a_tail_by_hand():
    """Rank 4, gamma 0.75: the tail is rank 3, with B[:, 3] = (0, 2) and A[3] = (1, 0)."""
    adapter = {A: torch.zeros(4, 2), B: torch.zeros(2, 4)}
    adapter[A][3, 0], adapter[B][1, 3] = 1.0, 2.0
    assert pruned_rank(4, 0.75, 1) == 3 and tail_norm(adapter, 3) == 2.0
    assert tail_norm(adapter, 4) == 0.0


@pytest.mark.parametrize(
    ("rank", "left"), [(2, 1), (4, 3), (8, 7), (16, 15), (64, 63), (128, 126), (1, 1)]
)
def test_of_the_papers_share_it_is_one_rank_a_round(rank, left):
    assert pruned_rank(rank, 0.99, 1) == left
    assert pruned_rank(rank, 1.0, 1) == rank
    assert pruned_rank(rank, 0.5, 200) == rank


def test_a_share_that_is_no_binary_fraction_loses_no_rank():
    assert 0.7 * 90 < 63 and pruned_rank(90, 0.7, 1) == 63
