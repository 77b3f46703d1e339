"""Experts choose clients: the optimum, against brute force and an integer solver; limits; speed."""

import itertools
import time

import numpy as np
import pytest
import torch
from scipy.optimize import Bounds, LinearConstraint, milp

from fedloom.aggregation.assignment import (
    assign_experts,
    infeasible,
    most_by_rows,
    nearest_limits,
    relevance_of,
    similarity,
    softmax,
)


def best_by_force(relevance, k, most, least):
    """Try every way in which each of 4 experts has k of 4 clients."""
    rows = [np.isin(range(4), chosen) for chosen in itertools.combinations(range(4), k)]
    best = -np.inf
    for choice in itertools.product(rows, repeat=4):
        held = np.array(choice)
        counts = held.sum(0)
        if counts.min() >= least and counts.max() <= most:
            best = max(best, float((relevance * held).sum()))
    return best


@pytest.mark.parametrize(
    ("k", "most", "least"), [(2, 2, 2), (2, 3, 1), (2, 4, 2), (3, 4, 2), (1, 2, 0)]
)
def test_every_small_case_is_solved_exactly(k, most, least):
    for seed in range(40):  # 200 cases in all
        relevance = np.random.default_rng(seed).random((4, 4))
        held = assign_experts(relevance, k, most, least)
        assert (held.sum(1) == k).all() and held.sum(0).min() >= least and held.sum(0).max() <= most
        expected = best_by_force(relevance, k, most, least)
        assert (relevance * held).sum() == pytest.approx(expected, abs=1e-9)


def test_embeddings_as_large_as_are_let_in_give_an_assignment():
    """A client may send embeddings up to admission.max_value; r is 64 at most in practice, 4096 here."""
    tokens, experts = torch.full((4, 4096), 1e-3), torch.full((4, 4096), 1e-3)
    tokens[2], experts[1] = 1e6, -1e6
    shares = softmax(relevance_of(experts, tokens))
    assert np.isfinite(shares).all() and np.allclose(shares.sum(1), 1)
    held = assign_experts(shares, 2, 4, 1)
    assert (held.sum(1) == 2).all() and held.sum(0).min() >= 1
    assert torch.isfinite(similarity(tokens[None], torch.ones(4))).all()


def best_by_integers(relevance, k, most, least):
    experts, clients = relevance.shape
    placed = np.kron(np.eye(experts), np.ones((1, clients)))
    held = np.kron(np.ones((1, experts)), np.eye(clients))
    found = milp(
        -relevance.ravel(),
        constraints=[LinearConstraint(placed, k, k), LinearConstraint(held, least, most)],
        integrality=np.ones(relevance.size),
        bounds=Bounds(0, 1),
    )
    return -found.fun


@pytest.mark.parametrize("seed", range(3))
def test_thirty_experts_and_fifty_clients_as_an_integer_solver_has_it(seed):
    relevance = np.random.default_rng(seed).random((30, 50))
    held = assign_experts(relevance, 4, 8)
    expected = best_by_integers(relevance, 4, 8, 2)
    assert (relevance * held).sum() == pytest.approx(expected, abs=1e-7)
    assert (held.sum(1) == 4).all() and held.sum(0).min() >= 2 and held.sum(0).max() <= 8


def test_thirty_experts_and_fifty_clients_in_fifty_milliseconds():
    relevance = np.random.default_rng(0).random((30, 50))
    times = []
    for _ in range(7):
        start = time.perf_counter()
        assign_experts(relevance, 4, 8)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05


def test_equal_relevances_still_give_whole_numbers():
    held = assign_experts(np.ones((6, 5)), 2, 4)
    assert (held.sum(1) == 2).all() and held.sum(0).min() >= 2


@pytest.mark.parametrize(
    ("sizes", "limits", "violated"),
    [
        ((4, 3), (4, 8, 2), "clients_per_expert <= clients: 4 > 3"),
        ((6, 3), (2, 1, 2), "min_experts_per_client <= max_experts_per_client: 2 > 1"),
        ((1, 1), (1, 8, 2), "min_experts_per_client <= experts: 2 > 1"),
        ((30, 50), (2, 8, 2), "min_experts_per_client * clients <= experts * clients_per_expert"),
        ((30, 4), (3, 8, 2), "experts * clients_per_expert <= max_experts_per_client * clients"),
    ],
)
def test_each_inequality_is_named(sizes, limits, violated):
    assert any(violated in text for text in infeasible(*sizes, *limits))
    with pytest.raises(ValueError, match="no assignment keeps"):
        assign_experts(np.ones(sizes), *limits)


def test_whatever_the_inequalities_allow_has_an_assignment():
    rng = np.random.default_rng(0)
    allowed = 0
    for _ in range(300):
        experts, clients, k, most, least = (int(rng.integers(1, top)) for top in (9, 9, 6, 9, 4))
        possible = not infeasible(experts, clients, k, most, least)
        allowed += possible
        if possible:
            held = assign_experts(rng.random((experts, clients)), k, most, least)
            assert (held.sum(1) == k).all()
            assert held.sum(0).min() >= least and held.sum(0).max() <= most
    assert 30 < allowed < 270


