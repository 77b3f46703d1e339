"""The mechanism of a run: its plan, its budget, and the same noise for the same release alone."""

import pytest
import torch

from fedloom.errors import PluginError, PrivacyError, SettingsError
from fedloom.privacy.accounting import Releases, epsilon
from fedloom.privacy.client_level import ClippedSum
from fedloom.privacy.correlation import Participation
from fedloom.privacy.ledger import PrivacyLedger
from fedloom.privacy.noise import NoiseSource
from fedloom.privacy.private_mean import ClientLevelPlan, PrivateMean, participation_of
from fedloom.privacy.settings import PrivacySettings

START = {"a": torch.zeros(50)}


def plan(rounds=3, **settings):
    given = {"unit": "client", "delta": 1e-3, "accountant": "rdp", "clip": 2.0, **settings}
    return ClientLevelPlan.of(PrivacySettings(**given), 20, 5, rounds)


def made(tmp_path, own, key=bytes(32)):
    return PrivateMean(
        own, NoiseSource(key, "run"), PrivacyLedger(tmp_path / "ledger", compose=own.compose)
    )


def updates(*values):
    return [{"a": torch.full((50,), float(value))} for value in values]


def mean(private, values, round, start=START):
    """The mean of clients that take part for the first time."""
    first = 1000 * round + 10 * len(private.ledger.entries)
    return private.mean(updates(*values), start, round, range(first, first + len(values)))


def test_a_target_is_solved_for_all_rounds(tmp_path):
    own = plan(target_epsilon=4.0, rounds=10)
    assert own.promised.epsilon == pytest.approx(4.0, rel=1e-3) and own.promised.epsilon <= 4
    assert own.rate == 0.25 and own.sampling == 1 and own.expected == 5
    assert plan(noise_multiplier=own.noise_multiplier, rounds=10).promised == own.promised


def test_the_same_release_again_is_the_same_noise_and_costs_nothing(tmp_path):
    first = made(tmp_path, plan(noise_multiplier=1.0))
    one = mean(first, [0.1, 0.2], 1)
    again = mean(made(tmp_path, first.plan), [0.2, 0.1], 1)  # in another order
    assert torch.equal(one["a"], again["a"])
    resumed = made(tmp_path, first.plan)
    other = mean(resumed, [0.1], 1)  # one answer less
    gap = (other["a"] - one["a"] + (0.2 / 5)).double()
    assert float(gap.std()) > 0.2  # the noises do not cancel
    assert len(resumed.ledger.entries) == 2
    assert resumed.spent() == epsilon([Releases(1.0, 1, 2)], 1e-3, "rdp")


def test_nobody_answering_is_noise_alone_over_the_same_denominator(tmp_path):
    found = mean(made(tmp_path, plan(noise_multiplier=1.0)), [], 1)
    assert 0.2 < float(found["a"].std()) < 0.7  # 1.0 * clip 2 / 5 expected = 0.4


def test_a_budget_stops_before_it_is_passed(tmp_path):
    private = made(tmp_path, plan(target_epsilon=4.0, rounds=2))
    mean(private, [1], 1)
    mean(private, [1], 2)
    before = private.spent()
    assert before.epsilon <= 4
    with pytest.raises(PrivacyError, match="target_epsilon is 4"):
        mean(private, [0.1], 2)
    assert private.spent() == before and private.latest == 2
    mean(private, [1], 2)  # the one that was spent may be repeated


def test_the_clip_follows_and_is_restored(tmp_path):
    own = plan(noise_multiplier=1.0, clip_quantile=0.5, clip_count_noise=2.0)
    assert own.sum_multiplier == pytest.approx(1.0328, abs=1e-4)
    private = made(tmp_path, own)
    mean(private, [100] * 20, 1)
    saved, clip = private.saved(), private.clip
    assert clip > own.clip  # all were longer
    other = made(tmp_path, own)
    other.restore(saved)
    assert other.clip == clip
    with pytest.raises(SettingsError, match="clip_count_noise = 0"):
        plan(noise_multiplier=1.0, clip_quantile=0.5)  # a twentieth of 5 clients


