"""Every method for three rounds over real processes: the bits of a simulation, and what it costs in time.

Server and clients have network namespaces of their own where that can be.
"""

import json

import pytest

import fedloom
from fedloom.experiment.experiment import Experiment
from fedloom.methods import METHODS
from machines import machines
from sampling import sampled

ASYNCHRONOUS = {
    name for name, (_, kind) in METHODS.items() if kind.asynchronous
}  # in an order of their own
FEDERATED = sorted(METHODS.keys() - {"centralised", *ASYNCHRONOUS})
ADAPTERS = {
    "fedamole": {"kind": "experts", "rank": 2, "experts": 4},
    "fedlease": {"kind": "experts", "rank": 2, "experts": 4, "router": "linear"},
    "fedmoe": {"kind": "submixture"},
}


@pytest.fixture(scope="module")
def three():
    with machines(3, apart=True) as own:
        own.start_all()
        yield own


def read(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.mark.parametrize("method", sampled(FEDERATED, 1))
def test_bits_are_those_of_a_simulation(three, mixture_folder, method, tmp_path):
    table = {
        "adapter": ADAPTERS.get(method, {}),
        "data": {"source": "builtin:preferences", "builtin_rows": 90},
        "method": {"name": method},
        "federation": {"clients": 3, "rounds": 3, "patience": 60},
        "training": {"local_steps": 2, "batch_size": 8},
        "output": {"folder": str(tmp_path / "here")},
    }
    if method == "fedbiscuit":
        table["method"]["selectors"] = 2
    if method == "fedmoe":
        table["model"] = {"path": str(mixture_folder)}
    if method in ("distillation", "fed_et", "feddm", "split"):
        table |= {
            "data": {"source": "builtin:labelled", "builtin_rows": 90},
            "objective": {"name": "classification"}, "public": {"rows": 16},
            "evaluation": {"per_client": method != "split"},
        }  # fmt: skip
    if method == "fedgrpo":
        table |= {
            "data": {"source": "builtin:sums", "builtin_rows": 90}, "public": {"rows": 16},
            "objective": {"name": "grpo", "group": 3, "max_new_tokens": 3},
        }  # fmt: skip
    experiment = Experiment.from_table(table)
    folder = three.run(experiment, method)
    fedloom.run(experiment)
    here, there = (read(path, "audit.jsonl") for path in (tmp_path / "here", folder))
    states = [[e["state"] for e in lines if e["event"] == "round"] for lines in (here, there)]
    assert states[0] == states[1] and len(states[0]) == 4
    seconds = [
        sum(r["seconds"] for r in read(path, "rounds.jsonl")[1:]) / 3
        for path in (tmp_path / "here", folder)
    ]
    print(f"{method}: {seconds[0]:.2f} s a round simulated, {seconds[1]:.2f} s between machines")
    log = (three.folder / "c0" / "worker.log").read_text()
    run = json.loads((folder / "run.json").read_text())["id"]
    assert log.count(f"run {run[:8]}: ready") == 1


@pytest.mark.full
@pytest.mark.parametrize("method", sorted(ASYNCHRONOUS))
def test_a_simulation_of_its_records_has_the_bits_of_an_asynchronous_run(three, method, tmp_path):
    table = {
        "data": {"source": "builtin:preferences", "builtin_rows": 90},
        "method": {"name": method, "concurrency": 3},
        "federation": {"clients": 3, "clients_per_round": 2, "rounds": 4, "patience": 60},
        "training": {"local_steps": 2, "batch_size": 8},
    }
    folder = three.run(Experiment.from_table(table), method)
    again = {"output": {"folder": str(tmp_path / "here")}, "simulation": {"replay": str(folder)}}
    fedloom.run(Experiment.from_table({**table, **again}))
    audits = (read(path, "audit.jsonl") for path in (tmp_path / "here", folder))
    states = [[e["state"] for e in lines if e["event"] == "round"] for lines in audits]
    assert states[0] == states[1] and len(states[0]) == 5
    assert all(len(r["arrivals"]["staleness"]) == 2 for r in read(folder, "rounds.jsonl")[1:])
