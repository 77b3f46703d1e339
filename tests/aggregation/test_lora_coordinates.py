"""Rotations, orthonormal rows and what is beyond a rank, by hand."""

import math

import pytest
import torch

from fedloom.aggregation import lora
from fedloom.aggregation.lora import nearest
from fedloom.aggregation.lora_coordinates import (
    left_vectors,
    orthonormal,
    orthonormal_b,
    rotated,
    rotation,
    rotation_flops,
    with_rest,
)
from fedloom.aggregation.means import weighted_mean

A, B = "x.lora_A.weight", "x.lora_B.weight"


def tensor(*rows):
    return torch.tensor(rows)


def pair(down, up):
    return {A: torch.as_tensor(down), B: torch.as_tensor(up)}


def turned(degrees):
    """The identity as B A, in coordinates that are turned."""
    angle = math.radians(degrees)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return pair(turn.T.contiguous(), turn)


def product(adapter):
    return adapter[B] @ adapter[A]


IDENTITY = pair(torch.eye(2), torch.eye(2))


@pytest.mark.parametrize(
    ("degrees", "share", "expected"),
    [
        (
            90,
            0.0,
            0.5,
        ),  # FedAvg: mean factors (I + R) / 2 and (I + R^T) / 2, of which the product is I / 2
        (90, 0.5, 0.85355339),  # 45 degrees are left: cos(22.5 degrees) squared
        (90, None, 1.0),
        (179.99, 0.5, 0.5),  # 90 degrees are left
        (180, None, 1.0),
    ],
)
def test_a_turned_client_no_longer_cancels_the_other(degrees, share, expected):
    for factor in (lora.A, lora.B):
        own = rotated(turned(degrees), IDENTITY, factor, share)
        mean = weighted_mean([IDENTITY, own], [1.0, 1.0])
        assert torch.allclose(product(mean), expected * torch.eye(2), atol=1e-4)


def test_the_best_rotation_by_hand():
    """M = A A_ref^T = [[0, 2], [-1, 0]] = U S V^T with S = (2, 1): R = U V^T = [[0, 1], [-1, 0]]."""
    own = pair(tensor([0.0, 2.0], [-1.0, 0.0]), tensor([0.0, 1.0], [1.0, 0.0]))
    assert rotation(own[A].double()).tolist() == [[0.0, 1.0], [-1.0, 0.0]]
    found = rotated(own, IDENTITY, lora.A, None)
    assert torch.allclose(found[A], torch.diag(tensor(1.0, 2.0)), atol=1e-6)
    assert torch.allclose(found[B], torch.diag(tensor(-1.0, 1.0)), atol=1e-6)
    assert torch.allclose(product(found), torch.diag(tensor(-1.0, 2.0)), atol=1e-6)


def test_only_a_reflection_undoes_the_change_of_one_sign():
    flipped = pair(torch.diag(tensor(1.0, -1.0)), torch.diag(tensor(1.0, -1.0)))
    means = {
        share: product(
            weighted_mean([IDENTITY, rotated(flipped, IDENTITY, lora.A, share)], [1.0, 1.0])
        )
        for share in (0.0, 1.0, None)
    }
    assert torch.allclose(means[0.0], torch.diag(tensor(1.0, 0.0)), atol=1e-6)
    assert not torch.allclose(means[1.0], torch.eye(2), atol=0.1)
    assert torch.allclose(means[None], torch.eye(2), atol=1e-6)


def test_orthonormal_rows_by_hand():
    """B = ([[1, 0], [0, 2]] + [[3, 0], [2, 0]]) / 2 = [[2, 0], [1, 1]], A = [[1, 1], [0, 1]]: the product
    [[2, 2], [1, 2]] has the singular values 3.56155281 and 0.56155281."""
    found = orthonormal(pair(tensor([1.0, 1.0], [0.0, 1.0]), tensor([2.0, 0.0], [1.0, 1.0])))
    rows = tensor([0.61541221, 0.78820544], [0.78820544, -0.61541221])
    signs = torch.sign(found[A][:, :1])
    assert torch.allclose(signs * found[A], rows, atol=1e-6)
    assert torch.allclose(found[A] @ found[A].T, torch.eye(2), atol=1e-6)
    values = tensor(3.56155281, 0.56155281)
    assert torch.allclose(found[B].T @ found[B], torch.diag(values**2), atol=1e-5)
    assert torch.allclose(product(found), tensor([2.0, 2.0], [1.0, 2.0]), atol=1e-6)


def test_where_b_is_zero_or_of_a_smaller_rank_a_keeps_its_row_space():
    fresh = pair(tensor([1.0, 2.0, 0.0], [0.0, 1.0, 0.0]), torch.zeros(3, 2))
    assert all(torch.equal(t, fresh[name]) for name, t in orthonormal(fresh).items())
    low = pair(torch.eye(2, 3), tensor([1.0, 0.0], [2.0, 0.0], [0.0, 0.0]))
    found = orthonormal(low)
    assert torch.allclose(found[A] @ found[A].T, torch.eye(2), atol=1e-6)
    assert not found[A][:, 2].any()
    assert torch.allclose(product(found), product(low), atol=1e-6)


