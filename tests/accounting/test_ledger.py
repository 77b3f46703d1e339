"""Time and memory are measured around a block, also when it fails."""

import time

import numpy as np
import pytest

from fedloom.accounting.ledger import Ledger


def test_seconds_and_peak_memory():
    ledger = Ledger()
    with ledger.measure(1, 2, "train"):
        block = np.ones(30_000_000)  # 240 MB
        del block
        time.sleep(0.05)
    with ledger.measure(1, 3, "train"):
        pass
    big, small = ledger.take()
    assert (big.round, big.client, big.phase) == (1, 2, "train")
    assert 0.05 <= big.seconds < 5
    assert big.peak_memory - small.peak_memory > 150e6
    assert ledger.take() == []


def test_a_failure_is_counted_too():
    ledger = Ledger()

    def fail():
        with ledger.measure(1, 0, "train") as cost:
            cost.bytes_down = 5
            raise RuntimeError("it fell over")

    with pytest.raises(RuntimeError, match="it fell over"):
        fail()
    assert ledger.take()[0].bytes_down == 5
