"""When what a run may say of privacy promises something."""

import pytest

from fedloom.privacy.settings import PrivacySettings
from fedloom.privacy.statement import CHECKED, NOTHING, SUMS, of_settings, promises, sentences

RECORD = {
    "unit": "row", "epsilon": 2.0, "delta": 1e-5, "noise_multiplier": 1.0, "clip": 1.0, "sampling": 0.1,
    "steps": 3, "accountant": "PLD", "neighbours": "one row more or less", "seeded": False,
    "not_covered": ["metrics"],
}  # fmt: skip


@pytest.mark.parametrize("unit", ["row", "client"])
def test_an_epsilon_with_noise_from_a_secret_key_is_a_promise(unit):
    record = {**RECORD, "unit": unit}
    assert promises(sentences(record))
    assert not promises(sentences({**record, "seeded": True}))
    assert not promises(sentences({**record, "epsilon": None}))
    assert not promises([])


def test_a_draw_that_bounds_a_clients_rounds_is_said_with_the_noise():
    drawn = {"min_separation": 5, "max_participations": 6, "planned_rounds": 30, "sensitivity": 2.5}
    record = {**RECORD, "unit": "client", "mechanism": "banded", "bands": 4, **drawn}
    (said, _) = sentences(record)
    assert (
        "noise correlated over 4 rounds (banded matrix factorisation); a client is drawn in at most 6 of "
        "30 rounds, 5 or more apart, and moves all releases together by at most 2.5 clips" in said
    )
    alone = sentences({**record, "bands": 1, "min_separation": 1})[0]
    assert (
        "noise of each round by itself; a client is drawn in at most 6 of 30 rounds, and" in alone
    )


@pytest.mark.parametrize(
    ("colluding", "helped"),
    [
        (0, " without any client's noise,"),
        (1, " with the noise of up to 1 client"),
        (3, " with the noise of up to 3 clients"),
    ],
)
def test_noise_that_clients_add_protects_from_the_coordinator_and_so_many_of_them(
    colluding, helped
):
    shares = {"noise": "distributed", "colluding": colluding, "asked": 10, "least": 6}
    record = {**RECORD, "unit": "client", **shares, "relied_on": 6 - colluding}
    said = sentences(record)[0]
    assert said.startswith(
        f"Privacy: whoever receives the model, the coordinator among them,{helped} learns of any one client"
    )
    assert (
        "3 noisy sums of clients' changes, to which each client added a share of the noise before secure "
        f"aggregation (that of {6 - colluding} is counted on: of 10 that are asked 6 are left at least), "
        "noise multiplier 1 or more, clip 1" in said
    )
    assert promises([said])


@pytest.mark.parametrize(
    ("unit", "steps", "what", "who"),
    [
        ("row", 1, "1 noisy steps at the client that spends most", ", the coordinator among them,"),
        ("client", 1, "1 noisy sum of clients' changes", ""),
        ("client", 2, "2 noisy sums of clients' changes", ""),
    ],
)
def test_the_sentence_of_a_promise(unit, steps, what, who):
    said, left_out = sentences({**RECORD, "unit": unit, "steps": steps})
    assert said == (
        f"Privacy: whoever receives the model{who} learns of any one {unit} no more than (epsilon, "
        f"delta) = (2, 1e-05) allows; neighbours: one row more or less; {what}, noise multiplier 1, clip "
        "1, sampling counted as 0.1; accountant: PLD"
    )
    assert left_out == "Not protected: metrics"
    assert sentences({**RECORD, "unit": unit, "steps": steps, "not_covered": []})[1:] == []


def test_what_promises_nothing_says_so_first():
    seeded = sentences({**RECORD, "seeded": True, "epsilon": None})
    assert [text.partition(".")[0].partition(",")[0] for text in seeded] == [
        "Privacy: reproducible",
        "Privacy: changes are clipped and get no noise",
        "Not protected: metrics",
    ]


@pytest.mark.parametrize(
    ("own", "here", "elsewhere"),
    [
        ({}, [], []),
        ({"profile": "research"}, [NOTHING], [NOTHING]),
        ({"profile": "research", "unit": "client"}, [], []),
        ({"unit": "row"}, [], []),
        ({"profile": "consortium"}, [SUMS], [SUMS, CHECKED]),
        ({"secure_aggregation": True}, [SUMS], [SUMS, CHECKED]),
    ],
)
def test_what_settings_alone_say(own, here, elsewhere):
    settings = PrivacySettings(**own)
    assert of_settings(settings) == here
    assert of_settings(settings, elsewhere=True) == elsewhere
    assert "3 clients or more" in SUMS


def test_a_draw_two_rounds_apart_by_a_tree():
    drawn = {"min_separation": 2, "max_participations": 6, "planned_rounds": 30, "sensitivity": 2.5}
    said = sentences({**RECORD, "unit": "client", "mechanism": "tree", **drawn})[0]
    assert (
        "by a binary tree; a client is drawn in at most 6 of 30 rounds, 2 or more apart, and"
        in said
    )


def test_a_secret_cohort_is_said_unless_it_follows_from_the_seed():
    own = {**RECORD, "unit": "client", "sampling": 0.125, "amplification": True}
    promised, secret, left_out = sentences({**own, "seeded": False})
    assert "sampling counted as 0.125" in promised and left_out.startswith("Not protected")
    assert secret.startswith(
        "Who was drawn is secret: each client was drawn for each round by a coin"
    )
    assert "of probability 0.125 that follows from the noise's key" in secret
    first, *others = sentences({**own, "seeded": True})
    assert "reproducible, therefore not private" in first
    assert first.endswith("from a secret key; who is drawn follows from the seed as well")
    assert not [text for text in others if "Who was drawn" in text]
