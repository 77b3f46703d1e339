"""How a method says that a page shows figures of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

Kind = Literal["line_chart", "client_table", "client_draws", "expert_assignment"]
"""What draws a section, in the module of ``reports/sections`` of that name."""

KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True)
class SectionSpec:
    """A section of a run's page, and of a comparison's, that a method declares.

    A round's figures are what the method wrote there: ``cohort.details[key] = ...``, as plain JSON.

    Attributes:
        kind: ``line_chart``: a number, or numbers by name, against rounds. ``client_table``: a number for
            each client id, clients by rounds. ``client_draws``: why each client was drawn, by id.
            ``expert_assignment``: who holds which experts.
        title: Its heading.
        text: What it shows, in a sentence or two below the heading; may be empty.
        key: In the rounds' details.
    """

    kind: Kind
    title: str
    text: str
    key: str

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> SectionSpec:
        """Return what ``run.json`` says; its kind may be one of another release."""
        return cls(**{own.name: str(record.get(own.name, "")) for own in fields(cls)})  # type: ignore[arg-type]


def problems(sections: object) -> list[str]:
    """Return what is wrong with what a method declares as its sections."""
    if not isinstance(sections, tuple) or not all(isinstance(s, SectionSpec) for s in sections):
        return [
            f"its sections must be a tuple of SectionSpec(kind, title, text, key), got {sections!r}"
        ]
    found = []
    for own in sections:
        if own.kind not in KINDS:
            kinds = ", ".join(KINDS)
            found.append(f"its section {own.title!r} is of kind {own.kind!r}; allowed: {kinds}")
        if not own.title or not own.key:
            found.append(f"{own!r} must have a title, and the key of the rounds' details it shows")
    return found
