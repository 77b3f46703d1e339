"""A run ends early and leaves its best round's adapter, whether it was resumed or not."""

import json

import pytest
from safetensors.torch import load_file

import fedloom
from fedloom.errors import SettingsError
from fedloom.experiment.experiment import Experiment
from fedloom.reports.run_page import write_report

PATIENCE = {"early_stopping_patience": 2, "samples": 0, "per_client": False}


def sections(rounds=6, evaluation=PATIENCE, **more):
    """So high a rate that the loss soon rises."""
    return {
        "objective": {"name": "sft"},
        "data": {"source": "builtin:instructions", "builtin_rows": 60},
        "federation": {"clients": 2, "rounds": rounds},
        "training": {"learning_rate": 0.05, "local_steps": 2},
        "adapter": {"rank": 2},
        "evaluation": evaluation,
        **more,
    }


def losses(folder):
    lines = (folder / "rounds.jsonl").read_text().splitlines()
    return [json.loads(line)["evaluation"]["global"]["loss"] for line in lines]


class Enough(Exception):
    pass


@pytest.mark.slow
def test_the_run_ends_and_leaves_the_best_rounds_adapter(experiment, tmp_path):
    folder = tmp_path / "run"
    result = fedloom.run(experiment(**sections()))
    summary = json.loads((folder / "summary.json").read_text())
    found, best = losses(folder), summary["best_round"]
    least = min(found[1:])
    assert found.index(least, 1) == best["round"] and best["stopped_early"]
    assert best["last_round"] == best["round"] + 2 == len(found) - 1 < 6
    assert summary["after"] == result.metrics["loss"] == least
    assert summary["change"] is not None  # by rows, of the round that was kept
    assert best["text"] in result.summary_text
    page = write_report([folder]).read_text()
    assert best["text"] in page and f"{least:.3f}" in page.partition(best["text"])[2]
    adapter = (result.adapter_path / "adapter_model.safetensors").read_bytes()

    # a run of as many rounds as the best has ends with that adapter
    table = sections(best["round"], {"samples": 0, "per_client": False})
    whole = fedloom.run(experiment(**table, output={"folder": str(tmp_path / "whole")}))
    same = load_file(whole.adapter_path / "adapter_model.safetensors")
    ours = load_file(result.adapter_path / "adapter_model.safetensors")
    assert all(ours[name].equal(own) for name, own in same.items())

    # resumed once it is over, it makes no round
    again = fedloom.resume(folder)
    assert len(losses(folder)) == len(found)
    assert (again.adapter_path / "adapter_model.safetensors").read_bytes() == adapter


@pytest.mark.parametrize(
    ("every", "stops"),
    [
        pytest.param(3, (4,), marks=pytest.mark.slow),
        pytest.param(1, range(1, 6), marks=pytest.mark.full),
        pytest.param(3, range(1, 6), marks=pytest.mark.full),
    ],
)
def test_resumed_after_any_round_it_ends_with_the_same(experiment, tmp_path, every, stops):
    output = {"checkpoint_every": every}
    whole = fedloom.run(
        experiment(**sections(), output={**output, "folder": str(tmp_path / "whole")})
    )
    assert len(losses(tmp_path / "whole")) == 6
    wanted = json.loads((tmp_path / "whole" / "summary.json").read_text())
    for stop in stops:
        folder = tmp_path / str(stop)

        def enough(record, stop=stop):
            if record.round == stop:
                raise Enough

        with pytest.raises(Enough):
            fedloom.run(
                experiment(**sections(), output={**output, "folder": str(folder)}), on_round=enough
            )
        result = fedloom.resume(folder)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            mine = (result.adapter_path / name).read_bytes()
            assert mine == (whole.adapter_path / name).read_bytes(), (stop, name)
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["best_round"] == wanted["best_round"]
        assert losses(folder) == losses(tmp_path / "whole")


def test_a_metric_that_is_not_there_and_methods_that_cannot(experiment, tmp_path):
    evaluation = {**PATIENCE, "metric_for_best_model": "loos"}
    with pytest.raises(SettingsError, match=r"metric_for_best_model = 'loos': .*loss"):
        fedloom.run(experiment(**sections(evaluation=evaluation)))
    assert not (tmp_path / "run").exists()
    for method in ("ditto", "local_only", "fedper"):
        with pytest.raises(SettingsError, match=rf"patience: method.name = '{method}' has models"):
            Experiment.from_table({"evaluation": PATIENCE, "method": {"name": method}})
