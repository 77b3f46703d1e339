"""Intervals by hand, and against scipy where it has them."""

import math

import numpy as np
import pytest
from scipy import special, stats

from fedloom.statistics.intervals import (
    LEVEL,
    NORMAL_QUANTILE,
    UNBOUNDED,
    Interval,
    Sample,
    change,
    mean_interval,
    rows_difference,
    rows_interval,
    sample_interval,
    share_interval,
)

SHARE = (0.0, 1.0)
Z = 1.959964**2


def sample(*totals, weights=None, groups=(), bounds=SHARE):
    return Sample("m", tuple(map(float, totals)), weights or (1.0,) * len(totals), groups, bounds)


def named(own, *, first=0):
    return [str(first + place) for place in range(len(own.totals))], own


def ends(interval):
    return interval.low, interval.high


@pytest.mark.parametrize(
    ("won", "of", "low", "high"),
    [
        (0, 6, 0.0, Z / (6 + Z)),  # "0.000 to 0.000" before
        (6, 6, 6 / (6 + Z), 1.0),
        (0, 3, 0.0, Z / (3 + Z)),
        (210, 400, 0.476, 0.5735),
    ],
)
def test_a_share(won, of, low, high):
    found = share_interval(won, of)
    assert ends(found) == pytest.approx((low, high), abs=2e-4)
    assert (found.estimate, found.units, found.over) == (won / of, of, "rows")


def test_a_tie_widens_a_share_and_nothing_has_none():
    half, none, one = share_interval(2.5, 9), share_interval(2, 9), share_interval(3, 9)
    assert ends(half) == (none.low, one.high) and half.estimate == 2.5 / 9
    nothing = Interval(None, None, None, 0, "rows", missing="not estimable without rows")
    assert share_interval(0, 0) == mean_interval([], "rows") == nothing
    assert sample_interval(sample(bounds=UNBOUNDED)) == rows_difference([], []) == nothing


def test_the_end_of_a_share_at_its_bound_is_exact():
    assert all(share_interval(units, units).high == 1.0 for units in range(1, 60))
    assert all(share_interval(0, units).low == 0.0 for units in range(1, 60))


def test_values_between_a_share_s_are_no_share():
    """0.5 is a tie of a share; 0.2 makes it a mean in bounds, here with 0 and 1 added."""
    ties, score = sample(0, 0.5, 1, 1, 1, 1), sample(0.2, 0.5, 1, 1, 1, 1)
    assert sample_interval(ties) == share_interval(4.5, 6)
    values = [0.2, 0.5, 1, 1, 1, 1, 0, 1]
    half = stats.t.ppf(0.975, 7) * np.std(values, ddof=1) / math.sqrt(8)
    assert sample_interval(score).low == pytest.approx(np.mean(values) - half)


def test_a_mean_over_seeds():
    """1 to 5: deviation 1.58114, error 0.70711, t with four degrees of freedom 2.776445."""
    found = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0], "seeds")
    assert ends(found) == pytest.approx((3 - 1.96324, 3 + 1.96324), abs=1e-5)
    theirs = stats.ttest_1samp([1.0, 2.0, 3.0, 4.0, 5.0], 0.0)
    assert found.p == pytest.approx(theirs.pvalue) and found.p == pytest.approx(0.0132356, abs=1e-6)
    assert ends(found) == pytest.approx(theirs.confidence_interval())


@pytest.mark.parametrize(
    ("values", "missing"),
    [
        ([0.001, 0.001], "not estimable from 2 seeds: needs at least 5"),  # p was 0.000
        ([0.3], "not estimable from 1 seed: needs at least 5"),
        ([0.1, 0.2, 0.3, 0.4], "not estimable from 4 seeds: needs at least 5"),
        (
            [0.3, 0.1 + 0.2, 0.3, 0.3, 0.3],  # alike up to rounding
            "not estimable: all 5 seeds give the same value; needs more seeds, or more held-out rows "
            "that tell them apart",
        ),
        ([0.0] * 5, "not estimable: all 5 seeds give the same value"),
        ([], "not estimable without seeds"),
    ],
)
def test_nothing_looks_certain_that_is_not(values, missing):
    found = mean_interval(values, "seeds")
    assert (found.low, found.high, found.p) == (None, None, None)
    assert found.missing.startswith(missing) and not found.excludes(7.0)


