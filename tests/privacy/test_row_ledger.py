"""A client's releases: each is written once, whoever asks again, and none beyond the budget."""

import pickle

import pytest

from fedloom.errors import PrivacyError
from fedloom.privacy.row_ledger import RowLedger


def test_the_same_release_is_one_and_another_is_another(tmp_path):
    own = RowLedger(tmp_path / "privacy" / "000000.txt")
    for release in (b"a", b"b", b"a"):
        own.spend(release, b"of " + release)
    assert len(own) == 2
    again = RowLedger(own.path)  # a process after a kill
    again.read()
    again.spend(b"b", b"of b")
    assert len(again) == 2
    again.spend(b"c", b"of c")
    assert len(own) == 3


def test_a_line_that_was_not_finished_was_not_released(tmp_path):
    own = RowLedger(tmp_path / "one.txt")
    own.spend(b"a", b"of a")
    with own.path.open("a") as file:
        file.write("6262 half a ha")
    assert len(own) == 1
    own.spend(b"b", b"of b")
    assert len(RowLedger(own.path)) == 2


def test_nothing_is_released_beyond_the_budget(tmp_path):
    own = RowLedger(tmp_path / "one.txt", allowed=2)
    own.spend(b"a", b"of a")
    own.spend(b"b", b"of b")
    own.spend(b"a", b"of a")
    with pytest.raises(PrivacyError, match="2 noisy steps"):
        own.spend(b"c", b"of c")
    assert len(RowLedger(own.path)) == 2


@pytest.mark.parametrize(
    "change", [lambda t: t.replace("6162", "6163"), lambda t: t.partition("\n")[2]]
)
def test_what_was_changed_is_refused(tmp_path, change):
    own = RowLedger(tmp_path / "one.txt")
    for release in (b"ab", b"cd", b"ef"):
        own.spend(release, b"of " + release)
    own.path.write_text(change(own.path.read_text()))
    with pytest.raises(PrivacyError, match="line 1 is not what was written"):
        own.read()


def test_a_batch_of_a_coordinators_run_has_one_noise(tmp_path):
    """Two noises on one batch tell more of it than the accountant takes two steps to."""
    own = RowLedger(tmp_path / "one.txt", once=True)
    own.spend(b"a", b"batch")
    own.spend(b"a", b"batch")
    for ledger in (own, RowLedger(own.path, once=True)):
        ledger.read()
        with pytest.raises(PrivacyError, match="this very batch has got its noise"):
            ledger.spend(b"b", b"batch")
    own.spend(b"b", b"another")
    assert len(own) == 2


def test_it_is_given_to_other_processes(tmp_path):
    own = pickle.loads(pickle.dumps(RowLedger(tmp_path / "one.txt", allowed=1)))
    own.spend(b"a", b"of a")
    assert len(own) == 1
