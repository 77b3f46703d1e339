"""Memory that training takes on a client, estimated from shapes.

Weights, then for every trained number itself, its gradient and what the optimizer keeps, then what the
forward pass leaves for the backward one. The last is an estimate: twice the inputs and outputs of every
linear layer that the backward pass reaches (norms, rotations and products between them keep about as much
again), and for the output layer three times its logits (the logits, their log-probabilities, their
gradient). A test compares the estimate with a process that trains.
"""

from __future__ import annotations

from fedloom.accounting.flops import ModelShape

OPTIMIZER_SLOTS = {
    "adamw": 2.0,
    "adam": 2.0,
    "sgd": 0.0,
    "adafactor": 0.0,
    "muon": 1.0,
    "lion": 1.0,
    "adamw_8bit": 0.5,
}
"""Optimizer states of four bytes per trained parameter; sgd has one with momentum. Of tensors below 4,096
numbers adamw_8bit keeps two."""


KEPT_BETWEEN = 2
"""Ratio of all activations that are kept to the inputs and outputs of linear layers; measured on a
process."""


def activation_bytes(shape: ModelShape, element: int = 4) -> float:
    """Return bytes a token that the forward pass leaves for the backward one, but for the output layer.

    Args:
        shape: The model's part that is on the client.
        element: Bytes of an activation.
    """
    reached = [linear for linear in shape.linears if linear.reached]
    return float(element * KEPT_BETWEEN * sum(x.inputs + x.outputs for x in reached))


def training_memory(
    shape: ModelShape,
    *,
    weights: int,
    trained: int,
    optimizer: str,
    tokens: int,
    head_positions: int,
    element: int = 4,
) -> float:
    """Return bytes.

    Args:
        shape: The model's part that is on the client.
        weights: Bytes of its frozen weights.
        trained: Trained numbers, in float32.
        optimizer: Its name.
        tokens: Tokens of a batch, padding included.
        head_positions: Positions of a batch that the output layer is applied to.
        element: Bytes of an activation.
    """
    activations = tokens * activation_bytes(shape, element)
    head = element * 3 * head_positions * shape.head.outputs
    return weights + trained * 4 * (2 + OPTIMIZER_SLOTS[optimizer]) + activations + head
