"""Whole runs: what they leave, what they must equal, and what stops them before they start."""

import errno
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import fedloom
from fedloom.data.examples import Preference
from fedloom.data.loading import LoadedData
from fedloom.data.token_set import Untokenized
from fedloom.errors import (
    CheckpointError,
    DataError,
    Interrupted,
    ModelError,
    OutputError,
    RoundFailed,
    SettingsError,
)
from fedloom.experiment.experiment import Experiment
from fedloom.methods import METHODS
from fedloom.objectives import DPO, OBJECTIVES
from fedloom.runs.adapter_scores import evaluate_adapter
from fedloom.runs.observers import Silent
from fedloom.runs.partitioning import partition_data
from fedloom.runs.run import resume_run
from fedloom.storage import checkpoint
from sampling import drawn, every, tries


def sha(folder):
    return hashlib.sha256(
        (Path(folder) / "adapter/adapter_model.safetensors").read_bytes()
    ).hexdigest()


def lines(folder, name):
    return [json.loads(line) for line in (Path(folder) / name).read_text().splitlines()]


SETS = {
    "dpo": "builtin:preferences",
    "kto": "builtin:feedback",
    "ipo": "builtin:preferences",
    "simpo": "builtin:preferences",
    "orpo": "builtin:preferences",
    "robust_dpo": "builtin:preferences",
    "rpo": "builtin:preferences",
    "reward_model": "builtin:preferences",
    "apo_zero": "builtin:preferences",
    "apo_down": "builtin:preferences",
    "cpo": "builtin:preferences",
    "selector": "builtin:preferences",
    "bco": "builtin:feedback",
    "sft": "builtin:instructions",
    "classification": "builtin:labelled",
}


FEW = ("dpo", "kto", "sft", "classification")

SHARED_LOSS = {"distillation", "fed_et", "feddm", "split", "fedgrpo"}
"""Methods for losses that several parties share, and for generated answers; tests/methods has them."""

CLASSIC = ["centralised", "local_only"]
OTHERS = sorted(METHODS.keys() - SHARED_LOSS - {"fedavg", *CLASSIC})
TURNS = [("fedavg", name) for name in SETS] + [
    pytest.param(method, name, marks=[pytest.mark.slow] if (place + turn) % 3 else [])
    for place, method in enumerate(CLASSIC + OTHERS)
    for turn, name in enumerate(SETS if method in CLASSIC else FEW)
    if name != "classification" or method not in ("fedpdpo", "fedamole", "fedlease", "fedmoe")
]
"""Of all but FedAvg every third pair is quick, so that each method runs under one objective or more."""

ADAPTERS = {
    "fedamole": {"kind": "experts", "rank": 2, "experts": 4},
    "fedlease": {"kind": "experts", "rank": 2, "experts": 3, "router": "linear"},
    "ravan": {"rank": 4},
    "hilora": {"rank": 3},
}
"""What a method needs that does not do with LoRA."""


@pytest.fixture
def suited(table, mixture_folder):
    """Make an experiment with the adapter, and the backbone, that a method needs."""

    def make(method, **sections):
        own = {**table, "adapter": {**table["adapter"], **ADAPTERS.get(method, {})}}
        if method == "fedmoe":
            own |= {"adapter": {"kind": "submixture"}, "model": {"path": str(mixture_folder)}}
        named = {"name": method} | (
            {"selectors": 1} if method == "fedbiscuit" else {}
        )  # in two rounds
        return Experiment.from_table({**own, "method": named, **sections})

    return make


