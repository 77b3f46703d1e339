"""``benchmarks/wire.py``: its intervals and claims by hand, and that it runs, goes on and writes its table."""

import gzip
import json
import runpy
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fedloom.runs.observers import Silent
from fedloom.runs.run import run_experiment

FILE = Path(__file__).parents[2] / "benchmarks/wire.py"


@pytest.fixture(scope="module")
def wire():
    return SimpleNamespace(**runpy.run_path(str(FILE), run_name="wire"))


def row(wire, losses, up=100.0, down=100.0, accuracy=0.5, weights=None):
    weights = weights or [1.0] * len(losses)
    return wire.Row(up, down, 2.0, losses, weights, accuracy, 1.0)


def test_an_interval_clusters_rows_by_seed(wire):
    plain = [row(wire, [1.0, 1.0])] * 2
    coded = [row(wire, [1.1, 1.3]), row(wire, [1.0, 1.2])]
    found = wire.difference(plain, coded)
    assert found.mean == pytest.approx(0.15)  # (0.1 + 0.3 + 0 + 0.2) / 4
    # seeds add (0.4 - 0.3) / 4 = 0.025 and -0.025: variance 2 (0.025^2 + 0.025^2) = 0.05^2, t of one
    # degree 12.706; over rows it is 4/3 of 0.003125 = 0.0645^2, and t of three is 3.182: narrower
    assert found.half == pytest.approx(12.706 * 0.05, rel=1e-4)
    alone = wire.difference(plain[:1], coded[:1])
    # of one seed over rows: they add (0.1 - 0.2) / 2 and 0.05: variance 2 (0.05^2 + 0.05^2) = 0.1^2
    assert (alone.mean, alone.half) == (pytest.approx(0.2), pytest.approx(1.2706, rel=1e-4))


def test_an_interval_is_not_narrower_than_over_rows(wire):
    plain = [row(wire, [1.0] * 4)] * 3
    coded = [row(wire, [0.0, 2.0, 0.5, 1.5 + 1e-6 * seed]) for seed in range(3)]
    found = wire.difference(plain, coded)
    # seeds agree to 1e-6; rows are off by 1, 1, 1/2, 1/2: variance 12/11 (3 * 2.5) / 12^2 = 0.2384^2
    assert found.half == pytest.approx(2.201 * 0.2384, rel=1e-3)


def test_tokens_weigh_a_row(wire):
    plain = [row(wire, [4.0, 1.0, 2.0], weights=[4.0, 1.0, 1.0])]
    coded = [row(wire, [4.4, 1.1, 2.4], weights=[4.0, 1.0, 1.0])]
    assert wire.difference(plain, coded).mean == pytest.approx(0.9 / 6)
    assert plain[0].loss == pytest.approx(7 / 6)


def test_a_claim_holds_by_the_upper_end_and_by_bytes(wire):
    plain = [row(wire, [1.0, 1.0, 1.0])]
    near = [row(wire, [1.001, 1.0, 1.001], up=5.0, down=10.0)]
    far = [row(wire, [1.1, 1.0, 1.2], up=2.0, down=2.0)]
    mild = [row(wire, [1.0, 1.0, 1.0001], up=25.0, down=25.0)]
    found = [
        wire.Judged("FedAvg", wire.PLAIN, plain, plain),
        wire.Judged("FedAvg", "near", plain, near),
        wire.Judged("SCAFFOLD", "far", plain, far),
        wire.Judged("FLoRA", "mild", plain, mild),
        wire.Judged("FedKSeed", wire.PLAIN, plain, far),
    ]
    said = list(wire.claims("part", found))
    # 0.001, 0, 0.001: mean 0.0667 %, variance 3/2 of 6 / 9^3 1e-6, t of two 4.303: half 0.1434 %
    assert said[0] == (
        "- part, FedAvg, 16 times fewer bytes up at equal loss: holds with near (20.0 times, upper end "
        "+0.21 % of 1 seeds)"
    )
    assert "8 times fewer bytes down at equal loss: holds with near (10.0" in said[1]
    assert "16 times fewer bytes up at equal loss: does not hold; not with far (50.0" in said[2]
    assert "4 times fewer bytes up at equal loss: holds with mild (4.0 times" in said[4]
    assert "8 times fewer bytes down at equal loss: does not hold: no preset has so few" in said[5]
    assert said[6].startswith("- part, FedKSeed: 50 times fewer bytes up than FedAvg as it is")
    line = found[1].line()
    assert line.startswith("| FedAvg | near | 1 | 0.005 | 20.0 | 0.01 | 10.0 | 1.0007 | +0.07 (")


def test_runs_are_those_of_the_grid(wire):
    runs = list(wire.keys([*wire.PARTS], [*wire.METHODS], [3, 4]))
    assert len(runs) == len(set(runs)) == 2 * (2 + 3 * 18) + 3 * 2 + 2 * 4 + 2
    assert {seed for _, method, _, seed in runs if method in wire.LITTLE} == {3}
    for key in (own for own in runs if own[3] == 3):
        wire.make_experiment(key, Path("run"), wire.Files("rows.jsonl.gz", "tiny", "tiny"))


def test_chosen_answers_are_drawn_and_split(wire, tmp_path):
    turns = [
        f"\n\nHuman: hi {i}\n\nAssistant: so\n\nHuman: and?\n\nAssistant: {i}" for i in range(30)
    ]
    empty = "\n\nHuman: hi\n\nAssistant:"
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps({"chosen": text}) + "\n" for text in [empty, *turns])
    found = wire.ChosenAnswers(str(path), 10).load(np.random.default_rng(0))
    assert (len(found.train), len(found.test)) == (8, 2)
    for own in chain(found.train, found.test):
        assert own.prompt + own.completion in turns and own.completion.strip().isdigit()


@pytest.mark.slow
def test_the_benchmark_runs_and_goes_on(wire, tmp_path, monkeypatch, capsys):
    words = [str(FILE), "--seeds", "5", "--work", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(FILE), run_name="__main__")
    said = capsys.readouterr().out
    assert "2 runs are missing" in said and "## builtin-try" in said
    assert "16 times fewer bytes up at equal loss: does not hold: no preset has so few" in said
    lines = (tmp_path / wire.LINES).read_text()
    (tmp_path / wire.LINES).write_text(lines + '{"key": ["builtin-try", "Fed')
    runpy.run_path(str(FILE), run_name="__main__")
    again = capsys.readouterr().out
    assert "0 runs are missing, 2 are in" in again
    assert again.partition("## ")[2] == said.partition("## ")[2]
    rows = wire.known(tmp_path / wire.LINES)
    plain, coded = (
        rows["builtin-try", "FedAvg", wire.PLAIN, 5],
        rows["builtin-try", "FedAvg", "int8", 5],
    )
    assert plain.up > 3.9 * coded.up and plain.down > 3.9 * coded.down
    assert plain.loss == pytest.approx(coded.loss, rel=1e-3)


@pytest.mark.slow
def test_losses_of_pairs_are_those_of_the_run(wire, tmp_path):
    key = ("builtin-try", "FedAvg", "as it is", 0)
    experiment = wire.make_experiment(key, tmp_path / "run", wire.Files())
    result = run_experiment(experiment, observer=Silent())
    losses = wire.pair_losses(experiment, result.adapter_path)
    assert len(losses) == 12 and len(set(losses)) > 1
    assert np.mean(losses) == pytest.approx(result.metrics["loss"], rel=1e-5)
