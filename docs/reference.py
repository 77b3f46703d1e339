"""Write the reference pages of the documentation from the code: every setting, and every command.

``python docs/reference.py`` writes ``settings.md``, ``commands.md`` and the tables of ``methods.md``
beside this file; a test compares them with the code.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from fedloom.data.continuations import ContinuationSettings
from fedloom.deployment.client_file import OWN_SECTIONS
from fedloom.deployment.gateway import GatewaySettings
from fedloom.evaluation.verdicts import JudgingSettings
from fedloom.experiment.aliases import ALIASES
from fedloom.experiment.experiment import Experiment
from fedloom.federation.selection import SELECTIONS
from fedloom.methods import METHODS
from fedloom.objectives import OBJECTIVES
from fedloom.runs.benchmarks import GenerationSettings
from fedloom.runs.comparison import CompareSettings, LinkSettings
from fedloom.settings.schema import Settings, descriptions

HERE = Path(__file__).parent

SETTINGS = """# Settings

<!-- written by docs/reference.py from the code -->

Every setting of an experiment file (TOML), section by section, with its type, its default and what it
means. `--set section.key=value` changes one on the command line. A setting that is not listed here is an
error, as is a value of another type or out of range; all mistakes of a file are told at once.

"""

COMMANDS = """# Commands

<!-- written by docs/reference.py from the code -->

`fedloom COMMAND --help` says the same; [command-line.md](command-line.md) says what all commands
have in common: exit codes, what is written where, and how they are stopped.

"""

BOUNDS = {
    "ge": "at least",
    "gt": "above",
    "le": "at most",
    "lt": "below",
    "min_length": "length at least",
}


def type_of(annotation: Any) -> str:
    """Return a type as it is written in TOML."""
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " or ".join(f'`"{own}"`' if isinstance(own, str) else f"`{own}`" for own in inside)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_of(own) for own in inside if own is not type(None))
    if origin is list or origin is tuple:
        return f"list of {type_of(inside[0])}" if inside else "list"
    if origin is dict:
        return f"table of {type_of(inside[1])}"
    if origin is typing.Annotated:
        return type_of(inside[0])
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return "table, see below"
    names = {str: "text", int: "integer", float: "number", bool: "true or false", Any: "settings"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def bounds_of(field: Any) -> str:
    """Return the bounds of a number or length."""
    found = [
        f"{words} {getattr(own, name):g}"
        for own in field.metadata
        for name, words in BOUNDS.items()
        if getattr(own, name, None) is not None
    ]
    return f" ({', '.join(found)})" if found else ""


def default_of(field: Any) -> str:
    """Return a default as it is written in TOML."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return ""
    if isinstance(value, Settings):
        return "see there"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if value and isinstance(value, dict):
        return f"`{{ {', '.join(f'{key} = {json.dumps(own)}' for key, own in value.items())} }}`"
    return f'`"{value}"`' if isinstance(value, str) else f"`{value}`"


def rows_of(kind: type[Settings]) -> Iterator[str]:
    """Yield the lines of a table of settings."""
    yield "| setting | type | default | |"
    yield "| --- | --- | --- | --- |"
    said = descriptions(kind)
    for name, field in kind.model_fields.items():
        if name == "name" and name not in said:
            continue  # it stands in the heading
        words = " ".join(said.get(name, "").split()).replace("|", "\\|")
        kind_of = type_of(field.annotation) + bounds_of(field)
        yield f"| `{name}` | {kind_of} | {default_of(field)} | {words} |"


def summary_of(kind: type) -> str:
    """Return the first paragraph of a docstring."""
    text = " ".join((inspect.getdoc(kind) or "").partition("\n\n")[0].replace("``", "`").split())
    text = re.sub(r"^`\[[^]]*\]`( of `[^`]*` in the server's folder)?: ", "", text)
    return text[:1].upper() + text[1:]


def nested_of(kind: type[Settings]) -> Iterator[type[Settings]]:
    """Yield the settings that lie in a section's own tables, each once."""
    found = [
        own
        for field in kind.model_fields.values()
        for own in (field.annotation, *typing.get_args(field.annotation))
        if isinstance(own, type) and issubclass(own, Settings)
    ]
    yield from dict.fromkeys(found)


def section(title: str, kind: type[Settings], level: int = 2) -> list[str]:
    """Return a section of the page, with those of its tables behind it."""
    lines = [f"{'#' * level} {title}", "", summary_of(kind), ""]
    rows = list(rows_of(kind))
    lines += [*rows, ""] if len(rows) > 2 else []
    for own in nested_of(kind):
        lines += section(own.__name__.removesuffix("Settings"), own, level + 1)
    return lines


def settings_page() -> str:
    """Return the page of all settings."""
    lines: list[str] = []
    for field in dataclasses.fields(Experiment):
        if field.name in ("name", "objective", "method", "notes"):
            continue
        kind: Any = field.default_factory
        lines += section(f"[{field.name}]", kind)
        if field.name == "federation":
            for name, (own, _) in SELECTIONS.items():
                lines += section(f"selection: {name}", own, 3)
        if field.name == "partition":
            lines += named("objective", OBJECTIVES) + named("method", METHODS)
    lines += ["## Beside an experiment", ""]
    for title, kind in (
        ("[compare]", CompareSettings), ("[link]", LinkSettings), ("[judging]", JudgingSettings),
        ("[generation]", GenerationSettings), ("[continuations]", ContinuationSettings),
    ):  # fmt: skip
        lines += section(title, kind, 3)
    lines += ["## A client's own file", "", "`fedloom client join --data FILE`.", ""]
    for name, kind in OWN_SECTIONS.items():
        lines += section(f"[{name}]", kind, 3)
    lines += ["## A server's `settings.toml`", "", *section("[gateway]", GatewaySettings, 3)]
    return SETTINGS + "\n".join(lines).rstrip() + "\n"


