"""The mechanism of a run: its plan, its budget, and the same noise for the same release alone."""

import pytest
import torch

from fedloom.errors import PluginError, PrivacyError, SettingsError
from fedloom.privacy.accounting import Releases, epsilon
from fedloom.privacy.ledger import PrivacyLedger
from fedloom.privacy.noise import NoiseSource
from fedloom.privacy.private_mean import ClientLevelPlan, PrivateMean
from fedloom.privacy.settings import PrivacySettings

START = {"a": torch.zeros(50)}


def plan(rounds=3, **settings):
    given = {"unit": "client", "delta": 1e-3, "accountant": "rdp", "clip": 2.0, **settings}
    return ClientLevelPlan.of(PrivacySettings(**given), 20, 5, rounds)


def made(tmp_path, own, key=bytes(32)):
    return PrivateMean(own, NoiseSource(key, "run"), PrivacyLedger(tmp_path / "ledger"))


def updates(*values):
    return [{"a": torch.full((50,), float(value))} for value in values]


def test_a_target_is_solved_for_all_rounds(tmp_path):
    own = plan(target_epsilon=4.0, rounds=10)
    assert own.promised.epsilon == pytest.approx(4.0, rel=1e-3) and own.promised.epsilon <= 4
    assert own.rate == 0.25 and own.sampling == 1 and own.expected == 5
    assert plan(noise_multiplier=own.noise_multiplier, rounds=10).promised == own.promised


def test_the_same_release_again_is_the_same_noise_and_costs_nothing(tmp_path):
    first = made(tmp_path, plan(noise_multiplier=1.0))
    one = first.mean(updates(0.1, 0.2), START, 1)
    again = made(tmp_path, first.plan).mean(updates(0.2, 0.1), START, 1)  # in another order
    assert torch.equal(one["a"], again["a"])
    resumed = made(tmp_path, first.plan)
    other = resumed.mean(updates(0.1), START, 1)  # one answer less
    gap = (other["a"] - one["a"] + (0.2 / 5)).double()
    assert float(gap.std()) > 0.2  # the noises do not cancel
    assert len(resumed.ledger.entries) == 2
    assert resumed.spent() == epsilon([Releases(1.0, 1, 2)], 1e-3, "rdp")


def test_nobody_answering_is_noise_alone_over_the_same_denominator(tmp_path):
    found = made(tmp_path, plan(noise_multiplier=1.0)).mean([], START, 1)
    assert 0.2 < float(found["a"].std()) < 0.7  # 1.0 * clip 2 / 5 expected = 0.4


def test_a_budget_stops_before_it_is_passed(tmp_path):
    private = made(tmp_path, plan(target_epsilon=4.0, rounds=2))
    private.mean(updates(1), START, 1)
    private.mean(updates(1), START, 2)
    before = private.spent()
    assert before.epsilon <= 4
    with pytest.raises(PrivacyError, match="target_epsilon is 4"):
        private.mean(updates(0.1), START, 2)
    assert private.spent() == before and private.latest == 2
    private.mean(updates(1), START, 2)  # the one that was spent may be repeated


def test_the_clip_follows_and_is_restored(tmp_path):
    own = plan(noise_multiplier=1.0, clip_quantile=0.5, clip_count_noise=2.0)
    assert own.sum_multiplier == pytest.approx(1.0328, abs=1e-4)
    private = made(tmp_path, own)
    private.mean(updates(*[100] * 20), START, 1)
    saved, clip = private.saved(), private.clip
    assert clip > own.clip  # all were longer
    other = made(tmp_path, own)
    other.restore(saved)
    assert other.clip == clip
    with pytest.raises(SettingsError, match="clip_count_noise = 0"):
        plan(noise_multiplier=1.0, clip_quantile=0.5)  # a twentieth of 5 clients


def test_a_state_that_did_not_come_of_it_is_refused(tmp_path):
    private = made(tmp_path, plan(noise_multiplier=1.0))
    with pytest.raises(PluginError, match="Method"):
        private.require_released(1)
    private.mean([], START, 1)
    private.require_released(1)
