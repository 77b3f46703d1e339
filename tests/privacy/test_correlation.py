"""Correlated noise: sensitivities by search, noise by the matrix, hand numbers, and dp-accounting's tree."""

import itertools

import dp_accounting
import dp_accounting.rdp
import numpy as np
import pytest
from scipy.stats import kstest

from fedloom.privacy.accounting import Releases, epsilon
from fedloom.privacy.correlation import Banded, Participation, Tree, most_of
from fedloom.privacy.noise import NoiseSource

SOURCE = NoiseSource(bytes(range(32)), "run")


def matrix(own, rounds):
    """C, from its definition."""
    if isinstance(own, Tree):
        t, i = np.mgrid[:rounds, :rounds] + 1
        return np.array((t - (t & -t) < i) & (i <= t), np.float64)
    column = np.concatenate([own.coefficients, np.zeros(rounds)])
    return np.tril(column[np.abs(np.subtract.outer(range(rounds), range(rounds)))])


def patterns(places, rounds):
    """All rounds in which a client may take part that leave no room for one more."""
    for count in range(1, places.most + 1):
        for own in itertools.combinations(range(rounds), count):
            if all(b - a >= places.separation for a, b in itertools.pairwise(own)):
                yield list(own)


CASES = [
    (kind, Participation.of(rounds, separation, most))
    for kind in (Tree, *(lambda own, p=p: Banded(own, p) for p in (1, 2, 3, 8)))
    for rounds, separation, most in [
        (1, 1, None),
        (7, 1, None),
        (7, 2, 2),
        (8, 3, None),
        (9, 4, 1),
        (8, 1, 3),
    ]
]


@pytest.mark.parametrize(("kind", "places"), CASES)
def test_no_client_moves_more_than_the_sensitivity(kind, places):
    own = kind(places)
    for rounds in range(1, places.rounds + 1):
        c = matrix(own, rounds)
        allowed = list(patterns(places, rounds))
        found = max(float(np.linalg.norm(c[:, pattern].sum(1))) for pattern in allowed)
        bound = own.sensitivity(rounds)
        assert found <= bound * (1 + 1e-12)
        if (
            isinstance(own, Banded)
            or places.most == 1
            or places.separation == 1 == places.rounds // places.most
        ):
            assert found == pytest.approx(bound, rel=1e-12)
        row = max(float(c[-1, pattern].sum()) for pattern in allowed)
        assert row <= own.row(rounds) * (1 + 1e-12)


def test_random_directions_of_a_thousand_clients_move_no_more():
    """Vectors of norm up to 1 in place of one direction, in rounds that the draw allows."""
    rng = np.random.default_rng(0)
    for trial in range(1000):
        rounds, apart = int(rng.integers(1, 40)), int(rng.integers(1, 6))
        places = Participation.of(rounds, apart, int(rng.integers(1, 8)))
        own = Tree(places) if trial % 2 else Banded(places, int(rng.integers(1, 17)))
        u, last, left = np.zeros((rounds, 3)), -apart, places.most
        for t in range(rounds):
            if left and t - last >= apart and rng.random() < 0.7:
                u[t] = rng.standard_normal(3)
                u[t] *= rng.choice([1.0, rng.random()]) / np.linalg.norm(u[t])
                last, left = t, left - 1
        assert np.linalg.norm(matrix(own, rounds) @ u) <= own.sensitivity(rounds) * (1 + 1e-12)


def test_hand_numbers():
    """c = 1, 1/2, 3/8, 5/16. Columns 1 and 3 of three bands over 4 rounds add up to 1, 1/2, 11/8, 1/2."""
    own = Banded(Participation.of(4, 2, None), 3)
    assert own.coefficients.tolist() == [1, 0.5, 0.375]
    assert own.sensitivity(4) ** 2 == pytest.approx(1 + 0.25 + (11 / 8) ** 2 + 0.25)
    assert own.row(4) == 1.375 and own.row(2) == 1.0
    assert own.sensitivity(1) == 1 and own.total([1, 1, 1]) == pytest.approx(3**0.5)
    tree = Tree(Participation.of(8, 8, None))
    assert tree.sensitivity(8) == 2.0  # round 1 is in nodes of 1, 2, 4 and 8 rounds
    assert Tree(Participation.of(4, 1, None)).sensitivity(4) ** 2 == pytest.approx(1 + 4 + 1 + 16)
    assert (
        Banded(Participation.of(10, 3, None), 1).sensitivity(10) == 2.0
    )  # 4 rounds of its own noise
    assert most_of(np.array([5.0, 6.0, 5.0, 1.0]), 2, 2) == 10
    assert most_of(np.array([5.0, 6.0, 5.0, 1.0]), 2, 1) == 6


@pytest.mark.parametrize("rounds", [1, 2, 3, 4, 7, 8, 100])
def test_a_tree_that_each_client_is_in_once_costs_what_dp_accounting_says(rounds):
    accountant = dp_accounting.rdp.RdpAccountant(
        neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_SPECIAL
    )
    accountant.compose(dp_accounting.SingleEpochTreeAggregationDpEvent(2.0, rounds))
    own = Tree(Participation.of(rounds, 1, 1)).sensitivity(rounds)
    ours = epsilon([Releases(2.0 / own, 1.0, 1)], 1e-5, "rdp").epsilon
    assert ours == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-6)


