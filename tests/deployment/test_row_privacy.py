"""Row-level privacy between machines: each client's own noise, ledger and budget."""

import json
import threading
import time

import pytest
import torch

import fedloom
from fedloom.deployment.error_report import LINES, Sentence
from fedloom.deployment.privacy_budget import ledger_of
from fedloom.errors import RoundFailed
from fedloom.experiment.experiment import Experiment
from fedloom.methods.bases.parameter_averaging import TRAIN_REPLY_NUMBERS
from fedloom.privacy.accounting import Releases, epsilon
from fedloom.runs.observers import Silent
from fedloom.runs.run import run_experiment
from fedloom.security.audit_log import events
from fedloom.training.results import reported
from fedloom.wire.envelope import ReplyHeader
from fedloom.wire.messages import Payload, decode, encode
from fedloom.wire.schema import NumberSpec, Schema
from hostile import HostileServer
from loopback import client_file, resealed
from machines import machines

PRIVATE = {"unit": "row", "delta": 1e-3, "noise_multiplier": 1.0, "accountant": "rdp"}
SPENT = f"policy.privacy.max_epsilon: {LINES['policy.privacy.max_epsilon']}"


@pytest.fixture
def private(table):
    """A small private experiment as a table: 2 clients, 2 rounds of 2 steps."""
    return {
        **table,
        "federation": {"rounds": 2, "clients": 2, "patience": 1.0},
        "training": {"optimizer": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "local_steps": 2, "batch_size": 8},
        "evaluation": {"per_client": False, "samples": 0, "max_examples": 4},
        "privacy": PRIVATE,
    }  # fmt: skip


@pytest.fixture
def server(loopback, table, tmp_path):
    """A server that asks one client of two whatever it likes."""

    def make(federation=None, **policy):
        federation = federation or loopback(2)
        path = client_file(tmp_path / "my.toml", models=[table["model"]["path"]], policy=policy)
        found = HostileServer(federation.worker(0, path))
        found.federation = federation
        return found

    return make


def train(found, run, round=1, change=0.0, rate=1.0, number=None):
    """Ask for a training that starts from the initial adapter, changed; return the update and the header."""
    parts = found.worker.run.parts
    adapter = {name: own + change for name, own in parts.local.resources[0].initial.items()}
    schema = Schema.of(adapter, (NumberSpec("learning_rate"),))
    answer = Schema.of(adapter, TRAIN_REPLY_NUMBERS, reported(parts.objective))
    own = {} if number is None else {"number": number}
    envelope, header = found.send(
        encode(Payload(adapter, {"learning_rate": rate}), schema),
        kind="exchange", run=run, action="train", round=round, request=schema.to_table(),
        reply=answer.to_table(), **own,
    )  # fmt: skip
    if header.error:
        return None, header
    sent = decode(envelope.payload, answer).tensors
    return torch.cat([(sent[name] - own).flatten() for name, own in adapter.items()]), header


def steps(found):
    """Noisy steps by the client's ledger, of each set of terms."""
    ledger = ledger_of(found.federation.home(0))
    return [ledger.made(own) for own in ledger.runs()]


def alike(one, two):
    """Correlation of two updates."""
    return float(torch.corrcoef(torch.stack([one, two]))[0, 1])


@pytest.mark.slow
def test_with_noise_from_the_seed_machines_have_the_bits_of_a_simulation(
    private, loopback, tmp_path
):
    table = {**private, "privacy": {**PRIVATE, "seeded": True}}
    here = Experiment.from_table({**table, "output": {"folder": str(tmp_path / "here")}})
    there = Experiment.from_table({**table, "output": {"folder": str(tmp_path / "there")}})
    fedloom.run(here)
    federation = loopback(2)
    run_experiment(there, observer=Silent(), remote=federation.engine(there))
    states = [
        [event["state"] for event in events(tmp_path / name, "round")] for name in ("here", "there")
    ]
    assert states[0] == states[1]
    promises = [
        json.loads((tmp_path / name / "summary.json").read_text())["privacy"]
        for name in ("here", "there")
    ]
    assert promises[0]["clients"] == promises[1]["clients"] and promises[1]["seeded"]
    assert not (
        federation.home(0).path / "privacy"
    ).exists()  # nothing is promised, nothing is spent


