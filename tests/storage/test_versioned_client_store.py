"""What a client keeps: the version of the last round that counts, whatever was given up in between."""

import pytest
import torch

from fedloom.errors import CheckpointError
from fedloom.storage.versioned_client_store import ClientVersions, Version


def value(found):
    return None if found is None else int(found[1]["x"])


def put(kept, began, round, number, oldest=-100):
    kept.put(Version(began, round), {"x": torch.tensor(number)}, oldest=oldest)


def test_the_newest_before_a_round(tmp_path):
    kept = ClientVersions(tmp_path / "kept")
    assert kept.latest((-1,), 1) is None
    for round in (1, 2, 5):
        put(kept, 1, round, round)
    assert [value(kept.latest((-1,), round)) for round in (1, 2, 3, 4, 5, 9)] == [1, 2, 2, 2, 5, 5]


def test_rounds_that_were_given_up_are_never_used_again(tmp_path):
    kept = ClientVersions(tmp_path / "kept")
    for round in (1, 2, 3, 4):
        put(kept, 1, round, round)
    assert value(kept.latest((-1, 2), 3)) == 2  # resumed after round 2: 3 and 4 did not count
    put(kept, 2, 3, 30)
    assert value(kept.latest((-1, 2), 4)) == 30
    assert value(kept.latest((-1, 2, 2), 3)) == 2  # resumed after 2 once more
    assert value(kept.latest((-1, 2, 2, 0), 1)) is None


def test_a_stretch_that_this_client_never_saw(tmp_path):
    kept = ClientVersions(tmp_path / "kept")
    for round in (1, 3, 5):
        put(kept, 1, round, round)
    assert value(kept.latest((-1, 3, 6), 8)) == 3  # 5 was given up while it was away


def test_old_versions_go_but_for_the_one_that_is_needed(tmp_path):
    kept = ClientVersions(tmp_path / "kept")
    for round in range(1, 11):
        put(kept, 1, round, round, oldest=round - 3)
    assert len(list((tmp_path / "kept").iterdir())) == 4
    assert value(kept.latest((-1,), 7)) == 7


def test_what_is_asked_for_once_more_keeps_the_version_before_it(tmp_path):
    """A server back after round 8 repeats the request of round 3, which began from round 1's version."""
    kept = ClientVersions(tmp_path / "kept")
    for number, round in enumerate((1, 3, 11), 1):
        own = {"x": torch.tensor(round)}
        kept.put(Version(1, round, number), own, oldest=round - 3, repeated=True)
    assert value(kept.latest((-1, 8), 3, {(1, 2)})) == 1


def test_a_damaged_version_is_named(tmp_path):
    kept = ClientVersions(tmp_path / "kept")
    put(kept, 1, 1, 1)
    (path,) = (tmp_path / "kept").iterdir()
    path.write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=r"damaged .*0001-000001-000000000\.safetensors"):
        kept.latest((-1,), 2)


def test_what_was_kept_over_a_message_that_does_not_count_is_not_used(tmp_path):
    kept = ClientVersions(tmp_path / "kept")
    for round, number in ((1, 4), (2, 7), (2, 9)):
        kept.put(Version(1, round, number), {"x": torch.tensor(number)}, oldest=-100)
    assert value(kept.latest((-1,), 3)) == 9
    assert value(kept.latest((-1,), 3, [(1, 9)])) == 7
    assert value(kept.latest((-1, 2), 3, [(2, 7)])) == 7  # numbers begin again with each stretch
    assert value(kept.latest((-1, 2), 3, [(1, 7)])) == 4
    kept.put(Version(2, 3, 4), {"x": torch.tensor(34)}, oldest=-100)
    assert value(kept.latest((-1, 2), 3, [(1, 4)])) == 34
    assert value(kept.latest((-1, 2), 3, [(2, 4)])) is None


def test_of_a_round_the_last_two_versions_stay(tmp_path):
    kept = ClientVersions(tmp_path / "kept")
    for number in range(1, 9):
        kept.put(Version(1, 1, number), {"x": torch.tensor(number)}, oldest=-100)
    assert len(list((tmp_path / "kept").iterdir())) == 2
    assert value(kept.latest((-1,), 1, [(1, 8)])) == 7