@pytest.mark.parametrize(
    "own",
    [
        Tree(Participation.of(13, 1, None)),
        *(Banded(Participation.of(13, 1, None), bands) for bands in (1, 2, 5)),
    ],
)
def test_noise_of_rounds_is_the_inverse_of_the_matrix(own):
    rng, earlier, kept = np.random.default_rng(1), {}, []
    drawn = rng.integers(-(2**40), 2**40, (13, 50))
    for t, z in enumerate(drawn, 1):
        kept.append(own.next(t, z, earlier))
        assert len(earlier) <= (own.bands - 1 if isinstance(own, Banded) else 4)
    c = matrix(own, 13)
    error = np.abs(c @ np.array(kept, np.float64) - drawn).max()
    assert error == 0 if isinstance(own, Tree) else error <= 0.5 + 2.0**-9
    inverse = np.linalg.inv(c)
    single, whole = own.variances()
    assert single == pytest.approx((inverse**2).sum(1))
    assert whole == pytest.approx((np.tril(np.ones((13, 13))) @ inverse).__pow__(2).sum(1))


def test_draws_are_gaussian_with_the_stated_deviations():
    """Kolmogorov-Smirnov of a round's noise and of the sum over all rounds, in steps of 2^30."""
    for own in (Tree(Participation.of(3, 1, None)), Banded(Participation.of(3, 1, None), 3)):
        earlier, found = {}, []
        for t in range(1, 4):
            z = SOURCE.stream("sum", t, -1).discrete_gaussian(2.0**30, 40_000)
            found.append(own.next(t, z, earlier))
        single, whole = own.variances()
        for noise, variance in ((found[-1], single[-1]), (sum(found), whole[-1])):
            assert kstest(noise / 2.0**30 / variance**0.5, "norm").pvalue > 1e-3


def test_bands_leave_less_noise_in_the_sum_than_a_tree_or_none():
    """At the same privacy: 30 rounds, each client in every fifth. What docs/privacy.md says of them."""
    places = Participation.of(30, 5, None)
    ways = {"independent": Banded(places, 1), "tree": Tree(places), "banded": Banded.best(places)}
    left = {
        name: own.sensitivity(30) * float(own.variances()[1][-1]) ** 0.5
        for name, own in ways.items()
    }
    assert {name: round(own, 1) for name, own in left.items()} == {
        "independent": 13.4,  # sqrt(6) sqrt(30); drawn by coins it is sqrt(30) sqrt(30)
        "tree": 11.3,
        "banded": 7.4,
    }


def test_rounds_that_fit_by_hand():
    """Of ten rounds, three apart: 1, 4, 7, 10."""
    assert [Participation.of(10, 3, most).most for most in (None, 2, 9)] == [4, 2, 4]
    own = Participation.of(10, 3, None)
    assert [own.within(rounds) for rounds in range(1, 11)] == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4]


def test_coefficients_are_cut_down_to_4096ths():
    """binom(2j, j) / 4^j: 252 / 1024 for j = 5, 0.07094 for 63."""
    own = Banded(Participation.of(1, 1, None), 64).coefficients * 4096
    assert own[[5, 6, 7, 63]].tolist() == [1008, 924, 858, 290]
    for bands in (0, 65):
        with pytest.raises(ValueError, match="bands must be from 1 to 64"):
            Banded(Participation.of(1, 1, None), bands)


def test_releases_that_were_made_again_by_hand():
    """Columns 1 and 3 of 1, 1/2, 3/8 over five rounds, and round 5 twice more, at 1 + 3/8 each."""
    own = Banded(Participation.of(8, 2, 2), 3)
    once = 1 + 0.25 + 1.375**2 + 0.25 + 0.375**2
    assert own.sensitivity(5) ** 2 == pytest.approx(once)
    assert own.total([1, 5, 3, 5, 5]) ** 2 == pytest.approx(once + 2 * 1.375**2)
    assert own.total([]) == 0.0
    tree = Tree(Participation.of(8, 2, 3))
    assert [tree.row(t) for t in range(1, 9)] == [1, 1, 1, 2, 1, 1, 1, 3]
    assert tree.total([4, 4, 2]) ** 2 == pytest.approx(7 + 2**2)


def test_which_noise_hangs_on_earlier_noise():
    places = Participation.of(8, 2, None)
    found = [
        (own.coupled, own.rounded) for own in (Tree(places), Banded(places, 1), Banded(places, 2))
    ]
    assert found == [(True, False), (False, False), (True, True)]


@pytest.mark.parametrize(
    ("places", "bands"),
    [((100, 1, 1), 16), ((64, 64, None), 16), ((30, 5, None), 5), ((2, 1, None), 1)],
)
def test_of_up_to_sixteen_bands_the_best_are_taken(places, bands):
    own, errors = Participation.of(*places), {}
    assert Banded.best(own).bands == bands
    for tried in range(1, min(16, own.rounds) + 1):
        way = Banded(own, tried)
        errors[tried] = float(way.variances()[1].mean()) * way.sensitivity(own.rounds) ** 2
    assert min(errors, key=errors.get) == bands
