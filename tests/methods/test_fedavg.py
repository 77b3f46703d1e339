"""FedAvg by hand. Clients take two steps of 0.1 towards (1, -1) and (3, 2) with weights 1 and 3.

A step keeps 0.9 of the distance, two keep 0.81. From (0, 1): client 0 reaches (0.19, 0.62), client 1
(0.57, 1.19); the weighted mean is ((0.19 + 3 0.57) / 4, (0.62 + 3 1.19) / 4) = (0.475, 1.0475).
"""

import pytest

from fedloom.methods.fedavg import FedAvg, FedAvgSettings

EXPECTED = [[0.475, 1.0475], [0.85975, 1.085975], [1.1713975, 1.11713975]]


def test_three_rounds(play):
    for found, expected in zip(play(FedAvg(FedAvgSettings())).adapters, EXPECTED, strict=True):
        assert found == pytest.approx(expected, abs=1e-12)
