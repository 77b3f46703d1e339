"""Profiles are settings under one name, and what a file says beside them goes first."""

import pytest

import fedloom
from fedloom.errors import SettingsError
from fedloom.privacy.settings import PROFILES, PrivacySettings

ALONE = {"evaluation": {"per_client": False}}


def privacy(**own):
    return fedloom.Experiment.from_table({**ALONE, "privacy": own}).privacy


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_is_the_settings_that_it_stands_for(name):
    plain = PrivacySettings(**PROFILES[name])
    assert privacy(profile=name) == plain.model_copy(update={"profile": name})
    again = fedloom.Experiment.from_table(
        fedloom.Experiment.from_table({**ALONE, "privacy": {"profile": name}}).to_table()
    )
    assert again.privacy == privacy(profile=name)


def test_what_the_file_says_goes_first():
    own = privacy(profile="regulated", target_epsilon=2.0, secure_aggregation=False)
    assert (own.unit, own.target_epsilon, own.secure_aggregation) == ("row", 2.0, False)
    whole = fedloom.Experiment.from_table({**ALONE, "privacy": own.model_dump()})
    assert fedloom.Experiment.from_table(whole.to_table(defaults=False)).privacy == own
    own = privacy(profile="regulated", noise_multiplier=1.5)
    assert (own.noise_multiplier, own.target_epsilon) == (1.5, None)


def test_no_profile_of_that_name():
    with pytest.raises(SettingsError, match="profile"):
        privacy(profile="strict")


@pytest.mark.parametrize(
    "own", [{"clip_quantile": 0.5}, {"clip_quantile": 0.5, "clip_count_noise": 2.0}]
)
def test_a_clip_that_adapts_is_of_updates_and_not_of_rows(own):
    given = {"delta": 1e-3, "noise_multiplier": 1.0, **own}
    assert privacy(unit="client", **given).clip_quantile == 0.5
    with pytest.raises(SettingsError) as caught:
        privacy(unit="row", **given)
    for name in own:
        assert f'privacy.{name} goes with privacy.unit = "client" alone' in str(caught.value)
