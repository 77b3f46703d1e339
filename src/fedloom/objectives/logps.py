"""Log-probabilities of completions under a causal LM; the one place that shifts labels.

log p(y|x) is the sum over the completion's tokens, not the mean (Rafailov et al. 2023,
"Direct Preference Optimization", https://arxiv.org/abs/2305.18290).
"""

from __future__ import annotations

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
    start = sequences.first_completion - 1
    length = sequences.input_ids.shape[1]
    output = model(
        input_ids=sequences.input_ids,
        attention_mask=sequences.attention_mask,
        logits_to_keep=length - start,
    )
    mask = sequences.completion_mask[:, start + 1 :]
    return output.logits[:, :-1][mask].float(), sequences.input_ids[:, start + 1 :][mask], mask


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
    scores = -F.cross_entropy(logits, targets, reduction="none")
    logps = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    logps = logps.masked_scatter(mask, scores)
    correct = torch.zeros_like(mask)
    correct[mask] = logits.detach().argmax(-1) == targets
    return logps, mask, correct


def completion_logps(model: Model, sequences: Sequences) -> Tensor:
    """Return ``(sequences,)`` float32: the summed log-prob of each completion."""
    return completion_token_logps(model, sequences)[0].sum(-1)
