"""The run folder: valid JSON always, whole files at once, torn lines forgiven at the end only."""

import json

import pytest

from fedloom.errors import OutputError
from fedloom.storage.run_folder import RunFolder


def test_numbers_that_are_not_finite_become_null(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_json("a.json", {"x": float("nan"), "y": [float("inf"), 1.5]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": None, "y": [None, 1.5]}
    folder.append("rounds.jsonl", [{"round": 0, "x": float("-inf")}])
    assert folder.read_lines("rounds.jsonl") == [{"round": 0, "x": None}]


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path):
    (tmp_path / "rounds.jsonl").write_text('{"round": 0}\n{"rou\n{"round": 2}\n')
    with pytest.raises(OutputError, match="line 2"):
        RunFolder(tmp_path).read_lines("rounds.jsonl")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    import os

    folder = RunFolder(tmp_path)
    folder.write_text("a.txt", "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left on device"):
        folder.write_text("a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old"
