"""Log-probabilities of completions under a causal LM; the one place that shifts labels.

log p(y|x) is the sum over the completion's tokens, not the mean (Rafailov et al. 2023,
"Direct Preference Optimization", https://arxiv.org/abs/2305.18290).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedloom.batch import Sequences
from fedloom.objectives.base import Model


def completion_logits(model: Model, sequences: Sequences) -> tuple[Tensor, Tensor, Tensor]:
    """Predict the completion tokens of each sequence.

    The LM head is applied from the position before the first completion token of the batch on.

    Args:
        model: A causal LM.
        sequences: ``(sequences, length)``.

    Returns:
        ``(completion tokens, vocabulary)`` float32 logits, row by row; the tokens themselves; and
        ``(sequences, kept)``: which of the last columns are completion tokens.
    """
    return _logits(_pass(model, sequences), sequences)


def completion_token_logps(model: Model, sequences: Sequences) -> tuple[Tensor, Tensor, Tensor]:
    """Score the completion tokens of each sequence, in float32.

    Args:
        model: A causal LM.
        sequences: ``(sequences, length)``.

    Returns:
        ``(sequences, kept)`` log-probs, zero where there is no completion token; the mask of the
        same shape; and whether each token was the most likely one (false off the mask).
    """
    logits, targets, mask = completion_logits(model, sequences)
    correct = torch.zeros_like(mask)
    correct[mask] = logits.detach().argmax(-1) == targets
    return _token_logps(logits, targets, mask), mask, correct


def completion_logps(model: Model, sequences: Sequences) -> Tensor:
    """Return ``(sequences,)`` float32: the summed log-prob of each completion."""
    return _token_logps(*completion_logits(model, sequences)).sum(-1)


def completion_rewards(model: Model, sequences: Sequences) -> tuple[Tensor, Tensor]:
    """Return the summed log-prob and the explicit reward of each completion, in one pass.

    Args:
        model: A causal LM with a reward head.
        sequences: ``(sequences, length)``.

    Returns:
        Two ``(sequences,)`` float32 tensors; the reward is read at the last token.
    """
    output = _pass(model, sequences)
    return _token_logps(*_logits(output, sequences)).sum(-1), output.rewards


def _pass(model: Model, sequences: Sequences) -> Any:
    return model(
        input_ids=sequences.input_ids,
        attention_mask=sequences.attention_mask,
        logits_to_keep=sequences.input_ids.shape[1] - (sequences.first_completion - 1),
    )


def _logits(output: Any, sequences: Sequences) -> tuple[Tensor, Tensor, Tensor]:
    start = sequences.first_completion
    mask = sequences.completion_mask[:, start:]
    return output.logits[:, :-1][mask].float(), sequences.input_ids[:, start:][mask], mask


def _token_logps(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    scores = -F.cross_entropy(logits, targets, reduction="none")
    logps = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    return logps.masked_scatter(mask, scores)
