"""What averaging LoRA's factors apart loses, and what stacking keeps, against dense products."""

import pytest
import torch

from fedloom.aggregation.lora import (
    averaging_error,
    corrected_mean,
    error_flops,
    nearest,
    norm,
    only_factors,
    part_of_ranks,
    product_error,
    rank_in_use,
    rank_of,
    residual,
    resized,
    slices,
    stacked,
    without_factors,
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


def test_slices_of_ranks_and_who_holds_them():
    assert slices([2, 4, 4], 5) == [(0, 2, (0, 1, 2)), (2, 4, (1, 2)), (4, 5, ())]
    assert slices([3, 1], 3) == [(0, 1, (0, 1)), (1, 3, (0,))]


def test_parts_of_an_adapter():
    (one,) = adapters(1, rank=3)
    own = {**one, "head": torch.ones(2)}
    part = part_of_ranks(own, 1, 3)
    assert part.keys() == one.keys() == only_factors(own).keys()
    assert torch.equal(part["x.lora_A.weight"], one["x.lora_A.weight"][1:])
    assert torch.equal(part["y.lora_B.weight"], one["y.lora_B.weight"][:, 1:])
    assert without_factors(own).keys() == {"head"}


@pytest.mark.parametrize(("second", "rank"), [(1e-6, 1.5), (1e-8, 1.0), (0.0, 1.0)])
def test_ranks_in_use_are_those_that_float32_can_tell_from_zero(second, rank):
    """In one layer 4 and a second value, beside it; in the other one alone."""
    found = {
        "x.lora_A.w": torch.eye(2), "x.lora_B.w": torch.diag(torch.tensor([4.0, 4.0 * second])),
        "y.lora_A.w": torch.eye(2), "y.lora_B.w": torch.diag(torch.tensor([0.0, 7.0])),
    }  # fmt: skip
    assert rank_in_use(found) == rank


def test_ranks_without_use_keep_the_rows_that_there_were():
    """diag(4, 1) in three ranks: roots 2 and 1, then the row of A from before beside zeros in B."""
    own = {"x.lora_A.w": torch.diag(torch.tensor([4.0, 1.0])), "x.lora_B.w": torch.eye(2)}
    before = {"x.lora_A.w": torch.full((3, 2), 9.0), "x.lora_B.w": torch.ones(2, 3)}
    found = nearest(own, 3, before)
    assert found["x.lora_A.w"].abs().tolist() == [[2, 0], [0, 1], [9, 9]]
    assert found["x.lora_B.w"].abs().tolist() == [[2, 0, 0], [0, 1, 0]]
    plain = nearest(own, 3)
    assert not plain["x.lora_A.w"][2].any() and plain["x.lora_A.w"].shape == (3, 2)


@pytest.mark.parametrize("rank", [1, 2])
def test_errors_with_and_without_products_by_hand(rank):
    """A (1, 0) and (0, 1), B the same: half of the identity, and the means' product is a quarter of ones."""
    some = [
        {"x.lora_A.w": torch.zeros(rank, 4), "x.lora_B.w": torch.zeros(4, rank)} for _ in range(2)
    ]
    for place, own in enumerate(some):
        own["x.lora_A.w"][0, place] = own["x.lora_B.w"][place, 0] = 1.0
    # ||1/4 ones - 1/2 I|| = 1/2 over ||1/2 I|| = sqrt(1/2); products are formed above 4 ranks in all
    assert averaging_error(some, [1.0, 1.0]) == pytest.approx(0.5**0.5)
    assert product_error(some[0], some, [0.5, 0.5]) == pytest.approx(1.0)
    assert averaging_error(some * 3, [1.0] * 6) == pytest.approx(0.5**0.5)
    assert error_flops(some) == 2 * (3 * rank) ** 2 * 8
    assert error_flops(some * 3) == 2 * 4 * (6 * rank) * 4
