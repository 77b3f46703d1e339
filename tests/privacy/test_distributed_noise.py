"""Shares of noise: the bound against exact sums, norms after rounding, and sums with clients missing."""

import itertools
import math

import dp_accounting
import dp_accounting.rdp
import numpy as np
import pytest
from scipy.stats import chisquare, kstest

from fedloom.privacy.accounting import Releases, epsilon
from fedloom.privacy.distributed_noise import (
    BIAS,
    NoiseShares,
    concentrated,
    least_survivors,
    rounded_norm,
)
from fedloom.privacy.noise import NoiseSource

SOURCE = NoiseSource(bytes(range(32)), "a run")


def shares(multiplier=1.0, clip=0.5, colluding=1, bits=16, clients=4, numbers=100, **own):
    return NoiseShares(multiplier, clip, colluding, bits, clients, numbers, **own)


def single(deviation):
    """The probabilities of one discrete Gaussian around 0, far into its tails."""
    reach = int(24 * deviation) + 24
    found = np.exp(-(np.arange(-reach, reach + 1.0) ** 2) / (2 * deviation**2))
    return found / found.sum()


def summed(deviation, clients):
    """Those of a sum of so many, convolved."""
    found = one = single(deviation)
    for _ in range(clients - 1):
        found = np.convolve(found, one)
    return found


def apart(found, by):
    """Log probabilities of a sum, and of one that a client moved by whole steps, where both are above 0."""
    moved, stays = np.pad(found, (by, 0)), np.pad(found, (0, by))
    there = (moved > 1e-280) & (stays > 1e-280)
    return np.log(moved[there]), np.log(stays[there])


@pytest.mark.parametrize("honest", [1, 2, 5, 20])
@pytest.mark.parametrize("deviation", [0.5, 0.7, 1.0, 2.0])
def test_the_bound_holds_for_exact_sums_and_is_not_loose_from_a_step_on(deviation, honest):
    """Renyi divergences of convolved probabilities: at most (order / 2) e^2."""
    for by, order in itertools.product((1, 2), (1.5, 2.0, 4.0)):
        moved, stays = apart(summed(deviation, honest), by)
        exact = math.log(np.exp(order * moved + (1 - order) * stays).sum()) / (order - 1)
        bound = order / 2 * concentrated(by, deviation, honest, 1) ** 2
        assert exact <= bound * (1 + 1e-9)
        assert deviation < 1 or exact > 0.99 * bound


def test_what_a_discrete_gaussian_of_the_same_variance_would_cost_is_no_bound():
    """20 clients with half a step each: a sixth more than without the extra term."""
    moved, stays = apart(summed(0.5, 20), 1)
    exact = math.log(np.exp(1.5 * moved - 0.5 * stays).sum()) / 0.5
    plain = 1.5 / 2 / (20 * 0.25)
    assert exact == pytest.approx(1.158 * plain, rel=1e-3)
    assert exact < 1.5 / 2 * concentrated(1, 0.5, 20, 1) ** 2


@pytest.mark.parametrize(("deviation", "honest", "moves"), [(0.7, 3, (1, 1)), (2.0, 5, (3, 2))])
def test_epsilon_is_above_that_of_the_exact_losses(deviation, honest, moves):
    """Two numbers moved at once: at the epsilon of the accountant the exact delta is below the stated."""
    losses, chances = np.zeros(1), np.ones(1)
    for by in moves:
        moved, stays = apart(summed(deviation, honest), by)
        losses = np.add.outer(losses, moved - stays).reshape(-1)
        chances = np.multiply.outer(chances, np.exp(moved)).reshape(-1)
    norm = math.hypot(*moves)
    z = 1 / concentrated(norm, deviation, honest, len(moves))
    for delta in (1e-2, 1e-5):
        stated = epsilon([Releases(z, 1, 1)], delta, "rdp").epsilon
        exact = float((chances * np.maximum(0, -np.expm1(stated - losses))).sum())
        assert 0 < exact <= delta


def test_it_is_accounted_as_concentrated_differential_privacy():
    """(1/2) e^2 of 7 releases, by dp-accounting's own event for it."""
    e = concentrated(3.0, 0.6, 4, 50)
    accountant = dp_accounting.rdp.RdpAccountant(
        neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_SPECIAL
    )
    accountant.compose(dp_accounting.ZCDpEvent(rho=e**2 / 2), 7)
    known = epsilon([Releases(1 / e, 1, 7)], 1e-4, "rdp").epsilon
    assert known == pytest.approx(accountant.get_epsilon(1e-4), rel=1e-9)


