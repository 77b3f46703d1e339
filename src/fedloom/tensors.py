"""Named tensors, and the state of a method: tensors and numbers with the round they belong to.

Everything that computes speaks of these; what travels is made of them in ``wire/``. Pure.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
"""Named tensors, in the order of their schema."""


class OnDemand(dict[str, Tensor]):
    """Base of named tensors of which each is read when it is asked for, and not kept."""


@dataclass(frozen=True)
class State:
    """All that a method carries from one round to the next: plain tensors and numbers."""

    tensors: Tensors
    numbers: Mapping[str, float] = field(default_factory=dict)

    def digest(self) -> str:
        """Return a SHA-256 over all of it."""
        whole = hashlib.sha256()
        for name in sorted(self.tensors):
            tensor = self.tensors[name].contiguous()
            whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            whole.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
        whole.update(repr(sorted(self.numbers.items())).encode())
        return whole.hexdigest()


def largest_value(tensor: Tensor) -> float:
    """Return the largest absolute value of real numbers: NaN if one of them is, 0 if there are none."""
    return max(abs(float(end)) for end in tensor.aminmax()) if tensor.numel() else 0.0


def largest_values(tensors: Tensors) -> dict[str, float]:
    """Return :func:`largest_value` of each tensor that holds fractions, with few calls of torch."""
    ends: dict[torch.dtype, dict[str, torch.return_types.aminmax]] = {}
    found = {name: 0.0 for name, own in tensors.items() if own.is_floating_point()}
    for name in found:
        if (own := tensors[name]).numel():
            ends.setdefault(own.dtype, {})[name] = own.aminmax()
    for alike in ends.values():
        both = torch.stack([end for pair in alike.values() for end in pair])
        found |= zip(alike, both.abs().view(-1, 2).amax(1).tolist(), strict=True)
    return found


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor of real numbers holds neither NaN nor infinity.

    No mask as long as the tensor is made, which takes twenty times as long and leaves holes in the
    server's memory.
    """
    return math.isfinite(largest_value(tensor))


def zeros_like(tensors: Tensors) -> Tensors:
    """Return zeros of the names, shapes, types and devices of other tensors."""
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def join_parts(**parts: Tensors) -> Tensors:
    """Return several sets of tensors as one, each name after its part: ``control/NAME``."""
    return {f"{part}/{name}": t for part, tensors in parts.items() for name, t in tensors.items()}


def part_of(tensors: Tensors, part: str) -> Tensors:
    """Return the tensors of one part of what :func:`join_parts` made; empty if it is not connected."""
    opening = f"{part}/"
    return {n.removeprefix(opening): t for n, t in tensors.items() if n.startswith(opening)}


def of_clients(part: str, tensors: Mapping[int, Tensor]) -> Tensors:
    """Return a tensor of each of some clients, named by its id: ``PART/000007``."""
    return {f"{part}/{client:06d}": tensor for client, tensor in sorted(tensors.items())}


def by_client(tensors: Tensors, part: str) -> dict[int, Tensor]:
    """Return the tensors that :func:`of_clients` named, by client id ascending."""
    return {int(name): tensor for name, tensor in sorted(part_of(tensors, part).items())}


def is_of_client(name: str, client: int) -> bool:
    """Return whether a tensor or number is named by a client's id, as :func:`of_clients` does."""
    return name.rpartition("/")[2] == f"{client:06d}"


def with_own_memory(tensors: Mapping[str, Tensor]) -> Tensors:
    """Return tensors contiguous and none over the memory of another, as a file of safetensors wants them.

    Only those are copied that must be.
    """
    found = {name: tensor.contiguous() for name, tensor in tensors.items()}
    end = 0
    for name, tensor in sorted(found.items(), key=lambda own: own[1].data_ptr()):
        if tensor.numel() and tensor.data_ptr() < end:
            found[name] = tensor.clone()
        end = max(end, tensor.data_ptr() + tensor.numel() * tensor.element_size())
    return found


def tensor_bytes(tensors: Tensors) -> int:
    """Return the bytes of tensors without a header."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
