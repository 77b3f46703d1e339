"""Trackers get each round's numbers once, are closed, and are missed with the command that helps."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

import fedloom
from fedloom.errors import SettingsError


class Recorder(ModuleType):
    """Stands in for wandb, mlflow and trackio: keeps every call."""

    def __init__(self, name):
        super().__init__(name)
        self.calls = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*arguments, **options):
            self.calls.append((name, arguments, options))
            return self

        return call


CALLS = {
    "wandb": ("log", "step", "finish"),
    "mlflow": ("log_metrics", "step", "end_run"),
    "trackio": ("log", "step", "finish"),
}
"""Of each tracker: what logs, the argument that is the round, what closes it."""


def test_every_round_is_logged_as_it_is_recorded_and_the_trackers_are_closed(
    experiment, monkeypatch
):
    recorders = {name: Recorder(name) for name in CALLS}
    for name, recorder in recorders.items():
        monkeypatch.setitem(sys.modules, name, recorder)
    result = fedloom.run(experiment(output={"trackers": [*CALLS]}))
    lines = (result.folder / "rounds.jsonl").read_text().splitlines()
    recorded = [numbers_of(json.loads(line)) for line in lines]
    assert recorded[0]["held_out/preference_accuracy"] == 0.5
    assert {"train/loss", "cost/bytes_up", "cost/flops", "cost/seconds"} <= recorded[1].keys()
    for name, (log, step, last) in CALLS.items():
        calls = recorders[name].calls
        logged = [(given[0], options[step]) for called, given, options in calls if called == log]
        assert logged == [(own, round) for round, own in enumerate(recorded)]
        assert calls[-1][0] == last


def numbers_of(record):
    """The numbers of a line of rounds.jsonl by the names that trackers get."""
    costs = ("bytes_up", "bytes_down", "flops", "seconds")
    return {
        **{f"held_out/{name}": own for name, own in record["evaluation"]["global"].items()},
        **{f"train/{name}": own for name, own in (record["train"] or {}).items()},
        **{f"cost/{name}": record[name] for name in costs},
    }


def test_a_tracker_that_is_not_installed_names_its_extra(experiment, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        SettingsError, match=r'wandb is not installed; pip install "fedloom\[wandb\]"'
    ):
        fedloom.run(experiment(output={"trackers": ["wandb"]}))
    assert not Path(experiment().output.folder).exists()
