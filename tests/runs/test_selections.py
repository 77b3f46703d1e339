"""Runs whose clients are drawn by what they tell: same bits on resume and with workers, bytes, refusals."""

import json
import math

import pytest

import fedloom
from fedloom.engines.in_process import SimulationEngine
from fedloom.errors import Interrupted, MessageError, SettingsError
from fedloom.experiment.experiment import Experiment
from fedloom.federation.selection import SELECTIONS
from fedloom.methods import METHODS
from fedloom.objectives import OBJECTIVES
from fedloom.reports.run_data import read_run
from fedloom.reports.sections.by_method import drawn
from fedloom.runs.assembly import assemble
from fedloom.runs.observers import Silent
from fedloom.runs.partitioning import partition_data
from fedloom.runs.run import resume_run, run_experiment
from fedloom.security.audit_log import events
from fedloom.training.steps import local_loss
from fedloom.wire.messages import Answer, Payload
from unchecked import encode_anything

INFORMED = [name for name, (_, kind) in SELECTIONS.items() if kind.informed]
SMALL = {
    "data": {"builtin_rows": 60},
    "federation": {"rounds": 3, "clients": 5, "clients_per_round": 2},
    "training": {"local_steps": 1},
    "evaluation": {"every": 9, "per_client": False, "max_examples": 4, "samples": 0},
}
DEVICES = {
    "simulation": {"devices": {"flops": {"kind": "loguniform", "low": "1GFLOP", "high": "1TFLOP"}}}
}


def lines(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def draws(folder):
    """Clients and states of all rounds, and what each client told."""
    found = [(r["clients"], r["details"], r["simulated"]) for r in lines(folder, "rounds.jsonl")]
    return found, [event["state"] for event in events(folder, "round")]


class Stop(Silent):
    """Stops a run as Ctrl+C does, once so many answers have arrived."""

    def __init__(self, after):
        self.left = after

    def client_done(self, round, client, done, of):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("name", "losses"),
    [
        ("oort", "rows"),
        *(
            pytest.param(name, losses, marks=pytest.mark.slow)
            for name in INFORMED
            for losses in ("rows", "training")
            if (name, losses) != ("oort", "rows")
        ),
    ],
)
def test_interrupted_it_draws_the_same(experiment, tmp_path, name, losses):
    own = {**SMALL, **DEVICES, "selection": {"name": name, "losses": losses, "rows": 8}}
    whole = fedloom.run(experiment(**own))
    found, states = draws(whole.folder)
    assert len({tuple(clients) for clients, _, _ in found[1:]}) > 1
    assert all(facts["seconds"] > 0 for r in found[1:] for facts in r[1]["selection"].values())
    broken = experiment(**own, output={"folder": str(tmp_path / "broken"), "checkpoint_every": 2})
    with pytest.raises(Interrupted):
        fedloom.run(broken, observer=Stop(4))
    again = resume_run(tmp_path / "broken")
    assert draws(again.folder) == (found, states)


@pytest.mark.slow
def test_workers_draw_the_same(experiment, tmp_path):
    own = {**SMALL, **DEVICES, "selection": {"name": "flash", "rows": 8}}
    alone = fedloom.run(experiment(**own))
    other = experiment(**own, output={"folder": str(tmp_path / "workers")})
    assert draws(fedloom.run(other, workers=2).folder) == draws(alone.folder)


def test_candidates_are_sent_the_model_and_their_losses_are_counted(experiment):
    """Four are sent the adapter, two of them once more; 2 numbers come up from each of the four."""
    chosen = {"name": "power_of_choice", "candidates": 4, "rows": 8}
    result = fedloom.run(experiment(**SMALL, selection=chosen))
    costs = [c for c in lines(result.folder, "costs.jsonl") if c["round"] == 1]
    asked = [c for c in costs if c["phase"] == "row_losses"]
    trained = [c for c in costs if c["phase"] == "train"]
    assert (len(asked), len(trained)) == (4, 2)
    assert all(c["bytes_up"] < 1000 and c["flops"] > 0 for c in asked)
    assert abs(asked[0]["bytes_down"] - trained[0]["bytes_down"]) < 50
    for record in lines(result.folder, "rounds.jsonl")[1:]:
        told = {int(client): loss for client, loss in record["details"]["candidates"].items()}
        largest = sorted(told, key=told.__getitem__)[-2:]
        assert record["clients"] == sorted(largest)
    (section,) = [
        own for own in drawn([read_run(result.folder)]) if own.spec.kind == "client_draws"
    ]
    table = section.content["table"]
    assert not section.note and len(table.rows) == 5
    assert sum(int(row[1]) for row in table.rows) == 2 * 3
    assert {row[5] for row in table.rows if row[1] != "0"} <= {
        f"a large loss ({n})" for n in range(5)
    }


