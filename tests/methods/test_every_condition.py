"""Every method of the registry under every condition that must not change what comes of it.

Clients come late, answer late, go and come back (``absent.ALL_OF_IT``), and tensors are compressed where the
method allows it, while

- workers do the clients' work, and some of them end in its midst
- the run is stopped in the midst of a round and goes on
- clients are on other machines, and all machines are started anew in the midst of a round
- clients are trained together, alone and by workers
- answers are summed securely, by workers and with clients that are trained together

All but what is trained together is the same to the bit. Methods that take answers one by one
(``asynchronous``) are compared between machines by a replay, in ``test_fedbuff_on_machines.py``.
"""

import inspect
import json

import pytest
import torch

from absent import ALL_OF_IT, CLIENTS, ROUNDS, AbsentEngine, Schedule, absent_on_machines, played
from fedloom.errors import Interrupted, SettingsError
from fedloom.experiment.experiment import Experiment
from fedloom.methods import METHODS
from fedloom.runs.observers import Silent
from fedloom.runs.run import _Given, resume_run, run_experiment
from fedloom.security.audit_log import events
from fedloom.storage import checkpoint
from loopback import builtin
from pools import with_pool
from sampling import drawn, sampled

STRONG = {"up": ["ternary:nearest", "zstd"], "down": "int4", "keep_plain_below": 0}
GENTLE = {"up": "int8", "down": "int8", "keep_plain_below": 0}
"""Of methods that need some bits of each number."""

FEW_AWAY = Schedule(away={2: {1}}, late={1: {0}})
"""So many are left in each of two rounds that their sum shows none of them."""

SETTINGS = {"fedbiscuit": {"selectors": 2}, "fedala": {"first_passes": 2}}

PLAIN_STEPS = {"optimizer": "sgd", "learning_rate": 0.2}
"""Adam divides by the gradient's own size, and so magnifies rounding."""

DIES = [False, True, *[False] * 5, True]


class Stop(Silent):
    """Stops a run when so many answers of a round have come."""

    def __init__(self, round, answers):
        self.round, self.left = round, answers

    def client_done(self, round, client, done, of):
        self.left -= round == self.round
        if self.left == 0:
            raise KeyboardInterrupt


def kind_of(method):
    return METHODS[method][1]


def schedule_of(method):
    return Schedule() if method == "centralised" else ALL_OF_IT  # its one client is there


@pytest.fixture
def made(suited, tmp_path):
    """Make the experiment of a method, with all that it keeps and compresses."""

    def make(method, folder="run", codecs=True, **sections):
        table = suited(method)
        table["federation"] |= {
            "clients": CLIENTS, "rounds": ROUNDS, "quorum": 0.2, "require": 1, "patience": 0.2,
            "deadline": 0.2,
        }  # fmt: skip
        table["method"] |= SETTINGS.get(method, {})
        table["data"]["builtin_rows"] = 40
        table["training"] |= {"local_steps": 1, "keep_optimizer_state": True}
        table["evaluation"] = {"samples": 0, "per_client": False, "every": ROUNDS}
        table["output"] = {"folder": str(tmp_path / folder), "verify": False}
        declared = kind_of(method).declares
        if codecs and declared.compression.holds:
            table["wire"] = GENTLE if declared.compression_bits else STRONG
        for name, own in sections.items():
            table[name] = {**table.get(name, {}), **own}
        try:
            return Experiment.from_table(table)
        except SettingsError as error:
            if "training.keep_optimizer_state" not in str(error):
                raise
            del table["training"]["keep_optimizer_state"]
            return Experiment.from_table(table)

    return make


@pytest.fixture(scope="module")
def last():
    """The method that was played last in one process, and what came of it."""
    return {}


@pytest.fixture
def alone(made, last):
    """Play a method in one process, once for all of its conditions that follow each other."""

    def play(method):
        if method not in last:
            last.clear()
            last[method] = played(made(method), schedule_of(method))
        return last[method]

    return play


def bits(stores):
    """The bits of what clients keep, by client and name."""
    kept = {client: stores[client] for client in sorted(stores)}
    return {
        client: {name: (t.dtype, t.shape, t.numpy().tobytes()) for name, t in sorted(own.items())}
        for client, own in kept.items()
    }


def costs_of(record):
    """What clients sent and did."""
    return sorted(
        (c.client, c.phase, c.bytes_up, c.bytes_down, c.flops, c.steps, c.examples, c.exchanges)
        for c in record.costs
    )


def outcome(found):
    """All that must be the same to the bit."""
    records = [(r.clients, r.rejected, r.train, r.client_train, r.details) for r in found.records]
    states = [state.digest() for state in found.states]
    return (
        states,
        records,
        [costs_of(r) for r in found.records],
        bits(found.parts.local.store.flat()),
    )


def states(folder):
    return [event["state"] for event in events(folder, "round")][1:]


def by_workers(made, method, alone):
    experiment, schedule = made(method), schedule_of(method)
    parts, _ = with_pool(experiment, seed=3, dies=DIES)
    assert outcome(played(experiment, schedule, parts)) == outcome(alone(method))


def moment(method):
    """The round in which a run is stopped, and after how many answers: others with every commit."""
    rng = drawn("stopped", method)
    return rng.randint(1, ROUNDS), 1 if method == "centralised" else rng.randint(1, 2)


