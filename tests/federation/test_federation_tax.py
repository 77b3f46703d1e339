"""The benchmark of what a federation adds to its steps runs, and both of its sides come to the same bits."""

import re
import runpy
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "benchmarks/federation_tax.py"


@pytest.mark.slow
def test_rounds_cost_little_beside_their_steps_and_come_to_the_same_bits(monkeypatch, capsys):
    words = ["--repeats", "2", "--rows", "120", "--hidden", "32"]
    monkeypatch.setattr(sys, "argv", [str(FILE), *words])
    runpy.run_path(str(FILE), run_name="__main__")
    said = capsys.readouterr().out
    assert "results equal bit for bit" in said
    # of short steps, in which what a round adds weighs most; the benchmark itself has longer ones
    assert float(re.search(r"federation tax ([0-9.]+)", said)[1]) < 1.5
