"""Model merging: hand-computed cases of each rule, and what must hold whatever the numbers are."""

import numpy as np
import pytest
import torch

from fedloom.aggregation.lora import nearest, norm
from fedloom.aggregation.means import weighted_mean
from fedloom.aggregation.merging import Merging, dare, knots, merged, merged_change, ties, trimmed

THREE = [
    torch.tensor([4.0, -3, 0.5, 1, -2]),
    torch.tensor([2.0, 3.5, -1, -0.2, -3]),
    torch.tensor([-1.0, -1, 2.5, 0.3, -0.1]),
]
A, B = "x.lora_A.weight", "x.lora_B.weight"


def no_draws(place):
    raise AssertionError("nothing is drawn")


def draws(place):
    return np.random.default_rng(place)


def adapter(seed, rank=2, outputs=5, inputs=4):
    rng = torch.Generator().manual_seed(seed)
    return {
        A: torch.randn(rank, inputs, generator=rng),
        B: torch.randn(outputs, rank, generator=rng),
        "score.weight": torch.randn(3, generator=rng),
    }


def product(own):
    return own[B].double() @ own[A].double()


def test_the_largest_entries_stay_and_of_equal_ones_the_first():
    # 3 of 5: the official threshold would keep 4
    assert trimmed(THREE[0], 0.6).tolist() == [4, -3, 0, 0, -2]
    assert trimmed(THREE[1], 0.6).tolist() == [2, 3.5, 0, 0, -3]
    assert trimmed(THREE[2], 0.6).tolist() == [-1, -1, 2.5, 0, 0]
    assert trimmed(torch.tensor([1.0, -1, 1, 1]), 0.5).tolist() == [1, -1, 0, 0]
    assert trimmed(torch.tensor([0.1, 3.0]), 0.01).tolist() == [0, 3]  # one at least
    assert trimmed(THREE[0], 1.0) is THREE[0]
    assert trimmed(torch.tensor([3.0, 1, -1, 1]), 0.5).tolist() == [3, 1, 0, 0]


def test_ties_by_hand():
    # sums of what is kept: 5, -0.5, 2.5, 0, -5; means over those that agree: (4+2)/2, (-3-1)/2, 2.5, -, (-2-3)/2
    found = ties(THREE, [1, 1, 1], 0.6)
    assert found.tolist() == pytest.approx([3, -2, 2.5, 0, -2.5])


def test_ties_with_weights_does_not_shrink():
    # weights .5 .3 .2; sums 2.4, -0.65, 0.5, 0, -1.9
    # (.5*4 + .3*2)/.8, (-.5*3 - .2)/.7, 2.5, 0, (-.5*2 - .3*3)/.8; PEFT divides by the count instead
    found = ties(THREE, [0.5, 0.3, 0.2], 0.6)
    assert found.tolist() == pytest.approx([3.25, -1.7 / 0.7, 2.5, 0, -2.375])
    assert torch.allclose(ties(THREE, [5, 3, 2], 0.6), found)


def test_ties_of_one_task_of_equal_ones_and_of_opposed_ones():
    assert ties(THREE[:1], [7.0], 1.0).tolist() == THREE[0].tolist()
    assert ties([THREE[0]] * 3, [1, 2, 3], 1.0).tolist() == pytest.approx(THREE[0].tolist())
    assert not ties(
        [THREE[0], -THREE[0]], [1, 1], 1.0
    ).any()  # official: the negative one, PEFT: the other
    assert torch.equal(ties(THREE, [1, 1, 1], 0.6), ties(THREE[::-1], [1, 1, 1], 0.6))


def test_dare_keeps_what_was_drawn_and_divides_it():
    class Drawn:
        def random(self, shape):
            return np.array([0.1, 0.7, 0.2, 0.9]).reshape(shape)

    assert dare(torch.tensor([1.0, -2, 4, 0.5]), 0.5, Drawn()).tolist() == [2, 0, 8, 0]
    assert dare(THREE[0], 1.0, Drawn()).tolist() == THREE[0].tolist()


def test_dare_is_unbiased_with_the_variance_that_is_said():
    rng, change = np.random.default_rng(0), torch.tensor([1.0, -2.0, 0.5])
    found = torch.stack([dare(change, 0.2, rng) for _ in range(20_000)])
    spread = change.double().square() * 0.8 / 0.2
    assert torch.allclose(
        found.mean(0), change.double(), atol=5 * float(spread.max() / 20_000) ** 0.5
    )
    assert torch.allclose(found.var(0), spread, rtol=0.05)