def test_a_run_leaves_its_ledgers_with_the_clients_and_no_key_anywhere(private, loopback, call):
    experiment, federation = Experiment.from_table(private), loopback(2)
    result = run_experiment(experiment, observer=Silent(), remote=federation.engine(experiment))
    promise = json.loads((result.folder / "summary.json").read_text())["privacy"]
    for number in range(2):
        home = federation.home(number)
        (charged,) = ledger_of(home).runs()
        assert ledger_of(home).made(charged) == charged.steps == 4
        said = promise["clients"][str(number)]
        assert {name: said[name] for name in ("units", "steps", "sampling", "noise_multiplier")} == {
            "units": charged.units, "steps": 4, "sampling": 8 / charged.units, "noise_multiplier": 1.0,
        }  # fmt: skip
        assert not list((home.path / "privacy" / "keys").iterdir())
    assert "each client's word for its units" in " ".join(promise["sentences"])
    assert not [*result.folder.glob("privacy*"), *result.folder.parent.glob(".*.noise-key")]
    costs = [json.loads(line) for line in (result.folder / "costs.jsonl").read_text().splitlines()]
    of_clients = [cost for cost in costs if cost["client"] >= 0]
    assert {(cost["tokens"], cost["flops"]) for cost in of_clients} == {(0, 0)}
    assert {cost["examples"] for cost in of_clients if cost["phase"] == "train"} == {16}  # expected
    code, said = call("client", "budget", "--home", federation.home(0).path)
    assert code == 0 and "builtin:preferences: 28 rows" in said
    assert "epsilon" in said and "sets no bound" in said and "4 of at most 4 noisy steps" in said


def test_a_client_that_is_started_again_has_the_same_noise_for_the_same_request(private, server):
    """And a request that differs in anything has other noise, on other batches, and is spent again."""
    found = server()
    run, _, _ = found.join(private)
    key = found.federation.home(0).path / "privacy" / "keys" / run
    assert key.stat().st_mode & 0o777 == 0o600 and len(key.read_text()) == 64
    first, header = train(found, run)
    assert steps(found) == [2]
    again = server(found.federation)  # another process, after a kill
    assert again.join(private, run=run)[2].error is None
    second, repeated = train(again, run)
    assert repeated.payload == header.payload and torch.equal(first, second)
    assert steps(again) == [2]
    other, _ = train(again, run, change=1e-6)
    assert steps(again) == [4] and abs(alike(first, other)) < 0.3
    _, refused = train(again, run, rate=0.5)  # four are planned in two rounds
    assert refused.error == Sentence.SPENT.value and steps(again) == [4]


@pytest.mark.slow
def test_the_same_round_with_other_noise_or_another_rate_is_another_release(private, server):
    """Found: noise of two multipliers under one key would be one stream, scaled."""
    found = server()
    one = {**private, "training": {**private["training"], "local_steps": 1}}
    run, _, _ = found.join(one)
    first, _ = train(found, run)
    slower, _ = train(found, run, rate=0.5)
    assert steps(found) == [2] and abs(alike(first, slower)) < 0.3
    for count, changed in enumerate(({"noise_multiplier": 2.0}, {"clip": 0.5}), 3):
        again = server(found.federation)
        assert again.join({**one, "privacy": {**PRIVATE, **changed}}, run=run)[2].error is None
        second, _ = train(again, run)
        assert abs(alike(first, second)) < 0.3 and sum(steps(again)) == count
    again = server(found.federation)
    again.join({**one, "privacy": {**PRIVATE, "delta": 1e-4}}, run=run)  # the noise is the first's
    assert train(again, run)[1].error == Sentence.SPENT.value and sum(steps(again)) == 4


@pytest.mark.slow
def test_a_key_that_is_lost_makes_other_releases(private, server):
    found = server()
    run, _, _ = found.join(private)
    first, _ = train(found, run)
    for content in (None, "half a k"):
        key = found.federation.home(0).path / "privacy" / "keys" / run
        key.unlink() if content is None else key.write_text(content)
        again = server(found.federation)
        again.join({**private, "federation": {**private["federation"], "rounds": 9}}, run=run)
        second, _ = train(again, run)
        assert abs(alike(first, second)) < 0.3
    assert sum(steps(again)) == 6


def test_a_budget_holds_over_runs_and_coordinators(private, server, caplog, call):
    policy = {"privacy": {"max_epsilon": 3.5, "delta": 1e-3}}
    found = server(**policy)
    run, _, _ = found.join(private)
    for round in (1, 2):
        assert train(found, run, round)[1].error is None
    other = {**private, "federation": {**private["federation"], "seed": 9}}
    _, envelope, reply = found.join(other)
    assert reply.error == SPENT and reply.joined is None and not envelope.payload
    assert "of 3.5 is spent of these rows (delta 0.001)" in caplog.text
    assert "of its 4 noisy steps" in caplog.text
    assert len(ledger_of(found.federation.home(0)).runs()) == 1
    code, said = call("client", "budget", "--home", found.federation.home(0).path)
    assert code == 0 and "of 3.5 at delta 0.001" in said and "to 1" in said


