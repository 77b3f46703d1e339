"""Which trained layers read something that depends on a token alone, and what they read for each.

Such layers are found by running the model: their input at a token must not change with the token before
it. In a transformer these are the projections of the first block's attention.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedloom.evaluation.privacy_audit.span import Candidates
from fedloom.models.adapters import AdapterModel

FACTOR_A, FACTOR_B = ".lora_A.weight", ".lora_B.weight"
WHOLE = (".ln_tuning_layers.weight", ".weight")
"""Endings of trained tensors that the span test reads: LoRA's factors, and weights trained whole."""

MOST_NUMBERS = 100_000_000
"""Of the inputs of the whole vocabulary, over all places."""

MOST_PLACES = 32
"""Places of a row for which inputs are worked out, where these depend on it."""

CHUNK = 2048
"""Tokens that are read at a time."""

BLOCK = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class ReadByToken:
    """What some layers read.

    Attributes:
        layers: Names of the layers, all with these inputs.
        candidates: What they read for each token, at each place.
        by_place: Whether the inputs depend on the place.
    """

    layers: tuple[str, ...]
    candidates: Candidates
    by_place: bool


class _Done(Exception):
    """All layers that were asked for have been reached."""


def layer_of(name: str) -> str | None:
    """Return the layer that a trained tensor belongs to, ``None`` where it is none of a layer's."""
    for ending in (FACTOR_A, FACTOR_B, *WHOLE):
        if name.endswith(ending):
            return name.removesuffix(ending)
    return None


def next_block(layer: str) -> str | None:
    """Return the name of a layer's like in the next block."""
    found = BLOCK.search(layer)
    if found is None:
        return None
    return f"{layer[: found.start(1)]}{int(found[1]) + 1}{layer[found.end(1) :]}"


def read_by_token(model: AdapterModel, vocabulary: int) -> list[ReadByToken]:
    """Return what layers read for each token, for each distinct input that depends on it alone.

    Args:
        model: With adapters in linear layers.
        vocabulary: Tokens, from 0.
    """
    modules = dict(model.model.named_modules())
    layers = [
        own for own in {layer_of(n): None for n in model.parameters} if own and own in modules
    ]
    if not layers or model.virtual_tokens:
        return []
    first, second, third = (min(vocabulary - 1, own) for own in (5, 17, 29))
    after = [inputs_of(model, layers, [[other, third]]) for other in (first, second)]
    alone = inputs_of(model, layers, [[third]])
    free = [
        own
        for own in layers
        if own in after[0] and torch.allclose(after[0][own], after[1][own], rtol=0, atol=1e-6)
    ]
    groups: dict[bytes, list[str]] = {}
    for own in free:  # layers that read the same are one view of it
        groups.setdefault(after[0][own].numpy().tobytes(), []).append(own)
    return [_read(model, tuple(own), vocabulary, alone, after[0]) for own in groups.values()]


def _read(
    model: AdapterModel,
    layers: tuple[str, ...],
    vocabulary: int,
    alone: dict[str, Tensor],
    after: dict[str, Tensor],
) -> ReadByToken:
    """Work out the inputs of layers that read the same."""
    layer = layers[0]
    by_place = not torch.allclose(alone[layer], after[layer], rtol=0, atol=1e-6)
    columns = alone[layer].shape[-1]
    most = max(1, MOST_NUMBERS // (vocabulary * columns))
    places = min(most, MOST_PLACES) if by_place else 1
    found = [
        torch.cat(
            [
                inputs_of(model, [layer], [[0] * place + [own] for own in tokens])[layer]
                for start in range(0, vocabulary, CHUNK)
                for tokens in [range(start, min(start + CHUNK, vocabulary))]
            ]
        )
        for place in range(places)
    ]
    return ReadByToken(layers, Candidates(torch.stack(found, dim=1)), by_place)


def inputs_of(
    model: AdapterModel, layers: Sequence[str], rows: Sequence[Sequence[int]], place: int = -1
) -> dict[str, Tensor]:
    """Return ``(rows, columns)`` what layers read at a place of each row, of those that are reached.

    Args:
        model: Is read in evaluation, as it is.
        layers: Names of modules.
        rows: Token ids, all of one length.
        place: From 0, or from the end.
    """
    ids = torch.tensor(rows, device=model.device)
    before = model.flops
    with _noting(model, layers, place) as found, model.evaluating(), suppress(_Done):
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    model.flops = before
    return found


@contextmanager
def _noting(model: AdapterModel, layers: Sequence[str], place: int) -> Iterator[dict[str, Tensor]]:
    """Yield what layers read in a pass; the pass is stopped after the last of them."""
    modules: dict[str, Any] = dict(model.model.named_modules())
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def note(module: object, inputs: tuple[Tensor, ...]) -> None:
            if name in found or not inputs or inputs[0].ndim != 3:
                return
            found[name] = inputs[0][:, place].detach().float().cpu()
            if len(found) == len(layers):
                raise _Done

        return note

    hooks = [modules[own].register_forward_pre_hook(hook(own)) for own in layers]
    try:
        yield found
    finally:
        for own in hooks:
            own.remove()
