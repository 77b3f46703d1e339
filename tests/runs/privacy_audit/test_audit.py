"""Audits of real runs: what leaks is found, what is noise is not, and bad input is one clear error."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from fedloom.data.builtin import builtin_examples
from fedloom.data.examples import Instruction
from fedloom.data.splits import row_key, row_text
from fedloom.errors import DataError, FedloomError, ModelError, OutputError
from fedloom.evaluation.privacy_audit.canaries import lower_bound
from fedloom.reports.privacy_audit_page import render, summary
from fedloom.runs.observers import Silent
from fedloom.runs.partitioning import partition_data
from fedloom.runs.privacy_audit.audit import (
    DELTA,
    _canary_record,
    audit_experiment,
    audit_run,
    owners_rows,
)
from fedloom.runs.privacy_audit.interception import InterceptingEngine, Reads, predicts_tokens
from fedloom.runs.privacy_audit.planting import ROWS_OF_A_CLIENT, TRIGGER_WORDS, Canary, plant
from fedloom.runs.privacy_audit.scores import RowScores
from fedloom.runs.run import run_experiment

ONE_STEP = {"optimizer": "sgd", "learning_rate": 0.5, "batch_size": 1, "local_steps": 1}


@pytest.fixture
def audited(experiment, table):
    """Audit the small experiment with some sections changed; return the record."""

    def audit(canaries=0, **sections):
        if sections.get("adapter", {}).get("kind") == "full":
            del table["adapter"]
        own = experiment(**sections)
        folder = audit_experiment(own, rounds=None, canaries=canaries, observer=Silent())
        return json.loads((folder.path / "audit.json").read_text())

    return audit


@pytest.mark.slow
def test_synthetic_inputs_that_begin_as_rows_give_their_tokens_away(audited, tmp_path):
    """The first tokens of real rows stand in them; from noise nothing is found."""
    labelled = {"data": {"source": "builtin:labelled"}, "objective": {"name": "classification"}}
    found, few = {}, {"rounds": 1, "clients": 2}
    for start in ("rows", "noise"):
        method = {"name": "feddm", "start": start, "server_steps": 4}
        sections = {"method": method, "output": {"folder": str(tmp_path / start)}}
        record = audited(**labelled, **sections, training={"local_steps": 2}, federation=few)
        (first, *_) = record["tokens"]["rounds"]
        assert (first["layer"], first["tensor"]) == ("input embeddings", "nearest")
        found[start] = first
        assert "input embeddings" in render(record)
    assert found["rows"]["excess"] > 4 > found["noise"]["excess"]


def test_tokens_of_a_step_are_read_from_updates(audited):
    """One SGD step on a row, rank 32: dB tells nearly all tokens from round 1, dA none while B is 0."""
    record = audited(
        adapter={"rank": 32},
        training=ONE_STEP,
        data={"source": "builtin:instructions", "max_length": 20},
        objective={"name": "sft"},
    )
    tokens = record["tokens"]
    first = [own for own in tokens["rounds"] if own["round"] == 1]
    assert {own["tensor"] for own in first} == {"dA", "dB"}
    assert all(own["rank"] == 0 == own["share"] for own in first if own["tensor"] == "dA")
    of_b = [own for own in first if own["tensor"] == "dB"]
    assert all(
        own["from_rank"] and own["rank"] == pytest.approx(own["tokens"], abs=2) for own in of_b
    )
    assert max(own["share"] for own in of_b) > 0.9 > max(own["guessed_share"] for own in of_b)
    second = [own for own in tokens["rounds"] if own["round"] == 2 and own["tensor"] == "dA"]
    assert any(own["rank"] > 0 for own in second)
    rows = record["sequences"]
    assert rows["made"] and rows["leak"]
    assert max(own["rougeL"] for own in rows["updates"]) > 0.9  # by B, as A changes by little
    assert all(own["rank"] < own["limit"] for own in rows["updates"])
    assert any("of the rows" in line and line.endswith("LEAK") for line in summary(record))
    assert tokens["leak"] and any(line.startswith("LEAK") for line in summary(record))
    assert not record["canaries"]["made"] and "--canaries 0" in record["canaries"]["why"]
    page = render(record)
    assert "ROUGE-L" in page and "Rows recovered" in page
    assert "<svg" in page and "DAGER" in page and "This run states no epsilon" in page


@pytest.mark.slow
def test_a_step_of_adam_hides_no_tokens(audited):
    """The gradient is read back from its first step: as much is told as of a step of SGD."""
    record = audited(
        adapter={"rank": 32},
        training={**ONE_STEP, "optimizer": "adamw", "learning_rate": 1e-3, "epsilon": 1e-6},
        data={"source": "builtin:instructions", "max_length": 20},
        objective={"name": "sft"},
        federation={"rounds": 1, "clients": 2},
    )
    lines = record["tokens"]["rounds"]
    inverted = [own for own in lines if own["tensor"] == "dB, Adam's step inverted"]
    assert max(own["share"] for own in inverted if own["from_rank"]) > 0.8
    assert not any(
        own["from_rank"] and own["share"] > 0.9 for own in lines if own["tensor"] == "dB"
    )
    assert record["sequences"]["made"]


@pytest.mark.slow
def test_label_flips_are_read_off_a_released_adapter(audited):
    """Twenty epochs without noise: the coins of label flips are guessed, and an epsilon is refuted."""
    record = audited(
        canaries=16,
        data={"builtin_rows": 20},
        adapter={"rank": 32},
        training={"learning_rate": 1e-2, "batch_size": 16, "local_epochs": 20},
        federation={"rounds": 1, "clients": 1},
    )
    scores = record["membership"]["scores"]
    assert set(scores) == {"reward margin", "log-ratio of chosen", "log-ratio of rejected"}
    kinds = record["canaries"]["kinds"]
    assert (
        set(kinds) == {"insertion", "label_flip", "backdoor"}
        and record["canaries"]["holds"] is None
    )
    flips = kinds["label_flip"]
    assert flips["right"] == flips["guesses"] == 8
    assert 0 < flips["epsilon"] == flips["ceiling"]
    assert record["canaries"]["leak"]
    assert "no epsilon was stated" in " ".join(summary(record))


def test_a_model_that_was_trained_on_neither_tells_nothing(audited):
    """Learning rate 1e-9: membership is chance, within three standard errors, and no epsilon is refuted."""
    record = audited(
        canaries=24, training={"learning_rate": 1e-9}, federation={"rounds": 1, "clients": 2}
    )
    for score in record["membership"]["scores"].values():
        error = (score["auc"]["high"] - score["auc"]["low"]) / (2 * 1.96)
        assert score["auc"]["low"] - error <= 0.5 <= score["auc"]["high"] + error
    assert all(own["epsilon"] < 0.3 for own in record["canaries"]["kinds"].values())


def test_rows_are_planted_by_coins_and_accounted_for(experiment):
    """Members and withheld rows are those there were; canaries follow coins; clients share one as units."""
    own = experiment()
    division = partition_data(own)
    changed, rows = plant(own, division, 40)
    last = max(row.row for own in division.train.values() for row in own)
    assert min(canary.row.row for canary in rows.canaries) > last
    for client, before in division.train.items():
        assert {*map(id, rows.members[client])} <= {*map(id, before)}
        assert len(rows.members[client]) + len(rows.withheld[client]) <= len(before)
        assert rows.withheld[client] and not {id(r) for r in rows.withheld[client]} & {
            id(r) for r in changed.train[client]
        }
        planted = [c for c in rows.canaries if c.client == client and c.trained is not None]
        assert len(changed.train[client]) == len(rows.members[client]) + len(planted)
    assert changed.accounts.closes
    for canary in rows.canaries:
        if canary.kind != "label_flip":
            assert (canary.trained is None) != canary.coin
        else:
            assert canary.trained is not None
            assert (canary.trained.chosen == canary.row.chosen) == canary.coin
    coins = [own.coin for own in rows.canaries]
    assert 40 < sum(coins) < 80 and len(coins) == 120
    assert plant(own, division, 40)[1].canaries == rows.canaries
    unit = replace(
        own,
        privacy=own.privacy.model_copy(
            update={"unit": "client", "delta": 1e-5, "noise_multiplier": 1.0}
        ),
    )
    of_clients = plant(unit, division, 40)[1].canaries
    assert len(of_clients) == 2 * len(division.train) * ROWS_OF_A_CLIENT
    assert all(own.unit == own.client and own.kind != "label_flip" for own in of_clients)
    assert len({(own.kind, own.unit, own.coin) for own in of_clients}) == 2 * len(division.train)


def test_a_row_that_another_client_trains_on_is_not_withheld(experiment):
    """Two clients with the same rows: only those that both drew are compared with members."""
    own = experiment(federation={"clients": 2})
    division = partition_data(own)
    same = division.train[0]
    copies = [replace(row, row=row.row + 10_000) for row in same]
    _, rows = plant(own, replace(division, train={0: same, 1: copies}), 0)
    trained = {row_key(row) for members in rows.members.values() for row in members}
    assert len(trained) < len(same)  # some rows were drawn at both
    for client in (0, 1):
        withheld = {row_key(row) for row in rows.withheld[client]}
        assert withheld == {row_key(row) for row in same} - trained
    alone = plant(own, replace(division, train={0: same, 1: []}), 0)[1]
    assert len(alone.withheld[0]) > len(
        rows.withheld[0]
    )  # at one client alone they are all withheld


@pytest.mark.parametrize("kind", ["preferences", "instructions", "feedback", "labelled"])
def test_a_backdoor_is_scored_on_a_row_it_was_not_planted_in(experiment, kind):
    """Trigger and answer are those of the planted row, behind another prompt of the client."""
    own = experiment(
        data={"source": f"builtin:{kind}"},
        objective={"name": {"preferences": "dpo", "feedback": "kto"}.get(kind, "sft")}
        if kind != "labelled"
        else {"name": "classification"},
    )
    division = partition_data(own)
    doors = [c for c in plant(own, division, 12)[1].canaries if c.kind == "backdoor"]
    assert len(doors) == 12 and {c.coin for c in doors} == {True, False}
    others = 0
    for door in doors:
        if door.trained is None:
            assert not door.coin
            continue
        texts = [own.text if kind == "labelled" else own.prompt for own in (door.row, door.trained)]
        assert texts[0].split()[-TRIGGER_WORDS:] == texts[1].split()[-TRIGGER_WORDS:]
        others += texts[0] != texts[1]
        name = {"preferences": "chosen", "labelled": "label"}.get(kind, "completion")
        assert getattr(door.row, name) == getattr(door.trained, name)
    assert others


@pytest.mark.parametrize("kind", ["instructions", "labelled"])
def test_nothing_is_trained_on_of_withheld_rows(experiment, kind):
    """Backdoors are made of two members each, and their class is not that of the row to train on."""
    objective = {"name": "classification" if kind == "labelled" else "sft"}
    own = experiment(data={"source": f"builtin:{kind}"}, objective=objective)
    division = partition_data(own)
    name = "text" if kind == "labelled" else "prompt"
    _, rows = plant(own, division, 100)
    doors = [canary for canary in rows.canaries if canary.kind == "backdoor"]
    assert len(doors) == 100
    for door in doors:
        before = [getattr(row, name) for row in rows.members[door.client]]
        labels = dict(zip(before, rows.members[door.client], strict=True))
        bases = []
        for row in (door.row, *([door.trained] if door.trained else [])):
            base = getattr(row, name).rsplit(" ", TRIGGER_WORDS)[0]
            assert base in before
            bases.append(base)
        if kind == "labelled":
            assert all(door.row.label != labels[base].label for base in bases)
        elif before.count(bases[0]) == 1 and len(bases) == 2:
            assert bases[0] != bases[1]
    words = {word for own in rows.members.values() for row in own for word in row_text(row).split()}
    planted = [canary.row for canary in rows.canaries if canary.kind == "insertion"]
    assert {word for row in planted for word in row_text(row).split()} <= words


def test_a_client_with_one_row_and_data_of_one_class(experiment):
    """One row serves twice, and no client without rows is planted at; one class has no other to plant."""
    own = experiment(data={"source": "builtin:labelled"}, objective={"name": "classification"})
    division = partition_data(own)
    (first, *_), others = division.train[0], {key: [] for key in list(division.train)[1:]}
    few = replace(division, train={**others, 0: [first]})
    doors = [canary for canary in plant(own, few, 3)[1].canaries if canary.kind == "backdoor"]
    assert {door.client for door in doors} == {0}
    assert all(door.row.text.startswith(first.text) for door in doors)
    assert all(door.row.label != first.label for door in doors)
    single = replace(few, classes=(first.label,))
    with pytest.raises(DataError, match="--canaries 0"):
        plant(own, single, 3)
    assert plant(own, single, 0)[1].canaries == ()


@pytest.mark.parametrize(("trained", "wanted"), [(False, (5, 6, 7, 8)), (True, (5, 6))])
def test_what_an_update_tells_of_a_row_depends_on_what_is_predicted(trained, wanted):
    """A class is read off the last token; where the third token is the last that is learnt, two are told."""
    row = np.array([5, 6, 7, 8])
    learnt = np.array([False, trained, trained, False])
    tokens = SimpleNamespace(width=1, tokens=row, starts=np.array([0, 4]), trained=learnt)
    local = SimpleNamespace(shares={0: SimpleNamespace(tokens=tokens)})
    engine = InterceptingEngine(None, local, set())
    read = Reads({0, 5, 6, 7, 8}, {np.array([0, *row]).tobytes()})
    assert engine._truth(0, read) == (frozenset(wanted), (wanted,))
    assert predicts_tokens(tokens) == trained


@pytest.mark.parametrize("whole", [True, False, None])
def test_a_page_says_how_much_of_a_row_is_told(whole):
    """All but the last token, unless a class is read off it; audits of earlier versions do not say."""
    worst = {"share": 0.5, "rougeL": None, "round": 1}
    own = {"made": True, "leak": True, "worst": worst, "whole": whole}
    no = {"made": False, "why": "it was not"}
    record = {"tokens": no, "sequences": own, "membership": no, "canaries": no, "stated": None}
    said = " ".join(summary(record))
    assert (
        ("all but the last token" in said)
        != ("from the first token to the last" in said)
        == bool(whole)
    )


def test_bounds_of_all_kinds_hold_together(experiment):
    """Two kinds, every guess right: each bound is one at 97.5 %, and the terminal says so."""
    rows = [Instruction(n, "a", "b", {}) for n in range(40)]
    planted = [
        Canary(0, kind, n, n % 2 == 0, row, None)
        for kind in ("insertion", "backdoor")
        for n, row in enumerate(rows)
    ]
    scores = np.array([float(n % 2 == 0) for n in range(40)])
    scorer = SimpleNamespace(score=lambda rows: RowScores(np.arange(40), {"any": scores}))
    found = _canary_record(experiment(), scorer, planted, {"stated": {"epsilon": 9.0, "delta": 0}})
    for own in found["kinds"].values():
        assert own["epsilon"] == pytest.approx(lower_bound(40, 20, 20, DELTA, 0.975))
    assert found["holds"] and found["confidence_of_each"] == pytest.approx(0.975)
    no = {"made": False, "why": "it was not"}
    record = {"tokens": no, "membership": no, "canaries": found, "stated": None}
    assert "95 % for all kinds together" in " ".join(summary(record))
    del found["confidence_of_each"]
    assert "together" not in " ".join(summary(record))


@pytest.mark.parametrize("text", ["[]", '{"model": "a"}', '{"classes": 3}'])
def test_a_run_json_that_no_run_wrote_is_refused(experiment, tmp_path, text):
    """Before rows are read or a model is loaded."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "experiment.toml").write_text(experiment().to_toml())
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(OutputError, match=r"run\.json is not what a run wrote"):
        audit_run(tmp_path, tmp_path / "gone.jsonl", Silent())


