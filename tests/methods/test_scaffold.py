"""SCAFFOLD by hand: two steps of 0.1 a round, c_k' = c_k - c + (w_t - w_k) / 0.2.

Round 1 is FedAvg's: (0.475, 1.0475). Client 0 moved from (0, 1) to (0.19, 0.62), so c_0 = (-0.95, 1.9);
client 1 to (0.57, 1.19), c_1 = (-2.85, -0.95); c = their plain mean = (-1.9, 0.475). The later rounds
are these ten lines of numpy::

    for t in range(3):
        w = {k: local(g, k, c - ck[k]) for k in (0, 1)}  # two times w -= 0.1 (w - T[k]); w -= 0.1 (c - ck)
        new = {k: ck[k] - c + (g - w[k]) / 0.2 for k in (0, 1)}
        c = c + sum(new[k] - ck[k] for k in (0, 1)) / 2
        ck, g = new, (w[0] + 3 * w[1]) / 4
"""

import pytest

from fedloom.methods.fedavg import FedAvg, FedAvgSettings
from fedloom.methods.scaffold import Scaffold, ScaffoldSettings
from fedloom.tensors import part_of

ADAPTERS = [[0.475, 1.0475], [0.7695, 0.9506], [1.0035325, 0.86534225]]
CONTROLS = [[-1.9, 0.475], [-1.44875, 0.520125], [-1.168975, 0.42807]]
OWN = [[-0.1691, 1.9278825], [-2.16885, -1.0717425]]


def test_three_rounds(play):
    played = play(Scaffold(ScaffoldSettings()))
    for found, expected in zip(played.adapters, ADAPTERS, strict=True):
        assert found == pytest.approx(expected, abs=1e-8)
    for state, expected in zip(played.states, CONTROLS, strict=True):
        assert part_of(state.tensors, "control")["lora_w"].tolist() == pytest.approx(
            expected, abs=1e-8
        )
    for client, expected in enumerate(OWN):
        found = played.kept[client]["control"]["lora_w"].tolist()
        assert found == pytest.approx(expected, abs=1e-8)


def test_the_first_round_is_fedavg_bit_for_bit(play):
    scaffold = play(Scaffold(ScaffoldSettings()), rounds=1)
    assert scaffold.adapters == play(FedAvg(FedAvgSettings()), rounds=1).adapters


def test_c_stays_the_mean_of_all_c_k_when_few_take_part(play):
    """One client of two: c moves by half of its change, (1/N) sum of dc_k."""
    played = play(Scaffold(ScaffoldSettings()), rounds=1, cohort=(0,))
    assert part_of(played.states[0].tensors, "control")["lora_w"].tolist() == pytest.approx(
        [-0.475, 0.95], abs=1e-12
    )
