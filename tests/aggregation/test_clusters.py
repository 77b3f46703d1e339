"""Distances of spans, silhouettes and groups, by hand."""

import math

import numpy as np
import pytest
import torch

from fedloom.aggregation.clusters import (
    average_linkage,
    balanced_groups,
    cosine_distances,
    median_distance,
    silhouette,
    silhouette_groups,
    spectral_groups,
    subspace_distances,
    subspace_distances_of,
)


def columns(*degrees):
    """One column of two numbers at an angle, by client."""
    return {
        client: [torch.tensor([[math.cos(math.radians(d))], [math.sin(math.radians(d))]])]
        for client, d in enumerate(degrees)
    }


def test_distances_are_those_of_spans():
    found = subspace_distances(columns(0, 60))
    assert found[0, 1] == pytest.approx(0.75)
    found = subspace_distances(columns(0, 10, 90, 80))
    assert found[0, 1] == pytest.approx(0.03015369)
    assert found[0, 2] == pytest.approx(1.0) and found[0, 3] == pytest.approx(0.96984631)
    assert median_distance(found) == pytest.approx(0.92643427, abs=1e-6)
    assert spectral_groups(found, 3) == [0, 0, 1, 1] == spectral_groups(found, 10)


def test_distances_are_means_over_layers():
    """Of 60 degrees in one layer 0.75, of none in the other 0."""
    one, other = columns(0, 60), columns(20, 20)
    both = {client: [*one[client], *other[client]] for client in one}
    assert subspace_distances(both)[0, 1] == pytest.approx(0.375)


def test_coordinates_and_signs_change_no_distance():
    torch.manual_seed(0)
    factors = {client: [torch.randn(6, 3), torch.randn(5, 3)] for client in range(4)}
    turn = torch.linalg.qr(torch.randn(3, 3))[0]
    turned = {client: [-own @ turn for own in factors[client]] for client in factors}
    assert np.allclose(subspace_distances(factors), subspace_distances(turned), atol=1e-6)


def test_silhouettes_by_hand():
    """1 - cos of (1, 0), (2, 1), (0, 1), (-1, 3); the best division is {1, 2}, {3, 4}."""
    rows = np.array([[1.0, 0], [2, 1], [0, 1], [-1, 3]])
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    distances = 1 - rows @ rows.T
    np.fill_diagonal(distances, 0.0)
    expected = {(0, 0, 1, 1): 0.91148716, (0, 0, 1, 2): 0.42586105, (0, 1, 2, 2): 0.46184946}
    for labels, value in expected.items():
        assert silhouette(distances, labels) == pytest.approx(value, abs=1e-7)
    assert average_linkage(distances, 2) == [0, 0, 1, 1]
    assert average_linkage(distances, 3) == [0, 1, 2, 2]


def test_a_silhouette_of_groups_of_three_by_hand():
    """0, 1, 2 and 10, 11, 12: 9.5 / 11, 9 / 10 and 7.5 / 9, and the same from the other side."""
    places = np.array([0.0, 1, 2, 10, 11, 12])
    found = silhouette(abs(places[:, None] - places), [0, 0, 0, 1, 1, 1])
    assert found == pytest.approx((9.5 / 11 + 0.9 + 7.5 / 9) / 3)


@pytest.mark.parametrize(("inside", "expected"), [(9.0, [0, 0, 1, 1]), (9.01, [0, 0, 0, 0])])
def test_a_silhouette_of_a_tenth_is_enough_to_divide(inside, expected):
    """Two pairs, 10 apart: (10 - 9) / 10 is just enough."""
    distances = np.full((4, 4), 10.0)
    distances[:2, :2] = distances[2:, 2:] = inside
    np.fill_diagonal(distances, 0.0)
    assert silhouette_groups(distances, 4) == expected
    assert spectral_groups(distances, 4) == expected


def test_the_best_number_of_groups_is_among_those_that_may_be():
    """Three pairs on a line; and a pair beside two that are as far from it as from each other."""
    places = np.array([0.0, 1, 10, 11, 40, 41])
    distances = abs(places[:, None] - places)
    assert silhouette_groups(distances, 2) == [0, 0, 0, 0, 1, 1]
    assert silhouette_groups(distances, 3) == silhouette_groups(distances, 6) == [0, 0, 1, 1, 2, 2]
    apart = np.ones((4, 4)) - np.eye(4)
    apart[0, 1] = apart[1, 0] = 0.1
    assert silhouette_groups(apart, 3) == silhouette_groups(apart, 9) == [0, 0, 1, 2]


def test_copies_of_one_client_are_one_group_and_so_are_few_or_alike_ones():
    torch.manual_seed(1)
    one = [torch.randn(8, 2)]
    assert spectral_groups(subspace_distances(dict.fromkeys(range(5), one)), 4) == [0] * 5
    assert spectral_groups(subspace_distances({0: one}), 4) == [0]
    assert spectral_groups(subspace_distances(columns(0, 90)), 4) == [0, 1]
    assert spectral_groups(subspace_distances(columns(0, 90)), 1) == [0, 0]
    wide = {client: [torch.randn(40, 2)] for client in range(6)}  # each as far from any other
    assert spectral_groups(subspace_distances(wide), 4) == [0] * 6


