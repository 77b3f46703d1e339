"""Fingerprints of rows: sizes of what is shared, and nothing that can be tested without the key."""

import json
import stat

import pytest

from fedloom.data import fingerprints as module
from fedloom.data.examples import Instruction, Labelled, Preference
from fedloom.data.fingerprints import (
    compare,
    fingerprints,
    make_key,
    read_fingerprints,
    read_key,
    write_fingerprints,
)
from fedloom.data.splits import row_key
from fedloom.data.text_statistics import matrix_of
from fedloom.errors import DataError, OutputError

KEY = bytes(range(32))


def rows(*numbers):
    return [Instruction(i, f"prompt {number}", "answer") for i, number in enumerate(numbers, 1)]


def written(tmp_path, name, own, key=KEY):
    write_fingerprints(fingerprints(own, key), tmp_path / name)
    return tmp_path / name


def test_sizes_of_every_intersection_are_those_of_the_sets(tmp_path):
    held = [range(10), range(5, 12), [0, 1, 11, 11]]
    files = [written(tmp_path, f"c{i}", rows(*own)) for i, own in enumerate(held)]
    found = compare(files)
    assert matrix_of(found, range(3)) == [[10, 5, 2], [5, 7, 1], [2, 1, 3]]
    assert found.holders == {1: 4, 2: 8} and found.all == 12 and found.twice == 8


def test_texts_are_alike_as_held_out_rows_are_and_kinds_can_be_mixed():
    one = fingerprints([Labelled(1, " Ünd\n so ", "a")], KEY)
    other = fingerprints([Labelled(7, "ünd so", "b"), Preference(1, "p", "a", "b")], KEY)
    assert one.rows < other.rows and len(other.rows) == 2


def test_a_file_tells_nothing_that_can_be_tested_without_the_key(tmp_path):
    own = rows(1, 2, 3)
    file = written(tmp_path, "c", own)
    content = file.read_bytes()
    assert all(row_key(row) not in content for row in own)
    assert not fingerprints(own, bytes(32)).rows & read_fingerprints(file).rows
    assert content == written(tmp_path, "again", own[::-1]).read_bytes()  # nor in which order
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_key_is_random_private_and_never_written_over(tmp_path):
    make_key(tmp_path / "k")
    make_key(tmp_path / "other")
    assert stat.S_IMODE((tmp_path / "k").stat().st_mode) == 0o600
    assert len(read_key(tmp_path / "k")) == 32 != read_key(tmp_path / "other")
    with pytest.raises(OutputError, match="is there already"):
        make_key(tmp_path / "k")
    (tmp_path / "short").write_text("00ff")
    with pytest.raises(DataError, match="holds 4 characters, a key 64"):
        read_key(tmp_path / "short")


def test_other_keys_and_damaged_files_are_told(tmp_path):
    sound, foreign = written(tmp_path, "a", rows(1, 2)), written(tmp_path, "b", rows(1), bytes(32))
    with pytest.raises(DataError, match="b is under another key than"):
        compare([sound, foreign])
    head, _, content = sound.read_bytes().partition(b"\n")
    for damaged in (
        head + b"\n" + content[:-1],
        head + b"\n" + content[16:] + content[:16],
        json.dumps({**json.loads(head), "rows": 3}).encode() + b"\n" + content,
        b"[" * 900 + b"\n",
        b"",
    ):
        (tmp_path / "d").write_bytes(damaged)
        with pytest.raises(DataError, match=r"damaged|holds no fingerprints"):
            read_fingerprints(tmp_path / "d")


def test_more_rows_than_are_compared_are_refused_on_both_sides(tmp_path, monkeypatch):
    many = written(tmp_path, "many", rows(*range(100)))
    monkeypatch.setattr(module, "MOST_ROWS", 30)
    with pytest.raises(DataError, match="is no file of at most 30 fingerprints"):
        read_fingerprints(many)
    with pytest.raises(
        DataError, match="there are 31 different rows, and fingerprints of at most 30"
    ):
        fingerprints(rows(*range(31)), KEY)
    assert len(fingerprints(rows(*range(30), 1, 2), KEY).rows) == 30
