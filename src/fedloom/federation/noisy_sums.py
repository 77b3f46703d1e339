"""Sums of changes to which clients have added noise themselves: what is masked, and what a sum says.

Nothing but the change itself is summed: what clients report, and their weights, would be released beside
it without noise. All weigh alike, and the denominator is fixed.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fedloom.privacy.distributed_noise import NoiseShares
from fedloom.privacy.noise import Floats, NoiseSource
from fedloom.privacy.secure_aggregation.masks import Words
from fedloom.privacy.secure_aggregation.quantisation import Grid
from fedloom.tensors import Tensors
from fedloom.wire.messages import Masking
from fedloom.wire.schema import Schema

PARTY = "share of a sum's noise"
"""What a client's noise is for, in the derivation of its stream."""


def shares_of(masking: Masking) -> NoiseShares | None:
    """Return what clients add, ``None`` where they add nothing."""
    own = masking.noise
    if own is None:
        return None
    return NoiseShares(
        own.multiplier,
        own.clip,
        own.colluding,
        masking.bits,
        masking.clients,
        sum(spec.elements for spec in masking.contents.tensors),
        masking.stochastic,
    )


def width_of(masking: Masking) -> int:
    """Return the bits of the modulus.

    Raises:
        ValueError: What is summed does not fit the largest.
    """
    shares = shares_of(masking)
    return shares.width if shares is not None else grid_of(masking).width


def grid_of(masking: Masking) -> Grid:
    """Return how values become integers where clients add no noise."""
    return Grid(masking.bits, masking.bound, masking.clients, masking.rows)


def noisy_words(
    shares: NoiseShares,
    tensors: Mapping[str, Tensor],
    origins: Tensors,
    rng: np.random.Generator | None,
    source: NoiseSource,
    moment: tuple[int, int, int],
) -> Words:
    """Return what a client masks: its weight 1, and its change in whole steps with its noise.

    Args:
        shares: What each client adds.
        tensors: Of its answer, in the order of their schema.
        origins: What it was sent, of those tensors that are no changes already.
        rng: Rounds.
        source: Of this client's noise.
        moment: Round, number of the sum, and the client's id.
    """
    round, number, client = moment
    steps = shares.rounded(_flat(tensors, origins), rng)
    digest = source.digest([repr(shares).encode(), steps.tobytes()])
    noise = source.stream(f"{PARTY} {number}", round, client, digest)
    return np.concatenate([np.ones(1, np.uint32), shares.words(steps, noise)])


def is_possible(shares: NoiseShares, clients: int, words: Words) -> bool:
    """Return whether a sum can be one of so many clients' changes; nearly all random ones cannot."""
    if int(words[0]) != clients:
        return False
    return bool(np.abs(shares.sums(words[1:])).max(initial=0) <= shares.largest)


def noisy_means(
    shares: NoiseShares, words: Words, contents: Schema, origins: Tensors, denominator: float
) -> Tensors:
    """Return the sum of changes over the expected number of clients, added to what was sent.

    Args:
        shares: What each client has added.
        words: The sum, without masks.
        contents: Schema of an answer.
        origins: What clients were sent, of those tensors that are no changes already.
        denominator: q N, clients that are expected; never those who answered.
    """
    change = shares.change(shares.sums(words[1:]), denominator)
    found, place = Tensors(), 0
    for spec in contents.tensors:
        own = torch.from_numpy(change[place : place + spec.elements]).view(spec.shape)
        if spec.name in origins:
            own = own + origins[spec.name].to(torch.float64)
        found[spec.name] = own.to(spec.dtype)
        place += spec.elements
    return found


def _flat(tensors: Mapping[str, Tensor], origins: Tensors) -> Floats:
    """Return the changes of all tensors after each other, in float64."""
    parts = []
    for name, tensor in tensors.items():
        change = tensor.to(torch.float64)
        if name in origins:
            change = change - origins[name].to(torch.float64)
        parts.append(change.reshape(-1).numpy())
    return np.concatenate(parts) if parts else np.zeros(0)
