"""When what a run may say of privacy promises something."""

import pytest

from fedloom.privacy.statement import promises, sentences

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
