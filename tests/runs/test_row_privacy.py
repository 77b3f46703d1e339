"""Row-level privacy of runs: what is promised, what is refused, and the same bits after a resume."""

import json

import numpy as np
import pytest

from fedloom.data.examples import Preference
from fedloom.errors import CheckpointError, DataError, SettingsError
from fedloom.experiment.experiment import Experiment
from fedloom.objectives import make_objective
from fedloom.objectives.base import Objective
from fedloom.privacy.accounting import Releases, epsilon
from fedloom.privacy.row_ledger import RowLedger
from fedloom.privacy.settings import PrivacySettings
from fedloom.runs import model_building
from fedloom.runs.assembly import assemble
from fedloom.runs.client_privacy import key_file
from fedloom.runs.observers import Silent
from fedloom.runs.partitioning import partition_data
from fedloom.runs.row_privacy import RowPlan, noise_multipliers, own_steps, row_statement
from fedloom.runs.run import resume_run, run_experiment
from fedloom.storage.run_folder import RunFolder
from fedloom.training.row_privacy import GRID, ClippedSum

PRIVATE = {
    "unit": "row",
    "delta": 1e-3,
    "noise_multiplier": 1.0,
    "accountant": "rdp",
}
SMALL = {
    "data": {"builtin_rows": 60},
    "federation": {"clients": 2, "rounds": 2},
    "training": {"local_steps": 2, "batch_size": 4},
    "evaluation": {"samples": 0, "max_examples": 4, "client_max_examples": 2},
}


@pytest.fixture
def private(experiment):
    def make(privacy=None, **sections):
        merged = {name: {**SMALL.get(name, {}), **own} for name, own in sections.items()}
        return experiment(**{**SMALL, **merged, "privacy": {**PRIVATE, **(privacy or {})}})

    return make


def read(folder, name):
    return json.loads((folder / name).read_text())


def weights(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_run_without_noise_promises_nothing(private, tmp_path):
    """Clipped gradients are releases without a bound: no epsilon is stated, and none of 0."""
    folder = tmp_path / "run"
    run_experiment(
        private({"noise_multiplier": 0.0}, federation={"rounds": 1, "clients": 1}),
        observer=Silent(),
    )
    own = read(folder, "summary.json")["privacy"]
    assert own["epsilon"] is None and own["steps"] == 2
    assert {one["epsilon"] for one in own["clients"].values()} == {None}


def test_a_run_says_what_it_promises_its_rows(private, tmp_path):
    folder = tmp_path / "run"
    run_experiment(private(objective={"name": "kto"}), observer=Silent())
    own, planned = read(folder, "summary.json")["privacy"], read(folder, "run.json")["privacy"]
    for client in own["clients"].values():
        assert client["sampling"] == 4 / client["units"] and client["steps"] == 4
        direct = epsilon([Releases(1.0, client["sampling"], 4)], 1e-3, "rdp").epsilon
        assert client["epsilon"] == direct <= own["epsilon"] == planned["epsilon"]
    assert own["unit"] == "row" and own["neighbours"] == "add or remove one"
    assert "any one row no more than" in " ".join(own["sentences"])
    assert not key_file(RunFolder.existing(folder)).exists()  # the run is over
    for line in (folder / "rounds.jsonl").read_text().splitlines():
        assert (json.loads(line)["train"] or {}).keys() <= {
            "aggregation_error"
        }  # of private updates
    with pytest.raises(CheckpointError, match="key of this run's noise"):
        resume_run(folder, from_round=1)


def test_a_resumed_run_has_the_same_bits(private, tmp_path):
    folder = tmp_path / "run"
    seeded = private({"seeded": True, "noise_multiplier": 0.5})
    run_experiment(seeded, observer=Silent())
    before, promise = weights(folder), read(folder, "summary.json")["privacy"]
    resume_run(folder, from_round=1)
    assert weights(folder) == before
    assert read(folder, "summary.json")["privacy"] == promise
    assert promise["sentences"][0].startswith("Privacy: reproducible, therefore not private")


def test_steps_that_are_made_again_with_other_sums_count_again(private, tmp_path, monkeypatch):
    """A resume whose sums differ in one step of the grid has other noise on nearly the same sum."""
    folder, whole = tmp_path / "run", ClippedSum.whole
    run_experiment(private({"seeded": True}), observer=Silent())
    steps = {
        c: own["steps"] for c, own in read(folder, "summary.json")["privacy"]["clients"].items()
    }
    assert set(steps.values()) == {4}

    def nearly(self):
        found = whole(self)
        found[0] += self.clip * 2.0**-GRID
        return found

    monkeypatch.setattr(ClippedSum, "whole", nearly)
    resume_run(folder, from_round=1)
    again = read(folder, "summary.json")["privacy"]
    assert {c: own["steps"] for c, own in again["clients"].items()} == dict.fromkeys(steps, 6)
    ledger = RowLedger(folder / "privacy" / "000000.txt")
    assert len(ledger) == 6


@pytest.mark.slow
def test_workers_have_the_bits_of_one_process(private, tmp_path):
    seeded = private({"seeded": True}, output={"folder": str(tmp_path / "one")})
    run_experiment(seeded, observer=Silent())
    apart = private({"seeded": True}, output={"folder": str(tmp_path / "two")})
    run_experiment(apart, observer=Silent(), workers=2)
    assert weights(tmp_path / "two") == weights(tmp_path / "one")


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"method": {"name": "split"}}, "activations of rows travel"),
        ({"method": {"name": "fdlora"}}, "losses of rows, without noise"),
        ({"method": {"name": "pfedme"}}, "several steps on each batch"),
        ({"objective": {"name": "kto", "weights": "balanced"}}, "objective.desirable_weight"),
        ({"training": {"local_steps": None, "local_tokens": 99}}, "training.local_tokens"),
        ({"partition": {"feedback": "spread"}, "objective": {"name": "kto"}}, "two clients"),
        ({"adapter": {"kind": "experts"}}, "even use of experts"),
        ({"adapter": {"dropout": 0.1}}, "one stream for all rows"),
        ({"model": {"dropout": True}}, "model.dropout = true draws from one stream"),
        ({"training": {"precision": "bf16"}}, 'use "fp32"'),
        ({"simulation": {"devices": {"flops": "5TFLOP"}}}, "comes in time, without noise"),
    ],
)
def test_what_cannot_hide_rows_is_refused(private, sections, said):
    with pytest.raises(SettingsError) as refused:
        private(**sections)
    assert said in "\n".join(refused.value.problems)