HAND = [
    (torch.tensor([[1.0, 0], [0, 0]]).double(), torch.tensor([[2.0, 0], [0, 0]]).double()),
    (torch.tensor([[1.0, 0], [0, 0]]).double(), torch.tensor([[1.0, 0], [1, 0]]).double()),
]
"""A and B of D1 = [[2, 0], [0, 0]] and D2 = [[1, 0], [1, 0]]."""


def test_knots_by_hand():
    # [D1 D2] has singular values 2.28824561 and 0.87403205
    up, down = knots(HAND, [1, 1], Merging("knots", density=1.0))
    expected = torch.tensor([[1.36180340, 0], [1.08541020, 0]]).double()
    assert torch.allclose(up @ down, expected, atol=1e-8)
    plain = ties([b @ a for a, b in HAND], [1, 1], 1.0)
    assert plain.tolist() == [[1.5, 0], [1, 0]]


def test_knots_with_the_mean_is_the_mean():
    up, down = knots(HAND, [1, 1], Merging("task_arithmetic"))
    assert torch.allclose(up @ down, torch.tensor([[1.5, 0], [0.5, 0]]).double())
    layers = [(adapter(k)[A].double(), adapter(k)[B].double()) for k in range(3)]
    up, down = knots(layers, [1, 2, 1], Merging("task_arithmetic"), layers[:1])
    whole = sum(w * (b @ a) for w, (a, b) in zip([1, 2, 1], layers, strict=True)) / 4
    assert torch.allclose(up @ down, whole - layers[0][1] @ layers[0][0])


def test_knots_of_equal_changes_is_the_change_and_of_none_nothing():
    a, b = adapter(0)[A].double(), adapter(0)[B].double()
    up, down = knots([(a, b)] * 3, [1, 2, 3], Merging("knots", density=1.0))
    assert torch.allclose(up @ down, b @ a)
    up, down = knots([(1e-4 * a, 1e-4 * b)] * 3, [1, 2, 3], Merging("knots", density=1.0))
    assert torch.allclose(1e8 * (up @ down), b @ a)
    up, down = knots([(a, b)] * 2, [1, 1], Merging("knots"), [(a, b)])
    assert not (up @ down).any()


ALL = [
    Merging("task_arithmetic"), Merging("ties", 0.5), Merging("dare", 0.5), Merging("knots", 0.5),
    Merging("task_arithmetic", space="product"), Merging("ties", 0.5, space="product"),
    Merging("dare", 0.5, space="product"),
]  # fmt: skip


@pytest.mark.parametrize("own", ALL, ids=str)
def test_whose_adapters_did_not_change_is_the_start(own):
    start = adapter(0)
    found, _ = merged([start, start], [1, 3], start, own, draws)
    assert torch.allclose(product(found), product(start), atol=1e-5)
    assert torch.equal(found["score.weight"], start["score.weight"])
    assert list(found) == list(start) and all(found[n].dtype == t.dtype for n, t in start.items())


@pytest.mark.parametrize("space", ["factors", "product"])
def test_one_client_gets_its_own_back(space):
    start, own = adapter(0), adapter(1)
    for rule in ("task_arithmetic", "ties", "dare", "knots"):
        found, _ = merged([own], [5], start, Merging(rule, 1.0, space=space), draws)
        assert torch.allclose(product(found), product(own), atol=1e-4), rule
        assert torch.allclose(found["score.weight"], own["score.weight"])


def test_task_arithmetic_of_scale_1_is_the_mean_and_of_scale_k_the_sum():
    start, own, weights = adapter(0), [adapter(1), adapter(2)], [1.0, 3.0]
    mean = weighted_mean(own, weights)
    found, lost = merged(own, weights, start, Merging("task_arithmetic"), no_draws)
    assert lost is None and all(torch.allclose(found[n], mean[n], atol=1e-6) for n in mean)
    found, _ = merged(own, [1, 1], start, Merging("task_arithmetic", scale=2.0), no_draws)
    for name, tensor in start.items():
        changes = sum(update[name] - tensor for update in own)
        assert torch.allclose(found[name], tensor + changes, atol=1e-5)


