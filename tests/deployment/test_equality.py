"""Every method gives the same bits, bytes and metrics in one process and between machines."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fedloom
from fedloom.audit import events
from fedloom.experiment import Experiment
from fedloom.methods import METHODS
from fedloom.runner import Silent, run_experiment

QUICK = ["fedavg", "scaffold", "fedpdpo", "fedamole", "fedmoe", "distillation", "split", "flora"]
OTHERS = sorted(METHODS.keys() - {"centralised", *QUICK})
ADAPTERS = {"fedamole": {"kind": "experts", "rank": 2, "experts": 4}}


@pytest.fixture
def suited(table, mixture_folder):
    """Make the experiment of a method."""

    def make(method):
        own = {**table, "adapter": {**table["adapter"], **ADAPTERS.get(method, {})}}
        if method == "fedmoe":
            own |= {"adapter": {"kind": "submixture"}, "model": {"path": str(mixture_folder)}}
        if method in ("distillation", "split"):
            own |= {"objective": {"name": "classification"}}
            own |= {
                "data": {"source": "builtin:labelled", "builtin_rows": 60},
                "public": {"rows": 8},
            }
        if method == "split":
            own |= {"evaluation": {**table["evaluation"], "per_client": False}}
        own["training"] = {**table["training"], "local_steps": 2}
        return {**own, "method": {"name": method}}

    return make


def rounds(folder):
    kept = []
    for line in (Path(folder) / "rounds.jsonl").read_text().splitlines():
        record = json.loads(line)
        del record["seconds"], record["flops"]  # costs() has the latter by phase
        kept.append(record)
    return kept


def costs(folder):
    """Costs that are counted, not measured.

    In one process clients whose models are still alike are judged once for all of them, and the
    reference model is counted with the experts that the client before has left in place.
    """
    found, measured = {}, ("seconds", "peak_memory")
    for line in (Path(folder) / "costs.jsonl").read_text().splitlines():
        cost = json.loads(line)
        where = cost["round"], cost["client"], cost["phase"]
        shared = ("flops",) if cost["phase"] in ("evaluate", "reference") else ()
        found[where] = {k: v for k, v in cost.items() if v and k not in (*measured, *shared)}
    return found


def states(folder):
    return [event["state"] for event in events(folder, "round")]


@pytest.mark.parametrize(
    "method", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_simulation_and_machines_give_the_same(suited, loopback, tmp_path, method):
    here = Experiment.from_table({**suited(method), "output": {"folder": str(tmp_path / "here")}})
    there = Experiment.from_table({**suited(method), "output": {"folder": str(tmp_path / "there")}})
    fedloom.run(here)
    federation = loopback(3)
    engine = federation.engine(there)
    run_experiment(there, observer=Silent(), remote=engine)
    one, two = tmp_path / "here", tmp_path / "there"
    assert states(one) == states(two)
    assert rounds(one) == rounds(two)
    assert costs(one) == costs(two)
    own = sorted(path.name for path in one.glob("clients/*"))
    for name in own:
        path = federation.home(int(name)).path / "runs"
        (model,) = path.glob("*/model")
        for file in (one / "clients" / name).glob("*.safetensors"):
            left, right = load_file(file), load_file(model / file.name)
            assert all(torch.equal(left[key], right[key]) for key in left.keys() | right.keys())
    assert bool(own) == (METHODS[method][1].own_models or METHODS[method][1].personal)