@pytest.mark.parametrize("settings", [{}, {"min_separation": 2}, {"max_participations": 1}])
def test_sum_and_number_of_clients_together_cost_what_the_noise_multiplier_says(settings):
    """By the two sums of neighbours, with noise of each: their joint distance is 1 / z."""
    own = plan(noise_multiplier=1.5, clip_quantile=0.5, clip_count_noise=2.0, **settings)
    long, other = ClippedSum.empty(START, own.clip), ClippedSum.empty(START, own.clip)
    for update in updates(100):
        long.add(update)
    for update in updates(*[0] * (own.neighbours == "one with all its changes zero")):
        other.add(update)
    moved = abs(long.balance - other.balance) / 2 / own.count_noise
    assert 1 / own.sum_multiplier**2 + moved**2 == pytest.approx(1.5**-2)
    least = 2.0 if settings else 1.0
    with pytest.raises(SettingsError, match=f"it must be above {least:g}"):
        plan(noise_multiplier=2.0, clip_quantile=0.5, clip_count_noise=least, **settings)


def test_a_state_that_did_not_come_of_it_is_refused(tmp_path):
    private = made(tmp_path, plan(noise_multiplier=1.0))
    with pytest.raises(PluginError, match="Method"):
        private.require_released(1)
    mean(private, [], 1)
    private.require_released(1)


CORRELATED = [
    {"mechanism": "tree", "min_separation": 2},
    {"mechanism": "banded", "min_separation": 2, "bands": 3},
    {"mechanism": "independent", "min_separation": 2},
]


@pytest.mark.parametrize("settings", CORRELATED)
def test_a_target_is_solved_for_the_rounds_that_a_client_may_take_part_in(settings):
    own = plan(target_epsilon=4.0, rounds=10, **settings)
    assert own.promised.epsilon == pytest.approx(4.0, rel=1e-3) and own.promised.epsilon <= 4
    moved = own.facts["sensitivity"]
    assert own.promised == epsilon([Releases(own.noise_multiplier / moved, 1, 1)], 1e-3, "rdp")
    if settings["mechanism"] == "independent":  # five of ten rounds
        assert own.promised.epsilon == pytest.approx(
            epsilon([Releases(own.noise_multiplier, 1, 5)], 1e-3, "rdp").epsilon
        )
    assert own.neighbours == "one with all its changes zero"


def noises(private, rounds, values=(0.3,)):
    """The noise that each round adds, in units of the clip."""
    found = []
    for round in rounds:
        clean = sum(values) * min(1, 2 / (values[0] * 50**0.5)) if values else 0
        found.append((mean(private, values, round)["a"].double() * 5 - clean) / 2)
    return torch.stack(found)


@pytest.mark.parametrize("settings", CORRELATED[:2])
def test_correlated_noise_is_the_same_after_a_kill_and_never_drawn_for_two_releases(
    tmp_path, settings
):
    own = plan(noise_multiplier=3.0, rounds=6, **settings)
    private = made(tmp_path, own)
    whole, saved = noises(private, [1, 2, 3]), private.saved()
    after = noises(private, [4, 5])
    resumed = made(tmp_path, own)
    resumed.restore(saved)
    assert torch.equal(noises(resumed, [4, 5]), after)
    assert len(resumed.ledger.entries) == 5
    other = made(tmp_path, own)
    other.restore(saved)
    changed = noises(other, [4], ())  # nobody answers this time
    assert float((changed[0] - after[0]).std()) > 2
    followed = noises(other, [5])  # the same answers as before, after another round
    assert float((followed[0] - after[1]).std()) > 2
    counted = own.correlation.total([1, 2, 3, 4, 5, 4, 5])
    assert other.spent() == epsilon([Releases(3.0 / counted, 1, 1)], 1e-3, "rdp")
    assert other.spent().epsilon > resumed.plan.promised.epsilon * 0.5
    c = torch.tensor(
        [[1.0, 0, 0], [1, 1, 0], [0, 0, 1]]
        if settings["mechanism"] == "tree"
        else [[1, 0, 0], [0.5, 1, 0], [0.375, 0.5, 1]],
        dtype=torch.float64,
    )
    assert (c @ whole).std(1).tolist() == pytest.approx([3, 3, 3], rel=0.35)  # independent again


