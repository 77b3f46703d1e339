"""The kinds of example, checked on construction: four to train on, and choices to judge by.

An example is text (or chat messages) as its owner wrote it, with the number of the row it came
from and the columns a partition may divide by. It knows nothing of tokens, files or clients.
The column conventions are TRL's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Message = Mapping[str, str]
"""A chat message: ``{"role": "user" | "assistant" | "system", "content": text}``."""

Text = str | tuple[Message, ...]
"""Plain text, or a conversation as a tuple of messages."""

Kind = Literal["instruction", "preference", "feedback", "labelled"]


def plain_text(text: Text) -> str:
    """Return a text, or what is said in a conversation as lines."""
    return text if isinstance(text, str) else "\n".join(message["content"] for message in text)


@dataclass(frozen=True)
class Instruction:
    """A prompt and the completion to learn (``prompt, completion``, ``messages`` or ``text``).

    ``accepted`` are other answers that would do as well; nothing is trained on them.
    """

    row: int
    prompt: Text
    completion: Text
    columns: Mapping[str, str] = field(default_factory=dict)
    accepted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Preference:
    """A prompt with a chosen and a rejected completion (``prompt, chosen, rejected``)."""

    row: int
    prompt: Text
    chosen: Text
    rejected: Text
    columns: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a pair that holds no preference."""
        if self.chosen == self.rejected:
            raise ValueError("chosen equals rejected")


@dataclass(frozen=True)
class Feedback:
    """A prompt and one completion that was found desirable or not (``prompt, completion, label``)."""

    row: int
    prompt: Text
    completion: Text
    desirable: bool
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Labelled:
    """A text and the name of its class (``text, label``)."""

    row: int
    text: str
    label: str
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """A prompt and all the completions it may have, of which one is right; held-out rows only."""

    row: int
    prompt: Text
    choices: tuple[str, ...]
    right: int
    columns: Mapping[str, str] = field(default_factory=dict)


Example = Instruction | Preference | Feedback | Labelled | Choice


def as_choice(example: Instruction, choices: Sequence[str]) -> Choice:
    """Return an instruction as the choice among all completions that there are.

    Raises:
        ValueError: Its own is none of them.
    """
    right = choices.index(str(example.completion))
    return Choice(example.row, example.prompt, tuple(choices), right, example.columns)


def unpair(pairs: Sequence[Preference]) -> list[Feedback]:
    """Unroll each pair into a desirable and an undesirable row, in that order (KTOO).

    Both rows keep the pair's row number, so what was one pair can be recognised again.
    """
    rows = []
    for pair in pairs:
        rows.append(Feedback(pair.row, pair.prompt, pair.chosen, True, pair.columns))
        rows.append(Feedback(pair.row, pair.prompt, pair.rejected, False, pair.columns))
    return rows
