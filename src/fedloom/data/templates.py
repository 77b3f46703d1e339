"""Prompt templates: what is put around an instruction before a model continues it.

Source of the Alpaca form: Taori et al. 2023, https://github.com/tatsu-lab/stanford_alpaca.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from fedloom.data.examples import Text

Template = Literal["alpaca", "chat", "plain"]


def alpaca(instruction: str) -> Text:
    """Return the prompt that Alpaca models were trained on, without an input field."""
    return (
        "Below is an instruction that describes a task. Write a response that appropriately "
        f"completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
    )


def chat(instruction: str) -> Text:
    """Return a conversation of one message, for the tokenizer's chat template."""
    return ({"role": "user", "content": instruction},)


def plain(instruction: str) -> Text:
    """Return the instruction as it is."""
    return instruction


TEMPLATES: dict[str, Callable[[str], Text]] = {"alpaca": alpaca, "chat": chat, "plain": plain}
"""Name in ``generation.template`` to its function."""