def named(title: str, choices: Any) -> list[str]:
    """Return a section with one part for each choice by name."""
    lines = [f"## [{title}]", "", f"`name` chooses; each {title} has settings of its own.", ""]
    for name, (kind, _) in choices.items():
        lines += section(name, kind, 3)
    return lines


def commands_page() -> str:
    """Return the page of all commands."""
    from fedloom.commands.main import app

    command = typer.main.get_command(app)
    return COMMANDS + "\n".join(_commands(command, ["fedloom"])).rstrip() + "\n"


def _commands(command: Any, words: list[str]) -> Iterator[str]:
    for name, own in sorted(getattr(command, "commands", {}).items()):
        called = [*words, name]
        if getattr(own, "commands", None):
            yield from _commands(own, called)
            continue
        arguments = [p for p in own.params if p.param_type_name == "argument"]
        options = [p for p in own.params if p.param_type_name == "option" and p.name != "help"]
        yield f"## {' '.join(called)}"
        yield ""
        yield re.sub(r"\s+", " ", (own.help or "").strip())
        yield ""
        if arguments or options:
            yield "| | type | default | |"
            yield "| --- | --- | --- | --- |"
        for own_parameter in (*arguments, *options):
            shown = (
                own_parameter.opts[0] if own_parameter in options else own_parameter.name.upper()
            )
            default = own_parameter.default
            text = "" if default in (None, (), []) or callable(default) else f"`{default}`"
            words_of = " ".join((getattr(own_parameter, "help", "") or "").split()).replace(
                "|", "\\|"
            )
            yield f"| `{shown}` | {own_parameter.type.name} | {text} | {words_of} |"
        yield ""


def methods_page() -> str:
    """Return the page of methods with its tables written anew."""
    tables = {"methods": _declared(), "works": _works(), "absence": _absence()}
    return _with_tables("methods.md", tables)


def other_tools_page() -> str:
    """Return the page on names in other tools with its table written anew."""
    return _with_tables("other_tools.md", {"names": _aliases()})


def _with_tables(file: str, tables: dict[str, Iterator[str]]) -> str:
    page = (HERE / file).read_text(encoding="utf-8")
    for name, lines in tables.items():
        opening = f"<!-- {name}: written by docs/reference.py -->\n"
        before, _, rest = page.partition(opening)
        after = rest.partition("<!-- end -->")[2]
        page = before + opening + "\n" + "\n".join(lines) + "\n\n<!-- end -->" + after
    return page


def _aliases() -> Iterator[str]:
    yield "| here | elsewhere |"
    yield "| --- | --- |"
    found: dict[str, list[str]] = {}
    for name, alias in ALIASES.items():
        section, key = name.split(".")
        where = f", in [{section}]" if section != alias.ours.split(".")[0] else ""
        found.setdefault(alias.ours, []).append(f"`{key}` ({alias.origin}{where})")
    for ours, names in found.items():
        yield f"| `{ours}` | {', '.join(names)} |"


def _declared() -> Iterator[str]:
    yield "| method | paper | | what travels | what a client keeps |"
    yield "| --- | --- | --- | --- | --- |"
    for name, (_, kind) in METHODS.items():
        own = kind.declares
        paper = f"[{own.title}]({own.paper})" if own.paper else own.title
        fidelity = f"{own.fidelity}: {own.difference}" if own.difference else own.fidelity
        yield f"| `{name}` | {paper} | {fidelity} | {own.travels} | {own.keeps} |"


def _works() -> Iterator[str]:
    yield (
        "| method | secure aggregation | client-level privacy | row-level privacy | asynchronous | "
        "compression |"
    )
    yield "| --- | --- | --- | --- | --- | --- |"
    for names, own in _alike(
        lambda own: (
            own.secure_aggregation,
            own.client_privacy,
            own.row_privacy,
            own.asynchronous,
            own.compression,
        )
    ):
        yield f"| {names} | {' | '.join(str(claim) for claim in own)} |"


def _absence() -> Iterator[str]:
    yield (
        "| method | client away, or its answer late | client that comes first in a later round, or "
        "comes back | client that left |"
    )
    yield "| --- | --- | --- | --- |"
    for names, own in _alike(lambda own: (own.absence,) if own.absence.tolerated else None):
        yield f"| {names} | {own[0].away} | {own[0].back} | {own[0].left} |"


def _alike(facts: Any) -> Iterator[tuple[str, Any]]:
    """Yield the names of methods of which something is the same, and what it is."""
    found: dict[Any, list[str]] = {}
    for name, (_, kind) in METHODS.items():
        own = facts(kind.declares)
        if own is not None:
            found.setdefault(own, []).append(f"`{name}`")
    for own, names in found.items():
        yield ", ".join(names), own


if __name__ == "__main__":
    (HERE / "settings.md").write_text(settings_page(), encoding="utf-8")
    (HERE / "commands.md").write_text(commands_page(), encoding="utf-8")
    (HERE / "methods.md").write_text(methods_page(), encoding="utf-8")
    (HERE / "other_tools.md").write_text(other_tools_page(), encoding="utf-8")
