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
