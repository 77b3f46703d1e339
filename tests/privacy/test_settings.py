"""Profiles are settings under one name, and what a file says beside them goes first."""

import pytest
from pydantic import ValidationError

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


@pytest.mark.parametrize(
    ("name", "allowed", "refused"),
    [
        ("delta", (1e-9, 0.999), (0.0, 1.0)),
        ("clip", (1e-8, 1e8), (0.9e-8, 1.1e8)),
        ("noise_multiplier", (0.0, 1e5), (-0.1, 1.1e5)),
        ("clip_quantile", (0.001, 0.999), (0.0, 1.0)),
        ("clip_learning_rate", (0.001, 1.0), (0.0, 1.001)),
        ("clip_count_noise", (0.001,), (0.0,)),
        ("min_separation", (1, 99), (0,)),
        ("max_participations", (1, 99), (0,)),
        ("bands", (1, 64), (0, 65)),
        ("target_epsilon", (0.001, 99.0), (0.0,)),
        ("units_per_pass", (1, 32), (0, 33)),
        ("colluding", (0, 9), (-1,)),
        ("sum_bits", (8, 24), (7, 25)),
        ("sum_bound", (0.001, 9.0), (0.0,)),
    ],
)
def test_bounds(name, allowed, refused):
    for value in allowed:
        assert getattr(PrivacySettings(**{name: value}), name) == value
    for value in refused:
        with pytest.raises(ValidationError):
            PrivacySettings(**{name: value})


def test_without_a_line_nothing_is_promised_and_every_number_is_as_documented():
    own = PrivacySettings()
    assert (own.clip, own.clip_learning_rate, own.units_per_pass) == (1.0, 0.2, 1)
    assert (own.sum_bits, own.sum_bound) == (16, 1.0)
    assert (own.noise, own.colluding, own.distributes) == ("central", 1, False)
    assert not (own.amplification or own.seeded or own.secure_aggregation)
    assert not (own.draws_in_steps or own.separates) and list(own.contradictions()) == []
    assert PrivacySettings(profile="consortium").secure_aggregation
    regulated = PrivacySettings(profile="regulated")
    assert (regulated.delta, regulated.target_epsilon, regulated.unit) == (1e-5, 8.0, "row")
    assert regulated.secure_aggregation and list(regulated.contradictions()) == []


@pytest.mark.parametrize(
    ("own", "draws", "separates"),
    [
        ({"unit": "row"}, True, False),
        ({"unit": "row", "seeded": True}, False, False),
        ({"unit": "row", "min_separation": 2}, True, False),
        ({"unit": "client"}, False, False),
        ({"unit": "client", "mechanism": "tree"}, False, True),
        ({"unit": "client", "min_separation": 2}, False, True),
        ({"unit": "client", "max_participations": 2}, False, True),
    ],
)
def test_where_noise_is_drawn_and_how_clients_are(own, draws, separates):
    found = PrivacySettings(**own)
    assert (found.draws_in_steps, found.separates) == (draws, separates)


ROW = {"unit": "row", "delta": 1e-3, "noise_multiplier": 1.0}
CLIENT = {**ROW, "unit": "client"}
SHARED = {**CLIENT, "noise": "distributed", "secure_aggregation": True}


@pytest.mark.parametrize(
    ("own", "named"),
    [
        (ROW, []),
        (CLIENT, []),
        ({**ROW, "column": "patient", "units_per_pass": 4, "secure_aggregation": True}, []),
        ({**CLIENT, "clip_quantile": 0.5, "clip_count_noise": 2.0, "min_separation": 2}, []),
        ({**CLIENT, "mechanism": "tree", "max_participations": 2}, []),
        ({"delta": 1e-3}, ["privacy.delta is given and"]),
        ({"noise_multiplier": 1.0}, ["privacy.noise_multiplier is given and"]),
        ({"target_epsilon": 1.0}, ["privacy.target_epsilon is given and"]),
        ({"column": "patient"}, ["privacy.column is given and"]),
        ({"unit": "row", "noise_multiplier": 1.0}, ["privacy.delta is missing"]),
        ({"unit": "row", "delta": 1e-3}, ["give one of"]),
        ({**ROW, "target_epsilon": 1.0}, ["give one of"]),
        ({**ROW, "amplification": True}, ["privacy.amplification = true"]),
        ({**CLIENT, "amplification": True}, []),
        (
            {**CLIENT, "amplification": True, "min_separation": 2},
            ["privacy.amplification = true needs"],
        ),
        ({"amplification": True}, ["privacy.amplification is given and"]),
        ({**CLIENT, "secure_aggregation": True}, ["privacy.secure_aggregation"]),
        ({**ROW, "mechanism": "tree"}, ["privacy.mechanism is about"]),
        ({**ROW, "min_separation": 2}, ["privacy.min_separation is about"]),
        ({**ROW, "max_participations": 2}, ["privacy.max_participations is about"]),
        ({**CLIENT, "clip_quantile": 0.5, "mechanism": "tree"}, ["privacy.clip_quantile: with"]),
        ({**CLIENT, "clip_count_noise": 2.0}, ["privacy.clip_count_noise is read"]),
        ({**CLIENT, "column": "patient"}, ["privacy.column groups"]),
        ({**CLIENT, "units_per_pass": 2}, ["privacy.units_per_pass goes"]),
        (SHARED, []),
        ({**SHARED, "min_separation": 2, "sum_bound": 3.0, "clip": 3.0, "accountant": "rdp"}, []),
        ({**SHARED, "secure_aggregation": False}, ['privacy.noise = "distributed": each client']),
        ({**SHARED, "unit": "row"}, ['privacy.noise = "distributed" goes with']),
        ({"noise": "distributed"}, ['privacy.noise = "distributed" goes with']),
        ({**SHARED, "mechanism": "banded"}, ['privacy.noise = "distributed": privacy.mechanism']),
        (
            {**SHARED, "clip_quantile": 0.5},
            ['privacy.noise = "distributed": privacy.clip_quantile'],
        ),
        ({**SHARED, "accountant": "pld"}, ['privacy.noise = "distributed": a sum of discrete']),
        ({**SHARED, "sum_bound": 2.0}, ['privacy.noise = "distributed": a number is']),
    ],
)
def test_what_cannot_both_be_meant_is_said_once_and_nothing_else(own, named):
    found = list(PrivacySettings(**own).contradictions())
    assert len(found) == len(named)
    assert all(words in text for words, text in zip(named, found, strict=True))
