"""What every engine must do, asked of all: another one would be added here and nowhere else."""

import gc
import warnings
from dataclasses import replace

import pytest
import torch

from fedloom.accounting.ledger import Ledger
from fedloom.deployment.error_report import Sentence
from fedloom.engines.ray_pool import RayCluster
from fedloom.engines.workers import WorkersEngine
from fedloom.federation.engine import RunDescription
from fedloom.federation.presence import Membership
from fedloom.methods.bases.parameter_averaging import EXAMPLES, LEARNING_RATE
from fedloom.runs.assembly import assemble
from fedloom.runs.observers import Silent
from fedloom.runs.partitioning import partition_data
from fedloom.runs.ray_workers import with_ray
from fedloom.runs.workers import WorkerTask, task_with_digests
from fedloom.training.results import reported
from fedloom.wire.messages import Exchange, Payload, decode
from fedloom.wire.schema import Schema
from pools import with_pool


def run_description(experiment, parts, began=(-1,), audit=lambda *a, **k: None):
    classes = parts.division.classes
    return RunDescription("0" * 32, experiment.to_toml(), classes, parts.model_digest, began, audit)


@pytest.fixture(scope="module")
def ray_cluster():
    """Ray on this machine, with two CPUs."""
    pytest.importorskip("ray", reason="the extra fedloom[ray] is not installed")
    cluster = RayCluster(None, 2)
    yield cluster
    cluster.close()
    with warnings.catch_warnings():  # Ray ends its processes and lets go of them without a look
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def engine_on_ray(settings, cluster, once):
    """Return a run's parts whose engine has actors of Ray, which all tests share."""
    parts = assemble(settings, partition_data(settings))
    task = task_with_digests(WorkerTask(settings, None, None, None), parts)
    pool = once("actors", lambda: with_ray(parts, 2, cluster, task, Silent()).engine.pool)
    return replace(parts, engine=WorkersEngine(parts.local, pool))


RAY = pytest.param("ray", marks=[pytest.mark.slow, pytest.mark.serial])


@pytest.fixture(params=["simulation", "workers", RAY, "flower"])
def engine(request, experiment, once):
    """An engine with three clients that is ready, and its parts."""
    settings = experiment(training={"local_steps": 1}, federation={"patience": 0.5})
    if request.param == "simulation":
        parts = assemble(settings, partition_data(settings))
        return parts.engine, parts
    if request.param == "workers":
        parts, _ = with_pool(settings)
        return parts.engine, parts
    if request.param == "ray":
        parts = engine_on_ray(settings, request.getfixturevalue("ray_cluster"), once)
        return parts.engine, parts
    remote = request.getfixturevalue("loopback")(3).engine(settings)
    parts = assemble(settings, partition_data(settings), remote=remote)
    remote.begin(run_description(settings, parts), parts.ledger)
    return remote, parts


def training(parts, round=1, clients=(0, 1, 2)):
    """What FedAvg asks in a round, and the replies' schema."""
    adapter = parts.initial
    payload = Payload(adapter, {"learning_rate": 1e-3})
    schema = Schema.of(adapter, (LEARNING_RATE,))
    reply = Schema.of(adapter, (EXAMPLES,), reported(parts.objective))
    return Exchange.broadcast("train", round, clients, payload, schema, reply)


def says(engine, answer, word):
    """Whether an answer's error has a word; between machines it is one of few sentences instead."""
    between = getattr(engine, "name", "") == "flower"
    return (Sentence.UNFIT.value if between else word) in answer.error


def test_it_knows_the_rows_of_each_client(engine):
    found, parts = engine
    assert found.sizes() == {c: len(rows) for c, rows in divide_rows(parts).items()}


def test_it_knows_who_belongs_to_the_federation(engine):
    found, parts = engine
    rows = {client: len(own) for client, own in divide_rows(parts).items()}
    assert found.membership() == Membership((0, 1, 2), frozenset(), rows)


def divide_rows(parts):
    return parts.division.train


def test_each_client_asked_answers_once_with_what_fits(engine):
    found, parts = engine
    exchange = training(parts)
    answers = {answer.client: answer for answer in found.exchange(exchange)}
    assert sorted(answers) == [0, 1, 2]
    for answer in answers.values():
        assert answer.error is None
        decode(answer.data, exchange.reply_schema)


def test_who_is_not_asked_does_not_answer(engine):
    found, parts = engine
    (answer,) = found.exchange(training(parts, clients=(1,)))
    assert answer.client == 1


def test_what_fails_on_a_client_is_an_answer_that_says_so(engine):
    found, parts = engine
    exchange = training(parts)
    broken = replace(exchange, requests={**exchange.requests, 1: b"not a payload"})
    answers = {answer.client: answer for answer in found.exchange(broken)}
    assert answers[1].data is None and says(found, answers[1], "payload")
    assert answers[0].data is not None and answers[2].data is not None


def test_an_action_that_there_is_not_fails_and_no_more(engine):
    found, parts = engine
    answers = list(found.exchange(replace(training(parts), action="dance")))
    assert len(answers) == 3
    assert all(a.data is None and says(found, a, "dance") for a in answers)


def test_costs_of_the_work_reach_the_ledger(engine):
    found, parts = engine
    exchange = training(parts)
    sizes = {a.client: len(a.data) for a in found.exchange(exchange)}
    found.finish_round()
    costs = {c.client: c for c in parts.ledger.take() if c.phase == "train"}
    assert {c: cost.bytes_up for c, cost in costs.items()} == sizes
    assert {c: cost.bytes_down for c, cost in costs.items()} == {
        c: len(data) for c, data in exchange.requests.items()
    }
    assert all(
        cost.steps == 1 and cost.flops > 0 and cost.exchanges == 1 for cost in costs.values()
    )


def test_both_give_the_same_bits(experiment, loopback):
    settings = experiment(training={"local_steps": 2})
    here = assemble(settings, partition_data(settings))
    remote = loopback(3).engine(settings)
    there = assemble(settings, partition_data(settings), remote=remote)
    remote.begin(run_description(settings, there), Ledger())
    assert there.engine.sizes() == here.engine.sizes()
    assert all(torch.equal(here.initial[name], there.initial[name]) for name in here.initial)
    left = {a.client: a.data for a in here.engine.exchange(training(here))}
    right = {a.client: a.data for a in there.engine.exchange(training(there))}
    assert left == right
