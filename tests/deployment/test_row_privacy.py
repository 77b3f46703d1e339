"""Row-level privacy between machines: each client's own noise, ledger and budget."""

import pytest

from fedloom.experiment.experiment import Experiment
from fedloom.runs.observers import Silent
from fedloom.runs.run import run_experiment

PRIVATE = {"unit": "row", "delta": 1e-3, "noise_multiplier": 1.0, "accountant": "rdp"}


def test_x(deployed):
    out = deployed(2, privacy=PRIVATE)
    import subprocess
    print(subprocess.run(["find", str(out.federation.folder), "-type", "f", "-size", "-200k"], capture_output=True, text=True).stdout)
    print((out.folder / "summary.json").read_text()[-3000:])
    assert 0
