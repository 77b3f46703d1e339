"""Completion log-probs against the textbook way: all logits, shifted labels, summed."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fedloom.data.batch import Predicting, Sequences
from fedloom.objectives import logps
from fedloom.objectives.logps import (
    completion_logits,
    completion_logits_in_parts,
    completion_logps,
    completion_rewards,
    completion_token_logps,
)

VOCABULARY = 11


class Toy:
    """Logits that depend on every token read so far."""

    def __init__(self):
        torch.manual_seed(0)
        self.table = torch.randn(VOCABULARY, VOCABULARY)
        self.kept = None

    def __call__(self, *, input_ids, attention_mask, logits_to_keep):
        self.kept = logits_to_keep
        logits = self.table[input_ids].cumsum(1)
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])


def sequences():
    ids = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    completion = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 0, 0]]).bool()
    return Sequences(ids, mask, completion, first_completion=2)


def test_sum_over_completion_tokens_only():
    model, batch = Toy(), sequences()
    scores = torch.log_softmax(model.table[batch.input_ids].cumsum(1), -1)
    first = sum(scores[0, t - 1, batch.input_ids[0, t]] for t in (3, 4, 5))
    second = sum(scores[1, t - 1, batch.input_ids[1, t]] for t in (2, 3))
    torch.testing.assert_close(completion_logps(model, batch), torch.stack([first, second]))
    assert (
        model.kept == 5
    )  # the head is not applied to columns before the one that predicts a token


def test_correct_marks_the_likeliest_token():
    model, batch = Toy(), sequences()
    _, mask, correct = completion_token_logps(model, batch)
    best = model.table[batch.input_ids].cumsum(1).argmax(-1)[:, :-1] == batch.input_ids[:, 1:]
    assert torch.equal(correct, best[:, 1:] & mask)


class Asked(Toy):
    """A model that can be asked for what its output layer reads."""

    def predicting(self, sequences):
        states = self.table[sequences.input_ids].cumsum(1)[:, :-1]
        mask = sequences.completion_mask[:, 1:]
        return SimpleNamespace(states=states[mask], logits=lambda states: 2 * states)


def test_logits_of_completion_tokens_row_by_row():
    """Those of the columns before: tokens 3 to 5 of the first row, 2 and 3 of the second."""
    model, batch = Toy(), sequences()
    whole = model.table[batch.input_ids].cumsum(1)
    expected = torch.cat([whole[0, 2:5], whole[1, 1:3]])
    logits, tokens, mask = completion_logits(model, batch)
    assert torch.equal(logits, expected) and tokens.tolist() == [4, 5, 6, 9, 10]
    assert torch.equal(mask, batch.completion_mask[:, 2:])
    logits, tokens, mask = completion_logits(Asked(), batch)
    assert torch.equal(logits, 2 * expected) and tokens.tolist() == [4, 5, 6, 9, 10]
    assert torch.equal(mask, batch.completion_mask[:, 2:])


class Read(Toy):
    """A model whose output layer is applied to what predicts a completion's tokens alone."""

    def predicting(self, sequences):
        states = self.table[sequences.input_ids].cumsum(1)[:, :-1][sequences.completion_mask[:, 1:]]
        self.states = states.requires_grad_()
        return Predicting(states, lambda states: 2 * states, VOCABULARY, False)


def test_tokens_beyond_those_that_are_graded_have_log_probs_without_a_gradient():
    model, whole = Read(), sequences()
    expected, _, correct = completion_token_logps(model, whole)
    found, _, likeliest = completion_token_logps(model, replace(whole, graded=3))
    torch.testing.assert_close(found, expected)
    assert torch.equal(likeliest, correct)
    found.sum().backward()
    moved = model.states.grad.abs().sum(1) > 0
    assert moved.tolist() == [True, True, True, False, False]


@pytest.mark.parametrize("model", [Toy, Read])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_logits_are_divided_by_the_temperature(model, temperature):
    """Which is 1 where it is not said."""
    own, whole = model(), sequences()
    logits, tokens, mask = completion_logits(own, whole)
    expected = (logits / temperature).log_softmax(1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(completion_token_logps(own, whole, temperature)[0][mask], expected)
    if temperature == 1:
        torch.testing.assert_close(completion_token_logps(own, whole)[0][mask], expected)


@pytest.mark.parametrize(
    ("held", "sizes"), [(1 << 24, [5]), (2 * VOCABULARY, [2, 2, 1]), (1, [1] * 5)]
)
def test_logits_in_parts_are_the_logits(monkeypatch, held, sizes):
    monkeypatch.setattr(logps, "CHUNK", held)
    whole = completion_logits(Toy(), sequences())[0]
    parts = list(completion_logits_in_parts(Read(), sequences()))
    assert [len(part) for part in parts] == sizes
    torch.testing.assert_close(torch.cat(parts), 2 * whole)
    (alone,) = completion_logits_in_parts(Toy(), sequences())
    assert torch.equal(alone, whole)


class Rewarding(Toy):
    """Rewards beside the logits."""

    def __call__(self, **asked):
        return SimpleNamespace(logits=super().__call__(**asked).logits, rewards=torch.ones(2))


def test_rewards_come_with_the_log_probs():
    found, rewards = completion_rewards(Rewarding(), sequences())
    torch.testing.assert_close(found, completion_logps(Toy(), sequences()))
    assert rewards.tolist() == [1.0, 1.0]
