"""Clients added and removed by brute force, the clip's quantile, and what noise is added."""

import math

import numpy as np
import pytest
import torch

from fedloom.privacy.client_level import (
    GRID,
    ClippedSum,
    next_clip,
    update_multiplier,
)
from fedloom.privacy.noise import NoiseSource

SOURCE = NoiseSource(bytes(range(32)), "run")


def summed(updates, start, clip):
    total = ClippedSum.empty(start, clip)
    for update in updates:
        total.add(update)
    return total


def noised_mean(total, multiplier, denominator):
    drawn = total.drawn(multiplier * GRID, SOURCE.stream("sum", 1, -1))
    return total.moved(drawn, denominator)


def vector(total):
    return np.concatenate(list(total.steps.values())).astype(object)


def distance_in_steps(one, other):
    """The exact square of the distance of two sums, in whole numbers."""
    return sum(int(x) ** 2 for x in vector(one) - vector(other))


def model(rng, scale):
    """A random model: up to seven tensors of any shape and dtype."""
    found = {}
    for i in range(rng.integers(1, 8)):
        shape = tuple(rng.integers(1, 6, rng.integers(1, 3)))
        dtype = [torch.float32, torch.float64, torch.bfloat16, torch.float16][rng.integers(4)]
        values = np.clip(rng.standard_normal(shape) * scale, -6e4, 6e4)
        found[f"t{i}"] = torch.tensor(values).to(dtype)
    return found


def like(start, rng, scale):
    values = (rng.standard_normal(tuple(t.shape)) * scale for t in start.values())
    pairs = zip(start.items(), values, strict=True)
    return {n: (t.double() + torch.tensor(v)).to(t.dtype) for (n, t), v in pairs}


def test_a_client_moves_the_sum_of_a_thousand_random_models_by_at_most_the_clip():
    rng = np.random.default_rng(0)
    reached = 0
    for _ in range(1000):
        start = model(rng, 10 ** rng.uniform(-3, 2))
        clip = float(10 ** rng.uniform(-3, 3))
        others = [like(start, rng, 10 ** rng.uniform(-4, 4)) for _ in range(rng.integers(0, 2))]
        one = like(start, rng, 10 ** rng.uniform(-4, 4))
        moved = distance_in_steps(summed([*others, one], start, clip), summed(others, start, clip))
        assert moved <= GRID**2
        reached += moved > (0.999 * GRID) ** 2
    assert reached > 300  # of many the bound is reached: it is not met by adding nothing


