"""Time and memory are measured around a block, also when it fails."""

import resource
import time
from types import SimpleNamespace

import numpy as np
import pytest

from fedloom.accounting import ledger as module
from fedloom.accounting.ledger import Ledger, peak_memory


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


def test_a_peak_is_in_bytes(monkeypatch):
    """Linux writes kibibytes: 2000 are 2,048,000 bytes."""

    class Status:
        def __init__(self, path):
            assert path == "/proc/self/status"

        def read_text(self):
            return "VmPeak:\t    9000 kB\nVmHWM:\t    2000 kB\nVmRSS:\t    1000 kB\n"

    monkeypatch.setattr(module, "Path", Status)
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: False)
    assert peak_memory() == 2_048_000


@pytest.mark.parametrize(("system", "expected"), [("linux", 3_072_000), ("darwin", 3000)])
def test_a_peak_without_proc_is_that_of_the_process(monkeypatch, system, expected):
    """ru_maxrss is in kibibytes on Linux and in bytes on macOS."""

    def missing(path):
        raise OSError

    monkeypatch.setattr(module, "Path", missing)
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(module.sys, "platform", system)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=3000))
    assert peak_memory() == expected
