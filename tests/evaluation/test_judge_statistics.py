"""Orders, intervals and biases on ratings whose answer is known."""

from collections import Counter

import numpy as np
import pytest
from scipy import stats

from fedloom.evaluation.judge_statistics import (
    Rating,
    agreement,
    bootstrap,
    consistency,
    first_preference,
    length_preference,
    model_scores,
    orders,
    position_bias,
    tied_share,
)

LENGTHS = {"a": 10, "b": 20, "c": 30}


def rate(score, questions=30, models=("a", "b", "c")):
    """Ratings of a judge that gives ``score(model, place)`` in every order."""
    rng = np.random.default_rng(0)
    return [
        Rating(f"q{q}", showing, models[m], place, score(models[m], place, q), LENGTHS[models[m]])
        for q in range(questions)
        for showing, order in enumerate(orders(len(models), 8, rng))
        for place, m in enumerate(order)
    ]


def rng():
    return np.random.default_rng(1)


def test_every_order_of_up_to_three_and_balanced_ones_above():
    assert len(orders(1, 8, rng())) == 1
    assert len(set(orders(3, 2, rng()))) == 6
    drawn = orders(5, 10, rng())
    assert len(drawn) == 10 and all(sorted(order) == list(range(5)) for order in drawn)
    places = Counter((place, who) for order in drawn for place, who in enumerate(order))
    assert set(places.values()) == {2}  # each answer twice at each place
    assert len(orders(4, 8, rng())) == 8 and len(orders(5, 3, rng())) == 5  # once around at least
    assert orders(5, 10, rng()) == drawn and orders(5, 10, np.random.default_rng(2)) != drawn


def test_the_bootstrap_holds_the_mean_and_narrows():
    found = bootstrap([0.0, 1.0] * 50, rng())
    assert found.mean == 0.5 and found.count == 100
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.5 / 10, abs=0.03)
    assert np.isnan(bootstrap([], rng()).mean)


def test_the_bootstrap_is_scipys_with_the_bounds_added():
    values = [
        0.2131,
        0.4273,
        0.9617,
        0.3089,
        0.2777,
    ]  # on no grid, so that quantiles tell draws apart
    theirs = stats.bootstrap(
        ([*values, 0.0, 1.0],), np.mean, n_resamples=2000, method="percentile", rng=rng()
    ).confidence_interval
    found = bootstrap(values, rng())
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert bootstrap([0.0, 1.0, 1.0], rng(), (0, 10)).high > 1.0  # of a scale: no share


def test_few_or_equal_questions_do_not_look_certain():
    none = bootstrap([0.0] * 6, rng())  # 0 of 6 answers refused
    assert (none.mean, none.low) == (0, 0) and none.high == pytest.approx(0.39033, abs=1e-5)
    half = bootstrap([0.5, 1.0, 0.0, 0.5], rng())  # ties make it no other than Wilson's: 2 of 4
    assert (half.low, half.high) == pytest.approx((0.15004, 0.84996), abs=2e-6)
    two = bootstrap([9.0, 9.0], rng(), (1, 10))
    assert two.low < 6 and two.high > 9.0 == two.mean
    assert bootstrap([10.0] * 3, rng(), (1, 10)).high == 10.0
    lengths = bootstrap([120.0, 80.0], rng(), (0, float("inf")))
    assert (
        np.isnan(lengths.low)
        and lengths.missing == "not estimable from 2 questions: needs at least 5"
    )


def test_a_fair_judge_has_no_bias():
    ratings = rate(lambda model, place, q: {"a": 3, "b": 8, "c": 5}[model])
    assert all(e.mean == pytest.approx(0) for e in position_bias(ratings, rng(), (1, 10)))
    assert first_preference(ratings, rng()).mean == pytest.approx(0.5)
    assert consistency(ratings, rng()).mean == 1.0 and tied_share(ratings, rng()).mean == 0.0
    assert model_scores(ratings)["b"]["q0"] == 8
    assert length_preference(ratings, rng()).mean == pytest.approx(2 / 3)  # b>a, c>a, not c>b