@pytest.mark.slow
def test_a_damaged_ledger_ends_the_part_of_a_client_and_is_said(private, server, call):
    found = server()
    found.join(private)
    path = found.federation.home(0).path / "privacy" / "ledger.jsonl"
    path.write_text(path.read_text().replace('"steps": 4', '"steps": 9'))
    _, _, reply = server(found.federation).join(private)
    assert reply.error == Sentence.SPENT.value
    code, said = call("client", "budget", "--home", found.federation.home(0).path)
    assert code == 6 and "line 1 is not what was written" in said and "put back a copy" in said


def test_rows_that_cannot_be_hidden_so_are_refused_before_training(private, server, caplog):
    found = server()
    for changed, said in (({"delta": 0.5}, "0.5 is not below 1 /"), ({"column": "gone"}, "'gone'")):
        _, _, reply = found.join({**private, "privacy": {**PRIVATE, **changed}})
        assert reply.error in (Sentence.HIDING.value, Sentence.READING.value)
        assert said in caplog.text
    assert not (found.federation.home(0).path / "privacy").exists()


@pytest.mark.slow
def test_a_client_that_would_train_without_privacy_is_not_let_in(deployed):
    """A release before this one leaves [privacy] out of what it takes over."""

    def older(mail, federation):
        def tamper(node, envelope):
            header = envelope.read(ReplyHeader)
            if node != 101 or header.joined is None:
                return envelope
            joined = header.joined.model_copy(update={"private": None})
            changed = header.model_copy(update={"joined": joined})
            return resealed(federation, 1, changed, envelope.payload)

        mail.tamper = tamper

    with pytest.raises(RoundFailed, match=r"client 1.*would train without \[privacy\]: upgrade it"):
        deployed(2, older, privacy=PRIVATE, federation={"require": 2, "quorum": 1.0})


class Site:
    """A coordinator and two clients, each a process, whose files bound what may be spent of their rows."""

    def __init__(self, own, budget):
        self.own, self.budget = own, budget

    def run(self, table, name):
        """Run an experiment; return what the command said, with its exit code."""
        experiment = Experiment.from_table({**table, "name": name})
        path = self.own.folder / f"{name}.toml"
        path.write_text(experiment.to_toml())
        policy = {"privacy": {"max_epsilon": self.budget, "delta": 1e-3}}
        for client in range(2):
            client_file(
                self.own.folder / f"c{client}.toml", models=[experiment.model.path], policy=policy
            )
        folder = self.own.folder / "runs" / name
        return self.own.call(
            "run", path, "--engine", "flower", "--home", self.own.server,
            "--set", f"output.folder={folder}", check=False, timeout=300,
        )  # fmt: skip

    def lines(self, client):
        """Noisy steps that are in a client's ledger, read while it writes."""
        steps = (self.own.folder / f"c{client}" / "privacy" / "steps").glob("*.txt")
        return sum(path.read_bytes().count(b"\n") for path in steps)


@pytest.mark.slow
def test_a_client_that_is_killed_in_the_middle_never_counts_too_little(private):
    """Of 4 rounds of 20 steps; another run on the same rows is then refused."""
    once = epsilon([Releases(6.0, 8 / 28, 80)], 1e-3).epsilon
    table = {
        **private,
        "federation": {
            "rounds": 4,
            "clients": 2,
            "quorum": 0.5,
            "patience": 60.0,
            "deadline": 60.0,
        },
        "training": {**private["training"], "local_steps": 20},
        "privacy": {**PRIVATE, "noise_multiplier": 6.0},
    }
    with machines(2) as own:
        own.start_all()
        site, done = Site(own, 1.2 * once), []
        running = threading.Thread(target=lambda: done.append(site.run(table, "first")))
        running.start()
        end = time.monotonic() + 120
        while site.lines(1) < 25 and running.is_alive() and time.monotonic() < end:
            time.sleep(0.02)
        own.kill("c1")
        spent = site.lines(1)
        own.start_client(1)
        running.join(240)
        assert done and done[0].returncode == 0, done
        folder = own.folder / "runs" / "first"
        costs = [json.loads(line) for line in (folder / "costs.jsonl").read_text().splitlines()]
        answered = sum(
            cost["steps"] for cost in costs if cost["client"] == 1 and cost["phase"] == "train"
        )
        assert 25 <= spent <= site.lines(1) <= 80 and answered <= site.lines(1)
        assert site.lines(0) == 80
        promise = json.loads((folder / "summary.json").read_text())["privacy"]
        assert promise["epsilon"] == pytest.approx(
            epsilon([Releases(6.0, 8 / 28, 80)], 1e-3, "rdp").epsilon
        )
        hurried = {**table["federation"], "patience": 25.0}
        refused = site.run({**table, "federation": hurried}, "second")
        assert refused.returncode and SPENT in refused.stdout + refused.stderr
        said = own.call("client", "budget", "--home", own.folder / "c0").stdout
        assert f"epsilon {once:.4g} of {1.2 * once:g} at delta 0.001" in said
        assert "80 of at most 80 noisy steps" in said