def test_an_objective_that_says_nothing_is_refused_before_rows_are_tokenised(private):
    class Own(Objective):
        pass

    built = private({"seeded": True})
    with pytest.raises(SettingsError, match="Own cannot"):
        assemble(built, partition_data(built), objective=Own())


def test_units_are_values_of_a_column_and_delta_is_below_one_over_them(private):
    built = private({"seeded": True, "column": "domain"})
    division = partition_data(built)
    parts = assemble(built, division)
    for client, own in parts.row_privacies.items():
        values = {row.columns["domain"] for row in division.train[client]}
        assert own.count == len(values) > 1
        assert isinstance(division.train[client][0], Preference)
    said = " ".join(row_statement(built, own_steps(built, parts.row_privacies))["sentences"])
    assert "any one value of 'domain' at a client" in said
    missing = private({"seeded": True, "column": "patient"})
    with pytest.raises(DataError, match="'patient' is not in the data"):
        assemble(missing, partition_data(missing))
    large = private({"seeded": True, "delta": 0.1})
    with pytest.raises(SettingsError, match="not below 1 /"):
        assemble(large, partition_data(large))
    secret = private()
    with pytest.raises(SettingsError, match="no secret"):
        assemble(secret, partition_data(secret))


@pytest.mark.slow
def test_each_client_has_noise_enough_for_the_target():
    privacy = PrivacySettings(unit="row", delta=1e-3, target_epsilon=4.0, accountant="rdp")
    plans = {c: RowPlan(n, 4 / n, 2 * n) for c, n in enumerate((22, 23, 24, 60))}
    found = noise_multipliers(plans, privacy)
    spent = [
        epsilon([Releases(found[c], own.sampling, own.steps)], 1e-3, "rdp").epsilon
        for c, own in plans.items()
    ]
    assert found[0] == found[1] == found[2] > found[3]  # alike in size, and solved for together
    assert max(spent) <= 4.0 and np.mean(spent) > 3


def test_the_models_own_dropout_is_off(private, experiment, monkeypatch):
    """One stream draws it for all rows of a batch: a unit more would change the others' gradients."""
    switched = []
    monkeypatch.setattr(model_building, "switch_dropout_off", switched.append)
    for settings, times in (
        (experiment(objective={"name": "orpo"}), 0),
        (private(objective={"name": "orpo"}), 1),
    ):
        switched.clear()
        model_building.build_model(
            settings, make_objective(settings.objective), (), lambda text: None
        )
        assert len(switched) == times


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"source": "x.jsonl", "max_rows": 9}, r"data\.max_rows draws rows by how many"),
        (
            {"domains": {n: {"source": f"{n}.jsonl", "max_rows": 9} for n in "ab"}},
            r"data\.domains\.b\.max_rows draws",
        ),
        (
            {"domains": {n: {"source": f"{n}.jsonl", "weight": 2} for n in "ab"}},
            r"data\.domains\.a\.weight draws",
        ),
        ({"source": "x.jsonl", "decontaminate": "drop"}, r"data\.decontaminate = \"drop\" takes"),
    ],
)
def test_what_one_row_more_would_draw_others_by_is_refused(data, told):
    table = {"data": {"kind": "instruction", **data}, "objective": {"name": "sft"}}
    Experiment.from_table(table)
    with pytest.raises(SettingsError, match=told):
        Experiment.from_table({**table, "privacy": {"unit": "row", "delta": 1e-3}})
