"""Rows that lie with the clients, and a coordinator that has a held-out set and nothing else."""

import json

import pytest

from fedloom.errors import RoundFailed
from fedloom.experiment import Experiment
from fedloom.progress import Silent
from fedloom.runner import run_experiment
from loopback import OPEN, client_file


@pytest.fixture
def private(table, loopback, rows_file, tmp_path):
    """Run an experiment over clients with these rows; returns the run's folder and the federation."""

    def run(kind, rows, held_out, **sections):
        federation, own = loopback(len(rows)), {}
        for client, lines in enumerate(rows):
            own[client] = client_file(
                tmp_path / f"own-{client}.toml", models=federation.models, policy=OPEN,
                data={"source": rows_file(lines, f"own-{client}.jsonl"), "kind": kind},
            )  # fmt: skip
        data = {
            "source": "clients", "kind": kind, "test_source": rows_file(held_out, "test.jsonl"), }  # fmt: skip
        settings = {
            **table, "data": data, "partition": {"client_test_fraction": 0.3}, "federation": {"clients": len(rows), "rounds": 2, "patience": 0.5},
            "evaluation": {**table["evaluation"], "per_client": True, "samples": 0},
            "training": {**table["training"], "local_steps": 1}, **sections,
        }  # fmt: skip
        engine = federation.engine(
            experiment := Experiment.from_table(settings), federation.mail(own=own)
        )
        return run_experiment(experiment, observer=Silent(), remote=engine), federation

    return run


def pairs(start, count):
    return [
        {"prompt": f"Q{i}?", "chosen": f"Yes, {i}.", "rejected": f"No, {i}."}
        for i in range(start, start + count)
    ]


def test_clients_with_models_of_their_own_are_judged_on_their_own_rows(private, mixture_folder):
    """Found: nobody was judged, and the run ended with a TypeError after all rounds."""
    result, federation = private(
        "preference", [pairs(0, 12), pairs(100, 16)], pairs(900, 6),
        method={"name": "fedamole"}, model={"path": str(mixture_folder)},
        adapter={"kind": "experts", "rank": 2, "experts": 4},
    )  # fmt: skip
    rounds = [json.loads(x) for x in (result.folder / "rounds.jsonl").read_text().splitlines()]
    for record in rounds:
        assert not record["rejected"]
        assert set(record["evaluation"]["clients"]["each"]) == {"0", "1"}
    partition = json.loads((result.folder / "partition.json").read_text())
    assert [(own["train"], own["held_out"]) for own in partition["clients"]] == [(8, 4), (11, 5)]
    assert (
        result.folder / "summary.json"
    ).exists() and "on clients' own rows (mean)" in result.summary_text
    for client in range(2):
        (model,) = federation.home(client).path.glob("runs/*/model/expert_model.safetensors")
        assert model.stat().st_size


@pytest.mark.parametrize("method", ["split", "fedavg"])
def test_a_class_that_the_coordinator_does_not_have_is_told_before_training(private, method):
    """Found: an AssertionError."""
    texts = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(20)]
    strange = [{"text": f"text {i}", "label": "abc"[i % 3]} for i in range(20)]
    sections = {"method": {"name": method}, "objective": {"name": "classification"}}
    with pytest.raises(RoundFailed) as failed:
        private("labelled", [texts, strange], texts[:8], **sections)
    assert "client-1 (client 1): its rows cannot be used as the experiment asks" in str(
        failed.value
    )
    assert "client-0" not in str(failed.value)
