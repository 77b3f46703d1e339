"""Answers to prompts, batched; greedy, or sampled from a seed that belongs to the prompt.

Sampling adds Gumbel noise to the scores and takes the largest, which is a draw from their softmax
(Gumbel 1954). Each row's noise comes from its own seed, so an answer does not depend on what it was
batched with.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedloom.data.encode import TextEncoder
from fedloom.data.sources import DataSettings
from fedloom.models.adapters import AdapterModel
from fedloom.models.architecture import pads_left, uses_cache
from fedloom.models.load import context_length, load_tokenizer, stop_tokens


@dataclass(frozen=True)
class BatchSupport:
    """What a model answers alike with as without; see ``models/architecture.py``.

    Attributes:
        together: Whether prompts of a batch may be padded on the left.
        cached: Whether it may go on with a cache of what it has read.
    """

    together: bool
    cached: bool

    @classmethod
    def of(cls, model: nn.Module, encoder: TextEncoder, *, several: bool) -> BatchSupport:
        """Ask a model, with some passes; ``several`` says whether batches have more than one prompt."""
        pad = int(encoder.tokenizer.pad_token_id)
        # PEFT counts padding between virtual tokens and the text as positions; recurrent models read it
        together = several and not _has_virtual_tokens(model) and pads_left(model, pad)
        with _without_warnings():
            return cls(together, uses_cache(model, pad, batched=together))


@dataclass(frozen=True)
class Ask:
    """A prompt and how it is to be answered.

    Attributes:
        prompt: Tokens that the model continues, at least one.
        temperature: At least 0; 0 is greedy.
        seed: Of the draws, above a temperature of 0.
        top_p: Above 0, at most 1; draws are from the fewest tokens whose probabilities add up to it.
    """

    prompt: tuple[int, ...]
    temperature: float = 0.0
    seed: int = 0
    top_p: float = 1.0


def load_encoder(
    path: str,
    revision: str | None = None,
    data: DataSettings | None = None,
    *,
    compares: bool = False,
) -> TextEncoder:
    """Load a model's tokenizer, and how texts are read with it.

    Args:
        path: Folder or Hub name of the model.
        revision: Branch, tag or commit on the Hub.
        data: How examples are read (default: as ``[data]`` has it without being told).
        compares: Whether the objective reads pairs as questions which answer is better.

    Raises:
        ModelError: The folder is missing, or holds no tokenizer.
    """
    data = data or DataSettings()
    return TextEncoder(
        load_tokenizer(path, revision),
        stop_tokens(path, revision),
        data.train_on,
        data.control_tokens,
        data.template_date,
        compares,
    )


def generate_answers(
    model: AdapterModel,
    encoder: TextEncoder,
    asks: Sequence[Ask],
    max_new_tokens: int,
    batch_size: int = 32,
) -> list[str]:
    """Return one answer to each prompt, without the prompt.

    Args:
        model: A causal LM with the adapter to use.
        encoder: Of its tokenizer.
        asks: Prompts; one too long for the context loses its start.
        max_new_tokens: Most tokens of an answer, above 0.
        batch_size: Prompts answered together.
    """
    with model.evaluating():
        return generate(model.model, encoder, asks, max_new_tokens, batch_size)


def continue_tokens(
    model: AdapterModel,
    encoder: TextEncoder,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int = 32,
) -> list[str]:
    """Return a greedy answer to each prompt given as tokens; see :func:`generate_answers`.

    Counted as one pass over a batch's prompts and answers.

    Args:
        model: The backbone with its adapter.
        encoder: Of that model; decodes the answers.
        prompts: Token ids of each prompt; of those that are too long the beginning is left out.
        max_new_tokens: Tokens of an answer at most, and never more than half the model's context.
        batch_size: Prompts that are answered together at most; 1 where padding would change answers.
    """
    with model.evaluating():
        return _answered(
            model.model,
            encoder,
            [Ask(tuple(prompt)) for prompt in prompts],
            max_new_tokens,
            batch_size,
            lambda rows, columns, new: model.count(rows, columns + model.virtual_tokens, new),
        )


def sample_tokens(
    model: AdapterModel,
    encoder: TextEncoder,
    asks: Sequence[Ask],
    max_new_tokens: int,
    batch_size: int = 32,
    support: BatchSupport | None = None,
) -> list[list[int]]:
    """Return what follows each prompt as tokens, up to and with the one that ends it.

    Counted, and cut to the context, as of :func:`continue_tokens`. Draws are from the model's own
    distribution: what its files say of generation, such as a penalty of repetitions, does not count.

    Args:
        model: The backbone with its adapter.
        encoder: Of that model.
        asks: Prompts, each with its temperature and seed.
        max_new_tokens: Tokens of an answer at most.
        batch_size: Prompts that are answered together at most.
        support: What the model supports (default: it is asked).
    """
    with model.evaluating(), _plain_generation(model.model):
        rows = _continued(
            model.model,
            encoder,
            asks,
            max_new_tokens,
            batch_size,
            lambda rows, columns, new: model.count(rows, columns + model.virtual_tokens, new),
            support,
        )
    return [row[: len(_until(row, encoder.stop_ids)) + 1] for row in rows]


@torch.no_grad()
def generate(
    model: nn.Module,
    encoder: TextEncoder,
    asks: Sequence[Ask],
    max_new_tokens: int,
    batch_size: int = 32,
    advance: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """Return one answer to each prompt; see :func:`generate_answers`.

    An answer has at most half the context, so that a prompt keeps the other half.

    Args:
        model: A causal model.
        encoder: Of that model; decodes the answers.
        asks: Prompts as token ids, each with its temperature and seed.
        max_new_tokens: Tokens of an answer at most.
        batch_size: Prompts that are answered together at most; 1 where padding would change answers.
        advance: Called with the number of prompts answered, batch by batch.
    """
    return _answered(
        model,
        encoder,
        asks,
        max_new_tokens,
        batch_size,
        lambda rows, columns, new: advance(rows),
    )


def _answered(
    model: nn.Module,
    encoder: TextEncoder,
    asks: Sequence[Ask],
    max_new_tokens: int,
    batch_size: int,
    done: Callable[[int, int, int], None],
) -> list[str]:
    """Answer prompts given as tokens; ``done`` is told each batch's rows, columns and new columns."""
    rows = _continued(model, encoder, asks, max_new_tokens, batch_size, done)
    ends = [_until(row, encoder.stop_ids) for row in rows]
    texts = encoder.tokenizer.batch_decode(ends, skip_special_tokens=True) if ends else []
    return [text.strip() for text in texts]


