"""The table of the specification (dp-accounting 0.6.0, opacus 1.6.0), the closed form, and what is refused."""

import itertools
import math
import sys

import pytest

from fedloom.errors import SettingsError
from fedloom.privacy import accounting
from fedloom.privacy.accounting import Releases, epsilon, solve_noise_multiplier
from fedloom.privacy.gaussian import delta_of

TABLE = [  # q, z, T, delta; epsilon by RDP, by PLD, by Opacus's RDP
    (1, 5.0, 30, 1e-5, 5.2524, 4.8661, 5.2524),
    (0.1, 1.0, 100, 1e-5, 7.9039, 7.0466, 7.8993),
    (0.01, 1.0, 1000, 1e-5, 2.1014, 1.8282, 2.1014),
    (0.01, 0.8, 2000, 1e-6, 5.5345, 4.9445, 5.5341),
    (10 / 747, 1.0, 200, 1e-4, 1.2817, 0.9608, 1.2817),
    (0.05, 2.0, 500, 1e-5, 2.7686, 2.5320, 2.7686),
    (0.001, 0.6, 10_000, 1e-6, 3.9992, 3.1522, 3.9991),
    (0.5, 3.0, 50, 1e-3, 4.6133, 4.0344, 4.5685),
]
QUICK = TABLE[5:6]

SOLVED = [  # q, T, delta, epsilon; z by RDP, by PLD: the specification's table
    (10 / 747, 200, 1e-4, 8, 0.5252, 0.4885),
    (0.01, 1000, 1e-5, 3, 0.8646, 0.8137),
    (0.1, 100, 1e-5, 8, 0.9937, 0.9359),
    (1, 30, 1e-5, 8, 3.4927, 3.2876),
    # by dp-accounting's own calibrate_dp_mechanism, between 0.4 and 30, to 1e-5
    (0.05, 500, 1e-5, 1, 4.6617, 4.3000),
    (0.001, 10_000, 1e-6, 2, 0.7542, 0.6690),
    (0.5, 50, 1e-3, 4, 3.3279, 3.0196),
    (1, 100, 1e-5, 2, 21.4911, 19.9381),
    (1, 1, 1e-6, 0.5, 8.6766, 8.0576),
    (4 / 60, 300, 1e-3, 8, 0.9021, 0.8398),
]


def pld_of(q, z, steps, delta):
    return epsilon([Releases(z, q, steps)], delta, "pld").epsilon


@pytest.mark.parametrize(("q", "z", "steps", "delta", "renyi", "pld", "opacus"), TABLE)
def test_renyi_is_as_in_the_table_and_near_opacus(q, z, steps, delta, renyi, pld, opacus):
    found = epsilon([Releases(z, q, steps)], delta, "rdp")
    assert found.epsilon == pytest.approx(renyi, abs=1e-3)
    assert found.epsilon == pytest.approx(opacus, rel=0.01)
    assert found.accountant.startswith("RDP, dp-accounting ")


@pytest.mark.parametrize(("q", "z", "steps", "delta", "renyi", "pld", "opacus"), QUICK)
def test_auto_takes_privacy_loss_distributions(q, z, steps, delta, renyi, pld, opacus):
    found = epsilon([Releases(z, q, 200), Releases(z, q, steps - 200)], delta)
    assert found.epsilon == pytest.approx(pld, abs=1e-3)
    assert found.accountant.startswith("PLD, dp-accounting ")


@pytest.mark.slow
@pytest.mark.parametrize(("q", "z", "steps", "delta", "renyi", "pld", "opacus"), TABLE)
def test_the_table_of_privacy_loss_distributions(q, z, steps, delta, renyi, pld, opacus):
    assert pld_of(q, z, steps, delta) == pytest.approx(pld, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("q", "steps", "delta", "target", "renyi", "pld"), SOLVED)
def test_the_table_of_noise_for_a_target(q, steps, delta, target, renyi, pld):
    by_renyi = solve_noise_multiplier(target, delta, q, steps, "rdp")
    assert by_renyi == pytest.approx(renyi, abs=3e-4, rel=2e-4)
    found = solve_noise_multiplier(target, delta, q, steps)
    assert found == pytest.approx(pld, abs=3e-4, rel=2e-4)
    assert epsilon([Releases(found, q, steps)], delta).epsilon <= target


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Optimal order:UserWarning")
def test_forty_settings_agree_with_opacus_and_the_closed_form():
    from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent
    from opacus.accountants.rdp import RDPAccountant

    grid = itertools.product((0.001, 0.01, 0.1, 1.0), (0.5, 1.0, 2.0, 5.0, 10.0), (1, 1000))
    checked = 0
    for q, z, steps in grid:
        delta = 1e-5
        found = epsilon([Releases(z, q, steps)], delta, "rdp").epsilon
        orders = RDPAccountant.DEFAULT_ALPHAS
        rdp = compute_rdp(q=q, noise_multiplier=z, steps=steps, orders=orders)
        theirs = get_privacy_spent(orders=orders, rdp=rdp, delta=delta)[0]
        # dp-accounting leaves out orders below 2 that do not converge, which large epsilons would take
        near = found == pytest.approx(theirs, rel=0.01, abs=2e-3) or found < theirs
        assert near or (found > 10 and found > theirs)
        best = epsilon([Releases(z, q, steps)], delta)
        assert best.epsilon <= found
        if q == 1 and best.accountant.startswith("PLD") and best.epsilon > 0:
            mu = math.sqrt(steps) / z
            assert delta_of(best.epsilon, mu) <= delta * (1 + 1e-6)
            assert delta_of(best.epsilon - 1e-3, mu) >= delta
        checked += 1
    assert checked == 40


