"""Bytes of a training step by hand."""

import pytest

from fedloom.accounting.flops import LinearShape, ModelShape
from fedloom.accounting.memory import OPTIMIZER_SLOTS, activation_bytes, training_memory

STATES = {"adamw": 2, "adam": 2, "sgd": 0, "adafactor": 0, "muon": 1, "lion": 1, "adamw_8bit": 0.5}


@pytest.mark.parametrize(("optimizer", "states"), STATES.items())
def test_a_step_by_hand(optimizer, states):
    """Two layers keep twice their 3 + 5 and 5 + 2 numbers of 7 tokens; 3 x 11 logits at 4 positions."""
    shape = ModelShape((LinearShape(3, 5), LinearShape(5, 2)), LinearShape(2, 11), 0, 0)
    found = training_memory(
        shape, weights=1000, trained=10, optimizer=optimizer, tokens=7, head_positions=4
    )
    assert found == 1000 + 10 * 4 * (2 + states) + 4 * 2 * 7 * (8 + 7) + 4 * 3 * 4 * 11
    assert OPTIMIZER_SLOTS.keys() == STATES.keys()


def test_activations_are_of_layers_that_the_backward_pass_reaches():
    layers = (LinearShape(3, 5, reached=False), LinearShape(5, 2))
    shape = ModelShape(layers, LinearShape(2, 11), 0, 0)
    assert activation_bytes(shape) == 4 * 2 * 7 and activation_bytes(shape, 2) == 2 * 2 * 7
    given = {"weights": 0, "trained": 0, "optimizer": "sgd", "tokens": 3, "head_positions": 1}
    assert training_memory(shape, **given, element=2) == 3 * 2 * 2 * 7 + 2 * 3 * 11
