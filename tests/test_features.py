"""The table of features: every name of theirs has its row, and every name of ours is there."""

import ast
import importlib.metadata
import importlib.util
import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def features():
    return runpy.run_path(str(DOCS / "features.py"))


@pytest.fixture(scope="module")
def table(features):
    return features["known"]()


def test_the_page_is_what_the_table_says(features):
    assert (DOCS / "features.md").read_text() == features["features_page"](), (
        "run: python docs/features.py"
    )


def test_every_name_of_theirs_has_a_row_and_every_row_says_something(features, table):
    rows = features["rows_of"](table)
    names = {n for product in table["products"].values() for n in features["names_of"](product)}
    assert len(names) > 1000
    assert [name for name in sorted(names) if features["row_of"](name, rows) is None] == []
    assert [row.feature for row in rows if bool(row.ours) == bool(row.without)] == []
    unused = [p.pattern for row in rows for p in row.patterns if not any(map(p.fullmatch, names))]
    assert unused == []


def test_every_name_of_ours_is_a_setting_or_a_command(features, table):
    rows = features["rows_of"](table)
    assert sum(len(row.ours) for row in rows) > 150
    assert list(features["unknown_names"](rows)) == []


def test_a_name_that_is_not_there_would_be_found(features):
    Row = features["Row"]
    ours = ("training.lr", "fedloom run --rounds", 'method.name = "fedavgg"', "method.name")
    assert list(features["unknown_names"]([Row("", "", ours, "", ())])) == list(ours[:3])


def fields(package, file, only=()):
    """Return the names of the fields of the classes in a file of an installed package."""
    [folder] = importlib.util.find_spec(package).submodule_search_locations
    found = []
    for own in ast.parse((Path(folder) / file).read_text(encoding="utf-8")).body:
        if isinstance(own, ast.ClassDef) and (not only or own.name in only):
            found += [
                field.target.id
                for field in own.body
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
                if not field.target.id.startswith("_")
                and "ClassVar" not in ast.unparse(field.annotation)
            ]
    return found


def test_names_of_what_is_installed_are_those_of_its_classes(features, table):
    trl = set(features["names_of"](table["products"]["trl"]))
    assert importlib.metadata.version("trl") == table["products"]["trl"]["version"]
    there = {*fields("transformers", "training_args.py")}
    for name in ("sft", "dpo", "kto", "grpo", "rloo", "reward"):
        there |= {*fields("trl", f"trainer/{name}_config.py")}
    there |= {*fields("trl", "trainer/model_config.py")}
    there |= {*fields("trl", "scripts/utils.py", ["ScriptArguments"])}
    there |= {f"peft.{name}" for name in fields("peft", "tuners/lora/config.py", ["LoraConfig"])}
    assert {name for name in trl if not name.startswith("trl ")} == there