def resumed(made, method, alone, monkeypatch, tmp_path):
    experiment, schedule = made(method), schedule_of(method)
    expected = alone(method)
    began, rounds = [0], moment(method)
    monkeypatch.setattr(
        _Given, "engine", lambda own, parts: AbsentEngine(parts.engine, schedule, began[0])
    )
    with pytest.raises(Interrupted):
        run_experiment(experiment, observer=Stop(*rounds))
    folder = tmp_path / "run"
    began[0] = rounds[0] - 1
    resume_run(folder, observer=Silent())
    assert states(folder) == [state.digest() for state in expected.states]
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    mark = json.loads((newest / "state.json").read_text())["fingerprint"]
    saved = checkpoint.load(folder / "checkpoints", mark).clients
    assert bits(saved) == bits(expected.parts.local.store.flat())


def between_machines(made, method, alone, loopback, tmp_path):
    experiment, schedule = made(method), schedule_of(method)
    expected, federation = alone(method), loopback(CLIENTS)
    mail, stop = federation.mail(source=builtin(experiment)), moment(method)
    absent_on_machines(mail, federation, schedule)
    with pytest.raises(Interrupted):
        run_experiment(experiment, observer=Stop(*stop), remote=federation.engine(experiment, mail))
    mail.done = stop[0] - 1
    mail.pushed.clear()
    for node in mail.workers:
        mail.workers[node] = federation.worker(node - 100, source=builtin(experiment))
    folder = tmp_path / "run"
    resume_run(folder, observer=Silent(), remote=federation.engine(experiment, mail))
    assert states(folder) == [state.digest() for state in expected.states]


def numbers_of(found):
    """All tensors of the server after the last round, and of clients' stores."""
    store = found.parts.local.store.flat()
    kept = {f"{c} {name}": t for c in store for name, t in dict(store[c]).items()}
    return {**found.states[-1].tensors, **kept}


def require_close(one, other, start):
    """Require that what was computed in another order is the same but for rounding."""
    left, right = numbers_of(one), numbers_of(other)
    assert left.keys() == right.keys()
    apart, moved = 0.0, 0.0
    for name, tensor in left.items():
        assert tensor.shape == right[name].shape
        before = start.get(name, torch.zeros(()))
        apart += float((tensor.double() - right[name].double()).square().sum())
        moved += float((tensor.double() - before.double()).square().sum())
    assert (apart / moved) ** 0.5 < 1e-4, f"{(apart / moved) ** 0.5:.3g}"
    for record, found in zip(one.records, other.records, strict=True):
        assert costs_of(record) == costs_of(found)
        assert record.client_train.keys() == found.client_train.keys()
        for client, own in record.client_train.items():
            assert found.client_train[client] == pytest.approx(own, rel=1e-3, abs=1e-4)


def together(made, method):
    schedule, alike = schedule_of(method), {"codecs": False, "training": PLAIN_STEPS}
    alone = played(made(method, **alike), schedule)
    experiment = made(method, **alike, simulation={"cohort": CLIENTS})
    found = played(experiment, schedule)
    require_close(alone, found, alone.parts.method.initial_state(alone.parts.initial).tensors)
    parts, _ = with_pool(experiment, seed=3, dies=DIES)
    assert outcome(played(experiment, schedule, parts)) == outcome(found)


def summed(made, method):
    private = {
        "codecs": False,
        "privacy": {"secure_aggregation": True, "sum_rounding": "nearest", "sum_bits": 20},
        "training": PLAIN_STEPS,
        "federation": {"quorum": 0.5, "rounds": 2},
    }
    if method == "fedpdpo":
        private["objective"] = {"name": "pdpo"}
    alone = played(made(method, **private), FEW_AWAY)
    parts, _ = with_pool(made(method, **private), seed=3, dies=DIES)
    assert outcome(played(made(method, **private), FEW_AWAY, parts)) == outcome(alone)
    experiment = made(method, **private, simulation={"cohort": CLIENTS})
    found = played(experiment, FEW_AWAY)
    require_close(alone, found, alone.parts.method.initial_state(alone.parts.initial).tensors)
    parts, _ = with_pool(experiment, seed=3, dies=DIES)
    assert outcome(played(experiment, FEW_AWAY, parts)) == outcome(found)


CONDITIONS = {
    "workers": by_workers,
    "resumed": resumed,
    "machines": between_machines,
    "together": together,
    "summed": summed,
}


def applies(method, condition):
    """Whether a method takes part in a condition, by its own word."""
    kind = kind_of(method)
    if condition == "machines":
        return method != "centralised" and not kind.asynchronous
    if condition == "summed":
        return kind.declares.secure_aggregation.holds and not kind.own_models
    return True


CELLS = [(m, c) for m in sorted(METHODS) for c in CONDITIONS if applies(m, c)]


@pytest.mark.parametrize("case", sampled(CELLS, 6), ids=" ".join)
def test_a_method_is_the_same_under_a_condition(request, case):
    method, condition = case
    play = CONDITIONS[condition]
    given = {
        name: request.getfixturevalue(name)
        for name in inspect.signature(play).parameters
        if name != "method"
    }
    play(method=method, **given)