@pytest.mark.parametrize(("kept", "rest"), [(0.9, 0.0), (0.9999, 1.0), (0.0, 0.0)])
def test_what_is_beyond_the_rank_by_hand(kept, rest):
    """diag(3, 2, 1): of the squares' sum 14 two values have 0.92857143; three have all of it."""
    whole = pair(torch.diag(tensor(3.0, 2.0, 1.0)), torch.eye(3))
    before = pair(torch.eye(2, 3), torch.zeros(3, 2))
    adapter, factors = with_rest(whole, 2, kept, before)
    assert torch.allclose(product(factors), torch.diag(tensor(0.0, 0.0, rest)), atol=1e-6)
    plain = nearest(whole, 2, before)
    assert all(torch.equal(adapter[name], plain[name]) for name in plain)
    roots = torch.diag(tensor(3.0, 2.0))
    assert torch.allclose(adapter[A] @ adapter[A].T, roots, atol=1e-6)
    assert torch.allclose(adapter[B].T @ adapter[B], roots, atol=1e-6)


@pytest.mark.parametrize(
    ("overlap", "expected"), [((3.0, 2.0, -1.0), (1, 1, 1)), ((-3.0, 2.0, 1.0), (-1, 1, -1))]
)
def test_a_reflection_is_turned_over_where_least_is_lost(overlap, expected):
    found = rotation(torch.diag(torch.tensor(overlap).double()), 1.0)
    assert torch.allclose(found, torch.diag(torch.tensor(expected).double()), atol=1e-12)


def test_operations_of_a_rotation():
    """A is 2 x 5, B 3 x 2: overlap and turned A 2 x 2 x 2 x 5 each, turned B 2 x 2 x 2 x 3."""
    assert rotation_flops(pair(torch.ones(2, 5), torch.ones(3, 2))) == 40 + 40 + 24


@pytest.mark.parametrize("first", [0.5, -0.5])
@pytest.mark.parametrize("second", [0.25, -0.25])
def test_orthonormal_rows_point_along_those_there_were(first, second):
    found = orthonormal(pair(torch.diag(tensor(first, second)), torch.diag(tensor(4.0, 2.0))))
    signs = torch.diag(tensor(first, second)).sign()
    assert torch.allclose(found[A], signs, atol=1e-6)
    assert torch.allclose(found[B], torch.diag(tensor(2.0, 0.5)), atol=1e-6)


@pytest.mark.parametrize(("rank", "kept"), [(1, (3.0, 0.0)), (2, (3.0, 2.0)), (4, (3.0, 2.0))])
def test_orthonormal_columns_of_the_nearest_of_a_rank(rank, kept):
    found = orthonormal_b(pair(torch.diag(tensor(3.0, 1.0)), torch.diag(tensor(1.0, 2.0))), rank)
    assert found[A].shape == (rank, 2) and found[B].shape == (2, rank)
    assert torch.allclose(product(found), torch.diag(torch.tensor(kept)), atol=1e-6)
    ones = torch.diag((torch.arange(rank) < 2).float())
    assert torch.allclose(found[B].T @ found[B], ones, atol=1e-6)
    assert not found[A][2:].any()


def test_left_vectors_are_as_many_as_the_factor_has_columns():
    found = left_vectors(tensor([0.0, 2.0], [1.0, 0.0], [0.0, 0.0]))
    assert torch.allclose(found.abs(), tensor([1.0, 0.0], [0.0, 1.0], [0.0, 0.0]).double())


def test_what_is_beyond_the_rank_in_layers_of_different_ranks():
    """Beyond the first of 0.3, 0.2, 0.1 are two, of 0.3 alone none, of zeros none."""
    names = {layer: (f"{layer}.lora_A.w", f"{layer}.lora_B.w") for layer in "xyz"}
    diagonals = {"x": (0.3, 0.2, 0.1), "y": (0.3, 0.0, 0.0), "z": (0.0, 0.0, 0.0)}
    whole, before = {}, {}
    for layer, (a, b) in names.items():
        whole |= {a: torch.eye(3), b: torch.diag(torch.tensor(diagonals[layer]))}
        before |= {a: torch.eye(1, 3), b: torch.zeros(3, 1)}
    adapter, rest = with_rest(whole, 1, 1 - 1e-9, before)
    for layer, (a, b) in names.items():
        first, *others = diagonals[layer]
        assert rest[a].shape == (2, 3) and rest[b].shape == (3, 2)
        assert torch.allclose(rest[b] @ rest[a], torch.diag(tensor(0.0, *others)), atol=1e-6)
        assert torch.allclose(rest[b].T @ rest[b], rest[a] @ rest[a].T, atol=1e-6)
        assert torch.allclose(adapter[b] @ adapter[a], torch.diag(tensor(first, 0, 0)), atol=1e-6)
    _, none = with_rest(whole, 3, 1 - 1e-9, {**whole})
    assert all(1 in tensor.shape and not tensor.any() for tensor in none.values())
    _, half = with_rest(whole, 1, 9 / 14, before)
    assert all(1 in tensor.shape for tensor in half.values())  # 0.3 alone has 9 of 14 parts