@pytest.mark.parametrize(("method", "name"), TURNS)
def test_every_objective_runs_under_every_method(suited, name, method):
    data = {"source": SETS[name], "builtin_rows": 30}
    training = {"learning_rate": 1e-3, "batch_size": 4}
    result = fedloom.run(suited(method, objective={"name": name}, data=data, training=training))
    assert set(result.metrics) == set(result.metrics_before)
    assert all(np.isfinite(value) for value in result.metrics.values())
    assert (result.adapter_path is None) == (
        method in ("local_only", "fedamole", "fedlease", "fedmoe")
    )
    summary = json.loads((result.folder / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["rounds"] == 2
    assert [record["round"] for record in lines(result.folder, "rounds.jsonl")] == [0, 1, 2]


def test_a_run_leaves_its_folder_and_can_be_repeated_from_it(experiment, tmp_path):
    result = fedloom.run(experiment(evaluation={"samples": 2, "max_new_tokens": 2}))
    names = {path.name for path in result.folder.iterdir()}
    assert names == {
        ".lock", "adapter", "audit.jsonl", "checkpoints", "costs.jsonl", "experiment.toml", "partition.json", "rounds.jsonl",
        "run.json", "samples.json", "summary.json",
    }  # fmt: skip
    again = Experiment.from_toml(
        result.folder / "experiment.toml", [f"output.folder={tmp_path / 'again'}"]
    )
    assert sha(fedloom.run(again).folder) == sha(result.folder)
    run = json.loads((result.folder / "run.json").read_text())
    assert run["versions"]["torch"] == torch.__version__ and run["seed"] == 0
    assert len(json.loads((result.folder / "samples.json").read_text())) == 2


@pytest.mark.slow
def test_another_seed_gives_another_adapter(experiment, tmp_path):
    first = fedloom.run(experiment())
    other = fedloom.run(experiment(federation={"seed": 1}, output={"folder": str(tmp_path / "b")}))
    assert sha(first.folder) != sha(other.folder)


@pytest.mark.parametrize("name", SETS)
def test_one_client_equals_centralised_bit_for_bit(experiment, tmp_path, name):
    def final(method, folder):
        built = experiment(
            objective={"name": name},
            data={"source": SETS[name], "builtin_rows": 40},
            federation={"clients": 1},
            adapter={"dropout": 0.1},
            method={"name": method},
            output={"folder": str(tmp_path / folder)},
        )
        return sha(fedloom.run(built).folder)

    assert final("fedavg", "a") == final("centralised", "b")


def test_the_adapter_loads_with_peft_and_scores_the_same(experiment):
    built = experiment(federation={"rounds": 1})
    result = fedloom.run(built)
    assert evaluate_adapter(built, result.adapter_path).metrics == dict(result.metrics)
    assert evaluate_adapter(built, None).metrics == dict(result.metrics_before)
    base = AutoModelForCausalLM.from_pretrained(built.model.path)
    assert (
        peft.PeftModel.from_pretrained(base, str(result.adapter_path)).peft_config["default"].r == 2
    )


def test_a_classifier_loads_with_peft_and_scores_the_same(experiment):
    built = experiment(objective={"name": "classification"}, data={"source": "builtin:labelled"})
    result = fedloom.run(built)
    assert evaluate_adapter(built, result.adapter_path).metrics == dict(result.metrics)
    base = AutoModelForSequenceClassification.from_pretrained(built.model.path, num_labels=8)
    peft.PeftModel.from_pretrained(base, str(result.adapter_path))


def test_measured_bytes_equal_the_formula(experiment):
    """FedLLM: P (b_u + b_d) for each client and round (specs/performance.md), to 0.1 % + 1 KB."""
    result = fedloom.run(experiment(adapter={"rank": 8}))
    hidden, ff, layers, rank = 32, 64, 2, 8
    shapes = [(hidden, hidden)] * 4 + [(hidden, ff)] * 2 + [(ff, hidden)]
    parameters = layers * sum(rank * (i + o) for i, o in shapes)
    for cost in lines(result.folder, "costs.jsonl"):
        if cost["phase"] == "train":
            formula = parameters * (4 + 4)
            assert abs(cost["bytes_down"] + cost["bytes_up"] - formula) <= 0.001 * formula + 1024


def test_local_only_sends_numbers_and_no_tensors(experiment):
    result = fedloom.run(experiment(method={"name": "local_only"}))
    for cost in lines(result.folder, "costs.jsonl"):
        assert cost["bytes_down"] < 400 and cost["bytes_up"] < 1000
    assert sorted(p.name for p in (result.folder / "clients").iterdir()) == ["0000", "0001", "0002"]


def test_partial_participation_and_evaluation_every_n_rounds(experiment):
    result = fedloom.run(
        experiment(federation={"rounds": 5, "clients_per_round": 2}, evaluation={"every": 2})
    )
    records = lines(result.folder, "rounds.jsonl")
    assert [bool(r["evaluation"]) for r in records] == [True, False, True, False, True, True]
    assert all(len(r["clients"]) == 2 for r in records[1:])
    assert records[-1]["evaluation"]["clients"]["worst"]["preference_accuracy"] <= 1


@pytest.mark.parametrize("method", every(3, sorted(METHODS.keys() - SHARED_LOSS)))
def test_every_method_is_judged_on_every_clients_own_rows(suited, method):
    few = {"data": {"builtin_rows": 30, "source": "builtin:preferences"}}
    result = fedloom.run(suited(method, **few))
    for record in lines(result.folder, "rounds.jsonl"):
        each = record["evaluation"]["clients"]["each"]
        assert list(each) == ["0", "1", "2"] and all(m["examples"] >= 1 for m in each.values())
        accuracies = [metrics["preference_accuracy"] for metrics in each.values()]
        clients = record["evaluation"]["clients"]
        assert clients["worst"]["preference_accuracy"] == min(accuracies)
        assert clients["mean"]["preference_accuracy"] == pytest.approx(np.mean(accuracies))
        assert clients["spread"]["preference_accuracy"] == pytest.approx(np.std(accuracies))


def test_pairs_are_unrolled_for_kto_and_judged_as_pairs(experiment):
    result = fedloom.run(experiment(objective={"name": "kto"}))
    assert "preference_accuracy" in result.metrics
    run = json.loads((result.folder / "run.json").read_text())
    partition = json.loads((result.folder / "partition.json").read_text())
    pairs = run["data"]["feedback"]["pairs"]
    assert run["data"]["train"] == sum(c["train"] for c in partition["clients"]) == 2 * pairs
    assert run["data"]["feedback"]["intact_share"] == 1.0


@pytest.mark.slow
def test_answers_spread_over_clients_break_pairs_and_keep_sizes(experiment, tmp_path):
    def deal(feedback):
        folder = tmp_path / feedback
        partition = {"feedback": feedback, "kind": "size", "sizes": [1.0, 2.0, 3.0]}
        result = fedloom.run(
            experiment(
                objective={"name": "kto", "weights": "balanced"},
                partition=partition,
                output={"folder": str(folder)},
            )
        )
        run = json.loads((folder / "run.json").read_text())["data"]["feedback"]
        shares = json.loads((folder / "partition.json").read_text())["clients"]
        return run, [client["train"] for client in shares], result

    together, sizes, ktoo = deal("together")
    spread, spread_sizes, ktor = deal("spread")
    assert spread_sizes == sizes and spread["rows"] == together["rows"]
    assert spread["desirable"] == together["desirable"] == spread["pairs"]
    assert together["intact_share"] == 1.0
    assert abs(spread["intact_share"] - spread["expected_intact_share_if_spread"]) < 0.25
    assert spread["expected_intact_share_if_spread"] == pytest.approx(0.38, abs=0.05)  # (1+4+9)/36
    assert dict(ktoo.metrics).keys() == dict(ktor.metrics).keys() and ktoo.metrics != ktor.metrics


class Watching(Silent):
    def __init__(self):
        self.warnings = []

    def warning(self, text):
        self.warnings.append(text)


def test_a_round_of_one_class_and_a_client_of_one_row_are_flagged(experiment, rows_file, tmp_path):
    rows = [{"prompt": f"q{i}", "completion": f" a{i}", "label": False} for i in range(12)]
    pairs = [{"prompt": f"p{i}", "chosen": f" yes{i}", "rejected": f" no{i}"} for i in range(9)]
    watching = Watching()
    result = fedloom.run(
        experiment(
            objective={"name": "kto", "weights": "balanced"},
            data={
                "source": rows_file(rows),
                "kind": "feedback",
                "test_source": rows_file(pairs, "pairs.jsonl"),
                "test_kind": "preference",
            },
            partition={"kind": "size", "sizes": [1.0, 5.0, 6.0], "client_test_fraction": 0.0},
        ),
        observer=watching,
    )
    assert "preference_accuracy" in result.metrics  # pairs judge what single answers taught
    record = lines(result.folder, "rounds.jsonl")[1]
    assert record["train"]["single_class"] == 1.0 and record["train"]["desirable_share"] == 0.0
    assert record["client_train"]["0"]["without_kl"] == 1.0  # one row has no mismatched completion
    assert record["client_train"]["1"]["without_kl"] == 0.0
    assert all(np.isfinite(v) for v in record["train"].values())
    assert watching.warnings == [
        f"round {n}: every row trained on was undesirable; KTO sees one side only" for n in (1, 2)
    ]


def test_incomplete_pairs_are_dropped_and_counted_or_become_feedback(
    experiment, rows_file, tmp_path
):
    rows = [{"prompt": f"p{i}", "chosen": f" yes{i}", "rejected": f" no{i}"} for i in range(40)]
    rows += [{"prompt": "x", "chosen": " same", "rejected": " same"}] * 2
    rows += [{"prompt": "y", "chosen": None, "rejected": " bad"}] * 3
    rows += [{"prompt": "z", "chosen": " good"}] * 4
    data = {"source": rows_file(rows), "kind": "preference"}
    fedloom.run(experiment(data=data, output={"folder": str(tmp_path / "dropped")}))
    run = json.loads((tmp_path / "dropped/run.json").read_text())["data"]
    assert run["dropped"] == {
        "chosen equals rejected": 2,
        "chosen missing": 3,
        "rejected missing": 4,
    }
    fedloom.run(
        experiment(
            objective={"name": "kto"},
            data={**data, "incomplete_pairs": "feedback"},
            output={"folder": str(tmp_path / "used")},
        )
    )
    used = json.loads((tmp_path / "used/run.json").read_text())["data"]
    assert used["dropped"] == {}
    held = used["client_held_out"] + used["global_held_out"]
    assert used["train"] == 2 * (40 - held) + 2 * 2 + 3 + 4  # whatever is held out is a whole pair


class Poisoned(DPO):
    """DPO whose loss is NaN on one row."""

    def __init__(self, row):
        super().__init__()
        self.row = row

    def loss(self, model, batch, statistics):
        loss, metrics = super().loss(model, batch, statistics)
        return (loss * float("nan") if self.row in batch.rows else loss), metrics


class Watcher(Silent):
    def __init__(self):
        self.warnings, self.rounds = [], []

    def warning(self, text):
        self.warnings.append(text)

    def round_done(self, record):
        self.rounds.append(record.round)


def test_a_client_with_a_nan_loss_is_named_and_the_round_goes_on(experiment):
    built = experiment()
    row = trained_row(built)
    watcher = Watcher()
    result = fedloom.run(built, objective=Poisoned(row), observer=watcher)
    records = lines(result.folder, "rounds.jsonl")
    rejected = [item for record in records for item in record["rejected"]]
    assert len({item["client"] for item in rejected}) == 1 and len(rejected) == 2
    assert (
        "the loss is nan at local step" in rejected[0]["reason"]
        and str(row) in rejected[0]["reason"]
    )
    assert watcher.warnings and all(np.isfinite(v) for v in result.metrics.values())


def trained_row(built):
    """The number of a row that somebody trains on."""
    return partition_data(built).train[1][0].row


def test_whatever_breaks_on_a_client_leaves_that_client_out(experiment):
    row = trained_row(experiment())

    class Fragile(DPO):
        def loss(self, model, batch, statistics):
            if row in batch.rows:
                raise ValueError("row 17 is too much")
            return super().loss(model, batch, statistics)

    watcher = Watcher()
    result = fedloom.run(experiment(), objective=Fragile(), observer=watcher)
    records = lines(result.folder, "rounds.jsonl")
    reasons = [item["reason"] for record in records for item in record["rejected"]]
    assert reasons == ["ValueError: row 17 is too much"] * 2 and len(watcher.warnings) == 2


def test_when_every_client_fails_the_run_stops_and_keeps_what_it_had(experiment):
    class Broken(DPO):
        def loss(self, model, batch, statistics):
            loss, metrics = super().loss(model, batch, statistics)
            return loss * float("inf"), metrics

    with pytest.raises(RoundFailed, match="0 of 3 clients gave a usable answer"):
        fedloom.run(experiment(), objective=Broken(), observer=Watcher())
    folder = Path(experiment().output.folder)
    assert (folder / "checkpoints" / "round-0000").is_dir()


class OwnSource:
    """A user's data, passed as an object."""

    def load(self, rng):
        rows = [Preference(i, f"q{i}", f" good {rng.integers(9)}", f" bad {i}") for i in range(40)]
        return LoadedData(rows[:30], rows[30:], "preference", "own")


def test_own_data_and_own_objective_need_no_change_to_the_package(experiment):
    result = fedloom.run(experiment(), data=OwnSource(), objective=DPO())
    partition = json.loads((result.folder / "partition.json").read_text())
    assert sum(c["train"] + c["held_out"] for c in partition["clients"]) == 30


def test_a_tensorboard_file_is_written_when_asked(experiment):
    result = fedloom.run(experiment(output={"trackers": ["tensorboard"]}))
    assert list((result.folder / "events").iterdir())


WORK = ("bytes_down", "bytes_up", "flops", "tokens", "targets", "examples", "steps", "exchanges")

# --- resuming ---------------------------------------------------------------------------------


class Stop(Silent):
    """Presses Ctrl-C after a number of answers."""

    def __init__(self, after):
        self.after = after

    def client_done(self, round, client, done, of):
        self.after -= 1
        if self.after == 0:
            raise KeyboardInterrupt


class Fail(Silent):
    """Ends the run when a round's last answer has come."""

    def __init__(self, round, error):
        self.round, self.error = round, error

    def client_done(self, round, client, done, of):
        if round == self.round and done == of:
            raise self.error


@pytest.mark.parametrize("error", [SystemExit(), RoundFailed("no quorum"), KeyboardInterrupt()])
@pytest.mark.slow
def test_whatever_ends_a_run_its_last_whole_round_is_saved(experiment, tmp_path, once, error):
    settings = {"federation": {"rounds": 4}, "data": {"builtin_rows": 30}}
    whole = once("four rounds", lambda: fedloom.run(experiment(**settings)))
    folder = tmp_path / "ended"
    built = experiment(**settings, output={"folder": str(folder), "checkpoint_every": 4})
    with pytest.raises(Interrupted if isinstance(error, KeyboardInterrupt) else type(error)):
        fedloom.run(built, observer=Fail(3, error))
    assert sorted(path.name for path in (folder / "checkpoints").iterdir())[-1] == "round-0002"
    assert sha(resume_run(folder).folder) == sha(whole.folder)


@pytest.mark.slow
def test_a_round_of_which_a_part_is_written_is_not_saved(experiment, tmp_path, monkeypatch):
    folder = tmp_path / "ended"
    settings = {"federation": {"rounds": 4}, "method": {"name": "scaffold"}}
    built = experiment(**settings, output={"folder": str(folder), "checkpoint_every": 4})
    whole = fedloom.run(experiment(**settings))
    real = fedloom.runs.run.round_record

    def full(record, headline, title):
        if record.round == 3:
            raise OutputError("the disk is full")
        return real(record, headline, title)

    with monkeypatch.context() as broken:
        broken.setattr("fedloom.runs.run.round_record", full)
        with pytest.raises(OutputError):
            fedloom.run(built)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir())[-1] == "round-0002"
    assert sha(resume_run(folder).folder) == sha(whole.folder)


def test_who_stops_a_resumed_run_at_once_is_told_what_is_saved(experiment, tmp_path):
    folder = tmp_path / "ended"
    built = experiment(federation={"rounds": 3}, output={"folder": str(folder)})
    with pytest.raises(Interrupted, match="everything up to round 1 is saved"):
        fedloom.run(built, observer=Fail(2, KeyboardInterrupt()))
    with pytest.raises(Interrupted, match="everything up to round 1 is saved"):
        resume_run(folder, observer=Fail(2, KeyboardInterrupt()))


@pytest.mark.parametrize(
    "method",
    [
        "fedavg",
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in (
                *("scaffold", "local_only", "fedyogi", "fedex_lora"),
                *("fed_sb", "fedkseed", "random_projection"),
                *("feddyn", "moon", "fedptr", "apfl", "fedala"),
                *("regmean", "lora_fair", "fedawa", "fedmap", "fedbiscuit"),
            )
        ),
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted(experiment, tmp_path, method):
    settings = {
        "method": {"name": method},
        "federation": {"rounds": 3, "clients_per_round": 2},
        "data": {"builtin_rows": 30},
        "training": {"keep_optimizer_state": method != "fedkseed"},
    }
    whole = fedloom.run(experiment(**settings))
    for after in (1, 3, 4, 6):
        broken = tmp_path / f"broken-{after}"
        built = experiment(**settings, output={"folder": str(broken), "checkpoint_every": 2})
        with pytest.raises(Interrupted, match=f"fedloom run --resume {broken}"):
            fedloom.run(built, observer=Stop(after))
        result = resume_run(broken)
        if method != "local_only":
            assert sha(result.folder) == sha(whole.folder)
        assert result.metrics == whole.metrics
        for left, right in zip(
            lines(whole.folder, "rounds.jsonl"), lines(broken, "rounds.jsonl"), strict=True
        ):
            # Time differs, and a resumed run's evaluation scores the reference model once more.
            assert {**left, "seconds": 0, "flops": 0} == {**right, "seconds": 0, "flops": 0}
        assert {n: result.costs[n] for n in WORK} == {n: whole.costs[n] for n in WORK}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "dpo"])
