"""``[selection]`` beside the other sections: older files, and what it cannot go with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fedloom.federation.selection import DEFAULT, SELECTIONS
from fedloom.methods import METHODS
from fedloom.settings.schema import Table

EARLIER = "federation.selection"
"""The setting of earlier releases, which is still read."""


def moved_selection(table: Mapping[str, Any]) -> tuple[Table, list[str], list[str]]:
    """Return a table with ``federation.selection`` as the section ``[selection]``, notes and mistakes.

    Args:
        table: Section to its settings, as a file has them.
    """
    table = dict(table)
    federation = table.get("federation")
    if not isinstance(federation, Mapping) or "selection" not in federation:
        return table, [], []
    chosen = federation["selection"]
    table["federation"] = {key: own for key, own in federation.items() if key != "selection"}
    if "selection" in table:
        return (
            table,
            [],
            [
                f"{EARLIER} = {chosen!r:.60}: there is a section [selection] too, which is its new name; "
                f"leave {EARLIER} out"
            ],
        )
    named = {"name": chosen} if isinstance(chosen, str) else chosen
    if not isinstance(named, Mapping) or not isinstance(named.get("name"), str):
        return (
            table,
            [],
            [
                f"{EARLIER} = {chosen!r:.60}: must be a name, or a table with one; write [selection] "
                'name = "availability"'
            ],
        )
    table["selection"] = dict(named)
    return table, [f"{EARLIER} is read as the section [selection], its new name"], []


def selection_contradictions(parts: Mapping[str, Any]) -> Iterator[str]:
    """Yield what contradicts a selection that goes by what single clients tell, in valid sections."""
    own = parts.get("selection")
    if own is None or own.name == DEFAULT or not SELECTIONS[own.name][1].informed:
        return
    what = f"selection.name = {own.name!r}"
    if "privacy" in parts:
        yield from _hidden(what, parts["privacy"])
    if "method" in parts:
        yield from _of_method(what, own, parts["method"].name)
    size = parts["federation"].drawn if "federation" in parts else 0
    candidates = getattr(own, "candidates", None)
    if candidates is not None and candidates < size:
        yield (
            f"selection.candidates = {candidates} is below the {size} clients that are drawn for a "
            f"round: give {size} at least, or leave it out"
        )


def _hidden(what: str, privacy: Any) -> Iterator[str]:
    """Yield which protection a single client's loss would go round."""
    tells = "goes by the loss that each client tells of its rows"
    if privacy.secure_aggregation:
        yield (
            f"{what} {tells}, and under privacy.secure_aggregation the server sees sums alone: use "
            '"uniform", "rows" or "availability"'
        )
    if privacy.unit == "row":
        yield (
            f'{what} {tells}, which has no noise: privacy.unit = "row" would not hold; use "uniform", '
            '"rows" or "availability"'
        )


def _of_method(what: str, own: Any, name: str) -> Iterator[str]:
    """Yield why a method's clients cannot be drawn or asked so."""
    method = METHODS[name][1]
    if method.asynchronous:
        yield (
            f"{what} draws the clients of a round, and method.name = {name!r} has those asked that are "
            "free: leave [selection] out"
        )
    elif not method.whole_at_clients and getattr(own, "losses", "") == "rows":
        yield (
            f"{what} asks clients for the loss of rows, and with method.name = {name!r} none has the "
            'whole model: set selection.losses = "training"'
        )
