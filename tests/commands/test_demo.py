"""The embedded default: a real signal, and domains that matter. Slow: makes the tiny model."""

import json

import pytest

import fedloom
from fedloom.commands.starter_experiment import starting_file
from fedloom.experiment.experiment import Experiment


def accuracies(tmp_path, name, *assignments):
    folder = tmp_path / name
    settings = [
        "federation.rounds=4",
        "evaluation.samples=0",
        f"output.folder={folder}",
        *assignments,
    ]
    fedloom.run(Experiment.from_toml(starting_file(), settings))
    rounds = (folder / "rounds.jsonl").read_text().splitlines()
    return [json.loads(r)["evaluation"]["global"]["preference_accuracy"] for r in rounds]


@pytest.mark.slow
def test_preferences_are_learnt_and_a_split_by_domain_is_harder(tmp_path):
    column = ("partition.column=domain", "federation.clients=6")
    iid = accuracies(tmp_path, "iid", "partition.kind=iid", *column)
    by_domain = accuracies(tmp_path, "domain", "partition.kind=column", *column)
    assert iid[0] == by_domain[0] == 0.5
    assert iid[-1] > iid[0] + 0.3  # measured: 0.91
    assert by_domain[-1] > by_domain[0] + 0.05  # measured: 0.71
    assert iid[-1] > by_domain[-1] + 0.15
