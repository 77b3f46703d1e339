"""The mutation test's changes are what they are called, and one is what a module is loaded with."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "benchmarks" / "mutants.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutants"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["mutants"]


SOURCE = '''"""Text."""
import math

LIMIT: "int" = 3

def share(left: float, right: float = 0.5) -> float:
    """Text."""
    if not left:
        raise ValueError(1 + 1)
    for one, other in zip([left], [right], strict=True):
        right -= one * other
    return -left if left <= right and math.pi else right
'''


def test_every_change_of_a_module(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "ROOT", tmp_path)
    (tmp_path / "share.py").write_text(SOURCE)
    found = [
        (own.line, script.first_apart(own.before, own.after))
        for own in script.mutants("x", tmp_path / "share.py")
    ]
    last = "return -left if left <= right and math.pi else right"
    head = "def share(left: float, right: float=0.5) -> float:"
    assert sorted(found) == sorted(
        [
            (4, "LIMIT: 'int' = 3 -> LIMIT: 'int' = 4"),
            (6, f"{head} -> {head.replace('0.5', '1.5')}"),
            (8, "if not left: -> if not not left:"),
            (11, "right -= one * other -> right += one * other"),
            (11, "right -= one * other -> right -= one / other"),
            (12, f"{last} -> return 0.0"),
            (12, f"{last} -> {last.replace('-left', '+left')}"),
            (12, f"{last} -> {last.replace('<=', '<')}"),
            (12, f"{last} -> {last.replace('and', 'or')}"),
        ]
    )


def test_a_changed_module_is_the_one_that_is_loaded(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "SOURCE", tmp_path)
    path = tmp_path / "parts" / "share.py"
    path.parent.mkdir()
    path.write_text("def half(value):\n    return value * 0.5\n")
    changes = [ast.unparse(script.changed(path.read_text(), number)) for number in range(3)]
    assert [own.splitlines()[1].strip() for own in changes] == [
        "return None",
        "return value / 0.5",
        "return value * 1.5",
    ]
    finder = script.Finder(path, 1)
    assert finder.find_spec("fedloom.parts.other", None) is None
    spec = finder.find_spec("fedloom.parts.share", None)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.half(3) == 6


def test_every_part_has_modules_and_every_module_tests(script):
    for part in script.STRATA:
        for path in script.modules(part):
            names = script.tests_of(part, path)
            assert names and all((ROOT / name.split("::")[0]).is_file() for name in names), path
    first = script.tests_of("aggregation", script.SOURCE / "aggregation" / "means.py")[0]
    assert first == "tests/aggregation/test_means.py"
