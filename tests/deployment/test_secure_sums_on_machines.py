"""Secure aggregation over real processes, of which one is killed at each stage: a right sum, or none."""

import json
import time

import pytest

from deployment.test_secure_sums import away
from fedloom.experiment.experiment import Experiment
from fedloom.federation.secure_exchange import KEYS, REVEALED, SHARES, SIGNATURES
from fedloom.security.audit_log import events
from fedloom.security.signing_keys import fingerprint
from loopback import client_file
from machines import machines

CLIENTS = 4


class Federation:
    """A coordinator and clients that name each other's keys."""

    def __init__(self, own):
        self.own = own
        lines = [(own.folder / f"{n}.pub").read_text() for n in range(CLIENTS)]
        self.prints = list(map(fingerprint, lines))

    def offer(self, experiment):
        for number in range(CLIENTS):
            others = [own for n, own in enumerate(self.prints) if n != number]
            client_file(
                self.own.folder / f"c{number}.toml",
                models=[experiment.model.path],
                policy={"privacy": {"secure_aggregation": True, "peers": others}},
            )

    def begin(self, experiment, name):
        """Begin a run in the background; return its folder."""
        self.offer(experiment)
        path, folder = self.own.folder / f"{name}.toml", self.own.folder / "runs" / name
        path.write_text(experiment.to_toml())
        words = ["run", path, "--engine", "flower", "--home", self.own.server]
        self.own.start("run", *words, "--set", f"output.folder={folder}")
        return folder

    def noted(self, client, run, event, action, round):
        """Whether a client's log says that it was asked for a stage, or has answered it."""
        path = self.own.folder / f"c{client}" / "audit.jsonl"
        found = events(path, event) if path.exists() else []
        return any((e["run"], e["action"], e["round"]) == (run, action, round) for e in found)


@pytest.fixture(scope="module")
def four():
    with machines(CLIENTS) as own:
        own.start_all()
        yield Federation(own)


def summed(table, **sections):
    federation = {"rounds": 2, "clients": CLIENTS, "patience": 60.0, "reconnect": 1.0}
    return Experiment.from_table(
        {
            **table,
            "federation": {
                **federation,
                "quorum": 0.5,
                "require": 3,
                **sections.get("federation", {}),
            },
            "training": {**table["training"], "local_steps": 30},
            "evaluation": {"per_client": False, "samples": 0, "max_examples": 4},
            "privacy": {"secure_aggregation": True},
        }
    )


def run_id(folder, process, log):
    """The run's id, once its clients have been met."""
    end = time.monotonic() + 240
    while time.monotonic() < end and process.poll() is None:
        if (folder / "run.json").exists():
            return json.loads((folder / "run.json").read_text())["id"]
        time.sleep(0.05)
    raise AssertionError(f"the run did not begin: {log.read_text()[-3000:]}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("event", "action"),
    [("answered", KEYS), ("asked", "train"), ("answered", "train"), ("answered", SIGNATURES)],
)
def test_a_client_that_is_killed_leaves_a_right_sum(four, table, federate, event, action):
    """Killed once its log says so: the next stage finds it gone, or its answer was there."""
    experiment = summed(table)
    name = f"{event}-{action}"
    folder = four.begin(experiment, name)
    process = four.own.processes["run"]
    try:
        run = run_id(folder, process, four.own.folder / "run.log")
        end = time.monotonic() + 60
        while not four.noted(3, run, event, action, 1) and time.monotonic() < end:
            time.sleep(0.01)
        four.own.kill("c3")
        assert process.wait(120) == 0, (four.own.folder / "run.log").read_text()[-3000:]
    finally:
        if process.poll() is None:
            four.own.kill("run")
        four.own.processes.pop("run", None)
        if "c3" not in four.own.processes:
            four.own.start_client(3)
    records = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    gone = {
        record["round"]: {own["client"] for own in record["rejected"]}
        | (set(range(CLIENTS)) - set(record["clients"]))
        for record in records
        if record["round"]
    }
    assert set(gone) == {1, 2} and all(clients <= {3} for clients in gone.values())
    if (event, action) in (("answered", KEYS), ("asked", "train")):  # it cannot have answered
        assert gone[1] == {3}
    here = federate(experiment, away(lambda asked: gone[asked.round]))
    states = [own["state"] for own in events(folder, "round") if own["round"]]
    assert states[-1] == here.state.digest()
    asked = {own["action"] for own in events(folder, "accepted")}
    assert {KEYS, SHARES, "train", SIGNATURES, REVEALED} <= asked
    four.own.call("audit", "verify", folder)


@pytest.mark.slow
def test_a_server_that_is_killed_in_a_sum_and_resumed_gives_the_same_bits(four, table, federate):
    experiment = summed(table)
    folder = four.begin(experiment, "resumed")
    run = run_id(folder, four.own.processes["run"], four.own.folder / "run.log")
    end = time.monotonic() + 120
    while not four.noted(0, run, "asked", "train", 2) and time.monotonic() < end:
        time.sleep(0.01)
    four.own.kill("run")
    four.own.kill("server")
    four.own.start_server()
    four.own.call(
        "run", "--resume", folder, "--engine", "flower", "--home", four.own.server, timeout=300
    )
    here = federate(experiment, away(lambda asked: ()))
    states = {own["round"]: own["state"] for own in events(folder, "round")}
    assert states[2] == here.state.digest()
    assert len(list(events(folder, "began"))) == 2