def test_a_chain_needs_its_releases_each_round_once_and_the_same_tensors(tmp_path):
    own = plan(noise_multiplier=1.0, **CORRELATED[0])
    private = made(tmp_path, own)
    noises(private, [1])
    with pytest.raises(PluginError, match="one mean of the same tensors in each"):
        mean(private, [1], 1)
    with pytest.raises(PluginError, match="with 50 numbers, this has 3"):
        mean(private, [], 2, {"a": torch.zeros(3)})
    saved = private.saved()
    saved["chain"]["hashes"] = ["00" * 32]
    with pytest.raises(PrivacyError, match="goes on from releases"):
        made(tmp_path, own).restore(saved)
    assert len(private.ledger.entries) == 1


def test_repeated_rounds_of_correlated_noise_stop_before_the_budget_is_passed(tmp_path):
    own = plan(target_epsilon=4.0, rounds=2, **CORRELATED[1])
    private = made(tmp_path, own)
    start = private.saved()
    noises(private, [1, 2])
    again = made(tmp_path, own)
    again.restore({**start, "ledger": private.ledger.position})
    with pytest.raises(PrivacyError, match="target_epsilon is 4"):
        noises(again, [1], (0.1,))
    assert again.spent() == private.spent()


def test_a_client_in_more_rounds_than_are_accounted_is_refused_before_anything_is_spent(tmp_path):
    own = plan(noise_multiplier=1.0, rounds=9, min_separation=2, max_participations=2)
    private = made(tmp_path, own)
    private.mean(updates(1, 1), START, 1, [3, 4])
    with pytest.raises(PrivacyError, match=r"clients \[4\] would take part more often"):
        private.mean(updates(1, 1), START, 2, [4, 5])
    private.mean(updates(1), START, 3, [4])
    resumed = made(tmp_path, own)
    resumed.restore(private.saved())
    for clients in ([4], [3, 3]):  # a third time; twice in one round
        with pytest.raises(
            PrivacyError, match="in 2 rounds at most, 2 or more apart, once in each"
        ):
            resumed.mean(updates(*clients), START, 5, clients)
    assert len(resumed.ledger.entries) == 2


def test_updates_of_clients_that_are_not_named_are_refused_before_anything_is_spent(tmp_path):
    private = made(tmp_path, plan(noise_multiplier=1.0, min_separation=2))
    for clients in ([], [3], [3, 4, 5]):
        with pytest.raises(PluginError, match=f"got 2 updates of {len(clients)} clients"):
            private.mean(updates(1, 1), START, 1, clients)
    assert not private.ledger.entries
    private.mean(iter(updates(1, 1)), START, 1, [3, 4])  # nothing was noted


def test_banded_noise_that_is_too_large_is_refused():
    with pytest.raises(SettingsError, match="above 1000"):
        plan(noise_multiplier=2000.0, **CORRELATED[1])


def test_numbers_of_a_plan():
    """Five of 20 clients: q = 1/4; the noise on their number is a twentieth of them by default."""
    own = plan(noise_multiplier=0.25, clip_quantile=0.5)
    assert (own.rate, own.count_noise, own.expected) == (0.25, 0.25, 5.0)
    assert own.facts == {} and own.neighbours == "add or remove one"
    settings = PrivacySettings(unit="client", delta=1e-3, noise_multiplier=1.0)
    few = ClientLevelPlan.of(settings, 3, 5, 2)
    assert few.rate == 1.0 and few.expected == 3
    assert few.noise_of_rounds == (1.0, pytest.approx(2**0.5))
    assert few.deviation(7) == 2**30