@pytest.mark.parametrize(
    "objective",
    [
        own if own in ("sft", "kto") else pytest.param(own, marks=pytest.mark.slow)
        for own in sorted(OBJECTIVES)
    ],
)
def test_what_a_client_tells_is_the_loss_of_its_training(experiment, suited, objective):
    """Over all rows the mean is that of one batch of all of them, wherever rows count by themselves."""
    kind = OBJECTIVES[objective][1]
    source = {"instruction": "instructions", "labelled": "labelled"}.get(kind.kind, "preferences")
    settings = experiment(
        data={"source": f"builtin:{source}", "builtin_rows": 30},
        objective={"name": objective},
        method={"name": "fedpdpo"} if kind.needs_reward else {"name": "fedavg"},
        federation={"clients": 1},
        training={"batch_size": 64},
    )
    parts = assemble(settings, partition_data(settings))
    parts.local.add_reference(1, 0)
    client = parts.local.client(0, 1)
    parts.model.write(parts.initial)
    losses, weights = client.row_losses(64)
    assert len(losses) == len(client.share) and all(map(math.isfinite, losses))
    mean = sum(w * own for w, own in zip(weights, losses, strict=True)) / sum(weights)
    own = kind.for_rows(parts.objective) if objective in ("kto", "pkto", "bco") else parts.objective
    whole = local_loss(
        client.model, client.share, own, client.training, seed=0, client=0, round=1, batches=1
    )
    assert mean == pytest.approx(whole, rel=1e-4)
    few, _ = client.row_losses(8)
    assert len(few) == 8 and few == client.row_losses(8)[0]


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"privacy": {"secure_aggregation": True}}, "the server sees sums alone"),
        ({"privacy": {"unit": "row", "noise_multiplier": 1.0}}, "which has no noise"),
        (
            {"privacy": {"unit": "client", "noise_multiplier": 1.0}},
            "leave out selection.name = 'oort'",
        ),
        ({"method": {"name": "fedbuff"}, **DEVICES}, "has those asked that are free"),
        (
            {
                "method": {"name": "split"},
                "objective": {"name": "sft"},
                "data": {"source": "builtin:instructions"},
            },
            'set selection.losses = "training"',
        ),
        ({"selection": {"name": "power_of_choice", "candidates": 1}}, "give 2 at least"),
        ({"selection": {"name": "oort", "rows": 4}}, "selection.rows = 4"),
        ({"selection": {"name": "flash", "candidates": 3}}, "is a setting of power_of_choice"),
    ],
)
def test_what_it_cannot_go_with_is_told_before_anything_is_read(table, sections, told):
    own = {**table, **SMALL, "selection": {"name": "oort"}, **sections}
    with pytest.raises(SettingsError) as raised:
        Experiment.from_table(own)
    assert sum(told in problem for problem in raised.value.problems) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("claim", "kind"),
    [
        ({"loss": math.nan, "root_mean_square": 1.0}, "not_finite"),
        ({"loss": 1e12, "root_mean_square": 1.0}, "out_of_range"),
        ({"loss": 1.0, "root_mean_square": -1.0}, "out_of_range"),
    ],
)
def test_a_loss_out_of_range_is_a_violation_and_draws_nobody(experiment, monkeypatch, claim, kind):
    plain = SimulationEngine.answer

    def answer(self, exchange, client):
        found = plain(self, exchange, client)
        if exchange.action != "row_losses" or client != 1:
            return found
        return Answer(client, encode_anything(Payload(numbers=claim), exchange.reply_schema))

    monkeypatch.setattr(SimulationEngine, "answer", answer)
    chosen = {"name": "power_of_choice", "candidates": 5, "rows": 8}
    result = fedloom.run(experiment(**SMALL, selection=chosen))
    records = lines(result.folder, "rounds.jsonl")[1:]
    assert not any(1 in record["clients"] for record in records)
    assert all(record["details"]["candidates"].keys() == {"0", "2", "3", "4"} for record in records)
    assert {(v["client"], v["kind"]) for r in records for v in r["offences"]} == {(1, kind)}


def test_a_client_says_nothing_of_fewer_rows_than_eight(experiment):
    parts = assemble(settings := experiment(federation={"clients": 1}), partition_data(settings))
    handler = parts.local.handlers["row_losses"]
    with pytest.raises(MessageError, match="losses of 1 rows are asked for, 8 is the least"):
        handler(parts.local.client(0, 1), Payload(parts.initial, {"rows": 1.0}))


EVERY = sorted(
    name for name, (_, kind) in METHODS.items() if not (kind.asynchronous or kind.pools_data)
)


@pytest.mark.slow
@pytest.mark.parametrize("method", EVERY)
def test_every_method_tells_what_oort_goes_by(suited, tmp_path, method):
    losses = "rows" if METHODS[method][1].whole_at_clients else "training"
    own = suited(method)
    own["federation"] = {
        **own.get("federation", {}),
        "clients": 3,
        "clients_per_round": 2,
        "rounds": 3,
    }
    chosen = {"name": "oort", "losses": losses, "rows": 8}
    output = {"folder": str(tmp_path / "run"), "verify": False}
    result = fedloom.run(Experiment.from_table({**own, "selection": chosen, "output": output}))
    for record in lines(result.folder, "rounds.jsonl")[1:]:
        for facts in record["details"]["selection"].values():
            assert facts["answered"] and math.isfinite(facts["loss"]), record
            assert (facts["root_mean_square"] is not None) == (losses == "rows")


@pytest.mark.slow
def test_between_machines_the_same_clients_are_drawn_and_times_are_recorded(
    suited, loopback, tmp_path
):
    drawn_by = {"name": "power_of_choice", "rows": 8}
    size = {"clients": 4, "clients_per_round": 2, "rounds": 3}
    table = {**suited("fedavg"), "federation": size, "selection": drawn_by}
    here = Experiment.from_table({**table, "output": {"folder": str(tmp_path / "here")}})
    there = Experiment.from_table({**table, "output": {"folder": str(tmp_path / "there")}})
    fedloom.run(here)
    run_experiment(there, observer=Silent(), remote=loopback(4).engine(there))
    one, two = (lines(tmp_path / own, "rounds.jsonl")[1:] for own in ("here", "there"))
    assert [r["clients"] for r in one] == [r["clients"] for r in two]
    assert [r["details"]["candidates"] for r in one] == [r["details"]["candidates"] for r in two]
    for record in two:
        assert all(own["seconds"] > 0 for own in record["details"]["selection"].values())
    assert all(own["seconds"] is None for own in one[0]["details"]["selection"].values())
