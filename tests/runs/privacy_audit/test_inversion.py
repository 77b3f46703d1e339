"""Gradient inversion of real updates: gradients are the client's own, and a short row is found whole."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedloom.evaluation.privacy_audit.sequences import ROUGE
from fedloom.reports.privacy_audit_page import render, summary
from fedloom.runs.observers import Silent
from fedloom.runs.privacy_audit import inversion
from fedloom.runs.privacy_audit.audit import audit_experiment
from fedloom.runs.privacy_audit.interception import InterceptingEngine, Reads
from fedloom.runs.privacy_audit.inversion import compared, inversion_record
from fedloom.runs.privacy_audit.simulated_rows import SimulatedRows
from fedloom.runs.privacy_audit.tokens import PlantedRun
from fedloom.runs.run import run_experiment

ROWS = {
    "data": {"source": "builtin:instructions", "max_length": 6},
    "objective": {"name": "sft"},
    "evaluation": {"samples": 0, "per_client": False},
}
ONE_STEP = {"batch_size": 1, "local_steps": 1, "max_grad_norm": 0.0}


def test_rows_end_with_the_last_predicted_token():
    """Two rows that differ in the last predicted token alone, and one that was not read; in order."""
    rows = [[5, 6, 8, 1], [5, 6, 7, 1], [3, 4], [9, 9, 2]]
    learnt = [[False, True, True, False]] * 2 + [[True, False], [False, True, True]]
    tokens = SimpleNamespace(
        width=1,
        tokens=np.concatenate(rows),
        starts=np.array([0, 4, 8, 10, 13]),
        trained=np.concatenate(learnt),
    )
    local = SimpleNamespace(shares={0: SimpleNamespace(tokens=tokens)})
    lines = [np.array([0, *rows[1]]), np.array([*rows[0], 0]), np.array(rows[2])]
    read = Reads({5, 6, 7, 8, 1}, dict.fromkeys(own.tobytes() for own in lines))
    assert InterceptingEngine(None, local, set())._learnt(0, read) == (
        ((5, 6, 7), (False, True, True)),
        ((5, 6, 8), (False, True, True)),
    )


def test_what_was_found_by_hand(monkeypatch):
    """Two of three tokens in either row's places; of 6 distinct ones 5, and 2 of the 6 commonest."""
    monkeypatch.setattr(inversion, "rouge", lambda found, truth: None)  # takes seconds to import
    truth, found = [(1, 2, 3), (4, 5, 6)], [(4, 5, 9), (1, 2, 6)]
    common = {1: 9.0, 2: 8.0, 10: 7.0, 11: 6.0, 12: 5.0, 13: 4.0, 3: 1.0}
    own = compared(found, truth, common)
    assert (own["tokens"], own["share"], own["guessed_share"]) == (6, 5 / 6, 2 / 6)
    assert own["places"] == 4 / 6
    assert {own[name] for name in ROUGE} == {None}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_short_row_is_found_whole(experiment, optimizer):
    """One step on a row of 6 tokens: the true row's simulated update is that which was sent."""
    rates = {"sgd": 0.5, "adamw": 1e-2}
    own = experiment(
        **ROWS,
        adapter={"rank": 4},
        federation={"rounds": 2, "clients": 2},
        training={**ONE_STEP, "optimizer": optimizer, "learning_rate": rates[optimizer]},
    )
    folder = audit_experiment(own, rounds=None, canaries=0, observer=Silent(), inversions=1)
    record = json.loads((folder.path / "audit.json").read_text())
    found = record["inversion"]
    (line,) = found["updates"]
    assert found["made"] and found["leak"] and line["round"] == 2
    assert line["distance_of_truth"] < 1e-2  # of what is read back from Adam's step 3e-3
    assert line["share"] > 0.8 > line["guessed_share"] and line["places"] > 0.8
    assert any(
        "Gradient inversion of 1 updates" in own and own.endswith("LEAK") for own in summary(record)
    )
    assert "of the true rows" in render(record)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"training": {"optimizer": "muon"}}, "simulates sgd, adam and adamw"),
        ({"training": {"optimizer": "sgd", "momentum": 0.5}}, "training.momentum"),
        ({"objective": {"name": "dpo"}, "data": {}}, 'objective.name is "dpo"'),
        ({"privacy": {"secure_aggregation": True}}, "sums of updates"),
    ],
)
def test_what_is_not_simulated_says_why(experiment, sections, words):
    """Before anything is looked at; and 0 updates are none."""
    planted = PlantedRun(experiment(**{**ROWS, **sections}), 0)
    planted.engine = object()
    assert words in inversion_record(planted, 1)["why"]
    assert "--inversions 0" in inversion_record(planted, 0)["why"]


def test_gradients_of_tries_are_the_model_s(experiment):
    """Several rows in one pass have the gradients that each has alone, where not all is predicted."""
    own = experiment(**ROWS, federation={"rounds": 1, "clients": 1}, training=ONE_STEP)
    planted = PlantedRun(own, 0)
    run_experiment(own, observer=Silent(), auditor=planted)
    model = planted.parts.local.resources[0].model
    simulated = SimulatedRows(model, list(model.parameters))
    tokens, learnt = torch.tensor([[5, 9, 7, 4], [6, 6, 8, 3]]), (False, False, True, True)
    found = simulated.of_tokens(tokens, learnt)
    for place, row in enumerate(tokens):
        logits = model(
            input_ids=row[None], attention_mask=torch.ones(1, 4, dtype=torch.long)
        ).logits
        scores = logits[0].float().log_softmax(-1)
        loss = -(scores[1, row[2]] + scores[2, row[3]])
        alone = torch.autograd.grad(loss, list(model.parameters.values()))
        for name, gradient in zip(model.parameters, alone, strict=True):
            assert torch.allclose(found[name][place], gradient, atol=1e-6)
    simulated.together = False
    again = simulated.of_tokens(tokens, learnt)
    assert all(torch.allclose(again[name], found[name], atol=1e-6) for name in found)