def test_a_value_at_either_end_is_not_excluded():
    interval = Interval(1.0, 0.5, 1.5, 9, "seeds")
    outside = {value: interval.excludes(value) for value in (0.0, 0.4, 0.5, 1.0, 1.5, 1.6)}
    assert outside == {0.0: True, 0.4: True, 0.5: False, 1.0: False, 1.5: False, 1.6: True}
    for half in (Interval(1.0, 0.5, None, 9, "seeds"), Interval(1.0, None, 1.5, 9, "seeds")):
        assert not half.excludes(0.0) and not half.excludes(2.0)


def test_no_interval_leaves_the_bounds():
    assert mean_interval([0.99, 1.0, 0.9, 1.0, 1.0], "seeds", SHARE).high == 1.0
    assert mean_interval([0.0, 0.0, 0.1, 0.0, 0.0], "clients", SHARE).low == 0.0


def test_a_deviation_is_no_finer_than_its_values():
    """One of five seeds differs by one row of 10: deviation 0.0447, rounding to 0.4 is 0.1155."""
    values = [0.1, 0.0, 0.0, 0.0, 0.0]
    wide = mean_interval(values, "seeds", step=0.4)
    assert wide.high - wide.estimate == pytest.approx(2.776445 * 0.4 / math.sqrt(12 * 5), abs=1e-5)
    assert mean_interval(values, "seeds", step=0.1) == mean_interval(values, "seeds")


def test_rows_of_one_model_each_are_the_paired_t_test():
    left, right = [1.0, 2.0, 4.0, 3.0, 2.5, 1.0], [1.5, 1.0, 6.0, 4.0, 2.0, 3.0]
    one, other = (sample(*values, bounds=UNBOUNDED) for values in (left, right))
    found = rows_difference([named(one)], [named(other)])
    theirs = stats.ttest_rel(right, left)
    assert found.p == pytest.approx(theirs.pvalue)
    assert ends(found) == pytest.approx(theirs.confidence_interval())
    assert found == change(one, other)


def test_a_paired_difference_of_shares():
    """Ten rows, three won and one lost, one added at -1 and at +1 (Bonett and Price): the middle is 2/12,
    squares 6 - 12/36, so the error is sqrt(12/11 * 5.66667) / 12 = 0.20719, t (11) = 2.200985."""
    left, right = sample(*[0] * 5, 1, *[1] * 4), sample(1, 1, 1, 0, 0, 0, *[1] * 4)
    found = change(left, right)
    assert found.estimate == pytest.approx(0.2) and found.units == 10
    assert ends(found) == pytest.approx((1 / 6 - 0.45602, 1 / 6 + 0.45602), abs=1e-4)
    same = change(left, left)  # not one row differs, and still other rows might
    assert same.estimate == 0 and same.low < -0.1 and same.high > 0.1 and same.p == 1.0


def test_below_five_rows_there_is_no_p():
    found = change(sample(0, 0, 0, 0), sample(1, 1, 1, 1))
    assert (found.p, found.missing) == (None, "not estimable from 4 rows: needs at least 5")
    assert change(sample(0, 0, 0, 0, 0), sample(1, 1, 1, 1, 1)).p < 0.05


def test_a_difference_has_the_width_of_its_scale_for_a_bound():
    """Of 1 to 10 it is -9 to 9: gaps of 9 and 0 with both added, mean 9 / 7, squares 243 - 81 / 7."""
    low, high = (
        Sample("", own, (1.0,) * 5, (), (1.0, 10.0)) for own in ((1.0,) * 5, (10.0, *(1.0,) * 4))
    )
    error = math.sqrt(7 / 6 * (243 - 81 / 7)) / 7
    found = change(low, high)
    assert ends(found) == pytest.approx(
        [9 / 7 + sign * stats.t.ppf(0.975, 6) * error for sign in (-1, 1)]
    )


@pytest.mark.parametrize("values", [(0.0,) * 5, (1e6, 1e6, 1e6, 1e6, 1e6 + 1e-4)])
def test_rows_that_are_alike_have_no_interval(values):
    found = sample_interval(sample(*values, bounds=UNBOUNDED))
    assert (found.low, found.high) == (None, None) and "all 5 rows give the same" in found.missing


def test_small_values_that_differ_have_one():
    found = sample_interval(sample(1e-12, 2e-12, 3e-12, 4e-12, 5e-12, bounds=UNBOUNDED))
    assert ends(found) == pytest.approx((1.03676e-12, 4.96324e-12), rel=1e-4)


