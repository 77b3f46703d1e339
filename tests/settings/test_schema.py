"""TOML, overrides, and complaints that help."""

from typing import Literal

import pytest
from pydantic import Field

from fedloom.errors import SettingsError
from fedloom.settings.schema import Settings, parse
from fedloom.settings.suggestions import nearest
from fedloom.settings.toml import override, read_toml, write_toml


class Oven(Settings):
    rounds: int = Field(default=3, ge=1)
    mode: Literal["bake", "grill"] = "bake"
    heat: float = 1.0


def test_all_mistakes_are_listed_with_the_nearest_key_or_the_allowed_values():
    settings, problems = parse(
        Oven, {"round": 2, "mode": "gril", "heat": "hot", "rounds": 0}, "oven"
    )
    assert settings is None
    text = "\n".join(problems)
    assert "oven.round: unknown key; did you mean 'rounds'? allowed: heat, mode, rounds" in text
    assert "oven.mode = 'gril': did you mean 'grill'? allowed: bake, grill" in text
    assert "oven.heat = 'hot': must be a valid number" in text
    assert "oven.rounds = 0: must be greater than or equal to 1" in text
    assert len(problems) == 4


@pytest.mark.parametrize("value", ["3", 2.5, True])
def test_types_are_strict(value):
    assert parse(Oven, {"rounds": value}, "oven")[0] is None


def test_an_integer_is_a_fine_float():
    assert parse(Oven, {"heat": 2}, "oven")[0] == Oven(heat=2.0)


def test_a_section_must_be_a_table():
    assert parse(Oven, 3, "oven")[1] == ["[oven] must be a section, not 3"]


def test_override_reads_toml_values_and_plain_strings():
    table = {"a": {"b": 1}}
    changed = override(table, ["a.b=2", "a.c=x/y.jsonl", 'd.e=["f"]', "a.g = 0.5", "d.h=true"])
    assert changed == {"a": {"b": 2, "c": "x/y.jsonl", "g": 0.5}, "d": {"e": ["f"], "h": True}}
    assert table == {"a": {"b": 1}}


@pytest.mark.parametrize("assignment", ["a.b", "=3", "a..b=3", "a.b.c=3"])
def test_a_bad_override_is_explained(assignment):
    with pytest.raises(SettingsError, match="--set"):
        override({"a": {"b": 1}}, [assignment])


def test_a_missing_file_names_its_neighbour(tmp_path):
    (tmp_path / "banking.toml").write_text("")
    with pytest.raises(SettingsError, match=r"did you mean 'banking\.toml'"):
        read_toml(tmp_path / "bankng.toml")


def test_what_is_no_toml_is_said(tmp_path):
    (tmp_path / "x.toml").write_text("a = = 3")
    with pytest.raises(SettingsError, match="not TOML"):
        read_toml(tmp_path / "x.toml")


def test_written_toml_reads_back(tmp_path):
    table = {"name": "x", "a": {"b": 1, "c": None, "d": ["e"], "f": 0.1}}
    (tmp_path / "x.toml").write_text(write_toml(table))
    assert read_toml(tmp_path / "x.toml") == {"name": "x", "a": {"b": 1, "d": ["e"], "f": 0.1}}


def test_nearest_without_a_near_one():
    assert nearest("zzz", ["alpha"]) == "allowed: alpha"


def test_a_new_name_starts_its_section_anew_and_other_assignments_stay():
    table = {"objective": {"name": "dpo", "sft_weight": 0.5}, "name": "x"}
    changed = override(table, ["objective.beta=0.3", "objective.name=kto"])
    assert changed["objective"] == {"name": "kto", "beta": 0.3}
    assert override(table, ["objective.name=dpo"])["objective"]["sft_weight"] == 0.5
    assert override(table, ["name=y"]) == {**table, "name": "y"}
    assert table["objective"]["sft_weight"] == 0.5
