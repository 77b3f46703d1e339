"""Write ``features.md``: settings and commands of other products beside ours, from ``features.toml``.

``python docs/features.py`` writes the page; ``tests/test_features.py`` compares it, looks up each name of
ours in the settings and commands, and checks that no name of theirs is left out.
"""

from __future__ import annotations

import re
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

HERE = Path(__file__).parent

PAGE = """# Features beside those of other products

<!-- written by docs/features.py from docs/features.toml -->

Settings and commands of TRL, LLaMA-Factory, axolotl, Flower and OpenFedLLM by their own names, and what
is there for each in fedloom, or why nothing is. It is a table of names: two products that have a setting
may do different things with it. What a name means here, and how experiments of other tools are taken
over, is on [From other tools](other_tools.md).

| product | version | how the names were collected |
| --- | --- | --- |
"""


@dataclass(frozen=True)
class Row:
    """A feature.

    Attributes:
        part: Heading of the table.
        feature: What it is.
        ours: Settings (``section.key``, ``section.name = "choice"``) and commands of fedloom.
        without: Why there is nothing, where there is nothing.
        patterns: Of names of other products.
    """

    part: str
    feature: str
    ours: tuple[str, ...]
    without: str
    patterns: tuple[re.Pattern[str], ...]


def known() -> dict[str, Any]:
    """Return what ``features.toml`` says."""
    return tomllib.loads((HERE / "features.toml").read_text(encoding="utf-8"))


def names_of(product: dict[str, Any]) -> list[str]:
    """Return the names of a product, in its own order."""
    return [name.strip() for name in product["names"].replace("\n", " ").split(",")]


def rows_of(table: dict[str, Any]) -> list[Row]:
    """Return the rows, each with the heading that it stands under."""
    found, part = [], ""
    for own in table["row"]:
        part = own.get("part", part)
        patterns = [re.compile(p.replace("~", " ")) for p in own.get("names", "").split()]
        found.append(
            Row(
                part,
                own["feature"],
                tuple(own.get("ours", ())),
                own.get("without", ""),
                tuple(patterns),
            )
        )
    return found


def row_of(name: str, rows: list[Row]) -> Row | None:
    """Return the first row that a name of another product belongs to."""
    return next((row for row in rows if any(p.fullmatch(name) for p in row.patterns)), None)


def features_page() -> str:
    """Return the page."""
    table = known()
    products, rows = table["products"], rows_of(table)
    names: dict[tuple[str, int], list[str]] = defaultdict(list)
    for product, own in products.items():
        for name in names_of(own):
            row = row_of(name, rows)
            if row is not None:
                names[product, rows.index(row)].append(name)
    titles = [own["title"] for own in products.values()]
    lines = [f"| {own['title']} | {own['version']} | {own['how']} |" for own in products.values()]
    part = ""
    for place, row in enumerate(rows):
        if row.part != part:
            part = row.part
            lines += ["", f"## {part}", "", f"| | fedloom | {' | '.join(titles)} |"]
            lines += [f"| --- | --- |{' --- |' * len(titles)}"]
        cells = [_codes(names[product, place]) for product in products]
        lines.append(f"| {row.feature} | {_ours(row)} | {' | '.join(cells)} |")
    return PAGE + "\n".join(lines) + "\n"


def _ours(row: Row) -> str:
    return _codes(row.ours) if row.ours else f"none: {row.without}"


def _codes(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)


def unknown_names(rows: list[Row]) -> Iterator[str]:
    """Yield names of ours in the table that are no setting and no command."""
    commands, settings, choices = our_commands(), our_settings(), our_choices()
    for row in rows:
        for name in row.ours:
            section, equals, value = name.partition(" = ")
            if name.startswith("fedloom "):
                there = name in commands
            elif equals:
                there = value.strip('"') in choices.get(section, ())
            else:
                there = name in settings
            if not there:
                yield name


def our_commands() -> set[str]:
    """Return commands and commands with each of their options: ``fedloom run --set``."""
    import typer

    from fedloom.commands.main import app

    found = set()
    rest = [("fedloom", typer.main.get_command(app))]
    while rest:
        words, command = rest.pop()
        rest += [(f"{words} {n}", own) for n, own in getattr(command, "commands", {}).items()]
        found |= {words, *(f"{words} {o}" for p in command.params for o in p.opts)}
    return found


def our_settings() -> set[str]:
    """Return ``section.key`` of every setting, of experiments and what lies beside them."""
    page = (HERE / "settings.md").read_text(encoding="utf-8")
    found, section, kept = set(), "", ""
    for line in page.splitlines():
        if heading := re.match(r"#+ \[(\w+)\]", line):
            section, kept = heading[1], heading[1]
        elif heading := re.match(r"#+ (\w+)$", line):
            section = {"ClientGroup": "clients.groups"}.get(heading[1], kept)
        elif setting := re.match(r"\| `(\w+)` \|", line):
            found.add(f"{section}.{setting[1]}")
    return found | {f"{own}.name" for own in ("method", "objective", "selection")}


def our_choices() -> dict[str, tuple[str, ...]]:
    """Return what may be chosen by name: section and key to the names."""
    from fedloom.aggregation.rules import AggregationSettings
    from fedloom.federation.selection import SELECTIONS
    from fedloom.methods import METHODS
    from fedloom.models.adapters import AdapterSettings
    from fedloom.objectives import OBJECTIVES

    return {
        "method.name": tuple(METHODS),
        "objective.name": tuple(OBJECTIVES),
        "selection.name": tuple(SELECTIONS),
        "aggregation.rule": get_args(AggregationSettings.model_fields["rule"].annotation),
        "adapter.kind": get_args(AdapterSettings.model_fields["kind"].annotation),
    }


if __name__ == "__main__":
    (HERE / "features.md").write_text(features_page(), encoding="utf-8")