def test_without_sampling_it_is_the_closed_form():
    found = epsilon([Releases(5.0, 1, 30)], 1e-5).epsilon
    mu = math.sqrt(30) / 5
    assert delta_of(found - 1e-3, mu) > 1e-5 > delta_of(found + 1e-3, mu)


def test_above_fifty_it_is_renyi_and_says_so():
    found = epsilon([Releases(1.0, 1, 400)], 1e-5)
    assert found.epsilon > 50 and found.accountant.startswith("RDP")
    with pytest.raises(SettingsError, match='use "rdp", or "auto"'):
        epsilon([Releases(1.0, 1, 400)], 1e-5, "pld")
    assert epsilon([Releases(0.1, 0.001, 1)], 1e-5).accountant.startswith("RDP")


def test_nothing_released_and_nothing_hidden():
    assert epsilon([], 1e-5).epsilon == epsilon([Releases(1, 1, 0)], 1e-5).epsilon == 0
    assert epsilon([Releases(0, 1, 1), Releases(5, 1, 1)], 1e-5).epsilon == math.inf


def test_a_solved_noise_multiplier_meets_its_target():
    z = solve_noise_multiplier(8, 1e-5, 1, 30, "rdp")
    assert z == pytest.approx(3.4927, abs=5e-4)
    assert epsilon([Releases(z, 1, 30)], 1e-5, "rdp").epsilon <= 8
    with pytest.raises(SettingsError, match="cannot be met"):
        solve_noise_multiplier(1e-7, 1e-5, 1, 10_000)


@pytest.mark.parametrize("given", [(-1, 1, 1), (1, 0, 1), (1, 1.1, 1), (1, 1, -1)])
def test_impossible_releases_are_refused(given):
    with pytest.raises(ValueError, match="accounted"):
        Releases(*given)


def test_a_missing_library_is_one_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    accounting._epsilon.cache_clear()
    with pytest.raises(SettingsError, match=r"pip install 'fedloom\[privacy\]'"):
        accounting.epsilon([Releases(1, 1, 1)], 1e-5)


ANSWERS = {"RDP": 2.0, "PLD": 1.0}


@pytest.fixture
def asked(monkeypatch):
    """Accountants that answer at once, and what they were asked."""
    calls, answers = [], dict(ANSWERS)

    def answer(kinds, delta, kind):
        calls.append((kind, kinds, delta))
        return accounting.Spent(answers[kind], kind)

    monkeypatch.setattr(accounting, "_epsilon", answer)
    return calls, answers


def test_which_accountant_is_asked_and_whose_answer_counts(asked):
    calls, answers = asked
    given = [Releases(2.0, 0.5, 3), Releases(1.0, 1, 1), Releases(2.0, 0.5, 4), Releases(9.0, 1, 0)]
    assert epsilon(given, 1e-5).accountant == "PLD"
    kinds = (((1.0, 1), 1), ((2.0, 0.5), 7))
    assert calls == [("RDP", kinds, 1e-5), ("PLD", kinds, 1e-5)]
    assert epsilon(given, 1e-5, "rdp").accountant == "RDP"
    answers["PLD"] = 3.0
    assert epsilon(given, 1e-5).accountant == "RDP"  # the least of both
    assert epsilon(given, 1e-5, "pld").accountant == "PLD"


@pytest.mark.parametrize(
    ("renyi", "noise", "kinds", "tried"),
    [
        (50.0, 1.0, 1, True),
        (50.1, 1.0, 1, False),
        (2.0, 0.2, 1, True),
        (2.0, 0.19, 1, False),
        (2.0, 1.0, 8, True),
        (2.0, 1.0, 9, False),
    ],
)
def test_where_privacy_loss_distributions_are_tried(asked, renyi, noise, kinds, tried):
    calls, answers = asked
    answers["RDP"] = renyi
    epsilon([Releases(noise + kind, 1, 1) for kind in range(kinds)], 1e-5)
    assert [kind for kind, *_ in calls] == (["RDP", "PLD"] if tried else ["RDP"])


@pytest.mark.parametrize("target", [0.01, 0.3, 1.0, 2.0, 40.0, 300.0])
@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
def test_the_least_noise_is_found_to_four_digits_and_in_few_steps(target, power):
    """spent = 4 / z^p, so that z = (4 / target)^(1 / p)."""
    calls = []

    def spent(z):
        calls.append(z)
        return 4 / z**power

    found, right = accounting._least(spent, target), (4 / target) ** (1 / power)
    assert spent(found) <= target and right * (1 - 1e-12) <= found <= right * (1 + 2e-4)
    assert len(calls) < 14


def test_a_curve_that_bends_and_a_target_that_anything_meets():
    found = accounting._least(lambda z: 1 / z + 5 / z**2, 6.0)
    assert 1.0 <= found <= 1 + 2e-4
    assert accounting._least(lambda z: 1e-3, 1.0) < 0.011  # no noise below is looked for


def test_without_sampling_the_closed_form_is_where_the_search_begins(monkeypatch):
    target, least = 2.0, accounting.noise_multiplier(2.0, 1e-5, 9)

    def solved(off):
        """With an accountant whose epsilon is too large by so much, relatively: about as 1 / z."""
        monkeypatch.setattr(
            accounting,
            "_epsilon",
            lambda kinds, delta, kind: accounting.Spent(
                target * least * (1 + off) / kinds[0][0][0], kind
            ),
        )
        return solve_noise_multiplier(target, 1e-5, 1, 9) / least - 1

    step = 1e-4 / 16
    assert solved(0.0) == pytest.approx(step, rel=1e-6)
    assert solved(3 * step) == pytest.approx(4 * step, rel=1e-6)  # doubled until it suffices
    with pytest.raises(SettingsError, match="cannot be met in 9 releases by noise up to 100000"):
        solved(1.1e5 / least - 1 + 1e5)
