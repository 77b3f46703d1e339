"""What a run starts from, between machines: sent once, counted, checked, and never by a path."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fedloom
from fedloom.errors import RoundFailed
from fedloom.experiment.experiment import Experiment
from fedloom.runs.observers import Silent
from fedloom.runs.run import run_experiment
from fedloom.wire.envelope import RequestHeader
from loopback import client_file

ADAPTER = {"rank": 4, "alpha": 12.0, "targets": ["q_proj", "v_proj"]}


@pytest.fixture
def made(table, tmp_path):
    """Make a small experiment."""

    def make(name, **sections):
        table["data"]["builtin_rows"] = 30
        table["training"] |= {"local_steps": 1, "learning_rate": 1e-2}
        table["evaluation"] = {"samples": 0}
        own = {**table, "output": {"folder": str(tmp_path / name)}, **sections}
        return Experiment.from_table(own)

    return make


def sft(made, method="fedavg"):
    data = {"source": "builtin:instructions", "builtin_rows": 30}
    own = made(
        "sft", adapter=ADAPTER, data=data, objective={"name": "sft"}, method={"name": method}
    )
    return fedloom.run(own).folder


def lines(folder, name):
    return [json.loads(line) for line in (Path(folder) / name).read_text().splitlines()]


def states(folder):
    return [e["state"] for e in lines(folder, "audit.jsonl") if e["event"] == "round"]


def began(folder):
    return [c for c in lines(folder, "costs.jsonl") if c["phase"] == "begin"]


def judged(folder):
    return [line["evaluation"] for line in lines(folder, "rounds.jsonl")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        "fedavg",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("ffa_lora", "fedsa_lora", "ditto", "local_only", "fedex_lora", "flexlora")
        ),
    ],
)
def test_machines_start_from_the_same(made, loopback, tmp_path, method):
    start = sft(made)
    own = {"adapter": {"start": str(start)}, "method": {"name": method}}
    here, there = made("here", **own), made("there", **own)
    fedloom.run(here)
    federation = loopback(3)
    mail = federation.mail()
    run_experiment(there, observer=Silent(), remote=federation.engine(there, mail))
    one, two = tmp_path / "here", tmp_path / "there"
    assert states(one) == states(two)
    assert judged(one) == judged(two)
    assert judged(two)[0]["clients"]["mean"]["preference_accuracy"] == 0.5  # all margins are 0
    assert [c["bytes_down"] for c in began(one)] == [c["bytes_down"] for c in began(two)]
    assert [c["client"] for c in began(two)] == [0, 1, 2]
    size = sum(
        t.numel() for t in load_file(start / "adapter" / "adapter_model.safetensors").values()
    )
    assert 4 * size < began(two)[0]["bytes_down"] < 4 * size + 4096
    # no client hears of a path, and each is sent the adapter once
    sent = [e for _, e in mail.pushed if e.read(RequestHeader).kind == "join"]
    assert sum(bool(envelope.payload) for envelope in sent) == 3
    for _, envelope in mail.pushed:
        assert str(tmp_path / "sft") not in (envelope.read(RequestHeader).experiment or "")


@pytest.mark.slow
def test_a_client_whose_copy_is_lost_is_sent_another(made, loopback, tmp_path):
    start = sft(made)
    there = made(
        "there",
        adapter={"start": str(start)},
        federation={"rounds": 3, "clients": 2, "require": 1, "quorum": 0.5, "patience": 5.0},
    )
    federation = loopback(2)
    mail = federation.mail()
    lost = []

    class Losing(Silent):
        def round_done(self, record):
            if record.round == 1 and not lost:
                (file,) = federation.home(1).path.glob("runs/*/start.safetensors")
                save_file({"other": torch.zeros(1)}, file)
                mail.workers[101] = federation.worker(1)
                lost.append(file)

    run_experiment(there, observer=Losing(), remote=federation.engine(there, mail))
    records = lines(tmp_path / "there", "rounds.jsonl")
    rejected = [
        (r["round"], one["client"], one["reason"]) for r in records for one in r["rejected"]
    ]
    assert rejected == [(2, 1, "it has not been sent yet what the run starts from")]
    assert set(load_file(lost[0])) != {"other"}
    assert [c["client"] for c in began(tmp_path / "there")].count(1) == 2


def test_a_policy_refuses_what_is_too_large(made, loopback, tmp_path):
    start = sft(made)
    there = made(
        "there",
        adapter={"start": str(start)},
        federation={"rounds": 1, "clients": 1, "patience": 0.2},
    )
    federation = loopback(1)
    own = client_file(tmp_path / "my.toml", models=federation.models, policy={"max_rank": 2})
    with pytest.raises(RoundFailed, match=r"policy.max_rank: the experiment asks for more"):
        run_experiment(
            there, observer=Silent(), remote=federation.engine(there, federation.mail({0: own}))
        )


@pytest.mark.slow
def test_clients_go_on_from_models_of_their_own(made, loopback, tmp_path):
    data = {"source": "builtin:preferences", "builtin_rows": 30}
    method = {"name": "fedper"}
    federation = loopback(3)
    first = made("first", adapter=ADAPTER, data=data, method=method)
    run_experiment(first, observer=Silent(), remote=federation.engine(first))
    second = made("second", adapter={"start": str(tmp_path / "first")}, data=data, method=method)
    mail = federation.mail()
    run_experiment(second, observer=Silent(), remote=federation.engine(second, mail))
    each = judged(tmp_path / "second")[0]["clients"]["each"].values()
    assert all(metrics["reward_margin"] == 0 for metrics in each)
    heads = set()
    for worker in mail.workers.values():
        (own,) = worker.run.parts.local.resources.values()
        assert own.own_start
        heads.add(str({n: float(t.sum()) for n, t in own.initial.items() if n.startswith("own.")}))
    assert len(heads) == 3
