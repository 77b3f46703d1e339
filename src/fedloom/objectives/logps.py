"""Log-probabilities of completions under a causal LM; the one place that shifts labels.

log p(y|x) is the sum over the completion's tokens, not the mean (Rafailov et al. 2023,
"Direct Preference Optimization", https://arxiv.org/abs/2305.18290).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedloom.data.batch import Predicting, Sequences
from fedloom.objectives.base import Model
from fedloom.objectives.chunked_head import CHUNK, token_logps


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
    predicting = _predicting(model, sequences)
    if predicting is None:
        return _logits(_pass(model, sequences), sequences)
    start = sequences.first_completion
    mask = sequences.completion_mask[:, start:]
    return predicting.logits(predicting.states).float(), _targets(sequences), mask


def completion_logits_in_parts(model: Model, sequences: Sequences) -> Iterator[Tensor]:
    """Yield the logits of :func:`completion_logits` some positions at a time, where they can be."""
    predicting = _predicting(model, sequences)
    if predicting is None:
        yield _logits(_pass(model, sequences), sequences)[0]
        return
    size = max(1, CHUNK // predicting.width)
    for start in range(0, len(predicting.states), size):
        yield predicting.logits(predicting.states[start : start + size]).float()


def completion_token_logps(
    model: Model, sequences: Sequences, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Score the completion tokens of each sequence, in float32.

    Args:
        model: A causal LM.
        sequences: ``(sequences, length)``.
        temperature: What logits are divided by, above 0.

    Returns:
        ``(sequences, kept)`` log-probs, zero where there is no completion token; the mask of the
        same shape; and whether each token was the most likely one (false off the mask).
    """
    scores, right, _ = _scored(model, sequences, temperature)
    mask = sequences.completion_mask[:, sequences.first_completion :]
    correct = torch.zeros_like(mask)
    correct[mask] = right
    return _spread(scores, mask), mask, correct


def completion_logps(model: Model, sequences: Sequences) -> Tensor:
    """Return ``(sequences,)`` float32: the summed log-prob of each completion.

    Those beyond ``sequences.graded`` are without a gradient.
    """
    return _summed(_scored(model, sequences)[0], sequences)


def completion_rewards(model: Model, sequences: Sequences) -> tuple[Tensor, Tensor]:
    """Return the summed log-prob and the explicit reward of each completion, in one pass.

    Args:
        model: A causal LM with a reward head.
        sequences: ``(sequences, length)``.

    Returns:
        Two ``(sequences,)`` float32 tensors; the reward is read at the last token.
    """
    scores, _, rewards = _scored(model, sequences)
    return _summed(scores, sequences), rewards


def _scored(
    model: Model, sequences: Sequences, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Any]:
    """Return ``(completion tokens,)`` log-probs, whether each was the likeliest token, and rewards."""
    predicting = _predicting(model, sequences)
    if predicting is not None:
        if temperature != 1:
            whole = predicting.logits
            predicting = replace(predicting, logits=lambda states: whole(states) / temperature)
        return *_token_logps(predicting, sequences), predicting.rewards
    output = _pass(model, sequences)
    logits, targets, _ = _logits(output, sequences)
    if temperature != 1:
        logits = logits / temperature
    correct = logits.detach().argmax(1) == targets
    scores = -F.cross_entropy(logits, targets, reduction="none")
    return scores, correct, getattr(output, "rewards", None)


def _token_logps(predicting: Predicting, sequences: Sequences) -> tuple[Tensor, Tensor]:
    """Return log-probs and whether each token was the likeliest, with gradients where they are wanted."""
    targets, graded = _targets(sequences), sequences.graded
    if graded is None:
        return token_logps(predicting, targets)
    own = token_logps(replace(predicting, states=predicting.states[:graded]), targets[:graded])
    with torch.no_grad():
        rest = replace(predicting, states=predicting.states[graded:])
        others = token_logps(rest, targets[graded:])
    return torch.cat([own[0], others[0]]), torch.cat([own[1], others[1]])


def _predicting(model: Model, sequences: Sequences) -> Predicting | None:
    """Return what the output layer of a model reads, where the model can be asked for it."""
    ask = getattr(model, "predicting", None)
    return None if ask is None else ask(sequences)


def _targets(sequences: Sequences) -> Tensor:
    return sequences.input_ids[sequences.completion_mask]


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


def _spread(scores: Tensor, mask: Tensor) -> Tensor:
    """Return scores where a mask is true, zero elsewhere."""
    logps = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    return logps.masked_scatter(mask, scores)


def _summed(scores: Tensor, sequences: Sequences) -> Tensor:
    return _spread(scores, sequences.completion_mask[:, sequences.first_completion :]).sum(1)
