"""Cables that are pulled: packets are lost in silence, and no connection is closed."""

import json
import time

import pytest

from fedloom.experiment import Experiment
from machines import can_have_namespaces, machines

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not can_have_namespaces(), reason="no network namespaces on this machine"),
]


@pytest.fixture(scope="module")
def apart():
    with machines(2, apart=True) as own:
        own.start_all()
        yield own


def start(own, name, rounds, deadline):
    table = {
        "data": {"source": "builtin:preferences", "builtin_rows": 60},
        "federation": {
            "clients": 2, "rounds": rounds, "quorum": 0.5, "deadline": deadline, "patience": 90.0,
        },
        "training": {"local_steps": 20, "batch_size": 8},
        "evaluation": {"per_client": False, "every": rounds, "samples": 0},
    }  # fmt: skip
    path, folder = own.folder / f"{name}.toml", own.folder / name
    path.write_text(Experiment.from_table(table).to_toml())
    words = ("run", path, "--engine", "flower", "--home", own.server)
    return folder, own.start(f"run-{name}", *words, "--set", f"output.folder={folder}")


def finished(own, name, folder, seconds):
    assert own.processes.pop(f"run-{name}").wait(seconds) == 0
    lines = map(json.loads, (folder / "rounds.jsonl").read_text().splitlines())
    return [record for record in lines if record["round"]]


@pytest.mark.parametrize("dark", [8.0, 40.0])
def test_a_silent_link_is_a_client_of_the_round_lost_and_comes_back(apart, dark):
    """Eight seconds are over before anybody notices; after forty both ends have given the link up."""
    folder, log = start(apart, f"dark{dark:.0f}", rounds=40, deadline=4.0)
    apart.wait(log, "round 3/40", 120)
    apart.network.pull("c1")
    time.sleep(dark)
    apart.network.plug("c1")
    rounds = finished(apart, f"dark{dark:.0f}", folder, 300)
    lost = {r["round"]: {x["client"] for x in r["rejected"]} for r in rounds}
    without = [round for round, clients in lost.items() if 1 in clients]
    assert without and all(clients <= {1} for clients in lost.values())
    assert without[-1] < 40 and not lost[40]
    print(f"{dark:.0f} s dark: left out of rounds {without[0]} to {without[-1]}")
