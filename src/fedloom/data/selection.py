"""Pairs as a question with two answers, A and B, of which one is better: what a selector is asked.

Source: Wu et al. 2024, "Towards Federated RLHF with Aggregated Client Preference for LLMs" (FedBis,
FedBiscuit), https://arxiv.org/abs/2407.03038: a language model reads the prompt and both answers and
says a letter. The wording is ours, and so is that each pair is asked in both orders.
"""

from __future__ import annotations

from fedloom.data.examples import Preference, Text, plain_text

LETTERS = ("A", "B")
"""What the better answer is called: A is the one that comes first."""


def question(prompt: Text, first: Text, second: Text) -> str:
    """Return the question which of two answers to a prompt is better; a letter answers it.

    Args:
        prompt: A text, or messages, each of which becomes a line with its role.
        first: Answer A.
        second: Answer B.
    """
    return (
        f"Prompt: {_conversation(prompt)}\nAnswer A: {plain_text(first).strip()}\n"
        f"Answer B: {plain_text(second).strip()}\nBetter answer: "
    )


def both_orders(pair: Preference) -> tuple[str, str]:
    """Return the question with the chosen answer as A, and as B."""
    return (
        question(pair.prompt, pair.chosen, pair.rejected),
        question(pair.prompt, pair.rejected, pair.chosen),
    )


def _conversation(prompt: Text) -> str:
    if isinstance(prompt, str):
        return prompt.strip()
    return "\n".join(f"{own['role']}: {plain_text((own,))}" for own in prompt)