START = {"a": torch.zeros(3), "b": torch.zeros(2, 2)}
ADVERSARIAL = {
    "NaN": {"a": torch.tensor([math.nan, 0, 0]), "b": torch.zeros(2, 2)},
    "infinity": {"a": torch.zeros(3), "b": torch.full((2, 2), -math.inf)},
    "huge": {"a": torch.full((3,), 3e38), "b": torch.full((2, 2), -3e38)},
    "just above": {"a": torch.tensor([1.0000001, 0, 0]), "b": torch.zeros(2, 2)},
    "each tensor at the clip": {"a": torch.tensor([1.0, 0, 0]), "b": torch.eye(2)},
    "tiny": {"a": torch.full((3,), 1e-45), "b": torch.zeros(2, 2)},
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_updates_move_the_sum_by_at_most_the_clip(name):
    others = [{"a": torch.ones(3), "b": torch.ones(2, 2)}] * 3
    total = summed([*others, ADVERSARIAL[name]], START, 1.0)
    without = summed(others, START, 1.0)
    assert distance_in_steps(total, without) <= GRID**2
    assert total.not_finite == (name in ("NaN", "infinity"))
    assert abs(total.balance - without.balance) == 1
    if total.not_finite:
        assert distance_in_steps(total, without) == 0 and total.balance < without.balance


def test_a_huge_float64_and_a_zero_update():
    start = {"a": torch.zeros(4, dtype=torch.float64)}
    huge = summed([{"a": torch.full((4,), 1e300, dtype=torch.float64)}], start, 1.0)
    assert huge.steps["a"].tolist() == pytest.approx([GRID / 2] * 4, abs=2)
    zero = summed([start], start, 1.0)
    assert (zero.steps["a"] == 0).all() and zero.balance == 1


def test_the_whole_update_is_one_vector():
    """Halves clipped apart would each keep the norm 1, together sqrt(2)."""
    update = {"a": torch.tensor([3.0, 0, 0]), "b": torch.tensor([[4.0, 0], [0, 0]])}
    total = summed([update], START, 1.0)
    assert total.steps["a"][0] / GRID == pytest.approx(0.6)
    assert total.steps["b"][0] / GRID == pytest.approx(0.8)


def test_hand_numbers_with_a_fixed_denominator_and_no_noise():
    start = {"a": torch.tensor([1.0, 2.0])}
    updates = [{"a": torch.tensor([1.5, 2.0])}, {"a": torch.tensor([1.0, 5.0])}]
    mean = noised_mean(summed(updates, start, 1.0), 0, 4.0)
    assert mean["a"].tolist() == pytest.approx([1 + 0.5 / 4, 2 + 1 / 4])
    empty = noised_mean(ClippedSum.empty(start, 1.0), 0, 4.0)
    assert torch.equal(empty["a"], start["a"])


def test_the_order_of_arrival_decides_no_bit():
    rng = np.random.default_rng(1)
    updates = [like(START, rng, 1.0) for _ in range(5)]
    forward, back = summed(updates, START, 0.7), summed(updates[::-1], START, 0.7)
    assert list(forward.content()) == list(back.content())


def test_noise_has_the_standard_deviation_of_the_clip_times_the_multiplier():
    start = {"a": torch.zeros(200_000)}
    total = ClippedSum.empty(start, 0.5)
    noisy = noised_mean(total, 1.5, 10.0)["a"]
    assert float(noisy.std()) == pytest.approx(1.5 * 0.5 / 10, rel=0.01)
    again = noised_mean(total, 1.5, 10.0)["a"]
    assert torch.equal(noisy, again)


def test_other_tensors_are_refused():
    with pytest.raises(ValueError, match="do not match"):
        summed([{"a": torch.zeros(3)}], START, 1.0)
    with pytest.raises(ValueError, match="shape"):
        summed([{"a": torch.zeros(4), "b": torch.zeros(2, 2)}], START, 1.0)


@pytest.mark.parametrize("first", [0.1, 3.0, 1.0])
def test_the_clip_converges_to_the_quantile_from_both_sides(first):
    """All norms are 1 (specification, section 3): it rises while no change fits, and falls while all do."""
    clip = first
    for _ in range(60):
        total = summed([{"a": torch.tensor([1.0])}] * 20, {"a": torch.zeros(1)}, clip)
        share = total.noised_share(0.0, 20, SOURCE.stream("clip", 1, -1))
        after = next_clip(clip, share, 0.5, 0.2)
        assert abs(math.log(after / clip)) <= 0.1 + 1e-12
        clip = after
    assert clip == pytest.approx(1.0, rel=0.11)


def test_the_noise_of_the_quantile_is_paid_by_the_sum():
    """Specification, section 3: z = 1 with sigma_b = |S| / 20."""
    assert update_multiplier(1, 1.0) == pytest.approx(1.1547, abs=1e-4)
    assert update_multiplier(1, 2.0) == pytest.approx(1.0328, abs=1e-4)
    assert update_multiplier(1, 5.0) == pytest.approx(1.0050, abs=1e-4)
    assert update_multiplier(0, 1.0) == 0
    with pytest.raises(ValueError, match="must be above 0"):
        update_multiplier(1, 0.5)


def test_a_noisy_share_is_about_its_mean():
    total = summed([{"a": torch.tensor([0.5])}] * 30, {"a": torch.zeros(1)}, 1.0)
    shares = [total.noised_share(2.0, 40, SOURCE.stream("clip", r, -1)) for r in range(2000)]
    assert np.mean(shares) == pytest.approx(
        0.5 + 30 / 80, abs=0.005
    )  # 10 of 40 expected are missing
    assert np.std(shares) == pytest.approx(2.0 / 40, rel=0.06)


def test_a_change_as_long_as_the_clip_is_within_it():
    start = {"a": torch.zeros(2, dtype=torch.float64)}
    for values, balance in (((0.6, 0.8), 1), ((0.6, 0.81), -1)):
        total = summed([{"a": torch.tensor(values, dtype=torch.float64)}], start, 1.0)
        assert total.balance == balance


def test_norms_far_below_and_above_what_their_squares_can_hold():
    start = {"a": torch.zeros(2, dtype=torch.float64), "none": torch.zeros(0)}
    for scale in (1e-200, 1.0, 1e200):
        update = {**start, "a": torch.tensor([3.0, -4.0], dtype=torch.float64) * scale}
        assert ClippedSum.empty(start, 1.0)._norm(update) == pytest.approx(5 * scale)
    assert ClippedSum.empty(start, 1.0)._norm(start) == 0.0


def test_a_share_by_hand():
    """Of 8 expected 3 answered, 2 of them within the clip: 1/2 + (2 - 1) / 16."""
    start = {"a": torch.zeros(1)}
    total = summed([{"a": torch.tensor([v])} for v in (0.5, 1.0, 1.5)], start, 1.0)
    assert total.noised_share(0.0, 8, SOURCE.stream("clip", 1, -1)) == 0.5 + 1 / 16
    assert total.numbers == 1 and next_clip(2.0, 0.75, 0.5, 0.4) == pytest.approx(
        2 * math.exp(-0.1)
    )