def test_a_judge_that_likes_the_first_place():
    ratings = rate(lambda model, place, q: 9 if place == 0 else 5)
    first, second, third = position_bias(ratings, rng(), (1, 10))
    assert 1 < first.low < first.mean == pytest.approx(8 / 3)  # equal questions are no certainty
    assert second.high < 0 and third.high < 0
    assert first_preference(ratings, rng()).mean == 1.0
    assert consistency(ratings, rng()).mean == 0.0
    assert length_preference(ratings, rng()).mean == pytest.approx(0.5)


def test_a_bias_has_the_width_of_the_scale_for_a_bound():
    ratings = rate(lambda model, place, q: 9 if place == 0 else 5, questions=2)
    first, *_ = position_bias(ratings, rng(), (1, 10))
    expected = bootstrap([8 / 3, 8 / 3], rng(), (-9, 9))
    assert (first.low, first.high) == pytest.approx((expected.low, expected.high))


def test_a_lead_of_less_than_a_point_counts_in_whatever_order_ratings_come():
    ratings = rate(lambda model, place, q: 5 - 0.2 * place)
    for own in (ratings, ratings[::-1]):
        assert first_preference(own, rng()).mean == 1.0


def test_questions_with_lost_showings_do_not_unbalance_the_places():
    ratings = rate(lambda model, place, q: {"a": 3, "b": 8, "c": 5}[model])
    lost = [r for r in ratings if not (r.question == "q0" and r.showing in (0, 1))]
    assert all(
        e.mean == pytest.approx(0) and e.count == 29 for e in position_bias(lost, rng(), (1, 10))
    )


def test_a_judge_that_likes_length():
    ratings = rate(lambda model, place, q: LENGTHS[model] / 5)
    found = length_preference(ratings, rng())
    assert found.mean == found.high == 1.0
    assert found.low == pytest.approx(30 / (30 + 1.959964**2))  # Wilson


def test_ties():
    ratings = rate(lambda model, place, q: 10 if q < 15 else place)
    found, whole = tied_share(ratings, rng()), 1.959964**2
    assert (found.mean, found.count) == (0.5, 30)
    middle, half = 0.5, 1.959964 / (30 + whole) * (30 * 0.25 + whole / 4) ** 0.5  # Wilson
    assert (found.low, found.high) == pytest.approx((middle - half, middle + half))
    found = consistency(ratings, rng())  # an eternal tie has no winner
    assert (found.mean, found.low, found.count) == (0.0, 0.0, 30)
    assert found.high == pytest.approx(whole / (30 + whole))


def test_nothing_was_rated():
    assert position_bias([], rng(), (1, 10)) == [] and not consistency([], rng()).count
    assert not tied_share([], rng()).count and length_preference([], rng()).count == 0


def test_agreement_is_krippendorffs_alpha():
    one = {"a": {"1": 1.0, "2": 2.0, "3": 3.0}, "b": {"1": 4.0}}
    assert agreement([one, one]) == pytest.approx(1.0)
    assert agreement([one]) is None and agreement([one, {"z": {"9": 1.0}}]) is None
    same = {"a": {"1": 5.0, "2": 5.0}}
    assert agreement([same, same]) is None  # nothing varies: alpha has no meaning
    # Two judges, units (1, 2), (2, 1): observed disagreement 1, expected (2/3): alpha = 1 - 3/2.
    left, right = {"a": {"1": 1.0, "2": 2.0}}, {"a": {"1": 2.0, "2": 1.0}}
    assert agreement([left, right]) == pytest.approx(-0.5)


def test_lost_verdicts_do_not_let_the_place_leak_into_the_scores():
    """A judge that only likes the first place, and loses one verdict in three: no model gains."""
    ratings = rate(lambda model, place, q: 9 if place == 0 else 5)
    drawn = np.random.default_rng(3).random((30, 6)) < 1 / 3
    kept = [r for r in ratings if not drawn[int(r.question[1:]), r.showing]]
    scores = model_scores(kept)
    assert 5 < len(scores["a"]) < 30  # a question counts where the answer was seen at every place
    for own in scores.values():
        assert list(own.values()) == pytest.approx([19 / 3] * len(own))
    naive = {m: np.mean([r.score for r in kept if r.model == m]) for m in scores}
    assert max(naive.values()) - min(naive.values()) > 0.05
