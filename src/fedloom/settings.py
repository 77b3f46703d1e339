"""Settings: TOML to checked pydantic models and back.

Each part of the package owns the settings it reads, as a subclass of :class:`Settings`; this file
knows none of them. It knows how to read TOML, apply ``--set`` overrides, turn pydantic's
complaints into one line each that names the nearest right key, and write TOML again.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError

from fedloom.errors import SettingsError
from fedloom.shown import quoted

Table = dict[str, Any]
"""A TOML table as ``tomllib`` reads it."""


LARGEST = 16 * 2**20
"""Bytes of a file of settings; one of TOML that names every member of a federation has some thousands."""

NOT_TOML = (ValueError, RecursionError)
"""What ``tomllib`` raises: no TOML, no UTF-8, a number of thousands of digits, brackets without end."""


class Settings(BaseModel):
    """Base of every part's settings: unknown keys are errors, types are strict, values frozen."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )


class NamedSettings(Settings):
    """Base of the settings of a section whose ``name`` chooses among several classes."""

    name: str = ""


@dataclass(frozen=True)
class Of:
    """Stands beside a setting's type: it is read where another setting, or a fact, has such a value.

    Attributes:
        what: Section and key, or the name of a fact (``unread.py``).
        values: Those with which it is read.
        otherwise: Why it is not, for a fact; of a setting, the value says it.
    """

    what: str
    values: tuple[object, ...]
    otherwise: str = ""


SettingsT = TypeVar("SettingsT", bound=Settings)


def read_toml(path: Path) -> Table:
    """Read a TOML file.

    Raises:
        SettingsError: The file is missing or is not TOML; the line is named.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise SettingsError([f"larger than {LARGEST >> 20} MiB, as no settings are"], str(path))
        return tomllib.loads(content.decode())
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")])
        hint = f"; did you mean {near[0]!r}?" if near else "; `fedloom init` writes one"
        raise SettingsError([f"file not found: {path}{hint}"], "the command") from None
    except NOT_TOML as error:
        raise SettingsError([f"not TOML: {_why(error)}"], str(path)) from None
    except OSError as error:
        raise SettingsError([f"cannot be read: {error.strerror}"], str(path)) from None


def parse_toml(text: str, source: str) -> Table:
    """Read TOML that another machine has sent.

    Raises:
        SettingsError: It is no TOML.
    """
    try:
        return tomllib.loads(text)
    except NOT_TOML as error:
        raise SettingsError([f"not TOML: {_why(error)}"], source) from None


def require_section(table: Table, source: str) -> None:
    """Refuse the file of an experiment that says nothing: every setting has a default, a run has none.

    Raises:
        SettingsError: There is no section in it.
    """
    if not table.keys() - {"name"}:
        raise SettingsError(
            ["no section is in it, so it names no experiment; `fedloom init FILE` writes one"],
            source,
        )


def write_toml(table: Mapping[str, Any]) -> str:
    """Return ``table`` as TOML text; keys whose value is ``None`` are left out."""
    return tomli_w.dumps(_without_none(table))


def override(table: Table, assignments: Iterable[str]) -> Table:
    """Return a copy of ``table`` with ``section.key=value`` assignments applied.

    A value is read as TOML (``3``, ``0.5``, ``true``, ``["a"]``, ``"text"``) and, where it is not,
    taken as a plain string, so ``--set data.source=rows.jsonl`` needs no quotes. A new
    ``section.name`` starts its section anew: what was set for one objective is not of another.

    Raises:
        SettingsError: An assignment has no ``=`` or runs through something that is no table.
    """
    result = _copy(table)
    problems = []
    for assignment in sorted(assignments, key=lambda text: ".name=" not in text.replace(" ", "")):
        if not is_text(assignment):  # bytes of the command line that are no UTF-8
            problems.append(f"--set {assignment!r}: write it in UTF-8")
            continue
        path, equals, text = assignment.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            problems.append(f"--set {assignment!r}: write it as section.key=value")
            continue
        target = result
        for key in keys[:-1]:
            target = target.setdefault(key, {})
            if not isinstance(target, dict):
                problems.append(f"--set {assignment!r}: {key!r} is a value, not a section")
                break
        else:
            value = _toml_value(text.strip())
            if keys[1:] == ["name"] and target.get("name", value) != value:
                target.clear()
            target[keys[-1]] = value
    if problems:
        raise SettingsError(problems, "the command")
    return result


def parse(
    settings_class: type[SettingsT], table: object, where: str
) -> tuple[SettingsT | None, list[str]]:
    """Check one table against its settings class.

    Args:
        settings_class: The part's settings.
        table: What stood in the file under ``where``.
        where: The section's name, put before each key in a complaint.

    Returns:
        The settings, or ``None`` where there are complaints; and the complaints, one line each.
    """
    if not isinstance(table, Mapping):
        return None, [f"[{where}] must be a section, not {quoted(table, 60)}"]
    try:
        return settings_class.model_validate(dict(table)), []
    except ValidationError as error:
        return None, [_complaint(settings_class, where, dict(item)) for item in error.errors()]


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return a hint such as ``did you mean 'rounds'? allowed: clients, rounds``."""
    names = sorted(allowed)
    match = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    hint = f"did you mean {match[0]!r}? " if match else ""
    return f"{hint}allowed: {', '.join(names)}"


def _complaint(settings_class: type[Settings], where: str, item: dict[str, Any]) -> str:
    keys = [str(part) for part in item["loc"]]
    path = ".".join([where, *keys])
    if item["type"] == "extra_forbidden":
        return f"{path}: unknown key; {nearest(keys[-1], settings_class.model_fields)}"
    if item["type"] == "missing":
        return f"{path}: missing; it has no default"
    message = item["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if item["type"] == "literal_error":
        expected = str(item.get("ctx", {}).get("expected", ""))
        options = [word.strip(" '") for word in expected.replace(" or ", ", ").split(",")]
        return f"{path} = {quoted(item['input'], 60)}: {nearest(str(item['input']), options)}"
    if not keys:
        return f"[{where}]: {message}"
    return f"{path} = {quoted(item['input'], 60)}: {message[:1].lower()}{message[1:]}"


def is_text(text: str) -> bool:
    """Return whether a text can be written; bytes of a command line or name may be no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _why(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _toml_value(text: str) -> object:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except NOT_TOML:
        return text


def _copy(table: Mapping[str, Any]) -> Table:
    return {
        key: _copy(value) if isinstance(value, Mapping) else value for key, value in table.items()
    }


def _without_none(table: Mapping[str, Any]) -> Table:
    return {
        key: _without_none(value) if isinstance(value, Mapping) else value
        for key, value in table.items()
        if value is not None
    }