def test_the_bound_by_hand():
    """sigma = 1/2, h = 2: tau = 10 exp(-pi^2 / 4) = 0.848; D = 3, d = 4: 3 / (sqrt(2) / 2) = 4.2426."""
    tau = 10 * math.exp(-(math.pi**2) / 4)
    assert tau == pytest.approx(0.84805, abs=1e-5)
    first, second = math.sqrt(18 + 8 * tau), 3 * math.sqrt(2) + 2 * tau
    assert concentrated(3, 0.5, 2, 4) == pytest.approx(min(first, second)) == pytest.approx(first)
    few = math.sqrt(2) * 0.1 + tau
    assert concentrated(0.1, 0.5, 2, 1) == pytest.approx(few)
    assert concentrated(3, 2.0, 1, 99) == 1.5  # one alone is a discrete Gaussian
    for wrong in ((0, 1, 1, 1), (1, 0.49, 1, 1), (1, 1, 0, 1), (1, 1, 1, 0)):
        with pytest.raises(ValueError, match="no noise that can be accounted for"):
            concentrated(*wrong)


def test_norms_after_rounding_by_hand():
    """d = 4, norm 3: 3 + 2 or sqrt(9 + 1 + 1 x (3 + 1)), as sqrt(2 log(e^(1/2))) = 1; 3 + 1 to the nearest."""
    assert rounded_norm(3, 4) == pytest.approx(math.sqrt(14))
    assert rounded_norm(0.1, 1) == pytest.approx(min(1.1, math.sqrt(0.01 + 0.25 + 0.6)))
    assert rounded_norm(3, 4, stochastic=False) == 4.0
    most = 2**15 - 1
    assert rounded_norm(most, 10**6) / most == pytest.approx(1.000132, abs=1e-6)
    assert pytest.approx(0.60653, abs=1e-5) == BIAS


def adversarial(numbers, rng):
    """Changes that are hard on a clip: long ones in one number, all alike, huge, tiny, none."""
    one = np.zeros(numbers)
    one[0] = 7.0
    yield one
    yield np.full(numbers, 1.0)
    yield np.full(numbers, 1e300) * rng.choice([-1, 1], numbers)
    yield np.full(numbers, 5e-324)
    yield np.full(numbers, 0.5 / math.sqrt(numbers))  # of exactly the clip's norm
    yield np.zeros(numbers)


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize(("bits", "numbers"), [(8, 5), (8, 20_000), (16, 300), (24, 1000)])
def test_no_rounded_change_is_longer_than_is_accounted(bits, numbers, stochastic):
    rng, own = np.random.default_rng(0), shares(bits=bits, numbers=numbers, stochastic=stochastic)
    random = (rng.normal(size=numbers) * 10.0 ** rng.uniform(-3, 3) for _ in range(60))
    for change in itertools.chain(adversarial(numbers, rng), random):
        steps = own.rounded(change, rng if stochastic else None)
        assert steps.dtype == np.int64 and sum(int(x) ** 2 for x in steps.tolist()) <= own.norm**2
        assert abs(steps).max() <= own.half + 1
        if bits == 24 and 1e-3 < abs(change).max() < 1e150:
            length = np.linalg.norm(change)
            near = change * min(1, 0.5 / length) / own.clip * own.half
            assert abs(steps - near).max() <= 1.0
    for bad in (math.nan, math.inf, -math.inf):
        assert not own.rounded(np.array([1.0] * (numbers - 1) + [bad]), rng).any()


class Upwards:
    """Random numbers that round everything up."""

    drawn = 0

    def random(self, n):
        self.drawn += 1
        return np.full(n, 1 - 2.0**-53)


def test_a_rounding_that_is_too_long_is_drawn_again_and_in_the_end_cut():
    own, always = shares(bits=8, numbers=100_000), Upwards()
    steps = own.rounded(np.full(100_000, 1e-3), always)
    assert always.drawn == 64 and not steps.any()
    assert own.norm < math.sqrt(100_000)  # which all of them are long, rounded up


def test_rounding_keeps_the_mean_nearly():
    """The condition is kept in most draws; what it biases is far below a step."""
    own, rng = shares(bits=8, numbers=400), np.random.default_rng(1)
    change = rng.normal(size=400) * 0.01
    found = np.mean([own.rounded(change, rng) for _ in range(4000)], axis=0)
    norm = np.linalg.norm(change)
    scaled = change * own.half / max(norm, own.clip)
    assert abs(found - scaled).mean() < 0.01
    assert abs((found - scaled) @ np.sign(scaled) / 400) < 0.002


