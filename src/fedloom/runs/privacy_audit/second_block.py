"""What the second block reads, which in a causal model depends on a token and those before it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom.evaluation.privacy_audit.sequences import Row
from fedloom.models.adapters import AdapterModel
from fedloom.models.backbone_delta import MOVED
from fedloom.runs.privacy_audit.first_block import (
    ReadByToken,
    inputs_of,
    layer_of,
    next_block,
)

CHUNK = 512
"""Beginnings of rows that are read at a time."""


@dataclass(frozen=True)
class ReadByBeginning:
    """Trained layers of the second block that read the same.

    Attributes:
        model: With these layers.
        layers: Their names.
    """

    model: AdapterModel
    layers: tuple[str, ...]

    def read(self, beginnings: Sequence[Row]) -> Tensor:
        """Return ``(n, columns)`` what they read at the last place of beginnings of one length."""
        name = self.layers[0]
        return torch.cat(
            [
                inputs_of(self.model, [name], beginnings[start : start + CHUNK])[name]
                for start in range(0, len(beginnings), CHUNK)
            ]
        )


def read_by_beginning(model: AdapterModel, first: ReadByToken) -> ReadByBeginning | None:
    """Return the layers of the second block that stand where these of the first do.

    ``None`` where none is trained, where they do not read the same, or where what is read at a place
    depends on tokens behind it.
    """
    trained = {layer_of(name) for name in model.parameters}
    layers = [own for own in map(next_block, first.layers) if own in trained and own is not None]
    if not layers:
        return None
    one, two, three = 5, 17, 29
    short, long = (
        inputs_of(model, layers, [[one, two]]),
        inputs_of(model, layers, [[one, two, three]], place=1),
    )
    same = [own for own in layers if own in short and torch.equal(short[own], short[layers[0]])]
    name = layers[0]
    if name not in short or not torch.allclose(short[name], long[name], rtol=0, atol=1e-4):
        return None
    return ReadByBeginning(model, tuple(same))


@contextmanager
def holding(
    model: AdapterModel, initial: Mapping[str, Tensor], received: Mapping[str, Tensor]
) -> Iterator[None]:
    """Inside, a model is what a client was sent, as far as the server knows it.

    Args:
        model: Is as before afterwards.
        initial: What clients begin a run with, where nothing is sent of it.
        received: By name, after the part of a message.
    """
    before = model.read()
    moved = dict(model.base.changes)
    sent = {name.rpartition("/")[2]: tensor for name, tensor in received.items()}
    known = {name: sent.get(name, initial.get(name, own)) for name, own in before.items()}
    fits = {n: t if t.shape == before[n].shape else before[n] for n, t in known.items()}
    model.write({**fits, **{n: t for n, t in sent.items() if n.startswith(MOVED)}})
    try:
        yield
    finally:
        model.write({**before, **moved})
