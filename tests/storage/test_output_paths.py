"""Nothing is written over unasked, and into no folder that is not there."""

import pytest

from fedloom.errors import OutputError
from fedloom.storage.output_paths import free_file, require_new_file, require_place


def test_a_new_file_in_a_folder_that_is_there(tmp_path):
    assert require_new_file(tmp_path / "x.html", "--to") == tmp_path / "x.html"
    require_place(tmp_path / "new", "--to")
    require_place(None, "--to")


def test_one_that_is_there_needs_force(tmp_path):
    (tmp_path / "x.html").write_text("mine")
    with pytest.raises(
        OutputError, match=r"is there already: give another name with --to, or --force"
    ):
        require_new_file(tmp_path / "x.html", "--to")
    require_new_file(tmp_path / "x.html", "--to", force=True)
    with pytest.raises(OutputError, match="is a folder: name a file in it with --to"):
        require_new_file(tmp_path, "--to", force=True)


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_that_is_not_there_is_not_made(tmp_path, force):
    with pytest.raises(OutputError, match=r"there is no folder .*nope to hold x.html: "):
        require_new_file(tmp_path / "nope" / "x.html", "--to", force=force)
    assert not (tmp_path / "nope").exists()


def test_a_name_of_our_own_choice_gets_a_number(tmp_path):
    page = tmp_path / "comparison.html"
    assert free_file(page) == page
    page.touch()
    (tmp_path / "comparison-2.html").touch()
    assert free_file(page) == tmp_path / "comparison-3.html" and free_file(page, force=True) == page
