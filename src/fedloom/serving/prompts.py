"""Conversations as the prompts that a model was trained on: by chat templates, or as plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedloom.data.encode import TextEncoder
from fedloom.data.examples import Message
from fedloom.data.row_parsing import template_texts

ANSWER = "{answer}"
"""Where the answer stands in a model card's example of a prompt."""


@dataclass(frozen=True)
class PromptFormat:
    """How a conversation is written for a model.

    Attributes:
        kind: ``"chat"``: by the tokenizer's chat template; ``"plain"``: as text, the messages in lines.
        before: Of a plain prompt, what stands before what the user says.
        after: And what stands behind it.
    """

    kind: Literal["chat", "plain"] = "chat"
    before: str = ""
    after: str = ""

    def tokens(self, encoder: TextEncoder, messages: Sequence[Message]) -> list[int]:
        """Return a conversation as the tokens that the model goes on with.

        Raises:
            DataError: The chat template refuses it.
        """
        if self.kind == "chat":
            return encoder.prompt(tuple(messages))
        return encoder.prompt("\n".join(map(self._line, messages)))

    def _line(self, message: Message) -> str:
        asked = message["role"] == "user"
        return (
            f"{self.before}{message['content']}{self.after}" if asked else str(message["content"])
        )

    @property
    def words(self) -> str:
        """What is said of it to a user."""
        if self.kind == "chat":
            return "prompts are rendered with the tokenizer's chat template"
        return "prompts are plain text that the model continues, as in its training"


def format_of(prompt: Mapping[str, Any]) -> PromptFormat:
    """Return the format that a model card tells of.

    A plain prompt of one placeholder has it filled; of several, nobody can tell which is what a user
    says, so that the model is given the text alone.

    Args:
        prompt: ``format`` and ``example`` as in ``fedloom.json``; ``{{`` and ``}}`` in it are braces.
    """
    if prompt.get("format") != "plain":
        return PromptFormat()
    texts = template_texts(str(prompt.get("example", "")).removesuffix(ANSWER))
    return PromptFormat("plain", *texts) if len(texts) == 2 else PromptFormat("plain")


def fitting(
    format: PromptFormat, encoder: TextEncoder, messages: Sequence[Message], room: int
) -> tuple[list[int], int]:
    """Return a conversation's tokens, at most ``room``, and how many old messages are left out.

    Instructions of the system and the last message stay; should these be too long, their tokens are cut
    at the beginning.

    Args:
        format: How it is written.
        encoder: Of the model.
        messages: The conversation; its last message is the user's.
        room: Tokens, at least 1.
    """
    opening = [message for message in messages[:1] if message["role"] == "system"]
    rest = list(messages[len(opening) :])
    left_out = 0
    while True:
        tokens = format.tokens(encoder, [*opening, *rest])
        if len(tokens) <= room or len(rest) <= 1:
            return tokens[-room:], left_out
        gone = 2 if len(rest) > 2 else 1  # a question goes with its answer
        rest, left_out = rest[gone:], left_out + gone
