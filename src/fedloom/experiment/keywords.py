"""An experiment as Python gives it: a file, a table or an object, with settings by keyword.

A keyword is what stands before the ``=`` after ``--set``: the name of a setting, where one section alone
has it (``rounds=2``), or a section with some of its settings (``federation={"rounds": 2}``).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedloom.errors import SettingsError
from fedloom.experiment.experiment import SECTIONS, Experiment, keys_of
from fedloom.settings.schema import Table
from fedloom.settings.suggestions import nearest
from fedloom.settings.toml import read_toml, require_section

CALL = "the call of run"
"""Where mistakes in keywords are."""


def read_experiment(given: object, keywords: Mapping[str, Any]) -> Experiment:
    """Return an experiment with some settings changed.

    Args:
        given: A TOML file, a table of sections (which may be empty), or an :class:`Experiment`.
        keywords: Settings or sections by name.

    Raises:
        SettingsError: It is none of these, or with every mistake found in it.
    """
    if isinstance(given, Experiment):
        if not keywords:
            return given
        changed = changed_table(given.to_table(), keywords)
        return Experiment.from_table(changed, given.name, CALL)
    if isinstance(given, Mapping):
        return Experiment.from_table(changed_table(given, keywords))
    if not isinstance(given, str | Path):
        raise SettingsError(
            [
                f"an experiment is a TOML file, a table of sections (a dictionary) or an Experiment, not "
                f"{type(given).__name__}"
            ],
            CALL,
        )
    table = read_toml(Path(given))
    require_section(table, str(given))
    return Experiment.from_table(changed_table(table, keywords), Path(given).stem, str(given))


def changed_table(table: Mapping[str, Any], keywords: Mapping[str, Any]) -> Table:
    """Return a table with settings and sections changed; a new name starts its section anew.

    Raises:
        SettingsError: A keyword is not a setting, or one of several sections.
    """
    changed, problems = dict(table), []
    for keyword, value in keywords.items():
        if keyword in SECTIONS and isinstance(value, Mapping):
            _change(changed, keyword, value)
        elif keyword == "name":
            changed["name"] = value
        else:
            sections = _sections_with(keyword, changed)
            if len(sections) == 1:
                _change(changed, sections[0], {keyword: value})
            elif keyword in SECTIONS:
                problems.append(f"{keyword} = {value!r:.60}: give the section as a dictionary")
            elif sections:
                ways = " or ".join(f"{own}={{{keyword!r}: ...}}" for own in sections)
                problems.append(f"{keyword} is a setting of several sections: {ways}")
            else:
                every = {*SECTIONS, *(key for own in SECTIONS for key in keys_of(own, changed))}
                problems.append(f"{keyword}: unknown setting; {nearest_few(keyword, every)}")
    if problems:
        raise SettingsError(problems, CALL)
    return changed


def nearest_few(word: str, names: set[str]) -> str:
    """Return the nearest name, and how to give sections."""
    hint, _, _ = nearest(word, names).partition("allowed:")
    return f'{hint}give settings by name, or sections: federation={{"rounds": 2}}'


def _sections_with(key: str, table: Mapping[str, Any]) -> list[str]:
    return [section for section in SECTIONS if key != "name" and key in keys_of(section, table)]


def _change(table: Table, section: str, values: Mapping[str, Any]) -> None:
    own = table.get(section, {})
    if not isinstance(own, Mapping):
        return  # no section: the experiment says so
    anew = "name" in values and values["name"] != own.get("name", values["name"])
    table[section] = dict(values) if anew else {**own, **values}
