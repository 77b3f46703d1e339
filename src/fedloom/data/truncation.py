"""Truncation: a prompt and its completions cut to the length that a model is trained with.

The completion is kept and the prompt loses its start (a leading ``<s>`` stays); a completion that alone
is too long loses its end. Both sides of a pair keep the same prompt tokens.
"""

from __future__ import annotations

from collections.abc import Sequence


def truncate(
    prompt: Sequence[int], completions: Sequence[Sequence[int]], max_length: int, bos: int | None
) -> tuple[list[int], list[list[int]]]:
    """Cut a prompt and its completions to ``max_length`` tokens; see the module's rule.

    Returns:
        The prompt's tokens that are left (at least one) and the completions' (may be empty).
    """
    kept = [list(completion[: max_length - 1]) for completion in completions]
    room = max_length - max(len(completion) for completion in kept)
    if len(prompt) <= room:
        return list(prompt), kept
    if bos is not None and prompt[0] == bos and room > 1:
        return [bos, *prompt[len(prompt) - room + 1 :]], kept
    return list(prompt[len(prompt) - room :]), kept
