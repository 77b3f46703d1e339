"""Cables that are pulled: packets are lost in silence, and no connection is closed."""

import json
import time

import pytest

from fedloom.experiment.experiment import Experiment
from machines import can_have_namespaces, machines

pytestmark = [
    pytest.mark.slow,
    pytest.mark.serial,
    pytest.mark.skipif(not can_have_namespaces(), reason="no network namespaces on this machine"),
]


@pytest.fixture(scope="module")
def apart():
    with machines(2, apart=True) as own:
        own.start_all()
        yield own


def rounds(folder):
    lines = (folder / "rounds.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["round"]]


@pytest.mark.parametrize("dark", [8, 40])
def test_a_silent_link_is_a_client_lost_for_a_round_and_comes_back(apart, dark):
    """After eight seconds nobody but the round has noticed; after forty both ends gave the link up."""
    table = {
        "data": {"source": "builtin:preferences", "builtin_rows": 60},
        "federation": {
            "clients": 2, "rounds": 5000, "quorum": 0.5, "deadline": 4.0, "patience": 90.0,
        },
        "training": {"local_steps": 20, "batch_size": 8},
        "evaluation": {"per_client": False, "every": 5000, "samples": 0},
    }  # fmt: skip
    path, folder = apart.folder / f"{dark}.toml", apart.folder / f"dark-{dark}"
    path.write_text(Experiment.from_table(table).to_toml())
    words = ("run", path, "--engine", "flower", "--home", apart.server)
    log = apart.start("run", *words, "--set", f"output.folder={folder}")
    apart.wait(log, "round 3/5000", 120)
    apart.network.pull("c1")
    time.sleep(dark)
    apart.network.plug("c1")
    before, plugged = len(rounds(folder)), time.monotonic()
    while not any(r["clients"] == [0, 1] and not r["rejected"] for r in rounds(folder)[before:]):
        assert time.monotonic() < plugged + 120, log.read_text()[-2000:]
        time.sleep(0.5)
    back = time.monotonic() - plugged
    apart.call("stop", "--home", apart.server)
    apart.processes.pop("run").wait(60)
    lost = {r["round"]: r["rejected"] for r in rounds(folder) if r["rejected"]}
    ((round, (left_out,)),) = lost.items()  # then it was not asked: the others went on
    assert left_out["client"] == 1 and left_out["reason"] == "no answer within 4 seconds"
    alone = sum(r["clients"] == [0] for r in rounds(folder))
    assert alone > dark / 4
    print(
        f"dark for {dark} s: left out of round {round}, then {alone} without it, back after {back:.0f} s"
    )