def test_shares_are_solved_for_the_stated_multiplier():
    for own in (
        shares(),
        shares(multiplier=0.025, bits=8, clients=100),
        shares(multiplier=3.0, colluding=0, clients=3, numbers=10**6),
        shares(multiplier=0.006, bits=8, clients=100, numbers=7),
    ):
        found = concentrated(own.norm, own.deviation, own.honest, own.numbers)
        assert found <= 1 / own.multiplier
        assert own.deviation == 0.5 or found == pytest.approx(1 / own.multiplier, rel=1e-7)
    own = shares(clients=10)  # 6 are left at least, and one of these tells its noise
    assert (own.least, own.honest) == (6, 5)
    assert own.deviation == pytest.approx(own.norm / math.sqrt(5), rel=1e-8)
    assert own.counted(6) == pytest.approx(1) and own.counted(10) == pytest.approx(math.sqrt(9 / 5))
    assert own.all_there == math.sqrt(2)
    quiet = shares(multiplier=0.0)
    assert quiet.deviation == 0 == quiet.counted(4)
    few = shares(multiplier=0.025, bits=8, clients=100)
    assert few.norm * few.multiplier / math.sqrt(few.honest) < 0.5 < few.deviation  # the extra term


def test_where_all_that_are_left_might_tell_nothing_is_relied_on():
    assert [least_survivors(n) for n in (3, 4, 5, 6, 10)] == [3, 3, 3, 4, 6]
    assert shares(colluding=2).honest == 1
    with pytest.raises(ValueError, match="colluding = 3: 3 of 4 clients may be all"):
        _ = shares(colluding=3).deviation


def test_the_modulus_has_room_for_all_changes_and_twelve_deviations():
    own = shares(multiplier=2.0, clients=10)
    extent = 10 * (own.half + 1) + 12 * own.deviation * math.sqrt(10)
    assert own.largest == math.ceil(extent) and 2 ** (own.width - 1) > own.largest
    assert 2 ** (own.width - 2) <= own.largest  # and no bit is wasted
    with pytest.raises(ValueError, match=r"take 34 bits a number, and 32 are the most: give 22"):
        _ = shares(multiplier=30.0, bits=24, clients=20).width
    assert shares(multiplier=30.0, bits=22, clients=20).width == 32


def test_signed_sums_come_back_from_the_modulus():
    own = shares(numbers=4)
    steps = np.array([-5, 0, own.half, -own.half])
    quiet = shares(numbers=4, multiplier=0.0)
    words = 2 * quiet.words(steps, SOURCE.stream("a", 1, 0))
    assert quiet.sums(words & np.uint32(2**quiet.width - 1)).tolist() == (2 * steps).tolist()
    found = quiet.change(2 * steps, 4.0)
    assert found.tolist() == pytest.approx([-5 / own.half / 4, 0, 0.25, -0.25])
    edge = np.array([2 ** (own.width - 1) - 1, 2 ** (own.width - 1), 2**own.width - 1], np.uint32)
    half = 2 ** (own.width - 1)
    assert own.sums(edge).tolist() == [half - 1, -half, -1]


def drawn(own, survivors, numbers, moment=1):
    """The sum of survivors' noise, by the words that they send."""
    total = np.zeros(numbers, np.uint32)
    for client in range(survivors):
        stream = SOURCE.stream("share", moment, client)
        total += own.words(np.zeros(numbers, np.int64), stream)
    return own.sums(total & np.uint32(2**own.width - 1))


@pytest.mark.parametrize("survivors", [10, 9, 8, 7])
def test_noise_of_those_who_are_left_is_what_is_counted_or_more(survivors):
    """Of 10 clients 0 to 30 % drop out: variance within 3 %, and a normal distribution on this fine a grid."""
    own, numbers = shares(clients=10, numbers=40_000), 40_000
    found = drawn(own, survivors, numbers, survivors)
    variance = survivors * own.deviation**2
    assert found.var() == pytest.approx(variance, rel=0.03)
    assert kstest(found / math.sqrt(variance), "norm").pvalue > 1e-3
    told = own.counted(survivors) * own.norm  # of which one client's part is known to others
    assert (survivors - 1) * own.deviation**2 == pytest.approx(told**2, rel=1e-6)
    assert told >= own.norm * (1 - 1e-9)


def test_a_sum_of_coarse_noise_has_the_convolved_distribution():
    own = shares(multiplier=0.012, bits=8, clients=6, colluding=0, numbers=100_000)
    assert 0.5 <= own.deviation < 1.5
    found, exact = drawn(own, 5, 100_000), summed(own.deviation, 5)
    middle, reach = len(exact) // 2, int(3 * own.deviation * math.sqrt(5))
    inside = np.arange(-reach, reach + 1)
    counts = np.array([(found == x).sum() for x in inside])
    likely = exact[middle - reach : middle + reach + 1]
    rest, others = 1 - likely.sum(), len(found) - counts.sum()
    test = chisquare([*counts, others], 100_000 * np.array([*likely, rest]))
    assert test.pvalue > 1e-3


def test_a_sum_of_no_numbers_has_no_noise():
    own = shares(numbers=0)
    assert own.deviation == 0 and own.rounded(np.zeros(0), None).shape == (0,)
    assert own.words(np.zeros(0, np.int64), SOURCE.stream("a", 1, 0)).shape == (0,)
