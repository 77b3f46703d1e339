"""FedAvgM by hand, beta1 = 0.5: the first round is FedAvg's (m = d).

Round 2: from (0.475, 1.0475) the clients' mean would be (0.85975, 1.085975), d = (0.38475, 0.038475),
m = (0.475 + 0.38475) / 2 = 0.429875 and (0.0475 + 0.038475) / 2 = 0.0429875: (0.904875, 1.0904875).
"""

import pytest

from fedloom.methods.fedavgm import FedAvgM, FedAvgMSettings

EXPECTED = [[0.475, 1.0475], [0.904875, 1.0904875], [1.27134938, 1.12713494]]


def test_three_rounds(play):
    found = play(FedAvgM(FedAvgMSettings())).adapters
    for one, expected in zip(found, EXPECTED, strict=True):
        assert one == pytest.approx(expected, abs=1e-8)


def test_without_momentum_it_is_fedavg(play):
    found = play(FedAvgM(FedAvgMSettings(beta1=0.0))).adapters
    assert found[-1] == pytest.approx([1.1713975, 1.11713975], abs=1e-12)