def test_facts_and_noise_of_a_tree_by_hand():
    """Of 4 rounds, each client in every second: nodes of 1, 2, 1, 4; w has 1, 2, 1, 3 draws in each."""
    own = plan(noise_multiplier=1.0, rounds=4, mechanism="tree", min_separation=2)
    assert own.facts == {
        "mechanism": "tree",
        "min_separation": 2,
        "max_participations": 2,
        "planned_rounds": 4,
        "sensitivity": own.correlation.sensitivity(4),
    }
    single, whole = own.noise_of_rounds
    assert single == pytest.approx((7 / 4) ** 0.5) and whole == 1.0
    assert own.deviation(100) == 2**30  # nothing is rounded


def test_bands_and_separation_by_default():
    """No more bands than rounds; clients / clients_per_round rounds apart, at least one."""
    own = plan(noise_multiplier=1.0, rounds=3, mechanism="banded", bands=5)
    assert own.facts["bands"] == 3 and own.facts["min_separation"] == 4
    assert plan(noise_multiplier=1.0, mechanism="banded", bands=2).facts["bands"] == 2
    assert plan(noise_multiplier=1.0, max_participations=1).facts["bands"] == 1
    settings = PrivacySettings(unit="client", delta=1e-3, noise_multiplier=1.0, mechanism="tree")
    assert participation_of(settings, 3, 5, 9) == Participation(9, 1, 9)
    assert participation_of(settings, 15, 5, 9) == Participation(9, 3, 3)


def test_banded_noise_is_larger_by_what_rounding_moves():
    """16 x 4 rounds x 100 numbers: 80 steps of 2^30 more."""
    own = plan(noise_multiplier=1000.0, rounds=4, mechanism="banded", bands=2)
    assert own.deviation(100) == pytest.approx(1000.0 * (2**30 + 80), rel=1e-12)


def test_a_ledger_of_sixteen_times_the_planned_releases_is_full(tmp_path):
    private = made(tmp_path, plan(noise_multiplier=1.0, rounds=2, **CORRELATED[1]))
    private.ledger.entries = [{}] * 31
    private._require_few()
    private.ledger.entries = [{}] * 32
    with pytest.raises(PrivacyError, match="has 16 times the releases that were planned"):
        private._require_few()


def test_noise_is_of_the_server_and_of_its_purpose(tmp_path):
    """Zero changes: what is released is the draw for round 1 of party -1 on the clipped sum."""
    own, source = plan(noise_multiplier=1.5), NoiseSource(bytes(32), "run")
    found = mean(made(tmp_path, own), [0.0], 1)
    total = ClippedSum.empty(START, own.clip)
    total.add(START)
    stream = source.stream("sum of changes", 1, -1, source.digest(total.content()))
    drawn = stream.discrete_gaussian(1.5 * 2**30, 50) * (2.0 / 2**30 / 5)
    assert found["a"].tolist() == pytest.approx(drawn.tolist(), rel=1e-6)


def sampled(members, cohort, rounds, delta, accountant="pld", **settings):
    given = {"unit": "client", "delta": delta, "accountant": accountant, "amplification": True}
    return ClientLevelPlan.of(PrivacySettings(**given, **settings), members, cohort, rounds)


@pytest.mark.parametrize(
    ("members", "cohort", "z", "rounds", "delta", "renyi", "numeric"),
    [
        (10, 1, 1.0, 100, 1e-5, 7.9039, 7.0466),
        (747, 10, 1.0, 200, 1e-4, 1.2817, 0.9608),
        (20, 1, 2.0, 500, 1e-5, 2.7686, 2.5320),
        (10, 5, 3.0, 50, 1e-3, 4.6133, 4.0344),
        (100, 1, 1.0, 1000, 1e-5, 2.1014, 1.8282),
    ],
)
def test_a_secret_cohort_costs_what_the_table_of_sampled_noise_says(
    members, cohort, z, rounds, delta, renyi, numeric
):
    """dp-accounting's values of Poisson sampling with the rate cohort / members."""
    for accountant, wanted in (("rdp", renyi), ("pld", numeric)):
        own = sampled(members, cohort, rounds, delta, accountant, noise_multiplier=z)
        assert own.sampling == own.rate == cohort / members
        assert own.promised.epsilon == pytest.approx(wanted, abs=1e-3)
        adaptive = sampled(
            members, cohort, rounds, delta, accountant, noise_multiplier=z,
            clip_quantile=0.5, clip_count_noise=z,
        )  # fmt: skip
        assert adaptive.promised == own.promised
        # (z^-2 - (2 z)^-2)^(-1/2) = z / sqrt(3 / 4)
        assert adaptive.sum_multiplier == pytest.approx(z / 0.75**0.5)


