"""Prompt templates: what is put around an instruction before a model continues it.

Source of the Alpaca form: Taori et al. 2023, https://github.com/tatsu-lab/stanford_alpaca.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

Template = Literal["alpaca", "chat", "plain"]


def alpaca(instruction: str, tokenizer: Any) -> str:
    """Return the prompt that Alpaca models were trained on, without an input field."""
    return (
        "Below is an instruction that describes a task. Write a response that appropriately "
        f"completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
    )


def chat(instruction: str, tokenizer: Any) -> str:
    """Return the tokenizer's own chat template around one message of a user."""
    messages = [{"role": "user", "content": instruction}]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text


def plain(instruction: str, tokenizer: Any) -> str:
    """Return the instruction as it is."""
    return instruction


TEMPLATES: dict[str, Callable[[str, Any], str]] = {"alpaca": alpaca, "chat": chat, "plain": plain}
"""Name in ``generation.template`` to its function."""
