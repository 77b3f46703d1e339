"""Rotations, orthonormal rows and what is beyond a rank, by hand."""

import math

import pytest
import torch

from fedloom.aggregation import lora
from fedloom.aggregation.lora import nearest
from fedloom.aggregation.lora_coordinates import orthonormal, rotated, rotation, with_rest
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
