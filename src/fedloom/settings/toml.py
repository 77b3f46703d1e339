"""TOML to tables and back, and ``--set`` overrides."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tomli_w

from fedloom.display.untrusted_text import quoted
from fedloom.errors import SettingsError
from fedloom.settings.schema import Table, reason_of

LARGEST = 16 * 2**20
"""Bytes of a file of settings; one of TOML that names every member of a federation has some thousands."""

DEEPEST = 32
"""Tables and lists within each other."""

MARK = "\ufeff"
"""What editors of Windows write before a text in UTF-8."""

NOT_TOML = (ValueError, RecursionError)
"""Exceptions of ``tomllib``: invalid TOML, invalid UTF-8, a number of thousands of digits, brackets
nested too deeply."""


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
        return _loaded(content.decode().removeprefix(MARK))
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")])
        hint = f"; did you mean {near[0]!r}?" if near else "; `fedloom init` writes one"
        raise SettingsError([f"file not found: {path}{hint}"], "the command") from None
    except NOT_TOML as error:
        raise SettingsError([f"not TOML: {_reason(error)}"], str(path)) from None
    except OSError as error:
        raise SettingsError([f"cannot be read: {error.strerror}"], str(path)) from None


def parse_toml(text: str, source: str) -> Table:
    """Read TOML that another machine has sent.

    Raises:
        SettingsError: It is not TOML.
    """
    try:
        return _loaded(text)
    except NOT_TOML as error:
        raise SettingsError([f"not TOML: {_reason(error)}"], source) from None


def _loaded(text: str) -> Table:
    """Return the table of a text, whose depth and texts harm nothing that reads it.

    Raises:
        ValueError: It is not TOML, too deep, or a text holds NUL, which no path and no C library takes.
        RecursionError: Brackets are nested too deeply.
    """
    table = tomllib.loads(text)
    inner: list[Any] = [table]
    for _ in range(DEEPEST):
        values = [v for own in inner for v in (own.values() if isinstance(own, dict) else own)]
        if bad := next((v for v in values if isinstance(v, str) and "\0" in v), None):
            raise ValueError(f"the text {quoted(bad, 60)} holds the character NUL; leave it out")
        inner = [v for v in values if isinstance(v, dict | list)]
        if not inner:
            return table
    raise RecursionError


def _reason(error: Exception) -> str:
    """Return in words what is wrong, and of what is no TOML's fault also what to do."""
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start + 1} is not UTF-8; save the file in UTF-8"
    return reason_of(error).partition("; use sys.")[0]


def require_section(table: Table, source: str) -> None:
    """Refuse an experiment file without any section.

    Raises:
        SettingsError: There is no section in it.
    """
    if not table.keys() - {"name"}:
        raise SettingsError(
            ["it has no section, so it describes no experiment; `fedloom init FILE` writes one"],
            source,
        )


def write_toml(table: Mapping[str, Any]) -> str:
    """Return ``table`` as TOML text; keys whose value is ``None`` are left out."""
    return tomli_w.dumps(_without_none(table))


def override(table: Table, assignments: Iterable[str]) -> Table:
    """Return a copy of ``table`` with ``section.key=value`` assignments applied.

    A value is read as TOML (``3``, ``0.5``, ``true``, ``["a"]``, ``"text"``) and, where it is not,
    taken as a plain string, so ``--set data.source=rows.jsonl`` needs no quotes. A new
    ``section.name`` replaces its section: settings of one objective do not apply to another.

    Raises:
        SettingsError: An assignment has no ``=`` or runs through something that is not a table.
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


def is_text(text: str) -> bool:
    """Return whether a text can be written; bytes of a command line or name may be no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _toml_value(text: str) -> object:
    try:
        return _loaded(f"value = {text}")["value"]
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


def set_key(text: str, section: str, key: str, value: int, source: str) -> str:
    """Return a TOML file's text with one number set, and every other line as it was.

    Args:
        text: Of the file.
        section: A table of the file, or one that is not in it yet.
        key: In the section.
        value: What is set.
        source: The file, for messages.

    Raises:
        SettingsError: The section is written in a way that a line cannot be put into (``training = { }``,
            ``training.key = 1``).
    """
    wanted: Table = tomllib.loads(text)
    wanted.setdefault(section, {})[key] = value
    end = "\r\n" if "\r\n" in text else "\n"
    lines = text.splitlines(keepends=True)
    new = f"{key} = {value}"
    header = re.compile(rf"\s*\[\s*{re.escape(section)}\s*\]\s*(#.*)?$")
    own = re.compile(rf"(\s*){re.escape(key)}\s*=\s*[^#\r\n]*?(\s*(?:#.*)?)$")
    at = next((i for i, line in enumerate(lines) if header.match(line.rstrip("\r\n"))), None)
    if at is None:
        ended = "" if not text or text.endswith("\n") else end
        changed = f"{text}{ended}{end if text else ''}[{section}]{end}{new}{end}"
    else:
        inside = range(at + 1, len(lines))
        stop = next((i for i in inside if lines[i].lstrip().startswith("[")), len(lines))
        for i in range(at + 1, stop):
            bare = lines[i].rstrip("\r\n")
            if found := own.match(bare):
                lines[i] = f"{found[1]}{new}{found[2]}{lines[i][len(bare) :]}"
                break
        else:
            lines[at] = lines[at].rstrip("\r\n") + end
            lines.insert(at + 1, new + end)
        changed = "".join(lines)
    try:
        right = tomllib.loads(changed) == wanted
    except NOT_TOML:
        right = False
    if not right:
        raise SettingsError(
            [
                f"no line of [{section}] can be set to {key} = ...: write the section as a line "
                f"[{section}] with one line for each setting below it"
            ],
            source,
        )
    return changed
