"""Which of LoRA's two factors a round trains, in methods that alternate: B in odd rounds, A in even ones.

With one factor fixed and equal everywhere, the product is linear in the other, so that the mean of what
clients send has the mean of their products, with any weights. B comes first: it begins with zeros, and
while it is zero A has no gradient.
"""

from __future__ import annotations

from collections.abc import Iterable

from fedloom.accounting.traffic import ParameterTraffic
from fedloom.aggregation.lora import A, B
from fedloom.tensors import Tensors, tensor_bytes


def trained_factor(round: int) -> str:
    """Return what the names of the factor that a round (from 1) trains have in them."""
    return B if round % 2 else A


def fixed_names(names: Iterable[str], round: int) -> list[str]:
    """Return the names of the factor that a round leaves as it is."""
    other = A if trained_factor(round) == B else B
    return [name for name in names if other in name]


def trained_part(adapter: Tensors, round: int) -> Tensors:
    """Return what a round trains: one factor, and what is none, such as a classification head."""
    fixed = set(fixed_names(adapter, round))
    return {name: tensor for name, tensor in adapter.items() if name not in fixed}


def half_up(adapter: Tensors) -> ParameterTraffic:
    """Return the bytes of a round with the adapter down and what is trained up."""
    odd, even = (tensor_bytes(trained_part(adapter, round)) for round in (1, 2))
    return ParameterTraffic(tensor_bytes(adapter), odd, up_even=even)
