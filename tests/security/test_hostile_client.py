"""An admitted client turns hostile and plays all it can think of, round after round.

It is in quarantine by the one rule there is, the others' result is that of a run without it, to the bit, and
neither the run's audit log, nor its records, nor the log of violations grows by more than is said here.

Over messages: real workers, the real engine, real messages of Flower in one process. Over streams: the same,
with the real streams over a socket, and clients that are threads at its other end.
"""

import contextlib
import json
import threading
import time
from dataclasses import replace

import pytest

from fedloom.deployment.violations import FILE, ViolationLog, read_violations
from fedloom.deployment.worker import Worker
from fedloom.engines.flower.streams import Streams
from fedloom.experiment.experiment import Experiment
from fedloom.federation.violations import KINDS
from fedloom.reports.run_page import write_report
from fedloom.runs.observers import Silent
from fedloom.runs.run import resume_run, run_experiment
from fedloom.wire.envelope import Envelope, ReplyHeader
from fedloom.wire.framing import LENGTH, connect, read_frame, reader, write_frame
from fedloom.wire.messages import METADATA
from fedloom.wire.packing import header_of
from loopback import resealed
from unchecked import rewritten

BAD, CLIENTS, ROUNDS = 2, 3, 30
RULE = {"offences": 3, "pause": 2}

pytestmark = pytest.mark.slow

LINE = 400
"""Bytes of an audit line of a refused answer, at most: round, action, kind, reason, two hashes."""


class Attacks:
    """What the client sends in place of its answer, one attack after the other."""

    def __init__(self, federation):
        self.federation, self.played, self.earlier = federation, [], []

    def signed(self, header, payload):
        return resealed(self.federation, BAD, header, payload)

    def numbers(self, envelope, header, **values):
        texts = {name: json.dumps(value) for name, value in values.items()}
        return self.signed(header, rewritten(envelope.payload, **texts))

    def spoiled(self, envelope, header, value):
        """The same payload with one float32 of it changed."""
        payload = bytearray(envelope.payload)
        payload[-4:] = value
        return self.signed(header, bytes(payload))

    def all(self):
        e299 = {"reward_accuracy": 3e299}
        return {
            "not signed": lambda e, h: (replace(e, signature=b"x" * 100), "forged"),
            "another's words": lambda e, h: (resealed(self.federation, 0, h, e.payload), "forged"),
            "a payload exchanged": lambda e, h: (replace(e, payload=b"x" * 900), "forged"),
            "an answer of long ago": lambda e, h: (self.earlier[0], "replayed"),
            "another round": lambda e, h: (
                self.signed(h.model_copy(update={"round": 10**6}), e.payload), "replayed",
            ),
            "NaN": lambda e, h: (self.spoiled(e, h, b"\x00\x00\xc0\x7f"), "not_finite"),
            "1e38": lambda e, h: (self.spoiled(e, h, b"\x99\x76\x96\x7e"), "out_of_range"),
            "3e299": lambda e, h: (self.numbers(e, h, metrics=e299), "out_of_range"),
            "-7": lambda e, h: (self.numbers(e, h, metrics={"reward_accuracy": -7}), "out_of_range"),
            "64 names": lambda e, h: (
                self.numbers(e, h, metrics={f"{h.round} {i}": 1.0 for i in range(64)}),
                "too_many_names",
            ),
            "2^40 rows": lambda e, h: (self.numbers(e, h, numbers=[2**40]), "out_of_range"),
            "rows that are no number": lambda e, h: (self.numbers(e, h, numbers=["9"]), "malformed"),
            "oversized": lambda e, h: (self.signed(h, e.payload + bytes(1 << 20)), "oversized"),
            "garbage": lambda e, h: (self.signed(h, b"\x80\x04\x95" * 99), "malformed"),
            "an essay for an error": lambda e, h: (
                self.signed(h.model_copy(update={"error": "\x1b[2J<script>" * 300}), b""), None,
            ),
            "work of a century": lambda e, h: (
                self.signed(h.model_copy(update={"joined": None, "work": [
                    h.work[0].model_copy(update={"flops": 1e23, "seconds": 1e8, "phase": "<b>"})
                ] * 16}), e.payload), "unseen",
            ),
        }  # fmt: skip

    def next(self, envelope, header):
        if not self.earlier:
            self.earlier.append(envelope)
        attacks = self.all()
        name = list(attacks)[len(self.played) % len(attacks)]
        found, kind = attacks[name](envelope, header)
        self.played.append((header.round, name, kind))
        return found


def table_of(table, folder):
    return {
        **table,
        "federation": {
            **table["federation"], "clients": CLIENTS, "rounds": ROUNDS, "quorum": 0.5, "patience": 2.0,
        },
        "training": {**table["training"], "local_steps": 1, "batch_size": 1},
        "evaluation": {**table["evaluation"], "per_client": False, "samples": 0},
        "output": {"folder": str(folder), "checkpoint_every": 10},
        "admission": RULE,
    }  # fmt: skip