def test_relevances_that_are_not_finite():
    relevance = np.ones((4, 4))
    relevance[1, 2] = np.nan
    with pytest.raises(ValueError, match="1 relevances are not finite"):
        assign_experts(relevance, 2, 4)


def test_similarity_by_hand():
    # around their mean (1, 1): (1, 0), (-1, 0) and, not known, a client far off
    tokens = torch.tensor([[[2.0, 1.0], [0.0, 1.0], [9.0, 9.0]]])
    found = similarity(tokens, torch.tensor([1, 1, 0]))
    assert torch.allclose(found, torch.tensor([[1.0, -1, 0], [-1, 1, 0], [0, 0, 0]]))
    assert not similarity(tokens, torch.zeros(3)).any()


def test_numbers_of_experts_follow_rows_by_hand():
    """12 placements. Rows 10, 20, 30: shares 2, 4 and 6. Rows 1, 1, 58: 0.2, 0.2 and 11.6, at least 2 and
    at most 5, which leaves 3 places: they go, one by one, to the first and the second, who are equal."""
    assert most_by_rows([10, 20, 30], 6, 2, 6, 2) == [2, 4, 6]
    assert most_by_rows([1, 1, 58], 6, 2, 5, 2) == [4, 3, 5]
    assert most_by_rows([0, 0, 0], 6, 2, 4, 2) == [4, 4, 4]  # nobody has told of any


def test_largest_numbers_of_each_client_can_always_be_kept():
    rng = np.random.default_rng(0)
    for _ in range(40):
        experts, clients = (int(own) for own in rng.integers(2, 9, 2))
        holders = int(rng.integers(1, clients + 1))
        most, least = int(rng.integers(1, experts + 1)), int(rng.integers(0, 3))
        if infeasible(experts, clients, holders, most, least):
            continue
        rows = rng.integers(0, 100, clients).tolist()
        largest = most_by_rows(rows, experts, holders, most, least)
        held = assign_experts(rng.random((experts, clients)), holders, largest, least)
        assert (held.sum(1) == holders).all() and (held.sum(0) >= least).all()
        assert (held.sum(0) <= largest).all() and max(largest) <= most
        ordered = sorted(zip(rows, largest, strict=True))
        assert all(one[1] <= other[1] + 1 for one, other in itertools.pairwise(ordered))


def test_limits_that_can_just_be_kept_are_kept():
    """Each of both clients holds all three experts: every inequality is an equality."""
    assert infeasible(3, 2, 2, 3, 3) == [] and assign_experts(np.ones((3, 2)), 2, 3, 3).all()
    assert infeasible(1, 1, 1, 8) != [] and infeasible(2, 1, 1, 8) == []  # two at least by default


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ((6, 4, 2, 4, 2), (2, 4, 2)),  # 12 placements among 4: as asked for
        ((6, 2, 3, 4, 2), (2, 6, 2)),  # both hold all
        ((2, 4, 1, 8), (1, 8, 0)),  # 2 placements are none for some
        ((5, 3, 2, 3, 4), (2, 4, 3)),  # 10 among 3: 4 at most, 3 at least
    ],
)
def test_limits_that_fewer_clients_can_keep(asked, found):
    assert nearest_limits(*asked) == found


def test_one_row_in_all_is_the_share_of_its_client():
    assert most_by_rows([1, 0], 4, 1, 4, 0) == [4, 0]
    assert most_by_rows([3, 3], 5, 1, 3) == [3, 3]  # two at least by default, and shares of 2.5


def test_relevance_and_its_softmax_by_hand():
    """<u, t> / sqrt(4); e^0 to e^ln 3 is 1 to 3, whatever is added to a row."""
    experts, tokens = (
        torch.tensor([[2.0, 0, 0, 1]]),
        torch.tensor([[3.0, 0, 0, 2], [0, 9.0, 0, -2]]),
    )
    assert relevance_of(experts, tokens).tolist() == [[4.0, -1.0]]
    rows = np.array([[0.0, np.log(3)], [700.0, 700.0 - np.log(3)]])
    assert softmax(rows) == pytest.approx(np.array([[0.25, 0.75], [0.75, 0.25]]))


def test_similarity_is_a_mean_over_layers_and_around_the_mean_of_known_clients():
    """Alike in one of two layers and opposed in the other; then around (0.5, 0.5), at right angles to none."""
    layers = torch.tensor([[[1.0, 0], [3, 0], [1, 0], [3, 0]], [[0.0, 1], [0, 3], [0, 3], [0, 1]]])
    found = similarity(layers, torch.ones(4))
    assert found[0].tolist() == pytest.approx([1, -1, 0, 0], abs=1e-6)
