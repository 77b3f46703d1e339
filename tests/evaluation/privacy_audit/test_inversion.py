"""Gradient inversion on gradients in closed form: hand values, torch's Adam, and rows that are found."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedloom.evaluation.privacy_audit import inversion
from fedloom.evaluation.privacy_audit.inversion import (
    AdamRule,
    Inversion,
    Shape,
    descent,
    distance,
)

VOCABULARY, WIDTH = 12, 16


class Closed:
    """A token's gradient is what it is predicted by, and the mean of all before it, beside its own."""

    def __init__(self):
        draw = torch.Generator().manual_seed(0)
        self.read, self.said = (torch.randn(VOCABULARY, WIDTH, generator=draw) for _ in range(2))

    def of_tokens(self, tokens, learnt):
        found = torch.zeros(len(tokens), WIDTH, WIDTH)
        for place in range(1, tokens.shape[1]):
            if learnt[place]:
                before = self.read[tokens[:, :place]]
                states = before[:, -1] + 0.5 * before.mean(1)
                found += states[:, :, None] * self.said[tokens[:, place]][:, None]
        return {"w": found}


def attack(rows, learnt, rule=descent, steps=1, seed=0):
    """Return an attack on the update of rows, and what it finds."""
    simulated = Closed()
    shape = Shape(tuple(learnt), steps)
    gradients = [
        simulated.of_tokens(torch.tensor([own]), flags)["w"]
        for own, flags in zip(rows, learnt, strict=True)
    ]
    each = len(rows) // steps
    summed = [sum(gradients[n : n + each]) for n in range(0, len(rows), each)]
    wanted = {"w": rule(summed)[0], "never": torch.zeros(2, 2)}
    rng = np.random.default_rng(seed)
    own = Inversion(wanted, simulated, rule, shape, torch.arange(VOCABULARY), rng)
    return own, own.find()


def test_distance_by_hand():
    """Alike 0, at right angles 1, opposite 2, of nothing 1; the mean over tensors."""
    wanted = {"a": torch.tensor([[3.0, 0.0]]), "b": torch.tensor([[0.0, 2.0]])}
    a = torch.tensor([[[1.0, 0.0]], [[0.0, 5.0]], [[-1.0, 0.0]], [[0.0, 0.0]]])
    b = torch.tensor([[[0.0, 1.0]], [[0.0, 1.0]], [[0.0, 1.0]], [[1.0, 1.0]]])
    expected = [0.0, 0.5, 1.0, (1 + 1 - 0.5**0.5) / 2]
    assert distance({"a": a, "b": b}, wanted).tolist() == pytest.approx(expected)


def test_adam_is_torch_s():
    """Three steps of a new optimizer, without the learning rate."""
    draw = torch.Generator().manual_seed(1)
    gradients = [torch.randn(1, 3, 4, generator=draw) for _ in range(3)]
    parameter = torch.nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
    optimizer = torch.optim.Adam([parameter], lr=1.0, betas=(0.8, 0.9), eps=1e-3)
    for own in gradients:
        parameter.grad = own[0].double() / 5
        optimizer.step()
    found = AdamRule(0.8, 0.9, 1e-3, 5)(gradients)
    assert torch.allclose(found[0].double(), parameter.detach(), atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_a_row_is_found_exactly(seed):
    """Six tokens, all but the first predicted; the update is that of the row alone."""
    row = tuple(np.random.default_rng(seed).choice(VOCABULARY, 6, replace=False).tolist())
    own, found = attack([row], [(False, *[True] * 5)], seed=seed)
    assert found.rows == (row,) and found.distance == pytest.approx(0, abs=1e-5)
    assert own.distance_of([torch.tensor(row)]) == pytest.approx(found.distance, abs=1e-5)
    assert found.read > 0 and list(own.wanted) == ["w"]


def test_adam_s_step_is_inverted_as_well():
    """Whose first step is the sign of the gradient."""
    row = (3, 1, 4, 0, 5)
    _, found = attack([row], [(False, *[True] * 4)], rule=AdamRule(0.9, 0.999, 1e-8, 4))
    assert found.rows == (row,)


def test_two_rows_of_a_step_are_found_in_any_order():
    """Their gradients are added: which was first is not told."""
    rows = ((1, 2, 3, 4), (5, 6, 7, 8))
    _, found = attack(rows, [(False, True, True, True)] * 2)
    assert set(found.rows) == set(rows)


def test_rows_of_two_steps_of_adam():
    """Each in its own step."""
    rows = ((1, 2, 3, 4), (5, 6, 7, 8))
    _, found = attack(rows, [(False, True, True, True)] * 2, AdamRule(0.9, 0.999, 1e-8, 3), 2)
    tokens = {token for row in found.rows for token in row}
    assert len(tokens & {1, 2, 3, 4, 5, 6, 7, 8}) >= 6


def test_what_precedes_the_first_predicted_token_is_drawn_and_then_replaced():
    """Two tokens of a prompt: the whole row is found by replacing single ones."""
    row = (2, 9, 4, 7, 1, 6)
    _, found = attack([row], [(False, False, False, True, True, True)])
    assert found.rows[0][2:] == row[2:]


def test_the_search_ends_where_it_has_read_enough(monkeypatch):
    """What is left of the row is drawn, and the row has its length."""
    monkeypatch.setattr(inversion, "MOST_READ", 10)
    monkeypatch.setattr(inversion, "SWEEPS", 0)
    own, found = attack([(3, 1, 4, 0, 5)], [(False, *[True] * 4)])
    assert len(found.rows[0]) == 5 and own.read == 5


@pytest.mark.parametrize(
    ("learnt", "steps"), [((), 1), (((False, True),) * 3, 2), (((True, False),), 1)]
)
def test_shapes_that_no_update_has(learnt, steps):
    """No rows, rows that do not divide, and a row of which only the first token is predicted."""
    with pytest.raises(ValueError, match=r"rows in|no gradient"):
        Shape(learnt, steps)


def test_an_update_of_nothing_is_refused():
    """It tells nothing."""
    with pytest.raises(ValueError, match="tells nothing"):
        Inversion(
            {"w": torch.zeros(2, 2)}, Closed(), descent, Shape(((False, True),), 1),
            torch.arange(3), np.random.default_rng(0),
        )  # fmt: skip
