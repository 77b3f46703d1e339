"""Importing transformers with less work: what it then knows and can do is the same."""

import inspect
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers
from transformers.utils import import_utils

from fedloom.models.lean_imports import FUNCTION, Later, cache_file, decoded, encoded, with_known

MODELS = Path(transformers.__file__).parent / "models"


def reading(folder, file):
    """transformers' function that reads a folder, as it is once the folder's content is known."""
    module = SimpleNamespace(**{FUNCTION: plain})
    with_known(module, folder, file)
    return getattr(module, FUNCTION)


plain = inspect.unwrap(getattr(import_utils, FUNCTION))


def in_order(structure):
    return [(key, in_order(own) if isinstance(key, str) else own) for key, own in structure.items()]


def test_all_models_are_known_as_transformers_reads_them():
    read = plain(str(MODELS))
    again = decoded(encoded(read))
    assert len(read) > 400 and in_order(again) == in_order(read)


def test_a_folder_is_read_once_and_again_where_its_file_is_damaged(tmp_path, monkeypatch):
    folder, file = MODELS / "llama", tmp_path / "imports" / "known.json"
    right = plain(str(folder))
    assert {"LlamaConfig"} in [own.get("configuration_llama") for own in right.values()]
    known = reading(folder, file)
    assert known(folder) == right and file.is_file()
    monkeypatch.setattr(os, "scandir", None)  # it is not read any more
    assert known(folder) == known(str(folder / "__init__.py")) == right
    monkeypatch.undo()
    for damaged in (b"", b"[{}]", b"[[], 1]", b'[{"a": 1}, []]', b"[{}, [[1, 2]]]", b"\xff"):
        file.write_bytes(damaged)
        assert known(folder) == right and decoded(encoded(right)) == right
        assert len(file.read_bytes()) > 100


def test_other_folders_are_read_as_ever(tmp_path):
    known = reading(MODELS / "llama", tmp_path / "known.json")
    assert known(str(MODELS / "bloom")) == plain(str(MODELS / "bloom"))
    assert not (tmp_path / "known.json").exists()


def test_only_an_installed_version_that_is_known_has_a_file_and_another_once_it_is_installed_anew(
    tmp_path,
):
    package = tmp_path / "transformers"
    assert cache_file(package) is None  # a developer's own
    for version in ("6.0.0", "5.23.0"):
        record = tmp_path / f"transformers-{version}.dist-info" / "RECORD"
        record.parent.mkdir()
        record.write_text("transformers/__init__.py,,")
        found = cache_file(package)
        assert (found is not None) == (version == "5.23.0")
    os.utime(record, ns=(0, 0))
    assert cache_file(package) not in (None, found)


@pytest.mark.parametrize("name", ["linear_sum_assignment", "brentq"])
def test_what_stands_for_a_module_gives_all_that_it_has(name):
    stands = Later("scipy.optimize")
    if name == "brentq":
        assert stands.brentq(lambda x: x - 2, 0, 5) == 2
    else:
        assert stands.linear_sum_assignment([[1, 0], [0, 1]])[1].tolist() == [1, 0]
