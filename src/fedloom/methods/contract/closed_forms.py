"""Closed forms of what a method's clients send and are sent, where ``[wire]`` has tensors compressed."""

from __future__ import annotations

from fedloom.accounting.traffic import Traffic
from fedloom.federation.compressed_traffic import compressed, named_parts
from fedloom.methods.contract.method import Method
from fedloom.tensors import Tensors
from fedloom.wire.settings import WireSettings


def compressed_traffic(method: Method, adapter: Tensors, settings: WireSettings) -> Traffic:
    """Return the closed form of a client's bytes in a round, as ``[wire]`` has tensors travel.

    Args:
        method: Whose round it is.
        adapter: The adapter as it is initialised.
        settings: ``[wire]``.

    Raises:
        SettingsError: A budget does not suffice.
    """
    return compressed(
        method.traffic(adapter),
        method.sent_shapes(adapter),
        settings,
        method.declares.message_parts,
        even=method.sent_in_even_rounds(adapter),
        received=method.received_shapes(adapter),
    )


def answers(method: Method, adapter: Tensors) -> tuple[Tensors, Tensors]:
    """Return tensors of the shapes of a client's answers in odd rounds and in even ones."""
    parts = method.declares.message_parts
    odd, even = method.sent_shapes(adapter), method.sent_in_even_rounds(adapter)
    return named_parts(odd, parts), named_parts(even, parts)