def test_a_mean_over_two_groups_by_hand():
    """Means 2 of 1, 3 and 4 of 2, 4, 6: variances 2/1 2/4 and 3/2 8/9, t with 5 - 2 is 3.182446."""
    found = sample_interval(sample(1, 3, 2, 4, 6, groups=(1, 1, 0, 0, 0), bounds=UNBOUNDED))
    assert found.estimate == 3.0 and found.units == 5
    assert found.high - 3 == 3 - found.low == pytest.approx(3.182446 * math.sqrt(7 / 3), abs=1e-5)


def test_a_row_is_one_unit_however_many_models_judged_it():
    one = sample(*[0, 1] * 10)
    other = sample(*[1, 1, 0, 1] * 5)
    single = rows_difference([named(one)], [named(other)])
    thrice = rows_difference([named(one)] * 3, [named(other)] * 3)
    assert ends(thrice) == pytest.approx(ends(single)) and thrice.units == 20
    apart = rows_difference(
        [named(one), named(one, first=100)], [named(other), named(other, first=100)]
    )
    assert apart.units == 40 and apart.high - apart.low < single.high - single.low
    with pytest.raises(ValueError, match="rows that both"):
        rows_difference([named(one)], [named(other, first=1)])


def test_a_loss_a_token_weighs_rows_by_their_tokens():
    """Totals 2, 6, 4, 3, 5 over 1, 3, 2, 2, 2 tokens: 20/10 = 2, residuals 0, 0, 0, -1, 1, so the error
    is sqrt(5/4 * 2) / 10 = 0.158114, t (4) = 2.776445."""
    own = sample(2, 6, 4, 3, 5, weights=(1.0, 3.0, 2.0, 2.0, 2.0), bounds=UNBOUNDED)
    found = sample_interval(own)
    assert found.estimate == 2.0
    assert ends(found) == pytest.approx((2 - 0.438993, 2 + 0.438993), abs=1e-5)
    assert Sample.from_record(own.to_record()) == own
    few = sample(2, 6, bounds=UNBOUNDED)
    assert sample_interval(few).missing == "not estimable from 2 rows: needs at least 5"


@pytest.mark.parametrize(
    "own",
    [
        sample(0, 1, 0.5),
        sample(2, 6, weights=(1.0, 3.0), bounds=(0.0, math.inf)),
        sample(0, 1, 1, groups=(0, 1, 1), bounds=UNBOUNDED),
    ],
)
def test_a_record_of_rows_is_read_again(own):
    record = own.to_record()
    assert ("weights" in record, "groups" in record) == (own.weights[-1] != 1, bool(own.groups))
    assert Sample.from_record(record) == own
    ends = [end if math.isfinite(end) else None for end in own.bounds]  # as JSON has them
    assert Sample.from_record({**record, "bounds": ends}) == own


def test_an_area_under_the_curve():
    """DeLong: the variance is that of the wins of either class over its number, added up."""
    wins = {1: [1.0, 0.5, 0.75, 1.0] * 10, 0: [0.5, 0.875, 0.875, 1.0] * 8}
    totals, groups = [*wins[1], *wins[0]], (1,) * 40 + (0,) * 32
    found = sample_interval(sample(*totals, groups=groups))
    padded = [[*own, 0.0, 1.0] for own in wins.values()]
    error = math.sqrt(sum(np.var(own, ddof=1) / len(own) for own in padded))
    middle = np.mean([np.mean(own) for own in padded])
    half = stats.t.ppf(0.975, 72 - 2 + 4) * error
    assert found.estimate == pytest.approx(0.8125)
    assert ends(found) == pytest.approx((middle - half, middle + half))


def test_means_within_bounds():
    """Four scores of 10 on a scale of 1 to 10: with 1 and 10 added, mean 8.5, deviation 3.67423."""
    scores = Sample("", (10.0,) * 4, (1.0,) * 4, (), (1.0, 10.0))
    found = sample_interval(scores, "questions")
    assert found.estimate == 10.0 and found.high == 10.0
    assert found.low == pytest.approx(
        8.5 - stats.t.ppf(0.975, 5) * 3.67423 / math.sqrt(6), abs=1e-4
    )
    shares = Sample("", (1.0,) * 6, (1.0,) * 6, (), SHARE)
    assert sample_interval(shares, "rows") == share_interval(6, 6)


def test_an_arm_of_several_models():
    own = sample(0, 1, 1, 1, 1, 0)
    assert rows_interval([named(own)]) == sample_interval(own)
    assert rows_interval([named(own), named(own)]).units == 6


def test_the_quantile_of_shares_is_scipys_to_the_bit():
    assert special.ndtri(0.5 + 0.5 * LEVEL) == NORMAL_QUANTILE