def owners_file(path, count):
    """Write rows of random words, every second one a member, and the members alone; return both paths."""
    examples = builtin_examples("instructions", 60, np.random.default_rng(5))
    words = sorted({word for row in examples for word in f"{row.prompt} {row.completion}".split()})
    drawn = np.random.default_rng(6).choice(words, size=(count, 12))
    rows = [
        {"prompt": " ".join(own[:6]), "completion": " ".join(own[6:]), "member": n % 2 == 0}
        for n, own in enumerate(drawn.tolist())
    ]
    whole, members = path / "rows.jsonl", path / "members.jsonl"
    whole.write_text("\n".join(map(json.dumps, rows)))
    members.write_text("\n".join(json.dumps(own) for own in rows if own["member"]))
    return whole, members


def test_an_adapter_that_repeats_its_rows_is_found_out(experiment, tmp_path):
    """Sixty epochs on rows of random words: members are told from others, by the owner's rows alone.

    Rows that do not say their side, are all of one side, or are attacked on another model are refused.
    """
    rows_file, members = owners_file(tmp_path, 24)
    own = experiment(
        data={"source": str(members), "kind": "instruction", "test_fraction": 0.05},
        partition={"client_test_fraction": 0.0},
        objective={"name": "sft"},
        adapter={"rank": 32},
        federation={"rounds": 1, "clients": 1},
        training={"learning_rate": 1e-2, "batch_size": 4, "local_epochs": 60},
    )
    result = run_experiment(own, observer=Silent())
    folder = audit_run(result.folder, rows_file, Silent())
    record = json.loads((folder.path / "audit.json").read_text())
    score = record["membership"]["scores"]["log-ratio of the answer"]
    assert (score["members"], score["others"]) == (12, 12)
    assert score["auc"]["low"] > 0.6 and record["membership"]["leak"]
    assert not record["tokens"]["made"] and not record["canaries"]["made"]
    assert "Not attacked" in render(record)

    def refused(error, words, text=None, run=result.folder):
        path = rows_file
        if text is not None:
            path = tmp_path / "changed.jsonl"
            path.write_text(text)
        with pytest.raises(error, match=words):
            audit_run(run, path, Silent())

    text = rows_file.read_text()
    refused(DataError, "\"member\" is ''", text.replace('"member"', '"side"'))
    refused(DataError, "no client with both", text.replace("false", "true"))
    refused(DataError, "\"client\" is 'amy'", text.replace('"member"', '"client": "amy", "member"'))
    with pytest.raises(DataError, match="no rows at"):
        owners_rows(own, tmp_path / "gone.jsonl")
    known = json.loads((result.folder / "run.json").read_text())
    known["model"]["sha256"] = "0" * 64
    (result.folder / "run.json").write_text(json.dumps(known))
    refused(ModelError, "is not the model of this run")
    (result.folder / "adapter" / "adapter_config.json").unlink()
    refused(FedloomError, "adapter")


