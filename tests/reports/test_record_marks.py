"""Records of a run are tied to its checkpoints by length and hash: hand-made files, and what is said."""

import hashlib

import pytest

from fedloom.errors import CheckpointError
from fedloom.reports import record_marks
from fedloom.storage.run_folder import RunFolder

LINES = b'{"round": 0}\n{"round": 1}\n'


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "rounds.jsonl").write_bytes(LINES)
    (tmp_path / "costs.jsonl").write_bytes(LINES * 2)
    (tmp_path / "run.json").write_bytes(b"{}\n")
    (tmp_path / "experiment.toml").write_bytes(b"[model]\n")
    return RunFolder(tmp_path)


def test_a_mark_is_length_and_hash_and_follows_what_is_added(folder):
    own = record_marks.Marks(folder)
    first = own.now()
    assert set(first) == {"rounds.jsonl", "costs.jsonl", "run.json", "experiment.toml"}
    assert first["rounds.jsonl"] == {"bytes": 26, "sha256": hashlib.sha256(LINES).hexdigest()}
    folder.append("rounds.jsonl", [{"round": 2}])
    second = own.now()["rounds.jsonl"]
    assert second == {"bytes": 39, "sha256": hashlib.sha256(LINES + b'{"round": 2}\n').hexdigest()}
    assert record_marks.Marks(folder).now()["rounds.jsonl"] == second
    assert record_marks.changes(folder, first) == []
    assert record_marks.changes(folder, first, ended=True) == [
        "rounds.jsonl has 13 bytes more than were written"
    ]


DAMAGES = {
    "a line is gone": (lambda own: own.write_bytes(LINES[:13]), "rounds.jsonl has 13 of 26 bytes"),
    "half a line": (lambda own: own.write_bytes(LINES[:-4]), "rounds.jsonl has 22 of 26 bytes"),
    "a repeated line": (lambda own: own.write_bytes(LINES[:13] * 2), "rounds.jsonl was changed"),
    "another number": (
        lambda own: own.write_bytes(LINES.replace(b"1", b"2")), "rounds.jsonl was changed",
    ),
    "no file": (lambda own: own.unlink(), "rounds.jsonl is missing"),
    "an empty file": (lambda own: own.write_bytes(b""), "rounds.jsonl has 0 of 26 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_was_changed_is_named(folder, damage):
    known = record_marks.Marks(folder).now()
    change, words = DAMAGES[damage]
    change(folder.path / "rounds.jsonl")
    with pytest.raises(CheckpointError) as refused:
        record_marks.require_unchanged(folder, known, 1)
    assert words in str(refused.value) and "when round 1 was saved" in str(refused.value)
    assert "from a backup, or start a new run" in str(refused.value)


def test_lines_that_were_added_are_cut_off_and_counted(folder):
    known = record_marks.Marks(folder).now()
    folder.append("rounds.jsonl", [{"round": 2}, {"round": 3}])
    with (folder.path / "costs.jsonl").open("a") as file:
        file.write('{"round": 2, "tor')
    record_marks.require_unchanged(folder, known, 1)
    assert record_marks.cut_back(folder, known) == [
        "2 lines of rounds.jsonl",
        "1 line of costs.jsonl",
    ]
    assert record_marks.Marks(folder).now() == known
    assert record_marks.cut_back(folder, known) == []
    assert record_marks.cut_back(folder, {}) == [
        "2 lines of rounds.jsonl",
        "4 lines of costs.jsonl",
    ]
    assert (folder.path / "rounds.jsonl").read_bytes() == b""


def test_the_experiment_may_be_edited_and_what_was_written_once_may_not(folder):
    known = record_marks.Marks(folder).now()
    (folder.path / "experiment.toml").write_text("[model]\n[output]\n")
    record_marks.require_unchanged(folder, known, 1)  # its fingerprint is the checkpoint's business
    assert record_marks.changes(folder, known, ended=True) == [
        "experiment.toml has 9 bytes more than were written"
    ]
    (folder.path / "run.json").write_text("{}\n\n")
    with pytest.raises(CheckpointError, match=r"run\.json has 1 bytes more"):
        record_marks.require_unchanged(folder, known, 1)


def test_a_checkpoint_without_marks_is_an_earlier_releases(folder):
    with pytest.raises(CheckpointError, match="an earlier release's"):
        record_marks.require_unchanged(folder, {}, 3)