def test_any_objective_interrupted_and_resumed_equals_uninterrupted(experiment, tmp_path, name):
    own = {"group": 3, "max_new_tokens": 4, "iterations": 2, "beta": 0.1} if name == "grpo" else {}
    if name == "rejection_sampling":
        own = {"group": 3, "max_new_tokens": 4}
    others = {
        "pdpo": SETS["dpo"],
        "pkto": SETS["kto"],
        "grpo": SETS["sft"],
        "rejection_sampling": SETS["sft"],
    }
    if name in ("grpo", "rejection_sampling"):
        own["rewards"] = ["regex:[a-m]"]
    settings = {
        "objective": {"name": name, **own},
        "data": {
            "source": {**SETS, **others}[name],
            "builtin_rows": 30,
        },
        "training": {"tokens_per_pass": 150, "batch_size": 8},
    }
    whole = fedloom.run(experiment(**settings))
    broken = tmp_path / "broken"
    built = experiment(**settings, output={"folder": str(broken)})
    with pytest.raises(Interrupted):
        fedloom.run(built, observer=Stop(2))
    assert sha(resume_run(broken).folder) == sha(whole.folder)


def test_resuming_a_finished_run_changes_nothing(experiment):
    result = fedloom.run(experiment())
    before = sha(result.folder)
    assert sha(resume_run(result.folder).folder) == before


