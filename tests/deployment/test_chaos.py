"""Many rounds, eight machines, and whatever can go wrong: the run ends, with the bits of its own record."""

import contextlib
import json
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest

from fedloom.experiment.experiment import Experiment
from fedloom.federation.admission import Admission
from fedloom.federation.protocol import Cohort
from fedloom.federation.rounds import Server
from fedloom.runs.assembly import assemble
from fedloom.runs.observers import Silent
from fedloom.runs.partitioning import partition_data
from fedloom.training.optimizers import round_learning_rate
from fedloom.training.results import reported
from fedloom.wire.messages import Answer
from links import Link
from machines import machines
from sampling import drawn, tries

CLIENTS, ROUNDS, BAD = 8, 60, 7
EARLY, LATE = range(25, 35), range(50, 60)
"""Rounds played when memory is read, long after the server's last start and before the run is written
out. It moves by some megabytes within seconds, so medians are compared: if all answers of the 25 rounds
between were kept, they would be 14.8 MB apart."""

OUT_OF_DATE = (0, 1)
"""Clients whose link is cut now and then."""

LONGEST = 840.0
"""Seconds."""


class Replay:
    """An engine in which clients are absent as a record says."""

    def __init__(self, engine, records):
        self.engine = engine
        self.rejected = {r["round"]: {x["client"] for x in r["rejected"]} for r in records}

    def sizes(self):
        return self.engine.sizes()

    def membership(self):
        return self.engine.membership()

    def absent(self):
        return {}

    def title(self, client):
        return f"client {client}"

    def exchange(self, exchange):
        gone = self.rejected[exchange.round] & exchange.requests.keys()
        for client in gone:
            yield Answer(client, error="absent")
        left = {c: data for c, data in exchange.requests.items() if c not in gone}
        yield from self.engine.exchange(replace(exchange, requests=left))

    def discard(self, clients):
        self.engine.discard(clients)


class SameCohorts(Server):
    """A server that asks whom a record says, of those that were there then."""

    def _cohort(self, round, presence):
        clients = tuple(self.recorded[round])
        last = round == self.federation.rounds
        rate, own = self.learning_rate(round), self.reported
        return Cohort(round, clients, presence, rate, last=last, reported=own)


def replayed(experiment, records):
    """The state of a simulation with the same participation record."""
    parts = assemble(experiment, partition_data(experiment))
    SameCohorts.recorded = {r["round"]: r["clients"] for r in records}
    server = SameCohorts(
        parts.method, Replay(parts.engine, records), experiment.federation,
        lambda round: round_learning_rate(experiment.training, round, experiment.federation.rounds),
        lambda state, round: None, lambda record, state: parts.engine.finish_round(),
        parts.ledger, Silent(), Admission(experiment.admission), reported=reported(parts.objective),
    )  # fmt: skip
    return server.run(parts.method.initial_state(parts.initial), 0)


def memory(own):
    """Resident bytes of the process that plays the rounds."""
    with contextlib.suppress(OSError, TypeError):
        found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{own.player()}/status").read_text())
        return int(found[1]) * 1024
    return None


def workers(own, client):
    """How many workers of a client have come so far as to listen."""
    return (own.folder / f"c{client}" / "worker.log").read_text().count(" listens for client")


def read(path):
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


