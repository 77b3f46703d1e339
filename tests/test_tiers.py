"""The tables of tests that take long name tests that there are."""

import ast
from functools import cache
from pathlib import Path

from tiers import LONG, QUICK, SLOW, spaced, spread


def test_every_name_is_that_of_a_test():
    @cache
    def tests_of(file):
        tree = ast.parse((Path(__file__).parent / file).read_text(encoding="utf-8"))
        return {own.name for own in tree.body if isinstance(own, ast.FunctionDef)}

    names = [name.partition("::")[::2] for name in (*QUICK, *SLOW, *LONG)]
    wrong = [name for name in names if name[1] and name[1] not in tests_of(name[0])]
    assert not wrong and all(tests_of(file) for file, _ in names)


def test_cases_that_stay_are_spaced_evenly():
    assert spaced(9, 3) == {0, 3, 6}
    assert spaced(2, 5) == {0, 1}
    assert spaced(7, 0) == set()


def test_long_files_are_begun_among_the_others_and_none_last():
    assert spread(list("AabBcdef"), "AB") == list("AabBcdef")
    assert spread(list("abcdefAB"), "AB") == list("AabBcdef")
    assert spread(list("abA"), "A") == list("Aab")
    assert spread(list("aAB"), "AB") == list("AaB")  # too few others
    assert spread(list("ab"), "") == list("ab")


def test_what_became_full_is_not_run_as_slow_too():
    """A test of a file that is slow as a whole keeps the file's mark."""
    lines = (Path(__file__).parents[1] / "Makefile").read_text(encoding="utf-8").splitlines()
    slow = [line for line in lines if '-m "slow' in line]
    assert len(slow) == 2 and all("(sample or not full)" in line for line in slow)