def test_resuming_as_another_experiment_names_the_difference(experiment, tmp_path):
    built = experiment()
    result = fedloom.run(built)
    other = tmp_path / "other.toml"
    other.write_text(experiment(training={"learning_rate": 5e-3}).to_toml())
    with pytest.raises(
        CheckpointError, match=r"training\.learning_rate is 0\.005, the run in .* has 0\.001"
    ):
        resume_run(result.folder, other)
    same = tmp_path / "same.toml"
    same.write_text(built.to_toml())
    assert resume_run(result.folder, same).metrics == result.metrics


def test_an_edited_folder_is_refused_by_the_fingerprint(experiment):
    result = fedloom.run(experiment())
    file = result.folder / "experiment.toml"
    file.write_text(file.read_text().replace("seed = 0", "seed = 9"))
    with pytest.raises(CheckpointError, match="belongs to another experiment"):
        resume_run(result.folder)


def test_a_changed_model_is_refused(experiment, tmp_path, model_folder):
    import shutil

    copy = shutil.copytree(model_folder, tmp_path / "model")
    result = fedloom.run(experiment(model={"path": str(copy)}))
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-2] ^= 1
    (copy / "model.safetensors").write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="has changed since"):
        resume_run(result.folder)


def test_a_truncated_checkpoint_is_refused_and_the_one_before_continues(experiment):
    result = fedloom.run(experiment())
    before = sha(result.folder)
    file = result.folder / "checkpoints/round-0002/state.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="--from-round 1"):
        resume_run(result.folder)
    assert sha(resume_run(result.folder, from_round=1).folder) == before