def test_two_groups_are_found_where_two_are_the_most():
    pairs = np.array([[0, 0.1, 1, 1], [0.1, 0, 1, 1], [1, 1, 0, 0.1], [1, 1, 0.1, 0]])
    assert spectral_groups(pairs, 2) == spectral_groups(pairs, 3) == [0, 0, 1, 1]
    assert spectral_groups(pairs, 1) == [0, 0, 0, 0]
    assert spectral_groups(pairs * 1e-9, 3) == [0, 0, 1, 1]
    assert spectral_groups(pairs * 9e-10, 3) == [0, 0, 0, 0]  # copies, but for rounding
    assert spectral_groups(np.array([[0, 0.6], [0.6, 0]]), 2) == [0, 1]
    assert spectral_groups(np.array([[0, 0.5], [0.5, 0]]), 2) == [0, 0]


@pytest.mark.parametrize(
    ("places", "most", "expected"),
    [
        ([(2, 6), (3, 6), (3, 4), (1, 2), (7, 5), (5, 4)], 4, [0, 0, 1, 1, 2, 2]),
        ([(6, 5), (4, 5), (4, 7)], 4, [0, 0, 0]),
        ([(0, 0), (1, 0), (5, 0)], 2, [0, 0, 1]),
    ],
)
def test_points_of_a_plane_are_divided_where_the_spectrum_has_its_gap(places, most, expected):
    points = np.array(places, np.float64)
    distances = np.linalg.norm(points[:, None] - points, axis=2) / 10
    assert spectral_groups(distances, most) == expected


def test_many_copies_hide_no_group():
    """Of 15 distances 10 are 0, and so is the median."""
    found = subspace_distances(columns(0, 0, 0, 0, 0, 90))
    assert median_distance(found) == 0.0 and spectral_groups(found, 4) == [0] * 5 + [1]
    assert spectral_groups(found * 1e-9, 4) == [0] * 5 + [1]
    assert median_distance(np.zeros((1, 1))) == 0.0


def test_linkage_of_one_and_of_two():
    assert average_linkage(np.zeros((1, 1)), 1) == [0]
    two = np.array([[0.0, 1.0], [1.0 + 1e-6, 0.0]])  # as rounding may leave it
    assert average_linkage(two, 1) == [0, 0] and average_linkage(two, 2) == [0, 1]


def test_distances_of_some_are_rows_of_all():
    factors = columns(0, 10, 90, 80)
    whole = subspace_distances(factors)
    found = subspace_distances_of(factors, (3, 1))
    assert list(found) == [1, 3]
    for client, row in found.items():
        assert row == {k: pytest.approx(whole[client, k]) for k in range(4) if k != client}


def test_balanced_groups_by_hand():
    """Three clients, two adapters, all prefer 0: quota 2, it takes the first two, the third goes to 1."""
    alike = dict.fromkeys(range(3), (0.1, 0.2))
    assert balanced_groups(alike, [0, 1, 2]) == {0: 0, 1: 0, 2: 1}
    assert balanced_groups(alike, [2, 1, 0]) == {2: 0, 1: 0, 0: 1}
    assert balanced_groups({}, []) == {}


def test_of_groups_that_are_named_as_often_the_lower_one_is_closed_first():
    """Four for 0 and four for 1, three at a time: who is left over goes to 1 before the last go to 2."""
    losses = {client: (0.1, 0.2, 0.3) if client < 4 else (0.2, 0.1, 0.3) for client in range(8)}
    found = balanced_groups(losses, list(range(8)))
    assert found == {0: 0, 1: 0, 2: 0, 3: 1, 4: 1, 5: 1, 6: 2, 7: 2}


@pytest.mark.parametrize("clients", [1, 2, 7, 10])
@pytest.mark.parametrize("groups", [1, 3, 5])
def test_balanced_groups_are_within_one_of_each_other(clients, groups):
    drawn = np.random.default_rng(clients).random((clients, groups))
    found = balanced_groups(dict(enumerate(drawn.tolist())), list(range(clients)))
    sizes = [list(found.values()).count(group) for group in range(groups)]
    assert found.keys() == set(range(clients)) and max(sizes) - min(sizes) <= 1


def test_cosine_distances_and_the_best_silhouette_by_hand():
    """B vectors (1, 0), (2, 1), (0, 1), (-1, 3)."""
    vectors = [(1.0, 0.0), (2.0, 1.0), (0.0, 1.0), (-1.0, 3.0)]
    found = cosine_distances({c: [torch.tensor([v])] for c, v in enumerate(vectors)})
    expected = {(0, 1): 0.10557281, (0, 2): 1.0, (0, 3): 1.31622777, (1, 2): 0.5527864,
                (1, 3): 0.85857864, (2, 3): 0.0513167}  # fmt: skip
    for (i, j), distance in expected.items():
        assert found[i, j] == found[j, i] == pytest.approx(distance)
    assert silhouette(found, [0, 0, 1, 1]) == pytest.approx(0.91148716)
    assert silhouette(found, [0, 0, 1, 2]) == pytest.approx(0.42586105)
    assert silhouette(found, [0, 1, 2, 2]) == pytest.approx(0.46184946)
    assert silhouette_groups(found, 4) == [0, 0, 1, 1]


def test_copies_of_one_client_are_one_group():
    copies = cosine_distances({c: [torch.ones(2, 2)] for c in range(5)})
    assert silhouette_groups(copies, 4) == [0] * 5
    assert silhouette_groups(copies[:2, :2], 4) == [0, 0] and silhouette_groups(
        copies[:1, :1], 4
    ) == [0]
    zeros = cosine_distances({0: [torch.zeros(2)], 1: [torch.ones(2)]})
    assert zeros[0, 1] == 1
    short = cosine_distances(
        {c: [torch.tensor(v)] for c, v in enumerate([(0.1, 0.0), (0.3, 0.0), (0.0, 0.2)])}
    )
    assert short[0] == pytest.approx([0, 0, 1])
