"""Bytes of a training step by hand."""

import pytest

from fedloom.accounting.flops import LinearShape, ModelShape
from fedloom.accounting.memory import training_memory


@pytest.mark.parametrize(("optimizer", "states"), [("adamw", 2), ("sgd", 0)])
def test_a_step_by_hand(optimizer, states):
    """Two layers keep twice their 3 + 5 and 5 + 2 numbers of 7 tokens; 3 x 11 logits at 4 positions."""
    shape = ModelShape((LinearShape(3, 5), LinearShape(5, 2)), LinearShape(2, 11), 0, 0)
    found = training_memory(
        shape, weights=1000, trained=10, optimizer=optimizer, tokens=7, head_positions=4
    )
    assert found == 1000 + 10 * 4 * (2 + states) + 4 * 2 * 7 * (8 + 7) + 4 * 3 * 4 * 11
