"""Checked settings: the base class of every section, and one line for every mistake.

Each part of the package owns the settings it reads, as a subclass of :class:`Settings`; this file
knows none of them. Each of Pydantic's errors becomes one line that names the nearest valid key.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from fedloom.display.untrusted_text import quoted
from fedloom.settings.suggestions import nearest

Table = dict[str, Any]
"""A TOML table as ``tomllib`` reads it."""


class Settings(BaseModel):
    """Base of every part's settings: unknown keys are errors, types are strict, values frozen."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        validate_default=True,
        allow_inf_nan=False,
    )


class NamedSettings(Settings):
    """Base of the settings of a section whose ``name`` chooses among several classes."""

    name: str = ""


@dataclass(frozen=True)
class Of:
    """Annotates a setting that is read only where another setting, or a fact, has given values.

    Attributes:
        what: Section and key, or the name of a fact (``experiment/unused_settings.py``).
        values: Values with which it is read.
        otherwise: Why it is not read, for a fact; for a setting, its value says why.
    """

    what: str
    values: tuple[object, ...]
    otherwise: str = ""


SettingsT = TypeVar("SettingsT", bound=Settings)


def descriptions(settings_class: type[Settings]) -> dict[str, str]:
    """Return what stands below each setting of a class in its source.

    Pydantic would read all of it whenever a class is made, in every process, and few ask for it.
    """
    import ast
    import inspect
    import textwrap

    found = {}
    for own in reversed(settings_class.__mro__[: settings_class.__mro__.index(Settings)]):
        source = ast.parse(textwrap.dedent(inspect.getsource(own))).body[0]
        assert isinstance(source, ast.ClassDef)
        for field, text in itertools.pairwise(source.body):
            match field, text:
                case ast.AnnAssign(ast.Name(name)), ast.Expr(ast.Constant(str(words))):
                    found[name] = inspect.cleandoc(words)
    return found


def parse(
    settings_class: type[SettingsT], table: object, where: str
) -> tuple[SettingsT | None, list[str]]:
    """Check one table against its settings class.

    Args:
        settings_class: The part's settings.
        table: What stood in the file under ``where``.
        where: The section's name, put before each key in a message.

    Returns:
        The settings, or ``None`` where there are mistakes; and the mistakes, one line each.
    """
    if not isinstance(table, Mapping):
        return None, [f"[{where}] must be a section, not {quoted(table, 60)}"]
    try:
        return settings_class.model_validate(dict(table)), []
    except ValidationError as error:
        return None, [_complaint(settings_class, where, dict(item)) for item in error.errors()]


def _complaint(settings_class: type[Settings], where: str, item: dict[str, Any]) -> str:
    keys = [str(part) for part in item["loc"]]
    path = ".".join([where, *keys])
    if item["type"] == "extra_forbidden":
        return f"{path}: unknown key; {nearest(keys[-1], _fields_at(settings_class, keys[:-1]))}"
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


def _fields_at(settings_class: type[Settings], keys: list[str]) -> list[str]:
    """Return the names of the settings in a table within a section, or of the nearest table above it."""
    fields = settings_class.model_fields
    for key in keys:
        inner = fields[key].annotation if key in fields else None
        if isinstance(inner, type) and issubclass(inner, Settings):
            fields = inner.model_fields
    return list(fields)


def reason_of(error: Exception) -> str:
    """Return in words why a value or a file could not be read."""
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)