def test_products_are_merged_and_cut_to_the_rank_with_the_loss_said():
    start, own, weights = adapter(0), [adapter(1), adapter(2, rank=3)], [1.0, 3.0]
    rule = Merging("task_arithmetic", scale=0.5, space="product")
    whole = 0.5 * product(start) + 0.5 * (product(own[0]) + 3 * product(own[1])) / 4
    found, lost = merged(own, weights, start, rule, no_draws, 5)
    assert lost < 1e-6 and found[A].shape == (5, 4)
    assert torch.allclose(product(found), whole, atol=1e-5)
    found, lost = merged(own, weights, start, rule, no_draws)
    values = torch.linalg.svdvals(whole)
    assert found[A].shape == (2, 4)
    assert lost == pytest.approx(float(values[2:].norm() / values.norm()), rel=1e-4)


def test_rules_of_entries_see_the_dense_products():
    start, own = adapter(0), [adapter(1), adapter(2)]
    changes = [product(update) - product(start) for update in own]
    for rule in (Merging("ties", 0.3, space="product"), Merging("dare", 0.3, space="product")):
        found, lost = merged(own, [1, 2], start, rule, draws, 4)
        dense = merged_change(changes, [1, 2], rule, draws)
        assert lost < 1e-6 and torch.allclose(product(found), product(start) + dense, atol=1e-5)


def test_without_a_start_changes_are_the_adapters():
    own = [adapter(1), adapter(2)]
    found, _ = merged(own, [1, 1], None, Merging("task_arithmetic", space="product"), no_draws, 4)
    assert torch.allclose(product(found), (product(own[0]) + product(own[1])) / 2, atol=1e-5)
    assert torch.allclose(
        found["score.weight"], (own[0]["score.weight"] + own[1]["score.weight"]) / 2
    )
    assert norm(nearest(found, 2)) <= norm(found) + 1e-6


@pytest.mark.parametrize("own", ALL, ids=str)
def test_the_order_of_clients_does_not_matter(own):
    start, updates, weights = adapter(0), [adapter(k) for k in (1, 2, 3)], [1.0, 2.0, 4.0]
    one, _ = merged(updates, weights, start, own, draws)
    other, _ = merged(updates[::-1], weights[::-1], start, own, lambda place: draws(2 - place))
    assert torch.allclose(product(one), product(other), atol=1e-4)


def test_what_cannot_be_merged():
    with pytest.raises(ValueError, match=r"1 updates with weights \[0\]"):
        merged([adapter(0)], [0], None, ALL[0], draws)
    with pytest.raises(ValueError, match="0 updates"):
        merged([], [], None, ALL[0], draws)


def test_shares_that_are_kept_by_default():
    rules = ("ties", "knots", "dare", "task_arithmetic")
    assert [Merging(rule).share for rule in rules] == [0.2, 0.2, 0.8, 1.0]
    assert [Merging(rule, 0.3).share for rule in rules] == [0.3] * 4
    assert [Merging(rule).of_products for rule in rules] == [False, True, False, False]
    assert Merging("ties", space="product").of_products and Merging("ties").scale == 1.0


@pytest.mark.parametrize("own", ALL[:2] + ALL[4:6], ids=str)
def test_who_weighs_nothing_does_not_count(own):
    start, updates = adapter(0), [adapter(1), adapter(2)]
    found, _ = merged(updates, [0, 2], start, own, no_draws)
    alone, _ = merged(updates[1:], [1], start, own, no_draws)
    assert torch.allclose(product(found), product(alone), atol=1e-5)


@pytest.mark.parametrize(("updates", "weights"), [(2, [1]), (1, [1, 1]), (2, [3, -1]), (2, [0, 0])])
def test_each_update_has_a_weight_of_zero_or_more(updates, weights):
    with pytest.raises(ValueError, match=f"{updates} updates with weights"):
        merged([adapter(k) for k in range(updates)], weights, None, ALL[0], no_draws)


def test_without_a_start_a_scale_is_of_products_once():
    own = [adapter(1), adapter(2)]
    mean = weighted_mean(own, [0.25, 0.5])
    found, lost = merged(own, [0.25, 0.5], None, Merging("task_arithmetic", scale=3.0), no_draws)
    assert lost is None and torch.allclose(found[A], mean[A], atol=1e-6)
    assert torch.allclose(found[B], 3 * mean[B], atol=1e-6)
    assert torch.allclose(found["score.weight"], mean["score.weight"])


def test_knots_of_one_client_that_did_not_move_is_nothing():
    a, b = adapter(0)[A].double(), adapter(0)[B].double()
    up, down = knots([(a, b)], [1], Merging("knots"), [(a, b)])
    assert up.shape == (5, 1) and down.shape == (1, 4) and not (up @ down).any()
