"""What averaging LoRA's factors apart loses, and what stacking keeps, against dense products."""

import pytest
import torch

from fedloom.aggregation.lora import (
    averaging_error,
    corrected_mean,
    error_flops,
    nearest,
    norm,
    product_error,
    rank_of,
    residual,
    resized,
    stacked,
)
from fedloom.aggregation.means import weighted_mean


def adapters(count=3, rank=2, same_a=False):
    torch.manual_seed(0)
    shared = torch.randn(rank, 5)
    return [
        {
            "x.lora_A.weight": shared if same_a else torch.randn(rank, 5),
            "x.lora_B.weight": torch.randn(4, rank),
            "y.lora_A.weight": shared if same_a else torch.randn(rank, 5),
            "y.lora_B.weight": torch.randn(3, rank),
        }
        for _ in range(count)
    ]


def products(adapter):
    return [
        (adapter[f"{n}.lora_B.weight"].double() @ adapter[f"{n}.lora_A.weight"].double())
        for n in "xy"
    ]


def mean_of_products(some, weights):
    shares = [w / sum(weights) for w in weights]
    every = [products(adapter) for adapter in some]
    return [sum(p * own[i] for p, own in zip(shares, every, strict=True)) for i in (0, 1)]


def test_stacking_is_the_mean_of_products_and_averaging_is_not():
    some, weights = adapters(), [1.0, 3.0, 4.0]
    exact = mean_of_products(some, weights)
    for one, other in zip(products(stacked(some, [0.125, 0.375, 0.5])), exact, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    for one, other in zip(products(weighted_mean(some, weights)), exact, strict=True):
        assert not torch.allclose(one, other, atol=0.1)


def test_the_error_is_that_of_the_dense_products():
    some, weights = adapters(), [1.0, 3.0, 4.0]
    exact = mean_of_products(some, weights)
    plain = products(weighted_mean(some, weights))
    lost = sum((a - b).square().sum() for a, b in zip(plain, exact, strict=True)) ** 0.5
    whole = sum(a.square().sum() for a in exact) ** 0.5
    assert averaging_error(some, weights) == pytest.approx(float(lost / whole), rel=1e-6)


def test_one_client_or_one_a_for_all_loses_nothing():
    assert averaging_error(adapters(1), [2.0]) == pytest.approx(0.0, abs=1e-7)
    assert averaging_error(adapters(same_a=True), [1.0, 1.0, 2.0]) == pytest.approx(0.0, abs=1e-7)


def test_without_both_factors_or_with_a_mean_of_zero_there_is_no_such_number():
    assert averaging_error([{"w": torch.ones(2)}], [1.0]) is None
    assert averaging_error([{"x.lora_A.weight": torch.ones(1, 2)}], [1.0]) is None
    nothing = {"x.lora_A.weight": torch.ones(1, 2), "x.lora_B.weight": torch.zeros(2, 1)}
    assert averaging_error([nothing, nothing], [1.0, 1.0]) is None


def test_a_run_reports_it_by_round(experiment, federate):
    found = federate(
        experiment(federation={"rounds": 2, "clients": 3}, training={"learning_rate": 1e-2})
    )
    errors = [record.train["aggregation_error"] for record in found.records]
    assert all(0 < error < 1 for error in errors)
    exact = federate(experiment(method={"name": "ffa_lora"}))
    assert "aggregation_error" not in exact.records[-1].train


def test_where_it_takes_too_long_a_round_does_not_say(experiment, federate, monkeypatch):
    """32 clients of rank 2 beside matrices of 64 x 64: 2 (66 x 66 x 128) operations for the first layer."""
    wide = {"x.lora_A.weight": torch.ones(2, 64), "x.lora_B.weight": torch.ones(64, 2)}
    assert error_flops([wide] * 32) == 2 * 66 * 66 * 128
    assert error_flops([wide] * 33) == 2 * 64 * 66 * 64
    monkeypatch.setattr("fedloom.methods.contract.averaging.AFFORDABLE", 0.0)
    found = federate(experiment(federation={"rounds": 1, "clients": 3}))
    assert "aggregation_error" not in found.records[-1].train


def test_the_residual_is_what_averaging_loses():
    some, weights = adapters(), [1.0, 3.0, 4.0]
    rest = residual(some, weights)
    assert rank_of(rest) == 4 * 2
    exact = mean_of_products(some, weights)
    plain = products(weighted_mean(some, weights))
    for one, two, three in zip(plain, products(rest), exact, strict=True):
        assert torch.allclose(one + two, three, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_truncation_is_the_nearest_of_its_rank_and_holds_all_smaller_ones(rank):
    """The distance to the dense mean is what its singular values beyond the rank make (Eckart, Young)."""
    some = [*adapters(2, rank=2), *adapters(1, rank=3)]
    weights, shares = [1.0, 3.0, 4.0], [0.125, 0.375, 0.5]
    whole = nearest(stacked(some, shares), 4)
    found = products(resized(whole, rank))
    lost = total = 0.0
    for one, dense in zip(found, mean_of_products(some, weights), strict=True):
        beyond = torch.linalg.svdvals(dense)[rank:].square().sum()
        assert float((one - dense).square().sum()) == pytest.approx(float(beyond), abs=1e-6)
        lost, total = lost + float(beyond), total + float(dense.square().sum())
    error = product_error(resized(whole, rank), some, shares)
    assert error == pytest.approx((lost / total) ** 0.5, abs=1e-5)


def test_other_ranks_by_zeros_or_the_first_rows():
    (one,) = adapters(1)
    wider = resized(one, 5)
    assert rank_of(wider) == 5 and wider["x.lora_B.weight"].shape == (4, 5)
    for left, right in zip(products(wider), products(one), strict=True):
        assert torch.equal(left, right)
    assert all(torch.equal(t, one[name]) for name, t in resized(wider, 2).items())
    assert resized({**one, "head": torch.ones(3)}, 1)["head"].tolist() == [1.0, 1.0, 1.0]


def test_norms_are_those_of_products():
    (one,) = adapters(1)
    dense = sum(float(product.square().sum()) for product in products(one)) ** 0.5
    assert norm(one) == pytest.approx(dense, rel=1e-9)


FAIR = [
    {"x.lora_A.w": torch.tensor([[1.0, 0]]), "x.lora_B.w": torch.tensor([[1.0], [0]])},
    {"x.lora_A.w": torch.tensor([[1.0, 2]]), "x.lora_B.w": torch.tensor([[3.0], [2]])},
]
"""Mean A (1, 1), mean B (2, 1)^T, mean of products [[2, 3], [1, 2]]."""


@pytest.mark.parametrize(
    ("strength", "b", "left"),
    [(0.0, [2.5, 1.5], 1.0), (0.5, [2.4, 1.4], 1.0198039), (1e12, [2.0, 1.0], 1.41421356)],
)
def test_a_corrected_mean_by_hand(strength, b, left):
    found = corrected_mean(FAIR, [1, 1], strength)
    assert found["x.lora_A.w"].tolist() == [[1, 1]]
    assert found["x.lora_B.w"].flatten().tolist() == pytest.approx(b)
    whole = torch.tensor([[2.0, 3], [1, 2]])
    residual = whole - found["x.lora_B.w"] @ found["x.lora_A.w"]
    assert float(residual.norm()) == pytest.approx(left)


def test_a_correction_is_nothing_where_nothing_is_lost():
    same_a = [FAIR[0], {**FAIR[1], "x.lora_A.w": FAIR[0]["x.lora_A.w"]}]
    for adapters in (same_a, [FAIR[1]] * 3):
        found = corrected_mean(adapters, [1.0] * len(adapters), 0.0)
        mean = weighted_mean(adapters, [1.0] * len(adapters))
        assert all(torch.allclose(found[name], mean[name]) for name in mean)
    zero = [{**own, "x.lora_A.w": torch.zeros(1, 2)} for own in FAIR]  # no inverse is needed
    assert torch.isfinite(corrected_mean(zero, [1, 1], 0.0)["x.lora_B.w"]).all()
