"""What clients and networks do wrong between machines: left out with the reason, and the round goes on."""

import contextlib
import json
import threading
import time
import tomllib
from dataclasses import replace

import pytest
import torch

import fedloom
from fedloom.deployment.worker import serve
from fedloom.errors import (
    ConnectionFailed,
    DataError,
    Interrupted,
    RoundFailed,
    SettingsError,
    TrainingError,
)
from fedloom.experiment.experiment import Experiment
from fedloom.methods import METHODS
from fedloom.runs.observers import Silent
from fedloom.runs.run import resume_run, run_experiment
from fedloom.security.audit_log import events, match
from fedloom.wire.envelope import Envelope, ReplyHeader, seal
from fedloom.wire.framing import connect, read_frame, reader, write_frame
from loopback import Outcome, of, resealed, tampering

CASES = {
    "unsigned": (
        lambda e, h, f: Envelope(e.header, e.payload),
        "not signed with the key of client 1",
    ),
    "signed by another": (
        lambda e, h, f: resealed(f, 2, h, e.payload),
        "not signed with the key of client 1",
    ),
    "another payload": (
        lambda e, h, f: Envelope(e.header, e.payload[:-1] + b"x", e.signature),
        "does not match the SHA-256 in its header",
    ),
    "of another round": (
        lambda e, h, f: resealed(f, 1, h.model_copy(update={"round": 7}), e.payload),
        "round 7",
    ),
    "of another message": (
        lambda e, h, f: resealed(f, 1, h.model_copy(update={"number": 1}), e.payload),
        "message 1 of run",
    ),
    "of another run": (
        lambda e, h, f: resealed(f, 1, h.model_copy(update={"run": "f" * 32}), e.payload),
        "of run ffffffff",
    ),
    "of a run before it was resumed": (
        lambda e, h, f: resealed(f, 1, h.model_copy(update={"began": 9}), e.payload),
        "is rejected: it is of",
    ),
    "in the name of another": (
        lambda e, h, f: resealed(f, 2, h.model_copy(update={"client": 2}), e.payload),
        "it is of client 2",
    ),
    "no header": (lambda e, h, f: Envelope(b"{", e.payload, e.signature), "header is malformed"),
    "a long header": (
        lambda e, h, f: Envelope(b" " * (1 << 20), b"", e.signature),
        "header has 1048576 bytes",
    ),
    "costs that cannot be": (
        lambda e, h, f: resealed(
            f, 1, h.model_copy(update={"work": [h.work[0].model_copy(update={"flops": -1.0})]}),
            e.payload,
        ),
        "header is malformed",
    ),
    "an error of Flower": (lambda e, h, f: "Node Unavailable", "Node Unavailable"),
    "too many bytes": (
        lambda e, h, f: resealed(f, 1, h, e.payload + bytes(1 << 20)),
        "the schema allows",
    ),
    "pickle": (
        lambda e, h, f: resealed(f, 1, h, b"\x80\x04\x95" + bytes(100)),
        "payload header is damaged",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_bad_answer_is_left_out_with_the_reason(deployed, once, case):
    change, reason = CASES[case]
    found = deployed(break_=tampering(1, change))
    for record in found.rounds:
        assert reason in of(record, 1)
        assert of(record, 0) is None and of(record, 2) is None
    assert found.states == once("client 1 is absent", lambda: absent(deployed, found, 1))


def absent(deployed, found, client):
    """The states of a run in which that client never answers."""
    folder = str(found.folder.with_name("absent"))
    gone = tampering(client, lambda e, h, f: "gone")
    return deployed(break_=gone, output={"folder": folder}).states


def test_who_does_not_answer_in_time_is_left_out_and_its_late_answer_dropped(deployed):
    def slow(mail, federation):
        def order(due):  # client 1's first answer comes with the next round's
            held = [m for m in due if m.metadata.dst_node_id == 101 and not late]
            if any(len(e.payload) for n, e in mail.pushed if n == 101):
                late.extend(held) if len(mail.pushed) > 6 else None
                return [m for m in due if m not in held]
            return due

        late = []
        mail.order = order

    found = deployed(break_=slow, federation={"deadline": 0.05, "rounds": 4})
    assert of(found.rounds[0], 1) == "no answer within 0.05 seconds"
    assert found.engine.late == 1 and len(found.events("late")) == 1
    answered = [event["client"] for event in found.events("accepted")]
    assert answered.count(0) == 4


def test_another_is_drawn_for_who_is_lost(deployed):
    settings = {"clients_per_round": 2, "replacements": 1, "rounds": 1}
    plain = deployed(clients=4, federation=settings)
    lost = plain.rounds[0]["clients"][0]
    found = deployed(
        clients=4,
        federation=settings,
        break_=tampering(lost, lambda e, h, f: "gone"),
        output={"folder": str(plain.folder.with_name("second"))},
    )
    (record,) = found.rounds
    assert record["replaced"] == [lost] and of(record, lost) == "gone"
    assert len(record["clients"]) == 2 and lost not in record["clients"]
    asked = [event["client"] for event in found.events("sent")]
    assert (
        sorted(asked) == sorted([*plain.rounds[0]["clients"], *record["clients"]][:3])
        or len(asked) == 3
    )


def test_a_quorum_that_is_not_there_ends_the_run_with_its_state_saved(deployed):
    def all_gone(mail, federation):
        mail.tamper = lambda node, e: e if e.read(ReplyHeader).joined else "gone"

    with pytest.raises(RoundFailed, match="0 of 3 clients gave a usable answer"):
        deployed(break_=all_gone)


def test_too_few_clients_are_waited_for_and_then_named(deployed):
    def offline(mail, federation):
        mail.offline = {100, 101, 102}

    with pytest.raises(RoundFailed, match=r"0 of 3 clients were ready within .*patience = 0\.2"):
        deployed(break_=offline, federation={"patience": 0.2})


def test_who_is_not_let_in_does_not_take_part(deployed):
    def stranger(mail, federation):
        federation.members().revoke("client-2")

    found = deployed(break_=stranger, federation={"patience": 0.3})
    assert all(record["clients"] == [0, 1] for record in found.rounds)
    (refused,) = found.events("refused_join")
    assert "not signed with the key of client 2" in refused["reason"]


@pytest.mark.parametrize(
    ("claim", "reason"),
    [
        ({"model": "0" * 64}, "its model or tokenizer differs: SHA-256 000000000000"),
        ({"version": "0.0.9", "protocol": 1}, "it has fedloom 0.0.9 (protocol 1), the server"),
    ],
)
def test_another_model_or_version_is_not_let_in(deployed, claim, reason):
    def other(mail, federation):
        def tamper(node, envelope):
            header = envelope.read(ReplyHeader)
            if header.joined is None or node != 101:
                return envelope
            joined = header.joined.model_copy(update=claim)
            return resealed(federation, 1, header.model_copy(update={"joined": joined}), b"")

        mail.tamper = tamper

    found = deployed(break_=other, federation={"patience": 0.3})
    assert all(record["clients"] == [0, 2] for record in found.rounds)
    (refused,) = found.events("refused_join")
    assert reason in refused["reason"]


def restarted(mail, federation, when):
    """Have client 1's machine start anew before it is asked in a round."""
    done = []

    def order(due):
        for message in due:
            if message.metadata.dst_node_id == 101 and not done and when(mail):
                done.append(1)
                mail.workers[101] = federation.worker(1)
        return due

    mail.order = order


@pytest.mark.parametrize("method", ["fedpdpo", "scaffold", "local_only"])
@pytest.mark.slow
def test_a_client_that_is_started_anew_still_has_what_it_keeps(deployed, method):
    settings = {"method": {"name": method}, "federation": {"rounds": 3}}
    plain = deployed(**settings)

    def restart(mail, federation):
        restarted(mail, federation, lambda mail: len(mail.pushed) >= 9)

    found = deployed(
        break_=restart, output={"folder": str(plain.folder.with_name("second"))}, **settings
    )
    assert found.states == plain.states
    assert [r["train"] for r in found.rounds] == [r["train"] for r in plain.rounds]


def test_a_message_that_comes_twice_is_answered_twice_and_done_once(deployed):
    found = deployed()
    node = found.mail.pushed[-2][0]
    worker = found.mail.workers[node]
    worker.run.parts.local.exchange = None  # a second training would fail
    last = [e for n, e in found.mail.pushed if n == node][-1].pack()
    assert worker.answer(last, streamed=False) == worker.answer(last, streamed=False)


@pytest.mark.slow
def test_a_run_that_failed_is_resumed_with_the_same_bits(deployed, table, tmp_path):
    plain = deployed(federation={"rounds": 3}, method={"name": "fedpdpo"})

    class Kill(Exception):
        pass

    def killed(mail, federation):
        real = mail.push_messages

        def push(messages):
            if len(mail.pushed) == 8:  # client 0 and 1 have been asked in round 2
                raise Kill
            return real(messages)

        mail.push_messages = push

    folder = plain.folder.with_name("second")
    seen = {}

    def keep(mail, federation):
        killed(mail, federation)
        seen["federation"], seen["mail"] = federation, mail

    with pytest.raises(Kill):
        deployed(
            federation={"rounds": 3},
            method={"name": "fedpdpo"},
            break_=keep,
            output={"folder": str(folder)},
        )
    experiment = Experiment.from_toml(folder / "experiment.toml")
    del seen["mail"].push_messages
    for message in list(seen["mail"]._waiting):  # they have worked on what the server forgot
        seen["mail"].pull_messages([message])
    with pytest.raises(SettingsError, match=r"was run with --engine flower;.*--engine flower"):
        resume_run(folder, observer=Silent())
    engine = seen["federation"].engine(experiment, seen["mail"])
    resume_run(folder, observer=Silent(), remote=engine)
    found = Outcome(folder, engine, seen["mail"], seen["federation"])
    assert found.states[-1] == plain.states[-1]
    for client in range(3):  # what was asked of them twice is in both logs
        assert match(folder, seen["federation"].home(client).path).asked
    began = found.events("began")
    assert [event["after"] for event in began] == [-1, 1]


def test_private_rows_stay_with_their_owners(deployed, rows_file, loopback, table, tmp_path):
    def pairs(start, count):
        return [
            {"question": f"Who is {i}?", "good": f"It is number {i}.", "bad": "No idea at all."}
            for i in range(start, start + count)
        ]

    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    held_out = rows_file(pairs(900, 6), "test.jsonl")
    federation = loopback(2)
    own = {}
    for client in range(2):
        rows = rows_file(pairs(100 * client, 12 + client), f"own-{client}.jsonl")
        text = f'[data]\nsource = "{rows}"\nkind = "preference"\n'
        text += "columns = " + json.dumps(columns).replace(":", " =") + "\n"
        own[client] = tmp_path / f"own-{client}.toml"
        text += f'[policy]\nmodels = ["{table["model"]["path"]}"]\n'
        own[client].write_text(text)
    settings = {
        **table,
        "data": {
            "source": "clients", "kind": "preference", "test_source": held_out,
            "columns": columns,
        },
        "federation": {"clients": 2, "rounds": 2, "patience": 1.0},
    }  # fmt: skip
    experiment = Experiment.from_table(settings)
    mail = federation.mail(own=own)
    engine = federation.engine(experiment, mail)
    result = run_experiment(experiment, observer=Silent(), remote=engine)
    found = Outcome(result.folder, engine, mail, federation)
    partition = json.loads((found.folder / "partition.json").read_text())
    assert [c["train"] for c in partition["clients"]] == [11, 12]
    assert all(record["evaluation"]["clients"]["each"] for record in found.rounds)
    for path in found.folder.rglob("*"):
        assert not path.is_file() or b"number 10" not in path.read_bytes()


@pytest.mark.parametrize("bad", ["a row", "a file that is not there"])
def test_what_is_wrong_with_private_rows_stays_with_their_owner(
    rows_file, loopback, table, tmp_path, caplog, bad
):
    rows = [{"prompt": f"Q{i}?", "chosen": "Yes.", "rejected": "No."} for i in range(9)]
    rows.append(
        {"prompt": "Mrs Miller?", "chosen": {"role": "HIV", "content": "Yes."}, "rejected": "No."}
    )
    path, own = rows_file(rows, "miller.jsonl"), tmp_path / "own.toml"
    source = path if bad == "a row" else "/data/millr.jsonl"
    own.write_text(
        f'[data]\nsource = "{source}"\nkind = "preference"\nmax_bad_share = 0.0\n'
        f'[policy]\nmodels = ["{table["model"]["path"]}"]\n'
    )
    private = {
        "source": "clients", "kind": "preference", "max_bad_share": 0.0,
        "test_source": rows_file(rows[:6], "test.jsonl"),
    }  # fmt: skip
    settings = {**table, "data": private, "federation": {"clients": 1, "patience": 0.1}}
    experiment = Experiment.from_table(settings)
    federation = loopback(1)
    mail = federation.mail(own={0: own})
    engine = federation.engine(experiment, mail)
    with pytest.raises(RoundFailed, match=r"worker\.log on its machine says why") as told:
        run_experiment(experiment, observer=Silent(), remote=engine)
    sent = b"".join(envelope.pack() for _, envelope in mail.pulled).decode(errors="replace")
    for secret in ("Miller", "HIV", "mill", "/data"):
        assert secret not in str(told.value) and secret not in sent
    assert ("HIV" if bad == "a row" else "/data/millr.jsonl") in caplog.text


def test_private_rows_are_not_looked_for_here(table, rows_file, tmp_path):
    held_out = rows_file([{"prompt": "a", "chosen": "b", "rejected": "c"}], "held_out.jsonl")
    private = {"source": "clients", "kind": "preference", "test_source": held_out}
    with pytest.raises(DataError, match="on other machines; use --engine flower"):
        run_experiment(Experiment.from_table({**table, "data": private}), observer=Silent())
    assert not list(tmp_path.glob("run*"))


def test_a_run_in_one_process_is_not_resumed_between_machines(experiment, loopback):
    settings = experiment(federation={"rounds": 1}, training={"local_steps": 1})
    folder = fedloom.run(settings).folder
    with pytest.raises(SettingsError, match="was run with --engine simulation"):
        resume_run(folder, observer=Silent(), remote=loopback(3).engine(settings))


def test_a_file_of_all_clients_can_be_dealt_as_a_simulation_deals_it(
    table, rows_file, loopback, tmp_path
):
    rows = [
        {"prompt": f"Who is {i}?", "chosen": f"It is {i}.", "rejected": "No idea."}
        for i in range(60)
    ]
    path, own = rows_file(rows), tmp_path / "own.toml"
    own.write_text(
        f'[data]\nsource = "{path}"\nkind = "preference"\nshare = "experiment"\n'
        f'[policy]\nmodels = ["{table["model"]["path"]}"]\n'
    )
    table |= {"data": {"source": path, "kind": "preference"}, "training": {"local_steps": 1}}
    states = []
    for name in ("here", "there"):
        experiment = Experiment.from_table({**table, "output": {"folder": str(tmp_path / name)}})
        federation = loopback(3)
        engine = federation.engine(experiment, federation.mail(own=dict.fromkeys(range(3), own)))
        remote = engine if name == "there" else None
        result = run_experiment(experiment, observer=Silent(), remote=remote)
        states.append(Outcome(result.folder, engine, None, federation).states)
    assert states[0] == states[1]


def test_rows_that_the_server_names_are_not_read(deployed, rows_file):
    rows = [{"prompt": f"Q {i}?", "chosen": f"Yes {i}.", "rejected": "No."} for i in range(40)]
    data = {"source": rows_file(rows), "kind": "preference", "builtin_rows": 60}
    said = r"data\.source: the experiment's setting differs from this client's"
    with pytest.raises(RoundFailed, match=said):
        deployed(data=data, federation={"patience": 0.3})


def test_a_message_that_is_not_the_servers_is_not_answered(deployed):
    found = deployed()
    worker = found.mail.workers[100]
    header, payload = found.mail.pushed[-1][1].header, found.mail.pushed[-1][1].payload
    from fedloom.errors import MessageError

    for forged in (Envelope(header, payload), Envelope(header, payload, b"x" * 70)):
        with pytest.raises(MessageError, match="not signed by a server"):
            worker.answer(forged.pack(), streamed=False)


def test_a_model_of_the_clients_own_is_written_on_its_own_machine(deployed):
    found = deployed(method={"name": "fedpdpo"})
    for client in range(3):
        (model,) = (found.federation.home(client).path / "runs").glob("*/model")
        assert (model / "adapter_model.safetensors").is_file()
    assert not (found.folder / "clients").exists()
    kept = list((found.federation.home(0).path / "runs").glob("*/kept/*"))
    assert kept and all(oct(path.stat().st_mode)[-3:] == "600" for path in kept)


def test_no_tensor_of_a_personal_part_is_in_any_message(deployed):
    found = deployed(method={"name": "fedpdpo"})
    personal = found.mail.workers[100].run.parts.local.store.slots(0)["personal"]
    both = [*found.mail.pushed, *found.mail.pulled]
    sent = b"".join(envelope.payload for _, envelope in both)
    shared = found.mail.workers[100].run.parts.local.resources[0].model.read()
    assert any(tensor.numpy().tobytes() in sent for tensor in shared.values())  # it would be found
    for tensor in personal.values():
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()[:64]
        assert len(set(raw)) < 3 or raw not in sent


def test_the_engine_is_not_needed_to_replace_a_broken_header():
    header = ReplyHeader(run="a", began=1, client=0, round=0, number=1)
    packed = seal(header, b"x").pack()
    assert Envelope.unpack(packed).read(ReplyHeader) == replace_payload(header, packed)


def replace_payload(header, packed):
    return header.model_copy(update={"payload": Envelope.unpack(packed).read(ReplyHeader).payload})


def failing(monkeypatch, method, rounds):
    """Have client 1 fail in some rounds, before it keeps anything."""
    plain = method.handlers

    def handlers(self):
        def train(client, payload):
            if client.id == 1 and client.round in rounds:
                raise TrainingError("it fell over")
            return plain(self)["train"](client, payload)

        return {**plain(self), "train": train}

    monkeypatch.setattr(method, "handlers", handlers)


LOST = {
    "refused": lambda e, h, f: resealed(f, 1, h, b"junk"),
    "not trusted": lambda e, h, f: Envelope(e.header, e.payload),
    "lost": lambda e, h, f: "gone",
}


@pytest.mark.slow
@pytest.mark.parametrize("how", LOST)
@pytest.mark.parametrize("method", [pytest.param("scaffold", marks=pytest.mark.slow), "fedpdpo"])
def test_what_a_client_kept_over_an_answer_that_does_not_count_is_undone(
    deployed, once, monkeypatch, method, how
):
    settings = {"method": {"name": method}, "federation": {"rounds": 4}}
    found = deployed(break_=tampering(1, LOST[how], rounds=(2, 3)), **settings)
    failing(monkeypatch, METHODS[method][1], rounds=(2, 3))
    settings["output"] = {"folder": str(found.folder.with_name("failing"))}
    for record in found.rounds:
        assert (of(record, 1) is not None) == (record["round"] in (2, 3))
    assert found.states == once(f"{method} fails", lambda: deployed(**settings).states)
    assert found.states == once(f"{method} fails here", lambda: simulated(found))


def simulated(found):
    """The states of a simulation of the same experiment."""
    folder = found.folder.with_name("simulated")
    written = tomllib.loads((found.folder / "experiment.toml").read_text())
    written["output"]["folder"] = str(folder)
    fedloom.run(Experiment.from_table(written))
    lines = map(json.loads, (folder / "audit.jsonl").read_text().splitlines())
    return [line["state"] for line in lines if line["event"] == "round"]


class Stop(Silent):
    def round_done(self, record):
        if record.round == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("anew", [False, True])
@pytest.mark.slow
def test_what_does_not_count_is_undone_by_a_run_that_is_resumed_too(
    loopback, experiment, monkeypatch, tmp_path, anew
):
    settings = {"method": {"name": "scaffold"}, "training": {"local_steps": 1}}
    settings["federation"] = {"rounds": 4, "patience": 1.0}
    here, there = (
        experiment(**settings, output={"folder": str(tmp_path / name)})
        for name in ("here", "there")
    )
    federation = loopback(3)
    mail = federation.mail()
    tampering(1, LOST["refused"], rounds=(2,))(mail, federation)
    with pytest.raises(Interrupted):
        run_experiment(there, observer=Stop(), remote=federation.engine(there, mail))
    mail = federation.mail() if anew else replace(mail, tamper=lambda node, envelope: envelope)
    resume_run(tmp_path / "there", observer=Silent(), remote=federation.engine(there, mail))
    failing(monkeypatch, METHODS["scaffold"][1], rounds=(2,))
    run_experiment(here, observer=Silent())
    states = [
        [event["state"] for event in events(tmp_path / name, "round")] for name in ("here", "there")
    ]
    assert states[0] == states[1] and len(states[0]) == 5


def test_a_message_that_a_worker_died_over_is_begun_as_if_it_had_not_come(deployed):
    found = deployed(method={"name": "scaffold"})
    last = [e for n, e in found.mail.pushed if n == 100 and e.payload][-1]
    first = [e.payload for n, e in found.mail.pulled if n == 100 and e.payload][-1]
    again = found.federation.worker(0).answer(last.pack(), streamed=False)
    assert Envelope.unpack(again).payload == first


def test_what_was_sent_before_a_run_was_resumed_is_not_done(deployed):
    found = deployed()
    worker = found.mail.workers[100]
    worker.run.began = 2
    stale = [e for n, e in found.mail.pushed if n == 100 and e.payload][-1].pack()
    header = Envelope.unpack(worker.answer(stale, streamed=False)).read(ReplyHeader)
    assert header.error == "the run has been resumed since this was sent"


@pytest.mark.slow
def test_a_worker_that_works_is_not_idle_however_long_it_takes(loopback):
    federation = loopback(1)
    worker, home = federation.worker(0), federation.home(0)
    working, done, ended = threading.Event(), threading.Event(), threading.Event()

    def answer(message, *, streamed):
        with worker._lock:
            working.set()
            done.wait(10)
        return b"answer"

    def served():
        serve(worker, home, idle=0.5)
        ended.set()

    worker.answer = answer
    with contextlib.closing(connect_when_there(served, home.socket)) as asking:
        write_frame(asking, b"question")
        assert working.wait(5) and not ended.wait(2.5)  # it looks every second
        done.set()
        assert read_frame(reader(asking), lambda: 10) == b"answer"
    assert ended.wait(5)


def connect_when_there(served, socket):
    threading.Thread(target=served, daemon=True).start()
    for _ in range(100):
        with contextlib.suppress(ConnectionFailed):
            return connect(socket)
        time.sleep(0.01)
    raise AssertionError("nobody listens")
