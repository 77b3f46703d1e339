"""Rounds of clients beside their bounds: twice at most, two rounds apart."""

import json

import pytest

from fedloom.errors import PrivacyError
from fedloom.privacy.correlation import Participation
from fedloom.privacy.participations import Participations

BOUNDS = Participation.of(9, 2, 2)


def test_a_client_waits_and_has_its_rounds():
    own = Participations(BOUNDS)
    assert own.times(7) == 0 and own.may(7, 1)
    own.take([7, 8], 1)
    assert own.times(7) == 1 and not own.may(7, 2) and own.may(7, 3) and own.may(9, 2)
    own.take([7], 3)
    assert own.times(7) == 2 and own.times(8) == 1
    assert not own.may(7, 9) and own.may(8, 9)


@pytest.mark.parametrize("clients", [[7, 9], [9, 9]])
def test_nothing_is_noted_where_one_may_not(clients):
    """Client 7 was there a round ago; 9 would count twice."""
    own = Participations(BOUNDS)
    own.take([7], 1)
    named = r"\[7\]" if 7 in clients else r"\[9, 9\]"
    with pytest.raises(
        PrivacyError, match=f"round 2: clients {named} .* in 2 rounds at most, 2 or"
    ):
        own.take(clients, 2)
    assert own.times(7) == 1 and own.times(9) == 0


def test_a_checkpoint_keeps_them():
    own, again = Participations(BOUNDS), Participations(BOUNDS)
    own.take([12, 3], 1)
    own.take([3], 4)
    saved = json.loads(json.dumps(own.saved()))
    assert saved == {"times": {"3": 2, "12": 1}, "last": {"3": 4, "12": 1}}
    again.restore(saved)
    assert again.saved() == saved and again.times(3) == 2
    assert not again.may(12, 2) and again.may(12, 3)
