"""Whether a model may read once what the sequences of an example begin with.

The two answers of a pair follow one prompt. Read one after another behind it, with positions that go on
from the prompt and attention that keeps the answers apart, they cost one reading of the prompt in place
of two. Whether a model then says what it says of each answer by itself is asked of it with two tiny
pairs: recurrent layers, positions that are counted by place and experts with a capacity do not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedloom.data.batch import Sequences
from fedloom.data.batching import collate
from fedloom.data.client_rows import TokenShare
from fedloom.data.token_set import TokenSet
from fedloom.errors import first_line
from fedloom.models.adapters import AdapterModel
from fedloom.models.configuration import text_part, vocabulary
from fedloom.models.tree_attention import LEAST, NEVER
from fedloom.objectives.logps import completion_token_logps

LOGPS = 1e-4
"""Difference of log-probs in float32 at most."""

GRADIENTS = 1e-3
"""Difference of gradients in float32 at most, over their norm."""

IN_LOWER_PRECISION = 0.05
"""The same in bfloat16."""

NOISE = 4.0
"""In lower precision: how many times the difference of log-probs that padding alone makes is allowed."""

PAIRS = ((6, (5, 3)), (3, (2, 4)))
"""Tokens of prompts, and of the answers to each, that a model is asked about."""

WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size")
"""What configurations call the number of tokens that a layer attends to at most."""


def shares_prompts(model: AdapterModel, longest: int) -> bool:
    """Return whether a model reads once what the sequences of an example begin with.

    Args:
        model: Asked once.
        longest: Tokens of the longest sequence: none may be beyond a layer's window, which the
            attention of a shared reading knows nothing of.
    """
    if model.shared_prompts is None:
        model.shared_prompts = not reason_against(model)
    return model.shared_prompts and longest <= _window(model)


def context(model: AdapterModel) -> int:
    """Return how many places a row has at most: some models have tables of no more."""
    own = getattr(text_part(model.model.config), "max_position_embeddings", None)
    return own if isinstance(own, int) and own > 0 else 1 << 30


def _window(model: Any) -> int:
    config = text_part(model.model.config)
    given = [getattr(config, name, None) for name in WINDOWS]
    return min((own for own in given if isinstance(own, int) and own > 0), default=1 << 30)


def reason_against(model: AdapterModel) -> str:
    """Return why a model reads each sequence by itself; empty where it need not. Asks the model."""
    if model.alone:
        return "what is added to the loss is a mean over sequences"
    if model.noise is not None:
        return "training.neftune_noise_alpha: each sequence has noise by its own length"
    if model.virtual_tokens:
        return "virtual tokens come before the text"
    if model.head is None:
        return "logits do not follow from what the output layer reads"
    if model.device.type == "meta":  # cannot be asked: as most do
        return ""
    flops, was_training = model.flops, model.model.training
    model.tree_from = NEVER
    model.model.eval()
    try:
        return _tried(model)
    except Exception as error:  # a model's code raises whatever it likes
        return f"it raises {type(error).__name__}: {first_line(error)}"
    finally:
        model.flops = flops
        model.model.train(was_training)


def _tried(model: AdapterModel) -> str:
    """Return what a model says otherwise where prompts are read once; empty for nothing.

    Where that is nothing, attention answer by answer is tried too, and kept if it is right.
    """
    share = _tiny(vocabulary(model.model.config, 64))
    plain, shared = (
        collate(share, np.arange(2), model.pad, model.device, groups=groups).sequences
        for groups in (None, [np.array([0]), np.array([1])])
    )
    known = _answers(model, plain)
    reason = _difference(model, known, shared, share)
    if not reason:
        model.tree_from = 0
        try:
            model.tree_from = NEVER if _difference(model, known, shared, share) else LEAST
        except Exception:  # then it is not offered
            model.tree_from = NEVER
    return reason


def _difference(
    model: AdapterModel, known: tuple[Tensor, Tensor], shared: Sequences, share: TokenShare
) -> str:
    """Return what a model says otherwise of the same sequences in another reading; empty for nothing."""
    logps, gradient = known
    found, slope = _answers(model, shared)
    most, steepest = LOGPS, GRADIENTS
    if model.autocast is not None or next(model.model.parameters()).dtype != torch.float32:
        second = collate(share, np.array([1]), model.pad, model.device).sequences
        alone = _answers(model, second)[0]  # without the padding that the first pair brings
        own = np.concatenate(
            [np.arange(5, 7), np.arange(10, 14)]
        )  # after 5 of chosen, 3 of rejected
        most = max(most, NOISE * float((alone - logps[own]).abs().max()))
        steepest = IN_LOWER_PRECISION
    apart = float((found - logps).abs().max())
    if not apart <= most:  # NaN too
        return f"log-probs differ by {apart:.1g}"
    apart, norm = float((slope - gradient).norm()), float(gradient.norm())
    if not apart <= steepest * norm:
        return f"gradients differ by {apart:.1g}, their norm being {norm:.1g}"
    return ""


def _answers(model: AdapterModel, sequences: Sequences) -> tuple[Tensor, Tensor]:
    """Return the log-probs of all completion tokens, and a gradient of the trained parameters."""
    own = [parameter for parameter in model.parameters.values() if parameter.requires_grad]
    with torch.enable_grad():
        logps, mask, _ = completion_token_logps(model, sequences)
        weights = torch.linspace(1, 2, logps.shape[1], device=logps.device)
        total = (logps * weights).sum()
        found = torch.autograd.grad(total, own, allow_unused=True)
    parts = [own.flatten().float() for own in found if own is not None]
    return logps.detach()[mask], torch.cat(parts)


def _tiny(tokens: int) -> TokenShare:
    """Return two pairs of a prompt and two answers each."""
    drawn = np.arange(1, 64) * 7919 % tokens
    parts, masks, prompts = [], [], []
    for number, (prompt, answers) in enumerate(PAIRS):
        opening = drawn[20 * number : 20 * number + prompt]
        for place, answer in enumerate(answers):
            own = drawn[20 * number + 8 + place : 20 * number + 8 + place + answer]
            parts.append(np.concatenate([opening, own]).astype(np.int32))
            masks.append(np.arange(prompt + answer) >= prompt)
            prompts.append(prompt)
    count = len(PAIRS)
    return TokenShare(
        TokenSet(
            2,
            np.arange(count),
            np.arange(count),
            np.concatenate(parts),
            np.concatenate(masks),
            np.concatenate([[0], np.cumsum([len(part) for part in parts])]),
            np.array(prompts),
            np.zeros((2 * count, 2), np.int64),
            np.zeros(count, np.bool_),
            np.full(count, -1),
            (),
        )
    )
