"""Noise on means: its size against the definition of privacy, and what it must not exceed."""

import math

import numpy as np
import pytest
from scipy.stats import norm

from fedloom.privacy.gaussian import ad_hoc_noise, delta_of, noise_multiplier, private_mean


def test_delta_by_hand():
    # mu = 1, epsilon = 1: Phi(-1/2) - e Phi(-3/2) = 0.308538 - 2.718282 * 0.066807
    assert delta_of(1.0, 1.0) == pytest.approx(0.126937, abs=1e-5)
    # mu-GDP at epsilon -> 0 is a total variation distance: 2 Phi(mu / 2) - 1
    assert delta_of(1e-9, 1.0) == pytest.approx(2 * norm.cdf(0.5) - 1, abs=1e-6)


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 8.0, 50.0])
@pytest.mark.parametrize("delta", [1e-9, 1e-5, 0.1])
@pytest.mark.parametrize("releases", [1, 30])
def test_the_multiplier_gives_just_what_is_asked(epsilon, delta, releases):
    mu = math.sqrt(releases) / noise_multiplier(epsilon, delta, releases)
    assert delta_of(epsilon, mu) == pytest.approx(delta, rel=1e-6)


@pytest.mark.parametrize(("epsilon", "delta"), [(0.5, 1e-3), (2.0, 1e-4)])
def test_against_the_definition_by_numbers(epsilon, delta):
    """T Gaussian releases on neighbours: integrate max(0, p - e^epsilon q) over a fine grid."""
    releases = 4
    z = noise_multiplier(epsilon, delta, releases)
    shift = math.sqrt(releases) / z  # of the sum of releases, in its own standard deviations
    x = np.linspace(-12, 12 + shift, 400_001)
    excess = np.maximum(0, norm.pdf(x, shift) - math.exp(epsilon) * norm.pdf(x))
    assert np.trapezoid(excess, x) == pytest.approx(delta, rel=1e-3)


def test_one_row_moves_the_mean_by_no_more_than_its_sensitivity():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(20, 6)) * 10
    other = rows.copy()
    other[7] = -1e6 * rows[7]
    means = [private_mean(r, 1.5, 0.0, np.random.default_rng(1)) for r in (rows, other)]
    assert np.linalg.norm(means[0] - means[1]) <= 2 * 1.5 / 20 + 1e-12
    assert np.linalg.norm(means[0] - means[1]) > 0.99 * 2 * 1.5 / 20  # the bound is reached


def test_short_rows_are_left_as_they_are_and_zeros_do_no_harm():
    rows = np.array([[0.3, 0.4], [0.0, 0.0], [3.0, 4.0]])
    found = private_mean(rows, 1.0, 0.0, np.random.default_rng(0))
    assert found == pytest.approx([(0.3 + 0.6) / 3, (0.4 + 0.8) / 3])


def test_the_noise_has_its_standard_deviation():
    found = private_mean(np.zeros((10, 40_000)), 2.0, 3.0, np.random.default_rng(0))
    assert found.std() == pytest.approx(3.0 * 2 * 2.0 / 10, rel=0.02)


def test_ad_hoc_noise_stays_within_the_largest_row_and_shrinks_with_eta():
    rng = np.random.default_rng(0)
    mean = np.array([1.0, -2.0, 0.5, 0.0])
    strong = [ad_hoc_noise(mean, 2.5, 0.01, rng) for _ in range(200)]
    assert max(np.linalg.norm(x) for x in strong) <= 2.5 + 1e-9
    weak = [ad_hoc_noise(mean, 2.5, 1e6, rng) for _ in range(200)]
    assert max(np.linalg.norm(x - mean) for x in weak) < 1e-4
    # E length = d / rate, E |u_i| = 1/2
    drawn = [ad_hoc_noise(np.zeros(4), 1e9, 2.0, rng) for _ in range(20_000)]
    assert np.abs(drawn).mean() == pytest.approx(4 / 2.0 / 2, rel=0.03)


class Drawn:
    """What a generator would draw."""

    def gamma(self, shape, scale):
        assert (shape, scale) == (2, 0.25)
        return 2.0

    def uniform(self, low, high, size):
        assert (low, high, size) == (-1.0, 1.0, 2)
        return np.array([0.5, -1.0])

    def normal(self, middle, deviation, size):
        assert (middle, size) == (0.0, 2) and deviation == pytest.approx(3 * 2 * 0.25 / 2)
        return np.array([10.0, 20.0])


def test_ad_hoc_noise_by_hand():
    """(4, 1) less 2 (0.5, -1) is (3, 3); shortened to the norm 3, and left alone within 9."""
    mean = np.array([4.0, 1.0])
    assert ad_hoc_noise(mean, 9.0, 4.0, Drawn()).tolist() == [3.0, 3.0]
    assert ad_hoc_noise(mean, 3.0, 4.0, Drawn()) == pytest.approx([3 / 2**0.5] * 2)
    assert ad_hoc_noise(np.array([1.0, -2.0]), 9.0, 4.0, Drawn()).tolist() == [0.0, 0.0]


def test_a_noisy_mean_by_hand():
    """(0.3, 0.4) and (0, 5) are cut to 0.25: (0.15, 0.2) and (0, 0.25)."""
    rows = np.array([[0.3, 0.4], [0.0, 5.0]])
    found = private_mean(rows, 0.25, 3.0, Drawn())
    assert found == pytest.approx([0.075 + 10, 0.225 + 20])
