"""Files of ledgers: chained lines, what a kill leaves of them, and who may read them."""

import json
import os

import pytest

from fedloom.errors import OutputError, PrivacyError
from fedloom.privacy.ledger_file import FIRST, append_entry, append_line, entries, whole_lines


def chain(path, *numbers):
    head = FIRST
    for number in numbers:
        head = append_entry(path, head, {"number": number, "and": "more"})["hash"]


def test_entries_come_back_with_their_hashes(tmp_path):
    path = tmp_path / "ledger"
    assert entries(path) == [] and whole_lines(path) == []
    chain(path, 1, 2, 3)
    found = entries(path)
    assert [own["number"] for own in found] == [1, 2, 3]
    assert len({own["hash"] for own in found}) == 3 and all(len(own["hash"]) == 64 for own in found)
    assert FIRST == "0" * 64
    assert path.read_text().splitlines() == [json.dumps(own, sort_keys=True) for own in found]
    alone = append_entry(tmp_path / "other", found[1]["hash"], {"and": "more", "number": 3})
    assert alone == found[2]  # the order of keys says nothing


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines[::-1],
        lambda lines: lines[1:],
        lambda lines: [lines[0].replace("more", "less"), *lines[1:]],
        lambda lines: ["[]", *lines[1:]],
        lambda lines: ["{}", *lines[1:]],
        lambda lines: ["no JSON", *lines[1:]],
    ],
)
def test_what_was_changed_is_refused(tmp_path, change):
    path = tmp_path / "ledger"
    chain(path, 1, 2)
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")
    with pytest.raises(PrivacyError, match=r"line 1 is not what was written.*; start a new run"):
        entries(path)
    with pytest.raises(PrivacyError, match="; put back a copy"):
        entries(path, "put back a copy")


def test_a_line_that_was_not_finished_is_cut_off_by_who_writes(tmp_path):
    path = tmp_path / "ledger"
    chain(path, 1)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"number": 2')
    for read in (whole_lines, entries):
        assert len(read(path, repair=False)) == 1 and path.read_bytes() != whole
    assert whole_lines(path) == whole.splitlines() and path.read_bytes() == whole
    path.write_bytes(whole + b"half")
    assert len(entries(path)) == 1 and path.read_bytes() == whole
    path.write_bytes(b"half")
    assert whole_lines(path) == [] and path.read_bytes() == b""


@pytest.mark.parametrize(("folder", "file"), [(0o700, 0o600), (0o755, 0o644), (0o750, 0o640)])
def test_a_private_folder_has_private_files(tmp_path, folder, file):
    path = tmp_path / "own" / "ledger"
    path.parent.mkdir()
    path.parent.chmod(folder)
    before = os.umask(0o022)
    try:
        append_line(path, "one")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == file
    append_line(path, "two")
    assert path.read_text() == "one\ntwo\n"


def test_lines_are_on_the_disk_and_so_is_the_name_of_a_new_file(tmp_path, monkeypatch):
    synced, real = [], os.fsync

    def fsync(file):
        synced.append(os.fstat(file).st_ino)
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    path = tmp_path / "ledger"
    append_line(path, "one")
    assert synced == [path.stat().st_ino, tmp_path.stat().st_ino]
    append_line(path, "two")
    assert synced[2:] == [path.stat().st_ino]


def test_what_cannot_be_written_whole_or_read_is_said(tmp_path, monkeypatch):
    with pytest.raises(OutputError, match="cannot read"):
        whole_lines(tmp_path)
    with pytest.raises(OutputError, match="cannot write"):
        append_line(tmp_path / "nowhere" / "ledger", "one")
    monkeypatch.setattr(os, "write", lambda file, data: len(data) - 1)
    with pytest.raises(OutputError, match=r"cannot write .*No space left"):
        append_line(tmp_path / "ledger", "one")