def test_what_is_no_run_folder(tmp_path):
    with pytest.raises(OutputError, match="no run folder at"):
        resume_run(tmp_path / "nothing")
    with pytest.raises(OutputError, match=r"has no experiment\.toml"):
        resume_run(tmp_path)


def test_a_full_disk_stops_cleanly_and_the_run_can_go_on(experiment, monkeypatch):
    built = experiment(federation={"rounds": 3})
    save = checkpoint.save

    def full(folder, state, *others):
        if state.round == 2:
            raise OutputError(f"cannot save the checkpoint {folder}: {os.strerror(errno.ENOSPC)}")
        return save(folder, state, *others)

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(OutputError, match="No space left on device"):
        fedloom.run(built)
    monkeypatch.undo()
    assert resume_run(Path(built.output.folder)).metrics


# --- bad input --------------------------------------------------------------------------------


def test_an_unwritable_output_is_said_before_anything_is_loaded(experiment, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot make the run folder"):
        fedloom.run(experiment(output={"folder": str(tmp_path / "file" / "run")}))


def test_an_unwritable_cache_names_the_variable_that_moves_it(experiment, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDLOOM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OutputError, match="set the variable FEDLOOM_CACHE"):
        fedloom.run(experiment(model={"path": "tiny"}))


def test_a_folder_that_holds_something_is_not_touched(experiment, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("keep")
    with pytest.raises(OutputError, match="is not empty"):
        fedloom.run(experiment())
    assert (tmp_path / "run" / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize(
    ("sections", "error", "message"),
    [
        ({"federation": {"clients": 100}}, DataError, "more than the 48 training rows"),
        (
            {"data": {"source": "builtin:preference"}},
            DataError,
            "did you mean 'builtin:preferences'",
        ),
        ({"data": {"source": "gone.jsonl", "kind": "preference"}}, DataError, "not found"),
        ({"model": {"path": "./gone"}}, ModelError, "is not a folder"),
        ({"adapter": {"targets": ["query"]}}, ModelError, "it has: .*q_proj"),
        ({"training": {"device": "warp"}}, ModelError, "training.device 'warp'"),
        (
            {"partition": {"kind": "column", "column": "planet"}},
            DataError,
            "there are: axis, domain",
        ),
    ],
)
def test_bad_input_is_one_error_and_leaves_nothing(experiment, sections, error, message):
    built = experiment(**sections)
    with pytest.raises(error, match=message):
        fedloom.run(built)
    assert not Path(built.output.folder).exists()


def test_a_client_without_a_row_left_is_named(experiment, rows_file):
    rows = [{"prompt": "p", "completion": f"c {i}", "site": str(i % 3)} for i in range(30)]
    source = rows_file(rows)
    built = experiment(
        data={"source": source, "kind": "instruction"},
        objective={"name": "sft"},
        partition={"kind": "column", "column": "site"},
    )

    from fedloom.runs import token_rows

    tokenize = token_rows.tokenize

    def lose_one_client(rows, *rest, **settings):
        tokens = tokenize(rows, *rest, **settings)
        sites = [row.columns["site"] for row in rows]
        lost = [i for i, site in enumerate(sites) if site == "1" or sites[: i + 1] == ["0"]]
        dropped = tuple(Untokenized(i, rows[i].row, f"lost at {sites[i]}") for i in lost)
        kept = tokens.take(np.array([i for i in range(len(tokens)) if i not in lost]))
        return replace(kept, dropped=dropped)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_rows, "tokenize", lose_one_client)
        with pytest.raises(DataError) as caught:
            fedloom.run(built)
    assert re.search(  # of what others lost, nothing
        r"client 1 has no row left after tokenising \(\{'lost at 1': \d+\}\); raise",
        str(caught.value),
    )


def test_all_mistakes_of_an_experiment_are_listed_at_once(tmp_path):
    file = tmp_path / "x.toml"
    file.write_text(
        """
        [federaton]
        rounds = 3
        [federation]
        rouns = 3
        clients = "four"
        [objective]
        name = "dop"
        [training]
        optimizer = "adamx"
        [adapter]
        rank = 0
        """
    )
    with pytest.raises(SettingsError) as caught:
        Experiment.from_toml(file)
    text = str(caught.value)
    assert "has 6 mistakes" in text
    for part in (
        "[federaton]: unknown section; did you mean 'federation'?",
        "federation.rouns: unknown key; did you mean 'rounds'?",
        "federation.clients = 'four'",
        "objective.name = 'dop': did you mean 'dpo'? allowed: apo_down, apo_zero, bco, classification, cpo, dpo, grpo, ipo, kto, orpo, pdpo, pkto, rejection_sampling, reward_model, robust_dpo, rpo, selector, sft, simpo",
        "training.optimizer = 'adamx': did you mean 'adam'? allowed: adafactor, adam, adamw, adamw_8bit, lion, muon, sgd",
        "adapter.rank = 0",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"federation": {"clients_per_round": 9}},
            "clients_per_round = 9 is above federation.clients = 3",
        ),
        (
            {"training": {"local_steps": 3, "local_epochs": 1}},
            "give local_epochs or local_steps, not both",
        ),
        ({"training": {"micro_batch_size": 16}}, "is above training.batch_size = 8"),
        ({"training": {"micro_batch_size": 3, "accumulation": 3}}, "is not batch_size 8"),
        (
            {"training": {"warmup_rounds": 4}, "federation": {"rounds": 4}},
            "warmup_rounds = 4 leaves none of 4 rounds",
        ),
        ({"training": {"min_learning_rate": 1.0}}, "min_learning_rate = 1.0 is above"),
        ({"training": {"learning_rate": float("nan")}}, "training.learning_rate = nan"),
        ({"training": {"learning_rate": float("inf")}}, "training.learning_rate = inf"),
        ({"training": {"momentum": 0.5}}, "momentum is of sgd; adamw has beta1"),
        ({"objective": {"name": "sft"}}, "for it use objective.name = dpo or robust_dpo"),
        ({"data": {"source": "x.jsonl"}}, "data.kind is missing"),
        ({"data": {"kind": "labelled"}}, "holds preference examples"),
        ({"partition": {"kind": "dirichlet"}}, "needs partition.column"),
        (
            {"objective": {"name": "dpo", "desirable_weight": 1.0}},
            "objective.desirable_weight is a setting of kto and pkto; objective.name is 'dpo'",
        ),
        (
            {"method": {"name": "fedavg", "mu": 0.1}},
            "method.mu is a setting of fedprox and fednova and moon; method.name is 'fedavg'",
        ),
        (
            {"method": {"name": "scaffold", "beta2": 0.9}},
            "method.beta2 is a setting of fedadam and fedyogi; method.name is 'scaffold'",
        ),
        (
            {"objective": {"name": "kto", "weights": "balanced", "desirable_weight": 2.0}},
            'weights = "balanced" sets both weights by itself; leave out desirable_weight',
        ),
        (
            {"objective": {"name": "dpo"}, "partition": {"feedback": "spread"}},
            "needs them together; use kto or bco",
        ),
        (
            {
                "objective": {"name": "kto"},
                "partition": {"feedback": "spread"},
                "federation": {"clients": 1},
            },
            "deals answers over clients, federation.clients is 1",
        ),
        (
            {
                "objective": {"name": "kto"},
                "partition": {"feedback": "spread"},
                "data": {"source": "builtin:feedback"},
            },
            "is for pairs; the data holds single answers",
        ),
        ({"data": {"incomplete_pairs": "feedback"}}, "cannot train on"),
        ({"data": {"source": []}}, "data.source is an empty list"),
        ({"data": {"test_kind": "feedback"}}, "data.test_kind needs data.test_source"),
        ({"method": {"name": "fedprox", "muu": 0.1}}, "did you mean 'mu'?"),
        (
            {"training": {"local_tokens": 5, "total_epochs": 3.0}},
            "training: give local_tokens or total_epochs, not both",
        ),
    ],
)
def test_contradictions(experiment, sections, message):
    with pytest.raises(SettingsError) as caught:
        experiment(**sections)
    assert message in str(caught.value)


