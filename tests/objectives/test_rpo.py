"""RPO by hand.

Chosen log-probs -2 (2 tokens) and -6 (4 tokens): mean a token 8 / 6; DPO's margin 0.1 (1 - 0) at both.
"""

import math

import pytest
import torch

from fedloom.data.batch import Batch, Sequences
from fedloom.objectives import rpo
from fedloom.objectives.dpo import DPO, DPOSettings
from fedloom.objectives.rpo import RPO, RPOSettings, chosen_cross_entropy

LENGTHS = [2, 4, 3, 1]
"""Tokens of two chosen and two rejected completions."""

LOGPS = torch.tensor([-2.0, -6.0, -3.0, -1.0], dtype=torch.float64)


def batch(lengths=LENGTHS, reference=(-3.0, -7.0, -3.0, -1.0)):
    mask = torch.tensor([[1 <= column <= own for column in range(6)] for own in lengths])
    ids = torch.ones(len(lengths), 6, dtype=torch.long)
    reference = torch.tensor(reference, dtype=torch.float64)
    sequences = Sequences(ids, torch.ones_like(ids), mask, 1)
    return Batch(
        tuple(range(len(lengths) // 2)), sequences, sum(lengths), 24, reference_logps=reference
    )


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """Log-probs as they are said: one pass of a model is not what is tested."""
    monkeypatch.setattr(rpo, "completion_logps", lambda model, sequences: model)


def test_hand_numbers():
    own = RPO(RPOSettings(beta=0.1, sft_weight=0.5))
    loss, metrics = own.loss(LOGPS, batch(), own.statistics(LOGPS, [batch()]))
    assert loss.item() == pytest.approx(math.log1p(math.exp(-0.1)) + 0.5 * 8 / 6)
    assert metrics["chosen_cross_entropy"].item() == pytest.approx(8 / 6)
    assert chosen_cross_entropy(LOGPS[:2], torch.tensor(6)).item() == pytest.approx(8 / 6)


def test_however_a_batch_is_cut_its_mean_is_over_all_tokens():
    own, whole = RPO(), batch()
    one, two = batch([2, 3], (-3.0, -3.0)), batch([4, 1], (-7.0, -1.0))
    mean = own.statistics(LOGPS, [one, two])
    parts = [own.loss(LOGPS[[0, 2]], one, mean)[0], own.loss(LOGPS[[1, 3]], two, mean)[0]]
    torch.testing.assert_close(
        sum(parts) / 2, own.loss(LOGPS, whole, own.statistics(LOGPS, [whole]))[0]
    )


def test_by_pair_it_is_dpo_with_sft_weight(monkeypatch):
    monkeypatch.setattr("fedloom.objectives.dpo.completion_logps", lambda model, sequences: model)
    expected = DPO(DPOSettings(sft_weight=1.0)).loss(LOGPS, batch(), None)[0]
    torch.testing.assert_close(RPO().for_rows().loss(LOGPS, batch(), None)[0], expected)
    mean = torch.tensor(9.0)  # of other pairs too: it changes nothing
    torch.testing.assert_close(RPO().for_rows().loss(LOGPS, batch(), mean)[0], expected)
    torch.testing.assert_close(RPO().loss(LOGPS, batch(), None)[0], expected)
