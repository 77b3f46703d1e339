"""What became of every row, in words: made from the record that ``run.json`` holds.

Old run folders have no such record; whoever shows it asks first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedloom.accounting.quantities import human_count

Record = Mapping[str, Any]

USED = {
    "public": "public",
    "trained": "trained on",
    "held_out": "held out by clients",
    "judged": "held out for all",
}
"""What examples are used for, in the order shown."""


def sources(record: Record) -> dict[str, Record]:
    """Return the accounts of all sources under what they are called."""
    named = {
        "rows": record["source"],
        "rows of the test set": record["test_source"],
        "rows of the public source": record["public_source"],
    }
    return {name: own for name, own in named.items() if own and own["rows"]}


def lines(own: Record) -> list[tuple[str, str]]:
    """Return an account as lines: what was read, what was lost and why, what is used."""
    found = [("read", human_count(own["rows"]))]
    found += [(reason, human_count(count, signed=True)) for reason, count in own["made"].items()]
    if own["malformed"]:
        found.append(("malformed", human_count(own["malformed"])))
    found += [
        (f"dropped: {reason}", human_count(count)) for reason, count in own["dropped"].items()
    ]
    found += [(said, human_count(own[name])) for name, said in USED.items() if own[name]]
    if own["unaccounted"]:
        found.append(("unaccounted for", human_count(own["unaccounted"])))
    for cut, whose in ((own["cut"], "trained on"), (own["held_out_cut"], "held out")):
        if cut and cut["cut_rows"]:
            share = f"{human_count(cut['cut_rows'])} ({cut['cut_rows'] / cut['rows']:.1%})"
            found.append((f"cut to max_length, of those {whose}", share))
    return found


def client_lines(record: Record) -> list[dict[str, str]]:
    """Return one row a client: what it was dealt, and what became of that."""
    rows = []
    for own in record["clients"]:
        made, cut = sum(own["made"].values()), own["cut"]
        rows.append(
            {
                "client": str(own["client"]),
                "rows": human_count(own["rows"]),
                "made": human_count(made, signed=True) if made else "",
                "left out": human_count(own["malformed"] + sum(own["dropped"].values())),
                "trained on": human_count(own["trained"]),
                "held out": human_count(own["held_out"]),
                "cut": f"{cut['cut_rows'] / cut['rows']:.1%}" if cut and cut["rows"] else "",
            }
        )
    return rows


def sentence(name: str, own: Record) -> str:
    """Return an account on one line, as a sum."""
    made, dropped = sum(own["made"].values()), sum(own["dropped"].values())
    parts = [(own["malformed"], "malformed"), (dropped, "dropped")]
    parts += [(own[key], said) for key, said in USED.items()]
    parts.append((own["unaccounted"], "unaccounted for"))
    given = f"{human_count(own['rows'])} read"
    if made:
        given += f" {'+' if made > 0 else '-'} {human_count(abs(made))} made of them"
    became = (f"{human_count(count)} {said}" for count, said in parts if count)
    return f"{name}: {given} = " + " + ".join(became)
