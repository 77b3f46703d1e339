"""What a method wrote into the details of rounds, as far as it is numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedloom.reports.run_data import Run

Numbers = dict[str, float]
"""By name; of a number alone the name is empty."""


def numbers_by_round(run: Run, key: str, *, named: bool = False) -> dict[int, Numbers]:
    """Return the numbers of each round that has any; those that are not finite are left out.

    Args:
        run: The run.
        key: Of the details.
        named: Whether a number alone is none.

    Raises:
        ValueError: A round has something else; the message says which and what.
    """
    return {
        record["round"]: _numbers(record["details"][key], f"round {record['round']}", key, named)
        for record in run.rounds
        if key in record.get("details", {})
    }


def few(rounds: Sequence[int], most: int) -> list[int]:
    """Return at most so many rounds, the first and the last among them."""
    if len(rounds) <= most:
        return list(rounds)
    step = (len(rounds) - 1) / (most - 1)
    return [rounds[round(i * step)] for i in range(most)]


def _numbers(value: object, where: str, key: str, named: bool) -> Numbers:
    found = value if isinstance(value, Mapping) or named else {"": value}
    if isinstance(found, Mapping) and all(map(_is_number, found.values())):
        return {str(name): float(own) for name, own in found.items() if own is not None}
    wanted = "numbers by client id" if named else "a number, or numbers by name"
    text = repr(value)
    raise ValueError(
        f"details[{key!r}] of {where} is {text[:80]}{'...' * (len(text) > 80)}; it must be {wanted}"
    )


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
