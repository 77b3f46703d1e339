"""Trackers get each round's numbers once, are closed, and are missed with the command that helps."""

import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import fedloom
from fedloom.errors import SettingsError
from fedloom.runs.trackers import open_trackers


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
            return SimpleNamespace(
                id="a", info=SimpleNamespace(run_id="a"), log=self.log, finish=self.finish
            )

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


def opened(name, folder, monkeypatch, **options):
    """The first call that a tracker gets, which opens its run."""
    recorder = Recorder(name)
    monkeypatch.setitem(sys.modules, name, recorder)
    open_trackers([name], folder, "run", {"federation": {"rounds": 1}}, **options)
    return recorder.calls[0]


def test_mlflow_neither_tags_user_path_and_repository_nor_reports_its_use(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "false")
    called, _, options = opened("mlflow", tmp_path, monkeypatch)
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    tags = options["tags"]
    assert called == "start_run" and options["log_system_metrics"] is False
    assert tags.pop("mlflow.source.name") == "fedloom"
    hidden = {f"mlflow.source.git.{own}" for own in ("commit", "branch", "repoURL")}
    assert tags.keys() == {"mlflow.user", *hidden} and not any(tags.values())


class Service(Recorder):
    """Gives each run that it begins an id of its own, and has those of ``kept``."""

    class exceptions:  # as mlflow has it
        class MlflowException(Exception):
            """A run is not there."""

    def __init__(self, name, kept=()):
        super().__init__(name)
        self.kept, self.begun = [*kept], []

    def init(self, *, id=None, resume=None, **options):
        assert (id is None) == (resume is None) and resume in (None, "allow")
        return self.start_run(run_id=id)

    def start_run(self, run_id=None, **options):
        if run_id is not None and self.__name__ == "mlflow" and run_id not in self.kept:
            raise self.exceptions.MlflowException(run_id)
        own = run_id or f"own-{len(self.begun)}"
        self.begun.append(own)
        self.id, self.info = own, SimpleNamespace(run_id=own)
        return self


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_resumed_run_goes_on_with_the_run_that_a_service_has(name, tmp_path, monkeypatch):
    service = Service(name, kept=["own-0"])
    monkeypatch.setitem(sys.modules, name, service)
    open_trackers([name], tmp_path, "run", {})
    open_trackers([name], tmp_path, "run", {}, resumed=True)
    assert service.begun == ["own-0", "own-0"]
    assert json.loads((tmp_path / "trackers.json").read_text()) == {name: "own-0"}
    open_trackers([name], tmp_path, "run", {})
    assert service.begun[2:] == ["own-2"]  # a run begun anew has nothing to do with the earlier one


def test_a_run_that_mlflow_has_no_more_is_begun_anew(tmp_path, monkeypatch):
    service = Service("mlflow")
    monkeypatch.setitem(sys.modules, "mlflow", service)
    (tmp_path / "trackers.json").write_text('{"mlflow": "gone", "wandb": "other"}')
    open_trackers(["mlflow"], tmp_path, "run", {}, resumed=True)
    assert service.begun == ["own-0"]
    kept = json.loads((tmp_path / "trackers.json").read_text())
    assert kept == {"mlflow": "own-0", "wandb": "other"}


@pytest.mark.parametrize("content", ["", "[]", "{", '{"wandb": 3}', None])
def test_an_id_that_cannot_be_read_is_none(content, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", service := Service("wandb"))
    if content is not None:
        (tmp_path / "trackers.json").write_text(content)
    open_trackers(["wandb"], tmp_path, "run", {}, resumed=True)
    assert service.begun == ["own-0"]


@pytest.mark.parametrize(("resumed", "said"), [(False, "never"), (True, "allow")])
def test_trackio_goes_on_with_a_run_that_is_resumed_alone(resumed, said, tmp_path, monkeypatch):
    called, _, options = opened("trackio", tmp_path, monkeypatch, resumed=resumed)
    assert (called, options["resume"]) == ("init", said)


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