@pytest.mark.serial
@pytest.mark.parametrize("rounds", tries(20, ROUNDS))
def test_the_run_survives_all_of_it(monkeypatch, rounds):
    table = {
        "data": {"source": "builtin:preferences", "builtin_rows": 400},
        "federation": {
            "clients": CLIENTS, "clients_per_round": 5, "rounds": rounds, "quorum": 0.2, "require": 0.2,
            "deadline": 20.0, "patience": 60.0, "reconnect": 2.0,
        },
        "training": {"local_steps": 25, "batch_size": 8},
        "admission": {"offences": 2, "pause": 10},
        "evaluation": {"per_client": False, "every": 5, "samples": 0},
    }  # fmt: skip
    experiment, rng = Experiment.from_table(table), drawn("chaos")
    start = time.monotonic()
    with machines(CLIENTS) as own:
        link = Link(own.port)
        own.start_server()

        def start_client(client, wait=False):
            words = own.joining(client)
            if client in OUT_OF_DATE:
                words = own.joining(client, server=f"localhost:{link.port}")
            here = Path(__file__).with_name("malicious")
            environment = os.environ.get("PYTHONPATH", "")
            if client == BAD:
                monkeypatch.setenv("PYTHONPATH", f"{here}:{environment}")
            log = own.start(f"c{client}", *words)
            monkeypatch.setenv("PYTHONPATH", environment)
            if wait:
                own.wait(log, "joined")

        for client in range(CLIENTS):
            start_client(client, wait=True)
        path, folder = own.folder / "chaos.toml", own.folder / "run"
        path.write_text(experiment.to_toml())
        words = ["run", path, "--engine", "flower", "--home", own.server]
        own.start("run", *words, "--set", f"output.folder={folder}")
        records, again, down, sizes, killed = folder / "rounds.jsonl", {}, 0, [], 0
        recovering = {}  # clients that were killed, and how many workers each had had by then
        while own.processes["run"].poll() is None:
            assert time.monotonic() - start < LONGEST, (own.folder / "run.log").read_text()[-3000:]
            time.sleep(1)
            done = len(read(records)) - 1
            for client in [c for c, moment in again.items() if time.monotonic() > moment]:
                del again[client]
                start_client(client)
            if down < 2 and done >= 8 * (down + 1):
                down += 1
                own.kill("run")
                own.kill("server")
                time.sleep(2)
                own.start_server()
                own.start(
                    "run", "run", "--resume", folder, "--engine", "flower", "--home", own.server
                )
                continue
            if resident := memory(own):
                sizes.append((done, resident))
            if done >= 1 and rng.random() < 0.08:
                link.cut(rng.uniform(0.5, 8))
            recovering = {c: count for c, count in recovering.items() if workers(own, c) == count}
            if done >= 1 and rng.random() < 3.6 / rounds and len(recovering) < 2:
                client = rng.choice([c for c in range(CLIENTS) if c not in recovering])
                recovering[client] = workers(own, client)
                own.kill(f"c{client}", signal.SIGKILL)
                again[client] = time.monotonic() + rng.uniform(2, 10)
                killed += 1
        log = (own.folder / "run.log").read_text()
        played = (own.server / "logs" / "serverapp.out").read_text()
        assert own.processes["run"].returncode == 0, f"{log[-3000:]}\n{played[-3000:]}"
        found = [record for record in read(records) if record["round"]]
        events = read(folder / "audit.jsonl")
        verified = own.call("audit", "verify", folder).stdout
    assert [record["round"] for record in found] == list(range(1, rounds + 1))
    began = [event["after"] for event in events if event["event"] == "began"]
    assert len(began) == 3 and began == sorted(began) and "are intact" in verified
    lost = [(r["round"], x["client"], x["reason"]) for r in found for x in r["rejected"]]
    bad = [reason for _, client, reason in lost if client == BAD]
    assert bad and any("NaN" in reason for reason in bad)
    assert any(BAD in map(int, r["paused"]) for r in found)
    offenders = {o["client"]: o for r in found for o in r["offences"]}
    assert set(offenders) == {BAD}, offenders  # whatever befell the others, they did nothing wrong
    assert any(client != BAD for _, client, _ in lost) and killed >= 3
    last = [event["state"] for event in events if event["event"] == "round"][-1]
    assert replayed(experiment, found).digest() == last
    seconds = time.monotonic() - start
    print(
        f"{seconds:.0f} s, {killed} clients killed, server killed {down} times, {len(lost)} answers lost; "
        f"{sorted({reason for *_, reason in lost})}"
    )
    assert seconds < 900
    if rounds == ROUNDS:
        early, late = (
            median(size for done, size in sizes if done in when) for when in (EARLY, LATE)
        )
        print(f"memory {early / 2**20:.1f} to {late / 2**20:.1f} MiB")
        assert late - early < 8 << 20, sizes
