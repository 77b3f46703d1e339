"""Files that are there whole or not at all."""

import errno
import threading

import pytest

from fedloom.errors import OutputError
from fedloom.storage.files import remove_temporary, write_atomically, written_atomically


def test_threads_that_write_one_file_do_not_tear_it(tmp_path):
    """Each has a temporary file of its own, and the last whole one stands."""
    path, begun = tmp_path / "entry.json", threading.Barrier(2)
    errors = []

    def write(letter):
        try:
            with written_atomically(path) as file:
                begun.wait(5)  # both are open now
                file.write(letter * 1000)
                begun.wait(5)
        except (OutputError, threading.BrokenBarrierError) as error:
            begun.abort()
            errors.append(error)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert path.read_bytes() in (b"a" * 1000, b"b" * 1000)
    assert [own.name for own in tmp_path.iterdir()] == ["entry.json"]


def test_what_a_writer_left_behind_is_swept(tmp_path):
    """Under the name that the writer itself gives it, here seen before it is whole."""
    with written_atomically(tmp_path / "entry.json") as file:
        file.write(b"half")
        (left,) = tmp_path.iterdir()
        again = tmp_path / "again"
        again.mkdir()
        (again / left.name).write_bytes(b"half")
    remove_temporary(again, "entry.json")
    assert list(again.iterdir()) == []


def test_what_was_there_stays_where_writing_fails(tmp_path):
    path = tmp_path / "entry.json"
    write_atomically(path, b"old")

    def fill_the_disk():
        with written_atomically(path) as file:
            file.write(b"new")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputError, match=r"cannot write .*entry\.json: No space left on device"):
        fill_the_disk()
    assert path.read_bytes() == b"old"
    assert [own.name for own in tmp_path.iterdir()] == ["entry.json"]
