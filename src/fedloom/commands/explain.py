"""``fedloom explain``: cause and way out of an error, by its name or its words, without a network.

``explanations.jsonl`` holds what ``docs/errors.md`` says, a section a line. ``python docs/errors.py``
writes both from the code; nothing is read before an error is printed or the command is used.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from fedloom.commands.app import app, say

FILE = Path(__file__).with_name("explanations.jsonl")

FEWEST = 12
"""Characters of a message beside what is filled in from which it is told apart from others."""

MISTAKE = "  - "
"""Before each mistake that an error lists."""

MOST_HINTS, MOST_SHOWN = 3, 5
"""Most sections that an error names, and that words are answered with at once."""


@dataclass(frozen=True)
class Section:
    """What is known of messages with the same first words.

    Attributes:
        name: By which it is asked for: small letters, digits and hyphens.
        words: The first words, with an ellipsis for what is filled in.
        messages: Of each its text, its cause, what to do, and the exit code.
    """

    name: str
    words: str
    messages: tuple[tuple[str, str, str, int], ...]


def sections() -> list[Section]:
    """Return all sections; none where the file is missing or cannot be read."""
    try:
        lines = FILE.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        return [Section(own[0], own[1], tuple(map(tuple, own[2]))) for own in rows]
    except (OSError, ValueError, IndexError, TypeError):
        return []


def fits(template: str, text: str) -> bool:
    """Return whether a text begins as a template with ellipses says."""
    first, *others = template.split("…")
    if not text.startswith(first):
        return False
    at = len(first)
    for part in others:
        if (found := text.find(part, at)) < 0:
            return False
        at = found + len(part)
    return True


def section_of(text: str, known: list[Section]) -> Section | None:
    """Return the section of an error: of those whose message it may be, the one that says most of it."""
    said = " ".join(text.split())
    best, most = None, FEWEST - 1
    for section in known:
        for template, *_ in section.messages:
            literal = len(template.replace("…", ""))
            if literal > most and fits(template, said):
                best, most = section, literal
    return best


def hints(error: str) -> list[str]:
    """Return lines that say how an error, or each mistake that it lists, is explained, where it is."""
    known, lines = sections(), error.splitlines()
    listed = [line.removeprefix(MISTAKE) for line in lines if line.startswith(MISTAKE)]
    found = [section_of(text, known) for text in listed or [error]]
    names = dict.fromkeys(section.name for section in found if section is not None)
    return [f"more: fedloom explain {name}" for name in [*names][:MOST_HINTS]]


@app.command()
def explain(
    error: Annotated[
        list[str],
        typer.Argument(
            help="Name of an error, as the line `more:` below it says, or words of its message."
        ),
    ],
) -> None:
    """Say what an error means and what to do about it."""
    from fedloom.settings.suggestions import did_you_mean

    known, text = sections(), " ".join(error).strip()
    by_name = {section.name: section for section in known}
    found = [by_name[text]] if text in by_name else []
    if not found and (section := section_of(text, known)):
        found = [section]
    if not found:
        said = text.casefold()
        found = [
            own for own in known if said and any(said in t[0].casefold() for t in own.messages)
        ]
    if not found:
        raise typer.BadParameter(
            f"no error has the name or the words {text[:80]!r}; {did_you_mean(text, by_name)}give words "
            "that stand in the message without what is filled in"
        )
    for line in _shown(found):
        say(line)


def _shown(found: list[Section]) -> Iterator[str]:
    """Yield the lines of some sections, or where they are many their names."""
    if len(found) > MOST_SHOWN:
        yield f"{len(found)} errors have these words; fedloom explain NAME has more of one:"
        yield from (f"  {section.name}  {section.words}" for section in found)
        return
    for place, section in enumerate(found):
        yield from [""] * bool(place)
        yield section.words
        for _, cause, way, code in section.messages:
            yield f"  Cause: {cause}"
            yield f"  What to do: {way} (Exit code {code}.)"
