"""Write the reference pages of the documentation from the code: every setting, and every command.

``python docs/reference.py`` writes ``settings.md``, ``commands.md`` the tables of ``methods.md``
and the lists of ``choose_method.md`` beside this file; a test compares them with the code.
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

import torch
import typer

from fedloom.accounting.traffic import ParameterTraffic
from fedloom.data.continuations import ContinuationSettings
from fedloom.deployment.client_file import OWN_SECTIONS
from fedloom.deployment.gateway import GatewaySettings
from fedloom.evaluation.verdicts import JudgingSettings
from fedloom.experiment.aliases import ALIASES
from fedloom.experiment.experiment import Experiment
from fedloom.experiment.flower_app import KEYS
from fedloom.federation.selection import SELECTIONS
from fedloom.methods import METHODS
from fedloom.methods.declaration import DRIFT
from fedloom.objectives import OBJECTIVES
from fedloom.runs.benchmarks import GenerationSettings
from fedloom.runs.comparison import CompareSettings, LinkSettings
from fedloom.settings.schema import Settings, descriptions
from fedloom.tensors import tensor_bytes

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
        if field.name == "selection":
            lines += named("selection", SELECTIONS)
            continue
        kind: Any = field.default_factory
        lines += section(f"[{field.name}]", kind)
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
    return _rewritten("methods", {"methods": _declared(), "works": _works(), "absence": _absence()})


def other_tools_page() -> str:
    """Return the page on names in other tools with its table written anew."""
    return _rewritten("other_tools", {"flower": _flower_keys(), "names": _aliases()})


def choose_method_page() -> str:
    """Return the page that guides to a method with its lists written anew."""
    return _rewritten("choose_method", {name: _listed(holds) for name, holds in SITUATIONS.items()})


def _rewritten(name: str, parts: dict[str, Iterator[str]]) -> str:
    """Return a page with what stands between its comments written anew."""
    page = (HERE / f"{name}.md").read_text(encoding="utf-8")
    for part, lines in parts.items():
        opening = f"<!-- {part}: written by docs/reference.py -->\n"
        before, found, rest = page.partition(opening)
        if not found:
            raise SystemExit(f"docs/{name}.md has no line {opening!r}")
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


def _flower_keys() -> Iterator[str]:
    yield "| key of a FlowerTune app | here |"
    yield "| --- | --- |"
    for name, key in KEYS.items():
        yield f"| `{name}` | `{key.ours}`{f' ({key.remark})' if key.remark else ''} |"


def _lora_of_7b() -> dict[str, torch.Tensor]:
    """Return the adapter that bytes are counted of: LoRA of rank 8, shapes alone."""
    return {
        f"base_model.model.model.layers.{layer}.self_attn.{module}.lora_{factor}.weight": torch.empty(
            (8, 4096) if factor == "A" else (4096, 8), device="meta"
        )
        for layer in range(32)
        for module in ("q_proj", "v_proj")
        for factor in "AB"
    }


def bytes_of(name: str) -> tuple[float, float] | None:
    """Return bytes down and up beside FedAvg's, ``None`` where they follow from more than the adapter."""
    settings, kind = METHODS[name]
    whole = tensor_bytes(_lora_of_7b())
    if kind.pools_data:
        return 0.0, 0.0
    try:
        own = kind(settings()).traffic(_lora_of_7b())
    except AttributeError:  # it asks the server's side of a run
        return None
    if not isinstance(own, ParameterTraffic):
        return None
    steps = 10
    return (own.down + own.also_down) / whole, (own.up + steps * own.up_a_step) / whole


def _bytes(name: str) -> str:
    found = bytes_of(name)
    if found is not None:
        return " / ".join(f"{share:.2g}" for share in found)
    return {
        "FedLLM": "by cohort, ranks, classes or experts",
        "KD-FedLLM": "by public rows",
        "Split-FedLLM": "by the tokens of every step",
    }[METHODS[name][1].declares.framework]


def _is_method(name: str) -> bool:
    return METHODS[name][1].declares.role == "method"


def _is_personal(name: str) -> bool:
    kind = METHODS[name][1]
    return kind.personal or kind.own_models


def _sends_little(name: str) -> bool:
    found = bytes_of(name)
    return found is not None and sum(found) <= 1.0


SITUATIONS: dict[str, Any] = {
    "disagree": _is_personal,
    "drift": lambda name: METHODS[name][1].declares.problem == DRIFT,
    "models": lambda name: METHODS[name][1].mixed_models,
    "ranks": lambda name: METHODS[name][1].mixed_ranks and not METHODS[name][1].mixed_models,
    "links": _sends_little,
    "speeds": lambda name: METHODS[name][1].asynchronous,
    "small": lambda name: not METHODS[name][1].whole_at_clients or METHODS[name][1].submixtures,
    "rules": lambda name: METHODS[name][1](METHODS[name][0]()).averages,
    "summed": lambda name: METHODS[name][1].declares.secure_aggregation.holds,
    "private": lambda name: METHODS[name][1].declares.client_privacy.holds,
}
"""What is listed on the page that guides to a method: name of the part to which methods are in it."""


def _listed(holds: Any) -> Iterator[str]:
    names = [f"`{name}`" for name in METHODS if _is_method(name) and holds(name)]
    yield ", ".join(names) + "." if names else "None yet."


def problem_of(name: str) -> str:
    """Return the problem that a method is for, as its traits and its declaration say."""
    kind = METHODS[name][1]
    traits = {
        "clients disagree": _is_personal(name),
        "unlike models": kind.mixed_models,
        "unlike ranks": kind.mixed_ranks and not kind.mixed_models,
        "unlike speeds": kind.asynchronous,
        "no room for the whole model": SITUATIONS["small"](name),
        "slow links": _sends_little(name),
        "the mean of factors is not that of products": kind.changes_backbone and kind.two_factors,
    }
    found = [words for words, holds in traits.items() if holds and _is_method(name)]
    found += [kind.declares.problem] if kind.declares.problem else []
    return "; ".join(found) or ("one model for all" if _is_method(name) else "a baseline")


def _declared() -> Iterator[str]:
    yield (
        "| method | problem | exactness | what travels | bytes down / up | what a client keeps | "
        "public rows | secure aggregation | privacy of clients / rows | absence | between machines |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for name, (_, kind) in METHODS.items():
        own = kind.declares
        paper = f"`{name}`: [{own.title}]({own.paper})" if own.paper else f"`{name}`: {own.title}"
        cells = [
            paper,
            problem_of(name),
            f"{own.fidelity}: {own.difference}" if own.difference else own.fidelity,
            own.travels,
            _bytes(name),
            own.keeps,
            "needed" if kind.needs_public else "no",
            _yes(own.secure_aggregation.holds),
            f"{_yes(own.client_privacy.holds)} / {_yes(own.row_privacy.holds)}",
            _yes(own.absence.tolerated),
            _yes(not kind.asynchronous and not kind.pools_data),
        ]
        yield f"| {' | '.join(cells)} |"


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


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
    (HERE / "choose_method.md").write_text(choose_method_page(), encoding="utf-8")