@pytest.mark.parametrize(
    ("members", "cohort", "rounds", "delta", "target", "accountant", "wanted"),
    [
        (747, 10, 200, 1e-4, 8.0, "rdp", 0.5252),
        pytest.param(747, 10, 200, 1e-4, 8.0, "pld", 0.4885, marks=pytest.mark.slow),
        pytest.param(100, 1, 1000, 1e-5, 3.0, "rdp", 0.8646, marks=pytest.mark.slow),
        pytest.param(100, 1, 1000, 1e-5, 3.0, "pld", 0.8137, marks=pytest.mark.slow),
        pytest.param(10, 1, 100, 1e-5, 8.0, "rdp", 0.9937, marks=pytest.mark.slow),
        pytest.param(10, 1, 100, 1e-5, 8.0, "pld", 0.9359, marks=pytest.mark.slow),
    ],
)
def test_a_target_is_solved_with_the_rate(
    members, cohort, rounds, delta, target, accountant, wanted
):
    own = sampled(members, cohort, rounds, delta, accountant, target_epsilon=target)
    assert own.noise_multiplier == pytest.approx(wanted, rel=1e-3)
    assert own.promised.epsilon <= target


def test_the_example_of_the_guide_without_amplification():
    """747 clients, 10 a round, 200 rounds: the closed form at mu = sqrt(200) / z gives epsilon 8 at 7.68."""
    settings = PrivacySettings(unit="client", delta=1e-4, target_epsilon=8.0)
    own = ClientLevelPlan.of(settings, 747, 10, 200)
    assert own.noise_multiplier == pytest.approx(7.6803, rel=1e-3) and own.sampling == 1


def test_releases_of_one_cohort_are_one_with_less_noise(tmp_path):
    """A round that was repeated with other answers had one cohort: z = (1 + 1)^(-1/2), drawn once."""
    own = sampled(20, 5, 3, 1e-3, "rdp", noise_multiplier=1.0)
    private = made(tmp_path, own)
    mean(private, [0.1], 1)
    mean(private, [0.2], 1)
    mean(private, [0.1], 2)
    expected = [Releases(1 / 2**0.5, 0.25, 1), Releases(1.0, 0.25, 1)]
    assert private.spent() == epsilon(expected, 1e-3, "rdp")
    assert [line["sampling"] for line in private.ledger.entries] == [0.25] * 3


def test_a_repeated_round_stops_before_the_budget_is_passed(tmp_path):
    own = sampled(20, 5, 2, 1e-3, "rdp", target_epsilon=2.0)
    private = made(tmp_path, own)
    mean(private, [0.1], 1)
    mean(private, [0.1], 2)
    with pytest.raises(PrivacyError, match="the next release would bring epsilon to"):
        mean(private, [0.2], 2)
    assert len(private.ledger.entries) == 2


def test_secret_coins_follow_from_key_and_round_alone(tmp_path):
    own = sampled(20, 5, 3, 1e-3, "rdp", noise_multiplier=1.0)
    first, again = made(tmp_path, own), made(tmp_path, own)
    other = made(tmp_path, own, bytes([1] * 32))
    mean(again, [0.1], 1)  # what was released does not move them
    assert (first.coins(1, 9) == again.coins(1, 20)[:9]).all()
    assert not (first.coins(1, 9) == first.coins(2, 9)).any()
    assert not (first.coins(1, 9) == other.coins(1, 9)).any()
    many = first.coins(3, 200_000)
    assert many.min() >= 0 and many.max() < 1
    assert abs((many < 0.25).mean() - 0.25) < 5 * (0.25 * 0.75 / 200_000) ** 0.5