def records(folder):
    lines = (folder / "rounds.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines][1:]


def states(folder):
    lines = map(json.loads, (folder / "audit.jsonl").read_text().splitlines())
    return [line["state"] for line in lines if line["event"] == "round"]


def play(loopback, table, folder, tamper=None, watch=None, resumed_at=None, streams=None):
    """Run the experiment with client 2 as it is told."""
    experiment = Experiment.from_table(table_of(table, folder))
    federation = loopback(CLIENTS)
    mail = federation.mail()
    attacks = Attacks(federation)

    def changed(node, envelope):
        header = envelope.read(ReplyHeader)
        if node != 100 + BAD or header.joined or not header.round:
            return envelope
        return tamper(attacks, envelope, header)

    mail.tamper = changed
    engine = federation.engine(experiment, mail, watch=watch, streams=streams)
    with contextlib.closing(engine):
        if resumed_at is None:
            run_experiment(experiment, observer=Silent(), remote=engine)
            return attacks

        class Stop(Silent):
            def round_done(self, record):
                if record.round == resumed_at:
                    raise KeyboardInterrupt

        with contextlib.suppress(Exception):
            run_experiment(experiment, observer=Stop(), remote=engine)
        again = federation.engine(experiment, mail, watch=watch)
        resume_run(folder, observer=Silent(), remote=again)
    return attacks


@pytest.fixture
def alone(loopback, table, tmp_path):
    """The states of the same run with client 2 gone."""
    play(loopback, table, tmp_path / "alone", lambda attacks, envelope, header: "gone")
    return states(tmp_path / "alone")


def by_hand(played):
    """In which rounds the rule lets the client be asked, given the kinds of what it sent."""
    asked, offended, until, number = [], 0, 0, 0
    for round in range(1, ROUNDS + 1):
        if round <= until:
            continue
        asked.append(round)
        offended += played[number][2] in KINDS
        number += 1
        if offended == RULE["offences"]:
            offended, until = 0, round + RULE["pause"]
    return asked


def test_over_messages(loopback, table, tmp_path, alone):
    log = ViolationLog(tmp_path / FILE)
    folder = tmp_path / "run"
    attacks = play(loopback, table, folder, Attacks.next, watch=log)
    found = records(folder)
    assert [round for round, *_ in attacks.played] == by_hand(attacks.played)
    assert len(attacks.played) >= len(attacks.all()) and len(found) == ROUNDS
    for round, name, kind in attacks.played:
        kinds = [(o["client"], o["kind"]) for o in found[round - 1]["offences"]]
        assert kinds == ([(BAD, kind)] if kind in KINDS else []), name
        assert {r["client"] for r in found[round - 1]["rejected"]} == (
            {BAD} if kind != "unseen" else set()
        ), name
    only_bad = [kind == "unseen" for _, _, kind in attacks.played]
    first = attacks.played[only_bad.index(True)][0] if any(only_bad) else ROUNDS + 1
    assert (
        states(folder)[:first] == alone[:first]
    )  # up to where its answer, with odd work, was sound
    assert first > 15
    paused = [record["paused"] for record in found]
    assert sum(map(bool, paused)) == ROUNDS - len(attacks.played)
    standing = read_violations(log.path).clients
    assert list(standing) == [BAD]
    assert sum(standing[BAD].kinds.values()) == sum(k in KINDS for *_, k in attacks.played)
    in_bytes(folder, tmp_path / "alone", log.path, len(attacks.played))
    page = write_report([folder]).read_text()
    assert page.count("<script") == 1  # the page's own
    assert "out of range" in page and "\x1b" not in page
    costs = [json.loads(line) for line in (folder / "costs.jsonl").read_text().splitlines()]
    assert {cost["phase"] for cost in costs} <= {"train", "reference", "evaluate"}


def in_bytes(folder, other, offences, attacks):
    """All files together grow by less than is said, whatever is sent."""

    def size(folder, name):
        return (folder / name).stat().st_size

    assert size(folder, "audit.jsonl") < size(other, "audit.jsonl") + LINE * attacks
    assert size(folder, "rounds.jsonl") < size(other, "rounds.jsonl") + 900 * attacks
    assert offences.stat().st_size < (attacks + 2 * ROUNDS) * 400


def test_a_resumed_run_decides_the_same(loopback, table, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    first = play(loopback, table, whole, Attacks.next)
    second = play(loopback, table, cut, Attacks.next, resumed_at=7)
    assert [round for round, *_ in second.played] == [round for round, *_ in first.played]
    assert states(cut) == states(whole)
    assert [facts(record) for record in records(cut)] == list(map(facts, records(whole)))


def facts(record):
    """What must be the same in both; reasons name the run and the message's number."""
    kinds = [(o["client"], o["kind"], o["count"]) for o in record["offences"]]
    return record["round"], record["clients"], record["paused"], kinds


def test_over_streams(loopback, table, tmp_path, alone, monkeypatch):
    """Too long, twice, before it is asked, garbage, another's number; it comes back each time."""
    place, stop = tmp_path / "s" / "run", threading.Event()
    waiting = {client: threading.Event() for client in range(CLIENTS)}
    sent = []

    def serve(worker, client):
        while not stop.is_set():
            try:
                with connect(place, 5.0) as connection:
                    write_frame(connection, json.dumps({"client": client}).encode())
                    waiting[client].set()
                    answer_all(worker, client, connection)
            except Exception:
                time.sleep(0.01)

    def answer_all(worker, client, connection):
        while (message := read_frame(reader(connection), lambda: 1 << 40)) is not None:
            answer = worker.answer(message, streamed=True)
            if client != BAD:
                write_frame(connection, answer)
                continue
            envelope = Envelope.unpack(answer)
            header = envelope.read(ReplyHeader)
            attack = len(sent) % 5
            sent.append((header.round, attack))
            if attack == 0:  # too long
                connection.sendall(LENGTH.pack(1 << 40) + bytes(100))
            elif attack == 1:  # garbage
                write_frame(connection, b"\x80\x04garbage" * 50)
            elif attack == 2:  # another's
                other = header.model_copy(update={"client": 0, "payload": ""})
                write_frame(connection, other.model_dump_json().encode())
            elif attack == 3:  # another round
                old = header.model_copy(update={"round": 9})
                text = old.model_dump_json(exclude_defaults=True).encode()
                write_frame(connection, replace(envelope, header=text).pack())
            else:  # NaN
                data, start = bytearray(envelope.payload), header_of(envelope.payload, 1 << 20)[1]
                assert METADATA and start < len(data)
                data[-4:] = b"\x00\x00\xc0\x7f"
                write_frame(connection, resealed(federation_of[0], BAD, header, bytes(data)).pack())

    federation_of, plain = [], type(loopback(1)).worker

    def worker(self, number, *own):
        federation_of[:] = [self]
        return plain(self, number, *own)

    monkeypatch.setattr(type(loopback(1)), "worker", worker)

    def open_stream(self, address, run):
        client = self.registration.number
        if self._streaming != run:
            self._streaming = run
            threading.Thread(target=serve, args=(self, client), daemon=True).start()
            waiting[client].wait(5.0)
            time.sleep(0.1)

    monkeypatch.setattr(Worker, "_open_stream", open_stream)
    log = ViolationLog(tmp_path / FILE)
    folder = tmp_path / "run"

    def streams(run, patience):
        opened.append(Streams(place, patience))
        return opened[-1]

    opened = []
    try:
        play(loopback, table, folder, Attacks.next, watch=log, streams=streams)
    finally:
        stop.set()
    found = records(folder)
    kinds = {o["kind"] for record in found for o in record["offences"]}
    assert {"oversized", "malformed", "replayed", "not_finite"} <= kinds
    assert all(o["client"] == BAD for record in found for o in record["offences"])
    assert all({r["client"] for r in record["rejected"]} <= {BAD} for record in found)
    assert all(0 in record["clients"] and 1 in record["clients"] for record in found)
    assert states(folder) == alone
    quarantined = sum(bool(record["paused"]) for record in found)
    assert quarantined >= ROUNDS // 4
    in_bytes(folder, tmp_path / "alone", log.path, ROUNDS)


def test_reports_by_the_thousand_are_one_record_a_round(loopback, table, tmp_path):
    """Who faces the network tells the run of each wrong call of a client; a flood of them is counted."""
    place = tmp_path / "s" / "run"
    log = ViolationLog(tmp_path / FILE)
    folder = tmp_path / "run"
    reports = []

    def streams(run, patience):
        own = Streams(place, patience)
        reports.append(own)
        return own

    class Flood(Silent):
        def round_done(self, record):
            if record.round:
                for _ in range(1000):
                    reports[0].report(BAD, "forbidden", "Control/StartRun " + "x" * 500)
                with connect(place, 5.0) as connection:
                    greeting = {"client": BAD, "offence": "oversized", "reason": "a body of 1 GB"}
                    write_frame(connection, json.dumps(greeting).encode())
                    connection.settimeout(5.0)
                    assert connection.recv(1) == b""

    settings = table_of(table, folder)
    settings["federation"] = {**settings["federation"], "rounds": 12}
    experiment = Experiment.from_table(settings)
    federation = loopback(CLIENTS)
    engine = federation.engine(experiment, watch=log, streams=streams)
    with contextlib.closing(engine):
        run_experiment(experiment, observer=Flood(), remote=engine)
    found = records(folder)
    assert found[1]["offences"] == [
        {"client": BAD, "kind": "forbidden", "reason": found[1]["offences"][0]["reason"], "count":
        1000}, {"client": BAD, "kind": "oversized", "reason": "a body of 1 GB", "count": 1},
    ]  # fmt: skip
    # violations in each round from 2 on: those of 2, 3 and 4 pause 5 and 6, of 5, 6 and 7 pause 8 and 9
    paused = [5, 6, 8, 9, 11, 12]
    assert [r["round"] for r in found if r["paused"]] == paused
    assert [r["round"] for r in found if BAD not in r["clients"]] == paused
    assert (folder / "audit.jsonl").stat().st_size < 110_000
    assert (folder / "rounds.jsonl").stat().st_size < 30_000
    assert log.path.stat().st_size < 60_000
    assert read_violations(log.path).clients[BAD].kinds["forbidden"] >= 100
