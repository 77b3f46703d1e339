"""Answers to prompts, batched and greedy, for the before-and-after table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fedloom.models.lora import AdapterModel


def generate_answers(
    model: AdapterModel, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int
) -> list[str]:
    """Return one greedy answer to each prompt, without the prompt.

    Args:
        model: A causal LM with the adapter to use.
        tokenizer: Its tokenizer.
        prompts: Rendered prompts; a prompt too long for the context loses its start.
        max_new_tokens: Most tokens of an answer, above 0.
    """
    if not prompts:
        return []
    config: Any = model.model.config
    context = int(getattr(config, "max_position_embeddings", 2048))
    room = max(1, context - max_new_tokens)
    rows = [tokenizer(prompt, verbose=False)["input_ids"][-room:] for prompt in prompts]
    rows = [_without_end(row, tokenizer) for row in rows]
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), model.pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = torch.tensor(row)
        mask[i, longest - len(row) :] = 1
    generate: Any = model.model.generate
    with model.evaluating():
        output = generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=model.pad,
            eos_token_id=tokenizer.eos_token_id,
        )
    answers = output[:, longest:].cpu()
    return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]


def _without_end(row: list[int], tokenizer: Any) -> list[int]:
    opening = (
        tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    )
    if len(row) > 1 and row[-1] == tokenizer.eos_token_id:
        row = row[:-1]
    return row or [opening]
