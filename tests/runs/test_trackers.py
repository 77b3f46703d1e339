"""Trackers get each round's numbers once, are closed, and are missed with the command that helps."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

import fedloom
from fedloom.errors import SettingsError


class Recorder(ModuleType):
    """Stands in for wandb and mlflow: keeps every call."""

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


@pytest.mark.parametrize(
    ("tracker", "log", "step", "last"),
    [("wandb", "log", "step", "finish"), ("mlflow", "log_metrics", "step", "end_run")],
)
def test_every_round_is_logged_and_the_tracker_closed(
    experiment, monkeypatch, tracker, log, step, last
):
    recorder = Recorder(tracker)
    monkeypatch.setitem(sys.modules, tracker, recorder)
    fedloom.run(experiment(output={"trackers": [tracker]}))
    logged = [
        (arguments[0], options[step]) for name, arguments, options in recorder.calls if name == log
    ]
    assert [round for _, round in logged] == [0, 1, 2]
    assert logged[0][0]["held_out/preference_accuracy"] == 0.5
    assert {"train/loss", "cost/bytes_up", "cost/flops", "cost/seconds"} <= logged[1][0].keys()
    assert recorder.calls[-1][0] == last


def test_a_tracker_that_is_not_installed_names_its_extra(experiment, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        SettingsError, match=r'wandb is not installed; pip install "fedloom\[wandb\]"'
    ):
        fedloom.run(experiment(output={"trackers": ["wandb"]}))
    assert not Path(experiment().output.folder).exists()
