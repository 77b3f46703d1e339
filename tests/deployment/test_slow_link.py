"""Two clients behind lines of 10 Mbit: what a round takes with tensors as they are, and compressed."""

import json
import shutil

import pytest

from fedloom.experiment.experiment import Experiment
from machines import can_have_namespaces, machines

pytestmark = [
    pytest.mark.slow,
    pytest.mark.serial,
    pytest.mark.skipif(
        not can_have_namespaces() or shutil.which("tc") is None,
        reason="no network namespaces, or nothing that shapes traffic, on this machine",
    ),
]

RATE = 10e6 / 8
"""Bytes a second of a line of 10 Mbit."""


def played(own, name, wire):
    """Return the seconds of the rounds of a run, and the largest bytes a client had up and down in one."""
    table = {
        "data": {"source": "builtin:preferences", "builtin_rows": 60},
        "adapter": {"rank": 128},
        "federation": {"clients": 2, "rounds": 3},
        "training": {"local_steps": 1, "batch_size": 2},
        "evaluation": {"per_client": False, "every": 3, "samples": 0},
        **wire,
    }
    folder = own.run(Experiment.from_table(table), name)
    lines = (folder / "rounds.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["round"]]
    costs = [json.loads(line) for line in (folder / "costs.jsonl").read_text().splitlines()]
    train = [own for own in costs if own["phase"] == "train"]
    largest = {way: max(own[f"bytes_{way}"] for own in train) for way in ("up", "down")}
    return [record["seconds"] for record in records], largest


def test_a_round_over_a_slow_link_is_as_long_as_its_bytes_and_compression_shortens_it():
    with machines(2, apart=True) as own:
        own.start_all()
        for client in range(2):
            own.network.limit(f"c{client}", "10mbit")
        plain, bytes_plain = played(own, "plain", {})
        small, bytes_small = played(own, "small", {"wire": {"up": "small", "down": "int4"}})
    floor = (bytes_plain["up"] + bytes_plain["down"]) / RATE
    print(f"bytes of a round: {bytes_plain} plain, {bytes_small} compressed")
    print(
        f"seconds of rounds: {plain} plain (at least {floor:.2f} on the line), {small} compressed"
    )
    assert bytes_plain["up"] > 12 * bytes_small["up"]
    assert min(plain) > floor
    assert min(small) < min(plain) - 0.7 * floor