def _continued(
    model: nn.Module,
    encoder: TextEncoder,
    asks: Sequence[Ask],
    max_new_tokens: int,
    batch_size: int,
    done: Callable[[int, int, int], None],
    support: BatchSupport | None = None,
) -> list[list[int]]:
    """Return what follows each prompt as tokens, with what a batch was filled up with after its end."""
    length = answer_length(model, max_new_tokens)
    longest = prompt_length(model, max_new_tokens)
    rows = [list(ask.prompt[-longest:]) for ask in asks]
    answers: list[list[int]] = [[]] * len(asks)
    if asks and support is None:
        support = BatchSupport.of(model, encoder, several=min(batch_size, len(asks)) > 1)
    if support is None or not support.together:
        batch_size = 1
    cached = support is None or support.cached
    order = sorted(range(len(asks)), key=lambda i: -len(rows[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        own = [rows[i] for i in chosen]
        output = continue_rows(model, encoder, own, [asks[i] for i in chosen], length, cached)
        before = max(map(len, own))
        for i, row in zip(chosen, output[:, before:].tolist(), strict=True):
            answers[i] = row
        done(len(chosen), output.shape[1], output.shape[1] - before)
    return answers


def answer_length(model: nn.Module, max_new_tokens: int) -> int:
    """Return the most tokens of an answer: those asked for, at most half the model's context."""
    return min(max_new_tokens, max(1, context_length(model) // 2))


def prompt_length(model: nn.Module, max_new_tokens: int) -> int:
    """Return the most tokens of a prompt, of which the last are kept: what an answer leaves free."""
    return max(1, context_length(model) - answer_length(model, max_new_tokens))


def continue_rows(
    model: nn.Module,
    encoder: TextEncoder,
    rows: list[list[int]],
    asks: list[Ask],
    length: int,
    cached: bool,
    observe: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Return prompts with padding before them, and what follows them.

    Args:
        model: A causal model.
        encoder: Of that model.
        rows: Token ids of each prompt.
        asks: How each is answered.
        length: New tokens at most.
        cached: Whether the model goes on alike with a cache (:func:`uses_cache`).
        observe: Called after each token with the rows so far, int64 ``(rows, tokens)``, and their scores;
            returns which rows end there, bool ``(rows,)``.
    """
    longest = max(len(row) for row in rows)
    device = next(model.parameters()).device
    pad = int(encoder.tokenizer.pad_token_id)
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = torch.tensor(row)
        mask[i, longest - len(row) :] = 1
    run: Any = model.generate
    with _without_warnings():
        output: Tensor = run(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=length,
            do_sample=False,
            use_cache=cached,
            pad_token_id=pad,
            eos_token_id=list(encoder.stop_ids) or None,
            logits_processor=[_Sampler(asks)] if any(ask.temperature for ask in asks) else None,
            stopping_criteria=None if observe is None else [observe],
        )
    return output.cpu()


@contextmanager
def _plain_generation(model: nn.Module) -> Iterator[None]:
    """Have a model generate by the arguments alone, without the defaults that its files give."""
    from transformers import GenerationConfig

    holders: list[Any] = [part for part in model.modules() if "generation_config" in vars(part)]
    kept = [part.generation_config for part in holders]
    try:
        for part in holders:
            part.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
        yield
    finally:
        for part, own in zip(holders, kept, strict=True):
            part.generation_config = own


@contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Position ids are not supported", UserWarning)
        yield


def _has_virtual_tokens(model: nn.Module) -> bool:
    config = getattr(model, "active_peft_config", None)
    return bool(getattr(config, "is_prompt_learning", False))


class _Sampler:
    """Makes the greedy choice of a row a draw at the row's temperature, from the row's seed."""

    def __init__(self, asks: Sequence[Ask]) -> None:
        self.asks = asks
        self.generators = [torch.Generator().manual_seed(ask.seed) for ask in asks]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        drawn = [row for row, ask in enumerate(self.asks) if ask.temperature]
        uniform = torch.empty(len(drawn), scores.shape[-1], dtype=torch.float64)
        for place, row in enumerate(drawn):
            torch.rand(scores.shape[-1], generator=self.generators[row], out=uniform[place])
        gumbel = -torch.log(-torch.log(uniform.clamp(1e-300, 1 - 1e-16)))
        for row, noise in zip(drawn, gumbel.to(scores), strict=True):
            ask = self.asks[row]
            scores[row] = most_probable(scores[row] / ask.temperature, ask.top_p) + noise
        return scores


def most_probable(scores: Tensor, share: float) -> Tensor:
    """Return scores with -inf for all tokens but the fewest whose probabilities add up to a share.

    Nucleus sampling (Holtzman et al. 2020, section 3.1).

    Args:
        scores: Logits of one position, ``(vocabulary,)``.
        share: Above 0, at most 1; at 1 all are kept.
    """
    if share >= 1:
        return scores
    ordered, places = scores.sort(descending=True, stable=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    return scores.masked_fill(
        torch.zeros_like(before, dtype=torch.bool).scatter(0, places, before >= share),
        float("-inf"),
    )


def _until(row: list[int], stops: Sequence[int]) -> list[int]:
    """Return what a model wrote before it stopped."""
    return row[: next((i for i, token in enumerate(row) if token in stops), len(row))]