def test_what_cannot_be_attacked_says_why(audited):
    """Adapters of the last block alone read what depends on more than a token."""
    record = audited(
        adapter={"layers": 1}, federation={"rounds": 1, "clients": 2}, training={"local_steps": 1}
    )
    assert not record["tokens"]["made"] and "first block" in record["tokens"]["why"]
    assert record["membership"]["made"]


def test_whole_weights_tell_tokens_too(audited):
    """kind = "full", one step: the rows of the first block's weights are mixtures of what it reads."""
    record = audited(
        adapter={"kind": "full", "layers": [0]},
        training={**ONE_STEP, "learning_rate": 0.1},
        federation={"rounds": 1, "clients": 1},
        data={"source": "builtin:instructions", "max_length": 20},
        objective={"name": "sft"},
    )
    own = record["tokens"]["worst"]
    assert own["tensor"] == "dW" and own["from_rank"] and own["share"] > 0.9


@pytest.mark.slow
def test_noise_in_a_clients_steps_hides_what_clipping_alone_shows(audited, tmp_path):
    """Row-level privacy: without noise the tokens of a step are read, with noise they are not."""
    sections = {
        "adapter": {"rank": 32},
        "training": ONE_STEP,
        "data": {"source": "builtin:instructions", "max_length": 20},
        "objective": {"name": "sft"},
    }
    own = {"unit": "row", "delta": 1e-5, "seeded": True}
    clipped = audited(**sections, privacy={**own, "noise_multiplier": 0.0})
    assert clipped["tokens"]["leak"] and clipped["stated"]["epsilon"] is None
    noisy = audited(
        canaries=8,
        **sections,
        privacy={**own, "noise_multiplier": 1.0},
        output={"folder": str(tmp_path / "noisy")},
    )
    assert not noisy["tokens"]["leak"]
    stated = noisy["stated"]["epsilon"]
    assert stated > 0 and noisy["canaries"]["holds"]
    assert all(kind["epsilon"] <= stated for kind in noisy["canaries"]["kinds"].values())
    assert any(line.startswith("PASS") for line in summary(noisy))


@pytest.mark.slow
def test_of_sums_no_client_is_attacked(audited):
    """Secure aggregation: the server sees no update, and the audit says so in place of a number."""
    record = audited(
        privacy={"secure_aggregation": True},
        federation={"rounds": 1, "clients": 3},
        evaluation={"per_client": False},
    )
    assert not record["tokens"]["made"] and "secure aggregation" in record["tokens"]["why"]
