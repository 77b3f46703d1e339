"""Workers give the bits of one process, whatever the order of answers and whichever worker ends."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import psutil
import pytest

import fedloom
from engines.test_contract import training
from fedloom.accounting.costs import REFERENCE
from fedloom.engines.workers import TRIES
from fedloom.errors import RoundFailed, SettingsError
from fedloom.federation.compressed_exchange import Compression
from fedloom.federation.protocol import EVALUATE
from fedloom.federation.rounds import Server
from fedloom.runs.answer_order import order_of_answers
from fedloom.runs.assembly import assemble
from fedloom.runs.observers import Silent
from fedloom.runs.partitioning import partition_data
from fedloom.runs.run import resume_run, run_experiment
from fedloom.training.results import reported
from fedloom.wire.messages import Payload
from pools import with_pool
from sampling import sampled

METHODS = {
    "fedavg": {"objective": {"name": "dpo"}},
    "scaffold": {"method": {"name": "scaffold"}},
    "feddyn": {"method": {"name": "feddyn"}},
    "fedala": {"method": {"name": "fedala", "first_passes": 2}},
    "kto": {"objective": {"name": "kto"}},
    "split": {
        "method": {"name": "split", "cut": 1},
        "objective": {"name": "sft"},
        "data": {"source": "builtin:instructions"},
    },
    "fed_sb": {"method": {"name": "fed_sb", "factors": "weights"}},
    "fedmap": {"method": {"name": "fedmap"}},
    "regmean": {"method": {"name": "regmean", "rows": 4}},
    "fedkseed": {"method": {"name": "fedkseed", "sampling": "weighted"}},
    "fedbuff": {
        "method": {"name": "fedbuff", "concurrency": 2},
        "federation": {"clients_per_round": 1},
    },
    "variants of lora": {
        "adapter": {
            "use_dora": True,
            "init_lora_weights": "pissa",
            "modules_to_save": ["model.norm"],
        }
    },
    "fedpdpo": {"method": {"name": "fedpdpo"}, "objective": {"name": "pdpo"}},
}
"""What clients keep between rounds (scaffold, feddyn, fedala, fedpdpo), and within one (split), and what neither does."""


def played(settings, parts):
    """Play all rounds; return the digest of the state, what clients store, and the costs but for times."""
    costs = []
    server = Server(
        parts.method,
        parts.engine,
        settings.federation,
        lambda round: 1e-2,
        lambda state, round: None,
        lambda record, state: (costs.extend(record.costs), parts.engine.finish_round()),
        parts.ledger,
        Silent(),
        reported=reported(parts.objective),
        clock=order_of_answers(settings),
        compression=Compression.of(settings.wire, settings.federation.seed, parts.initial),
    )
    state = server.run(parts.method.initial_state(parts.initial))
    kept = {
        client: {name: tensor.tolist() for name, tensor in own.items()}
        for client, own in parts.local.store.flat().items()
    }
    counted = [(c.round, c.client, c.phase, c.bytes_up, c.bytes_down, c.flops) for c in costs]
    return state.digest(), kept, counted


def train_on(client, payload):
    """Train at a rate that depends on how often the client was asked in this round."""
    client.model.write(payload.tensors)
    asked = client.session["asked"] = client.session.get("asked", 0) + 1
    result = yield from client.training_steps(payload.numbers["learning_rate"] * asked)
    return Payload(client.model.read(), {"examples": len(client.share)}, result.metrics)


@pytest.mark.parametrize(
    ("asked", "dies", "units"),
    [
        # the session that is lost is needed one exchange later
        (((0, 1, 2), (2,), (0, 1)), [0, 0, 1], [(0, 1), (2,), (2,), (2,), (1,), (0,)]),
        # a session is made anew beside that of a client which was trained together with it
        (((0, 1), (0, 1), (0, 1)), [0, 1], [(0, 1), (1,), (1,), (0,), (1,), (0,)]),
    ],
)
def test_sessions_of_a_cohort_are_made_anew_one_by_one(experiment, asked, dies, units):
    settings = experiment(
        objective={"name": "sft"},
        data={"source": "builtin:instructions", "builtin_rows": 24},
        training={"local_steps": 1, "batch_size": 2},
        simulation={"cohort": 2},
    )

    def answers(parts):
        parts.local.handlers = {**parts.local.handlers, "train": train_on}
        return [
            (own.client, own.error, own.data)
            for clients in asked
            for own in parts.engine.exchange(training(parts, clients=clients))
        ]

    alone = answers(assemble(settings, partition_data(settings)))
    assert all(error is None for _, error, _ in alone)
    parts, pool = with_pool(settings, size=1, dies=dies, handlers={"train": train_on})
    assert answers(parts) == alone
    assert pool.units == units


@pytest.mark.parametrize("name", METHODS)
def test_any_order_of_answers_and_any_death_give_the_bits_of_one_process(experiment, name):
    settings = experiment(**METHODS[name], training={"local_steps": 2})
    alone = played(settings, assemble(settings, partition_data(settings)))
    dies = [False, True, False, False, True]
    parts, _ = with_pool(settings, seed=3, dies=dies)
    assert played(settings, parts) == alone


def test_the_longest_is_begun_first_and_answers_come_in_the_order_of_requests(experiment):
    settings = experiment(
        partition={"kind": "size", "sizes": [8, 24, 16]},
        training={"local_epochs": 1},
    )
    parts, pool = with_pool(settings, size=1)
    answers = [answer.client for answer in parts.engine.exchange(training(parts))]
    sizes = parts.local.sizes()
    assert answers == [0, 1, 2] and len(set(sizes.values())) > 1
    assert [sizes[client] for client in pool.order] == sorted(sizes.values(), reverse=True)


def test_a_reference_is_computed_once_whoever_asks(experiment):
    settings = experiment(training={"local_steps": 1})
    parts, _ = with_pool(settings, seed=1)
    for round in (1, 2, 3):
        list(parts.engine.exchange(training(parts, round)))
    scored = [cost.client for cost in parts.ledger.take() if cost.phase == REFERENCE]
    assert sorted(scored) == [0, 1, 2]


def test_work_that_ends_its_worker_three_times_ends_the_round(experiment):
    settings = experiment(training={"local_steps": 1})
    parts, _ = with_pool(settings, size=1, dies=[True] * TRIES)
    with pytest.raises(RoundFailed, match=r"ended its worker 3 times, the last time by signal 9"):
        list(parts.engine.exchange(training(parts)))
    parts, _ = with_pool(settings, size=1, dies=[True] * (TRIES - 1))
    assert all(answer.error is None for answer in parts.engine.exchange(training(parts)))


def test_a_worker_that_ends_with_nothing_to_do_is_replaced(experiment):
    settings = experiment(training={"local_steps": 1})
    parts, pool = with_pool(settings, size=2, idle_dies=1)
    assert [a.client for a in parts.engine.exchange(training(parts, clients=(1,)))] == [1]
    assert pool.idle_dies == 0


def test_log_probs_are_sent_to_a_worker_that_only_evaluated(experiment):
    """A worker that has had a client, and no log-probs of it, is sent them when they are known."""
    settings = experiment(training={"local_steps": 1})
    parts, _ = with_pool(settings, size=2, seed=1)
    engine = parts.engine
    list(engine.exchange(replace(training(parts, 0), action=EVALUATE)))  # nothing is scored
    for round in (1, 2, 3, 4):
        list(engine.exchange(training(parts, round)))
    scored = [cost.client for cost in parts.ledger.take() if cost.phase == REFERENCE]
    assert sorted(scored) == [0, 1, 2]


def test_answers_to_what_was_given_up_do_not_count(experiment):
    settings = experiment(training={"local_steps": 1})
    parts, _ = with_pool(settings, size=2)
    begun = parts.engine.exchange(training(parts))
    next(begun)
    begun.close()
    parts.ledger.take()
    assert [answer.client for answer in parts.engine.exchange(training(parts, 2))] == [0, 1, 2]
    assert {cost.round for cost in parts.ledger.take()} == {2}


def test_more_workers_than_memory_are_refused_with_the_number_that_fits(experiment, monkeypatch):
    class Little:
        available = 1.2e9

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Little)
    with pytest.raises(
        SettingsError, match=r"--workers 9: .* GB for workers .*: at most [1-3] fit"
    ):
        run_experiment(experiment(), observer=Silent(), workers=9)


def test_a_number_that_is_none_is_refused(call, experiment, tmp_path):
    file = tmp_path / "e.toml"
    file.write_text(experiment().to_toml())
    for wrong in ("0", "-2", "many", "1.5"):
        code, told = call("run", str(file), "--workers", wrong)
        assert code == 2 and "--workers" in told and wrong in told
    for wrong in (0, "4", True):
        with pytest.raises(
            SettingsError, match=rf"workers = {wrong!r}: give a number from 1, or \"auto"
        ):
            fedloom.run(experiment(), workers=wrong)


@pytest.mark.slow
def test_what_cannot_be_given_to_workers_is_said(experiment):
    from fedloom.objectives import DPO

    class Own(DPO):
        pass

    with pytest.raises(SettingsError, match=r"objective or source of your own cannot be given"):
        run_experiment(experiment(), observer=Silent(), objective=Own(), workers=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", sampled(METHODS, 2))
def test_processes_give_the_bits_of_one(experiment, tmp_path, name):
    settings = experiment(
        **METHODS[name], training={"local_steps": 2}, output={"folder": str(tmp_path / "one")}
    )
    one = run_experiment(settings, observer=Silent())
    settings = experiment(
        **METHODS[name], training={"local_steps": 2}, output={"folder": str(tmp_path / "two")}
    )

    def kill():
        """End a worker in the midst of its work, twice."""
        for _ in range(2):
            time.sleep(1.5)
            hosts = psutil.Process().children()
            workers = [own for host in hosts for own in host.children()]
            if workers:
                workers[0].kill()

    killer = threading.Thread(target=kill)
    killer.start()
    two = run_experiment(settings, observer=Silent(), workers=2)
    killer.join()
    assert two.metrics == one.metrics
    for file in sorted((tmp_path / "one").rglob("*.safetensors")):
        other = tmp_path / "two" / file.relative_to(tmp_path / "one")
        assert other.read_bytes() == file.read_bytes(), file
    assert not [
        p for p in psutil.Process().children(recursive=True) if "workers" in str(p.cmdline())
    ]


@pytest.mark.slow
def test_ctrl_c_leaves_no_process_and_the_run_goes_on(experiment, tmp_path):
    settings = experiment(
        federation={"rounds": 12},
        output={"folder": str(tmp_path / "run")},
        training={"local_steps": 4},
    )
    file = tmp_path / "e.toml"
    file.write_text(settings.to_toml())
    command = [sys.executable, "-m", "fedloom", "run", str(file), "--workers", "2"]
    run = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        # what a shell starts in the background, as these tests may be, ignores Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    rounds = tmp_path / "run" / "rounds.jsonl"
    deadline = time.monotonic() + 120
    while not rounds.exists() or len(rounds.read_text().splitlines()) < 3:
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    started = psutil.Process(run.pid).children(recursive=True)
    assert len(started) >= 3  # the host and two workers
    os.killpg(run.pid, signal.SIGINT)
    assert run.wait(60) == 130
    _, alive = psutil.wait_procs(started, 15)
    assert not alive
    settings = experiment(
        federation={"rounds": 12},
        output={"folder": str(tmp_path / "whole")},
        training={"local_steps": 4},
    )
    whole = run_experiment(settings, observer=Silent())
    resumed = resume_run(tmp_path / "run", workers=2)
    assert resumed.metrics == whole.metrics