def test_an_experiment_survives_toml(experiment):
    built = experiment(
        training={"max_grad_norm": 0.0, "local_steps": 4}, adapter={"targets": ["q_proj"]}
    )
    import tomllib

    assert Experiment.from_table(tomllib.loads(built.to_toml())) == built


# --- real processes ---------------------------------------------------------------------------


def start(arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "fedloom", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    )


def test_what_killed_writers_left_is_swept_and_nothing_else(experiment, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".experiment.toml.7").write_text("[mod")
    fedloom.run(experiment())
    (folder / ".rounds.jsonl.7").write_text("{")
    (folder / ".mine").write_text("mine")
    (folder / "checkpoints" / ".round-0001.7").mkdir()
    resume_run(folder, from_round=1)
    assert sorted(path.name for path in folder.glob(".*")) == [".lock", ".mine"]
    assert not list((folder / "checkpoints").glob(".*"))
    other = tmp_path / "other"
    other.mkdir()
    (other / ".notes.7").write_text("mine")
    with pytest.raises(OutputError, match="is not empty"):
        fedloom.run(experiment(output={"folder": str(other)}))


@pytest.mark.parametrize("enough", tries(3, 20))
def test_kill_minus_9_at_random_moments(experiment, tmp_path, enough):
    """Killed and resumed until it ends, so often in all, the bytes are those of one quiet run."""
    settings = {"federation": {"rounds": 6}, "training": {"local_epochs": 4}}
    file = tmp_path / "x.toml"
    file.write_text(experiment(**settings).to_toml())
    start(["run", file, "--set", f"output.folder={tmp_path / 'quiet'}"]).communicate()
    expected = sha(tmp_path / "quiet")
    rng, kills = drawn("kill -9"), 0
    while kills < enough:
        folder = tmp_path / f"run-{kills}"
        words = ["run", file, "--set", f"output.folder={folder}"]
        while not (folder / "summary.json").exists():
            with start(words) as process:
                if kills < enough:
                    for _ in range(rng.randint(1, 4)):  # it says a line a round
                        process.stdout.readline()
                    time.sleep(rng.uniform(0, 0.5))
                    process.kill()
                process.communicate()
            kills += process.returncode == -signal.SIGKILL
            assert process.returncode in (0, -signal.SIGKILL)
            if (folder / "experiment.toml").exists():
                words = ["run", "--resume", folder]
        assert sha(folder) == expected
