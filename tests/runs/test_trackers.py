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


@pytest.mark.parametrize(
    ("tracker", "log", "step", "last"),
    [
        ("wandb", "log", "step", "finish"),
        ("mlflow", "log_metrics", "step", "end_run"),
        ("trackio", "log", "step", "finish"),
    ],
)
def test_every_round_is_logged_and_the_tracker_closed(
    experiment, monkeypatch, tracker, log, step, last
):
    recorder = Recorder(tracker)
    monkeypatch.setitem(sys.modules, tracker, recorder)
    result = fedloom.run(experiment(output={"trackers": [tracker]}))
    logged = [
        (arguments[0], options[step]) for name, arguments, options in recorder.calls if name == log
    ]
    assert [round for _, round in logged] == [0, 1, 2]
    assert logged[0][0]["held_out/preference_accuracy"] == 0.5
    for line, (numbers, _) in zip(
        (result.folder / "rounds.jsonl").read_text().splitlines(), logged, strict=True
    ):
        record = json.loads(line)
        own = {f"held_out/{name}": own for name, own in record["evaluation"]["global"].items()}
        own |= {f"train/{name}": own for name, own in (record["train"] or {}).items()}
        own |= {
            f"cost/{name}": record[name] for name in ("bytes_up", "bytes_down", "flops", "seconds")
        }
        assert numbers == own
    assert recorder.calls[-1][0] == last


def test_a_tracker_that_is_not_installed_names_its_extra(experiment, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        SettingsError, match=r'wandb is not installed; pip install "fedloom\[wandb\]"'
    ):
        fedloom.run(experiment(output={"trackers": ["wandb"]}))
    assert not Path(experiment().output.folder).exists()
