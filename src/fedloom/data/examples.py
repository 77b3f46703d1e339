"""The kinds of example, checked on construction: four to train on, and choices to judge by.

An example is text (or chat messages) as its owner wrote it, with the number of the row it came
from and the columns a partition may divide by. It knows nothing of tokens, files or clients.
The column conventions are TRL's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Message = Mapping[str, Any]
"""A chat message as chat templates take it: ``{"role": ..., "content": ...}``.

The role is user, assistant, system, developer or tool. The content is a text, a list of parts
``{"type": "text", "text": ...}``, or ``None`` beside ``tool_calls``. Further keys that there may be:
``tool_calls``, ``tool_call_id``, ``name`` and ``reasoning_content``.
"""

Tools = tuple[Mapping[str, Any], ...]
"""JSON schemas of the functions that a conversation may call."""

Text = str | tuple[Message, ...]
"""Plain text, or a conversation as a tuple of messages."""

Kind = Literal["instruction", "preference", "feedback", "labelled"]


def first_answer(text: Text) -> Text:
    """Return a completion up to its first answer: what is asked for by the prompt alone."""
    if isinstance(text, str):
        return text
    first = next((i for i, own in enumerate(text) if own["role"] == "assistant"), len(text) - 1)
    return text[: first + 1]


def last_answer(text: Text) -> Text:
    """Return the last answer of a completion alone."""
    if isinstance(text, str):
        return text
    return tuple(own for own in text if own["role"] == "assistant")[-1:]


def plain_text(text: Text) -> str:
    """Return a text, or what is said and called in a conversation as lines."""
    return text if isinstance(text, str) else "\n".join(map(_said, text))


def _said(message: Message) -> str:
    """Return a message as text: its content, and every call as ``name(arguments as JSON)``."""
    content = message.get("content") or ""
    parts = [content] if isinstance(content, str) else [part["text"] for part in content]
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    parts += [
        f"{call['name']}({json.dumps(call['arguments'], ensure_ascii=False)})" for call in calls
    ]
    return "\n".join(part for part in parts if part)


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
    tools: Tools = ()


@dataclass(frozen=True)
class Preference:
    """A prompt with a chosen and a rejected completion (``prompt, chosen, rejected``)."""

    row: int
    prompt: Text
    chosen: Text
    rejected: Text
    columns: Mapping[str, str] = field(default_factory=dict)
    tools: Tools = ()

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
    tools: Tools = ()


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
    tools: Tools = ()


Example = Instruction | Preference | Feedback | Labelled | Choice


def as_choice(example: Instruction, choices: Sequence[str]) -> Choice:
    """Return an instruction as the choice among all completions that there are.

    Raises:
        ValueError: Its own is none of them.
    """
    right = choices.index(str(example.completion))
    return Choice(
        example.row, example.prompt, tuple(choices), right, example.columns, example.tools
    )


def unpair(pairs: Sequence[Preference]) -> list[Feedback]:
    """Unroll each pair into a desirable and an undesirable row, in that order (KTOO).

    Both rows keep the pair's row number, so what was one pair can be recognised again.
    """
    rows = []
    for pair in pairs:
        for answer, desirable in ((pair.chosen, True), (pair.rejected, False)):
            rows.append(
                Feedback(pair.row, pair.prompt, answer, desirable, pair.columns, pair.tools)
            )
    return rows
